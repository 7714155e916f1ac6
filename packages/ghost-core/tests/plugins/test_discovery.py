"""Discovery: whatever a plugin does, the others keep working."""

import logging
from collections.abc import Callable

import pytest
from torch import nn

from ghost_core import Engine, Projection, UnknownNameError
from ghost_core.plugins import DISABLED_VARIABLE, Contributions, collect
from ghost_core.testing import PlainEmbedding, PlainLinear
from ghost_core.tracking import Found

LINEAR = """
@hookimpl
def ghost_samplers():
    return {nn.Linear: PlainLinear}
"""

EMBEDDING = """
@hookimpl
def ghost_samplers():
    return {"torch.nn.modules.sparse.Embedding": PlainEmbedding}

@hookimpl
def ghost_engines():
    return {"hold": GradientHolder}

@hookimpl
def ghost_projections():
    return {"ones": Ones}
"""

Install = Callable[..., None]


def status(contributions: Contributions) -> dict[str, str]:
    return {plugin.name: plugin.status for plugin in contributions.plugins}


def handles(contributions: Contributions, module: nn.Module) -> bool:
    return isinstance(contributions.samplers.find(module), Found)


def test_working_plugins_are_found_with_their_offers(install: Install, discover) -> None:
    install("ghost-one", LINEAR)
    install("ghost-two", EMBEDDING)
    contributions = discover()
    assert status(contributions) == {"ghost-one:plugin": "loaded", "ghost-two:plugin": "loaded"}
    assert isinstance(contributions.samplers.find(nn.Linear(1, 1)).sampler, PlainLinear)
    assert isinstance(contributions.samplers.find(nn.Embedding(1, 1)).sampler, PlainEmbedding)
    assert issubclass(contributions.engines["hold"], Engine)
    assert issubclass(contributions.projection("ones"), Projection)
    assert contributions.plugins[0].version == "1.2"
    assert contributions.plugins[1].offers == [
        "sampler torch.nn.modules.sparse.Embedding",
        "engine hold",
        "projection ones",
    ]


