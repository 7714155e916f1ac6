"""What can be made of values: views, sums over groups, files, pictures, values over time."""

import csv
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from ghost_core import CaptureError, MissingExtraError, UnknownNameError
from ghost_core.testing import assert_within
from ghost_engines import DotProductEngine, InRunValues, ValueTable
from ghost_engines.values.sums import Sums

STEPS, N, SAMPLES = 7, 4, 10


class Run:
    """A run against two directions, whose credited steps are kept beside."""

    def __init__(self, mlp, draw_directions, **options):
        self.model = mlp
        optimizer = torch.optim.SGD(mlp.parameters(), lr=0.1)
        self.schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        engine = DotProductEngine(mlp)
        for name, direction in zip(("a", "b"), draw_directions(mlp, 2).values(), strict=True):
            engine.add_direction(name, direction)
        self.credited = []
        with engine, InRunValues(engine, optimizer, **options) as self.values:
            self.values.on_credit(self.credited.append)
            for step in range(STEPS):
                optimizer.zero_grad()
                with engine.batch([(3 * step + at) % SAMPLES for at in range(N)]):
                    mlp(torch.randn(N, 5, dtype=torch.float64)).square().sum().backward()
                optimizer.step()
                self.schedule.step()
                if step == 2 and options.get("history"):
                    self.values.mark("epoch 1")

    def sums(self, of=lambda step: step.values, until=STEPS):
        """Return sums by sample, `[SAMPLES, 2]`, of what each step credited."""
        total = torch.zeros(SAMPLES, 2, dtype=torch.float64)
        for step in self.credited[:until]:
            total.index_add_(0, step.ids, of(step))
        return total


@pytest.fixture
def run(mlp, draw_directions):
    return Run(mlp, draw_directions)


def by_id(table):
    values = torch.zeros(SAMPLES, 2, dtype=torch.float64)
    values[torch.from_numpy(table.ids)] = torch.from_numpy(table.values)
    return values


def test_a_table_is_what_the_steps_credited(run):
    table = run.values.table()
    expected = run.sums()
    assert_within(by_id(table), expected, expected.norm())
    assert (np.diff(table.values[:, 0]) >= 0).all()
    assert len(table) == len(run.values) == SAMPLES
    assert table.steps.tolist() == list(range(1, STEPS + 1))
    by_step = torch.stack([step.values.sum(0) for step in run.credited])
    assert_within(torch.from_numpy(table.by_step), by_step, by_step.abs())
    assert repr(table) == "ValueTable(10 samples, 7 steps, K=2 (a, b))"
    assert repr(run.values) == "<InRunValues: 10 samples, 7 steps>"


def test_normalised_every_step_hands_out_as_much(run):
    expected = run.sums(lambda step: step.values / step.values.abs().sum(0))
    table = run.values.table(normalised=True)
    assert_within(by_id(table), expected, expected.norm())
    assert (np.diff(table.values[:, 0]) >= 0).all()
    assert by_id(table).abs().sum(0).le(STEPS + 1e-9).all()
    plain = by_id(run.values.table())
    assert not torch.allclose(plain / plain.norm(), expected / expected.norm(), rtol=0.1)
    share = run.credited[3].values.sum(0) / run.credited[3].values.abs().sum(0)
    assert_within(torch.from_numpy(table.by_step[3]), share, torch.ones(2))


def test_a_step_of_zeros_has_no_shares(mlp):
    optimizer = torch.optim.SGD(mlp.parameters(), lr=0.0)
    engine = DotProductEngine(mlp)
    zeros = {name: torch.ones_like(each) for name, each in mlp.named_parameters()}
    engine.add_direction("a", zeros)
    with engine, InRunValues(engine, optimizer) as values:
        with engine.batch([0]):
            mlp(torch.ones(1, 5, dtype=torch.float64)).sum().backward()
        optimizer.step()
    assert values.table(normalised=True).values.tolist() == [[0.0]]


@pytest.mark.parametrize("as_mapping", [True, False])
def test_groups_add_up(as_mapping, run):
    name = lambda sample: "odd" if sample % 2 else "even"  # noqa: E731
    groups = run.values.by_group({n: name(n) for n in range(99)} if as_mapping else name)
    assert groups.groups == ("even", "odd")
    assert groups.samples.tolist() == [5, 5]
    expected = torch.stack([run.sums()[::2].sum(0), run.sums()[1::2].sum(0)])
    assert_within(torch.from_numpy(groups.values), expected, run.sums().norm())
    assert list(groups.columns()) == ["group", "value_a", "value_b", "samples"]
    assert repr(groups) == "GroupValues(2 groups, a, b)"


def test_a_sample_without_a_group_is_named(run):
    with pytest.raises(UnknownNameError, match=r"sample '0'.*It has no group"):
        run.values.by_group(dict.fromkeys(range(1, SAMPLES), "x"))


# Over time


def test_values_over_time(mlp, draw_directions):
    run = Run(mlp, draw_directions, history=3)
    history = run.values.history
    assert history.steps == (3, 3, 6)
    assert history.labels == ("step 3", "epoch 1", "step 6")
    for sample in range(SAMPLES):
        for column, name in enumerate("ab"):
            got = torch.from_numpy(history.of(sample, name))
            expected = torch.stack([run.sums(until=n)[sample, column] for n in (3, 3, 6)])
            assert_within(got, expected, run.sums().norm())
    columns = history.columns()
    assert list(columns) == ["step", "moment", "id", "value_a", "value_b"]
    rows = (columns["moment"] == "epoch 1") & (columns["id"] == 4)
    assert columns["value_b"][rows].tolist() == [history.of(4, "b")[1]]
    assert repr(history) == "History(3 moments, 10 samples)"
    with pytest.raises(CaptureError, match="2 directions"):
        history.of(0)
    with pytest.raises(UnknownNameError, match="sample '77'"):
        history.of(77, "a")


