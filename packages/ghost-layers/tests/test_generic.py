from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

from ghost_core import (
    Call,
    Record,
    SamplerRegistry,
    UnsupportedLayerError,
    WrongSplitError,
    full_precision,
)
from ghost_core.testing import GradientHolder, assert_within, check_sampler, per_sample_gradients
from ghost_core.testing.snapshots import live_tensors
from ghost_core.tracking import Claim, dotted_name
from ghost_layers.plugin import ghost_samplers
from ghost_layers.replay import GenericSampler, Way


def registry() -> SamplerRegistry:
    offered = {
        kind if isinstance(kind, str) else dotted_name(kind): sampler
        for kind, sampler in ghost_samplers().items()
    }
    offered[dotted_name(nn.Module)] = GenericSampler
    return SamplerRegistry(Claim(kind, sampler, "test") for kind, sampler in offered.items())


def losses(output: Any) -> Tensor:
    values = (output if isinstance(output, Tensor) else output[0]).double()
    generator = torch.Generator().manual_seed(2)
    weights = torch.randn(values.shape, generator=generator, dtype=torch.float64)
    return (weights * (values + (1 + values**2).sqrt())).flatten(1).sum(1)


def check(
    model: nn.Module,
    *inputs: Any,
    layers: str = "*",
    frozen: bool = False,
    tolerance: float = 1e-9,
    **options: Any,
) -> GradientHolder:
    """Compare with autograd on a copy, also that nothing else than gradients differs afterwards."""
    other = copy.deepcopy(model)
    torch.manual_seed(1)
    plain = losses(other(*inputs))
    expected = per_sample_gradients(other, plain)
    after = torch.get_rng_state()
    engine = GradientHolder(model, registry=registry(), layers=layers, **options)
    torch.manual_seed(1)
    with engine.frozen() if frozen else engine, engine.batch(range(len(plain))) as batch:
        output = model(*inputs)
        losses(output).sum().backward()
    assert torch.equal(torch.get_rng_state(), after)
    for mine, theirs in zip(model.buffers(), other.buffers(), strict=True):
        assert torch.equal(mine, theirs)
    assert [m.training for m in model.modules()] == [m.training for m in other.modules()]
    held = batch.result.materialize()
    for name, gradient in held.items():
        rows = expected[name].flatten(1)
        scale = rows.norm(dim=1).clamp(min=1e-6).reshape(-1, *[1] * (gradient.dim() - 1))
        assert_within(gradient, expected[name], scale, tolerance, name)
    return engine


