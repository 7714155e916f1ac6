"""Selective activation checkpointing: training untouched, numbers exact or refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from tests.silent.compare import (
    WAYS,
    assert_training_untouched,
    drawn,
    exact_or_refused,
    squares,
)
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

N, T, D = 4, 3, 6
MATRICES = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
ROOTS = [torch.ops.aten.rsqrt.default]
PRODUCTS = [torch.ops.aten.mul.Tensor]
KEEP = CheckpointPolicy.MUST_SAVE

Context = Callable[[], Any]

ISSUE = "issue: replays inside a caching mode"


class Scale(nn.Module):
    """Without a closed form, so that it is run again."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.scale = nn.Parameter(drawn(D, D)), nn.Parameter(drawn(D))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weight).tanh() * self.scale


class RMS(nn.Module):
    """A norm that is none of torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(drawn(D) + 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight


class Branching(RMS):
    """Asks for a value, so that it is run again as a whole batch, with shapes as before."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.detach().sum() > 1e9 else super().forward(x)


class Unscaled(nn.Module):
    """The norm without a parameter, which nobody runs again and nobody compares."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


class Selective(nn.Module):
    """A checkpointed block between two layers; without a context, nothing is checkpointed."""

    def __init__(self, inner: nn.Module, context: Context | None) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(D, D), inner, nn.Linear(D, D))
        self.out, self.context = nn.Linear(D, 2), context

    def forward(self, x: Tensor) -> Tensor:
        if self.context is None:
            return self.out(self.block(x))
        return self.out(checkpoint(self.block, x, use_reentrant=False, context_fn=self.context))


def policy(kept: list[Any], context: Any, operation: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    """Keep what some operations return, and compute all else again."""
    keep = operation in kept
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


CONTEXTS: dict[str, Context] = {
    "matrices, as a list": partial(create_selective_checkpoint_contexts, MATRICES),
    "matrices": partial(create_selective_checkpoint_contexts, partial(policy, MATRICES)),
    "roots": partial(create_selective_checkpoint_contexts, partial(policy, ROOTS)),
    "products": partial(create_selective_checkpoint_contexts, partial(policy, PRODUCTS)),
    "everything": partial(create_selective_checkpoint_contexts, lambda *_, **__: KEEP),
}

BEHIND = "a function behind a replay"

INNER: dict[str, Callable[[], nn.Module]] = {
    "one replayed": Scale,
    "two replayed": lambda: nn.Sequential(RMS(), nn.Linear(D, D), nn.Tanh(), RMS()),
    BEHIND: lambda: nn.Sequential(Branching(), Unscaled()),
    "closed form": lambda: nn.LayerNorm(D),
}

UNVERIFIED_FAILURES = {("roots", BEHIND), ("products", BEHIND)}
"""Where replays break what torch keeps: the training is another one."""

VERIFIED_FAILURES = {
    *((context, inner) for context in ("matrices", "matrices, as a list") for inner in INNER),
    ("everything", "closed form"),
    *UNVERIFIED_FAILURES,
}
"""Where the probe's backward pass, the first of two, ends in a raw error."""

IMPOSSIBLE = ("everything", BEHIND)
"""What torch itself cannot run."""


def cases(*, verify: bool) -> list[Any]:
    """Return all contexts and inner modules, those that fail today marked."""
    return [
        pytest.param(context, inner, marks=_marks(verify, context, inner))
        for context in CONTEXTS
        for inner in INNER
        if (context, inner) != IMPOSSIBLE
    ]


def _marks(verify: bool, context: str, inner: str) -> list[pytest.MarkDecorator]:
    failing = VERIFIED_FAILURES if verify else UNVERIFIED_FAILURES
    failed = (context, inner) in failing
    marks = [pytest.mark.xfail(strict=True, reason=ISSUE)] if failed else []
    everyday = context in ("matrices", "roots")
    return marks if everyday else [*marks, pytest.mark.stress]


def models(context: str, inner: str) -> tuple[nn.Module, nn.Module]:
    """Make a checkpointed model and the same one without checkpoints."""
    both = []
    for chosen in (CONTEXTS[context], None):
        torch.manual_seed(0)
        both.append(Selective(INNER[inner](), chosen).double())
    return both[0], both[1]


def check_training(context: str, inner: str, *, verify: bool) -> None:
    model, _ = models(context, inner)
    x = drawn(N, T, D)
    assert_training_untouched(model, lambda: squares(model(x)), N, verify=verify)


def check_numbers(way: str, context: str, inner: str, *, verify: bool) -> None:
    model, twin = models(context, inner)
    x = drawn(N, T, D)
    plain = twin, lambda: squares(twin(x))
    exact_or_refused(model, lambda: squares(model(x)), way, plain=plain, verify=verify)


@pytest.mark.parametrize(("context", "inner"), cases(verify=True))
def test_training_with_verification(context: str, inner: str) -> None:
    check_training(context, inner, verify=True)


@pytest.mark.parametrize(("context", "inner"), cases(verify=False))
def test_training_without_verification(context: str, inner: str) -> None:
    check_training(context, inner, verify=False)


@pytest.mark.parametrize(("context", "inner"), cases(verify=True))
@pytest.mark.parametrize("way", WAYS)
def test_numbers_with_verification(way: str, context: str, inner: str) -> None:
    check_numbers(way, context, inner, verify=True)


@pytest.mark.parametrize(("context", "inner"), cases(verify=False))
@pytest.mark.parametrize("way", WAYS)
def test_numbers_without_verification(way: str, context: str, inner: str) -> None:
    check_numbers(way, context, inner, verify=False)
