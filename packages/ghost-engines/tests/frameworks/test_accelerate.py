"""Values in a loop of Accelerate's: accumulation, its backward pass, its clipping."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from trainer_kit import brute_force

from ghost_core import CaptureError
from ghost_engines import DotProductEngine, IdCollator, InRunValues, Run, take_ids, with_ids

RATE, CLIP = 0.2, 0.05
INPUTS = torch.randn(22, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
VALIDATION = torch.randn(5, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()


def loss_of(model, inputs):
    return model(inputs).square().sum(1)


@pytest.fixture
def accelerate():
    """Accelerate, whose settings are those of the whole process."""
    found = pytest.importorskip("accelerate")
    reset(found)
    yield found
    reset(found)


def reset(accelerate):
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def train(accelerate, folder, with_ghost):
    """Train; return the model, the run and what was trained on."""
    reset(accelerate)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    data = DataLoader(with_ids([{"x": x} for x in INPUTS]), batch_size=4, collate_fn=IdCollator())
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    model, optimizer, data = accelerator.prepare(model, optimizer, data)
    seen, at = [], 0
    method = "dot_product" if with_ghost else "none"
    direction = {"val": lambda: loss_of(model, VALIDATION).mean()}
    run = Run(model, optimizer, {"folder": folder, "method": method}, directions=direction)
    with run:
        for batch in data:
            ids = take_ids(batch)
            parameters = {name: each.clone() for name, each in model.state_dict().items()}
            seen.append({"at": at, "ids": ids.tolist(), "parameters": parameters})
            with accelerator.accumulate(model):
                with run.batch(ids):
                    accelerator.backward(loss_of(model, batch["x"]).mean())
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), CLIP)
                    at += 1
                optimizer.step()
                optimizer.zero_grad()
    return accelerator.unwrap_model(model), run, seen


def losses(model, parts):
    return [
        loss_of(model, INPUTS[[one]]).sum() / len(part["ids"]) / 2
        for part in parts
        for one in part["ids"]
    ]


def test_values_are_those_of_brute_force(accelerate, tmp_path):
    expected_model, _, seen = train(accelerate, tmp_path / "none", with_ghost=False)
    model, run, _ = train(accelerate, tmp_path / "run", with_ghost=True)
    assert all(map(torch.equal, model.parameters(), expected_model.parameters()))

    def validation(one):
        return loss_of(one, VALIDATION).mean()

    expected = brute_force(net(), seen, losses, validation, rate=RATE, clip=CLIP)
    assert sorted(expected) == list(range(22))
    assert run.values.to_dict() == pytest.approx(expected, rel=1e-9)
    assert run.steps == 3


def test_mistakes_say_what_to_do():
    model, other = net(), net()
    engine = DotProductEngine(model)
    with pytest.raises(CaptureError, match=r"the optimizer does not hold 0\.bias"):
        InRunValues(engine, torch.optim.SGD(other.parameters(), lr=RATE))
    wrapped = nn.ModuleList([model])  # as a wrapper has it inside
    outer = DotProductEngine(wrapped)
    outer.add_direction("val", lambda: loss_of(model, VALIDATION).mean())
    with pytest.raises(CaptureError, match="call"), outer, outer.batch([0, 1]):
        loss_of(model, INPUTS[:2]).sum().backward()


def prepared(accelerate):
    reset(accelerate)
    accelerator = accelerate.Accelerator(cpu=True)
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    return accelerator, *accelerator.prepare(model, optimizer)


@pytest.mark.stress
def test_accelerates_checkpoints_have_the_values(accelerate, tmp_path):
    found = []
    for name in ("whole", "resumed"):
        accelerator, model, optimizer = prepared(accelerate)
        direction = {"val": lambda model=model: loss_of(model, VALIDATION).mean()}
        run = Run(model, optimizer, {"folder": tmp_path / name}, directions=direction)
        accelerator.register_for_checkpointing(run)
        with run:
            if name == "resumed":
                accelerator.load_state(str(tmp_path / "saved"))
            while run.steps < 4:
                ids = [3 * run.steps, 3 * run.steps + 1, 3 * run.steps + 2]
                with run.batch(ids):
                    accelerator.backward(loss_of(model, INPUTS[ids]).mean())
                optimizer.step()
                optimizer.zero_grad()
                if run.steps == 2 and name == "whole":
                    accelerator.save_state(str(tmp_path / "saved"))
        found.append((accelerator.unwrap_model(model), run))
    (whole, one), (resumed, other) = found
    assert all(map(torch.equal, whole.parameters(), resumed.parameters()))
    assert one.values.to_dict() == other.values.to_dict()
    assert len(one.values) == 12
