"""What a score log gives back, and what it refuses."""

import copy
import errno
import gc
import logging
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fork_kit import CALLS
from hypothesis import given, settings
from hypothesis import strategies as st
from log_kit import NAMES, UNIT, assert_holds, fill, make, step
from torch import nn

from ghost_engines import DotProductEngine, InRunValues, ScoreLog, StoreError
from ghost_engines.store import DamagedStoreError
from ghost_engines.values import CreditedStep


def shards(root):
    return sorted(root.rglob("*.safetensors"))


@pytest.mark.parametrize("unit", [1, UNIT, 65_536])
def test_steps_come_back_as_they_were(tmp_path, unit):
    make(tmp_path / "log", 40, unit)
    log = ScoreLog.open(tmp_path / "log")
    assert_holds(log, [0] * 40)
    assert (log.first, log.last, log.committed, log.directions) == (1, 40, 40, NAMES)
    assert len(shards(tmp_path)) == {1: 40, UNIT: 5, 65_536: 1}[unit]
    log.verify()
    assert repr(log) == f"<ScoreLog: {tmp_path / 'log'}, steps 1 to 40>"
    assert log.size_on_disk == sum(path.stat().st_size for path in shards(tmp_path))


def test_an_empty_log_is_one(tmp_path):
    make(tmp_path / "log", 0)
    log = ScoreLog.open(tmp_path / "log")
    assert_holds(log, [])
    assert (log.first, log.last, log.directions) == (None, None, ())
    assert len(log.totals()) == 0
    with ScoreLog.resume(tmp_path / "log", after=0) as log:
        fill(log, 3)
    assert_holds(ScoreLog.open(tmp_path / "log"), [0] * 3)


def test_steps_are_acknowledged_once_a_shard_is_full_or_after_a_commit(tmp_path):
    with ScoreLog.create(tmp_path / "log", unit=UNIT) as log:
        fill(log, 3)
        assert (log.last, log.committed) == (3, None)
        assert len(ScoreLog.open(tmp_path / "log")) == 0
        assert_holds(log, [0] * 3)  # the writer sees all
        log.commit()
        assert log.committed == 3
        reader = ScoreLog.open(tmp_path / "log")
        fill(log, 20)
        assert 3 < log.committed < 20
        assert_holds(reader, [0] * 3)  # as it was when it was opened
        assert_holds(log, [0] * 20)
    assert log.committed == 20
    assert_holds(log, [0] * 20)


def test_what_is_appended_is_copied(tmp_path):
    given = step(3)
    with ScoreLog.create(tmp_path / "log") as log:
        log.append(given)
        given.values.zero_()
        given.ids.zero_()
    (found,) = log
    assert torch.equal(found.values, step(3).values)
    assert torch.equal(found.ids, step(3).ids)


def test_a_writer_keeps_the_steps_of_one_shard_in_memory(tmp_path):
    def kept():
        gc.collect()
        return sum(isinstance(each, CreditedStep) for each in gc.get_objects())

    before = kept()
    with ScoreLog.create(tmp_path / "log", unit=UNIT) as log:
        most = 0
        for number in range(1, 101):
            log.append(step(number))
            most = max(most, kept() - before) if number % 25 == 0 else most
    assert 0 < most < UNIT


# Resuming


@pytest.mark.parametrize("after", range(0, 41, 4))
def test_the_run_that_goes_on_is_what_counts(tmp_path, after, caplog):
    make(tmp_path / "log", 40)
    with caplog.at_level(logging.WARNING), ScoreLog.resume(tmp_path / "log", after=after) as log:
        assert_holds(log, [0] * after)
        assert log.committed == (after or None)
        assert_holds(ScoreLog.open(tmp_path / "log"), [0] * after)
        fill(log, 45, run=1)
    said = [record.message for record in caplog.records]
    assert len(said) == (after < 40)
    assert all(f"the steps after {after}, up to 40, are dropped" in each for each in said)
    log = ScoreLog.open(tmp_path / "log")
    assert_holds(log, [0] * after + [1] * (45 - after))
    log.verify()


