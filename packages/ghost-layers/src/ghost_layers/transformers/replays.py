"""Samplers that run modules of transformers again, which is never imported here.

These modules use parameters of modules inside in other ways than by calling these, or write what
they look up for all samples into values of samples. What is added to these, as in T5, is followed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import nn

from ghost_core import GradientSampler
from ghost_core.sampler import own_parameters
from ghost_layers.replay import ReplaySampler
from ghost_layers.transformers.names import class_names


class EncoderBiasSampler(ReplaySampler):
    """Per-sample gradients of the relative position biases of MPNet's encoder."""

    parameters: ClassVar[tuple[str, ...]] = ("relative_attention_bias.weight",)


class MixerSampler(ReplaySampler):
    """Per-sample gradients of a Mamba mixer, or a gated delta net (arXiv:2312.00752, 2412.06464).

    It takes the weights of its convolution and of its time steps' projection from the modules that
    have them, without calling these.
    """

    inside: ClassVar[tuple[str, ...]] = (
        "conv1d.weight",
        "conv1d.bias",
        "dt_proj.weight",
        "dt_proj.bias",
    )

    def owns(self, module: nn.Module) -> tuple[str, ...]:
        """Return the module's own parameters and those that it takes from modules inside."""
        present = {name for name, _ in module.named_parameters(remove_duplicate=False)}
        return (*own_parameters(module), *(name for name in self.inside if name in present))


TRANSFORMERS_REPLAYS: Mapping[str | type[nn.Module], type[GradientSampler]] = {
    **dict.fromkeys(class_names("mpnet.MPNetEncoder"), EncoderBiasSampler),
    **dict.fromkeys(
        class_names("""
            bamba.BambaMixer falcon_h1.FalconH1Mixer falcon_mamba.FalconMambaMixer
            granitemoehybrid.GraniteMoeHybridMambaLayer jamba.JambaMambaMixer mamba.MambaMixer
            mamba2.Mamba2Mixer nemotron_h.NemotronHMamba2Mixer olmo_hybrid.OlmoHybridGatedDeltaNet
            qwen3_5.Qwen3_5GatedDeltaNet qwen3_5_moe.Qwen3_5MoeGatedDeltaNet
            qwen3_next.Qwen3NextGatedDeltaNet qwen4_exp.Qwen4ExpTextGatedDeltaNet
            zamba.ZambaMambaMixer zamba2.Zamba2MambaMixer
        """),
        MixerSampler,
    ),
}
"""Samplers by dotted class name, for the classes whose code was read, in transformers 5.23."""
