"""What cannot be split by token, and tokens in other precisions."""

import copy

import pytest
import torch
from token_kit import Folded, check_sum, dots_of, engine_for, scored, squares
from torch import nn

from ghost_core import CaptureError, Dense, SamplerRegistry
from ghost_core.testing import PlainLinear, assert_within
from ghost_core.tracking import Claim, dotted_name
from ghost_engines import DotProductEngine, InRunValues

# Precision, scale, other users


def test_bfloat16_is_widened(draw_directions):
    model = nn.Linear(16, 12).bfloat16()
    inputs = torch.randn(4, 6, 16, dtype=torch.bfloat16)
    directions = {
        name: {key: value.float() for key, value in each.items()}
        for name, each in draw_directions(model, 2).items()
    }
    outputs = model(inputs)
    (arrived,) = torch.autograd.grad(outputs.float().square().sum(), outputs)
    parts = {
        "weight": torch.einsum("ntp,ntd->ntpd", arrived.double(), inputs.double()),
        "bias": arrived.double(),
    }
    wide = {
        name: {key: value.double() for key, value in each.items()}
        for name, each in directions.items()
    }
    expected, scale = dots_of(parts, wide, leading=2)
    engine = engine_for(model, directions)
    scores = scored(engine, model, inputs, losses=lambda outputs: outputs.float().square())
    assert scores.by_token.dtype == torch.float32
    assert_within(scores.by_token, expected, scale, 1e-6)


def test_the_scale_of_a_grad_scaler_is_divided_out(mlp, sequences, draw_directions):
    directions = draw_directions(mlp, 1)
    plain = scored(engine_for(mlp, directions), mlp, sequences).by_token
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    engine = engine_for(mlp, directions, grad_scaler=scaler)
    scores = scored(engine, mlp, sequences, losses=lambda outputs: scaler.scale(squares(outputs)))
    assert_within(scores.by_token, plain, plain.abs())
    check_sum(scores)


def test_in_run_values_are_the_same(mlp, sequences, draw_directions):
    (direction,) = draw_directions(mlp, 1).values()
    found = []
    for per_token in (False, True):
        model = copy.deepcopy(mlp)
        engine = DotProductEngine(model, per_token=per_token)
        engine.add_direction("given", direction)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        with InRunValues(engine, optimizer) as values, engine:
            with engine.batch(range(4)):
                squares(model(sequences)).sum().backward()
            optimizer.step()
        found.append(values.to_dict())
    plain, by_token = found
    assert any(plain.values())
    assert by_token == pytest.approx(plain, rel=1e-12)


def test_beside_an_engine_without_tokens(mlp, sequences, draw_directions):
    directions = draw_directions(mlp, 3)
    tokens, plain = engine_for(mlp, directions), DotProductEngine(mlp)
    for name, direction in directions.items():
        plain.add_direction(name, direction)
    with tokens, plain, tokens.batch(range(4)) as first, plain.batch(range(4)) as second:
        squares(mlp(sequences)).sum().backward()
    by_token = first.result.by_token
    assert_within(by_token.sum(1), second.result.total, by_token.abs().sum(1))
    with pytest.raises(CaptureError, match=r"make the engine with .*per_token=True"):
        _ = second.result.by_token
    with pytest.raises(CaptureError, match=r"make the engine with .*per_token=True"):
        second.result.by_segment(torch.zeros(4, 4, dtype=torch.int64))


# What cannot be split by token


class Pooled(nn.Module):
    """A classifier whose head sees the mean over tokens."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(5, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 2)

    def forward(self, inputs):
        return self.head(self.norm(self.body(inputs)).mean(1))


class Shortened(nn.Module):
    """Has a convolution with fewer positions than there are tokens."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(5, 4)
        self.again = nn.Linear(4, 4)
        self.short = nn.Conv1d(4, 3, 2, bias=False)

    def forward(self, inputs):
        return self.short(self.again(self.body(inputs)).mT)


