"""Models that broke simpler designs: each is compared with autograd, sample by sample."""

import copy
import pickle
from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from torch import Tensor, nn

from ghost_core import (
    Call,
    CaptureError,
    GradientSampler,
    Outer,
    PastCall,
    PerSampleGradient,
    Record,
    SamplerRegistry,
    Tokens,
    as_tokens,
)
from ghost_core.testing import (
    GradientHolder,
    TinyTransformer,
    next_token_losses,
    per_sample_gradients,
)
from ghost_core.tracking import Claim, dotted_name

N, T, D = 4, 3, 6
Hold = Callable[..., GradientHolder]
Exact = Callable[..., None]


def inputs(*shape: int) -> Tensor:
    return torch.randn(shape or (N, T, D), dtype=torch.float64)


def squares(output: Tensor) -> Tensor:
    return output.square().flatten(1).sum(1)


class Reused(nn.Module):
    """Calls one layer twice, and again in a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(D, D)
        self.norm = nn.LayerNorm(D)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x).relu()
        for _ in range(2):
            x = self.norm(self.layer(x))
        return x


class Residual(nn.Module):
    """Adds to a float32 stream in place; a layer under autocast keeps a copy of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(D)
        self.layer = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        x += self.layer(x).tanh()
        x += self.layer(x)
        return x


@pytest.mark.parametrize("bias", [True, False])
def test_in_place_after_a_linear_whose_output_is_a_view(assert_exact: Exact, bias: bool) -> None:
    model = nn.Sequential(
        nn.Linear(D, D, bias=bias),
        nn.ReLU(inplace=True),
        nn.LayerNorm(D),
        nn.Dropout(0.2, inplace=True),
        nn.Linear(D, 2),
        nn.Hardtanh(inplace=True),
    ).double()
    x = inputs()
    assert_exact(model, lambda: squares(model(x)))


def test_in_place_changes_of_an_input_that_is_kept_are_an_error_not_a_number(hold: Hold) -> None:
    class Overwrites(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(D, D)

        def forward(self, x: Tensor) -> Tensor:
            h = x * 1
            y = self.layer(h)
            h.add_(1)
            return y

    model, x = Overwrites().double(), inputs()
    engine = hold(model, verify=False)
    with (
        engine,
        pytest.raises(RuntimeError, match="modified by an inplace operation"),
        engine.batch(range(N)),
    ):
        model(x).sum().backward()


def test_an_in_place_residual_under_autocast(hold: Hold) -> None:
    model, x = Residual(), inputs().float()
    engine = hold(model)
    with engine, engine.batch(range(N)) as batch:
        with torch.autocast("cpu", torch.bfloat16):
            output = model(x)
        squares(output).sum().backward()
    held = batch.result.materialize()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        # The contributions sum to training's gradient, but for its rounding to bfloat16.
        error = (held[name].sum(0) - parameter.grad.double()).norm()
        assert error < 1e-2 * held[name].norm(), name


@pytest.mark.parametrize("n", [1, 2, T, D])
def test_as_many_samples_as_tokens_or_features(assert_exact: Exact, n: int) -> None:
    model, x = Reused().double(), inputs(n, T, D)
    assert_exact(model, lambda: squares(model(x)))


@pytest.mark.parametrize("shape", [(N, D), (N, T, D), (N, 2, T, D)])
def test_a_reused_module(assert_exact: Exact, shape: tuple[int, ...]) -> None:
    model, x = Reused().double(), inputs(*shape)
    assert_exact(model, lambda: squares(model(x)))


def test_a_tied_head_and_shared_positions(assert_exact: Exact) -> None:
    model = TinyTransformer().double()
    ids = torch.randint(0, 19, (N, 6))
    assert_exact(model, lambda: next_token_losses(model(ids), ids))


@pytest.mark.parametrize("n", [1, 5])
def test_shared_positions_with_as_many_samples_as_positions(assert_exact: Exact, n: int) -> None:
    model = TinyTransformer().double()
    ids = torch.randint(0, 19, (n, 5))
    assert_exact(model, lambda: next_token_losses(model(ids), ids))


def test_several_outputs_and_unused_ones(assert_exact: Exact) -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(D, 2), nn.Linear(D, 2)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"used": self.used(x), "unused": self.unused(x)}

    model, x = Heads().double(), inputs()
    assert_exact(model, lambda: squares(model(x)["used"]), layers="used")


