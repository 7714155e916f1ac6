"""The training of language models: what it leaves alone, goes on with, reports and refuses."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ghost_core import CaptureError, UnknownNameError
from ghost_engines import CorpusError, GroupValues
from ghost_examples import lm_training
from ghost_examples.kept_options import OPTIONS
from ghost_examples.language_models import (
    Options,
    launch,
    meaning,
    metrics,
    models,
    new_gpt2,
    open_corpora,
    training,
)
from ghost_examples.language_models.data import Batches

DOMAINS = ("python", "scripture")


@pytest.fixture
def small(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Options:
    """Everything as small as it gets."""
    monkeypatch.setitem(models.PRESETS, "tiny", models.Shape(1, 16, 2))
    return Options(
        results_dir=tmp_path / "results",
        corpus=str(corpus),
        steps=4,
        batch=3,
        validation=1,
        eval_every=2,
        eval_blocks=2,
        save_every=2,
        log_every=2,
        shown=1,
        dropout=0.1,
        device="cpu",
    )


def recorded(options: Options) -> metrics.Curves:
    return metrics.read_curves(options.results_dir / "run")


def test_it_ends_with_tables_plots_and_passages(
    small: Options, capsys: pytest.CaptureFixture[str]
) -> None:
    launch.run(replace(small, check_domains=True, shown=12))
    out = capsys.readouterr().out
    assert "step 4/4  loss " in out
    assert "tokens/s  00:00 left" in out
    assert "Most valuable passages, for all of them:" in out
    names = {path.name for path in small.results_dir.iterdir()}
    assert names == {
        *("options.json", "run", "without-python", "without-scripture"),
        *("loss.png", "domains.png", "values.png", "meaning.png"),
        *("domains.csv", "values.csv", "passages.md", "meaning.json"),
    }
    header, *rows = (small.results_dir / "values.csv").read_text().splitlines()
    assert header.startswith("id,value_python,value_scripture")
    assert len(rows) == 12  # four steps of three, and no sample twice
    # AdamW has no second moments in the first step, which is credited with nothing.
    assert sum(float(row.split(",")[1]) == 0 for row in rows) == 3
    assert "+0.00000" not in (small.results_dir / "passages.md").read_text()
    # The table by domain has the sums of the values by sample, which are of two domains by id.
    sums = {"python": 0.0, "scripture": 0.0}
    for row in rows:
        sample, value, *_ = row.split(",")
        sums["python" if int(sample) < 10**9 else "scripture"] += float(value)
    printed = [line.split() for line in out.splitlines() if line.startswith(DOMAINS)]
    domains = (small.results_dir / "domains.csv").read_text().splitlines()[1:]
    for line, at in zip(domains, range(2), strict=True):
        name, value, *_ = line.split(",")
        assert float(value) == pytest.approx(sums[name], abs=1e-12)
        assert printed[at][:2] == [name, f"{float(value):.4f}"]


@pytest.mark.stress
@pytest.mark.parametrize("method", ["exact", "fused", "concatenated"])
def test_training_is_that_without_values(small: Options, method: str) -> None:
    found = {}
    for each in ("none", method):
        options = replace(small, method=each, results_dir=small.results_dir / each, dropout=0.0)
        launch.run(options)
        state = torch.load(options.results_dir / "run/checkpoint.pt", weights_only=True)
        found[each] = recorded(options).train, state["objects"]["model"]
    (losses, plain), (others, other) = found.values()
    if method == "exact":
        assert losses == others
        assert all(torch.equal(plain[name], other[name]) for name in plain)
    else:
        assert list(losses.values()) == pytest.approx(list(others.values()), rel=1e-3)
    assert len(losses) == 4


class StoppedError(Exception):
    """Stands for whatever ends a process."""


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not(
    small: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = replace(small, results_dir=small.results_dir / "whole")
    launch.run(whole)

    class Stops(training.Pace):
        def stepped(self, step: int, loss: torch.Tensor) -> None:
            if step == 3:  # after a checkpoint, and a step that is lost
                raise StoppedError

    with monkeypatch.context() as patched:
        patched.setattr(training, "Pace", Stops)
        with pytest.raises(StoppedError):
            launch.run(small)
    assert not (small.results_dir / "values.csv").exists()
    launch.run(replace(small, log_every=1))
    assert recorded(small) == recorded(whole)
    for name in ("values.csv", "domains.csv", "passages.md"):
        assert (small.results_dir / name).read_bytes() == (whole.results_dir / name).read_bytes()


def test_a_run_goes_on_with_its_own_options_only(small: Options) -> None:
    launch.run(replace(small, method="none", steps=1))
    for changed in ({"lr": 0.5}, {"steps": 2}, {"domains": "python"}):
        with pytest.raises(CaptureError, match=f"has {next(iter(changed))}="):
            launch.run(replace(small, **{"method": "none", "steps": 1, **changed}))
    launch.run(replace(small, method="none", steps=1, workers=1))


def test_a_run_that_never_began_binds_nobody(small: Options) -> None:
    with pytest.raises(CorpusError):
        launch.run(replace(small, method="none", steps=1, corpus="nowhere"))
    launch.run(replace(small, method="none", steps=1))
    options = json.loads((small.results_dir / OPTIONS).read_text())
    assert options["corpus"] == small.corpus


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "exakt"}, "did you mean 'exact'"),
        ({"preset": "huge"}, "unknown preset 'huge'"),
        ({"dtype": "float16"}, "did you mean 'bfloat16'"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"lr": 0.0}, "above 0"),
        ({"check_domains": True, "method": "none"}, "method='none' has none"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises((UnknownNameError, CaptureError), match=message):
        Options(**options)  # type: ignore[arg-type]


def test_data_that_are_not_there_are_named(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = str(tmp_path / "results")
    with pytest.raises(SystemExit) as ended:
        lm_training.main(["--corpus", str(tmp_path), "--results-dir", results])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert f"there is no {tmp_path}/train-DOMAIN.bin" in said
    assert "python -m ghost_examples.tokenize" in said
    with pytest.raises(UnknownNameError, match="did you mean 'python'"):
        open_corpora(str(corpus), ("pyton",), 16, tmp_path)
    with pytest.raises(CorpusError, match="a step takes 900 blocks, and there are"):
        Batches(60, 900, range(1), 0)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b"{"),
        ("config.json", b'{"model_type": "vit"}'),
        ("config.json", b'{"model_type": "gpt2", "n_layer": "x"}'),
        ("config.json", b'{"model_type": "gpt2", "n_layer": 1, "n_embd": 32, "n_head": 2}'),
        ("model.safetensors", b"abc"),
        ("model.safetensors", None),
    ],
)
def test_a_broken_model_is_named_in_a_line(
    name: str, content: bytes | None, small: Options, tmp_path: Path
) -> None:
    new_gpt2("tiny", vocabulary=64, length=16).save_pretrained(tmp_path)  # type: ignore[operator]
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError, match="cannot be read: ") as refused:
        models.load_causal(tmp_path, vocabulary=64, length=16)
    said = str(refused.value)
    assert said.startswith(f"the model in {tmp_path} ")
    assert "\n" not in said


def test_a_model_without_all_its_weights_is_refused(tmp_path: Path) -> None:
    new_gpt2("tiny", vocabulary=64, length=16).save_pretrained(tmp_path)  # type: ignore[operator]
    weights = load_file(path := tmp_path / "model.safetensors")
    del weights["transformer.ln_f.weight"]
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(CorpusError, match=r"has no weights for transformer\.ln_f\.weight"):
        models.load_causal(tmp_path, vocabulary=64, length=16)


def test_what_cannot_be_read_or_written_ends_with_a_line(
    small: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, taken = tmp_path / "model", tmp_path / "taken"
    model.mkdir()
    (model / "config.json").write_text("{")
    taken.touch()
    common = ["--corpus", small.corpus, "--device", "cpu"]
    results = str(tmp_path / "results")
    for arguments, said in (
        (["--model", str(model), "--results-dir", results], f"the model in {model} cannot be read"),
        (["--results-dir", str(taken)], f"nothing can be written to --results-dir: .*'{taken}'"),
        (["--results-dir", str(taken / "in")], f"nothing can be written .*'{taken}/in'"),
    ):
        with pytest.raises(SystemExit) as ended:
            lm_training.main([*common, *arguments])
        assert ended.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert re.match(said, line)


def test_each_epoch_is_another_permutation_and_a_step_depends_on_its_number_alone() -> None:
    batches = list(Batches(10, 3, range(6), seed=5))
    epochs = [[*chain.from_iterable(batches[start : start + 3])] for start in (0, 3)]
    assert all(len(set(epoch)) == 9 and max(epoch) < 10 for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert list(Batches(10, 3, range(4, 6), seed=5)) == batches[4:]
    assert list(Batches(10, 3, range(6), seed=6)) != batches


@pytest.mark.stress
def test_a_model_on_disk_must_suffice_for_the_data(tmp_path: Path, small: Options) -> None:
    new_gpt2("tiny", vocabulary=1024, length=16).save_pretrained(tmp_path)  # type: ignore[operator]
    launch.run(replace(small, model=tmp_path, steps=1))
    assert len(recorded(small).train) == 1
    with pytest.raises(CorpusError, match="has 1024 token ids, the data 2000"):
        models.load_causal(tmp_path, vocabulary=2000, length=16)
    with pytest.raises(CorpusError, match="has 16 positions, and blocks have 17"):
        models.load_causal(tmp_path, vocabulary=1024, length=17)
    with pytest.raises(CorpusError, match=r"has nothing, and no config\.json"):
        models.load_causal(tmp_path / "none", vocabulary=1024, length=16)


def test_samples_of_a_domain_that_is_left_out_weigh_nothing(small: Options, corpus: Path) -> None:
    corpora = open_corpora(str(corpus), (), 16, small.results_dir)
    plan = training.Plan(small, corpora, small.results_dir, "none", "python")
    trainer = training.Trainer(plan, torch.device("cpu"))
    ids = torch.tensor([0, 10**9, 1, 10**9 + 1])
    assert trainer.weights(ids).tolist() == [0, 0.25, 0, 0.25]


def test_each_step_is_scored_against_the_next_validation_blocks(
    small: Options, corpus: Path
) -> None:
    corpora = open_corpora(str(corpus), (), 16, small.results_dir)
    plan = training.Plan(replace(small, validation=2), corpora, small.results_dir, "none")
    trainer = training.Trainer(plan, torch.device("cpu"))
    data = corpora.val.domains["python"]
    for trainer.step, first in ((0, 0), (1, 2), (3, 6)):
        expected = torch.stack([data[first]["input_ids"], data[first + 1]["input_ids"]])
        assert torch.equal(trainer.validation("python"), expected)


def rename_tokenizer(corpus: Path, name: str) -> None:
    for path in corpus.glob("*.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer": name}))


def test_a_tokenizer_that_is_gone_is_missed_before_training(small: Options, tmp_path: Path) -> None:
    shutil.copytree(small.corpus, tmp_path / "corpus")
    rename_tokenizer(tmp_path / "corpus", str(tmp_path / "gone"))
    asked = replace(small, corpus=str(tmp_path / "corpus"))
    with pytest.raises(CorpusError, match=r"no tokenizer in .*gone"):
        launch.run(asked)
    assert not (small.results_dir / "run").exists()


@pytest.mark.stress
def test_without_a_tokenizer_passages_are_shown_as_ids(small: Options, tmp_path: Path) -> None:
    shutil.copytree(small.corpus, tmp_path / "corpus")
    rename_tokenizer(tmp_path / "corpus", "")
    launch.run(replace(small, corpus=str(tmp_path / "corpus"), steps=2))
    assert "[" in (small.results_dir / "passages.md").read_text()


def test_values_are_compared_with_what_training_without_a_domain_did(tmp_path: Path) -> None:
    values = [[3.0, 1.0], [2.0, 4.0]]
    found = meaning.Meaning(("a", "b"), ("a", "b"), values, [[6.0, 2.0], [4.0, 8.0]])
    assert found.correlation == pytest.approx(1)
    assert found.correlation_of_others is None
    text = meaning.report_meaning(found, tmp_path)
    assert "all pairs: 1.000" in text
    assert json.loads((tmp_path / "meaning.json").read_text())["changes"] == found.changes


def test_a_domain_of_which_no_sample_was_drawn_is_worth_nothing() -> None:
    by_domain = GroupValues(
        directions=("a", "b"),
        groups=("b",),
        values=np.array([[1.0, 2.0]]),
        samples=np.array([4]),
    )
    whole = metrics.Curves({}, {"a": {0: 9.0, 1: 5.0}, "b": {0: 9.0, 1: 6.0}})
    without = metrics.Curves({}, {"a": {0: 9.0, 1: 5.5}, "b": {0: 9.0, 1: 7.0}})
    found = meaning.compare(by_domain, whole, {"a": without, "b": without})
    assert found.values == [[0.0, 0.0], [1.0, 2.0]]
    assert found.changes == [[0.5, 1.0], [0.5, 1.0]]
