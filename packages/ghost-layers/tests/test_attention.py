from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ghost_core import SamplerRegistry, WrongSplitError
from ghost_core.testing import GradientHolder, assert_within, check_sampler, per_sample_gradients
from ghost_core.tracking import Claim, dotted_name
from ghost_layers.attention import MultiheadAttentionSampler
from ghost_layers.linear import LinearSampler
from ghost_layers.replay import Way

REGISTRY = SamplerRegistry(
    [
        Claim(dotted_name(nn.MultiheadAttention), MultiheadAttentionSampler, "test"),
        Claim(dotted_name(nn.Linear), LinearSampler, "test"),
    ]
)
CAUSAL = torch.triu(torch.ones(4, 4, dtype=torch.bool), diagonal=1)
PADDING = torch.arange(4) >= torch.tensor([[3], [4], [2]])


def losses(output: Any) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    total = torch.zeros(())
    for each in output:
        if each is not None:
            values = each.double()
            weights = torch.randn(values.shape, generator=generator, dtype=torch.float64)
            total = total + (weights * (values + (1 + values**2).sqrt())).flatten(1).sum(1)
    return total


class Attends(nn.Module):
    """Attends to projected inputs `[N, T, 4]`, whatever the layout of the attention."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.attention = nn.MultiheadAttention(4, 2, **options)

    def forward(self, query: Tensor, other: Tensor | None = None, **options: Any) -> Any:
        query = self.linear(query)
        other = query if other is None else other
        if not self.attention.batch_first:
            same = other is query
            query = query.transpose(0, 1)
            other = query if same else other.transpose(0, 1)
        output, weights = self.attention(query, other, other, **options)
        if not self.attention.batch_first:
            output = output.transpose(0, 1)
        return output, weights


def check(
    model: nn.Module,
    *inputs: Tensor,
    layers: str = "*",
    frozen: bool = False,
    tolerance: float = 1e-9,
    **options: Any,
) -> None:
    """Compare with autograd on a copy that draws the same random numbers."""
    other = copy.deepcopy(model)
    torch.manual_seed(1)
    plain = losses(other(*inputs, **options))
    expected = per_sample_gradients(other, plain)
    after = torch.get_rng_state()
    engine = GradientHolder(model, registry=REGISTRY, layers=layers)
    for _ in range(2):
        torch.manual_seed(1)
        with engine.frozen() if frozen else engine, engine.batch(range(len(plain))) as batch:
            losses(model(*inputs, **options)).sum().backward()
        assert torch.equal(torch.get_rng_state(), after)
        for name, held in batch.result.materialize().items():
            # The bias of the keys has no gradient; it is a part of `in_proj_bias`.
            assert expected[name].any()
            assert_within(held, expected[name], expected[name].norm(), tolerance, name)


def doubles(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("uses", [pytest.param(1, marks=pytest.mark.stress), 2])
def test_conformance(uses: int) -> None:
    attention = nn.MultiheadAttention(4, 2, batch_first=True)
    inputs = [torch.randn(3, tokens, 4) for tokens in (5, 3, 3)]
    check_sampler(MultiheadAttentionSampler, attention, *inputs, uses=uses)


@pytest.mark.parametrize(
    ("batch_first", "dropout", "need_weights"),
    [  # by default, any two of them meet in each way
        each if sum(map(bool, each)) % 2 == 0 else pytest.param(*each, marks=pytest.mark.stress)
        for each in itertools.product([True, False], [0.0, 0.5], [True, False])
    ],
)
def test_masks(batch_first: bool, dropout: float, need_weights: bool, ways: list[Way]) -> None:
    options = {"batch_first": batch_first, "dropout": dropout}
    inputs, shown = doubles(3, 4, 4), {"need_weights": need_weights}
    check(Attends(**options).double(), inputs, **shown)
    check(Attends(**options).double(), inputs, attn_mask=CAUSAL, is_causal=True, **shown)
    check(Attends(**options).double(), inputs, key_padding_mask=PADDING, **shown)
    check(Attends(**options).double(), inputs, attn_mask=doubles(6, 4, 4), **shown)
    both = {"attn_mask": doubles(6, 4, 4), "key_padding_mask": doubles(3, 4)}
    check(Attends(**options).double(), inputs, **both, **shown)
    assert ways == [Way.VMAP if options["dropout"] else Way.REWRITTEN] * 5


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("n", [1, 4])
def test_as_many_tokens_as_samples(batch_first: bool, n: int, ways: list[Way]) -> None:
    model = Attends(batch_first=batch_first, dropout=0.3).double()
    check(model, doubles(n, 4, 4), attn_mask=doubles(4, 4), average_attn_weights=False)
    assert ways == [Way.BATCH if n == 1 else Way.VMAP]


@pytest.mark.parametrize(
    "options",
    [
        {"bias": False},
        {"add_bias_kv": True},
        {"add_zero_attn": True, "batch_first": True},
        {"kdim": 3, "vdim": 3, "batch_first": True},
        {"kdim": 3, "vdim": 3, "add_bias_kv": True, "dropout": 0.5},
    ],
)
def test_other_parameters(options: dict[str, Any]) -> None:
    model = Attends(**options).double()
    inputs = [doubles(3, 5, 4)]
    if "kdim" in options:
        inputs.append(doubles(3, 2, 3))
    check(model, *inputs)


@pytest.mark.parametrize("training", [True, False])
def test_frozen(training: bool) -> None:
    # In evaluation, attention has a path without gradients, and the call itself takes it.
    model = Attends(batch_first=True).double().train(training)
    check(model, doubles(3, 4, 4), frozen=True)
    model = Attends(batch_first=True).double().train(training)
    model.linear.requires_grad_(False)
    check(model, doubles(3, 4, 4), frozen=True)


@pytest.mark.parametrize("layers", ["*out_proj.bias", "*in_proj_weight", "*out_proj*,*in_proj*"])
def test_some_of_the_parameters(layers: str) -> None:
    check(Attends(dropout=0.5).double(), doubles(3, 4, 4), layers=layers)


def test_projection_of_zero_hides_no_dropout_mask() -> None:
    model = Attends(dropout=0.5, batch_first=True).double()
    nn.init.zeros_(model.attention.out_proj.weight)
    check(model, doubles(3, 4, 4), layers="*out_proj.weight", need_weights=False)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_lower_precision(dtype: torch.dtype, tolerance: float) -> None:
    model = Attends(dropout=0.3, batch_first=True).to(dtype)
    check(model, torch.randn(3, 4, 4).to(dtype), need_weights=False, tolerance=tolerance)


def test_autocast(ways: list[Way]) -> None:
    class Cast(Attends):
        def forward(self, query: Tensor, other: Tensor | None = None, **options: Any) -> Any:
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(query, other, **options)

    check(Cast(dropout=0.3, batch_first=True), torch.randn(3, 4, 4), tolerance=3e-2)
    assert ways == [Way.VMAP]


def test_encoder_layer_in_training() -> None:
    class Encodes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)

        def forward(self, x: Tensor) -> Any:
            return (self.layer(x),)

    check(Encodes().double(), doubles(3, 4, 4), layers="layer.self_attn,layer.linear1")


def test_inputs_without_samples_are_refused() -> None:
    attention = nn.MultiheadAttention(4, 2).double()
    model = nn.ModuleDict({"attention": attention})
    model.forward = lambda x: attention(x, x, x)[0]
    engine = GradientHolder(model, registry=REGISTRY)
    pattern = r"(?s)its query has the shape \(4, 4\).*give it inputs with three axes"
    with engine, pytest.raises(WrongSplitError, match=pattern), engine.batch(range(4)):
        model(doubles(4, 4))


def test_tokens_of_one_input_are_told_apart() -> None:
    model, x = Attends(batch_first=True).double(), doubles(3, 5, 4)
    engine = GradientHolder(model, registry=REGISTRY)
    with engine, engine.batch(range(3)) as batch:
        losses(model(x, need_weights=False)).sum().backward()
    for name, (one,) in batch.result.uses.items():
        use = one.gradient
        direction = torch.randn(1, *model.get_parameter(name).shape, dtype=torch.float64)
        dots = use.token_dot(direction)
        assert dots.shape == (3, 5, 1)
        torch.testing.assert_close(dots.sum(1), use.dot(direction))
