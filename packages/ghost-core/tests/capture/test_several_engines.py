"""Several engines at once share one capture, and nothing else."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ghost_core import CaptureError, Freeze, Pass, PerSampleGradient, TrackedParameter
from ghost_core.testing import GradientHolder, per_sample_gradients
from ghost_core.testing.snapshots import assert_untouched, traces

N, D = 4, 3
Hold = Callable[..., GradientHolder]


def loss(output: Tensor) -> Tensor:
    return output.square().sum()


def test_two_engines_share_one_capture(
    hold: Hold, assert_held, model: nn.Module, x: Tensor
) -> None:
    both, weights = hold(model), hold(model, layers="*.weight")
    expected = per_sample_gradients(model, model(x).square().sum(1))
    plain = copy.deepcopy(model)
    with both, weights:
        with both.batch(range(N)) as first, weights.batch(range(N)) as second:
            loss(model(x)).backward()
        with weights.batch(range(N)) as third:
            loss(model(x)).backward()
    assert_held(first.result, expected)
    of_weights = {name: g for name, g in expected.items() if name.endswith("weight")}
    assert_held(second.result, of_weights)
    assert_held(third.result, of_weights)
    loss(plain(x)).backward()
    loss(plain(x)).backward()
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)


def test_engines_must_open_the_same_batch(hold: Hold, model: nn.Module, x: Tensor) -> None:
    one, other = hold(model), hold(model)
    with one, other, one.batch(range(N)):
        with pytest.raises(CaptureError, match="another engine opened this batch for 4"):
            other.batch(range(N + 1)).__enter__()
        loss(model(x)).backward()
        with pytest.raises(CaptureError, match="before the model is called"):
            other.batch(range(N)).__enter__()


def test_a_closed_batch_gets_nothing_more(
    hold: Hold, assert_held, model: nn.Module, x: Tensor
) -> None:
    outer, inner = hold(model), hold(model)
    expected = per_sample_gradients(model, model(x).square().sum(1))
    with outer, inner, outer.batch(range(N)) as first:
        with inner.batch(range(N)) as second:
            once = loss(model(x))
            once.backward(retain_graph=True)
        once.backward()
    assert_held(second.result, expected)
    assert_held(first.result, {name: 2 * gradient for name, gradient in expected.items()})


@pytest.mark.parametrize("freeze", Freeze)
def test_engines_on_a_model_and_a_part_of_it_are_exact_or_refused(
    registry, assert_held, model: nn.Module, x: Tensor, freeze: Freeze
) -> None:
    class Summing(GradientHolder):
        def on_gradient(
            self, pass_: Pass, parameter: TrackedParameter, gradient: PerSampleGradient
        ) -> Tensor:
            super().on_gradient(pass_, parameter, gradient)
            return gradient.sum()

    Summing.freeze = freeze
    model = nn.Sequential(copy.deepcopy(model))
    expected = per_sample_gradients(model, model(x).square().sum(1))
    found = traces(model)
    whole, part = (Summing(each, registry=registry) for each in (model, model[0]))
    try:
        with whole, part, whole.batch(range(N)) as first, part.batch(range(N)) as second:
            loss(model(x)).backward()
    except CaptureError:  # a refusal is as good
        return
    finally:
        assert_untouched(found, model, "after leaving")
    assert_held(first.result, expected)
    assert_held(second.result, {name[2:]: gradient for name, gradient in expected.items()})
    for name, gradient in expected.items():
        made = model.get_parameter(name).grad
        if freeze is Freeze.PASS:
            assert made is None
        else:
            torch.testing.assert_close(made, gradient.sum(0))
