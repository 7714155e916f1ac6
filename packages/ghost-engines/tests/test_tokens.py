"""Dots by token and by document, against autograd with a copy of each parameter per position."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from ghost_core import CaptureError, Dense, Outer, SamplerRegistry, Tokens
from ghost_core.testing import PlainLinear, assert_within, per_sample_gradients
from ghost_core.tracking import Claim, dotted_name
from ghost_engines import DotProductEngine, InRunValues

VOCABULARY, WIDTH = 11, 4

# A language model for packed documents, and the same with parameters of its own at every position


def places_of(documents):
    """Return positions that start anew with every document: `[N, T]`."""
    places = torch.zeros_like(documents)
    for t in range(1, documents.shape[1]):
        places[:, t] = (places[:, t - 1] + 1) * (documents[:, t] == documents[:, t - 1])
    return places


def attended(mixed, documents):
    """Attend causally, within documents."""
    query, key, value = mixed.chunk(3, dim=-1)
    allowed = (documents[:, :, None] == documents[:, None, :]).tril()
    weights = (query @ key.mT).masked_fill(~allowed, -torch.inf).softmax(-1)
    return weights @ value


class Packed(nn.Module):
    """Token ids and document ids `[N, T]` to logits; a tied head, and a layer used twice."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.places = nn.Embedding(8, WIDTH)
        self.first = nn.LayerNorm(WIDTH)
        self.attend = nn.Linear(WIDTH, 3 * WIDTH)
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.last = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.head.weight = self.tokens.weight

    def forward(self, ids, documents):
        hidden = self.tokens(ids) + self.places(places_of(documents))
        hidden = hidden + attended(self.attend(self.first(hidden)), documents)
        hidden = hidden + self.inner(torch.tanh(self.inner(hidden)))
        return self.head(self.last(hidden))


def linear(inputs, copies, name):
    outputs = torch.einsum("ntd,ntpd->ntp", inputs, copies[f"{name}.weight"])
    return outputs + copies[f"{name}.bias"]


def normed(inputs, copies, name):
    centred = inputs - inputs.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return scaled * copies[f"{name}.weight"] + copies[f"{name}.bias"]


def looked_up(index, tables):
    where = index[:, :, None, None].expand(-1, -1, 1, tables.shape[-1])
    return tables.gather(2, where).squeeze(2)


def with_copies(copies, ids, documents):
    """Compute what `Packed` does, with parameters `[N, T, *shape]`."""
    hidden = looked_up(ids, copies["tokens.weight"])
    hidden = hidden + looked_up(places_of(documents), copies["places.weight"])
    hidden = hidden + attended(linear(normed(hidden, copies, "first"), copies, "attend"), documents)
    hidden = hidden + linear(torch.tanh(linear(hidden, copies, "inner")), copies, "inner")
    hidden = normed(hidden, copies, "last")
    logits = torch.einsum("ntd,ntpd->ntp", hidden, copies["tokens.weight"])
    return logits + copies["head.bias"]


def token_losses(logits, ids):
    """Return the loss of predicting the next token at each position; none at the last: `[N, T]`."""
    losses = functional.cross_entropy(logits[:, :-1].mT, ids[:, 1:], reduction="none")
    return functional.pad(losses, (0, 1))


def gradients_by_token(model, ids, documents):
    """Return each position's part of the gradient by autograd: `[N, T, *shape]` by name."""
    copies = {
        name: p.detach().expand(*ids.shape, *p.shape).clone().requires_grad_()
        for name, p in model.named_parameters()
    }
    logits = with_copies(copies, ids, documents)
    assert torch.allclose(logits, model(ids, documents), rtol=0, atol=1e-12)
    found = torch.autograd.grad(token_losses(logits, ids).sum(), list(copies.values()))
    return dict(zip(copies, found, strict=True))


