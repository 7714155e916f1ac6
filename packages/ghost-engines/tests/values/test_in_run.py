"""In-run values against values computed step by step by autograd."""

import copy
import sys

import pytest
import torch
from torch import nn

from ghost_core import CaptureError, MissingExtraError, UnknownNameError
from ghost_core.testing import assert_within, per_sample_gradients
from ghost_engines import DotProductEngine, InRunValues

COLUMNS = ["id", "value", "times_seen", "first_step", "last_step", "altered"]


def squares(outputs):
    """Return a loss per sample, `[N]`."""
    return (outputs - 1).square().sum(1)


class Training:
    """A small regression whose values are computed a second time, by autograd alone."""

    def __init__(self, model, make_optimizer=torch.optim.SGD, **options):
        self.model = model
        self.inputs = torch.randn(12, 5, dtype=torch.float64)
        self.validation = torch.randn(6, 5, dtype=torch.float64)
        groups = [
            {"params": list(model[0].parameters()), "lr": 0.05},
            {"params": list(model[2].parameters()), "lr": 0.02},
        ]
        self.optimizer = make_optimizer(groups, **options)
        self.engine = DotProductEngine(model)
        self.engine.add_direction("val", self.validation_loss)
        self.values = InRunValues(self.engine, self.optimizer)
        self.expected = {}
        self.pending = []

    def validation_loss(self):
        return squares(self.model(self.validation)).mean()

    def rate(self, name):
        """Return the learning rate of a parameter, as the optimizer has it now."""
        sign = -1 if self.optimizer.param_groups[0].get("maximize") else 1
        return sign * self.optimizer.param_groups[0 if name.startswith("0.") else 1]["lr"]

    def batch(self, ids, weight=1.0):
        """Run forward and backward, and keep what a step would credit."""
        names = [name for name, _ in self.model.named_parameters()]
        losses = weight * squares(self.model(self.inputs[ids])) / len(ids)
        each = per_sample_gradients(self.model, losses)
        direction = torch.autograd.grad(self.validation_loss(), list(self.model.parameters()))
        dots = {
            name: each[name].flatten(1) @ vector.flatten()
            for name, vector in zip(names, direction, strict=True)
        }
        self.pending.append((ids, dots))
        with self.engine.batch(ids):
            (weight * squares(self.model(self.inputs[ids])) / len(ids)).sum().backward()

    def step(self):
        """Make a step and credit what is pending."""
        for ids, dots in self.pending:
            credit = sum(self.rate(name) * values for name, values in dots.items())
            for sample, value in zip(ids, credit.tolist(), strict=True):
                self.expected[sample] = self.expected.get(sample, 0.0) + value
        self.pending.clear()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def check(self):
        found = self.values.to_dict()
        assert found.keys() == self.expected.keys()
        assert len(self.values) == len(found) > 0
        got = torch.tensor([found[sample] for sample in self.expected], dtype=torch.float64)
        expected = torch.tensor(list(self.expected.values()), dtype=torch.float64)
        assert_within(got, expected, expected.norm())
        assert [self.values[sample] for sample in self.expected] == got.tolist()


@pytest.fixture
def training(mlp):
    training = Training(mlp)
    with training.engine, training.values:
        yield training


def test_sum_over_steps_with_a_rate_per_group_and_a_scheduler(training):
    scheduler = torch.optim.lr_scheduler.ExponentialLR(training.optimizer, gamma=0.5)
    for step in range(5):
        training.batch([(3 * step + at) % 12 for at in range(4)])
        training.step()
        scheduler.step()
    assert training.rate("0.weight") == pytest.approx(0.05 / 32)
    assert training.values.steps == 5
    assert training.values.skipped_batches == 0
    training.check()


def test_accumulation_over_two_batches_a_step(training):
    for first in (0, 4):
        training.batch(list(range(first, first + 3)), weight=0.5)
        training.batch(list(range(first + 3, first + 7)), weight=0.5)
        training.step()
    assert training.values.steps == 2
    training.check()


