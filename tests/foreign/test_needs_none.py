"""Models without anything to follow: after the first batch nothing watches them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.foreign.foreign import curved
from tests.foreign.language import NanoGPT
from torch import Tensor, nn
from torch.utils import _python_dispatch

from ghost_core._torch import function_modes, gradient_hooks
from ghost_core.testing import GradientHolder

N = 3


class Looking(nn.Module):
    """A model that notes what watches it while it runs, in its middle."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.seen = model, set[str]()
        list(model.modules())[-1].register_forward_pre_hook(self._look)

    def _look(self, *_: object) -> None:
        self.seen = {type(mode).__name__ for mode in function_modes()}
        self.seen |= {
            type(mode).__name__ for mode in _python_dispatch._get_current_dispatch_mode_stack()
        }
        self.seen |= {name for name, each in self.named_parameters() if gradient_hooks(each)}

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


def _layers() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 2))


MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "layers": lambda: (_layers(), torch.randn(N, 4)),
    "convolutions": lambda: (
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(16, 2)),
        torch.randn(N, 1, 4, 4),
    ),
}


def watched(model: nn.Module, x: Tensor) -> list[set[str]]:
    """Return what watched each of three batches."""
    looking, seen = Looking(model), []
    engine = GradientHolder(looking)
    with engine:
        for _ in range(3):
            with engine.batch(range(N)):
                curved(looking(x)).sum().backward()
            seen.append(looking.seen)
    return seen


@pytest.mark.parametrize("name", MODELS)
def test_nothing_watches_after_the_first_batch(name: str) -> None:
    torch.manual_seed(0)
    first, *later = watched(*MODELS[name]())
    assert {"SharedValues", "UsageMode"} <= first
    assert later == [set(), set()]


def test_what_has_something_to_follow_is_watched_further() -> None:
    torch.manual_seed(0)
    first, *later = watched(NanoGPT(), torch.randint(11, (N, 4)))
    assert {"SharedValues", "UsageMode"} <= first
    assert all("SharedValues" in each and "UsageMode" not in each for each in later)
