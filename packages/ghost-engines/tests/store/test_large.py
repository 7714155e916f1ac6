"""Stores of very many shards, and of shards that are large."""

import os
import resource
import subprocess
import sys
import textwrap

import pytest
import torch
from store_kit import FakeEngine, batch

from ghost_engines.store import GradientStore, StoredRows

N = 70_000
"""More shards than a process can have maps, 65,530 by default, and than files it can open."""


@pytest.mark.stress
def test_more_shards_than_can_be_mapped_are_read_at_once(tmp_path, monkeypatch):
    rows = batch(0, N)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)  # takes minutes, and shows nothing here
        with GradientStore.create(tmp_path / "g", FakeEngine(), unit=1) as store:
            store.append(rows, loss=rows.ids / 7)
    store = GradientStore.open(tmp_path / "g")
    assert torch.equal(store.ids, rows.ids)
    assert torch.equal(store.losses, rows.ids / 7)
    assert torch.equal(store.rows(), rows.rows)
    blocks = list(store.blocks())
    assert len(blocks) == N
    assert torch.equal(torch.cat([block.rows for block in blocks]), rows.rows)
    assert store.search(rows.rows[:1], k=1).ids.shape == (1, 1)


def test_mapped_shards_keep_no_file_open(tmp_path, monkeypatch):
    monkeypatch.setattr("ghost_engines.store.tensor_files._WORTH_MAPPING", 0)
    rows = batch(0, 40)
    with GradientStore.create(tmp_path / "g", FakeEngine(), unit=1) as store:
        store.append(rows)
    store = GradientStore.open(tmp_path / "g")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, hard))
    try:
        blocks = list(store.blocks())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert torch.equal(torch.cat([block.rows for block in blocks]), rows.rows)


MEASURE = r"""
    import re, sys
    from pathlib import Path

    import torch
    from ghost_engines.store import GradientStore, StoredRows

    class Engine:
        k_total, dtype = 4096, torch.float32

        def manifest(self):
            return {}

    def peak():
        return int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1])

    torch.set_num_threads(1)
    unit = 8192
    rows = torch.randn(256, 4096)
    before = peak()
    with GradientStore.create(sys.argv[1], Engine(), unit=unit) as store:
        for start in range(0, 3 * unit, len(rows)):
            store.append(StoredRows(torch.arange(start, start + len(rows)), rows, None))
    print((peak() - before) / (unit * 4096 * 4 / 1024))
"""


@pytest.mark.stress
def test_a_writer_keeps_one_unit_in_memory(tmp_path):
    script = textwrap.dedent(MEASURE)
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "g")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert 0.9 < float(done.stdout) < 1.4


def test_a_batch_may_be_larger_than_many_units(tmp_path):
    rows = batch(0, 1000)
    with GradientStore.create(tmp_path / "g", FakeEngine(), unit=400) as store:
        store.append(rows)
        assert (len(store), store.committed) == (1000, 800)
        store.append(StoredRows(rows.ids[:1] - 1, rows.rows[:1], None))
    assert torch.equal(GradientStore.open(tmp_path / "g").rows(0, 1000), rows.rows)
