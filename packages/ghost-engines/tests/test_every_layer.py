"""Every layer of torch.nn with a sampler, through both engines, against per-sample autograd."""

import copy
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import nn

from ghost_core.testing import per_sample_gradients
from ghost_engines import DotProductEngine, ProjectionEngine

VOCABULARY, PADDING = 7, 2


class Case(NamedTuple):
    """A layer and its inputs `shape`: indices for tables, else numbers."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    indices: bool = False


class Around(nn.Module):
    """The root: a linear map of the last axis, so that the layer's inputs need gradients too."""

    def __init__(self, layer, width):
        super().__init__()
        self.before = nn.Linear(width, width) if width else None
        self.layer = layer

    def forward(self, inputs):
        return self.layer(inputs if self.before is None else torch.tanh(self.before(inputs)))


class Twice(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, inputs):
        return self.inner(torch.tanh(self.inner(inputs)))


class Tied(nn.Module):
    """A table whose transpose is the head."""

    def __init__(self, bias):
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, 6)
        self.head = nn.Linear(6, VOCABULARY, bias=bias)
        self.head.weight = self.table.weight

    def forward(self, tokens):
        return self.head(torch.tanh(self.table(tokens)))


class OneInstance(nn.Module):
    """Two names for one layer."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = self.first

    def forward(self, inputs):
        return self.second(torch.tanh(self.first(inputs)))


class Weighted(nn.Module):
    """A bag whose entries have weights."""

    def __init__(self, **options):
        super().__init__()
        self.bag = nn.EmbeddingBag(VOCABULARY, 5, mode="sum", **options)

    def forward(self, tokens):
        weights = torch.linspace(-1, 2, tokens.numel(), dtype=torch.float64).reshape(tokens.shape)
        return self.bag(tokens, per_sample_weights=weights)


class ChannelsLast(nn.Module):
    def __init__(self, inner, memory_format):
        super().__init__()
        self.inner = inner.to(memory_format=memory_format)
        self.memory_format = memory_format

    def forward(self, inputs):
        inputs = inputs.contiguous(memory_format=self.memory_format)
        assert not inputs.is_contiguous()
        return self.inner(inputs)


class Transposed(nn.Module):
    """Gives a layer inputs that are not contiguous."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, inputs):
        return self.inner(inputs.mT)


def freeze(layer, *names):
    """Freeze some of a layer's parameters."""
    for name in names:
        layer.get_parameter(name).requires_grad_(False)
    return layer


def evaluated(norm):
    """Put a norm with running statistics, which are not trivial, into evaluation mode."""
    norm.running_mean.copy_(torch.linspace(-1, 1, norm.num_features))
    norm.running_var.copy_(torch.linspace(0.5, 2, norm.num_features))
    return norm.eval()


def table(**options):
    return nn.Embedding(VOCABULARY, 5, **options)


def bag(**options):
    return nn.EmbeddingBag(VOCABULARY, 5, **options)


