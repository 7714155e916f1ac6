"""Parameters that go into a custom function: each sample's part, by the function's own backward."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from tests.foreign.foreign import assert_same, assert_same_training
from tests.silent.compare import holds, squares
from tests.silent.functions import Product
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ghost_core import CaptureError, GhostError, UnbalancedError, WrongSplitError
from ghost_core.testing import GradientHolder, per_sample_gradients

N, T, D, V = 3, 4, 5, 6
IDS = torch.tensor([[1, 2, 3, 1], [0, 5, 2, 2], [4, 4, 1, 0]])


class Logs(torch.autograd.Function):
    """Log-probabilities of targets and, where asked for, entropies, as TRL's fused head makes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, entropy: bool) -> Any:
        ctx.set_materialize_grads(False)
        logs = (x @ weight.T).log_softmax(-1)
        ctx.save_for_backward(x, weight, targets, logs)
        best = logs.argmax(-1)
        ctx.mark_non_differentiable(best)
        made = -(logs.exp() * logs).sum(-1) if entropy else None
        return logs.gather(-1, targets[:, None])[:, 0], made, best

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, to_entropy: Tensor | None, *_: Any) -> Any:
        x, weight, targets, logs = ctx.saved_tensors
        inner = torch.zeros_like(logs)
        if grad is not None:
            inner += (nn.functional.one_hot(targets, V) - logs.exp()) * grad[:, None]
        if to_entropy is not None:
            entropy = -(logs.exp() * logs).sum(-1, keepdim=True)
            inner -= to_entropy[:, None] * logs.exp() * (logs + entropy)
        return inner @ weight, inner.T @ x, None, None


