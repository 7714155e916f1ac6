"""Other people's models: twenty patterns of tests/foreign at realistic sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from tests.foreign.adapters import Base, DoRA, LoRA
from tests.foreign.foreign import curved, next_token_loss, tokens
from tests.foreign.images import ConvNeXt, NormFree, PoolFormer, ResNet, VisionTransformer
from tests.foreign.language import Llama, NanoGPT, QueryKeyNorm, RelativeBias, XTransformer
from tests.foreign.vision import Beit, MaxViT, MViT, OpenClip, Swin, SwinV2, XCiT
from torch import Tensor, nn

from bench.case import Case, Group, Setting, Way
from bench.steps import first_scored, plain, scored

GROUP = Group(
    "foreign",
    "20 foreign models, dots with one direction that is there",
    {"later": 1.8, "first": 5.0},
)

Make = Callable[[int, int], nn.Module]
"""Makes a model of a width, for T tokens."""

_WORDS = 1024


def text(make: Make, setting: Setting) -> Mapping[str, Way]:
    """Make the steps of a language model: N = 8 rows of T = 64 token ids."""
    n, length, width = (4, 6, 8) if setting.tiny else (8, 64, 128)
    ids = tokens(n, length, _WORDS).to(setting.device)
    model = make(width, length)
    return _steps(model, lambda model: next_token_loss(model(ids), ids), n, setting)


def patches(make: Make, setting: Setting) -> Mapping[str, Way]:
    """Make the steps of a model of N = 16 images as T = 64 patches, `[N, T, 3]`."""
    n, length, width = (4, 4, 8) if setting.tiny else (16, 64, 128)
    inputs = torch.randn(n, length, 3, device=setting.device)
    return _steps(make(width, length), lambda model: _loss(model(inputs)), n, setting)


def lines(make: Make, setting: Setting) -> Mapping[str, Way]:
    """Make the steps of a model of N = 16 images of one dimension, `[N, 3, T]`, T = 64."""
    n, length, width = (4, 8, 8) if setting.tiny else (16, 64, 128)
    inputs = torch.randn(n, 3, length, device=setting.device)
    return _steps(make(width, length), lambda model: _loss(model(inputs)), n, setting)


def images(make: Make, setting: Setting) -> Mapping[str, Way]:
    """Make the steps of a model of N = 8 images of 32 x 32 pixels."""
    n, size, width = (4, 4, 6) if setting.tiny else (8, 32, 32)
    inputs = torch.randn(n, 3, size, size, device=setting.device)
    return _steps(make(width, size), lambda model: _loss(model(inputs)), n, setting)


def _loss(outputs: Tensor | tuple[Tensor, ...]) -> Tensor:
    losses: Tensor = curved(outputs if isinstance(outputs, Tensor) else outputs[0])
    return losses


def _steps(
    model: nn.Module, loss: Callable[[nn.Module], Tensor], n: int, setting: Setting
) -> Mapping[str, Way]:
    model = model.to(setting.device).eval()

    def mean(model: nn.Module) -> Tensor:
        return loss(model).mean()

    return {
        "plain": plain(model, mean),
        "later": scored(setting, model, mean, n),
        "first": first_scored(model, mean, n),
    }


def _case(
    name: str, steps: Callable[[Make, Setting], Mapping[str, Way]], make: Make, what: str
) -> Case:
    return Case(f"foreign_{name}", what, partial(steps, make), group=GROUP.name)


def _relative(width: int, length: int) -> nn.Module:
    bias = partial(RelativeBias, length)
    model: nn.Module = XTransformer(bias=bias, width=width, vocabulary=_WORDS)
    return model


def _adapted(kind: type[nn.Module], width: int, length: int) -> nn.Module:
    model: nn.Module = Base(kind, width, _WORDS)
    return model


CASES = [
    _case("nanogpt", text, lambda d, t: NanoGPT(True, d, _WORDS, t), "nanoGPT, tied"),
    _case(
        "llama_tied",
        text,
        lambda d, t: Llama("linear", width=d, vocabulary=_WORDS),
        "torchtune's, tied",
    ),
    _case("x_transformers", text, _relative, "x-transformers with relative biases"),
    _case(
        "qk_norm", text, lambda d, t: QueryKeyNorm(d, _WORDS), "x-transformers with learned scales"
    ),
    _case("lora", text, partial(_adapted, LoRA), "peft's LoRA"),
    _case("dora", text, partial(_adapted, DoRA), "peft's DoRA"),
    _case("swin", lines, lambda d, t: Swin(True, d), "torchvision's Swin"),
    _case("swin_windows", lines, lambda d, t: Swin(False, d), "Swin with attention as modules"),
    _case("swin_v2", patches, lambda d, t: SwinV2(d), "Swin V2's attention"),
    _case("beit", patches, lambda d, t: Beit(True, d, t), "BEiT"),
    _case("eva", patches, lambda d, t: Beit(False, d, t), "EVA"),
    _case("maxvit", lines, lambda d, t: MaxViT(d), "MaxViT"),
    _case("mvit", patches, lambda d, t: MViT(d, t), "MViT"),
    _case("xcit", lines, lambda d, t: XCiT(d), "XCiT"),
    _case("open_clip", lines, lambda d, t: OpenClip(False, d, t // 2), "open_clip's image tower"),
    _case("vit", patches, lambda d, t: VisionTransformer(d, 2, t), "timm's ViT with LayerScale"),
    _case("resnet", images, lambda d, t: ResNet(d, 3), "timm's ResNet, norms that activate"),
    _case("nfnet", images, lambda d, t: NormFree(d, 3), "timm's NFNet, standardised weights"),
    _case("convnext", images, lambda d, t: ConvNeXt(d, 2), "timm's ConvNeXt"),
    _case("poolformer", images, lambda d, t: PoolFormer(d, 2), "timm's PoolFormer"),
]
