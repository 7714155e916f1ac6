from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from ghost_core.testing import per_sample_gradients
from ghost_examples.demo import convnet, digits
from ghost_examples.demo.annotator import CONFUSIONS, annotate, random_flips
from ghost_examples.demo.convnet import Recipe
from ghost_examples.demo.report import Findings

TINY = Recipe(epochs=1, batch=100)


def test_the_parts_share_no_image_and_cover_all() -> None:
    data = annotate(0)
    assert (len(data.train), len(data.validation), len(data.test)) == (1200, 200, 397)
    assert [len(part) for part in data.positions] == [1200, 200, 397]
    assert torch.equal(torch.cat(data.positions).sort().values, torch.arange(1797))


def test_the_careless_annotator_makes_the_mistakes_that_are_told() -> None:
    data = annotate(1)
    given, truth = data.train.labels, data.truth
    for digit, mistaken in CONFUSIONS.items():
        labels = given[truth == digit]
        wrong = labels[labels != digit]
        assert len(wrong) == round(0.4 * len(labels)) > 0
        assert (wrong == mistaken).all()
    others = ~torch.isin(truth, torch.tensor([*CONFUSIONS]))
    assert torch.equal(given[others], truth[others])


def test_the_random_annotator_makes_as_many_mistakes_on_the_same_split() -> None:
    careless, random = annotate(2), annotate(2, random_flips)
    assert torch.equal(careless.truth, random.truth)
    assert torch.equal(careless.test.images, random.test.images)
    assert careless.mislabelled.sum() == random.mislabelled.sum() > 100
    assert len(set(random.truth[random.mislabelled].tolist())) == 10
    assert 0 <= random.train.labels.min() <= random.train.labels.max() <= 9


def test_a_seed_always_gives_the_same_and_another_something_else() -> None:
    assert torch.equal(annotate(0).train.labels, annotate(0).train.labels)
    assert not torch.equal(annotate(0).positions[0], annotate(1).positions[0])
    with pytest.raises(ValueError, match="1700 \\+ 97"):
        annotate(0, n_train=1700, n_validation=97)


def test_the_scored_training_is_the_plain_one() -> None:
    data = annotate(0, n_train=300)
    plain = convnet.train(data.train, TINY, 0, "cpu")
    scored, values = convnet.train_scored(data, TINY, 0, "cpu")
    for ours, theirs in zip(scored.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert sorted(values.to_dict()) == list(range(300))


def test_norms_are_those_of_autograd() -> None:
    data = annotate(0, n_train=5)
    model = convnet.new_model(0, "cpu")
    losses, norms = convnet.losses_and_norms(model, data.train)
    expected = cross_entropy(model(data.train.images), data.train.labels, reduction="none")
    gradients = per_sample_gradients(model, expected)
    whole = torch.cat([each.flatten(1) for each in gradients.values()], dim=1)
    assert torch.allclose(norms, whole.norm(dim=1), rtol=1e-5)
    assert torch.equal(losses, expected.detach())


def test_a_seed_gives_every_method_its_numbers() -> None:
    with tqdm(total=digits.RUNS, disable=True) as bar:
        found = digits.run_seed(0, TINY, "cpu", bar)
    assert found.precision.keys() == digits.METHODS.keys()
    assert found.accuracy.keys() == {**digits.METHODS, **digits.BOUNDS}.keys()
    assert all(0 <= share <= 1 for share in (*found.precision.values(), *found.accuracy.values()))
    assert len(found.flagged) == found.mistakes
    ours = [image.value for image in found.flagged]
    assert ours == sorted(ours) == found.table["value"].tolist()[: found.mistakes]
    right = sum(image.is_mistake for image in found.flagged)
    assert found.precision["value"] == pytest.approx(right / found.mistakes)
    assert (found.table["given"] != found.table["truth"]).sum() == found.mistakes


@pytest.mark.parametrize(
    ("precision", "accuracy", "named"),
    [
        (0.1, 0.02, []),
        (0.3, 0.05, []),
        (0.09, 0.05, ["precision"]),
        (0.3, 0.01, ["accuracy"]),
        (-0.1, -0.1, ["precision", "accuracy"]),
        (float("nan"), 0.05, ["precision"]),
    ],
)
def test_the_demo_passes_only_with_both_margins(
    precision: float, accuracy: float, named: list[str]
) -> None:
    found = digits.shortfalls({"value": precision, "loss": 0.0}, {"value": accuracy, "loss": 0.0})
    assert [line.split()[1] for line in found] == named


def test_what_is_shown_was_measured(findings: Findings, capsys: pytest.CaptureFixture[str]) -> None:
    result = findings.digits
    assert result.about_random_flips.endswith("There the plain loss suffices.")
    worse = replace(result.seeds[0], random_precision={"value": 0.8, "loss": 0.7})
    assert "suffices" not in replace(result, seeds=[worse]).about_random_flips
    digits.show(result)
    out = capsys.readouterr().out
    assert "in-run value               0.900  0.950" in out
    assert "by value 0.880, by loss 0.960" in out
