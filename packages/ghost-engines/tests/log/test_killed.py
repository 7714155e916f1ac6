"""Writers that are killed lose no step that they acknowledged, and double none."""

import pytest
from fork_kit import run_script

KILLER = """
    # Forks training runs, kills them, and checks after each what is left of the log.
    import itertools, random, shutil, sys
    from pathlib import Path

    import torch
    from fork_kit import finish, fork, kill_at
    from log_kit import assert_holds, holds, make, step

    from ghost_engines import ScoreLog

    UNIT, TOTAL = 24, 40
    torch.set_num_threads(1)


    def train(root, after, run, acknowledge):
        # Goes on after a checkpoint's step. Every step that is on disk is acknowledged.
        draw = random.Random(run)
        if (root / "log.json").exists():
            log = ScoreLog.resume(root, after=after)
        else:
            log = ScoreLog.create(root, unit=UNIT)
        acknowledge(log.committed or 0)
        with log:
            for number in range(after + 1, TOTAL + 1):
                log.append(step(number, run))
                acknowledge(log.committed or 0)
                if draw.random() < 0.2:
                    log.commit()
                    acknowledge(log.committed)
        acknowledge(log.committed)


    def left(root):
        if not (root / "log.json").exists():
            return 0
        log = ScoreLog.open(root)
        log.verify()
        return len(log)


    def check(root, after, before, run, acknowledged):
        # What the run wrote follows the steps up to the checkpoint. If it was killed while the log
        # was cut, before it acknowledged anything, the old steps are there up to some later one.
        n = left(root)
        assert n >= acknowledged, f"{acknowledged} steps were acknowledged, {n} are there"
        assert n >= after, f"{after} steps were kept, {n} are there"
        if n == 0:
            return []
        log, made = ScoreLog.open(root), before[:after] + [run] * (n - after)
        if acknowledged == 0 and n <= len(before) and not holds(log, made):
            made = before[:n]
        assert_holds(log, made)
        return made


    def at_every_step(root, stride, first):
        for at in itertools.count(first, stride):
            # The run is killed; one that resumes from an older checkpoint is too; the third is not.
            runs, draw, killed = [], random.Random(at), 0
            for run in (1, 2):
                after = draw.randint(0, len(runs))

                def dying(acknowledge):
                    kill_at(at if run == 1 else at % 23)
                    train(root, after, run, acknowledge)

                status, acknowledged = finish(*fork(dying))
                killed += status != 0
                runs = check(root, after, runs, run, acknowledged)
                if run == 1 and not killed:
                    assert len(runs) == TOTAL
            after = draw.randint(0, len(runs))
            status, _ = finish(*fork(lambda acknowledge: train(root, after, 3, acknowledge)))
            assert status == 0
            assert_holds(ScoreLog.open(root), runs[:after] + [3] * (TOTAL - after))
            assert not [path for path in root.rglob("*") if "tmp" in path.name]
            shutil.rmtree(root)
            if killed < 2:
                assert at > 40, at
                return


    def while_cutting(root):
        # Whenever a log is cut, a kill leaves one that ends at some step, and can be cut again.
        for at in itertools.count():
            make(root, TOTAL, UNIT)

            def dying(acknowledge):
                kill_at(at, ("unlink", "replace"))
                ScoreLog.resume(root, after=3)

            status, _ = finish(*fork(dying))
            left = len(ScoreLog.open(root))
            assert_holds(ScoreLog.open(root), [0] * left)
            assert left >= 3
            with ScoreLog.resume(root, after=3) as log:
                assert_holds(log, [0] * 3)
            shutil.rmtree(root)
            if status == 0:
                assert at > 3, at
                return


    while_cutting(Path(sys.argv[1]))
    at_every_step(Path(sys.argv[1]), *map(int, sys.argv[2:]))
"""


def test_no_acknowledged_step_is_lost_or_doubled_whatever_step_a_writer_is_killed_at(
    fresh, tmp_path
):
    run_script(fresh, KILLER, tmp_path / "log", 151, 4)


@pytest.mark.stress
def test_no_acknowledged_step_is_lost_or_doubled_at_any_step(fresh, tmp_path):
    run_script(fresh, KILLER, tmp_path / "log", 1, 0)
