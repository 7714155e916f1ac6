"""A library that is not installed is named with the extra that brings it."""

import sys

import pytest

from ghost_core import MissingExtraError


@pytest.mark.parametrize(
    ("name", "package", "extra"),
    [
        ("GhostTrainer", "transformers", "hf"),
        ("GhostLightning", "lightning", "lightning"),
        pytest.param("GhostSFTTrainer", "trl", "trl", marks=pytest.mark.stress),
    ],
)
def test_the_extra_is_named(name, package, extra, monkeypatch):
    import ghost_engines.frameworks as wing

    if package == "trl":
        pytest.importorskip("transformers")
        assert wing.GhostMixin  # which the module of trl needs
    monkeypatch.setitem(sys.modules, package, None)
    for loaded in [each for each in sys.modules if each.startswith(f"{package}.")]:
        monkeypatch.setitem(sys.modules, loaded, None)
    modules = {"hf": ["trainer", "callback"]}.get(extra, [extra])
    for module in modules:
        monkeypatch.delitem(sys.modules, f"{wing.__name__}.{module}", raising=False)
    for public in {*modules, name} & vars(wing).keys():
        monkeypatch.delitem(vars(wing), public)
    message = rf"{package}, which is not installed: pip install 'ghost-engines\[{extra}\]'"
    with pytest.raises(MissingExtraError, match=message):
        getattr(wing, name)


def test_there_are_no_other_names():
    import ghost_engines.frameworks as wing

    with pytest.raises(AttributeError, match="no attribute 'GhostKeras'"):
        wing.GhostKeras  # noqa: B018