class Filled(Product):
    """One that torch sees nothing of, as those of kernels in other languages."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight.clone())
        made = torch.empty(*x.shape[:-1], V, dtype=x.dtype)
        made.numpy()[:] = x.numpy() @ weight.numpy().T
        return made


class Once(Product):
    """One that spoils what it keeps."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.kept = x.clone()
        return Product.forward(ctx, x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        ctx.kept *= 2
        return grad @ ctx.saved_tensors[1], grad.flatten(0, -2).T @ ctx.kept.flatten(0, -2)


class Decayed(Product):
    """One that adds something to what samples do."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        to_x, to_weight = Product.backward(ctx, grad)
        return to_x, to_weight + 0.1 * ctx.saved_tensors[1]


class Dropped(Product):
    """One that draws in the backward pass."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        to_x, to_weight = Product.backward(ctx, grad)
        return to_x, to_weight * torch.rand(to_weight.shape, dtype=to_weight.dtype)


class Mean(Product):
    """A loss of all samples in one number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        return Product.forward(ctx, x, weight).mean()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, _ = ctx.saved_tensors
        each = grad.expand(*x.shape[:-1], V) / x[..., 0].numel() / V
        return Product.backward(ctx, each)


class Typed(torch.autograd.Function):
    """Products in half of the bits, and their squared sums in all; gradients are to be alike."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight)
        made = x @ weight.T
        return made.float(), made.square().sum(-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, to_squares: Tensor) -> tuple[Tensor, Tensor]:
        assert (grad.dtype, to_squares.dtype) == (torch.float32, torch.float64)
        x, weight = ctx.saved_tensors
        inner = grad.double() + 2 * to_squares[..., None] * (x @ weight.T)
        return Product.backward(ctx, inner)


class Nothing(Product):
    """One whose gradient of the weight is none at all."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad @ ctx.saved_tensors[1], None


class Halved(Product):
    """One that computes in bfloat16, whatever the weight is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        return Product.forward(ctx, x.bfloat16(), weight.bfloat16()).float()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        to_x, to_weight = Product.backward(ctx, grad.bfloat16())
        return to_x.float(), to_weight.float()


Head = Callable[[Tensor, nn.Linear, Tensor], Tensor]
"""From hidden values `[N, T, D]`, the head and targets `[N, T]` to one number per sample."""


def by_token(x: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
    logs, _, _ = Logs.apply(x.reshape(-1, D), head.weight, targets.reshape(-1), False)
    return logs.view(N, T).sum(1)


def with_entropy(x: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
    logs, entropy, _ = Logs.apply(x.reshape(-1, D), head.weight, targets.reshape(-1), True)
    return (logs.view(N, T) + 0.1 * entropy.view(N, T)).sum(1)


def valid_only(x: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
    mask = targets > 1
    logs, _, _ = Logs.apply(x[mask], head.weight, targets[mask], False)
    return x.new_zeros(N, T).masked_scatter(mask, logs).sum(1)


def twice(x: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
    squared = Product.apply(Product.apply(x, head.weight)[..., :D], head.weight).square()
    return squared.flatten(1).sum(1) + squares(head(x))


def of_a_copy(x: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
    return squares(Product.apply(x, head.weight.mul(2)))


def filled(x: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
    return squares(Filled.apply(x, head.weight).view(N, T, V) + head.weight.sum(1))


def checkpointed(x: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
    found: Tensor = checkpoint(
        lambda x: squares(Product.apply(x.tanh(), head.weight)), x, use_reentrant=False
    )
    return found


def drawing(x: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
    return squares(Dropped.apply(x, head.weight))


def of_two_dtypes(x: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
    return Typed.apply(x, head.weight)[1].sum(1)


def behind_positions(x: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
    rows = torch.cat([x, x.sin()], 1).transpose(0, 1)
    joined = torch.cat([rows, rows.cos()])
    return Product.apply(joined, head.weight).transpose(0, 1).square().sum((1, 2))


class Model(nn.Module):
    def __init__(self, head: Head, *, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.body = nn.Embedding(V, D), nn.Linear(D, D)
        self.head, self.use = nn.Linear(D, V, bias=False), head
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.use(self.body(self.embedding(ids)).tanh(), self.head, ids.roll(1, 1))


HEADS = [
    by_token,
    with_entropy,
    valid_only,
    twice,
    of_a_copy,
    filled,
    checkpointed,
    of_two_dtypes,
    behind_positions,
]


def expected_of(model: nn.Module, ids: Tensor = IDS) -> dict[str, Tensor]:
    return per_sample_gradients(model, model(ids))


@pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
@pytest.mark.parametrize("head", HEADS)
def test_each_samples_part_is_that_of_autograd(head: Head, tied: bool) -> None:
    model = Model(head, tied=tied).double()
    holds(model, lambda: model(IDS), "attached", expected_of(model))


@pytest.mark.parametrize("head", [*HEADS, drawing])
def test_training_is_untouched(head: Head) -> None:
    """Also by what is drawn in a backward pass."""
    model = Model(head, tied=True).double()
    engine, found = GradientHolder(model), []
    for attached in (False, True):
        torch.manual_seed(1)
        with ExitStack() as stack:
            if attached:
                stack.enter_context(engine)
                stack.enter_context(engine.batch(range(N)))
            model(IDS).sum().backward()
        found.append(({name: p.grad for name, p in model.named_parameters()}, torch.rand(1)))
        model.zero_grad()
    assert_same_training(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_rows_are_asked_for_in_every_batch() -> None:
    """What has as many valid tokens as before, in other places, is of other samples."""
    model = Model(valid_only).double()
    even = torch.tensor([[2, 3, 0, 1], [4, 5, 0, 0], [1, 1, 2, 2]])
    uneven = torch.tensor([[2, 3, 4, 5], [0, 0, 1, 2], [0, 1, 0, 3]])
    assert (even > 1).sum() == (uneven > 1).sum()
    engine = GradientHolder(model)
    with engine:
        for ids in (even, uneven, IDS):
            expected = expected_of(model, ids)
            model.zero_grad()
            with engine.batch(range(N)) as batch:
                model(ids).sum().backward()
            assert_same(batch.result.materialize(), expected)


def joined(x: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
    """Take as many tokens of each sample as its first one says."""
    lengths = targets.roll(-1, 1)[:, 0].tolist()
    rows = torch.cat([each[:length] for each, length in zip(x, lengths, strict=True)])
    losses = Product.apply(rows, head.weight).square().sum(1)
    return torch.stack([each.sum() for each in losses.split(lengths)])


def written(x: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
    """Write samples into another place, and into another one in each batch."""
    order = targets.roll(-1, 1)[:, 0].argsort()
    rows = torch.zeros_like(x)
    rows[order] = x
    return squares(Product.apply(rows, head.weight))[order]


@pytest.mark.parametrize("head", [joined, written])
def test_rows_that_were_in_order_are_asked_for_too(head: Head) -> None:
    model = Model(head).double()
    engine = GradientHolder(model)
    with engine:
        for first in ([2, 2, 2], [1, 4, 1], [4, 1, 1]):
            ids = IDS.clone()
            ids[:, 0] = torch.tensor(first)
            expected = expected_of(model, ids)
            model.zero_grad()
            with engine.batch(range(N)) as batch:
                model(ids).sum().backward()
            assert_same(batch.result.materialize(), expected)


@pytest.mark.parametrize("autocast", [False, True], ids=["own dtype", "autocast"])
def test_what_is_computed_in_bfloat16_is_compared_as_that(autocast: bool) -> None:
    """However each sample's part is rounded, beside the sum."""

    def head(x: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
        if autocast:
            return squares(Product.apply(x, head.weight.to(x.dtype)).float())
        return squares(Halved.apply(x, head.weight))

    model, ids = Model(head), IDS.repeat(9, 1)
    engine = GradientHolder(model)

    def run() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(ids)

    expected = per_sample_gradients(model, run())
    with engine, engine.batch(range(len(ids))) as batch:
        run().sum().backward()
    found = batch.result.materialize()["head.weight"].float()
    torch.testing.assert_close(found, expected["head.weight"], rtol=0.03, atol=0.03)


def test_a_function_that_makes_no_gradient_of_a_weight() -> None:
    def head(x: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
        return squares(Nothing.apply(x, head.weight))

    model = Model(head).double()
    engine = GradientHolder(model)
    with engine, engine.batch(range(N)) as batch:
        model(IDS).sum().backward()
    assert model.head.weight.grad is None
    assert batch.verified


def test_what_is_written_to_afterwards_is_refused() -> None:
    def head(x: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
        weight = head.weight.mul(2)
        losses = squares(Filled.apply(x, weight))
        weight.mul_(3)
        return losses

    model = Model(head).double()
    engine = GradientHolder(model)
    with pytest.raises(WrongSplitError, match="written to"), engine, engine.batch(range(N)):
        model(IDS).sum().backward()


def test_micro_batches_and_a_loss_that_leaves_samples_out() -> None:
    model = Model(by_token).double()
    expected = expected_of(model)
    engine = GradientHolder(model)
    with engine, engine.batch(range(2 * N)) as batch:
        for weights in ([1.0, 0.0, 2.0], [0.0, 0.0, 1.0]):
            (model(IDS) * torch.tensor(weights)).sum().backward()
    weighed = torch.tensor([1.0, 0, 2, 0, 0, 1]).double()[:, None, None]
    found = batch.result.materialize()["head.weight"]
    torch.testing.assert_close(found, expected["head.weight"].repeat(2, 1, 1) * weighed)


REFUSED: dict[str, tuple[Any, type[GhostError], str]] = {
    "one number": (
        Mean,
        WrongSplitError,
        r"(?s)head\.weight.*MeanBackward.*exclude='head\.weight'",
    ),
    "spoilt": (Once, WrongSplitError, r"(?s)OnceBackward.*again.*exclude='head\.weight'"),
    "affine": (Decayed, UnbalancedError, r"head\.weight"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_cannot_be_told_is_refused_by_name(why: str) -> None:
    function, error, message = REFUSED[why]

    def head(x: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
        return x.sum((1, 2)) + function.apply(x, head.weight).flatten()[:1].sum()

    def rows(x: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
        return squares(function.apply(x, head.weight))

    model = Model(head if why == "one number" else rows).double()
    engine = GradientHolder(model)
    with pytest.raises(error, match=message), engine, engine.batch(range(N)):
        model(IDS).sum().backward()


@pytest.mark.parametrize("followed", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_function_behind_a_function_is_refused(frozen: bool, followed: bool) -> None:
    """Nobody sees the first one's output, and a use that is followed excuses no other."""

    def head(x: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
        behind = Product.apply(Product.apply(x, head.weight), torch.eye(V).double())
        return squares(behind + x @ head.weight.T if followed else behind)

    model = Model(head).double()
    engine = GradientHolder(model)
    refused = pytest.raises(WrongSplitError, match=r"head\.weight")
    with engine.frozen() if frozen else engine, refused, engine.batch(range(N)):
        model(IDS).sum().backward()


def test_what_no_probe_reaches_is_refused() -> None:
    engine = GradientHolder(Model(by_token).double(), layers="head")
    refused = pytest.raises(WrongSplitError, match="no module before it that is measured")
    with refused, engine, engine.batch(range(N)):
        engine.model(IDS).sum().backward()


def test_gradients_after_the_batch_are_an_error() -> None:
    model = Model(by_token).double()
    engine = GradientHolder(model)
    with engine:
        with engine.batch(range(N)):
            losses = model(IDS)
            losses.sum().backward(retain_graph=True)
        with pytest.raises(CaptureError, match="after its batch was closed"):
            losses.sum().backward()
