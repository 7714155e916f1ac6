"""Samplers for the normalisations of transformers, which is never imported here.

Its models write them out anew, each under a name of its own. What a weight is multiplied by depends
on where the code casts; whether one is added to the weight makes no difference to its gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ghost_core import Call, GradientSampler, PastCall, PerSampleGradient, Record
from ghost_layers.normalization import LayerNormSampler, Normalized, ScaleSampler
from ghost_layers.shapes import only_input
from ghost_layers.transformers.formula import FormulaChecked, Random
from ghost_layers.transformers.names import class_names


class LlamaRMSNormSampler(FormulaChecked, ScaleSampler):
    """Per-sample gradients of `weight * rms(x.float()).to(x.dtype)`."""

    parameters = ("weight",)

    def normalized(self, call: Call) -> Normalized:
        """Keep the input."""
        eps = _epsilon(call.module)
        return Normalized(only_input(call), lambda x: _divided_by_rms(x.float(), eps).to(x.dtype))


class GemmaRMSNormSampler(FormulaChecked, ScaleSampler):
    """Per-sample gradients of `((1 + weight) * rms(x.float())).to(x.dtype)`, or without the one."""

    parameters = ("weight",)

    def normalized(self, call: Call) -> Normalized:
        """Keep the input."""
        eps = _epsilon(call.module)
        return Normalized(only_input(call), lambda x: _divided_by_rms(x.float(), eps))


class T5LayerNormSampler(FormulaChecked, ScaleSampler):
    """Per-sample gradients of `weight * (x / rms).to(weight.dtype)`, cast only if that is half."""

    parameters = ("weight",)

    def normalized(self, call: Call) -> Normalized:
        """Keep the input."""
        eps, dtype = _epsilon(call.module), call.outputs[0].dtype
        return Normalized(
            only_input(call),
            lambda x: (x * torch.rsqrt(_mean_square(x.float()) + eps)).to(dtype),
        )


class CohereLayerNormSampler(FormulaChecked, ScaleSampler):
    """Per-sample gradients of a layer norm without bias, computed in float32 throughout."""

    parameters = ("weight",)

    def normalized(self, call: Call) -> Normalized:
        """Keep the input."""
        eps = _epsilon(call.module)
        return Normalized(only_input(call), lambda x: _divided_by_rms(_centred(x.float()), eps))


class ImageLayerNormSampler(FormulaChecked, LayerNormSampler):
    """Per-sample gradients of a layer norm over the channels of images, `[N, C, H, W]`.

    Some have a `data_format`, and may be set to images with the channels on the last axis.
    """

    def example(self, module: Any, random: Random) -> Tensor:
        """Return two images of 2 by 3 pixels."""
        image = random(*self.example_shape, 2, *module.weight.shape)
        return image.movedim(-1, 1) if _channels_first(module) else image

    def record(self, call: Call) -> Mapping[str, Record]:
        """Keep the input, and where its channels are."""
        call.static = _channels_first(call.module)
        return super().record(call)

    def normalized(self, call: Call) -> Normalized:
        """Keep the input, with channels on the last axis."""
        record = super().normalized(call)
        return record.replace(x=record.x.movedim(1, -1)) if call.static else record

    def gradients(
        self, call: PastCall, records: Mapping[str, Record], grads: Sequence[Tensor | None]
    ) -> Mapping[str, PerSampleGradient]:
        """Multiply the normalised input by the output gradient."""
        (grad,) = grads
        assert grad is not None
        return super().gradients(call, records, [grad.movedim(1, -1) if call.static else grad])


def _divided_by_rms(x: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(_mean_square(x) + eps)


def _mean_square(x: Tensor) -> Tensor:
    return x.pow(2).mean(-1, keepdim=True)


def _centred(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)


def _channels_first(module: Any) -> bool:
    return getattr(module, "data_format", "channels_first") == "channels_first"


def _epsilon(module: Any) -> float:
    eps: float = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
    return eps


_LLAMA = """
    aimv2.Aimv2RMSNorm apertus.ApertusRMSNorm arcee.ArceeRMSNorm aria.AriaTextRMSNorm
    axk1.AXK1RMSNorm axk2.AXK2RMSNorm bailing_hybrid.BailingHybridRMSNorm bamba.BambaRMSNorm
    bitnet.BitNetRMSNorm blt.BltRMSNorm chameleon.ChameleonRMSNorm clvp.ClvpRMSNorm
    cohere2_moe.Cohere2MoeRMSNorm cosmos3_edge.Cosmos3EdgeTextRMSNorm csm.CsmRMSNorm
    cwm.CwmRMSNorm deepseek_ocr2.DeepseekOcr2TextRMSNorm deepseek_ocr2.DeepseekOcr2VisionRMSNorm
    deepseek_v2.DeepseekV2RMSNorm deepseek_v3.DeepseekV3RMSNorm deepseek_v32.DeepseekV32RMSNorm
    deimv2.Deimv2RMSNorm dia.DiaRMSNorm diffllama.DiffLlamaRMSNorm doge.DogeRMSNorm
    dots1.Dots1RMSNorm dots3_note.Dots3NoteRMSNorm emu3.Emu3RMSNorm ernie4_5.Ernie4_5RMSNorm
    ernie4_5_moe.Ernie4_5_MoeRMSNorm ernie4_5_vl_moe.Ernie4_5_VLMoeRMSNorm
    eurobert.EuroBertRMSNorm evolla.EvollaRMSNorm exaone4.Exaone4RMSNorm
    exaone4_5.Exaone4_5_RMSNorm exaone_moe.ExaoneMoeRMSNorm falcon_h1.FalconH1RMSNorm
    falcon_mamba.FalconMambaRMSNorm glm.GlmRMSNorm glm4.Glm4RMSNorm glm4_moe.Glm4MoeRMSNorm
    glm4_moe_lite.Glm4MoeLiteRMSNorm glm4v.Glm4vRMSNorm glm4v_moe.Glm4vMoeRMSNorm
    glm4v_moe.Glm4vMoeTextRMSNorm glm5_next.Glm5NextRMSNorm glm5_next.Glm5NextTextRMSNorm
    glm_image.GlmImageRMSNorm glm_moe_dsa.GlmMoeDsaRMSNorm glm_ocr.GlmOcrRMSNorm
    granite.GraniteRMSNorm granite4_vision.Granite4VisionTextRMSNorm
    granite_docling.GraniteDoclingTextRMSNorm granite_swa.GraniteSWARMSNorm
    granitemoe.GraniteMoeRMSNorm granitemoe_swa.GraniteMoeSWARMSNorm
    granitemoehybrid.GraniteMoeHybridRMSNorm granitemoeshared.GraniteMoeSharedRMSNorm
    higgs_audio_v2.HiggsAudioV2RMSNorm hunyuan_v1_dense.HunYuanDenseV1RMSNorm
    hunyuan_v1_moe.HunYuanMoEV1RMSNorm hunyuan_vl.HunYuanVLRMSNorm hy_v3.HYV3RMSNorm
    hy_v4.HYV4RMSNorm hyperclovax.HyperCLOVAXRMSNorm idefics2.Idefics2RMSNorm
    idefics3.Idefics3RMSNorm inkling.InklingRMSNorm internvl.InternVLVisionRMSNorm
    jamba.JambaRMSNorm jetmoe.JetMoeRMSNorm kimi_linear.KimiLinearRMSNorm kolibri1.Kolibri1RMSNorm
    laguna.LagunaRMSNorm lfm2.Lfm2RMSNorm lfm2_moe.Lfm2MoeRMSNorm lfm3.Lfm3RMSNorm
    lfm3_vl.Lfm3VlVisionRMSNorm lighton_ocr.LightOnOcrRMSNorm llama.LlamaRMSNorm
    llama4.Llama4TextRMSNorm longcat_flash.LongcatFlashRMSNorm mamba.MambaRMSNorm
    mamba2.Mamba2RMSNorm mellum.MellumRMSNorm mimo_v2_flash.MiMoV2FlashRMSNorm
    minicpm3.MiniCPM3RMSNorm minimax.MiniMaxRMSNorm minimax_m2.MiniMaxM2RMSNorm
    ministral.MinistralRMSNorm ministral3.Ministral3RMSNorm mistral.MistralRMSNorm
    mistral3.Mistral3RMSNorm mistral4.Mistral4RMSNorm mistral_large4.MistralLarge4RMSNorm
    mixtral.MixtralRMSNorm mllama.MllamaTextRMSNorm molmo2.Molmo2RMSNorm
    muse_glimmer_assistant.MuseGlimmerAssistantRMSNorm neucodec.NeuCodecRMSNorm olmoe.OlmoeRMSNorm
    ovis2.Ovis2RMSNorm paddleocr_vl.PaddleOCRRMSNorm pe_audio.PeAudioEncoderRMSNorm
    pe_audio_video.PeAudioVideoEncoderRMSNorm pe_video.PeVideoEncoderRMSNorm phi3.Phi3RMSNorm
    phi4_multimodal.Phi4MultimodalRMSNorm pixtral.PixtralRMSNorm
    qianfan_ocr.QianfanOCRVisionRMSNorm qwen2.Qwen2RMSNorm qwen2_5_omni.Qwen2_5OmniRMSNorm
    qwen2_5_vl.Qwen2_5_VLRMSNorm qwen2_moe.Qwen2MoeRMSNorm qwen2_vl.Qwen2VLRMSNorm
    qwen3.Qwen3RMSNorm qwen3_moe.Qwen3MoeRMSNorm qwen3_omni_moe.Qwen3OmniMoeCode2WavRMSNorm
    qwen3_omni_moe.Qwen3OmniMoeRMSNorm qwen3_omni_moe.Qwen3OmniMoeTextRMSNorm
    qwen3_omni_moe.Qwen3OmniMoeThinkerTextRMSNorm qwen3_vl.Qwen3VLTextRMSNorm
    qwen3_vl_moe.Qwen3VLMoeTextRMSNorm sapiens2.Sapiens2RMSNorm seed_oss.SeedOssRMSNorm
    smollm3.SmolLM3RMSNorm solar_open.SolarOpenRMSNorm timesfm.TimesFmRMSNorm
    timesfm2_5.TimesFm2_5RMSNorm ultrabert.UltrabertRMSNorm ultravbert.UltraVBertRMSNorm
    unlimited_ocr.UnlimitedOcrTextRMSNorm vibevoice.VibeVoiceRMSNorm
    vibevoice_acoustic_tokenizer.VibeVoiceAcousticTokenizerRMSNorm
    vibevoice_asr.VibeVoiceAsrRMSNorm voxtral_realtime.VoxtralRealtimeRMSNorm
    xcodec2.Xcodec2RMSNorm youtu.YoutuRMSNorm zamba.ZambaRMSNorm zamba2.Zamba2RMSNorm
    zaya.ZayaRMSNorm
