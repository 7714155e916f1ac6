"""The example of a projected corpus: what it writes, and that it goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ghost_engines import GradientStore
from ghost_examples import lm_projection as example
from ghost_examples.texts import Passage


@pytest.mark.stress
def test_it_writes_what_it_measured_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--per-domain", "16", "--steps", "2", "--dim", "512", "--queries", "3"]
    output = tmp_path / "out"
    example.main([*given, "--output", str(output)])
    said = capsys.readouterr().out
    ways = ["ghost, whitened", "ghost, cosine", "TF-IDF", "random, same domain", "random"]
    assert [line[:22].strip() for line in said.splitlines()[2:]] == ways
    statistics = json.loads((output / "statistics.json").read_text())
    assert statistics["samples"] == statistics["projected_now"] == 60
    assert statistics["own_domain"]["random, same domain"] == 1.0
    assert list(statistics["gain_in_millinats"]) == ways
    assert json.loads((output / "config.json").read_text())["steps"] == 2
    assert GradientStore.open(output / "store").groups is not None
    example.main([*given, "--output", str(output)])
    again = json.loads((output / "statistics.json").read_text())
    assert again["projected_now"] == 0
    for name in ("gain_in_millinats", "own_domain", "mean_loss"):
        assert again[name] == statistics[name]


def test_queries_are_spread_over_what_is_held_out() -> None:
    held_out = [Passage(name, at, "", ()) for name in "abcd" for at in range(3)]
    chosen = example._spread(held_out, 4)
    assert [(passage.domain, passage.index) for passage in chosen] == [(n, 0) for n in "abcd"]
    assert example._spread(held_out, 10**6) == held_out


def test_its_help_names_the_module(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        example.main(["--help"])
    assert "usage: ghost_examples.lm_projection " in capsys.readouterr().out
