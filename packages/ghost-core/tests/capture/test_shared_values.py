"""Values that are the same for all samples: followed to where they meet the samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from ghost_core import Engine, WrongSplitError
from ghost_core.testing import per_sample_gradients
from ghost_core.testing.cases.roots import Unseen

N, D, V = 4, 6, 11
Hold = Callable[..., Engine[object]]


class Base(nn.Module):
    """Words, something shared, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(V, D), nn.Embedding(8, D)
        self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, V)
        self.double()

    def at(self, t: int) -> Tensor:
        return self.wpe(torch.arange(t))


class Added(Base):
    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.wte(ids) + self.at(ids.shape[1])))


class Scaled(Base):
    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.wte(ids) * (0.5 * self.at(ids.shape[1])).tanh()))


class Normed(Base):
    """A shared value goes through a tracked module."""

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.wte(ids).tanh() + self.norm(self.at(ids.shape[1])))


class Prefixed(Base):
    """A learned prefix, expanded and put in front."""

    def forward(self, ids: Tensor) -> Tensor:
        prefix = self.at(2)[None].expand(len(ids), -1, -1)
        return self.head(self.norm(torch.cat([prefix, self.wte(ids)], 1)))


class Repeated(Base):
    def forward(self, ids: Tensor) -> Tensor:
        prefix = self.at(2)[None].repeat(len(ids), 1, 1)
        return self.head(self.norm(torch.cat([prefix, self.wte(ids)], 1)))


class Twice(Base):
    """One shared value meets the samples in two places."""

    def forward(self, ids: Tensor) -> Tensor:
        pos, x = self.at(ids.shape[1]), self.wte(ids)
        return self.head(self.norm(x + pos) * pos)


class Keys(Base):
    """Samples attend to a shared table."""

    def forward(self, ids: Tensor) -> Tensor:
        table = self.at(5)
        x = self.wte(ids)
        return self.head(self.norm((x @ table.T).softmax(-1) @ table))


class Tied(Base):
    """The head's weight is used as a tensor."""

    def forward(self, ids: Tensor) -> Tensor:
        return functional.linear(self.norm(self.wte(ids)).tanh(), self.wte.weight)


class Transposed(Base):
    def forward(self, ids: Tensor) -> Tensor:
        return self.norm(self.wte(ids)).tanh() @ self.wte.weight.t()


class Queries(Base):
    """A table of queries is never called, its weight is used."""

    def forward(self, ids: Tensor) -> Tensor:
        queries = self.wpe.weight.unsqueeze(0).repeat(len(ids), 1, 1)
        x = self.wte(ids)
        return self.head(self.norm((queries @ x.mT).softmax(-1) @ x + queries))


class Child(Base):
    """Another module's weights are used functionally."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.wte(ids))
        return functional.linear(x, self.head.weight, self.head.bias)


class Borrowed(Base):
    """A layer's weight is used beside the layer."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids)
        weight = self.head.weight
        return self.head(self.norm(x)) + x.tanh() @ weight.T


class RelativeBias(nn.Module):
    """Attends as T5 does, with a bias from an embedding of distances."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.bias, self.query = nn.Embedding(V, D), nn.Embedding(9, 2), nn.Linear(D, D)
        self.double()

    def forward(self, ids: Tensor) -> Tensor:
        x, places = self.wte(ids), torch.arange(ids.shape[1])
        distance = (places[:, None] - places).abs()
        bias = self.bias(distance).permute(2, 0, 1)[None]
        query = self.query(x).unflatten(2, (2, -1)).transpose(1, 2)
        mixed = torch.softmax(query @ query.mT + bias, -1) @ query
        return mixed.transpose(1, 2).flatten(2)


class Windows(RelativeBias):
    """Samples are folded with windows, as in Swin, when they meet the bias."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids).repeat_interleave(2, 0).tanh()  # [N·2, T, d]
        bias = self.bias(torch.arange(ids.shape[1])).sum(1)
        return (self.query(x) + bias[:, None]).unflatten(0, (-1, 2)).flatten(1, 2)


class Returned(Base):
    """The model returns what is the same for all, one row for each sample."""

    def forward(self, ids: Tensor) -> Tensor:
        self.wte(ids)
        return self.head(self.norm(self.at(ids.shape[1])))[None].expand(len(ids), -1, -1)


