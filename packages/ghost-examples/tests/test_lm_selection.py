"""The example of online selection of passages: what it compares is comparable, and it says it."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from ghost_core import CaptureError
from ghost_engines import Run
from ghost_examples import choosing, lm_selection
from ghost_examples.language_models import (
    Cut,
    new_gpt2,
    open_corpora,
    open_tokenizer,
    per_sample_loss,
    write_domain,
)
from ghost_examples.texts import load_domain


@pytest.fixture
def small(tmp_path: Path) -> lm_selection.Options:
    """Two domains, and everything as small as it gets."""
    for name in ("python", "scripture"):
        text, cut = load_domain(name)[:2000], Cut(8, 4, by_block=True)
        write_domain(tmp_path / "corpus", name, [text], open_tokenizer("embedded"), cut)
    return lm_selection.Options(
        output=tmp_path / "out",
        corpus=str(tmp_path / "corpus"),
        seeds=1,
        steps=1,
        candidates=4,
        chosen=2,
        known=1,
        test=2,
    )


@pytest.mark.stress
def test_it_prints_a_row_for_each_way_and_draws_them(
    small: lm_selection.Options, capsys: pytest.CaptureFixture[str]
) -> None:
    again = lm_selection.Options(**{**vars(small), "output": small.output.parent / "again"})
    found = [lm_selection.run(each) for each in (small, small, again)]
    assert found[0] == found[1] == found[2]
    header, *rows, path = capsys.readouterr().out.splitlines()[:7]
    assert "loss on python" in header
    assert [row[:14].strip() for row in rows] == [*choosing.WAYS]
    assert Path(path).stat().st_size > 10_000
    other = {**vars(small), "output": small.output.parent / "other", "test": 900}
    with pytest.raises(CaptureError, match="and 1 \\+ 900 are asked for"):
        lm_selection.run(lm_selection.Options(**other))


def test_each_way_chooses_as_many_and_by_what_it_says(small: lm_selection.Options) -> None:
    corpora = open_corpora(small.corpus, (), 8, small.output)
    model = new_gpt2("tiny", vocabulary=corpora.train.vocabulary, length=8)
    samples = [corpora.train[at] for at in (0, 1, -1, -2)]
    tokens = torch.stack([each["input_ids"] for each in samples])
    ids = torch.tensor([each["sample_id"] for each in samples])
    optimizer = torch.optim.AdamW(model.parameters())
    targets = {"known": lambda: per_sample_loss(model, tokens[2:3]).mean()}
    own = partial(per_sample_loss, model, tokens)
    chosen = {}
    for name, way in choosing.WAYS.items():
        config = way.config(small.output / name, small.chosen)
        with Run(model, optimizer, config, directions=targets) as run:
            chosen[name] = way.choose(run, own, ids, small.chosen, 0.1).tolist()
    assert all(len(set(each)) == 2 for each in chosen.values())
    order = per_sample_loss(model, tokens).argsort().tolist()
    assert chosen["lowest loss"] == order[:2]
    assert chosen["highest loss"] == order[:-3:-1]
    assert chosen["TopK"][0] == chosen["Greedy"][0] == 2  # the passage that is to be learnt


class KilledError(Exception):
    """Stands for what ends a process."""


@pytest.mark.stress
@pytest.mark.parametrize("name", ["at random", "Greedy"])
def test_a_way_that_was_stopped_goes_on_as_if_it_was_not(
    name: str, small: lm_selection.Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends in the fifth step, one after its last checkpoint."""
    asked = lm_selection.Options(**{**vars(small), "steps": 12})
    corpora = open_corpora(asked.corpus, (), 8, asked.output)
    whole = lm_selection.train(name, corpora, asked, 0)
    other = lm_selection.Options(**{**vars(asked), "output": asked.output / "killed"})
    made, steps = lm_selection.Stride.step, []

    def breaks(stride: lm_selection.Stride) -> None:
        made(stride)
        steps.append(stride.rate)
        if len(steps) == 5:
            raise KilledError

    monkeypatch.setattr(lm_selection.Stride, "step", breaks)
    with pytest.raises(KilledError):
        lm_selection.train(name, corpora, other, 0)
    assert lm_selection.train(name, corpora, other, 0) == whole
    assert len(steps) == 5 + 8
    assert steps[4] == steps[5]  # of the fifth step, made twice


def test_what_does_not_fit_is_a_line(
    small: lm_selection.Options, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--corpus", small.corpus, "--output", str(small.output), "--length", "8"]
    with pytest.raises(SystemExit, match="2"):
        lm_selection.main([*given, "--target", "pyhton"])
    assert capsys.readouterr().err == (
        "unknown target 'pyhton'; did you mean 'python'? Available: python, scripture.\n"
    )


def test_another_comparison_is_not_gone_on_with(small: lm_selection.Options) -> None:
    (small.output / "runs").mkdir(parents=True)
    options = small.output / "options.json"
    for content, message in (("{", "does not say what options"), ("[]", "no options by name")):
        options.write_text(content)
        with pytest.raises(CaptureError, match=message):
            lm_selection.run(small)
    options.write_text('{"corpus": "other"}')
    with pytest.raises(CaptureError, match=r"has corpus='other', and this one corpus=.*"):
        lm_selection.run(small)


def test_options_that_do_not_fit_are_refused() -> None:
    with pytest.raises(CaptureError, match="5 cannot be chosen out of 4"):
        lm_selection.Options(chosen=5, candidates=4)
    with pytest.raises(CaptureError, match="seeds must be at least 1"):
        lm_selection.Options(seeds=0)
