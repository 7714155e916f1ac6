"""What a sampler raises stays what it is, and says whose sampler it is and for what."""

import pytest
import torch
from torch import Tensor, nn

from ghost_core import CaptureError, Claim, SamplerRegistry
from ghost_core.testing import GradientHolder, PlainLinear


class OddError(Exception):
    """Nobody else raises this."""


def failing(where: str, error: Exception) -> type[PlainLinear]:
    def fail(*_: object) -> None:
        raise error

    return type("Failing", (PlainLinear,), {where: fail})


def run(where: str, error: Exception, way: str) -> None:
    model = nn.Sequential(nn.Linear(3, 2)).double()
    claim = Claim("torch.nn.modules.linear.Linear", failing(where, error), "shop:layers")
    engine = GradientHolder(model, registry=SamplerRegistry([claim]))
    x: Tensor = torch.randn(4, 3, dtype=torch.float64)
    with engine.frozen() if way == "frozen" else engine, engine.batch(range(4)):
        model(x).square().sum().backward()


@pytest.mark.parametrize("where", ["prepare", "record", "gradients"])
@pytest.mark.parametrize("way", ["attached", "frozen"])
def test_plugin_and_module_are_named(where: str, way: str) -> None:
    with pytest.raises(OddError) as caught:
        run(where, OddError("odd"), way)
    assert str(caught.value) == "odd"
    (note,) = caught.value.__notes__
    assert "Failing of the plugin shop:layers" in note
    assert "0 [0.weight, 0.bias], a torch.nn.modules.linear.Linear" in note


def test_what_ghost_says_is_enough() -> None:
    with pytest.raises(CaptureError) as caught:
        run("record", CaptureError("ours"), "attached")
    assert not hasattr(caught.value, "__notes__")
