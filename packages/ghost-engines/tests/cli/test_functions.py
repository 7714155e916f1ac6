"""What is imported from the working directory: the modules that are named, and what they import."""

import sys

import pytest

from ghost_engines.cli.errors import CommandError
from ghost_engines.cli.functions import find_function

LOOKING = """
import sys
from pathlib import Path
import beside

WHILE_IMPORTED = str(Path.cwd()) in sys.path


def while_called():
    return str(Path.cwd()) in sys.path
"""


@pytest.fixture(autouse=True)
def _looking(tmp_path, _here):
    (tmp_path / "looking.py").write_text(LOOKING)
    (tmp_path / "beside.py").write_text("")
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside/__init__.py").write_text("import beside")
    (tmp_path / "inside/deep.py").write_text("from looking import while_called")


@pytest.mark.parametrize("name", ["looking", "inside.deep"])
def test_the_working_directory_is_on_the_path_while_a_module_there_is_imported(name):
    before = list(sys.path)
    function = find_function(f"{name}:while_called", "--data")
    assert sys.modules["looking"].WHILE_IMPORTED
    assert not function()
    assert sys.path == before


def test_it_is_not_while_a_module_elsewhere_is(tmp_path, monkeypatch):
    """Whatever that imports is its own, not what happens to lie here."""
    for module in ("fractions", "numbers"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    (tmp_path / "numbers.py").write_text("raise AssertionError")
    assert callable(find_function("fractions:Fraction", "--data"))


def test_a_module_that_is_nowhere_is_said(tmp_path):
    with pytest.raises(CommandError, match="no module 'nowhere', neither in the current"):
        find_function("nowhere:f", "--data")
