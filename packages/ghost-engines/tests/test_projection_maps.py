"""The random maps, the layout of rows, and what inner products of rows estimate."""

import hashlib
import json

import pytest
import torch
from engine_kit import squares
from projection_kit import floats, project, project_frozen
from torch import nn

from ghost_core import CaptureError, UnknownNameError
from ghost_core.plugins import installed
from ghost_core.testing import next_token_losses, per_sample_gradients
from ghost_engines import ProjectionEngine
from ghost_engines.projection import STORAGE_DTYPES

# Layout


def test_layout_is_in_order_of_parameter_names(transformer):
    engine = ProjectionEngine(transformer, dim=16, min_dim=3)
    names = [block.parameter for block in engine.layout]
    assert names == sorted(names)
    assert names != [name for name, p in transformer.named_parameters() if p.requires_grad]
    stops = [block.columns.stop for block in engine.layout]
    assert [block.offset for block in engine.layout] == [0, *stops[:-1]]
    assert engine.k_total == stops[-1]


def test_manifest_names_everything_that_changes_a_value(mlp):
    engine = ProjectionEngine(mlp, dim=6, seed=3, init="rademacher", dtype="float16", verify=False)
    manifest = json.loads(json.dumps(engine.manifest()))
    assert manifest == {
        "projection": "rademacher",
        "options": {},
        "source": "ghost-engines:engines",
        "maps": hashlib.sha256().hexdigest(),  # of nothing: all gradients are as small as that
        "seed": 3,
        "dtype": "float16",
        "loss_weights": None,
        "unit_norm": False,
        "verified": False,
        "layers": [block.manifest() for block in engine.layout],
    }
    assert [layer["name"] for layer in manifest["layers"]] == [
        "0.bias", "0.weight", "2.bias", "2.weight"
    ]  # fmt: skip


def test_total_dim_bounds_the_row(transformer, tokens):
    engine = ProjectionEngine(transformer, total_dim=300, min_dim=2)
    assert 200 < engine.k_total <= 300
    losses = lambda logits: next_token_losses(logits, tokens)  # noqa: E731
    assert project_frozen(engine, transformer, tokens, losses).rows.shape == (5, engine.k_total)


def test_default_is_256_dimensions_per_parameter():
    engine = ProjectionEngine(nn.Linear(400, 400, bias=False))
    assert engine.k_total == 256
    assert (engine.layout[0].k_left, engine.layout[0].k_right) == (16, 16)


def test_min_dim_is_the_least_of_each_side():
    model = nn.Linear(400, 100, bias=False)
    (block,) = ProjectionEngine(model, dim=16, min_dim=8).layout
    assert (block.k_left, block.k_right) == (8, 8)
    (block,) = ProjectionEngine(model, dim=16, min_dim=1).layout
    assert block.k_left > block.k_right >= 1


# Seeds


SCRIPT = """
import hashlib
import torch
from torch import nn
from ghost_engines import ProjectionEngine

torch.manual_seed({seed})
torch.rand({seed})
names = {names}
model = nn.Module()
for name in names:
    model.add_module(name, nn.Linear(30, 20))
engine = ProjectionEngine(model, dim=12, min_dim=2, seed=5, init="{init}")
digest = hashlib.sha256()
for name in sorted(names):
    for side in engine.maps(name + ".weight"):
        digest.update(side.contiguous().numpy().tobytes())
print(digest.hexdigest(), *(block.parameter for block in engine.layout))
"""


def test_maps_are_equal_in_every_process_and_independent_of_module_order(fresh):
    done = fresh(SCRIPT.format(seed=2, names=["b", "a"], init="orthonormal"))
    assert done.returncode == 0, done.stderr
    first = done.stdout.split()
    assert first[1:] == ["a.bias", "a.weight", "b.bias", "b.weight"]
    model = nn.ModuleDict({"c": nn.Linear(3, 3), "b": nn.Linear(30, 20), "a": nn.Linear(30, 20)})
    engine = ProjectionEngine(model, dim=12, min_dim=2, seed=5, init="orthonormal")
    digest = hashlib.sha256()
    for name in ("a", "b"):
        for side in engine.maps(f"{name}.weight"):
            digest.update(side.contiguous().numpy().tobytes())
    assert digest.hexdigest() == first[0]


def test_seed_and_name_and_side_change_the_maps():
    model = nn.ModuleDict({"a": nn.Linear(20, 20, bias=False), "b": nn.Linear(20, 20, bias=False)})
    maps = [
        side
        for seed in (0, 1)
        for name in ("a.weight", "b.weight")
        for side in ProjectionEngine(model, dim=9, min_dim=1, seed=seed).maps(name)
    ]
    assert len(maps) == 8
    assert all(side.shape == (3, 20) for side in maps)
    for at, side in enumerate(maps):
        assert not any(torch.equal(side, other) for other in maps[:at])


def test_maps_neither_use_nor_move_the_global_generators(mlp):
    torch.manual_seed(1)
    first = ProjectionEngine(mlp, dim=6, min_dim=2).maps("0.weight")
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = ProjectionEngine(mlp, dim=6, min_dim=2).maps("0.weight")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, first, second))
    assert first[0].shape == (2, 7)


def test_maps_of_an_unknown_parameter_list_what_exists(mlp):
    with pytest.raises(UnknownNameError, match=r"Available: 0\.bias, 0\.weight, 2\.bias"):
        ProjectionEngine(mlp, dim=6).maps("1.weight")


