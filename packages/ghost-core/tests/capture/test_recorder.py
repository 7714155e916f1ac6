"""Models that broke simpler designs: each is compared with autograd, sample by sample."""

from collections.abc import Mapping, Sequence

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

from .reused import D, Exact, Hold, N, Reused, T, inputs, squares


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
