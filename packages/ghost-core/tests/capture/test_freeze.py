"""Engines that make the weight gradients, and passes for which nobody does."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ghost_core import (
    Batch,
    CaptureError,
    Freeze,
    Pass,
    PerSampleGradient,
    SamplerRegistry,
    TrackedParameter,
    UnbalancedError,
)
from ghost_core.testing import (
    GradientHolder,
    Held,
    PlainLinear,
    TinyTransformer,
    next_token_losses,
    per_sample_gradients,
)
from ghost_core.testing.snapshots import assert_untouched, traces
from ghost_core.tracking import Claim, dotted_name

N, T = 4, 5


class Summing(GradientHolder):
    """Returns the sum of the per-sample gradients as the parameter's."""

    freeze = Freeze.CALL

    def on_gradient(
        self, pass_: Pass, parameter: TrackedParameter, gradient: PerSampleGradient
    ) -> Tensor:
        super().on_gradient(pass_, parameter, gradient)
        return gradient.sum()


class Forgetful(Summing):
    """Returns nothing for one parameter."""

    def on_gradient(
        self, pass_: Pass, parameter: TrackedParameter, gradient: PerSampleGradient
    ) -> Tensor | None:
        made = super().on_gradient(pass_, parameter, gradient)
        return None if parameter.name == "attend.bias" else made


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(0, 19, (N, T))


@pytest.fixture(params=[True, False], ids=["verified", "trusted"])
def make(registry, request) -> Callable[..., Summing]:
    """Make an engine: in a batch that is verified, autograd makes gradients beside it."""
    return lambda model, **options: Summing(
        model, registry=registry, verify=request.param, **options
    )


def train(model: nn.Module, ids: Tensor, dtype: torch.dtype | None = None) -> None:
    for part in ids.split(2):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            logits = model(part)
        next_token_losses(logits, part).sum().backward()


@pytest.mark.parametrize("exclude", [(), "before*,last", "tokens"])
def test_the_gradient_is_that_of_plain_training(make, ids: Tensor, exclude: str) -> None:
    plain = TinyTransformer().double().eval()
    model = copy.deepcopy(plain)
    train(plain, ids)
    found, engine = traces(model), make(model, exclude=exclude)
    with engine, engine.batch(range(N)):
        train(model, ids)
    assert_untouched(found, model, "after leaving")
    for (name, mine), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, msg=name)


def test_the_gradient_under_autocast(make, ids: Tensor) -> None:
    plain = TinyTransformer().eval()
    model = copy.deepcopy(plain)
    train(plain, ids, torch.bfloat16)
    with make(model) as engine, engine.batch(range(N)):
        train(model, ids, torch.bfloat16)
    for (name, mine), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        if theirs.grad is None:
            assert mine.grad is None
            continue
        assert mine.grad.dtype == torch.float32
        assert (mine.grad - theirs.grad).norm() < 2e-2 * theirs.grad.norm(), name


def test_gradients_accumulate_as_ever(make, ids: Tensor) -> None:
    model = TinyTransformer().double().eval()
    train(model, ids)
    once = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    with make(model) as engine, engine.batch(range(N)):
        train(model, ids)
    train(model, ids)
    for name, gradient in once.items():
        torch.testing.assert_close(model.get_parameter(name).grad, 3 * gradient)


def test_flags_are_restored_during_the_forward_pass(make) -> None:
    flags = []

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.layer(x)
            flags.append(self.layer.weight.requires_grad)
            return x

    model = Model()
    with make(model) as engine, engine.batch(range(N)):
        model(torch.randn(N, 2)).sum().backward()
    assert flags == [True]


@pytest.mark.parametrize("where", ["inside the layer", "after the layer", "in the backward pass"])
def test_flags_are_restored_after_an_exception(make, where: str) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).double()
    found, x = traces(model), torch.randn(N, 2, dtype=torch.float64)
    engine = make(model)

    def fail(*_: object) -> None:
        raise KeyError

    with engine:
        if where == "inside the layer":
            x = x[:, :1]  # the layer itself raises
        else:
            handle = model[0].register_forward_hook(
                fail
                if where == "after the layer"
                else lambda module, args, output: output.register_hook(fail) and None
            )
        with pytest.raises((KeyError, RuntimeError)), engine.batch(range(N)):
            model(x).sum().backward()
        if where != "inside the layer":
            handle.remove()
        assert all(parameter.requires_grad for parameter in model.parameters())
    assert_untouched(found, model, where)


def test_a_layer_that_calls_itself_is_exact_or_refused(make) -> None:
    model = nn.Sequential(nn.Linear(2, 2)).double()
    found, x = traces(model), torch.randn(N, 2, dtype=torch.float64)
    inner: list[Tensor] = []

    def again(layer: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
        if inner:
            return None
        inner.append(args[0])
        return (layer(args[0]),)

    plain = copy.deepcopy(model)
    plain[0](plain[0](x)).sum().backward()
    engine = make(model)
    try:
        with engine, engine.batch(range(N)):
            handle = model[0].register_forward_pre_hook(again)
            model(x).sum().backward()
    except CaptureError:  # a refusal is as good
        return
    finally:
        handle.remove()
        assert_untouched(found, model, "after leaving")
    torch.testing.assert_close(model[0].weight.grad, plain[0].weight.grad)


def test_owners_of_a_tied_parameter_restore_its_flag(registry) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).double()
    model[1].weight = model[0].weight
    engine = Summing(model, registry=registry)
    with engine, engine.batch(range(N)):
        model(torch.randn(N, 2, dtype=torch.float64)).sum().backward()
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_checkpointing_keeps_the_gradient(make) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5), nn.Linear(3, 3))

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.block, x, use_reentrant=False)

    plain = Model().double()
    model, x = copy.deepcopy(plain), torch.randn(N, 3, dtype=torch.float64)
    torch.manual_seed(1)
    plain(x).square().sum().backward()
    torch.manual_seed(1)
    with make(model) as engine, engine.batch(range(N)):
        model(x).square().sum().backward()
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)
        assert mine.requires_grad


