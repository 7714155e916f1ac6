"""What is missing from contributions is found where they do not add up to autograd's gradient."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ghost_core import CaptureError, SamplerRegistry, UnbalancedError, WrongSplitError
from ghost_core.algebra import Dense
from ghost_core.split import Balance
from ghost_core.testing import GradientHolder, PlainLinear, per_sample_gradients, plain_registry
from ghost_core.tracking import Claim, dotted_name

N, D = 5, 3


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


class Scaled(PlainLinear):
    """Makes gradients of a factor too large; `generic`, so that it is looked at always."""

    factor = 1.0
    generic = True

    def gradients(self, call, records, grads):
        return super().gradients(call, records, [grads[0] * self.factor])


@pytest.fixture
def model() -> nn.Module:
    return Two().double()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(N, D, dtype=torch.float64)


def scaled_registry() -> SamplerRegistry:
    return SamplerRegistry([Claim(dotted_name(nn.Linear), Scaled, "test")])


def run(engine: GradientHolder, loss) -> None:
    with engine.batch(range(N)):
        loss().backward()


def test_a_penalty_from_before_the_batch_is_found(hold, model, x) -> None:
    engine = hold(model)
    penalty = model.b.weight.square().sum()
    unbalanced = pytest.raises(UnbalancedError, match=r"gradient of b\.weight")
    with engine, unbalanced:
        run(engine, lambda: model(x).sum() + penalty)
    with engine:
        run(engine, lambda: model(x).sum())


def test_a_wrong_factor_is_found_in_any_batch(model, x, monkeypatch) -> None:
    engine = GradientHolder(model, registry=scaled_registry())
    with engine:
        run(engine, lambda: model(x).square().sum())
        monkeypatch.setattr(Scaled, "factor", 1.01)
        with pytest.raises(UnbalancedError, match=r"so are those of 3 other parameters"):
            run(engine, lambda: model(x).square().sum())
        monkeypatch.setattr(Scaled, "factor", 0.0)
        with pytest.raises(UnbalancedError, match=r"do not add up"):
            run(engine, lambda: model(x).square().sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_no_alarm_and_a_fault_is_one(dtype, x, monkeypatch) -> None:
    model, x = Two().to(dtype), x.to(dtype)
    engine = GradientHolder(model, registry=scaled_registry())
    with engine:
        run(engine, lambda: (model(x).float() - 3).square().sum())
        monkeypatch.setattr(Scaled, "factor", 1.5)
        with pytest.raises(UnbalancedError, match=r"do not add up"):
            run(engine, lambda: (model(x).float() - 3).square().sum())


def test_gradients_that_cancel_over_samples_are_no_alarm(hold, model, x) -> None:
    engine = hold(model)
    both = torch.cat([x, x])
    sign = torch.tensor([1.0] * N + [-1.0] * N, dtype=torch.float64)
    with engine, engine.batch(range(2 * N)):
        (model(both).square().sum(1) * sign).sum().backward()


def test_several_backward_passes_and_overflow_are_no_alarm(hold, model, x) -> None:
    engine = hold(model)
    with engine:
        with engine.batch(range(N)):
            output = model(x)
            torch.autograd.grad(output.sum(), [model.a.weight], retain_graph=True)
            output.sum().backward(retain_graph=True)
            output.square().sum().backward()
            with engine.paused():
                model(x).square().sum().backward()
        with engine.batch(range(N)):
            (model(x).square().sum() * float("inf")).backward()


def test_hooks_are_gone_afterwards(hold, model, x) -> None:
    engine = hold(model)
    with engine:
        run(engine, lambda: model(x).sum())
    assert all(parameter._backward_hooks is None for parameter in model.parameters())


def test_a_head_that_the_output_does_not_depend_on_is_refused(hold, x) -> None:
    class Aside(Two):
        """Leaves a head's output, rows turned around, in an attribute."""

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.a(x)
            self.aside = self.b(hidden.detach().flip(0))
            return hidden

    model = Aside().double()
    engine = hold(model)
    aside = pytest.raises(WrongSplitError, match=r"the loss depends on b \[b\.weight, b\.bias\]")
    with engine, aside:
        run(engine, lambda: model(x).sum() + model.aside.square().sum())


def test_a_hook_on_a_parameter_is_refused_in_frozen_passes_too(hold, model, x) -> None:
    model.a.weight.register_hook(lambda grad: grad * 2)
    engine = hold(model)
    refused = pytest.raises(CaptureError, match=r"a\.weight has a hook on its gradient")
    with engine.frozen(), refused:
        run(engine, lambda: model(x).sum())


