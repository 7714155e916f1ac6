"""Whatever the command is given, it ends with one line that says what is wrong, and status 2."""

import io
import json
import os
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
from bad_input_kit import GIVEN
from safetensors.torch import save

from ghost_engines import cli

BROKEN = {
    "syntax.py": b"def f(:\n",
    "nul.py": b"x = 1\0\n",
    "encoded.py": b'x = "\xff\xfe"\n',
    "exiting.py": b"import sys; sys.exit(0)",
    "fatal.py": b'class Fatal(BaseException): pass\nraise Fatal("x")',
    "guarded.py": b'def __getattr__(name): raise RuntimeError("no " + name)',
}
"""Modules that cannot be imported, or not asked for a function."""


def numpy_file(values):
    data = io.BytesIO()
    np.save(data, values, allow_pickle=True)
    return data.getvalue()


def numpy_header(shape, dtype="<i8"):
    """Return a file whose header claims a shape."""
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(64)


def archive():
    data = io.BytesIO()
    np.savez(data, a=np.zeros(3))
    return data.getvalue()


IDS = torch.ones(2, 3, dtype=torch.long)
FILES = {
    "empty.txt": b"",
    "empty.jsonl": b"",
    "empty.npy": b"",
    "empty.safetensors": b"",
    "binary.txt": bytes(range(256)),
    "binary.jsonl": bytes(range(256)),
    "binary.npy": bytes(range(256)),
    "binary.safetensors": bytes(range(256)),
    "blank.txt": b"\n \n",
    "words.txt": b"no tokenizer\n",
    "latin.txt": b"\xe9t\xe9\n",
    "cut.jsonl": b'{"text": "a"',
    "number.jsonl": b'{"text": 1}',
    "list.jsonl": b"[1]",
    "other.jsonl": b'{"tex": "a"}',
    "string.jsonl": b'"s"',
    "nan.jsonl": b"NaN",
    "deep.jsonl": b"[" * 100_000,
    "floats.npy": numpy_file(np.zeros((2, 3))),
    "vector.npy": numpy_file(np.zeros(3, dtype=int)),
    "no-samples.npy": numpy_file(np.zeros((0, 3), dtype=int)),
    "no-tokens.npy": numpy_file(np.zeros((3, 0), dtype=int)),
    "objects.npy": numpy_file(np.array([[{}]], dtype=object)),
    "huge-ids.npy": numpy_file(np.full((2, 5), 2**62)),
    "words.npy": numpy_file(np.array([["a"]])),
    "fields.npy": numpy_file(np.zeros((2, 3), dtype=[("a", int)])),
    "archive.npy": archive(),
    "cut.npy": numpy_file(np.ones((4, 5), dtype=int))[:-20],
    "head.npy": numpy_file(np.ones((4, 5), dtype=int))[:30],
    "no-axes.npy": numpy_file(np.array(3)),
    "negative.npy": numpy_header("(-2, 3)"),
    "negative-both.npy": numpy_header("(-2, -3)"),
    "huge.npy": numpy_header("(1000000000000, 1000000000000)"),
    "larger.npy": numpy_header("(99999999999999999999999, 3)"),
    "halves.npy": numpy_header("(2.0, 3)"),
    "truth.npy": numpy_header("(True, 3)"),
    "deep.npy": numpy_header("(" * 5000),
    "dates.npy": numpy_header("(2, 3)", "<M8[s]"),
    "unsigned.npy": numpy_file(np.full((2, 3), 2**63, dtype=np.uint64)),
    "two.safetensors": save({"a": IDS, "b": IDS + 1}),
    "floats.safetensors": save({"a": IDS.float()}),
    "bools.safetensors": save({"a": IDS > 0}),
    "scalar.safetensors": save({"a": torch.tensor(1)}),
    "vector.safetensors": save({"a": IDS[0]}),
    "unsigned.safetensors": save({"a": torch.from_numpy(np.full((2, 3), 2**63, np.uint64))}),
    "none.safetensors": save({}),
    "no-samples.safetensors": save({"a": IDS[:0]}),
    "scalar-mask.safetensors": save({"input_ids": IDS, "attention_mask": torch.tensor(1)}),
    "nan-mask.safetensors": save({"input_ids": IDS, "attention_mask": IDS * float("nan")}),
}