"""

_GEMMA = """
    afmoe.AfmoeRMSNorm beam.BeamRMSNorm deepseek_v4.DeepseekV4RMSNorm
    diffusion_gemma.DiffusionGemmaRMSNorm embedding_gemma2.EmbeddingGemma2RMSNorm
    flex_olmo.FlexOlmoRMSNorm flint.FlintRMSNorm gemma.GemmaRMSNorm gemma2.Gemma2RMSNorm
    gemma3.Gemma3RMSNorm gemma3n.Gemma3nRMSNorm gemma4.Gemma4RMSNorm
    gemma4_unified.Gemma4UnifiedRMSNorm gpt_oss.GptOssRMSNorm helium.HeliumRMSNorm
    inkling2.Inkling2RMSNorm kyutai_speech_to_text.KyutaiSpeechToTextRMSNorm
    minimax_m3_vl.MiniMaxM3VLRMSNorm moshi.MoshiRMSNorm muse_glimmer.MuseGlimmerRMSNorm
    muse_glimmer.MuseGlimmerTextCenteredRMSNorm muse_spark.MuseSparkRMSNorm
    muse_spark.MuseSparkTextCenteredRMSNorm nemotron_h.NemotronHRMSNorm
    nemotron_h_omni.NemotronH_Omni_RMSNorm neomme.NeoMMERMSNorm olmo2.Olmo2RMSNorm
    olmo3.Olmo3RMSNorm olmo_hybrid.OlmoHybridRMSNorm
    openai_privacy_filter.OpenAIPrivacyFilterRMSNorm qwen3_5.Qwen3_5RMSNorm
    qwen3_5_moe.Qwen3_5MoeRMSNorm qwen3_next.Qwen3NextRMSNorm
    recurrent_gemma.RecurrentGemmaRMSNorm step3p7.Step3p7RMSNorm t5gemma.T5GemmaRMSNorm
    t5gemma2.T5Gemma2RMSNorm vaultgemma.VaultGemmaRMSNorm
