"""Where rows come from: whether they may stand in a store, or be compared with its rows.

Rows that an engine made carry its manifest. Tensors, and rows that are put together by hand, do
not say what they are, and are taken as given.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ghost_engines.store.errors import StoreError
from ghost_engines.store.manifest import Manifest, differences, plain
from ghost_engines.store.rows import RowBatch

_SHOWN = 6

_FREE = ("dtype", "verified")
"""What queries may have otherwise: it changes no direction."""


class OtherRowsError(StoreError):
    """Rows that would be appended are not of the kind of those in a store.

    Args:
        root: Folder of the store.
        stored: What the rows in the store are.
        now: What the rows are that would be appended.

    Attributes:
        stored: What the rows in the store are.
        now: What the rows are that would be appended.
    """

    def __init__(self, root: Path, stored: Manifest, now: Manifest) -> None:
        self.stored, self.now = stored, now
        super().__init__(
            f"the rows would not be those of the store at {root}: "
            f"{listed(stored.differences(now))}",
            reason="rows that were made in another way cannot be compared",
            remedy="make the engine, info and columns as they were when the store was made, or "
            "make another store with GradientStore.create(path, engine)",
        )


def check_origin(batch: RowBatch, store: Manifest) -> None:
    """Refuse to store rows of another engine.

    Raises:
        StoreError: If they are.
    """
    made = getattr(batch, "manifest", None)
    if isinstance(made, Mapping) and (found := _other(store.engine, made)):
        raise StoreError(
            f"the rows of the batch are not of the engine that the store was made with: "
            f"{listed(found)}",
            reason="rows that were projected in another way cannot be compared",
            remedy="append what that engine collects, or make another store with "
            "GradientStore.create(path, engine)",
        )


def check_verified(batch: RowBatch, store: Manifest) -> None:
    """Refuse rows whose split by sample is not verified where the store says that it is.

    Raises:
        StoreError: If it is not.
    """
    if store.engine.get("verified") is True and getattr(batch, "verified", True) is False:
        raise StoreError(
            "the batch is not verified, and the store says of all its rows that they are",
            reason="not all of its passes could be compared, as where a module runs for the first "
            "time",
            remedy="run the batch once more, which verifies it; or make an engine with "
            "verify=False, and a store with that engine",
        )


def query_rows(queries: Tensor | RowBatch, store: Manifest) -> Tensor:
    """Return the rows to search with, `[Q, k_total]`.

    Args:
        queries: Rows as a tensor, or with the manifest of the engine that made them.
        store: What the rows in the store are.

    Raises:
        StoreError: If they are rows of another engine.
    """
    if isinstance(queries, Tensor) or not hasattr(queries, "rows"):
        return queries  # type: ignore[return-value] # the search says what is wrong with others
    made = getattr(queries, "manifest", None)
    if isinstance(made, Mapping) and (found := _unlike(store.engine, made)):
        raise StoreError(
            f"the queries are not of the kind that the store holds: {listed(found)}",
            reason="scores between rows that were projected in different ways are noise",
            remedy="make the queries with an engine like that of the store; its manifest has "
            "the options",
        )
    return queries.rows


def check_alike(ours: Manifest, theirs: Manifest, what: str) -> None:
    """Refuse to use what was made from one store on another, unless their rows are of one kind.

    Args:
        ours: What the rows are that it is used on.
        theirs: What the rows are that it was made from.
        what: What it is.

    Raises:
        StoreError: If they were projected in different ways, or are of different models.
    """
    found = _unlike(ours.engine, theirs.engine)
    models = [each.info["model"] for each in (ours, theirs) if "model" in each.info]
    if models[1:] and models[0] != models[1]:
        found.append("info.model")
    if found:
        raise StoreError(
            f"the {what} is of rows of another kind than those that it is used on: {listed(found)}",
            reason="columns of rows that were made in different ways mean different things",
            remedy=f"make a {what} of the store itself, or of one by the same engine and model",
        )


def _unlike(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Return in what rows differ that cannot be compared with each other."""
    mine, yours = (
        {key: value for key, value in each.items() if key not in _FREE} for each in (ours, theirs)
    )
    return _other(mine, yours)


def _other(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    return list(differences("", ours, plain("the rows' manifest", theirs)))


def listed(found: list[str]) -> str:
    """Return differences between manifests as a text, those of layers last and not all."""
    found = sorted(found, key=lambda line: line.startswith("layers"))
    more = len(found) - _SHOWN
    return "; ".join([*found[:_SHOWN], *([f"and {more} more"] if more > 0 else [])])
