"""What a projection engine can be told: dimensions by name, sketches, weights, projections."""

import math
import re
from dataclasses import dataclass

import pytest
import torch
from engine_kit import squares
from projection_kit import floats, project, project_frozen
from torch import nn

from ghost_core import CaptureError, Projection, UnknownNameError
from ghost_core.testing import assert_within, per_sample_gradients
from ghost_engines import ProjectionEngine
from ghost_engines.random_projections import GaussianProjection, RademacherProjection
from ghost_engines.store import GradientStore, StoreError


def sizes(engine):
    return {block.parameter: (block.k_left, block.k_right) for block in engine.layout}


# Dimensions by glob


def test_later_globs_win_and_zero_leaves_out(transformer):
    names = [name for name, _ in transformer.named_parameters()]
    assert "tokens.weight" in names
    engine = ProjectionEngine(
        transformer, dim=12, min_dim=2, dims={"*": 6, "tokens": "whole", "positions": 0}
    )
    found = sizes(engine)
    assert found["tokens.weight"] == tuple(transformer.tokens.weight.shape)
    assert not any(name.startswith("positions") for name in found)


def test_rows_of_chosen_sides_are_projected_gradients(mlp, assert_rows):
    inputs = floats(4, 5)
    expected = per_sample_gradients(mlp, squares(mlp(inputs)))
    engine = ProjectionEngine(
        mlp, dim=6, min_dim=2, dims={"0": "whole", "0.weight": (3, 2)}, dtype="float64"
    )
    assert sizes(engine) == {
        "0.bias": (7, 1), "0.weight": (3, 2), "2.bias": (3, 1), "2.weight": (3, 2)
    }  # fmt: skip
    assert_rows(engine, project(engine, mlp, inputs), expected)


def test_total_dim_is_what_is_left_for_the_others():
    model = nn.ModuleList(nn.Linear(50, 40, bias=False) for _ in range(3))
    engine = ProjectionEngine(model, total_dim=300, min_dim=2, dims={"1": (4, 5)})
    assert sizes(engine)["1.weight"] == (4, 5)
    assert 250 < engine.k_total <= 300


@pytest.mark.parametrize(
    ("dims", "error", "told"),
    [
        ({"1": 5}, UnknownNameError, "unknown layer '1'"),
        ({"0.weight": (8, 1)}, CaptureError, "is a matrix of 7 by 5"),
        ({"0.weight": (0, 1)}, CaptureError, "at least 1"),
        ({"0": -1}, CaptureError, "at least 1"),
        ({"0": "hole"}, CaptureError, "'whole'"),
        ({0: 5}, CaptureError, "mapping of globs"),
        ([("0", 5)], CaptureError, "mapping of globs"),
    ],
)
def test_dims_that_mean_nothing_are_refused(dims, error, told, mlp):
    with pytest.raises(error, match=told):
        ProjectionEngine(mlp, dims=dims)


def test_whole_keeps_gradients_as_they_are(mlp):
    inputs = floats(4, 5)
    expected = per_sample_gradients(mlp, squares(mlp(inputs)))
    engine = ProjectionEngine(mlp, dim="whole", dtype="float64")
    flat = torch.cat([expected[block.parameter].flatten(1) for block in engine.layout], 1)
    assert_within(project(engine, mlp, inputs).rows, flat, flat.norm(dim=1)[:, None])


# Sketches


