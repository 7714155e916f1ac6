"""Models, batches and losses that nothing can be done with, as a module for `ghost verify`."""

GIVEN = '''
import sys
import numpy as np
import torch
from torch import nn


class Fatal(BaseException):
    """Neither an exception nor an exit."""


class Unprintable(Exception):
    def __str__(self):
        raise ValueError("no text")


class Lines(Exception):
    def __str__(self):
        return "a\\nb\\tc\\ud800"


def raising(error):
    def function(*arguments):
        raise error
    return function


fatal, unprintable, lines = raising(Fatal("b")), raising(Unprintable()), raising(Lines())
leaving, staying = raising(SystemExit("x")), raising(SystemExit(0))
closing, disk = raising(GeneratorExit()), raising(OSError())
missing, stopping, full = raising(KeyError("x")), raising(StopIteration()), raising(MemoryError())
asserting, piping = raising(AssertionError()), raising(BrokenPipeError("p"))
undecoded = raising(UnicodeDecodeError("utf-8", b"x", 0, 1, "bad"))


def endless(*arguments):
    return endless(*arguments)


def nothing(*arguments):
    return None


class Lazy:
    @property
    def function(self):
        raise RuntimeError("property")

    def __call__(self, *arguments):
        raise TypeError


lazy, number = Lazy(), 3


def linear():
    return nn.Linear(6, 3)


def batch():
    return torch.randn(4, 6)


def losses(model, batch):
    return model(batch).square().sum(1)


# Models


class Odd(nn.Linear):
    def __init__(self):
        super().__init__(6, 3)


class Secretive(Odd):
    def __getattr__(self, name):
        raise KeyError(name) if name.startswith("_orig") else AttributeError(name)


class Unmoved(Odd):
    def to(self, *arguments, **named):
        raise KeyError("to")


class Untrained(Odd):
    def train(self, mode=True):
        raise KeyError("train")


class Failing(Odd):
    def forward(self, inputs):
        raise RuntimeError("a\\nb")


class Exiting(Odd):
    def forward(self, inputs):
        sys.exit(3)


def not_a_number():
    model = linear()
    nn.init.constant_(model.weight, float("nan"))
    return model


def infinite():
    model = linear()
    nn.init.constant_(model.weight, float("inf"))
    return model


def frozen():
    return linear().requires_grad_(False)


def empty_shell():
    return nn.Module()


def uninitialised():
    return nn.LazyLinear(3)


def a_class():
    return nn.Linear


def without_parameters():
    return nn.ReLU()


def without_storage():
    return nn.Linear(6, 3, device="meta")


# Batches


def nans():
    return torch.full((4, 6), float("nan"))


def no_samples():
    return torch.zeros(0, 6)


def too_wide():
    return torch.randn(4, 7)


def a_list():
    return [1, 2, 3]


def whole_numbers():
    return torch.zeros(4, 6, dtype=torch.long)


def an_array():
    return np.zeros((4, 6))


def a_ring():
    ring = []
    ring.append(ring)
    return ring


def ids(**other):
    return {"input_ids": torch.ones(2, 5, dtype=torch.long), **other}


def ids_too_large():
    return {"input_ids": torch.full((2, 5), 10**9)}


def ids_below_zero():
    return {"input_ids": torch.full((2, 5), -7)}


def ids_of_bools():
    return {"input_ids": torch.ones(2, 5, dtype=torch.bool)}


def ids_of_complex():
    return {"input_ids": torch.ones(2, 5, dtype=torch.complex64)}


def no_ids():
    return {"input_ids": torch.ones(0, 5, dtype=torch.long)}


def mask_of_text():
    return ids(attention_mask="no")


def mask_too_short():
    return ids(attention_mask=torch.ones(3))


def mask_of_nan():
    return ids(attention_mask=torch.full((2, 5), float("nan")))


# Losses


def a_float(model, batch):
    return 1.0


def floats(model, batch):
    return [1.0, 2.0]


def scalar(model, batch):
    return losses(model, batch).sum()


def matrix(model, batch):
    return model(batch)


def of_integers(model, batch):
    return torch.zeros(4, dtype=torch.long)


def of_complex(model, batch):
    return losses(model, batch).to(torch.complex64)


def of_bools(model, batch):
    return losses(model, batch) > 0


def detached(model, batch):
    return losses(model, batch).detach()


def of_nan(model, batch):
    return losses(model, batch) * float("nan")


def of_infinity(model, batch):
    return losses(model, batch) / 0


def none_of_them(model, batch):
    return losses(model, batch)[:0]


def backward_already(model, batch):
    found = losses(model, batch)
    found.sum().backward()
    return found


def of_one(model, batch):
    return losses(model, batch)[:1]


def of_more(model, batch):
    return losses(model, batch).repeat(3)


def without_grad(model, batch):
    with torch.no_grad():
        return losses(model, batch)


def of_inference(model, batch):
    with torch.inference_mode():
        return losses(model, batch)


def of_nothing(model, batch):
    return torch.zeros(4, requires_grad=True)


def of_another_model(model, batch):
    return losses(linear(), batch)


def nowhere(model, batch):
    return torch.zeros(4, device="meta", requires_grad=True)


def sparse(model, batch):
    return losses(model, batch).to_sparse()


def takes_nothing():
    return None
'''