def test_an_engine_that_forgets_a_gradient_is_an_error(registry, ids: Tensor) -> None:
    model = TinyTransformer()
    engine = Forgetful(model, registry=registry)
    with (
        engine,
        pytest.raises(CaptureError, match=r"no engine made the gradient of attend\.bias"),
        engine.batch(range(N)),
    ):
        train(model, ids)


class FirstTwo(Summing):
    """Gives parameters the gradient of the first two samples."""

    def on_gradient(
        self, pass_: Pass, parameter: TrackedParameter, gradient: PerSampleGradient
    ) -> Tensor:
        super().on_gradient(pass_, parameter, gradient)
        return gradient.narrow(slice(0, 2)).sum()


class WithPositions(nn.Module):
    """Positions that are looked up once for all samples, and a head tied by a function."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(19, 6), nn.Embedding(T, 6)
        self.inner = nn.Linear(6, 6)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + 2 * self.positions(torch.arange(T))
        return nn.functional.linear(torch.tanh(self.inner(x)), self.tokens.weight)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("exclude", [(), "positions"])
def test_parameters_get_what_the_engine_makes_where_autograd_does_too(
    registry, ids: Tensor, verify: bool, exclude: str
) -> None:
    model = WithPositions().double()
    expected = per_sample_gradients(model, next_token_losses(model(ids), ids))
    engine = FirstTwo(model, registry=registry, verify=verify, exclude=exclude)
    with engine:
        for _ in range(2):
            model.zero_grad()
            with engine.batch(range(N)) as batch:
                next_token_losses(model(ids), ids).sum().backward()
            assert batch.verified is verify
            for name, parameter in model.named_parameters():
                samples = N if name == "positions.weight" and exclude else 2
                torch.testing.assert_close(parameter.grad, expected[name][:samples].sum(0))


def test_only_plain_sums_are_taken_for_what_autograd_makes(registry, ids: Tensor) -> None:
    class Wrong(FirstTwo):
        plain_sums = True

    model = WithPositions().double()
    expected = per_sample_gradients(model, next_token_losses(model(ids), ids))
    with Wrong(model, registry=registry, verify=False) as engine, engine.batch(range(N)):
        next_token_losses(model(ids), ids).sum().backward()
    grad = model.positions.weight.grad
    torch.testing.assert_close(grad, expected["positions.weight"].sum(0))


def test_a_result_left_in_an_attribute_is_found() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Leaves(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + self.layer.left

    class Leaves(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            self.left = nn.functional.linear(x, self.weight)
            return super().forward(x)

    class LeavesSampler(PlainLinear):
        methods = ()

    model, x = Model().double(), torch.randn(N, 3, dtype=torch.float64)
    known = SamplerRegistry([Claim(dotted_name(Leaves), LeavesSampler, "test")])
    engine = Summing(model, registry=known)
    with engine, pytest.raises(UnbalancedError, match=r"layer\.weight"), engine.batch(range(N)):
        model(x).sum().backward()


def test_only_one_engine_makes_gradients(make, hold) -> None:
    model = TinyTransformer()
    with make(model), pytest.raises(CaptureError, match="only one engine"), make(model):
        pass
    with make(model), hold(model):
        pass


def test_an_engine_beside_it_sees_the_same(make, hold, assert_held, ids: Tensor) -> None:
    model = TinyTransformer().double().eval()
    expected = per_sample_gradients(model, next_token_losses(model(ids), ids))
    one, other = make(model), hold(model)
    with one, other, one.batch(range(N)) as first, other.batch(range(N)) as second:
        train(model, ids)
    assert_held(first.result, expected)
    assert_held(second.result, expected)


def test_modules_that_only_another_engine_tracks_train_on(make, hold, ids: Tensor) -> None:
    plain = TinyTransformer().double().eval()
    model = copy.deepcopy(plain)
    train(plain, ids)
    one, other = make(model, layers="attend"), hold(model)
    with one, other, one.batch(range(N)), other.batch(range(N)):
        train(model, ids)
    for (name, mine), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, msg=name)


def test_calls_outside_of_a_batch_train_as_ever(make, ids: Tensor) -> None:
    plain = TinyTransformer().double().eval()
    model = copy.deepcopy(plain)
    train(plain, ids)
    with make(model):
        train(model, ids)
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert mine.grad is None if theirs.grad is None else torch.equal(mine.grad, theirs.grad)


def test_frozen_works_for_it_too(make, assert_held, ids: Tensor) -> None:
    model = TinyTransformer().double().eval()
    expected = per_sample_gradients(model, next_token_losses(model(ids), ids))
    engine = make(model)
    with engine.frozen(), engine.batch(range(N)) as batch:
        train(model, ids)
    assert_held(batch.result, expected)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_frozen_does_not_lift_a_users_freeze(hold, ids: Tensor) -> None:
    model = TinyTransformer()
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    engine = hold(model)
    with pytest.raises(KeyError), engine.frozen():
        raise KeyError
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags


def test_a_batch_of_each_kind_has_the_same_result(make, hold, assert_held, ids: Tensor) -> None:
    model = TinyTransformer().double().eval()
    results: list[Held] = []
    for engine, frozen in ((hold(model), False), (hold(model), True), (make(model), False)):
        with engine.frozen() if frozen else engine, engine.batch(range(N)) as batch:
            assert isinstance(batch, Batch)
            train(model, ids)
        results.append(batch.result)
    expected = results[0].materialize()
    for result in results[1:]:
        assert_held(result, expected)
