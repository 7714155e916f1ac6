from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._pytree import tree_leaves

from ghost_core import Call, Outer, SamplerRegistry, WrongSplitError, full_precision
from ghost_core.testing import GradientHolder, assert_within, check_sampler, per_sample_gradients
from ghost_core.tracking import Claim, dotted_name
from ghost_layers.linear import LinearSampler
from ghost_layers.recurrent import RecurrentCellSampler, RecurrentSampler
from ghost_layers.replay import Way

LAYERS = [nn.RNN, nn.LSTM, nn.GRU]
CELLS = [nn.RNNCell, nn.LSTMCell, nn.GRUCell]
REGISTRY = SamplerRegistry(
    [
        *(Claim(dotted_name(kind), RecurrentSampler, "test") for kind in LAYERS),
        *(Claim(dotted_name(kind), RecurrentCellSampler, "test") for kind in CELLS),
        Claim(dotted_name(nn.Linear), LinearSampler, "test"),
    ]
)


def losses(outputs: Any) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    total = torch.zeros(())
    for each in tree_leaves(outputs):
        values = each.double()
        weights = torch.randn(values.shape, generator=generator, dtype=torch.float64)
        total = total + (weights * (values + (1 + values**2).sqrt())).flatten(1).sum(1)
    return total


class Recurs(nn.Module):
    """Runs a layer on projected inputs `[N, T, 3]`; all outputs have samples on axis 0."""

    def __init__(self, layer: nn.RNNBase, *, only: str = "all") -> None:
        super().__init__()
        self.linear, self.layer, self.only = nn.Linear(3, 3), layer, only

    def forward(self, x: Tensor, *states: Tensor) -> Any:
        x = self.linear(x)
        if not self.layer.batch_first:
            x = x.transpose(0, 1)
        given = [state.transpose(0, 1) for state in states]
        output, last = self.layer(x, *([tuple(given)] if len(given) > 1 else given))
        if not self.layer.batch_first:
            output = output.transpose(0, 1)
        last = [state.transpose(0, 1) for state in tree_leaves(last)]
        if self.only == "all":
            return [output, *last]
        return [output] if self.only == "output" else last[-1:]


def check(
    model: nn.Module,
    *inputs: Tensor,
    layers: str = "*",
    frozen: bool = False,
    tolerance: float = 1e-9,
) -> dict[str, list[Any]]:
    """Compare with autograd, with the same random numbers."""
    torch.manual_seed(1)
    plain = losses(model(*inputs))
    expected = per_sample_gradients(model, plain)
    after = torch.get_rng_state()
    engine = GradientHolder(model, registry=REGISTRY, layers=layers)
    for _ in range(2):
        torch.manual_seed(1)
        with engine.frozen() if frozen else engine, engine.batch(range(len(plain))) as batch:
            losses(model(*inputs)).sum().backward()
        assert torch.equal(torch.get_rng_state(), after)
        for name, held in batch.result.materialize().items():
            assert expected[name].any()
            assert_within(held, expected[name], expected[name].norm(), tolerance, name)
    return {name: batch.result.gradients(name) for name in batch.result.uses}


def doubles(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize(
    ("kind", "uses"),
    [
        (nn.GRU, 1),  # the new gate takes two biases
        (nn.LSTM, 2),  # two states
        *(
            pytest.param(*each, marks=pytest.mark.stress)
            for each in [(nn.RNN, 1), (nn.RNN, 2), (nn.GRU, 2), (nn.LSTM, 1)]
        ),
    ],
)
def test_conformance(kind: type[nn.RNNBase], uses: int) -> None:
    layer = kind(3, 2, batch_first=True)
    check_sampler(RecurrentSampler, layer, torch.randn(4, 3, 3), uses=uses)


@pytest.mark.parametrize("kind", [pytest.param(nn.RNNCell, marks=pytest.mark.stress), *CELLS[1:]])
def test_cells(kind: type[nn.RNNCellBase]) -> None:
    states = [torch.randn(4, 2), torch.randn(4, 2)]
    given: Any = tuple(states) if kind is nn.LSTMCell else states[0]
    check_sampler(RecurrentCellSampler, kind(3, 2), torch.randn(4, 3), given)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, marks=pytest.mark.stress),
        {"num_layers": 2, "bidirectional": True, "batch_first": True},
        pytest.param({"num_layers": 3, "dropout": 0.5}, marks=pytest.mark.stress),
        {"num_layers": 2, "dropout": 0.5, "bidirectional": True, "bias": False},
    ],
)
def test_layers(kind: type[nn.RNNBase], options: dict[str, Any], ways: list[Way]) -> None:
    uses = check(Recurs(kind(3, 4, **options)).double(), doubles(3, 5, 3))
    assert ways == [Way.REWRITTEN]
    assert all(isinstance(each, Outer) for each in uses["layer.weight_hh_l0"])


