"""How near in-run values are to what a step really did, under optimizers that change it.

The reference is exact: the Shapley values of one step, over all 65,536 subsets of its 16 samples,
of a small network of tanh: `python -m ghost_examples.faithfulness` takes less than a minute.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from ghost_core.testing import per_sample_gradients, shapley, subset_sums
from ghost_engines import DotProductEngine, InRunValues, adam_aware

N, SEEDS, WARM = 16, 5, 20
SGD = {"lr": 0.05}

Tensors = dict[str, Tensor]
Moved = Callable[["Task", Tensors], Mapping[str, Tensor]]
"""Returns the parameters after a step with gradients `[S, *shape]`, for S subsets at a time."""


class Task:
    """A small regression with noise in its targets, some way into its training.

    Args:
        seed: Seed of data and parameters.
        optimizer: The class of the optimizer.
        options: Its options.
        dropout: Probability of dropout behind the tanh.
    """

    def __init__(
        self, seed: int, optimizer: Any, options: Mapping[str, Any], dropout: float = 0.0
    ) -> None:
        torch.manual_seed(seed)
        layers = nn.Linear(3, 4), nn.Tanh(), nn.Dropout(dropout), nn.Linear(4, 1)
        self.model = nn.Sequential(*layers).double()
        self.x, self.validation = (torch.randn(n, 3, dtype=torch.float64) for n in (N, 24))
        self.y = self.truth(self.x) + torch.randn(N, 1, dtype=torch.float64)
        self.optimizer = optimizer(self.model.parameters(), **options)
        for _ in range(WARM):
            self.train()

    def truth(self, x: Tensor) -> Tensor:
        """Return targets without noise, `[N, 1]`."""
        return x.sum(1, keepdim=True).sin()

    def losses(self, masks: int = 0) -> Tensor:
        """Return what each sample adds to the mean loss, `[N]`; `masks` seeds the dropout."""
        torch.manual_seed(masks)
        outputs: Tensor = self.model(self.x)
        return (outputs - self.y).square().sum(1) / N

    def train(self, weights: Tensor | None = None) -> None:
        """Make a step, with each sample's loss weighted if weights are given, `[N]`."""
        self.optimizer.zero_grad()
        losses = self.losses()
        (losses if weights is None else weights * losses).sum().backward()
        self.optimizer.step()

    def validation_loss(self) -> Tensor:
        """Return the mean loss on validation data."""
        outputs: Tensor = self.model(self.validation)
        return (outputs - self.truth(self.validation)).square().mean()

    def exact(self, moved: Moved, masks: int = 0) -> Tensor:
        """Return the Shapley values of the next step, `[N]`."""
        each = per_sample_gradients(self.model, self.losses(masks))
        targets = self.truth(self.validation)
        self.model.eval()

        def loss(parameters: Mapping[str, Tensor]) -> Tensor:
            outputs: Tensor = functional_call(self.model, dict(parameters), (self.validation,))
            return (outputs - targets).square().mean()

        with torch.no_grad():
            found = [
                vmap(loss)(
                    moved(self, {name: subset_sums(rows, subsets) for name, rows in each.items()})
                )
                for subsets in torch.arange(1 << N).split(1 << 13)
            ]
        self.model.train()
        return shapley(-torch.cat(found))

    def values(
        self, *, order: Any = 1, aware: bool = False, clip: float | None = None, masks: int = 0
    ) -> Tensor:
        """Make the next step, return its in-run values `[N]`, and go back to before it."""
        state = copy.deepcopy((self.model.state_dict(), self.optimizer.state_dict()))
        self.optimizer.zero_grad()
        engine = DotProductEngine(self.model)
        transform = adam_aware(self.optimizer) if aware else None
        engine.add_direction("val", self.validation_loss, transform=transform)
        with engine, InRunValues(engine, self.optimizer, order=order) as values:
            with engine.batch(range(N)):
                self.losses(masks).sum().backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(self.model.parameters(), clip)
            self.optimizer.step()
        self.model.load_state_dict(state[0])
        self.optimizer.load_state_dict(state[1])
        return torch.tensor([values[n] for n in range(N)], dtype=torch.float64)

    def left_out(self, steps: int) -> Tensor:
        """Return how much higher the validation loss is some steps after one without a sample."""
        state = copy.deepcopy((self.model.state_dict(), self.optimizer.state_dict()))
        found = []
        for without in (None, *range(N)):
            weights = torch.ones(N, dtype=torch.float64)
            if without is not None:
                weights[without] = 0
            self.train(weights)
            for _ in range(steps - 1):
                self.train()
            found.append(self.validation_loss().item())
            self.model.load_state_dict(state[0])
            self.optimizer.load_state_dict(copy.deepcopy(state[1]))
        return torch.tensor(found[1:], dtype=torch.float64) - found[0]


def gradient_step(task: Task, sums: Tensors) -> Mapping[str, Tensor]:
    """Step as gradient descent does, with the momentum that there is."""
    (group,) = task.optimizer.param_groups
    moved = {}
    for name, leaf in task.model.named_parameters():
        velocity = task.optimizer.state[leaf].get("momentum_buffer")
        pushed = 0.0 if velocity is None else group["momentum"] * velocity
        moved[name] = leaf - group["lr"] * (pushed + sums[name])
    return moved


