"""Projected gradients against per-sample autograd in float64, and everything around them."""

import hashlib
import json
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ghost_core import CaptureError, UnknownNameError
from ghost_core.plugins import installed
from ghost_core.testing import assert_within, check_engine, next_token_losses, per_sample_gradients
from ghost_engines import ProjectionEngine
from ghost_engines.projection import STORAGE_DTYPES


def squares(outputs):
    """Return a loss per sample, `[N]`, from outputs `[N, ...]`."""
    return outputs.square().flatten(1).sum(1) + outputs.flatten(1).sum(1)


def project(engine, model, inputs, losses=squares):
    """Project one batch's gradients beside training."""
    with engine, engine.batch(range(len(inputs))) as batch:
        losses(model(inputs)).sum().backward()
    return batch.result


def project_frozen(engine, model, inputs, losses=squares):
    """Project one batch's gradients in a pass without training."""
    with engine.frozen(), engine.batch(range(len(inputs))) as batch:
        losses(model(inputs)).sum().backward()
    return batch.result


def floats(*shape):
    return torch.randn(shape, dtype=torch.float64)


def linear():
    return nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 11, bias=False)), floats(4, 12)


def linear_with_tokens():
    return nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 11)), floats(4, 2, 3, 12)


def transposed_linear():
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    return nn.Sequential(conv1d(13, 9), nn.Tanh(), conv1d(4, 13)), floats(4, 5, 9)


def embedding():
    model = nn.Sequential(nn.Embedding(30, 9, padding_idx=0), nn.Tanh(), nn.Linear(9, 3))
    return model, torch.randint(0, 30, (4, 6))


def embedding_bag():
    model = nn.Sequential(nn.EmbeddingBag(30, 9, mode="mean"), nn.Tanh(), nn.Linear(9, 3))
    return model, torch.randint(0, 30, (4, 6))


def convolution_1d():
    return nn.Sequential(nn.Conv1d(4, 6, 3, stride=2, padding=1), nn.Tanh()), floats(4, 4, 9)


def convolution_2d():
    model = nn.Sequential(
        nn.Conv2d(4, 6, 3, dilation=2, padding=2, groups=2), nn.ReLU(inplace=True), nn.Flatten(),
        nn.Linear(6 * 5 * 4, 3),
    )  # fmt: skip
    return model, floats(3, 4, 5, 4)


def norms():
    model = nn.Sequential(nn.Linear(6, 12), nn.LayerNorm(12), nn.Tanh(), nn.RMSNorm(12))
    return model, floats(4, 3, 6)


def group_norm():
    return nn.Sequential(nn.Conv1d(4, 12, 3), nn.GroupNorm(3, 12), nn.Tanh()), floats(4, 4, 7)


CASES = [
    linear, linear_with_tokens, transposed_linear, embedding, embedding_bag, convolution_1d,
    convolution_2d, norms, group_norm,
]  # fmt: skip


@pytest.fixture(params=CASES, ids=lambda case: case.__name__)
def case(request):
    """A model in float64 and its inputs."""
    model, inputs = request.param()
    return model.double(), inputs


# Exact


@pytest.mark.parametrize("init", ["gaussian", "rademacher", "orthonormal"])
def test_rows_are_projected_gradients(init, case, assert_rows):
    model, inputs = case
    expected = per_sample_gradients(model, squares(model(inputs)))
    engine = ProjectionEngine(model, dim=12, min_dim=2, init=init, dtype="float64")
    assert any(block.size < block.shape.numel() for block in engine.layout)
    assert_rows(engine, project(engine, model, inputs), expected)
    model.zero_grad()
    assert_rows(engine, project_frozen(engine, model, inputs), expected)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_whole_gradients_where_nothing_is_projected(case, assert_rows):
    model, inputs = case
    expected = per_sample_gradients(model, squares(model(inputs)))
    engine = ProjectionEngine(model, dim=10**6, dtype="float64")
    assert [block.size for block in engine.layout] == [
        parameter.shape.numel() for parameter in engine.parameters
    ]
    batch = project_frozen(engine, model, inputs)
    assert_rows(engine, batch, expected)
    flat = torch.cat([expected[block.parameter].flatten(1) for block in engine.layout], 1)
    assert_within(batch.rows, flat, flat.norm(dim=1)[:, None])


