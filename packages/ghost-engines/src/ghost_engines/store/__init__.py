"""Rows of projected gradients on disk, and exact search among them."""

from ghost_engines.store.dtypes import STORAGE_DTYPES
from ghost_engines.store.errors import DamagedStoreError, StoreError
from ghost_engines.store.listing import clean, has_shards, listed_units, shard_path
from ghost_engines.store.lock import WriterLock
from ghost_engines.store.manifest import Manifest
from ghost_engines.store.neighbours import Neighbours
from ghost_engines.store.rows import StoredRows
from ghost_engines.store.shards import check_contents
from ghost_engines.store.store import GradientStore
from ghost_engines.store.tensor_files import TensorFile, header, write_tensors

__all__ = [
    "STORAGE_DTYPES",
    "DamagedStoreError",
    "GradientStore",
    "Manifest",
    "Neighbours",
    "StoreError",
    "StoredRows",
    "TensorFile",
    "WriterLock",
    "check_contents",
    "clean",
    "has_shards",
    "header",
    "listed_units",
    "shard_path",
    "write_tensors",
]
