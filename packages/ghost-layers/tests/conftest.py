from __future__ import annotations

import pytest
import torch

from ghost_core import SamplerRegistry
from ghost_core.tracking import Claim, dotted_name
from ghost_layers.plugin import ghost_samplers
from ghost_layers.replay import Plan, Search, Way


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.default_generator.manual_seed(0)  # `torch.manual_seed` formats stack traces, too


@pytest.fixture(scope="session")
def registry() -> SamplerRegistry:
    """Everything that this package offers, whether or not other plugins are installed."""
    return SamplerRegistry(
        Claim(kind if isinstance(kind, str) else dotted_name(kind), sampler, "ghost-layers:layers")
        for kind, sampler in ghost_samplers().items()
    )


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> list[Way]:
    """The ways to run calls again that were found, in order."""
    found: list[Way] = []
    find = Search.find

    def find_and_note(self: Search) -> Plan:
        plan = find(self)
        found.append(plan.way)
        return plan

    monkeypatch.setattr(Search, "find", find_and_note)
    return found
