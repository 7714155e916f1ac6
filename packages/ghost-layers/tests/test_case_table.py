"""Every layer configuration of the public table: all operations are exact, or it is refused."""

from __future__ import annotations

import re

import pytest

from ghost_core.testing import LAYERS, VARIANTS, check_example

REFUSED = {
    "batch norm 1d in training",
    "batch norm 2d in training",
    "batch norm without running statistics",
    "centred over the batch",
    "contrasted over the batch",
    "conv1d, unbatched",
    "conv2d, unbatched",
    "embedding bag, scaled by frequency",
    "embedding, scaled by frequency",
    "gradients disabled",
    "instance norm, unbatched",
    "layer norm, unbatched",
    "linear, behind a batch norm in training",
    "linear, unbatched",
    "normalised by its own code",
    "forward that holds the layer",
    "generator of the program",
    "recomputed by reentrant checkpointing",
    "recursive",
    "sequence first, undeclared",
    "sequence first, undeclared, as many tokens as samples",
    "spectral norm, by a hook",
    "weight norm, by a hook",
}


def marked(name: str) -> object:
    """Leave to the stress tests what is the same in another size or along other axes.

    That is what the table calls variants, and options of convolutions along one or three axes that
    those along two have.
    """
    along_two = re.sub("conv[13]d", "conv2d", name)
    again = name in VARIANTS or (along_two != name and "," in name and along_two in LAYERS)
    return pytest.param(name, marks=pytest.mark.stress if again else ())


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", [marked(name) for name in (*LAYERS, *VARIANTS)])
def test_all_operations_are_exact_or_refused(name: str) -> None:
    check_example(LAYERS.get(name) or VARIANTS[name])


def test_refused_are_these_and_no_others() -> None:
    assert {name for name, example in LAYERS.items() if example.refusal is not None} == REFUSED
    assert len(REFUSED) <= 30
