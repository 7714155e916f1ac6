"""Reads the command line, runs cases, and writes what they cost."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

from bench.case import Case
from bench.memory import keep_freed
from bench.registry import CASES, GROUPS, chosen
from bench.report import Results, rows, table, write_json, write_plot
from bench.rounds import Timed, measure
from ghost_core import GhostError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the cases that were asked for; return the status to leave with."""
    parser = _parser()
    given = parser.parse_args(arguments)
    if given.list:
        print("\n".join(f"{case.name:24} {case.subject}" for case in CASES))
        return 0
    try:
        cases = chosen(given.only)
    except ValueError as error:
        parser.error(str(error))
    if given.rounds < 1:
        parser.error("--rounds has to be 1 or more")
    device = torch.device(given.device)
    if device.type != "cpu" and not torch.get_device_module(device).is_available():
        parser.error(f"there is no device {given.device} here")
    torch.set_num_threads(given.threads)
    keep_freed()
    runnable = [case for case in cases if not _missing(case)]
    results: dict[str, dict[str, Timed]] = {}
    refused: dict[str, str] = {}
    for case in runnable:
        print(f"{case.name}: {case.subject}", flush=True)
        try:
            results[case.name] = measure(case, device, given.rounds, tiny=given.tiny)
        except GhostError as error:  # the others are worth their time
            refused[case.name] = str(error)
    measured = [case for case in runnable if case.name in results]
    _write(Path(given.out), device, measured, results, tiny=given.tiny)
    for case in cases:
        if missing := _missing(case):
            print(f"left out: {case.name}, which needs {', '.join(missing)}")
    for name, reason in refused.items():
        print(f"REFUSED: {name}: {reason}")
    return 1 if refused else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "bench",
        description="What ghost costs, as multiples of plain steps that take turns with it.",
    )
    parser.add_argument(
        "--only", action="append", default=[], metavar="NAME", help="a case, a glob or a group"
    )
    parser.add_argument("--rounds", type=int, default=15, help="rounds that count (15)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or another one of torch's (cpu)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (1)")
    parser.add_argument("--out", default="results/bench", help="folder to write to (results/bench)")
    parser.add_argument("--tiny", action="store_true", help="sizes for a test; times mean nothing")
    parser.add_argument("--list", action="store_true", help="say which cases there are")
    return parser


def _missing(case: Case) -> list[str]:
    return [name for name in case.needs if find_spec(name) is None]


def _write(
    out: Path, device: torch.device, cases: Sequence[Case], results: Results, *, tiny: bool
) -> None:
    """Print the table, and write it, the JSON and the plot to a folder."""
    lines = list(rows(cases, GROUPS, results, tiny=tiny))
    text = table(lines)
    print(f"\n{text}")
    out.mkdir(parents=True, exist_ok=True)
    (out / "bench.txt").write_text(text + "\n", encoding="utf-8")
    write_json(out / "bench.json", device, cases, lines, results)
    files = ["bench.txt", "bench.json"]
    if find_spec("matplotlib") is None:
        print("no plot: it needs matplotlib")
    else:
        write_plot(out / "bench.svg", lines)
        files.append("bench.svg")
    print(f"written to {out}: {', '.join(files)}")
