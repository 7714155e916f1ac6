"""What a sampler promises beside its numbers: `check_sampler` finds each promise that is broken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

from ghost_core import (
    Call,
    Dense,
    GradientSampler,
    Outer,
    PastCall,
    PerSampleGradient,
    Record,
    Tokens,
    as_tokens,
)
from ghost_core.testing import PlainEmbedding, PlainLinear, check_sampler

from .inputs import D, N, P, sequence


class HidesInput(PlainLinear):
    """Keeps the input from Python, where autograd does not know of it."""

    def record(self, call: Call) -> Mapping[str, Record]:
        call.static = super().record(call)
        return {}

    def gradients(
        self, call: PastCall, records: Mapping[str, Record], grads: Sequence[Tensor | None]
    ) -> Mapping[str, PerSampleGradient]:
        return super().gradients(call, call.static, grads)


class HidesCopy(HidesInput):
    """Keeps a copy of the input, inside of something else."""

    def record(self, call: Call) -> Mapping[str, Record]:
        super().record(call)
        call.static = {
            name: replace(record, x=record.x.detach().clone())
            for name, record in call.static.items()
            if isinstance(record, Tokens)
        }
        return {}


class ByPosition(PlainLinear):
    """Expects the input by position."""

    def record(self, call: Call) -> Mapping[str, Record]:
        if "weight" not in call.shapes:
            return {}
        return {"weight": Tokens(as_tokens(call.args[0].to(call.outputs[0].dtype)))}


class KeepsFloat32(PlainLinear):
    """Keeps the input as it was before autocast."""

    def record(self, call: Call) -> Mapping[str, Record]:
        if "weight" not in call.shapes:
            return {}
        return {"weight": Tokens(as_tokens(call.argument(0, "input")))}


@dataclass(frozen=True)
class Unflagged(Tokens):
    """Does not say that it is compressed."""

    def compress(self, projection: Tensor) -> Tokens:
        return replace(super().compress(projection), compressed=False)


class Compresses(PlainLinear):
    """Keeps what compresses in its own way."""

    def record(self, call: Call) -> Mapping[str, Record]:
        return {
            name: Unflagged(record.x)
            for name, record in super().record(call).items()
            if isinstance(record, Tokens)
        }


class DropsFlag(PlainLinear):
    """Makes a new factor of what comes back, which may be compressed."""

    def gradients(
        self, call: PastCall, records: Mapping[str, Record], grads: Sequence[Tensor | None]
    ) -> Mapping[str, PerSampleGradient]:
        fresh = {name: Tokens(each.x) for name, each in records.items() if isinstance(each, Tokens)}
        return super().gradients(call, fresh, grads)


class FirstToken(PlainLinear):
    """Takes the first token for all, which is right where there is one."""

    def gradients(
        self, call: PastCall, records: Mapping[str, Record], grads: Sequence[Tensor | None]
    ) -> Mapping[str, PerSampleGradient]:
        made = super().gradients(call, records, grads)
        return {
            name: Dense(each.terms[:, :1]) if isinstance(each, Dense) else each
            for name, each in made.items()
        }


class FirstId(PlainEmbedding):
    """Takes the first token for all."""

    def gradients(
        self, call: PastCall, records: Mapping[str, Record], grads: Sequence[Tensor | None]
    ) -> Mapping[str, PerSampleGradient]:
        (made,) = super().gradients(call, records, grads).values()
        assert isinstance(made, Outer)
        first = {name: value[:, :1] for name, value in made.factor.tensors().items()}
        return {"weight": Outer(made.factor.replace(**first), made.grad[:, :1], made.shape)}


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        (HidesInput, r"HidesInput keeps tensors of a call of Linear in static: .* records"),
        (HidesCopy, r"HidesCopy keeps tensors of a call of Linear in static"),
        (ByPosition, r"ByPosition in the forward pass with inputs by keyword: IndexError"),
        (KeepsFloat32, r"KeepsFloat32 keeps float32 of Linear under bfloat16 autocast"),
        (Compresses, r"Linear\.weight, compress: .* does not say that it is compressed"),
        (DropsFlag, r"Linear\.weight, project after compression: "),
    ],
)
def test_a_broken_promise(sampler: type[GradientSampler], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_sampler(sampler, nn.Linear(D, P), sequence())


@pytest.mark.parametrize(
    ("sampler", "layer", "inputs"),
    [
        (FirstToken, nn.Linear(D, P), torch.randn(N, D)),
        (FirstId, nn.Embedding(7, P), torch.tensor([0, 4, 4, 2])),
    ],
)
def test_a_missing_sum_over_tokens_where_one_is_given(
    sampler: type[GradientSampler], layer: nn.Module, inputs: Tensor
) -> None:
    message = r"(Linear\.bias|Embedding\.weight) with several tokens, materialize: .* are off"
    with pytest.raises(AssertionError, match=message):
        check_sampler(sampler, layer, inputs)


def test_what_is_no_tensor_of_the_call_may_be_static() -> None:
    class Static(PlainLinear):
        table = torch.arange(3.0)

        def record(self, call: Call) -> Mapping[str, Record]:
            call.static = (self.table, call.args[0].shape if call.args else None, "text")
            return super().record(call)

    check_sampler(Static, nn.Linear(D, P), sequence())


def test_a_layer_that_knows_no_keywords_is_called_by_position() -> None:
    class Positional(nn.Linear):
        def forward(self, input: Tensor, /) -> Tensor:
            return super().forward(input)

    class Several(nn.Linear):
        def forward(self, *inputs: Tensor) -> Tensor:
            return super().forward(*inputs)

    for kind in (Positional, Several):
        check_sampler(ByPosition, kind(D, P), sequence())
