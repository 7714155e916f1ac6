"""Projected gradients against projections of autograd's gradients."""

import pytest
import torch
from projection_kit import floats, project, project_frozen
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ghost_core import CaptureError
from ghost_core.testing import assert_within, next_token_losses, per_sample_gradients
from ghost_engines import ProjectionEngine


def squares(outputs):
    """Return a loss per sample, `[N]`, from outputs `[N, ...]`."""
    return outputs.square().flatten(1).sum(1) + outputs.flatten(1).sum(1)


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
