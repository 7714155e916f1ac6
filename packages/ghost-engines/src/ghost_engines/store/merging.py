"""Several stores of the same kind of rows, copied into one."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ghost_engines.progress import Progress
from ghost_engines.store.beside import LOSS
from ghost_engines.store.errors import SeveralRowsError, StoreError
from ghost_engines.store.hashes import bytes_of
from ghost_engines.store.labels import Labels
from ghost_engines.store.lookup import several_times
from ghost_engines.store.manifest import MANIFEST, Manifest, differences
from ghost_engines.store.origin import listed
from ghost_engines.store.rows import StoredRows
from ghost_engines.store.store import GradientStore, StrPath

_BLOCK = 4096
_OWN = ("unit", "duplicates", "schema")
"""What stores of the same kind of rows may have otherwise."""


def merge(
    sources: Sequence[StrPath],
    into: StrPath,
    *,
    unit: int | None = None,
    duplicates: str = "error",
    progress: bool | None = None,
) -> GradientStore:
    """Copy the rows of several stores, or of the parts of one, into one with a single writer.

    The sources stay as they are. Called again after it was interrupted or killed, it goes on where
    it was; the source's rows must be the same as before. The notes are those of the first source,
    and whitenings, which are of some rows, are left behind.

    Args:
        sources: Folders of stores whose rows are of the same kind, in the order of their rows.
        into: Folder of the new store, or of one that such a call has begun.
        unit: Rows per shard; by default as in the first source.
        duplicates: What becomes of a sample that several have: an `error`, which comes before
            anything is written, or the later row is to `replace` the earlier one.
        progress: Whether to show a progress bar. By default at a terminal, if it takes long.

    Returns:
        The new store, open for reading.

    Raises:
        UnknownNameError: If there is no such way to treat duplicates.
        StoreError: If there are no sources, their rows are not of one kind, several have a sample,
            `into` is one of the sources, or it holds something else.
        DamagedStoreError: If a file of a source is missing or was altered.
        OSError: If something cannot be read or written.
    """
    stores = [GradientStore.open(path) for path in sources]
    if not stores:
        raise StoreError("there is nothing to merge", remedy="give the folders of some stores")
    _check_apart(stores, into)
    _check_same_kind(stores)
    if duplicates == "error" and (twice := several_times(torch.cat([s.ids for s in stores]))):
        raise SeveralRowsError(
            f"samples {twice} are there more than once",
            reason="the stores have them both, and nothing says which row counts",
            remedy='leave a store out, or let later rows count with duplicates="replace"',
        )
    total = sum(map(len, stores))
    with _target(stores[0].manifest, into, unit, duplicates) as target:
        done = len(target)  # by a call before this one, if there are any
        beside = {"ids": target.ids, **target.columns}
        if done > total:
            raise _other(target)
        with Progress(total, "merge", progress) as bar:
            for start, block in _blocks(stores):
                there = min(max(done - start, 0), len(block))
                _check_done(target, start, block[:there], beside)
                rest = block[there:]
                target.append(rest, rest.loss, columns=rest.columns)
                bar.advance(len(block))
    return GradientStore.open(into)


def _check_apart(stores: Sequence[GradientStore], into: StrPath) -> None:
    """Refuse to write into a source."""
    if not (Path(into) / MANIFEST).exists():
        return
    target = Path(into).resolve()
    if any(store.path.resolve() == target for store in stores):
        raise StoreError(
            f"the store at {into} is one of those that are to be merged",
            reason="the sources stay as they are",
            remedy="choose another folder for the merged store",
        )


def _check_same_kind(stores: Sequence[GradientStore]) -> None:
    first = stores[0]
    for store in stores[1:]:
        if found := list(differences("", _kind(first.manifest), _kind(store.manifest))):
            raise StoreError(
                f"the rows in {store.path} are not of the kind of those in {first.path}: "
                f"{listed(found)}",
                reason="rows that were made in another way cannot be compared",
                remedy="merge stores of one engine, with the same info, data and columns",
            )
    kinds = {store.loss_dtype for store in stores if len(store)}
    if len(kinds) > 1:
        raise StoreError(
            f"the stores do not have the same kind of loss: {', '.join(sorted(map(str, kinds)))}",
            reason="a store has losses of one dtype for all rows, or none",
            remedy="merge those that have, or write them with the losses declared as a column",
        )


def _kind(manifest: Manifest) -> dict[str, Any]:
    return {key: value for key, value in manifest.identity().items() if key not in _OWN}


@dataclass(frozen=True)
class _Engine:
    """What made the rows of a store, as far as its manifest tells."""

    told: Manifest

    @property
    def k_total(self) -> int:
        return self.told.k_total

    @property
    def dtype(self) -> torch.dtype:
        return self.told.torch_dtype

    def manifest(self) -> dict[str, Any]:
        return self.told.engine


def _target(first: Manifest, into: StrPath, unit: int | None, duplicates: str) -> GradientStore:
    given: dict[str, Any] = {
        "info": first.info,
        "columns": first.declared,
        "data": first.data_files,
    }
    if not (Path(into) / MANIFEST).exists():
        return GradientStore.create(
            into,
            _Engine(first),
            unit=first.unit if unit is None else unit,
            duplicates=duplicates,
            notes=first.notes,
            **given,
        )
    store = GradientStore.resume(into, _Engine(first), **given)
    if store.manifest.duplicates != duplicates or store.manifest.unit != (unit or first.unit):
        store.close()
        raise _other(store)
    return store


def _blocks(stores: Sequence[GradientStore]) -> Iterator[tuple[int, StoredRows]]:
    """Yield all rows with the ordinals at which they begin."""
    start = 0
    for block in itertools.chain.from_iterable(store.blocks(_BLOCK) for store in stores):
        yield start, block
        start += len(block)


def _check_done(
    target: GradientStore, start: int, block: StoredRows, beside: Mapping[str, Tensor | Labels]
) -> None:
    """Raise if what is in the new store already is other than what belongs there, in any byte."""
    if not len(block):
        return
    stop = start + len(block)
    losses = {} if block.loss is None else {LOSS: block.loss}
    given = {"ids": block.ids, **losses, **block.columns}
    same = given.keys() == beside.keys() and _same(target.rows(start, stop), block.rows)
    if not same or not all(_same(_part(beside[name], start, stop), given[name]) for name in given):
        raise _other(target)


def _part(values: Tensor | Labels, start: int, stop: int) -> Tensor | Labels:
    if isinstance(values, Labels):
        return Labels(values.codes[start:stop], values.names)
    return values[start:stop]


def _same(there: Tensor | Labels, given: Tensor | Labels) -> bool:
    if isinstance(there, Labels) or isinstance(given, Labels):
        return list(there) == list(given)
    # Numbers that are not finite may stand in a column, and are not equal to themselves.
    return there.dtype == given.dtype and bytes_of(there.contiguous()) == bytes_of(
        given.contiguous()
    )


def _other(target: GradientStore) -> StoreError:
    return StoreError(
        f"the store at {target.path} does not hold what merging these stores begins with",
        reason="a merge goes on only with what the same merge has written",
        remedy="choose another folder, or give the stores as before",
    )
