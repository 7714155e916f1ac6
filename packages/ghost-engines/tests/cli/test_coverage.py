"""The command `ghost coverage`: what handles which module."""

import pytest

from ghost_core.tracking import Refused
from ghost_engines import cli

HEAD = ["module", "class", "sampler", "parameters", "numbers"]


def covered(capsys, *arguments):
    """Return the exit status, the table and what is below it."""
    status = cli.main(["coverage", *arguments])
    table, _, below = capsys.readouterr().out.partition("\n\n")
    return status, [line.split("\t") for line in table.splitlines()], below


def test_every_module_has_a_line(capsys):
    assert covered(capsys, "subjects:normalised") == (
        0,
        [
            HEAD,
            ["0", "Linear", "LinearSampler", "weight, bias", "42"],
            ["1", "BatchNorm1d", "BatchNormSampler", "weight, bias", "14"],
            ["2", "Linear", "LinearSampler", "weight, bias", "24"],
        ],
        "tracked: 6 of 6 trainable parameters\n",
    )


@pytest.mark.parametrize(
    "given", [["--layers", "0,2.weight", "--exclude", "0.bias"], ["--layers", "*.weight"]]
)
def test_what_is_left_out_has_none(capsys, given):
    assert covered(capsys, "subjects:mlp", *given) == (
        0,
        [
            HEAD,
            ["0", "Linear", "LinearSampler", "weight", "35"],
            ["2", "Linear", "LinearSampler", "weight", "21"],
        ],
        "tracked: 2 of 4 trainable parameters\n",
    )


def test_a_module_that_nobody_handles_is_a_refusal(capsys, monkeypatch):
    refused = Refused("unknown")
    monkeypatch.setattr("ghost_core.tracking.SamplerRegistry.find", lambda *_, **__: refused)
    assert cli.main(["coverage", "subjects:mlp"]) == 1
    assert "refused: no per-sample gradients for these modules:\n" in capsys.readouterr().out


def test_what_selects_nothing_is_an_error(capsys):
    assert cli.main(["coverage", "subjects:mlp", "--layers", "missing"]) == 2
    assert "missing" in capsys.readouterr().err