# Inner products


@pytest.mark.parametrize("init", ["gaussian", "rademacher", "orthonormal"])
def test_inner_products_of_rows_estimate_those_of_gradients(init):
    """The mean over many seeds is within six standard errors; one alone is not exact."""
    model = nn.Sequential(nn.Linear(12, 14), nn.Tanh(), nn.Linear(14, 10)).double()
    inputs = floats(5, 3, 12)
    expected = per_sample_gradients(model, squares(model(inputs)))
    flat = torch.cat([expected[name].flatten(1) for name in sorted(expected)], 1)
    gram = flat @ flat.mT
    grams = []
    for seed in range(600):
        engine = ProjectionEngine(model, dim=16, min_dim=2, seed=seed, init=init, dtype="float64")
        rows = engine.project(expected)
        grams.append(rows @ rows.mT)
    found = torch.stack(grams)
    error = (found.mean(0) - gram).abs()
    deviation = found.std(0)
    assert (error <= 6 * deviation / 600**0.5).all()
    # The bound must mean something: each entry is estimated to a fraction of the norms.
    norms = flat.norm(dim=1)
    assert (6 * deviation / 600**0.5 < 0.2 * norms[:, None] * norms).all()
    assert ((found[0] - gram).abs() > 1e-3 * gram.abs()).any()


# Storage dtypes


@pytest.mark.parametrize("name", STORAGE_DTYPES)
def test_storage_dtypes_by_name_and_as_dtype(name, mlp):
    inputs, dtype = floats(4, 5), STORAGE_DTYPES[name]
    exact = project(ProjectionEngine(mlp, dim=6, min_dim=2, dtype="float64"), mlp, inputs).rows
    for given in (name, dtype):
        engine = ProjectionEngine(mlp, dim=6, min_dim=2, dtype=given)
        rows = project(engine, mlp, inputs).rows
        assert engine.dtype == rows.dtype == dtype
        assert torch.equal(rows, exact.to(dtype))
        assert engine.manifest()["dtype"] == name


@pytest.mark.parametrize("dtype", ["float8", torch.int32, torch.complex64])
def test_unknown_dtype_lists_what_exists(dtype, mlp):
    with pytest.raises(UnknownNameError, match="Available: bfloat16, float16, float32, float64"):
        ProjectionEngine(mlp, dtype=dtype)


def test_overflow_of_the_storage_dtype_is_an_error(mlp):
    inputs = floats(4, 5)
    scale = torch.ones(4, dtype=torch.float64)
    scale[2] = 1e6
    engine = ProjectionEngine(mlp, dim=6, dtype="float16")
    with (
        pytest.raises(CaptureError, match=r"samples \[72\] overflow torch\.float16"),
        engine,
        engine.batch([70, 71, 72, 73]),
    ):
        (scale * squares(mlp(inputs))).sum().backward()
    wide = ProjectionEngine(mlp, dim=6, dtype="bfloat16")
    with wide, wide.batch([70, 71, 72, 73]) as batch:
        (scale * squares(mlp(inputs))).sum().backward()
    assert batch.result.rows.isfinite().all()


def test_bfloat16_model_is_projected_in_float32():
    model = nn.Sequential(nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 20)).bfloat16()
    inputs = torch.randn(4, 40).bfloat16()
    engine = ProjectionEngine(model, dim=20, min_dim=2)
    assert all(side.dtype == torch.float32 for side in engine.maps("0.weight"))
    rows = project(engine, model, inputs).rows
    assert rows.dtype == torch.float32
    # Rows made of products in bfloat16 would be numbers of bfloat16.
    assert not torch.equal(rows, rows.bfloat16().float())


# Refusals


def test_unknown_init_lists_what_exists(mlp):
    with pytest.raises(UnknownNameError, match="did you mean 'gaussian'") as error:
        ProjectionEngine(mlp, init="gausian")
    for name in ("gaussian", "orthonormal", "rademacher"):
        assert name in str(error.value)


def test_unknown_layer_lists_what_exists(mlp):
    with pytest.raises(UnknownNameError, match=r"unknown layer '\*attn\*'.*Available: 0, 0\.bias"):
        ProjectionEngine(mlp, layers="*attn*")


def test_unknown_option_is_a_type_error(mlp):
    with pytest.raises(TypeError, match="rank"):
        ProjectionEngine(mlp, rank=256)


def test_dim_and_total_dim_exclude_each_other(mlp):
    with pytest.raises(CaptureError, match=r"either dim .* or total_dim"):
        ProjectionEngine(mlp, dim=64, total_dim=512)


@pytest.mark.parametrize("option", [{"dim": 0}, {"total_dim": -1}, {"min_dim": 0}])
def test_dimensions_are_positive(option, mlp):
    with pytest.raises(CaptureError, match="must be at least 1"):
        ProjectionEngine(mlp, **option)


def test_projection_of_a_plugin_is_found_by_name(mlp, assert_rows):
    pytest.importorskip("ghost_plugin_sample")
    assert "coordinates" in installed().projections
    inputs = floats(4, 5)
    expected = per_sample_gradients(mlp, squares(mlp(inputs)))
    engine = ProjectionEngine(mlp, dim=6, min_dim=2, init="coordinates", dtype="float64")
    assert_rows(engine, project(engine, mlp, inputs), expected)
    assert engine.manifest()["projection"] == "coordinates"