CONFIGURATIONS = [
    b"", b"[]", b"{}", b"null", b'"x"', b"{", b"\xff\xfe{}", b"[" * 100_000,
    b'{"architectures": []}', b'{"architectures": ["A", "B"]}',
    *(json.dumps({"architectures": each}).encode() for each in (
        ["logging"], ["pipeline"], ["__name__"], ["PreTrainedModel"], ["Trainer"], ["os"], [""],
        ["GPT2Tokenizer"], ["GPT2LMHeadModel.forward"], ["\x1b[31m"], [3], [None], [["A"]], "G",
        {"A": 1}, ["GPT2LMHeadModel"],
    )),
]  # fmt: skip

TEXTS = [
    "", ":", "::", "a:b:c", "\ud800:x", "x" * 5000, "x" * 5000 + ":f", "a\0b:f", "a\0b", "~", "/",
    "/dev/null", ".", "subjects.py", ".x:f", "x.:f", "0a:f", "os.path:f", "sys:exit",
    "given:losses.__globals__", "given:Fatal.x", "given:number", "given:lazy.function",
    *(f"{name.removesuffix('.py')}:f" for name in BROKEN),
]  # fmt: skip
"""What names no function."""

RAISING = """
    fatal unprintable lines leaving staying closing missing stopping full asserting piping disk
    undecoded endless nothing lazy
""".split()  # noqa: SIM905
"""Functions that raise or return nothing."""

MODELS = """
    Secretive Unmoved Untrained Failing Exiting not_a_number infinite frozen empty_shell
    uninitialised a_class without_parameters without_storage
""".split()  # noqa: SIM905
BATCHES = "nans no_samples too_wide a_list whole_numbers an_array a_ring ids".split()  # noqa: SIM905
TOKENS = """
    ids_too_large ids_below_zero ids_of_bools ids_of_complex no_ids mask_of_text mask_too_short
    mask_of_nan
""".split()  # noqa: SIM905
LOSSES = """
    a_float floats scalar matrix of_integers of_complex of_bools detached of_nan of_infinity
    none_of_them backward_already of_one of_more without_grad of_inference of_nothing
    of_another_model nowhere sparse takes_nothing
""".split()  # noqa: SIM905

OPTIONS = [
    ("--samples", 0), ("--samples", -1), ("--tolerance", "nan"), ("--tolerance", "inf"),
    ("--tolerance", -1), ("--tolerance", 2), ("--tolerance", "1e400"), ("--seed", -1),
    ("--seed", 2**32), ("--seed", -(2**63) - 1), ("--seed", 10**100), ("--device", ""),
    ("--device", "cuda:99"), ("--device", "meta"), ("--device", "\ud800"), ("--device", "tpu9"),
    ("--device", "privateuseone"), ("--layers", ""), ("--layers", ","), ("--layers", "["),
    ("--layers", "nope"), ("--layers", "\0"), ("--layers", "x" * 10_000), ("--exclude", "*"),
    ("--exclude", "nope"), ("--batch-size", 10**30), ("--truncate", -3), ("--text", "body"),
]  # fmt: skip

STORES = ["missing", "a-file", ".", "/dev/null", "a-file/x", "a\0b", "\ud800", "x" * 5000, ""]

OWN = ("given:linear", "given:batch", "given:losses")


def given(model=OWN[0], data=OWN[1], loss=OWN[2], *more):
    return ["verify", model, "--data", data, "--loss", loss, *map(str, more)]


def tokens(data, model="subjects:tiny"):
    return ["verify", model, "--data", data]


INPUTS = [
    *(given(**{place: text}) for text in TEXTS for place in ("model", "data", "loss")),
    *(given(**{place: f"given:{name}"}) for name in RAISING for place in ("model", "data", "loss")),
    *(given(model=f"given:{name}") for name in MODELS),
    *(given(data=f"given:{name}") for name in BATCHES),
    *(given(loss=f"given:{name}") for name in LOSSES),
    *(tokens(f"given:{name}") for name in TOKENS),
    *(tokens(name) for name in FILES),
    *(tokens(f"missing.{kind}") for kind in ("txt", "jsonl", "npy", "safetensors")),
    *(tokens(f"a-folder.{kind}") for kind in ("txt", "jsonl", "npy", "safetensors")),
    *(tokens(f"pipe.{kind}") for kind in ("txt", "jsonl", "npy", "safetensors", "parquet")),
    given(*OWN, "--config", "pipe.yaml"),
    *(tokens(f"a-file/x.{kind}") for kind in ("txt", "jsonl", "npy", "safetensors")),
    *(tokens(f"a\0b.{kind}") for kind in ("txt", "jsonl", "npy", "safetensors")),
    *(tokens("subjects:ids", f"checkpoint-{at}") for at in range(len(CONFIGURATIONS))),
    *(given(*OWN, *option) for option in OPTIONS),
    *(["store", "info", path] for path in STORES),
    *(["store", "verify", path] for path in STORES),
    *(["store", "export", path, "--out", "out"] for path in STORES),
    *(["store", "merge", path, "--into", "new"] for path in STORES),
    *(["values", path] for path in STORES),
    *(["values", ".", "--out", f"{path}.csv"] for path in STORES),
]

