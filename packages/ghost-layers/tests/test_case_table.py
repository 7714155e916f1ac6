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
    """Leave to the stress tests what is the same in another size, or that others stand for.

    That is what the table calls variants, options that another layer with the same code has
    (convolutions and norms along two axes, an LSTM but for biases and states, an encoder layer),
    and several options at once where the table has each alone.
    """
    other = name
    for layers, standing in STANDING_FOR.items():
        other = re.sub(layers, standing, other)
    layer, *options = name.split(", ")
    each_alone = len(options) > 1 and all(f"{layer}, {each}" in LAYERS for each in options)
    again = name in VARIANTS or each_alone or (other != name and "," in name and other in LAYERS)
    return pytest.param(name, marks=pytest.mark.stress if again else ())


STANDING_FOR = {
    "conv[13]d": "conv2d",
    "norm [13]d": "norm 2d",
    "[013] spatial": "2 spatial",
    "^(rnn|gru), (?!no bias|given)": "lstm, ",
    "^decoder layer": "encoder layer",
}
"""Layers, and those that stand for them in the default tests."""


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", [marked(name) for name in (*LAYERS, *VARIANTS)])
def test_all_operations_are_exact_or_refused(name: str) -> None:
    check_example(LAYERS.get(name) or VARIANTS[name])


def test_refused_are_these_and_no_others() -> None:
    assert {name for name, example in LAYERS.items() if example.refusal is not None} == REFUSED
    assert len(REFUSED) <= 30
