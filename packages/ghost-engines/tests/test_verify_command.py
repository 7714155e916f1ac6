"""`ghost verify`, on models and data that a user names."""

import json
import re
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ghost_core import GhostError
from ghost_core.tracking import Refused
from ghost_engines import cli
from ghost_engines.cli import models
from ghost_engines.cli.batches import load_batch
from ghost_engines.cli.losses import next_token_losses

SUBJECTS = """
import numpy as np
import torch
from torch import nn
from ghost_core.testing import TinyTransformer

NUMBER = 3


def tiny():
    return TinyTransformer()


def mlp():
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def normalised():
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3))


def dropping():
    return nn.Sequential(nn.Linear(5, 7), nn.Dropout(0.5), nn.Linear(7, 3))


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, inputs):
        return inputs * self.scale


class Factory:
    make = staticmethod(mlp)


def batch():
    generator = torch.Generator().manual_seed(1)
    return {
        "inputs": torch.randn(6, 5, generator=generator),
        "labels": torch.arange(6) % 3,
        "names": list("abcdef"),
    }


def ids():
    return torch.randint(0, 19, (5, 7), generator=torch.Generator().manual_seed(1))


def cross_entropy(model, batch):
    logits = model(batch["inputs"])
    return nn.functional.cross_entropy(logits, batch["labels"], reduction="none")


def coupled(model, batch):
    losses = cross_entropy(model, batch)
    return losses / losses.max()


def mean(model, batch):
    return cross_entropy(model, batch).mean()


def penalised(model, batch):
    inputs = batch["inputs"].clone().requires_grad_()
    losses = cross_entropy(model, batch | {"inputs": inputs})
    (slopes,) = torch.autograd.grad(losses.sum(), inputs, create_graph=True)
    return losses + slopes.square().sum(1)


def broken(*arguments):
    raise KeyError("a\\nb")


def leaving():
    raise SystemExit(0)


def number():
    return NUMBER
"""