def test_shards_do_not_depend_on_interruptions(tmp_path):
    make(tmp_path / "whole", 40)
    make(tmp_path / "parts", 13)
    for after, last in ((13, 22), (17, 30), (30, 40)):
        with ScoreLog.resume(tmp_path / "parts", after=after) as log:
            fill(log, last)
    for left, right in zip(shards(tmp_path / "whole"), shards(tmp_path / "parts"), strict=True):
        assert left.stat().st_size == right.stat().st_size
    whole, parts = (ScoreLog.open(tmp_path / name).totals() for name in ("whole", "parts"))
    for name, column in whole.columns().items():
        np.testing.assert_array_equal(parts.columns()[name], column, strict=True)


RUNS = st.lists(
    st.tuples(st.integers(0, 30), st.lists(st.booleans(), max_size=25)), min_size=1, max_size=4
)
"""Runs: the step that each resumes after, and for each step it makes whether it commits then."""


@settings(max_examples=12, deadline=None, derandomize=True)
@given(unit=st.integers(1, 40), runs=RUNS)
def test_whatever_is_done_to_a_log_it_holds_the_steps_of_the_run_that_went_on(unit, runs):
    run_one_after_the_other(unit, runs)


@pytest.mark.stress
@settings(max_examples=200, deadline=None, derandomize=True)
@given(unit=st.integers(1, 40), runs=RUNS)
def test_whatever_else_is_done_to_a_log(unit, runs):
    run_one_after_the_other(unit, runs)


def run_one_after_the_other(unit, runs):
    """Each run resumes after a step, makes some, and commits after those that are true."""
    made = []
    with tempfile.TemporaryDirectory() as root:
        ScoreLog.create(Path(root), unit=unit).close()
        for run, (wanted, commits) in enumerate(runs):
            after = min(wanted, len(made))
            with ScoreLog.resume(root, after=after) as log:
                made = made[:after]
                for committed in commits:
                    made.append(run)
                    log.append(step(len(made), run))
                    if committed:
                        log.commit()
                        assert log.committed == len(made)
                assert_holds(log, made)
            assert_holds(ScoreLog.open(root), made)
        log = ScoreLog.open(root)
        log.verify()
        sizes = [1 + len(each.ids) for each in log]
        assert len(shards(Path(root))) == shards_of(sizes, unit)


def shards_of(sizes, unit):
    """Return how many shards steps of these sizes take."""
    count, filled = 0, unit
    for size in sizes:
        if filled >= unit:
            count, filled = count + 1, 0
        filled += size
    return count


def test_a_log_that_ends_before_the_checkpoint_is_refused(tmp_path):
    make(tmp_path / "log", 7)
    with pytest.raises(StoreError, match=r"ends with step 7, before step 9\nReason: .*\nRemedy: "):
        ScoreLog.resume(tmp_path / "log", after=9)
    with ScoreLog.resume(tmp_path / "log", after=7) as log:
        assert_holds(log, [0] * 7)


def test_directions_may_be_others_once_nothing_is_left_of_the_old(tmp_path):
    other = replace(step(6), values=step(6).values[:, :1], directions=("new",))
    with ScoreLog.create(tmp_path / "log") as log:
        log.append(replace(step(5), values=torch.zeros(0, 2, dtype=torch.float64)))
        log.append(step(6))
        with pytest.raises(StoreError, match=r"step 7 has directions new; those .* val, test\n"):
            log.append(replace(other, step=7))
    with ScoreLog.resume(tmp_path / "log", after=5) as log:
        assert log.directions == ()
        log.append(other)
    assert ScoreLog.open(tmp_path / "log").directions == ("new",)


# Sums


def test_totals_are_sums_over_all_steps(tmp_path):
    table = ScoreLog.open(make(tmp_path / "log", 40)).totals()
    seen, values = {}, {}
    for number in range(1, 41):
        each = step(number)
        for sample, value in zip(each.ids.tolist(), each.values.tolist(), strict=True):
            seen.setdefault(sample, []).append((number, each.altered))
            values.setdefault(sample, []).append(value)
    assert table.ids.tolist() == list(values)
    for at, sample in enumerate(values):
        np.testing.assert_allclose(table.values[at], np.sum(values[sample], 0), rtol=1e-14)
        steps, altered = zip(*seen[sample], strict=True)
        assert table.counts[at].tolist() == [len(steps), steps[0], steps[-1], sum(altered)]
    assert table.steps.tolist() == list(range(1, 41))
    np.testing.assert_allclose(table.by_step.sum(0), table.values.sum(0))
    assert list(table.columns()) == [
        "id", "value_val", "value_test", "times_seen", "first_step", "last_step", "altered"
    ]  # fmt: skip
    assert repr(table) == f"ValueTable({len(values)} samples, 40 steps, K=2 (val, test))"