def doubles(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


class Behind(nn.Module):
    """Puts a linear layer in front of a module, so that its inputs have gradients."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.module = module

    def forward(self, x: Tensor, *inputs: Any) -> Any:
        return self.module(self.linear(x), *inputs)


class Scaled(nn.Module):
    """Holds a bare parameter; what it does is given, or written by a subclass."""

    def __init__(self, forward: Callable[[Any, Tensor], Any] | None = None) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(4) + 0.5)
        self.function = forward

    def forward(self, x: Tensor) -> Any:
        return self.scale * x if self.function is None else self.function(self, x)


class Gated(nn.Module):
    """A residual block behind a layer scale."""

    def __init__(self, gate: float, dropout: float = 0.5) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.full((4,), gate))
        self.norm, self.linear = nn.LayerNorm(4), nn.Linear(4, 4)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gate * self.dropout(functional.gelu(self.linear(self.norm(x))))


# Layers of torch


@pytest.mark.parametrize(
    ("module", "shapes"),
    [
        (nn.ConvTranspose1d(3, 4, 2, stride=2), [(3, 3, 5)]),
        (nn.ConvTranspose2d(4, 6, 3, groups=2, output_padding=1, stride=2), [(3, 4, 3, 2)]),
        (nn.ConvTranspose3d(2, 3, 2), [(3, 2, 2, 3, 2)]),
        (nn.Bilinear(3, 4, 5), [(4, 3), (4, 4)]),
        (nn.PReLU(3), [(4, 3, 2)]),
    ],
)
def test_layers_of_torch(module: nn.Module, shapes: list[tuple[int, ...]]) -> None:
    check_sampler(GenericSampler, module, *[torch.randn(shape) for shape in shapes])


def test_used_twice() -> None:
    check_sampler(GenericSampler, nn.PReLU(3), torch.randn(4, 3, 2), uses=2)


PARAMETRIZED: dict[str, Callable[[], nn.Module]] = {
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(4, 3)),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(4, 3)),
    "spectral norm of a convolution": lambda: parametrizations.spectral_norm(nn.Conv1d(4, 3, 1)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(4, 3)),
    "Cayley": lambda: parametrizations.orthogonal(nn.Linear(4, 4), orthogonal_map="cayley"),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", PARAMETRIZED)
def test_parametrized(kind: str, training: bool) -> None:
    model = Behind(PARAMETRIZED[kind]()).double().train(training)
    shape = (5, 4, 4) if isinstance(model.module, nn.Conv1d) else (5, 4)
    engine = check(model, doubles(*shape))
    assert any("parametrizations" in parameter.name for parameter in engine.parameters)


def test_parametrized_with_cached_values() -> None:
    model = Behind(parametrizations.weight_norm(nn.Linear(4, 3))).double()
    expected = per_sample_gradients(model, losses(model(inputs := doubles(5, 4))))
    engine = GradientHolder(model, registry=registry())
    with parametrize.cached(), engine, engine.batch(range(5)) as batch:
        losses(model(inputs)).sum().backward()
    for name, held in batch.result.materialize().items():
        assert_within(held, expected[name], expected[name].norm())


def test_one_of_the_parametrized() -> None:
    model = Behind(parametrizations.weight_norm(nn.Linear(4, 3))).double()
    check(model, doubles(5, 4), layers="*original0")


# Modules with parameters of their own


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token, self.table = nn.Parameter(torch.randn(1, 1, 4)), nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.table[: x.shape[1] + 1]


class Experts(nn.Module):
    """Routes by value, which cannot be vectorised."""

    def __init__(self, capacity: int | None = None) -> None:
        super().__init__()
        self.weight, self.gate = nn.Parameter(torch.randn(3, 4, 4)), nn.Parameter(torch.randn(3, 4))
        self.unused = nn.Parameter(torch.randn(2))
        self.capacity = capacity

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        share, chosen = (rows @ self.gate.T).softmax(-1).max(-1)
        out = torch.zeros_like(rows)
        for expert in range(3):
            (index,) = (chosen == expert).nonzero(as_tuple=True)
            index = index[: self.capacity]
            made = (rows[index] @ self.weight[expert]) * share[index, None]
            out = out.index_put((index,), made)
        return out.view_as(x)


class Head(nn.Module):
    """Holds a bias that is that of a layer inside, as BERT's does."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.Linear(4, 4)
        self.bias = nn.Parameter(torch.randn(4))
        self.decoder.bias = self.bias
        self.scale = nn.Parameter(torch.rand(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(x) * self.scale


class Twins(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.randn(4))
        self.other = self.one

    def forward(self, x: Tensor) -> Tensor:
        return x * self.one + self.other.sin()


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return (mask.to(x.dtype) @ x) * self.scale


class Unused(nn.Module):
    """Has an embedding for masked positions, which it draws with numpy in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.masked = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            mask = torch.as_tensor(np.random.rand(*x.shape[:2]) < 0.5)
            x = torch.where(mask[..., None], self.masked, x)
        return 2 * x if random.random() < 0.5 else 3 * x


MODULES: dict[str, tuple[Callable[[], nn.Module], list[Way]]] = {
    "tokens": (Tokens, [Way.VMAP]),
    "experts": (Experts, [Way.BATCH]),
    "experts with a capacity": (lambda: Experts(capacity=2), [Way.BATCH]),
    "head": (Head, [Way.VMAP]),
    "twins": (Twins, [Way.VMAP]),
    "gated": (lambda: Gated(0.5), [Way.VMAP]),
    "gates near zero": (lambda: nn.Sequential(Gated(1e-6), Gated(0.0)), [Way.VMAP] * 2),
    "random masks": (Unused, [Way.BATCH]),
}


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("frozen", [False, True])
def test_bare_parameters(kind: str, frozen: bool, ways: list[Way]) -> None:
    make, expected = MODULES[kind]
    check(Seeded(Behind(make())).double(), doubles(4, 3, 4), frozen=frozen)
    assert ways == expected


class Seeded(nn.Module):
    """Seeds the generators that are not torch's."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Any) -> Any:
        np.random.seed(0)
        random.seed(0)
        return self.model(*inputs)


def test_unused_parameter_has_no_gradient() -> None:
    model = Seeded(Behind(Unused())).double().eval()
    engine = GradientHolder(model, registry=registry())
    with engine, engine.batch(range(3)) as batch:
        losses(model(doubles(3, 2, 4))).sum().backward()
    held = batch.result.materialize()
    assert not held["model.module.masked"].any()
    assert held["model.linear.weight"].any()


@pytest.mark.parametrize("n", [1, 3, 5])
def test_mask_that_samples_share(n: int) -> None:
    # With five samples, the mask [5, 5] might be one row for each of them.
    check(Behind(Masked()).double(), doubles(n, 5, 4), torch.rand(5, 5) > 0.5)


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("layers", ["module.gate", "*"])
def test_dropout(n: int, layers: str) -> None:
    check(Behind(Gated(1e-6)).double(), doubles(n, 3, 4), layers=layers)


def test_later_batches_are_run_in_the_same_way(ways: list[Way]) -> None:
    model = Behind(Gated(0.1)).double()
    engine = GradientHolder(model, registry=registry())
    with engine:
        for n in (4, 3, 4):
            inputs = doubles(n, 3, 4)
            torch.manual_seed(n)
            expected = per_sample_gradients(model, losses(model(inputs)))
            torch.manual_seed(n)
            with engine.batch(range(n)) as batch:
                losses(model(inputs)).sum().backward()
            for name, held in batch.result.materialize().items():
                assert_within(held, expected[name], expected[name].norm())
    assert ways == [Way.VMAP]


def test_later_batch_that_needs_another_way(ways: list[Way]) -> None:
    def branch_by_value(module: Scaled, x: Tensor) -> Tensor:
        if x.shape[1] > 1 and x.sum() > 1e9:  # never, but vmap cannot know
            return x
        return x * module.scale

    model = Behind(Scaled(branch_by_value)).double()
    engine = GradientHolder(model, registry=registry())
    with engine:
        for tokens in (1, 4):
            inputs = doubles(2, tokens, 4)
            expected = per_sample_gradients(model, losses(model(inputs)))
            with engine.batch(range(2)) as batch:
                losses(model(inputs)).sum().backward()
            for name, held in batch.result.materialize().items():
                assert_within(held, expected[name], expected[name].norm())
    assert ways == [Way.VMAP, Way.BATCH]


def unordered_noise(x: Tensor) -> Tensor:
    """Draw numbers in another order than sample by sample."""
    return torch.rand(x.shape[1], len(x), *x.shape[2:], dtype=x.dtype).transpose(0, 1)


def mean_of_all(x: Tensor) -> Tensor:
    return x.mean(0, keepdim=True).expand_as(x)


class TwoGates(nn.Module):
    """Two gates of zero in a row, of which neither has a gradient."""

    def __init__(self, inside: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.outer, self.inner = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))
        self.inside = inside

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer * (self.inner * x * self.inside(x))


def test_gates_in_a_row_that_move_later() -> None:
    # Then the values are still too small to show which random numbers were drawn.
    model = Behind(TwoGates(unordered_noise)).double()
    check(model, doubles(4, 3, 4))
    nn.init.constant_(model.module.outer, 1e-7)
    nn.init.constant_(model.module.inner, 1e-7)
    check(model, doubles(4, 3, 4))


def test_mixing_behind_gates_in_a_row_is_refused_when_they_move() -> None:
    model = Behind(TwoGates(mean_of_all)).double()
    check(model, doubles(4, 3, 4), layers="module.*")
    nn.init.constant_(model.module.outer, 1e-7)
    nn.init.constant_(model.module.inner, 1e-7)
    with pytest.raises(WrongSplitError, match=r"depends on other samples"):
        check(model, doubles(4, 3, 4), layers="module.*")


def test_noise_behind_a_gate_that_is_not_asked_for(ways: list[Way]) -> None:
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.scale = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.gate * (self.scale * x * unordered_noise(x))

    model = Behind(Gate()).double()
    check(model, doubles(4, 3, 4), layers="linear,*scale")
    nn.init.constant_(model.module.gate, 1e-14)
    check(model, doubles(4, 3, 4), layers="linear,*scale")
    assert ways == [Way.BATCH]


def test_way_that_depends_on_parameters(ways: list[Way]) -> None:
    # With other parameters, samples would be by themselves.
    def mix(module: Scaled, x: Tensor) -> Tensor:
        if module.scale.abs().max() < 1e-3:
            return x + module.scale * x.detach().mean(0)
        return x + module.scale * x

    model = Behind(Scaled(mix)).double()
    nn.init.constant_(model.module.scale, 1e-4)
    check(model, doubles(4, 4))
    assert ways == [Way.BATCH]


def test_parameters_that_cannot_be_others(ways: list[Way]) -> None:
    def blow_up(module: Scaled, x: Tensor) -> Tensor:
        return x + module.scale * x.detach().mean(0) / (module.scale == 0)

    check(Behind(Zero(blow_up)).double(), doubles(4, 4))
    assert ways == [Way.BATCH]


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("noisy", [False, True])
def test_row_that_samples_share(n: int, noisy: bool, ways: list[Way]) -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(3, 4))

        def forward(self, x: Tensor | None = None) -> Any:
            row = self.table.sin().unsqueeze(0)
            if x is None:
                return row
            if noisy:  # in another order than sample by sample
                x = x * torch.rand(3, len(x), 4, dtype=x.dtype).transpose(0, 1)
            return x * self.table, row

    class Adds(nn.Module):
        def __init__(self, beside: bool) -> None:
            super().__init__()
            self.positions, self.linear, self.beside = Positions(), nn.Linear(4, 4), beside

        def forward(self, x: Tensor) -> Tensor:
            x = self.linear(x)
            if not self.beside:
                return x + self.positions()
            scaled, row = self.positions(x)
            out: Tensor = scaled * x + row
            return out

    check(Adds(beside=False).double(), doubles(n, 3, 4))
    check(Adds(beside=True).double(), doubles(n, 3, 4))
    assert ways == [Way.BATCH, Way.BATCH if noisy or n == 1 else Way.VMAP]


def test_several_parameters_in_a_tied_module() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.PReLU(), nn.PReLU()
            self.second.weight = self.first.weight
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.linear(self.first(self.linear(x))) + 0.1)

    check(Tied().double(), doubles(4, 4))


