"""Samplers for the layers of transformers, which is never imported."""

from ghost_layers.transformers.embeddings import TRANSFORMERS_EMBEDDINGS
from ghost_layers.transformers.formula import FormulaChecked, Random, other_formula
from ghost_layers.transformers.names import class_names
from ghost_layers.transformers.norms import TRANSFORMERS_NORMS, ImageLayerNormSampler
from ghost_layers.transformers.replays import TRANSFORMERS_REPLAYS

__all__ = [
    "TRANSFORMERS_EMBEDDINGS",
    "TRANSFORMERS_NORMS",
    "TRANSFORMERS_REPLAYS",
    "FormulaChecked",
    "ImageLayerNormSampler",
    "Random",
    "class_names",
    "other_formula",
]
