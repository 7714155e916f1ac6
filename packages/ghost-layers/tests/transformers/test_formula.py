from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from ghost_core import SamplerRegistry, UnsupportedLayerError
from ghost_core.testing import GradientHolder
from ghost_core.tracking import Found, Refused, dotted_name
from ghost_layers.plugin import ghost_samplers
from ghost_layers.replay import ReplaySampler
from ghost_layers.transformers import formula

LLAMA = "transformers.models.llama.modeling_llama.LlamaRMSNorm"
BART = "transformers.models.bart.modeling_bart.BartScaledWordEmbedding"
CONVNEXT = "transformers.models.convnext.modeling_convnext.ConvNextLayerNorm"
COHERE = "transformers.models.cohere.modeling_cohere.CohereLayerNorm"
GEMMA = "transformers.models.gemma.modeling_gemma.GemmaRMSNorm"
T5 = "transformers.models.t5.modeling_t5.T5LayerNorm"
CONV1D = "transformers.pytorch_utils.Conv1D"
FALCON = "transformers.models.falcon.modeling_falcon.FalconLinear"

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


class Norm(nn.Module):
    calls = 0

    def __init__(self, features: int = 6, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(features))
        self.eps = eps
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        type(self).calls += 1
        self.seen += 1
        return self.scale() * self.normalized(x.float()).to(x.dtype)

    def scale(self) -> Tensor:
        return self.weight

    def normalized(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


class Exponential(Norm):
    """The gradient at the weight that it starts with is the expected one."""

    def scale(self) -> Tensor:
        return self.weight.exp()


class EpsilonOutside(Norm):
    def normalized(self, x: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True).sqrt() + self.eps)


class Centred(Norm):
    def normalized(self, x: Tensor) -> Tensor:
        return super().normalized(x - x.mean(-1, keepdim=True))


class Gated(Norm):
    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) * gate


class RootScaled(nn.Embedding):
    embed_scale = 2.0

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.embed_scale**0.5


class Flipped(nn.LayerNorm):
    data_format = "channels_last"

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).flip(1)


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class DoubledTransposed(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(inputs, outputs)), None

    def forward(self, input: Tensor) -> Tensor:
        return 2 * input @ self.weight


def called(kind: type[nn.Module], name: str) -> type[nn.Module]:
    """Return a new class that goes by another one's name."""
    module, _, local = name.rpartition(".")
    return type(local, (kind,), {"__module__": module, "__qualname__": local})


def genuine(name: str) -> nn.Module:
    pytest.importorskip("transformers")
    module, _, local = name.rpartition(".")
    kind = getattr(pytest.importorskip(module), local)
    made = {
        BART: lambda: kind(9, 3, 1, embed_scale=1.7),
        CONV1D: lambda: kind(7, 9),
        FALCON: lambda: kind(9, 7),
    }
    result: nn.Module = made.get(name, lambda: kind(6))()
    return result


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (Exponential, LLAMA),
        (EpsilonOutside, LLAMA),
        (Centred, GEMMA),
        (Exponential, T5),
        (Norm, COHERE),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_with_another_formula_is_refused(
    registry: SamplerRegistry, kind: type[nn.Module], name: str, dtype: torch.dtype
) -> None:
    if kind is EpsilonOutside and dtype == torch.float16:
        pytest.skip("float16 cannot hold the inputs that would show it")
    module = called(kind, name)().to(dtype)
    assert "differ from autograd's by" in str(registry.find(module))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [(BART, (9, 3)), (BART, (9, 3, 2)), (CONVNEXT, (6,)), (FALCON, (9, 7)), (CONV1D, (9, 7))],
    ids=str,
)
def test_other_layer_with_another_formula_is_refused(
    registry: SamplerRegistry, name: str, arguments: tuple[int, ...]
) -> None:
    kinds = {BART: RootScaled, CONVNEXT: Flipped, CONV1D: DoubledTransposed}
    kind: Any = called(kinds.get(name, Doubled), name)
    module = kind(*arguments)
    assert "differ from autograd's by" in str(registry.find(module))


def test_message_names_class_reason_and_remedy(registry: SamplerRegistry) -> None:
    model = nn.Sequential(called(Exponential, LLAMA)())
    with pytest.raises(UnsupportedLayerError) as caught:
        GradientHolder(model, registry=registry)
    message = str(caught.value)
    assert f"{LLAMA} does not compute the formula that LlamaRMSNormSampler" in message
    assert "gradients on a tiny input differ from autograd's by" in message
    assert "use a version of its library where it does, exclude the layer" in message


