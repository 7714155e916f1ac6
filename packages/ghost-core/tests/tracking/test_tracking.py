"""Which parameters are tracked, and under which names."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from ghost_core import (
    CaptureError,
    GhostError,
    SamplerRegistry,
    UnknownNameError,
    UnsupportedLayerError,
)
from ghost_core.testing import TinyTransformer
from ghost_core.tracking import Patterns, Selection, Tracking, as_patterns, track


class Model(nn.Module):
    """Two blocks, a norm and a head that is tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(7, 4)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"attn": nn.Linear(4, 4), "mlp": nn.Linear(4, 4, bias=False)})
            for _ in range(2)
        )
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.tokens.weight


def select(
    model: nn.Module, registry: SamplerRegistry, layers: Patterns = "*", exclude: Patterns = ()
) -> Tracking:
    return track(model, Selection(registry, layers, exclude))


def names(tracking: Tracking) -> list[str]:
    return [parameter.name for parameter in tracking.parameters]


@pytest.mark.parametrize(
    ("layers", "exclude", "expected"),
    [
        (
            "*",
            (),
            "blocks.0.attn.bias blocks.0.attn.weight blocks.0.mlp.weight blocks.1.attn.bias "
            "blocks.1.attn.weight blocks.1.mlp.weight norm.bias norm.weight tokens.weight",
        ),
        ("blocks.0", (), "blocks.0.attn.bias blocks.0.attn.weight blocks.0.mlp.weight"),
        ("*mlp*", (), "blocks.0.mlp.weight blocks.1.mlp.weight"),
        ("*attn.weight", (), "blocks.0.attn.weight blocks.1.attn.weight"),
        ("norm, blocks.1.mlp ,", (), "blocks.1.mlp.weight norm.bias norm.weight"),
        (["norm", "blocks.1.mlp"], (), "blocks.1.mlp.weight norm.bias norm.weight"),
        ("blocks", "*.bias,*mlp*", "blocks.0.attn.weight blocks.1.attn.weight"),
        ("norm", ["*.bias"], "norm.weight"),
        ("head", (), "tokens.weight"),
        ("tokens,norm", "head", "norm.bias norm.weight"),
        ("blocks.[01].mlp", (), "blocks.0.mlp.weight blocks.1.mlp.weight"),
    ],
)
def test_globs_select_parameters(
    registry: SamplerRegistry, layers: str, exclude: str, expected: str
) -> None:
    assert names(select(Model(), registry, layers, exclude)) == expected.split()


def test_a_shared_parameter_is_one_site_with_all_its_names(registry: SamplerRegistry) -> None:
    tracking = select(Model(), registry, "tokens")
    (parameter,) = tracking.parameters
    assert parameter.name == "tokens.weight"
    assert parameter.aliases == ("tokens.weight", "head.weight")
    assert parameter.shape == (7, 4)
    assert parameter.dtype == torch.float32
    assert [module.name for module in tracking.modules] == ["tokens", "head"]
    assert all(module.parameters["weight"] is parameter for module in tracking.modules)


def test_a_module_in_two_places_is_tracked_once(registry: SamplerRegistry) -> None:
    shared = nn.Linear(3, 3)
    tracking = select(nn.Sequential(shared, nn.ReLU(), shared), registry)
    assert [module.name for module in tracking.modules] == ["0"]
    assert tracking.parameters[1].aliases == ("0.weight", "2.weight")


def test_modules_come_in_the_order_of_the_model_and_know_their_parameters(
    registry: SamplerRegistry,
) -> None:
    tracking = select(Model(), registry, "norm,blocks.0")
    assert [module.name for module in tracking.modules] == ["blocks.0.attn", "blocks.0.mlp", "norm"]
    assert tracking.modules[0].shapes == {"weight": (4, 4), "bias": (4,)}


def test_frozen_parameters_are_left_out(registry: SamplerRegistry) -> None:
    model = Model()
    model.norm.bias.requires_grad_(False)
    model.blocks.requires_grad_(False)
    assert names(select(model, registry)) == ["norm.weight", "tokens.weight"]
    assert not model.norm.bias.requires_grad


def test_a_module_with_frozen_parameters_only_needs_no_sampler(registry: SamplerRegistry) -> None:
    model = nn.Sequential(nn.Conv1d(2, 2, 1).requires_grad_(False), nn.Linear(3, 3))
    assert names(select(model, registry)) == ["1.bias", "1.weight"]


@pytest.mark.parametrize("option", ["layers", "exclude"])
def test_a_pattern_that_matches_nothing_is_an_error_that_lists_names(
    registry: SamplerRegistry, option: str
) -> None:
    with pytest.raises(UnknownNameError, match=r"blocks\.0\.atn.*did you mean 'blocks\.0\.attn'"):
        select(Model(), registry, **{option: ["norm", "blocks.0.atn"]})


def test_an_unknown_name_is_a_value_error_and_a_ghost_error(registry: SamplerRegistry) -> None:
    with pytest.raises(ValueError, match=r"Patterns are .* Available: blocks, .*more\.$") as caught:
        select(Model(), registry, "nothing")
    assert isinstance(caught.value, GhostError)


@pytest.mark.parametrize(
    ("layers", "exclude", "frozen"), [("*", "*", ""), ("", (), ""), ("norm", (), "norm")]
)
def test_no_parameter_is_an_error(
    registry: SamplerRegistry, layers: str, exclude: str, frozen: str
) -> None:
    model = Model()
    if frozen:
        model.get_submodule(frozen).requires_grad_(False)
    with pytest.raises(CaptureError, match=r"no trainable parameter is selected: \d of 9"):
        select(model, registry, layers, exclude)


def test_unsupported_modules_are_listed_with_reasons(registry: SamplerRegistry) -> None:
    model = nn.ModuleDict({"conv": nn.Conv1d(2, 2, 1), "norm": nn.LayerNorm((2, 2))})
    with pytest.raises(UnsupportedLayerError) as caught:
        select(model, registry)
    message = str(caught.value)
    assert "conv [conv.weight, conv.bias]: no sampler is registered for torch.nn" in message
    assert "norm [norm.weight, norm.bias]: only the last axis" in message
    assert "exclude=" in message


def test_bare_parameters_are_not_skipped_silently(registry: SamplerRegistry) -> None:
    model = Model()
    model.scale = nn.Parameter(torch.ones(1))
    with pytest.raises(UnsupportedLayerError, match=r"\(root\) \[scale\]"):
        select(model, registry)
    assert "scale" not in names(select(model, registry, exclude="scale"))


def test_a_parametrised_weight_is_not_taken_for_a_plain_one(registry: SamplerRegistry) -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(2, 2)))
    with pytest.raises(UnsupportedLayerError, match="ParametrizationList"):
        select(model, registry)
    assert names(select(model, registry, "*.bias")) == ["0.bias"]


@pytest.mark.parametrize("inner", [True, False])
def test_compiled_modules_are_refused_by_name(registry: SamplerRegistry, inner: bool) -> None:
    model: nn.Module = TinyTransformer()
    if inner:
        model.attend.compile(backend="eager")
    else:
        model = torch.compile(model, backend="eager")
    with pytest.raises(CaptureError, match="attend" if inner else "the model") as caught:
        select(model, registry)
    assert "before torch.compile" in str(caught.value)


def test_patterns() -> None:
    assert as_patterns("a, b.*,,") == ("a", "b.*")
    assert as_patterns(["a,b", "c"]) == ("a", "b", "c")
    assert as_patterns(()) == ()
