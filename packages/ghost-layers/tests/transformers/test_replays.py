from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ghost_core import SamplerRegistry
from ghost_core.testing import GradientHolder, assert_within, per_sample_gradients
from ghost_core.tracking import Claim, dotted_name
from ghost_layers.plugin import ghost_samplers
from ghost_layers.replay import Way
from ghost_layers.transformers import TRANSFORMERS_REPLAYS

transformers = pytest.importorskip("transformers")

MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
T5: dict[str, Any] = {
    "vocab_size": 11,
    "d_model": 8,
    "d_kv": 4,
    "d_ff": 8,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 2,
    "relative_attention_num_buckets": 8,
    "decoder_start_token_id": 0,
}
SWITCH = {"num_experts": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}
LONG = {"local_radius": 2, "global_block_size": 3}
STACKS = {
    "T5": {},
    "MT5": {},
    "UMT5": {},
    "LongT5": {"encoder_attention_type": "local", **LONG},
    "SwitchTransformers": SWITCH,
}
SHARED = {"hidden_size": 8, "intermediate_size": 16, "vocab_size": 11, "num_attention_heads": 2}
ONE = {"mamba_d_state": 4, "mamba_dt_rank": 2, "n_mamba_heads": 2}
TWO = {
    "mamba_n_heads": 4,
    "mamba_d_head": 4,
    "mamba_n_groups": 2,
    "mamba_d_state": 4,
    "mamba_chunk_size": 4,
    "mamba_d_ssm": 16,
}
OTHER_TWO = {
    "mamba_d_state": 4,
    "mamba_ngroups": 2,
    "n_mamba_heads": 4,
    "mamba_headdim": 4,
    "chunk_size": 4,
}
OWN_TWO = {"state_size": 4, "num_heads": 4, "head_dim": 4, "n_groups": 2, "chunk_size": 4}
DELTA = {
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 4,
    "head_dim": 4,
}
NEMOTRON = {
    "mamba_num_heads": 4,
    "mamba_head_dim": 4,
    "n_groups": 2,
    "ssm_state_size": 4,
    "chunk_size": 4,
}
MIXERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bamba.BambaMixer": ("Bamba", TWO),
    "granitemoehybrid.GraniteMoeHybridMambaLayer": ("GraniteMoeHybrid", TWO),
    "jamba.JambaMambaMixer": ("Jamba", ONE),
    "mamba.MambaMixer": ("Mamba", {"state_size": 4, "time_step_rank": 2}),
    "mamba2.Mamba2Mixer": ("Mamba2", OWN_TWO),
    "nemotron_h.NemotronHMamba2Mixer": ("NemotronH", NEMOTRON),
    "olmo_hybrid.OlmoHybridGatedDeltaNet": ("OlmoHybrid", DELTA),
    "qwen3_5.Qwen3_5GatedDeltaNet": ("Qwen3_5Text", DELTA),
    "qwen3_5_moe.Qwen3_5MoeGatedDeltaNet": ("Qwen3_5MoeText", DELTA),
    "qwen3_next.Qwen3NextGatedDeltaNet": ("Qwen3Next", DELTA),
    "qwen4_exp.Qwen4ExpTextGatedDeltaNet": ("Qwen4ExpText", DELTA),
    "zamba.ZambaMambaMixer": ("Zamba", ONE),
    "zamba2.Zamba2MambaMixer": ("Zamba2", OTHER_TWO),
}


ALIKE = {
    "bamba.BambaMixer",  # mamba2.Mamba2Mixer, as the next two
    "granitemoehybrid.GraniteMoeHybridMambaLayer",
    "zamba2.Zamba2MambaMixer",
    "qwen3_5.Qwen3_5GatedDeltaNet",  # olmo_hybrid.OlmoHybridGatedDeltaNet, as the next two
    "qwen3_5_moe.Qwen3_5MoeGatedDeltaNet",
    "qwen4_exp.Qwen4ExpTextGatedDeltaNet",
}
"""Mixers that another one of the default tests stands for."""


