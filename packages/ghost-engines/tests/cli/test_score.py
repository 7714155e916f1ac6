"""The command `ghost score`, run as a user or a script runs it."""

import csv
import importlib
import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from command_kit import parts, score

from ghost_core import Engine
from ghost_core.plugins import installed
from ghost_core.tracking import Refused
from ghost_engines import score_dataset
from ghost_engines.cli.functions import find_function
from ghost_engines.cli.losses import next_token_losses

MLP = ("subjects:mlp", "--data", "subjects:batch", "--loss", "subjects:cross_entropy")
TARGETS = ("--targets", "val=subjects:batch", "again=subjects:batch")


def read(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def subjects():
    """The module with the functions that the command is given."""
    find_function("subjects:mlp", "MODEL")
    return sys.modules["subjects"]


def expected(subjects, **options):
    torch.manual_seed(0)
    model, batch = subjects.mlp().double(), subjects.batch()
    batch["inputs"] = batch["inputs"].double()
    return score_dataset(model, subjects.cross_entropy, batch, {"val": batch}, **options)


def test_scores_are_those_of_score_dataset(subjects, tmp_path, capsys):
    table = expected(subjects)
    assert score(*MLP, *TARGETS, "--dtype", "float64", "--out", "scores.csv", "--top", 1) == 0
    said = capsys.readouterr()
    assert said.err == ""
    tables, _ = parts(said.out + "\n\n")
    summary, ends = tables
    assert summary == [
        ["property", "value"],
        ["model", "subjects:mlp (Sequential)"],
        ["parameters", "66"],
        ["dtype", "float64"],
        ["device", "cpu"],
        ["data", "subjects:batch"],
        ["target val", "subjects:batch"],
        ["target again", "subjects:batch"],
        ["loss", "subjects:cross_entropy"],
        ["samples", "6"],
        ["verified", "yes"],
    ]
    rows = read("scores.csv")
    found = np.array([float(row["score_val"]) for row in rows])
    np.testing.assert_allclose(found, table.scores[:, 0], rtol=1e-12)
    assert [row["score_again"] for row in rows] == [row["score_val"] for row in rows]
    np.testing.assert_allclose([float(row["norm"]) for row in rows], table.norms, rtol=1e-12)
    assert ends[0] == ["of", "which", "sample", "score", "norm"]
    best = int(found.argmax())
    shown = [str(best), f"{found[best]:.6g}", f"{table.norms[best]:.6g}"]
    assert ends[1] == ["val", "most helpful", *shown]
    assert {row[0] for row in ends[1:]} == {"val", "again"}
    assert all((float(row[3]) > 0) == (row[1] == "most helpful") for row in ends[1:])


def test_a_data_set_and_a_picture(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    pairs = ("subjects:mlp", "--data", "subjects:dataset", "--loss", "subjects:of_pairs")
    assert score(*pairs, "--targets", "val=subjects:dataset", "--plot", "scores.png") == 0
    assert (tmp_path / "scores.png").stat().st_size > 1000
    assert "samples\t6\n" in capsys.readouterr().out


def test_ids_are_found_under_a_key_and_norms_left_out(tmp_path):
    numbered = ("subjects:mlp", "--data", "subjects:numbered", "--loss", "subjects:cross_entropy")
    arguments = (*numbered, *TARGETS[:2], "--ids", "id", "--no-norms", "--out", "scores.jsonl")
    assert score(*arguments) == 0
    rows = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert [list(row) for row in rows] == [["id", "score_val"]] * 6
    assert [row["id"] for row in rows] == [0, 2, 4, 6, 8, 10]


@pytest.mark.parametrize("kind", ["npy", "safetensors"])
def test_all_samples_of_a_file_are_scored(kind, subjects, tmp_path):
    ids = torch.randint(0, 19, (11, 6), generator=torch.Generator().manual_seed(1))
    ids[3:6, 4:] = -1
    np.save(tmp_path / "ids.npy", ids.numpy())
    importlib.import_module("safetensors.torch").save_file(
        {"input_ids": ids}, tmp_path / "ids.safetensors"
    )
    arguments = ("subjects:tiny", "--data", f"ids.{kind}", "--targets", "val=ids.npy")
    assert score(*arguments, "--batch-size", 4, "--dtype", "float64", "--out", "scores.csv") == 0
    torch.manual_seed(0)
    batch = {"input_ids": ids.clamp(min=0), "attention_mask": (ids >= 0).long()}
    table = score_dataset(subjects.tiny().double(), next_token_losses, batch, {"val": batch})
    found = [float(row["score_val"]) for row in read("scores.csv")]
    np.testing.assert_allclose(found, table.scores[:, 0], rtol=1e-9)


def test_engines_go_by_name_those_of_plugins_too(monkeypatch, capsys):
    class Counting(Engine[torch.Tensor]):
        """Gives each sample the number of its gradient's parts."""

        def on_start(self, batch):
            self.counts = torch.zeros(batch.n)

        def on_gradient(self, pass_, parameter, gradient):
            self.counts[pass_.samples] += 1

        def on_end(self, batch):
            return self.counts

    found = installed()
    offered = replace(found, engines={**found.engines, "counting": Counting})
    monkeypatch.setattr("ghost_engines.dataset.score.installed", lambda: offered)
    assert score(*MLP, "--engine", "counting", "--top", 6) == 0
    _, table = capsys.readouterr().out.split("\n\n")
    titles, *rows = [line.split("\t") for line in table.splitlines()]
    assert titles == ["of", "which", "sample", "score"]
    assert [row[:2] for row in rows] == [["counting", "highest"]] * 6 + [["counting", "lowest"]] * 6
    assert {row[3] for row in rows} == {"4"}
    assert score(*MLP, "--engine", "norm") == 0
    assert "\nnorm\thighest\t" in capsys.readouterr().out


def test_a_refusal_is_no_success(capsys, monkeypatch):
    monkeypatch.setattr(
        "ghost_core.tracking.SamplerRegistry.find", lambda *_, **__: Refused("unknown")
    )
    assert score(*MLP, *TARGETS) == 1
    said = capsys.readouterr()
    assert said.out.startswith("refused: no per-sample gradients for these modules:\n")
    assert said.err == ""


def test_an_interrupt_leaves_a_clean_line_and_no_file(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("ghost_engines.progress._PATIENCE", 0.0)
    arguments = ("subjects:mlp", "--data", "subjects:batch", "--loss", "subjects:interrupted")
    with monkeypatch.context() as patch:
        patch.setattr("sys.stderr.isatty", lambda: True)
        status = score(*arguments, *TARGETS[:2], "--batch-size", 2, "--out", "scores.csv")
    assert status == 130
    said = capsys.readouterr()
    assert said.out == ""
    assert "score:   0%" in said.err
    assert said.err.endswith("\nghost: interrupted\n")
    assert not (tmp_path / "scores.csv").exists()


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ([*MLP], "--targets: give at least one, as NAME=DATA"),
        ([*MLP, "--targets", "subjects:batch"], "--targets: 'subjects:batch' is not of the form"),
        ([*MLP, "--targets", "a=x", "a=y"], "--targets: there are two of the name 'a'"),
        ([*MLP, "--targets", "a=none.npy"], "--targets a: none.npy cannot be read: No such file"),
        ([*MLP, "--targets", "a=none"], "--targets a: none is neither a .txt, .jsonl"),
        ([*MLP, "--targets", "a=subjects:nothing"], "--targets a: subjects has no 'nothing'"),
        ([*MLP, *TARGETS, "--out", "scores.xlsx"], "unknown kind of file '.xlsx'. Available: .csv"),
        ([*MLP, *TARGETS, "--out", "none/a.csv"], "there is no folder none to write a.csv to"),
        ([*MLP, *TARGETS, "--plot", "a.bmp"], "unknown kind of picture '.bmp'. Available: .pdf"),
        ([*MLP, *TARGETS, "--top", 0], "--top must be at least 1, not 0"),
        ([*MLP, *TARGETS, "--batch-size", 0], "batch_size must be at least 1, not 0"),
        ([*MLP, *TARGETS, "--seed", -1], "--seed must be from 0 to 2**32 - 1, not -1"),
        ([*MLP, *TARGETS, "--engine", "dots"], "unknown engine 'dots'"),
        ([*MLP, *TARGETS, "--engine", "gram"], "engine 'gram' takes no targets"),
        ([*MLP, "--engine", "gram"], "engine 'gram' gives no table by sample"),
        ([*MLP, *TARGETS, "--ids", "id"], "train: a batch has no ids under 'id'"),
        ([*MLP, *TARGETS, "--layers", "head"], "unknown layer 'head'"),
        ([*MLP[:4], "subjects:mean", *TARGETS], "target 'val': losses are float32 of shape ()"),
        ([*MLP[:4], "subjects:broken", *TARGETS], "--loss: subjects:broken raised KeyError"),
        (["subjects:mlp", "--data", "subjects:number", *MLP[3:], *TARGETS], "train is of type int"),
    ],
)
def test_what_cannot_be_used_is_one_line_of_error(arguments, what, capsys, tmp_path):
    before = set(tmp_path.iterdir())
    assert score(*arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"ghost: {what}")
    assert len(said.err.splitlines()) == 1
    assert {path for path in tmp_path.iterdir() if path.suffix != ""} - before == set()
