from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ghost_engines import GradientStore
from ghost_examples.demo import once_more, passages
from ghost_examples.demo.__main__ import Sizes
from ghost_examples.demo.once_more import WAYS
from ghost_examples.demo.report import Findings
from ghost_examples.texts import DOMAINS, build_vocabulary


def test_held_out_passages_are_neither_trained_on_nor_stored() -> None:
    kept, held_out = passages.split(passages.Plan(length=64, per_domain=32, every=8))
    assert not {(p.domain, p.index) for p in kept} & {(p.domain, p.index) for p in held_out}
    for domain in DOMAINS:
        assert sum(passage.domain == domain.name for passage in kept) == 28
        assert sum(passage.domain == domain.name for passage in held_out) == 4


def test_the_model_has_the_vocabulary_of_the_texts(sizes: Sizes) -> None:
    model = passages.new_model(sizes.plan, "cpu")
    assert model.config.vocab_size == build_vocabulary().size
    tokens = torch.tensor([[0] * 31 + [build_vocabulary().size - 1]])
    assert passages.per_sample_loss(model, tokens).shape == (1,)


def test_every_kept_passage_is_stored_and_every_query_answered(
    sizes: Sizes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "gradients"
    first = passages.run(folder, "cpu", sizes.plan)
    again = passages.run(folder, "cpu", sizes.plan)
    assert [path.name for path in tmp_path.iterdir()] == ["gradients"]
    store = GradientStore.open(folder)
    assert torch.equal(store.ids, torch.arange(24))
    assert store.losses is not None
    assert store.k_total == again.columns
    assert again.looked == first.looked
    assert len(again.looked) == 8
    for each in again.looked:
        scores = [near.score for near in each.found]
        assert scores == sorted(scores, reverse=True)
        assert len(scores) == sizes.plan.neighbours
    assert again.chance == 0.25
    assert [each.query.domain for each in again.shown] == [domain.name for domain in DOMAINS]
    passages.show(again)
    said = capsys.readouterr().out
    assert "by chance 25.0%" in said
    assert first.once_more == again.once_more
    assert set(again.once_more.gains) == set(WAYS)
    assert again.once_more.queries == 8
    for title in WAYS.values():
        assert title in said


def test_the_passage_itself_helps_more_than_others(sizes: Sizes, tmp_path: Path) -> None:
    kept, _ = passages.split(sizes.plan)
    tokens = passages.as_tokens(kept, "cpu")
    model = passages.new_model(sizes.plan, "cpu")
    plan = replace(sizes.plan, dim=256, dtype="float32")
    store = passages.projected(tmp_path / "g", model, tokens, plan)
    chosen = once_more.choose(store, store.rows(0, 6), kept, kept[:6])
    assert chosen["ghost, cosine"] == chosen["TF-IDF"] == list(range(6))
    assert {kept[at].domain for at in chosen["random, same domain"]} == {kept[0].domain}
    others = [(at + 5) % len(kept) for at in range(6)]
    found = once_more.judge(
        model, passages.per_sample_loss, tokens, tokens[:6], chosen | {"random": others}
    )
    assert all(a > b for a, b in zip(found.gains["TF-IDF"], found.gains["random"], strict=True))
    gain = found.gains["TF-IDF"]
    assert found.mean("TF-IDF") == pytest.approx(sum(gain) / 6)
    more = torch.tensor(found.gains["ghost, whitened"]) - torch.tensor(gain)
    expected = (more.mean().item(), more.std().item() / 6**0.5)
    assert found.ahead == pytest.approx(expected, abs=1e-4)
    assert found.error("TF-IDF") == pytest.approx(torch.tensor(gain).std().item() / 6**0.5)


def test_a_folder_of_something_else_is_left_alone(sizes: Sizes, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("all of it")
    with pytest.raises(FileExistsError, match="is no store of gradients"):
        passages.run(tmp_path, "cpu", sizes.plan)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_stored_passage_is_its_own_nearest(sizes: Sizes, tmp_path: Path) -> None:
    kept, _ = passages.split(sizes.plan)
    tokens = passages.as_tokens(kept, "cpu")
    model = passages.new_model(sizes.plan, "cpu")
    plan = replace(sizes.plan, dim=256, dtype="float32")
    store = passages.projected(tmp_path / "g", model, tokens, plan)
    again = passages.projected(tmp_path / "h", model, tokens[:4], plan)
    assert torch.equal(store.search(again.rows(), 1, "cosine").ids[:, 0], torch.arange(4))


def test_shares_count_the_nearest_passage_alone(findings: Findings) -> None:
    result = findings.passages
    assert result.share == 0
    assert result.own_share == {"python": 0}
    assert result.chance == 0.75
