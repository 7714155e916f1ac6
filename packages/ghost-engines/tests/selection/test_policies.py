"""What policies choose, against brute force, and what is no choice."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor

from ghost_core import CaptureError, GhostError, Policy, UnknownNameError
from ghost_core.plugins import installed
from ghost_engines import CandidateScores, Greedy, Threshold, TopK

N = 7


def scores_of(dots: Tensor, gram: Tensor | None = None, **options: object) -> CandidateScores:
    given = {"directions": ("val",), "verified": True, "products": gram, **options}
    columns = dots.reshape(len(dots), -1)
    return CandidateScores(ids=torch.arange(len(dots)) + 100, by_parameter={"w": columns}, **given)


@pytest.fixture
def gradients() -> Tensor:
    """Gradients of which two are nearly the same, and some oppose the direction."""
    found = torch.randn(N, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    found[2] = 3 * found[1].sign()
    found[5] = found[2] * 0.99
    return found


DIRECTION = torch.tensor([1.0, -1.0, 1.0, 0.5], dtype=torch.float64)


def gain(chosen: tuple[int, ...], gradients: Tensor, lr: float) -> float:
    """Return what a set gains by its definition, with pairs and no sum over any matrix."""
    first = sum(float(gradients[n] @ DIRECTION) for n in chosen)
    pairs = sum(float(gradients[n] @ gradients[m]) for n, m in combinations(chosen, 2))
    return lr * first - lr**2 * pairs


@pytest.mark.parametrize("lr", [0.02, 0.3, 2.0])
@pytest.mark.parametrize("k", [1, 3, N])
def test_greedy_takes_the_best_next_by_its_own_objective(
    gradients: Tensor, k: int, lr: float
) -> None:
    scores = scores_of(gradients @ DIRECTION, gradients @ gradients.mT)
    chosen = scores.choose(Greedy(k, lr)).indices.tolist()
    expected: tuple[int, ...] = ()
    for _ in range(k):
        others = [n for n in range(N) if n not in expected]
        expected += (max(others, key=lambda n: gain((*expected, n), gradients, lr)),)
    assert chosen == list(expected)


def test_greedy_finds_nearly_the_best_set_where_the_best_alone_are_alike(gradients: Tensor) -> None:
    scores, lr = scores_of(gradients @ DIRECTION, gradients @ gradients.mT), 0.2
    best = max(gain(each, gradients, lr) for each in combinations(range(N), 3))
    greedy = gain(tuple(scores.choose(Greedy(3, lr)).indices.tolist()), gradients, lr)
    alone = gain(tuple(scores.choose(TopK(3)).indices.tolist()), gradients, lr)
    assert alone < greedy <= best + 1e-12
    assert greedy > 0.9 * best


def test_top_k_and_threshold_are_in_order_and_keep_ties() -> None:
    dots = torch.tensor([1.0, 3.0, -1.0, 3.0, 0.0])
    assert scores_of(dots).choose(TopK(3)).indices.tolist() == [1, 3, 0]
    assert scores_of(dots).choose(TopK(9)).indices.tolist() == [1, 3, 0, 4, 2]
    assert scores_of(dots).choose(Threshold()).ids.tolist() == [101, 103, 100]
    assert scores_of(dots).choose("threshold", value=1.0).indices.tolist() == [1, 3]
    none = scores_of(dots).choose(Threshold(5.0))
    assert len(none) == 0
    assert dots[none.indices].shape == (0,)
    assert none.indices.dtype == torch.int64


def test_a_choice_says_what_it_is(gradients: Tensor) -> None:
    scores = scores_of(gradients @ DIRECTION, gradients @ gradients.mT)
    chosen = scores.choose("greedy", k=2, lr=0.5)
    ids = chosen.ids.tolist()
    assert repr(chosen) == f"Chosen(2 of 7 for val by Greedy(k=2, lr=0.5): {ids}, verified)"
    assert ids == [100 + at for at in chosen.indices.tolist()]
    assert "with their Gram" in repr(scores)


def test_a_choice_is_for_one_direction() -> None:
    scores = scores_of(torch.tensor([[1.0, 5.0], [2.0, 4.0]]), directions=("a", "b"))
    assert scores.choose(TopK(1), direction="a").indices.tolist() == [1]
    assert scores.choose(TopK(1), direction="b").indices.tolist() == [0]
    with pytest.raises(CaptureError, match="for one of them"):
        scores.choose(TopK(1))
    with pytest.raises(UnknownNameError, match="direction 'c'"):
        scores.choose(TopK(1), direction="c")


class Given(Policy):
    def __init__(self, chosen: object) -> None:
        self.chosen = chosen

    def __repr__(self) -> str:
        return "Given"

    def choose(self, dots, gram):
        return self.chosen


@pytest.mark.parametrize("chosen", [[0, 0], [2], [-1], [0.5], [True, False], [[0], [1]]])
def test_what_is_no_choice_is_refused(chosen: object) -> None:
    with pytest.raises(CaptureError, match="Given chose"):
        scores_of(torch.zeros(2)).choose(Given(chosen))


def test_what_a_policy_cannot_do_is_refused() -> None:
    scores = scores_of(torch.tensor([1.0, 2.0]))
    with pytest.raises(CaptureError, match="gram=True"):
        scores.choose(Greedy(1, 0.1))
    with pytest.raises(CaptureError, match=r"samples \[101\] are not finite"):
        scores_of(torch.tensor([1.0, float("nan")])).choose(TopK(1))
    with pytest.raises(CaptureError, match="made already"):
        scores.choose(TopK(1), k=2)
    with pytest.raises(CaptureError, match=r"cannot be made of (.|\n)*Remedy: it takes k$"):
        scores.choose("top_k", n=2)
    with pytest.raises(UnknownNameError, match="top_k"):
        scores.choose("topk", k=2)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (TopK, {"k": 0}),
        (TopK, {"k": 1.5}),
        (Threshold, {"value": float("nan")}),
        (Threshold, {"value": "0"}),
        (Greedy, {"k": 1, "lr": -1.0}),
        (Greedy, {"k": True, "lr": 0.1}),
    ],
)
def test_options_that_mean_nothing_are_refused(kind: type[Policy], options: dict) -> None:
    with pytest.raises(GhostError, match="must be"):
        kind(**options)


def test_policies_of_ghost_are_offered_by_name() -> None:
    assert {"top_k": TopK, "threshold": Threshold, "greedy": Greedy}.items() <= (
        installed().policies.items()
    )