def test_an_unused_module_has_zero_gradients(hold: Hold) -> None:
    model = nn.ModuleDict({"used": nn.Linear(D, 2), "unused": nn.Linear(D, 2)}).double()
    model.forward = lambda x: (model["used"](x), model["unused"](x))
    engine, x = hold(model), inputs()
    with engine, engine.batch(range(N)) as batch:
        squares(model(x)[0]).sum().backward()
    assert batch.result.uses["unused.weight"] == []
    assert not batch.result.materialize()["unused.weight"].any()


def test_a_call_without_gradients_inside_a_pass_does_not_count(assert_exact: Exact) -> None:
    class Targets(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(D, D)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                target = self.layer(x)
            return self.layer(x) * target

    model, x = Targets().double(), inputs()
    assert_exact(model, lambda: squares(model(x)))


def test_a_module_that_runs_only_without_gradients_is_an_error(hold: Hold) -> None:
    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden, self.layer = nn.Linear(D, D), nn.Linear(D, D)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                x = self.hidden(x)
            return self.layer(x)

    model, x = Detached().double(), inputs()
    engine = hold(model)
    with (
        engine,
        pytest.raises(CaptureError, match="hidden ran only with gradients disabled"),
        engine.batch(range(N)),
    ):
        squares(model(x)).sum().backward()


@pytest.mark.parametrize("sizes", [[1, 1, 1, 1], [2, 2], [1, 3], [3, 1]])
def test_micro_batches_follow_one_another(hold: Hold, assert_held, sizes: list[int]) -> None:
    model, x = Reused().double(), inputs()
    expected = per_sample_gradients(model, squares(model(x)))
    engine = hold(model)
    with engine, engine.batch(range(N)) as batch:
        for part in x.split(sizes):
            squares(model(part)).sum().backward()
    assert_held(batch.result, expected)


def test_passes_of_all_samples_add_up(assert_exact: Exact) -> None:
    model, x, y = Reused().double(), inputs(), inputs()
    assert_exact(model, lambda: squares(model(x)) * squares(model(y)))


def test_a_second_backward_adds(hold: Hold) -> None:
    model, x = Reused().double(), inputs()
    once, twice = hold(model), hold(model)
    with once, once.batch(range(N)) as first:
        squares(model(x)).sum().backward()
    with twice, twice.batch(range(N)) as second:
        losses = squares(model(x)).sum()
        losses.backward(retain_graph=True)
        losses.backward()
    for name, gradient in first.result.materialize().items():
        torch.testing.assert_close(second.result.materialize()[name], 2 * gradient)


def test_integer_inputs_with_everything_frozen(hold: Hold, assert_held) -> None:
    model = TinyTransformer().double().eval()
    ids = torch.randint(0, 19, (N, 6))
    expected = per_sample_gradients(model, next_token_losses(model(ids), ids))
    engine = hold(model)
    with engine.frozen(), engine.batch(range(N)) as batch:
        assert not any(parameter.requires_grad for parameter in model.parameters())
        next_token_losses(model(ids), ids).sum().backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.attend.weight.requires_grad
    assert not model.last.bias.requires_grad
    assert_held(batch.result, expected)


def test_an_empty_batch(hold: Hold) -> None:
    model = Reused().double()
    engine = hold(model)
    with engine, engine.batch([]) as batch:
        squares(model(inputs(0, T, D))).sum().backward()
    assert batch.n == 0
    assert batch.result.materialize()["layer.weight"].shape == (0, D, D)


def test_copies_of_the_model_are_left_alone(hold: Hold) -> None:
    model, x = Reused().double(), inputs()
    engine = hold(model)
    with engine, engine.batch(range(N)) as batch:
        average = copy.deepcopy(model)
        squares(model(x)).sum().backward()
        squares(average(inputs(7, T, D))).sum().backward()
    assert len(batch.result.uses["layer.weight"]) == 3
    assert torch.equal(average(x), model(x))


def test_the_model_can_be_pickled_while_attached(hold: Hold) -> None:
    model, x = Reused().double(), inputs()
    with hold(model):
        data = pickle.dumps(model)
    twin = pickle.loads(data)
    assert torch.equal(twin(x), model(x))


def test_hooks_of_the_user_change_inputs_and_outputs_as_before(assert_exact: Exact) -> None:
    model, x = Reused().double(), inputs()
    model.layer.register_forward_hook(lambda module, args, output: 2 * output)
    model.layer.register_forward_pre_hook(lambda module, args: (3 * args[0],))
    assert_exact(model, lambda: squares(model(x)))


def test_a_hook_that_changes_the_output_before_it_is_seen_is_not_ignored(
    hold: Hold, assert_held
) -> None:
    plain, x = Reused().double(), inputs()
    plain.layer.register_forward_hook(lambda module, args, output: 2 * output)
    expected = per_sample_gradients(plain, squares(plain(x)))
    model = Reused().double()
    model.load_state_dict(plain.state_dict())
    engine = hold(model)
    try:
        with engine, engine.batch(range(N)) as batch:
            model.layer.register_forward_hook(lambda module, args, output: 2 * output, prepend=True)
            squares(model(x)).sum().backward()
    except CaptureError:  # a refusal is as good
        return
    assert_held(batch.result, expected)


def test_backward_hooks_of_the_user_see_nothing_new(hold: Hold) -> None:
    model, x = Reused().double(), inputs().requires_grad_()
    seen: list[Tensor] = []
    model.layer.register_full_backward_hook(lambda module, gi, go: seen.append(go[0]))
    squares(model(x)).sum().backward()
    plain = list(seen)
    engine = hold(model)
    with engine, engine.batch(range(N)):
        squares(model(x)).sum().backward()
    torch.testing.assert_close(seen[len(plain) :], plain)


class Pair(nn.Module):
    """Has two outputs that share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D, D))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = x @ self.weight.mT
        return y, -y


class PairSampler(GradientSampler):
    parameters = ("weight",)

    def record(self, call: Call) -> dict[str, Record]:
        return {"weight": Tokens(as_tokens(call.argument(0, "x")))}

    def gradients(
        self, call: PastCall, records: Mapping[str, Record], grads: Sequence[Tensor | None]
    ) -> dict[str, PerSampleGradient]:
        first, second = grads
        total = 0 if first is None else first
        total = total if second is None else total - second
        return {"weight": Outer(records["weight"], as_tokens(total), call.shapes["weight"])}


@pytest.mark.parametrize("used", ["both", "first", "second", "both, changed in place"])
def test_several_outputs_of_one_module(assert_held, used: str) -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair = Pair()

        def forward(self, x: Tensor) -> Tensor:
            first, second = self.pair(x)
            if "place" in used:
                first.mul_(3)
            if used == "first":
                return first
            return second.exp() if used == "second" else first * 2 + second.exp()

    model, x = Root().double(), inputs()
    expected = per_sample_gradients(model, squares(model(x)))
    registry = SamplerRegistry([Claim(dotted_name(Pair), PairSampler, "test")])
    engine = GradientHolder(model, registry=registry)
    with engine, engine.batch(range(N)) as batch:
        squares(model(x)).sum().backward()
    assert_held(batch.result, expected)


def test_keyword_inputs(assert_exact: Exact) -> None:
    class Keywords(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(D, D)

        def forward(self, *, x: Tensor) -> Tensor:
            return self.layer(input=x)

    model, x = Keywords().double(), inputs()
    assert_exact(model, lambda: squares(model(x=x)))


def test_gradients_of_inputs_are_no_contributions(hold: Hold, assert_held) -> None:
    model, x = Reused().double(), inputs().requires_grad_()
    engine = hold(model)
    with engine, engine.batch(range(N)) as batch:
        (gradient,) = torch.autograd.grad(squares(model(x)).sum(), x)
        moved = (x + 0.1 * gradient.sign()).detach()
        squares(model(moved)).sum().backward()
    assert_held(batch.result, per_sample_gradients(model, squares(model(moved))))


def test_gradients_that_reach_no_parameter_are_refused(hold: Hold) -> None:
    model = Reused().double()
    engine = hold(model)
    with engine, pytest.raises(CaptureError, match="no gradient arrived"), engine.batch(range(N)):
        squares(model(inputs())).sum().backward(inputs=list(model.parameters()))


def test_hooks_on_gradients_of_parameters_are_refused(hold: Hold) -> None:
    model = Reused().double()
    model.layer.weight.register_hook(lambda gradient: 0 * gradient)
    engine = hold(model)
    with engine, pytest.raises(CaptureError, match=r"layer\.weight has a hook"):  # noqa: SIM117
        with engine.batch(range(N)):
            squares(model(inputs())).sum().backward()


def test_other_values_for_parameters_are_refused(hold: Hold) -> None:
    model = Reused().double()
    twice = {name: 2 * parameter for name, parameter in model.named_parameters()}
    engine = hold(model)
    with engine, pytest.raises(CaptureError, match="functional_call"), engine.batch(range(N)):
        torch.func.functional_call(model, twice, inputs()).sum().backward()
