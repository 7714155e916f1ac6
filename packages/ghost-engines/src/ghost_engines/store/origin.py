"""Where rows come from: whether they may stand in a store, or be compared with its rows.

Rows that an engine made carry its manifest. Tensors, and rows that are put together by hand, do
not say what they are, and are taken as given.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ghost_engines.store.errors import StoreError
from ghost_engines.store.manifest import Manifest, differences, plain
from ghost_engines.store.rows import RowBatch

_SHOWN = 6

_DIGEST = re.compile("[0-9a-f]{64}")
"""What `model_digest` returns."""

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
    """Refuse to store rows of another engine or model.

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
    if _of_another_model(batch, store):
        raise StoreError(
            "the rows of the batch are of another model than those in the store",
            reason="gradients of one model cannot be compared with those of another",
            remedy="append rows of that model, or make another store with "
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
        StoreError: If they are rows of another engine, or of another model.
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
    if _of_another_model(queries, store):
        raise StoreError(
            "the queries are of another model than the rows in the store",
            reason="its parameters or buffers have other values or dtypes, and gradients differ",
            remedy="project the queries with the model that the store was made with, or, to ask "
            "another one on purpose, with project_queries(..., digest=False)",
        )
    return queries.rows


def _of_another_model(batch: RowBatch, store: Manifest) -> bool:
    """Return whether rows are of another model than a store's, if both say which they are of."""
    stored, made = store.info.get("model"), getattr(batch, "model", None)
    # What a user calls a model in the store's info need not be a digest.
    known = isinstance(stored, str) and _DIGEST.fullmatch(stored) is not None
    return known and made is not None and made != stored


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