OF_VERIFY = {"--samples", "--tolerance", "--batch-size"}
"""Options that `ghost score` does not have, or takes any number for."""


def scored(verified):
    """Return what scores the data that `ghost verify` is given."""
    _, model, data, values, *more = verified
    target = "given:batch" if "--loss" in more else "given:ids"
    return ["score", model, data, values, "--targets", f"val={target}", *more]


INPUTS += [scored(each) for each in INPUTS if each[0] == "verify" and not OF_VERIFY & {*each}]

CHOSEN = [
    *(given(model=text) for text in ("", ":", "a:b:c", "\ud800:x", "/dev/null", "a\0b")),
    *(given(model=f"{name}:f") for name in ("syntax", "exiting", "fatal", "guarded")),
    *(given(data=f"given:{name}") for name in ("number", "Fatal.x", "lazy.function")),
    *(given(data=f"given:{name}") for name in ("unprintable", "lines", "leaving", "nans")),
    *(given(model=f"given:{name}") for name in ("Failing", "not_a_number", "frozen", "a_class")),
    *(
        given(loss=f"given:{name}")
        for name in ("nothing", "floats", "matrix", "detached", "of_nan", "backward_already")
    ),
    *(tokens(f"given:{name}") for name in ("ids_too_large", "no_ids", "mask_too_short")),
    *(
        tokens(name)
        for name in (
            "empty.txt", "binary.jsonl", "deep.jsonl", "floats.npy", "objects.npy", "cut.npy",
            "no-axes.npy", "negative.npy", "truth.npy", "unsigned.npy", "unsigned.safetensors",
            "two.safetensors", "nan-mask.safetensors", "missing.txt", "a-folder.npy", "pipe.txt",
            "pipe.npy",
            "a-file/x.safetensors", "a\0b.jsonl",
        )
    ),
    *(tokens("subjects:ids", f"checkpoint-{at}") for at in (5, 7, 9, 10, 20, 23)),
    *(
        given(*OWN, *option)
        for option in OPTIONS
        if option in [
            ("--seed", -1), ("--seed", 2**32), ("--tolerance", "nan"), ("--device", "meta"),
            ("--layers", "nope"), ("--exclude", "*"), ("--samples", 0), ("--text", "body"),
        ]
    ),
    *(["store", "info", path] for path in ("missing", "a-file", "\ud800")),
    ["store", "verify", "a\0b"],
    ["store", "merge", "a\0b", "--into", "new"],
    ["store", "export", "a-file", "--out", "out"],
    *(["values", path] for path in ("missing", "a-file", "\ud800")),
    ["values", ".", "--out", "a\0b.csv"],
    *(scored(given(data=f"given:{name}")) for name in ("lazy.function", "lines", "nans")),
    *(scored(tokens(name)) for name in ("no-axes.npy", "cut.npy", "nan-mask.safetensors")),
]  # fmt: skip
"""One of each kind, for every day; the others are for the stress tests."""

NOT_UNDERSTOOD = [[], ["nope"], ["plugins", "x"], given(*OWN, "--dtype", "int8")]
NOR_THESE = [
    ["store"], ["store", "a"], ["store", "info", "a", "b"], ["store", "merge", "a"],
    ["verify"], ["--help=3"], given(*OWN, "--samples", "x"),
    given(*OWN, "--tolerance", "x"), given(*OWN, "--seed", "1.5"), given(*OWN, "--nope"),
    given(*OWN, "--batch-size", "many"),
]  # fmt: skip


