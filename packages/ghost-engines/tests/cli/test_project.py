"""`ghost project`: from data to a store."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from command_kit import project

from ghost_core.testing import assert_within, per_sample_gradients
from ghost_engines import GradientStore, ProjectionEngine, cli
from ghost_engines.cli.losses import next_token_losses
from ghost_engines.corpus import BLOCKS_PER_DOMAIN, TokenWriter, token_path

MLP = ("subjects:mlp", "--data", "subjects:dataset", "--loss", "subjects:of_pairs")


def test_a_store_has_projected_gradients_of_a_data_set(capsys):
    given = ("--dim", 6, "--min-dim", 2, "--dims", "2=whole", "0.weight=2x3", "--seed", 3)
    assert project(*MLP, "--store", "g", *given) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert "projected now\t6\n" in said.out
    import subjects

    torch.manual_seed(3)
    model = subjects.mlp()
    store = GradientStore.open("g")
    engine = ProjectionEngine.from_manifest(model, store)
    assert {block.parameter: block.k_right for block in engine.layout}["0.weight"] == 3
    losses = subjects.cross_entropy(model, subjects.batch())
    expected = engine.project(per_sample_gradients(model, losses))
    assert_within(store.rows(), expected, expected.norm(dim=1)[:, None], tolerance=1e-5)
    assert store.ids.tolist() == list(range(6))
    report = json.loads(Path("g/project.json").read_text())
    assert report["samples"] == 6
    assert report["config"]["seed"] == 3
    assert store.manifest.notes["config"] == report["config"]
    assert project(*MLP, "--store", "g", *given) == 0
    assert "projected now\t0\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (("--dim", "many"), "--dim: 'many' is no number"),
        (("--dims", "0"), "--dims: '0' is not of the form GLOB=DIM"),
        (("--text", "body"), "--text is for texts"),
        (("--truncate", 3, "--block", 3), "--truncate and --block exclude each other"),
        (("--text", "a", "--messages", "b"), "--text and --messages exclude each other"),
        (("--prompt", "a"), "--prompt and --completion go together"),
        (("--init", "gausian"), "did you mean 'gaussian'"),
        (("--data", "none.csv"), "is neither a .txt, .jsonl, .parquet, .npy, .safetensors file"),
        (("--domains", "a", "--data", "none"), "none cannot be read"),
    ],
)
def test_what_does_not_fit_is_one_line_of_error(given, told, tmp_path, capsys):
    assert project(*MLP, "--store", "g", *given) == 2
    said = capsys.readouterr().err
    assert said.startswith("ghost: ")
    assert len(said.splitlines()) == 1
    assert told in said
    assert not (tmp_path / "g").exists()


def test_a_folder_of_texts_without_domains_says_how_to_name_them(tmp_path, capsys):
    (tmp_path / "d").mkdir()
    for name in ("web.jsonl", "code.txt", "notes.md"):
        (tmp_path / "d" / name).touch()
    assert project("subjects:tiny", "--data", "d", "--store", "g") == 2
    assert "d is a folder with files of texts" in (said := capsys.readouterr().err)
    assert said.endswith("--domains code,web\n")


def refused(capsys, *given):
    """Return what is said of other options than the store was made with."""
    assert project(*given) == 2
    said = capsys.readouterr().err
    assert "create(" not in said
    return said


def test_a_store_of_other_options_names_them_first(capsys):
    given = (*MLP, "--store", "g", "--dims", "2=whole", "--min-dim", 1)
    assert project(*given, "--dim", 6) == 0
    said = refused(capsys, *given, "--dim", 4, "--unit-norm", "--batch-size", 2)
    assert (
        "g: --dim: 6 in the store, 4 now; --unit-norm: not given in the store, given now; " in said
    )
    assert "k_total: " in said
    assert "--batch-size" not in said
    assert "--dims" not in said
    said = refused(capsys, *given, "--dim", 6, "--seed", 1)
    assert "g: --seed: 0 in the store, 1 now; MODEL: subjects:mlp is another model" in said
    assert "info.model" not in said


def test_a_file_that_changed_is_named(tmp_path, capsys):
    given = ("subjects:tiny", "--data", "ids.npy", "--store", "g", "--dim", 2, "--min-dim", 1)
    np.save(tmp_path / "ids.npy", np.arange(12).reshape(3, 4))
    assert project(*given) == 0
    np.save(tmp_path / "ids.npy", np.arange(1, 13).reshape(3, 4))
    assert f"{tmp_path / 'ids.npy'} has other content than in the store" in refused(capsys, *given)


def test_data_that_are_mended_are_projected_into_the_same_folder(checkpoint, tmp_path, capsys):
    given = (checkpoint, "--data", "d.jsonl", "--store", "g", "--dim", 2, "--min-dim", 1)
    (tmp_path / "d.jsonl").write_text('{"text": "the cat sat"}\n{"text": "a\n')
    assert "text 2 of d.jsonl is no JSON object" in refused(capsys, *given)
    (tmp_path / "d.jsonl").write_text('{"text": "the cat sat"}\n{"text": "a dog"}\n')
    assert project(*given) == 0
    assert len(GradientStore.open("g")) == 2


def test_a_store_without_rows_of_other_options_may_be_removed(capsys):
    given = (*MLP, "--store", "g", "--dim", 2, "--min-dim", 1)
    assert project(*given) == 0
    assert "no rows" not in refused(capsys, *given, "--seed", 1)
    store = GradientStore.open("g")
    shutil.rmtree("g")
    Path("g").mkdir()
    store.manifest.write(Path("g").absolute())
    assert "remove the store, which has no rows" in refused(capsys, *given, "--seed", 1)


def test_a_folder_of_something_else_is_refused(checkpoint, tmp_path, capsys):
    before = sorted(checkpoint.iterdir())
    said = refused(capsys, *MLP, "--store", checkpoint, "--dim", 2)
    assert f"--store: {checkpoint} is not empty, and holds no store, but config.json" in said
    assert f"--store {checkpoint / 'store'}" in said
    assert sorted(checkpoint.iterdir()) == before
    (tmp_path / "g").mkdir()
    (tmp_path / "g/.gitkeep").write_text("")
    for _ in range(2):  # the second one goes on
        assert project(*MLP, "--store", "g", "--dim", 2, "--min-dim", 1) == 0
    (tmp_path / "g/manifest.json").unlink()
    assert "manifest.json is missing, but there are shards" in refused(capsys, *MLP, "--store", "g")


def test_a_folder_that_cannot_be_made_is_named(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    said = refused(capsys, *MLP, "--store", "file/g", "--dim", 2, "--min-dim", 1)
    assert f"the folder {tmp_path / 'file/g'} cannot be made: Not a directory" in said


def test_the_options_of_a_store_can_be_read(capsys):
    given = ("--dim", 6, "--dims", "2=whole", "0.*=3", "--unit-norm")
    assert project(*MLP, "--store", "g", *given) == 0
    capsys.readouterr()
    assert cli.main(["store", "info", "g"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "config" in line]
    assert lines == [
        f"note: config\t{option}"
        for option in (
            "MODEL subjects:mlp", "--data subjects:dataset", "--store g",
            "--loss subjects:of_pairs", "--dim 6", "--dims 2=whole '0.*=3'", "--unit-norm",
        )
    ]  # fmt: skip


def test_an_interrupt_keeps_what_is_computed(tmp_path, capsys):
    """The loss raises an interrupt in its fourth call; a window here is a batch."""
    (tmp_path / "many.py").write_text(
        "import subjects\n\ndef batches():\n"
        "    return [subjects.batch() | {'id': [6 * at + each for each in range(6)]}"
        " for at in range(5)]\n"
    )
    given = ("subjects:mlp", "--data", "many:batches", "--store", "g", "--ids", "id")
    assert project(*given, "--loss", "subjects:interrupted") == 130
    assert "interrupted" in capsys.readouterr().err
    assert len(GradientStore.open("g")) == 18


def test_a_model_that_mixes_samples_is_refused(tmp_path, capsys):
    (tmp_path / "mixing.py").write_text(
        "import torch\nfrom torch import nn\n\nclass Mixing(nn.Module):\n"
        "    def forward(self, inputs):\n        return inputs - inputs.mean(0)\n\n"
        "def model():\n    return nn.Sequential(nn.Linear(5, 3), Mixing())\n"
    )
    assert project("mixing:model", *MLP[1:], "--store", "h") == 1
    assert capsys.readouterr().out.startswith("refused: ")


def test_losses_are_of_what_is_learnt_and_may_be_summed():
    model = torch.nn.Embedding(5, 5)
    ids = torch.tensor([[1, 2, 3, 4], [1, 2, 0, 0]])
    batch = {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])}
    each = torch.nn.functional.cross_entropy(model(ids)[:, :-1].mT, ids[:, 1:], reduction="none")
    summed = next_token_losses(model, batch, reduction="sum")
    assert_within(summed, torch.stack([each[0].sum(), each[1, 0]]), 1.0, tolerance=1e-6)
    batch["labels"] = torch.where(ids == 3, ids, -100)
    answers = next_token_losses(model, batch)
    assert_within(answers, torch.stack([each[0, 1], each[1, 0] * 0]), 1.0, tolerance=1e-6)


def test_the_launcher_of_processes_has_a_module_to_run(capsys, monkeypatch):
    import runpy
    import sys

    monkeypatch.setattr(sys, "argv", ["ghost", "--version"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("ghost_engines", run_name="__main__")
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("ghost ")


def test_a_launcher_says_which_process_this_is(capsys, monkeypatch):
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert project(*MLP, "--store", "g", "--unit", 2) == 0
        said = capsys.readouterr().out
        assert ("process\t0 of 2" in said) == (rank == "0")
    assert GradientStore.open("g").ids.tolist() == list(range(6))
    assert json.loads(Path("g/project-1-of-2.json").read_text())["samples"] == 2
    monkeypatch.setenv("RANK", "2")
    assert project(*MLP, "--store", "g") == 2
    assert "RANK=2, WORLD_SIZE=2" in capsys.readouterr().err


def test_blocks_of_tokens_keep_their_ids_and_domains(tmp_path, capsys):
    for number, domain in enumerate(("web", "code")):
        path = token_path(tmp_path / "d", "train", domain)
        first = number * BLOCKS_PER_DOMAIN
        with TokenWriter(path, vocabulary=19, length=7, first_id=first) as writer:
            writer.append(torch.arange(14 + 7 * number) % 19)
    given = ("subjects:tiny", "--data", "d", "--dim", 6, "--min-dim", 1)
    assert project(*given, "--store", "g") == 0
    store = GradientStore.open("g")
    code, web = [10**9, 10**9 + 1, 10**9 + 2], [0, 1]
    assert sorted(store.ids.tolist()) == web + code
    assert store.ids[store.groups.equal("code")].tolist() == code
    digests = {Path(file.path).name: file.digest for file in store.manifest.data_files}
    sidecar = json.loads((tmp_path / "d/train-web.json").read_text())
    assert digests["train-web.bin"] == f"sha256:{sidecar['sha256']}"
    assert project(*given, "--store", "h", "--domains", "web") == 0
    assert GradientStore.open("h").ids.tolist() == web
    capsys.readouterr()
    assert project(*given, "--store", "i", "--domains", "wev") == 2
    assert "did you mean 'web'" in capsys.readouterr().err


def test_rows_of_token_ids_are_projected_without_their_padding(tmp_path):
    np.save(
        tmp_path / "ids.npy", np.array([[1, 2, 3, 4, 5], [6, 7, 8, -1, -1], [9, 1, -1, -1, -1]])
    )
    given = ("subjects:tiny", "--data", "ids.npy", "--dim", 6, "--min-dim", 1)
    assert project(*given, "--store", "g", "--batch-size", 1) == 0
    assert json.loads(Path("g/project.json").read_text())["tokens"] == 10
    store = GradientStore.open("g")
    assert store.ids.tolist() == [0, 1, 2]
    import subjects

    torch.manual_seed(0)
    model = subjects.tiny().eval()
    engine = ProjectionEngine.from_manifest(model, store)
    losses = next_token_losses(model, torch.tensor([[6, 7, 8]]))
    expected = engine.project(per_sample_gradients(model, losses))
    assert_within(store.rows()[[1]], expected, expected.norm(dim=1)[:, None], tolerance=1e-5)
