"""Language models for packed documents, and their gradients by token from autograd."""

import torch
from torch import nn
from torch.nn import functional

from ghost_core.testing import assert_within
from ghost_engines import DotProductEngine

VOCABULARY, WIDTH = 11, 4


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


DOCUMENTS = torch.tensor([[7, 7, 7, 2, 2, 2], [2, 2, 9, 9, 9, 9], [7, 4, 4, 4, -1, -1]])
"""Three samples packed of documents; 7 and 2 are in two of them."""


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
