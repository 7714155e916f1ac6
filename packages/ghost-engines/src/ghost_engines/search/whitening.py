"""Scores that take into account in which directions all rows are long: `⟨q, C⁻¹ r⟩`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from ghost_core import UnknownNameError
from ghost_core.algebra import full_precision
from ghost_core.tracking import Patterns
from ghost_engines.progress import Progress
from ghost_engines.store import (
    Columns,
    DamagedStoreError,
    GradientStore,
    Manifest,
    RowReader,
    StoreError,
    TensorFile,
    check_alike,
    check_contents,
    check_store,
    columns_of,
    device_of,
    header,
    number,
    parameter_columns,
    write_tensors,
)

BLOCKS = ("all", "parameter")
"""Between which columns second moments are taken: all, or those of each parameter."""

_FORMAT = "ghost whitening 1"

_NOISE = 100
"""How many times eps, for each column, sums over many rows and a Cholesky factor may be off."""

_SMALLEST = 1e-146
"""Numbers whose squares have all their digits in float64, and 1 / it for their sums."""


@dataclass(frozen=True, repr=False)
class Whitening:
    """The inverse of the second moments of a store's rows, to search by.

    With C the mean of `r rᵀ` over all rows and λ the damping times C's mean eigenvalue, a row
    scores `⟨q, (C + λI)⁻¹ r⟩`. Of per-sample gradients, C is the empirical Fisher information, and
    the score an influence with it in place of the Hessian (Koh and Liang, 2017); TRAK (Park et
    al., 2023) is the same without damping. The inverse is applied to queries, so that a search
    costs what it does by dot.

    Make one with `of`: of the store that is searched, or of another one by the same engine and
    model. If that holds gradients whose labels were drawn from the model, C is the Fisher
    information itself, which is nearer to the Hessian where the model fits its data well.

    Attributes:
        damping: λ, relative to the mean eigenvalue of each block.
        blocks: `parameter`: each parameter's columns have a C of their own. `all`: there is one C,
            `[k_total, k_total]`.
        moments: C by parameter, float64 `[c, c]`; under `*` if there is one.
        manifest: What the store's rows are.
        rows: What tells these rows from others: the store's digest.
    """

    damping: float
    blocks: str
    moments: Mapping[str, Tensor]
    manifest: Manifest
    rows: str
    _factors: dict[str, Tensor] = field(default_factory=dict, compare=False)

    @classmethod
    def of(
        cls,
        store: GradientStore,
        damping: float = 0.1,
        blocks: str = "parameter",
        *,
        renew: bool = False,
        save: bool = True,
        device: torch.device | str = "cpu",
        progress: bool | None = None,
    ) -> Self:
        """Return the whitening of a store: the one that is kept beside it, or from a pass over it.

        C is kept in `whitening/` in the store's folder, with a digest of the rows; it is the same
        for every damping. Neither `merge` nor `export` takes it along.

        Args:
            store: The store, with all its rows committed.
            damping: λ, relative to the mean eigenvalue of each block; 0 or more.
            blocks: `parameter` or `all`.
            renew: Whether to replace what is kept, which may be of other rows.
            save: Whether to keep what a pass found.
            device: Where to compute in the pass, in float64.
            progress: Whether to show a progress bar. By default at a terminal, if it takes long.

        Raises:
            UnknownNameError: If `blocks` does not exist.
            StoreError: If the damping is negative, there are no rows, some are not committed, the
                manifest does not say which columns belong to which parameter, what is kept is of
                other rows, or squares of the rows leave the range of float64.
            DamagedStoreError: If a file was altered.
            OSError: If it cannot be kept.
        """
        check_store(store)
        damping, device = number("damping", damping), device_of(device)
        if blocks not in BLOCKS:
            raise UnknownNameError("blocks", blocks, BLOCKS)
        if not isfinite(damping) or damping < 0:
            raise StoreError(f"damping must be 0 or more, not {damping}")
        path = _path(store, blocks)
        of = {"rows": store.digest(), "blocks": blocks, "n": str(len(store))}
        if path.exists() and not renew:
            found = _read(path, of, _places(store.manifest, blocks))
            return cls(damping, blocks, found, store.manifest, of["rows"])
        moments = _second_moments(store, blocks, device, progress)
        if save:
            metadata = {"format": _FORMAT, **of}
            write_tensors(path, moments, metadata, store.path, shared=True)
        return cls(damping, blocks, moments, store.manifest, of["rows"])

    def __repr__(self) -> str:
        """Say what it is of."""
        size = sum(map(len, self.moments.values()))
        return (
            f"<{type(self).__name__}: damping={self.damping}, {len(self.moments)} blocks, {size}>"
        )

    def transform(self, store: RowReader, queries: Tensor, columns: Columns) -> Tensor:
        """Return `(C + λI)⁻¹ q` for each query, as a search asks for.

        Args:
            store: What the rows are in.
            queries: `[Q, c]`.
            columns: Which columns of a row these are: C is that of these columns.

        Returns:
            Float64 `[Q, c]`.

        Raises:
            StoreError: If its rows are of another kind, C cannot be inverted, or it is of rows that
                have only zeros where others may have more.
        """
        check_alike(store.manifest, self.manifest, "whitening")
        found = torch.zeros_like(queries, dtype=torch.float64)
        for name, here, factor in self._parts(store.manifest, columns):
            part = queries[:, here].double().mT
            if factor is not None:
                found[:, here] = torch.cholesky_solve(part, factor.to(queries.device)).mT
            elif part.any() and store.digest() != self.rows:
                raise _only_zeros(name)
        return found

    def self_influence(
        self,
        store: GradientStore,
        *,
        parameters: Patterns | None = None,
        block: int = 4096,
        progress: bool | None = None,
    ) -> Tensor:
        """Return `⟨r, (C + λI)⁻¹ r⟩` of each row: how unlike the others a sample is.

        Args:
            store: The store.
            parameters: Globs over names of modules and parameters: whose columns to take.
            block: Rows to take at once.
            progress: Whether to show a progress bar. By default at a terminal, if it takes long.

        Returns:
            In order of the rows, float64 `[N]`.

        Raises:
            UnknownNameError: If a glob matches nothing.
            StoreError: If its rows are of another kind, C cannot be inverted, or it is of rows that
                have only zeros where these have more.
            DamagedStoreError: If a file went missing or was altered.
        """
        check_alike(store.manifest, self.manifest, "whitening")
        columns = columns_of(store.manifest, parameters)
        parts = list(self._parts(store.manifest, columns))
        influence = torch.zeros(len(store), dtype=torch.float64, device="cpu")
        start = 0
        with full_precision(influence.device), Progress(len(store), "influence", progress) as bar:
            for found in store.scan(block):
                rows = found.rows[:, columns].double()
                for name, here, factor in parts:
                    if factor is None:
                        if rows[:, here].any():
                            raise _only_zeros(name)
                        continue
                    white = torch.linalg.solve_triangular(factor, rows[:, here].mT, upper=False)
                    influence[start : start + len(found)] += white.square().sum(0)
                start += len(found)
                bar.advance(len(found))
        return influence

    def _parts(
        self, manifest: Manifest, columns: Columns
    ) -> list[tuple[str, Tensor, Tensor | None]]:
        """Return, block by block, which of some columns are in it, and the Cholesky factor.

        There is none where all rows are zero, whatever the damping: they add nothing to a score.
        """
        taken = torch.arange(manifest.k_total, device="cpu")[columns]
        parts = []
        for name, place in _places(manifest, self.blocks).items():
            here = ((taken >= place.start) & (taken < place.stop)).nonzero().flatten()
            if len(here):
                parts.append((name, here, self._factor(name, taken[here] - place.start)))
        return parts

    def _factor(self, name: str, columns: Tensor) -> Tensor | None:
        """Return the Cholesky factor of C + λI for some columns of a block, all of them or not."""
        whole = len(columns) == len(self.moments[name])
        if whole and name in self._factors:
            return self._factors[name]
        moments = self.moments[name][columns][:, columns]
        mean = moments.diagonal().mean().item()
        if not mean:
            return None
        moments.diagonal().add_(self.damping * mean)
        factor: Tensor
        factor, failed = torch.linalg.cholesky_ex(moments)
        # What is left of a column when those before it are taken out, against what rounding leaves.
        noise = _NOISE * len(moments) * torch.finfo(moments.dtype).eps
        if failed or not (factor.diagonal().square() > noise * moments.diagonal()).all():
            raise StoreError(
                f"the second moments of {_said(name)} cannot be "
                f"inverted with damping={self.damping}",
                reason="there are directions that no row has, but for rounding",
                remedy="raise the damping, as to 0.1",
            )
        if whole:
            self._factors[name] = factor
        return factor


def _only_zeros(name: str) -> StoreError:
    return StoreError(
        f"the rows that the whitening was made of have only zeros in {_said(name)}, and others "
        "have not",
        reason="what is long or short there is not known, and these columns would not count",
        remedy='make one of rows that have it, or leave it out with parameters="..."',
    )


def _path(store: GradientStore, blocks: str) -> Path:
    return store.path / "whitening" / f"{blocks}.safetensors"


def _places(manifest: Manifest, blocks: str) -> dict[str, slice]:
    if blocks == "all":
        return {"*": slice(0, manifest.k_total)}
    return parameter_columns(manifest)


def _read(
    path: Path, expected: Mapping[str, str], places: Mapping[str, slice]
) -> dict[str, Tensor]:
    """Read what is kept beside a store, if it is of its rows, and of those blocks."""
    with TensorFile(path) as file:
        if (found := file.metadata.get("format")) != _FORMAT:
            raise StoreError(f"{path} has the format {found!r}, this version reads {_FORMAT!r}")
        if (found := file.metadata.get("blocks")) != expected["blocks"]:
            raise StoreError(
                f"{path} has moments of blocks={found!r}, not of {expected['blocks']!r}",
                reason="it was renamed or copied",
                remedy="make it anew: Whitening.of(store, renew=True)",
            )
        if any(file.metadata.get(name) != expected[name] for name in ("rows", "n")):
            raise StoreError(
                f"{path} is of other rows than those that the store has now",
                reason=f"it is of {file.metadata.get('n')} rows, as they were then",
                remedy=f"make it anew: Whitening.of(store, renew=True), or remove {path}",
            )
        sizes = {name: place.stop - place.start for name, place in places.items()}
        if header(file)[1] != {name: ([n, n], "F64") for name, n in sizes.items()}:
            raise DamagedStoreError(
                f"{path} was altered: it has no moments of {', '.join(map(_said, places))}",
                reason="its hash is of its numbers, and not of how they are called",
                remedy="make it anew: Whitening.of(store, renew=True)",
            )
        check_contents(file)
        return {name: file.read_tensor(name) for name in file.keys()}  # noqa: SIM118 # no mapping


def _second_moments(
    store: GradientStore, blocks: str, device: torch.device, progress: bool | None
) -> dict[str, Tensor]:
    """Return the mean of `r rᵀ` of each block, float64, in one pass."""
    if not len(store):
        raise StoreError("a store without rows has no second moments")
    places = _places(store.manifest, blocks)
    moments = {
        name: torch.zeros(
            place.stop - place.start, place.stop - place.start, dtype=torch.float64, device=device
        )
        for name, place in places.items()
    }
    longest = torch.zeros(store.k_total, dtype=torch.float64, device=device)
    with full_precision(device), Progress(len(store), "whitening", progress) as bar:
        for found in store.scan():
            rows = found.rows.to(device).double()
            torch.maximum(longest, rows.abs().amax(0), out=longest)
            for name, place in places.items():
                moments[name].addmm_(rows[:, place].mT, rows[:, place])
            bar.advance(len(found))
    for name, place in places.items():
        _check_range(name, longest[place].max().item())
    return {name: (moment / len(store)).cpu() for name, moment in moments.items()}


def _check_range(name: str, largest: float) -> None:
    """Refuse rows of which second moments are zero or infinite, and the rows are not."""
    if largest == 0 or _SMALLEST < largest < 1 / _SMALLEST:
        return
    raise StoreError(
        f"rows have no second moments in {_said(name)}: their largest number is {largest:.3g}",
        reason=f"its square {'under' if largest < 1 else 'over'}flows float64",
        remedy='scale the loss that rows are made of, or search by="cosine"',
    )


def _said(name: str) -> str:
    return "all columns" if name == "*" else name
