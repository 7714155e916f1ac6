"""An index beside the shards of a large store: ids in order, and where their rows are.

Without it, whoever looks a sample up reads the ids of all shards. It says which shards it was made
of, by the hashes of their ids, and is made anew where it is missing, altered, or of others.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from ghost_engines.store.errors import DamagedStoreError
from ghost_engines.store.hashes import FAST
from ghost_engines.store.lookup import IdIndex
from ghost_engines.store.shards import check_contents
from ghost_engines.store.tensor_files import TensorFile, write_tensors

logger = logging.getLogger(__name__)

INDEX = "index.safetensors"

WORTH_KEEPING = 1000
"""Shards from which on an index is kept; the ids of fewer are read in tenths of a second."""


def kept_index(root: Path, made_of: str, ids: Callable[[], Tensor]) -> IdIndex:
    """Return the index of a store, which is read, mapped; or made and kept.

    Args:
        root: Folder of the store.
        made_of: A digest of the shards.
        ids: Reads the ids of all rows.

    Raises:
        DamagedStoreError: If a shard went missing or was altered.
        OSError: If a shard cannot be read.
    """
    if (found := _read(root / INDEX, made_of)) is None:
        found = IdIndex.of(ids())
        try:
            tensors = {"ids": found.ids, "ordinals": found.ordinals}
            write_tensors(root / INDEX, tensors, {"shards": made_of}, root, FAST, shared=True)
        except OSError as error:  # as in a folder that may be read only: it works without
            logger.info("the index of %s is not kept: %s", root, error)
    return found


def _read(path: Path, made_of: str) -> IdIndex | None:
    """Return an index if there is one of these shards."""
    try:
        with TensorFile(path) as file:
            if file.metadata.get("shards") != made_of or set(file.places) != {"ids", "ordinals"}:
                return None
            check_contents(file)
            return IdIndex(file.get_tensor("ids"), file.get_tensor("ordinals"))
    except (DamagedStoreError, OSError) as error:
        logger.info("the index at %s is made anew: %s", path, error)
        return None
