"""Vision models: Swin, BEiT, EVA, MaxViT, MViT, XCiT, LeViT, DETR, open_clip, ConvNeXt."""

from __future__ import annotations

from functools import partial

import torch
from tests.foreign.blocks import Attention, Block, distances
from tests.foreign.foreign import Batch, Foreign, curved
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812


class WindowAttention(nn.Module):
    """Swin: attention in windows, whose rows are folded into the batch, with a table of biases.

    Args:
        functional: Whether the weights are handed to a function, as torchvision does, so that the
            linear layers inside are never called.
        shift: How far windows are shifted.
    """

    def __init__(self, functional: bool, shift: int, width: int) -> None:
        super().__init__()
        self.attn, self.shift, self.functional = Attention(width), shift, functional
        self.relative_position_bias_table = nn.Parameter(torch.randn(3, 2))

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        bias = self.relative_position_bias_table[distances(2).view(-1)].view(2, 2, -1)
        windows = x.roll(-self.shift, 1).reshape(n * length // 2, 2, width)
        bias = bias.permute(2, 0, 1)[None]
        if self.functional:
            qkv = F.linear(windows, self.attn.qkv.weight).view(-1, 2, 3, 2, width // 2)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            y = (q @ k.mT + bias).softmax(-1) @ v
            y = F.linear(y.transpose(1, 2).flatten(2), self.attn.proj.weight, self.attn.proj.bias)
        else:
            y = self.attn(windows, bias)
        return y.view(n, length, width).roll(self.shift, 1)


class Swin(nn.Module):
    """Two blocks, plain and shifted windows, patches merged between them."""

    def __init__(self, functional: bool = False, width: int = 8) -> None:
        super().__init__()
        self.embed, self.norm = nn.Conv1d(3, width, 2, 2), nn.LayerNorm(width)
        self.plain, self.shifted = (WindowAttention(functional, shift, width) for shift in (0, 1))
        self.merge, self.head = nn.Linear(2 * width, width, bias=False), nn.Linear(width, 3)

    def forward(self, image: Tensor) -> Tensor:
        x = self.norm(self.embed(image).mT)
        x = x + self.plain(x)
        x = self.merge(torch.cat((x[:, 0::2], x[:, 1::2]), -1))
        return self.head((x + self.shifted(x)).mean(1))


class SwinV2(nn.Module):
    """Swin V2: biases are an MLP of relative coordinates, whose activation is in place.

    As in torchvision, weights are handed to a function, and keys' part of a bias is set to zero.
    """

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embed, self.qkv = nn.Linear(3, width), nn.Linear(width, 3 * width)
        self.cpb_mlp = nn.Sequential(
            nn.Linear(1, 8), nn.ReLU(inplace=True), nn.Linear(8, 2, bias=False)
        )
        self.logit_scale = nn.Parameter(torch.ones(2, 1, 1))
        self.proj, self.head = nn.Linear(width, width), nn.Linear(width, 3)

    def forward(self, patches: Tensor) -> Tensor:
        n, length, _ = patches.shape
        windows = self.embed(patches).roll(-1, 1).reshape(n * length // 2, 2, -1)
        qkv_bias = self.qkv.bias.clone()
        qkv_bias[len(qkv_bias) // 3 : 2 * len(qkv_bias) // 3].zero_()
        qkv = F.linear(windows, self.qkv.weight, qkv_bias).view(len(windows), 2, 3, 2, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        far = torch.arange(-1, 2, dtype=patches.dtype)[:, None]
        table = self.cpb_mlp(far.sign() * far.abs().log1p())
        bias = 16 * table[distances(2)].permute(2, 0, 1).sigmoid()
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT
        scores = scores * self.logit_scale.clamp(max=4.6).exp() + bias[None]
        y = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        y = F.linear(y, self.proj.weight, self.proj.bias).view(n, length, -1).roll(1, 1)
        return self.head(y.mean(1))


class Beit(nn.Module):
    """BEiT and EVA: query and value biases joined around a hole, a shared table of biases.

    Args:
        shared: Whether one table serves all blocks, computed by the model, as in BEiT.
    """

    def __init__(self, shared: bool, width: int = 8, length: int = 4) -> None:
        super().__init__()
        self.embed, self.shared = nn.Linear(3, width), shared
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.q_bias, self.v_bias = (nn.Parameter(torch.zeros(width)) for _ in range(2))
        self.table = nn.Parameter(torch.randn(2 * length + 1, 2)) if shared else None
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.gamma_1, self.head = nn.Parameter(0.1 * torch.ones(width)), nn.Linear(width, 3)

    def forward(self, patches: Tensor) -> Tensor:
        x = torch.cat((self.cls_token.expand(len(patches), -1, -1), self.embed(patches)), 1)
        joined = torch.cat((self.q_bias, torch.zeros_like(self.v_bias), self.v_bias))
        qkv = F.linear(x, self.qkv.weight, joined).unflatten(-1, (3, 2, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        scores = q @ k.mT
        if self.table is not None:
            scores = scores + self.table[distances(x.shape[1])].permute(2, 0, 1)[None]
        x = x + self.gamma_1 * self.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return self.head(x[:, 0])


class MaxViT(nn.Module):
    """Block and grid attention: rows folded both ways, with a bias table in a module of its own."""

    class Bias(nn.Module):
        """timm's RelPosBias: `get_bias` is called, never the module."""

        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(3, 2))

        def get_bias(self) -> Tensor:
            return self.table[distances(2)].permute(2, 0, 1)[None]

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv1d(3, width, 3, padding=1)
        self.block, self.grid = Attention(width), Attention(width)
        self.block_bias, self.grid_bias = self.Bias(), self.Bias()
        self.head = nn.Linear(width, 3)

    def forward(self, image: Tensor) -> Tensor:
        x = F.gelu(self.stem(image)).mT
        n, length, width = x.shape
        blocks = x.reshape(-1, 2, width)
        x = x + self.block(blocks, self.block_bias.get_bias()).view(n, length, width)
        grid = x.view(n, 2, length // 2, width).transpose(1, 2).reshape(-1, 2, width)
        grid = self.grid(grid, self.grid_bias.get_bias()).view(n, length // 2, 2, width)
        return self.head((x + grid.transpose(1, 2).reshape(n, length, width)).mean(1))


class Detr(nn.Module):
    """DETR: queries are an embedding's weight, repeated for each sample; sequence first inside."""

    def __init__(self, width: int = 8, queries: int = 5, pixels: int = 4) -> None:
        super().__init__()
        self.input_proj, self.query_embed = nn.Conv1d(3, width, 1), nn.Embedding(queries, width)
        self.row_embed = nn.Embedding(pixels, width)
        self.attn, self.norm = nn.MultiheadAttention(width, 2), nn.LayerNorm(width)
        self.class_embed, self.bbox_embed = nn.Linear(width, 3), nn.Linear(width, 4)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        x = self.input_proj(image).permute(2, 0, 1)
        position = self.row_embed(torch.arange(len(x)))[:, None].repeat(1, x.shape[1], 1)
        queries = self.query_embed.weight[:, None].repeat(1, x.shape[1], 1)
        y = self.norm(queries + self.attn(queries, x + position, x)[0]).transpose(0, 1)
        return {"logits": self.class_embed(y), "boxes": self.bbox_embed(y).sigmoid()}


class OpenClip(nn.Module):
    """open_clip's towers: class token, positional parameters, projections, a scale nobody uses."""

    def __init__(self, scaled: bool = False, width: int = 8, length: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(3, width, 2, 2, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn(length + 1, width))
        self.ln_pre, self.block = nn.LayerNorm(width), Block(width)
        self.proj = nn.Parameter(torch.randn(width, 6))
        self.logit_scale, self.scaled = nn.Parameter(torch.tensor(1.0)), scaled

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        x = self.conv1(image).mT
        first = self.class_embedding.view(1, 1, -1).expand(len(x), -1, -1)
        x = torch.cat((first, x), 1) + self.positional_embedding
        x = F.normalize(self.block(self.ln_pre(x))[:, 0] @ self.proj, dim=-1)
        scale = self.logit_scale.exp()
        return (x * scale if self.scaled else x), scale


class XCiT(nn.Module):
    """Positions of one row, from a convolution of a constant, then repeated for each sample."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embed, self.position = nn.Conv1d(3, width, 2, 2), nn.Conv1d(2, width, 1)
        self.temperature = nn.Parameter(torch.ones(2, 1, 1))
        self.qkv, self.head = nn.Linear(width, 3 * width), nn.Linear(width, 3)

    def forward(self, image: Tensor) -> Tensor:
        x = self.embed(image).mT
        at = torch.arange(x.shape[1], dtype=x.dtype)
        encoded = self.position(torch.stack((at.sin(), at.cos()))[None])
        x = x + encoded.repeat(len(x), 1, 1).mT
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 4, 1)
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * self.temperature
        return self.head((scores.softmax(-1) @ v).permute(0, 3, 1, 2).flatten(2).mean(1))


class LeViT(nn.Module):
    """Attention biases are looked up once and kept from call to call in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attn = nn.Linear(3, 8), Attention()
        self.attention_biases = nn.Parameter(torch.randn(2, 7))
        self.attention_bias_cache: dict[str, Tensor] = {}
        self.head = nn.Linear(8, 3)

    def get_attention_biases(self, length: int) -> Tensor:
        if torch.is_grad_enabled() and self.training:
            return self.attention_biases[:, distances(length)]
        if "cpu" not in self.attention_bias_cache:
            self.attention_bias_cache["cpu"] = self.attention_biases[:, distances(length)]
        return self.attention_bias_cache["cpu"]

    def forward(self, patches: Tensor) -> Tensor:
        x = self.embed(patches)
        return self.head((x + self.attn(x, self.get_attention_biases(x.shape[1]))).mean(1))


class LeViTAttention(nn.Module):
    """As in LeViT, with parameter and cache in the attention itself, which is replayed."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.biased, self.head = nn.Linear(3, 3), LeViT(), nn.Linear(3, 2)

    def forward(self, patches: Tensor) -> Tensor:
        return self.head(self.biased(self.stem(patches)))


class MViT(nn.Module):
    """MViT: relative positions by axis from tables, pooled queries; a branch multiplied by zero."""

    def __init__(self, width: int = 8, length: int = 4) -> None:
        super().__init__()
        self.embed, self.qkv = nn.Linear(3, width), nn.Linear(width, 3 * width)
        self.pool_q = nn.Conv1d(width // 2, width // 2, 2, 2, groups=width // 2, bias=False)
        self.norm_q = nn.LayerNorm(width // 2)
        self.rel_pos = nn.Parameter(torch.randn(2 * length - 1, width // 2))
        self.unused, self.head = nn.Linear(width, width), nn.Linear(width, 3)

    def forward(self, patches: Tensor) -> Tensor:
        n, length, _ = patches.shape
        x = self.embed(patches)
        q, k, v = self.qkv(x).view(n, length, 3, 2, -1).permute(2, 0, 3, 1, 4)
        q = self.pool_q(q.flatten(0, 1).mT).mT.reshape(n, 2, length // 2, -1)
        q = self.norm_q(q)
        relative = self.rel_pos[distances(length)[::2]]
        scores = q @ k.mT + torch.einsum("nhqc,qkc->nhqk", q, relative)
        y = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        y = y + self.unused(x)[:, ::2] * torch.zeros(1, dtype=x.dtype)
        return self.head(y.mean(1))


class MViTPooled(nn.Module):
    """MViT's last block: heads of all tokens but the first are pooled, which the head never sees.

    What the convolution gets are zeros, whose rows are folded by head.
    """

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embed, self.qkv = nn.Linear(3, width), nn.Linear(width, 3 * width)
        self.class_token = nn.Parameter(torch.randn(width))
        self.pool_q = nn.Conv1d(width // 2, width // 2, 3, padding=1, groups=width // 2)
        self.head = nn.Linear(width, 3)

    def forward(self, patches: Tensor) -> Tensor:
        x = self.embed(patches)
        x = torch.cat((self.class_token.expand(len(x), 1, -1), x), 1)
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        first, rest = q[:, :, :1], q[:, :, 1:]
        pooled = self.pool_q(rest.flatten(0, 1).mT).mT.unflatten(0, (len(x), 2))
        q = torch.cat((first, pooled), 2)
        y = ((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2)
        return self.head(y[:, 0])


class ConvNeXt(nn.Module):
    """Depthwise convolution, channels-last norm, layer scale, and a group norm without a bias."""

    def __init__(self, affine: bool, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 2, 2)
        self.dw = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm, self.pw = nn.LayerNorm(width), nn.Linear(width, width)
        self.gamma = nn.Parameter(torch.full((width,), 0.1))
        self.group = nn.GroupNorm(2, width)
        if not affine:
            self.group.register_parameter("bias", None)
        self.head = nn.Linear(width, 3)

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image.to(memory_format=torch.channels_last))
        y = self.pw(self.norm(self.dw(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        return self.head(self.group(x + self.gamma[:, None, None] * y).mean((2, 3)))


class ResNet(nn.Module):
    """A residual block; in training mode its norms couple samples."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 3)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(F.relu(self.norm(self.conv(image)), inplace=True).mean((2, 3)))


def _line(n: int) -> Batch:
    return {"image": torch.randn(n, 3, 6)}


def _line_of_8(n: int) -> Batch:
    return {"image": torch.randn(n, 3, 8)}


def _line_of_4(n: int) -> Batch:
    return {"image": torch.randn(n, 3, 4)}


def _square(n: int) -> Batch:
    return {"image": torch.randn(n, 3, 4, 4)}


def _patches(n: int) -> Batch:
    return {"patches": torch.randn(n, 4, 3)}


def _curved(model: nn.Module, batch: Batch) -> Tensor:
    return curved(model(*batch.values()))


def _cleared(model: nn.Module, batch: Batch) -> Tensor:
    model.biased.attention_bias_cache.clear()  # as timm does on `train()`
    return curved(model(*batch.values()))


def _of_first(model: nn.Module, batch: Batch) -> Tensor:
    return curved(model(*batch.values())[0])


def _detection(model: nn.Module, batch: Batch) -> Tensor:
    found = model(batch["image"])
    return curved(found["logits"]) + curved(found["boxes"])


_NORM = {"batch_dim": {"norm": 1}}  # inside, DETR is sequence-first

VISION = [
    Foreign("swin", Swin, _line_of_8, _curved),
    Foreign("torchvision_swin", partial(Swin, True), _line_of_8, _curved, everyday=True),
    Foreign("swin_v2", SwinV2, _patches, _curved, n=3, everyday=True),
    Foreign("swin_v2_7_samples", SwinV2, _patches, _curved, n=7),
    Foreign("beit", partial(Beit, True), _patches, _curved, everyday=True),
    Foreign("eva", partial(Beit, False), _patches, _curved, everyday=True),
    Foreign("maxvit", MaxViT, _line, _curved),
    Foreign("mvit", MViT, _patches, _curved),
    Foreign("mvit_pooled", MViTPooled, _patches, _curved),
    Foreign("detr", Detr, _line_of_4, _detection, options=_NORM, everyday=True),
    Foreign("detr_as_many_samples_as_queries", Detr, _line_of_4, _detection, n=5, options=_NORM),
    Foreign("open_clip", OpenClip, _line, _of_first, everyday=True),
    Foreign("open_clip_scaled", partial(OpenClip, True), _line, _of_first),
    Foreign("xcit", XCiT, _line, _curved),
    Foreign("levit_training", LeViT, _patches, _curved, training=True),
    Foreign("levit", LeViTAttention, _patches, _cleared),
    Foreign("resnet", ResNet, _square, _curved, everyday=True),
    Foreign("resnet_training", ResNet, _square, _curved, training=True, everyday=True),
    Foreign("convnext_channels_last", partial(ConvNeXt, True), _square, _curved),
    Foreign("group_norm_without_bias_channels_last", partial(ConvNeXt, False), _square, _curved),
]
