"""Per-sample gradient algebra, the sampler and engine interfaces, and the plugin system."""

from ghost_core.algebra import (
    Dense,
    InputFactor,
    Lookups,
    Outer,
    Owned,
    PerSampleGradient,
    Record,
    Tokens,
    accumulation_dtype,
    full_precision,
    matrix_shape,
)
from ghost_core.batch import Batch, SampleIds
from ghost_core.capture import Freeze, Pass
from ghost_core.compare import Comparison, ParameterCheck
from ghost_core.engine import Engine, EngineOptions
from ghost_core.errors import (
    CaptureError,
    GhostError,
    MissingExtraError,
    PluginConflictError,
    PluginError,
    UnbalancedError,
    UnknownNameError,
    UnknownOptionError,
    UnsupportedLayerError,
    WrongSplitError,
)
from ghost_core.plugins import Command, Override, hookimpl
from ghost_core.policy import Policy
from ghost_core.projection import Projection
from ghost_core.sampler import Call, GradientSampler, PastCall, as_tokens
from ghost_core.tracking import Claim, Patterns, SamplerRegistry, TrackedParameter

__all__ = [
    "Batch",
    "Call",
    "CaptureError",
    "Claim",
    "Command",
    "Comparison",
    "Dense",
    "Engine",
    "EngineOptions",
    "Freeze",
    "GhostError",
    "GradientSampler",
    "InputFactor",
    "Lookups",
    "MissingExtraError",
    "Outer",
    "Override",
    "Owned",
    "ParameterCheck",
    "Pass",
    "PastCall",
    "Patterns",
    "PerSampleGradient",
    "PluginConflictError",
    "PluginError",
    "Policy",
    "Projection",
    "Record",
    "SampleIds",
    "SamplerRegistry",
    "Tokens",
    "TrackedParameter",
    "UnbalancedError",
    "UnknownNameError",
    "UnknownOptionError",
    "UnsupportedLayerError",
    "WrongSplitError",
    "accumulation_dtype",
    "as_tokens",
    "full_precision",
    "hookimpl",
    "matrix_shape",
]