def test_a_pre_hook_that_runs_after_ghosts_is_refused(hold, model, x) -> None:
    engine = hold(model)
    with engine:
        hook = model.b.register_forward_pre_hook(lambda module, args: args)
        with pytest.raises(CaptureError, match=r"a forward pre-hook on b .* runs after ghost's"):
            run(engine, lambda: model(x).sum())
        hook.remove()
        run(engine, lambda: model(x).sum())


def test_probes_do_not_write_buffers_of_what_is_recomputed(hold, x) -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(D, D)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return torch.tanh(self.linear(x))

    class Checkpointed(Two):
        def __init__(self) -> None:
            super().__init__()
            self.counts = Counts()

        def forward(self, x: Tensor) -> Tensor:
            return self.b(checkpoint(self.counts, self.a(x), use_reentrant=False))

    model = Checkpointed().double()
    engine = hold(model)
    expected = per_sample_gradients(model, model(x).sum(1))
    before = float(model.counts.calls)
    with engine, engine.batch(range(N)) as batch:
        model(x).sum().backward()
    assert float(model.counts.calls) == before + 2  # forward, and recomputed once
    for name, gradient in batch.result.materialize().items():
        torch.testing.assert_close(gradient, expected[name])


def test_few_rows_that_do_not_tell_a_fold_apart(hold, assert_held) -> None:
    class Inner(nn.Module):
        """Rows `[A, N, B]` flattened, of which one for each sample matters."""

        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            n = len(x)
            hidden = self.a(x.transpose(0, 1).reshape(-1, 2)).view(2, n, 2, 2).transpose(0, 1)
            return hidden[torch.arange(n), 0, torch.arange(n)]

    model, x = Inner().double(), torch.randn(2, 2, 2, 2, dtype=torch.float64)
    engine = hold(model)
    expected = per_sample_gradients(model, model(x).sin().sum(1))
    with engine, engine.batch(range(2)) as batch:
        model(x).sin().sum(1).sum().backward()
    assert_held(batch.result, expected)


def test_lazy_parameters_are_refused() -> None:
    with pytest.raises(CaptureError, match=r"0\.weight has no shape yet: run the model once"):
        GradientHolder(nn.Sequential(nn.LazyLinear(3)), registry=plain_registry())


class Spoilt(torch.autograd.Function):
    """Passes values through, and spoils one element of what comes back."""

    @staticmethod
    def forward(ctx, value, spoil):
        ctx.spoil = spoil
        return value.clone()

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        grad.view(-1)[0] = ctx.spoil
        return grad, None


@pytest.mark.parametrize("spoil", [float("nan"), float("inf")])
def test_nan_in_what_autograd_made_alone_is_found(model, x, spoil: float) -> None:
    """Training is lost, and the scores say nothing of it."""
    engine = GradientHolder(model, registry=scaled_registry())
    penalty = Spoilt.apply(model.b.weight, spoil).sum()
    with engine, pytest.raises(UnbalancedError, match=r"gradient of b\.weight"):
        run(engine, lambda: model(x).square().sum() + penalty)


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_nan_in_what_arrived_alone_is_found(model, x, monkeypatch, factor: float) -> None:
    engine = GradientHolder(model, registry=scaled_registry())
    with engine:
        run(engine, lambda: model(x).square().sum())
        monkeypatch.setattr(Scaled, "factor", factor)
        with pytest.raises(UnbalancedError, match=r"do not add up"):
            run(engine, lambda: model(x).square().sum())


def test_what_overflows_hides_no_fault_of_other_parameters(model, x) -> None:
    class Overflowing(nn.Module):
        """Has a head whose gradients are infinite, beside one whose gradients are not."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = model.a, model.b

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.a(x), self.b(x)

    root = Overflowing()
    engine = GradientHolder(root, registry=scaled_registry())
    penalty = root.a.weight.sum()

    def loss() -> Tensor:
        one, other = root(x)
        return one.sum() + penalty + (other * 1e300 * 1e300).sum()

    with engine, pytest.raises(UnbalancedError, match=r"gradient of a\.weight"):
        run(engine, loss)


def test_a_leaf_that_is_forgotten_leaves_nothing_to_one_of_its_name() -> None:
    first, second = (torch.ones(2, requires_grad=True) for _ in range(2))
    balance = Balance({}, lambda: True)
    balance.forget([balance.watch("weight", first)])
    account = balance.watch("weight", second)
    (3 * first + second).sum().backward()
    balance.add(account, Dense(torch.ones(1, 1, 2)), None, True)
    balance.check()
    balance.close()
