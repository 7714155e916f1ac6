"""Other people's models against one autograd call per sample, in float64.

In training, frozen and by `engine.verify`, numbers are exact in all parameters, or the pattern is
on the list of refusals.
"""

from __future__ import annotations

import pytest
from tests.foreign.adapters import ADAPTERS
from tests.foreign.foreign import WAYS, Foreign, check
from tests.foreign.graphs import GRAPHS
from tests.foreign.images import IMAGES
from tests.foreign.language import LANGUAGE
from tests.foreign.refused import REFUSED
from tests.foreign.rows import ROWS
from tests.foreign.speech import SPEECH
from tests.foreign.vision import VISION

from ghost_core import GhostError

ALL = [*LANGUAGE, *VISION, *IMAGES, *GRAPHS, *ADAPTERS, *ROWS, *SPEECH]

NAMES = {foreign.name for foreign in ALL}


STOOD_FOR = {
    "nanogpt_with_targets",  # nanogpt
    "x_transformers",  # x_transformers_relative
    "swin_v2",  # torchvision_swin
    "beit",  # eva
    "resnet",  # timm_resnet
    "prompt_tuning",  # prefix_tuning
    "gcn",  # gin
    "lora",  # dora
}
"""Patterns whose operations another one of the most used has."""


def params(chosen: list[Foreign]) -> list[object]:
    """Mark what is not among the most used, or what others stand for, as `stress`."""
    return [
        pytest.param(
            foreign,
            id=foreign.name,
            marks=() if foreign.everyday and foreign.name not in STOOD_FOR else pytest.mark.stress,
        )
        for foreign in chosen
    ]


def test_names_are_known_and_unique() -> None:
    assert len(NAMES) == len(ALL)
    assert REFUSED.keys() <= NAMES


def test_refusals_are_few() -> None:
    assert len(REFUSED) <= 0.05 * len(ALL)


def test_a_dozen_or_more_are_everyday() -> None:
    assert 12 <= sum(foreign.everyday for foreign in ALL) <= 30


@pytest.mark.parametrize("foreign", params([each for each in ALL if each.name not in REFUSED]))
def test_exact_in_every_way(foreign: Foreign) -> None:
    for way in WAYS:
        check(foreign, way)


@pytest.mark.parametrize("foreign", params([each for each in ALL if each.name in REFUSED]))
def test_refused_in_every_way(foreign: Foreign) -> None:
    for way in WAYS:
        with pytest.raises(GhostError, match=REFUSED[foreign.name]):
            check(foreign, way)
