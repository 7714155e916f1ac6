"""Writers that are killed lose no row that they acknowledged."""

import os
import signal
import subprocess

import pytest
from fork_kit import run_script, script
from kill_kit import FakeEngine, assert_holds_exactly

from ghost_engines.store import GradientStore, StoreError

# Killed


KILLER = """
    # Forks writers, kills them, and checks after each what is left.
    import itertools, os, random, shutil, signal, struct, sys, time
    from pathlib import Path

    import torch
    from fork_kit import finish, fork, kill_at

    from ghost_engines.store import GradientStore, StoredRows

    K, UNIT, TOTAL = 5, 16, 41
    torch.set_num_threads(1)


    class FakeEngine:
        k_total, dtype = K, torch.float32

        def manifest(self):
            return {"seed": 3}


    def batch(start, stop):
        ordinals = torch.arange(start, stop)
        rows = ordinals[:, None] * 10 + torch.arange(K)
        return StoredRows(ordinals * 3 + 1, rows.float(), ordinals / 2)


    def write_rows(root, total, acknowledge, seed, pause=0.0):
        draw = random.Random(seed)
        if (root / "manifest.json").exists():
            store = GradientStore.resume(root, FakeEngine())
        else:
            store = GradientStore.create(root, FakeEngine(), unit=UNIT)
        acknowledge(store.committed)
        with store:
            while len(store) < total:
                rows = batch(len(store), min(len(store) + draw.randint(1, 12), total))
                store.append(rows, loss=rows.loss)
                acknowledge(store.committed)
                if draw.random() < 0.3:
                    store.commit()
                    acknowledge(store.committed)
                time.sleep(pause)
        acknowledge(store.committed)


    def check(root, at_least):
        if not (root / "manifest.json").exists():
            assert at_least == 0, "acknowledged rows without a manifest"
            return 0
        store = GradientStore.open(root)
        n = len(store)
        assert n >= at_least, f"{at_least} rows were acknowledged, {n} are there"
        expected = batch(0, n)
        assert torch.equal(store.ids, expected.ids), "rows lost, doubled or out of order"
        assert torch.equal(store.rows(), expected.rows)
        assert n == 0 or torch.equal(store.losses, expected.loss)
        store.verify()
        return n


    def at_every_step(root, stride):
        for step in itertools.count(0, stride):
            def killed(acknowledge):
                kill_at(step)
                write_rows(root, TOTAL, acknowledge, seed=1)

            status, acknowledged = finish(*fork(killed))
            check(root, acknowledged)
            if status != 0:
                status, acknowledged = finish(
                    *fork(lambda acknowledge: write_rows(root, TOTAL, acknowledge, seed=2))
                )
                assert status == 0
                assert check(root, acknowledged) == TOTAL
                assert not [path for path in root.rglob("*") if "tmp" in path.name]
                shutil.rmtree(root)
                continue
            assert check(root, acknowledged) == TOTAL
            return step


    def at_random(root, wanted):
        # Goes on until as many writers were killed, and as many rows are there.
        draw, rows, killed = random.Random(0), 0, 0
        for round in range(20 * wanted):
            work = lambda acknowledge: write_rows(root, rows + 300, acknowledge, round, 0.0005)
            pid, reading = fork(work)
            # Its own steps are what a writer is killed after, however long they take.
            seen = b"".join(os.read(reading, 8) for _ in range(draw.randint(0, 12)))
            time.sleep(draw.random() * 0.002)
            os.kill(pid, signal.SIGKILL)
            status, acknowledged = finish(pid, reading)
            at_least = max(acknowledged, rows, *struct.unpack(f"{len(seen) // 8}q", seen), 0)
            killed += status != 0
            rows = check(root, at_least)
            if min(rows, killed) >= wanted:
                return
        raise AssertionError((rows, killed))


    def with_a_child(root):
        # The child outlives the writer, as a data loader's worker may.
        store = GradientStore.create(root, FakeEngine(), unit=UNIT)
        rows = batch(0, 7)
        store.append(rows, loss=rows.loss)
        store.commit()
        if os.fork() == 0:
            try:
                store.append(rows, loss=rows.loss)
            except Exception as error:
                print(type(error).__name__, error, flush=True)
            store.close()
            time.sleep(60)
            os._exit(0)
        time.sleep(60)


    def often(root, stride, wanted):
        at_every_step(root / "steps", stride)
        at_random(root / "random", wanted)


    {"often": often, "child": with_a_child}[sys.argv[1]](
        Path(sys.argv[2]), *map(int, sys.argv[3:])
    )
"""


# The arguments: how many steps there are between kills, and how many kills come at random.
@pytest.mark.parametrize("kills", [(19, 4), pytest.param((1, 500), marks=pytest.mark.stress)])
def test_no_acknowledged_row_is_lost_or_doubled_whenever_a_writer_is_killed(fresh, tmp_path, kills):
    run_script(fresh, KILLER, "often", tmp_path, *kills)


def test_a_forked_child_neither_writes_nor_keeps_the_next_writer_out(tmp_path):
    with subprocess.Popen(
        script(KILLER, "child", tmp_path / "g"),
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as writer:
        try:
            said = writer.stdout.readline()
            assert "StoreError" in said
            assert "belongs to the process that this one was forked from" in said
            with pytest.raises(StoreError, match="another writer"):
                GradientStore.resume(tmp_path / "g", FakeEngine())
            writer.kill()
            writer.wait()
            with GradientStore.resume(tmp_path / "g", FakeEngine()) as store:
                assert_holds_exactly(store, 7)
        finally:
            os.killpg(writer.pid, signal.SIGKILL)