def but(names: Iterable[str], others: set[str]) -> list[object]:
    """Leave others of the names to the stress tests."""
    return [
        pytest.param(name, marks=pytest.mark.stress if name in others else ()) for name in names
    ]


MODELS: dict[str, dict[str, Any]] = {
    "FalconH1": TWO | {"num_key_value_heads": 1, "head_dim": 4},
    "FalconMamba": {"state_size": 4, "time_step_rank": 2},
}
"""Models whose mixers cannot be made by themselves."""


def registry() -> SamplerRegistry:
    offered = {
        kind if isinstance(kind, str) else dotted_name(kind): sampler
        for kind, sampler in (ghost_samplers() | TRANSFORMERS_REPLAYS).items()
    }
    return SamplerRegistry(Claim(kind, sampler, "test") for kind, sampler in offered.items())


def losses(output: Tensor) -> Tensor:
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
    return (weights * output.sin()).flatten(1).sum(1)


def check(
    model: nn.Module,
    layers: str,
    *inputs: Tensor,
    attach: Callable[[GradientHolder], Any] = lambda engine: engine,
    **options: Any,
) -> GradientHolder:
    torch.manual_seed(1)
    expected = per_sample_gradients(model, losses(model(*inputs, **options)))
    engine = GradientHolder(model, registry=registry(), layers=layers)
    torch.manual_seed(1)
    with attach(engine), engine.batch(range(3)) as batch:
        losses(model(*inputs, **options)).sum().backward()
    for name, held in batch.result.materialize().items():
        assert expected[name].any()
        assert_within(held, expected[name], expected[name].norm(), what=name)
    return engine


