"""The command `ghost`, run as a user or a script runs it."""

import io
import json
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

import ghost_engines
from ghost_core.plugins import Plugin
from ghost_engines import ProjectionEngine, cli
from ghost_engines.store import GradientStore, StoredRows


class Done(NamedTuple):
    """What a run of the command left behind."""

    returncode: int
    stdout: str
    stderr: str


def ghost(*arguments: object) -> Done:
    """Run the command as into pipes."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = cli.main([*map(str, arguments)])
    return Done(status, out.getvalue(), err.getvalue())


@pytest.fixture
def root(tmp_path, mlp) -> Path:
    engine = ProjectionEngine(mlp, dim=4, min_dim=1, seed=17, dtype="float16")
    with GradientStore.create(
        tmp_path / "g", engine, unit=4, info={"loss": "nll"}, notes={"who": "a\tb"}
    ) as store:
        rows = torch.randn(10, engine.k_total).half()
        store.append(StoredRows(torch.arange(10), rows, None), loss=torch.zeros(10))
    return tmp_path / "g"


def damage(root: Path) -> Path:
    path = sorted(root.rglob("*.safetensors"))[1]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    return path


def test_help_names_the_commands_and_what_they_take(capsys):
    for arguments, words in {
        ("--help",): ["plugins", "score", "store", "values", "verify", "--version"],
        ("values", "--help"): ["LOG", "--out", "--plot", "--top", "--verify"],
        ("score", "--help"): ["MODEL", "--data", "--targets", "--engine", "--out", "NAME=DATA"],
        ("store", "--help"): ["info", "verify", "merge", "export"],
        ("store", "merge", "--help"): ["STORE", "--into", "--unit", "--replace"],
        ("verify", "--help"): ["MODEL", "--data", "--loss"],
    }.items():
        with pytest.raises(SystemExit) as caught:
            cli.main(arguments)
        assert caught.value.code == 0
        said = capsys.readouterr().out
        assert all(word in said for word in words)


def test_what_needs_no_torch_does_not_wait_for_it():
    lines = {
        "--help": 0,
        "--version": 0,
        "store --help": 0,
        "store export --help": 0,
        "score --help": 0,
        "values --help": 0,
        "verify --help": 0,
        "plugins --help": 0,
        "nope": 2,
    }
    code = f"""
import sys
from ghost_engines.cli import main
for line, expected in {lines}.items():
    print("said:", line)
    print("said:", line, file=sys.stderr)
    try:
        status = main(line.split())
    except SystemExit as ended:
        status = ended.code
    assert status == expected, line
    assert "torch" not in sys.modules, line
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    out, err = (each.split("said: ")[1:] for each in (done.stdout, done.stderr))
    assert len(out) == len(err) == len(lines)
    assert all("ghost" in each[0] + each[1] for each in zip(out, err, strict=True))


