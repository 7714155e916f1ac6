"""Trains language models of any size, with values of their samples."""

from ghost_examples.language_models.data import Batches, Corpora, blocks, loader, open_corpora
from ghost_examples.language_models.launch import run
from ghost_examples.language_models.models import PRESETS, new_gpt2, per_sample_loss
from ghost_examples.language_models.options import Options
from ghost_examples.language_models.sources import Source
from ghost_examples.language_models.tokenizers import EMBEDDED, Tokenizer, open_tokenizer
from ghost_examples.language_models.writing import TRAIN, VAL, Cut, Written, write_domain

__all__ = [
    "EMBEDDED",
    "PRESETS",
    "TRAIN",
    "VAL",
    "Batches",
    "Corpora",
    "Cut",
    "Options",
    "Source",
    "Tokenizer",
    "Written",
    "blocks",
    "loader",
    "new_gpt2",
    "open_corpora",
    "open_tokenizer",
    "per_sample_loss",
    "run",
    "write_domain",
]
