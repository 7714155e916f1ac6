"""Writers that are killed, disks that fill up, and what is left of the store."""

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from ghost_engines.store import GradientStore, StoredRows, StoreError

K = 5
UNIT = 16
TOTAL = 41
STEPS = ("open", "write", "fsync", "replace", "mkdir")
"""The functions of `os` that a write is made of."""


@dataclass
class FakeEngine:
    k_total: int = K
    dtype: torch.dtype = torch.float32

    def manifest(self) -> dict[str, Any]:
        return {"seed": 3}


def batch(start: int, stop: int) -> StoredRows:
    ordinals = torch.arange(start, stop)
    rows = ordinals[:, None] * 10 + torch.arange(K)
    return StoredRows(ordinals * 3 + 1, rows.float(), ordinals / 2)


def append(store: GradientStore, stop: int) -> None:
    rows = batch(len(store), stop)
    store.append(rows, loss=rows.loss)


def assert_holds_exactly(store: GradientStore, n: int) -> None:
    expected = batch(0, n)
    assert len(store) == store.committed == n
    assert torch.equal(store.ids, expected.ids)
    assert torch.equal(store.rows(), expected.rows)
    assert store.losses is None or torch.equal(store.losses, expected.loss)
    store.verify()


def leftovers(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if "tmp" in path.name]


# Killed

KILLER = """
    # Forks writers, kills them, and checks after each what is left. Forking costs nothing, starting
    # Python with torch takes seconds.
    import itertools, os, random, shutil, signal, struct, sys, time
    from pathlib import Path

    import torch

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


    real_write = os.write


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


    def kill_at(step):
        # Dies before the given system call of a write; a write call has written half by then.
        calls = itertools.count()

        def dying(name, real):
            def call(*arguments, **named):
                if next(calls) == step:
                    if name == "write":
                        descriptor, data = arguments
                        real(descriptor, data[: len(data) // 2])
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*arguments, **named)

            return call

        for name in ("open", "write", "fsync", "replace", "mkdir"):
            setattr(os, name, dying(name, getattr(os, name)))


    def fork(work):
        # Returns the child's pid and the end of a pipe on which it acknowledges rows.
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                os.close(reading)
                work(lambda n: real_write(writing, struct.pack("q", n)))
                status = 0
            finally:
                os._exit(status)
        os.close(writing)
        return pid, reading


    def finish(pid, reading):
        # Returns the child's exit status and the last number that it acknowledged.
        acknowledged = 0
        with open(reading, "rb") as pipe:
            while len(packed := pipe.read(8)) == 8:
                acknowledged = struct.unpack("q", packed)[0]
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert status in (0, -signal.SIGKILL), status
        return status, acknowledged


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


    {"steps": at_every_step, "random": at_random, "child": with_a_child}[sys.argv[1]](
        Path(sys.argv[2]), *map(int, sys.argv[3:])
    )
"""


def killer(*arguments: object) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(KILLER), *map(str, arguments)]


