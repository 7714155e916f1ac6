"""How rows are laid out, and how many dimensions each parameter gets."""

import json
import math
import re

import pytest
import torch

from ghost_core import CaptureError, TrackedParameter
from ghost_engines.blocks import Block, arrange

SHAPES = {
    "a.bias": (7,),
    "a.weight": (7, 300),
    "conv.weight": (12, 4, 3, 3),
    "embedding.weight": (5000, 16),
    "norm.weight": (64,),
    "scalar": (),
    "wide.weight": (2048, 512),
}


def parameter(name, shape):
    return TrackedParameter(name, (name,), torch.Size(shape), torch.float32, torch.device("cpu"))


@pytest.fixture
def parameters():
    return [parameter(name, shape) for name, shape in SHAPES.items()]


def sides(shape):
    """Return a parameter's shape as a matrix."""
    return (shape[0], math.prod(shape[1:])) if shape else (1, 1)


def assert_fits(blocks, min_dim):
    assert [block.parameter for block in blocks] == list(SHAPES)
    offset = 0
    for block in blocks:
        n_left, n_right = sides(SHAPES[block.parameter])
        assert block.shape == SHAPES[block.parameter]
        assert block.offset == offset
        assert block.columns == slice(offset, offset + block.k_left * block.k_right)
        assert block.size == block.k_left * block.k_right
        assert min(min_dim, n_left) <= block.k_left <= n_left
        assert min(min_dim, n_right) <= block.k_right <= n_right
        offset = block.columns.stop


@pytest.mark.parametrize("min_dim", [1, 4, 8, 20])
@pytest.mark.parametrize("dim", [1, 7, 64, 256, 1024])
def test_blocks_follow_one_another_and_fit_their_parameters(dim, min_dim, parameters):
    assert_fits(arrange(parameters, dim=dim, total_dim=None, min_dim=min_dim), min_dim)


@pytest.mark.parametrize("dim", [256, 1024, 4096])
def test_sides_are_shared_out_by_the_root_of_their_lengths(dim):
    """`k_right / k_left ≈ √(n_left / n_right)`, where no side is clipped."""
    for n_left, n_right in [(1000, 1000), (4000, 1000), (1000, 4000), (3000, 700), (16000, 1000)]:
        (block,) = arrange([parameter("w", (n_left, n_right))], dim=dim, total_dim=None, min_dim=1)
        ratio = block.k_right / block.k_left
        assert ratio == pytest.approx(math.sqrt(n_left / n_right), rel=0.25)
        assert block.size == pytest.approx(dim, rel=0.15)


def test_exact_shares():
    """`dim = 256` of a 4 to 1 matrix: √(256·2) = 22.6 to √(256/2) = 11.3."""
    wide, square = parameter("w", (4000, 1000)), parameter("s", (1000, 1000))
    tall = parameter("t", (1000, 4000))
    blocks = arrange([square, tall, wide], dim=256, total_dim=None, min_dim=8)
    assert [(block.k_left, block.k_right) for block in blocks] == [(16, 16), (23, 11), (11, 23)]
    assert [block.offset for block in blocks] == [0, 256, 509]


def test_a_short_side_leaves_its_share_to_the_other():
    blocks = arrange([parameter("w", (3, 1000))], dim=256, total_dim=None, min_dim=1)
    assert (blocks[0].k_left, blocks[0].k_right) == (3, 85)
    blocks = arrange([parameter("w", (1000, 2))], dim=256, total_dim=None, min_dim=1)
    assert (blocks[0].k_left, blocks[0].k_right) == (128, 2)


def test_a_vector_is_one_column():
    (block,) = arrange([parameter("bias", (1000,))], dim=256, total_dim=None, min_dim=8)
    assert (block.k_left, block.k_right) == (256, 1)


def test_a_small_parameter_is_kept_whole():
    (block,) = arrange([parameter("w", (5, 6))], dim=256, total_dim=None, min_dim=8)
    assert (block.k_left, block.k_right) == (5, 6)


def test_min_dim_holds_on_both_sides():
    (block,) = arrange([parameter("w", (10**6, 100))], dim=64, total_dim=None, min_dim=8)
    assert (block.k_left, block.k_right) == (8, 8)
    (block,) = arrange([parameter("w", (10**6, 100))], dim=64, total_dim=None, min_dim=1)
    assert block.k_right > 8 > block.k_left


@pytest.mark.parametrize("min_dim", [1, 2, 8])
def test_total_dim_is_never_exceeded(min_dim, parameters):
    fitting = 0
    for total_dim in [*range(7, 400, 3), *range(400, 8000, 400), 10**5]:
        try:
            blocks = arrange(parameters, dim=None, total_dim=total_dim, min_dim=min_dim)
        except CaptureError:
            continue
        fitting += 1
        assert_fits(blocks, min_dim)
        assert blocks[-1].columns.stop <= total_dim
    assert fitting > 5


def test_total_dim_is_made_use_of():
    parameters = [parameter(f"w{at}", (500 + 100 * at, 800)) for at in range(8)]
    for total_dim in (512, 2048, 8192):
        blocks = arrange(parameters, dim=None, total_dim=total_dim, min_dim=1)
        assert 0.75 * total_dim <= blocks[-1].columns.stop <= total_dim


def test_total_dim_gives_larger_parameters_more(parameters):
    blocks = {b.parameter: b for b in arrange(parameters, dim=None, total_dim=2000, min_dim=1)}
    assert blocks["wide.weight"].size > blocks["embedding.weight"].size > blocks["a.weight"].size


def test_total_dim_that_is_too_small_says_what_is_needed(parameters):
    with pytest.raises(CaptureError, match=r"total_dim=100 is too small for 7 .*min_dim=8.*need"):
        arrange(parameters, dim=None, total_dim=100, min_dim=8)


def test_total_dim_that_an_error_asks_for_is_enough(parameters):
    with pytest.raises(CaptureError, match="too small") as error:
        arrange(parameters, dim=None, total_dim=100, min_dim=8)
    needed = int(re.search(r"need (\d+)", str(error.value))[1])
    assert_fits(arrange(parameters, dim=None, total_dim=needed, min_dim=8), 8)


@pytest.mark.parametrize(("dim", "total_dim"), [(None, None), (256, 2048)])
def test_just_one_of_both_dims_is_given(dim, total_dim, parameters):
    with pytest.raises(CaptureError, match=r"either dim .* or total_dim"):
        arrange(parameters, dim=dim, total_dim=total_dim, min_dim=8)


@pytest.mark.parametrize(
    ("dim", "total_dim", "min_dim", "name"),
    [
        (0, None, 8, "dim"),
        (-3, None, 8, "dim"),
        (None, 0, 8, "total_dim"),
        (64, None, 0, "min_dim"),
    ],
)
def test_dims_are_positive(dim, total_dim, min_dim, name, parameters):
    with pytest.raises(CaptureError, match=f"^{name} must be at least 1"):
        arrange(parameters, dim=dim, total_dim=total_dim, min_dim=min_dim)


def test_manifest_is_json_and_has_all_numbers():
    block = Block("conv.weight", torch.Size((12, 4, 3, 3)), 40, 6, 8)
    assert json.loads(json.dumps(block.manifest())) == {
        "name": "conv.weight",
        "shape": [12, 4, 3, 3],
        "offset": 40,
        "k_left": 6,
        "k_right": 8,
    }
    sketched = Block("bias", torch.Size((12,)), 0, 6, 1, sketched=True).manifest()
    assert sketched["sketched"] is True
