"""Values where `optimizer.step` is given a closure, which makes the gradients inside of it."""

import pytest
import torch
from torch import nn

from ghost_core import CaptureError
from ghost_engines import DotProductEngine, InRunValues

INPUTS = torch.randn(12, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def train(closes, clip=0.01, order=1, steps=3):
    """Train; a batch is closed before the step, in its closure, or never."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    engine = DotProductEngine(model)
    engine.add_direction("val", lambda: model(INPUTS).square().mean())
    values = InRunValues(engine, optimizer, order=order)
    with engine, values:
        for step in range(steps):
            ids = [3 * step, 3 * step + 1, 3 * step + 2]
            batch = engine.batch(ids)
            batch.__enter__()

            def backward(ids=ids, batch=batch):
                optimizer.zero_grad()
                loss = model(INPUTS[ids]).square().sum()
                loss.backward()
                if closes != "never":
                    batch.__exit__(None, None, None)
                nn.utils.clip_grad_norm_(model.parameters(), clip)
                return loss

            if closes == "before":
                backward()
                optimizer.step()
            elif closes == "by position":
                optimizer.step(backward)
            else:
                optimizer.step(closure=backward)
    return model, values


@pytest.mark.parametrize("closes", ["by name", "by position"])
def test_values_are_those_of_a_step_without_a_closure(closes):
    """What clipping did inside of the step is part of the value."""
    model, values = train(closes)
    expected, before = train("before")
    assert all(map(torch.equal, model.parameters(), expected.parameters()))
    assert values.to_dict() == before.to_dict()
    assert len(values) == 9
    assert (values.columns()["altered"] == 0).all()
    unclipped = train(closes, clip=1e9, steps=1)[1]
    assert abs(unclipped[0]) > 10 * abs(train(closes, steps=1)[1][0]) > 0


def test_a_batch_that_the_closure_leaves_open_is_refused():
    with pytest.raises(CaptureError, match="step inside an open batch"):
        train("never")


def test_curvature_needs_gradients_before_the_step():
    with pytest.raises(CaptureError, match=r"optimizer\.step\(closure\) does not go with order=2"):
        train("by name", order=2)
