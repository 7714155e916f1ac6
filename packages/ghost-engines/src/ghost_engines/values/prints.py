"""Prints of gradients: a few numbers that tell whether one became a multiple of itself."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ghost_core._torch import norms, own_part
from ghost_core.ranks import Ranks
from ghost_core.restoring import graphs_kept

_PIECE = 1 << 22
"""Elements that are summed up at a time, so that no gradient is copied as a whole."""

_SMALL = 1 << 14
"""Elements of a gradient that is looked at with others at once, in few operations for all."""

_ROUNDING = 1e-12


class Print(NamedTuple):
    """What is known of a gradient.

    Attributes:
        magnitude: Sum of the magnitudes of its elements.
        norm: Root of the sum of their squares.
        weighted: Sum of them, every third one doubled, and the first ones counted once more: what
            is symmetric otherwise is not by threes, nor up to somewhere inside.
    """

    magnitude: float
    norm: float
    weighted: float

    @property
    def filled(self) -> bool:
        """Whether it is anything but zeros."""
        return self.magnitude != 0


def prints(gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the numbers of prints where the gradients are, float64 `[3, P]` for P pieces."""
    with graphs_kept(False):
        elements = {name: _elements(each) for name, each in gradients.items()}
        small: dict[torch.device, dict[str, Tensor]] = {}
        large: dict[str, Tensor] = {}
        for name, each in elements.items():
            several = small.setdefault(each.device, {}) if each.numel() <= _SMALL else large
            several[name] = each
        found = _of_large(large)
        for together in small.values():
            found |= _of_small(together)
        return found


def _of_small(elements: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Return the prints of small gradients on one device."""
    lengths = [each.numel() for each in elements.values()]
    flat = torch.cat(list(elements.values())).double()
    numbers = torch.stack((flat.abs(), flat * flat, flat * _weights(tuple(lengths), flat.device)))
    rows = torch.stack([part.sum(1) for part in numbers.split(lengths, 1)], 1)
    rows[1].sqrt_()
    return zip(elements, rows.split(1, 1), strict=True)


@lru_cache(maxsize=16)
def _weights(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Return what elements of gradients that follow one another count for in weighted sums."""
    weights = torch.ones(sum(lengths), dtype=torch.float64)
    for part in weights.split(lengths):
        part[::3] = 2
        part[: _first(len(part))] += 1
    return weights.to(device)


def _first(count: int) -> int:
    """Return how many elements count once more: inside of a row, where there are rows."""
    return int(0.382 * count)


def _of_large(elements: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the prints of others, piece by piece."""
    if not elements:
        return {}
    f64 = torch.float64
    split = [each.split(_PIECE) for each in elements.values()]
    pieces = [piece for parts in split for piece in parts]
    weighted = [
        piece.sum(dtype=f64)
        + piece[::3].sum(dtype=f64)
        + piece[: _first(len(piece))].sum(dtype=f64)
        for piece in pieces
    ]
    numbers = [*norms(pieces, 1), *norms(pieces, 2), *weighted]
    device = numbers[0].device
    rows = torch.stack([each.to(device, non_blocking=True) for each in numbers]).view(3, -1)
    return dict(zip(elements, rows.split([len(parts) for parts in split], 1), strict=True))


def prints_of_all(ranks: Ranks, *found: Mapping[str, Tensor]) -> list[Mapping[str, Tensor]]:
    """Return the prints of whole gradients, where each process has seen a part, float64 `[3, 1]`.

    Other gradients are whole in each, and are left as they are.
    """
    if ranks.sharded is None:
        return list(found)
    keys = [(at, name) for at, each in enumerate(found) for name in sorted(each)]
    rows = [found[at][name] for at, name in keys]
    joined: list[dict[str, Tensor]] = [{} for _ in found]
    if rows:
        squared = [torch.stack([each[0], each[1].square(), each[2]]).sum(1) for each in rows]
        sums = ranks.sum(torch.stack([each.to(squared[0].device) for each in squared]))
        for (at, name), (magnitude, square, weighted) in zip(keys, sums, strict=True):
            joined[at][name] = torch.stack([magnitude, square.sqrt(), weighted])[:, None]
    return list(joined)


def read(*found: Mapping[str, Tensor]) -> list[dict[str, Print]]:
    """Return prints that can be compared; all are waited for together."""
    rows = [each for numbers in found for each in numbers.values()]
    if not rows:
        return [{} for _ in found]
    columns = iter(torch.cat([each.to(rows[0].device) for each in rows], 1).T.tolist())
    return [
        {name: _joined([next(columns) for _ in range(each.shape[1])]) for name, each in one.items()}
        for one in found
    ]


def ratio(before: Print, after: Print, dtype: torch.dtype) -> float | None:
    """Return what a gradient was multiplied with; None if it was changed in another way.

    A gradient that became

        g / 2          has half of all three sums: 0.5
        -g             has the same magnitudes, and the weighted sum with the other sign: -1
        g with noise   has sums that changed by different factors: None

    Args:
        before: Its print.
        after: Its print after the change.
        dtype: Its dtype, which says how far each element may be from the product.
    """
    if after == before or not (before.filled or after.filled):
        return 1.0
    if not all(map(math.isfinite, (*before, *after))):
        # An overflow stays one, and tells nothing.
        return None if all(map(math.isfinite, before)) or all(map(math.isfinite, after)) else 1.0
    if not before.filled:
        return None
    size = after.norm / before.norm
    # Where the elements add up to nothing, as behind a norm, the sign of the sum is rounding's.
    told = abs(before.weighted) > max(8 * torch.finfo(dtype).eps, _ROUNDING) * before.norm
    turned = abs(after.weighted + size * before.weighted)
    straight = abs(after.weighted - size * before.weighted)
    # But no element is rounded where all are multiplied with a power of two.
    told |= _is_power_of_two(size) and turned <= _ROUNDING * after.magnitude < straight
    sign = -1.0 if told and turned < straight else 1.0
    tolerance = max(8 * torch.finfo(dtype).eps, 1e-9)
    # What elements are rounded by adds up where all are alike, and is a walk where they differ.
    walked = abs(after.weighted) + math.sqrt(after.magnitude * after.norm)
    if abs(after.magnitude - size * before.magnitude) > tolerance * after.magnitude or (
        turned if sign < 0 else straight
    ) > tolerance * min(after.magnitude, walked):
        return None
    # Sums depend on where a tensor lies in memory, by rounding.
    return 1.0 if abs(sign * size - 1) <= _ROUNDING else sign * size


def _is_power_of_two(size: float) -> bool:
    """Tell whether a number is a power of two, but for how sums are rounded."""
    mantissa, _ = math.frexp(size)
    return min(2 * mantissa - 1, 1 - mantissa) <= _ROUNDING


def _elements(gradient: Tensor) -> Tensor:
    """Return what a gradient holds as one axis of real numbers."""
    gradient = own_part(gradient.detach())
    values = gradient.coalesce().values() if gradient.is_sparse else gradient
    return (torch.view_as_real(values) if values.is_complex() else values).reshape(-1)


def _joined(pieces: list[list[float]]) -> Print:
    magnitudes, roots, weighted = zip(*pieces, strict=True)
    return Print(math.fsum(magnitudes), math.hypot(*roots), math.fsum(weighted))