class Returns(nn.Module):
    """Returns one tensor of what a model returns."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor, **options: Any) -> Tensor:
        output = self.model(*inputs, **options)
        if isinstance(output, Tensor):
            return output
        return getattr(output, "logits", output[0])


def made(model: str, options: dict[str, Any], kind: str) -> nn.Module:
    """Make a tiny model or skip, with all parameters away from their initial values."""
    try:
        config, of_kind = getattr(transformers, f"{model}Config"), getattr(transformers, kind)
    except AttributeError:
        pytest.skip(f"this version of transformers has no {kind}")
    return shaken(of_kind(config(**options)))


def shaken(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        parameter.data.copy_(0.3 * torch.randn_like(parameter))
    return module.double()


@pytest.mark.parametrize("training", [pytest.param(False, marks=pytest.mark.stress), True])
@pytest.mark.parametrize("model", but(STACKS, {"MT5"}))  # as T5
def test_biases_of_encoders_and_decoders(model: str, training: bool, ways: list[Way]) -> None:
    kind = f"{model}ForConditionalGeneration"
    whole = Returns(made(model, T5 | STACKS[model], kind)).train(training)
    tokens, labels = torch.randint(1, 11, (3, 5)), torch.randint(1, 11, (3, 4))
    options = {"attention_mask": MASK, "decoder_input_ids": labels, "use_cache": False}
    engine = check(whole, "*relative_attention_bias*", tokens, **options)
    assert len(engine.parameters) == (4 if model == "UMT5" else 2)
    assert not ways  # followed: nothing runs again


def test_biases_without_masks_in_a_frozen_pass(ways: list[Way]) -> None:
    whole = Returns(made("T5", T5, "T5ForConditionalGeneration"))
    tokens, labels = torch.randint(1, 11, (3, 5)), torch.randint(1, 11, (3, 4))
    options = {"decoder_input_ids": labels, "use_cache": False}
    check(whole, "*relative*", tokens, attach=GradientHolder.frozen, **options)
    assert not ways


def test_biases_of_global_attention() -> None:
    options = {"encoder_attention_type": "transient-global", **LONG}
    whole = Returns(made("LongT5", T5 | options, "LongT5EncoderModel"))
    engine = check(whole, "*relative*", torch.randint(1, 11, (3, 5)), attention_mask=MASK)
    assert len(engine.parameters) == 2


def test_all_of_t5_with_a_cache() -> None:
    whole = Returns(made("T5", T5, "T5ForConditionalGeneration"))
    tokens, labels = torch.randint(1, 11, (3, 5)), torch.randint(1, 11, (3, 4))
    check(whole, "*", tokens, attention_mask=MASK, decoder_input_ids=labels)


@pytest.mark.parametrize("training", [False, True])
def test_biases_of_mpnet(training: bool) -> None:
    options = SHARED | {"num_hidden_layers": 2, "max_position_embeddings": 12}
    whole = Returns(made("MPNet", options, "MPNetModel")).train(training)
    check(whole, "*relative*", torch.randint(2, 11, (3, 5)), attention_mask=MASK)


class Mixes(nn.Module):
    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.linear, self.mixer = nn.Linear(8, 8), mixer

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        output = self.mixer(self.linear(x), attention_mask=mask)
        return output if isinstance(output, Tensor) else output[0]


@pytest.mark.parametrize("training", [pytest.param(False, marks=pytest.mark.stress), True])
@pytest.mark.parametrize("name", but(MIXERS, ALIKE))
def test_mixers(name: str, training: bool) -> None:
    file, _, kind = name.partition(".")
    config, options = MIXERS[name]
    module = f"transformers.models.{file}.modeling_{file}"
    try:
        of_kind = getattr(import_module(module), kind)
        given = getattr(transformers, f"{config}Config")(**SHARED, **options)
    except (ImportError, AttributeError):
        pytest.skip(f"this version of transformers has no {name}")
    mixer = shaken(of_kind(given, layer_idx=0)).train(training)
    own = TRANSFORMERS_REPLAYS[f"{module}.{kind}"]().owns(mixer)
    layers = ",".join(f"mixer.{each}" for each in own)
    assert "mixer.conv1d.weight" in layers
    inputs = torch.randn(3, 5, 8, dtype=torch.float64)
    check(Mixes(mixer).double(), f"{layers},linear", inputs, MASK)


@pytest.mark.parametrize("name", MODELS)
def test_mixers_of_models(name: str) -> None:
    options = SHARED | MODELS[name] | {"num_hidden_layers": 1, "pad_token_id": 0}
    model = Returns(made(name, options, f"{name}ForCausalLM"))
    tokens = torch.randint(1, 11, (3, 5))
    check(
        model,
        f"*conv1d*,*dt_{'bias' if name == 'FalconH1' else 'proj*'},*A_log,*D",
        tokens,
        attention_mask=MASK,
        use_cache=False,
    )


class Given(nn.Module):
    """Gives a model its inputs by name."""

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        self.model, self.name = model, name

    def forward(self, inputs: Tensor, labels: Tensor) -> Tensor:
        options = {self.name: inputs, "decoder_input_ids": labels, "use_cache": False}
        logits: Tensor = self.model(**options).logits
        return logits


def test_biases_of_models_for_images_and_sound() -> None:
    labels = torch.randint(1, 11, (3, 4))
    sound = made("Pop2Piano", T5, "Pop2PianoForConditionalGeneration")
    inputs = torch.randn(3, 5, 8, dtype=torch.float64)
    check(Given(sound, "inputs_embeds"), "*relative*", inputs, labels)
    text = {"hidden_size": 8, "decoder_start_token_id": 0, **T5}
    vision = {"hidden_size": 8, "patch_embed_hidden_size": 8, "d_ff": 8, "d_kv": 4}
    vision |= {"num_hidden_layers": 1, "num_attention_heads": 2}
    options = {"text_config": text, "vision_config": vision}
    images = made("Pix2Struct", options, "Pix2StructForConditionalGeneration")
    patches = torch.rand(3, 4, 10, dtype=torch.float64) + 1  # row and column first
    check(Given(images, "flattened_patches"), "*relative*", patches, labels)
