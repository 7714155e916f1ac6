"""Kronecker-projected per-sample gradients, for stores and search."""

from __future__ import annotations

import glob
from collections.abc import Mapping
from contextlib import nullcontext
from types import MappingProxyType
from typing import Any, Self, Unpack

import torch
from torch import Tensor, nn

from ghost_core import (
    Batch,
    CaptureError,
    EngineOptions,
    Pass,
    PerSampleGradient,
    Projection,
    Record,
    TrackedParameter,
    UnknownNameError,
)
from ghost_core.algebra import accumulation_dtype
from ghost_core.arguments import switch, whole
from ghost_core.plugins import installed
from ghost_core.tracking import Patterns, as_patterns, select_parameters
from ghost_engines.blocks import Block, Dim, arrange
from ghost_engines.maps import digest, draw
from ghost_engines.projected import ProjectedRows
from ghost_engines.projections import described, resolve
from ghost_engines.random_modules import drawing, random_modules
from ghost_engines.store import STORAGE_DTYPES
from ghost_engines.weighing import LossWeights, WeighingEngine


class ProjectionOptions(EngineOptions, total=False):
    """The options of `ProjectionEngine`, which says what they mean."""

    dim: Dim | None
    total_dim: int | None
    min_dim: int
    dims: Mapping[str, Dim]
    sketch: Patterns
    seed: int
    init: str | Projection | type[Projection]
    dtype: torch.dtype | str
    loss_weights: LossWeights | None
    unit_norm: bool