def dots_of(gradients, directions, leading):
    """Return dots `[..., K]` of gradients `[..., *shape]` by name, and what errors relate to."""
    dots, scale = 0.0, 0.0
    for name, gradient in gradients.items():
        rows = gradient.flatten(leading) if gradient.dim() > leading else gradient[..., None]
        columns = torch.stack([each[name].flatten() for each in directions.values()], 1)
        dots = dots + rows @ columns
        scale = scale + rows.norm(dim=-1, keepdim=True) * columns.norm(dim=0)
    assert dots.any(), "the reference is zero, so nothing would be tested"
    return dots, scale


def engine_for(model, directions, **options):
    engine = DotProductEngine(model, per_token=True, **options)
    for name, direction in directions.items():
        engine.add_direction(name, direction)
    return engine


def squares(outputs):
    """Return a loss for each sample, `[N]`, from outputs `[N, ...]`."""
    return outputs.square().flatten(1).sum(1) + outputs.flatten(1).sum(1)


def scored(engine, model, *inputs, losses=squares):
    with engine, engine.batch(range(len(inputs[0]))) as batch:
        losses(model(*inputs)).sum().backward()
    return batch.result


def check_sum(scores):
    scale = scores.by_token.abs().sum(1)
    assert_within(scores.by_token.sum(1), scores.total, scale, what="sum over tokens")


@pytest.fixture
def model():
    return Packed().double()


@pytest.fixture
def ids():
    return torch.randint(0, VOCABULARY, (3, 6))


DOCUMENTS = torch.tensor([[7, 7, 7, 2, 2, 2], [2, 2, 9, 9, 9, 9], [7, 4, 4, 4, -1, -1]])
"""Three samples packed of documents; 7 and 2 are in two of them."""


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


class Folded(nn.Module):
    """Folds samples and tokens into rows before a layer, in either order; or tokens first."""

    def __init__(self, fold):
        super().__init__()
        self.body, self.inner, self.fold = nn.Linear(5, 4), nn.Linear(4, 4), fold

    def forward(self, inputs):
        hidden = torch.tanh(self.body(inputs))
        if self.fold == "samples first":
            return self.inner(hidden.flatten(0, 1)).unflatten(0, hidden.shape[:2])
        if self.fold == "tokens first":
            rows = hidden.transpose(0, 1)
            return self.inner(rows.flatten(0, 1)).unflatten(0, rows.shape[:2]).transpose(0, 1)
        return self.inner(hidden.transpose(0, 1)).transpose(0, 1)


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


@pytest.fixture
def sequences():
    return torch.randn(4, 4, 5, dtype=torch.float64)


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


# Precision, scale, other users


def test_bfloat16_is_widened(draw_directions):
    model = nn.Linear(16, 12).bfloat16()
    inputs = torch.randn(4, 6, 16, dtype=torch.bfloat16)
    directions = {
        name: {key: value.float() for key, value in each.items()}
        for name, each in draw_directions(model, 2).items()
    }
    outputs = model(inputs)
    (arrived,) = torch.autograd.grad(outputs.float().square().sum(), outputs)
    parts = {
        "weight": torch.einsum("ntp,ntd->ntpd", arrived.double(), inputs.double()),
        "bias": arrived.double(),
    }
    wide = {
        name: {key: value.double() for key, value in each.items()}
        for name, each in directions.items()
    }
    expected, scale = dots_of(parts, wide, leading=2)
    engine = engine_for(model, directions)
    scores = scored(engine, model, inputs, losses=lambda outputs: outputs.float().square())
    assert scores.by_token.dtype == torch.float32
    assert_within(scores.by_token, expected, scale, 1e-6)


def test_the_scale_of_a_grad_scaler_is_divided_out(mlp, sequences, draw_directions):
    directions = draw_directions(mlp, 1)
    plain = scored(engine_for(mlp, directions), mlp, sequences).by_token
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    engine = engine_for(mlp, directions, grad_scaler=scaler)
    scores = scored(engine, mlp, sequences, losses=lambda outputs: scaler.scale(squares(outputs)))
    assert_within(scores.by_token, plain, plain.abs())
    check_sum(scores)