def test_the_public_names_are_there_although_imported_late(fresh):
    code = """
import sys
import ghost_engines
assert "torch" not in sys.modules
assert {"GramEngine", "cli"} - {*dir(ghost_engines)} == {"cli"}
assert not hasattr(ghost_engines, "NoSuchEngine")
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    code = """
import ghost_engines
assert {"GramEngine", "cli"} - {*dir(ghost_engines)} == {"cli"}
assert not hasattr(ghost_engines, "NoSuchEngine")
from ghost_engines import *
from ghost_engines import gram
assert GramEngine is gram.GramEngine is ghost_engines.GramEngine
"""
    done = fresh(code)
    assert done.returncode == 0, done.stderr
    for name in ghost_engines.__all__:
        assert getattr(ghost_engines, name) is not None
        assert name in dir(ghost_engines)
    with pytest.raises(AttributeError, match="'ghost_engines' has no attribute 'NoSuchEngine'"):
        _ = ghost_engines.NoSuchEngine


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr() == (f"ghost {metadata.version('ghost-engines')}\n", "")


def test_plugins_into_a_pipe_are_fields_separated_by_tabs():
    done = ghost("plugins")
    assert (done.returncode, done.stderr) == (0, "")
    titles, *rows = [line.split("\t") for line in done.stdout.splitlines()]
    assert titles == ["plugin", "version", "offer", "status"]
    assert all(len(row) == 4 for row in rows)
    assert max(map(len, done.stdout.splitlines())) < 200
    assert [row[0] for row in rows] == sorted(row[0] for row in rows)
    ours = {row[2]: row[3] for row in rows if row[0] == "ghost-engines:engines"}
    assert ours["engine projection"] == ours["command verify"] == "loaded"
    assert "sampler torch.nn.modules.linear.Linear" in {
        row[2] for row in rows if row[0].startswith("ghost-layers:")
    }


def test_plugins_at_a_terminal_are_aligned_and_many_offers_counted(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert cli.main(["plugins"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["plugin", "version", "offers", "status"]
    assert "\t" not in "".join(lines)
    layers = next(line for line in lines if line.startswith("ghost-layers:"))
    assert " samplers " in layers
    assert all(line[lines[0].index("status") - 1] == " " for line in lines)


def test_a_plugin_that_does_not_work_says_so_on_its_row(monkeypatch, capsys):
    class Found:
        plugins = (
            Plugin("bad:x", "1", [], ["ImportError: no\n\tmodule"]),
            Plugin("good:y", "2", ["engine one", "engine two"]),
            Plugin("off:z", "3", disabled=True),
        )

    monkeypatch.setattr("ghost_engines.cli.plugins.installed", Found)
    assert cli.main(["plugins"]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == [
        "bad:x\t1\t-\tfailed: ImportError: no module",
        "good:y\t2\tengine one\tloaded",
        "good:y\t2\tengine two\tloaded",
        "off:z\t3\t-\tdisabled by GHOST_DISABLED_PLUGINS",
    ]


def test_a_store_is_described(root):
    done = ghost("store", "info", root)
    assert (done.returncode, done.stderr) == (0, "")
    summary, layers = (
        [line.split("\t") for line in part.splitlines()] for part in done.stdout.split("\n\n")
    )
    values = dict(summary)
    manifest = json.loads((root / "manifest.json").read_text())
    size = sum(path.stat().st_size for path in root.rglob("*.safetensors"))
    for key, value in {
        "path": str(root),
        "rows": "10",
        "dimensions": str(manifest["k_total"]),
        "dtype": "float16",
        "losses": "float32",
        "size on disk": f"{size} bytes",
        "rows per shard": "4",
        "projection": "gaussian",
        "seed": "17",
        "verified": "yes",
        "info: loss": "nll",
        "note: who": "a b",
        "fingerprint": manifest["fingerprint"],
    }.items():
        assert values[key] == value
    assert layers[0] == ["name", "shape", "offset", "k_left", "k_right"]
    assert [row[0] for row in layers[1:]] == ["0.bias", "0.weight", "2.bias", "2.weight"]
    assert layers[2][1] == "7×5"


def test_a_store_at_a_terminal_is_aligned(root, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert cli.main(["store", "info", str(root)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "\t" not in "".join(lines)
    column = lines[0].index("value")
    assert next(line for line in lines if line.startswith("rows per shard"))[column:] == "4"


def test_verify_says_that_all_is_well(root, capsys):
    assert cli.main(["store", "verify", str(root)]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert said.out.splitlines()[-1] == "verified: every shard fits its hash"


@pytest.mark.parametrize("kind", ["altered", "missing", "cut off"])
def test_verify_names_what_is_damaged(root, kind, capsys):
    path = damage(root)
    if kind == "missing":
        path.unlink()
    if kind == "cut off":
        path.write_bytes(path.read_bytes()[:50])
    assert cli.main(["store", "verify", str(root)]) == 1
    said = capsys.readouterr()
    assert said.err == ""
    assert said.out.startswith(f"damaged: {path} ")
    assert kind in said.out


def test_a_script_sees_damage_by_the_exit_status(root):
    path = damage(root)
    done = ghost("store", "verify", root)
    assert (done.returncode, done.stderr) == (1, "")
    assert str(path) in done.stdout


def test_a_broken_store_is_one_line_of_error(root):
    for shard in sorted(root.rglob("*.safetensors"))[:2]:
        shard.unlink()
    done = ghost("store", "info", root)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("ghost: ")
    assert "g-00000000.safetensors is missing" in done.stderr


@pytest.mark.parametrize("what", [["info"], ["verify"], ["merge", "--into", "x"]])
def test_a_path_without_a_store_is_one_line_of_error(tmp_path, what, capsys):
    assert cli.main(["store", *what, str(tmp_path / "none")]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"ghost: there is no store at {tmp_path / 'none'}")
    assert said.err.endswith("or make one with `ghost project`\n")
    assert len(said.err.splitlines()) == 1


def test_a_store_whose_engine_has_a_manifest_of_its_own_kind_is_described(tmp_path, capsys):
    class Engine:
        k_total, dtype = 3, torch.float32

        def manifest(self):
            return {"layers": "all", "nested": {"a": [1, 2]}}

    GradientStore.create(tmp_path / "g", Engine()).close()
    assert cli.main(["store", "info", str(tmp_path / "g")]) == 0
    assert "nested\t{'a': [1, 2]}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments", [[], ["stores"], ["store"], ["store", "merge", "x"], ["plugins", "--nope"]]
)
def test_arguments_that_cannot_be_understood_end_with_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "--help" in said.err


def test_a_mistake_names_the_help_of_its_command(capsys):
    with pytest.raises(SystemExit):
        cli.main(["verify", "a:b", "--data", "a:b", "--samples", "x"])
    assert "ghost verify --help" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--help"], ["score", "--help"], ["project", "--help"]])
def test_the_help_names_the_status_of_an_interrupt(arguments, capsys):
    with pytest.raises(SystemExit):
        cli.main(arguments)
    assert "130" in capsys.readouterr().out


def test_a_reader_that_has_seen_enough_is_no_error(fresh):
    code = """
