"""timm's layers and the blocks around them, rebuilt under the names of timm's own classes.

What ghost knows of a library's layers it knows by name, so that the patterns need the names too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeVar

import torch
from tests.foreign.blocks import Block
from tests.foreign.foreign import Batch, Foreign, curved
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

Kind = TypeVar("Kind", bound=type[nn.Module])


def named(module: str) -> Callable[[Kind], Kind]:
    """Give a class the dotted name that it has in timm."""

    def decorate(kind: Kind) -> Kind:
        kind.__module__ = f"timm.layers.{module}"
        return kind

    return decorate


@named("norm_act")
class BatchNormAct2d(nn.BatchNorm2d):
    """Batch norm and activation in one module that is a batch norm."""

    def __init__(self, width: int, act: Callable[[], nn.Module] | None = None) -> None:
        super().__init__(width)
        self.drop = nn.Identity()
        self.act = nn.ReLU(inplace=True) if act is None else act()

    def forward(self, x: Tensor) -> Tensor:
        mean, variance = self.running_mean, self.running_var
        x = F.batch_norm(
            x, mean, variance, self.weight, self.bias, self.training, self.momentum, self.eps
        )
        return self.act(self.drop(x))


@named("norm")
class LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of images."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


@named("norm")
class LayerNorm(nn.LayerNorm):
    """Layer norm, with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


@named("norm")
class GroupNorm1(nn.GroupNorm):
    """Group norm with one group."""

    def __init__(self, width: int) -> None:
        super().__init__(1, width)

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


@named("layer_scale")
class LayerScale(nn.Module):
    """A factor for each feature, on the last axis."""

    def __init__(self, width: int, inplace: bool = False) -> None:
        super().__init__()
        self.gamma, self.inplace = nn.Parameter(torch.ones(width)), inplace

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(self.gamma) if self.inplace else x * self.gamma


@named("layer_scale")
class LayerScale2d(LayerScale):
    """A factor for each channel of images."""

    def forward(self, x: Tensor) -> Tensor:
        gamma = self.gamma.view(1, -1, 1, 1)
        return x.mul_(gamma) if self.inplace else x * gamma


