"""Samplers for the layers of transformers, which is never imported."""

from ghost_layers.transformers.embeddings import TRANSFORMERS_EMBEDDINGS
from ghost_layers.transformers.formula import FormulaChecked, Random
from ghost_layers.transformers.names import class_names
from ghost_layers.transformers.norms import TRANSFORMERS_NORMS
from ghost_layers.transformers.replays import TRANSFORMERS_REPLAYS

__all__ = [
    "TRANSFORMERS_EMBEDDINGS",
    "TRANSFORMERS_NORMS",
    "TRANSFORMERS_REPLAYS",
    "FormulaChecked",
    "Random",
    "class_names",
]