@pytest.mark.parametrize("frozen", [False, True])
def test_language_model_with_tied_parameter(frozen, transformer, tokens, assert_rows):
    run = project_frozen if frozen else project
    losses = next_token_losses(transformer(tokens), tokens)
    expected = per_sample_gradients(transformer, losses)
    assert "tokens.weight" in expected
    assert "head.weight" not in expected
    engine = ProjectionEngine(transformer, dim=16, min_dim=3, dtype="float64")
    batch = run(engine, transformer, tokens, lambda logits: next_token_losses(logits, tokens))
    assert_rows(engine, batch, expected)


def test_module_used_twice(assert_rows):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(9, 9)

        def forward(self, inputs):
            return self.inner(torch.tanh(self.inner(inputs)))

    model, inputs = Twice().double(), floats(4, 3, 9)
    expected = per_sample_gradients(model, squares(model(inputs)))
    engine = ProjectionEngine(model, dim=12, min_dim=2, dtype="float64")
    assert_rows(engine, project(engine, model, inputs), expected)


def test_token_mean_loss_with_padding_gives_contributions(transformer, tokens, assert_rows):
    targets = tokens.clone()
    for sample, length in enumerate((7, 2, 4, 6, 3)):
        targets[sample, length:] = -100
    sums = functional.cross_entropy(transformer(tokens).mT, targets, reduction="none").sum(1)
    expected = per_sample_gradients(transformer, sums / (targets != -100).sum())
    engine = ProjectionEngine(transformer, dim=16, min_dim=3, dtype="float64")
    with engine, engine.batch(range(5)) as batch:
        logits = transformer(tokens).flatten(0, 1)
        functional.cross_entropy(logits, targets.flatten(), ignore_index=-100).backward()
    assert_rows(engine, batch.result, expected)


def test_micro_batches_and_several_backward_passes(mlp, assert_rows):
    inputs = floats(5, 5)
    expected = per_sample_gradients(mlp, 3 * squares(mlp(inputs)))
    engine = ProjectionEngine(mlp, dim=6, min_dim=2, dtype="float64")
    with engine, engine.batch([9, 8, 7, 6, 5]) as batch:
        for part in inputs.split(2):
            loss = squares(mlp(part)).sum()
            loss.backward(retain_graph=True)
            (2 * loss).backward()
    assert_rows(engine, batch.result, expected)
    assert batch.result.ids.tolist() == [9, 8, 7, 6, 5]


@pytest.mark.parametrize("run", [project, project_frozen])
def test_every_batch_may_have_another_shape(run, mlp, assert_rows):
    engine = ProjectionEngine(mlp, dim=6, min_dim=2, dtype="float64")
    for shape in [(4, 5), (7, 5), (2, 30, 5), (1, 5), (40, 5), (3, 1, 2, 5)]:
        inputs = floats(*shape)
        expected = per_sample_gradients(mlp, squares(mlp(inputs)))
        assert_rows(engine, run(engine, mlp, inputs), expected)


@pytest.mark.parametrize("run", [project, project_frozen])
def test_batch_without_samples_has_no_rows(run, mlp):
    engine = ProjectionEngine(mlp, dim=6)
    assert run(engine, mlp, floats(0, 5)).rows.shape == (0, engine.k_total)


def test_training_loop_and_frozen_pass_give_equal_rows(transformer, tokens):
    transformer.float()
    engine = ProjectionEngine(transformer, dim=16, min_dim=3)
    losses = lambda logits: next_token_losses(logits, tokens)  # noqa: E731
    beside = project(engine, transformer, tokens, losses).rows
    assert beside.any()
    assert torch.equal(beside, project_frozen(engine, transformer, tokens, losses).rows)


def test_project_maps_given_gradients_to_rows(mlp):
    inputs = floats(4, 5)
    expected = per_sample_gradients(mlp, squares(mlp(inputs)))
    engine = ProjectionEngine(mlp, dim=6, min_dim=2, dtype="float64")
    rows, given = project(engine, mlp, inputs).rows, engine.project(expected)
    assert given.shape == (4, engine.k_total)
    assert_within(rows, given, 10 * given.norm(dim=1)[:, None])