def test_no_sample() -> None:
    model = nn.Sequential(nn.PReLU(4)).double()
    engine = GradientHolder(model, registry=registry())
    with engine, engine.batch([]) as batch:
        model(doubles(0, 4)).sum().backward()
    assert batch.result.materialize()["0.weight"].shape == (0, 4)


def test_samples_on_another_axis() -> None:
    class SequenceFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Gated(0.1)

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x.transpose(0, 1)).transpose(0, 1)

    axes = {"block": 1, "block.*": 1}
    check(SequenceFirst().double(), doubles(4, 4, 4), batch_dim=axes)


def test_rows_folded_into_the_batch() -> None:
    class Folded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Gated(0.1)

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x.flatten(0, 1)).unflatten(0, x.shape[:2])

    check(Folded().double(), doubles(3, 2, 4))


@pytest.mark.parametrize("early", [True, False])
def test_outputs_that_are_detached(early: bool) -> None:
    def both(module: Scaled, x: Tensor) -> tuple[Tensor, ...]:
        y = x * module.scale
        return (y.detach(), y) if early else (y, y.detach())

    class Second(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Behind(Scaled(both))

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x)[early]

    check(Second().double(), doubles(3, 4))


@pytest.mark.parametrize("training", [True, False])
def test_checkpointing(training: bool) -> None:
    class Outside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.block = nn.Linear(4, 4), Gated(0.1)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = checkpoint(self.block, self.linear(x), use_reentrant=False)
            return out

    class Inside(Gated):
        def forward(self, x: Tensor) -> Tensor:
            inner: Tensor = checkpoint(
                lambda x: self.dropout(self.linear(self.norm(x))), x, use_reentrant=False
            )
            return x + self.gate * inner

    check(Outside().double().train(training), doubles(3, 2, 4))
    check(Behind(Inside(0.1)).double().train(training), doubles(3, 2, 4))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("width", [4, 160])
