"""A table that is empty, or lacks a sample, says why."""

import pytest
import torch

from ghost_core import CaptureError, UnknownNameError
from ghost_engines import DotProductEngine, InRunValues


class Run:
    """A loop, taken apart."""

    def __init__(self, mlp):
        self.model = mlp
        self.optimizer = torch.optim.SGD(mlp.parameters(), lr=0.1)
        self.engine = DotProductEngine(mlp)
        ones = {name: torch.ones_like(each) for name, each in mlp.named_parameters()}
        self.engine.add_direction("ones", ones)
        self.values = InRunValues(self.engine, self.optimizer)

    def batch(self, *ids):
        with self.engine.batch(ids):
            self.backward(len(ids))

    def backward(self, n=2):
        self.model(torch.randn(n, 5, dtype=torch.float64)).square().sum().backward()

    def step(self):
        self.optimizer.step()
        self.optimizer.zero_grad()


@pytest.fixture
def run(mlp):
    run = Run(mlp)
    with run.engine:
        yield run


def no_batch(run):
    run.backward()
    run.step()


def no_step(run):
    run.batch(0, 1)
    run.batch(2, 3)


def another_optimizer(run):
    other = torch.optim.SGD(run.model.parameters(), lr=0.1)
    for at in range(2):
        run.batch(2 * at, 2 * at + 1)
        other.step()
        other.zero_grad()


def another_optimizer_once(run):
    run.batch(0, 1)
    torch.optim.SGD(run.model.parameters(), lr=0.1).step()


def dropped(run):
    run.batch(0, 1)
    run.optimizer.zero_grad()
    run.step()


def nothing_chosen(run):
    run.batch()
    run.step()


@pytest.mark.parametrize(
    ("act", "reason"),
    [
        (no_batch, "no batch was opened"),
        (no_step, "no step followed the 2 batches"),
        (another_optimizer, "another optimizer stepped"),
        (another_optimizer_once, "another optimizer stepped"),
        (nothing_chosen, "the 1 batches had no samples"),
        (dropped, "batches were dropped: the gradients of 1 of 1 were thrown away"),
    ],
)
def test_an_empty_table_says_why_once(act, reason, run, caplog):
    act(run)
    assert not caplog.records
    run.values.close()
    assert run.values.to_dict() == {}
    run.values.table()
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage().startswith(f"there are no values: {reason}")


@pytest.mark.parametrize("told", [True, False])
def test_a_scaler_that_skips_every_step_is_named(told, mlp, caplog):
    scaler = torch.amp.GradScaler("cpu")
    optimizer = torch.optim.SGD(mlp.parameters(), lr=0.1)
    engine = DotProductEngine(mlp, grad_scaler=scaler if told else None)
    ones = {name: torch.ones_like(each) for name, each in mlp.named_parameters()}
    engine.add_direction("ones", ones)
    with engine, InRunValues(engine, optimizer):
        for at in range(3):
            optimizer.zero_grad()
            with engine.batch([at]):
                inputs = torch.full((1, 5), torch.inf, dtype=torch.float64)
                scaler.scale(mlp(inputs).square().sum()).backward()
            scaler.step(optimizer)
            scaler.update()
    assert "there are no values: no step followed the 3 batches" in caplog.text
    assert ("grad_scaler may have skipped its steps because" in caplog.text) == told


def test_reading_an_empty_table_says_why_too(run, caplog):
    assert len(run.values.columns()["id"]) == 0
    assert "there are no values: no batch was opened" in caplog.text


def test_a_partly_credited_table_says_why_once(run, caplog):
    run.batch(0, 1)
    run.step()
    run.batch(2, 3)
    run.optimizer.zero_grad()
    run.batch(4)
    run.values.table()
    assert not caplog.records
    for _ in range(2):
        run.values.close()
    assert caplog.messages == [
        "values are missing: the gradients of 1 of 3 batches were thrown away before a step was "
        "made with them; no step followed the last 1 of 3 batches"
    ]


def test_another_optimizer_between_batch_and_step_is_named_where_batches_are_missing(run, caplog):
    run.batch(0, 1)
    run.step()
    another_optimizer(run)
    run.values.close()
    assert "parameters changed" in caplog.text
    assert "as by another optimizer" in caplog.text


def test_a_whole_table_says_nothing(run, caplog):
    for at in range(3):
        run.batch(at)
        run.batch(at + 5)
        run.step()
    run.values.close()
    run.values.table()
    assert not caplog.records


def test_an_exception_is_reason_enough(run, caplog):
    def fail():
        run.batch(0, 1)
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="disk"), run.values:
        fail()
    assert not caplog.records
    assert not run.optimizer._optimizer_step_post_hooks


def test_a_sample_without_a_value_names_the_nearest_cause(run):
    def cause(sample):
        with pytest.raises(UnknownNameError) as error:
            run.values[sample]
        assert f"sample {sample} has no value" in str(error.value)
        assert "did you mean" not in str(error.value)
        return error.value.reason

    assert "no batch was opened" in cause(3)
    run.batch(3, 4)
    assert cause(3) == "no step was made with its batch yet"
    run.optimizer.zero_grad()
    run.batch(5)
    assert "thrown away" in cause(3)
    run.step()
    assert "thrown away" in cause(4)
    assert cause(33) == "it was in none of the 2 batches so far"
    assert run.values[5] != 0


def test_history_that_was_not_asked_for_is_refused(run):
    for ask in (lambda: run.values.history, lambda: run.values.mark("epoch 1")):
        with pytest.raises(CaptureError, match=r"history=True"):
            ask()
    for wrong in (0, -3, 1.5):
        with pytest.raises(CaptureError, match="history must be"):
            InRunValues(run.engine, run.optimizer, history=wrong)


def test_the_name_of_a_direction_is_no_sample(run):
    run.batch(0, 1)
    run.optimizer.step()
    (name,) = run.values.directions
    with pytest.raises(UnknownNameError, match=f"'{name}' is the name of a direction") as caught:
        run.values[name]
    assert f"values[sample, {name!r}]" in caught.value.remedy