"""

_T5 = """
    idefics.IdeficsRMSNorm kosmos2_5.Kosmos2_5LayerNorm longt5.LongT5LayerNorm mt5.MT5LayerNorm
    pix2struct.Pix2StructLayerNorm pop2piano.Pop2PianoLayerNorm
    switch_transformers.SwitchTransformersLayerNorm t5.T5LayerNorm udop.UdopLayerNorm
    umt5.UMT5LayerNorm
"""

_COHERE = """
    cohere.CohereLayerNorm cohere2.Cohere2LayerNorm cohere2_moe.Cohere2MoeLayerNorm
    cohere_compass.CohereCompassLayerNorm
"""

_IMAGE = """
    convnext.ConvNextLayerNorm convnextv2.ConvNextV2LayerNorm
    deepseek_ocr2.DeepseekOcr2SamLayerNorm deepseek_vl_hybrid.DeepseekVLHybridLayerNorm
    dinov3_convnext.DINOv3ConvNextLayerNorm edgetam.EdgeTamLayerNorm
    edgetam_video.EdgeTamVideoLayerNorm eomt.EomtLayerNorm2d eomt_dinov3.EomtDinov3LayerNorm2d
    got_ocr2.GotOcr2LayerNorm lw_detr.LwDetrLayerNorm pp_formulanet.PPFormulaNetLayerNorm
    rf_detr.RfDetrLayerNorm sam.SamLayerNorm sam2.Sam2LayerNorm sam2_video.Sam2VideoLayerNorm
    sam3_tracker.Sam3TrackerLayerNorm sam3_tracker_video.Sam3TrackerVideoLayerNorm
    sam_hq.SamHQLayerNorm seggpt.SegGptLayerNorm slanext.SLANeXtLayerNorm
    unlimited_ocr.UnlimitedOcrSamLayerNorm videomt.VideomtLayerNorm2d
"""

TRANSFORMERS_NORMS: Mapping[str | type[nn.Module], type[GradientSampler]] = {
    **dict.fromkeys(class_names(_LLAMA), LlamaRMSNormSampler),
    **dict.fromkeys(class_names(_GEMMA), GemmaRMSNormSampler),
    **dict.fromkeys(class_names(_T5), T5LayerNormSampler),
    **dict.fromkeys(class_names(_COHERE), CohereLayerNormSampler),
    **dict.fromkeys(class_names(_IMAGE), ImageLayerNormSampler),
}
"""Samplers by dotted class name, for the classes whose code was compared, in transformers 5.23."""
