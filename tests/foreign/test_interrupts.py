"""Ctrl-C at any line of ghost's leaves the model as it was found: no hooks, flags or modes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from tests.foreign.foreign import assert_same, curved
from torch import Tensor, nn
from torch.nn.utils import parametrize

import ghost_core
import ghost_engines
import ghost_layers
from ghost_core import GhostError
from ghost_core.testing import GradientHolder, per_sample_gradients
from ghost_core.testing.snapshots import assert_untouched, traces
from ghost_engines import DotProductEngine

N = 3

FOLDERS = tuple(
    str(Path(package.__file__ or "").parent)
    for package in (ghost_core, ghost_layers, ghost_engines)
)

WAYS = ("attached", "frozen")


class Model(nn.Module):
    """Meets what a batch can meet: a closed form, a replay, a row shared by all samples."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(3, 4), nn.LayerNorm(4)
        self.scale, self.shared = nn.Parameter(torch.randn(4)), nn.Embedding(1, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.layer(x) + self.shared(torch.zeros(1, dtype=torch.long))).tanh()


class Replayed(nn.Module):
    """A module without a closed form."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.scale = Model(), nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.scale


class Packing(nn.Module):
    """Packs what is not padded: in the second batch, whose rows are then asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        mask = x.abs().sum(-1) > 0
        rows = self.second(self.first(x)[mask].tanh())
        padded = rows.new_zeros(*mask.shape, 2)
        padded[mask] = rows
        return padded


class Tracer:
    """Counts the lines that run in ghost's packages, and raises KeyboardInterrupt at one of them.

    Attributes:
        at: Line at which it raises, by order of execution from 1; 0 for never.
        count: Lines so far.
        where: The line it raised at, as file and number.
        open: What the batch left open that was interrupted, before the engine was detached.
    """

    def __init__(self, at: int = 0) -> None:
        self.at, self.count, self.where, self.open = at, 0, "", ""

    @contextmanager
    def tracing(self) -> Iterator[None]:
        """Count the lines inside."""
        before = sys.gettrace()
        sys.settrace(self._call)
        try:
            yield
        finally:
            sys.settrace(before)

    def _call(self, frame: FrameType, event: str, argument: Any) -> Callable[..., Any] | None:
        return self._line if frame.f_code.co_filename.startswith(FOLDERS) else None

    def _line(self, frame: FrameType, event: str, argument: Any) -> Callable[..., Any]:
        if event == "line":
            self.count += 1
            if self.count == self.at:
                self.where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
                raise KeyboardInterrupt
        return self._line


@dataclass(frozen=True)
class Kind:
    """A model, and what it is given.

    Attributes:
        make: Makes the model.
        options: Options of the engine.
        padded: Lengths of samples in the second batch, which are padded to 4; nothing for `[N, 3]`.
    """

    make: Callable[[], nn.Module]
    options: Mapping[str, Any] = field(default_factory=dict)
    padded: tuple[int, ...] = ()

    def inputs(self, number: int = 1) -> Tensor:
        """Return the samples of a batch."""
        generator = torch.Generator().manual_seed(2)
        shape = (N, 4, 3) if self.padded else (N, 3)
        x = torch.randn(*shape, dtype=torch.float64, generator=generator)
        for sample, length in zip(x, self.padded, strict=False):
            sample[length if number == 2 else 4 :] = 0
        return x


def run(kind: Kind, model: nn.Module, way: str, tracer: Tracer, traced: int) -> None:
    """Attach, run two batches and detach.

    Args:
        kind: What the model is given.
        model: The model.
        way: One of `WAYS`.
        tracer: Counts lines, and interrupts.
        traced: The batch in which it does, 1 or 2; 0 for all that is not in a batch.
    """
    engine = GradientHolder(model, **kind.options)

    def outside() -> AbstractContextManager[None]:
        return nullcontext() if traced else tracer.tracing()

    context = engine.frozen() if way == "frozen" else engine
    with outside():
        context.__enter__()
    error: BaseException | None = None
    try:
        for number in (1, 2) if traced else ():
            traced_now = tracer.tracing() if number == traced else nullcontext()
            x = kind.inputs(number)
            with traced_now, engine.batch(range(N)):
                curved(model(x)).sum().backward()
    except BaseException as raised:
        error, tracer.open = raised, open_modes()
    with outside():
        context.__exit__(*((type(error), error, error.__traceback__) if error else (None,) * 3))
    if error is not None:
        raise error


KINDS = {
    "small": Kind(lambda: nn.Linear(3, 2)),
    "large": Kind(Replayed),
    "packing": Kind(Packing, padded=(4, 2, 3)),
    "unit": Kind(Replayed, {"units": "inner"}),
}