@pytest.mark.parametrize("set_to_none", [True, False])
def test_skipped_step_credits_nothing_and_is_counted(set_to_none, training):
    training.batch([0, 1, 2])
    training.step()
    training.batch([0, 3, 4])
    training.batch([5])
    training.optimizer.zero_grad(set_to_none=set_to_none)  # as after an overflow: no step
    training.pending.clear()
    training.batch([2, 6])
    training.step()
    assert training.values.skipped_batches == 2
    assert training.values.steps == 2
    assert training.values.to_dict().keys() == {0, 1, 2, 6}
    training.check()


def test_skipped_step_is_noticed_where_zero_grad_is_called_inside_the_batch(mlp):
    inputs = torch.randn(2, 5, dtype=torch.float64)
    optimizer = torch.optim.SGD(mlp.parameters(), lr=0.1)
    engine = DotProductEngine(mlp)
    engine.add_direction("val", lambda: squares(mlp(inputs + 1)).mean())
    with engine, InRunValues(engine, optimizer) as values:
        for ids in ([0, 1], [2, 3]):
            with engine.batch(ids):
                optimizer.zero_grad()
                squares(mlp(inputs)).mean().backward()
        optimizer.step()
    assert values.skipped_batches == 1
    assert values.to_dict().keys() == {2, 3}


def test_step_skipped_by_a_grad_scaler(mlp):
    mlp.float()
    inputs = torch.randn(4, 5)
    optimizer = torch.optim.SGD(mlp.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-120)
    engine = DotProductEngine(mlp, grad_scaler=scaler)
    engine.add_direction("val", lambda: squares(mlp(inputs + 1)).mean())
    values = InRunValues(engine, optimizer)
    with engine, values:
        for ids in ([0, 1, 2, 3], [4, 5, 6, 7]):
            optimizer.zero_grad()
            with engine.batch(ids):
                scaler.scale(100 * squares(mlp(inputs)).mean()).backward()
            scaler.step(optimizer)
            scaler.update()
    assert values.steps == 1
    assert values.skipped_batches == 1
    assert values.to_dict().keys() == {4, 5, 6, 7}
    assert torch.tensor(list(values.to_dict().values())).isfinite().all()


def test_step_inside_an_open_batch_is_refused(mlp):
    """Its batch has no scores yet: they would be credited to the step after it."""
    training = Training(mlp)

    def step():
        squares(mlp(training.inputs[:3])).mean().backward()
        training.optimizer.step()

    batch = training.engine.batch([0, 1, 2])
    with training.engine, training.values, pytest.raises(CaptureError), batch:
        step()


def test_step_without_a_batch_credits_nothing(training):
    training.batch([0, 1])
    training.step()
    before = training.values.to_dict()
    training.optimizer.step()
    squares(training.model(training.inputs)).sum().backward()
    training.optimizer.step()
    assert training.values.to_dict() == before
    assert training.values.steps == 3


def test_id_seen_twice_in_a_batch_and_in_two_steps(training):
    pandas = pytest.importorskip("pandas")
    training.batch([3, 5, 3])
    training.step()
    training.batch([5, 7])
    training.step()
    training.check()
    table = training.values.to_pandas()
    assert isinstance(table, pandas.DataFrame)
    rows = {row.id: (row.times_seen, row.first_step, row.last_step) for row in table.itertuples()}
    assert rows == {3: (2, 1, 1), 5: (2, 1, 2), 7: (1, 2, 2)}


def test_maximize_turns_the_sign(mlp):
    training = Training(mlp, maximize=True)
    with training.engine, training.values:
        for ids in ([0, 1, 2], [3, 4, 5]):
            training.batch(ids)
            training.step()
    training.check()
    # The steps climbed: what would have lowered the validation loss raised it.
    assert sum(training.values.to_dict().values()) < 0


@pytest.mark.parametrize("maximize", [False, True])
def test_values_of_a_step_predict_the_change_of_the_validation_loss(maximize, mlp):
    training = Training(mlp, maximize=maximize)
    for group in training.optimizer.param_groups:
        group["lr"] *= 1e-4
    with training.engine, training.values:
        before = training.validation_loss().item()
        training.batch(list(range(12)))
        training.step()
        after = training.validation_loss().item()
    predicted = sum(training.values.to_dict().values())
    assert (predicted > 0) != maximize  # positive: the samples lowered the loss
    assert predicted == pytest.approx(before - after, rel=1e-3)


