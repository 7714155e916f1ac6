"""Training that is killed at any moment goes on as if it never was."""

import pytest
from fork_kit import run_script

KILLER = """
    # Forks training loops, kills them, and lets the last one go on to the end.
    import itertools, os, random, shutil, signal, sys
    from pathlib import Path

    import torch
    from fork_kit import finish, fork, kill_at
    from run_kit import STEPS, trained

    from ghost_engines import ScoreLog

    torch.set_num_threads(1)


    class Dying:
        # A file that is written through: dies in the given write, when half of it is there.

        def __init__(self, file, writes, at):
            self.file, self.writes, self.at = file, writes, at

        def write(self, data):
            if next(self.writes) == self.at:
                self.file.write(bytes(data)[: len(data) // 2])
                self.file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            return self.file.write(data)

        def __getattr__(self, name):
            return getattr(self.file, name)

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            self.file.close()


    def die_in_a_write(at):
        real, writes = os.fdopen, itertools.count()
        os.fdopen = lambda *given, **named: Dying(real(*given, **named), writes, at)


    def train(folder, acknowledge, killed_at=None):
        def before_save(run):
            if run.steps == killed_at:
                os.kill(os.getpid(), signal.SIGKILL)

        def after_step(run):
            if run.steps % 2 == 0:
                acknowledge(run.steps)

        chooses = {"policy": {"top_k": {"k": 3}}, "refresh": 3}
        fields = chooses if sys.argv[3:] else {"refresh": 2}
        return trained(folder, before_save, after_step, **fields)


    def outcome(folder, model, run):
        log = [(e.step, e.ids.tolist(), e.values.tolist()) for e in ScoreLog.open(folder / "log")]
        parameters = [each.tolist() for each in model.parameters()]
        metrics = (folder / "metrics.jsonl").read_text()
        return parameters, run.values.to_dict(), run.values.columns(), log, metrics


    def same(one, other):
        columns, expected = one[2], other[2]
        assert columns.keys() == expected.keys()
        assert all((columns[name] == expected[name]).all() for name in expected)
        assert (*one[:2], *one[3:]) == (*other[:2], *other[3:])


    def killed(folder, prepare, killed_at=None):
        # Returns whether a loop that goes on was killed; what it had saved is there.
        def work(acknowledge):
            prepare()
            train(folder, acknowledge, killed_at)

        status, acknowledged = finish(*fork(work))
        if acknowledged:
            state = torch.load(folder / "checkpoint.pt", weights_only=True)
            assert state["run"]["steps"] >= acknowledged
        return status != 0


    def complete(folder, expected):
        def work(acknowledge):
            same(outcome(folder, *train(folder, acknowledge)), expected)
            left = [each.name for each in folder.rglob("*") if "tmp" in each.name]
            assert not left, left

        status, _ = finish(*fork(work))
        assert status == 0
        shutil.rmtree(folder)


    def at_each(root, expected, prepare, stride):
        # Kills a loop, then one that goes on elsewhere, until the first is not killed any more.
        for at in itertools.count(1, stride):
            folder = root / "run"
            first_was = killed(folder, lambda: prepare(at))
            killed(folder, lambda: prepare(at % 17))
            complete(folder, expected)
            if not first_was:
                assert at > 1
                return


    root, stride = Path(sys.argv[1]), int(sys.argv[2])
    expected = outcome(root / "whole", *train(root / "whole", lambda steps: None))
    at_each(root, expected, kill_at, stride)
    at_each(root, expected, die_in_a_write, stride)
    draw = random.Random(stride)
    for _ in range(max(2, 40 // stride)):
        for step in draw.sample(range(1, STEPS + 1), 2):
            killed(root / "run", lambda: None, killed_at=step)
        complete(root / "run", expected)
"""


def test_a_killed_run_goes_on_as_one(fresh, tmp_path):
    run_script(fresh, KILLER, tmp_path, 263)


@pytest.mark.stress
def test_a_run_that_is_killed_at_every_other_call_goes_on_as_one(fresh, tmp_path):
    run_script(fresh, KILLER, tmp_path, 2)


@pytest.mark.stress
def test_a_killed_run_that_chooses_goes_on_as_one(fresh, tmp_path):
    run_script(fresh, KILLER, tmp_path, 67, "chooses")
