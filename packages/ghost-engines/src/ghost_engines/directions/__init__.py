"""Directions: what per-sample gradients are multiplied with."""

from ghost_engines.directions.closures import Closure, ClosureSource
from ghost_engines.directions.collection import Directions
from ghost_engines.directions.factored import (
    FactoredDirection,
    Factors,
    Uses,
    dots_with,
    squared_norm_of,
)
from ghost_engines.directions.files import load_direction, save_direction
from ghost_engines.directions.transforms import (
    Gradient,
    Transform,
    adam_aware,
    second_order,
    unit_norm,
)

__all__ = [
    "Closure",
    "ClosureSource",
    "Directions",
    "FactoredDirection",
    "Factors",
    "Gradient",
    "Transform",
    "Uses",
    "adam_aware",
    "dots_with",
    "load_direction",
    "save_direction",
    "second_order",
    "squared_norm_of",
    "unit_norm",
]
