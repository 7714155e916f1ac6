"""Architectures of transformers with default options against per-sample autograd in float64.

Every trainable parameter of every architecture is compared, on batches with padding and attention
masks. What ghost cannot split it must refuse: `EXPECTED_REFUSALS` says which, and why.
"""

from __future__ import annotations

import pytest
import torch
from tests.zoo import FAMILIES, compare
from tests.zoo.compare import check_gradients, held_gradients
from torch import Tensor, nn

from ghost_core import GhostError
from ghost_core.testing import GradientHolder, per_sample_gradients

COUPLED = r"changing the gradient of sample 0's output alone changes other rows at"

EXPECTED_REFUSALS: dict[str, str] = {
    # Every image meets every text.
    "clip": COUPLED,
    "clip_logits": COUPLED,
}
"""What the refusal of an architecture says, by name."""

EXACT = [name for name in FAMILIES if name not in EXPECTED_REFUSALS]

UNLIKE_EACH_OTHER = {"gpt2", "llama", "mixtral", "mamba", "bert", "t5", "vit", "llava"}

STOOD_FOR = {
    "mamba",  # mamba_without_cache, and itself with as many samples as tokens
    "llava",  # itself with as many samples as tokens
    "distilbert",  # bert
    "wav2vec2_unmasked",  # wav2vec2
    "llava_two_images",  # llava_four_images
    "llava_some_images",  # llava_four_images
    "llava_two_images_not_owned",  # llava_four_images_not_owned
}
"""Architectures with the operations of another, which the default tests have."""


def but(names, others):
    """Leave others of the names to the stress tests."""
    return [
        pytest.param(name, marks=pytest.mark.stress if name in others else ()) for name in names
    ]


SOME = but(EXACT, {*EXACT} - UNLIKE_EACH_OTHER)
REPLAYED = {"mixtral", "mamba", "t5", "llava"}
"""What a frozen pass meets that it does not in other architectures."""


@pytest.mark.parametrize("name", but(EXACT, STOOD_FOR))
def test_every_parameter(name):
    compare(FAMILIES[name].case(4))


@pytest.mark.parametrize("name", SOME)
def test_as_many_samples_as_tokens(name):
    """Nothing tells the axes apart by size."""
    square = FAMILIES[name].square
    compare(FAMILIES[name].case(square, square))


@pytest.mark.stress
@pytest.mark.parametrize("name", EXACT)
def test_one_sample(name):
    compare(FAMILIES[name].case(1))


@pytest.mark.parametrize("name", but(EXACT, {*EXACT} - REPLAYED))
def test_frozen(name):
    compare(FAMILIES[name].case(3), frozen=True)


@pytest.mark.parametrize(
    "name", but([name for name in EXACT if FAMILIES[name].stochastic], STOOD_FOR | {"opt", "bert"})
)
def test_training_with_random_numbers(name):
    compare(FAMILIES[name].case(4, training=True))


@pytest.mark.stress
@pytest.mark.parametrize("seed", range(1, 4))
@pytest.mark.parametrize("n", [2, 3, 7])
@pytest.mark.parametrize("name", EXACT)
def test_other_batches_and_weights(name, n, seed):
    compare(FAMILIES[name].case(n, seed=seed))


@pytest.mark.parametrize("name", EXPECTED_REFUSALS)
def test_refused_by_name(name):
    family = FAMILIES[name]
    for case in (family.case(4), family.case(family.square, family.square)):
        with pytest.raises(GhostError, match=EXPECTED_REFUSALS[name]):
            held_gradients(case)


def test_contrastive_losses_are_split_by_row_of_the_output():
    """Where a loss couples samples, a contribution is what came through the sample's own row."""
    case = FAMILIES["clip_embeddings"].case(4)
    engine = GradientHolder(case.model)
    with engine, engine.batch(range(4)) as batch:
        contrastive_loss(*case.model(**case.batch)).backward()
    outputs = case.model(**case.batch)
    grads = torch.autograd.grad(contrastive_loss(*outputs), outputs, retain_graph=True)
    images, texts = ((each * grad).sum(1) for each, grad in zip(outputs, grads, strict=True))
    check_gradients(
        case, batch.result.materialize(), per_sample_gradients(case.model, images + texts)
    )


def contrastive_loss(images: Tensor, texts: Tensor) -> Tensor:
    """Return CLIP's own loss, in which every image meets every text."""
    logits, pairs = images @ texts.mT * 5, torch.arange(len(images))
    each_way = [nn.functional.cross_entropy(side, pairs) for side in (logits, logits.mT)]
    return torch.stack(each_way).mean()