def test_recurrent_layer_inside(dtype: torch.dtype, width: int, ways: list[Way]) -> None:
    # In float32, its kernel asks whether it is to be differentiated.
    class Recurs(Gated):
        def __init__(self) -> None:
            super().__init__(0.1)
            self.layer = nn.LSTM(4, width, num_layers=2, dropout=0.5, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.gate[:3].sum() * self.layer(x)[0].sum(-1, keepdim=True)

    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    model = Behind(Recurs()).to(dtype)
    check(model, torch.randn(3, 5, 4, dtype=dtype), layers="*gate,linear", tolerance=tolerance)
    assert ways == [Way.BATCH]


def test_hooks_on_saved_tensors() -> None:
    with torch.autograd.graph.save_on_cpu():
        check(Behind(Gated(0.1)).double(), doubles(3, 2, 4))


def test_derivatives_in_the_forward_pass(ways: list[Way]) -> None:
    def slope(module: Scaled, x: Tensor) -> Tensor:
        x = x if x.requires_grad else x.requires_grad_()
        energy = (x * module.scale).sin().sum()
        return torch.autograd.grad(energy, x, create_graph=True)[0]

    check(Behind(Scaled(slope)).double(), doubles(3, 4))
    assert ways == [Way.BATCH]


def recorded(module: nn.Module, x: Tensor) -> tuple[Call, Mapping[str, Record], Tensor]:
    """Run a module and record the call as the recorder does; also return a gradient for it."""
    sampler = GenericSampler()
    before = sampler.prepare(module)
    output = module(x)
    names = sampler.owns(module)
    shapes = {name: module.get_parameter(name).shape for name in names}
    call = Call("", module, (x,), {}, (output.detach(),), shapes, before=before)
    with full_precision(x.device):
        records = sampler.record(call)
    slope = torch.randn_like(output)
    return call, records, slope


NARROWED: dict[str, Callable[[], nn.Module]] = {
    "VMAP": lambda: Gated(0.5, dropout=0.0),
    "VMAP with random numbers": lambda: Gated(0.5),
    "BATCH": lambda: Experts(capacity=2),
}


@pytest.mark.parametrize("way", NARROWED)
@pytest.mark.parametrize("samples", [slice(1, 3), torch.tensor([3, 0])])
def test_some_of_the_samples(way: str, samples: slice | Tensor, ways: list[Way]) -> None:
    call, records, slope = recorded(NARROWED[way]().double(), doubles(4, 3, 4))
    assert [each.name for each in ways] == way.split()[:1]
    with full_precision(slope.device):
        whole = GenericSampler().gradients(call.past(), records, [slope])
        narrow = {name: record.narrow(samples) for name, record in records.items()}
        part = GenericSampler().gradients(call.past(), narrow, [slope[samples]])
    for name, gradient in part.items():
        torch.testing.assert_close(gradient.materialize(), whole[name].materialize()[samples])


# The state of the module


def test_modes_that_change_before_the_backward_pass() -> None:
    model, inputs = Behind(Gated(0.1)).double(), doubles(3, 2, 4)
    torch.manual_seed(1)
    expected = per_sample_gradients(model, losses(model(inputs)))
    engine = GradientHolder(model, registry=registry())
    with engine, engine.batch(range(3)) as batch:
        torch.manual_seed(1)
        loss = losses(model(inputs)).sum()
        model.eval()
        model.module.dropout.p = 0.1
        loss.backward()
        assert not any(module.training for module in model.modules())
    for name, held in batch.result.materialize().items():
        assert_within(held, expected[name], expected[name].norm())


def test_buffers_that_the_call_writes() -> None:
    class Drifting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.rand(4))
            self.register_buffer("drift", torch.zeros(4))

        def forward(self, x: Tensor) -> Tensor:
            self.drift += x.detach().mean(0)
            return x * self.scale + self.drift

    check(Behind(Drifting()).double(), doubles(3, 4))


