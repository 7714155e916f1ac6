"""The benchmarks run and count right. What they measure is for a person to read, not for a test."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import pytest
import torch
from bench import command
from bench.by_hand import Built, Contraction
from bench.case import Case, Group, Way
from bench.command import main
from bench.registry import CASES, GROUPS, chosen
from bench.report import rows, table
from bench.rounds import Timed, interleaved
from tests.fresh import Fresh
from torch import Tensor, nn

from ghost_core import CaptureError

QUICK = ("demo_convnet", "attention_alone")


def test_names_are_unique_and_groups_are_known() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
    assert {case.group for case in CASES if case.group} == {group.name for group in GROUPS}
    assert chosen(["attention_*"]) == [case for case in CASES if "attention" in case.name]


def test_a_misspelt_case_names_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"no case is named 'atention'.*attention_alone"):
        chosen(["atention"])


def test_ways_take_turns_and_only_their_steps_are_timed() -> None:
    done, now = [], [0.0]

    def way(name: str, seconds: float) -> Way:
        def run() -> None:
            done.append(name)
            now[0] += seconds

        def before() -> None:
            now[0] += 100

        return Way(run, before)

    ways = {"plain": way("plain", 1), "scored": way("scored", 3)}
    taken = interleaved(ways, 2, lambda: None, lambda: now[0])
    assert taken == {"plain": [1, 1], "scored": [3, 3]}
    assert done == ["plain", "scored", "scored", "plain", "plain", "scored"]


def test_ratios_are_those_of_the_same_round() -> None:
    timed = Timed([2.0, 30.0, 4.0], [1.0, 10.0, 4.0])
    assert timed.ratio == 2  # of 2, 3, 1
    assert timed.least == 2


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told")
@pytest.mark.parametrize("told", [False, True])
def test_what_is_freed_stays_if_the_c_library_is_told(fresh: Fresh, told: bool) -> None:
    done = fresh(
        "import ctypes, resource\n"
        "from bench.memory import keep_freed\n"
        f"{'keep_freed()' if told else ''}\n"
        "library = ctypes.CDLL(None)\n"
        "library.malloc.restype, library.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]\n"
        "def pages():\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    value = library.malloc(2**27)\n"
        "    ctypes.memset(value, 1, 2**27)\n"
        "    library.free(value)\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "print([pages(), pages()])\n",
        paths=(Path(__file__).parents[1],),
    )
    first, again = json.loads(done.stdout)
    assert first > 2**4
    assert (again < first / 4) == told


@pytest.mark.parametrize("p", [2, 7])  # narrower than the inputs, and wider
def test_products_by_hand_are_those_of_each_sample(p: int) -> None:
    layer, x = nn.Linear(5, p).double(), torch.randn(3, 4, 5, dtype=torch.float64)
    direction = torch.randn(p, 5, dtype=torch.float64)
    output = layer(x)
    losses = output.square().sum((1, 2))
    expected = [torch.autograd.grad(each, layer.weight, retain_graph=True)[0] for each in losses]
    dots = torch.stack([(each * direction).sum() for each in expected])
    contracted: list[Tensor] = []
    Contraction(direction, contracted)(layer, (x,), output)
    losses.sum().backward()
    torch.testing.assert_close(contracted, [dots])
    plain = [layer.weight.grad, layer.bias.grad]
    layer.zero_grad()
    taken: list[Tensor] = []
    rows = Built.apply(
        x, layer.weight, layer.bias, direction, lambda part, along: taken.append(part.dot(along))
    )
    rows.square().sum().backward()
    torch.testing.assert_close(torch.stack(taken), dots)
    torch.testing.assert_close([layer.weight.grad, layer.bias.grad], plain)


def test_the_table_says_which_goals_were_reached() -> None:
    def case(name: str, goal: float) -> Case:
        return Case(name, "", lambda _: {}, goals={"scored": goal}, group="both")

    plain = Timed([1.0], [1.0])
    results = {
        "reached": {"plain": plain, "scored": Timed([2.0], [1.0])},
        "missed": {"plain": plain, "scored": Timed([4.0], [1.0])},
    }
    group = Group("both", "", {"scored": 2.9})
    lines = list(rows([case("reached", 2.0), case("missed", 3.9)], [group], results))
    assert [(row.case, row.ratio, row.verdict) for row in lines if row.goal] == [
        ("reached", 2.0, "yes, goal 2"),
        ("missed", 4.0, "NO, goal 3.9"),
        ("both: median of 2", 3.0, "NO, goal 2.9"),
    ]
    assert len(table(lines).splitlines()) == 1 + 6


@pytest.mark.parametrize(
    ("seconds", "verdict"),
    [(0.5, "yes, goal 1; yes, goal 500 ms"), (0.8, "yes, goal 1; NO, goal 500 ms")],
)
def test_the_table_says_what_is_done_in_a_second(seconds: float, verdict: str) -> None:
    goals = {"goals": {"store": 1.0}, "seconds": {"store": 0.5}}
    case = Case("write", "", lambda _: {}, volume=2_000_000_000, **goals)
    results = {"write": {"store": Timed([seconds], [1.0])}}
    (row,) = rows([case], [], results)
    assert row.rate == pytest.approx(2 / seconds)
    assert row.verdict == verdict
    line = table([row]).splitlines()[1]
    assert f" {1000 * seconds:.2f}  {2 / seconds:.2f} " in line
    assert verdict in line
    (tiny,) = rows([case], [], results, tiny=True)
    assert (tiny.rate, tiny.limit, tiny.verdict) == (None, None, "yes, goal 1")


def test_the_command_writes_table_json_and_plot(tmp_path: Path, capsys) -> None:
    pytest.importorskip("matplotlib")
    _run(tmp_path, QUICK)
    assert (tmp_path / "bench.svg").stat().st_size
    text = (tmp_path / "bench.txt").read_text()
    assert text in capsys.readouterr().out
    assert all(name in text for name in QUICK)


def test_a_case_that_is_refused_is_said_and_the_others_measured(
    tmp_path: Path, capsys, monkeypatch
) -> None:
    def refused(_: object) -> dict[str, Way]:
        raise CaptureError("not this one")

    cases = [Case("bad", "", refused), *chosen(["attention_alone"])]
    monkeypatch.setattr(command, "chosen", lambda _: cases)
    assert main(["--tiny", "--rounds=1", f"--out={tmp_path}"]) == 1
    assert "REFUSED: bad: not this one" in capsys.readouterr().out
    written = json.loads((tmp_path / "bench.json").read_text())
    assert set(written["seconds"]) == {"attention_alone"}


@pytest.mark.stress
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_case_runs(tmp_path: Path, case: Case) -> None:
    for name in case.needs:
        pytest.importorskip(name)
    _run(tmp_path, [case.name])


def _run(folder: Path, names: tuple[str, ...] | list[str]) -> None:
    """Run cases at tiny sizes and look at what was written."""
    threads = torch.get_num_threads()
    only = [part for name in names for part in ("--only", name)]
    assert main(["--tiny", "--rounds=2", f"--out={folder}", *only]) == 0
    assert torch.get_num_threads() == threads == 1
    written = json.loads((folder / "bench.json").read_text())
    assert set(written["seconds"]) == set(names)
    for ways in written["seconds"].values():
        assert len(ways) > 1
        assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in ways.values())
    assert written["environment"]["device"] == "cpu"
