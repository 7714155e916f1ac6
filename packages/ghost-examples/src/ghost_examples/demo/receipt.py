"""The receipt: are the numbers right, is training untouched, and what does scoring cost?

Nothing is taken on trust. The reference for every number is autograd alone, asked for one sample
after the other, in float64.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor, nn

from ghost_engines import DotProductEngine, ProjectionEngine

TOLERANCE = 1e-9
"""Largest deviation that passes, in float64."""


@dataclass(frozen=True)
class Subject:
    """A model to check, with data.

    Attributes:
        name: For a reader.
        model: The model; it is copied.
        inputs: Training samples, `[n, ...]`.
        labels: Their labels, `[n, ...]`.
        held_out: Validation samples and their labels.
        losses: Returns the samples' losses `[N]` for a model, inputs and labels.
        batch: Samples per step.
        lr: Learning rate of plain gradient descent.
    """

    name: str
    model: nn.Module
    inputs: Tensor
    labels: Tensor
    held_out: tuple[Tensor, Tensor]
    losses: Callable[[nn.Module, Tensor, Tensor], Tensor]
    batch: int
    lr: float

    def loss_of(self, model: nn.Module, ids: Tensor) -> Tensor:
        """Return the mean loss of some training samples."""
        return self.losses(model, self.inputs[ids], self.labels[ids]).mean()

    def held_out_loss(self, model: nn.Module) -> Tensor:
        """Return the mean loss of the validation samples."""
        return self.losses(model, *self.held_out).mean()

    def ids(self, step: int) -> Tensor:
        """Return the ids of a step's samples."""
        return torch.arange(step * self.batch, (step + 1) * self.batch) % len(self.inputs)

    def in_float64(self, n: int) -> Subject:
        """Return the same with n samples, everything in float64."""

        def widened(values: Tensor) -> Tensor:
            return values[:n].double() if values.is_floating_point() else values[:n]

        model = copy.deepcopy(self.model).double()
        inputs, labels = widened(self.inputs), widened(self.labels)
        held_out = (widened(self.held_out[0]), widened(self.held_out[1]))
        return Subject(self.name, model, inputs, labels, held_out, self.losses, n, self.lr)


@dataclass(frozen=True)
class Receipt:
    """What was found for one model.

    Attributes:
        name: The model.
        samples: Number of samples that were compared with autograd.
        dots: Worst deviation of a dot product, relative to `‖g_n‖ ‖h‖`.
        rows: Worst deviation of a projected row, relative to its norm.
        identical: Whether parameters are bit-identical after training with and without ghost.
        steps: Number of these training steps.
        plain_ms: Median time of a plain training step, in milliseconds.
        scored_ms: Of a step that is scored against a direction that was there before.
        renewed_ms: Of a step that is scored against a validation gradient made for it.
    """

    name: str
    samples: int
    dots: float
    rows: float
    identical: bool
    steps: int
    plain_ms: float
    scored_ms: float
    renewed_ms: float

    @property
    def failures(self) -> list[str]:
        """What is not as promised; nothing if all is well."""
        found = []
        for what, deviation in (("dot products", self.dots), ("rows", self.rows)):
            if not deviation <= TOLERANCE:  # NaN is no agreement
                found.append(f"{self.name}: {what} deviate by {deviation:.2g} from autograd")
        if not self.identical:
            found.append(f"{self.name}: training with ghost gave other parameters than without")
        return found


def check(subject: Subject, *, samples: int = 8, steps: int = 10, timed: int = 11) -> Receipt:
    """Check one model.

    Args:
        subject: The model and its data.
        samples: Samples to compare with autograd.
        steps: Training steps to compare bit by bit.
        timed: Steps of each kind to time.
    """
    exact = subject.in_float64(samples)
    gradients = naive_gradients(exact)
    plain, scored, renewed = times(subject, timed)
    return Receipt(
        name=subject.name,
        samples=samples,
        dots=dot_deviation(exact, gradients),
        rows=row_deviation(exact, gradients),
        identical=is_untouched(subject, steps),
        steps=steps,
        plain_ms=1000 * plain,
        scored_ms=1000 * scored,
        renewed_ms=1000 * renewed,
    )


def naive_gradients(subject: Subject) -> dict[str, Tensor]:
    """Return each sample's contribution, `[N, *shape]` by parameter, one sample at a time."""
    parameters = dict(subject.model.named_parameters())
    found: dict[str, list[Tensor]] = {name: [] for name in parameters}
    for n in range(len(subject.inputs)):
        # Alone through the model, and a mean over N: nothing of this goes through ghost.
        loss = subject.loss_of(subject.model, torch.tensor([n])) / len(subject.inputs)
        made = torch.autograd.grad(loss, list(parameters.values()))
        for rows, gradient in zip(found.values(), made, strict=True):
            rows.append(gradient)
    return {name: torch.stack(rows) for name, rows in found.items()}


def dot_deviation(subject: Subject, gradients: Mapping[str, Tensor]) -> float:
    """Return the worst deviation of a dot product with the validation gradient."""
    model, everything = subject.model, torch.arange(len(subject.inputs))
    engine = DotProductEngine(model)
    engine.add_direction("held out", lambda: subject.held_out_loss(model))
    with engine, engine.batch(everything) as batch:
        subject.loss_of(model, everything).backward()
    model.zero_grad()
    direction = held_out_gradient(subject)
    expected = torch.stack(
        [(gradients[name] * h).flatten(1).sum(1) for name, h in direction.items()]
    )
    got = torch.stack([batch.result.by_parameter[name][:, 0] for name in direction])
    scale = _norms(gradients) * _norms({name: h.unsqueeze(0) for name, h in direction.items()})
    errors = torch.cat([got - expected, (batch.result.total[:, 0] - expected.sum(0)).unsqueeze(0)])
    return float((errors.abs() / scale).max())


