"""Prints tables and single lines."""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO


def print_table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print aligned columns for a person, or fields separated by tabs for a program."""
    table = [titles, *([one_line(cell) for cell in row] for row in rows)]
    if not sys.stdout.isatty():
        for row in table:
            print("\t".join(row))
        return
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())


def one_line(value: object) -> str:
    """Return a value as text that can be printed, without line breaks or tabs.

    What an error says ends with a full stop where its reason or remedy follows.
    """
    sentences = re.sub(r"(?<![.:;])\n(?=(Reason|Remedy): )", ". ", str(value))
    return plain(" ".join(sentences.split()))


def plain(text: str) -> str:
    """Return a text in which nothing but line breaks commands the terminal.

    Names and notes come from files, which anybody may have written: escape codes, and whatever else
    is not to be seen, become what python would write for them.
    """
    return "".join(
        each if each.isprintable() or each == "\n" else each.encode("unicode_escape").decode()
        for each in text
    )


def open_streams() -> None:
    """Let everything be printed: names of any bytes, and to streams that are closed."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def stop_printing(stream: TextIO | None = None) -> None:
    """Drop what is printed from now on, because the reader has seen enough.

    Python would complain again when it flushes at exit.

    Args:
        stream: Where it is printed; by default the standard output.
    """
    stream = sys.stdout if stream is None else stream
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def print_error(text: str) -> None:
    """Print a line for errors; where nobody can read it, the exit status alone says so."""
    try:
        print(f"ghost: {text}", file=sys.stderr)
    except OSError:
        stop_printing(sys.stderr)


@contextmanager
def while_read() -> Iterator[None]:
    """Print what is printed inside, and go on where nobody reads it any more."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        stop_printing()
