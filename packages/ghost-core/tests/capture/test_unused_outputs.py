"""What the loss does not use stays without a gradient: training is as it is without ghost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ghost_core import PastCall, PerSampleGradient, Record, SamplerRegistry
from ghost_core.testing import GradientHolder, PlainLinear, per_sample_gradients
from ghost_core.tracking import Claim, dotted_name

N, D = 4, 3


class Doubled(torch.autograd.Function):
    """Makes gradients of zero out of none, as custom functions do by default."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


class TwoHeads(nn.Linear):
    """Returns a second output, which comes from another parameter alone."""

    def __init__(self) -> None:
        super().__init__(D, D)
        self.other = nn.Parameter(torch.ones(D))
        self.seen: list[Tensor | None] = []

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        second = x.detach() * Doubled.apply(self.other)
        if second.requires_grad:
            second.register_hook(self.seen.append)
        return super().forward(x), second


class TwoHeadsSampler(PlainLinear):
    """Knows the first output only."""

    parameters = ("weight", "bias", "other")

    def gradients(
        self, call: PastCall, records: Mapping[str, Record], grads: Sequence[Tensor | None]
    ) -> Mapping[str, PerSampleGradient]:
        return super().gradients(call, records, grads[:1])


class Root(nn.Module):
    def __init__(self, uses: str) -> None:
        super().__init__()
        self.heads, self.uses = TwoHeads(), uses

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.heads(x)
        return {"first": first.tanh(), "both": first.tanh() + second, "twice": first * first}[
            self.uses
        ]


def registry() -> SamplerRegistry:
    return SamplerRegistry([Claim(dotted_name(TwoHeads), TwoHeadsSampler, "test")])


def trained(uses: str, x: Tensor, *, watched: bool) -> Root:
    torch.manual_seed(0)
    model = Root(uses).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    engine = GradientHolder(model, registry=registry(), exclude="*.other", verify=False)
    for _ in range(3):
        optimizer.zero_grad()
        if watched:
            with engine, engine.batch(range(N)):
                model(x).sum().backward()
        else:
            model(x).sum().backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("uses", ["first", "both", "twice"])
def test_an_output_that_the_loss_does_not_use_gets_no_gradient(uses: str) -> None:
    x = torch.randn(N, D, dtype=torch.float64)
    plain, watched = trained(uses, x, watched=False), trained(uses, x, watched=True)
    assert (plain.heads.other.grad is None) == (uses != "both")
    assert (watched.heads.other.grad is None) == (uses != "both")
    for expected, found in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(expected, found)
    assert len(watched.heads.seen) == len(plain.heads.seen)


def test_gradients_of_several_outputs_arrive_together() -> None:
    model, x = Root("both").double(), torch.randn(N, D, dtype=torch.float64)
    calls: list[list[bool]] = []

    class Counts(TwoHeadsSampler):
        def gradients(
            self, call: PastCall, records: Mapping[str, Record], grads: Sequence[Tensor | None]
        ) -> Mapping[str, PerSampleGradient]:
            calls.append([grad is not None for grad in grads])
            return super().gradients(call, records, grads)

    known = SamplerRegistry([Claim(dotted_name(TwoHeads), Counts, "test")])
    engine = GradientHolder(model, registry=known, exclude="*.other", verify=False)
    expected = per_sample_gradients(model, model(x).sum(1))
    with engine, engine.batch(range(N)) as batch:
        losses = model(x).sum(1)
        for loss in losses:  # several backward passes through one graph
            loss.backward(retain_graph=True)
    assert calls == [[True, True]] * N
    (use, *others) = batch.result.gradients("heads.weight")
    whole = sum((other.materialize() for other in others), use.materialize())
    torch.testing.assert_close(whole, expected["heads.weight"])
