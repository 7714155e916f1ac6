"""Commands on checkpoints of transformers."""

import builtins
import json
import os
import runpy
import shutil
import socket
import subprocess
import sys
from importlib.machinery import PathFinder

import pytest
import torch
from command_kit import batch_of, parts, project, score, verify
from safetensors.torch import load_file, save_file

from ghost_engines import GradientStore, cli, project_dataset
from ghost_engines.cli import models
from ghost_engines.cli.losses import next_token_losses
from ghost_engines.cli.models import load_model
from ghost_engines.corpus import TokenWriter, token_path
from ghost_engines.store import DataFile

# Checkpoints of transformers


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
    assert values["texts"] == "cut to 8: 1 of 4"
    assert values["loss"] == "mean cross-entropy of each sample's next tokens"
    assert {row[0] for row in coverage} == {
        "class", "Conv1D", "Embedding", "Embedding, Linear", "LayerNorm"
    }  # fmt: skip
    assert tracked[0] == ["tracked: 16 of 16 trainable parameters"]
    assert len(checks) == 17
    assert verdict.startswith("exact: the gradients of 4 of 4 samples agree")


@pytest.mark.usefixtures("_offline")
def test_texts_are_looked_up_in_a_store_and_shown(checkpoint, texts, tmp_path, capsys):
    def losses(model, batch):
        return next_token_losses(model, batch)

    texts.write_text(texts.read_text().replace("a dog ran", "<b>a</b> dog ran"))
    batch = batch_of(texts, checkpoint, model := load_model(str(checkpoint)))
    files = [DataFile.of(texts)]
    project_dataset(model, losses, [batch], tmp_path / "g", files=files, layers="*.mlp.*")
    page = tmp_path / "out.html"
    asked = ("query", str(tmp_path / "g"), str(checkpoint), "-k", "4", "--by", "cosine")
    assert cli.main([*asked, "--text", "the dog", "--html", str(page)]) == 0
    (_, found), _ = parts(capsys.readouterr().out + "\n\n")
    assert found[1][4:] == ["2", "-", "the dog"]
    assert float(found[1][2]) == pytest.approx(1, abs=1e-3)
    assert {row[6][:9] for row in found[1:]} == {"the dog", "<b>a</b> ", "the cat s", "and and a"}
    assert "&lt;b&gt;a&lt;/b&gt; dog ran" in page.read_text()
    assert "<b>a" not in page.read_text()
    again = tmp_path / "asked.jsonl"
    again.write_text('{"q": "the cat sat on the mat"}\n{"q": "the dog"}\n')
    assert cli.main([*asked, "--file", str(again), "--text", "q", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert [each["text"] for each in said["queries"]] == ["the cat sat on the mat", "the dog"]
    assert [each["found"][0]["id"] for each in said["queries"]] == [0, 2]
    texts.write_text("one line\n")
    assert cli.main([*asked, "--text", "the dog"]) == 0
    assert "has changed since" in capsys.readouterr().err
    assert cli.main([*asked, "--text", "the dog", "--data", str(texts)]) == 2
    assert "--data has 1 samples" in capsys.readouterr().err


PLANTED = """
    transformers regex yaml tokenizers safetensors sympy jinja2 tqdm random tyro signal typing json
    dataclasses torch
""".split()  # noqa: SIM905
"""Modules that may be imported while a checkpoint is loaded and verified."""

COMMAND = ["verify", ".", "--data=texts.txt"]


@pytest.fixture
def downloaded(checkpoint, texts, tmp_path):
    """A checkpoint that texts lie in."""
    folder = tmp_path / "downloaded"
    shutil.copytree(checkpoint, folder)
    shutil.copy(texts, folder / "texts.txt")
    return folder


def test_no_file_that_lies_in_a_checkpoint_is_found(downloaded, monkeypatch, capsys):
    """Whatever is imported on the way, a file beside the weights would not be what is found."""
    (downloaded / "lying_there.py").touch()
    monkeypatch.chdir(downloaded)
    monkeypatch.setattr(sys, "path", [os.getcwd(), *filter(None, sys.path)])
    monkeypatch.setattr(sys, "argv", ["ghost", *COMMAND])
    real, main, found = builtins.__import__, cli.main, []

    def looking(*arguments, **named):
        found.append(PathFinder.find_spec("lying_there"))
        return real(*arguments, **named)

    def watched():
        with monkeypatch.context() as patched:
            patched.setattr(builtins, "__import__", looking)
            return main()

    monkeypatch.setattr(cli, "main", watched)
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("ghost_engines", run_name="__main__")
    assert ended.value.code == 0
    assert len(found) > 20
    assert not any(found)
    assert capsys.readouterr().err == ""


@pytest.mark.stress
def test_no_file_that_lies_in_a_checkpoint_is_imported(downloaded, tmp_path):
    """As launchers of processes run the command, for which Python adds the working directory."""
    for name in PLANTED:
        code = f"from pathlib import Path\nPath({str(tmp_path)!r}, 'ran-{name}').touch()\n"
        (downloaded / f"{name}.py").write_text(code)
    command = [sys.executable, "-m", "ghost_engines", *COMMAND]
    done = subprocess.run(command, cwd=downloaded, capture_output=True, text=True)
    assert list(tmp_path.glob("ran-*")) == []
    assert (done.returncode, done.stderr) == (0, "")


def test_a_checkpoint_and_lines_of_json(checkpoint, tmp_path, capsys):
    lines = [{"body": "the cat sat"}, {"body": "a dog ran then", "id": 1}]
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    arguments = (checkpoint, "--data", "texts.jsonl", "--text", "body")
    assert verify(*arguments, "--truncate", 3, "--train") == 0
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
@pytest.mark.usefixtures("_offline")
def test_all_texts_of_a_file_are_scored(checkpoint, texts, capsys):
    """Batches are padded by themselves, which changes no score."""
    printed = []
    for size in (2, 4):
        arguments = ("--targets", f"val={texts}", "--batch-size", size, "--truncate", 8)
        arguments = (*arguments, "--dtype", "float64")
        assert score(checkpoint, "--data", texts, *arguments, "--out", f"{size}.jsonl") == 0
        assert "samples\t4\n" in capsys.readouterr().out
        with open(f"{size}.jsonl", encoding="utf-8") as file:
            printed.append([json.loads(line)["score_val"] for line in file])
    assert printed[0] == pytest.approx(printed[1], rel=1e-9)


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
        (
            '{"architectures": ["GPT2Config"], "model_type": "gpt2"}',
            "the class GPT2Config of empty is not one of transformers",
        ),
    ],
)
def test_folders_that_are_no_checkpoint(config, what, tmp_path, capsys, texts):
    if not what.startswith(("has", "does")):
        pytest.importorskip("transformers")  # whose classes it may name
    (tmp_path / "empty").mkdir()
    if config is not None:
        (tmp_path / "empty" / "config.json").write_text(config)
    assert verify("empty", "--data", texts) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("ghost: MODEL: ")
    assert len(said.err.splitlines()) == 1
    assert what in said.err


