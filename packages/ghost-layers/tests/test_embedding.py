from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ghost_core import SamplerRegistry, UnsupportedLayerError
from ghost_core.testing import GradientHolder, check_sampler, per_sample_gradients
from ghost_core.tracking import Claim, dotted_name
from ghost_layers import EmbeddingBagSampler, EmbeddingSampler


def indices(*shape: int, size: int = 7) -> Tensor:
    return torch.randint(size, shape)


@pytest.mark.parametrize(
    "shape",
    [
        (5,),
        (4, 4),
        *(  # other numbers of tokens; the table of cases has these, too
            pytest.param(shape, marks=pytest.mark.stress)
            for shape in [(3, 4), (3, 2, 3), (2, 2, 3, 2)]
        ),
    ],
)
def test_embedding(shape: tuple[int, ...]) -> None:
    check_sampler(EmbeddingSampler, nn.Embedding(7, 3), indices(*shape))


@pytest.mark.parametrize("padding", [0, pytest.param(2, marks=pytest.mark.stress), -1])
def test_padding_contributes_nothing(padding: int) -> None:
    index = torch.tensor([[0, 2, 6, 6], [1, 1, 2, 3], [6, 0, 2, 5]])
    check_sampler(EmbeddingSampler, nn.Embedding(7, 3, padding_idx=padding), index, uses=2)


def test_int32_indices() -> None:
    check_sampler(EmbeddingSampler, nn.Embedding(7, 3), indices(3, 4).int())


def test_input_by_keyword() -> None:
    check_sampler(EmbeddingSampler, nn.Embedding(7, 3), input=indices(3, 4))


@pytest.mark.parametrize("norm_type", [pytest.param(2.0, marks=pytest.mark.stress), 1.0])
def test_renormalised_table(norm_type: float) -> None:
    module = nn.Embedding(7, 3, max_norm=0.5, norm_type=norm_type)
    check_sampler(EmbeddingSampler, module, indices(3, 4))


BAGS: list[Any] = [
    pytest.param({"mode": "sum"}, marks=pytest.mark.stress),  # the table of cases has both
    pytest.param({"mode": "mean"}, marks=pytest.mark.stress),
    {"mode": "sum", "padding_idx": 2},
    {"mode": "mean", "padding_idx": -1},
    {"mode": "mean", "max_norm": 0.5},
]


@pytest.mark.parametrize("options", BAGS)
@pytest.mark.parametrize("uses", [pytest.param(1, marks=pytest.mark.stress), 2])
def test_embedding_bag(options: dict[str, Any], uses: int) -> None:
    index = torch.tensor([[0, 2, 6, 6], [6, 6, 6, 2], [6, 6, 6, 6], [2, 2, 2, 2], [1, 1, 2, 3]])
    check_sampler(EmbeddingBagSampler, nn.EmbeddingBag(7, 3, **options), index, uses=uses)


@pytest.mark.parametrize("padding", [pytest.param(None, marks=pytest.mark.stress), 2])
def test_embedding_bag_with_weights(padding: int | None) -> None:
    module = nn.EmbeddingBag(7, 3, mode="sum", padding_idx=padding)
    index, weights = indices(3, 4), torch.randn(3, 4)
    check_sampler(EmbeddingBagSampler, module, index, None, weights)
    check_sampler(EmbeddingBagSampler, module, index, per_sample_weights=weights)


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_sparse_gradients_are_left_alone(kind: type[nn.Module]) -> None:
    model = nn.Sequential(kind(7, 3, sparse=True))
    with holder(model) as engine, engine.batch(range(3)) as batch:
        model(indices(3, 4)).sum().backward()
    gradient = model[0].weight.grad
    assert gradient is not None
    assert gradient.is_sparse
    held = batch.result.materialize()["0.weight"].sum(0)
    torch.testing.assert_close(held.float(), gradient.to_dense())


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.Embedding(7, 3, scale_grad_by_freq=True), "set scale_grad_by_freq=False"),
        (nn.EmbeddingBag(7, 3, scale_grad_by_freq=True), "set scale_grad_by_freq=False"),
    ],
)
def test_what_cannot_be_split_is_refused(module: nn.Module, reason: str) -> None:
    with pytest.raises(UnsupportedLayerError, match=reason):
        holder(nn.Sequential(module))


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("last", [False, True])
def test_offsets(mode: str, last: bool) -> None:
    """Bags of two entries, none, padding alone, and three."""
    index, starts = torch.tensor([3, 1, 1, 5, 5, 2]), torch.tensor([0, 2, 2, 3, 6])
    table = nn.EmbeddingBag(7, 3, mode=mode, include_last_offset=last, padding_idx=1)
    table, offsets = table.double(), starts if last else starts[:-1]
    weights = torch.rand(6, dtype=torch.float64) if mode == "sum" else None

    def losses() -> Tensor:
        return table(index, offsets, weights).sin().sum(1)

    expected = per_sample_gradients(table, losses())["weight"]
    with holder(table) as engine, engine.batch(range(4)) as batch:
        losses().sum().backward()
    assert batch.verified
    torch.testing.assert_close(batch.result.materialize()["weight"], expected)


def test_equal_rows_of_which_the_first_is_the_largest() -> None:
    """Torch gives the gradient to the first of several that are equal."""
    table = nn.EmbeddingBag(7, 3, mode="max").double()
    with torch.no_grad():
        table.weight[2:5] = table.weight[2]
    index = torch.tensor([[4, 2, 3], [2, 3, 4], [3, 3, 6]])
    expected = per_sample_gradients(table, table(index).sum(1))["weight"]
    with holder(table) as engine, engine.batch(range(3)) as batch:
        table(index).sum().backward()
    torch.testing.assert_close(batch.result.materialize()["weight"], expected)


def holder(model: nn.Module, **options: Any) -> GradientHolder:
    claims = {nn.Embedding: EmbeddingSampler, nn.EmbeddingBag: EmbeddingBagSampler}
    named = [Claim(dotted_name(kind), sampler, "test") for kind, sampler in claims.items()]
    return GradientHolder(model, registry=SamplerRegistry(named), **options)