BROKEN = {
    "raises": ("raise RuntimeError('no such driver')", "RuntimeError: no such driver"),
    "does not import": ("import no_such_module", "ModuleNotFoundError"),
    "misspells a hook": (
        "@hookimpl\ndef ghost_sampler():\n    return {}",
        "unknown hook 'ghost_sampler'; did you mean 'ghost_samplers'",
    ),
    "takes arguments": (
        "@hookimpl\ndef ghost_samplers(what):\n    return {}",
        "PluginValidationError",
    ),
    "raises in a hook": (
        "@hookimpl\ndef ghost_samplers():\n    raise KeyError('x')",
        "KeyError: 'x'",
    ),
    "offers no mapping": (
        "@hookimpl\ndef ghost_samplers():\n    return [PlainLinear]",
        "ghost_samplers returned list, not a mapping",
    ),
    "offers an instance": (
        "@hookimpl\ndef ghost_samplers():\n    return {nn.Conv1d: PlainLinear()}",
        "no class of GradientSampler",
    ),
    "offers another kind": (
        "@hookimpl\ndef ghost_engines():\n    return {'linear': PlainLinear}",
        "no class of Engine",
    ),
    "offers under no name": (
        "@hookimpl\ndef ghost_engines():\n    return {3: GradientHolder}",
        "has the key 3, not a name",
    ),
    "offers an engine for a layer": (
        "@hookimpl\ndef ghost_engines():\n    return {nn.Linear: GradientHolder}",
        "not a name",
    ),
    "offers something abstract": (
        "@hookimpl\ndef ghost_projections():\n    return {'none': Projection}",
        "Projection does not implement draw",
    ),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_plugin_is_reported_and_the_rest_works(
    install: Install, discover, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    code, problem = BROKEN[how]
    install("ghost-broken", code)
    install("ghost-one", LINEAR)
    with caplog.at_level(logging.WARNING):
        contributions = discover()
    assert handles(contributions, nn.Linear(1, 1))
    assert status(contributions)["ghost-one:plugin"] == "loaded"
    assert problem in status(contributions)["ghost-broken:plugin"]
    assert "ghost-broken:plugin 1.2 failed" in caplog.text
    assert "ghost-broken:plugin" in contributions.samplers.find(nn.Conv1d(1, 1, 1)).reason
    with pytest.raises(UnknownNameError, match="ghost-broken:plugin"):
        contributions.projection("none")


def test_one_bad_hook_does_not_cost_the_plugin_its_others(install: Install, discover) -> None:
    install("ghost-half", LINEAR + "@hookimpl\ndef ghost_engines():\n    return None\n")
    contributions = discover()
    assert handles(contributions, nn.Linear(1, 1))
    assert "ghost_engines returned NoneType" in status(contributions)["ghost-half:plugin"]


def test_two_plugins_for_one_layer_are_both_named_and_neither_is_used(
    install: Install, discover
) -> None:
    install("ghost-one", LINEAR)
    install("ghost-other", LINEAR)
    install("ghost-two", EMBEDDING)
    contributions = discover()
    assert not handles(contributions, nn.Linear(1, 1))
    assert handles(contributions, nn.Embedding(1, 1))
    for mine, other in (("one", "other"), ("other", "one")):
        text = status(contributions)[f"ghost-{mine}:plugin"]
        assert "PluginConflictError: sampler torch.nn.modules.linear.Linear" in text
        assert f"ghost-{other}:plugin" in text
        assert DISABLED_VARIABLE in text


def test_a_class_and_its_dotted_name_clash(install: Install, discover) -> None:
    install("ghost-one", LINEAR)
    install(
        "ghost-other",
        "@hookimpl\ndef ghost_samplers():\n"
        "    return {'torch.nn.modules.linear.Linear': PlainLinear}",
    )
    assert "PluginConflictError" in status(discover())["ghost-one:plugin"]


@pytest.mark.parametrize("name", ["ghost-other", "ghost-x, ghost-other", "Ghost_Other"])
def test_the_environment_switches_a_distribution_off(
    install: Install, discover, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    install("ghost-one", LINEAR)
    install("ghost-other", LINEAR)
    install("ghost-x", "")
    monkeypatch.setenv(DISABLED_VARIABLE, name)
    contributions = discover()
    assert handles(contributions, nn.Linear(1, 1))
    assert status(contributions)["ghost-other:plugin"] == f"disabled by {DISABLED_VARIABLE}"
    assert status(contributions)["ghost-one:plugin"] == "loaded"


def test_a_disabled_plugin_is_not_imported(
    install: Install, discover, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("ghost-one", "raise RuntimeError")
    monkeypatch.setenv(DISABLED_VARIABLE, "ghost-one")
    assert status(discover()) == {"ghost-one:plugin": f"disabled by {DISABLED_VARIABLE}"}


def test_equal_entry_names_of_two_distributions_do_not_clash(install: Install, discover) -> None:
    install("ghost-one", LINEAR, entry="same")
    install("ghost-two", EMBEDDING, entry="same")
    contributions = discover()
    assert handles(contributions, nn.Linear(1, 1))
    assert handles(contributions, nn.Embedding(1, 1))


def test_a_distribution_may_have_several_entries(install: Install, discover) -> None:
    install("ghost-one", LINEAR, entry="a")
    install("ghost-one", EMBEDDING, entry="b")
    assert list(status(discover())) == ["ghost-one:a", "ghost-one:b"]


def test_a_folder_named_twice_counts_once(install: Install, found) -> None:
    install("ghost-one", LINEAR)
    assert status(collect(found() * 2)) == {"ghost-one:plugin": "loaded"}


def test_an_unknown_projection_lists_what_exists(install: Install, discover) -> None:
    install("ghost-two", EMBEDDING)
    with pytest.raises(UnknownNameError, match="'one'; did you mean 'ones'"):
        discover().projection("one")


def test_nothing_installed_is_no_error() -> None:
    contributions = collect([])
    assert contributions.plugins == ()
    assert contributions.samplers.claims == ()