CASES = {
    # Linear
    "linear": Case(lambda: nn.Linear(6, 7), (4, 6)),
    "linear, square": Case(lambda: nn.Linear(7, 7), (4, 7)),
    "linear, no bias": Case(lambda: nn.Linear(6, 7, bias=False), (4, 6)),
    "linear, one output": Case(lambda: nn.Linear(15, 1), (4, 15)),
    "linear, tokens": Case(lambda: nn.Linear(6, 7), (4, 3, 6)),
    "linear, tokens, no bias": Case(lambda: nn.Linear(6, 7, bias=False), (4, 3, 6)),
    "linear, many tokens": Case(lambda: nn.Linear(6, 7), (3, 40, 6)),
    "linear, as many tokens as samples": Case(lambda: nn.Linear(6, 7), (5, 5, 6)),
    "linear, two axes of tokens": Case(lambda: nn.Linear(6, 7), (4, 2, 3, 6)),
    "linear, two axes of tokens, no bias": Case(lambda: nn.Linear(6, 7, bias=False), (4, 2, 3, 6)),
    "linear, not contiguous": Case(lambda: Transposed(nn.Linear(6, 7)), (4, 6, 3)),
    "linear, one sample": Case(lambda: nn.Linear(6, 7), (1, 3, 6)),
    "linear, only the weight": Case(lambda: freeze(nn.Linear(6, 7), "bias"), (4, 3, 6)),
    "linear, only the bias": Case(lambda: freeze(nn.Linear(6, 14), "weight"), (4, 3, 6)),
    "linear, used twice": Case(lambda: Twice(nn.Linear(6, 6)), (4, 6)),
    "linear, used twice on tokens": Case(lambda: Twice(nn.Linear(6, 6, bias=False)), (4, 3, 6)),
    "linear, two names": Case(OneInstance, (4, 3, 6)),
    # Convolutions: along one axis
    "conv1d": Case(lambda: nn.Conv1d(3, 6, 3), (4, 3, 9)),
    "conv1d, no bias": Case(lambda: nn.Conv1d(3, 6, 3, bias=False), (4, 3, 9)),
    "conv1d, kernel of one": Case(lambda: nn.Conv1d(3, 6, 1), (4, 3, 9)),
    "conv1d, even kernel": Case(lambda: nn.Conv1d(3, 6, 4), (4, 3, 9)),
    "conv1d, stride": Case(lambda: nn.Conv1d(3, 6, 3, stride=2), (4, 3, 10)),
    "conv1d, stride beyond the kernel": Case(lambda: nn.Conv1d(3, 6, 2, stride=3), (4, 3, 10)),
    "conv1d, padding": Case(lambda: nn.Conv1d(3, 6, 3, padding=2), (4, 3, 7)),
    "conv1d, valid": Case(lambda: nn.Conv1d(3, 6, 3, padding="valid"), (4, 3, 7)),
    "conv1d, same": Case(lambda: nn.Conv1d(3, 6, 5, padding="same"), (4, 3, 7)),
    "conv1d, same, even kernel": Case(lambda: nn.Conv1d(3, 6, 4, padding="same"), (4, 3, 7)),
    "conv1d, same, even kernel, dilation": Case(
        lambda: nn.Conv1d(3, 6, 4, padding="same", dilation=3), (4, 3, 8)
    ),
    "conv1d, dilation": Case(lambda: nn.Conv1d(3, 6, 3, dilation=2), (4, 3, 9)),
    "conv1d, stride, padding and dilation": Case(
        lambda: nn.Conv1d(3, 6, 3, stride=2, padding=3, dilation=2), (4, 3, 8)
    ),
    "conv1d, reflect": Case(
        lambda: nn.Conv1d(3, 6, 3, padding=2, padding_mode="reflect"), (4, 3, 7)
    ),
    "conv1d, replicate": Case(
        lambda: nn.Conv1d(3, 6, 3, padding=2, padding_mode="replicate"), (4, 3, 7)
    ),
    "conv1d, circular": Case(
        lambda: nn.Conv1d(3, 6, 3, padding=2, padding_mode="circular"), (4, 3, 7)
    ),
    "conv1d, same and circular, even kernel": Case(
        lambda: nn.Conv1d(3, 6, 4, padding="same", padding_mode="circular"), (4, 3, 7)
    ),
    "conv1d, groups": Case(lambda: nn.Conv1d(4, 6, 3, groups=2), (4, 4, 9)),
    "conv1d, depthwise": Case(lambda: nn.Conv1d(6, 6, 3, groups=6, padding=1), (4, 6, 7)),
    "conv1d, as many positions as samples": Case(lambda: nn.Conv1d(3, 6, 3, padding=1), (5, 3, 5)),
    "conv1d, many positions": Case(lambda: nn.Conv1d(2, 7, 3), (3, 2, 50)),
    "conv1d, used twice": Case(lambda: Twice(nn.Conv1d(4, 4, 3, padding=1)), (4, 4, 6)),
    # ... two
    "conv2d": Case(lambda: nn.Conv2d(2, 5, 3), (4, 2, 5, 6)),
    "conv2d, no bias": Case(lambda: nn.Conv2d(2, 5, 3, bias=False), (4, 2, 5, 6)),
    "conv2d, one position": Case(lambda: nn.Conv2d(2, 5, 3), (4, 2, 3, 3)),
    "conv2d, even and odd kernel": Case(lambda: nn.Conv2d(2, 5, (2, 3)), (4, 2, 5, 6)),
    "conv2d, strides": Case(lambda: nn.Conv2d(2, 5, 3, stride=(2, 1)), (4, 2, 6, 5)),
    "conv2d, paddings": Case(lambda: nn.Conv2d(2, 5, 3, padding=(2, 1)), (4, 2, 4, 5)),
    "conv2d, valid": Case(lambda: nn.Conv2d(2, 5, (3, 2), padding="valid"), (4, 2, 4, 5)),
    "conv2d, same": Case(lambda: nn.Conv2d(2, 5, (3, 5), padding="same"), (4, 2, 4, 5)),
    "conv2d, same, even and odd kernel": Case(
        lambda: nn.Conv2d(2, 5, (4, 3), padding="same"), (4, 2, 4, 5)
    ),
    "conv2d, dilations": Case(lambda: nn.Conv2d(2, 5, (2, 3), dilation=(3, 2)), (4, 2, 6, 7)),
    "conv2d, stride, padding, dilation and groups": Case(
        lambda: nn.Conv2d(4, 6, (3, 2), (2, 1), (1, 2), (1, 3), groups=2), (3, 4, 6, 5)
    ),
    "conv2d, reflect": Case(
        lambda: nn.Conv2d(2, 5, 3, padding=(1, 2), padding_mode="reflect"), (4, 2, 4, 5)
    ),
    "conv2d, replicate": Case(
        lambda: nn.Conv2d(2, 5, 3, padding=(1, 2), padding_mode="replicate"), (4, 2, 4, 5)
    ),
    "conv2d, circular": Case(
        lambda: nn.Conv2d(2, 5, 3, padding=(1, 2), padding_mode="circular"), (4, 2, 4, 5)
    ),
    "conv2d, depthwise": Case(lambda: nn.Conv2d(4, 4, 3, groups=4, bias=False), (4, 4, 5, 4)),
    "conv2d, depthwise with a multiplier": Case(
        lambda: nn.Conv2d(3, 6, 3, groups=3, dilation=2), (4, 3, 6, 7)
    ),
    "conv2d, channels last": Case(
        lambda: ChannelsLast(nn.Conv2d(4, 6, 3, padding=1), torch.channels_last), (4, 4, 5, 6)
    ),
    "conv2d, channels last, groups and stride": Case(
        lambda: ChannelsLast(nn.Conv2d(4, 6, 3, stride=2, groups=2), torch.channels_last),
        (4, 4, 5, 6),
    ),
    "conv2d, only the bias": Case(lambda: freeze(nn.Conv2d(2, 14, 3), "weight"), (4, 2, 4, 5)),
    "conv2d, as many positions as samples": Case(lambda: nn.Conv2d(2, 5, 2), (6, 2, 3, 4)),
    # ... three
    "conv3d": Case(lambda: nn.Conv3d(2, 4, 2), (3, 2, 3, 4, 3)),
    "conv3d, no bias": Case(lambda: nn.Conv3d(2, 4, (1, 2, 3), bias=False), (3, 2, 3, 3, 4)),
    "conv3d, stride, padding and dilation": Case(
        lambda: nn.Conv3d(2, 4, (2, 3, 2), (1, 2, 1), (1, 2, 0), (2, 1, 3)), (3, 2, 3, 4, 5)
    ),
    "conv3d, same, even and odd kernel": Case(
        lambda: nn.Conv3d(2, 4, (2, 3, 1), padding="same"), (3, 2, 3, 3, 2)
    ),
    "conv3d, reflect": Case(
        lambda: nn.Conv3d(2, 4, 2, padding=(1, 0, 2), padding_mode="reflect"), (3, 2, 3, 3, 4)
    ),
    "conv3d, replicate": Case(
        lambda: nn.Conv3d(2, 4, 2, padding=(1, 0, 2), padding_mode="replicate"), (3, 2, 3, 3, 4)
    ),
    "conv3d, circular": Case(
        lambda: nn.Conv3d(2, 4, 2, padding=(1, 0, 2), padding_mode="circular"), (3, 2, 3, 3, 4)
    ),
    "conv3d, groups": Case(lambda: nn.Conv3d(4, 4, 2, groups=2), (3, 4, 3, 3, 3)),
    "conv3d, depthwise": Case(lambda: nn.Conv3d(4, 4, 2, groups=4), (3, 4, 3, 3, 3)),
    "conv3d, channels last": Case(
        lambda: ChannelsLast(nn.Conv3d(2, 4, 2), torch.channels_last_3d), (3, 2, 3, 3, 4)
    ),
    # Tables
    "embedding, one index": Case(table, (6,), indices=True),
    "embedding, tokens": Case(table, (4, 6), indices=True),
    "embedding, two axes of tokens": Case(table, (4, 3, 2), indices=True),
    "embedding, as many tokens as samples": Case(table, (6, 6), indices=True),
    "embedding, padding": Case(lambda: table(padding_idx=PADDING), (4, 6), indices=True),
    "embedding, padding from the end": Case(lambda: table(padding_idx=-1), (4, 6), indices=True),
    "embedding, one index, padding": Case(lambda: table(padding_idx=PADDING), (20,), indices=True),
    "embedding, sparse": Case(lambda: table(sparse=True), (4, 6), indices=True),
    "embedding, sparse, padding": Case(
        lambda: table(sparse=True, padding_idx=PADDING), (4, 6), indices=True
    ),
    "embedding, max_norm": Case(lambda: table(max_norm=1.0), (4, 6), indices=True),
    "embedding bag, sum": Case(lambda: bag(mode="sum"), (4, 6), indices=True),
    "embedding bag, mean": Case(lambda: bag(mode="mean"), (4, 6), indices=True),
    "embedding bag, sum, padding": Case(
        lambda: bag(mode="sum", padding_idx=PADDING), (4, 6), indices=True
    ),
    "embedding bag, mean, padding": Case(
        lambda: bag(mode="mean", padding_idx=PADDING), (4, 6), indices=True
    ),
    "embedding bag, sparse": Case(lambda: bag(mode="sum", sparse=True), (4, 6), indices=True),
    "embedding bag, weights": Case(Weighted, (4, 6), indices=True),
    "embedding bag, weights, padding": Case(
        lambda: Weighted(padding_idx=PADDING), (4, 6), indices=True
    ),
    "embedding tied to a head": Case(lambda: Tied(bias=False), (4, 6), indices=True),
    "embedding tied to a head with a bias": Case(lambda: Tied(bias=True), (4, 6), indices=True),
    "embedding tied to a head, whose bias alone is frozen": Case(
        lambda: freeze(Tied(bias=True), "head.bias"), (4, 6), indices=True
    ),
    # Norms
    "layer norm": Case(lambda: nn.LayerNorm(15), (4, 15)),
    "layer norm, tokens": Case(lambda: nn.LayerNorm(15), (4, 3, 15)),
    "layer norm, as many tokens as samples": Case(lambda: nn.LayerNorm(15), (5, 5, 15)),
    "layer norm, two axes": Case(lambda: nn.LayerNorm((3, 7)), (4, 3, 7)),
    "layer norm, two axes, tokens": Case(lambda: nn.LayerNorm((3, 7)), (4, 2, 3, 7)),
    "layer norm, no bias": Case(lambda: nn.LayerNorm(15, bias=False), (4, 3, 15)),
    "layer norm, no affine": Case(
        lambda: nn.Sequential(nn.LayerNorm(6, elementwise_affine=False), nn.Linear(6, 7)), (4, 3, 6)
    ),
    "layer norm, large eps": Case(lambda: nn.LayerNorm(15, eps=0.5), (4, 3, 15)),
    "layer norm, only the bias": Case(lambda: freeze(nn.LayerNorm(15), "weight"), (4, 3, 15)),
    "layer norm, used twice": Case(lambda: Twice(nn.LayerNorm(15)), (4, 3, 15)),
    "rms norm": Case(lambda: nn.RMSNorm(15), (4, 15)),
    "rms norm, tokens": Case(lambda: nn.RMSNorm(15, eps=0.1), (4, 3, 15)),
    "rms norm, two axes": Case(lambda: nn.RMSNorm((3, 7)), (4, 3, 7)),
    "group norm": Case(lambda: nn.GroupNorm(3, 15), (4, 15, 4)),
    "group norm, one group": Case(lambda: nn.GroupNorm(1, 15), (4, 15)),
    "group norm, two spatial axes": Case(lambda: nn.GroupNorm(5, 15), (4, 15, 2, 3)),
    "group norm, no affine": Case(
        lambda: nn.Sequential(nn.GroupNorm(2, 4, affine=False), nn.Conv1d(4, 5, 2)), (4, 4, 5)
    ),
    "group norm, only the weight": Case(lambda: freeze(nn.GroupNorm(3, 15), "bias"), (4, 15, 4)),
    "instance norm 1d": Case(lambda: nn.InstanceNorm1d(15, affine=True), (4, 15, 5)),
    "instance norm 2d": Case(lambda: nn.InstanceNorm2d(15, affine=True), (4, 15, 3, 2)),
    "instance norm 3d": Case(lambda: nn.InstanceNorm3d(15, affine=True), (3, 15, 2, 2, 2)),
    "instance norm, running statistics": Case(
        lambda: evaluated(nn.InstanceNorm1d(15, affine=True, track_running_stats=True)), (4, 15, 5)
    ),
    "batch norm 1d": Case(lambda: evaluated(nn.BatchNorm1d(15)), (4, 15)),
    "batch norm 1d, tokens": Case(lambda: evaluated(nn.BatchNorm1d(15)), (4, 15, 4)),
    "batch norm 2d": Case(lambda: evaluated(nn.BatchNorm2d(15)), (4, 15, 3, 2)),
    "batch norm 3d": Case(lambda: evaluated(nn.BatchNorm3d(15)), (3, 15, 2, 2, 2)),
    "batch norm, only the bias": Case(
        lambda: freeze(evaluated(nn.BatchNorm1d(15)), "weight"), (4, 15, 3)
    ),
}


