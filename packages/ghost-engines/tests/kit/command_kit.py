"""What the tests of commands share: functions that they are given, and how they are run."""

import torch

from ghost_engines import cli
from ghost_engines.cli.batches import load_batch
from ghost_engines.cli.corpora import CorpusOptions

SUBJECTS = """
import numpy as np
import torch
from torch import nn
from ghost_core.testing import TinyTransformer

NUMBER = 3


def tiny():
    return TinyTransformer()


def mlp():
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def normalised():
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3))


def dropping():
    return nn.Sequential(nn.Linear(5, 7), nn.Dropout(0.5), nn.Linear(7, 3))


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, inputs):
        return inputs * self.scale


class Factory:
    make = staticmethod(mlp)


def batch():
    generator = torch.Generator().manual_seed(1)
    return {
        "inputs": torch.randn(6, 5, generator=generator),
        "labels": torch.arange(6) % 3,
        "names": list("abcdef"),
    }


def ids():
    return torch.randint(0, 19, (5, 7), generator=torch.Generator().manual_seed(1))


def cross_entropy(model, batch):
    logits = model(batch["inputs"])
    return nn.functional.cross_entropy(logits, batch["labels"], reduction="none")


def coupled(model, batch):
    losses = cross_entropy(model, batch)
    return losses / losses.max()


def mean(model, batch):
    return cross_entropy(model, batch).mean()


def penalised(model, batch):
    inputs = batch["inputs"].clone().requires_grad_()
    losses = cross_entropy(model, batch | {"inputs": inputs})
    (slopes,) = torch.autograd.grad(losses.sum(), inputs, create_graph=True)
    return losses + slopes.square().sum(1)


def broken(*arguments):
    raise KeyError("a\\nb")


def leaving():
    raise SystemExit(0)


def number():
    return NUMBER


def interrupted(model, batch):
    interrupted.batches = getattr(interrupted, "batches", 0) + 1
    if interrupted.batches == 4:
        raise KeyboardInterrupt
    return cross_entropy(model, batch)


def dataset():
    return torch.utils.data.TensorDataset(batch()["inputs"], batch()["labels"])


def of_pairs(model, batch):
    return cross_entropy(model, {"inputs": batch[0], "labels": batch[1]})


def numbered():
    return [batch() | {"id": torch.arange(6) * 2}]
"""

MLP = ("subjects:mlp", "--data", "subjects:batch", "--loss", "subjects:cross_entropy")


def verify(*arguments):
    return cli.main(["verify", *map(str, arguments)])


def score(*arguments):
    return cli.main(["score", *map(str, arguments)])


def project(*arguments):
    return cli.main(["project", *map(str, arguments)])


def parts(said):
    """Return the tables of an output into a pipe, and the text after them."""
    *tables, text = said.split("\n\n")
    return [[line.split("\t") for line in table.splitlines()] for table in tables], text


def batch_of(data, model="subjects:tiny", loaded=None, *, batch_size=None, **options):
    """Return the batch that commands look at, as `load_batch` takes it from data."""
    how = CorpusOptions(data=str(data), model=str(model), **options)
    return load_batch(how, loaded or torch.nn.Identity(), batch_size=batch_size).batch
