"""What the tests of several engines share: losses, models, and comparisons with autograd."""

import torch
from torch import nn
from torch.nn import functional

from ghost_core.testing import assert_within
from ghost_engines import NormEngine
from ghost_engines.gram import GramEngine


def squares(outputs):
    """Return a loss per sample, `[N]`, from outputs `[N, ...]`."""
    return outputs.square().flatten(1).sum(1) + outputs.flatten(1).sum(1)


def rows(gradients):
    """Return whole gradients as rows, `[N, size]`."""
    return torch.cat([gradient.flatten(1) for gradient in gradients.values()], 1).double()


def by_layer(gradients):
    layers = {}
    for name, gradient in gradients.items():
        layers.setdefault(name.rpartition(".")[0], {})[name] = gradient
    return {name: rows(parts) for name, parts in layers.items()}


def check_norms(norms, gradients, tolerance=1e-9):
    """Assert that norms are those of per-sample gradients, `[N, *shape]` by parameter name."""
    assert norms.squared.keys() == norms.by_parameter.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert gradient.any(), f"the reference of {name} is zero, so nothing would be tested"
        expected = gradient.flatten(1).double().norm(dim=1)
        assert_within(norms.squared[name], expected**2, expected**2, 2 * tolerance, name)
        assert_within(norms.by_parameter[name], expected, expected, tolerance, name)
    layers = by_layer(gradients)
    assert norms.by_layer.keys() == layers.keys()
    for name, layer in layers.items():
        assert_within(norms.by_layer[name], layer.norm(dim=1), layer.norm(dim=1), tolerance, name)
    total = rows(gradients).norm(dim=1)
    assert_within(norms.total, total, total, tolerance, "total")
    assert norms.finite.all()


def measure(model, inputs, loss, loss_weights="sum", given=None, **options):
    """Measure one batch; `loss` makes the backpropagated loss of the model's outputs."""
    engine = NormEngine(model, loss_weights=loss_weights, **options)
    with engine, engine.batch(range(len(inputs)), loss_weights=given) as batch:
        loss(model(inputs)).backward()
    return batch.result


def sum_of_squares(outputs):
    return squares(outputs).sum()


class Repeated(nn.Module):
    """Uses one layer several times."""

    def __init__(self, inner, times):
        super().__init__()
        self.inner, self.times = inner, times

    def forward(self, inputs):
        for _ in range(self.times):
            inputs = torch.tanh(self.inner(inputs))
        return inputs


WEIGHTS = torch.tensor([0.25, 3.0, 1e-3, 0.5, 1.5], dtype=torch.float64)


def check_products(got, left, right, tolerance, what):
    scale = left.norm(dim=1)[:, None] * right.norm(dim=1)
    assert_within(got, left @ right.mT, scale, tolerance, what)


def check_cosines(got, left, right, tolerance, what):
    expected = functional.normalize(left) @ functional.normalize(right).mT
    assert_within(got, expected, 1.0, tolerance, what)


def check_gram(gram, gradients, reference=None, tolerance=1e-9):
    """Assert that products are those of per-sample gradients, `[N, *shape]` by parameter name.

    Args:
        gram: What the engine found.
        gradients: Of the batch.
        reference: Of the reference batch.
        tolerance: Error allowed relative to the norms of what is multiplied.
    """
    assert gram.by_parameter.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert gradient.any(), f"the reference of {name} is zero, so nothing would be tested"
        flat = gradient.flatten(1).double()
        check_products(gram.by_parameter[name], flat, flat, tolerance, name)
    layers, whole = by_layer(gradients), rows(gradients)
    assert gram.by_layer.keys() == layers.keys()
    for name, layer in layers.items():
        check_products(gram.by_layer[name], layer, layer, tolerance, name)
    check_products(gram.total, whole, whole, tolerance, "total")
    check_cosines(gram.cosines, whole, whole, tolerance, "cosines")
    assert gram.finite.all()
    if reference is None:
        assert gram.reference is None
        return
    others, other_layers = rows(reference), by_layer(reference)
    check_products(gram.between.total, whole, others, tolerance, "between")
    assert gram.between.by_parameter.keys() == reference.keys()
    assert gram.between.verified == gram.verified
    assert torch.equal(gram.between.ids, gram.ids)
    check_cosines(gram.between.cosines, whole, others, tolerance, "cosines between")
    assert gram.between.by_layer.keys() == layers.keys()
    for name, layer in layers.items():
        got, right = gram.between.by_layer[name], other_layers[name]
        check_products(got, layer, right, tolerance, f"{name}, between")


def multiply(model, inputs, loss, loss_weights="sum", given=None, **options):
    """Multiply the samples of one batch; `loss` makes the loss of the model's outputs."""
    engine = GramEngine(model, loss_weights=loss_weights, **options)
    with engine, engine.batch(range(len(inputs)), loss_weights=given) as batch:
        loss(model(inputs)).backward()
    return batch.result


def gradient(model, loss):
    """Return the gradient of a loss by name of the trainable parameters."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def train(engine, model, inputs, losses=squares):
    """Score one batch with the sum of the samples' losses."""
    with engine, engine.batch(range(len(inputs))) as batch:
        losses(model(inputs)).sum().backward()
    return batch.result
