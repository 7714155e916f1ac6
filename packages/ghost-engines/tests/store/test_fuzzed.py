"""Stores of which something was altered at random: a clear error, or the rows that were stored."""

import json
import os
import random
import shutil
import signal
import struct
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from store_kit import FakeEngine, batch, fill

from ghost_engines.search import Whitening
from ghost_engines.store import GradientStore, StoreError

N, UNIT, MORE = 22, 4, 27

PLACES = {"parameter": [2, 4], "all": [6]}
"""How many columns are whitened together."""

JUNK = [
    None,
    True,
    -1,
    0,
    1,
    3,
    1.5,
    16.0,
    10**30,
    "",
    "x",
    "\ud800",
    [],
    [[]],
    {},
    {"a": 1},
    [0, 0],
]


def make_store(root: Path, seed: int = 42) -> None:
    with GradientStore.create(root, FakeEngine(seed=seed), unit=UNIT, notes={"who": "me"}) as store:
        fill(store, N, step=3, with_loss=True)
    assert_whitened(GradientStore.open(root), N)  # which is kept


def write_on(root: Path) -> None:
    with GradientStore.resume(root, FakeEngine()) as store:
        fill(store, MORE, with_loss=True)
    store = GradientStore.open(root)
    try:
        assert_whitened(store, MORE)  # if what was kept is lost
    except StoreError:  # it is of fewer rows
        assert_whitened(store, MORE, renew=True)


def make_parts(root: Path, seed: int = 42) -> None:
    for rank in range(2):
        write_part(root, rank, [(at, min(at + UNIT, N)) for at in range(0, N, UNIT)][rank::2], seed)
    assert_right(GradientStore.open(root), N)  # which leaves an index


def write_part(root: Path, rank: int, ranges: list[tuple[int, int]], seed: int = 42) -> None:
    columns = {"loss": "float32", "group": "category"}
    engine = FakeEngine(seed=seed)
    with GradientStore.join(root, engine, part=(rank, 2), unit=UNIT, columns=columns) as store:
        for start, stop in ranges:
            rows = batch(start, stop)
            groups = [f"g{at % 3}" for at in range(start, stop)]
            store.append(rows, rows.ids / 7, columns={"group": groups})


def write_parts_on(root: Path) -> None:
    write_part(root, 1, [(N, 6 * UNIT)])  # the rest of the last unit
    write_part(root, 0, [(6 * UNIT, MORE)])


def assert_whitened(store: GradientStore, n: int, **given: bool) -> None:
    rows = batch(0, n).rows.double()
    for blocks, lengths in PLACES.items():
        found = Whitening.of(store, 0.3, blocks, **given)
        second = [part.mT @ part / n for part in rows.split(lengths, dim=1)]
        for moments, wanted in zip(found.moments.values(), second, strict=True):
            assert torch.allclose(moments, wanted, rtol=1e-12, atol=0)
        inverses = [
            torch.linalg.inv(each + 0.3 * each.diagonal().mean() * torch.eye(len(each)))
            for each in second
        ]
        scores = rows[:2] @ torch.block_diag(*inverses) @ rows.mT
        nearest = scores.argsort(descending=True, stable=True)[:, :3]
        assert torch.equal(store.search(batch(0, 2).rows, k=3, by=found).ordinals, nearest)


KINDS = {"one": (make_store, write_on), "parts": (make_parts, write_parts_on)}


def some_file(root: Path, draw: random.Random) -> Path:
    # Each kind of file in turn, as there are more shards than others.
    names = ("manifest.json", "committed.json", ".lock", "parts.json", "index.safetensors")
    kinds = [sorted(root.rglob(name)) for name in (*names, *["g-*.safetensors"] * 2)]
    kinds += [sorted(root.glob("whitening/*"))] * 3
    return draw.choice(draw.choice([kind for kind in kinds if kind]))


def some_folder(root: Path, draw: random.Random) -> Path:
    folders = [root / "shards", root / "shards/00000", *root.glob("whitening")]
    if (root / "parts").exists():
        folders = [root / "parts", *(root / "parts").glob("*"), *(root / "parts").glob("*/shards")]
    return draw.choice(sorted(folders))


# Mutations of a file's bytes