def test_one_sample_alone_is_predicted_too(training):
    for group in training.optimizer.param_groups:
        group["lr"] = 1e-6
    for sample in range(12):
        before = training.validation_loss().item()
        training.batch([sample])
        training.step()
        after = training.validation_loss().item()
        assert training.values[sample] == pytest.approx(before - after, rel=1e-3, abs=1e-12)


def test_rates_follow_a_loaded_optimizer_state(training):
    """Loading a state replaces the optimizer's groups."""
    training.optimizer.load_state_dict(training.optimizer.state_dict())
    for group in training.optimizer.param_groups:
        group["lr"] *= 10
    training.batch([0, 1, 2])
    training.step()
    training.check()


def test_learning_rate_may_be_a_tensor(training):
    for group in training.optimizer.param_groups:
        group["lr"] = torch.tensor(group["lr"])
    training.batch([0, 1, 2])
    training.step()
    training.check()


def test_table_has_its_columns_sorted_by_value(training):
    pytest.importorskip("pandas")
    for ids in ([0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]):
        training.batch(ids)
        training.step()
    table = training.values.to_pandas()
    assert list(table.columns) == COLUMNS
    assert table["value"].is_monotonic_increasing
    assert table["value"].nunique() == 12
    assert list(table.index) == list(range(12))
    assert dict(zip(table["id"], table["value"], strict=True)) == training.values.to_dict()


def test_empty_table_has_the_same_columns(training):
    pytest.importorskip("pandas")
    table = training.values.to_pandas()
    assert list(table.columns) == COLUMNS
    assert len(table) == 0


def test_missing_pandas_is_named(training, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingExtraError, match=r"ghost-engines\[pandas\]"):
        training.values.to_pandas()


def test_optimizer_without_a_tracked_parameter_is_refused(mlp):
    engine = DotProductEngine(mlp)
    with pytest.raises(CaptureError, match=r"does not hold 2\.bias"):
        InRunValues(engine, torch.optim.SGD([*mlp[0].parameters(), mlp[2].weight], lr=0.1))
    selected = DotProductEngine(mlp, exclude="2.bias")
    InRunValues(selected, torch.optim.SGD([*mlp[0].parameters(), mlp[2].weight], lr=0.1)).close()


def test_optimizer_of_another_model_is_refused(mlp):
    """To leave its parameters out would leave nothing."""
    other = torch.optim.SGD(copy.deepcopy(mlp).parameters(), lr=0.1)
    with pytest.raises(CaptureError, match=r"holds none of .* tracks, 0\.bias among") as caught:
        InRunValues(DotProductEngine(mlp), other)
    assert "another model" in caught.value.reason
    assert "exclude" not in str(caught.value)
    assert "model.parameters()" in caught.value.remedy


def test_refused_values_leave_nothing_behind(mlp):
    engine = DotProductEngine(mlp)
    optimizer = torch.optim.SGD(mlp[0].parameters(), lr=0.1)
    with pytest.raises(CaptureError):
        InRunValues(engine, optimizer)
    assert not optimizer._optimizer_step_post_hooks


def test_close_removes_everything(mlp):
    training = Training(mlp)
    other = InRunValues(training.engine, training.optimizer)
    with training.engine:
        training.batch([0, 1])
        training.step()
        before = other.to_dict()
        assert before == training.values.to_dict()
        other.close()
        training.batch([0, 1])
        training.step()
        assert other.to_dict() == before
        assert other.steps == 1
        assert training.values.to_dict() != before
        after = training.values.to_dict()
        training.values.close()
        assert not training.optimizer._optimizer_step_post_hooks
        training.batch([0, 1])
        training.step()
        assert training.values.to_dict() == after


def test_closing_twice_is_harmless(mlp):
    training = Training(mlp)
    with training.values:
        training.values.close()


