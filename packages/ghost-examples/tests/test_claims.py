from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import pytest
from tqdm import tqdm

from ghost_examples.demo import claims, digits
from ghost_examples.demo.annotator import annotate
from ghost_examples.demo.convnet import Recipe, train_scored
from ghost_examples.demo.methods import METHODS, TITLES, Suspects
from ghost_examples.demo.report import Findings

PRECISION = dict.fromkeys(METHODS, 0.5) | {"value": 0.7, "dot": 0.8}
ACCURACY = dict.fromkeys(TITLES, 0.9) | {"value": 0.95}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({}, []),
        ({"loss": 0.59}, []),
        ({"loss": 0.61}, ["loss"]),
        ({"machine": 0.64}, []),
        ({"machine": 0.66}, ["SVM on clean images"]),
        ({"neighbours": 0.71}, ["nearest neighbour", "nearest neighbour"]),
        ({"further": 0.99, "crossed": 0.99}, []),
        ({"value": math.nan}, ["loss", "nearest neighbour"]),
    ],
)
def test_precision_needs_its_margins(changes: Mapping[str, float], named: list[str]) -> None:
    found = claims.shortfalls({20: PRECISION | changes}, {20: ACCURACY})
    assert [line.split(" by ")[-1].split(":")[0] for line in found] == named


def test_many_clean_images_may_do_without_ghost_but_not_without_margin_to_the_loss() -> None:
    assert claims.shortfalls({30: PRECISION | {"machine": 0.9}}, {30: ACCURACY}) == []
    (line,) = claims.shortfalls({200: PRECISION}, {200: ACCURACY | {"loss": 0.94}})
    assert "accuracy with 200 clean images is 0.950 by in-run value and 0.940 by loss" in line


@pytest.mark.parametrize(
    ("changes", "enough"),
    [
        ({}, "dot"),
        ({"value": 0.785}, "value"),
        ({"further": 0.79}, "further"),
        ({"loss": 1}, "loss"),
    ],
)
def test_what_needs_least_and_finds_as_many_suffices(
    changes: Mapping[str, float], enough: str
) -> None:
    assert claims.suffices(PRECISION | changes) == enough


def test_a_verdict_names_what_is_better_still(findings: Findings) -> None:
    seed = findings.digits.seeds[0]
    close = {20: PRECISION | {"loss": 0.79, "further": 0.805}}
    line, _ = claims.verdicts(replace(findings.digits, seeds=[replace(seed, precision=close)]))
    told = "in-run value 0.700, dot product 0.800, fine-tuned ConvNet 0.805"
    assert line == f"20 clean images: loss suffices, 0.790 ({told})"


def test_what_is_shown_was_measured(findings: Findings, capsys: pytest.CaptureFixture[str]) -> None:
    claims.show(findings.digits)
    out = capsys.readouterr().out
    assert " ".join(TITLES["value"].split()) + " " * 16 + "         0.900         0.900" in out
    assert "20 clean images: in-run value suffices, 0.900 (dot product 0.850)" in out
    beside = "(in-run value 0.900, dot product 0.850)"
    assert f"200 clean images: nearest neighbour suffices, 0.920 {beside}" in out
    beside = "(in-run value 0.880, dot product 0.850)"
    assert f"labels flipped at random, 20 clean images: loss suffices, 0.960 {beside}" in out
    assert "±" not in out


def test_several_seeds_have_a_spread(
    findings: Findings, capsys: pytest.CaptureFixture[str]
) -> None:
    seed = findings.digits.seeds[0]
    found = {n: {**each, "value": 0.8} for n, each in seed.precision.items()}
    two = replace(findings.digits, seeds=[seed, replace(seed, precision=found)])
    claims.show(two)
    assert "0.850 ±0.071" in capsys.readouterr().out
    assert two.precision[20]["value"] == pytest.approx(0.85)


@pytest.mark.stress
def test_twenty_clean_images_are_worth_more_to_ghost_than_to_a_classifier() -> None:
    data, n = annotate(0), 20
    model, values = train_scored(data, [n], Recipe(), 0, "cpu")
    suspects = Suspects(data.train, model, 0, "cpu")
    clean, wrong = data.clean[:n], data.mislabelled
    scores = suspects.aided(clean, suspects.adapted(clean), values[n]) | suspects.unaided()
    found = {
        name: wrong[each.topk(int(wrong.sum())).indices].float().mean().item()
        for name, each in scores.items()
    }
    simple = max(found[name] for name in ("neighbours", "machine", "alone", "crossed", "loss"))
    assert found["value"] > simple + 0.05
    assert found["dot"] > simple + 0.1


@pytest.mark.stress
def test_the_demo_says_what_holds() -> None:
    seeds, counts = range(3), (20, 80, 200)
    with tqdm(total=len(seeds) * digits.runs(counts), disable=True) as bar:
        result = digits.DigitsResult(
            Recipe(), [digits.Trial(seed, Recipe(), "cpu", bar).run(counts) for seed in seeds]
        )
    assert claims.failures(result) == []
    precision, random = result.precision, result.random_precision
    # Where ghost wins, where it draws, and where it loses: the page says all three.
    for n in counts:
        assert abs(precision[n]["dot"] - precision[n]["further"]) < 0.04
        assert precision[n]["further"] > precision[n]["value"] + 0.02
    assert precision[200]["neighbours"] > precision[200]["value"] + 0.02
    assert random["loss"] > max(random["value"], random["dot"]) + 0.05
    for name in ("value", "dot"):
        assert result.accuracy[20][name] > result.accuracy[20]["loss"] + 0.02
