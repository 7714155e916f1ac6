"""Logs and tables of several processes, read as those of one."""

import json
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from log_kit import NAMES, make, same, step

from ghost_core import CaptureError
from ghost_engines import JoinedLog, ScoreLog, StoreError, ValueTable, cli
from ghost_engines.store import DamagedStoreError

LAST = 30


def of(rank, number):
    """Return what a step credits in one of two processes; ids of 0 and 3 are in both."""
    whole = step(number)
    ours = [at for at, each in enumerate(whole.ids.tolist()) if each % 3 == 0 or each % 2 == rank]
    return replace(whole, ids=whole.ids[ours], values=whole.values[ours] * (1 + rank))


@pytest.fixture
def root(tmp_path):
    for rank in range(2):
        with ScoreLog.create(tmp_path / "logs" / str(rank), unit=24) as log:
            for number in range(1, LAST + 1):
                log.append(of(rank, number))
    return tmp_path / "logs"


def test_steps_have_the_samples_of_all(root):
    log = JoinedLog.open(root)
    assert (log.first, log.last, len(log), log.directions) == (1, LAST, LAST, NAMES)
    assert repr(log) == f"<JoinedLog: {root}, 2 logs, steps 1 to {LAST}>"
    found = list(log)
    assert [each.step for each in found] == list(range(1, LAST + 1))
    for number, each in enumerate(found, 1):
        parts = of(0, number), of(1, number)
        ids, values = (torch.cat([getattr(p, name) for p in parts]) for name in ("ids", "values"))
        assert same(each, replace(parts[0], ids=ids, values=values))


def test_sums_are_those_of_all_steps(root):
    table, wanted, seen = JoinedLog.open(root).totals(), {}, {}
    for number in range(1, LAST + 1):
        for rank in range(2):
            part = of(rank, number)
            for sample, value in zip(part.ids.tolist(), part.values.numpy(), strict=True):
                wanted[sample] = wanted.get(sample, 0) + value
                seen[sample] = seen.get(sample, 0) + 1
    assert sorted(table.ids) == sorted(wanted)
    for sample, value, times in zip(table.ids, table.values, table.counts[:, 0], strict=True):
        np.testing.assert_allclose(value, wanted[sample], rtol=1e-12)
        assert times == seen[sample]
    joined = ValueTable.union([ScoreLog.open(root / name).totals() for name in "01"])
    order = np.argsort(table.values[:, 0], kind="stable")
    np.testing.assert_array_equal(joined.ids, table.ids[order])
    np.testing.assert_allclose(joined.values, table.values[order], rtol=1e-12)
    np.testing.assert_array_equal(joined.counts[:, :3], table.counts[order][:, :3])
    np.testing.assert_array_equal(joined.steps, table.steps)
    np.testing.assert_allclose(joined.by_step, table.by_step, rtol=1e-12)


def test_the_command_adds_them_up(root, capsys):
    assert cli.main(["values", str(root), "--verify", "--top", "1"]) == 0
    said = capsys.readouterr().out
    assert "verified" in said
    assert any(line.split() == ["steps", str(LAST)] for line in said.splitlines())
    (shard, *_) = sorted((root / "1").rglob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"!")
    assert cli.main(["values", str(root), "--verify"]) == 1
    assert str(shard) in capsys.readouterr().out


def test_steps_that_not_all_have_are_left_out(root, caplog):
    with ScoreLog.resume(root / "0", after=LAST) as log:
        log.append(of(0, LAST + 1))
    with caplog.at_level(logging.WARNING):
        joined = JoinedLog.open(root)
    assert f"steps after {LAST} are left out" in caplog.text
    assert (len(joined), joined.last) == (LAST, LAST)
    assert len(list(joined)) == LAST
    make(root / "2", 0)  # one that has not committed anything
    empty = JoinedLog.open(root)
    assert (len(empty), empty.first, empty.last, list(empty)) == (0, None, None, [])


def test_what_does_not_belong_together_is_refused(root, tmp_path):
    with pytest.raises(StoreError, match="none in the folders inside"):
        JoinedLog.open(tmp_path / "nowhere")
    with ScoreLog.create(root / "2") as log:
        for number in (1, 2, LAST):
            log.append(of(0, number))
    with pytest.raises(DamagedStoreError, match="step 3 is in 2 of the 3 logs"):
        JoinedLog.open(root).totals()
    with ScoreLog.create(root / "3") as log:
        log.append(replace(of(0, 1), directions=("other", "names")))
    with pytest.raises(StoreError, match="they are no logs of one run"):
        JoinedLog.open(root)
    tables = [ScoreLog.open(root / name).totals() for name in "03"]
    with pytest.raises(CaptureError, match="tables to unite must be of the same directions"):
        ValueTable.union(tables)


@pytest.fixture
def two_processes(monkeypatch):
    """Let torch say that there are two."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)


@pytest.mark.parametrize(
    ("there", "missing"), [("0", "1"), ("1", "0"), ("rank-0/log", "rank-1"), ("first", "1 log")]
)
def test_a_log_that_is_missing_is_named(there, missing, tmp_path, two_processes):
    """Also that of the highest rank, which no gap tells of: each log knows how many there are."""
    with ScoreLog.create(tmp_path / there) as log:
        log.append(of(0, 1))
    with pytest.raises(StoreError, match=f"has no log of {missing}|lacks {missing}"):
        JoinedLog.open(tmp_path)
    assert cli.main(["values", str(tmp_path)]) == 2
    with ScoreLog.open(tmp_path / there) as alone:  # each can be read by itself
        assert len(alone) == 1


def test_a_log_that_does_not_say_of_how_many_it_is_is_read(root):
    """As one of an older version."""
    for name in "01":
        manifest = json.loads((root / name / "log.json").read_text())
        assert manifest.pop("processes") == 1
        (root / name / "log.json").write_text(json.dumps(manifest))
    assert len(JoinedLog.open(root)) == LAST


@pytest.mark.parametrize("processes", [0, -1, "2", 1.5, True])
def test_a_number_of_processes_that_is_none_is_damage(processes, root):
    path = root / "0" / "log.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"processes": processes}))
    with pytest.raises(DamagedStoreError, match="was altered: it has processes="):
        ScoreLog.open(root / "0")
