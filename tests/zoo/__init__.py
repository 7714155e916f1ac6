"""Tiny models of transformers with their batches, and how they are compared with autograd."""

from tests.zoo.audio import AUDIO
from tests.zoo.compare import compare
from tests.zoo.decoders import DECODERS
from tests.zoo.encoders import ENCODERS
from tests.zoo.family import Case, Family
from tests.zoo.images import IMAGES
from tests.zoo.pairs import PAIRS

FAMILIES: dict[str, Family] = {**DECODERS, **ENCODERS, **IMAGES, **AUDIO, **PAIRS}
"""Every architecture by name."""

__all__ = ["FAMILIES", "Case", "Family", "compare"]