def test_project_refuses_missing_and_misshapen_gradients(mlp):
    engine = ProjectionEngine(mlp, dim=6)
    gradients = {name: torch.zeros(2, *p.shape) for name, p in mlp.named_parameters()}
    assert engine.project(gradients).shape == (2, engine.k_total)
    with pytest.raises(CaptureError, match=r"2\.bias is missing"):
        engine.project({name: g for name, g in gradients.items() if name != "2.bias"})
    with pytest.raises(CaptureError, match=r"2\.bias is of shape \(3,\)"):
        engine.project({**gradients, "2.bias": torch.zeros(3)})


# Frozen passes


@pytest.fixture
def mixed(mlp):
    """A model with frozen and trainable parameters."""
    mlp[0].bias.requires_grad_(False)
    mlp[2].weight.requires_grad_(False)
    return mlp


def flags(model):
    return [parameter.requires_grad for parameter in model.parameters()]


def test_frozen_makes_no_gradients_and_restores_mixed_flags(mixed, assert_rows):
    inputs = floats(4, 5)
    expected = per_sample_gradients(mixed, squares(mixed(inputs)))
    assert expected.keys() == {"0.weight", "2.bias"}
    engine = ProjectionEngine(mixed, dim=6, min_dim=2, dtype="float64")
    with engine.frozen():
        assert flags(mixed) == [False] * 4
        with engine.batch(range(4)) as batch:
            squares(mixed(inputs)).sum().backward()
    assert_rows(engine, batch.result, expected)
    assert flags(mixed) == [True, False, False, True]
    assert [parameter.grad for parameter in mixed.parameters()] == [None] * 4
    assert not any(module._forward_hooks for module in mixed.modules())


@pytest.mark.parametrize("where", ["attached", "in the batch", "in the model"])
def test_frozen_restores_mixed_flags_after_an_exception(where, mixed):
    engine = ProjectionEngine(mixed, dim=6)

    def fail(*_):
        raise ZeroDivisionError

    def run():
        if where == "attached":
            fail()
        with engine.batch(range(4)):
            squares(mixed(floats(4, 5))).sum().backward()
            fail()

    handle = mixed[2].register_forward_hook(fail) if where == "in the model" else None
    with pytest.raises(ZeroDivisionError), engine.frozen():
        run()
    if handle:
        handle.remove()
    assert flags(mixed) == [True, False, False, True]
    assert not any(module._forward_hooks for module in mixed.modules())
    project(engine, mixed, floats(4, 5))
    project_frozen(engine, mixed, floats(4, 5))
    assert flags(mixed) == [True, False, False, True]


def test_frozen_keeps_gradients_that_are_there(mixed):
    mixed[0].weight.grad = torch.ones(7, 5, dtype=torch.float64)
    project_frozen(ProjectionEngine(mixed, dim=6), mixed, floats(4, 5))
    assert torch.equal(mixed[0].weight.grad, torch.ones(7, 5, dtype=torch.float64))


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
        "seed": 3,
        "dtype": "float16",
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


def run_script(**values):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(**values)], capture_output=True, text=True, check=True
    )
    return done.stdout.split()


def test_maps_are_equal_in_every_process_and_independent_of_module_order():
    first = run_script(seed=1, names=["a", "b"], init="orthonormal")
    assert run_script(seed=2, names=["b", "a"], init="orthonormal") == first
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


# Memory


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that is made inside."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.elements = max(self.elements, leaf.numel())
        return result


@pytest.mark.parametrize("frozen", [False, True])
def test_embedding_never_builds_a_table_per_sample(frozen):
    vocabulary, width, n = 3000, 24, 6
    model = nn.Sequential(nn.Embedding(vocabulary, width), nn.Linear(width, 4))
    tokens = torch.randint(0, vocabulary, (n, 10))
    engine = ProjectionEngine(model, dim=64, layers="0", verify=False)
    with (
        engine.frozen() if frozen else engine,
        Largest() as largest,
        engine.batch(range(n)) as batch,
    ):
        squares(model(tokens)).sum().backward()
    assert batch.result.rows.any()
    assert n * 10 * width <= largest.elements <= vocabulary * width  # the training's own gradient
    if frozen:
        assert largest.elements < vocabulary * width


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


def test_keeps_what_every_engine_promises():
    check_engine(lambda model: ProjectionEngine(model, dim=16, min_dim=2))
