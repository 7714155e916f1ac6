"""Rows that are packed, picked, sorted or joined: all in their plain order at first, and not later.

The first batch is probed, and its samples are where rows say. Later ones have as many rows, or as
many for each sample on average, and these belong to others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from tests.foreign.foreign import assert_same, curved
from tests.silent.compare import WAYS, Counted, drawn
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence
from torch.utils.checkpoint import checkpoint

from ghost_core import GhostError
from ghost_core.testing import GradientHolder, per_sample_gradients

N, T, D = 4, 6, 5
FULL = [T] * N
Body = Callable[["Model", Tensor, Tensor], Tensor]
"""From samples `[N, T, D]` and their lengths `[N]` to `[N, ...]`, or to all rows `[R, D]`."""


class Model(nn.Module):
    """Two layers, one on all positions and one on what is picked, and a bare parameter."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.last = (nn.Linear(D, D) for _ in range(3))
        self.scale, self.body = nn.Parameter(torch.rand(D)), body
        self.gru = nn.GRU(D, D, batch_first=True)
        self.double()

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return self.body(self, x, lengths)


def valid(x: Tensor, lengths: Tensor) -> Tensor:
    return torch.arange(x.shape[1]) < lengths[:, None]


def unpacked(x: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
    padded = x.new_zeros(*mask.shape, rows.shape[-1])
    padded[mask] = rows
    return padded


def packed(m: Model, x: Tensor, lengths: Tensor) -> Tensor:
    mask = valid(x, lengths)
    return unpacked(x, mask, m.second(m.first(x)[mask]).tanh())


def packed_data(m: Model, x: Tensor, lengths: Tensor) -> Tensor:
    """There is no graph before the module."""
    mask = valid(x, lengths)
    return unpacked(x, mask, m.second(m.first(x[mask]).tanh()))


def packed_flat(m: Model, x: Tensor, lengths: Tensor) -> Tensor:
    keep = valid(x, lengths).flatten().nonzero().flatten()
    rows = m.second(m.first(x).view(-1, D).index_select(0, keep)).tanh()
    return x.new_zeros(len(x) * x.shape[1], D).index_copy(0, keep, rows).view_as(x)


def scattered(m: Model, x: Tensor, lengths: Tensor) -> Tensor:
    mask = valid(x, lengths)[..., None].expand_as(x)
    rows = m.second(m.first(x).masked_select(mask).view(-1, D))
    return torch.zeros_like(x).masked_scatter(mask, rows.tanh())


def added(m: Model, x: Tensor, lengths: Tensor) -> Tensor:
    """Sums of each sample's rows, as graphs are pooled."""
    owner = torch.arange(len(x)).repeat_interleave(lengths)
    rows = m.second(m.first(x[valid(x, lengths)]).tanh())
    return x.new_zeros(len(x), D).index_add(0, owner, rows.square())


def scatter_added(m: Model, x: Tensor, lengths: Tensor) -> Tensor:
    owner = torch.arange(len(x)).repeat_interleave(lengths)
    rows = m.second(m.first(x[valid(x, lengths)]).tanh())
    return x.new_zeros(len(x), D).scatter_add(0, owner[:, None].expand(-1, D), rows.square())


def split(m: Model, x: Tensor, lengths: Tensor) -> Tensor:
    rows = m.second(m.first(x[valid(x, lengths)]).tanh())
    return torch.stack([each.square().sum(0) for each in rows.split(lengths.tolist())])


def sliced(m: Model, x: Tensor, lengths: Tensor) -> Tensor:
    ends = lengths.cumsum(0).tolist()
    rows = m.second(m.first(x[valid(x, lengths)]).tanh())
    return torch.stack([rows[e - n : e].sin().sum(0) for e, n in zip(ends, lengths, strict=True)])


def joined(m: Model, x: Tensor, lengths: Tensor) -> Tensor:
    """Slices that are joined, and padded again by torch, which writes into parts."""
    pieces = [each[:n] for each, n in zip(m.first(x), lengths.tolist(), strict=True)]
    rows = m.second(torch.cat(pieces)).tanh()
    return pad_sequence(rows.split(lengths.tolist()), batch_first=True)


def segmented(m: Model, x: Tensor, lengths: Tensor) -> Tensor:
    rows = m.second(m.first(x[valid(x, lengths)]).tanh())
    return torch.segment_reduce(rows, "sum", lengths=lengths, axis=0)


def scaled(m: Model, x: Tensor, lengths: Tensor) -> Tensor:
    """A parameter outside of modules meets packed rows."""
    mask = valid(x, lengths)
    return unpacked(x, mask, (m.first(x)[mask] * m.scale).tanh())


def embedded(m: Model, x: Tensor, lengths: Tensor) -> Tensor:
    """Rows that are looked up, as values and as a table."""
    owner = torch.arange(len(x)).repeat_interleave(lengths)
    place = torch.arange(len(owner)) - (lengths.cumsum(0) - lengths)[owner]
    rows = m.second(m.first(x[owner, place]).tanh())
    table = torch.full((len(x), x.shape[1]), len(rows)).index_put((owner, place), torch.arange(
        len(rows)))  # fmt: skip
    return nn.functional.embedding(table, torch.cat([rows, rows.new_zeros(1, D)]))


class Taken(torch.autograd.Function):
    """Picks rows where torch does not see it, as flash attention's unpadding does."""

    @staticmethod
    def forward(ctx, rows: Tensor, index: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(index)
        ctx.size = len(rows)
        return rows[index]

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        (index,) = ctx.saved_tensors
        return grad.new_zeros(ctx.size, D).index_add(0, index, grad), None


class Placed(torch.autograd.Function):
    """Puts rows where torch does not see it."""

    @staticmethod
    def forward(ctx, rows: Tensor, index: Tensor, size: int) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(index)
        return rows.new_zeros(size, D).index_copy(0, index, rows)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[no-untyped-def]
        (index,) = ctx.saved_tensors
        return grad[index], None, None


def taken(m: Model, x: Tensor, lengths: Tensor) -> Tensor:
    mask = valid(x, lengths)
    keep = mask.flatten().nonzero().flatten()
    rows = m.second(Taken.apply(m.first(x).view(-1, D), keep)).tanh()
    return Placed.apply(rows, keep, mask.numel()).view_as(x)


def sorted_rows(m: Model, x: Tensor, lengths: Tensor) -> Tensor:
    """As recurrent models do, the longest first."""
    order = lengths.argsort(descending=True, stable=True)
    return m.second(m.first(x[order]).tanh())[order.argsort()]


def sorted_by_lists(m: Model, x: Tensor, lengths: Tensor) -> Tensor:
    order = lengths.argsort(descending=True, stable=True)
    rows = m.second(m.first(x[order]).tanh())
    return torch.stack([rows[at] for at in order.argsort().tolist()])


def sorted_parts(m: Model, x: Tensor, lengths: Tensor) -> Tensor:
    """Parts of one value, of which only those who use them tell which is which."""
    order = lengths.argsort(descending=True, stable=True)
    rows = m.second(m.first(x[order]).tanh()).unbind()
    return torch.stack([rows[at].tanh() for at in order.argsort().tolist()])


def written(m: Model, x: Tensor, lengths: Tensor) -> Tensor:
    """Rows that are written into places, one sample after the other."""
    order = lengths.argsort(descending=True, stable=True)
    rows, made = m.second(m.first(x[order]).tanh()), torch.zeros_like(x)
    for at, place in enumerate(order.tolist()):
        made[place] = rows[at]
    return made


def nested(m: Model, x: Tensor, lengths: Tensor) -> Tensor:
    """Rows of one sample see each other, in a tensor without sizes."""
    ends = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    rows = torch.nested.nested_tensor_from_jagged(m.first(x[valid(x, lengths)]), ends)
    heads = rows.unsqueeze(2).transpose(1, 2)
    made = nn.functional.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2)
    return unpacked(x, valid(x, lengths), m.second(made.squeeze(2).values()).tanh())


def one_of_each(m: Model, x: Tensor, lengths: Tensor) -> Tensor:
    """Rows of those tokens that a sample begins with: one of each, or two of some."""
    mask = torch.arange(T) < (lengths - T + 1)[:, None]
    return unpacked(x, mask, m.second(m.first(x)[mask]).tanh())


def recurrent(m: Model, x: Tensor, lengths: Tensor) -> Tensor:
    order = lengths.argsort(descending=True, stable=True)
    given = pack_padded_sequence(m.first(x)[order], lengths[order], batch_first=True)
    data = m.second(m.gru(given)[0].data).tanh()
    made = pad_packed_sequence(given._replace(data=data), batch_first=True, total_length=T)
    return made[0][order.argsort()]


def packed_without_graph(m: Model, x: Tensor, lengths: Tensor) -> Tensor:
    given = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    data = m.second(m.first(given.data).tanh())
    return pad_packed_sequence(given._replace(data=data), batch_first=True, total_length=T)[0]


def checkpointed(m: Model, x: Tensor, lengths: Tensor) -> Tensor:
    """What is picked is not at hand where a checkpoint runs the code again."""
    found: Tensor = checkpoint(partial(packed, m), x, lengths, use_reentrant=False)
    return found


BODIES = [packed, packed_data, packed_flat, scattered, added, scatter_added, split, sliced, joined,
          segmented, scaled, embedded, taken, sorted_rows, sorted_by_lists, sorted_parts, written,
          packed_without_graph, one_of_each, recurrent, checkpointed]  # fmt: skip

LATER: list[Sequence[int]] = [
    [6, 2, 6, 2],  # four rows for each sample, on average
    [2, 6, 2, 6],
    FULL,
    [5, 3, 1, 3],
    [5, 4, 6, 6],  # any number
]
ONE_OF_EACH = [[7, 5, 6, 6], [5, 7, 6, 6], FULL, [7, 5, 7, 5], [6, 5, 7, 7]]


def plainly(model: Model, x: Tensor, lengths: Tensor) -> Tensor:
    """Return the loss of each sample of a model that returns one value for each."""
    return curved(model(x, lengths))


def asserted(
    engine: GradientHolder, lengths: Sequence[int], x: Tensor, losses: Body = plainly
) -> None:
    """Compare a batch with one autograd call per sample."""
    model, given = engine.model, (x, torch.tensor(lengths))
    plain = Model(model.body)
    plain.load_state_dict(model.state_dict())
    expected = per_sample_gradients(plain, losses(plain, *given))
    with engine.batch(range(len(x))) as batch:
        losses(model, *given).sum().backward()
    model.zero_grad()
    assert batch.verified
    held = batch.result.materialize()
    assert_same(held, {name: expected[name] for name in held})


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("way", [WAYS[0], pytest.param(WAYS[1], marks=pytest.mark.stress)])
@pytest.mark.parametrize("body", [*BODIES, pytest.param(nested, marks=pytest.mark.stress)])
def test_exact_in_every_batch(body: Body, way: str) -> None:
    engine = GradientHolder(Model(body))
    later = ONE_OF_EACH if body is one_of_each else LATER
    with engine.frozen() if way == "frozen" else engine:
        for lengths in (FULL, *later):
            asserted(engine, lengths, drawn(N, T, D))


def summed(model: Model, x: Tensor, lengths: Tensor) -> Tensor:
    """Return the loss of each sample of a model that returns all its rows, `[R, D]`."""
    owner = torch.arange(len(x)).repeat_interleave(lengths)
    losses = curved(model(x, lengths))
    return losses.new_zeros(len(x)).index_add(0, owner, losses)


def views(m: Model, x: Tensor, lengths: Tensor) -> Tensor:
    """Two views of each sample, one behind the other, `[2N, T, D]`: as pairs are compared."""
    hidden = m.first(x)
    both, mask = torch.cat([hidden, hidden.sin()]), valid(x, lengths).repeat(2, 1)
    return unpacked(both, mask, m.second(both[mask]).tanh())


def encoders(m: Model, x: Tensor, lengths: Tensor) -> Tensor:
    """A vector of each of two encoders, `[2N, D]`: no row matters for two of its sample's."""
    mask = valid(x, lengths)[..., None]
    return torch.cat([(m.first(x).tanh() * mask).sum(1), (m.second(x).sin() * mask).sum(1)])


def flat(m: Model, x: Tensor, lengths: Tensor) -> Tensor:
    """All positions of all samples, `[N * T, D]`."""
    return packed(m, x, lengths).flatten(0, 1)


def of_views(model: Model, x: Tensor, lengths: Tensor) -> Tensor:
    return curved(model(x, lengths)).view(2, len(x)).sum(0)


def of_positions(model: Model, x: Tensor, lengths: Tensor) -> Tensor:
    return curved(model(x, lengths).view(len(x), -1))


FIRST = {"full": FULL, "even": [6, 2, 5, 3], "odd": [5, 4, 6, 6]}


@pytest.mark.parametrize(
    ("first", "way"),
    [  # by default each of them in one way
        pytest.param(
            FIRST[name],
            way,
            id=f"{name}-{way}",
            marks=() if (name == "even") == (way == "frozen") else pytest.mark.stress,
        )
        for way in WAYS
        for name in FIRST
    ],
)
@pytest.mark.parametrize(
    ("body", "losses"), [(views, of_views), (encoders, of_views), (flat, of_positions)]
)
def test_several_entries_of_a_sample_in_the_output(
    body: Body, losses: Body, first: Sequence[int], way: str
) -> None:
    """Layers with one row per sample tell their order, whatever is between."""
    engine = GradientHolder(Model(body))
    with engine.frozen() if way == "frozen" else engine:
        for lengths in (first, *LATER):
            asserted(engine, lengths, drawn(N, T, D), losses)


def flat_throughout(m: Model, x: Tensor, lengths: Tensor) -> Tensor:
    """No layer has one row per sample, and no position sees another."""
    mask, hidden = valid(x, lengths).flatten(), m.first(x.flatten(0, 1))
    return unpacked(hidden, mask, m.second(hidden[mask]).tanh())


@pytest.mark.parametrize("lengths", [[N, N, 0, 0], [N, 0, 0, 0], FULL, [5, 3, 1, 3]])
def test_rows_that_were_picked_do_not_tell_the_order_of_others(lengths: Sequence[int]) -> None:
    """Where only some samples have any, what is picked looks like rows of each."""
    engine, x = (
        GradientHolder(Model(flat_throughout)),
        drawn(N, T, D)[:, : N if 0 in lengths else T],
    )
    with engine, pytest.raises(GhostError, match="does not tell 4 samples apart"):
        asserted(engine, [min(n, x.shape[1]) for n in lengths], x, of_positions)


class Attended(torch.autograd.Function):
    """Lets rows of one sample see each other, as kernels for joined sequences do."""

    @staticmethod
    def forward(ctx, rows: Tensor, owner: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(owner)
        return torch.zeros_like(rows).index_add(0, owner, rows)[owner]

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        (owner,) = ctx.saved_tensors
        return torch.zeros_like(grad).index_add(0, owner, grad)[owner], None


def joined_throughout(m: Model, x: Tensor, lengths: Tensor) -> Tensor:
    """All rows in one sequence, from data to the output: nothing of the graph picks any."""
    owner = torch.arange(len(x)).repeat_interleave(lengths)
    return m.second(Attended.apply(m.first(x[valid(x, lengths)]), owner).tanh())


def joined_at_last(m: Model, x: Tensor, lengths: Tensor) -> Tensor:
    """The head of a model that predicts valid positions only."""
    mask = valid(x, lengths)
    return m.second(m.first(x).cumsum(1)[mask].tanh())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("body", [joined_throughout, joined_at_last])
def test_rows_that_a_model_returns_are_exact_or_refused(body: Body, way: str) -> None:
    """What it returns tells no samples apart once they have other numbers of rows."""
    engine = GradientHolder(Model(body))
    with engine.frozen() if way == "frozen" else engine:
        for _ in range(2):
            asserted(engine, FULL, drawn(N, T, D), summed)
        with pytest.raises(GhostError, match="does not tell 4 samples apart"):
            asserted(engine, [6, 2, 6, 2], drawn(N, T, D), summed)


def pooled(m: Model, x: Tensor, lengths: Tensor) -> Tensor:
    return m.second(m.first(x))[torch.arange(len(x)), lengths - 1]


def pooled_flat(m: Model, x: Tensor, lengths: Tensor) -> Tensor:
    last = torch.arange(len(x)) * x.shape[1] + lengths - 1
    return m.second(m.first(x)).view(-1, D).index_select(0, last)


def pooled_by_time(m: Model, x: Tensor, lengths: Tensor) -> Tensor:
    return m.second(m.first(x)).transpose(0, 1)[lengths - 1, torch.arange(len(x))]


def windows(m: Model, x: Tensor, lengths: Tensor) -> Tensor:
    """Shifted windows, as in Swin."""
    rolled = m.first(x).roll(int(lengths[0]), 1).unflatten(1, (-1, 2)).flatten(0, 1)
    made = m.second(rolled.flip(1)).unflatten(0, (len(x), -1)).flatten(1, 2)
    return torch.cat([made[:, int(lengths[1]) :], made[:, : int(lengths[1])]], 1)


def picked_within(m: Model, x: Tensor, lengths: Tensor) -> Tensor:
    hidden = m.second(m.first(x).tanh())
    index = (torch.arange(x.shape[1]) + lengths[:, None]) % x.shape[1]
    taken = hidden.gather(1, index[..., None].expand_as(hidden)).sort(1).values
    first, *_ = taken[:, index[0]].split([int(lengths[2]), x.shape[1] - int(lengths[2])], 1)
    return torch.stack([first.topk(1, 1).values, first[:, :1]], 1)


def halved(m: Model, x: Tensor, lengths: Tensor) -> Tensor:
    """Two views of each sample, one behind the other, as in contrastive training."""
    both = m.second(torch.cat([m.first(x), m.first(x.sin())])).tanh()
    return torch.cat(both.chunk(2), 1)


def masked_evenly(m: Model, x: Tensor, lengths: Tensor) -> Tensor:
    """As many rows of each, in other places."""
    index = (torch.arange(x.shape[1]) + lengths[:, None]) % x.shape[1]
    mask = index < 2
    return unpacked(x, mask, m.second(m.first(x)[mask]).tanh())


@pytest.mark.parametrize("body", [pooled, pooled_flat, pooled_by_time, windows, picked_within,
                                  halved, masked_evenly])  # fmt: skip
def test_what_stays_within_samples_costs_nothing(body: Body) -> None:
    """No backward pass is run besides the user's own, once the first batch is verified."""
    engine = GradientHolder(Model(lambda m, x, lengths: body(m, Counted.apply(m.last(x)), lengths)))
    with engine:
        for at, lengths in enumerate(([3, 4, 5, 2], [1, 5, 2, 4], [5, 1, 1, 1], [2, 2, 5, 3])):
            Counted.runs = 0
            asserted(engine, lengths, drawn(N, T, D))
            probes = Counted.runs - 1 - N  # without the user's and the oracle's
            assert probes == 0 if at else probes > 0


def test_hooks_of_users_do_not_see_that_rows_are_asked_for() -> None:
    engine, seen = GradientHolder(Model(packed), exclude="scale"), []

    def hook(module: nn.Module, given: object, arrived: tuple[Tensor, ...]) -> None:
        seen.extend(bool(each.isnan().any()) for each in arrived)

    engine.model.second.register_full_backward_hook(hook)
    with engine:
        for lengths in (FULL, *LATER):
            with engine.batch(range(N)):
                curved(engine.model(drawn(N, T, D), torch.tensor(lengths))).sum().backward()
    assert len(seen) == 1 + len(LATER)
    assert not any(seen)
