"""Rows of projected gradients on disk, and exact search among them."""

from ghost_engines.store.beside import Column
from ghost_engines.store.columns import Columns, columns_of, parameter_columns
from ghost_engines.store.data_files import DataFile
from ghost_engines.store.dtypes import STORAGE_DTYPES
from ghost_engines.store.errors import (
    DamagedStoreError,
    MissingLogError,
    MissingStoreError,
    SeveralRowsError,
    StoreError,
    check_all,
)
from ghost_engines.store.exporting import export
from ghost_engines.store.given import check_store, device_of, number
from ghost_engines.store.labels import Labels
from ghost_engines.store.listing import clean, has_shards, listed_units, shard_path
from ghost_engines.store.lock import WriterLock
from ghost_engines.store.manifest import MANIFEST, Manifest
from ghost_engines.store.merging import merge
from ghost_engines.store.neighbours import Neighbours, best
from ghost_engines.store.origin import OtherRowsError, check_alike
from ghost_engines.store.powers import in_range, overflow, powers_for, times
from ghost_engines.store.rows import StoredRows
from ghost_engines.store.scan import Scan
from ghost_engines.store.scorer import (
    METRICS,
    By,
    Queries,
    RowReader,
    Scorer,
    unit_length,
)
from ghost_engines.store.seen import SeenIds
from ghost_engines.store.shards import check_contents
from ghost_engines.store.store import GradientStore
from ghost_engines.store.tensor_files import TensorFile, header, write_tensors

__all__ = [
    "MANIFEST",
    "METRICS",
    "STORAGE_DTYPES",
    "By",
    "Column",
    "Columns",
    "DamagedStoreError",
    "DataFile",
    "GradientStore",
    "Labels",
    "Manifest",
    "MissingLogError",
    "MissingStoreError",
    "Neighbours",
    "OtherRowsError",
    "Queries",
    "RowReader",
    "Scan",
    "Scorer",
    "SeenIds",
    "SeveralRowsError",
    "StoreError",
    "StoredRows",
    "TensorFile",
    "WriterLock",
    "best",
    "check_alike",
    "check_all",
    "check_contents",
    "check_store",
    "clean",
    "columns_of",
    "device_of",
    "export",
    "has_shards",
    "header",
    "in_range",
    "listed_units",
    "merge",
    "number",
    "overflow",
    "parameter_columns",
    "powers_for",
    "shard_path",
    "times",
    "unit_length",
    "write_tensors",
]