def test_in_run_values_are_the_same(mlp, sequences, draw_directions):
    (direction,) = draw_directions(mlp, 1).values()
    found = []
    for per_token in (False, True):
        model = copy.deepcopy(mlp)
        engine = DotProductEngine(model, per_token=per_token)
        engine.add_direction("given", direction)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        with InRunValues(engine, optimizer) as values, engine:
            with engine.batch(range(4)):
                squares(model(sequences)).sum().backward()
            optimizer.step()
        found.append(values.to_dict())
    plain, by_token = found
    assert any(plain.values())
    assert by_token == pytest.approx(plain, rel=1e-12)


def test_beside_an_engine_without_tokens(mlp, sequences, draw_directions):
    directions = draw_directions(mlp, 3)
    tokens, plain = engine_for(mlp, directions), DotProductEngine(mlp)
    for name, direction in directions.items():
        plain.add_direction(name, direction)
    with tokens, plain, tokens.batch(range(4)) as first, plain.batch(range(4)) as second:
        squares(mlp(sequences)).sum().backward()
    by_token = first.result.by_token
    assert_within(by_token.sum(1), second.result.total, by_token.abs().sum(1))
    with pytest.raises(CaptureError, match=r"make the engine with .*per_token=True"):
        _ = second.result.by_token
    with pytest.raises(CaptureError, match=r"make the engine with .*per_token=True"):
        second.result.by_segment(torch.zeros(4, 4, dtype=torch.int64))


# What cannot be split by token


class Pooled(nn.Module):
    """A classifier whose head sees the mean over tokens."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(5, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 2)

    def forward(self, inputs):
        return self.head(self.norm(self.body(inputs)).mean(1))


class Shortened(nn.Module):
    """Has a convolution with fewer positions than there are tokens."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(5, 4)
        self.again = nn.Linear(4, 4)
        self.short = nn.Conv1d(4, 3, 2, bias=False)

    def forward(self, inputs):
        return self.short(self.again(self.body(inputs)).mT)


class Whole(nn.Module):
    """Normalises over tokens and features at once, with a weight for each."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(5, 4)
        self.norm = nn.LayerNorm((4, 4), bias=False)

    def forward(self, inputs):
        return self.norm(self.body(inputs))


class Twice(nn.Module):
    """Uses a layer for all tokens and for their mean."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(5, 5)

    def forward(self, inputs):
        return self.inner(torch.tanh(self.inner(inputs)).mean(1))


@pytest.mark.parametrize(
    ("kind", "message", "names"),
    [
        (Pooled, r"have 4 tokens, such as body\.bias, but not .*head\.bias, head\.weight: 1\n", 2),
        (Shortened, r"have 4 tokens, such as again\.bias, but not these: short\.weight: 3\n", 1),
        (Whole, r"have 4 tokens, such as body\.bias, but not these: norm\.weight: 1\n", 1),
    ],
)
def test_parameters_without_the_tokens_are_refused_by_name(
    kind, message, names, sequences, draw_directions
):
    model = kind().double()
    directions = draw_directions(model, 1)
    with pytest.raises(CaptureError, match=message) as refused:
        scored(engine_for(model, directions), model, sequences)
    exclude = str(refused.value).partition("exclude='")[2].partition("'")[0]
    assert len(exclude.split(",")) == names
    engine = engine_for(model, directions, exclude=exclude)
    check_sum(scored(engine, model, sequences))
    plain = DotProductEngine(model)
    plain.add_direction("random 0", directions["random 0"])
    assert scored(plain, model, sequences).total.any()


def test_parameter_used_with_and_without_tokens_is_refused(sequences, draw_directions):
    model = Twice().double()
    engine = engine_for(model, draw_directions(model, 1))
    with pytest.raises(CaptureError, match=r"exclude='inner\.bias,inner\.weight'"):
        scored(engine, model, sequences)


