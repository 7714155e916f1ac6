"""Whitened scores of a logistic regression on digits, against training it again."""

import logging

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from ghost_engines import GradientStore, ProjectionEngine
from ghost_engines.search import Whitening, scores

logger = logging.getLogger(__name__)

CLASSES, DECAY, TRAINED, TESTED = 10, 1.0, 1200, 30


def digits() -> tuple[Tensor, Tensor]:
    sklearn = pytest.importorskip("sklearn.datasets")
    images, labels = sklearn.load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return torch.tensor(images)[order] / 16, torch.tensor(labels)[order]


def fitted(images: Tensor, labels: Tensor, weights: Tensor, start: Tensor) -> Tensor:
    """Return the minimum of the weighted sum of losses and DECAY / 2 · |W|², by Newton's steps."""
    found, size = start, start.numel()
    for _ in range(40):
        p = (images @ found.T).softmax(1)
        gradient = ((p - one_hot(labels, CLASSES)) * weights[:, None]).T @ images + DECAY * found
        if gradient.norm() < 1e-9:
            return found
        spread = (torch.diag_embed(p) - p[:, :, None] * p[:, None]) * weights[:, None, None]
        hessian = (spread.permute(1, 2, 0)[..., None] * images).mT @ images
        hessian = hessian.permute(0, 2, 1, 3).reshape(size, size)
        hessian.diagonal().add_(DECAY)
        found = found - torch.linalg.solve(hessian, gradient.flatten()).view_as(found)
    raise AssertionError("did not converge")


def store(
    path, model: nn.Module, images: Tensor, labels: Tensor, weights: Tensor | None = None
) -> GradientStore:
    """Store whole gradients: an axis that is not longer than its share is kept as it is."""
    engine = ProjectionEngine(model, dim=10 * 64, dtype="float64")
    with GradientStore.create(path, engine) as made, engine.frozen():
        with engine.batch(range(len(labels))):
            losses = cross_entropy(model(images), labels, reduction="none")
            (losses if weights is None else losses * weights).sum().backward()
        made.append(engine.collect())
    return GradientStore.open(path)


def correlation(a: Tensor, b: Tensor) -> float:
    """Return the mean correlation of rows with rows."""
    return torch.stack(
        [torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(a, b, strict=True)]
    ).mean().item()  # fmt: skip


def ranks(values: Tensor) -> Tensor:
    return values.argsort(1).argsort(1).double()


@pytest.mark.stress
def test_whitened_scores_tell_what_training_without_samples_does(tmp_path):
    images, labels = digits()
    asked, answers = images[TRAINED:][:TESTED], labels[TRAINED:][:TESTED]
    images, labels = images[:TRAINED], labels[:TRAINED]
    everything = torch.ones(TRAINED, dtype=torch.float64)
    best = fitted(images, labels, everything, torch.zeros(CLASSES, 64, dtype=torch.float64))
    model = nn.Linear(64, CLASSES, bias=False, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(best)

    def losses(weights: Tensor, start: Tensor) -> Tensor:
        return cross_entropy(
            asked @ fitted(images, labels, weights, start).T, answers, reduction="none"
        )

    generator = torch.Generator().manual_seed(1)
    without, base = range(0, TRAINED, 30), losses(everything, best)
    left_out = torch.stack(
        [losses(everything.index_fill(0, torch.tensor([at]), 0.0), best) - base for at in without],
        1,
    )
    subsets = torch.zeros(40, TRAINED, dtype=torch.float64)
    for subset in subsets:
        subset[torch.randperm(TRAINED, generator=generator)[: TRAINED // 2]] = 1
    retrained = torch.stack([losses(subset, best / 2) for subset in subsets], 1)

    gradients = store(tmp_path / "g", model, images, labels)
    queries = store(tmp_path / "q", model, asked, answers).rows()
    # Of each class, weighted by the root of its probability: C is the Fisher information, over 10.
    likely = (images @ best.T).softmax(1).flatten().sqrt()
    classes = torch.arange(CLASSES).repeat(TRAINED)
    repeated = images.repeat_interleave(CLASSES, 0)
    fisher = store(tmp_path / "f", model, repeated, classes, likely)
    mean = Whitening.of(fisher, 0.0).moments["weight"].diagonal().mean().item()
    exact = DECAY / TRAINED / CLASSES / mean  # the damping that is the weight decay

    found = {}
    for name, by in {
        "dot": "dot",
        "own rows": Whitening.of(gradients),
        "Fisher": Whitening.of(fisher, exact),
    }.items():
        table = scores(gradients, queries, by).scores
        found[name] = (
            correlation(table[:, list(without)], left_out),
            correlation(ranks(table @ subsets.T), ranks(-retrained)),
        )
    logger.info("leave-one-out and LDS: %s", found)
    assert found["Fisher"][0] > 0.98
    assert found["Fisher"][1] > 0.9
    assert found["own rows"][1] > found["dot"][1] + 0.2
    assert 0.25 < found["dot"][1] < 0.5