def test_attributes_that_the_call_writes() -> None:
    def count(module: Any, x: Tensor) -> Tensor:
        module.calls.append(len(module.calls))
        return x * module.scale * len(module.calls)

    model = Behind(Scaled(count)).double()
    model.module.calls = []
    check(model, doubles(3, 4))
    assert model.module.calls == [0]


def test_generator_of_the_module() -> None:
    def noisy(module: Any, x: Tensor) -> Tensor:
        noise = torch.rand(x.shape, generator=module.generator, dtype=x.dtype)
        return x * module.scale * noise

    model, inputs = Behind(Scaled(noisy)).double(), doubles(3, 4)
    model.module.generator = torch.Generator().manual_seed(0)
    expected = per_sample_gradients(model, losses(model(inputs)))
    state = model.module.generator.get_state()
    model.module.generator.manual_seed(0)
    engine = GradientHolder(model, registry=registry())
    with engine, engine.batch(range(3)) as batch:
        losses(model(inputs)).sum().backward()
    assert torch.equal(model.module.generator.get_state(), state)
    for name, held in batch.result.materialize().items():
        assert_within(held, expected[name], expected[name].norm())


def test_tensors_left_from_earlier_calls_are_released() -> None:
    def remember(module: Any, x: Tensor) -> Tensor:
        module.last = [x * module.scale]
        out: Tensor = module.last[0]
        return out

    model = Behind(Scaled(remember)).double()
    engine = GradientHolder(model, registry=registry(), verify=False)
    counts: list[int] = []
    with engine:
        for _ in range(2):
            for _ in range(3):
                with engine.batch(range(2)):
                    losses(model(doubles(2, 4))).sum().backward()
            counts.append(live_tensors())
    assert counts[0] == counts[1]


