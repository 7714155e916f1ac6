"""Kronecker-projected per-sample gradients, for stores and search."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from ghost_core import (
    Batch,
    CaptureError,
    Engine,
    EngineOptions,
    InputFactor,
    Pass,
    PerSampleGradient,
    Projection,
    Record,
    TrackedParameter,
    UnknownNameError,
)
from ghost_core.algebra import accumulation_dtype, matrix_shape
from ghost_core.arguments import whole
from ghost_core.plugins import installed
from ghost_engines.blocks import Block, arrange
from ghost_engines.random_modules import drawing, random_modules
from ghost_engines.results import Result, layers
from ghost_engines.store import STORAGE_DTYPES


@dataclass(frozen=True, kw_only=True, repr=False)
class ProjectedRows(Result):
    """Projected gradients of a batch: of each sample's contribution to the backpropagated loss.

    Backpropagate the sum of per-sample losses to get each sample's own gradient.

    Attributes:
        rows: `[N, k_total]` in the storage dtype.
        layout: Which columns belong to which parameter.
        random: Names of modules that dropped something at random, as dropout in training mode:
            the rows are those of one draw.
        manifest: The engine's manifest, by which a store tells rows of other engines; None for
            rows that were put together by hand.
    """

    rows: Tensor
    layout: tuple[Block, ...]
    random: tuple[str, ...] = ()
    manifest: Mapping[str, Any] | None = None

    @property
    def total(self) -> Tensor:
        """The rows, `[N, k_total]`: whole gradients, projected."""
        return self.rows

    @property
    def by_parameter(self) -> dict[str, Tensor]:
        """Columns of each parameter, `[N, k_left · k_right]`."""
        return {block.parameter: self.rows[:, block.columns] for block in self.layout}

    @property
    def by_layer(self) -> dict[str, Tensor]:
        """Columns of the parameters that one module owns, side by side."""
        parts = self.by_parameter
        return {
            layer: torch.cat([parts[name] for name in names], dim=1)
            for layer, names in layers(parts).items()
        }

    def _facts(self) -> list[str]:
        columns, dtype = self.rows.shape[1], str(self.rows.dtype).removeprefix("torch.")
        return [*super()._facts(), f"{len(self.layout)} parameters", f"k_total={columns}", dtype]


@dataclass(frozen=True)
class _Maps:
    """A parameter's maps, `[k, n]`; None where an axis keeps all its dimensions."""

    left: Tensor | None
    right: Tensor | None


