"""A batch belongs to the thread that opened it, whatever others do to the model meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from threading import Thread

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ghost_core import Batch, CaptureError, SamplerRegistry
from ghost_core.capture import Recorder
from ghost_core.testing import GradientHolder, Held, PlainLinear, per_sample_gradients
from ghost_core.tracking import Claim, dotted_name

N, D = 4, 3


class Interrupted(nn.Module):
    """Lets something happen between its layers, once."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(D, D), nn.Linear(D, D)
        self.happening: list[Callable[[], None]] = []

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        if self.happening:
            self.happening.pop()()
        return self.last(x)


class Sampler(PlainLinear):
    """Lets something happen while a call is recorded, and while its gradients are made; once."""

    happening: list[Callable[[], None]]

    def record(self, call):
        return self._run(super().record(call))

    def gradients(self, call, records, grads):
        return self._run(super().gradients(call, records, grads))

    def _run(self, result):
        if self.happening:
            self.happening.pop()()
        return result


def in_thread(run: Callable[[], object]) -> BaseException | None:
    """Run something in another thread, and return what it raised."""
    raised: list[BaseException] = []

    def caught() -> None:
        try:
            run()
        except BaseException as error:
            raised.append(error)

    thread = Thread(target=caught)
    thread.start()
    thread.join()
    return raised[0] if raised else None


def registry() -> SamplerRegistry:
    return SamplerRegistry([Claim(dotted_name(nn.Linear), Sampler, "test")])


@pytest.fixture
def model() -> Interrupted:
    Sampler.happening = []
    return Interrupted().double()


def losses(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().sum(1)


def others(x: Tensor) -> Tensor:
    """Return as many other samples."""
    return x.flip(0) * 2 + 1


def run_with(
    model: Interrupted, x: Tensor, when: str, happens: Callable[[], None], batches: int
) -> Batch[Held]:
    """Run batches, and return the last; something happens in it, at one of these times."""
    engine = GradientHolder(model, registry=registry())
    with engine:
        for number in range(batches):
            last = number == batches - 1
            with engine.batch(range(N)) as batch:
                if last and when == "forward":
                    model.happening.append(happens)
                if last and when == "record":
                    Sampler.happening.append(happens)
                loss = losses(model, x).sum()
                if last and when == "between":
                    happens()
                if last and when == "backward":
                    Sampler.happening.append(happens)
                loss.backward()
    return batch


TIMES = ("forward", "record", "between", "backward")


@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize("when", TIMES)
def test_a_thread_that_evaluates_is_left_alone(
    model, x: Tensor, assert_held, when: str, batches: int
) -> None:
    expected, other = per_sample_gradients(model, losses(model, x)), others(x)[:2]
    with torch.no_grad():
        known = model(other)
    raised: list[BaseException | None] = []

    def evaluate() -> None:
        with torch.no_grad():
            assert torch.equal(model(other), known)

    batch = run_with(model, x, when, lambda: raised.append(in_thread(evaluate)), batches)
    assert raised == [None]
    assert batch.verified
    assert_held(batch.result, expected)


@pytest.mark.parametrize("called", ["model", "part"])
@pytest.mark.parametrize("when", TIMES)
def test_a_thread_that_trains_meanwhile_is_told(
    model, x: Tensor, assert_held, when: str, called: str
) -> None:
    expected, other = per_sample_gradients(model, losses(model, x)), others(x)
    raised: list[BaseException | None] = []

    def train() -> None:
        (model if called == "model" else model.last)(other)

    batch = run_with(model, x, when, lambda: raised.append(in_thread(train)), 2)
    assert isinstance(raised[0], CaptureError)
    assert "called in another thread" in str(raised[0])
    assert "no_grad" in raised[0].remedy
    assert_held(batch.result, expected)


def test_a_paused_model_is_for_all_threads(model, x: Tensor, assert_held) -> None:
    expected = per_sample_gradients(model, losses(model, x))
    engine = GradientHolder(model, registry=registry())
    with engine, engine.batch(range(N)) as batch:
        losses(model, x).sum().backward()
        with engine.paused():
            assert in_thread(lambda: losses(model, others(x)).sum()) is None
    assert_held(batch.result, expected)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_backward_pass_may_run_in_any_thread(
    model, x: Tensor, assert_held, checkpointed: bool
) -> None:
    """As autograd's own threads run it, and what it recomputes, on other devices."""
    expected = per_sample_gradients(model, losses(model, x))

    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x, use_reentrant=False) if checkpointed else model(x)

    root = Root()
    engine = GradientHolder(root, registry=registry())
    with engine, engine.batch(range(N)) as batch:
        loss = losses(root, x).sum()
        assert in_thread(loss.backward) is None
    assert_held(batch.result, {f"inner.{name}": each for name, each in expected.items()})


def test_a_fused_module_that_another_thread_runs_too(x: Tensor, assert_held) -> None:
    """It runs outside of ghost's modes, which its own thread has to come back to."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(D, 1, 4, dropout=0.0, batch_first=True).double().eval()
    layer.requires_grad_(False)
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(D, 2).double())
    inputs, raised = x.unsqueeze(1), []

    def evaluate() -> None:
        with torch.no_grad():
            model(inputs)

    def meanwhile(module: nn.Module, args: object, output: Tensor) -> None:
        if not raised:
            raised.append(None)
            raised.append(in_thread(evaluate))

    expected = per_sample_gradients(model, losses(model, inputs))
    layer.norm1.register_forward_hook(meanwhile)
    engine = GradientHolder(model, registry=registry())
    with engine.frozen(), engine.batch(range(N)) as batch:
        losses(model, inputs).sum().backward()
    assert raised == [None, None]
    assert torch._C._is_torch_function_enabled()
    assert_held(batch.result, expected)


def test_silence_that_an_interrupt_left_is_that_of_its_batch_alone(
    model, x: Tensor, assert_held
) -> None:
    expected = per_sample_gradients(model, losses(model, x))
    engine = GradientHolder(model, registry=registry())
    left = ExitStack()

    def interrupted() -> None:
        with engine.batch(range(N)):
            state = Recorder.of(model)._state
            left.enter_context(state.silence())  # as where Ctrl-C comes at its end
            assert state.paused
            raise KeyboardInterrupt

    with engine, left:
        with pytest.raises(KeyboardInterrupt):
            interrupted()
        with engine.batch(range(N)) as batch:
            losses(model, x).sum().backward()
    assert_held(batch.result, expected)
