"""The command `ghost verify`, run as a user or a script runs it."""

import re
import subprocess
import sys

import pytest
from command_kit import MLP, parts, verify

from ghost_core.tracking import Refused

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


@pytest.mark.stress
def test_a_verdict_that_nobody_reads_is_no_success():
    command = [sys.executable, "-m", "ghost_engines", "verify", *MLP[:4], "subjects:coupled"]
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
        "--exclude", "--tolerance", "--seed", "--train", "--truncate", "--device",
        "--text", "--prompt", "--completion", "--messages", "--block", "--domains", "--split",
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
        ([*MLP[:4], "subjects:penalised"], "the loss depends on a gradient that was taken thr"),
        ([*MLP, "--layers", "head"], "unknown layer 'head'"),
        ([*MLP, "--samples", "0"], "samples must be at least 1, not 0"),
        ([*MLP, "--tolerance", "2"], "tolerance must be between 0 and 1, not 2.0"),
        ([*MLP, "--batch-size", "0"], "--batch-size must be at least 1, not 0"),
        ([*MLP, "--batch-size", "4"], "--batch-size is for files: subjects:batch decides itself"),
        ([*MLP, "--truncate", "4"], "--truncate is for files: subjects:batch decides itself"),
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
