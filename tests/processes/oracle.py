"""The same training in one process, with one autograd call per sample."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import torch
from tests.processes.training import CLIP, RATE, Case, Net, held_out, losses, net, samples
from torch import Tensor

WORLD = 2


@dataclass
class Expected:
    """What two processes are to find.

    Attributes:
        parameters: Parameters after the run.
        scores: By process and micro-batch: the score of each sample.
        values: By process: the value of each sample.
        sizes: What scores are to be compared to, largest of all.
    """

    parameters: dict[str, Tensor]
    scores: list[list[dict[int, float]]] = field(default_factory=lambda: [[], []])
    values: list[dict[int, float]] = field(
        default_factory=lambda: [defaultdict(float), defaultdict(float)]
    )


def expected(case: Case) -> Expected:
    """Train on the union of what the processes have, and add up each sample's part."""
    model, inputs = net(), samples()
    parameters = list(model.parameters())
    found = Expected({name: each.detach() for name, each in model.named_parameters()})
    for step in case.steps:
        gradient = [torch.zeros_like(each) for each in parameters]
        waiting = []
        for at, parts in enumerate(step):
            direction = _direction(case, model)
            for rank in range(WORLD):
                scores = {}
                for sample in parts[rank]:
                    own = losses(model(inputs[[sample]], case.head(rank, at))).sum()
                    # The mean over the process's samples, averaged over processes.
                    part = _gradients(own / len(parts[rank]) / WORLD, parameters)
                    gradient = [a + b for a, b in zip(gradient, part, strict=True)]
                    scores[sample] = _dot(part, direction)
                found.scores[rank].append(scores)
                waiting += [(rank, sample, score) for sample, score in scores.items()]
        norm = float(torch.stack([each.norm() for each in gradient]).norm())
        factor = min(1.0, CLIP / (norm + 1e-6)) if case.clips else 1.0
        for rank, sample, score in waiting:
            found.values[rank][sample] += RATE * factor * score
        with torch.no_grad():
            for parameter, each in zip(parameters, gradient, strict=True):
                parameter -= RATE * factor * each
    return found


def _direction(case: Case, model: Net) -> list[Tensor]:
    """Return the gradient of the mean of the processes' validation losses."""
    model.eval()
    targets = [held_out()[list(part)] for part in case.validation]
    means = [losses(model(target)).mean() for target in targets]
    model.train()
    return _gradients(torch.stack(means).mean(), list(model.parameters()))


def _gradients(loss: Tensor, parameters: list[torch.nn.Parameter]) -> list[Tensor]:
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def _dot(one: list[Tensor], other: list[Tensor]) -> float:
    return float(sum((a * b).sum() for a, b in zip(one, other, strict=True)))