# Precision


@pytest.mark.parametrize(
    ("dtype", "autocast", "tolerance"),
    [
        (torch.float32, False, 1e-5),
        (torch.bfloat16, False, 3e-2),
        (torch.float32, True, 3e-2),
    ],
)
def test_lower_precision(dtype: torch.dtype, autocast: bool, tolerance: float) -> None:
    class Cast(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                out: Tensor = self.module(x)
            return out

    model = Cast(Behind(nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4)), Gated(0.5))))
    engine = check(model.to(dtype), torch.randn(5, 3, 4).to(dtype), tolerance=tolerance)
    assert len(engine.parameters) == 10


# Refusals


class Caching(Scaled):
    def __init__(self) -> None:
        super().__init__()
        self.cached = [self.scale]

    def forward(self, x: Tensor) -> Tensor:
        return x * self.cached[0]


class Using(Head):
    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.decoder.weight.detach(), self.decoder.bias) * self.scale


class Normalizing(Scaled):
    def __init__(self, gate: float) -> None:
        super().__init__()
        nn.init.constant_(self.scale, gate)
        self.norm = nn.BatchNorm1d(4, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.norm(x)


class Stateful(Scaled):
    def forward(self, x: Tensor) -> Tensor:
        made = x * self.scale
        if hasattr(self, "last"):
            made = made + self.last.detach()
        self.last = made
        return made


GENERATOR = torch.Generator().manual_seed(0)


def foreign_noise(module: Scaled, x: Tensor) -> Tensor:
    return x + module.scale * torch.rand(x.shape, generator=GENERATOR, dtype=x.dtype)


class Zero(Scaled):
    def __init__(self, function: Callable[[Any, Tensor], Any]) -> None:
        super().__init__(function)
        nn.init.zeros_(self.scale)


def keep(module: Any, x: Tensor) -> Tensor:
    module.kept += 1
    return x * module.scale


def keeping() -> Scaled:
    module: Any = Scaled(keep)
    module.kept = torch.zeros(4)
    kept: Scaled = module
    return kept


class Large(Scaled):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("large", torch.zeros(2**17))

    def forward(self, x: Tensor) -> Tensor:
        self.large += 1
        return x * self.scale * self.large[0]


REFUSED: dict[str, Callable[[], nn.Module]] = {
    "writes into its inputs": lambda: Scaled(lambda module, x: x.mul_(module.scale)),
    "writes into its inputs, its parameters or tensors that it keeps": keeping,
    "its code keeps scale in another place than its parameters": Caching,
    "it uses decoder.bias, a parameter that it owns under another name": Using,
    "a sample's output depends on other samples": lambda: Normalizing(0.0),
    "depends on other samples, as where something normalises": lambda: Normalizing(1e-9),
    "something else: it draws random numbers": lambda: Scaled(foreign_noise),
    "something else each time that it runs": lambda: Zero(foreign_noise),
    "writes into its buffer large, which is too large": Large,
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_run_again_is_refused(reason: str) -> None:
    model = Behind(REFUSED[reason]()).double()
    engine = GradientHolder(model, registry=registry(), layers="linear,*scale,*module.*")
    pattern = rf"(?s)split by sample: module .*Reason: .*{reason}.*Remedy: .*exclude="
    with engine, pytest.raises(WrongSplitError, match=pattern), engine.batch(range(3)):
        model(doubles(3, 4))


def test_state_with_a_graph_is_refused() -> None:
    model = Behind(Stateful()).double()
    model(doubles(3, 4))
    engine = GradientHolder(model, registry=registry())
    with (
        engine,
        pytest.raises(WrongSplitError, match=r"running it again failed with AttributeError"),
        engine.batch(range(3)),
    ):
        model(doubles(3, 4))


def test_nested_tensors_are_refused() -> None:
    class Takes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.rand(4))

        def forward(self, x: Tensor, other: object) -> Tensor:
            return x * self.scale

    lengths = torch.nn.utils.rnn.pack_padded_sequence(torch.ones(2, 2, 1), torch.tensor([2, 1]))
    values = {
        r"nested or sparse": torch.eye(3).to_sparse(),
        r"PackedSequence": lengths,
    }
    model = Behind(Takes()).double()
    for reason, value in values.items():
        engine = GradientHolder(model, registry=registry())
        with engine, pytest.raises(WrongSplitError, match=reason), engine.batch(range(3)):
            model(doubles(3, 4), value)


def old_weight_norm() -> nn.Module:
    with pytest.warns(FutureWarning):
        return torch.nn.utils.weight_norm(nn.Linear(4, 4))


def hooked() -> nn.Module:
    gated = Gated(0.1)
    gated.linear.register_forward_hook(lambda module, args, output: 2 * output)
    return gated


class ComplexScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4, dtype=torch.complex64))


