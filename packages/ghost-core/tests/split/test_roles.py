"""What nodes say of the axes that they put elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from ghost_core.split.roles import ROLES


@pytest.mark.parametrize(
    ("make", "axes"),
    [
        (lambda x: x.transpose(-1, 0), [0, 2]),
        (lambda x: x.permute(0, -1, 1), [1, 2]),
        (lambda x: x.expand(2, 3, 5, 4), [0, 2]),
        (lambda x: x.expand(3, 1, 4), []),
        (lambda x: x.repeat(2, 1, 5, 1), [0, 2]),
        (lambda x: x.unfold(-1, 2, 1), [2]),
        (lambda x: x.unfold(0, 2, 1), [0]),
        (lambda x: x.diagonal(0, -3, -1), [0, 2]),
        (lambda x: torch.stack([x, x], -1), [3]),
        (lambda x: torch.cat([x, x], -2), [1]),
    ],
    ids=["transposed", "permuted", "expanded", "not expanded", "repeated", "unfolded",
         "unfolded first", "diagonal", "stacked", "joined"],
)  # fmt: skip
def test_axes_are_those_that_were_named(
    make: Callable[[Tensor], Tensor], axes: Sequence[int]
) -> None:
    value = make(torch.randn(3, 1, 4, requires_grad=True))
    node = value.grad_fn
    tell = ROLES[type(node)].turn
    assert tell is not None
    turn = tell(node)
    assert turn.shape == value.shape
    assert list(turn.axes) == axes
