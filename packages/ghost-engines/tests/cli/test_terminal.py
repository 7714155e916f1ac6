"""What is printed never commands the terminal: no control character of a file gets there."""

import json
import sys

import pytest
from command_kit import MLP, verify
from torch import nn

from ghost_engines import ProjectionEngine, cli
from ghost_engines.store import GradientStore

EVIL = "\x1b[2J\x1b]0;owned\x07\x9b31m\u202edetrevni\u200b\rover"


def harmless(text):
    """Tell whether a text has no control characters but line breaks and tabs."""
    return all(each.isprintable() or each in "\n\t" for each in text)


@pytest.fixture
def root(tmp_path):
    engine = ProjectionEngine(nn.Linear(2, 2), dim=4)
    GradientStore.create(
        tmp_path / "g", engine, info={EVIL: EVIL}, notes={EVIL: EVIL, "list": [EVIL, {"a": EVIL}]}
    ).close()
    return tmp_path / "g"


@pytest.mark.parametrize("terminal", [True, False])
def test_notes_of_a_store(root, terminal, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    assert cli.main(["store", "info", str(root)]) == 0
    said = capsys.readouterr().out
    assert "owned" in said
    assert r"\x1b[2J" in said
    assert r"\u202edetrevni" in said
    assert harmless(said)


def test_names_in_a_damaged_store(root, capsys):
    (root / "manifest.json").write_text(json.dumps({"schema": EVIL}))
    assert cli.main(["store", "verify", str(root)]) == 2
    assert harmless(capsys.readouterr().err)


def test_names_of_modules(tmp_path, capsys):
    model = f"""
from torch import nn

class Model(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(5, 3))
        self.add_module({EVIL.replace(".", "")!r}, nn.BatchNorm1d(3))


def model():
    return Model()
"""
    (tmp_path / "evil.py").write_text(model)
    assert verify("evil:model", *MLP[1:], "--train") == 1
    said = capsys.readouterr()
    assert "refused" in said.out
    assert "owned" in said.out
    assert harmless(said.out + said.err)


def test_names_on_the_command_line(capsys):
    for arguments in ((EVIL, *MLP[1:]), (*MLP, "--device", EVIL), (*MLP, "--layers", EVIL)):
        assert verify(*arguments) == 2
        said = capsys.readouterr().err
        assert said.startswith("ghost: ")
        assert harmless(said)
        assert len(said.splitlines()) == 1


def test_what_can_be_printed_stays_as_it_is(root, tmp_path, capsys):
    GradientStore.create(
        tmp_path / "h", ProjectionEngine(nn.Linear(2, 2), dim=4), notes={"who": "Zoë 名 × ᵀ \ud800"}
    ).close()
    assert cli.main(["store", "info", str(tmp_path / "h")]) == 0
    assert "note: who\tZoë 名 × ᵀ \\ud800\n" in capsys.readouterr().out
