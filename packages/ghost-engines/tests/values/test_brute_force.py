"""In-run values against Shapley values of one step, over all subsets of its batch."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, vmap
from torch.nn.utils import clip_grad_norm_

from ghost_core import CaptureError
from ghost_core.testing import assert_within, per_sample_gradients, shapley, subset_sums
from ghost_engines import DotProductEngine, InRunValues, adam_aware

N, RATE = 16, 0.05
SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.stress) for seed in (1, 2))]


def pearson(one, other):
    return torch.corrcoef(torch.stack([one, other]))[0, 1].item()


class Task:
    """A small network of tanh, whose samples differ in how they bend the validation loss."""

    def __init__(self, seed):
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
        self.x, self.validation = (torch.randn(n, 3, dtype=torch.float64) for n in (N, 24))
        self.y = self.truth(self.x) + torch.randn(N, 1, dtype=torch.float64)

    def truth(self, x):
        return torch.sin(x.sum(1, keepdim=True))

    def losses(self):
        return (self.model(self.x) - self.y).square().sum(1) / N

    def validation_loss(self):
        return (self.model(self.validation) - self.truth(self.validation)).square().mean()

    def brute_force(self, moved):
        """Return the Shapley values of one step.

        Args:
            moved: Returns the parameters after a step with gradients `[S, *shape]` by name, for S
                subsets at a time.
        """
        each = per_sample_gradients(self.model, self.losses())
        truth = self.truth(self.validation)

        def loss(parameters):
            outputs = functional_call(self.model, parameters, (self.validation,))
            return (outputs - truth).square().mean()

        with torch.no_grad():
            after = torch.cat(
                [
                    vmap(loss)(moved({k: subset_sums(g, part) for k, g in each.items()}))
                    for part in torch.arange(1 << N).split(1 << 13)
                ]
            )
        return shapley(-after)  # what is lowered is gained

    def gradient_step(self, sums, factor=1.0):
        leaves = self.model.named_parameters()
        return {name: leaf - RATE * factor * sums[name] for name, leaf in leaves}

    def values(
        self,
        optimizer=None,
        act=None,
        micro=1,
        scaler=None,
        told=False,
        transform=None,
        order=1,
        mode="exact",
    ):
        """Make one step from where the model is, and leave it there; return values `[N]`."""
        before = {name: each.clone() for name, each in self.model.state_dict().items()}
        optimizer = optimizer or torch.optim.SGD(self.model.parameters(), lr=RATE)
        optimizer.zero_grad()
        engine = DotProductEngine(self.model, mode=mode, grad_scaler=scaler if told else None)
        engine.add_direction("val", self.validation_loss, transform=transform)
        with engine, InRunValues(engine, optimizer, order=order) as values:
            for ids in torch.arange(N).split(N // micro):
                with engine.batch(ids):
                    loss = (self.model(self.x[ids]) - self.y[ids]).square().sum() / N
                    (loss if scaler is None else scaler.scale(loss)).backward()
            if act is not None:
                act(self.model)
            optimizer.step() if scaler is None else scaler.step(optimizer)
        self.model.load_state_dict(before)
        return torch.tensor([values[n] for n in range(N)], dtype=torch.float64)


@pytest.mark.parametrize("seed", SEEDS)
def test_both_orders_against_all_subsets(seed):
    """The second order leaves a hundredth of the error of the first, and less."""
    task = Task(seed)
    expected = task.brute_force(task.gradient_step)
    first, second = task.values(), task.values(order=2)
    assert pearson(first, expected) > 0.95
    assert pearson(second, expected) > 0.999
    assert (second - expected).norm() < 0.01 * (first - expected).norm()


def clip(model):
    assert clip_grad_norm_(model.parameters(), 0.05) > 0.05


def clipped(task):
    """Return the factor that the whole batch is clipped with."""
    gradients = torch.autograd.grad(task.losses().sum(), list(task.model.parameters()))
    return 0.05 / (torch.cat([each.flatten() for each in gradients]).norm().item() + 1e-6)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("how", ["clipped", "scaled", "scaled as told"])
def test_clipping_and_scaling_against_all_subsets(how, order):
    task = Task(0)
    if how == "clipped":
        factor, options = clipped(task), {"act": clip}
    else:
        scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
        factor, options = 1.0, {"scaler": scaler, "told": how == "scaled as told"}
    expected = task.brute_force(lambda sums: task.gradient_step(sums, factor))
    found = task.values(order=order, **options)
    assert (found - expected).norm() < (0.2 if order == 1 else 0.002) * expected.norm()


def test_second_order_of_a_step_with_several_batches():
    """Curvature belongs to the whole step, whatever it was accumulated from."""
    task = Task(0)
    whole = task.values(order=2)
    assert_within(task.values(order=2, micro=4), whole, whole.norm())
    assert not torch.allclose(task.values(), whole, rtol=1e-3)


@pytest.mark.parametrize("order", [1, 2])
def test_values_of_the_fused_mode_are_those_of_the_exact_one(order):
    task = Task(0)
    exact = task.values(order=order)
    assert_within(task.values(order=order, mode="fused"), exact, exact.norm())


def adam_step(task, optimizer):
    """Return the step of Adam for many subsets at once, written down by hand."""
    (group,) = optimizer.param_groups
    one, two = group["betas"]

    def moved(sums):
        after = {}
        for name, leaf in task.model.named_parameters():
            state = optimizer.state[leaf]
            t = state["step"].item() + 1
            m = one * state["exp_avg"] + (1 - one) * sums[name]
            v = two * state["exp_avg_sq"] + (1 - two) * sums[name].square()
            root = (v / (1 - two**t)).sqrt() + group["eps"]
            after[name] = leaf - group["lr"] * m / (1 - one**t) / root
        return after

    return moved


@pytest.mark.parametrize("seed", SEEDS)
def test_under_adam_the_preconditioned_direction_is_nearer_to_all_subsets(seed):
    task = Task(seed)
    optimizer = torch.optim.Adam(task.model.parameters(), lr=0.01)
    for _ in range(20):
        optimizer.zero_grad()
        task.losses().sum().backward()
        optimizer.step()
    expected = task.brute_force(adam_step(task, optimizer))
    state = copy.deepcopy(optimizer.state_dict())
    found = []
    for transform in (None, adam_aware(optimizer)):
        optimizer.load_state_dict(copy.deepcopy(state))
        found.append(pearson(task.values(optimizer, transform=transform), expected))
    raw, aware = found
    assert aware > 0.95
    assert aware >= raw


def test_second_order_needs_a_loss():
    task = Task(0)
    with pytest.raises(CaptureError, match="direction 'val' has no second order"):
        task.values(order=2, transform=lambda found: found)
    with pytest.raises(CaptureError, match="order must be 1 or 2, not 3"):
        task.values(order=3)
