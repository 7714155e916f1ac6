"""Registers the samplers of this package. The table says which one handles which layer."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ghost_core import GradientSampler, hookimpl
from ghost_layers.attention import MultiheadAttentionSampler
from ghost_layers.convolution import ConvolutionSampler
from ghost_layers.embedding import EmbeddingBagSampler, EmbeddingSampler
from ghost_layers.linear import Conv1DSampler, FalconLinearSampler, LinearSampler
from ghost_layers.normalization import (
    BatchNormSampler,
    GroupNormSampler,
    InstanceNormSampler,
    LayerNormSampler,
    RMSNormSampler,
)
from ghost_layers.recurrent import RecurrentCellSampler, RecurrentSampler
from ghost_layers.replay import GenericSampler
from ghost_layers.timm import TIMM
from ghost_layers.transformers import (
    TRANSFORMERS_EMBEDDINGS,
    TRANSFORMERS_NORMS,
    TRANSFORMERS_REPLAYS,
)


@hookimpl
def ghost_samplers() -> Mapping[str | type[nn.Module], type[GradientSampler]]:
    """Offer a sampler for every layer that this package knows."""
    return {
        # linear.py
        nn.Linear: LinearSampler,
        "transformers.pytorch_utils.Conv1D": Conv1DSampler,
        "transformers.models.falcon.modeling_falcon.FalconLinear": FalconLinearSampler,
        # convolution.py
        nn.Conv1d: ConvolutionSampler,
        nn.Conv2d: ConvolutionSampler,
        nn.Conv3d: ConvolutionSampler,
        # embedding.py
        nn.Embedding: EmbeddingSampler,
        nn.EmbeddingBag: EmbeddingBagSampler,
        # normalization.py
        nn.LayerNorm: LayerNormSampler,
        nn.RMSNorm: RMSNormSampler,
        nn.GroupNorm: GroupNormSampler,
        nn.InstanceNorm1d: InstanceNormSampler,
        nn.InstanceNorm2d: InstanceNormSampler,
        nn.InstanceNorm3d: InstanceNormSampler,
        nn.BatchNorm1d: BatchNormSampler,
        nn.BatchNorm2d: BatchNormSampler,
        nn.BatchNorm3d: BatchNormSampler,
        nn.SyncBatchNorm: BatchNormSampler,
        # attention.py
        nn.MultiheadAttention: MultiheadAttentionSampler,
        # recurrent.py
        nn.RNN: RecurrentSampler,
        nn.LSTM: RecurrentSampler,
        nn.GRU: RecurrentSampler,
        nn.RNNCell: RecurrentCellSampler,
        nn.LSTMCell: RecurrentCellSampler,
        nn.GRUCell: RecurrentCellSampler,
        # transformers/
        **TRANSFORMERS_EMBEDDINGS,  # Embedding(index) * embed_scale
        **TRANSFORMERS_NORMS,  # root-mean-square norms and bias-free layer norms
        **TRANSFORMERS_REPLAYS,  # Mamba's mixers and MPNet's relative biases
        **TIMM,  # norms, layer scales and standardised convolutions
        # replay/: whatever nothing else is for
        nn.Module: GenericSampler,
    }