def run_killer(*arguments: object, timeout: float = 600) -> None:
    done = subprocess.run(killer(*arguments), capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr


def test_no_acknowledged_row_is_lost_or_doubled_whatever_step_a_writer_is_killed_at(tmp_path):
    run_killer("steps", tmp_path / "g", 3)


def test_no_acknowledged_row_is_lost_or_doubled_whenever_a_writer_is_killed(tmp_path):
    run_killer("random", tmp_path / "g", 12)


@pytest.mark.stress
def test_no_acknowledged_row_is_lost_or_doubled_in_many_kills(tmp_path):
    run_killer("steps", tmp_path / "steps", 1)
    run_killer("random", tmp_path / "random", 500)


def test_a_forked_child_neither_writes_nor_keeps_the_next_writer_out(tmp_path):
    with subprocess.Popen(
        killer("child", tmp_path / "g"), stdout=subprocess.PIPE, text=True, start_new_session=True
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


# Failing disks


@dataclass
class Failing:
    """Makes the n-th call of one function of `os` fail, and all later ones while `broken`."""

    name: str
    at: int
    calls: int = 0
    broken: bool = True

    def replacement(self) -> Callable[..., Any]:
        real = getattr(os, self.name)

        def call(*arguments: Any, **named: Any) -> Any:
            self.calls += 1
            if self.calls > self.at and self.broken:
                if self.name == "write":
                    descriptor, data = arguments
                    real(descriptor, data[: len(data) // 2])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*arguments, **named)

        return call


@contextmanager
def failing(name: str, at: int) -> Iterator[Failing]:
    state = Failing(name, at)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, name, state.replacement())
        yield state


@pytest.mark.parametrize("name", STEPS)
def test_after_a_failed_write_the_writer_can_go_on(tmp_path, name):
    for at in range(100):
        root = tmp_path / f"{name}{at}"
        store = GradientStore.create(root, FakeEngine(), unit=UNIT)
        with store, failing(name, at) as disk:
            failed = False
            for stop in (5, 14, 36, 38, TOTAL):
                try:
                    append(store, stop)
                    store.commit()
                except OSError:
                    failed = True
                    assert len(store) == stop
                    left = GradientStore.open(root)
                    assert len(left) >= store.committed
                    assert_holds_exactly(left, len(left))
                    disk.broken = False
                    with pytest.raises(StoreError, match="do not append them again"):
                        append(store, stop + 1)
                    store.commit()
                    assert store.committed == stop
        assert_holds_exactly(GradientStore.open(root), TOTAL)
        assert leftovers(root) == []
        if not failed:
            break
    assert at > 0
    assert not failed


@pytest.mark.parametrize("name", STEPS)
def test_after_a_disk_stays_full_the_store_can_be_read_and_resumed(tmp_path, name):
    for at in range(100):
        root = tmp_path / f"{name}{at}"
        store = GradientStore.create(root, FakeEngine(), unit=UNIT)
        acknowledged, failure = 0, None
        with failing(name, at):
            try:
                with store:
                    for stop in (5, 14, 36, 38, TOTAL):
                        append(store, stop)
                        acknowledged = store.committed
                        store.commit()
                        acknowledged = store.committed
            except OSError as error:
                failure = error
        left = GradientStore.open(root)
        assert len(left) >= store.committed >= acknowledged
        assert_holds_exactly(left, len(left))
        with GradientStore.resume(root, FakeEngine()) as store:
            if len(store) < TOTAL:
                append(store, TOTAL)
        assert_holds_exactly(GradientStore.open(root), TOTAL)
        assert leftovers(root) == []
        if failure is None:
            break
        assert failure.errno == errno.ENOSPC
        assert "then the last rows could not be written" in failure.__notes__[0]
    assert at > 0
    assert failure is None


@pytest.mark.parametrize("name", ["open", "write", "fsync", "replace"])
def test_a_create_that_failed_can_be_repeated(tmp_path, name):
    for at in range(20):
        root = tmp_path / "new" / f"{name}{at}"
        try:
            with failing(name, at):
                GradientStore.create(root, FakeEngine(), unit=UNIT).close()
        except OSError:
            if not (root / "manifest.json").exists():
                with GradientStore.create(root, FakeEngine(), unit=UNIT) as store:
                    append(store, TOTAL)
            else:
                with GradientStore.resume(root, FakeEngine()) as store:
                    append(store, TOTAL)
            assert_holds_exactly(GradientStore.open(root), TOTAL)
        else:
            break
    assert at > 0


def test_a_file_that_may_not_grow_is_an_error_and_loses_nothing(tmp_path):
    with GradientStore.create(tmp_path / "g", FakeEngine(), unit=UNIT) as store:
        append(store, 14)
        store.commit()
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
        try:
            with pytest.raises(OSError, match="File too large"):
                append(store, TOTAL)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert_holds_exactly(GradientStore.open(tmp_path / "g"), 14)
        assert leftovers(tmp_path / "g") == []
    assert_holds_exactly(GradientStore.open(tmp_path / "g"), TOTAL)


def test_a_failed_commit_never_hides_the_first_exception(tmp_path, caplog):
    def interrupted(disk: Failing) -> None:
        with GradientStore.create(tmp_path / "g", FakeEngine(), unit=UNIT) as store:
            append(store, 5)
            disk.at = 0
            raise ZeroDivisionError

    with failing("fsync", 1000) as disk, pytest.raises(ZeroDivisionError) as caught:
        interrupted(disk)
    assert "could not be written" in caught.value.__notes__[0]
    assert "No space left" in caught.value.__notes__[0]
    assert "could not be written" in caplog.text
    with GradientStore.resume(tmp_path / "g", FakeEngine()) as store:
        assert_holds_exactly(store, 0)


def test_a_failed_commit_at_the_end_is_an_error(tmp_path):
    store = GradientStore.create(tmp_path / "g", FakeEngine(), unit=UNIT)
    append(store, 5)
    with failing("fsync", 0), pytest.raises(OSError, match="No space left"):
        store.close()
    assert len(store) == 0
    GradientStore.resume(tmp_path / "g", FakeEngine()).close()


def test_a_folder_that_is_removed_is_not_made_anew(tmp_path):
    store = GradientStore.create(tmp_path / "g", FakeEngine(), unit=UNIT)
    append(store, 5)
    (tmp_path / "g").rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError):
        store.commit()
    assert not (tmp_path / "g").exists()
    (tmp_path / "elsewhere").rename(tmp_path / "g")
    store.close()
    assert_holds_exactly(GradientStore.open(tmp_path / "g"), 5)


def test_data_is_on_disk_before_its_name_and_the_name_before_the_acknowledgement(
    tmp_path, monkeypatch
):
    """A power failure cannot be tried; the order of the steps is what saves from it."""
    seen: list[tuple[str, str]] = []
    synced, replaced = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        seen.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}")))
        synced(descriptor)

    def replace(source: Path, target: Path) -> None:
        seen.append(("replace", str(target)))
        replaced(source, target)

    store = GradientStore.create(tmp_path / "a/g", FakeEngine(), unit=UNIT)
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    with store:
        append(store, 3)
    root = tmp_path / "a/g"
    shard = root / "shards/00000/g-00000000.safetensors"
    assert seen == [
        ("fsync", f"{shard}.ghost-tmp"),
        ("replace", str(shard)),
        ("fsync", str(shard.parent)),
        ("fsync", str(root / "shards")),
        ("fsync", str(root)),
    ]
    seen.clear()
    GradientStore.create(tmp_path / "b/c", FakeEngine()).close()
    assert ("fsync", str(tmp_path)) in seen
    assert seen.index(("fsync", str(tmp_path / "b"))) < seen.index(
        ("replace", str(tmp_path / "b/c/manifest.json"))
    )


def test_what_killed_writers_left_is_cleaned_up_and_never_read(tmp_path):
    with GradientStore.create(tmp_path / "g", FakeEngine(), unit=UNIT) as store:
        append(store, 20)
    for leftover in ("manifest.json", "shards/00000/g-00000002.safetensors"):
        (tmp_path / "g" / f"{leftover}.ghost-tmp").write_bytes(b"half")
    assert_holds_exactly(GradientStore.open(tmp_path / "g"), 20)
    with GradientStore.resume(tmp_path / "g", FakeEngine()) as store:
        assert leftovers(tmp_path / "g") == []
        assert_holds_exactly(store, 20)


def test_a_damaged_tail_is_not_written_anew_with_a_good_hash(tmp_path):
    with GradientStore.create(tmp_path, FakeEngine(), unit=UNIT) as store:
        append(store, 5)
    (shard,) = tmp_path.rglob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(StoreError, match="altered"):
        GradientStore.resume(tmp_path, FakeEngine())


def test_a_writer_does_not_write_into_a_store_that_replaced_its_own(tmp_path):
    root = tmp_path / "store"
    first = GradientStore.create(root, FakeEngine(), unit=UNIT)
    append(first, 5)
    shutil.rmtree(root)
    with GradientStore.create(root, FakeEngine(), unit=UNIT) as second:
        append(second, 7)
        second.commit()
        with pytest.raises(StoreError, match="replaced by another"):
            first.commit()
        with pytest.raises(StoreError, match="replaced by another"):
            first.close()
    with GradientStore.open(root) as store:
        assert_holds_exactly(store, 7)
