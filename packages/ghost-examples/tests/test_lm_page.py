"""The page on language models: its commands are understood and run, its code is right."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
import tyro

from ghost_examples import lm_selection, lm_training, tokenize, vision_language
from ghost_examples.language_models import Options, models
from ghost_examples.texts import load_domain

PAGE = Path(__file__).parents[3] / "docs/language_models.md"
SMALL = "--steps 2 --batch 2 --validation 1 --eval-blocks 1 --device cpu --length 16 --shown 1"
PROGRAMS = {
    "lm_training": (lm_training, Options, SMALL),
    "tokenize": (tokenize, tokenize.Options, "--length 16"),
    "vision_language": (vision_language, vision_language.Options, "--steps 1"),
    "lm_selection": (lm_selection, lm_selection.Options, "--seeds 1 --steps 1 --length 16"),
}


def commands() -> list[tuple[str, list[str]]]:
    """Return the programs of the page's commands, with what they are given."""
    if not PAGE.exists():
        pytest.skip("there is no documentation beside an installed package")
    found = []
    for block in re.findall(r"^```bash\n(.*?)^```", PAGE.read_text(), re.M | re.S):
        for line in block.splitlines():
            match = re.search(r"(?:ghost_examples\.(\w+)|(lm_training)\.sh)(.*)", line)
            assert match, line
            found.append((match[1] or match[2], shlex.split(match[3])))
    return found


def test_every_command_is_understood() -> None:
    found = commands()
    assert len(found) >= 6
    for name, arguments in found:
        tyro.cli(PROGRAMS[name][1], args=arguments)


def test_its_python_is_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands()
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    there: dict[str, object] = {}
    exec(code, there)
    corpus = there["corpus"]
    assert corpus[0]["sample_id"] == 10**9  # type: ignore[index]
    assert corpus.domain_of(2) == "web"  # type: ignore[attr-defined]
    assert corpus.by_id(2).tolist() == [8, 9, 10, 11]  # type: ignore[attr-defined]


@pytest.mark.stress
def test_its_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one process, at the smallest sizes."""
    monkeypatch.chdir(tmp_path)
    for name in models.PRESETS:
        monkeypatch.setitem(models.PRESETS, name, models.Shape(1, 16, 2))
    pandas = pytest.importorskip("pandas")
    texts = [load_domain("manual")[at : at + 500] for at in range(0, 20_000, 500)]
    Path("books.txt").write_text(load_domain("scripture")[:20_000])
    pandas.DataFrame({"text": texts}).to_json("web.jsonl", orient="records", lines=True)
    pandas.DataFrame({"text": texts}).to_parquet("code.parquet")
    for name, arguments in commands():
        if name == "lm_training":
            shutil.rmtree("lm-results", ignore_errors=True)
        program, _, small = PROGRAMS[name]
        program.main([*arguments, *small.split()])
        if name == "lm_training" and "--results-dir" not in arguments:
            assert Path("lm-results/domains.png").exists()
    assert Path("lm-results/meaning.png").exists()
    assert Path("results/passages.md").exists()
