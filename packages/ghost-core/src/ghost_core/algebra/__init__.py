"""What a per-sample gradient is and what can be asked of it; knows no module and no model."""

from ghost_core.algebra.dense import Dense, read_only
from ghost_core.algebra.factors import InputFactor, Lookups, Record, Tokens
from ghost_core.algebra.gradients import (
    PerSampleGradient,
    as_rows,
    gram_of_uses,
    matrix_shape,
    paired_of_uses,
)
from ghost_core.algebra.numerics import (
    accumulation_dtype,
    building_at_most,
    chunks,
    full_precision,
    precisely,
)
from ghost_core.algebra.outer import Outer
from ghost_core.algebra.owned import Owned
from ghost_core.algebra.precision import INSIDE, PRECISIONS, TF32, Precision, floating_dtypes
from ghost_core.algebra.reduced import Reduced
from ghost_core.algebra.weighing import weighed, weight_of

__all__ = [
    "INSIDE",
    "PRECISIONS",
    "TF32",
    "Dense",
    "InputFactor",
    "Lookups",
    "Outer",
    "Owned",
    "PerSampleGradient",
    "Precision",
    "Record",
    "Reduced",
    "Tokens",
    "accumulation_dtype",
    "as_rows",
    "building_at_most",
    "chunks",
    "floating_dtypes",
    "full_precision",
    "gram_of_uses",
    "matrix_shape",
    "paired_of_uses",
    "precisely",
    "read_only",
    "weighed",
    "weight_of",
]
