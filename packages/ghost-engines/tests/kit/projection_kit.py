"""What the tests of projections share: how a batch is projected."""

import torch
from engine_kit import squares


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