def test_weights_that_are_missing_are_named(checkpoint, tmp_path, texts, capsys):
    """Transformers draws random numbers in their place."""
    shutil.copytree(checkpoint, tmp_path / "short")
    path = tmp_path / "short" / "model.safetensors"
    kept = load_file(path)
    del kept["transformer.h.0.mlp.c_fc.bias"], kept["transformer.ln_f.weight"]
    save_file(kept, path, {"format": "pt"})
    assert verify("short", "--data", texts) == 2
    assert capsys.readouterr().err == (
        "ghost: MODEL: short has no weights for transformer.h.0.mlp.c_fc.bias, "
        "transformer.ln_f.weight, which the class in 'architectures', GPT2LMHeadModel, has\n"
    )


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


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("a.txt", b"", "has no text"),
        ("a.txt", b"\xff\xfe", "is not UTF-8"),
        (
            "a.jsonl",
            b'{"text": "a a"}\n\n{"test": "b"}',
            "text 2 of a.jsonl has no field 'text', but",
        ),
        ("a.jsonl", b"[1]", "text 1 of a.jsonl is no JSON object"),
        ("a.jsonl", b"a", "text 1 of a.jsonl is no JSON object"),
        ("a.jsonl", b'{"text": 1}', "'text' of text 1 of a.jsonl is a int, no text"),
        ("a.parquet", b"nonsense", "is no Parquet file"),
    ],
)
def test_files_that_have_no_texts(checkpoint, name, content, what, tmp_path, capsys):
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    for run, option in ((verify, "--data"), (score, "--data"), (score, "--targets a")):
        given = ("--data", name) if option == "--data" else ("--data", "good.jsonl")
        (tmp_path / "good.jsonl").write_text('{"text": "the cat"}\n')
        targets = () if run is verify else ("--targets", f"a={name}")
        assert run(checkpoint, *given, *targets) == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.startswith(f"ghost: {option}: ")
        assert len(said.err.splitlines()) == 1
        assert what in said.err


