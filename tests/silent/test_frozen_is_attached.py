"""What runs under `frozen()` is what runs without it, whatever asks for `requires_grad`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.silent.compare import WAYS, drawn, exact_or_refused, holds, squares
from torch import Tensor, nn

from ghost_core import CaptureError
from ghost_core._torch import function_modes
from ghost_core.testing import GradientHolder, per_sample_gradients

N, T, D = 4, 5, 8

NESTED = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")

LENGTHS = torch.tensor([5, 3, 2, 4])


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
@pytest.mark.parametrize("way", WAYS)
def test_encoder_with_only_the_head_tracked(way: str) -> None:
    """Torch's nested tensors return zeros at padding, where the plain way returns numbers."""
    model, x = made(Encoder(encoder())), drawn(N, T, D)
    assert (
        exact_or_refused(model, lambda: squares(model(x, padding())), way, layers="head.*")
        == "exact"
    )


@NESTED
@pytest.mark.parametrize("way", WAYS)
def test_encoder_with_all_tracked(way: str) -> None:
    model, x = made(Encoder(encoder())), drawn(N, T, D)
    assert exact_or_refused(model, lambda: squares(model(x, padding())), way) == "exact"


@pytest.mark.parametrize("way", WAYS)
def test_a_single_encoder_layer(way: str) -> None:
    model, x = made(Encoder(layer())), drawn(N, T, D)
    assert (
        exact_or_refused(model, lambda: squares(model(x, padding())), way, layers="head.*")
        == "exact"
    )


@pytest.mark.parametrize("way", WAYS)
def test_attention_with_a_sample_that_is_masked_altogether(way: str) -> None:
    """The plain way returns NaN there, the fast path zeros."""
    model, x = made(Attention()), drawn(N, T, D)
    assert (
        exact_or_refused(model, lambda: squares(model(x, padding(1))), way, layers="head.*")
        == "exact"
    )


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", [AsksParameter, Counts])
def test_code_that_reads_flags_of_parameters(kind: type[nn.Module], way: str) -> None:
    model, x = made(kind()), drawn(N, D)
    assert exact_or_refused(model, lambda: squares(model(x)), way) == "exact"


@pytest.mark.parametrize("way", WAYS)
def test_code_that_reads_flags_of_activations(way: str) -> None:
    model, x = made(AsksActivation()), drawn(N, D)
    assert exact_or_refused(model, lambda: squares(model(x)), way, layers="head.*") == "exact"


class Stranger(torch.autograd.Function):
    """An identity that no function mode sees."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class AsksStranger(AsksParameter):
    """Asks about what comes from a function that nobody sees."""

    def forward(self, x: Tensor) -> Tensor:
        y = Stranger.apply(self.layer(x))
        return self.head(y.relu() if y.requires_grad else y)


def test_answers_that_nothing_tells_are_refused() -> None:
    model, x = made(AsksStranger()), drawn(N, D)
    expected = per_sample_gradients(model, squares(model(x)))
    with pytest.raises(CaptureError, match="AsksStranger") as refused:
        holds(model, lambda: squares(model(x)), "frozen", expected, layers="head.*")
    assert "no function mode" in refused.value.reason
    assert "with engine" in refused.value.remedy
    exact_or_refused(model, lambda: squares(model(x)), "attached", layers="head.*")


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("kind", [AsksParameter, AsksActivation, Counts])
def test_later_passes_are_answered_as_well(kind: type[nn.Module], verify: bool) -> None:
    model, x = made(kind()), drawn(N, D)
    expected = per_sample_gradients(model, squares(model(x)))
    engine = GradientHolder(model, layers="head.*", verify=verify)
    with engine.frozen():
        for _ in range(3):
            with engine.batch(range(N)) as batch:
                squares(model(x)).sum().backward()
            for name, held in batch.result.materialize().items():
                assert torch.allclose(held, expected[name], rtol=1e-9, atol=1e-12)
    assert all(parameter.requires_grad for parameter in model.parameters())


class Behind(nn.Module):
    """An encoder that the user froze, behind a layer or before it, or without gradients."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.first, self.encoder, self.head = nn.Linear(D, D), encoder(), nn.Linear(D, 3)
        self.where = where

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        if self.where == "behind":
            x = self.first(x)
        with torch.set_grad_enabled(self.where != "without gradients"):
            x = self.encoder(x, src_key_padding_mask=padding)
        if self.where != "behind":
            x = self.first(x)
        return self.head(x.mean(1))


@NESTED
@pytest.mark.parametrize("layers", ["*", "head.*"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("where", ["behind", "before", "without gradients"])
def test_encoder_that_is_fused_without_ghost(where: str, way: str, layers: str) -> None:
    """Where the user's own run takes torch's way, ghost's modes do not keep it from that."""
    model, x = made(Behind(where)), drawn(N, T, D)
    for parameter in model.encoder.parameters():
        parameter.requires_grad_(where == "without gradients")
    excluded = "encoder.*" if where == "without gradients" and layers == "*" else ()

    def losses() -> Tensor:
        return squares(model(x, padding()))

    expected = losses().detach()
    engine = GradientHolder(model, layers=layers, exclude=excluded)
    with engine.frozen() if way == "frozen" else engine:
        for _ in range(2):
            with engine.batch(range(N)):
                found = losses()
                found.sum().backward()
            assert torch.allclose(found, expected, rtol=1e-9)
    model.zero_grad()
    options = {"layers": layers, "exclude": excluded}
    assert exact_or_refused(model, losses, way, **options) == "exact"
    assert function_modes() == []
