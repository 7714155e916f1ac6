"""Which columns of a row belong to which parameter, as a store's manifest says."""

from __future__ import annotations

import itertools
from typing import TypeAlias

import torch
from torch import Tensor

from ghost_core.tracking import Patterns, select_parameters
from ghost_engines.store.errors import StoreError
from ghost_engines.store.manifest import Manifest

Columns: TypeAlias = slice | Tensor
"""Columns that stand side by side, or their numbers, int64 `[c]`."""


def parameter_columns(manifest: Manifest) -> dict[str, slice]:
    """Return the columns of each parameter.

    Raises:
        StoreError: If the manifest does not say which parameters the rows are of.
    """
    layers = manifest.engine.get("layers")
    try:
        starts = {str(layer["name"]): int(layer["offset"]) for layer in layers or ()}
    except (KeyError, TypeError, ValueError):
        starts = {}
    ends = [*starts.values(), manifest.k_total]
    if not starts or ends[0] != 0 or any(a >= b for a, b in itertools.pairwise(ends)):
        raise StoreError(
            "the manifest does not say which columns belong to which parameter",
            reason="the engine that the store was made with does not list its 'layers' by 'name' "
            "and 'offset'",
            remedy='compare whole rows: leave parameters out, and give blocks="all" to a whitening',
        )
    return {name: slice(*ends[at : at + 2]) for at, name in enumerate(starts)}


def columns_of(manifest: Manifest, parameters: Patterns | None) -> Columns:
    """Return the columns of some parameters.

    Args:
        manifest: What the rows are.
        parameters: Globs over names of modules and parameters; None for all columns.

    Raises:
        UnknownNameError: If a glob matches nothing.
        CaptureError: If they are no globs.
        StoreError: If the manifest does not say which parameters the rows are of.
    """
    if parameters is None:
        return slice(0, manifest.k_total)
    places = parameter_columns(manifest)
    chosen = select_parameters(([name] for name in places), parameters, "parameters")
    if not chosen:
        raise StoreError("parameters names none", remedy="give a glob such as '*.attn.*'")
    found = [place for name, place in places.items() if name in chosen]
    if all(a.stop == b.start for a, b in itertools.pairwise(found)):
        return slice(found[0].start, found[-1].stop)
    return torch.cat([torch.arange(place.start, place.stop, device="cpu") for place in found])


def count(columns: Columns) -> int:
    """Return how many columns there are."""
    return columns.stop - columns.start if isinstance(columns, slice) else len(columns)
