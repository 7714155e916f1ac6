"""Runs of language models, with options whose effects are looked up in what the runs wrote."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import shutil
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from ghost_examples.language_models import (
    Cut,
    Options,
    launch,
    metrics,
    models,
    new_gpt2,
    open_corpora,
    open_tokenizer,
    per_sample_loss,
    training,
    write_domain,
)
from ghost_examples.texts import load_domain


class Ran(NamedTuple):
    """A run that has ended."""

    folder: Path
    said: str
    curves: metrics.Curves
    values: dict[int, list[float]]
    targets: list[str]
    parameters: dict[str, Tensor]


def train(folder: Path, corpus: Path, **changed: Any) -> Ran:
    """Train as little as can be."""
    counts = {"steps": 3, "batch": 3, "validation": 1, "eval_every": 3, "eval_blocks": 2}
    common = {"results_dir": folder, "corpus": str(corpus), "shown": 2, "device": "cpu"}
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patched, redirect_stdout(said):
        patched.setitem(models.PRESETS, "tiny", models.Shape(1, 16, 2))
        launch.run(Options(**{**common, **counts, **changed}))
    with (folder / "values.csv").open() as file:
        header, *rows = csv.reader(file)
    at = [place for place, name in enumerate(header) if name.startswith("value_")]
    values = {int(row[0]): [float(row[place]) for place in at] for row in rows}
    targets = [header[place].removeprefix("value_") for place in at]
    state = torch.load(folder / "run/checkpoint.pt", weights_only=True)["objects"]["model"]
    return Ran(folder, said.getvalue(), metrics.read_curves(folder / "run"), values, targets, state)


@pytest.fixture(scope="module")
def exact(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """A run that others are compared with."""
    return train(tmp_path_factory.mktemp("exact"), corpus)


PUBLISHED = {
    "small": (12, 768, 12, 124_439_808),
    "medium": (24, 1024, 16, 354_823_168),
    "large": (36, 1280, 20, 774_030_080),
}
"""Layers, width, heads and parameters of GPT-2, as published."""


def test_presets_are_gpt2_in_its_published_sizes() -> None:
    assert models.PRESETS.keys() == {"tiny", *PUBLISHED}
    tiny = 1024 * 96 + 16 * 96 + 2 * (12 * 96**2 + 13 * 96) + 2 * 96
    sizes = {"tiny": (2, 96, 4, tiny)} | PUBLISHED
    for name, (layers, width, heads, count) in sizes.items():
        vocabulary, length = (1024, 16) if name == "tiny" else (50257, 1024)
        with torch.device("meta"):
            model: Any = new_gpt2(name, vocabulary=vocabulary, length=length)
        config = model.config
        assert (config.n_layer, config.n_embd, config.n_head) == (layers, width, heads)
        assert sum(each.numel() for each in model.parameters()) == count


def test_a_new_gpt2_has_the_vocabulary_of_the_data_and_no_token_outside_it() -> None:
    model: Any = new_gpt2("tiny", vocabulary=70, length=16)
    assert model.get_input_embeddings().weight.shape == (70, 96)
    assert model(torch.tensor([[69, 0]])).logits.shape == (1, 2, 70)
    for config in (model.config, model.generation_config):
        for name in ("bos", "eos", "pad"):
            token = getattr(config, f"{name}_token_id")
            assert token is None or 0 <= token < 70


@pytest.mark.stress
def test_a_llama_on_disk_is_trained(corpus: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=open_tokenizer("embedded").size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
    )
    llama: Any = LlamaForCausalLM(config)
    llama.save_pretrained(tmp_path / "llama")
    found = train(tmp_path / "results", corpus, model=tmp_path / "llama")
    before = llama.state_dict()
    assert found.parameters.keys() == before.keys()
    assert all(not torch.equal(found.parameters[name], before[name]) for name in before)
    model: nn.Module = llama
    data = open_corpora(str(corpus), (), 16, tmp_path).val.domains
    for domain, curve in found.curves.val.items():
        tokens = torch.stack([data[domain][at]["input_ids"] for at in range(2)])
        assert curve[0] == pytest.approx(per_sample_loss(model, tokens).mean().item(), rel=1e-5)
    assert any(value for row in found.values.values() for value in row)


@pytest.mark.stress
def test_domains_that_are_not_named_are_left_out(corpus: Path, tmp_path: Path) -> None:
    data = tmp_path / "corpus"
    shutil.copytree(corpus, data)
    cut = Cut(16, 4, by_block=True)
    write_domain(data, "manual", [load_domain("manual")[:2200]], open_tokenizer("embedded"), cut)
    found = train(tmp_path / "results", data, domains="manual,scripture", steps=6)
    named = {"manual", "scripture"}
    assert set(found.targets) == set(found.curves.val) == named
    _, *rows = (found.folder / "domains.csv").read_text().splitlines()
    assert {row.split(",")[0] for row in rows} == named
    of = open_corpora(str(data), tuple(named), 16, tmp_path).train.domain_of
    assert len(found.values) == 18
    assert {of(sample) for sample in found.values} == named


@pytest.mark.stress
def test_fused_values_are_those_of_exact(corpus: Path, tmp_path: Path, exact: Ran) -> None:
    fused = train(tmp_path, corpus, method="fused")
    assert fused.targets == exact.targets
    assert fused.values.keys() == exact.values.keys()
    largest = max(abs(each) for row in exact.values.values() for each in row)
    assert largest > 0
    for sample, row in exact.values.items():
        # Adam's first steps divide what was rounded in another order by its own size.
        assert fused.values[sample] == pytest.approx(row, rel=1e-4, abs=1e-4 * largest)


@pytest.mark.stress
def test_bfloat16_is_that_of_autocast(
    corpus: Path, tmp_path: Path, exact: Ran, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def watched(model: nn.Module, tokens: Tensor) -> Tensor:
        seen.append(model(tokens).logits.dtype)
        return per_sample_loss(model, tokens)

    found = train(tmp_path / "plain", corpus, dtype="bfloat16")
    assert json.loads((found.folder / "options.json").read_text())["dtype"] == "bfloat16"
    monkeypatch.setattr(training, "per_sample_loss", watched)
    train(tmp_path / "watched", corpus, dtype="bfloat16", method="concatenated")
    assert seen
    assert set(seen) == {torch.bfloat16}
    assert {each.dtype for each in found.parameters.values()} == {torch.float32}
    # Not the same, or nothing was rounded; not far away either.
    assert found.curves.train != exact.curves.train
    expected = [*exact.curves.train.values()]
    assert [*found.curves.train.values()] == pytest.approx(expected, rel=1e-2)
    values = [each for row in found.values.values() for each in row]
    assert len(values) == 18
    assert all(map(math.isfinite, values))
    assert any(values)


def ranked(ran: Ran, target: str) -> list[tuple[float, int]]:
    """Return values and ids for a target, the highest first, from the table."""
    at = ran.targets.index(target) if target in ran.targets else None
    pairs = [(sum(row) if at is None else row[at], sample) for sample, row in ran.values.items()]
    return sorted((pair for pair in pairs if pair[0]), reverse=True)


@pytest.mark.stress
def test_passages_are_those_of_the_table_in_its_order(corpus: Path, exact: Ran) -> None:
    train_data = open_corpora(str(corpus), (), 16, exact.folder).train
    tokenizer = open_tokenizer("embedded")
    sections = re.split(r"^## For ", (exact.folder / "passages.md").read_text(), flags=re.M)[1:]
    assert [each.split("\n")[0] for each in sections] == ["all of them", *exact.targets]
    for section in sections:
        order = ranked(exact, section.split("\n")[0])
        assert len(order) == 6  # the first step of Adam credits nothing
        shown = [*order[:2], *order[::-1][:2]]
        found = re.findall(r"^([+-][\d.]+), (\w+), sample (\d+)\n\n((?:    .*\n?)*)", section, re.M)
        assert [int(sample) for _, _, sample, _ in found] == [sample for _, sample in shown]
        for (value, domain, _, text), (expected, sample) in zip(found, shown, strict=True):
            assert float(value) == pytest.approx(expected, abs=1e-6)
            assert domain == train_data.domain_of(sample)
            lines = [line.removeprefix("    ") for line in text.splitlines()]
            written = tokenizer.decode(train_data.by_id(sample).tolist()).splitlines()
            assert lines == written
    most, least = re.findall(
        r"^(?:Most|Least) valuable passages, for all of them:\n((?:  .*\n?)+)", exact.said, re.M
    )
    order = ranked(exact, "all of them")
    for lines, expected in ((most, order[:2]), (least, order[::-1][:2])):
        for line, (value, sample) in zip(lines.splitlines(), expected, strict=True):
            start = " ".join(tokenizer.decode(train_data.by_id(sample).tolist()).split())
            assert line.split(maxsplit=2)[:2] == [f"{value:+.5f}", train_data.domain_of(sample)]
            assert line.split(maxsplit=2)[2] == start[:90]