def row_deviation(subject: Subject, gradients: Mapping[str, Tensor]) -> float:
    """Return the worst deviation of a projected row from `L g_n Rᵀ`."""
    engine = ProjectionEngine(subject.model, dim=64, dtype=torch.float64)
    everything = torch.arange(len(subject.inputs))
    with engine.frozen(), engine.batch(everything):
        subject.loss_of(subject.model, everything).backward()
    parts = []
    for block in engine.layout:
        left, right = engine.maps(block.parameter)
        matrices = gradients[block.parameter].reshape(len(everything), block.shape[0], -1)
        parts.append((left @ matrices @ right.mT).flatten(1))
    expected = torch.cat(parts, dim=1)
    errors = (engine.collect().rows - expected).norm(dim=1) / expected.norm(dim=1)
    return float(errors.max())


def is_untouched(subject: Subject, steps: int) -> bool:
    """Tell whether training with both engines attached gives bit-identical parameters."""
    plain, watched = copy.deepcopy(subject.model), copy.deepcopy(subject.model)
    dots, rows = DotProductEngine(watched), ProjectionEngine(watched, dim=64)
    dots.add_direction("held out", lambda: subject.held_out_loss(watched))
    train(subject, plain, steps)
    with dots, rows:
        train(subject, watched, steps, (dots, rows))
    pairs = zip(plain.parameters(), watched.parameters(), strict=True)
    return all(torch.equal(ours, theirs) for ours, theirs in pairs)


def train(
    subject: Subject,
    model: nn.Module,
    steps: int,
    engines: Sequence[DotProductEngine | ProjectionEngine] = (),
) -> None:
    """Train by plain gradient descent, with every step captured by the engines."""
    optimizer = torch.optim.SGD(model.parameters(), lr=subject.lr)
    for step in range(steps):
        with ExitStack() as stack:
            optimizer.zero_grad()
            for engine in engines:
                stack.enter_context(engine.batch(subject.ids(step)))
            subject.loss_of(model, subject.ids(step)).backward()
        optimizer.step()


def times(subject: Subject, count: int) -> list[float]:
    """Return the median seconds of a plain, a scored, and a scored step with a new direction.

    The kinds take turns in one process, so that whatever else the machine does hits all of them.
    """
    plain, scored, renewed = (copy.deepcopy(subject.model) for _ in range(3))
    given, made = DotProductEngine(scored), DotProductEngine(renewed)
    given.add_direction("held out", held_out_gradient(subject))
    made.add_direction("held out", lambda: subject.held_out_loss(renewed))
    kinds = ((plain, None), (scored, given), (renewed, made))
    taken: list[list[float]] = [[], [], []]
    with given, made:
        for step in range(count + 1):
            for (model, engine), seconds in zip(kinds, taken, strict=True):
                seconds.append(timed_step(subject, model, engine, subject.ids(step)))
    # The first step of each kind is left out: it verifies the split by sample.
    return [median(seconds[1:]) for seconds in taken]


def timed_step(
    subject: Subject, model: nn.Module, engine: DotProductEngine | None, ids: Tensor
) -> float:
    """Return the seconds that a training step takes."""
    optimizer = torch.optim.SGD(model.parameters(), lr=subject.lr)
    _wait(subject)
    start = time.perf_counter()
    with engine.batch(ids) if engine else nullcontext():
        subject.loss_of(model, ids).backward()
    optimizer.step()
    optimizer.zero_grad()
    _wait(subject)
    return time.perf_counter() - start


def held_out_gradient(subject: Subject) -> dict[str, Tensor]:
    """Return the gradient of the validation loss by parameter, from autograd alone."""
    parameters = dict(subject.model.named_parameters())
    made = torch.autograd.grad(subject.held_out_loss(subject.model), list(parameters.values()))
    return dict(zip(parameters, made, strict=True))


def _norms(gradients: Mapping[str, Tensor]) -> Tensor:
    """Return the norms of whole gradients, `[N]`."""
    whole = torch.cat([each.flatten(1) for each in gradients.values()], dim=1)
    return whole.square().sum(1).sqrt()


def _wait(subject: Subject) -> None:
    """Wait for the device, which works on its own."""
    if subject.inputs.is_cuda:
        torch.cuda.synchronize(subject.inputs.device)


def show(receipts: Sequence[Receipt]) -> None:
    """Print the receipts."""
    for receipt in receipts:
        print(f"{receipt.name}:")
        print(f"  worst deviation from autograd, {receipt.samples} samples, float64:")
        print(f"    dot products {receipt.dots:.1e}, projected rows {receipt.rows:.1e}")
        same = "yes" if receipt.identical else "NO"
        print(f"  parameters bit-identical after {receipt.steps} steps with ghost: {same}")
        print(
            f"  a training step takes {receipt.plain_ms:.1f} ms, scored "
            f"{receipt.scored_ms / receipt.plain_ms:.2f} ×, with the validation gradient made anew "
            f"{receipt.renewed_ms / receipt.plain_ms:.2f} ×"
        )