def test_relu() -> None:
    check(Recurs(nn.RNN(3, 4, nonlinearity="relu", num_layers=2)).double(), doubles(3, 5, 3))


@pytest.mark.parametrize("only", ["output", "last state"])
@pytest.mark.parametrize("proj_size", [0, 2])
def test_states(only: str, proj_size: int) -> None:
    layer = nn.LSTM(3, 4, num_layers=2, proj_size=proj_size)
    given = doubles(3, 2, proj_size or 4), doubles(3, 2, 4)
    check(Recurs(layer, only=only).double(), doubles(3, 5, 3), *given)
    check(Recurs(nn.GRU(3, 4), only=only).double(), doubles(3, 5, 3), doubles(3, 1, 4))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("n", [1, 5])
def test_as_many_steps_as_samples(batch_first: bool, n: int) -> None:
    layer = nn.LSTM(3, 4, num_layers=2, dropout=0.5, batch_first=batch_first)
    check(Recurs(layer).double(), doubles(n, 5, 3))


@pytest.mark.parametrize("layers", ["*weight_hh_l1", "*bias_ih_l0", "layer.*ih*,linear"])
def test_some_of_the_parameters(layers: str) -> None:
    layer = nn.GRU(3, 4, num_layers=2, dropout=0.5)
    check(Recurs(layer).double(), doubles(3, 5, 3), layers=layers)


@pytest.mark.parametrize("training", [True, False])
def test_frozen(training: bool) -> None:
    layer = nn.LSTM(3, 4, num_layers=2, dropout=0.5)
    check(Recurs(layer).double().train(training), doubles(3, 5, 3), frozen=True)


def test_used_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.LSTM(3, 3, batch_first=True)

        def forward(self, x: Tensor) -> Any:
            return self.layer(*self.layer(x))[0]

    uses = check(Twice().double(), doubles(4, 5, 3))
    assert all(len(each) == 2 for each in uses.values())


def test_parametrized(ways: list[Way]) -> None:
    layer = parametrizations.weight_norm(nn.LSTM(3, 4), "weight_hh_l0")
    check(Recurs(layer).double(), doubles(3, 5, 3))
    assert ways == [Way.BATCH]


def test_dropout_where_the_layer_cannot_be_rewritten(ways: list[Way]) -> None:
    layer = parametrizations.weight_norm(nn.GRU(3, 4, 2, dropout=0.5), "weight_hh_l0")
    check(Recurs(layer).double(), doubles(3, 5, 3))
    assert ways == [Way.BATCH]


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
def test_lower_precision(kind: type[nn.RNNBase], dtype: torch.dtype, tolerance: float) -> None:
    layer = kind(3, 4, num_layers=2, dropout=0.5)
    check(Recurs(layer).to(dtype), torch.randn(3, 5, 3).to(dtype), tolerance=tolerance)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("parametrized", [False, True])