def clipped_step(limit: float, *, each: bool) -> Moved:
    """Step after clipping; `each` subset by its own norm, or all by that of the whole batch."""

    def step(task: Task, sums: Tensors) -> Mapping[str, Tensor]:
        whole = torch.autograd.grad(task.losses().sum(), list(task.model.parameters()))
        norm = torch.stack([part.square().sum() for part in whole]).sum().sqrt()
        if each:
            norm = sum(part.square().flatten(1).sum(1) for part in sums.values()) ** 0.5
        factor = (limit / (norm + 1e-6)).clamp(max=1)
        scaled = {
            name: factor.reshape(-1, *[1] * (part.dim() - 1)) * part for name, part in sums.items()
        }
        return gradient_step(task, scaled)

    return torch.enable_grad()(step)


def adam_step(task: Task, sums: Tensors) -> Mapping[str, Tensor]:
    """Step as AdamW does, written down by hand."""
    (group,) = task.optimizer.param_groups
    one, two = group["betas"]
    moved = {}
    for name, leaf in task.model.named_parameters():
        state = task.optimizer.state[leaf]
        t = state["step"].item() + 1
        m = one * state["exp_avg"] + (1 - one) * sums[name]
        v = two * state["exp_avg_sq"] + (1 - two) * sums[name].square()
        root = (v / (1 - two**t)).sqrt() + group["eps"]
        kept = leaf * (1 - group["lr"] * group["weight_decay"])
        moved[name] = kept - group["lr"] * m / (1 - one**t) / root
    return moved


@dataclass(frozen=True)
class Setting:
    """What is measured: an optimizer, what its step is, and how values are asked for."""

    name: str
    moved: Moved
    optimizer: Any = torch.optim.SGD
    options: Mapping[str, Any] = field(default_factory=lambda: SGD)
    dropout: float = 0.0
    asked: Mapping[str, Any] = field(default_factory=dict)


LIMIT = 0.1
MOMENTUM = {**SGD, "momentum": 0.9}
ADAM = {"lr": 0.01}
SETTINGS = (
    Setting("gradient descent", gradient_step),
    Setting("gradient descent, order=2", gradient_step, asked={"order": 2}),
    Setting("clipped, by the batch's norm", clipped_step(LIMIT, each=False), asked={"clip": LIMIT}),
    Setting("clipped, each subset anew", clipped_step(LIMIT, each=True), asked={"clip": LIMIT}),
    Setting("momentum 0.9", gradient_step, options=MOMENTUM),
    Setting("AdamW", adam_step, torch.optim.AdamW, ADAM),
    Setting("AdamW, adam_aware", adam_step, torch.optim.AdamW, ADAM, asked={"aware": True}),
    Setting("dropout 0.5, the same masks", gradient_step, dropout=0.5),
)


def pearson(one: Tensor, other: Tensor) -> float:
    """Return the correlation of two rows of numbers."""
    return float(torch.corrcoef(torch.stack([one, other]))[0, 1])


def slope(values: Tensor, effects: Tensor) -> float:
    """Return what a unit of value stands for, by least squares through zero."""
    return float((values * effects).sum() / values.square().sum())


def measure(setting: Setting, seeds: int = SEEDS) -> tuple[float, float]:
    """Return mean correlation with exact Shapley values, and mean slope on them."""
    found = []
    for seed in range(seeds):
        task = Task(seed, setting.optimizer, setting.options, setting.dropout)
        exact = task.exact(setting.moved)
        values = task.values(**setting.asked)
        found.append((pearson(values, exact), slope(values, exact)))
    return fmean(each[0] for each in found), fmean(each[1] for each in found)


def over_masks(seeds: int = SEEDS) -> float:
    """Return the mean correlation of the values of one step under two draws of dropout masks."""
    tasks = [Task(seed, torch.optim.SGD, SGD, 0.5) for seed in range(seeds)]
    return fmean(pearson(task.values(masks=1), task.values(masks=2)) for task in tasks)


def later(options: Mapping[str, Any], steps: int, seeds: int = SEEDS) -> float:
    """Return what a unit of value is worth some steps later."""
    tasks = [Task(seed, torch.optim.SGD, options) for seed in range(seeds)]
    return fmean(slope(task.values(), task.left_out(steps)) for task in tasks)


def main() -> None:
    """Print the figures."""
    print(f"{'':34}correlation   exact / value")
    for setting in SETTINGS:
        correlation, unit = measure(setting)
        print(f"{setting.name:34}{correlation:11.4f}{unit:16.3g}")
    print(f"\nvalues under two draws of dropout masks: correlation {over_masks():.2f}")
    for name, options in (("gradient descent", SGD), ("momentum 0.9", MOMENTUM)):
        worth = ", ".join(f"{later(options, n):.2f} after {n}" for n in (1, 3, 10))
        print(f"{name}: a unit of value is worth {worth} steps")


if __name__ == "__main__":
    main()
