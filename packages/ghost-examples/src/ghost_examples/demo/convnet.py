"""A small convolutional network for digits: trained as always, and trained with scores."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LinearLR, LRScheduler

from ghost_engines import DotProductEngine, InRunValues, NormEngine
from ghost_examples.demo.annotator import Annotated, Images


@dataclass(frozen=True)
class Recipe:
    """How the network is trained: plain gradient descent with a falling learning rate.

    Batch and learning rate were chosen by the accuracy on held-out images, with seeds that the demo
    does not use; the number of epochs keeps the demo short.

    Attributes:
        epochs: Times that each image is seen.
        batch: Images per step.
        lr: Learning rate at the start; it falls to zero in equal steps.
        weight_decay: Pulls the parameters towards zero.
    """

    epochs: int = 12
    batch: int = 32
    lr: float = 0.3
    weight_decay: float = 0.0


def new_model(seed: int, device: str) -> nn.Sequential:
    """Return a small convolutional network with parameters drawn from a seed."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 10),
    ).to(device)


def batches(n: int, recipe: Recipe, seed: int) -> Iterator[Tensor]:
    """Yield the ids of each step's images, int64 `[N]`."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(recipe.epochs):
        yield from torch.randperm(n, generator=generator).split(recipe.batch)


def new_optimizer(model: nn.Module, n: int, recipe: Recipe) -> tuple[torch.optim.SGD, LRScheduler]:
    """Return the optimizer for n images, and what lowers its learning rate after each step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    steps = recipe.epochs * math.ceil(n / recipe.batch)
    return optimizer, LinearLR(optimizer, start_factor=1, end_factor=0, total_iters=steps)


def train(
    images: Images, recipe: Recipe, seed: int, device: str, model: nn.Module | None = None
) -> nn.Module:
    """Train a new network, or the given one further, without ghost."""
    model = new_model(seed, device) if model is None else model
    optimizer, schedule = new_optimizer(model, len(images), recipe)
    for ids in batches(len(images), recipe, seed):
        batch = images[ids]
        optimizer.zero_grad()
        cross_entropy(model(batch.images), batch.labels).backward()
        optimizer.step()
        schedule.step()
    return model


def mean_loss(model: nn.Module, images: Images) -> Tensor:
    """Return the mean loss of images, a scalar."""
    return cross_entropy(model(images.images), images.labels)


def train_scored(
    data: Annotated, counts: Sequence[int], recipe: Recipe, seed: int, device: str
) -> tuple[nn.Module, dict[int, InRunValues]]:
    """Train the same network and give each image its in-run values on the way.

    One run gives the values for each count of clean images: a direction each.
    """
    model = new_model(seed, device)
    optimizer, schedule = new_optimizer(model, len(data.train), recipe)
    engine = DotProductEngine(model)
    for n in counts:
        engine.add_direction(str(n), partial(mean_loss, model, data.clean[:n]))
    values = {n: InRunValues(engine, optimizer, direction=str(n)) for n in counts}
    with ExitStack() as stack:
        stack.enter_context(engine)
        for each in values.values():
            stack.enter_context(each)
        for ids in batches(len(data.train), recipe, seed):
            batch = data.train[ids]
            optimizer.zero_grad()
            with engine.batch(ids):
                cross_entropy(model(batch.images), batch.labels).backward()
            optimizer.step()
            schedule.step()
    return model, values


def losses_and_norms(model: nn.Module, images: Images) -> tuple[Tensor, Tensor]:
    """Return each image's own loss and the norm of its gradient, both `[n]`."""
    engine = NormEngine(model, loss_weights="sum")
    with engine.frozen(), engine.batch(range(len(images))):
        losses = cross_entropy(model(images.images), images.labels, reduction="none")
        losses.sum().backward()
    return losses.detach().cpu(), engine.collect().total.cpu()


def dot_products(model: nn.Module, images: Images, clean: Images) -> Tensor:
    """Return the dot product of each image's own gradient with that of the clean loss, `[n]`."""
    engine = DotProductEngine(model)
    engine.add_direction("clean", partial(mean_loss, model, clean))
    with engine.frozen(), engine.batch(range(len(images))):
        cross_entropy(model(images.images), images.labels, reduction="sum").backward()
    return engine.collect().total[:, 0].cpu()


def accuracy(model: nn.Module, images: Images) -> float:
    """Return the share of images that get their label."""
    with torch.no_grad():
        right = model(images.images).argmax(1) == images.labels
    return float(right.float().mean())