def test_autocast(kind: type[nn.RNNBase], n: int, parametrized: bool, ways: list[Way]) -> None:
    # The kernel behind an LSTM under autocast can be differentiated once only.
    layer = kind(3, 4, num_layers=2, dropout=0.5)
    if parametrized:
        parametrizations.weight_norm(layer, "weight_hh_l1")
    model, inputs = Recurs(layer, only="output"), torch.randn(n, 5, 3)
    expected: list[dict[str, Tensor]] = []
    for sample in range(n):
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16):
            outputs = model(inputs)
        model.zero_grad()
        losses(outputs)[sample].backward()
        expected.append({name: p.grad.double() for name, p in model.named_parameters()})
    engine = GradientHolder(model, registry=REGISTRY)
    torch.manual_seed(1)
    with engine, engine.batch(range(n)) as batch:
        with torch.autocast("cpu", torch.bfloat16):
            outputs = model(inputs)
        losses(outputs).sum().backward()
    for name, held in batch.result.materialize().items():
        gradients = torch.stack([each[name] for each in expected])
        assert_within(held, gradients, gradients.norm(), 5e-2)
    assert ways == [Way.BATCH if n == 1 or parametrized else Way.REWRITTEN]


def test_some_of_the_samples() -> None:
    layer, sampler = nn.LSTM(3, 4, batch_first=True).double(), RecurrentSampler()
    before, inputs = sampler.prepare(layer), doubles(4, 5, 3)
    outputs = tree_leaves(layer(inputs))
    moved = tuple(outputs[:1] + [state.transpose(0, 1) for state in outputs[1:]])
    shapes = {name: parameter.shape for name, parameter in layer.named_parameters()}
    call = Call("", layer, (inputs,), {}, moved, shapes, before=before)
    slopes, some = [torch.randn_like(each) for each in moved], torch.tensor([2, 0])
    with full_precision(inputs.device):
        records = sampler.record(call)
        whole = sampler.gradients(call.past(), records, slopes)
        narrow = {name: record.narrow(some) for name, record in records.items()}
        part = sampler.gradients(call.past(), narrow, [each[some] for each in slopes])
    for name, gradient in part.items():
        torch.testing.assert_close(gradient.materialize(), whole[name].materialize()[some])


def test_the_layer_is_as_it_was() -> None:
    layer = nn.LSTM(3, 4)
    weights, refs = list(layer._flat_weights), list(layer._flat_weight_refs)
    model = Recurs(layer)
    engine = GradientHolder(model, registry=REGISTRY)
    with engine, engine.batch(range(2)):
        losses(model(torch.randn(2, 5, 3))).sum().backward()
    assert all(mine is theirs for mine, theirs in zip(layer._flat_weights, weights, strict=True))
    assert layer._flat_weight_refs == refs


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, torch.tensor([3, 2, 1]), batch_first=True)
        output: Tensor = self.layer(packed)[1][0]
        return output.transpose(0, 1)


class Unbatched(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.GRU(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.layer(x)[0]
        return output


@pytest.mark.parametrize(
    ("kind", "shape", "reason"),
    [
        (Packed, (3, 3, 3), r"(?s)PackedSequence.*padded tensors, and mask the loss"),
        (Unbatched, (3, 3), r"(?s)shape \(3, 3\), without an axis.*input with three axes"),
    ],
)
def test_inputs_without_an_axis_for_samples_are_refused(
    kind: type[nn.Module], shape: tuple[int, ...], reason: str
) -> None:
    """Packed sequences are followed step by step instead, unless nothing may be followed."""
    model = kind().double()
    engine = GradientHolder(model, registry=REGISTRY, lift=False)
    with engine, pytest.raises(WrongSplitError, match=reason), engine.batch(range(3)):
        model(doubles(*shape))


def test_cell_without_an_axis_for_samples_is_refused() -> None:
    model = nn.Sequential(nn.GRUCell(3, 3)).double()
    engine = GradientHolder(model, registry=REGISTRY)
    with (
        engine,
        pytest.raises(WrongSplitError, match=r"inputs with two axes"),
        engine.batch(range(3)),
    ):
        model(doubles(3))


def test_packed_sequences_that_nobody_asks_about_are_refused() -> None:
    """With as many features as samples, rows would be looked for among the features."""
    model = Packed().double()
    engine = GradientHolder(model, registry=REGISTRY, verify=False)
    reason = r"(?s)layer.*PackedSequence.*verify=False.*row_owner"
    with engine, pytest.raises(WrongSplitError, match=reason), engine.batch(range(3)):
        model(doubles(3, 3, 3))
