"""What cannot be compared is refused, and why."""

import random

import numpy as np
import pytest
import torch

from ghost_core import CaptureError
from ghost_core.compare import check_losses

N, T, D = 6, 5, 4


def test_losses_that_are_not_one_per_sample_are_refused(model, inputs, check, own):
    for losses, what in {
        lambda: own(model(inputs)).sum(): r"losses are float64 of shape \(\)",
        lambda: model(inputs): r"losses are float64 of shape \(6, 5, 4\)",
        lambda: own(model(inputs))[:0]: r"losses are float64 of shape \(0,\)",
        lambda: own(model(inputs)).tolist(): r"losses are a list",
        lambda: own(model(inputs)).detach(): r"losses do not depend on any trainable parameter",
        lambda: torch.arange(N): r"losses are int64 of shape \(6,\)",
        lambda: own(model(inputs)) / torch.tensor([1, 1, 0, 1, 1, 1]): r"sample 2 is not finite",
    }.items():
        with pytest.raises(CaptureError, match=what):
            check(model, losses)


def test_losses_of_other_samples_than_the_model_ran_on_are_refused(model, inputs, check):
    with pytest.raises(CaptureError, match=r"6 of 30 samples went through the model"):
        check(model, lambda: model(inputs).sin().sum(2).flatten())


@pytest.mark.parametrize("change", [1.1, slice(0, 3)])
def test_losses_that_differ_from_call_to_call_are_refused(change, model, inputs, check, own):
    calls = []

    def losses():
        calls.append(0)
        found = own(model(inputs))
        if len(calls) < 2:
            return found
        return found * change if isinstance(change, float) else found[change]

    with pytest.raises(CaptureError, match="losses are others each time they are computed"):
        check(model, losses)


def test_losses_as_before_are_returned():
    losses = torch.rand(3, requires_grad=True)
    assert check_losses(losses, losses.detach() * (1 + 1e-6)) is losses
    with pytest.raises(CaptureError, match="others each time"):
        check_losses(losses, losses.detach() * (1 + 1e-3))


def test_random_numbers_are_the_same_each_time(model, inputs, check, own):
    drawn = []

    def losses():
        noise = torch.rand(N) + random.random() + np.random.rand()
        drawn.append(noise)
        return own(model(inputs)) * noise

    assert check(model, losses).ok
    assert len(drawn) >= 3
    assert all(torch.equal(noise, drawn[0]) for noise in drawn)


def test_gradients_that_are_not_finite_without_ghost_are_refused(model, inputs, check, own):
    def losses():
        return own(model(inputs)) + (model(inputs) * 0).abs().sqrt().flatten(1).sum(1)

    with pytest.raises(CaptureError, match=r"gradient of .* is not finite .* also without ghost"):
        check(model, losses)


def test_gradients_that_are_all_zero_prove_nothing(model, inputs, check, own):
    with pytest.raises(CaptureError, match="there is nothing to compare"):
        check(model, lambda: own(model(inputs)) * 0)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"samples": 0}, "samples must be at least 1, not 0"),
        ({"tolerance": 0.0}, r"tolerance must be between 0 and 1, not 0\.0"),
        ({"tolerance": 1.0}, r"tolerance must be between 0 and 1, not 1\.0"),
        ({"tolerance": float("nan")}, "tolerance must be between 0 and 1, not nan"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, what, model, inputs, check, own):
    with pytest.raises(CaptureError, match=what):
        check(model, lambda: own(model(inputs)), **options)
