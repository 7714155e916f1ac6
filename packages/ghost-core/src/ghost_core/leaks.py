"""Looks for ways from a model's outputs to a parameter that lead past the Taps of its modules."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from ghost_core.errors import WrongSplitError
from ghost_core.tap import receiver_of
from ghost_core.tracking import TrackedModule


def check_leaks(
    model: nn.Module,
    outputs: Iterable[Tensor],
    modules: Mapping[str, TrackedModule],
    names: Iterable[str],
) -> None:
    """Raise if a gradient could reach a parameter without passing its module's outputs.

    A layer of a known class returns all that it computes. Any other module may leave something in
    an attribute or in an object that it was given, and what comes of that has no Tap. Only modules
    whose sampler is generic or that own parameters of others are looked at, and only where
    parameters are not frozen, since else the graph does not lead to them.

    Args:
        model: The root module.
        outputs: What the model returned.
        modules: The tracked modules by name.
        names: Those to look at.

    Raises:
        WrongSplitError: Naming module and parameter.
    """
    roots = [output.grad_fn for output in outputs]
    owners: dict[str, set[str]] = {}
    for tracked in modules.values():
        for site in tracked.sites.values():
            owners.setdefault(site.parameter, set()).add(tracked.name)
    for tracked in (modules[name] for name in names):
        for local, site in tracked.sites.items():
            if not tracked.sampler.generic and "." not in local:
                continue
            parameter = model.get_parameter(site.parameter)
            if _leads_to(parameter, roots, owners[site.parameter]):
                raise WrongSplitError(
                    f"gradients cannot be split by sample: {site.parameter} matters for the "
                    f"model's output in a way that does not pass the outputs of {tracked.label}\n"
                    "Reason: what the module leaves in an attribute, or in an object that it was "
                    "given (such as a cache), is used afterwards.\n"
                    f"Remedy: return it instead, or leave the parameter out with "
                    f"exclude={site.parameter!r}"
                )


def _leads_to(parameter: Tensor, roots: Iterable[Any], owners: set[str]) -> bool:
    """Walk through the graph, but not past the Taps of the parameter's modules."""
    waiting, seen = [node for node in roots if node is not None], set()
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if getattr(node, "variable", None) is parameter:
            return True
        if (receiver := receiver_of(node)) is not None and receiver.name in owners:
            continue
        waiting += [behind for behind, _ in node.next_functions if behind is not None]
    return False
