"""Dots by token against gradients of copies of the parameters, one for each token."""

import pytest
import torch
from token_kit import (
    DOCUMENTS,
    Folded,
    check_sum,
    dots_of,
    engine_for,
    gradients_by_token,
    looked_up,
    scored,
    squares,
    token_losses,
    with_copies,
)
from torch import nn

from ghost_core import Outer, Tokens
from ghost_core.testing import assert_within, per_sample_gradients

VOCABULARY, WIDTH = 11, 4

# By token


@pytest.mark.parametrize(("n", "t"), [(3, 6), (5, 5), (1, 4), (4, 1)])
@pytest.mark.parametrize("k", [1, 3])
def test_language_model(n, t, k, model, draw_directions, assert_scores):
    ids, documents = torch.randint(0, VOCABULARY, (n, t)), torch.zeros(n, t, dtype=torch.int64)

    def losses(logits):
        return (token_losses(logits, ids) + logits.square().mean(-1)).sum(1)

    copies = {
        name: p.detach().expand(n, t, *p.shape).clone().requires_grad_()
        for name, p in model.named_parameters()
    }
    loss = losses(with_copies(copies, ids, documents)).sum()
    parts = torch.autograd.grad(loss, list(copies.values()))
    directions = draw_directions(model, k)
    expected, scale = dots_of(dict(zip(copies, parts, strict=True)), directions, leading=2)
    engine = engine_for(model, directions)
    scores = scored(engine, model, ids, documents, losses=losses)
    assert scores.verified
    assert_within(scores.by_token, expected, scale, what="by_token")
    check_sum(scores)
    assert_scores(scores, per_sample_gradients(model, losses(model(ids, documents))), directions)
    with engine.frozen(), engine.batch(range(n)) as batch:
        losses(model(ids, documents)).sum().backward()
    assert_within(batch.result.by_token, expected, scale, what="by_token, frozen")


def test_each_parameter_alone(model, ids, draw_directions):
    """Errors of one parameter cannot hide behind another's."""
    directions, gradients = draw_directions(model, 2), gradients_by_token(model, ids, DOCUMENTS)
    for name, gradient in gradients.items():
        expected, scale = dots_of({name: gradient}, directions, leading=2)
        engine = engine_for(model, directions, layers=name)
        scores = scored(
            engine, model, ids, DOCUMENTS, losses=lambda logits: token_losses(logits, ids)
        )
        assert_within(scores.by_token, expected, scale, what=name)


class ChannelsFirst(nn.Module):
    """Gives a layer inputs `[N, d, T]` and returns `[N, T, p]`."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, inputs):
        return self.layer(inputs.mT).mT


LAYERS = {
    "linear": lambda: nn.Linear(4, 3),
    "linear without bias": lambda: nn.Linear(4, 3, bias=False),
    "layer norm": lambda: nn.LayerNorm(4),
    "rms norm": lambda: nn.RMSNorm(4),
    "convolution": lambda: ChannelsFirst(nn.Conv1d(4, 3, 3, padding=1)),
    "grouped convolution": lambda: ChannelsFirst(nn.Conv1d(4, 6, 3, padding="same", groups=2)),
    "strided convolution": lambda: ChannelsFirst(nn.Conv1d(4, 3, 2, stride=2)),
    "group norm": lambda: ChannelsFirst(nn.GroupNorm(2, 4)),
    "instance norm": lambda: ChannelsFirst(nn.InstanceNorm1d(4, affine=True)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_layer_against_losses_of_single_positions(kind, draw_directions):
    """For one layer alone, the loss at a position reaches its parameters at that position only."""
    model, inputs = LAYERS[kind]().double(), torch.randn(6, 6, 4, dtype=torch.float64)
    directions = draw_directions(model, 2)
    weights = torch.randn_like(model(inputs))

    def losses(outputs):
        return (weights * outputs.sin()).sum(-1)  # [N, T]

    at = losses(model(inputs)).unbind(1)
    each = [dots_of(per_sample_gradients(model, loss), directions, leading=1) for loss in at]
    expected, scale = (torch.stack(values, 1) for values in zip(*each, strict=True))
    scores = scored(engine_for(model, directions), model, inputs, losses=losses)
    assert_within(scores.by_token, expected, scale, what=kind)
    check_sum(scores)


def test_embedding_with_padding(draw_directions):
    model = nn.Embedding(VOCABULARY, 3, padding_idx=2).double()
    ids = torch.randint(0, VOCABULARY, (4, 4))
    ids[0, 1] = ids[3, 0] = 2
    directions = draw_directions(model, 2)
    at = model(ids).sin().sum(-1).unbind(1)
    each = [dots_of(per_sample_gradients(model, loss), directions, leading=1) for loss in at]
    expected, scale = (torch.stack(values, 1) for values in zip(*each, strict=True))
    scores = scored(engine_for(model, directions), model, ids, losses=torch.sin)
    assert_within(scores.by_token, expected, scale)
    assert not scores.by_token[0, 1].any()


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_tokens_of_a_bag(mode, draw_directions):
    model, ids = nn.EmbeddingBag(VOCABULARY, 3, mode=mode).double(), torch.randint(0, 11, (4, 4))
    tables = model.weight.detach().expand(4, 4, VOCABULARY, 3).clone().requires_grad_()
    bags = getattr(looked_up(ids, tables), mode)(1)
    assert torch.allclose(bags, model(ids))
    (parts,) = torch.autograd.grad(squares(bags).sum(), tables)
    directions = draw_directions(model, 2)
    expected, scale = dots_of({"weight": parts}, directions, leading=2)
    scores = scored(engine_for(model, directions), model, ids)
    assert_within(scores.by_token, expected, scale)


@pytest.mark.parametrize("transposed", [False, True])
def test_outer_products_of_either_layout(transposed):
    """The second layout is that of `Conv1D` of transformers, `[d, p]`; N = T = d = p = K."""
    inputs, grads, directions = (torch.randn(4, 4, 4, dtype=torch.float64) for _ in range(3))
    outer = Outer(Tokens(inputs.unsqueeze(2), transposed), grads.unsqueeze(2), torch.Size((4, 4)))
    pattern = "ntd,ntp,kdp->ntk" if transposed else "ntd,ntp,kpd->ntk"
    expected = torch.einsum(pattern, inputs, grads, directions)
    scale = inputs.norm(dim=2, keepdim=True) * grads.norm(dim=2, keepdim=True)
    assert_within(outer.token_dot(directions), expected, scale * directions.flatten(1).norm(dim=1))


def test_axes_between_samples_and_features_are_folded_in_order(mlp, draw_directions):
    directions = draw_directions(mlp, 2)
    inputs = torch.randn(4, 2, 3, 5, dtype=torch.float64)
    by_rows = scored(engine_for(mlp, directions), mlp, inputs).by_token
    flat = scored(engine_for(mlp, directions), mlp, inputs.flatten(1, 2)).by_token
    assert by_rows.shape == (4, 6, 2)
    assert torch.allclose(by_rows, flat, rtol=1e-12, atol=1e-12)


def test_positions_computed_once_for_all_samples(transformer, tokens, draw_directions):
    """Position embeddings have one row, whose tokens are the samples' tokens all the same."""
    directions = draw_directions(transformer, 2)
    engine = engine_for(transformer, directions, layers="positions")
    scores = scored(engine, transformer, tokens)
    parts = per_sample_gradients(transformer, squares(transformer(tokens)), ["positions.weight"])
    by_place = parts["positions.weight"][:, : tokens.shape[1]]  # row t is used at position t only
    table = torch.stack([each["positions.weight"] for each in directions.values()])[:, :7]
    expected = torch.einsum("ntd,ktd->ntk", by_place, table)
    scale = by_place.norm(dim=2, keepdim=True) * table.flatten(1).norm(dim=1)
    assert_within(scores.by_token, expected, scale)
    whole = scored(engine_for(transformer, directions), transformer, tokens)
    assert whole.by_token.shape == (5, 7, 2)
    check_sum(whole)


