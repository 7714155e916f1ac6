"""Options of all commands from a file of YAML."""

import json
from dataclasses import fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
from command_kit import MLP, project

from ghost_engines import cli
from ghost_engines.cli.commands import _told
from ghost_engines.cli.folder_options import STORE
from ghost_engines.cli.own import Configured

pytest.importorskip("yaml")

KINDS = {
    **{(name,): kind for name, kind in cli.COMMANDS.items() if issubclass(kind, Configured)},
    **{("store", name): kind for name, kind in STORE.items()},
}


def sample(kind):
    """Return a value of an option as a file has it, and as the command gets it."""
    if isinstance(kind, UnionType):
        (kind,) = set(get_args(kind)) - {NoneType}
    if get_origin(kind) is Literal:
        return (get_args(kind)[-1],) * 2
    if get_origin(kind) is tuple:
        return ["a", "b"], tuple(map(get_args(kind)[0], "ab"))
    return {
        str: ("7", "7"), int: (7, 7), bool: (True, True), float: (0.25, 0.25),
        Path: ("here", Path("here")),
    }[kind]  # fmt: skip


def test_no_command_with_options_is_left_out():
    assert set(cli.COMMANDS) - {words[0] for words in KINDS} == {"plugins"}


@pytest.mark.parametrize("words", KINDS, ids=" ".join)
def test_every_option_may_come_from_a_file(words, tmp_path):
    kind, path = KINDS[words], tmp_path / "c.yaml"
    hints = get_type_hints(kind)
    names = [entry.name for entry in fields(kind) if entry.name != "config"]
    values = {name: sample(hints[name]) for name in names}
    path.write_text(json.dumps({name.replace("_", "-"): values[name][0] for name in names}))
    found = _told(cli.COMMANDS, [*words, "--config", str(path)])
    found = found.what if words[0] == "store" else found
    assert type(found) is kind
    assert {name: getattr(found, name) for name in names} == {
        name: value for name, (_, value) in values.items()
    }
    assert found.config == path


@pytest.mark.parametrize("words", KINDS, ids=" ".join)
def test_a_misspelt_option_in_a_file_names_the_nearest(words, tmp_path, capsys):
    name = next(entry.name for entry in fields(KINDS[words]) if entry.name != "config")
    (tmp_path / "c.yaml").write_text(f"{name}s: 1\n")
    assert cli.main([*words, "--config=c.yaml"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"ghost: unknown option in c.yaml '{name}s'; did you mean '{name}'?")
    assert said.count("\n") == 1


def test_what_is_given_in_the_shell_goes_first(tmp_path, capsys):
    given = dict(zip(("model", "data", "loss"), (MLP[0], MLP[2], MLP[4]), strict=True))
    (tmp_path / "c.yaml").write_text(
        json.dumps(given | {"targets": {"val": "subjects:batch"}, "top": 1, "layers": ["0", "2"]})
    )
    assert cli.main(["score", "--config", "c.yaml", "--out", "a.jsonl"]) == 0
    both = ("--targets", "a=subjects:batch", "b=subjects:batch", "--top", "2", "--layers", "2")
    assert cli.main(["score", "--config", "c.yaml", *both, "--out", "b.jsonl"]) == 0
    first, second = (json.loads(Path(name).read_text().splitlines()[0]) for name in
                     ("a.jsonl", "b.jsonl"))  # fmt: skip
    assert {"score_val"} == {name for name in first if name.startswith("score")}
    assert {"score_a", "score_b"} == {name for name in second if name.startswith("score")}
    assert second["norm"] < first["norm"]
    assert capsys.readouterr().out.count("most helpful\t") == 1 + 2 * 2


@pytest.mark.parametrize(
    "content",
    [b"", b"3", b"null", b"\xff\xfe\x00", b"[" * 5000, b"a: &a [*a]", b"a: 1\na: 2", b"? [1]\n: 2",
     b"!!python/object/apply:os.getcwd []", b"model: !!timestamp x", b"top: 1" + b"0" * 5000,
     b"a: b: c", None],
)  # fmt: skip
@pytest.mark.parametrize(
    "words",
    [("score",), pytest.param(("store", "merge"), marks=pytest.mark.stress)],
    ids=" ".join,
)
def test_what_is_no_file_of_options_is_one_line(words, content, tmp_path, capsys):
    for name in ("c.yaml", "a\0b", "x" * 300, ".", "\ud800"):
        if content is not None:
            (tmp_path / "c.yaml").write_bytes(content)
        assert cli.main([*words, "--config", name]) == 2
        said = capsys.readouterr()
        assert said.err.startswith("ghost: ")
        assert len(said.err.splitlines()) == 1
        assert said.out == ""
        content = None if name == "c.yaml" else content
        (tmp_path / "c.yaml").unlink(missing_ok=True)


def test_what_is_wrong_in_a_file_is_one_line(tmp_path, capsys):
    pytest.importorskip("yaml")
    (tmp_path / "c.yaml").write_text(
        "model: subjects:mlp\ndata: subjects:dataset\nloss: subjects:of_pairs\n"
        "dim: 8\nmin-dim: 1\ndims: {'0': whole}\nunit-norm: true\nstore: g\nseed: 1\n"
    )
    assert project("--config", "c.yaml", "--seed", 5) == 0
    config = json.loads((tmp_path / "g/project.json").read_text())["config"]
    assert (config["seed"], config["dim"], config["unit_norm"]) == (5, "8", True)
    assert config["dims"] == ["0=whole"]
    capsys.readouterr()
    for text, told in {
        "dimm: 8": "unknown option in c.yaml 'dimm'; did you mean 'dim'?",
        "unit: many": "unit in c.yaml is 'many'",
        "dim: {a: 1}": "dim in c.yaml is {'a': 1}, and should be one value",
        "seed: {a: 1}": "seed in c.yaml is {'a': 1}, and should be whole",
        "batch_size: {a: 1}": "batch_size in c.yaml is {'a': 1}, and should be whole",
        "unit: [1, 2]": "unit in c.yaml is [1, 2], and should be whole",
        "store: {a: 1}": "store in c.yaml is {'a': 1}, and should be one value",
        "unit_norm: 3": "unit_norm in c.yaml is 3, and should be true or false",
        "storage: int8": "storage in c.yaml is 'int8'; there are float64, float32,",
        "storage: {a: 1}": "storage in c.yaml is {'a': 1}; there are",
        "init: null": "init in c.yaml is None, and should be one value",
        "layers: [a, {b: 1}]": "layers in c.yaml is ['a', {'b': 1}], and should be one value",
        "- 1": "has no options by name",
        "dim: 8\ndim: 9": "'dim' is there twice",
        "min-dim: 8\nmin_dim: 9": "min_dim is there twice in c.yaml",
        "a: [": "is no YAML",
    }.items():
        (tmp_path / "c.yaml").write_text(text)
        assert project("--config", "c.yaml") == 2
        said = capsys.readouterr()
        assert told in said.err
        assert said.err.count("\n") == 1
        assert said.out == ""


def test_a_file_that_cannot_be_read_is_named_by_its_option(tmp_path, capsys):
    pytest.importorskip("yaml")
    (tmp_path / "folder").mkdir()
    for name, why in (("none.yaml", "No such file or directory"), ("folder", "Is a directory")):
        assert project("--config", name) == 2
        assert capsys.readouterr().err == f"ghost: --config: {name} cannot be read: {why}\n"
