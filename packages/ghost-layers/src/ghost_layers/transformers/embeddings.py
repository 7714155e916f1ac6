"""Samplers for the embeddings of transformers, which is never imported here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ghost_core import GradientSampler
from ghost_core.algebra import accumulation_dtype
from ghost_layers.embedding import EmbeddingSampler
from ghost_layers.transformers.formula import FormulaChecked, Random
from ghost_layers.transformers.names import class_names


class ScaledEmbeddingSampler(FormulaChecked, EmbeddingSampler):
    """Per-sample gradients of `Embedding(index) * embed_scale`."""

    def shrink(self, module: Any) -> None:
        """Leave the copy a table of 4 by 5, or smaller, with the padding in its first row."""
        module._parameters["weight"] = module.weight[:4, :5]
        if module.padding_idx is not None:
            module.padding_idx = 0

    def example(self, module: Any, random: Random) -> Tensor:
        """Return indices `[2, 3]` that differ between samples."""
        index = torch.arange(6, device=module.weight.device) % len(module.weight)
        return index.reshape(self.example_shape)

    def token_weight(self, module: Any, index: Tensor, output: Tensor) -> Tensor:
        """Return the scale, zero for padding; `[N, T]`."""
        kept = super().token_weight(module, index, output)
        weight = torch.ones_like(index, dtype=accumulation_dtype(output))
        scale = module.embed_scale
        if isinstance(scale, Tensor):
            scale = scale.to(output.dtype)  # the forward rounds a buffer, but not a number
        weight *= scale
        return weight if kept is None else weight * kept


TRANSFORMERS_EMBEDDINGS: Mapping[str | type[nn.Module], type[GradientSampler]] = dict.fromkeys(
    class_names("""
        bart.BartScaledWordEmbedding bigbird_pegasus.BigBirdPegasusScaledWordEmbedding
        biogpt.BioGptScaledWordEmbedding blenderbot.BlenderbotScaledWordEmbedding
        diffusion_gemma.DiffusionGemmaTextScaledWordEmbedding
        embedding_gemma2.EmbeddingGemma2TextScaledWordEmbedding gemma.GemmaTextScaledWordEmbedding
        gemma2.Gemma2TextScaledWordEmbedding gemma3.Gemma3TextScaledWordEmbedding
        gemma3n.Gemma3nTextScaledWordEmbedding gemma4.Gemma4TextScaledWordEmbedding
        gemma4_unified.Gemma4UnifiedTextScaledWordEmbedding m2m_100.M2M100ScaledWordEmbedding
        mbart.MBartScaledWordEmbedding minicpm3.MiniCPM3ScaledWordEmbedding
        nllb_moe.NllbMoeScaledWordEmbedding pegasus_x.PegasusXScaledWordEmbedding
        plbart.PLBartScaledWordEmbedding pp_formulanet.PPFormulaNetScaledWordEmbedding
        seamless_m4t.SeamlessM4TScaledWordEmbedding
        seamless_m4t_v2.SeamlessM4Tv2ScaledWordEmbedding trocr.TrOCRScaledWordEmbedding
        vaultgemma.VaultGemmaTextScaledWordEmbedding xglm.XGLMScaledWordEmbedding
    """),
    ScaledEmbeddingSampler,
)
"""Samplers by dotted class name, for the classes whose code was compared, in transformers 5.23."""