def test_many_parameters_are_not_all_listed_twice(draw_directions):
    heads = nn.ModuleList(nn.Linear(5, 2) for _ in range(7)).double()

    class Many(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.heads = nn.Linear(5, 5).double(), heads

        def forward(self, inputs):
            pooled = self.body(inputs).mean(1)
            return torch.stack([head(pooled) for head in self.heads], 1)

    model = Many()
    engine = engine_for(model, draw_directions(model, 1))
    with pytest.raises(CaptureError, match=r"heads\.4\.weight and 4 more: 1\n"):
        scored(engine, model, torch.randn(2, 3, 5, dtype=torch.float64))


def test_passes_of_different_lengths_are_refused(mlp, sequences, draw_directions):
    engine = engine_for(mlp, draw_directions(mlp, 1))
    message = r"passes of this batch had different numbers of tokens, 3, 4\n.*\n.*pad them"

    def backward(batches):
        for inputs in batches:
            squares(mlp(inputs)).sum().backward()

    with engine:
        for batches in (sequences[:2], sequences[2:, :3]), (sequences, sequences[:, :3]):
            with pytest.raises(CaptureError, match=message), engine.batch(range(4)):
                backward(batches)
    assert scored(engine, mlp, sequences).by_token.any()


def test_rows_of_unknown_positions_are_refused():
    model = Folded("samples first").double()
    message = r"row_owner is given for inner\n.*\n.*exclude='inner'"
    with pytest.raises(CaptureError, match=message):
        DotProductEngine(model, per_token=True, row_owner={"inner": "owner"})
    DotProductEngine(model, row_owner={"inner": "owner"})
    DotProductEngine(model, per_token=True, row_owner={"inner": "owner"}, exclude="inner")


def test_sampler_that_sums_over_tokens_is_refused(sequences, draw_directions):
    class Summed(PlainLinear):
        def gradients(self, call, records, grads):
            made = super().gradients(call, records, grads)
            return {**made, "bias": Dense(made["bias"].terms.sum(1, keepdim=True))}

    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 3)).double()
    registry = SamplerRegistry([Claim(dotted_name(nn.Linear), Summed, "test")])
    engine = engine_for(model, draw_directions(model, 1), registry=registry)
    with pytest.raises(CaptureError, match=r"not these: 0\.bias, 1\.bias: 1\n"):
        scored(engine, model, sequences)


# By document


@pytest.mark.parametrize("across", [False, True])
def test_document_masks_make_it_the_gradient_of_the_documents_loss(
    across, model, ids, draw_directions
):
    """A document's loss is that at its positions, with or without those that predict the next."""
    counted = functional.pad(DOCUMENTS[:, 1:] == DOCUMENTS[:, :-1], (0, 1)) | across

    def losses(logits):
        return token_losses(logits, ids) * counted

    directions = draw_directions(model, 3)
    scores = scored(engine_for(model, directions), model, ids, DOCUMENTS, losses=losses)
    segments = scores.by_segment(DOCUMENTS)
    assert segments.ids.tolist() == [2, 4, 7, 9]
    assert segments.ids.dtype == torch.int64
    assert segments.directions == tuple(directions)
    assert segments.verified
    outside = DOCUMENTS < 0
    own = [losses(model(ids, DOCUMENTS))[document == DOCUMENTS].sum() for document in (2, 4, 7, 9)]
    expected, scale = dots_of(per_sample_gradients(model, torch.stack(own)), directions, 1)
    assert_within(segments.total, expected, scale, what="documents")
    padding = losses(model(ids, DOCUMENTS))[outside].sum().unsqueeze(0)
    expected, scale = dots_of(per_sample_gradients(model, padding), directions, 1)
    assert_within(segments.outside, expected[0], scale[0], what="padding")
    parts = segments.total.sum(0) + segments.outside
    assert_within(parts, scores.total.sum(0), scores.by_token.abs().sum((0, 1)), what="sum")