class Whole(nn.Module):
    """Normalises over tokens and features at once, with a weight for each."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(5, 4)
        self.norm = nn.LayerNorm((4, 4), bias=False)

    def forward(self, inputs):
        return self.norm(self.body(inputs))


class Twice(nn.Module):
    """Uses a layer for all tokens and for their mean."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(5, 5)

    def forward(self, inputs):
        return self.inner(torch.tanh(self.inner(inputs)).mean(1))


@pytest.mark.parametrize(
    ("kind", "message", "names"),
    [
        (Pooled, r"have 4 tokens, such as body\.bias, but not .*head\.bias, head\.weight: 1\n", 2),
        (Shortened, r"have 4 tokens, such as again\.bias, but not these: short\.weight: 3\n", 1),
        (Whole, r"have 4 tokens, such as body\.bias, but not these: norm\.weight: 1\n", 1),
    ],
)
def test_parameters_without_the_tokens_are_refused_by_name(
    kind, message, names, sequences, draw_directions
):
    model = kind().double()
    directions = draw_directions(model, 1)
    with pytest.raises(CaptureError, match=message) as refused:
        scored(engine_for(model, directions), model, sequences)
    exclude = str(refused.value).partition("exclude='")[2].partition("'")[0]
    assert len(exclude.split(",")) == names
    engine = engine_for(model, directions, exclude=exclude)
    check_sum(scored(engine, model, sequences))
    plain = DotProductEngine(model)
    plain.add_direction("random 0", directions["random 0"])
    assert scored(plain, model, sequences).total.any()


def test_parameter_used_with_and_without_tokens_is_refused(sequences, draw_directions):
    model = Twice().double()
    engine = engine_for(model, draw_directions(model, 1))
    with pytest.raises(CaptureError, match=r"exclude='inner\.bias,inner\.weight'"):
        scored(engine, model, sequences)


def test_many_parameters_are_not_all_listed_twice(draw_directions):
    heads = nn.ModuleList(nn.Linear(5, 2) for _ in range(7)).double()

    class Many(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.heads = nn.Linear(5, 5).double(), heads

        def forward(self, inputs):
            pooled = self.body(inputs).mean(1)
            return torch.stack([head(pooled) for head in self.heads], 1)

    model = Many()
    engine = engine_for(model, draw_directions(model, 1))
    with pytest.raises(CaptureError, match=r"heads\.4\.weight and 4 more: 1\n"):
        scored(engine, model, torch.randn(2, 3, 5, dtype=torch.float64))


def test_passes_of_different_lengths_are_refused(mlp, sequences, draw_directions):
    engine = engine_for(mlp, draw_directions(mlp, 1))
    message = r"passes of this batch had different numbers of tokens, 3, 4\n.*\n.*pad them"

    def backward(batches):
        for inputs in batches:
            squares(mlp(inputs)).sum().backward()

    with engine:
        for batches in (sequences[:2], sequences[2:, :3]), (sequences, sequences[:, :3]):
            with pytest.raises(CaptureError, match=message), engine.batch(range(4)):
                backward(batches)
    assert scored(engine, mlp, sequences).by_token.any()


def test_rows_of_unknown_positions_are_refused():
    model = Folded("samples first").double()
    message = r"row_owner is given for inner\n.*\n.*exclude='inner'"
    with pytest.raises(CaptureError, match=message):
        DotProductEngine(model, per_token=True, row_owner={"inner": "owner"})
    DotProductEngine(model, row_owner={"inner": "owner"})
    DotProductEngine(model, per_token=True, row_owner={"inner": "owner"}, exclude="inner")


def test_sampler_that_sums_over_tokens_is_refused(sequences, draw_directions):
    class Summed(PlainLinear):
        def gradients(self, call, records, grads):
            made = super().gradients(call, records, grads)
            return {**made, "bias": Dense(made["bias"].terms.sum(1, keepdim=True))}

    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 3)).double()
    registry = SamplerRegistry([Claim(dotted_name(nn.Linear), Summed, "test")])
    engine = engine_for(model, draw_directions(model, 1), registry=registry)
    with pytest.raises(CaptureError, match=r"not these: 0\.bias, 1\.bias: 1\n"):
        scored(engine, model, sequences)
