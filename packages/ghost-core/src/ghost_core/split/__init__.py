"""Which row belongs to which sample: declared, then proven."""

from ghost_core.split.axes import RowAxes, describe, find_axes
from ghost_core.split.balance import Balance
from ghost_core.split.lifts import Lift
from ghost_core.split.owners import Fold, find_owner, owner_of_rows
from ghost_core.split.probe import nan_in, numbers_in, probed_samples
from ghost_core.split.sites import Site
from ghost_core.split.verifier import Verifier

__all__ = [
    "Balance",
    "Fold",
    "Lift",
    "RowAxes",
    "Site",
    "Verifier",
    "describe",
    "find_axes",
    "find_owner",
    "nan_in",
    "numbers_in",
    "owner_of_rows",
    "probed_samples",
]
