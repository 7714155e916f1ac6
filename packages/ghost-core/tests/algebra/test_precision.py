"""What can be asked of gradients by dtype."""

import pytest
import torch

from ghost_core.algebra import PRECISIONS, Precision


@pytest.mark.parametrize(
    ("dtypes", "narrowest"),
    [
        ([torch.float64], torch.float64),
        ([torch.float64, torch.float32], torch.float32),
        ([torch.float16, torch.float32], torch.float16),
        ([torch.float8_e4m3fn, torch.float64], torch.bfloat16),
    ],
)
def test_the_narrowest_dtype_counts(dtypes: list[torch.dtype], narrowest: torch.dtype) -> None:
    assert Precision.of(dtypes) is Precision.of(reversed(dtypes)) is PRECISIONS[narrowest]
