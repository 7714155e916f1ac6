"""Writers of parts that are killed: once they went on, all is as if nothing had happened."""

import pytest
from fork_kit import run_script

KILLER = """
    # Forks two writers of one store, kills one or both, and lets them go on.
    import itertools, os, random, shutil, signal, struct, sys, time
    from pathlib import Path

    import torch
    from fork_kit import finish, fork, kill_at

    from ghost_engines.store import GradientStore, StoredRows

    K, UNIT, WORLD = 5, 8, 2
    torch.set_num_threads(1)


    class FakeEngine:
        k_total, dtype = K, torch.float32

        def manifest(self):
            return {"seed": 3}


    def batch(ordinals):
        rows = ordinals[:, None] * 10 + torch.arange(K)
        return StoredRows(ordinals * 3 + 1, rows.float(), ordinals / 2)


    def columns(ordinals):
        return {"norm": ordinals / 3, "group": [f"g{n // 5 % 3}" for n in ordinals.tolist()]}


    def mine(rank, total):
        # Units of data in turn.
        return torch.arange(total).split(UNIT)[rank::WORLD]


    def write_rows(root, rank, total, acknowledge, seed, pause=0.0, named=False):
        draw = random.Random(seed)
        store = GradientStore.join(
            root,
            FakeEngine(),
            part=f"host-{rank}" if named else (rank, WORLD),
            unit=UNIT,
            columns={"norm": "float32", "group": "category"},
        )
        acknowledge(store.committed)
        rest = torch.cat(mine(rank, total))[len(store):]
        with store:
            while len(rest):
                some, rest = rest.split([n := min(len(rest), draw.randint(1, 7)), len(rest) - n])
                rows = batch(some)
                store.append(rows, rows.loss, columns=columns(some))
                acknowledge(store.committed)
                if draw.random() < 0.2:
                    store.commit()
                    acknowledge(store.committed)
                time.sleep(pause)
        acknowledge(store.committed)


    def contents(root):
        return {
            str(path.relative_to(root)): path.read_bytes()
            for path in sorted(root.rglob("*"))
            if path.is_file()
        }


    def whole(root, total, named=False):
        for rank in range(WORLD):
            write_rows(root, rank, total, lambda n: None, 0, named=named)
        return contents(root)


    def check(root, total, at_least):
        # Every acknowledged row is there, and every row once.
        if not (root / "parts.json").exists():
            assert not any(at_least), at_least
            return 0
        store = GradientStore.open(root)
        ids = store.ids.tolist()
        assert len(set(ids)) == len(ids), "a sample is there twice"
        expected = set()
        for rank, n in enumerate(at_least):
            expected |= set(batch(torch.cat(mine(rank, total))[:n]).ids.tolist())
        assert expected <= set(ids), "an acknowledged sample is not there"
        ordinals = (store.ids - 1) // 3
        assert torch.equal(store.rows(), batch(ordinals).rows)
        if len(store):
            assert torch.equal(store.losses, batch(ordinals).loss)
            assert torch.equal(store.columns["norm"], columns(ordinals)["norm"])
            assert list(store.groups) == columns(ordinals)["group"]
        store.verify()
        return len(store)


    def finish_all(root, total, named=False):
        writers = [
            fork(lambda ack, rank=rank: write_rows(root, rank, total, ack, 5, named=named))
            for rank in range(WORLD)
        ]
        assert [finish(*writer)[0] for writer in writers] == [0] * WORLD


    def at_every_step(root, stride):
        # Rank 0 dies before each system call in turn, while rank 1 writes.
        total = 41
        expected = whole(root / "whole", total)
        for step in itertools.count(0, stride):
            def killed(acknowledge):
                kill_at(step)
                write_rows(root / "g", 0, total, acknowledge, seed=1)

            writers = fork(killed), fork(
                lambda acknowledge: write_rows(root / "g", 1, total, acknowledge, seed=2)
            )
            ends = [finish(*writer) for writer in writers]
            assert ends[1][0] == 0
            check(root / "g", total, [n for _, n in ends])
            finish_all(root / "g", total)
            assert contents(root / "g") == expected
            shutil.rmtree(root / "g")
            if ends[0][0] == 0:
                return


    def at_random(root, wanted, total, named):
        # Both are killed again and again, until there were enough kills and all rows are there.
        draw, killed, at_least = random.Random(named), 0, [0] * WORLD
        expected = whole(root / "whole", total, named)
        for round in range(100 * wanted):
            writers = [
                fork(lambda ack, rank=rank: write_rows(
                    root / "g", rank, total, ack, round + rank, 0.0005, named
                ))
                for rank in range(WORLD)
            ]
            # Its own steps are what a writer is killed after, however long they take.
            for rank, (pid, reading) in enumerate(writers[: draw.randint(0, WORLD)]):
                for _ in range(draw.randint(0, 8)):
                    if seen := os.read(reading, 8):
                        at_least[rank] = max(at_least[rank], struct.unpack("q", seen)[0])
                time.sleep(draw.random() * 0.002)
                os.kill(pid, signal.SIGKILL)
            for rank, writer in enumerate(writers):
                status, acknowledged = finish(*writer)
                killed += status != 0
                at_least[rank] = max(at_least[rank], acknowledged)
            rows = check(root / "g", total, at_least)
            if rows == total:
                finish_all(root / "g", total, named)
                assert contents(root / "g") == expected
                shutil.rmtree(root / "g")
                at_least = [0] * WORLD
                if killed >= wanted:
                    return
        raise AssertionError((rows, killed))


    task, root, *numbers = sys.argv[1:]
    {"steps": at_every_step, "random": at_random}[task](Path(root), *map(int, numbers))
"""


@pytest.mark.stress
def test_a_writer_killed_at_any_step_beside_another_goes_on_as_if_nothing_was(fresh, tmp_path):
    run_script(fresh, KILLER, "steps", tmp_path, 1)


@pytest.mark.stress
@pytest.mark.parametrize("named", [0, 1], ids=["dealt", "named"])
def test_two_writers_killed_again_and_again_lose_and_double_nothing(fresh, tmp_path, named):
    run_script(fresh, KILLER, "random", tmp_path, 50, 400, named)
