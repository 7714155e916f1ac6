"""The example of projection errors: the formula against draws, and what is printed and written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Size, nn

from ghost_engines import Block, ProjectionEngine
from ghost_examples import projection_error as example

SMALL = ["--dims", "4", "64", "--samples", "3", "--seeds", "2", "--steps", "1"]


def test_rank_one_is_the_closed_form() -> None:
    left, right = (torch.nn.functional.normalize(torch.randn(n), dim=0) for n in (9, 7))
    gradient = torch.outer(left, right).double()
    block = Block("weight", Size((9, 7)), 0, 3, 4)
    found = example.predicted_variance(gradient, gradient, block)
    assert found == pytest.approx((1 + 2 / 3) * (1 + 2 / 4) - 1)
    whole = Block("weight", Size((9, 7)), 0, 9, 4)
    assert example.predicted_variance(gradient, gradient, whole) == pytest.approx(2 / 4)


@pytest.mark.stress
@pytest.mark.parametrize("dims", [(3, 4), (9, 4), (3, 7)])
def test_variance_of_drawn_maps_is_as_predicted(dims: tuple[int, int]) -> None:
    torch.manual_seed(1)
    pair = torch.randn(2, 9, 7, dtype=torch.float64)
    model = nn.Linear(7, 9, bias=False).double()
    found = []
    for seed in range(10_000):
        engine = ProjectionEngine(model, dims={"weight": dims}, seed=seed)
        first, second = engine.project({"weight": pair})
        found.append(float(first @ second))
    predicted = example.predicted_variance(pair[0], pair[1], engine.layout[0])
    assert torch.tensor(found, dtype=torch.float64).var() == pytest.approx(predicted, rel=0.1)


def test_it_prints_and_writes_a_row_for_each_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example.main([*SMALL, "--output", str(tmp_path / "out")])
    titles, *rows = capsys.readouterr().out.splitlines()
    assert titles.split() == ["dim", "columns", *example.KINDS, "predicted"]
    assert [row.split()[0] for row in rows] == ["4", "64"]
    written = json.loads((tmp_path / "out/errors.json").read_text())["rows"]
    assert written[0]["predicted"] > written[1]["predicted"] > 0
    assert written[0]["errors"]["gaussian"] > written[1]["errors"]["gaussian"]
    assert "predicted" in (tmp_path / "out/errors.svg").read_text()
