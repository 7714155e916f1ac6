"""Rows that samples own in any number, and places that sizes do not tell: found, or refused."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn

from ghost_core import WrongSplitError
from ghost_core.testing import GradientHolder, assert_within, per_sample_gradients

N, T, D = 4, 3, 5
Hold = Callable[..., GradientHolder]


class Experts(nn.Module):
    """A mixture of experts: each token goes to one of three, of which the batch decides."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(D, D) for _ in range(3))
        self.first, self.head = nn.Linear(D, D), nn.Linear(D, 2)
        self.double()

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        rows = self.first(x).flatten(0, 1)
        y = torch.zeros_like(rows)
        for at, expert in enumerate(self.experts):
            taken = (chosen.flatten() == at).nonzero().flatten()
            y = y.index_add(0, taken, expert(self.given(rows[taken])).tanh())
        return self.head(y.view_as(x))

    def given(self, rows: Tensor) -> Tensor:
        return rows


class MixingBefore(Experts):
    """Experts subtract the mean of all rows that they get: their own gradients are exact."""

    def given(self, rows: Tensor) -> Tensor:
        return rows - rows.mean(0)


class MixingAfter(Experts):
    """A row of an expert goes to two samples."""

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        y = self.experts[0](x.flatten(0, 1)[:5])
        self.experts[1](x), self.experts[2](x), self.first(x)
        return self.head(y.repeat(3, 1)[: N * T].view_as(x))


class Positions(nn.Module):
    """Sequence-first inside: positions meet samples on the second axis."""

    def __init__(self) -> None:
        super().__init__()
        self.wpe, self.layer, self.head = nn.Embedding(8, D), nn.Linear(D, D), nn.Linear(D, 2)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        places = self.wpe(torch.arange(x.shape[1]))[:, None].tanh()
        return self.head((self.layer(x).transpose(0, 1) * places).cumsum(0).transpose(0, 1))


class Flat(nn.Module):
    """Returns `[N * T, 2]`, or `[T * N, 2]`."""

    def __init__(self, minor: bool) -> None:
        super().__init__()
        self.layer, self.head, self.minor = nn.Linear(D, D), nn.Linear(D, 2), minor
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x).cumsum(1)
        return self.head((x.transpose(0, 1) if self.minor else x).reshape(-1, D))


def curved(output: Tensor) -> Tensor:
    slopes = torch.linspace(0.5, 1.5, output[0].numel(), dtype=torch.float64)
    return (output.flatten(1) * slopes.view(-1)).sin().sum(1)


def samples(t: int = T) -> Tensor:
    return torch.randn(N, t, D, dtype=torch.float64)


def check(
    engine: GradientHolder,
    frozen: bool,
    batches: Iterable[tuple[Tensor, ...]],
    losses: Callable[..., Tensor] = lambda model, *batch: curved(model(*batch)),
) -> None:
    """Compare batches, the engine attached all the while, with autograd on a copy."""
    model, plain = engine.model, copy.deepcopy(engine.model)
    with engine.frozen() if frozen else engine:
        for inputs in batches:
            expected = per_sample_gradients(plain, losses(plain, *inputs))
            with engine.batch(range(N)) as batch:
                losses(model, *inputs).sum().backward()
            assert batch.verified
            got = batch.result.materialize()
            assert any(each.any() for each in got.values())
            for name, held in got.items():
                assert_within(held, expected[name], torch.tensor(1.0), 1e-9, name)