def test_values_over_time_by_epoch_alone(mlp, draw_directions):
    assert Run(mlp, draw_directions, history=True).values.history.labels == ("epoch 1",)


def test_a_sample_that_came_later_had_nothing(mlp, draw_directions):
    run = Run(mlp, draw_directions, history=1)
    late = run.credited[1].ids.tolist()[-1]
    assert late not in run.credited[0].ids.tolist()
    assert run.values.history.of(late, "a")[0] == 0.0
    assert run.values.history.of(late, "a")[1] != 0.0


# Files and pictures


def test_files_hold_the_table(run, tmp_path):
    run.values.to_csv(tmp_path / "values.csv")
    with open(tmp_path / "values.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["id"]) for row in rows] == run.values.table().ids.tolist()
    assert {int(row["id"]): float(row["value_b"]) for row in rows} == run.values.to_dict("b")
    groups = run.values.by_group(lambda sample: "all")
    groups.to_csv(tmp_path / "groups.csv")
    assert (tmp_path / "groups.csv").read_text().splitlines()[1].startswith("all,")


def test_parquet_holds_the_table(run, tmp_path):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow", exc_type=ImportError)
    for name, table in {"values": run.values, "groups": run.values.by_group(str)}.items():
        table.to_parquet(tmp_path / f"{name}.parquet")
        found = pandas.read_parquet(tmp_path / f"{name}.parquet")
        expected = table.columns()
        assert list(found) == list(expected)
        assert all(found[key].tolist() == each.tolist() for key, each in expected.items())


def test_pictures(run, tmp_path):
    pytest.importorskip("matplotlib")
    figure = run.values.plot(tmp_path / "values.png", top=3)
    assert (tmp_path / "values.png").read_bytes().startswith(b"\x89PNG")
    assert len(figure.axes) == 6
    bars, _, over = figure.axes[:3]
    lowest = run.values.table().ids[0]
    assert bars.get_yticklabels()[-1].get_text() == str(lowest)
    (line,) = [each for each in over.lines if len(each.get_xdata()) == STEPS]
    assert line.get_ydata()[-1] == pytest.approx(run.sums()[:, 0].sum().item())
    groups = run.values.by_group(lambda sample: "odd" if sample % 2 else "even")
    heat = groups.plot(tmp_path / "groups.svg")
    axes = heat.axes[0]
    assert [each.get_text() for each in axes.get_yticklabels()] == ["even", "odd"]
    assert [each.get_text() for each in axes.get_xticklabels()] == ["a", "b"]
    assert np.array_equal(axes.images[0].get_array(), groups.values)
    low, high = axes.images[0].get_clim()
    assert -low == high == np.abs(groups.values).max()


def test_missing_libraries_are_named(run, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for draw in (run.values.plot, run.values.by_group(str).plot):
        with pytest.raises(MissingExtraError, match=r"ghost-engines\[plot\]"):
            draw(tmp_path / "x.png")
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingExtraError, match=r"ghost-engines\[pandas\]"):
        run.values.to_pandas()


def table_of(steps, keep):
    """Return the table of a process that made some of the samples of each step."""
    sums = Sums(("a", "b"))
    for step in steps:
        mine = torch.tensor([keep(at, int(sample)) for at, sample in enumerate(step.ids)])
        sums.add(replace(step, ids=step.ids[mine], values=step.values[mine]))
    return ValueTable(
        directions=sums.directions,
        ids=sums.ids,
        values=sums.values,
        counts=sums.counts,
        steps=sums.steps,
        by_step=sums.by_step,
    )


@pytest.mark.parametrize(
    "keep", [lambda at, sample: sample % 2, lambda at, sample: at % 2], ids=["apart", "shared"]
)
def test_the_union_of_what_processes_credited_is_the_table_of_one(run, keep):
    parts = [
        table_of(run.credited, lambda at, sample, want=want: keep(at, sample) == want)
        for want in (0, 1)
    ]
    whole, found = run.values.table(), ValueTable.union(parts)
    assert found.directions == ("a", "b")
    assert found.steps.tolist() == whole.steps.tolist()
    np.testing.assert_allclose(found.by_step, whole.by_step, rtol=1e-12)
    np.testing.assert_allclose(by_id(found), run.sums(), rtol=1e-12)
    assert (np.diff(found.values[:, 0]) >= 0).all()
    order = [whole.ids.tolist().index(sample) for sample in found.ids.tolist()]
    assert found.counts.tolist() == whole.counts[order].tolist()
    groups = found.by_group(lambda sample: str(sample % 3))
    np.testing.assert_allclose(groups.values, run.values.by_group(lambda s: str(s % 3)).values)


def test_tables_of_other_directions_have_no_union(run):
    one = run.values.table()
    other = replace(one, directions=("b", "a"))
    with pytest.raises(CaptureError, match="same directions"):
        ValueTable.union([one, other])
    for given, named in (
        ([], "nothing"),
        (3, "int"),
        ([one, 1], "ValueTable, int|int, ValueTable"),
    ):
        with pytest.raises(CaptureError, match=f"must be a list of ValueTable, not {named}"):
            ValueTable.union(given)
    nobody = ValueTable.union([table_of([], None), one])
    assert nobody.ids.tolist() == one.ids.tolist()