MLP = ("subjects:mlp", "--data", "subjects:batch", "--loss", "subjects:cross_entropy")


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    """Work in a folder that has the module `subjects`."""
    (tmp_path / "subjects.py").write_text(SUBJECTS)
    (tmp_path / "faulty.py").write_text("import missing_dependency\n")
    (tmp_path / "raising.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    before, path = set(sys.modules), list(sys.path)
    yield
    assert sys.path == path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def verify(*arguments):
    return cli.main(["verify", *map(str, arguments)])


def parts(said):
    """Return the tables of an output into a pipe, and the text after them."""
    *tables, text = said.split("\n\n")
    return [[line.split("\t") for line in table.splitlines()] for table in tables], text


# What it says


def test_a_model_and_a_loss_of_ones_own(capsys):
    assert verify(*MLP, "--samples", 4) == 0
    said = capsys.readouterr()
    (summary, coverage, tracked, checks), verdict = parts(said.out)
    assert said.err == ""
    assert summary == [
        ["property", "value"],
        ["model", "subjects:mlp (Sequential)"],
        ["parameters", "66"],
        ["dtype", "float64"],
        ["device", "cpu"],
        ["data", "subjects:batch"],
        ["loss", "subjects:cross_entropy"],
        ["mode", "evaluation"],
    ]
    assert coverage[0] == ["class", "sampler", "parameters", "numbers"]
    assert coverage[1:] == [["Linear", "LinearSampler", "4", "66"]]
    assert tracked == [
        ["tracked: 4 of 4 trainable parameters"],
        ["compared: samples 0, 2, 3, 5 of 6"],
    ]
    titles, *rows = checks
    assert titles == [
        "parameter", "class", "sampler", "shape", "error", "sample", "tolerance", "ok"
    ]  # fmt: skip
    assert {row[0] for row in rows} == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert all(float(row[4]) < 1e-14 and row[6:] == ["1e-09", "yes"] for row in rows)
    assert [float(row[4]) for row in rows] == sorted((float(row[4]) for row in rows), reverse=True)
    assert verdict.startswith("exact: the gradients of 4 of 6 samples agree with one autograd call")
    assert verdict.count("\n") == 1


def test_losses_that_depend_on_each_other_are_wrong(capsys):
    assert verify(*MLP[:4], "subjects:coupled") == 1
    said = capsys.readouterr()
    tables, verdict = parts(said.out)
    assert said.err == ""
    assert [row[-1] for row in tables[-1][1:]] == ["WRONG"] * 4
    assert re.match(r"wrong: .*\nReason: .* depend on each other.*\nRemedy: ", verdict)


def test_a_refusal_is_no_success(capsys):
    assert verify("subjects:normalised", *MLP[1:], "--train") == 1
    said = capsys.readouterr()
    assert said.err == ""
    assert "mode\ttraining\n\nrefused: gradients cannot be split by sample" in said.out
    assert "normalises over the batch" in said.out
    assert verify("subjects:normalised", *MLP[1:]) == 0


def test_a_layer_that_nobody_handles_is_a_refusal(capsys, monkeypatch):
    refused = Refused("unknown")
    monkeypatch.setattr("ghost_core.tracking.SamplerRegistry.find", lambda *_, **__: refused)
    assert verify(*MLP) == 1
    assert "\nrefused: no per-sample gradients for these modules:\n" in capsys.readouterr().out


def test_at_a_terminal_it_is_aligned_and_shows_the_worst(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr("ghost_engines.cli.verify._SHOWN", 3)
    assert verify("subjects:tiny", "--data", "subjects:ids") == 0
    out = capsys.readouterr().out
    assert "\t" not in out
    lines = out.splitlines()
    start = next(at for at, line in enumerate(lines) if line.startswith("parameter "))
    assert lines[start + 4] == "... and 11 more, which are within their tolerances"
    column = lines[start].index("class")
    assert all(line[column - 1] == " " for line in lines[start : start + 4])
    assert "tracked: 14 of 14 trainable parameters, besides 1 frozen\n" in out


def test_into_a_pipe_every_parameter_is_shown(capsys, monkeypatch):
    monkeypatch.setattr("ghost_engines.cli.verify._SHOWN", 1)
    assert verify(*MLP) == 0
    assert len(parts(capsys.readouterr().out)[0][-1]) == 1 + 4


def test_progress_is_shown_at_a_terminal_only_and_counts_samples(monkeypatch):
    counted, given = [], {}

    class Bar:
        update = counted.append

        def __init__(self, **options):
            given.update(options)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr("ghost_engines.cli.verify.tqdm", Bar)
    assert verify(*MLP, "--samples", 4) == 0
    assert counted == [1] * 4
    assert given["total"] == 4
    assert given["disable"] is None


def test_at_a_terminal_all_that_is_wrong_is_shown(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr("ghost_engines.cli.verify._SHOWN", 1)
    assert verify(*MLP[:4], "subjects:coupled") == 1
    out = capsys.readouterr().out
    assert out.count("WRONG") == 4
    assert "more, which" not in out


def test_a_verdict_that_nobody_reads_is_no_success():
    command = [sys.executable, "-m", "ghost_engines.cli", "verify", *MLP[:4], "subjects:coupled"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        running.stdout.close()
        assert running.stderr.read() == b""
    assert running.returncode == 1


def test_help_names_the_options(capsys):
    with pytest.raises(SystemExit) as caught:
        verify("--help")
    assert caught.value.code == 0
    said = capsys.readouterr().out
    for option in (
        "MODEL", "--data", "--loss", "--samples", "--batch-size", "--dtype", "--layers",
        "--exclude", "--tolerance", "--seed", "--train", "--field", "--max-tokens", "--device",
    ):  # fmt: skip
        assert option in said
    assert "Exits with 0 if all are exact; 1 if one is wrong" in said


# Options


def test_layers_and_exclude_select(capsys):
    assert verify(*MLP, "--layers", "0,2.bias", "--exclude", "0.bias") == 0
    out = capsys.readouterr().out
    assert "tracked: 2 of 4 trainable parameters\n" in out
    assert "\n0.weight\t" in out
    assert "\n2.bias\t" in out
    assert "\n0.bias\t" not in out


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [("float64", "1e-09"), ("float32", "1e-04"), ("bfloat16", "5e-02"), ("as-is", "1e-04")],
)
def test_model_and_batch_are_cast(dtype, tolerance, capsys):
    assert verify(*MLP, "--dtype", dtype) == 0
    out = capsys.readouterr().out
    assert f"dtype\t{dtype if dtype != 'as-is' else 'float32'}\n" in out
    assert f"(tolerance {tolerance})" in out


def test_a_tolerance_of_ones_own(capsys):
    assert verify(*MLP, "--tolerance", "1e-18") == 1
    assert "(tolerance 1e-18)" in capsys.readouterr().out


def test_training_mode_has_dropout_and_the_seed_draws_it(capsys):
    def rows(*options):
        assert verify("subjects:dropping", *MLP[1:], *options) == 0
        return capsys.readouterr().out.split("sample\ttolerance")[1]

    trained = rows("--train")
    assert trained == rows("--train")
    assert trained != rows()
    assert trained != rows("--train", "--seed", 1)


def test_a_dotted_function_is_found():
    assert verify("subjects:Factory.make", *MLP[1:]) == 0


# Data


def batch_of(data, **options):
    return load_batch(str(data), "subjects:tiny", torch.nn.Identity(), **options)


def test_ids_from_numpy_are_padded_with_negative_numbers(tmp_path, capsys):
    ids = np.array([[1, 2, 3, 4], [5, 6, -1, -100], [7, -1, -1, -1]], dtype=np.int32)
    np.save(tmp_path / "ids.npy", ids)
    batch = batch_of("ids.npy")
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4], [5, 6, 0, 0], [7, 0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]
    assert {each.dtype for each in batch.values()} == {torch.int64}
    assert verify("subjects:tiny", "--data", "ids.npy") == 0
    assert "batch\t3 × 4 tokens, 42 % padding\n" in capsys.readouterr().out


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
    batch = batch_of("ids.npy", batch_size=2, max_tokens=2)
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
        ("a.txt", b"", "has no text"),
        ("a.txt", b"\xff\xfe", "is not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n\n{"test": "b"}', "text 2 of a.jsonl is no JSON object with"),
        ("a.jsonl", b"[1]", "text 1 of a.jsonl is no JSON object with 'text'; --field names"),
        ("a.jsonl", b"a", "text 1 of a.jsonl is no JSON object"),
        ("a.jsonl", b'{"text": 1}', "'text' of text 1 of a.jsonl is a int, no text"),
        ("a.txt", b"a text", "only a checkpoint's folder has a tokenizer"),
        ("a.csv", b"", "neither a .txt, .jsonl, .npy or .safetensors file nor"),
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


@pytest.mark.parametrize("name", ["a.npy", "a.safetensors", "a.txt", "a.jsonl"])
def test_a_file_that_does_not_exist(name, capsys):
    assert verify("subjects:tiny", "--data", name) == 2
    said = capsys.readouterr()
    assert "o such file" in said.err
    assert name in said.err
    assert len(said.err.splitlines()) == 1


# The default loss


def naive_losses(logits, batch):
    """Return losses by a loop over tokens."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    found = []
    for sample in range(len(ids)):
        terms = [
            -logits[sample, at].log_softmax(-1)[ids[sample, at + 1]]
            for at in range(ids.shape[1] - 1)
            if mask[sample, at] and mask[sample, at + 1]
        ]
        found.append(sum(terms) / len(terms) if terms else torch.zeros(()))
    return torch.stack(found)


@pytest.fixture
def padded():
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 1, 1], [0, 1, 0, 1], [0, 0, 0, 0]])
    ids = torch.randint(1, 19, mask.shape, generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids * mask, "attention_mask": mask}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_default_loss_is_the_mean_over_tokens_that_are_not_padding(dtype, padded, transformer):
    model = transformer.to(dtype)
    losses = next_token_losses(model, padded)
    logits = model(padded["input_ids"])
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert losses.dtype == wide
    torch.testing.assert_close(losses, naive_losses(logits.to(wide), padded).to(wide))
    assert losses[-1] == 0


def test_default_loss_takes_ids_alone(padded, transformer):
    ids = padded["input_ids"]
    everything = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    expected = next_token_losses(transformer, everything)
    assert torch.equal(next_token_losses(transformer, ids), expected)
    assert torch.equal(next_token_losses(transformer, {"input_ids": ids}), expected)


def test_default_loss_gives_a_model_the_inputs_it_takes(padded, transformer):
    class Output:
        def __init__(self, logits):
            self.logits = logits

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = transformer

        def forward(self, attention_mask, input_ids, wrap=None):
            assert attention_mask is padded["attention_mask"]
            logits = self.inner(input_ids)
            return {"tuple": (logits, 0), "object": Output(logits), None: logits}[wrap]

    class Reader(torch.nn.Module):
        def forward(self, input_ids, decoder_input_ids):
            assert decoder_input_ids is input_ids
            return transformer(input_ids)

    expected = next_token_losses(transformer, padded)
    assert torch.equal(next_token_losses(Model(), padded), expected)
    assert torch.equal(next_token_losses(Reader(), padded), expected)
    for wrap in ("tuple", "object"):
        model = Model()
        model.forward = lambda attention_mask, input_ids, m=model, w=wrap: Model.forward(
            m, attention_mask, input_ids, w
        )
        assert torch.equal(next_token_losses(model, padded), expected)


def test_a_batch_that_the_default_loss_does_not_know(capsys):
    assert verify("subjects:mlp", "--data", "subjects:batch") == 2
    said = capsys.readouterr()
    assert said.err == (
        "ghost: the batch has no token ids [N, T]: give a loss for it, --loss module:function\n"
    )


def test_a_model_that_the_default_loss_does_not_know(capsys, tmp_path):
    (tmp_path / "other.py").write_text(
        "import torch\n\n\ndef model():\n    return torch.nn.Embedding(19, 3).double()\n\n\n"
        "def bags():\n    return torch.nn.EmbeddingBag(19, 3).double()\n"
    )
    assert verify("other:bags", "--data", "subjects:ids") == 2
    assert "returned no logits (5, 7, 'vocabulary'), but (5, 3): give a loss" in (
        capsys.readouterr().err
    )


# What cannot be used


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["nowhere", *MLP[1:]], "MODEL: nowhere is neither a folder nor module:function"),
        (["subjects:", *MLP[1:]], "MODEL: 'subjects:' is not of the form module:function"),
        ([":mlp", *MLP[1:]], "MODEL: ':mlp' is not of the form"),
        (["a b:mlp", *MLP[1:]], "MODEL: 'a b:mlp' is not of the form"),
        (["subject:mlp", *MLP[1:]], "MODEL: there is no module 'subject', neither in the current"),
        (["subject.a:mlp", *MLP[1:]], "MODEL: there is no module 'subject', neither"),
        (["faulty:mlp", *MLP[1:]], "MODEL: importing faulty raised ModuleNotFoundError: No module"),
        (["raising:mlp", *MLP[1:]], "MODEL: importing raising raised ZeroDivisionError: division"),
        (["subjects:nothing", *MLP[1:]], "MODEL: subjects has no 'nothing'"),
        (["subjects:NUMBER", *MLP[1:]], "MODEL: subjects:NUMBER is no function, but of type int"),
        (["subjects:number", *MLP[1:]], "MODEL: subjects:number returned a int, no torch.nn.Mod"),
        (["subjects:broken", *MLP[1:]], r"MODEL: subjects:broken raised KeyError: 'a\nb'"),
        (["subjects:leaving", *MLP[1:]], "MODEL: subjects:leaving raised SystemExit: 0"),
        ([*MLP[:2], "subjects:nothing"], "--data: subjects has no 'nothing'"),
        ([*MLP[:2], "subjects:broken"], "--data: subjects:broken raised KeyError"),
        ([*MLP[:4], "subjects:nothing"], "--loss: subjects has no 'nothing'"),
        ([*MLP[:4], "subjects:broken"], "--loss: subjects:broken raised KeyError"),
        ([*MLP[:4], "subjects:number"], "--loss: subjects:number raised TypeError: number() takes"),
        ([*MLP[:4], "subjects:mean"], "losses are float64 of shape (): return one loss per sample"),
        ([*MLP[:4], "subjects:penalised"], "the comparison raised RuntimeError: "),
        ([*MLP, "--layers", "head"], "unknown layer 'head'"),
        ([*MLP, "--samples", "0"], "samples must be at least 1, not 0"),
        ([*MLP, "--tolerance", "2"], "tolerance must be between 0 and 1, not 2.0"),
        ([*MLP, "--batch-size", "0"], "--batch-size must be at least 1, not 0"),
        ([*MLP, "--batch-size", "4"], "--batch-size is for files: subjects:batch decides itself"),
        ([*MLP, "--max-tokens", "4"], "--max-tokens is for files: subjects:batch decides itself"),
        ([*MLP, "--device", "tpu9"], "--device tpu9: "),
    ],
)
def test_what_cannot_be_used_is_one_line_of_error(arguments, what, capsys):
    assert verify(*arguments) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"ghost: {what}")
    assert len(said.err.splitlines()) == 1


@pytest.mark.parametrize("arguments", [[], ["subjects:mlp"], [*MLP, "--dtype", "int8"]])
def test_arguments_that_cannot_be_understood_end_with_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        verify(*arguments)
    assert caught.value.code == 2
    assert capsys.readouterr().out == ""


# Checkpoints of transformers


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder with a small GPT-2 in bfloat16, and a tokenizer of words."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("checkpoint")
    config = transformers.GPT2Config(
        vocab_size=16, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=1
    )
    torch.manual_seed(0)
    transformers.utils.logging.disable_progress_bar()
    transformers.GPT2LMHeadModel(config).bfloat16().save_pretrained(folder)
    transformers.utils.logging.enable_progress_bar()
    words = ["<unk>", "<eos>", "the", "a", "cat", "dog", "sat", "ran", "on", "mat", "and"]
    known = tokenizers.models.WordLevel(
        {word: at for at, word in enumerate(words)}, unk_token="<unk>"
    )
    tokenizer = tokenizers.Tokenizer(known)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("the cat sat on the mat\n\na dog ran\nthe dog\n" + "and " * 99 + "\n")
    return path


@pytest.fixture
def _offline(monkeypatch):
    """Make every connection fail."""

    def connect(*_, **__):
        raise AssertionError("a connection was opened")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)


@pytest.mark.usefixtures("_offline")
def test_a_checkpoint_and_texts(checkpoint, texts, capsys):
    assert verify(checkpoint, "--data", texts) == 0
    said = capsys.readouterr()
    assert said.err == ""
    (summary, coverage, tracked, checks), verdict = parts(said.out)
    values = dict(summary)
    assert values["model"] == f"{checkpoint} (GPT2LMHeadModel)"
    assert values["dtype"] == "float64"
    assert values["batch"] == "4 × 8 tokens, 41 % padding"
    assert values["loss"] == "mean cross-entropy of each sample's next tokens"
    assert {row[0] for row in coverage} == {
        "class", "Conv1D", "Embedding", "Embedding, Linear", "LayerNorm"
    }  # fmt: skip
    assert tracked[0] == ["tracked: 16 of 16 trainable parameters"]
    assert len(checks) == 17
    assert verdict.startswith("exact: the gradients of 4 of 4 samples agree")


def test_a_checkpoint_and_lines_of_json(checkpoint, tmp_path, capsys):
    lines = [{"body": "the cat sat"}, {"body": "a dog ran then", "id": 1}]
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    arguments = (checkpoint, "--data", "texts.jsonl", "--field", "body")
    assert verify(*arguments, "--max-tokens", 3, "--train") == 0
    assert "batch\t2 × 3 tokens, 0 % padding\n" in capsys.readouterr().out
    assert verify(*arguments, "--batch-size", 1) == 0
    assert "batch\t1 × 3 tokens, 0 % padding\n" in capsys.readouterr().out


def test_a_checkpoint_as_it_is(checkpoint, texts, capsys):
    assert verify(checkpoint, "--data", texts, "--dtype", "as-is") == 0
    assert "dtype\tbfloat16\n" in capsys.readouterr().out


def test_a_checkpoint_and_a_loss_of_ones_own(checkpoint, texts, tmp_path, capsys):
    (tmp_path / "losses.py").write_text(
        "def squares(model, batch):\n"
        "    assert batch.keys() == {'input_ids', 'attention_mask'}\n"
        "    assert not model.config.use_cache\n"
        "    return model(**batch).logits.square().sum((1, 2))\n"
    )
    assert verify(checkpoint, "--data", texts, "--loss", "losses:squares") == 0
    assert "loss\tlosses:squares\n" in capsys.readouterr().out


@pytest.mark.usefixtures("checkpoint")  # skips where there is no transformers
@pytest.mark.parametrize(
    ("config", "what"),
    [
        (None, "has no config.json, so it is no checkpoint"),
        ("{", "does not name one class in 'architectures'"),
        ("[]", "does not name one class in 'architectures'"),
        ('{"model_type": "gpt2"}', "does not name one class in 'architectures'"),
        ('{"architectures": []}', "does not name one class in 'architectures'"),
        ('{"architectures": ["A", "B"]}', "does not name one class in 'architectures'"),
        ('{"architectures": ["NoSuchModel"]}', "the class NoSuchModel of empty is not one of"),
        (
            '{"architectures": ["GPT2LMHeadModel"], "auto_map": {"AutoModel": "a.B"}}',
            "the class GPT2LMHeadModel of empty is not one of transformers",
        ),
        ('{"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}', "empty cannot be loaded"),
    ],
)
def test_folders_that_are_no_checkpoint(config, what, tmp_path, capsys, texts):
    (tmp_path / "empty").mkdir()
    if config is not None:
        (tmp_path / "empty" / "config.json").write_text(config)
    assert verify("empty", "--data", texts) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("ghost: MODEL: ")
    assert len(said.err.splitlines()) == 1
    assert what in said.err


def test_a_checkpoint_without_a_tokenizer(checkpoint, tmp_path, texts, capsys):
    (tmp_path / "bare").mkdir()
    for path in checkpoint.glob("*"):
        if "tokenizer" not in path.name:
            (tmp_path / "bare" / path.name).write_bytes(path.read_bytes())
    assert verify("bare", "--data", texts) == 2
    said = capsys.readouterr()
    assert said.err.startswith("ghost: bare has no tokenizer that can be loaded: ")
    assert len(said.err.splitlines()) == 1


def test_without_transformers_the_error_names_the_extra(tmp_path, monkeypatch, capsys, texts):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"]}')
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert verify("folder", "--data", texts) == 2
    assert capsys.readouterr().err == (
        "ghost: a checkpoint needs transformers, which is not installed: "
        "pip install 'ghost-engines[transformers]'\n"
    )


def test_bars_of_transformers_are_shown_at_a_terminal_only(checkpoint, monkeypatch):
    transformers = pytest.importorskip("transformers")
    logging, seen = transformers.utils.logging, []
    for terminal in (False, True):
        monkeypatch.setattr(sys.stderr, "isatty", lambda shown=terminal: shown)
        with models._bars_at_a_terminal(transformers):
            seen.append(logging.is_progress_bar_enabled())
        assert logging.is_progress_bar_enabled()
    assert seen == [False, True]
