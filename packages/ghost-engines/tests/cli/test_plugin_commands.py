"""Subcommands that plugins offer: shown, run, and named where they fail."""

import sys

import pytest
from torch import nn

from ghost_core import UnknownNameError
from ghost_core.plugins import DISABLED_VARIABLE, installed
from ghost_engines import ProjectionEngine, cli

CODE = '''
import sys
from dataclasses import dataclass, field
from enum import Enum

from ghost_core import GhostError, Override, hookimpl


@dataclass(frozen=True)
class Greet:
    """Greet somebody by name.

    Args:
        name: Whom to greet.
        times: How often.
    """

    name: str
    times: int = 1

    def run(self):
        print(" ".join([f"hello {self.name}"] * self.times))
        return 3


@dataclass(frozen=True)
class Fail:
    """Fail in some way."""

    how: str

    def run(self):
        match self.how:
            case "raise":
                raise KeyError("what")
            case "refuse":
                raise GhostError("not today")
            case "file":
                open("/no/such/file")
            case "leave":
                sys.exit(0)
            case "nothing":
                return None
            case "much":
                return 2**20
            case "interrupt":
                raise KeyboardInterrupt


class Unreadable:
    def __init__(self, what: "NoSuchType"):
        pass

    def run(self):
        return 0


@dataclass(frozen=True)
class Mine:
    """Take the place of a command of ghost's."""

    def run(self):
        print("mine")
        return 0


class Tone(Enum):
    LOUD = 1
    QUIET = 2


@dataclass(frozen=True)
class Many:
    """Take options of many types, which are looked at once all are there."""

    numbers: list[int]
    tone: Tone
    share: float = 0.5
    names: tuple[str, ...] = ()
    pair: tuple[int, str] = (1, "a")
    extra: dict[str, int] = field(default_factory=dict)

    def __post_init__(self):
        assert len(self.numbers) == 2

    def run(self):
        print(self.numbers, self.tone.name, self.share, self.names, self.extra)
        return 0


@dataclass(frozen=True)
class Configured:
    """Have an option of that name itself."""

    config: str

    def run(self):
        print(f"its own {self.config}")
        return 0


@hookimpl
def ghost_commands():
    return {"greet": Greet, "many": Many, "configured": Configured, "fail": Fail,
            "unreadable": Unreadable, "store": Mine, "plugins-too": Mine, "verify": Override(Mine)}
'''


LAYERS = """
from ghost_core import Projection, hookimpl
from ghost_core.testing import GradientHolder, PlainLinear


class OddSampler(PlainLinear):
    def record(self, call):
        raise KeyError("odd")


class OddProjection(Projection):
    def __init__(self):
        raise KeyError("odd")

    def draw(self, k, n, generator):
        raise AssertionError


class OddEngine(GradientHolder):
    def __init__(self, model, **options):
        super().__init__(model, **options)
        raise KeyError("odd")


@hookimpl
def ghost_samplers():
    return {"odd.Odd": OddSampler}


@hookimpl
def ghost_projections():
    return {"odd": OddProjection}


@hookimpl
def ghost_engines():
    return {"odd": OddEngine}
"""

ODD = """
from torch import nn


class Odd(nn.Linear):
    pass


def model():
    return nn.Sequential(Odd(5, 3))
"""


@pytest.fixture(autouse=True)
def _shop(tmp_path, _here, monkeypatch):
    """Install a distribution with commands in one plugin, and layers and more in another."""
    monkeypatch.delenv(DISABLED_VARIABLE, raising=False)
    (tmp_path / "shop_commands.py").write_text(CODE)
    (tmp_path / "shop_layers.py").write_text(LAYERS)
    (tmp_path / "odd.py").write_text(ODD)
    folder = tmp_path / "shop-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: shop\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text(
        "[ghost]\ncommands = shop_commands\nlayers = shop_layers\n"
    )
    sys.path.insert(0, str(tmp_path))
    installed.cache_clear()
    yield
    sys.path.remove(str(tmp_path))
    installed.cache_clear()