def test_every_direction_has_a_column(mlp, draw_directions):
    optimizer = torch.optim.SGD(mlp.parameters(), lr=0.1)
    inputs = torch.randn(3, 5, dtype=torch.float64)
    engine = DotProductEngine(mlp)
    for name, direction in draw_directions(mlp, 2).items():
        engine.add_direction(name, direction)
    values = InRunValues(engine, optimizer)
    named = InRunValues(engine, optimizer, direction="random 1")
    with engine, values, named:
        with engine.batch(range(3)) as batch:
            squares(mlp(inputs)).sum().backward()
        optimizer.step()
    total = 0.1 * batch.result.total
    assert values.directions == ("random 0", "random 1")
    for column, name in enumerate(values.directions):
        got = torch.tensor([values[sample, name] for sample in range(3)], dtype=torch.float64)
        assert_within(got, total[:, column], total.norm())
        assert values.to_dict(name) == dict(enumerate(got.tolist()))
    assert named.to_dict() == values.to_dict("random 1")
    assert named.to_dict() != values.to_dict("random 0")
    for ask in (lambda: values[0], values.to_dict):
        with pytest.raises(CaptureError, match="2 directions: name one of random 0, random 1"):
            ask()
    with pytest.raises(UnknownNameError, match="did you mean 'random 1'"):
        values[0, "random1"]
    pytest.importorskip("pandas")
    columns = ["id", "value_random 0", "value_random 1", *COLUMNS[2:]]
    assert list(values.to_pandas().columns) == columns
    assert list(named.to_pandas().columns) == COLUMNS


def test_directions_stay_the_same_while_values_are_added_up(mlp, draw_directions):
    optimizer = torch.optim.SGD(mlp.parameters(), lr=0.1)
    engine = DotProductEngine(mlp)
    first, second = draw_directions(mlp, 2).values()
    engine.add_direction("first", first)

    def step():
        with engine.batch(range(3)):
            squares(mlp(torch.randn(3, 5, dtype=torch.float64))).sum().backward()
        optimizer.step()

    with engine, InRunValues(engine, optimizer, direction="first") as one:
        with InRunValues(engine, optimizer):
            step()
            engine.add_direction("second", second)
            with pytest.raises(CaptureError, match="are first, second now, and were first"):
                step()
        step()
    assert one.steps == 2


def test_every_credited_step_is_told(training):
    told = []
    handle = training.values.on_credit(told.append)
    training.optimizer.step()
    for ids in ([3, 5, 3], [5, 7]):
        training.batch(ids)
    training.step()
    handle.remove()
    training.batch([1])
    training.step()
    assert [step.step for step in told] == [1, 2]
    assert [step.ids.tolist() for step in told] == [[], [3, 5, 3, 5, 7]]
    assert told[1].ids.dtype == torch.int64
    assert told[1].values.dtype == torch.float64
    assert told[1].values.shape == (5, 1)
    assert told[1].directions == ("val",)
    sums = torch.zeros(8, dtype=torch.float64).index_add(0, told[1].ids, told[1].values[:, 0])
    values = training.values.to_dict()
    assert all(sums[sample].item() == pytest.approx(values[sample]) for sample in (3, 5, 7))


def test_unknown_direction_lists_what_exists(mlp, draw_directions):
    optimizer = torch.optim.SGD(mlp.parameters(), lr=0.1)
    engine = DotProductEngine(mlp)
    engine.add_direction("val", draw_directions(mlp, 1)["random 0"])

    def step():
        with engine.batch(range(3)):
            squares(mlp(torch.randn(3, 5, dtype=torch.float64))).sum().backward()
        optimizer.step()

    values = InRunValues(engine, optimizer, direction="vla")
    with engine, values, pytest.raises(UnknownNameError, match="did you mean 'val'"):
        step()


def test_training_is_the_same_with_and_without_values():
    def train(watched):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        engine = DotProductEngine(model)
        engine.add_direction("val", lambda: squares(model(torch.ones(2, 5))).mean())
        values = InRunValues(engine, optimizer) if watched else None
        for step in range(5):
            inputs = torch.randn(32, 5)
            optimizer.zero_grad()
            if watched:
                with engine, engine.batch(range(32 * step, 32 * step + 32)):
                    squares(model(inputs)).mean().backward()
            else:
                squares(model(inputs)).mean().backward()
            optimizer.step()
        assert values is None or len(values) == 160
        return list(model.parameters())

    pairs = zip(train(watched=False), train(watched=True), strict=True)
    assert all(torch.equal(plain, watched) for plain, watched in pairs)
