"""Every mode where a parameter goes into a custom function: dots, norms and `.grad`."""

import copy

import pytest
import torch
from mode_kit import check_grads, check_norms_of
from torch import nn

from ghost_core.algebra import building_at_most
from ghost_core.testing import per_sample_gradients
from ghost_engines import DotProductEngine

N = 3


class Squares(torch.autograd.Function):
    """Squared sums of products, in one number per token, as a head fused with its loss."""

    @staticmethod
    def forward(ctx, x, weight, scale):
        ctx.save_for_backward(x, weight, scale)
        return (x @ weight.T).square().sum(-1) * scale[0]

    @staticmethod
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        inner = 2 * (x @ weight.T) * (grad * scale[0])[:, None]
        to_scale = (grad * (x @ weight.T).square().sum(-1)).sum()
        return inner @ weight, inner.T @ x, to_scale[None, None]


class Model(nn.Module):
    """A head that is tied to the embedding, called once and used in a function twice."""

    def __init__(self):
        super().__init__()
        self.embedding, self.body = nn.Embedding(7, 5), nn.Linear(5, 5)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.scale = nn.Linear(1, 1, bias=False)

    def forward(self, ids):
        x = self.body(self.embedding(ids)).tanh()
        losses = self.head(x).square().sum((1, 2))
        for each in (x.flatten(0, 1), x.sin().flatten(0, 1)):
            made = Squares.apply(each, self.head.weight, self.scale.weight)
            losses = losses + made.view(ids.shape).sum(1)
        return losses


@pytest.fixture
def ids():
    return torch.randint(7, (2 * N, 4), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model().double()


@pytest.mark.parametrize("most", [2**20, 200], ids=["at once", "in parts"])
@pytest.mark.parametrize("mode", ["exact", "fused"])
def test_dots_norms_and_gradients(mode, most, model, ids, draw_directions, assert_scores):
    """In a batch that is verified, and in one that is not."""
    plain, directions = copy.deepcopy(model), draw_directions(model, 2)
    engine = DotProductEngine(model, mode=mode, norms=True)
    for name, direction in directions.items():
        engine.add_direction(name, direction)
    with engine:
        for part in ids.split(N):
            gradients = per_sample_gradients(plain, plain(part))
            plain.zero_grad()
            model.zero_grad()
            plain(part).sum().backward()
            with building_at_most(most), engine.batch(range(N)) as batch:
                model(part).sum().backward()
            assert_scores(batch.result, gradients, directions)
            check_norms_of(batch.result, gradients, directions)
            check_grads(plain, model)


@pytest.mark.parametrize("most", [2**20, 200], ids=["at once", "in parts"])
def test_concatenated(most, model, ids, assert_scores):
    """The gradient that the function makes is one of validation samples as well."""
    plain = copy.deepcopy(model)
    engine = DotProductEngine(model, mode="concatenated", norms=True)
    train, validation = ids.split([4, 2])
    own = per_sample_gradients(plain, plain(train))
    theirs = per_sample_gradients(plain, plain(validation))
    direction = {name: each.sum(0) for name, each in theirs.items()}
    plain(train).sum().backward()
    with engine:
        for _ in range(2):
            model.zero_grad()
            both = engine.concatenate(train, validation)
            with building_at_most(most), engine.batch(range(4)) as batch:
                engine.backward(model(both), train_weight=1, validation_weight=1)
            assert_scores(batch.result, own, {"validation": direction})
            check_norms_of(batch.result, own, {"validation": direction})
            check_grads(plain, model)
