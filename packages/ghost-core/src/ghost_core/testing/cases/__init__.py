"""A table of layer configurations, to run samplers and engines over.

`LAYERS` holds each configuration once: no two have the same semantics, sizes aside. `VARIANTS` has
some of them again, in other sizes or made in another way. Both need nothing but torch.

    from ghost_core.testing import LAYERS, check_example

    for example in LAYERS.values():
        check_example(example)
"""

from collections.abc import Mapping
from types import MappingProxyType

from torch import nn

from ghost_core.testing.cases.attention import ATTENTION, TRANSFORMERS
from ghost_core.testing.cases.bare import BARE
from ghost_core.testing.cases.code import CODE
from ghost_core.testing.cases.convolutions import CONVOLUTION_VARIANTS, CONVOLUTIONS
from ghost_core.testing.cases.linear import LINEAR, LINEAR_VARIANTS
from ghost_core.testing.cases.norms import NORM_VARIANTS, NORMS
from ghost_core.testing.cases.parametrized import PARAMETRIZED
from ghost_core.testing.cases.recurrent import RECURRENT
from ghost_core.testing.cases.refused import REFUSED
from ghost_core.testing.cases.semantics import semantic_key
from ghost_core.testing.cases.shared import CALLS, SHARED
from ghost_core.testing.cases.tables import TABLE_VARIANTS, TABLES
from ghost_core.testing.cases.transposed import ACTIVATIONS, TRANSPOSED, TRANSPOSED_VARIANTS
from ghost_core.testing.examples import LayerExample

_FAMILIES = [
    LINEAR,
    CONVOLUTIONS,
    TABLES,
    NORMS,
    SHARED,
    CALLS,
    TRANSPOSED,
    ACTIVATIONS,
    RECURRENT,
    ATTENTION,
    TRANSFORMERS,
    BARE,
    CODE,
    PARAMETRIZED,
    REFUSED,
]

LAYERS: Mapping[str, LayerExample] = MappingProxyType(
    {name: example for family in _FAMILIES for name, example in family.items()}
)
"""Every configuration by name. Those with a `refusal` must be refused, all others be exact."""

VARIANTS: Mapping[str, LayerExample] = MappingProxyType(
    LINEAR_VARIANTS | CONVOLUTION_VARIANTS | TABLE_VARIANTS | NORM_VARIANTS | TRANSPOSED_VARIANTS
)
"""Examples of semantics that are in `LAYERS`, in other sizes or made in another way."""


def of_family(family: str) -> dict[str, LayerExample]:
    """Return the examples of a family, such as `"linear"` or `"attention"`.

    Raises:
        ValueError: If there is no such family; the message lists those that exist.
    """
    found = {name: example for name, example in LAYERS.items() if example.family == family}
    if not found:
        known = sorted({example.family for example in LAYERS.values()})
        raise ValueError(f"no family {family!r}; there are {', '.join(known)}")
    return found


def of_class(*kinds: type[nn.Module]) -> dict[str, LayerExample]:
    """Return the examples in which a module of one of these very classes owns parameters."""
    return {
        name: example
        for name, example in LAYERS.items()
        if any(
            type(module) in kinds and any(True for _ in module.parameters(recurse=False))
            for module in example.make().modules()
        )
    }


__all__ = ["LAYERS", "VARIANTS", "of_class", "of_family", "semantic_key"]
