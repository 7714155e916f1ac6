from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from ghost_core.capture.at_once import all_at_once
from ghost_core.testing.cases.roots import Unseen

INDEX = torch.tensor([[0, 3, 3], [5, 0, 1]])

KNOWN: dict[str, Callable[[Tensor], Tensor]] = {
    "gathered": lambda p: p[INDEX].view(1, 2, 3, 4).permute(0, 3, 1, 2).contiguous(),
    "by columns": lambda p: p.mT[:, INDEX].transpose(0, 1),
    "in parts": lambda p: torch.cat([p[1:3, None].squeeze(1), p[0].expand(2, 4)]).repeat(2, 1),
    "stacked": lambda p: torch.stack(
        [p.reshape(-1), p.t().reshape(-1), p.double().float().view(-1)]
    ),
    "entry by entry": lambda p: (1 - p.exp() / (2 + p.sin()) - p.cos() * 3).tanh() + p.sigmoid(),
    "more of these": lambda p: -(p.relu() + 1).log() + functional.gelu(p) + functional.silu(p),
    "powers and sums": lambda p: p.pow(3) * p.sum() + p.sum(1, keepdim=True) - p.cumsum(0) + 1 / p,
    "in bounds": lambda p: p.clamp(0.2, 0.8) + p.clamp(max=0.5).clamp_min(0.3) + p.clamp_max(0.7),
    "roots and parts": lambda p: (p.sqrt() + p.abs().rsqrt()).softmax(1) + functional.softplus(p),
    "where, on average": lambda p: torch.where(p > 0.5, p, -p) - p.mean(1, keepdim=True),
    "products": lambda p: functional.linear(p @ p.mT, p.mT, p[:, 0].neg()[:4]),
    "products by batch": lambda p: p.unsqueeze(0) @ p.mT.unsqueeze(0).clone(),
}

UNKNOWN: dict[str, Callable[[Tensor], Tensor]] = {
    "a function": lambda p: Unseen.apply(p) * 2,
    "interpolated": lambda p: functional.interpolate(p[None], 8),
}


def each(value: Tensor, p: Tensor, gradients: Tensor) -> Tensor:
    rows = [torch.autograd.grad(value, p, one, retain_graph=True)[0] for one in gradients]
    return torch.stack(rows)


@pytest.mark.parametrize("name", KNOWN)
def test_at_once_is_one_by_one(name: str) -> None:
    p, other = torch.rand(6, 4, requires_grad=True), torch.rand(2, requires_grad=True)
    value = KNOWN[name](p)
    gradients = torch.randn(3, *value.shape)
    found = all_at_once(value, [p, other], gradients)
    assert found is not None
    assert found[1] is None
    torch.testing.assert_close(found[0], each(value, p, gradients))


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_not_known_is_left_alone(name: str) -> None:
    p = torch.rand(6, 4, requires_grad=True)
    value = UNKNOWN[name](p)
    assert all_at_once(value, [p], torch.randn(3, *value.shape)) is None


def test_graphs_are_looked_at_up_to_what_is_asked_for() -> None:
    p = torch.rand(6, 4, requires_grad=True)
    between = Unseen.apply(p) * 1
    value = between.exp()
    gradients = torch.randn(3, 6, 4)
    (found,) = all_at_once(value, [between], gradients) or [None]
    torch.testing.assert_close(found, each(value, between, gradients))


def test_a_hook_that_reads_numbers_is_given_one_sample_after_the_other() -> None:
    p, read = torch.rand(6, 4, requires_grad=True), []
    value = p.tanh()
    value.register_hook(lambda gradient: read.append(float(gradient.sum())))
    assert all_at_once(value.exp(), [p], torch.randn(3, 6, 4)) is None
    assert not read
