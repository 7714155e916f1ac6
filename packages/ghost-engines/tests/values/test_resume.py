"""Values after save, kill and resume are bit for bit those of an uninterrupted run."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from ghost_core import CaptureError
from ghost_engines import DotProductEngine, InRunValues, adam_aware

STEPS = 9


def train(path, until=STEPS, kill=False):
    """Train from the checkpoint at a path, if there is one; save one after every other step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.2), nn.Linear(6, 2))
    inputs, validation = torch.randn(40, 4), torch.randn(8, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.5)
    engine = DotProductEngine(model)

    def loss():
        return model(validation).square().mean()

    engine.add_direction("seldom", loss, refresh=4)
    engine.add_direction("adam", loss, transform=adam_aware(optimizer))
    values = InRunValues(engine, optimizer, history=2)
    saved = {"model": model, "optimizer": optimizer, "schedule": schedule, "values": values}
    first = 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        for name, each in saved.items():
            each.load_state_dict(state[name])
        torch.set_rng_state(state["rng"])
        first = state["step"]
    with engine, values:
        for step in range(first, until):
            ids = [(7 * step + at) % 40 for at in range(8)]
            optimizer.zero_grad()
            with engine.batch(ids):
                model(inputs[ids]).square().sum().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            schedule.step()
            if step % 2:
                state = {name: each.state_dict() for name, each in saved.items()}
                state |= {"rng": torch.get_rng_state(), "step": step + 1}
                torch.save(state, path.with_suffix(".new"))
                os.replace(path.with_suffix(".new"), path)
        if kill:
            os.kill(os.getpid(), signal.SIGKILL)
    return values


def same(one, other):
    for direction in ("seldom", "adam"):
        assert one.to_dict(direction) == other.to_dict(direction)
        assert any(one.to_dict(direction).values())
    for normalised in (False, True):
        tables = one.table(normalised=normalised), other.table(normalised=normalised)
        for name in ("ids", "values", "counts", "steps", "by_step"):
            assert (getattr(tables[0], name) == getattr(tables[1], name)).all(), name
    found, expected = one.history.columns(), other.history.columns()
    assert all((found[name] == expected[name]).all() for name in expected)
    assert repr(one) == repr(other)


@pytest.mark.parametrize("until", [2, 5, 6])
def test_resumed_values_are_those_of_one_run(until, tmp_path):
    """A process that ends after an odd step lost what it did since its checkpoint."""
    whole = train(tmp_path / "whole.pt")
    train(tmp_path / "run.pt", until)
    same(train(tmp_path / "run.pt"), whole)


@pytest.mark.stress
@pytest.mark.parametrize("until", range(2, STEPS))
def test_killed_processes_are_gone_on_with(until, tmp_path):
    code = (
        "import test_resume, pathlib, sys; test_resume.train(pathlib.Path(sys.argv[1]), {}, True)"
    )
    killed = subprocess.run(
        [sys.executable, "-c", code.format(until), str(tmp_path / "run.pt")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])},
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    same(train(tmp_path / "run.pt"), train(tmp_path / "whole.pt"))


def test_batches_that_waited_for_a_step_are_skipped_and_said(mlp, caplog):
    def new():
        optimizer = torch.optim.SGD(mlp.parameters(), lr=0.1)
        engine = DotProductEngine(mlp)
        ones = {name: torch.ones_like(each) for name, each in mlp.named_parameters()}
        engine.add_direction("ones", ones)
        return engine, optimizer, InRunValues(engine, optimizer)

    def batch(engine, *ids):
        with engine.batch(ids):
            mlp(torch.ones(len(ids), 5, dtype=torch.float64)).square().sum().backward()

    engine, optimizer, values = new()
    with engine:
        batch(engine, 0, 1)
        optimizer.step()
        optimizer.zero_grad()
        batch(engine, 2, 3)
        state = values.state_dict()
    optimizer.zero_grad()
    engine, optimizer, values = new()
    values.load_state_dict(state)
    assert "while 1 batches waited for a step" in caplog.text
    assert values.skipped_batches == 1
    assert values.steps == 1
    with pytest.raises(ValueError, match="gradients of its batch were thrown away"):
        values[2]
    with engine:
        batch(engine, 4)
        optimizer.step()
    assert values.to_dict().keys() == {0, 1, 4}
    assert values.steps == 2


@pytest.mark.parametrize("lacking", [("sums",), ("sums", "run", "history", "engine")])
def test_a_state_that_lacks_something_is_refused(lacking, mlp, draw_directions):
    engine = DotProductEngine(mlp)
    engine.add_direction("a", draw_directions(mlp, 1)["random 0"])
    values = InRunValues(engine, torch.optim.SGD(mlp.parameters(), lr=0.1))
    state = {name: each for name, each in values.state_dict().items() if name not in lacking}
    with pytest.raises(CaptureError, match=f"it lacks {', '.join(lacking)}\n") as caught:
        values.load_state_dict(state)
    assert "state_dict()" in caught.value.remedy


def test_the_state_of_other_directions_is_refused(mlp, draw_directions):
    optimizer = torch.optim.SGD(mlp.parameters(), lr=0.1)
    found = []
    for names in (("a",), ("a", "b")):
        engine = DotProductEngine(mlp)
        for name in names:
            engine.add_direction(name, draw_directions(mlp, 1)["random 0"])
        found.append(InRunValues(engine, optimizer))
    with pytest.raises(CaptureError, match="the state is of directions a, and these values are of"):
        found[1].load_state_dict(found[0].state_dict())
