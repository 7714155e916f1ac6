"""Values in a loop of Accelerate's: accumulation, its backward pass, its clipping."""

from contextlib import nullcontext

import pytest
import torch
from process_kit import group_of_one
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from trainer_kit import brute_force

from ghost_core import CaptureError
from ghost_core.testing.snapshots import assert_untouched, traces
from ghost_engines import DotProductEngine, IdCollator, InRunValues, Run, take_ids, with_ids

RATE, CLIP, BATCH = 0.2, 0.05, 4
INPUTS = torch.randn(22, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
VALIDATION = torch.randn(5, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def net(dropout=0.0):
    torch.manual_seed(0)
    middle = [nn.Tanh(), nn.Dropout(dropout)]
    return nn.Sequential(nn.Linear(4, 6), *middle, nn.Linear(6, 2)).double()


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


class Loop:
    """A loop as a user has it, which knows of ghost only what it is given.

    Attributes:
        seen: What it trained on, batch by batch, and with what parameters.
    """

    def __init__(self, accelerate, dropout=0.0, wrap=None):
        reset(accelerate)
        self.accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = net(dropout)
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        if wrap is not None:  # as `prepare` does where there are several processes
            self.model = wrap(self.model)
        self.seen = []

    @property
    def inner(self):
        return self.accelerator.unwrap_model(self.model)

    def measured(self, folder, model=None):
        """Return a run of this loop."""
        direction = {"val": lambda: loss_of(self.model, VALIDATION).mean()}
        model = self.model if model is None else model
        return Run(model, self.optimizer, {"folder": folder}, directions=direction)

    def data(self, run):
        rows = [{"x": x} for x in INPUTS]
        if run is None:
            return self.accelerator.prepare(DataLoader(rows, batch_size=BATCH))
        data = DataLoader(with_ids(rows), batch_size=BATCH, collate_fn=IdCollator())
        return self.accelerator.prepare(data)

    def epoch(self, run=None, *, evaluates=False, fails_at=None):
        """Train once on all samples, without ghost where there is no run."""
        all_ids = torch.arange(len(INPUTS)).split(BATCH)
        for index, batch in enumerate(self.data(run)):
            ids = all_ids[index].tolist()
            assert run is None or take_ids(batch).tolist() == ids
            parameters = {name: each.clone() for name, each in self.inner.state_dict().items()}
            self.seen.append({"at": index // 2, "ids": ids, "parameters": parameters})
            if evaluates:
                self.evaluate()
            with self.accelerator.accumulate(self.model):
                with nullcontext() if run is None else run.batch(ids):
                    loss = loss_of(self.model, batch["x"]).mean()
                    if evaluates:
                        with nullcontext() if run is None else run.evaluation():
                            self.evaluate()
                    if index == fails_at:
                        raise ZeroDivisionError
                    self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), CLIP)
                self.optimizer.step()
                self.optimizer.zero_grad()

    def evaluate(self):
        """Look at the validation loss and at its gradient."""
        self.model.eval()
        with torch.no_grad():
            loss = loss_of(self.model, VALIDATION).mean()
        again = loss_of(self.model, VALIDATION).mean()
        assert torch.equal(loss, again)
        assert all(each.any() for each in torch.autograd.grad(again, [*self.model.parameters()]))
        self.model.train()


def same_parameters(one, other):
    pairs = zip(one.inner.parameters(), other.inner.parameters(), strict=True)
    return all(torch.equal(*pair) for pair in pairs)


def losses(model, parts):
    return [
        loss_of(model, INPUTS[[one]]).sum() / len(part["ids"]) / 2
        for part in parts
        for one in part["ids"]
    ]


def test_values_are_those_of_brute_force(accelerate, tmp_path):
    plain, loop = Loop(accelerate), Loop(accelerate)
    plain.epoch()
    with loop.measured(tmp_path) as run:
        loop.epoch(run)
    assert same_parameters(loop, plain)

    def validation(one):
        return loss_of(one, VALIDATION).mean()

    expected = brute_force(net(), plain.seen, losses, validation, rate=RATE, clip=CLIP)
    assert sorted(expected) == list(range(22))
    assert run.values.to_dict() == pytest.approx(expected, rel=1e-9)
    assert run.steps == 3


def test_evaluation_between_changes_nothing(accelerate, tmp_path):
    """Also while a batch is open, and in a model that draws when it trains."""
    found = {}
    for evaluates in (False, True):
        plain, loop = Loop(accelerate, dropout=0.3), Loop(accelerate, dropout=0.3)
        torch.manual_seed(1)
        plain.epoch(evaluates=evaluates)
        torch.manual_seed(1)
        with loop.measured(tmp_path / str(evaluates)) as run:
            loop.epoch(run, evaluates=evaluates)
        assert same_parameters(loop, plain)
        found[evaluates] = loop, run.values.to_dict()
    assert same_parameters(found[True][0], found[False][0])
    assert found[True][1] == found[False][1]
    assert len(found[True][1]) == 22
    assert any(found[True][1].values())


def interrupted(loop, fails_at, run=None):
    """Train until something fails in a batch, and once more without ghost."""
    before = traces(loop.model)
    with pytest.raises(ZeroDivisionError), run or nullcontext():
        loop.epoch(run, fails_at=fails_at)
    loop.optimizer.zero_grad()
    assert_untouched(before, loop.model, "an exception")
    optimizer = loop.optimizer.optimizer
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    loop.epoch()


@pytest.mark.parametrize("fails_at", [2, pytest.param(3, marks=pytest.mark.stress)])
def test_an_exception_in_the_middle_of_a_step(fails_at, accelerate, tmp_path):
    """In the first of its batches, and where gradients of another one wait."""
    plain, loop = Loop(accelerate), Loop(accelerate)
    interrupted(plain, fails_at)
    interrupted(loop, fails_at, run := loop.measured(tmp_path))
    assert same_parameters(loop, plain)
    assert run.steps == 1
    assert sorted(run.values.to_dict()) == list(range(2 * BATCH))  # those of the whole step


@pytest.mark.parametrize("given", ["wrapper", pytest.param("inside", marks=pytest.mark.stress)])
def test_the_wrapper_or_what_is_inside_may_be_given(given, accelerate, tmp_path):
    """`prepare` wraps the model only where there are several processes."""
    with group_of_one():
        plain, loop = (Loop(accelerate, wrap=DistributedDataParallel) for _ in range(2))
        plain.epoch()
        with loop.measured(tmp_path / "a", loop.model if given == "wrapper" else loop.inner) as run:
            loop.epoch(run)
    alone = Loop(accelerate)
    with alone.measured(tmp_path / "b") as expected:
        alone.epoch(expected)
    assert isinstance(loop.model, DistributedDataParallel)
    assert same_parameters(loop, plain)
    assert same_parameters(loop, alone)
    assert run.values.to_dict() == expected.values.to_dict()


def said(what):
    """Return the whole message of what is refused."""
    with pytest.raises(CaptureError) as caught:
        what()
    return str(caught.value)


def test_a_removed_column_is_named(accelerate):
    """A collator of one's own takes what the model needs, and no more."""

    def collate(samples):
        return {"x": torch.stack([each["x"] for each in samples])}

    data = DataLoader(with_ids([{"x": x} for x in INPUTS]), batch_size=BATCH, collate_fn=collate)
    batch = next(iter(Loop(accelerate).accelerator.prepare(data)))
    assert said(lambda: take_ids(batch)) == (
        "the batch has no 'sample_id': it has x\n"
        "Reason: data without with_ids (data to evaluate on need ids, too, where they go through "
        "the same collator), a collator other than IdCollator, or a trainer that takes away what "
        "the model's forward does not name.\n"
        "Remedy: load with_ids(data), or data with such a column, with "
        "collate_fn=IdCollator(...); for Hugging Face's Trainer set "
        "TrainingArguments(remove_unused_columns=False)"
    )


def test_the_optimizer_of_another_model_is_named(accelerate, tmp_path):
    loop, other = Loop(accelerate), Loop(accelerate)
    before = traces(loop.model)
    engine, loop.optimizer = DotProductEngine(loop.model), other.optimizer
    message = said(loop.measured(tmp_path).__enter__)
    assert message == said(lambda: InRunValues(engine, other.optimizer))
    assert message == (
        "the optimizer holds none of the parameters that the engine tracks, 0.bias among them\n"
        "Reason: it is that of another model, or was made before the model's parameters were "
        "replaced, as wrapping, moving or loading a model may do.\n"
        "Remedy: make it of the model that is trained, with model.parameters(), once that is "
        "loaded, moved and wrapped, and the engine of the same model"
    )
    assert_untouched(before, loop.model, "a refusal")


def test_an_engine_on_another_wrapper_is_named(accelerate, tmp_path):
    """One that the loop does not call, and one with a wrapped part."""
    loop = Loop(accelerate)
    with loop.measured(tmp_path, nn.ModuleList([loop.model])) as run:
        assert said(lambda: loop.epoch(run)) == (
            "0.0 was called outside a call of the model: call the module that the engine was made "
            "for, or close the batch first"
        )
    with group_of_one():
        part = nn.Sequential(DistributedDataParallel(net()))
        assert said(lambda: loop.measured(tmp_path, part)) == (
            "0 is a DistributedDataParallel\n"
            "Reason: it wraps a part of the model only.\n"
            "Remedy: wrap the whole model in DistributedDataParallel, and give that to the engine"
        )


@pytest.mark.stress
def test_accelerates_checkpoints_have_the_values(accelerate, tmp_path):
    found = []
    for name in ("whole", "resumed"):
        loop = Loop(accelerate)
        run = loop.measured(tmp_path / name)
        loop.accelerator.register_for_checkpointing(run)
        with run:
            if name == "resumed":
                loop.accelerator.load_state(str(tmp_path / "saved"))
            while run.steps < 4:
                ids = [3 * run.steps, 3 * run.steps + 1, 3 * run.steps + 2]
                with run.batch(ids):
                    loop.accelerator.backward(loss_of(loop.model, INPUTS[ids]).mean())
                loop.optimizer.step()
                loop.optimizer.zero_grad()
                if run.steps == 2 and name == "whole":
                    loop.accelerator.save_state(str(tmp_path / "saved"))
        found.append((loop, run))
    (whole, one), (resumed, other) = found
    assert same_parameters(whole, resumed)
    assert one.values.to_dict() == other.values.to_dict()
    assert len(one.values) == 12
