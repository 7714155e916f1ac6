"""Precision of whatever ghost computes, and the user's settings around it."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from ghost_core.algebra import (
    accumulation_dtype,
    building_at_most,
    chunks,
    full_precision,
    precisely,
)
from ghost_core.process import exact_products

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ([torch.bfloat16], torch.float32),
        ([torch.float16, torch.bfloat16], torch.float32),
        ([torch.float32, torch.float64], torch.float64),
        ([], torch.float32),
    ],
)
def test_accumulation_is_float32_or_float64(
    dtypes: list[torch.dtype], expected: torch.dtype
) -> None:
    assert accumulation_dtype(*(torch.zeros(1, dtype=dtype) for dtype in dtypes)) == expected


def test_autocast_and_gradients_are_off_inside() -> None:
    x = torch.ones(2, 2, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        with full_precision(CPU):
            product = x @ x
        assert (x @ x).dtype == torch.bfloat16
    assert product.dtype == torch.float32
    assert not product.requires_grad


@pytest.mark.parametrize("gradients", [True, False])
def test_a_function_is_called_without_autocast_and_gradients(gradients: bool) -> None:
    x = torch.ones(2, 2, requires_grad=True)
    with torch.set_grad_enabled(gradients), torch.autocast("cpu", torch.bfloat16):
        product = precisely(CPU, torch.matmul, x, x)
    assert product.dtype == torch.float32
    assert not product.requires_grad


NEWER = hasattr(torch.backends, "fp32_precision")


def owners() -> dict[str, Any]:
    """Return what has a setting of its own in the newer interface."""
    backends = torch.backends
    return {
        "all": backends,
        "cuda matmul": backends.cuda.matmul,
        "cudnn": backends.cudnn,
        "cudnn conv": backends.cudnn.conv,
        "cudnn rnn": backends.cudnn.rnn,
        "mkldnn": backends.mkldnn,
        "mkldnn matmul": backends.mkldnn.matmul,
        "mkldnn conv": backends.mkldnn.conv,
        "mkldnn rnn": backends.mkldnn.rnn,
    }


@pytest.fixture
def restored() -> Iterator[None]:
    """Put all settings back, in whichever interface they were changed."""
    before = {name: owner.fp32_precision for name, owner in owners().items()} if NEWER else {}
    matmul, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    for name, precision in before.items():
        owners()[name].fp32_precision = precision
    torch.set_float32_matmul_precision(matmul)
    torch.backends.cudnn.allow_tf32 = cudnn
    for name, precision in before.items():
        owners()[name].fp32_precision = precision


@pytest.fixture
def fast_matmul(restored: None) -> None:
    torch.set_float32_matmul_precision("high")


@pytest.mark.usefixtures("fast_matmul")
def test_fast_products_are_off_inside_and_back_afterwards() -> None:
    with full_precision(CPU):
        if NEWER:
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
            assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
        else:
            assert torch.get_float32_matmul_precision() == "highest"
    assert torch.get_float32_matmul_precision() == "high"


@pytest.mark.usefixtures("fast_matmul")
@pytest.mark.parametrize("gradients", [True, False])
def test_a_function_is_called_without_fast_products(gradients: bool) -> None:
    with torch.set_grad_enabled(gradients):
        if NEWER:
            assert precisely(CPU, lambda: torch.backends.mkldnn.matmul.fp32_precision) == "ieee"
        else:
            assert precisely(CPU, torch.get_float32_matmul_precision) == "highest"
    assert torch.get_float32_matmul_precision() == "high"


@pytest.mark.usefixtures("fast_matmul")
def test_settings_are_back_after_an_exception() -> None:
    with pytest.raises(KeyError), full_precision(CPU):
        raise KeyError
    assert torch.get_float32_matmul_precision() == "high"
    assert torch.is_grad_enabled()


@pytest.mark.skipif(not NEWER, reason="this torch has one interface only")
@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
@pytest.mark.parametrize(
    "name", ["all", "cuda matmul", "cudnn", "cudnn conv", "cudnn rnn", "mkldnn matmul"]
)
def test_settings_made_through_the_newer_interface_are_handled(name: str, precision: str) -> None:
    owners()[name].fp32_precision = precision
    before = {each: owner.fp32_precision for each, owner in owners().items()}
    with full_precision(CPU):
        assert torch.backends.mkldnn.matmul.fp32_precision != "tf32"
    with exact_products():
        assert torch.backends.cuda.matmul.fp32_precision != "tf32"
        assert torch.backends.cudnn.conv.fp32_precision != "tf32"
    assert {each: owner.fp32_precision for each, owner in owners().items()} == before


@pytest.mark.parametrize(
    ("n", "per_sample", "limit", "expected"),
    [
        (5, 1, 2, [(0, 2), (2, 4), (4, 5)]),
        (5, 10, 2, [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)]),
        (3, 1, 100, [(0, 3)]),
        (3, 0, 100, [(0, 3)]),
        (0, 1, 100, [(0, 0)]),
    ],
)
def test_chunks_cover_all_samples_in_order(
    n: int, per_sample: int, limit: int, expected: list[tuple[int, int]]
) -> None:
    assert [(part.start, part.stop) for part in chunks(n, per_sample, limit)] == expected


@pytest.mark.usefixtures("restored")
def test_what_a_user_chose_for_all_products_is_left_alone_and_overruled() -> None:
    """An operation inherits what is chosen for all of them; what is exact is not set again."""
    backends: Any = torch.backends
    with torch.no_grad(), full_precision(CPU):
        assert backends.mkldnn.matmul.fp32_precision in ("none", "ieee")
    backends.mkldnn.fp32_precision = "bf16"
    with torch.no_grad(), full_precision(CPU):
        assert backends.mkldnn.matmul.fp32_precision == "ieee"
        assert backends.mkldnn.conv.fp32_precision == "ieee"
        assert not torch.is_grad_enabled()
    assert backends.mkldnn.matmul.fp32_precision == "bf16"


def test_less_is_built_at_once_inside() -> None:
    assert list(chunks(4, 2**24)) == [slice(0, 2), slice(2, 4)]
    with building_at_most(4 * 2**24):
        assert len(list(chunks(4, 2**24))) == 4
        assert len(list(chunks(4, 1, limit=2))) == 2
        with building_at_most(1):  # a sample at least
            assert len(list(chunks(4, 2**24))) == 4
    assert len(list(chunks(4, 2**24))) == 2
