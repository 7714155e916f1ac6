"""Per-sample gradient algebra, the sampler and engine interfaces, and the plugin system."""

from ghost_core.capture import Pass
from ghost_core.engine import Batch, Engine
from ghost_core.errors import (
    CaptureError,
    GhostError,
    MissingExtraError,
    PluginConflictError,
    PluginError,
    UnknownNameError,
    UnsupportedLayerError,
    WrongSplitError,
)
from ghost_core.factors import InputFactor, Record, Rows, Tokens
from ghost_core.gradients import Dense, Outer, PerSampleGradient
from ghost_core.hookspecs import hookimpl
from ghost_core.projection import Projection
from ghost_core.recorder import Freeze
from ghost_core.registry import SamplerRegistry
from ghost_core.sampler import Call, GradientSampler, as_tokens
from ghost_core.tracking import Site

__all__ = [
    "Batch",
    "Call",
    "CaptureError",
    "Dense",
    "Engine",
    "Freeze",
    "GhostError",
    "GradientSampler",
    "InputFactor",
    "MissingExtraError",
    "Outer",
    "Pass",
    "PerSampleGradient",
    "PluginConflictError",
    "PluginError",
    "Projection",
    "Record",
    "Rows",
    "SamplerRegistry",
    "Site",
    "Tokens",
    "UnknownNameError",
    "UnsupportedLayerError",
    "WrongSplitError",
    "as_tokens",
    "hookimpl",
]