@pytest.mark.parametrize(
    ("fold", "options"),
    [
        ("samples first", {}),
        ("tokens first", {}),
        ("another axis", {"batch_dim": {"inner": 1}}),
    ],
)
@pytest.mark.parametrize("n", [3, 4])
def test_rows_of_samples_and_tokens_are_unfolded(fold, options, n, draw_directions):
    model, inputs = Folded(fold).double(), torch.randn(n, 4, 5, dtype=torch.float64)
    directions = draw_directions(model, 2)
    at = model(inputs).sin().sum(-1).unbind(1)  # nothing here goes from token to token
    each = [dots_of(per_sample_gradients(model, loss), directions, leading=1) for loss in at]
    expected, scale = (torch.stack(values, 1) for values in zip(*each, strict=True))
    scores = scored(engine_for(model, directions, **options), model, inputs, losses=torch.sin)
    assert_within(scores.by_token, expected, scale, what=fold)
    check_sum(scores)


# Several passes


def test_micro_batches_follow_one_another(mlp, sequences, draw_directions):
    directions = draw_directions(mlp, 2)
    engine = engine_for(mlp, directions)
    whole = scored(engine, mlp, sequences).by_token
    with engine, engine.batch(range(4)) as batch:
        for part in sequences.split([1, 2, 1]):
            squares(mlp(part)).sum().backward()
    assert_within(batch.result.by_token, whole, whole.abs().amax())


def test_passes_on_the_same_samples_add(mlp, sequences, draw_directions):
    directions, others = draw_directions(mlp, 2), sequences.flip(2) + 1
    engine = engine_for(mlp, directions)
    one, two = (scored(engine, mlp, each).by_token for each in (sequences, others))
    with engine, engine.batch(range(4)) as batch:
        (squares(mlp(sequences)) + 3 * squares(mlp(others))).sum().backward()
    assert_within(batch.result.by_token, one + 3 * two, (one.abs() + two.abs()).amax())
    with engine, engine.batch(range(4)) as batch:
        loss = squares(mlp(sequences)).sum()
        loss.backward(retain_graph=True)
        loss.backward()
    assert_within(batch.result.by_token, 2 * one, one.abs().amax())


def test_nothing_remains_from_batch_to_batch(mlp, sequences, draw_directions):
    engine = engine_for(mlp, draw_directions(mlp, 1))
    first = scored(engine, mlp, sequences).by_token
    assert scored(engine, mlp, sequences[:, :3]).by_token.shape == (4, 3, 1)
    assert torch.equal(scored(engine, mlp, sequences).by_token, first)


def test_batch_without_samples(mlp, draw_directions):
    engine = engine_for(mlp, draw_directions(mlp, 2))
    scores = scored(engine, mlp, torch.zeros(0, 4, 5, dtype=torch.float64))
    assert scores.by_token.shape == (0, 4, 2)
    segments = scores.by_segment(torch.zeros(0, 4, dtype=torch.int64))
    assert segments.ids.shape == (0,)
    assert segments.total.shape == (0, 2)
