"""What a comparison says: its table, its verdict, its error."""

import re

import pytest
from torch import nn

from ghost_core import Dense, WrongSplitError

N, T, D = 6, 5, 4


def test_the_table_is_aligned_and_sorted_worst_first(model, inputs, check, own, faulty):
    def biases_only(name, gradient):
        return Dense(gradient.materialize()[:, None] * 3) if name == "bias" else gradient

    found = check(model, lambda: own(model(inputs)), registry=faulty(biases_only))
    lines = found.table().splitlines()
    assert lines[0].split() == [
        "parameter", "class", "sampler", "shape", "error", "sample", "tolerance", "ok"
    ]  # fmt: skip
    assert [line.split()[-1] for line in lines[1:]] == ["WRONG", "WRONG", "yes", "yes"]
    assert {lines[1].split()[0], lines[2].split()[0]} == {"first.bias", "second.bias"}
    assert lines[1].split()[3:5] == ["4", "2.0e+00"]
    assert len({line.index("Linear ") for line in lines[1:]}) == 1
    ratios = [each.error / each.tolerance for each in found.parameters]
    assert ratios == sorted(ratios, reverse=True)
    assert found.lines()[1][3] == "4"
    assert "4×4" in found.table()


def test_the_verdict_is_a_sentence(model, inputs, check, own, doubled):
    found = check(model, lambda: own(model(inputs)), samples=3)
    assert re.fullmatch(
        r"exact: the gradients of 3 of 6 samples agree with one autograd call each at all 4 "
        r"parameters; the largest error is \d\.\de-1\d of the norm, at \w+\.\w+, sample \d "
        r"\(tolerance 1e-09\)",
        found.verdict,
    )
    wrong = check(model, lambda: own(model(inputs)), registry=doubled, samples=3)
    assert re.fullmatch(
        r"wrong: the gradients of 3 of 6 samples differ from one autograd call each at 4 of 4 "
        r"parameters, at most by 1\.0e\+00 of the norm, at \w+\.\w+, sample \d "
        r"\(tolerance 1e-09\)",
        wrong.verdict,
    )
    with pytest.raises(WrongSplitError) as caught:
        wrong.raise_if_wrong()
    first, *listed, reason, remedy = str(caught.value).splitlines()
    assert first == wrong.verdict
    assert len(listed) == 4
    assert reason.startswith("Reason: ")
    assert remedy.startswith("Remedy: ")
    assert caught.value.reason == wrong.reason
    assert caught.value.remedy == wrong.remedy


def test_the_error_lists_ten_parameters_at_most(inputs, check, own, doubled):
    model = nn.Sequential(*(nn.Linear(D, D, bias=False) for _ in range(12))).double()
    found = check(model, lambda: own(model(inputs)), registry=doubled)
    with pytest.raises(WrongSplitError, match=r"(?s)and 2 more\nReason: ") as caught:
        found.raise_if_wrong()
    assert str(caught.value).count("(Linear, Faulty)") == 10


def test_what_was_found_shows_at_a_glance(model, inputs, check, own, doubled):
    found = check(model, lambda: own(model(inputs)))
    assert repr(found) == f"Comparison({found.verdict}; verified)"
    wrong = check(model, lambda: own(model(inputs)), registry=doubled, verify=False)
    assert repr(wrong) == f"Comparison({wrong.verdict}; not verified)"