class ProjectionEngine(WeighingEngine[ProjectedRows]):
    """Projects each per-sample gradient G to `L G Rᵀ` without ever building G.

    L and R are random maps with `E[LᵀL] = E[RᵀR] = I`, so that inner products of rows estimate
    inner products of gradients. The input side is compressed in the forward pass, the output side
    in the backward pass, and an axis that is not longer than its share is kept as it is.

    In a training loop it leaves training bit-identical. Under `frozen()` it makes no weight
    gradients, which is less work than a training step. The rows are the same.

    Args:
        model: The module that is called.
        dim: Dimensions per parameter, k_left · k_right, about; "whole" keeps gradients as they
            are. 256 if `total_dim` is not given.
        total_dim: Dimensions of a whole row instead, shared out over the parameters.
        min_dim: The least that an axis is projected to, if it has as many dimensions.
        dims: Dimensions of some parameters, by glob over names of parameters and modules; later
            ones win. As `dim`, or just `(k_left, k_right)`. 0 leaves parameters out, as `exclude`
            does, whatever else is said of them.
        sketch: Globs: the gradients of which parameters to sketch as a whole, and not side by
            side. It is meant for those that are no sums of outer products, as of norms, biases and
            bare parameters: others are built for it.
        seed: Seed of the maps. Each depends on it and on the parameter's name alone, so that all
            processes draw the same.
        init: The projection: the name of one, `gaussian`, `rademacher`, `orthonormal` or a
            plugin's; a `Projection`, or a class of them.
        dtype: Storage dtype of the rows, or its name, whatever the model's dtype is. Rows are
            computed in float32 at least; one that overflows the storage dtype is an error.
        loss_weights: What the backpropagated loss was, of the samples' own losses: "sum", "mean" or
            "given", with weights for each `batch`. Rows are those of own losses then. Without it,
            they are of contributions to the loss that was backpropagated.
        unit_norm: Whether to divide each row by its norm. A row of zeros stays as it is.
        options: What all engines take: see `Engine`.

    Raises:
        UnknownNameError: If a glob matches nothing, or `init` or `dtype` does not exist.
        CaptureError: If the dimensions are not positive or do not fit, or the projection's options
            have no JSON form.
        UnsupportedLayerError: If a selected parameter belongs to a module without a sampler.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        dim: Dim | None = None,
        total_dim: int | None = None,
        min_dim: int = 8,
        dims: Mapping[str, Dim] = MappingProxyType({}),
        sketch: Patterns = (),
        seed: int = 0,
        init: str | Projection | type[Projection] = "gaussian",
        dtype: torch.dtype | str = torch.float32,
        loss_weights: LossWeights | None = None,
        unit_norm: bool = False,
        **options: Unpack[EngineOptions],
    ) -> None:
        options["exclude"] = [
            *as_patterns(options.get("exclude", ()), "exclude"),
            *(pattern for pattern, each in _checked(dims).items() if _is_zero(each)),
        ]
        super().__init__(model, loss_weights=loss_weights, **options)
        if dim is None and total_dim is None:
            dim = 256
        self.dtype = _storage_dtype(dtype)
        self.seed = whole("seed", seed)
        self.unit_norm = switch("unit_norm", unit_norm)
        self.layout: tuple[Block, ...] = arrange(
            self.parameters,
            dim=dim,
            total_dim=total_dim,
            min_dim=min_dim,
            dims=self._by_parameter(dims),
            sketched=self._matching(sketch, "sketch"),
        )
        self._blocks = {block.parameter: block for block in self.layout}
        self.init, projection = resolve(init)
        owned = bool(installed().owner("projection", self.init))
        with installed().blame("projection", self.init) if owned else nullcontext():
            self._maps = {
                each.name: draw(projection, self.seed, each, self._blocks[each.name])
                for each in self.parameters
            }
            self._described = described(self.init, projection)
        self._described["maps"] = digest(self._maps[block.parameter] for block in self.layout)
        self._rows = torch.empty(0)
        self._random = random_modules(self.model)
        self._manifest = self.manifest()

    @classmethod
    def from_manifest(
        cls,
        model: nn.Module,
        store: Any,
        *,
        init: Projection | type[Projection] | None = None,
        **options: Any,
    ) -> Self:
        """Make the engine again that a store's rows were made with, to search it with others.

        Args:
            model: The model, or one with the same parameters.
            store: A store, its manifest, or what `manifest` of an engine returned.
            init: The projection, if no plugin offers it.
            options: What changes no value of a row: see `Engine`; `dtype` too.

        Raises:
            CaptureError: If there is no such manifest, or the engine would make other rows.
            UnknownNameError: If a parameter or the projection does not exist.
        """
        manifest = getattr(store, "manifest", store)
        made = getattr(manifest, "engine", manifest)
        keys = ("projection", "options", "maps", "seed", "dtype", "layers")
        if not isinstance(made, Mapping) or (absent := [key for key in keys if key not in made]):
            missing = ", ".join(absent) if isinstance(made, Mapping) else "it is no mapping"
            raise CaptureError(
                "the manifest does not say how a ProjectionEngine is made",
                reason=f"missing: {missing}",
                remedy="give the store, or what engine.manifest() returned",
            )
        if init is None:
            with installed().blame("projection", made["projection"]):
                init = installed().projection(made["projection"])(**made["options"])
        layers = made["layers"]
        names = [glob.escape(layer["name"]) for layer in layers]
        again: dict[str, Any] = {
            "layers": names,
            "dims": {
                name: (layer["k_left"], layer["k_right"])
                for name, layer in zip(names, layers, strict=True)
            },
            "sketch": [
                name for name, layer in zip(names, layers, strict=True) if layer.get("sketched")
            ],
            "seed": made["seed"],
            "dtype": made["dtype"],
            "loss_weights": made.get("loss_weights"),
            "unit_norm": made.get("unit_norm", False),
            "verify": made.get("verified", True),
        }
        engine = cls(model, init=init, **(again | options))
        now = engine.manifest()
        free = ("dtype", "verified", "source")
        if other := [key for key in now if key not in free and now[key] != made.get(key)]:
            raise CaptureError(
                f"the engine would make other rows than those of the manifest: {', '.join(other)} "
                "would differ",
                reason="the model has other parameters, or the projection draws other maps",
                remedy="give the model that the store was made with, and the same projection",
            )
        return engine

    @property
    def k_total(self) -> int:
        """Number of columns of a row."""
        return sum(block.size for block in self.layout)

    def maps(self, name: str) -> tuple[Tensor, Tensor]:
        """Return a parameter's maps L `[k_left, n_left]` and R `[k_right, n_right]`.

        A parameter that is sketched is seen as one column of numbers.

        Raises:
            UnknownNameError: If the parameter is not tracked.
        """
        if name not in self._maps:
            raise UnknownNameError("parameter", name, self._maps)
        parameter = next(each for each in self.parameters if each.name == name)
        dtype = accumulation_dtype(parameter.dtype)
        left, right = (
            torch.eye(size, dtype=dtype, device=parameter.device) if drawn is None else drawn
            for drawn, size in zip(self._maps[name].dense(), self._blocks[name].matrix, strict=True)
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
            parameter = next(each for each in self.parameters if each.name == block.parameter)
            matrices = gradient.detach().reshape(len(gradient), *block.matrix)
            dtype = accumulation_dtype(parameter.dtype)
            parts.append(self._maps[block.parameter].given(matrices.to(dtype)))
        rows = torch.cat(parts, dim=1)
        return _unit(rows, rows.norm(dim=1)) if self.unit_norm else rows

    def manifest(self) -> dict[str, Any]:
        """Return, as JSON-able values, everything here that changes a value of a row."""
        return {
            "projection": self.init,
            **self._described,
            "seed": self.seed,
            "dtype": str(self.dtype).removeprefix("torch."),
            "loss_weights": self.loss_weights,
            "unit_norm": self.unit_norm,
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
        return self._maps[parameter.name].compress(record)

    def on_gradient(
        self, pass_: Pass, parameter: TrackedParameter, gradient: PerSampleGradient
    ) -> None:
        """Compress the output side and sum over tokens."""
        self.check_mean(pass_, len(self._rows))
        projected = self._maps[parameter.name].project(gradient)
        columns = self._blocks[parameter.name].columns
        self._rows[pass_.samples, columns].add_(projected.to(self._rows))

    def on_end(self, batch: Batch[ProjectedRows]) -> ProjectedRows:
        """Return the rows in the storage dtype."""
        exact = self._rows / self._divisors(batch)
        norms = torch.linalg.vector_norm(exact, dim=1)
        if self.unit_norm:
            exact = _unit(exact, norms)
        return ProjectedRows(
            ids=batch.ids,
            verified=batch.verified,
            rows=self._stored(exact, batch),
            layout=self.layout,
            random=drawing(self._random),
            manifest=self._manifest,
            norms=norms,
        )

    def on_close(self) -> None:
        """Let go of the rows."""
        super().on_close()
        self._rows = torch.empty(0)

    def _divisors(self, batch: Batch[ProjectedRows]) -> Tensor | float:
        """Return what rows are divided by: `[N, 1]`, or one number for all."""
        if self.loss_weights != "given":
            return float(self.scaled_weights[0]) if batch.n else 1.0
        squared = self._rows.square().sum(1)
        return self.divisors(batch, squared).to(self._rows)[:, None]

    def _stored(self, exact: Tensor, batch: Batch[ProjectedRows]) -> Tensor:
        """Return rows in the storage dtype; nobody waits for the device where it is wide enough."""
        rows = exact.to(self.dtype)
        if torch.finfo(self.dtype).max >= torch.finfo(exact.dtype).max:
            return rows
        lost = exact.isfinite().all(1) & ~rows.isfinite().all(1)
        if lost.any():
            raise CaptureError(
                f"the rows of samples {batch.ids[lost.cpu()].tolist()} overflow {self.dtype}: "
                "choose another dtype, or scale the loss"
            )
        return rows

    def _by_parameter(self, dims: Mapping[str, Dim]) -> dict[str, Dim]:
        """Return dimensions by the name of each parameter that they are given for."""
        return {
            name: dim
            for pattern, dim in dims.items()
            if not _is_zero(dim)
            for name in self._matching([pattern], "dims")
        }

    def _matching(self, patterns: Patterns, option: str) -> set[str]:
        return select_parameters(
            ([each.name, *each.aliases] for each in self.parameters), patterns, option
        )


def _checked(dims: object) -> Mapping[str, Dim]:
    if not isinstance(dims, Mapping) or not all(isinstance(name, str) for name in dims):
        raise CaptureError(
            f"dims must be a mapping of globs over names of parameters and modules, not {dims!r}",
            reason="each parameter may have dimensions of its own",
            remedy='give them by glob, such as dims={"*.mlp.*": 1024}',
        )
    return dims


def _is_zero(dim: Dim) -> bool:
    return type(dim) is int and dim == 0


def _unit(rows: Tensor, norms: Tensor) -> Tensor:
    return rows / torch.where(norms > 0, norms, 1.0)[:, None]


def _storage_dtype(dtype: torch.dtype | str) -> torch.dtype:
    if isinstance(dtype, str):
        if dtype not in STORAGE_DTYPES:
            raise UnknownNameError("dtype", dtype, STORAGE_DTYPES)
        return STORAGE_DTYPES[dtype]
    if dtype not in STORAGE_DTYPES.values():
        raise UnknownNameError("dtype", str(dtype), STORAGE_DTYPES)
    return dtype
