"""Rows in memory: what a caller appends, and what a shard holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol, Self

import torch
from torch import Tensor

from ghost_core import Batch
from ghost_engines.store.beside import LOSS, ColumnValues, checked_columns
from ghost_engines.store.dtypes import STORAGE_DTYPES
from ghost_engines.store.errors import StoreError
from ghost_engines.store.finite import all_finite
from ghost_engines.store.given import check_tensor
from ghost_engines.store.labels import Labels, Names
from ghost_engines.store.manifest import Manifest


class RowBatch(Protocol):
    """Rows with the ids of their samples."""

    @property
    def ids(self) -> Tensor:
        """Sample ids, int64 `[N]`."""

    @property
    def rows(self) -> Tensor:
        """Rows `[N, k_total]` in the store's dtype."""


@dataclass(frozen=True)
class StoredRows:
    """Consecutive rows of a store.

    Attributes:
        ids: Sample ids, int64 `[n]`.
        rows: `[n, k_total]`.
        loss: The samples' losses `[n]`, if they were stored.
        columns: What else is stored beside the rows, by name: numbers `[n]`, or names.
    """

    ids: Tensor
    rows: Tensor
    loss: Tensor | None = None
    columns: Mapping[str, Tensor | Labels] = field(default_factory=dict)

    def __len__(self) -> int:
        """Return the number of rows n."""
        return self.ids.shape[0]  # each append asks many times: len(tensor) takes 1 µs

    def __getitem__(self, part: slice | Tensor) -> Self:
        """Return some of the rows; those of a slice as views."""
        return self.mapped(lambda tensor: tensor[part])

    def copy(self) -> Self:
        """Return them in memory of their own."""
        return self.mapped(torch.clone)

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Return them with each tensor changed."""
        columns = {
            name: Labels(change(column.codes), column.names)
            if isinstance(column, Labels)
            else change(column)
            for name, column in self.columns.items()
        }
        loss = None if self.loss is None else change(self.loss)
        return type(self)(change(self.ids), change(self.rows), loss, columns)

    def tensors(self) -> dict[str, Tensor]:
        """Return the numbers of each row, by name."""
        tensors = {"g": self.rows, "ids": self.ids}
        if self.loss is not None:
            tensors[LOSS] = self.loss
        for name, column in self.columns.items():
            tensors[name] = column.codes if isinstance(column, Labels) else column
        return tensors


def checked(
    batch: RowBatch,
    loss: Tensor | None,
    columns: Mapping[str, ColumnValues],
    manifest: Manifest,
    names: Mapping[str, Names],
) -> StoredRows:
    """Return a batch as rows of a store, on the device on which it is.

    Args:
        batch: The batch, on any device.
        loss: Losses `[N]`, floating point.
        columns: What else is to be stored beside the rows.
        manifest: What the store holds.
        names: The writer's table of names for each column of names.

    Raises:
        StoreError: If a shape or a dtype does not fit.
    """
    _check_tensors(batch, loss)
    if not isinstance(columns, Mapping):
        raise StoreError(f'columns must be a mapping like {{"norm": norms}}, not {columns!r}')
    ids, rows = batch.ids, batch.rows
    if ids.dtype != torch.int64 or ids.dim() != 1:
        raise StoreError(f"ids must be int64 [N], not {_kind(ids)}")
    if rows.shape != (len(ids), manifest.k_total):
        raise StoreError(
            f"rows must be [{len(ids)}, {manifest.k_total}] for {len(ids)} ids, not {_kind(rows)}"
        )
    if rows.dtype != manifest.torch_dtype:
        raise StoreError(
            f"rows must be {manifest.torch_dtype} as in the store, not {rows.dtype}: nothing is "
            "cast here; make the engine with that dtype"
        )
    if loss is not None and (loss.shape != ids.shape or loss.dtype not in STORAGE_DTYPES.values()):
        raise StoreError(
            f"loss must be [{len(ids)}], of dtype {', '.join(STORAGE_DTYPES)}, not {_kind(loss)}"
        )
    if loss is not None and LOSS in columns:
        raise StoreError(
            "the batch has two columns of losses",
            reason="loss was given, and columns has one called loss",
            remedy="give one of them",
        )
    if loss is not None and LOSS in manifest.declared:
        columns = {**columns, LOSS: loss}
    found = checked_columns(len(ids), columns, manifest.declared, names)
    declared_loss = found.pop(LOSS, loss)
    assert not isinstance(declared_loss, Labels)
    return StoredRows(ids, rows, declared_loss, found)


def with_tables(rows: StoredRows, names: Mapping[str, Names]) -> StoredRows:
    """Return rows with their names numbered by a writer's tables, to which new ones are added."""
    columns = {
        name: Labels(column.numbered(names[name]), names[name])
        if isinstance(column, Labels)
        else column
        for name, column in rows.columns.items()
    }
    return replace(rows, columns=columns)


def check_finite(found: StoredRows) -> None:
    """Refuse rows that are not finite, in memory of their own.

    Raises:
        StoreError: If there are any.
    """
    if all_finite(found.rows):
        return
    bad = found.ids[~found.rows.isfinite().all(dim=1)].tolist()
    more = f" and {len(bad) - 20} more" if len(bad) > 20 else ""
    raise StoreError(
        f"the rows of samples {', '.join(map(str, bad[:20]))}{more} are not finite; no row of the "
        "batch was stored"
    )


def _check_tensors(batch: object, loss: object) -> None:
    """Refuse what has no rows, which are most often those that an engine's batch has."""
    kind = type(batch).__name__
    if missing := [f"no {name}" for name in ("ids", "rows") if not hasattr(batch, name)]:
        raise StoreError(
            f"a {kind} has {' and '.join(missing)}, so it cannot be stored",
            reason="rows are stored with the ids of their samples",
            remedy="append batch.result once the batch is closed"
            if isinstance(batch, Batch)
            else "append what a ProjectionEngine found: engine.collect()",
        )
    for name in ("ids", "rows"):
        check_tensor(f"{name} of a {kind}", getattr(batch, name))
    if loss is not None:
        check_tensor("loss", loss)


def _kind(tensor: Tensor) -> str:
    return f"{tensor.dtype} of shape {list(tensor.shape)}"
