"""The conformance test of random projections."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from ghost_core import Projection
from ghost_core.state import RandomState

SHAPES = ((1, 1), (1, 7), (3, 7), (7, 7), (16, 64))


def check_projection(projection: Projection | type[Projection], *, draws: int = 400) -> None:
    """Assert that a projection draws maps that keep inner products in expectation.

    For several shapes, k = 1, n = 1 and k = n among them: the map is finite float32 `[k, n]` on
    the CPU; equal generators give equal maps, different ones different maps; two draws from one
    generator differ; no global random number generator is used. Over many draws, the mean of
    `PᵀP` is the identity, within six standard errors of each entry.

    Args:
        projection: The projection, or a class that takes no arguments.
        draws: How many maps the mean is taken over.

    Raises:
        AssertionError: Naming the shape and what is wrong.
    """
    chosen = projection() if isinstance(projection, type) else projection
    name = type(chosen).__name__
    for k, n in SHAPES:
        what = f"{name}.draw(k={k}, n={n})"
        _check_form(chosen, k, n, what)
        _check_randomness(chosen, k, n, what)
    for k, n in SHAPES:
        _check_expectation(chosen, k, n, f"{name}.draw(k={k}, n={n})", draws)


def _draw(projection: Projection, k: int, n: int, seed: int) -> Tensor:
    return projection.draw(k, n, Generator().manual_seed(seed))


def _check_form(projection: Projection, k: int, n: int, what: str) -> None:
    drawn = _draw(projection, k, n, 0)
    if drawn.shape != (k, n):
        raise AssertionError(f"{what}: shape {tuple(drawn.shape)}, expected {(k, n)}")
    if drawn.dtype != torch.float32:
        raise AssertionError(f"{what}: dtype {drawn.dtype}, expected torch.float32")
    if drawn.device.type != "cpu":
        raise AssertionError(f"{what}: on {drawn.device}, expected cpu")
    if not drawn.isfinite().all():
        raise AssertionError(f"{what}: not finite")


def _check_randomness(projection: Projection, k: int, n: int, what: str) -> None:
    before = RandomState.now()
    first, again = _draw(projection, k, n, 0), _draw(projection, k, n, 0)
    if not torch.equal(first, again):
        raise AssertionError(f"{what}: equal generators give different maps")
    if RandomState.now() != before:
        raise AssertionError(f"{what}: a global random number generator was used")
    if n == 1:  # E[PᵀP] = I leaves no more than a sign to chance
        return
    others = [_draw(projection, k, n, seed) for seed in range(1, 65)]
    if all(torch.equal(first, other) for other in others):
        raise AssertionError(f"{what}: different generators give equal maps")
    generator = Generator().manual_seed(0)
    sequence = [projection.draw(k, n, generator) for _ in range(64)]
    if all(torch.equal(sequence[0], other) for other in sequence[1:]):
        raise AssertionError(f"{what}: one generator gives the same map again and again")


def _check_expectation(projection: Projection, k: int, n: int, what: str, draws: int) -> None:
    generator = Generator().manual_seed(1)
    maps = [projection.draw(k, n, generator).double() for _ in range(draws)]
    products = torch.stack([drawn.mT @ drawn for drawn in maps])  # [draws, n, n]
    mean, deviation = products.mean(0), products.std(0)
    error = (mean - torch.eye(n, dtype=torch.float64)).abs()
    # Six standard errors: with the entries of all shapes, a chance of about 1e-5.
    bound = 6 * deviation / draws**0.5 + 1e-5
    if not (error <= bound).all():
        excess = error - bound
        at = tuple(int(i) for i in torch.unravel_index(excess.argmax(), excess.shape))
        raise AssertionError(
            f"{what}: E[PᵀP] is not the identity: entry {list(at)} is {mean[at].item():.4f} over "
            f"{draws} draws, error {error[at].item():.3g} > bound {bound[at].item():.3g}"
        )