class SharedWeight(nn.Module):
    """A module that nobody handles uses a parameter of another one."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.first = nn.Embedding(V, D), nn.Linear(D, D)
        self.double()

    def forward(self, ids: Tensor) -> Tensor:
        return self.first(self.wte(ids)).tanh() @ self.first.weight + self.first.bias


MODELS: list[Callable[[], nn.Module]] = [
    Added, Scaled, Normed, Prefixed, Repeated, Twice, Keys, Tied, Transposed, Queries, Child,
    Borrowed, RelativeBias, Windows, Returned, SharedWeight,
]  # fmt: skip


def losses_of(model: nn.Module, ids: Tensor) -> Tensor:
    return model(ids).sin().mean((1, 2))


@pytest.mark.parametrize(
    ("t", "frozen"),
    [
        (3, False),
        (N, True),
        pytest.param(3, True, marks=pytest.mark.stress),
        pytest.param(N, False, marks=pytest.mark.stress),
    ],
)
@pytest.mark.parametrize("kind", MODELS)
def test_exact(
    hold: Hold,
    assert_held: Callable[..., None],
    kind: Callable[[], nn.Module],
    t: int,
    frozen: bool,
) -> None:
    torch.manual_seed(0)
    model = kind()
    used = per_sample_gradients(model, losses_of(model, torch.randint(0, V, (N, t))))
    unused = [name for name, gradient in used.items() if not gradient.any()]
    engine = hold(model, exclude=unused)
    for _ in range(3):
        ids = torch.randint(0, V, (N, t))
        expected = per_sample_gradients(model, losses_of(model, ids), sorted(engine.tracking.names))
        with engine.frozen() if frozen else engine, engine.batch(range(N)) as batch:
            losses_of(model, ids).sum().backward()
        assert batch.verified
        assert_held(batch.result, expected)


@pytest.mark.parametrize(
    "kind",
    [  # one for each kind of use
        kind
        if kind in (Added, Prefixed, Keys, Tied, RelativeBias, Windows, Returned, SharedWeight)
        else pytest.param(kind, marks=pytest.mark.stress)
        for kind in MODELS
    ],
)
def test_training_is_untouched(hold: Hold, kind: Callable[[], nn.Module]) -> None:
    def trained(watched: bool) -> nn.Module:
        torch.manual_seed(0)
        model = kind().float()
        engine = hold(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        for _ in range(4):
            ids = torch.randint(0, V, (N, 3))
            optimizer.zero_grad()
            if watched:
                with engine, engine.batch(range(N)):
                    losses_of(model, ids).sum().backward()
            else:
                losses_of(model, ids).sum().backward()
            optimizer.step()
        return model

    plain, watched = trained(False), trained(True)
    for expected, found in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(expected, found)


def test_under_autocast(hold: Hold) -> None:
    model, ids = Tied().float(), torch.randint(0, V, (N, 3))
    exact = per_sample_gradients(model, losses_of(model, ids), ["wte.weight"])["wte.weight"]
    engine = hold(model, layers="wte")
    with torch.autocast("cpu", torch.bfloat16), engine, engine.batch(range(N)) as batch:
        losses_of(model, ids).sum().backward()
    uses = batch.result.gradients("wte.weight")
    found = sum(use.materialize().double() for use in uses[1:]) + uses[0].materialize().double()
    assert (found - exact).norm() < 0.05 * exact.norm()


def test_what_is_written_in_place_is_refused(hold: Hold) -> None:
    class Writes(Base):
        def forward(self, ids: Tensor) -> Tensor:
            x = self.wte(ids) * 1
            x[:, :2] = self.at(2)
            return self.head(self.norm(x))

    engine = hold(model := Writes())
    refused = pytest.raises(WrongSplitError, match=r"__setitem__ writes .* computed by wpe")
    with engine, refused, engine.batch(range(N)):
        losses_of(model, torch.randint(0, V, (N, 3))).sum().backward()
    assert torch.overrides._len_torch_function_stack() == 0


@pytest.mark.parametrize(
    ("rows", "said"),
    [(3, "same for all samples, meets them in TensorBase.mul"), (N, "of sample 0's output alone")],
)
def test_a_shared_value_that_one_sample_changes_is_refused(
    hold: Hold, rows: int, said: str
) -> None:
    class Changes(Base):
        def forward(self, ids: Tensor) -> Tensor:
            x = self.wte(ids)
            return self.head(self.norm(x + self.at(ids.shape[1]) * x[:1].mean()))

    engine = hold(model := Changes())
    refused = pytest.raises(WrongSplitError, match=said)
    with engine, refused, engine.batch(range(N)):
        losses_of(model, torch.randint(0, V, (N, rows))).sum().backward()


def test_gradients_follow_several_backward_passes_and_micro_batches(
    hold: Hold, assert_held: Callable[..., None]
) -> None:
    model, ids = Scaled(), torch.randint(0, V, (N, 3))
    expected = per_sample_gradients(model, losses_of(model, ids))
    engine = hold(model)
    with engine, engine.batch(range(N)) as batch:
        for loss in losses_of(model, ids):
            loss.backward(retain_graph=True)
    assert_held(batch.result, expected)
    with engine, engine.batch(range(N)) as batch:
        for part in ids.split([1, N - 1]):
            losses_of(model, part).sum().backward()
    assert_held(batch.result, expected)


@pytest.mark.parametrize(
    ("kind", "said"),
    [(Tied, "parameters are used outside the modules"), (Added, r"wpe\.weight\] returned 3 rows")],
)
def test_nothing_is_followed_without_lifting(
    hold: Hold, kind: Callable[[], nn.Module], said: str
) -> None:
    engine = hold(model := kind(), lift=False)
    with engine, pytest.raises(WrongSplitError, match=said), engine.batch(range(N)):
        losses_of(model, torch.randint(0, V, (N, 3))).sum().backward()


@pytest.mark.parametrize("frozen", [False, True])
def test_a_use_that_nobody_sees_is_refused(hold: Hold, frozen: bool) -> None:
    class Hidden(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, places: Tensor) -> Tensor:
            return x + places

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
            return grad, grad.sum(0)

    class Hides(Base):
        def forward(self, ids: Tensor) -> Tensor:
            x, places = self.wte(ids), self.at(ids.shape[1])
            return self.head(self.norm(Unseen.apply(Hidden.apply(x + places, places))))

    engine = hold(model := Hides())
    refused = pytest.raises(WrongSplitError, match=r"do not add up to the gradient of wpe")
    with engine.frozen() if frozen else engine, refused as error, engine.batch(range(N)):
        losses_of(model, torch.randint(0, V, (N, 3))).sum().backward()
    excluded = "wpe" if frozen else "wpe.weight"
    assert error.value.remedy.endswith(f"exclude={excluded!r}")
    hold(model, exclude=excluded)  # the remedy names what there is


def test_a_model_without_shared_values_is_not_followed_after_its_first_batch(hold: Hold) -> None:
    class Plain(Base):
        def forward(self, ids: Tensor) -> Tensor:
            following.append(bool(torch.overrides._len_torch_function_stack()))
            return self.head(self.norm(self.wte(ids)))

    following: list[bool] = []
    engine = hold(model := Plain(), exclude="wpe")
    with engine:
        for _ in range(3):
            with engine.batch(range(N)):
                losses_of(model, torch.randint(0, V, (N, 3))).sum().backward()
    assert following == [True, False, False]


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("kind", [Added, Tied])
def test_a_penalty_on_a_parameter_in_shared_values_is_refused(
    hold: Hold, kind: Callable[[], Base], frozen: bool
) -> None:
    engine = hold(model := kind())
    shared = model.wpe.weight if kind is Added else model.wte.weight

    def backpropagate() -> None:
        losses = losses_of(model, torch.randint(0, V, (N, 3)))
        (losses + shared.square().sum()).sum().backward()

    refused = pytest.raises(WrongSplitError, match=r"w[tp]e\.weight")
    with engine.frozen() if frozen else engine, refused, engine.batch(range(N)):
        backpropagate()


@pytest.mark.parametrize("frozen", [False, True])
def test_a_value_that_is_written_to_after_it_met_samples_is_refused(
    hold: Hold, frozen: bool
) -> None:
    class Late(Base):
        def forward(self, ids: Tensor) -> Tensor:
            places = self.at(ids.shape[1]) * 1.5
            x = self.wte(ids) + places
            places.mul_(3)
            return self.head(self.norm(x + places))

    engine = hold(model := Late())
    refused = pytest.raises(WrongSplitError, match=r"was written to after it had met them")
    with engine.frozen() if frozen else engine, refused, engine.batch(range(N)):
        losses_of(model, torch.randint(0, V, (N, 3))).sum().backward()
