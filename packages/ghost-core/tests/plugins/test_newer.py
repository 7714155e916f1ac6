"""A plugin that was made for a newer ghost: what fits is loaded, what does not is said."""

import logging

import pytest
from torch import nn

from ghost_core import PluginError
from ghost_core.plugins import Contributions
from ghost_core.testing import GradientHolder
from ghost_core.tracking import Found

NEWER = """
import ghost_core

@hookimpl
def ghost_samplers():
    return {nn.Linear: PlainLinear, nn.Embedding: Override(PlainEmbedding, priority=3, when=1)}

@hookimpl
def ghost_dashboards():
    raise AssertionError("nobody asks for these")

@hookimpl
def ghost_engines(model):
    raise AssertionError("nobody has a model")

@hookimpl
def ghost_projections():
    from ghost_core import SomethingNew

@hookimpl
def ghost_commands():
    return {"fine": Command, "Not Fine": Command, "bad": PlainLinear}

class Command:
    def run(self):
        return 0
"""

SAID = [
    "unknown hook 'ghost_dashboards'",
    "Argument(s) {'model'} are declared in the hookimpl but can not be found",
    "cannot import name 'SomethingNew'",
    "an Override has 'priority', 'when'",
    "ghost_commands has the key 'Not Fine'",
    "ghost_commands offers <class",
]


def status(contributions: Contributions) -> str:
    (plugin,) = contributions.plugins
    return plugin.status


def test_what_fits_is_loaded_and_the_rest_is_said(
    install, discover, caplog: pytest.LogCaptureFixture
) -> None:
    install("newer", NEWER)
    with caplog.at_level(logging.WARNING):
        contributions = discover()
    (plugin,) = contributions.plugins
    assert plugin.offers == ["sampler torch.nn.modules.linear.Linear", "command fine"]
    assert isinstance(contributions.samplers.find(nn.Linear(1, 1)), Found)
    assert not isinstance(contributions.samplers.find(nn.Embedding(1, 1)), Found)
    assert contributions.commands["fine"]().run() == 0
    assert contributions.owner("command", "fine") == "newer:plugin"
    assert plugin.status.startswith("loaded in part: ")
    assert len(plugin.problems) == len(SAID)
    for said in SAID:
        assert said in plugin.status
        assert said in caplog.text


def test_of_several_offers_of_a_hook_the_good_ones_stand(install, discover) -> None:
    install(
        "half",
        "@hookimpl\ndef ghost_engines():\n"
        "    return {'hold': GradientHolder, 'linear': PlainLinear, 3: GradientHolder}\n",
    )
    contributions = discover()
    assert list(contributions.engines) == ["hold"]
    assert "no class of Engine" in status(contributions)
    assert "has the key 3, not a name" in status(contributions)


def test_a_hook_may_have_another_name_than_its_function(install, discover) -> None:
    install(
        "named",
        "@hookimpl(specname='ghost_engines')\ndef mine():\n    return {'hold': GradientHolder}\n",
    )
    assert list(discover().engines) == ["hold"]


def test_a_plugin_of_which_nothing_fits_has_failed(install, discover) -> None:
    install("newest", "@hookimpl\ndef ghost_dashboards():\n    return {}\n")
    assert status(discover()).startswith("failed: UnknownNameError: unknown hook 'ghost_dashb")


@pytest.mark.parametrize("command", ["3", "None", "PlainLinear", "PlainLinear()", "Running()"])
def test_what_cannot_be_run_is_no_command(install, discover, command: str) -> None:
    code = "class Running:\n    def run(self):\n        return 0\n"
    hook = f"@hookimpl\ndef ghost_commands():\n    return {{'bad': {command}}}\n"
    install("bad", code + hook)
    contributions = discover()
    assert dict(contributions.commands) == {}
    assert "which is no class of Command" in status(contributions)


def test_two_plugins_with_one_command_are_both_named(install, discover) -> None:
    code = "class Running:\n    def run(self):\n        return 0\n"
    hook = "@hookimpl\ndef ghost_commands():\n    return {'hello': Running}\n"
    install("mine", code + hook)
    install("yours", code + hook)
    contributions = discover()
    assert dict(contributions.commands) == {}
    assert all("command hello is also offered" in each.status for each in contributions.plugins)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("def __init__(self):\n        raise KeyError('init')", "Faulty cannot be made: KeyError"),
        ("def refuse(self, module):\n        raise KeyError('refuse')", "Faulty.refuse raised"),
        ("def owns(self, module):\n        raise KeyError('owns')", "Faulty.owns raised"),
    ],
)
def test_a_sampler_that_fails_before_a_pass_names_plugin_and_module(
    install, discover, code: str, said: str
) -> None:
    install(
        "faulty",
        f"class Faulty(PlainLinear):\n    {code}\n\n"
        "@hookimpl\ndef ghost_samplers():\n    return {nn.Linear: Faulty}\n",
    )
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(PluginError, match=said) as caught:
        GradientHolder(model, registry=discover().samplers)
    assert "faulty:plugin" in str(caught.value)
    assert "torch.nn.modules.linear.Linear" in str(caught.value)
    assert "GHOST_DISABLED_PLUGINS" in caught.value.remedy