def made(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return KINDS[kind].make().double()


def interrupted(kind: str, way: str, traced: int, at: int) -> str:
    """Interrupt at one line, and return what is not as it was found then; empty if all is."""
    model, tracer = made(kind), Tracer(at)
    found = traces(model)
    try:
        run(KINDS[kind], model, way, tracer, traced)
        left = "it was not interrupted"
    except KeyboardInterrupt:
        left = tracer.open or left_behind(kind, model, found, works=at % 25 == 0)
    except Exception as error:  # another one in its place
        left = f"{type(error).__name__}: {error}"
    finally:
        close_modes()
    return f"{tracer.where}: {left}" if left else ""


def open_modes() -> str:
    """Return what is open of torch's modes; nothing if all is closed."""
    if count := torch._C._len_torch_dispatch_stack():
        return f"{count} dispatch modes are open"
    if count := torch._C._len_torch_function_stack():
        return f"{count} function modes are open"
    if torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
        return "hooks on saved tensors are open"
    if not torch.is_grad_enabled():
        return "gradients are disabled"
    if settings() != BEFORE[0]:
        return "settings of the process are not as they were"
    nested = torch.autocast_increment_nesting() - 1
    torch.autocast_decrement_nesting()
    return "autocast is open" if nested else ""


def settings() -> tuple[object, ...]:
    """Return what ghost sets in the whole process for a while."""
    backends: Any = torch.backends
    products = backends.mkldnn.matmul.fp32_precision
    return products, backends.mha.get_fastpath_enabled(), parametrize._cache_enabled


BEFORE = [settings()]


@pytest.fixture(autouse=True)
def _settings_of_the_process() -> None:
    """Compare with what the tests before left, whatever that is."""
    BEFORE[0] = settings()


def close_modes() -> None:
    """Close what an interrupt left open, so that the next one is judged by itself."""
    while torch._C._len_torch_dispatch_stack():
        torch._C._pop_torch_dispatch_stack(None)
    while torch._C._len_torch_function_stack():
        torch._C._pop_torch_function_stack()
    while torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
        torch._C._autograd._pop_saved_tensors_default_hooks()
    while torch.autocast_decrement_nesting() >= 0:
        pass
    torch.autocast_increment_nesting()
    torch.set_grad_enabled(True)


def left_behind(kind: str, model: nn.Module, found: dict[str, object], *, works: bool) -> str:
    """Return what is not as it was found; empty if all is, and a new engine works if asked."""
    if modes := open_modes():
        return modes
    try:
        assert_untouched(found, model, "interrupted")
        model.zero_grad()
        if works:
            assert_works(kind, model)
    except (AssertionError, GhostError) as error:
        return str(error)
    return ""


def assert_works(kind: str, model: nn.Module) -> None:
    """Assert that a new engine gives exact numbers, in a first batch and in a later one."""
    engine = GradientHolder(model, **KINDS[kind].options)
    with engine:
        for x in (KINDS[kind].inputs(1), KINDS[kind].inputs(2)):
            with engine.paused():
                expected = per_sample_gradients(model, curved(model(x)))
            with engine.batch(range(N)) as batch:
                curved(model(x)).sum().backward()
            assert_same(batch.result.materialize(), expected)


def interrupt_everywhere(kind: str, way: str, traced: int, step: int = 1) -> list[str]:
    """Interrupt at every `step`-th line, and return those that left something behind."""
    assert_works(kind, made(kind))  # what is done once in a process is not worth tracing
    run(KINDS[kind], made(kind), way, Tracer(), traced)
    counter = Tracer()
    run(KINDS[kind], made(kind), way, counter, traced)
    assert counter.count > 20
    found = (interrupted(kind, way, traced, at) for at in range(1, counter.count + 1, step))
    return [left for left in found if left]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("kind", "step"),
    [
        ("small", 5),
        pytest.param("small", 1, marks=pytest.mark.stress),
        pytest.param("large", 1, marks=pytest.mark.stress),
    ],
)
def test_while_attaching_and_detaching(kind: str, step: int, way: str) -> None:
    assert interrupt_everywhere(kind, way, 0, step) == []


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.stress), 89])
def test_inside_a_batch(step: int, number: int, way: str) -> None:
    assert interrupt_everywhere("small", way, number, step) == []


@pytest.mark.stress
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize(("kind", "step"), [("large", 30), ("unit", 30), ("packing", 10)])
def test_inside_a_batch_with_replays(kind: str, step: int, number: int, way: str) -> None:
    """Some lines, since there are tens of thousands and each takes a batch."""
    assert interrupt_everywhere(kind, way, number, step) == []


@pytest.mark.parametrize("way", WAYS)
def test_while_the_rows_of_a_later_batch_are_asked_for(way: str) -> None:
    assert interrupt_everywhere("packing", way, 2, step=211) == []


def score_candidates(engine: DotProductEngine, model: nn.Module, tracer: Tracer) -> None:
    """Score twice while the engine is attached; the second time is traced."""
    for traced_now in (nullcontext(), tracer.tracing()):
        with traced_now, engine.scoring():
            engine.score(lambda: curved(model(KINDS["small"].inputs())), range(N), gram=True)


@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.stress), 29])
def test_while_candidates_are_scored(step: int) -> None:
    """The parameters that were frozen are not, at once, and the engine goes on."""
    model = made("small")
    engine = DotProductEngine(model)
    engine.add_direction("d", {name: p.detach() for name, p in model.named_parameters()})
    with engine:
        counter = Tracer()
        score_candidates(engine, model, counter)
        found, left = traces(model), []
        for at in range(1, counter.count + 1, step):
            tracer = Tracer(at)
            with pytest.raises(KeyboardInterrupt):
                score_candidates(engine, model, tracer)
            if wrong := open_modes() or "".join(_changed(found, traces(model))):
                left.append(f"{tracer.where}: {wrong}")
            close_modes()
        with engine.batch(range(N)) as batch:
            curved(model(KINDS["small"].inputs())).sum().backward()
    assert left == []
    assert batch.result.verified


def _changed(found: dict[str, object], now: dict[str, object]) -> list[str]:
    return [key for key in found if found[key] != now[key]]