def flip(path, root, draw):
    data = bytearray(path.read_bytes())
    for _ in range(draw.choice([1, 1, 1, 5])):
        if data:
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def overwrite(path, root, draw):
    data = bytearray(path.read_bytes())
    start = draw.randrange(len(data) + 1)
    length = draw.choice([1, 8, 64, len(data)])
    data[start : start + length] = draw.choice([bytes(length), draw.randbytes(length)])
    path.write_bytes(data)


def cut(path, root, draw):
    data = path.read_bytes()
    path.write_bytes(data[: draw.randrange(len(data) + 1)])


def lengthen(path, root, draw):
    path.write_bytes(path.read_bytes() + draw.randbytes(draw.choice([1, 8, 5000])))


def insert(path, root, draw):
    data = path.read_bytes()
    at = draw.randrange(len(data) + 1)
    path.write_bytes(data[:at] + draw.randbytes(draw.choice([1, 8])) + data[at:])


def length_of_header(path, root, draw):
    data = path.read_bytes()
    length = draw.choice([0, 1, 7, len(data), 2**31, 2**63, 2**64 - 1])
    path.write_bytes(struct.pack("<Q", length) + data[8:])


# Mutations of JSON


def altered(value, draw):
    """Return a JSON value with one thing in it changed."""
    if isinstance(value, dict) and value and draw.random() < 0.9:
        key = draw.choice(sorted(value))
        match draw.randrange(6):
            case 0:
                return {other: value[other] for other in value if other != key}
            case 1:
                return {**value, f"{key}x": value[key]}
            case _:
                return {**value, key: altered(value[key], draw)}
    if isinstance(value, list) and value and draw.random() < 0.8:
        at = draw.randrange(len(value))
        return [*value[:at], altered(value[at], draw), *value[at + draw.choice([0, 1]) :]]
    if isinstance(value, int) and draw.random() < 0.5:
        return value + draw.choice([-8, -1, 1, 8])
    return draw.choice(JUNK)


def json_of_file(path, root, draw):
    if path.suffix == ".safetensors":
        data = path.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        text = json.dumps(altered(json.loads(data[8 : 8 + length]), draw)).encode()
        text += b" " * (-len(text) % 8)
        path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    elif path.suffix == ".json":
        path.write_text(json.dumps(altered(json.loads(path.read_text()), draw)))
    else:
        lengthen(path, root, draw)


def nested(path, root, draw):
    deep = draw.choice([b"[", b'{"a":']) * draw.choice([10, 100_000])
    if path.suffix == ".safetensors":
        deep = struct.pack("<Q", len(deep)) + deep
    path.write_bytes(deep)


# Mutations of names


def remove(path, root, draw):
    path.unlink()


def rename(path, root, draw):
    path.rename(
        path.with_name(path.name.replace("0", draw.choice("19x٣"), 1) + draw.choice(["", "~"]))
    )


def swap(path, root, draw):
    other = some_file(root, draw)
    if other != path:
        path.rename(root / "aside")
        other.rename(path)
        (root / "aside").rename(other)


def stray(path, root, draw):
    unit = draw.choice([0, 1, 5, 6, 7, 999, 1000, 10**7, 10**12, 10**40, -1])
    shards = draw.choice(sorted(root.rglob("shards")))
    folder = shards / draw.choice([f"{unit // 1000:05d}", "00000", "x"])
    folder.mkdir(exist_ok=True)
    target = folder / f"g-{unit:08d}.safetensors"
    if target != path:
        shutil.copy(path, target)


def folder_in_its_place(path, root, draw):
    path.unlink()
    path.mkdir()


def pipe_in_its_place(path, root, draw):
    path.unlink()
    os.mkfifo(path)


def link_in_its_place(path, root, draw):
    target = draw.choice([path, root / "nothing", some_file(root, draw), "/dev/zero", "/dev/null"])
    path.unlink()
    path.symlink_to(target)


def folder_gone(path, root, draw):
    shutil.rmtree(some_folder(root, draw))


def folder_elsewhere(path, root, draw):
    folder = some_folder(root, draw)
    folder.rename(folder.with_name(draw.choice(["00001", "old", "x~"])))


def file_for_folder(path, root, draw):
    folder = some_folder(root, draw)
    shutil.rmtree(folder)
    draw.choice([lambda: folder.write_text(""), lambda: os.mkfifo(folder)])()


def leftover(path, root, draw):
    target = path.with_name(path.name + ".ghost-tmp")
    draw.choice([lambda: target.write_bytes(b"half"), target.mkdir, lambda: os.mkfifo(target)])()


