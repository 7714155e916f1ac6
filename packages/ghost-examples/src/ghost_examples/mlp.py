"""What the two MLP examples share: options, data and a training loop that knows nothing of ghost.

The data are scikit-learn's scans of handwritten digits, 8 × 8 pixels, which come with it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy


@dataclass(frozen=True)
class Options:
    """Options of both examples.

    Attributes:
        steps: Training steps.
        train_batch: Samples in each training step.
        val_batch: Validation samples, the same in every step.
        lr: Learning rate of plain gradient descent.
        seed: Seed of the initial parameters and of the order of the samples.
        device: Where to compute: cpu, cuda, cuda:1, ...
    """

    steps: int = 10
    train_batch: int = 8
    val_batch: int = 4
    lr: float = 0.1
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("steps", "train_batch", "val_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")


@dataclass(frozen=True)
class Digits:
    """Scans of digits, shuffled.

    Attributes:
        inputs: Grey values from 0 to 1, `[n, 64]`.
        labels: `[n]`.
    """

    inputs: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, samples: slice | Tensor) -> Digits:
        return Digits(self.inputs[samples], self.labels[samples])

    @property
    def ids(self) -> range:
        """One id per sample, from 0."""
        return range(len(self))


@dataclass(frozen=True)
class Step:
    """One batch of training.

    Attributes:
        number: Counts from 1.
        ids: Which samples, int64 `[N]`.
        batch: The samples.
    """

    number: int
    ids: Tensor
    batch: Digits


def load(options: Options) -> tuple[Digits, Digits]:
    """Return the training samples and, apart from these, the validation samples.

    Raises:
        ValueError: If there are not as many digits as the options ask for.
    """
    bundle = load_digits()
    shuffle = torch.Generator().manual_seed(options.seed)
    order = torch.randperm(len(bundle.target), generator=shuffle)
    if options.train_batch + options.val_batch > len(order):
        raise ValueError(f"there are {len(order)} digits: choose smaller batches")
    inputs = torch.tensor(bundle.data / 16, dtype=torch.float32)[order].to(options.device)
    digits = Digits(inputs, torch.tensor(bundle.target)[order].to(options.device))
    return digits[options.val_batch :], digits[: options.val_batch]


def build(options: Options) -> nn.Sequential:
    """Return a small MLP; the same seed gives the same parameters."""
    torch.manual_seed(options.seed)
    layers = OrderedDict(hidden=nn.Linear(64, 32), relu=nn.ReLU(), output=nn.Linear(32, 10))
    return nn.Sequential(layers).to(options.device)


def loss_of(model: nn.Module, digits: Digits) -> Tensor:
    """Return the mean loss, a scalar."""
    return cross_entropy(model(digits.inputs), digits.labels)


def train(
    model: nn.Module,
    digits: Digits,
    options: Options,
    around: Callable[[Step], AbstractContextManager[object]] | None = None,
) -> None:
    """Train by plain gradient descent.

    Args:
        model: The model, whose parameters change.
        digits: The training samples.
        options: Steps, batch size, learning rate and seed.
        around: Returns a context for the forward and backward pass of a step; ghost's place.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=options.lr)
    order = torch.Generator().manual_seed(options.seed)
    for number in range(1, options.steps + 1):
        ids = torch.randperm(len(digits), generator=order)[: options.train_batch]
        step = Step(number, ids, digits[ids])
        optimizer.zero_grad()
        with nullcontext() if around is None else around(step):
            loss_of(model, step.batch).backward()
        optimizer.step()
