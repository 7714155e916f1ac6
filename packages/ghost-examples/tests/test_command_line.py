"""Every example's help ends quietly where nobody reads on."""

from __future__ import annotations

import os
import sys
from importlib import import_module

import pytest

EXAMPLES = (
    *("lm_projection", "lm_selection", "lm_training", "mlp_dot_product", "mlp_projection"),
    *("projection_error", "selection", "tokenize", "trainer_values", "vision_language"),
    "demo.__main__",
)


def check_help_unread(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    main = import_module(f"ghost_examples.{name}").main
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as nobody, monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", nobody)
        with pytest.raises(SystemExit) as ended:
            main(["--help"])
        print("more")  # and what comes later is dropped, as python's own flush at exit is
    assert ended.value.code == 0, name


def test_help_that_nobody_reads_ends_quietly(monkeypatch: pytest.MonkeyPatch) -> None:
    check_help_unread("lm_training", monkeypatch)


@pytest.mark.stress
def test_every_help_that_nobody_reads_ends_quietly(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in EXAMPLES:
        check_help_unread(name, monkeypatch)
