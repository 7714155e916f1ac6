"""The example of images and texts: both modes score as autograd does, and train alike."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from ghost_core import CaptureError
from ghost_examples import vision_language
from ghost_examples.vision_language import IMAGE, PATCHES


def test_a_text_has_places_for_each_of_its_images() -> None:
    samples = vision_language.draw(40, torch.Generator().manual_seed(0))
    assert set(samples.counts.tolist()) == {1, 2, 3}
    assert len(samples.images) == int(samples.counts.sum())
    places = (samples.text["input_ids"] == IMAGE).sum(1)
    assert places.tolist() == (PATCHES * samples.counts).tolist()
    lengths = samples.text["attention_mask"].sum(1)
    assert lengths.tolist() == (PATCHES * samples.counts + samples.counts + 1).tolist()


@pytest.mark.stress
def test_both_modes_score_as_autograd_and_train_alike(capsys: pytest.CaptureFixture[str]) -> None:
    vision_language.main(["--steps", "3", "--batch", "3", "--validation", "2", "--test", "2"])
    said = capsys.readouterr().out
    assert said.count("of autograd's") == 2
    options = vision_language.Options(steps=3, batch=3, validation=2, test=2)
    exact, joined = vision_language.run(options).values()
    for outcome in (exact, joined):
        assert outcome.deviation < 1e-12
        assert int(outcome.values.samples.sum()) == 9
    assert joined.losses == pytest.approx(exact.losses, rel=1e-9)
    assert joined.values.values == pytest.approx(exact.values.values, rel=1e-6)


@pytest.mark.stress
@pytest.mark.parametrize("mode", vision_language.MODES)
def test_evaluation_between_steps_changes_nothing(mode: str) -> None:
    options = vision_language.Options(steps=2, batch=3, validation=2, test=2, eval_every=1)
    with_one = vision_language.train(mode, options)
    without = vision_language.train(mode, replace(options, eval_every=2))
    assert with_one.measured.keys() == {0, 1, 2}
    assert without.measured.keys() == {0, 2}
    assert len(set(with_one.measured.values())) == 3
    assert with_one.losses == without.losses
    assert np.array_equal(with_one.values.values, without.values.values)
    assert with_one.values.values.any()
    parameters = without.model.state_dict()
    for name, found in with_one.model.state_dict().items():
        assert torch.equal(found, parameters[name]), name


def test_options_that_do_not_fit_are_refused() -> None:
    with pytest.raises(CaptureError, match="steps must be at least 1"):
        vision_language.Options(steps=0)
