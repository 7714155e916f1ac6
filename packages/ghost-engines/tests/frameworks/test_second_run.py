"""A second run in the folder of another, inside Lightning, without its trainer, which is slow."""

import pytest
import torch
from torch import nn

from ghost_core import CaptureError
from ghost_engines import Run, RunConfig


def test_lightning_is_told_how_it_goes_on(tmp_path):
    pytest.importorskip("lightning.pytorch")
    from ghost_engines.frameworks.lightning import GhostLightning

    net = nn.Linear(3, 2)
    config = RunConfig(folder=tmp_path, mode="exact")
    directions = {"val": lambda: net(torch.ones(1, 3)).sum()}

    def begin(callback):
        run = Run(net, torch.optim.SGD(net.parameters(), lr=0.1), config, directions=directions)
        callback.begin(run, None)
        callback.on_train_batch_start(None, None, {"sample_id": torch.arange(2)}, 0)

    def end(callback):
        callback.on_exception(None, None, interrupt := KeyboardInterrupt())
        assert not hasattr(interrupt, "__notes__")

    first, second = (GhostLightning(config, directions) for _ in range(2))
    begin(first)
    end(first)
    with pytest.raises(CaptureError, match="there is a run in") as caught:
        begin(second)
    assert "trainer.fit(..., ckpt_path=...)" in caught.value.remedy
    assert "choose another folder" in caught.value.remedy
    second.on_exception(None, None, caught.value)
    assert not hasattr(caught.value, "__notes__")
    assert not net._forward_hooks
