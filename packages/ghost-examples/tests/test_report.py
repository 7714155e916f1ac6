from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from ghost_examples.demo import figures, report
from ghost_examples.demo.report import Findings

VOID = {"meta", "img", "br", "link", "input", "hr"}
LOADS = re.compile(
    r"""\b(?:src|href|srcset|data|action)\s*=\s*["']?\s*(?:https?:)?//|@import|url\(\s*["']?(?!#)""",
    re.IGNORECASE,
)


class _Page(HTMLParser):
    """Collects tags and checks that they are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture
def _undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave figures out, which take longest and are looked at elsewhere."""
    for name in ("panels", "bars", "digit"):
        monkeypatch.setattr(figures, name, lambda *_: "")


def test_the_page_is_whole_and_the_same_each_time_and_loads_nothing(findings: Findings) -> None:
    page = report.render(findings)
    assert page == report.render(findings)  # figures, too, are the same each time
    parsed = _Page(page)
    assert parsed.open == []
    assert parsed.tags.count("svg") == 2
    assert parsed.tags.count("img") == 2
    assert not {"script", "link", "iframe", "object"} & set(parsed.tags)
    assert not LOADS.search(page), LOADS.search(page)


def test_the_page_tells_everything(findings: Findings) -> None:
    page = " ".join(report.render(findings).split())
    for text in (
        "Positive means that the sample lowered the validation loss",
        "labels flipped at random, 20 clean images: loss suffices, 0.960",
        "200 clean images: nearest neighbour suffices",
        "labelled <strong>8</strong>",
        "-0.250",
        "whitened gradients save -2.0 ± 0.0 more than the same words do",
        "Random, of the same kind",
        "dashed: the label was right",
        "0.750",
        "yes, 10 steps",
        "2.00 ×",
        "ghost-core",
        "King James Bible",
        "passed",
    ):
        assert text in page, text
    assert "failed" not in page


def test_the_figure_shows_what_each_count_gave(
    findings: Findings, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[figures.Panel] = []
    monkeypatch.setattr(figures, "panels", lambda shown, below: drawn.extend(shown) or "")
    report.comparison(findings.digits)
    precision, accuracy = ({line.title: line.values for line in each.lines} for each in drawn)
    assert precision["nearest neighbour"] == {20: [0.5], 200: [0.92]}
    assert precision["in-run value"] == {20: [0.9], 200: [0.9]}
    assert precision["loss"] == {0: [0.5]}
    assert accuracy["in-run value"] == {20: [0.95], 200: [0.95]}
    assert drawn[1].references == {"nothing\nleft out": 0.875, "all mistakes\nleft out": 0.875}


@pytest.mark.usefixtures("_undrawn")
def test_texts_are_escaped(findings: Findings) -> None:
    page = report.render(findings)
    assert "if a &lt; b: &lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "a &amp; b\n  &#39;quoted&#39;" in page


@pytest.mark.usefixtures("_undrawn")
def test_failures_are_shown(findings: Findings) -> None:
    wrong = replace(findings, receipts=[replace(findings.receipts[0], identical=False)])
    assert len(wrong.failures) == 1
    page = report.render(wrong)
    assert wrong.failures[0] in page
    assert "passed</span>" not in page


@pytest.mark.usefixtures("_undrawn")
def test_files_are_written_and_replaced(findings: Findings, tmp_path: Path) -> None:
    output = tmp_path / "made" / "here"
    report.write(output, findings)
    path = report.write(output, replace(findings, seconds=99.0))
    assert path == output / "report.html"
    names = sorted(each.name for each in output.iterdir())
    assert names == ["digits.csv", "report.html", "results.json"]
    results = json.loads((output / "results.json").read_text("utf-8"))
    assert results["seconds"] == 99.0
    assert results["digits"]["precision"]["20"]["value"] == 0.9
    assert (output / "digits.csv").read_text("utf-8").startswith("id,value")


@pytest.mark.usefixtures("_undrawn")
def test_a_write_that_fails_leaves_the_old_file(
    findings: Findings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = report.write(tmp_path, findings)
    old = {each.name: each.read_text("utf-8") for each in tmp_path.iterdir()}

    def fail(handle: int) -> None:
        if os.readlink(f"/proc/self/fd/{handle}").startswith(str(path)):
            raise OSError("no space")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space"):
        report.write(tmp_path, replace(findings, seconds=99.0))
    now = {each.name: each.read_text("utf-8") for each in tmp_path.iterdir()}
    assert now.keys() == old.keys()
    assert now[path.name] == old[path.name]
    assert now["results.json"] != old["results.json"]