UNCOPIED: dict[str, Callable[[], nn.Module]] = {
    r"WeightNorm.*use torch.nn.utils.parametrizations.weight_norm instead": old_weight_norm,
    r"parametrizations.spectral_norm": lambda: torch.nn.utils.spectral_norm(nn.Linear(4, 4)),
    r"linear \(torch.nn.modules.linear.Linear\) has a hook, .*hooked.*exclude": hooked,
    r"scale is complex": ComplexScale,
}


@pytest.mark.parametrize("reason", UNCOPIED)
def test_modules_that_cannot_be_copied_are_refused(reason: str) -> None:
    with pytest.raises(UnsupportedLayerError, match=reason):
        GradientHolder(nn.Sequential(UNCOPIED[reason]()), registry=registry(), layers="0.*")


def test_hook_that_comes_later_is_refused() -> None:
    model = Behind(Gated(0.1)).double()
    engine = GradientHolder(model, registry=registry())
    with engine:
        model.module.norm.register_forward_hook(lambda module, args, output: output)
        with pytest.raises(WrongSplitError, match=r"has a hook"), engine.batch(range(3)):
            model(doubles(3, 4))


def test_loss_of_a_scalar_output_is_refused() -> None:
    def with_penalty(module: Scaled, x: Tensor) -> tuple[Tensor, Tensor]:
        return x * module.scale, module.scale.square().sum()

    model = Behind(Scaled(with_penalty)).double()
    check(model, doubles(3, 4))
    engine = GradientHolder(model, registry=registry())
    with engine, engine.batch(range(3)):
        output, penalty = model(doubles(3, 4))
        with pytest.raises(WrongSplitError, match=r"scalar"):
            (output.sum() + penalty).backward()
        losses(model(doubles(3, 4))).sum().backward()