class Bare(nn.Module):
    """A bare parameter, a norm and a linear layer."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.randn(6, 8))
        self.inner = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)

    def forward(self, inputs):
        return self.norm(torch.tanh(self.inner(inputs) + self.shift))


@pytest.mark.parametrize("run", [project, project_frozen])
def test_sketches_are_linear_maps_of_whole_gradients(run, assert_rows):
    model, inputs = Bare().double(), floats(4, 6, 8)
    expected = per_sample_gradients(model, squares(model(inputs)))
    engine = ProjectionEngine(model, dim=5, min_dim=2, sketch="*", dtype="float64")
    assert sizes(engine)["shift"] == (5, 1)
    assert all(block.sketched for block in engine.layout)
    assert_rows(engine, run(engine, model, inputs), expected)
    given = engine.project(expected)
    rows = run(engine, model, inputs).rows
    assert_within(rows, given, 10 * given.norm(dim=1)[:, None])


def test_sketches_keep_inner_products_in_expectation():
    """Within three standard errors, entry by entry, with the variance of a count sketch."""
    model, n = nn.Linear(1, 40, bias=False).double(), 300
    pair = torch.nn.functional.normalize(floats(2, 40, 1), dim=1)
    exact = float((pair[0] * pair[1]).sum())
    found = []
    for seed in range(n):
        engine = ProjectionEngine(model, dim=8, sketch="weight", seed=seed, dtype="float64")
        a, b = engine.project({"weight": pair})
        found.append(float(a @ b))
    estimates = torch.tensor(found, dtype=torch.float64)
    assert (estimates.mean() - exact).abs() < 3 * estimates.std() / math.sqrt(n)
    squared, product = pair.squeeze(2).square(), pair[0] * pair[1]
    variance = float(1 + exact**2 - 2 * product.square().sum()) / 8
    assert squared.sum() == pytest.approx(2)
    assert estimates.var() == pytest.approx(variance, rel=0.25)


# Inner products


@pytest.mark.parametrize("init", ["gaussian", "rademacher", "orthonormal"])
def test_inner_products_are_unbiased_within_three_standard_errors(init):
    model = nn.Linear(12, 10, bias=False).double()
    pair = floats(2, 10, 12)
    exact = float((pair[0] * pair[1]).sum())
    estimates = []
    for seed in range(300):
        engine = ProjectionEngine(model, dims={"weight": (4, 5)}, seed=seed, init=init)
        a, b = engine.project({"weight": pair})
        estimates.append(float(a @ b))
    found = torch.tensor(estimates, dtype=torch.float64)
    error = found.std() / math.sqrt(300)
    assert (found.mean() - exact).abs() < 3 * error
    assert error < 0.15 * pair[0].norm() * pair[1].norm()


@pytest.mark.stress
def test_variance_of_gaussian_maps_is_the_closed_form_for_rank_one():
    """`(1 + 2/k_i)(1 + 2/k_o) - 1` of the squared norm of a gradient of rank one and norm one."""
    model, k_left, k_right = nn.Linear(12, 10, bias=False).double(), 4, 5
    left = torch.nn.functional.normalize(floats(10), dim=0)
    right = torch.nn.functional.normalize(floats(12), dim=0)
    gradient = torch.outer(left, right)[None]
    found = []
    for seed in range(20_000):
        engine = ProjectionEngine(model, dims={"weight": (k_left, k_right)}, seed=seed)
        found.append(float(engine.project({"weight": gradient}).square().sum()))
    expected = (1 + 2 / k_right) * (1 + 2 / k_left) - 1
    assert torch.tensor(found, dtype=torch.float64).var() == pytest.approx(expected, rel=0.1)


# Weights and norms


def test_rows_are_of_own_losses_where_weights_are_told(mlp, assert_rows):
    inputs, weights = floats(4, 5), torch.tensor([0.5, 2.0, 1.0, 4.0])
    expected = per_sample_gradients(mlp, squares(mlp(inputs)))
    options = {"dim": 6, "min_dim": 2, "dtype": "float64"}
    mean = ProjectionEngine(mlp, loss_weights="mean", **options)
    assert_rows(mean, project(mean, mlp, inputs, lambda y: squares(y) / 4), expected)
    given = ProjectionEngine(mlp, loss_weights="given", **options)
    with given, given.batch(range(4), loss_weights=weights) as batch:
        (weights * squares(mlp(inputs))).sum().backward()
    assert_rows(given, batch.result, expected)
    assert given.manifest()["loss_weights"] == "given"


def test_unknown_loss_weights_list_what_exists(mlp):
    with pytest.raises(UnknownNameError, match=r"'man'.*did you mean 'mean'"):
        ProjectionEngine(mlp, loss_weights="man")


def test_rows_of_unit_norm_and_norms_of_all(mlp):
    inputs = floats(4, 5)
    inputs[2] = 0
    losses = lambda y: squares(y) - squares(y).detach()  # noqa: E731
    plain = project(ProjectionEngine(mlp, dim=6, dtype="float64"), mlp, inputs, losses)
    unit = project(ProjectionEngine(mlp, dim=6, dtype="float64", unit_norm=True), mlp, inputs)
    assert_within(plain.norms, plain.rows.norm(dim=1), plain.norms)
    assert_within(unit.norms, plain.norms, plain.norms)
    assert_within(unit.rows * plain.norms[:, None], plain.rows, plain.norms[:, None])
    none = ProjectionEngine(mlp, dim=6, dtype="float64", unit_norm=True)
    zeros = project(none, mlp, inputs, lambda y: 0 * squares(y))
    assert torch.equal(zeros.rows, torch.zeros_like(zeros.rows))


# Projections


@dataclass
class Scaled(Projection):
    """Another draw each time that its class is given another one."""

    factor: float = 1.0
    flip: bool = False

    def draw(self, k, n, generator):
        drawn = GaussianProjection().draw(k, n, generator)
        return -drawn if self.flip else drawn


def test_a_projection_may_be_a_class_or_an_object_with_options(mlp, assert_rows):
    inputs = floats(4, 5)
    expected = per_sample_gradients(mlp, squares(mlp(inputs)))
    for init in (Scaled, Scaled(2.0)):
        engine = ProjectionEngine(mlp, dim=6, min_dim=2, init=init, dtype="float64")
        assert_rows(engine, project(engine, mlp, inputs), expected)
    manifest = engine.manifest()
    assert manifest["projection"].endswith("test_projection_options.Scaled")
    assert manifest["options"] == {"factor": 2.0, "flip": False}
    named = ProjectionEngine(mlp, dim=6, min_dim=2, init="rademacher")
    given = ProjectionEngine(mlp, dim=6, min_dim=2, init=RademacherProjection())
    assert named.manifest() == given.manifest()


def test_what_is_no_projection_is_refused(mlp):
    with pytest.raises(UnknownNameError, match=r"unknown projection .*Give the name of one"):
        ProjectionEngine(mlp, init=nn.Linear)
    with pytest.raises(CaptureError, match="no JSON form"):
        ProjectionEngine(mlp, init=Scaled(object()))


def test_another_draw_under_the_same_name_does_not_resume_a_store(mlp, tmp_path, monkeypatch):
    engine = ProjectionEngine(mlp, dim=4, min_dim=1)
    with GradientStore.create(tmp_path / "g", engine) as store:
        store.append(project_frozen(engine, mlp, floats(4, 5)))
    monkeypatch.setattr(GaussianProjection, "draw", RademacherProjection.draw)
    other = ProjectionEngine(mlp, dim=4, min_dim=1)
    with pytest.raises(StoreError, match=r"engine\.maps: .* in the store"):
        GradientStore.resume(tmp_path / "g", other)
    with pytest.raises(StoreError, match="maps: "):
        store.search(project_frozen(other, mlp, floats(1, 5)))


# The engine again


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"init": "orthonormal", "seed": 9, "unit_norm": True, "loss_weights": "sum"},
        {"dims": {"0": 0, "2.weight": (2, 3)}, "sketch": "2.bias", "dtype": "float16"},
        {"total_dim": 12, "dim": None, "verify": False},
    ],
)
def test_a_store_is_enough_to_make_its_engine_again(options, mlp, tmp_path):
    engine = ProjectionEngine(mlp, **{"dim": 4, "min_dim": 1, **options})
    with GradientStore.create(tmp_path / "g", engine) as store:
        store.append(project_frozen(engine, mlp, floats(4, 5)))
    again = ProjectionEngine.from_manifest(mlp, GradientStore.open(tmp_path / "g"))
    assert again.manifest() == engine.manifest()
    inputs = floats(2, 5)
    rows = [project_frozen(each, mlp, inputs).rows for each in (engine, again)]
    assert torch.equal(*rows)


def test_a_projection_that_no_plugin_offers_is_given_again(mlp):
    made = ProjectionEngine(mlp, dim=4, min_dim=1, init=Scaled()).manifest()
    with pytest.raises(UnknownNameError, match=re.escape(made["projection"])):
        ProjectionEngine.from_manifest(mlp, made)
    assert ProjectionEngine.from_manifest(mlp, made, init=Scaled()).manifest() == made
    with pytest.raises(CaptureError, match="options, maps would differ"):
        ProjectionEngine.from_manifest(mlp, made, init=Scaled(flip=True))


def test_another_model_or_no_manifest_is_refused(mlp):
    made = ProjectionEngine(mlp, dim=4, min_dim=1).manifest()
    with pytest.raises(UnknownNameError, match=r"2\."):
        ProjectionEngine.from_manifest(mlp[:2], made)
    wider = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    with pytest.raises(CaptureError, match="layers"):
        ProjectionEngine.from_manifest(wider, made)
    with pytest.raises(CaptureError, match="missing: options, maps"):
        ProjectionEngine.from_manifest(mlp, {"seed": 1, "projection": "gaussian"})
