"""Who gives what several plugins offer, what is switched off, and plugins that fail badly."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest
from torch import nn

from ghost_core.plugins import DISABLED_VARIABLE, Contributions
from ghost_core.tracking import Refused

LINEAR = "torch.nn.modules.linear.Linear"

PLAIN = """
@hookimpl
def ghost_samplers():
    return {nn.Linear: PlainLinear, nn.Embedding: PlainEmbedding}
"""

MINE = """
class Mine(PlainLinear):
    pass

@hookimpl
def ghost_samplers():
    return {nn.Linear: Mine}
"""

OVERRIDE = MINE.replace("{nn.Linear: Mine}", "{nn.Linear: Override(Mine)}")


def used(contributions: Contributions) -> str:
    found = contributions.samplers.find(nn.Linear(1, 1))
    return "" if isinstance(found, Refused) else type(found.sampler).__name__


def status(contributions: Contributions) -> dict[str, str]:
    return {plugin.name.partition(":")[0]: plugin.status for plugin in contributions.plugins}


def test_one_declared_override_wins(install, discover) -> None:
    install("ghost-layers", PLAIN)
    install("mine", OVERRIDE)
    contributions = discover()
    assert used(contributions) == "Mine"
    assert status(contributions) == {"ghost-layers": "loaded", "mine": "loaded"}
    offers = {plugin.name: plugin.offers for plugin in contributions.plugins}
    assert offers["mine:plugin"] == [f"sampler {LINEAR}"]
    assert offers["ghost-layers:plugin"] == ["sampler torch.nn.modules.sparse.Embedding"]


def test_two_overrides_conflict_and_the_default_stands(install, discover) -> None:
    install("ghost-layers", PLAIN)
    install("mine", OVERRIDE)
    install("yours", OVERRIDE)
    contributions = discover()
    assert used(contributions) == "PlainLinear"
    told = status(contributions)
    assert told["ghost-layers"] == "loaded"
    for one, other in (("mine", "yours"), ("yours", "mine")):
        assert f"sampler {LINEAR} is also overridden by {other}:plugin" in told[one]


def test_a_rival_that_declares_nothing_leaves_the_default_in_place(install, discover) -> None:
    install("ghost-layers", PLAIN)
    install("mine", MINE)
    contributions = discover()
    assert used(contributions) == "PlainLinear"
    told = status(contributions)
    assert told["ghost-layers"] == "loaded"
    assert f"sampler {LINEAR} is given by ghost-layers:plugin; offer an Override" in told["mine"]


def test_an_override_beats_others_who_declare_nothing(install, discover) -> None:
    install("mine", OVERRIDE)
    install("yours", MINE)
    contributions = discover()
    assert used(contributions) == "Mine"
    assert "is given by mine:plugin" in status(contributions)["yours"]


def test_engines_and_projections_can_be_overridden(install, discover) -> None:
    hook = "\n@hookimpl\ndef ghost_engines():\n    return {'hold': %s}\n"
    install("ghost-engines", hook % "GradientHolder")
    install("mine", "class Mine(GradientHolder): pass\n" + hook % "Override(Mine)")
    assert discover().engines["hold"].__name__ == "Mine"


def test_what_is_overridden_is_checked(install, discover) -> None:
    install("ghost-layers", PLAIN)
    install("mine", OVERRIDE.replace("Override(Mine)", "Override(GradientHolder)"))
    contributions = discover()
    assert used(contributions) == "PlainLinear"
    assert "which is no class of GradientSampler" in status(contributions)["mine"]


@pytest.mark.parametrize("name", [f"mine:sampler:{LINEAR}", f" Mine : sampler:{LINEAR}"])
def test_a_single_offer_can_be_switched_off(install, discover, monkeypatch, name: str) -> None:
    monkeypatch.setenv(DISABLED_VARIABLE, name.replace(" : ", ":"))
    install("ghost-layers", PLAIN)
    install("mine", OVERRIDE)
    contributions = discover()
    assert used(contributions) == "PlainLinear"
    assert (
        status(contributions)["mine"] == f"loaded, without sampler {LINEAR} ({DISABLED_VARIABLE})"
    )


def test_one_plugin_of_a_distribution_can_be_switched_off(install, discover, monkeypatch) -> None:
    monkeypatch.setenv(DISABLED_VARIABLE, "mine:b")
    install("mine", PLAIN, entry="a")
    install("mine", "raise RuntimeError", entry="b")
    shown = {plugin.name: plugin.status for plugin in discover().plugins}
    assert shown == {"mine:a": "loaded", "mine:b": f"disabled by {DISABLED_VARIABLE}"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mien", "unknown plugin in GHOST_DISABLED_PLUGINS 'mien'; did you mean 'mine'"),
        ("mine:sampler:torch.nn.Linear", "unknown plugin in GHOST_DISABLED_PLUGINS 'mine:sampler"),
        ("mine, yuors", "'yuors'"),
    ],
)
def test_a_misspelt_name_is_said(
    install, discover, monkeypatch, caplog: pytest.LogCaptureFixture, name: str, message: str
) -> None:
    monkeypatch.setenv(DISABLED_VARIABLE, name)
    install("mine", PLAIN)
    with caplog.at_level(logging.WARNING):
        discover()
    assert message in caplog.text


def test_names_that_mean_something_are_not_complained_about(
    install, discover, monkeypatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(DISABLED_VARIABLE, f"yours,,mine:sampler:{LINEAR},")
    install("mine", PLAIN)
    install("yours", "raise RuntimeError")
    discover()
    assert caplog.text == ""


BADLY = {
    "exits": ("import sys\nsys.exit(3)", "SystemExit: 3"),
    "exits in a hook": (
        "@hookimpl\ndef ghost_samplers():\n    raise SystemExit('bye')",
        "SystemExit: bye",
    ),
    "raises what is no Exception": (
        "class Odd(BaseException):\n    pass\nraise Odd('odd')",
        "Odd: odd",
    ),
    "raises what cannot be told": (
        "class Mute(Exception):\n    def __str__(self):\n        raise self\nraise Mute",
        "failed: Mute",
    ),
    "offers a mapping that raises": (
        "from collections.abc import Mapping\nclass Bad(dict):\n"
        "    def items(self):\n        raise GeneratorExit\n"
        "@hookimpl\ndef ghost_samplers():\n    return Bad()",
        "GeneratorExit",
    ),
}


@pytest.mark.parametrize("how", BADLY)
def test_nothing_that_a_plugin_raises_is_fatal(install, discover, how: str) -> None:
    code, problem = BADLY[how]
    install("bad", code)
    install("mine", MINE)
    contributions = discover()
    assert used(contributions) == "Mine"
    assert problem in status(contributions)["bad"]


def test_an_interrupt_is_not_the_plugin_s(install, discover) -> None:
    install("slow", "raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        discover()


@pytest.mark.parametrize("metadata", ["Metadata-Version: 2.1\n", "", None])
def test_a_distribution_without_a_name_is_reported(
    install, discover, tmp_path: Path, caplog: pytest.LogCaptureFixture, metadata: str | None
) -> None:
    install("unnamed", PLAIN)
    install("mine", MINE)
    file = tmp_path / "unnamed-1.2.dist-info" / "METADATA"
    file.unlink() if metadata is None else file.write_text(metadata)
    contributions = discover()
    assert used(contributions) == "Mine"
    assert status(contributions)["mine"] == "loaded"
    assert re.search(r"nameless\):plugin .* failed: .* has no name", caplog.text)