def test_objects_of_the_users_are_not_written_to() -> None:
    class Writes(nn.Module):
        """Counts its calls in what it has and in what it is given."""

        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.rand(4))
            self.seen, self.counter = SimpleNamespace(calls=0), Counter()
            self.numbers = np.zeros(1)
            self.method = self.scaled

        def scaled(self, x: Tensor) -> Tensor:
            self.seen.calls += 1
            return x * self.scale

        def forward(self, x: Tensor, context: SimpleNamespace) -> Tensor:
            context.calls += 1
            context.inner.append(1)
            self.counter["calls"] += 1
            self.numbers[0] += 1
            return self.method(x)

    model, x = Behind(Writes()).double(), doubles(3, 4)
    engine = GradientHolder(model, registry=registry())
    context = SimpleNamespace(calls=0, inner=[])
    expected = per_sample_gradients(model, model(x, SimpleNamespace(calls=0, inner=[])).sum(1))
    with engine, engine.batch(range(3)) as batch:
        model(x, context).sum().backward()
    for name, gradient in batch.result.materialize().items():
        torch.testing.assert_close(gradient, expected[name])
    written = next(module for module in model.modules() if isinstance(module, Writes))
    assert (context.calls, context.inner) == (1, [1])
    assert (written.seen.calls, written.counter["calls"], written.numbers[0]) == (2, 2, 2)


def test_random_numbers_beside_large_values_are_those_of_the_call() -> None:
    class Drops(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter((torch.randn(8) * 0.02).bfloat16())

        def forward(self, x: Tensor) -> Tensor:
            scaled = functional.layer_norm(x, (8,)) * self.scale
            return x + functional.dropout(scaled, 0.1, self.training)

    model = nn.Sequential(Drops())
    x = torch.randn(6, 4, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    x[..., 0] *= 200
    slope = torch.linspace(-1, 1, x.numel()).reshape(x.shape).double()
    for options in ({"batch_dim": {"*": 1}}, {}):
        n, axes = (4, (0, 2)) if options else (6, (1, 2))
        engine = GradientHolder(model, registry=registry(), **options)
        torch.manual_seed(1)
        expected = per_sample_gradients(model, (model(x).double() * slope).sum(axes))
        torch.manual_seed(1)
        with engine.frozen(), engine.batch(range(n)) as batch:
            (model(x).double() * slope).sum(axes).sum().backward()
        for name, gradient in batch.result.materialize().items():
            error = (gradient - expected[name].double()).norm() / expected[name].double().norm()
            assert error < 2e-2, f"{name} {options}"


@pytest.mark.parametrize("how", ["hook", "batch size"])
def test_gradients_that_are_others_for_one_sample_are_those_of_the_call(how: str) -> None:
    class Unlike(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.rand(4))

        def forward(self, x: Tensor) -> Tensor:
            if how == "batch size":
                return x * (self.scale if len(x) > 1 else self.scale.detach())
            scaled = x * self.scale
            if scaled.requires_grad:
                scaled.register_hook(lambda grad: grad / len(grad))
            return scaled

    model, x = Behind(Unlike()).double(), doubles(5, 4)
    engine = GradientHolder(model, registry=registry())
    expected = per_sample_gradients(model, model(x).sin().sum(1), ["module.scale"])
    with engine.frozen(), engine.batch(range(5)) as batch:
        model(x).sin().sum().backward()
    torch.testing.assert_close(batch.result.materialize()["module.scale"], expected["module.scale"])
