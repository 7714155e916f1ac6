"""Nothing between the opening of a batch and the end of its backward pass waits for a device.

A program waits where it asks a tensor for its values. Which operations ask is the same on all
devices, so that the CPU shows it, too; on CUDA torch's own debug mode looks as well.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from tests.device.test_models_on_device import moved
from tests.zoo import FAMILIES, Case
from torch.autograd.profiler import profile

from ghost_engines import DotProductEngine, NormEngine, ProjectionEngine

WAITING = {
    "aten::_local_scalar_dense",
    "aten::allclose",
    "aten::equal",
    "aten::is_nonzero",
    "aten::masked_select",
    "aten::nonzero",
    "aten::unique_dim",
    "aten::_unique2",
}
"""Operations whose results, or their shapes, depend on what is in a tensor."""


def dots(case: Case, **options: Any) -> DotProductEngine:
    engine = DotProductEngine(case.model, **options)
    engine.add_direction("ones", {name: torch.ones_like(p) for name, p in named(case)})
    return engine


def named(case: Case) -> Iterator[tuple[str, torch.nn.Parameter]]:
    return case.model.named_parameters()


ENGINES: dict[str, Callable[[Case], Any]] = {
    "dots": dots,
    "fused": partial(dots, mode="fused", norms=True),
    "concatenated": lambda case: DotProductEngine(case.model, mode="concatenated", norms=True),
    "norms": lambda case: NormEngine(case.model, loss_weights="sum"),
    "rows": lambda case: ProjectionEngine(case.model, dim=8),
}


def waits(device: torch.device, run: Callable[[], object]) -> Counter[str]:
    """Count what waits: operations by name, and on CUDA what torch itself sees."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            with profile() as seen:
                run()
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    names = [event.name for event in seen.function_events if event.name in WAITING]
    return Counter([*names, *(str(each.message) for each in said if "sync" in str(each.message))])


def ways() -> Iterator[Any]:
    """Yield engines, and whether batches are frozen, which by default is tried with two."""
    for kind in ENGINES:
        for frozen in (False, True):
            again = frozen and kind not in ("dots", "rows")
            marks = pytest.mark.stress if again else ()
            name = f"{kind}-{'frozen' if frozen else 'training'}"
            yield pytest.param(kind, frozen, id=name, marks=marks)


@pytest.mark.parametrize(("kind", "frozen"), [*ways()])
@pytest.mark.parametrize(
    "name",
    ["gpt2", *(pytest.param(each, marks=pytest.mark.stress) for each in ("llama", "resnet"))],
)
def test_nothing_waits_inside_a_batch(
    name: str, kind: str, frozen: bool, device: torch.device
) -> None:
    case = moved(FAMILIES[name].case(4), device)

    def run() -> None:
        case.losses().sum().backward()

    plain = waits(device, run)  # architectures look at their masks
    engine = ENGINES[kind](case)
    step, n = (partial(run_joined, engine, case), 3) if kind == "concatenated" else (run, 4)
    with engine.frozen() if frozen else engine:
        for _ in range(2):  # what is looked at, and found, in the first batches
            with opened(engine, n):
                step()
        with opened(engine, n):
            assert waits(device, step) == plain


@contextmanager
def opened(engine: Any, n: int) -> Iterator[None]:
    """Open a batch of n samples: all four, or three beside one of validation."""
    if n < 4:
        engine.concatenate(torch.zeros(n, 1), torch.zeros(1, 1))
    with engine.batch(range(n)):
        yield


def run_joined(engine: DotProductEngine, case: Case) -> None:
    """Run a batch whose last sample is of validation."""
    engine.backward(case.losses(), train_weight=1, validation_weight=0.5)


def test_what_waits_is_counted(device: torch.device) -> None:
    values = torch.ones(3, device=device)
    assert waits(device, lambda: bool((values > 0).all()))
    assert not waits(device, lambda: (values > 0).all())