@named("std_conv")
class ScaledStdConv2d(nn.Conv2d):
    """A convolution whose weight is standardised, and scaled by a gain for each output."""

    def __init__(self, inputs: int, outputs: int, kernel: int, **options: int) -> None:
        super().__init__(inputs, outputs, kernel, padding=kernel // 2, **options)
        self.scale, self.eps = self.weight[0].numel() ** -0.5, 1e-6
        self.gain = nn.Parameter(torch.ones(outputs, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        weight = F.batch_norm(
            self.weight.reshape(1, self.out_channels, -1),
            None,
            None,
            weight=(self.gain * self.scale).view(-1),
            training=True,
            momentum=0.0,
            eps=self.eps,
        ).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class ResNet(nn.Module):
    """Residual blocks of convolutions with norms that activate."""

    def __init__(
        self, width: int = 6, depth: int = 1, act: Callable[[], nn.Module] | None = None
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.norms = nn.ModuleList([BatchNormAct2d(width, act) for _ in range(2 * depth)])
        self.convolutions = nn.ModuleList(
            [nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2 * depth)]
        )
        self.head = nn.Linear(width, 3)

    def forward(self, image: Tensor) -> Tensor:
        x, layers = self.stem(image), self._layers()
        for (norm, convolution), (second_norm, second) in zip(layers, layers, strict=True):
            x = x + second(second_norm(convolution(norm(x))))
        return self.head(x.mean((2, 3)))

    def _layers(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        return iter(zip(self.norms, self.convolutions, strict=True))


class NormFree(nn.Module):
    """NFNet's residual blocks: no norms, but standardised weights."""

    def __init__(self, width: int = 6, depth: int = 1) -> None:
        super().__init__()
        self.stem = ScaledStdConv2d(3, width, 3, stride=2)
        self.blocks = nn.ModuleList(
            [ScaledStdConv2d(width, width, 3, groups=2) for _ in range(2 * depth)]
        )
        self.head = nn.Linear(width, 3)

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image)
        for block in self.blocks:
            x = x + 0.5 * block(F.gelu(x))
        return self.head(x.mean((2, 3)))


class ConvNeXt(nn.Module):
    """Depthwise convolutions, layer norm over channels, layer scale as a module."""

    class Stage(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.conv_dw = nn.Conv2d(width, width, 3, padding=1, groups=width)
            self.norm, self.scale = LayerNorm2d(width), LayerScale2d(width)
            self.up, self.down = nn.Conv2d(width, 2 * width, 1), nn.Conv2d(2 * width, width, 1)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.scale(self.down(F.gelu(self.up(self.norm(self.conv_dw(x))))))

    def __init__(self, width: int = 6, depth: int = 1) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 2, 2), LayerNorm2d(width))
        self.stages = nn.Sequential(*(self.Stage(width) for _ in range(depth)))
        self.norm, self.head = LayerNorm(width), nn.Linear(width, 3)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.norm(self.stages(self.stem(image)).mean((2, 3))))


class PoolFormer(nn.Module):
    """Pooling in place of attention, group norm with one group, layer scale for images."""

    def __init__(self, width: int = 6, depth: int = 1) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 2, 2)
        self.norms = nn.ModuleList([GroupNorm1(width) for _ in range(2 * depth)])
        self.scales = nn.ModuleList([LayerScale2d(width) for _ in range(2 * depth)])
        self.up = nn.ModuleList([nn.Conv2d(width, 2 * width, 1) for _ in range(depth)])
        self.down = nn.ModuleList([nn.Conv2d(2 * width, width, 1) for _ in range(depth)])
        self.head = nn.Linear(width, 3)

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image)
        for at, (up, down) in enumerate(zip(self.up, self.down, strict=True)):
            y = self.norms[2 * at](x)
            x = x + self.scales[2 * at](F.avg_pool2d(y, 3, 1, 1) - y)
            y = down(F.gelu(up(self.norms[2 * at + 1](x))))
            x = x + self.scales[2 * at + 1](y)
        return self.head(x.mean((2, 3)))


class VisionTransformer(nn.Module):
    """DeiT III and DINOv2: a class token, positions, and layer scales in each block."""

    def __init__(self, width: int = 8, depth: int = 1, length: int = 4) -> None:
        super().__init__()
        self.patch_embed = nn.Linear(3, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, length + 1, width))
        self.blocks = nn.ModuleList([Block(width) for _ in range(depth)])
        self.scales = nn.ModuleList([LayerScale(width) for _ in range(2 * depth)])
        self.norm, self.head = LayerNorm(width), nn.Linear(width, 3)

    def forward(self, patches: Tensor) -> Tensor:
        x = torch.cat((self.cls_token.expand(len(patches), -1, -1), self.patch_embed(patches)), 1)
        x = x + self.pos_embed
        for at, block in enumerate(self.blocks):
            x = x + self.scales[2 * at](block.attn(block.norm1(x)))
            x = x + self.scales[2 * at + 1](block.mlp(block.norm2(x)))
        return self.head(self.norm(x)[:, 0])


def _images(n: int) -> Batch:
    return {"image": torch.randn(n, 3, 4, 4)}


def _patches(n: int) -> Batch:
    return {"patches": torch.randn(n, 4, 3)}


def _curved(model: nn.Module, batch: Batch) -> Tensor:
    return curved(model(*batch.values()))


IMAGES = [
    Foreign("timm_resnet", ResNet, _images, _curved, everyday=True),
    Foreign("timm_resnet_silu", partial(ResNet, act=partial(nn.SiLU, True)), _images, _curved),
    Foreign("timm_resnet_prelu", partial(ResNet, act=nn.PReLU), _images, _curved),
    Foreign("timm_nfnet", NormFree, _images, _curved, everyday=True),
    Foreign("timm_convnext", ConvNeXt, _images, _curved),
    Foreign("timm_poolformer", PoolFormer, _images, _curved),
    Foreign("timm_vit_layer_scale", VisionTransformer, _patches, _curved, everyday=True),
]
