"""Rows of projected gradients on disk, and exact search among them."""

from ghost_engines.store.dtypes import STORAGE_DTYPES
from ghost_engines.store.errors import DamagedStoreError, StoreError
from ghost_engines.store.manifest import Manifest
from ghost_engines.store.neighbours import Neighbours
from ghost_engines.store.rows import StoredRows
from ghost_engines.store.store import GradientStore

__all__ = [
    "STORAGE_DTYPES",
    "DamagedStoreError",
    "GradientStore",
    "Manifest",
    "Neighbours",
    "StoreError",
    "StoredRows",
]
