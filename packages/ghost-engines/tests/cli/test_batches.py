"""The batch that `ghost verify` makes of a file."""

import re

import numpy as np
import pytest
import torch
from command_kit import batch_of, project, score, verify
from safetensors.torch import save_file

from ghost_core import GhostError
from ghost_engines.cli.batches import load_data
from ghost_engines.cli.corpora import CorpusOptions

# Data


def test_ids_from_numpy_are_padded_with_negative_numbers(tmp_path, capsys):
    ids = np.array([[1, 2, 3, 4], [5, 6, -1, -100], [7, 8, -1, -1]], dtype=np.int32)
    np.save(tmp_path / "ids.npy", ids)
    batch = batch_of("ids.npy")
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4], [5, 6, 0, 0], [7, 8, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0]]
    assert {each.dtype for each in batch.values()} == {torch.int64}
    assert verify("subjects:tiny", "--data", "ids.npy") == 0
    assert "batch\t3 × 4 tokens, 33 % padding\n" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["input_ids", "anything"])
def test_ids_from_safetensors(name, tmp_path):
    ids = torch.tensor([[1, 2, 3], [4, 5, -1]], dtype=torch.int32)
    save_file({name: ids}, tmp_path / "ids.safetensors")
    batch = batch_of("ids.safetensors")
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 5, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]


def test_a_mask_in_the_file_is_used(tmp_path):
    ids, mask = torch.tensor([[1, 2, 3]]), torch.tensor([[False, True, True]])
    save_file(
        {"input_ids": ids, "attention_mask": mask, "labels": ids + 1}, tmp_path / "ids.safetensors"
    )
    batch = batch_of("ids.safetensors")
    assert batch.keys() == {"input_ids", "attention_mask"}
    assert batch["attention_mask"].tolist() == [[0, 1, 1]]
    save_file({"input_ids": ids, "attention_mask": mask[:, :2]}, tmp_path / "bad.safetensors")
    with pytest.raises(GhostError, match=r"has shape \(1, 2\), 'input_ids' \(1, 3\)"):
        batch_of("bad.safetensors")


def test_a_batch_is_what_a_file_starts_with(tmp_path):
    np.save(tmp_path / "ids.npy", np.arange(60).reshape(20, 3))
    assert batch_of("ids.npy")["input_ids"].shape == (16, 3)
    batch = batch_of("ids.npy", batch_size=2, truncate=2)
    assert batch["input_ids"].tolist() == [[0, 1], [3, 4]]
    assert batch["attention_mask"].shape == (2, 2)
    ids = torch.arange(60).reshape(20, 3)
    save_file({"input_ids": ids, "attention_mask": ids + 1}, tmp_path / "ids.safetensors")
    batch = batch_of("ids.safetensors", batch_size=2)
    assert batch["input_ids"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert batch["attention_mask"].shape == (2, 3)


@pytest.mark.parametrize(
    ("name", "values", "what"),
    [
        ("a.npy", np.zeros((2, 3)), r"integers \[N, T\], not float64 of shape \(2, 3\)"),
        ("a.npy", np.zeros(3, int), r"not int64 of shape \(3,\)"),
        ("a.npy", np.zeros((0, 3), int), "has no token"),
        ("a.npy", b"", "is no array of numbers"),
        ("a.npy", b"nonsense", "is no array of numbers"),
        ("a.safetensors", {"x": torch.zeros(2, 3)}, r"integers \[N, T\], not float32"),
        ("a.safetensors", {"x": torch.ones(2, 3) > 0}, r"integers \[N, T\], not bool"),
        ("a.safetensors", {"x": torch.zeros(2).int()}, r"not int32 of shape \(2,\)"),
        ("a.safetensors", {"x": torch.zeros(1), "y": torch.ones(1)}, "just one tensor, not x, y"),
        ("a.safetensors", b"nonsense", "cannot be read"),
        ("a.npy", np.full((2, 3), 2**63, np.uint64), "the id 9223372036854775808, which does not"),
        (
            "a.safetensors",
            {"x": torch.from_numpy(np.full((2, 3), 2**64 - 1, np.uint64))},
            "the id 18446744073709551615, which does not fit into int64",
        ),
        ("a.txt", b"a text", "only a checkpoint's folder has a tokenizer"),
        ("a.csv", b"", "neither a .txt, .jsonl, .parquet, .npy, .safetensors file, nor"),
    ],
)
def test_files_that_are_no_batch(name, values, what, tmp_path, capsys):
    match values:
        case bytes():
            (tmp_path / name).write_bytes(values)
        case dict():
            save_file(values, tmp_path / name)
        case _:
            np.save(tmp_path / name, values)
    assert verify("subjects:tiny", "--data", name) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("ghost: --data: ")
    assert len(said.err.splitlines()) == 1
    assert re.search(what, said.err)


def test_rows_without_a_token_to_predict_are_refused_by_every_command(tmp_path, capsys):
    np.save(tmp_path / "good.npy", np.array([[1, 2, 3]]))
    np.save(tmp_path / "bad.npy", np.array([[1, 2, 3], [4, -1, 5]]))
    told = ": bad.npy: row 1 has no token to predict"
    with pytest.raises(GhostError, match=told):  # before any work is done
        load_data(
            CorpusOptions(data="bad.npy", model="subjects:tiny"), torch.nn.Identity(), batch_size=1
        )
    given = ("subjects:tiny", "--data")
    assert verify(*given, "bad.npy") == 2
    assert f"--data{told}" in capsys.readouterr().err
    assert score(*given, "bad.npy", "--targets", "a=good.npy") == 2
    assert f"--data{told}" in capsys.readouterr().err
    assert score(*given, "good.npy", "--targets", "a=bad.npy") == 2
    assert f"--targets a{told}" in capsys.readouterr().err
    assert project(*given, "bad.npy", "--store", "g") == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("name", ["a.npy", "a.safetensors", "a.txt", "a.jsonl"])
def test_a_file_that_does_not_exist(name, capsys):
    assert verify("subjects:tiny", "--data", name) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"ghost: --data: {name} cannot be read: ")
    assert "o such file" in said.err
    assert len(said.err.splitlines()) == 1


@pytest.mark.parametrize("data", ["subjects:ids", "a.npy"])
def test_a_field_goes_with_texts(data, tmp_path, capsys):
    np.save(tmp_path / "a.npy", np.array([[1, 2, 3]]))
    for option in ("--text", "--messages"):
        assert verify("subjects:tiny", "--data", data, option, "body") == 2
        said = capsys.readouterr().err
        assert said.startswith(f"ghost: {option} is for texts: {data} ")
        assert len(said.splitlines()) == 1