def named(inputs, chosen):
    """Return them under short names, each once; what is not chosen is for the stress tests."""
    return [
        pytest.param(
            each,
            id=f"{at}: {ascii(' '.join(each))[-40:]}",
            marks=() if each in chosen else pytest.mark.stress,
        )
        for at, each in enumerate(inputs)
    ]


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A folder with all files, which are many to write for each test."""
    folder = tmp_path_factory.mktemp("kept")
    (folder / "given.py").write_text(GIVEN, encoding="utf-8", errors="surrogatepass")
    (folder / "a-file").write_text("x")
    for kind in ("txt", "jsonl", "npy", "safetensors", "parquet", "yaml"):
        os.mkfifo(folder / f"pipe.{kind}")
    for name, data in {**BROKEN, **FILES}.items():
        (folder / name).write_bytes(data)
    for at, configuration in enumerate(CONFIGURATIONS):
        (folder / f"checkpoint-{at}").mkdir()
        (folder / f"checkpoint-{at}" / "config.json").write_bytes(configuration)
    return folder


@pytest.fixture(autouse=True)
def _files(tmp_path, _here, kept):
    for path in kept.iterdir():
        (tmp_path / path.name).symlink_to(path)
    for kind in ("txt", "jsonl", "npy", "safetensors"):
        (tmp_path / f"a-folder.{kind}").mkdir()


def test_the_input_that_others_spoil_is_good(capsys):
    assert cli.main(given()) == 0, capsys.readouterr().err
    assert cli.main(tokens("given:ids")) == 0, capsys.readouterr().err
    assert len({json.dumps(arguments) for arguments in INPUTS}) == len(INPUTS) >= 250
    assert [arguments for arguments in CHOSEN if arguments not in INPUTS] == []


@pytest.mark.filterwarnings("ignore")  # of torch, about what it is given
@pytest.mark.parametrize("arguments", named(INPUTS, CHOSEN))
def test_bad_input_is_one_line_of_error(arguments, capsys):
    assert cli.main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("ghost: ")
    assert len(said.splitlines()) == 1
    assert len(said) > len("ghost: \n")
    assert said[:-1].isprintable()


@pytest.mark.parametrize("arguments", named([*NOT_UNDERSTOOD, *NOR_THESE], NOT_UNDERSTOOD))
def test_arguments_that_are_not_understood_are_explained(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "Traceback" not in said.err
    assert said.err


def test_an_interrupt_is_no_failure_of_ghost(tmp_path, capsys):
    (tmp_path / "slow.py").write_text("def model():\n    raise KeyboardInterrupt\n")
    assert cli.main(given(model="slow:model")) == 130
    assert capsys.readouterr().err == "ghost: interrupted\n"


WHOLE = " ".join(given())
FULL = ("/dev/full", "broken")
"""Where errors cannot be written: a full disk, and a pipe that nobody reads."""

STREAMS = [
    ("--version", ">&-", 0, ""),
    ("--help", ">/dev/full", 2, ""),
    ("--version", ">/dev/full", 2, "1"),
    ("values missing", "2>/dev/full", 2, ""),
]
OTHER_STREAMS = [
    *((arguments, ">&-", 0, "1") for arguments in ("--version", "--help")),
    *((arguments, ">&- 2>&-", 0, "") for arguments in ("--version", "--help")),
    ("--help", ">&-", 0, ""),
    ("--help", ">/dev/full", 2, "1"),
    ("--version", ">/dev/full", 2, ""),
    *((WHOLE, ">&-", 0, unbuffered) for unbuffered in ("", "1")),
    *((WHOLE, ">/dev/full", 2, unbuffered) for unbuffered in ("", "1")),
    (WHOLE, "2>&-", 0, ""),
    (WHOLE, ">&- 2>&-", 0, ""),
    *(("nope", f"{stream} 2>{full}", 2, "") for stream in ("", ">&-") for full in FULL),
    ("values missing", "2>/dev/full", 2, "1"),
    *(("values missing", "2>broken", 2, unbuffered) for unbuffered in ("", "1")),
    ("store info missing", "2>&-", 2, ""),
]


@pytest.mark.parametrize(
    ("arguments", "streams", "status", "unbuffered"),
    [*STREAMS, *(pytest.param(*each, marks=pytest.mark.stress) for each in OTHER_STREAMS)],
)
def test_streams_that_cannot_be_written(arguments, streams, status, unbuffered, monkeypatch):
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    reading, writing = os.pipe()
    os.close(reading)
    streams = streams.replace("broken", f"&{writing}")
    command = f'"{sys.executable}" -m ghost_engines {arguments} {streams}'
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, pass_fds=[writing]
    )
    os.close(writing)
    assert done.returncode == status
    assert len(done.stderr.splitlines()) == (1 if status and "2>" not in streams else 0)
