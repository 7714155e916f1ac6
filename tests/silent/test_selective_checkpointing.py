"""Selective activation checkpointing: training untouched, numbers exact or refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
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
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from ghost_core.testing import GradientHolder

N, T, D = 4, 3, 6
MATRICES = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
ROOTS = [torch.ops.aten.rsqrt.default]
PRODUCTS = [torch.ops.aten.mul.Tensor]
KEEP = CheckpointPolicy.MUST_SAVE

Context = Callable[[], Any]


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

IMPOSSIBLE = ("everything", BEHIND)
"""What torch itself cannot run."""


VERIFIED = {("matrices", True), ("roots", False)}
"""Contexts of the default tests, and whether engines verify."""


def cases(ways: Sequence[str] = ("",)) -> list[object]:
    """Return all contexts, inner modules, ways and whether to verify, most for the stress tests.

    By default verified batches are attached and others frozen, where there are ways.
    """
    found = []
    for context, inner, way, verify in product(CONTEXTS, INNER, ways, (True, False)):
        if (context, inner) != IMPOSSIBLE:
            quick = (context, verify) in VERIFIED and way == (ways[0] if verify else ways[-1])
            marks = () if quick else pytest.mark.stress
            given = (context, inner, way, verify) if way else (context, inner, verify)
            found.append(pytest.param(*given, marks=marks))
    return found


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
    options = {"plain": plain, "verify": verify}
    assert exact_or_refused(model, lambda: squares(model(x)), way, **options) == "exact"


@pytest.mark.parametrize(("context", "inner", "verify"), cases())
def test_training(context: str, inner: str, verify: bool) -> None:
    check_training(context, inner, verify=verify)


@pytest.mark.parametrize(("context", "inner", "way", "verify"), cases(WAYS))
def test_numbers(way: str, context: str, inner: str, verify: bool) -> None:
    check_numbers(way, context, inner, verify=verify)


@pytest.mark.parametrize("verify", [True, pytest.param(False, marks=pytest.mark.stress)])
@pytest.mark.parametrize("context", CONTEXTS)
def test_block_that_is_not_tracked(context: str, verify: bool) -> None:
    """No hook runs in it, and the probe's backward passes go through it all the same."""
    model, twin = models(context, "one replayed")
    x, first = drawn(N, T, D), nn.Linear(D, D).double()
    both = nn.Sequential(first, model), nn.Sequential(first, twin)
    options = {"layers": "0.*", "verify": verify}
    assert_training_untouched(both[0], lambda: squares(both[0](x)), N, **options)
    plain = both[1], lambda: squares(both[1](x))
    for way in WAYS:
        run = partial(exact_or_refused, both[0], lambda: squares(both[0](x)), way, plain=plain)
        assert run(**options) == "exact"


def test_modes_of_the_user_do_not_see_replays() -> None:
    """Any mode around a module sees what it sees without ghost, but for views."""
    model, x = nn.Sequential(Scale(), nn.Linear(D, 2)).double(), drawn(N, T, D)
    plain, seen = Seen(), Seen()
    with plain:
        model(x)
    engine = GradientHolder(model, verify=False)
    with engine, engine.batch(range(N)):
        with seen:
            y = model(x)
        squares(y).sum().backward()
    assert seen.computed == plain.computed != []


class Seen(TorchDispatchMode):
    """Keeps which operations ran."""

    def __init__(self) -> None:
        super().__init__()
        self.computed: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and func is not torch.ops.aten.detach.default:
            self.computed.append(func)
        return func(*args, **(kwargs or {}))
