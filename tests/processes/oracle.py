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
        cosines: By process and micro-batch: the cosine of each sample.
        values: By process: the value of each sample.
    """

    parameters: dict[str, Tensor]
    scores: list[list[dict[int, float]]] = field(default_factory=lambda: [[], []])
    cosines: list[list[list[float]]] = field(default_factory=lambda: [[], []])
    values: list[dict[int, float]] = field(
        default_factory=lambda: [defaultdict(float), defaultdict(float)]
    )


def expected(case: Case) -> Expected:
    """Train on the union of what the processes have, and add up each sample's part."""
    model, inputs = net(case.again), samples()
    parameters = list(model.parameters())
    found = Expected({name: each.detach() for name, each in model.named_parameters()})
    for step in case.steps:
        gradient = [torch.zeros_like(each) for each in parameters]
        waiting = []
        for at, parts in enumerate(step):
            direction = _gradients(_held_out_loss(case, model, at), parameters)
            for rank in range(WORLD):
                scores, cosines = {}, []
                for sample in parts[rank]:
                    own = losses(model(inputs[[sample]], case.head(rank, at))).sum()
                    # The mean over the process's samples, averaged over processes.
                    part = _gradients(own / len(parts[rank]) / WORLD, parameters)
                    gradient = [a + b for a, b in zip(gradient, part, strict=True)]
                    scores[sample] = _dot(part, direction)
                    cosines.append(scores[sample] / _norm(part) / _norm(direction))
                    waiting.append((rank, sample, part, scores[sample]))
                found.scores[rank].append(scores)
                found.cosines[rank].append(cosines)
        factor = min(1.0, CLIP / (_norm(gradient) + 1e-6)) if case.clips else 1.0
        bend = _bend(case, model, [-RATE * factor * each for each in gradient])
        for rank, sample, part, score in waiting:
            found.values[rank][sample] += RATE * factor * (score + _dot(part, bend) / 2)
        with torch.no_grad():
            for parameter, each in zip(parameters, gradient, strict=True):
                parameter -= RATE * factor * each
    return found


def _held_out_loss(case: Case, model: Net, at: int | None = None) -> Tensor:
    """Return the mean of the processes' validation losses.

    Args:
        case: The run.
        model: The model.
        at: The micro-batch, whose heads are used where validation samples go with it.
    """
    model.eval()
    means = []
    for rank, part in enumerate(case.validation):
        head = case.head(rank, at) if case.joins and at is not None else None
        means.append(losses(model(held_out()[list(part)], head)).mean())
    model.train()
    return torch.stack(means).mean()


def _bend(case: Case, model: Net, step: list[Tensor]) -> list[Tensor]:
    """Return the Hessian of the validation loss times a step, or zeros for the first order."""
    parameters = list(model.parameters())
    if case.order == 1:
        return [torch.zeros_like(each) for each in step]
    loss = _held_out_loss(case, model)
    gradients = torch.autograd.grad(loss, parameters, create_graph=True)
    slope = torch.stack([(a * b).sum() for a, b in zip(gradients, step, strict=True)]).sum()
    return _gradients(slope, parameters)


def _gradients(loss: Tensor, parameters: list[torch.nn.Parameter]) -> list[Tensor]:
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def _dot(one: list[Tensor], other: list[Tensor]) -> float:
    return float(sum((a * b).sum() for a, b in zip(one, other, strict=True)))


def _norm(tensors: list[Tensor]) -> float:
    return float(torch.stack([each.norm() for each in tensors]).norm())
