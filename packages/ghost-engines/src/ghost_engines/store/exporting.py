"""The rows of a store in files that other programs read."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from ghost_engines.files import TEMPORARY, put_in_place
from ghost_engines.progress import Progress
from ghost_engines.store.beside import LOSS
from ghost_engines.store.errors import StoreError
from ghost_engines.store.hashes import bytes_of
from ghost_engines.store.labels import Labels
from ghost_engines.store.rows import StoredRows
from ghost_engines.store.store import GradientStore, StrPath
from ghost_engines.tables import check_folder, pyarrow_for

_BLOCK = 4096


def export(store: GradientStore, path: StrPath, *, progress: bool | None = None) -> None:
    """Write a store's rows, ids, losses and columns for other programs, a block at a time.

    Rows of bfloat16, which numpy and Parquet do not have, are written as float32, which holds them
    exactly; all else has the dtype that it has in the store. The manifest and whitenings are left
    behind.

    Args:
        store: The store, as it was opened.
        path: A file that ends in `.parquet`, with `id`, `row` (a list of fixed size) and a column
            for each column of the store, in row groups of some thousand rows; or a folder to make,
            with `rows.npy` `[len, k_total]`, `ids.npy`, `loss.npy` and one file for each column,
            where names are numbers with a table in `<column>.names.json`.
        progress: Whether to show a progress bar. By default at a terminal, if it takes long.

    Raises:
        StoreError: If there is something at the path, its ending says another kind of file, or a
            column has a name that the rows or their ids have there.
        MissingExtraError: If pyarrow is not installed.
        DamagedStoreError: If a file of the store is missing or was altered.
        OSError: If something cannot be read or written.
    """
    path = Path(path)
    check_folder(path)
    if path.suffix not in (".parquet", ""):
        raise StoreError(
            f"{path} is neither a Parquet file nor a folder",
            reason=f"rows are not written as {path.suffix}",
            remedy="choose a name that ends in .parquet, or a folder without an ending, for .npy",
        )
    _check_names(store, ("id", "row") if path.suffix else ("rows",))
    if os.path.lexists(path):
        raise StoreError(f"there is something at {path}", remedy="remove it, or choose another")
    write = _parquet if path.suffix else _npy
    with _replacing(path) as temporary, Progress(len(store), "export", progress) as bar:
        write(store, temporary, bar.advance)


def _check_names(store: GradientStore, taken: Sequence[str]) -> None:
    """Refuse columns of stores that were made before their names were taken."""
    if wrong := [name for name in taken if name in store.manifest.columns]:
        raise StoreError(
            f"column {wrong[0]!r} of the store cannot be exported to such a file",
            reason=f"the rows or their ids are called {wrong[0]!r} there, and would be lost",
            remedy="export to the other kind, a folder of .npy files or a .parquet file",
        )


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Put what is written to another place in this one, once it is whole and on disk."""
    temporary = path.with_name(path.name + TEMPORARY)
    _remove(temporary)
    try:
        yield temporary
        put_in_place(temporary, path)
    finally:
        _remove(temporary)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _npy(store: GradientStore, folder: Path, advance: Callable[[int], None]) -> None:
    folder.mkdir()
    _save(folder / "ids.npy", store.ids)
    for name, column in store.columns.items():
        if isinstance(column, Labels):
            (folder / f"{name}.names.json").write_text(json.dumps(list(column.names)) + "\n")
            column = column.codes
        _save(folder / f"{name}.npy", column)
    with open(folder / "rows.npy", "wb") as file:
        _npy_header(file, (len(store), store.k_total), _writable(store.rows(0, 0)).numpy().dtype)
        for block in store.blocks(_BLOCK):
            file.write(bytes_of(_writable(block.rows)))
            advance(len(block))


def _save(path: Path, tensor: Tensor) -> None:
    np.save(path, _writable(tensor).numpy())


def _npy_header(file: IO[bytes], shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    descr = np.lib.format.dtype_to_descr(dtype)
    np.lib.format.write_array_header_1_0(
        file, {"descr": descr, "fortran_order": False, "shape": shape}
    )


def _writable(tensor: Tensor) -> Tensor:
    """Return numbers of a kind that numpy has."""
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor


def _parquet(store: GradientStore, path: Path, advance: Callable[[int], None]) -> None:
    pa, parquet = pyarrow_for(str(path))
    with ExitStack() as stack:
        writer: Any = None
        for block in store.blocks(_BLOCK) if len(store) else [_no_rows(store)]:
            table = pa.table(_arrays(pa, block))
            if writer is None:
                writer = stack.enter_context(parquet.ParquetWriter(path, table.schema))
            writer.write_table(table)
            advance(len(block))


def _arrays(pa: Any, block: StoredRows) -> dict[str, Any]:
    numbers = pa.array(_writable(block.rows).reshape(-1).numpy())
    found = {
        "id": pa.array(block.ids.numpy()),
        "row": pa.FixedSizeListArray.from_arrays(numbers, block.rows.shape[1]),
    }
    losses = {} if block.loss is None else {LOSS: block.loss}
    for name, column in {**losses, **block.columns}.items():
        if isinstance(column, Labels):
            found[name] = pa.array(list(column), type=pa.string())
        else:
            found[name] = pa.array(_writable(column).numpy())
    return found


def _no_rows(store: GradientStore) -> StoredRows:
    """Return the rows of an empty store, which say what it would hold."""
    beside = {name: column for name, column in store.columns.items() if name != LOSS}
    return StoredRows(store.ids, store.rows(), store.losses, beside)
