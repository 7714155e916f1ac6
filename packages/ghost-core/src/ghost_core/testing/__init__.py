"""The public test kit: conformance tests for samplers, engines and projections, and the oracle.

It needs nothing but ghost-core, and no test framework: checks raise `AssertionError`.
"""

from ghost_core.testing.cases import LAYERS, VARIANTS, of_class, of_family, semantic_key
from ghost_core.testing.engines import check_engine
from ghost_core.testing.examples import (
    VOCABULARY,
    Inputs,
    LayerExample,
    N,
    given,
    indices,
    losses,
    normal,
)
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
from ghost_core.testing.samplers import (
    REDUCED_PRECISION,
    check_example,
    check_layer,
    check_sampler,
)
from ghost_core.testing.shapley import shapley, subset_sums
from ghost_core.testing.tiny import TinyTransformer, next_token_losses
from ghost_core.testing.trials import capture, dense

__all__ = [
    "LAYERS",
    "REDUCED_PRECISION",
    "VARIANTS",
    "VOCABULARY",
    "GradientHolder",
    "Gradients",
    "Held",
    "Inputs",
    "LayerExample",
    "N",
    "PlainEmbedding",
    "PlainLayerNorm",
    "PlainLinear",
    "TinyTransformer",
    "Use",
    "agreeing_gradients",
    "assert_within",
    "capture",
    "check_engine",
    "check_example",
    "check_layer",
    "check_operations",
    "check_projection",
    "check_sampler",
    "dense",
    "given",
    "indices",
    "losses",
    "next_token_losses",
    "normal",
    "of_class",
    "of_family",
    "per_sample_gradients",
    "plain_registry",
    "semantic_key",
    "shapley",
    "subset_sums",
]
