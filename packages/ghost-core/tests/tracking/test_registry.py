"""Who handles which module."""

import pytest
import torch
from torch import Tensor, nn

from ghost_core import GradientSampler, PluginConflictError, SamplerRegistry
from ghost_core.testing import PlainEmbedding, PlainLayerNorm, PlainLinear
from ghost_core.tracking import Claim, Refused, dotted_name


class SameLinear(nn.Linear):
    """Runs the methods of its base."""


class OtherLinear(nn.Linear):
    """Computes something else."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class OtherCall(nn.Linear):
    """Computes something else in an unusual place."""

    def __call__(self, input: Tensor) -> Tensor:
        return 2 * super().__call__(input)


def refusal(registry: SamplerRegistry, module: nn.Module) -> str:
    found = registry.find(module)
    assert isinstance(found, Refused), f"handled by {found}"
    return found.reason


def test_a_class_is_found_by_its_dotted_name(registry: SamplerRegistry) -> None:
    assert isinstance(registry.find(nn.Linear(2, 2)).sampler, PlainLinear)
    assert isinstance(registry.find(nn.LayerNorm(2)).sampler, PlainLayerNorm)
    assert isinstance(registry.find(nn.Embedding(2, 2)).sampler, PlainEmbedding)


def test_one_sampler_serves_all_layers_of_its_kind(registry: SamplerRegistry) -> None:
    assert registry.find(nn.Linear(2, 2)).sampler is registry.find(nn.Linear(3, 3)).sampler


def test_a_subclass_that_runs_the_same_methods_is_handled(registry: SamplerRegistry) -> None:
    assert isinstance(registry.find(SameLinear(2, 2)).sampler, PlainLinear)


@pytest.mark.parametrize("kind", [OtherLinear, OtherCall])
def test_a_subclass_that_computes_something_else_is_refused(
    registry: SamplerRegistry, kind: type[nn.Linear]
) -> None:
    assert "replaces" in refusal(registry, kind(2, 2))


def test_a_subclass_can_be_claimed_on_its_own() -> None:
    class Doubled(PlainLinear):
        pass

    registry = SamplerRegistry(
        [
            Claim(dotted_name(nn.Linear), PlainLinear, "a"),
            Claim(dotted_name(OtherLinear), Doubled, "b"),
        ]
    )
    assert type(registry.find(OtherLinear(2, 2)).sampler) is Doubled
    assert type(registry.find(SameLinear(2, 2)).sampler) is PlainLinear


def test_a_method_that_a_sampler_relies_on_must_be_the_same() -> None:
    class Careful(PlainLinear):
        methods = ("forward", "extra_repr")

    class Chatty(nn.Linear):
        def extra_repr(self) -> str:
            return "chatty"

    registry = SamplerRegistry([Claim(dotted_name(nn.Linear), Careful, "a")])
    assert "replaces extra_repr" in refusal(registry, Chatty(2, 2))


def test_a_patched_instance_is_refused(registry: SamplerRegistry) -> None:
    module = nn.Linear(2, 2)
    module.forward = lambda input: input  # type: ignore[method-assign]
    assert "replaces forward" in refusal(registry, module)


def test_a_parameter_too_many_is_refused(registry: SamplerRegistry) -> None:
    module = nn.Linear(2, 2)
    module.scale = nn.Parameter(torch.ones(1))
    assert "it owns scale" in refusal(registry, module)


def test_a_sampler_may_refuse(registry: SamplerRegistry) -> None:
    assert "max_norm" in refusal(registry, nn.Embedding(3, 2, max_norm=1.0))


def test_an_unknown_module_is_named_with_the_note() -> None:
    registry = SamplerRegistry([], " (plugins left out: broken:ghost)")
    message = refusal(registry, nn.Linear(2, 2))
    assert "torch.nn.modules.linear.Linear" in message
    assert "broken:ghost" in message


def test_two_plugins_for_one_class_are_an_error_that_names_both() -> None:
    claims = [Claim("a.Layer", PlainLinear, "one"), Claim("a.Layer", PlainEmbedding, "two")]
    with pytest.raises(PluginConflictError, match=r"'one' and 'two' both handle a\.Layer"):
        SamplerRegistry(claims)


def test_claims_are_listed_in_order() -> None:
    claims = (Claim("b.Layer", PlainLinear, "one"), Claim("a.Layer", PlainLinear, "two"))
    assert SamplerRegistry(claims).claims == claims


def test_samplers_are_made_when_they_are_needed() -> None:
    class Costly(PlainLinear):
        def __init__(self) -> None:
            raise AssertionError("not needed")

    registry = SamplerRegistry([Claim("a.Layer", Costly, "one")])
    assert isinstance(registry.find(nn.Linear(2, 2)), Refused)
    assert issubclass(Costly, GradientSampler)
