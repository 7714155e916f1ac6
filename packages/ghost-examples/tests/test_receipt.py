from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ghost_core import Batch
from ghost_engines import DotProductEngine, ProjectedRows, ProjectionEngine, Scores
from ghost_examples.demo import receipt
from ghost_examples.demo.__main__ import Sizes
from ghost_examples.demo.receipt import Receipt, Subject
from ghost_examples.demo.subjects import digits_subject, passages_subject

GOOD = Receipt("a model", 8, 1e-16, 1e-16, True, 10, 1.0, 2.0, 3.0)


@pytest.fixture
def subject(sizes: Sizes) -> Subject:
    return replace(digits_subject(sizes.recipe, "cpu"), batch=8)


def test_both_models_pass(
    subject: Subject, sizes: Sizes, capsys: pytest.CaptureFixture[str]
) -> None:
    for each in (subject, passages_subject(sizes.plan, "cpu")):
        found = receipt.check(each, samples=3, steps=2, timed=1)
        assert found.failures == []
        assert 0 < found.dots < 1e-12
        assert 0 < found.rows < 1e-12
        assert min(found.plain_ms, found.scored_ms, found.renewed_ms) > 0
        receipt.show([found])
    assert capsys.readouterr().out.count("with ghost: yes") == 2


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (replace(GOOD, dots=1e-8), "dot products deviate by 1e-08"),
        (replace(GOOD, rows=float("nan")), "rows deviate by nan"),
        (replace(GOOD, identical=False), "other parameters"),
    ],
)
def test_whatever_is_not_as_promised_is_named(wrong: Receipt, message: str) -> None:
    assert GOOD.failures == []
    (failure,) = wrong.failures
    assert failure.startswith("a model: ")
    assert message in failure


class _WrongDots(DotProductEngine):
    def on_end(self, batch: Batch[Scores]) -> Scores:
        scores = super().on_end(batch)
        dots = {name: value * (1 + 1e-3) for name, value in scores.by_parameter.items()}
        return replace(scores, by_parameter=dots)


class _WrongRows(ProjectionEngine):
    def on_end(self, batch: Batch[ProjectedRows]) -> ProjectedRows:
        with torch.no_grad():  # and training is changed as well
            next(iter(self.model.parameters())).mul_(1 + 1e-6)
        found = super().on_end(batch)
        return replace(found, rows=found.rows.flip(0))


def test_wrong_numbers_and_changed_training_are_found(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receipt, "DotProductEngine", _WrongDots)
    monkeypatch.setattr(receipt, "ProjectionEngine", _WrongRows)
    found = receipt.check(subject, samples=3, steps=2, timed=1)
    assert found.dots > 1e-6
    assert found.rows > 1e-3
    assert not found.identical
    assert len(found.failures) == 3
