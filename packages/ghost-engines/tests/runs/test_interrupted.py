"""Ctrl-C at any line while a run chooses, credits and saves: the loop is as it was, and goes on."""

import pytest
import torch
from interrupt_kit import EVERYWHERE, Interrupt, Listed, attempts
from run_kit import INPUTS, losses_of, make, validation_of

from ghost_core.testing.snapshots import traces
from ghost_engines import Run, RunConfig, ScoreLog

STEPS = 4
CHOOSES = {"policy": {"top_k": {"k": 3}}, "refresh": 3}
PROJECTS = {"method": ["projection", "dot_product"], "options": {"projection": {"dim": 4}}}


class Loop:
    """A training loop in a folder, from its checkpoint if there is one.

    Attributes:
        model: Its model.
        run: Its run.
    """

    def __init__(self, folder, fields):
        self.model, self.optimizer = make()
        self.folder, config = folder, RunConfig(folder=folder, log_every=1, history=2, **fields)
        self.run = Run(
            self.model, self.optimizer, config, directions={"val": validation_of(self.model)}
        )
        self.found = self.traces()

    def traces(self):
        hooks = [
            *self.optimizer._optimizer_step_pre_hooks,
            *self.optimizer._optimizer_step_post_hooks,
        ]
        return traces(self.model) | {"steps": hooks}

    def go(self):
        """Train to the end."""
        saved = {"model": self.model, "optimizer": self.optimizer}
        with self.run as run:
            for step in range(run.resume(**saved), STEPS):
                ids = torch.arange(6) * 3 + step
                if run.config.policy is not None:
                    ids = run.select(lambda ids=ids: losses_of(self.model, INPUTS[ids]), ids).ids
                with run.batch(ids):
                    losses_of(self.model, INPUTS[ids]).mean().backward()
                self.optimizer.step()
                self.optimizer.zero_grad()
                run.record(at=step)
                if run.steps % 2 == 0:
                    run.save(**saved)

    def left(self):
        """Return what an interrupt has left behind; nothing if nothing."""
        stacks = torch._C._len_torch_dispatch_stack(), torch._C._len_torch_function_stack()
        if any(stacks) or not torch.is_grad_enabled():
            close_modes()  # so that the next interrupt is judged by itself
            return f"modes are open: {stacks}, or gradients are off"
        now = self.traces()
        return ", ".join(name for name in now if now[name] != self.found[name])

    def outcome(self):
        log = [
            (e.step, e.ids.tolist(), e.values.tolist()) for e in ScoreLog.open(self.folder / "log")
        ]
        metrics = (self.folder / "metrics.jsonl").read_text()
        return [each.tolist() for each in self.model.parameters()], log, metrics


def close_modes():
    while torch._C._len_torch_dispatch_stack():
        torch._C._pop_torch_dispatch_stack(None)
    while torch._C._len_torch_function_stack():
        torch._C._pop_torch_function_stack()
    torch.set_grad_enabled(True)


CASES = [
    pytest.param(CHOOSES, 500, id="chooses"),
    pytest.param(CHOOSES, 1, marks=pytest.mark.stress, id="chooses-each-line"),
    pytest.param(PROJECTS, 3, marks=pytest.mark.stress, id="projects"),
]


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")  # a `with` that ended as it began
@pytest.mark.parametrize(("fields", "stride"), CASES)
def test_a_run_that_was_interrupted_leaves_no_trace_and_goes_on_as_one(tmp_path, fields, stride):
    """Before one of the runs of each line of the code, or of so many of them."""
    whole = Loop(tmp_path / "whole", fields)
    whole.go()
    with Listed(EVERYWHERE) as listed:
        Loop(tmp_path / "listed", fields).go()
    wrong, interrupted = [], 0
    for at in listed.one_of_each()[::stride]:
        loop = Loop(tmp_path / f"{at}", fields)
        interrupt = Interrupt(at, EVERYWHERE)
        try:
            with interrupt:
                loop.go()
        except KeyboardInterrupt:
            interrupted += 1
        except BaseException as error:
            wrong.append(f"{interrupt.where}: {error!r}")
        if left := loop.left():
            wrong.append(f"{interrupt.where}: {left}")
        del loop
        again = Loop(tmp_path / f"{at}", fields)
        try:
            again.go()
            same = again.outcome() == whole.outcome()
        except BaseException as error:
            wrong.append(f"{interrupt.where}: then {error!r}")
            continue
        if not same:
            wrong.append(f"{interrupt.where}: goes on as another")
    assert wrong == []
    assert interrupted > 4


@pytest.mark.stress
def test_nothing_is_left_where_a_run_is_entered_or_left(tmp_path):
    """At each line, in order: which run of a line is interrupted is no matter of luck."""
    with Loop(tmp_path / "before", CHOOSES).run:
        pass
    wrong = []
    for interrupt in attempts(1, EVERYWHERE):
        loop = Loop(tmp_path / f"{interrupt.at}", CHOOSES)
        try:
            with interrupt, loop.run:
                pass
        except KeyboardInterrupt:
            pass
        if left := loop.left():
            wrong.append(f"{interrupt.where}: {left}")
    assert wrong == []
