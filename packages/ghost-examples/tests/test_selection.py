"""The example of online selection: what it compares is comparable, and it says what it found."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ghost_engines import Run
from ghost_examples import choosing, selection

SMALL = selection.Options(seeds=2, steps=2, candidates=12, chosen=3, clean=10)


def test_it_prints_a_row_for_each_way(capsys: pytest.CaptureFixture[str]) -> None:
    selection.main(
        ["--seeds", "1", "--steps", "2", "--candidates", "12", "--chosen", "3", "--clean", "10"]
    )
    header, *rows = capsys.readouterr().out.splitlines()
    assert "wrong labels" in header
    assert [row[:14].strip() for row in rows] == [*choosing.WAYS, selection.CLEAN]
    assert all(row.count("%") == 2 for row in rows)


def test_runs_with_one_seed_are_the_same_each_time() -> None:
    again = [selection.run(SMALL) for _ in range(2)]
    assert again[0] == again[1]
    assert [outcome.wrong for outcome in again[0][selection.CLEAN]] == [0.0, 0.0]


def test_wrong_labels_are_as_many_as_asked_for_and_no_image_is_in_two_parts() -> None:
    found = selection.task(selection.Options(wrong=0.25, clean=30), seed=1)
    assert int(found.is_wrong.sum()) == round(0.25 * len(found.train))
    assert (len(found.clean), len(found.test)) == (30, 400)
    parts = torch.cat([found.train.inputs, found.clean.inputs, found.test.inputs])
    assert len(parts) == 1797


def chosen_by(name: str, folder: Path) -> tuple[list[int], Tensor, dict[str, Tensor]]:
    """Return what a way chooses of twelve candidates, their losses, and what changed meanwhile."""
    found, model = selection.task(SMALL, 0), selection.convnet(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=SMALL.lr)
    own = partial(selection.losses, model, found.train[:12])
    way = choosing.WAYS[name]
    targets = {"clean": lambda: selection.loss_of(model, found.clean)}
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with Run(model, optimizer, way.config(folder, 3), directions=targets) as run:
        chosen = way.choose(run, own, torch.arange(12), 3, SMALL.lr).tolist()
    after = model.state_dict()
    changed = {key: value for key, value in before.items() if not torch.equal(value, after[key])}
    return chosen, own().detach(), changed


@pytest.mark.parametrize("name", choosing.WAYS)
def test_each_way_chooses_as_many_candidates_once_each(name: str, tmp_path: Path) -> None:
    chosen, _, changed = chosen_by(name, tmp_path)
    assert len(chosen) == len(set(chosen)) == 3
    assert not changed


def test_losses_are_chosen_by_their_size(tmp_path: Path) -> None:
    lowest, losses, _ = chosen_by("lowest loss", tmp_path / "lowest")
    order = losses.argsort().tolist()
    assert lowest == order[:3]
    assert chosen_by("highest loss", tmp_path / "highest")[0] == order[:-4:-1]
