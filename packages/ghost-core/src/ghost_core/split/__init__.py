"""Which row belongs to which sample: declared, then proven."""

from ghost_core.split.axes import Layout, describe, expanded, lay_out
from ghost_core.split.balance import Balance
from ghost_core.split.owners import Fold, find_owner
from ghost_core.split.probe import nan_in, numbers_in, probed_samples
from ghost_core.split.reasons import unclear_fold
from ghost_core.split.verifier import Verifier

__all__ = [
    "Balance",
    "Fold",
    "Layout",
    "Verifier",
    "describe",
    "expanded",
    "find_owner",
    "lay_out",
    "nan_in",
    "numbers_in",
    "probed_samples",
    "unclear_fold",
]
