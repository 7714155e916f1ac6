"""In-run values: what each training sample did for validation losses while training ran."""

from ghost_engines.values.credit import CreditedStep
from ghost_engines.values.groups import GroupValues
from ghost_engines.values.history import History
from ghost_engines.values.in_run import InRunValues
from ghost_engines.values.optimizers import skipped, stepping
from ghost_engines.values.sums import COUNTS, Sums
from ghost_engines.values.value_table import ValueTable

__all__ = [
    "COUNTS",
    "CreditedStep",
    "GroupValues",
    "History",
    "InRunValues",
    "Sums",
    "ValueTable",
    "skipped",
    "stepping",
]
