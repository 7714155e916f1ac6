"""Architectures of transformers on a device: in float64, with TF32, in half precision."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from tests.zoo import FAMILIES, Case, compare
from tests.zoo.compare import held_gradients
from tests.zoo.modes import MODES, compare_mode
from torch import Tensor

from ghost_core.testing import per_sample_gradients
from ghost_core.testing.oracle import norms

EVERYWHERE = os.environ.get("GHOST_TEST_DEVICE", "cpu") != "cpu"
REFUSED = {"clip", "clip_logits"}
LORA = pytest.param(
    "llama_lora", marks=pytest.mark.skipif(find_spec("peft") is None, reason="peft is not there")
)
NAMES = (
    [LORA if name == "llama_lora" else name for name in FAMILIES if name not in REFUSED]
    if EVERYWHERE
    else ["gpt2", "llama"]
)
SOME = ["gpt2", "llama", "bert", "vit"] if EVERYWHERE else ["gpt2"]
UNSELECTED = {("mixtral_but_experts", "concatenated")}
NO_WORSE = 1.2
"""How far off ghost may be as a multiple of autograd, in the same dtype and with the same TF32."""


def moved(case: Case, device: torch.device) -> Case:
    """Return a case on a device."""
    batch = {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in case.batch.items()
    }
    return replace(case, model=case.model.to(device), batch=batch)


@pytest.mark.parametrize("frozen", [False, True], ids=["training", "frozen"])
@pytest.mark.parametrize("name", NAMES)
def test_every_parameter(name: str, frozen: bool, device: torch.device) -> None:
    compare(moved(FAMILIES[name].case(4), device), frozen=frozen)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_every_mode(name: str, mode: str, device: torch.device) -> None:
    if (name, mode) in UNSELECTED:
        pytest.skip("refused on any device: the engine would have to make all gradients")
    compare_mode(moved(FAMILIES[name].case(6), device), mode)


@contextmanager
def multiplying_in(precision: str) -> Iterator[None]:
    """Let matrix products of CUDA be computed in TF32 or not."""
    kept = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = precision
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = kept


@pytest.mark.parametrize(
    ("dtype", "precision"),
    [
        (torch.float32, "ieee"),
        (torch.float32, "tf32"),
        (torch.bfloat16, "ieee"),
    ],
    ids=["float32", "TF32", "bfloat16"],
)
@pytest.mark.parametrize("name", SOME)
def test_no_further_off_than_autograd(
    name: str, dtype: torch.dtype, precision: str, device: torch.device
) -> None:
    with multiplying_in(precision):
        case = moved(FAMILIES[name].case(4, dtype=dtype), device)
        rounded = per_sample_gradients(case.model, case.losses())
        held = held_gradients(case)
    batch = {
        key: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in case.batch.items()
    }
    wide = replace(case, model=case.model.double(), batch=batch)
    expected = per_sample_gradients(wide.model, wide.losses())
    floor = 1e-6 * torch.stack([norms(each) for each in expected.values()]).norm(dim=0)
    assert (distance(held, expected) <= NO_WORSE * distance(rounded, expected) + floor).all()


def distance(gradients: dict[str, Tensor], others: dict[str, Tensor]) -> Tensor:
    """Return the norms of the differences over all parameters, `[N]`."""
    each = [norms(gradients[name].double() - others[name].double()) for name in others]
    return torch.stack(each).norm(dim=0)
