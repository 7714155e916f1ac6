from __future__ import annotations

import io
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from ghost_core.testing import per_sample_gradients
from ghost_examples.demo import baselines, convnet, digits
from ghost_examples.demo.annotator import CONFUSIONS, Images, annotate, random_flips
from ghost_examples.demo.convnet import Recipe
from ghost_examples.demo.methods import BOUNDS, METHODS

TINY = Recipe(epochs=1, batch=100)


def test_the_parts_share_no_image_and_cover_all() -> None:
    data = annotate(0)
    assert (len(data.train), len(data.clean), len(data.test)) == (1200, 200, 397)
    assert [len(part) for part in data.positions] == [1200, 200, 397]
    assert torch.equal(torch.cat(data.positions).sort().values, torch.arange(1797))


def test_any_few_clean_images_hold_as_many_of_each_digit() -> None:
    labels = annotate(3).clean.labels
    for n in range(10, 201, 10):
        assert labels[:n].bincount().tolist() == [n // 10] * 10


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
    with pytest.raises(ValueError, match="1700 \\+ 100"):
        annotate(0, n_train=1700, per_digit=10)
    with pytest.raises(ValueError, match="not 179 images of each"):
        annotate(0, n_train=2, per_digit=179)


def test_the_scored_training_is_the_plain_one() -> None:
    data = annotate(0, n_train=300)
    plain = convnet.train(data.train, TINY, 0, "cpu")
    scored, values = convnet.train_scored(data, [20, 100], TINY, 0, "cpu")
    for ours, theirs in zip(scored.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert [sorted(each.to_dict()) for each in values.values()] == [[*range(300)]] * 2
    _, alone = convnet.train_scored(data, [20], TINY, 0, "cpu")
    assert values[20].to_dict() == pytest.approx(alone[20].to_dict(), rel=1e-4, abs=1e-7)
    assert values[20].to_dict() != pytest.approx(values[100].to_dict(), rel=1e-2)


def test_dot_products_are_those_of_autograd() -> None:
    data = annotate(0, n_train=5)
    model = convnet.new_model(0, "cpu")
    found = convnet.dot_products(model, data.train, data.clean[:10])
    losses = cross_entropy(model(data.train.images), data.train.labels, reduction="none")
    gradients = per_sample_gradients(model, losses)
    clean = torch.autograd.grad(convnet.mean_loss(model, data.clean[:10]), list(model.parameters()))
    expected = sum(
        (gradients[name].flatten(1) @ direction.flatten())
        for (name, _), direction in zip(model.named_parameters(), clean, strict=True)
    )
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-6)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_norms_are_those_of_autograd() -> None:
    data = annotate(0, n_train=5)
    model = convnet.new_model(0, "cpu")
    losses, norms = convnet.losses_and_norms(model, data.train)
    expected = cross_entropy(model(data.train.images), data.train.labels, reduction="none")
    gradients = per_sample_gradients(model, expected)
    whole = torch.cat([each.flatten(1) for each in gradients.values()], dim=1)
    assert torch.allclose(norms, whole.norm(dim=1), rtol=1e-5)
    assert torch.equal(losses, expected.detach())


FEW = 400
"""Images that the trial trains on: a third of those of a demo."""


@pytest.fixture(scope="module")
def trial() -> digits.SeedResult:
    """What one seed finds with ten clean images, and with thirty."""
    with (
        pytest.MonkeyPatch.context() as patch,
        tqdm(total=digits.runs([10, 30]), disable=False, file=io.StringIO()) as bar,
    ):
        patch.setattr(digits, "annotate", partial(annotate, n_train=FEW))
        shorter = replace(baselines.ALONE, steps=30)
        patch.setattr(baselines, "alone", partial(baselines.alone, setting=shorter))
        found = digits.Trial(0, TINY, "cpu", bar).run([10, 30])
        assert bar.n == bar.total
    return found


def test_a_seed_gives_every_method_its_numbers(trial: digits.SeedResult) -> None:
    found, counts = trial, [10, 30]
    assert [*found.precision] == [*found.accuracy] == counts
    for n in counts:
        assert [*found.precision[n]] == [*METHODS]
        assert found.accuracy[n].keys() == {**METHODS, **BOUNDS}.keys()
        shares = (*found.precision[n].values(), *found.accuracy[n].values())
        assert all(0 <= share <= 1 for share in shares)
    assert found.random_precision.keys() == METHODS.keys()
    for name, method in METHODS.items():
        if not method.needs_clean:
            assert found.precision[10][name] == found.precision[30][name]
            assert found.accuracy[10][name] == found.accuracy[30][name]
    assert found.precision[10] != found.precision[30]
    assert len(found.flagged) == found.mistakes
    ours = [image.value for image in found.flagged]
    assert ours == sorted(ours) == found.table["value"].tolist()[: found.mistakes]
    right = sum(image.is_mistake for image in found.flagged)
    assert found.precision[10]["value"] == pytest.approx(right / found.mistakes)
    assert (found.table["given"] != found.table["truth"]).sum() == found.mistakes


def test_each_count_has_the_values_of_its_clean_images(trial: digits.SeedResult) -> None:
    data = annotate(0, n_train=FEW)
    _, values = convnet.train_scored(data, [10, 30], TINY, 0, "cpu")
    expected = {}
    for n, by_sample in values.items():
        lowest = sorted(range(len(data.train)), key=by_sample.to_dict().__getitem__)
        expected[n] = data.mislabelled[lowest[: trial.mistakes]].float().mean().item()
    assert expected[10] != expected[30]
    assert {n: trial.precision[n]["value"] for n in expected} == pytest.approx(expected)


def test_a_network_is_trained_without_what_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Images] = []

    def train(images: Images, recipe: Recipe, seed: int, device: str) -> nn.Module:
        seen.append(images)
        return convnet.new_model(seed, device)

    monkeypatch.setattr(digits, "train", train)
    with tqdm(disable=True) as bar:
        trial = digits.Trial(0, TINY, "cpu", bar)
        trial.without(torch.tensor([0, 1199]))
    assert torch.equal(seen[0].images, trial.data.train.images[1:1199])
    assert torch.equal(seen[0].labels, trial.data.train.labels[1:1199])


@pytest.mark.stress
def test_counts_are_sorted_and_told_once() -> None:
    found = digits.run(1, "cpu", TINY, (20, 10, 20))
    assert found.counts == (10, 20)
