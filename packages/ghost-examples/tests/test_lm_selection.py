"""The example of online selection of passages: what it compares is comparable, and it says it."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from ghost_core import CaptureError
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
    found = [lm_selection.run(small) for _ in range(2)]
    assert found[0] == found[1]
    header, *rows, path = capsys.readouterr().out.splitlines()[:7]
    assert "loss on python" in header
    assert [row[:14].strip() for row in rows] == [*choosing.WAYS]
    assert Path(path).stat().st_size > 10_000
    with pytest.raises(CaptureError, match="and 1 \\+ 900 are asked for"):
        lm_selection.run(lm_selection.Options(**{**vars(small), "test": 900}))


def test_each_way_chooses_as_many_and_by_what_it_says(small: lm_selection.Options) -> None:
    corpora = open_corpora(small.corpus, (), 8, small.output)
    model = new_gpt2("tiny", vocabulary=corpora.train.vocabulary, length=8)
    samples = [corpora.train[at] for at in (0, 1, -1, -2)]
    tokens = torch.stack([each["input_ids"] for each in samples])
    ids = torch.tensor([each["sample_id"] for each in samples])
    engine = lm_selection.DotProductEngine(model)
    engine.add_direction("known", lambda: per_sample_loss(model, tokens[2:3]).mean())
    with engine:
        own = partial(per_sample_loss, model, tokens)
        step = choosing.Step(engine, own, ids, small.chosen, 0.1, torch.Generator())
        chosen = {name: way(step).tolist() for name, way in choosing.WAYS.items()}
    assert all(len(set(each)) == 2 for each in chosen.values())
    order = per_sample_loss(model, tokens).argsort().tolist()
    assert chosen["lowest loss"] == order[:2]
    assert chosen["highest loss"] == order[:-3:-1]
    assert chosen["TopK"][0] == chosen["Greedy"][0] == 2  # the passage that is to be learnt


def test_options_that_do_not_fit_are_refused() -> None:
    with pytest.raises(CaptureError, match="5 cannot be chosen out of 4"):
        lm_selection.Options(chosen=5, candidates=4)
    with pytest.raises(CaptureError, match="seeds must be at least 1"):
        lm_selection.Options(seeds=0)