def test_without_document_masks_it_is_the_share_by_position(model, ids, draw_directions):
    """Attention across documents carries losses from one to another: the number is another one."""
    directions, one = draw_directions(model, 2), torch.zeros_like(DOCUMENTS)

    def losses(logits):
        return token_losses(logits, ids)

    segments = scored(engine_for(model, directions), model, ids, one, losses=losses).by_segment(
        DOCUMENTS
    )
    by_token, scale = dots_of(gradients_by_token(model, ids, one), directions, leading=2)
    for row, document in enumerate((2, 4, 7, 9)):
        here = document == DOCUMENTS
        assert_within(segments.total[row], by_token[here].sum(0), scale[here].sum(0))
    own = [losses(model(ids, one))[document == DOCUMENTS].sum() for document in (2, 4, 7, 9)]
    of_losses, scale = dots_of(per_sample_gradients(model, torch.stack(own)), directions, 1)
    assert ((segments.total - of_losses).abs() > 1e-3 * scale).any()


CONVERSIONS = {
    "tensor": lambda ids: ids,
    "tensor of int32": lambda ids: ids.to(torch.int32),
    "array": lambda ids: ids.numpy(),
    "lists": lambda ids: ids.tolist(),
    "list of arrays": lambda ids: [row.numpy() for row in ids],
    "list of tensors": list,
}


@pytest.mark.parametrize("kind", CONVERSIONS)
def test_document_ids_of_every_kind(kind, mlp, sequences, draw_directions):
    scores = scored(engine_for(mlp, draw_directions(mlp, 2)), mlp, sequences)
    documents = torch.tensor([[0, 0, 1, 1], [1, 5, -1, 5], [-9, 2, 2, 2], [0, 1, 2, 5]])
    segments = scores.by_segment(CONVERSIONS[kind](documents))
    assert segments.ids.tolist() == [0, 1, 2, 5]
    expected = torch.stack(
        [scores.by_token[documents == document].sum(0) for document in (0, 1, 2, 5)]
    )
    assert_within(segments.total, expected, scores.by_token.abs().sum((0, 1)))
    assert_within(
        segments.outside, scores.by_token[documents < 0].sum(0), scores.by_token.abs().sum((0, 1))
    )


def test_overflow_stays_in_its_document(mlp, sequences, draw_directions):
    engine = engine_for(mlp, draw_directions(mlp, 1), verify=False)
    scores = scored(engine, mlp, sequences)
    scores.token_dots[2, 1] = torch.nan
    segments = scores.by_segment(torch.arange(4)[:, None].expand(4, 4))
    assert not segments.verified
    assert segments.total.isfinite().all(1).tolist() == [True, True, False, True]


ZEROS = np.zeros((4, 4), dtype=np.int64)


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        (ZEROS[:3], r"integers \[N, T\] = \[4, 4\], not int64 of shape \[3, 4\]"),
        (ZEROS[0], r"not int64 of shape \[4\]"),
        (torch.zeros(4, 5, dtype=torch.int64), r"not torch\.int64 of shape \[4, 5\]"),
        (torch.zeros(4, 4), r"not torch\.float32"),
        (torch.zeros(4, 4, dtype=torch.bfloat16), r"not torch\.bfloat16"),
        (torch.zeros(4, 4, dtype=torch.bool), r"not torch\.bool"),
        (ZEROS.astype(bool), r"not bool"),
        (ZEROS.astype(np.float64), r"not float64"),
        ([[0, 1, 2, None]] * 4, r"not object"),
        ([["a"] * 4] * 4, r"not <U1"),
        ([[0, 1, 2], [0, 1], [0], []], r"integers \[N, T\] = \[4, 4\]: "),
        (ZEROS.astype(np.uint64) + np.uint64(2**63), r"fit into int64"),
        (None, r"not object of shape \[\]"),
    ],
)
def test_document_ids_that_are_not_integers_by_token_are_refused(
    documents, message, mlp, sequences, draw_directions
):
    scores = scored(engine_for(mlp, draw_directions(mlp, 1)), mlp, sequences)
    with pytest.raises(CaptureError, match=message):
        scores.by_segment(documents)
