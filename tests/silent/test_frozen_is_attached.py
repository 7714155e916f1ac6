"""What runs under `frozen()` is what runs without it, whatever asks for `requires_grad`."""

from __future__ import annotations

import pytest
import torch
from tests.silent.compare import WAYS, drawn, exact_or_refused, squares
from torch import Tensor, nn

N, T, D = 4, 5, 8

NESTED = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")

LENGTHS = torch.tensor([5, 3, 2, 4])


def issue(*ways: str, reason: str) -> list[object]:
    """Return the ways as parameters, some of them failing."""
    mark = pytest.mark.xfail(strict=True, reason=f"issue: {reason}")
    return [pytest.param(way, marks=[mark] if way in ways else []) for way in WAYS]


class Encoder(nn.Module):
    """Pools over all positions of a padded batch, those of the padding included."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(D, 3)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        return self.head(self.encoder(x, src_key_padding_mask=padding).mean(1))


class Attention(nn.Module):
    """Attends with keys masked, of one sample all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(D, 2, batch_first=True)
        self.head = nn.Linear(D, 3)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        y = self.attention(x, x, x, key_padding_mask=padding, need_weights=False)[0]
        return self.head(y.mean(1).nan_to_num(1.0))


class AsksParameter(nn.Module):
    """Takes another branch where a weight does not require gradients, as merged adapters do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(D, D), nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return self.head(y.relu() if self.layer.weight.requires_grad else y)


class AsksActivation(AsksParameter):
    """Takes another branch where an activation does not require gradients."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return self.head(y.relu() if y.requires_grad else y)


class Counts(AsksParameter):
    """Counts trainable parameters, as code that sets gradient checkpointing up does."""

    def forward(self, x: Tensor) -> Tensor:
        trainable = sum(parameter.requires_grad for parameter in self.parameters())
        return self.head(self.layer(x) * trainable)


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(D, 2, D, batch_first=True, dropout=0.0)
    return nn.TransformerEncoder(layer, 2)


def layer() -> nn.Module:
    return nn.TransformerEncoderLayer(D, 2, D, batch_first=True, dropout=0.0)


def made(model: nn.Module) -> nn.Module:
    """Give a model random weights in float64, in evaluation mode."""
    generator = torch.Generator().manual_seed(0)
    model = model.double().eval()
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter) * 0.5
    return model


def padding(full: int | None = None) -> Tensor:
    """Return which positions are padding, `[N, T]`; all of one sample's."""
    mask = torch.arange(T) >= LENGTHS[:, None]
    if full is not None:
        mask[full] = True
    return mask


@NESTED
@pytest.mark.parametrize("way", issue("frozen", reason="nested tensors when all is frozen"))
def test_encoder_with_only_the_head_tracked(way: str) -> None:
    """Torch's nested tensors return zeros at padding, where the plain way returns numbers."""
    model, x = made(Encoder(encoder())), drawn(N, T, D)
    exact_or_refused(model, lambda: squares(model(x, padding())), way, layers="head.*")


@NESTED
@pytest.mark.parametrize("way", issue("frozen", reason="nested tensors when all is frozen"))
def test_encoder_with_all_tracked(way: str) -> None:
    model, x = made(Encoder(encoder())), drawn(N, T, D)
    assert exact_or_refused(model, lambda: squares(model(x, padding())), way) == "exact"


@pytest.mark.parametrize("way", WAYS)
def test_a_single_encoder_layer(way: str) -> None:
    model, x = made(Encoder(layer())), drawn(N, T, D)
    exact_or_refused(model, lambda: squares(model(x, padding())), way, layers="head.*")


@pytest.mark.parametrize("way", issue("frozen", reason="fast path of attention when frozen"))
def test_attention_with_a_sample_that_is_masked_altogether(way: str) -> None:
    """The plain way returns NaN there, the fast path zeros."""
    model, x = made(Attention()), drawn(N, T, D)
    exact_or_refused(model, lambda: squares(model(x, padding(1))), way, layers="head.*")


@pytest.mark.parametrize("way", issue("frozen", reason="flags that the model's code reads"))
@pytest.mark.parametrize("kind", [AsksParameter, Counts])
def test_code_that_reads_flags_of_parameters(kind: type[nn.Module], way: str) -> None:
    model, x = made(kind()), drawn(N, D)
    exact_or_refused(model, lambda: squares(model(x)), way)


@pytest.mark.parametrize("way", issue("frozen", reason="flags that the model's code reads"))
def test_code_that_reads_flags_of_activations(way: str) -> None:
    model, x = made(AsksActivation()), drawn(N, D)
    exact_or_refused(model, lambda: squares(model(x)), way, layers="head.*")