import os, runpy, sys
reading, writing = os.pipe()
os.dup2(writing, 1)
os.close(writing)
os.close(reading)
sys.argv = ["ghost", "plugins"]
runpy.run_module("ghost_engines", run_name="__main__", alter_sys=True)
"""
    done = fresh(code)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_command_is_installed():
    entry = next(iter(metadata.entry_points(group="console_scripts", name="ghost")))
    assert entry.load() is cli.main
    assert shutil.which("ghost", path=str(Path(sys.executable).parent))


def test_stores_are_merged_and_exported(root, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(root, other)
    assert cli.main(["store", "merge", str(root), str(other), "--into", str(tmp_path / "m")]) == 2
    said = capsys.readouterr().err
    assert "are there more than once" in said
    assert said.endswith("or let later rows count with --replace\n")
    assert not (tmp_path / "m").exists()
    merge = ["store", "merge", str(root), str(other), "--into", str(tmp_path / "m"), "--replace"]
    assert cli.main([*merge, "--unit", "3"]) == 0
    assert capsys.readouterr() == (f"10 rows in {tmp_path / 'm'}\n", "")
    merged, given = GradientStore.open(tmp_path / "m"), GradientStore.open(root)
    assert merged.manifest.unit == 3
    assert torch.equal(merged.rows(), given.rows())
    export = ["store", "export", str(tmp_path / "m"), "--out", str(tmp_path / "out")]
    assert cli.main(export) == 0
    assert capsys.readouterr() == (f"10 rows in {tmp_path / 'out'}\n", "")
    assert np.array_equal(np.load(tmp_path / "out/rows.npy"), given.rows().numpy())
    assert cli.main(export) == 2
    assert "there is something at" in capsys.readouterr().err
