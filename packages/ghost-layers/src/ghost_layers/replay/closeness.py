"""Compares what a call gives in two ways: the same, but for rounding."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from ghost_core.algebra import TF32, Precision


def same_rows(got: Tensor, expected: Tensor, dtypes: Collection[torch.dtype]) -> bool:
    """Tell whether an output is the same, relative to the largest entry of each row.

    Args:
        got: An output, rows first.
        expected: What it should be; one row stands for any number.
        dtypes: What it was computed in.
    """
    if got.shape[1:] != expected.shape[1:] or got.dtype != expected.dtype:
        return False
    if 1 not in (len(got), len(expected)) and len(got) != len(expected):
        return False
    if torch.equal(got, expected):  # most are, to the bit
        return True
    tolerance = Precision.of(dtypes).tolerance
    if torch.float32 in dtypes and expected.device.type != "cpu":
        tolerance = max(tolerance, TF32)
    if _are_near(got, expected, tolerance):
        return True
    mine, theirs = got.double(), expected.double()
    same = (mine == theirs) | (mine.isnan() & theirs.isnan())
    scale = theirs.nan_to_num(0, 0, 0).abs().reshape(len(theirs), -1)
    if not scale.shape[1]:
        return True
    bound = tolerance * scale.amax(1).reshape(-1, *[1] * (mine.dim() - 1))
    return bool((same | ((mine - theirs).abs() <= bound)).all())


def _are_near(got: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Tell whether all entries are numbers and the same, without widening them."""
    if not expected.numel() or not got.numel():
        return False
    largest = ((got - expected)[:, None].flatten(1), expected[:, None].flatten(1))
    off, scale = (torch.linalg.vector_norm(each, math.inf, 1) for each in largest)
    return bool((off <= tolerance * scale).all())


def are_close(
    got: Mapping[str, Tensor], expected: Mapping[str, Tensor], dtypes: Collection[torch.dtype]
) -> bool:
    """Tell whether gradients are the same, relative to their norms.

    Args:
        got: Gradients by name.
        expected: What they should be.
        dtypes: What they were computed in.
    """
    precision = Precision.of(dtypes)
    norms = {name: float(each.double().norm()) for name, each in expected.items()}
    floor = precision.floor * sum(norm**2 for norm in norms.values()) ** 0.5
    return all(
        float((got[name].double() - each.double()).norm())
        <= precision.tolerance * max(norms[name], floor)
        for name, each in expected.items()
    )