ROUTES = [
    [[0, 0, 1], [1, 0, 0], [2, 2, 2], [0, 1, 2]],
    [[0, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 1]],  # one row, and none
    [[1, 0, 0], [0, 1, 2], [0, 2, 1], [1, 0, 0]],  # N rows of some samples
    [[2, 1, 0], [2, 1, 0], [2, 1, 0], [2, 1, 0]],  # a row of each sample everywhere
    [[1, 1, 1], [1, 1, 1], [0, 0, 0], [0, 0, 0]],  # rows as if samples were folded
]
"""The expert of each token, `[N, T]`, batch by batch."""


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("kind", [Experts, MixingBefore])
def test_each_batch_has_routes_of_its_own(hold: Hold, kind: type[Experts], frozen: bool) -> None:
    """What mixes samples before an expert is no part of the expert's gradient."""
    left_out = () if kind is Experts else ("first",)
    engine = hold(kind(), exclude=left_out)
    check(engine, frozen, [(samples(), torch.tensor(chosen)) for chosen in ROUTES])


@pytest.mark.parametrize("frozen", [False, True])
def test_rows_of_several_samples_are_refused(hold: Hold, frozen: bool) -> None:
    engine = hold(MixingBefore())
    refused = pytest.raises(WrongSplitError, match=r"(?s)rows for 4 samples|several samples")
    chosen = torch.tensor(ROUTES[0])
    with engine.frozen() if frozen else engine, refused, engine.batch(range(N)):
        curved(engine.model(samples(), chosen)).sum().backward()
    engine = hold(MixingAfter())
    with engine.frozen() if frozen else engine, refused, engine.batch(range(N)):
        curved(engine.model(samples(), chosen)).sum().backward()


def test_rows_that_begin_to_mix_are_refused(hold: Hold) -> None:
    """In a later batch, when nothing is verified any more but whose each row is."""
    model = Experts()
    engine = hold(model)
    with engine:
        for chosen in ROUTES[:2]:
            with engine.batch(range(N)):
                curved(model(samples(), torch.tensor(chosen))).sum().backward()
        model.given = lambda rows: rows - rows.mean(0)  # type: ignore[method-assign]
        several = pytest.raises(WrongSplitError, match="several samples depend on the same rows")
        with several, engine.batch(range(N)):
            curved(model(samples(), torch.tensor(ROUTES[0]))).sum().backward()


def test_a_row_that_no_output_depends_on_is_refused(hold: Hold) -> None:
    """It is routed to nobody, and the loss depends on it all the same."""
    model = Experts()
    kept: list[Tensor] = []
    model.given = lambda rows: kept.append(rows) or rows  # type: ignore[method-assign, func-returns-value]
    engine, chosen = hold(model), torch.tensor(ROUTES[0])
    stray = model.experts[0]
    refused = pytest.raises(WrongSplitError, match="on which the model's output did not depend")

    def forward(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        kept.append(stray(args[0].flatten(0, 1)[:5]))

    model.register_forward_hook(forward)
    with engine, refused, engine.batch(range(N)):
        output = model(samples(), chosen)
        (curved(output).sum() + kept[-1].sum()).backward()


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("lengths", [(T, N, T), (N, T, N), (2 * N, N)])
def test_as_many_positions_as_samples_in_a_later_batch(
    hold: Hold, lengths: tuple[int, ...], frozen: bool
) -> None:
    """Sizes do not tell which axis the samples are on; a batch before does, or a probe."""
    check(hold(Positions()), frozen, [(samples(t),) for t in lengths])


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("t", [T, N])
@pytest.mark.parametrize("minor", [False, True])
def test_outputs_with_samples_folded(hold: Hold, minor: bool, t: int, frozen: bool) -> None:
    def losses(model: nn.Module, x: Tensor) -> Tensor:
        output = model(x)
        return curved(output.view(t, N, 2).transpose(0, 1) if minor else output.view(N, t, 2))

    check(hold(Flat(minor)), frozen, [(samples(t),), (samples(t),)], losses)


def test_outputs_of_which_nothing_tells_the_order_are_refused(hold: Hold) -> None:
    engine = hold(Flat(False), layers="head")
    refused = pytest.raises(WrongSplitError, match="could be")
    with engine, refused, engine.batch(range(N)):
        engine.model(samples()).sum().backward()