def of_another_store(path, root, draw):
    other = root.with_name("other")
    if not other.exists():
        KINDS["parts" if (root / "parts").exists() else "one"][0](other, 7)
    shutil.copy(other / path.relative_to(root), path)


MUTATIONS: list[Callable[..., None]] = [
    *(flip, overwrite, cut, lengthen, insert, length_of_header, json_of_file, json_of_file, nested),
    *(remove, rename, swap, stray, folder_in_its_place, pipe_in_its_place, link_in_its_place),
    *(folder_gone, folder_elsewhere, file_for_folder, leftover, of_another_store),
]


@contextmanager
def no_longer_than(seconds: int):
    def late(number, frame):
        raise AssertionError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def assert_right(store: GradientStore, n: int) -> None:
    expected = batch(0, n)
    assert len(store) == n
    assert torch.equal(store.ids, expected.ids)
    assert torch.equal(store.losses, expected.ids / 7)
    assert torch.equal(store.rows(), expected.rows)
    assert torch.equal(torch.cat([block.rows for block in store.blocks(3)]), expected.rows)
    found = store.search(expected.rows[:2], k=2)
    order = (expected.rows[:2] @ expected.rows.T).sort(descending=True, stable=True).indices
    assert torch.equal(found.ordinals, order[:, :2])
    assert torch.equal(store.rows_by_id(expected.ids), expected.rows)
    assert store.groups is None or list(store.groups) == [f"g{at % 3}" for at in range(n)]


def assert_clear(error: Exception, root: Path) -> None:
    """Assert that an error is one of ghost's or of the system, and names a path of the store."""
    assert isinstance(error, StoreError | OSError), repr(error)
    assert str(root) in str(error), repr(error)


def try_everything(root: Path, write_on: Callable[[Path], None]) -> bool:
    """Read, then write on; return whether there was an error."""
    failures = 0
    reads: list[Callable[[GradientStore], object]] = [
        lambda store: assert_right(store, N),
        lambda store: store.ids,
        lambda store: store.losses,
        lambda store: store.rows(),
        lambda store: store.rows_by_id(batch(0, N).ids),
    ]
    if not (root / "parts").exists():
        reads.append(lambda store: assert_whitened(store, N))
    for read in reads:  # each with a store of its own: the first read checks most
        try:
            store = GradientStore.open(root)
            result = read(store)
        except (StoreError, OSError) as error:
            assert_clear(error, root)
            failures += 1
        else:
            assert len(store) == N
            if isinstance(result, torch.Tensor):
                expected = batch(0, N)
                rights = (expected.ids, expected.ids / 7, expected.rows)
                assert any(torch.equal(result, right) for right in rights)
    try:
        write_on(root)
        assert_right(GradientStore.open(root), MORE)
    except (StoreError, OSError) as error:
        assert_clear(error, root)
        failures += 1
    return failures > 0


def seeds():
    return [0, *(pytest.param(seed, marks=pytest.mark.stress) for seed in range(1, 34))]


@pytest.mark.parametrize("seed", seeds())
@pytest.mark.parametrize("kind", ["one", pytest.param("parts", marks=pytest.mark.stress)])
def test_an_altered_store_is_a_clear_error_or_gives_the_right_rows(
    tmp_path, monkeypatch, kind, seed
):
    monkeypatch.setattr("ghost_engines.store.pieces.WORTH_KEEPING", 2)
    draw = random.Random(seed)
    make, write_on = KINDS[kind]
    make(tmp_path / "original")
    failed = 0
    rounds = 100 if seed else len(MUTATIONS)
    for at in range(rounds):
        root = tmp_path / "store"
        shutil.copytree(tmp_path / "original", root)
        mutate = draw.choice(MUTATIONS) if seed else MUTATIONS[at]
        path = some_file(root, draw)
        worth_mapping = draw.choice([0, 1 << 20])
        monkeypatch.setattr("ghost_engines.store.tensor_files._WORTH_MAPPING", worth_mapping)
        mutate(path, root, draw)
        try:
            with no_longer_than(60):
                failed += try_everything(root, write_on)
        except BaseException as error:
            error.add_note(f"seed {seed}, round {at}: {mutate.__name__} of {path}")
            raise
        shutil.rmtree(root)
    assert rounds / 4 < failed < rounds
