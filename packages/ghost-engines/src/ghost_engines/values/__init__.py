"""In-run values: what each training sample did for validation losses while training ran."""

from ghost_engines.values.credit import CreditedStep
from ghost_engines.values.in_run import InRunValues
from ghost_engines.values.table import COUNTS, Table

__all__ = ["COUNTS", "CreditedStep", "InRunValues", "Table"]
