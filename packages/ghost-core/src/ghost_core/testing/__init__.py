"""The public test kit: conformance tests for samplers, engines and projections, and the oracle.

It needs nothing but ghost-core, and no test framework: checks raise `AssertionError`.
"""

from ghost_core.testing.engines import check_engine
from ghost_core.testing.holder import GradientHolder, Held, Use
from ghost_core.testing.operations import Gradients, check_operations
from ghost_core.testing.oracle import agreeing_gradients, assert_within, per_sample_gradients
from ghost_core.testing.plain import (
    PlainEmbedding,
    PlainLayerNorm,
    PlainLinear,
    plain_registry,
)
from ghost_core.testing.projections import check_projection
from ghost_core.testing.samplers import REDUCED_PRECISION, check_sampler
from ghost_core.testing.tiny import TinyTransformer, next_token_losses

__all__ = [
    "REDUCED_PRECISION",
    "GradientHolder",
    "Gradients",
    "Held",
    "PlainEmbedding",
    "PlainLayerNorm",
    "PlainLinear",
    "TinyTransformer",
    "Use",
    "agreeing_gradients",
    "assert_within",
    "check_engine",
    "check_operations",
    "check_projection",
    "check_sampler",
    "next_token_losses",
    "per_sample_gradients",
    "plain_registry",
]
