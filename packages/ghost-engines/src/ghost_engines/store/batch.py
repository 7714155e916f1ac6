"""What can be appended to a store."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ghost_engines.store.dtypes import STORAGE_DTYPES
from ghost_engines.store.errors import StoreError
from ghost_engines.store.format import StoredRows
from ghost_engines.store.manifest import Manifest


class RowBatch(Protocol):
    """Rows with the ids of their samples."""

    @property
    def ids(self) -> Tensor:
        """Sample ids, int64 `[N]`."""

    @property
    def rows(self) -> Tensor:
        """Rows `[N, k_total]` in the store's dtype."""


def checked(batch: RowBatch, loss: Tensor | None, manifest: Manifest) -> StoredRows:
    """Return a copy of a batch on the CPU.

    Args:
        batch: The batch, on any device.
        loss: Losses `[N]`, floating point.
        manifest: What the store holds.

    Raises:
        StoreError: If a shape or a dtype does not fit, or a row is not finite.
    """
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
    finite = rows.detach().isfinite().all(dim=1).cpu()
    if not finite.all():
        bad = ids.cpu()[~finite].tolist()
        more = f" and {len(bad) - 20} more" if len(bad) > 20 else ""
        raise StoreError(
            f"the rows of samples {', '.join(map(str, bad[:20]))}{more} are not finite; no row of "
            "the batch was stored"
        )
    return StoredRows(_copied(ids), _copied(rows), None if loss is None else _copied(loss))


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _kind(tensor: Tensor) -> str:
    return f"{tensor.dtype} of shape {list(tensor.shape)}"