def losses(outputs):
    """Return a loss per sample, `[N]`, in which every output counts and tokens meet."""
    weights = torch.randn(outputs.shape, dtype=outputs.dtype, generator=seeded(1))
    each = (weights * outputs.sin()).flatten(1).sum(1)
    return each + each.square()


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def dense(gradient):
    return gradient.to_dense() if gradient is not None and gradient.is_sparse else gradient


def backpropagate(model, inputs):
    losses(model(inputs)).sum().backward()


def reference(model, inputs):
    """Ask autograd for each sample's gradient; a table's sparse ones are made dense first."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            module.sparse = False
    return per_sample_gradients(model, losses(model(inputs)))


@pytest.fixture(params=CASES)
def case(request):
    """A model in float64 around the layer, and its inputs."""
    make, shape, indices = CASES[request.param]
    layer = make()
    if indices:
        inputs = torch.randint(0, VOCABULARY, shape, generator=seeded(0))
        if len(shape) > 1 or shape[0] > VOCABULARY:
            assert set(inputs.unique().tolist()) == set(range(VOCABULARY))
    else:
        inputs = torch.randn(shape, dtype=torch.float64, generator=seeded(0))
    model = Around(layer, 0 if indices else shape[-1]).double()
    with torch.no_grad():  # norms start with ones and zeros
        for parameter in model.parameters():
            parameter += torch.randn(parameter.shape, dtype=torch.float64, generator=seeded(2)) / 4
    return model, inputs


def assert_trained_as(plain, model):
    for name, parameter in model.named_parameters():
        found, wanted = dense(parameter.grad), dense(plain.get_parameter(name).grad)
        same = found is wanted if found is None or wanted is None else torch.equal(found, wanted)
        assert same, f"{name}.grad is not that of plain training"


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
def test_dots_and_rows_are_those_of_autograd(case, assert_scores, assert_rows, draw_directions):
    model, inputs = case
    n, gradients = len(inputs), reference(model, inputs)
    assert any(name.startswith("layer.") for name in gradients)
    plain = copy.deepcopy(model)
    backpropagate(plain, inputs)
    directions = draw_directions(model, 2)

    def dot_products(model):
        engine = DotProductEngine(model)
        for name, direction in directions.items():
            engine.add_direction(name, direction)
        return engine

    def projections(model):
        engine = ProjectionEngine(model, dim=12, min_dim=3, dtype="float64")
        assert any(
            block.size < block.shape.numel()
            for block in engine.layout
            if block.parameter.startswith("layer.")
        ), "nothing of the layer is projected"
        return engine

    scored = copy.deepcopy(model)
    engine = dot_products(scored)
    with engine, engine.batch(range(n)) as batch:
        backpropagate(scored, inputs)
    assert_scores(batch.result, gradients, directions)
    assert_trained_as(plain, scored)

    projected = copy.deepcopy(model)
    engine = projections(projected)
    with engine, engine.batch(range(n)) as batch:
        backpropagate(projected, inputs)
    assert_rows(engine, batch.result, gradients)
    assert_trained_as(plain, projected)

    frozen = copy.deepcopy(model)
    engine, other = projections(frozen), dot_products(frozen)
    with engine.frozen(), engine.batch(range(n)) as batch:
        backpropagate(frozen, inputs)
    assert_rows(engine, batch.result, gradients)
    both = engine.frozen(), other.frozen()
    with both[0], both[1], other.batch(range(n)) as scores, engine.batch(range(n)) as batch:
        backpropagate(frozen, inputs)
    assert_scores(scores.result, gradients, directions)
    assert_rows(engine, batch.result, gradients)
    assert all(parameter.grad is None for parameter in frozen.parameters())


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
def test_table_has_cases_with_as_many_tokens_as_samples():
    """There an engine that takes one for the other could go unnoticed, but for the values."""
    found = []
    for name, (make, shape, indices) in CASES.items():
        layer = make().double()
        inputs = torch.zeros(shape, dtype=torch.int64 if indices else torch.float64)
        with torch.no_grad():
            output = layer(inputs)
        tokens = output.shape[2:] if hasattr(layer, "padding_mode") else output.shape[1:-1]
        if tokens.numel() == len(inputs) > 1:
            found.append(name)
    assert {name for name in CASES if "as many" in name} <= set(found)
    assert len(found) >= 2


def test_table_is_as_long_as_promised():
    assert len(CASES) >= 60