def test_other_arguments_are_refused(registry: SamplerRegistry) -> None:
    found = str(registry.find(called(Gated, LLAMA)()))
    assert "(TypeError on a tiny input: " in found
    assert "exclude the layer" in found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [LLAMA, GEMMA, T5, COHERE, CONVNEXT, BART, CONV1D, FALCON])
def test_genuine_classes_pass(registry: SamplerRegistry, name: str, dtype: torch.dtype) -> None:
    module = genuine(name).to(dtype).requires_grad_(False)
    for ambient in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        formula._findings.clear()
        with ambient(), torch.autocast("cpu", torch.bfloat16):
            assert isinstance(registry.find(module), Found)


@pytest.mark.stress  # imports the models of all families
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_listed_norm_passes_in_every_dtype(
    registry: SamplerRegistry, dtype: torch.dtype
) -> None:
    from ghost_layers.transformers import TRANSFORMERS_NORMS

    pytest.importorskip("transformers")
    refused = {}
    for name in TRANSFORMERS_NORMS:
        module, _, local = name.rpartition(".")
        try:
            kind = getattr(__import__(module, fromlist=[local]), local)
        except (ImportError, AttributeError):
            continue
        eps = {"eps": 1e-6} if "eps" in kind.__init__.__code__.co_varnames else {}
        found = registry.find(kind(6, **eps).to(dtype))
        if isinstance(found, Refused):
            refused[name] = found.reason
    assert not refused


def test_check_leaves_no_trace(registry: SamplerRegistry) -> None:
    module = called(Norm, LLAMA)().train()
    module.weight.requires_grad_(False)
    weight, buffer, fired = module.weight, module.seen, []
    weight.grad = torch.ones_like(weight)
    before = weight.clone(), weight.grad.clone(), set(vars(module)), torch.get_rng_state()
    module.register_forward_hook(lambda *_: fired.append("forward"))
    module.register_forward_pre_hook(lambda *_: fired.append("before"))
    module.register_full_backward_hook(lambda *_: fired.append("backward"))
    everywhere = nn.modules.module.register_module_forward_hook(lambda *_: fired.append("global"))
    try:
        assert isinstance(registry.find(module), Found)
    finally:
        everywhere.remove()
    assert type(module).calls == 1
    assert not fired
    assert module.weight is weight
    assert module.seen is buffer
    assert buffer == 0
    assert not weight.requires_grad
    assert module.training
    assert weight.grad is not None
    assert torch.equal(weight, before[0])
    assert torch.equal(weight.grad, before[1])
    assert set(vars(module)) == before[2]
    assert torch.equal(torch.get_rng_state(), before[3])


def test_check_runs_once_per_class_and_configuration(registry: SamplerRegistry) -> None:
    kind: Any = called(Norm, LLAMA)
    for features in (6, 6, 8):
        assert isinstance(registry.find(kind(features)), Found)
    assert kind.calls == 1
    registry.find(kind(eps=1e-5))
    registry.find(kind().double())
    assert kind.calls == 3
    for n in range(2 * formula._CONFIGURATIONS):
        registry.find(kind(eps=float(n + 1)))
    assert len(formula._findings[kind]) <= formula._CONFIGURATIONS


def test_neither_module_nor_class_is_kept(registry: SamplerRegistry) -> None:
    kind: Any = called(Norm, LLAMA)
    module = kind()
    registry.find(module)
    left, left_kind = weakref.ref(module), weakref.ref(kind)
    del module, kind
    gc.collect()
    assert left() is None
    assert left_kind() is None


def test_module_without_data_is_not_checked(registry: SamplerRegistry) -> None:
    kind: Any = called(Norm, LLAMA)
    assert isinstance(registry.find(kind().to("meta")), Found)
    assert kind.calls == 0


def test_large_tables_are_cut_down(
    registry: SamplerRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = []
    lookup = functional.embedding

    def recorded(index: Tensor, weight: Tensor, *args: Any) -> Tensor:
        shapes.append(tuple(weight.shape))
        return lookup(index, weight, *args)

    monkeypatch.setattr(functional, "embedding", recorded)
    registry.find(called(RootScaled, BART)(1000, 300, 999))
    assert shapes == [(4, 5)]


def test_claims_by_name_of_a_known_formula_are_checked() -> None:
    by_name = {
        name: sampler
        for name, sampler in ghost_samplers().items()
        if isinstance(name, str) and not issubclass(sampler, ReplaySampler)  # proven in each call
    }
    assert dotted_name(called(Norm, LLAMA)) in by_name
    assert all(issubclass(sampler, formula.FormulaChecked) for sampler in by_name.values())
