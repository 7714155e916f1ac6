"""Experts that get the tokens of one sample alone, or a single token, in the first batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from tests.foreign.foreign import WAYS, Foreign, check, curved
from torch import Tensor, nn

from ghost_core import WrongSplitError
from ghost_core.testing import GradientHolder


class Routed(nn.Module):
    """Routes tokens to experts by place: as many to each as is said, and the rest to the last."""

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        self.first, self.head, self.sizes = nn.Linear(3, 8), nn.Linear(8, 8), sizes
        self.experts = nn.ModuleList([nn.Linear(8, 8) for _ in range(len(sizes) + 1)])

    def forward(self, x: Tensor) -> Tensor:
        rows = self.first(x).flatten(0, 1)
        y, share = torch.zeros_like(rows), rows.softmax(-1)[:, :1]
        for expert, token in zip(self.experts, split(len(rows), self.sizes), strict=True):
            y[token] += share[token] * expert(rows[token])
        out: Tensor = self.head(rows + y).view(*x.shape[:2], 8)
        return out


def split(rows: int, sizes: Sequence[int]) -> Iterator[Tensor]:
    """Yield the positions of consecutive rows."""
    ends = [0, *sizes, rows - sum(sizes)]
    for at, size in enumerate(ends[1:]):
        start = sum(ends[: at + 1])
        yield torch.arange(start, start + size)


def inputs(n: int) -> dict[str, Tensor]:
    return {"x": torch.randn(n, 3, 3)}


def losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return curved(model(batch["x"]))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("sizes", [(1,), (3, 1)], ids=str)
def test_an_expert_that_gets_one_token(sizes: tuple[int, ...], way: str) -> None:
    check(
        Foreign("experts", lambda: Routed(sizes), lambda n: {"x": torch.randn(n, 3, 3)}, losses),
        way,
    )


def test_one_row_without_following_is_refused_by_name() -> None:
    model = Routed((1,))
    engine = GradientHolder(model, lift=False)
    with engine, pytest.raises(WrongSplitError, match=r"experts\.0"), engine.batch(range(4)):
        model(torch.randn(4, 3, 3))
