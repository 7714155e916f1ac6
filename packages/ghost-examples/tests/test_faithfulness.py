"""The figures of "What optimizers do to a value": they are what the page says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ghost_examples import faithfulness
from ghost_examples.faithfulness import SETTINGS, Task, measure

PAGE = Path(__file__).parents[3] / "docs/scores.md"


@pytest.mark.parametrize(
    ("at", "least", "unit"), [(0, 0.99, (0.9, 1.1)), (2, 0.999, (0.99, 1.01)), (6, 0.98, (0.5, 1))]
)
def test_values_are_near_to_exact_ones(at: int, least: float, unit: tuple[float, float]) -> None:
    correlation, slope = measure(SETTINGS[at], seeds=1)
    assert correlation > least
    assert unit[0] < slope < unit[1]


def test_leaving_a_sample_out_of_a_step_is_its_value() -> None:
    task = Task(0, SETTINGS[0].optimizer, SETTINGS[0].options)
    values, effects = task.values(), task.left_out(1)
    assert faithfulness.pearson(values, effects) > 0.99


@pytest.mark.stress
def test_the_page_says_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    if not PAGE.exists():
        pytest.skip("there is no documentation beside an installed package")
    faithfulness.main()
    printed = re.findall(r"^\S.* +(\S+) +(\S+)$", capsys.readouterr().out, re.M)[:8]
    rows = re.findall(r"^\| .+ \| (\.?[\d.]+) \| (\.?[\d.]+) \|$", PAGE.read_text(), re.M)[:8]
    assert len(rows) == len(SETTINGS)
    for found, said in zip(printed, rows, strict=True):
        assert float(found[0]) == pytest.approx(float(said[0]), abs=2e-4)
        assert float(found[1]) == pytest.approx(float(said[1]), abs=0.01)
