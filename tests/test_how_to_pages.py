"""Every how-to page is a program that runs from its first block to its last."""

import re
from pathlib import Path

import pytest
import torch
from tests.test_documentation import blocks, run

ROOT = Path(__file__).parents[1]
PAGES = {each.stem for each in (ROOT / "docs/howto").glob("*.md")}


@pytest.fixture
def page(tmp_path, monkeypatch):
    """Return what runs a page in an empty folder and returns what it defined."""
    monkeypatch.chdir(tmp_path)

    def read(name, least):
        found, namespace = blocks(f"docs/howto/{name}.md"), {"__name__": "page"}
        assert len(found) >= least
        with torch.random.fork_rng(devices=[]):
            for block in found:
                run(block, namespace)
        return namespace

    return read


def check_values(table, samples):
    assert sorted(table.ids.tolist()) == list(range(samples))
    assert (abs(table.values) > 0).any()


def test_every_page_is_run_and_found():
    text = Path(__file__).read_text(encoding="utf-8")
    assert set(re.findall(r'page\("([\w-]+)"', text)) == PAGES
    assert set(re.findall(r"howto/([\w-]+)\.md", (ROOT / "mkdocs.yml").read_text())) == PAGES


def test_plain_loop(page):
    found = page("plain-loop", 1)
    check_values(found["table"], 96)
    assert found["run"].steps == 6
    assert len(Path("runs/plain/metrics.jsonl").read_text().splitlines()) == 6


def test_batch_norm(page):
    found = page("batch-norm", 5)
    assert "1 normalises over the batch" in found["refusal"]
    assert found["scores"].total.shape == (16, 1)


def test_labels(page):
    found = page("labels", 2)
    assert found["found"] > 0.9 > 0.2 > found["by_chance"]
    assert len(Path("scores.csv").read_text().splitlines()) == 801


@pytest.mark.stress  # torch's compiler takes seconds to import
def test_compile(page):
    found = page("compile", 3)
    assert [each.total.shape for each in found["scores"]] == [(8, 1)] * 4


@pytest.mark.stress
def test_trainer(page, monkeypatch):
    pytest.importorskip("accelerate")
    pytest.importorskip("tensorboard")
    found = page("trainer", 3)
    check_values(found["table"], 32)
    resumed = found["ghost"].values.table()
    assert (resumed.values == found["table"].values).all()
    assert Path("out/checkpoint-3/ghost.pt").exists()


@pytest.mark.stress
def test_accelerate(page):
    pytest.importorskip("accelerate")
    check_values(page("accelerate", 1)["table"], 96)


@pytest.mark.stress
@pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning")
def test_lightning(page):
    pytest.importorskip("lightning")
    check_values(page("lightning", 1)["table"], 96)


@pytest.mark.stress
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing` is deprecated:FutureWarning")
def test_trl(page):
    pytest.importorskip("trl")
    found = page("trl", 3)
    check_values(found["table"], 16)
    assert found["ghost"].run.config.engines == ("dot_product",)