def test_they_are_in_the_help(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--help"])
    said = capsys.readouterr()
    assert ended.value.code == 0
    assert "Greet somebody by name." in said.out
    assert all(name in said.out for name in ("greet", "fail", "plugins", "score", "store"))
    assert "unreadable" not in said.out
    (line,) = said.err.splitlines()
    assert line.startswith("ghost: the command unreadable of the plugin shop:commands cannot be ")
    with pytest.raises(SystemExit) as ended:
        cli.main(["greet", "--help"])
    assert "How often." in capsys.readouterr().out


def test_they_run_with_what_they_are_told(capsys):
    assert cli.main(["greet", "--name", "you", "--times", "2"]) == 3
    assert capsys.readouterr().out == "hello you hello you\n"
    with pytest.raises(SystemExit) as ended:
        cli.main(["greet", "--nam", "you"])
    assert ended.value.code == 2


def test_their_options_come_from_a_file_too(tmp_path, capsys):
    pytest.importorskip("yaml")
    (tmp_path / "c.yaml").write_text("name: you\ntimes: 2\n")
    assert cli.main(["greet", "--config", "c.yaml"]) == 3
    assert cli.main(["greet", "--config=c.yaml", "--times", "1"]) == 3
    assert capsys.readouterr().out == "hello you hello you\nhello you\n"
    assert cli.main(["configured", "--config", "c.yaml"]) == 0
    assert capsys.readouterr().out == "its own c.yaml\n"
    (tmp_path / "c.yaml").write_text("numbers: [1, 2]\ntone: LOUD\nshare: 1\nnames: {a: b}\n")
    assert cli.main(["many", "--config", "c.yaml"]) == 0
    assert cli.main(["many", "--config", "c.yaml", "--numbers", "3", "4", "--extra", "a", "1"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "[1, 2] LOUD 1.0 ('a=b',) {}", "[3, 4] LOUD 1.0 ('a=b',) {'a': 1}"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("nam: you", "unknown option in c.yaml 'nam'; did you mean 'names'?"),
        ("numbers: [1, a]", "numbers in c.yaml is [1, 'a'], and should be whole"),
        ("tone: loud", "tone in c.yaml is 'loud', and should be LOUD, QUIET"),
        ("share: half", "share in c.yaml is 'half', and should be a number"),
        ("pair: [1, a]", "pair in c.yaml is [1, 'a'], and can be given in the shell only"),
        ("extra: {a: 1}", "extra in c.yaml is {'a': 1}, and can be given in the shell only"),
    ],
)
def test_what_is_wrong_in_their_file_is_one_line(text, told, tmp_path, capsys):
    pytest.importorskip("yaml")
    (tmp_path / "c.yaml").write_text(text)
    assert cli.main(["many", "--config", "c.yaml"]) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("ghost: ")
    assert told in line


def test_they_are_among_the_plugins(capsys):
    assert cli.main(["plugins"]) == 0
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert ["shop:commands", "1.0", "command greet"] in [row[:3] for row in rows]
    assert ["ghost-engines:engines", "command score"] in [[row[0], row[2]] for row in rows]
    assert "command store is given by ghost-engines:engines" in str(rows)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("raise", "KeyError: 'what'"),
        ("refuse", "not today"),
        ("file", "No such file or directory: '/no/such/file'"),
        ("leave", "SystemExit: 0"),
        ("nothing", "its run() returned None, which is no exit status"),
        ("much", "its run() returned 1048576, which is no exit status"),
    ],
)
def test_what_goes_wrong_in_them_names_the_plugin(how, said, capsys):
    assert cli.main(["fail", "--how", how]) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("ghost: the command fail of the plugin shop:commands: ")
    assert said in line


def test_an_interrupt_is_not_the_plugin_s(capsys):
    assert cli.main(["fail", "--how", "interrupt"]) == 130
    assert "shop" not in capsys.readouterr().err.splitlines()[-1]


def test_ghost_s_own_stand_unless_they_are_overridden(tmp_path, capsys):
    assert cli.main(["store", "info", str(tmp_path / "none")]) == 2
    assert "there is no store" in capsys.readouterr().err
    assert cli.main(["verify"]) == 0
    assert capsys.readouterr().out == "mine\n"


def test_what_is_switched_off_is_no_command(monkeypatch, capsys):
    monkeypatch.setenv(DISABLED_VARIABLE, "shop:command:greet")
    with pytest.raises(SystemExit):
        cli.main(["greet", "--name", "you"])
    assert "hello" not in capsys.readouterr().out


SCORE = ("--data", "subjects:batch", "--loss", "subjects:cross_entropy")


def test_what_a_sampler_raises_names_plugin_and_module(capsys):
    assert cli.main(["score", "odd:model", *SCORE, "--targets", "val=subjects:batch"]) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("ghost: ")
    assert "KeyError: 'odd' (raised by OddSampler of the plugin shop:layers, for 0 [" in line


def test_what_an_engine_raises_while_it_is_made_names_the_plugin(capsys):
    assert cli.main(["score", "subjects:mlp", *SCORE, "--engine", "odd"]) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert "KeyError: 'odd' (raised by the engine odd of the plugin shop:layers)" in line


def test_what_a_projection_raises_names_the_plugin():
    with pytest.raises(KeyError, match="odd") as caught:
        ProjectionEngine(nn.Linear(2, 2), init="odd")
    assert caught.value.__notes__ == ["raised by the projection odd of the plugin shop:layers"]
    with pytest.raises(UnknownNameError, match="unknown projection 3"):
        ProjectionEngine(nn.Linear(2, 2), init=3)