class ProjectionEngine(Engine[ProjectedRows]):
    """Projects each per-sample gradient G to `L G Rᵀ` without ever building G.

    L and R are random maps with `E[LᵀL] = E[RᵀR] = I`, so that inner products of rows estimate
    inner products of gradients. The input side is compressed in the forward pass, the output side
    in the backward pass, and an axis that is not longer than its share is kept as it is.

    In a training loop it leaves training bit-identical. Under `frozen()` it makes no weight
    gradients, which is less work than a training step. The rows are the same.

    Args:
        model: The module that is called.
        dim: Dimensions per parameter, k_left · k_right, about. 256 if `total_dim` is not given.
        total_dim: Dimensions of a whole row instead, shared out over the parameters.
        min_dim: The least that an axis is projected to, if it has as many dimensions.
        seed: Seed of the maps. Each depends on it and on the parameter's name alone, so that all
            processes draw the same.
        init: Name of the projection: `gaussian`, `rademacher`, `orthonormal` or a plugin's.
        dtype: Storage dtype of the rows, or its name, whatever the model's dtype is. Rows are
            computed in float32 at least; one that overflows the storage dtype is an error.
        options: What all engines take: see `Engine`.

    Raises:
        UnknownNameError: If a glob matches nothing, or `init` or `dtype` does not exist.
        CaptureError: If the dimensions are not positive or do not fit.
        UnsupportedLayerError: If a selected parameter belongs to a module without a sampler.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        dim: int | None = None,
        total_dim: int | None = None,
        min_dim: int = 8,
        seed: int = 0,
        init: str = "gaussian",
        dtype: torch.dtype | str = torch.float32,
        **options: Unpack[EngineOptions],
    ) -> None:
        super().__init__(model, **options)
        if dim is None and total_dim is None:
            dim = 256
        self.dtype = _storage_dtype(dtype)
        self.seed = whole("seed", seed)
        self.init = init
        self.layout: tuple[Block, ...] = arrange(
            self.parameters, dim=dim, total_dim=total_dim, min_dim=min_dim
        )
        self._blocks = {block.parameter: block for block in self.layout}
        with installed().blame("projection", init):
            projection = installed().projection(init)()
            self._maps = {
                each.name: _draw(projection, self.seed, each, self._blocks[each.name])
                for each in self.parameters
            }
        self._rows = torch.empty(0)
        self._random = random_modules(model)
        self._manifest = self.manifest()

    @property
    def k_total(self) -> int:
        """Number of columns of a row."""
        return sum(block.size for block in self.layout)

    def maps(self, name: str) -> tuple[Tensor, Tensor]:
        """Return a parameter's maps L `[k_left, n_left]` and R `[k_right, n_right]`.

        Raises:
            UnknownNameError: If the parameter is not tracked.
        """
        if name not in self._maps:
            raise UnknownNameError("parameter", name, self._maps)
        parameter = next(each for each in self.parameters if each.name == name)
        maps, dtype = self._maps[name], accumulation_dtype(parameter.dtype)
        left, right = (
            torch.eye(size, dtype=dtype, device=parameter.device) if drawn is None else drawn
            for drawn, size in zip(
                (maps.left, maps.right), matrix_shape(parameter.shape), strict=True
            )
        )
        return left, right

    def project(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """Project gradients given by parameter, as rows to search with.

        Args:
            gradients: `[Q, *shape]` for each tracked parameter by name.

        Returns:
            `[Q, k_total]`, float32 or float64.

        Raises:
            CaptureError: If a tracked parameter is missing or has another shape.
        """
        parts = []
        for block in self.layout:
            gradient = gradients.get(block.parameter)
            if gradient is None or gradient.shape[1:] != block.shape:
                found = "missing" if gradient is None else f"of shape {tuple(gradient.shape)}"
                raise CaptureError(
                    f"the gradient of {block.parameter} is {found}; needed: [Q, "
                    f"{', '.join(map(str, block.shape))}]"
                )
            left, right = self.maps(block.parameter)
            matrix = (
                gradient.detach().reshape(len(gradient), *matrix_shape(block.shape)).to(left.dtype)
            )
            parts.append((left @ matrix @ right.mT).flatten(1))
        return torch.cat(parts, dim=1)

    def manifest(self) -> dict[str, Any]:
        """Return, as JSON-able values, everything here that changes a value of a row."""
        return {
            "projection": self.init,
            "seed": self.seed,
            "dtype": str(self.dtype).removeprefix("torch."),
            "verified": self.verifies,
            "layers": [block.manifest() for block in self.layout],
        }

    def on_start(self, batch: Batch[ProjectedRows]) -> None:
        """Make room for the rows."""
        dtype = accumulation_dtype(*(parameter.dtype for parameter in self.parameters))
        self._rows = torch.zeros(
            batch.n, self.k_total, dtype=dtype, device=self.parameters[0].device
        )

    def on_input(self, parameter: TrackedParameter, record: Record) -> Record:
        """Compress the input side, where that makes it smaller."""
        maps = self._maps[parameter.name]
        if not isinstance(record, InputFactor):
            return record
        seen = maps.left if record.transposed else maps.right
        return record if seen is None else record.compress(seen)

    def on_gradient(
        self, pass_: Pass, parameter: TrackedParameter, gradient: PerSampleGradient
    ) -> None:
        """Compress the output side and sum over tokens."""
        maps, block = self._maps[parameter.name], self._blocks[parameter.name]
        projected = gradient.project(maps.left, maps.right)
        self._rows[pass_.samples, block.columns] += projected.flatten(1).to(self._rows)

    def on_end(self, batch: Batch[ProjectedRows]) -> ProjectedRows:
        """Return the rows in the storage dtype."""
        exact = self._rows / self.loss_scale
        rows = exact.to(self.dtype)
        lost = exact.isfinite().all(1) & ~rows.isfinite().all(1)
        if lost.any():
            raise CaptureError(
                f"the rows of samples {batch.ids[lost.cpu()].tolist()} overflow {self.dtype}: "
                "choose another dtype, or scale the loss"
            )
        return ProjectedRows(
            ids=batch.ids,
            verified=batch.verified,
            rows=rows,
            layout=self.layout,
            random=drawing(self._random),
            manifest=self._manifest,
        )

    def on_close(self) -> None:
        """Let go of the rows."""
        self._rows = torch.empty(0)


def _storage_dtype(dtype: torch.dtype | str) -> torch.dtype:
    if isinstance(dtype, str):
        if dtype not in STORAGE_DTYPES:
            raise UnknownNameError("dtype", dtype, STORAGE_DTYPES)
        return STORAGE_DTYPES[dtype]
    if dtype not in STORAGE_DTYPES.values():
        raise UnknownNameError("dtype", str(dtype), STORAGE_DTYPES)
    return dtype


def _draw(projection: Projection, seed: int, parameter: TrackedParameter, block: Block) -> _Maps:
    n_left, n_right = matrix_shape(parameter.shape)
    dtype = accumulation_dtype(parameter.dtype)

    def side(name: str, k: int, n: int) -> Tensor | None:
        if k == n:
            return None
        drawn = projection.draw(k, n, _generator(seed, parameter.name, name))
        return drawn.to(parameter.device, dtype)

    return _Maps(side("left", block.k_left, n_left), side("right", block.k_right, n_right))


def _generator(seed: int, parameter: str, side: str) -> torch.Generator:
    """Seed a generator from names, which unlike positions are equal in every process."""
    digest = hashlib.sha256(f"{seed}/{parameter}/{side}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