@pytest.mark.usefixtures("_offline")
def test_domains_of_texts_are_projected_and_kept_apart(checkpoint, texts, tmp_path, capsys):
    (tmp_path / "d").mkdir()
    shutil.copy(texts, tmp_path / "d/web.txt")
    chats = {"prompt": "the cat", "completion": "sat on"}
    (tmp_path / "d/code.jsonl").write_text(json.dumps({"text": "a dog ran", **chats}) + "\n")
    given = ("--store", "g", "--dim", 8, "--min-dim", 1, "--domains", "web,code", "--truncate", 6)
    assert project(checkpoint, "--data", "d", *given, "--tokens-per-batch", 12) == 0
    assert "\ncode\t1\t" in capsys.readouterr().out
    store = GradientStore.open("g")
    assert store.ids.tolist() == [0, 1, 2, 3, 10**9]
    assert store.groups.equal("code").tolist() == [False] * 4 + [True]
    begin, end = (int(store.columns[name][4]) for name in ("begin", "end"))
    assert (begin, end) == (0, (tmp_path / "d/code.jsonl").stat().st_size)
    assert store.columns["source"].tolist() == [0, 0, 0, 0, 1]
    shown = _asked("g", checkpoint, capsys)
    assert shown[10**9] == "a dog ran"
    assert shown[0] == "the cat sat on the mat"
    assert [file.path for file in store.manifest.data_files] == [
        str(tmp_path / "d/web.txt"), str(tmp_path / "d/code.jsonl")
    ]  # fmt: skip


def test_texts_that_are_too_long_are_cut_only_on_request(checkpoint, texts, capsys):
    assert project(checkpoint, "--data", texts, "--store", "g", "--dim", 8) == 2
    assert "has 99 tokens, and the model takes 8" in capsys.readouterr().err
    assert project(checkpoint, "--data", texts, "--store", "h", "--dim", 8, "--block", 8) == 0
    assert len(GradientStore.open("h")) == (6 + 3 + 2 + 99 + 4) // 8
    assert _asked("h", checkpoint, capsys)[1].split()[-5:] == ["the", "dog", "<eos>", "and", "and"]


def test_no_command_cuts_a_text_unasked_but_verify_which_says_so(checkpoint, texts, capsys):
    told = "text 4 of " + f"{texts} has 99 tokens, and the model takes 8"
    short = texts.with_name("short.txt")
    short.write_text("the cat sat on the mat\n")
    for data, target, option in ((texts, short, "--data"), (short, texts, "--targets a")):
        given = ("--data", data, "--targets", f"a={target}")
        assert score(checkpoint, *given) == 2
        assert f"{option}: {told}" in (said := capsys.readouterr().err)
        assert "Remedy: cut what is longer (--truncate 8), or pack all texts into" in said
        assert score(checkpoint, *given, "--truncate", 8, "--dtype", "float64") == 0
    assert verify(checkpoint, "--data", texts, "--truncate", 9) == 2
    assert "text 4" in capsys.readouterr().err
    assert verify(checkpoint, "--data", short) == 0
    assert "cut to" not in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "the"])
def test_texts_without_a_token_to_predict_are_refused(checkpoint, text, tmp_path, capsys):
    (tmp_path / "bad.jsonl").write_text(json.dumps({"text": text}) + "\n")
    (tmp_path / "good.jsonl").write_text(json.dumps({"text": "the cat sat"}) + "\n")
    told = "text 1 of bad.jsonl has no token to predict"
    for run, *given in (
        (verify, "--data", "bad.jsonl"),
        (score, "--data", "bad.jsonl", "--targets", "a=good.jsonl"),
        (score, "--data", "good.jsonl", "--targets", "a=bad.jsonl"),
        (project, "--data", "bad.jsonl", "--store", "g"),
    ):
        assert run(checkpoint, *given) == 2
        assert told in capsys.readouterr().err
    assert project(checkpoint, "--data", "good.jsonl", "--store", "h", "--dim", 8) == 0
    asked = ("query", "h", str(checkpoint))
    capsys.readouterr()
    assert cli.main([*asked, "--text", "the cat", text]) == 2
    said = capsys.readouterr().err
    assert "--text: text 2 has no token to predict" in said
    assert ("it has no tokens" in said) == (text == "")
    assert "Remedy: leave it out of the data, or take more tokens" in said
    assert cli.main([*asked, "--file", "bad.jsonl"]) == 2
    assert f"--file: {told}" in capsys.readouterr().err


def test_all_rows_of_a_file_are_asked_for(checkpoint, tmp_path, capsys):
    ids = torch.arange(40).reshape(20, 2) % 16
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file({"input_ids": ids}, tmp_path / "ids.safetensors")
    given = ("--data", "ids.safetensors", "--store", "g", "--dim", 8, "--min-dim", 1)
    assert project(checkpoint, *given) == 0
    capsys.readouterr()
    asked = ("query", "g", str(checkpoint), "--file", "ids.safetensors", "-k", "1", "--json")
    assert cli.main([*asked]) == 0
    assert len(json.loads(capsys.readouterr().out)["queries"]) == 20


