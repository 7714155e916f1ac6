"""The command `ghost values`, run as a user or a script runs it."""

import csv
import os

import numpy as np
import pytest
from command_kit import parts
from log_kit import make
from torch import nn

from ghost_engines import GradientStore, ProjectionEngine, ScoreLog, cli


@pytest.fixture
def root(tmp_path):
    return make(tmp_path / "log", 40)


def values(*arguments):
    return cli.main(["values", *map(str, arguments)])


def test_a_log_is_added_up_printed_and_written(root, tmp_path, capsys):
    assert values(root, "--top", 2, "--out", "values.csv") == 0
    said = capsys.readouterr()
    assert said.err == ""
    (summary, ends), _ = parts(said.out + "\n\n")
    table = ScoreLog.open(root).totals()
    size = sum(path.stat().st_size for path in root.rglob("*.safetensors"))
    assert summary == [
        ["property", "value"],
        ["path", str(root)],
        ["directions", "val, test"],
        ["steps", "40"],
        ["first step", "1"],
        ["last step", "40"],
        ["samples", str(len(table))],
        ["credits", str(table.counts[:, 0].sum())],
        ["size on disk", f"{size} bytes"],
    ]
    assert ends[0] == ["of", "which", "sample", "value", "times seen", "last step"]
    for direction, name in enumerate(("val", "test")):
        column = table.values[:, direction]
        rows = [row for row in ends[1:] if row[0] == name]
        for which, order in (
            ("most helpful", np.argsort(-column)),
            ("most harmful", column.argsort()),
        ):
            shown = [row[2:4] for row in rows if row[1] == which]
            expected = [[str(table.ids[at]), f"{column[at]:.6g}"] for at in order[: len(shown)]]
            assert shown == expected
            assert shown
    with open("values.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["value_val"]) for row in rows] == table.values[:, 0].tolist()
    assert [int(row["times_seen"]) for row in rows] == table.counts[:, 0].tolist()


def test_a_log_is_drawn(root, tmp_path):
    pytest.importorskip("matplotlib")
    assert values(root, "--plot", "values.png") == 0
    assert (tmp_path / "values.png").stat().st_size > 1000


def test_an_empty_log_is_described(tmp_path, capsys):
    make(tmp_path / "log", 0)
    assert values("log") == 0
    said = capsys.readouterr()
    assert "directions\t-\nsteps\t0\nfirst step\t-\n" in said.out


def test_verify_tells_damage(root, capsys):
    assert values(root, "--verify") == 0
    assert "verified\tevery shard fits its hash\n" in capsys.readouterr().out
    path = sorted(root.rglob("*.safetensors"))[1]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert values(root, "--verify") == 1
    said = capsys.readouterr()
    assert said.out.startswith(f"damaged: {path} was altered")
    assert said.err == ""


def test_a_store_of_gradients_is_no_log(tmp_path, capsys):
    engine = ProjectionEngine(nn.Linear(2, 2), dim=4)
    GradientStore.create(tmp_path / "g", engine).close()
    assert values(tmp_path / "g") == 2
    said = capsys.readouterr().err
    assert "g is a store of gradients" in said
    assert "`ghost store info`" in said
    assert values(tmp_path / "none") == 2
    assert "ScoreLog" not in capsys.readouterr().err


def test_what_cannot_be_read_or_written_is_one_line_of_error(root, tmp_path, capsys):
    os.truncate(sorted(root.rglob("*.safetensors"))[0], 100)
    for arguments, what in (
        (["none"], "there is no score log at "),
        ([root], f"{sorted(root.rglob('*.safetensors'))[0]} is cut off or not a shard"),
        ([root, "--out", "values.xlsx"], "unknown kind of file '.xlsx'"),
        ([root, "--plot", "values.csv"], "unknown kind of picture '.csv'"),
        ([root, "--top", 0], "--top must be at least 1, not 0"),
    ):
        assert values(*arguments) == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.startswith(f"ghost: {what}")
        assert len(said.err.splitlines()) == 1