class Run:
    """Training whose values are logged; batch n is the same in every run."""

    def __init__(self):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.engine = DotProductEngine(self.model)
        val = torch.randn(5, 4)
        self.engine.add_direction("val", lambda: self.model(val).square().mean())
        self.values = InRunValues(self.engine, self.optimizer)

    def train(self, log, last):
        handle = self.values.on_credit(log.append)
        with self.engine:
            for number in range(self.values.steps + 1, last + 1):
                inputs = torch.randn(6, 4, generator=torch.Generator().manual_seed(number))
                self.optimizer.zero_grad()
                with self.engine.batch((torch.arange(6) * number) % 13):
                    self.model(inputs).square().sum().backward()
                self.optimizer.step()
        handle.remove()

    def checkpoint(self):
        parts = (self.model, self.optimizer, self.values)
        return copy.deepcopy([part.state_dict() for part in parts])

    def load(self, checkpoint):
        for part, state in zip((self.model, self.optimizer, self.values), checkpoint, strict=True):
            part.load_state_dict(state)


def test_the_log_of_a_run_that_was_resumed_is_that_of_one_that_was_not(tmp_path):
    """Sums are the values of the run bit for bit, though the log was ahead of the checkpoint."""
    whole, killed, resumed = Run(), Run(), Run()
    with ScoreLog.create(tmp_path / "whole", unit=20) as log:
        whole.train(log, 12)
    with ScoreLog.create(tmp_path / "log", unit=20) as log:
        killed.train(log, 7)
        log.commit()
        checkpoint = killed.checkpoint()
        killed.train(log, 10)
    resumed.load(checkpoint)
    with ScoreLog.resume(tmp_path / "log", after=resumed.values.steps) as log:
        assert log.last == 7
        resumed.train(log, 12)
    for name in ("whole", "log"):
        table = ScoreLog.open(tmp_path / name).totals()
        sums = dict(zip(table.ids.tolist(), table.values[:, 0].tolist(), strict=True))
        assert sums == whole.values.to_dict()
        assert list(table.columns())[:2] == ["id", "value"]


# What is refused


def test_a_step_that_is_there_already_is_refused_and_the_log_is_as_it_was(tmp_path):
    with ScoreLog.create(tmp_path / "log") as log:
        fill(log, 4)
        for number in (4, 2):
            with pytest.raises(StoreError, match=rf"up to 4, and this is step {number}\nReason: "):
                log.append(step(number))
        log.append(step(5))
    assert_holds(ScoreLog.open(tmp_path / "log"), [0] * 5)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"step": 0}, "must be a whole one from 1 on, not 0"),
        ({"step": True}, "not True"),
        ({"step": 2.0}, r"not 2\.0"),
        ({"ids": torch.arange(3)}, r"values must be torch.float64 \[3, 2\], not .* \[4, 2\]"),
        ({"ids": torch.zeros(4)}, r"ids must be torch.int64 \[4\], not torch.float32 \[4\]"),
        ({"values": torch.zeros(4, 2)}, "values must be torch.float64"),
        ({"directions": ("val",)}, r"values must be torch.float64 \[4, 1\]"),
    ],
)
def test_a_step_of_another_kind_is_refused(tmp_path, change, what):
    with ScoreLog.create(tmp_path / "log") as log:
        good = step(9)
        with pytest.raises(StoreError, match=what):
            log.append(SimpleNamespace(**{**vars(good), **change}))
        assert len(log) == 0


def test_opening_what_is_no_log_is_refused(tmp_path):
    make(tmp_path / "log", 3)
    for call in (ScoreLog.open, lambda path: ScoreLog.resume(path, after=0)):
        with pytest.raises(StoreError, match=r"(?s)there is no score log at .*make one"):
            call(tmp_path / "none")
    with pytest.raises(StoreError, match=r"there is a score log at .* already: go on"):
        ScoreLog.create(tmp_path / "log")
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="is a file; a score log is a folder"):
        ScoreLog.create(tmp_path / "file")
    with pytest.raises(StoreError, match="after must be at least 0"):
        ScoreLog.resume(tmp_path / "log", after=-1)
    with pytest.raises(StoreError, match="unit must be at least 1"):
        ScoreLog.create(tmp_path / "new", unit=0)