def _asked(store, checkpoint, capsys):
    """Return the texts that a query shows, by id."""
    capsys.readouterr()
    command = ("query", store, str(checkpoint), "--text", "the cat sat", "-k", "99", "--json")
    assert cli.main([*command]) == 0
    (said,) = json.loads(capsys.readouterr().out)["queries"]
    return {found["id"]: found["text"] for found in said["found"]}


def test_samples_of_other_fields_are_shown_and_those_that_changed_are_not(
    checkpoint, tmp_path, capsys
):
    lines = [{"ask": "the cat", "say": "sat on"}, {"ask": "a dog", "say": "ran"}]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    given = ("--prompt", "ask", "--completion", "say", "--dim", 8, "--min-dim", 1)
    assert project(checkpoint, "--data", path, "--store", "g", *given) == 0
    assert _asked("g", checkpoint, capsys) == {0: "the cat\nsat on", 1: "a dog\nran"}
    path.write_text(json.dumps(lines[0]) + "\n")
    asked = ("query", "g", str(checkpoint), "--text", "the cat sat")
    told = "ghost: the texts of the store's samples cannot be shown: "
    assert cli.main([*asked]) == 0
    said = capsys.readouterr()
    assert said.out.endswith("\t-\n")
    assert said.err == f"{told}{path} has changed since the store was made\n"
    path.unlink()
    assert cli.main([*asked]) == 0
    said = capsys.readouterr().err
    assert said.startswith(f"{told}--data: {path} cannot be read: ")
    assert said.count("\n") == 1


def test_answers_of_a_conversation_are_learnt_by_the_template_of_a_checkpoint(checkpoint, tmp_path):
    pytest.importorskip("jinja2")
    folder = shutil.copytree(checkpoint, tmp_path / "c")
    (folder / "chat_template.jinja").write_text(
        "{% for each in messages %}"
        "{{ 'the' if each.role == 'user' else 'a' }} {{ each.content }} <eos> {% endfor %}"
        "{% if add_generation_prompt %}a {% endif %}"
    )
    said = [("user", "cat sat"), ("assistant", "dog ran")]
    chat = {"chat": [{"role": role, "content": content} for role, content in said]}
    (tmp_path / "chats.jsonl").write_text(json.dumps(chat) + "\n")
    pair = {"ask": "the cat sat <eos> a", "say": "dog ran"}  # and its end, as in the template
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair) + "\n")
    given = ("--dim", 8, "--dtype", "float32")
    chats = ("--data", "chats.jsonl", "--messages", "chat", "--store", "g")
    pairs = ("--data", "pairs.jsonl", "--prompt", "ask", "--completion", "say", "--store", "h")
    assert project(folder, *chats, *given) == project(folder, *pairs, *given) == 0
    found, expected = GradientStore.open("g"), GradientStore.open("h")
    assert torch.equal(found.losses, expected.losses)
    assert torch.equal(found.rows(), expected.rows())


def test_texts_of_a_file_that_has_changed_are_not_taken_for_the_samples(
    checkpoint, tmp_path, capsys, caplog
):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in ("the cat sat", "a dog ran")))
    given = ("--data", path, "--store", "g", "--dim", 8, "--min-dim", 1)
    assert project(checkpoint, *given) == 0
    manifest = json.loads((tmp_path / "g/manifest.json").read_text())
    (tmp_path / "g/manifest.json").write_text(json.dumps({**manifest, "notes": {}}))  # as python's
    assert _asked("g", checkpoint, capsys) == {0: "the cat sat", 1: "a dog ran"}
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[::-1]))
    assert _asked("g", checkpoint, capsys) == {0: None, 1: None}
    asked = ("query", "g", str(checkpoint), "--text", "the cat sat")
    assert cli.main([*asked]) == 0
    said = f"cannot be shown: {path} has changed since the store was made\n"
    assert capsys.readouterr().err.endswith(said)
    assert "not what" not in caplog.text
    assert cli.main([*asked, "--data", str(path)]) == 0
    assert f"{path} is not what the store was made of" in caplog.text


def test_blocks_of_tokens_are_shown_as_texts(checkpoint, tmp_path, capsys):
    with TokenWriter(token_path(tmp_path / "d", "train", "web"), vocabulary=16, length=3) as writer:
        writer.append([2, 4, 6, 3, 5, 7])
    assert project(checkpoint, "--data", "d", "--store", "g", "--dim", 8, "--min-dim", 1) == 0
    assert _asked("g", checkpoint, capsys) == {0: "the cat sat", 1: "a dog ran"}
