from __future__ import annotations

from pathlib import Path

import pytest

from ghost_examples.demo import __main__ as demo
from ghost_examples.demo import claims, receipt
from ghost_examples.demo.report import Findings


def run(output: Path, sizes: demo.Sizes) -> int:
    with pytest.raises(SystemExit) as ended:
        demo.main(["--output", str(output), "--seeds", "1", "--clean", "20"], sizes)
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.mark.stress
def test_the_whole_demo_fails_after_too_little_training(
    sizes: demo.Sizes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "out", sizes) == 1
    shown = capsys.readouterr()
    assert "FAILED: digits: precision with 20 clean images is" in shown.err
    assert shown.out.splitlines()[-1] == str(tmp_path / "out" / "report.html")
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["digits.csv", "gradients", "report.html", "results.json"]


def test_what_it_found_decides_how_it_ends(
    findings: Findings,
    sizes: demo.Sizes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(demo, "run", lambda options, sizes: findings)
    monkeypatch.setattr(claims, "shortfalls", lambda precision, accuracy: [])
    assert run(tmp_path, sizes) == 0
    passed = capsys.readouterr()
    assert "FAILED" not in passed.err
    assert passed.out.splitlines()[-1] == str(tmp_path / "report.html")
    monkeypatch.setattr(receipt, "TOLERANCE", 0.0)
    assert run(tmp_path, sizes) == 1
    assert "deviate" in capsys.readouterr().err


@pytest.mark.stress
def test_the_whole_demo_passes_or_fails_by_its_rule(
    sizes: demo.Sizes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # One epoch is too little to find anything.
    assert run(tmp_path / "out", sizes) == 1
    first = capsys.readouterr()
    assert "FAILED: digits: precision with 20 clean images is" in first.err
    assert first.out.splitlines()[-1] == str(tmp_path / "out" / "report.html")

    monkeypatch.setattr(claims, "shortfalls", lambda precision, accuracy: [])
    assert run(tmp_path / "out", sizes) == 0
    second = capsys.readouterr()
    assert "FAILED" not in second.err
    assert second.out.splitlines()[-1] == str(tmp_path / "out" / "report.html")
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["digits.csv", "gradients", "report.html", "results.json"]

    monkeypatch.setattr(receipt, "TOLERANCE", 0.0)
    assert run(tmp_path / "out", sizes) == 1
    assert "deviate" in capsys.readouterr().err


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        demo.main(["--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert all(option in out for option in ("--output", "--seeds", "--clean", "--device"))


def test_no_seeds_are_refused() -> None:
    with pytest.raises(ValueError, match="seeds must be at least 1"):
        demo.Options(seeds=0)


@pytest.mark.parametrize("clean", [(), (0,), (15,), (20, 210), (-10,)])
def test_clean_images_that_cannot_be_shared_out_are_refused(clean: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="multiples of 10 up to 200"):
        demo.Options(clean=clean)
