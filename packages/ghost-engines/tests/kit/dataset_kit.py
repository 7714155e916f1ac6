"""Data sets for a small classifier, and what autograd says of their samples."""

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from ghost_core.testing import per_sample_gradients


def classifier():
    """Maps `[N, 5]` to 3 classes in float64; drops features where it trains."""
    return nn.Sequential(nn.Linear(5, 6), nn.Dropout(0.5), nn.Tanh(), nn.Linear(6, 3)).double()


def losses(model, batch):
    inputs, labels = batch
    return cross_entropy(model(inputs), labels, reduction="none")


def draw(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(n, 5, dtype=torch.float64, generator=generator)
    return inputs, torch.randint(0, 3, (n,), generator=generator)


def rows(model, data):
    """Return the gradients of the samples' own losses in evaluation mode, `[N, size]`.

    One autograd call for each sample, and nothing of ghost's engines.
    """
    training = model.training
    model.eval()
    try:
        gradients = per_sample_gradients(model, losses(model, data))
    finally:
        model.train(training)
    return torch.cat([gradient.flatten(1) for gradient in gradients.values()], 1)


class Streamed(IterableDataset):
    """Yields samples, and does not know how many."""

    def __init__(self, data):
        self.data = data

    def __iter__(self):
        yield from zip(*self.data, strict=True)


class MapStyle:
    """Has samples, and is no torch data set."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data[0])

    def __getitem__(self, at):
        if at >= len(self):
            raise IndexError(at)
        return tuple(part[at] for part in self.data)


class Broken(Dataset):
    """Raises where its third sample is read."""

    def __len__(self):
        return 9

    def __getitem__(self, at):
        if at == 2:
            raise RuntimeError("unreadable")
        return draw(1)[0][0], 0


def samples(data):
    return TensorDataset(*data)
