"""What users do to values that are the same for all samples on the way to the samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from ghost_core import Engine
from ghost_core.capture.ordinary import on_samples_alone
from ghost_core.testing import per_sample_gradients

N, T, D, V = 4, 3, 6, 11
BACKWARDS = torch.arange(T).flip(0)
Hold = Callable[..., Engine[object]]
Use = Callable[["Model", Tensor, Tensor], Tensor]


class Model(nn.Module):
    """Words, positions and what is done with both."""

    def __init__(self, use: Use) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(V, D), nn.Embedding(T, D)
        self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, V)
        self.use = use
        self.double()

    def positions(self) -> Tensor:
        return self.wpe(torch.arange(T))

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.use(self, self.wte(ids), self.positions())))


def hooked(model: Model, x: Tensor, places: Tensor) -> Tensor:
    places.register_hook(lambda grad: 2 * grad)
    return x + places


def read(model: Model, x: Tensor, places: Tensor) -> Tensor:
    bent = places.tanh()
    bent.register_hook(lambda grad: None if grad.sum().isfinite() else grad)
    return x + bent.exp()


def changed_in_place(model: Model, x: Tensor, places: Tensor) -> Tensor:
    return x + places.mul_(2).add_(1)


def moved(places: Tensor) -> Tensor:
    """Return places in another order, in memory of their own."""
    return places[BACKWARDS][None].permute(2, 0, 1).contiguous()


def put_in_order(model: Model, x: Tensor, places: Tensor) -> Tensor:
    return x + moved(places).permute(1, 2, 0)


def moved_then_hooked(model: Model, x: Tensor, places: Tensor) -> Tensor:
    other = moved(places)
    other.register_hook(lambda grad: 2 * grad)
    return x + other.permute(1, 2, 0)


def moved_then_written_to(model: Model, x: Tensor, places: Tensor) -> Tensor:
    other = moved(places)
    other.view(-1).mul_(2)
    other[0] = 1
    return x + other.permute(1, 2, 0)


def moved_then_written_to_before(model: Model, x: Tensor, places: Tensor) -> Tensor:
    before = places[BACKWARDS]
    other = before.permute(1, 0).contiguous()
    before.mul_(2)
    return x + other.permute(1, 0)


OPERATIONS = torch.library.Library("ghost_shared_values", "DEF")
for schema, kernel in {
    "contiguous(Tensor x) -> Tensor": lambda x: x.square() * 3,
    "add(Tensor x, Tensor y) -> Tensor": lambda x, y: x + y.square(),
}.items():
    OPERATIONS.impl(OPERATIONS.define(schema), kernel, "CompositeImplicitAutograd")


def moved_by_name_alone(model: Model, x: Tensor, places: Tensor) -> Tensor:
    return x + torch.ops.ghost_shared_values.contiguous(places)


def added_by_name_alone(model: Model, x: Tensor, places: Tensor) -> Tensor:
    return torch.ops.ghost_shared_values.add(x, places)


def called_by_keyword(model: Model, x: Tensor, places: Tensor) -> Tensor:
    return model.norm(input=x) + places


def called_twice(model: Model, x: Tensor, places: Tensor) -> Tensor:
    """Of one output only what another module makes of it meets the samples."""
    other = functional.layer_norm(model.positions(), (D,), model.norm.weight, model.norm.bias)
    return x * model.norm(places) + other


def scaled(model: Model, x: Tensor, places: Tensor) -> Tensor:
    return torch.add(x, places, alpha=3)


@pytest.mark.parametrize(
    ("use", "frozen"),
    [
        (scaled, False), (scaled, True), (called_twice, False), (called_twice, True),
        (hooked, True), (read, False), (changed_in_place, True), (put_in_order, False),
        (put_in_order, True), (moved_then_hooked, False), (moved_then_written_to, False),
        (moved_then_written_to_before, False), (moved_by_name_alone, False),
        (moved_by_name_alone, True), (called_by_keyword, False), (called_by_keyword, True),
        (added_by_name_alone, False), (added_by_name_alone, True),
    ],
)  # fmt: skip
def test_exact(hold: Hold, assert_held: Callable[..., None], use: Use, frozen: bool) -> None:
    engine = hold(model := Model(use))
    for _ in range(2):
        ids = torch.randint(0, V, (N, T))
        expected = per_sample_gradients(model, model(ids).sin().mean((1, 2)))
        with engine.frozen() if frozen else engine, engine.batch(range(N)) as batch:
            model(ids).sin().mean((1, 2)).sum().backward()
        assert batch.verified
        assert_held(batch.result, expected)


def stacked(model: Model, x: Tensor, places: Tensor) -> Tensor:
    return torch.stack([x, places.expand_as(x)]).prod(0)


def named(model: Model, x: Tensor, places: Tensor) -> Tensor:
    return torch.mul(input=x, other=places)


def with_another_parameter(model: Model, x: Tensor, places: Tensor) -> Tensor:
    return x * model.head.weight[:1] + torch.where(x > 0, x, model.norm.weight)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("use", [stacked, named, with_another_parameter])
def test_later_batches_do_something_else(
    hold: Hold, assert_held: Callable[..., None], use: Use, frozen: bool
) -> None:
    """Behind what the first batch showed, between modules and after the last of them."""

    batches: Iterator[bool] = iter(())

    def changing(model: Model, x: Tensor, places: Tensor) -> Tensor:
        x = (x + places).tanh().view(N, T, D)
        return use(model, x, places) if next(batches) else x

    engine, ids = hold(model := Model(changing)), torch.randint(0, V, (N, T))
    batches = iter([False, True, False, False, True, True])
    expected = [per_sample_gradients(model, model(ids).sin().mean((1, 2))) for _ in range(2)]
    with engine.frozen() if frozen else engine:
        for later in (False, False, True, True):
            with engine.batch(range(N)) as batch:
                model(ids).sin().mean((1, 2)).sum().backward()
            assert_held(batch.result, expected[later])


def test_exact_where_no_sample_goes_into_a_graph(
    hold: Hold, assert_held: Callable[..., None]
) -> None:
    """Positions that are trained, and left out, go through a module that is not."""
    model = Model(lambda model, x, places: x * model.norm(places.tanh().mul(2)))
    engine, ids = hold(model, exclude="wpe"), torch.randint(0, V, (N, T))
    found = per_sample_gradients(model, model(ids).sin().mean((1, 2)))
    expected = {name: each for name, each in found.items() if name in engine.tracking.names}
    with engine:
        for _ in range(2):
            with engine.batch(range(N)) as batch:
                model(ids).sin().mean((1, 2)).sum().backward()
            assert_held(batch.result, expected)


def test_lists_are_looked_into() -> None:
    x, places = (torch.ones(1, requires_grad=True) * 1 for _ in range(2))
    assert on_samples_alone([x, [x, 1], (x,)], (), (), {}, None)
    assert not on_samples_alone([x, [1, (places,)]], {id(places)}, (), {}, None)
    assert not on_samples_alone([x, {"places": places}], {id(places)}, (), {}, None)


def summed(model: Model, x: Tensor, places: Tensor) -> Tensor:
    return x + places


def tied(model: Model, x: Tensor, places: Tensor) -> Tensor:
    return x + places + x @ model.head.weight.T @ model.head.weight


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("use", [summed, tied])
def test_a_pass_that_breaks_off_says_nothing_of_later_ones(
    hold: Hold, assert_held: Callable[..., None], use: Use, verify: bool
) -> None:
    """It did not come to where a shared value is used."""
    engine, ids = hold(model := Model(use), verify=verify), torch.randint(0, V, (N, T))
    expected = per_sample_gradients(model, model(ids).sin().mean((1, 2)))
    with engine:
        with pytest.raises(IndexError), engine.batch(range(N)):
            model(ids + V)
        for _ in range(2):
            with engine.batch(range(N)) as batch:
                model(ids).sin().mean((1, 2)).sum().backward()
            assert_held(batch.result, expected)


def test_what_another_engine_tracks_is_looked_for_anew(
    hold: Hold, assert_held: Callable[..., None]
) -> None:
    """The first one tracked nothing that is the same for all samples."""
    model, ids = Model(summed), torch.randint(0, V, (N, T))
    expected = per_sample_gradients(model, model(ids).sin().mean((1, 2)))
    engines = [hold(model, layers="head", verify=False), hold(model, verify=False)]
    with engines[0]:
        with engines[0].batch(range(N)):
            model(ids).sin().mean((1, 2)).sum().backward()
        with engines[1], engines[1].batch(range(N)) as batch:
            model(ids).sin().mean((1, 2)).sum().backward()
    assert_held(batch.result, expected)
