"""A folder with modules that the command imports functions from."""

import sys

import pytest
from command_kit import SUBJECTS


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    """Work in a folder that has the module `subjects`."""
    (tmp_path / "subjects.py").write_text(SUBJECTS)
    (tmp_path / "faulty.py").write_text("import missing_dependency\n")
    (tmp_path / "raising.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    before, path = set(sys.modules), list(sys.path)
    yield
    assert sys.path == path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]
