from __future__ import annotations

import runpy
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from ghost_core import Batch
from ghost_engines import ProjectedRows, ProjectionEngine
from ghost_examples import mlp, mlp_dot_product, mlp_projection

SMALL = ["--steps", "2", "--train-batch", "3", "--val-batch", "2"]


def test_dot_products_are_printed_step_by_step(capsys: pytest.CaptureFixture[str]) -> None:
    mlp_dot_product.main([*SMALL, "--lr", "0.1", "--device", "cpu"])
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("step ")] == ["step 1", "step 2"]
    names = ["sample", "hidden.bias", "hidden.weight", "output.bias", "output.weight", "total"]
    table = [line.split() for line in lines if line.startswith("  ")]
    assert [row[0] for row in table] == names * 2
    assert all(len(row) == 1 + 3 for row in table)
    numbers = torch.tensor([[float(cell) for cell in row[1:]] for row in table[1:6]])
    assert torch.allclose(numbers[:-1].sum(0), numbers[-1], atol=1e-4)
    assert lines[-1].startswith("validation loss after 2 steps: ")


def test_it_runs_as_a_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "ghost_examples.mlp_dot_product"
    monkeypatch.setattr(sys, "argv", [name, *SMALL])
    monkeypatch.delitem(sys.modules, name)  # runpy warns of modules that are there already
    runpy.run_module(name, run_name="__main__")
    assert capsys.readouterr().out.splitlines()[-1].startswith("validation loss after 2 steps: ")


@pytest.mark.stress
def test_it_runs_in_a_process_of_its_own() -> None:
    command = [sys.executable, "-m", "ghost_examples.mlp_dot_product", *SMALL]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines()[-1].startswith("validation loss after 2 steps: ")


def test_the_final_loss_is_that_of_training_without_ghost() -> None:
    options = mlp.Options(steps=3)
    model, (digits, validation) = mlp.build(options), mlp.load(options)
    loss = mlp_dot_product.run(options)
    mlp.train(model, digits, options)
    assert loss == mlp.loss_of(model, validation).item()


def test_training_and_validation_samples_are_apart() -> None:
    options = mlp.Options(val_batch=100)
    digits, validation = mlp.load(options)
    assert len(digits) + len(validation) == 1797
    assert len(validation) == 100
    with pytest.raises(ValueError, match="smaller batches"):
        mlp.load(mlp.Options(train_batch=1700, val_batch=98))


def test_impossible_options_are_refused() -> None:
    with pytest.raises(ValueError, match="steps must be at least 1, not 0"):
        mlp.Options(steps=0)


@pytest.mark.parametrize("mode", mlp_projection.MODES)
def test_each_mode_succeeds(mode: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        mlp_projection.main([*SMALL, "--mode", mode])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert "NOT" not in out
    if mode == "project":
        assert "(3, " in out
        assert "hidden.weight" in out


class _Scaled(ProjectionEngine):
    factor = 1.0

    def on_end(self, batch: Batch[ProjectedRows]) -> ProjectedRows:
        found = super().on_end(batch)
        return replace(found, rows=found.rows * self.factor)


class _Touching(ProjectionEngine):
    def on_end(self, batch: Batch[ProjectedRows]) -> ProjectedRows:
        with torch.no_grad():
            next(iter(self.model.parameters()))[0] += 1e-7
        return super().on_end(batch)


@pytest.mark.parametrize("factor", [1 + 1e-6, float("nan")])
def test_the_naive_check_fails_on_wrong_rows(
    factor: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(mlp_projection, "ProjectionEngine", _Scaled)
    monkeypatch.setattr(_Scaled, "factor", factor)
    with pytest.raises(SystemExit) as ended:
        mlp_projection.main([*SMALL, "--mode", "naive_check"])
    assert ended.value.code == 1
    assert "DO NOT agree" in capsys.readouterr().out


def test_non_interference_fails_if_training_is_changed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(mlp_projection, "ProjectionEngine", _Touching)
    with pytest.raises(SystemExit) as ended:
        mlp_projection.main([*SMALL, "--mode", "non_interference"])
    assert ended.value.code == 1
    out = capsys.readouterr().out
    assert "NOT identical" in out
    assert "differs by up to" in out


def test_an_unknown_mode_lists_the_modes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        mlp_projection.main(["--mode", "guess"])
    assert ended.value.code not in (0, None)
    shown = capsys.readouterr()
    assert all(mode in shown.err + shown.out for mode in mlp_projection.MODES)