def test_there_is_one_writer_and_a_reader_is_none(tmp_path):
    with ScoreLog.create(tmp_path / "log") as log:
        with pytest.raises(StoreError, match="another writer has"):
            ScoreLog.resume(tmp_path / "log", after=0)
        log.append(step(1))
    with pytest.raises(StoreError, match=r"not open for writing: ScoreLog\.resume"):
        log.append(step(2))
    with pytest.raises(StoreError, match=r"not open for writing: ScoreLog\.resume"):
        ScoreLog.open(tmp_path / "log").commit()


# Files that fail, and that were damaged


@pytest.mark.parametrize("name", [each for each in CALLS if each != "unlink"])
def test_after_a_failed_write_the_writer_can_go_on(tmp_path, name, monkeypatch):
    real, failed = getattr(os, name), []

    def fails_once(*arguments, **named):
        if not failed:
            failed.append(name)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments, **named)

    with ScoreLog.create(tmp_path / "log") as log:
        fill(log, 4)
        with monkeypatch.context() as patch:
            patch.setattr(os, name, fails_once)
            with pytest.raises(OSError, match="No space left"):
                log.commit()
            with pytest.raises(StoreError, match="do not append them again"):
                log.append(step(5))
            log.commit()
        assert log.committed == 4
        log.append(step(5))
    assert_holds(ScoreLog.open(tmp_path / "log"), [0] * 5)


def test_a_writer_that_cannot_close_says_what_is_lost(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    log = ScoreLog.create(tmp_path / "log")

    def train():
        with log:
            log.append(step(1))
            log.commit()
            log.append(step(2))
            monkeypatch.setattr(os, "fsync", full)
            raise KeyError("training")

    with pytest.raises(KeyError) as caught:
        train()
    assert "and then the last steps could not be written to" in caught.value.__notes__[0]
    monkeypatch.undo()
    assert_holds(log, [0])
    assert_holds(ScoreLog.open(tmp_path / "log"), [0])


def renamed(root):
    shards(root)[1].rename(shards(root)[1].with_name("g-00000009.safetensors"))


def swapped(root):
    first, second, *_ = (path.read_bytes() for path in shards(root))
    shards(root)[0].write_bytes(second)
    shards(root)[1].write_bytes(first)


def foreign(root):
    make(root.parent / "other", 40)
    shards(root)[2].write_bytes(shards(root.parent / "other")[2].read_bytes())


def cut(root):
    os.truncate(shards(root)[2], 100)


def without_manifest(root):
    (root / "log.json").write_text("{}")


def of_the_future(root):
    (root / "log.json").write_text('{"name": "a", "unit": 3, "schema": 2}')


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (renamed, "g-00000001.safetensors is missing"),
        (swapped, "holds unit 1: it was renamed"),
        (foreign, "belongs to another log"),
        (cut, "is cut off or not a shard"),
        (without_manifest, "is not a log's manifest"),
        (of_the_future, "has format version 2, this version of ghost reads 1"),
    ],
)
def test_damage_is_found_when_a_log_is_opened(tmp_path, damage, what):
    damage(make(tmp_path / "log", 40))
    for call in (ScoreLog.open, lambda path: ScoreLog.resume(path, after=1)):
        with pytest.raises(StoreError, match=what):
            call(tmp_path / "log")


def test_altered_numbers_are_found(tmp_path):
    root = make(tmp_path / "log", 40)
    for at in (1, -1):
        data = bytearray(shards(root)[at].read_bytes())
        data[-1] ^= 1
        shards(root)[at].write_bytes(data)
    with pytest.raises(DamagedStoreError, match=r"00000001.* was altered(.|\n)*00000004"):
        ScoreLog.open(root).verify()
    with pytest.raises(DamagedStoreError, match=r"00000004.* was altered"):
        ScoreLog.resume(root, after=40)  # the writer would give what is in it a new hash
