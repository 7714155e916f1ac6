"""Samplers for the layers of torch.nn and transformers.

`ghost_layers.plugin` says which sampler handles which layer. What is exported here is for samplers
of related layers.
"""

from ghost_layers.attention import MultiheadAttentionSampler
from ghost_layers.convolution import ConvolutionSampler, Geometry, Patches
from ghost_layers.embedding import EmbeddingBagSampler, EmbeddingSampler
from ghost_layers.linear import Conv1DSampler, FalconLinearSampler, LinearSampler
from ghost_layers.normalization import (
    BatchNormSampler,
    ChannelScaleSampler,
    GroupNormSampler,
    InstanceNormSampler,
    LayerNormSampler,
    Normalized,
    RMSNormSampler,
    ScaleSampler,
    Standardized,
)
from ghost_layers.recurrent import RecurrentCellSampler, RecurrentSampler
from ghost_layers.replay import GenericSampler, ReplaySampler

__all__ = [
    "BatchNormSampler",
    "ChannelScaleSampler",
    "Conv1DSampler",
    "ConvolutionSampler",
    "EmbeddingBagSampler",
    "EmbeddingSampler",
    "FalconLinearSampler",
    "GenericSampler",
    "Geometry",
    "GroupNormSampler",
    "InstanceNormSampler",
    "LayerNormSampler",
    "LinearSampler",
    "MultiheadAttentionSampler",
    "Normalized",
    "Patches",
    "RMSNormSampler",
    "RecurrentCellSampler",
    "RecurrentSampler",
    "ReplaySampler",
    "ScaleSampler",
    "Standardized",
]
