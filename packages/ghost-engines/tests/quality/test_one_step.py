"""Tail-patch against a step that is written out."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from ghost_engines.quality import QualityError, tail_patch


def losses(model, batch):
    return cross_entropy(model(batch[0]), batch[1], reduction="none")


def batch(n):
    return torch.randn(n, 5), torch.randint(0, 3, (n,))


def test_it_is_what_a_step_does_and_leaves_no_trace():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3), nn.Linear(9, 9))
    model = model[:3].append(nn.Dropout(0.5)).train()
    model[0].bias.requires_grad_(False)
    model[2].weight.grad = torch.ones(3, 7)
    queries, found = [batch(2) for _ in range(4)], [batch(3) for _ in range(4)]
    before = copy.deepcopy(model)
    state = torch.get_rng_state()
    patched = tail_patch(model, losses, queries, found, lr=0.3)
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in before.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
    assert torch.equal(model[2].weight.grad, torch.ones(3, 7))
    for at, (query, those) in enumerate(zip(queries, found, strict=True)):
        again = copy.deepcopy(before)
        torch.set_rng_state(state)
        first = losses(again, query).mean().item()
        optimizer = torch.optim.SGD([p for p in again.parameters() if p.requires_grad], lr=0.3)
        optimizer.zero_grad()
        losses(again, those).mean().backward()
        optimizer.step()
        second = losses(again, query).mean().item()
        assert patched.before[at].item() == pytest.approx(first, abs=1e-6)
        assert patched.after[at].item() == pytest.approx(second, abs=1e-6)
        assert patched.gain[at].item() == pytest.approx(first - second, abs=1e-6)
    assert patched.mean == pytest.approx(patched.gain.mean().item())
    assert repr(patched).endswith("Q=4)")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"found": []}, "0 batches found for 1 queries"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"lr": float("inf")}, "lr must be positive"),
        ({"per_sample_loss": lambda m, b: losses(m, b).mean()}, r"\[N\], not \[\]"),
        ({"per_sample_loss": lambda m, b: losses(m, b) / 0}, "not finite"),
    ],
)
def test_what_does_not_fit_is_refused(given, message):
    model = nn.Linear(5, 3)
    weight = model.weight.detach().clone()
    whole = {"model": model, "per_sample_loss": losses, "queries": [batch(1)], "found": [batch(2)]}
    with pytest.raises(QualityError, match=message):
        tail_patch(**whole | {"lr": 0.1} | given)
    assert torch.equal(model.weight, weight)
