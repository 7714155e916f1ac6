"""What is written beside the rows of stores: works that may fail, be interrupted, and go on."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from kill_kit import leftovers
from log_kit import NAMES, step
from store_kit import FakeEngine, batch

from ghost_engines import JoinedLog, ScoreLog
from ghost_engines.search import Whitening
from ghost_engines.store import GradientStore, export, merge
from ghost_engines.store import pieces as pieces_of_stores

N, UNIT, COLUMNS = 23, 4, {"n": "int32", "group": "category"}


def beside(ordinals):
    return {"n": ordinals.int() + 5, "group": [f"g{n % 3}" for n in ordinals.tolist()]}


def rows_of(ordinals):
    return batch(0, N)[ordinals]


def contents(root):
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name not in (".lock", ".joining")
    }


def assert_rows(store, ordinals):
    """Assert that a store holds what every store here has at these ordinals."""
    assert torch.equal(store.ids, rows_of(ordinals).ids)
    assert torch.equal(store.rows(), rows_of(ordinals).rows)
    assert torch.equal(store.columns["n"], beside(ordinals)["n"])
    assert list(store.groups) == beside(ordinals)["group"]
    store.verify()


def source(root, ordinals, **given):
    with GradientStore.create(root, FakeEngine(), unit=UNIT, columns=COLUMNS, **given) as store:
        store.append(rows_of(ordinals), columns=beside(ordinals))
    return root


@dataclass
class Work:
    """Something that is written in a folder, and can be done again.

    Attributes:
        root: The folder, with what is needed in it.
        acknowledged: What was said to be safe, by part.
        spared: Which calls it does without.
    """

    root: Path
    spared = ("rename",)

    def __post_init__(self):
        self.acknowledged = {}
        self.prepare()

    def prepare(self):
        """Make what is needed."""

    def do(self):
        """Do it, or go on."""

    def check(self):
        """Assert that nothing that was acknowledged is lost, and nothing is half there."""

    def check_done(self):
        """Assert that all is there."""


class Joining(Work):
    """Two writers of parts, one after the other, each with every second unit."""

    def mine(self, rank):
        return torch.cat(torch.arange(N).split(UNIT)[rank::2])

    def do(self):
        for rank in range(2):
            store = GradientStore.join(
                self.root / "g", FakeEngine(), part=(rank, 2), unit=UNIT, columns=COLUMNS
            )
            with store:
                assert len(store) >= self.acknowledged.get(rank, 0)
                for some in self.mine(rank)[len(store) :].split(3):
                    store.append(rows_of(some), columns=beside(some))
                    self.acknowledged[rank] = store.committed
                store.commit()
                self.acknowledged[rank] = store.committed

    def check(self):
        if not (self.root / "g/manifest.json").exists():
            assert not any(self.acknowledged.values())
            return
        store = GradientStore.open(self.root / "g")
        ordinals = (store.ids - 1) // 3
        assert_rows(store, ordinals)
        for rank, n in self.acknowledged.items():
            assert set(self.mine(rank)[:n].tolist()) <= set(ordinals.tolist())

    def check_done(self):
        assert_rows(GradientStore.open(self.root / "g"), torch.arange(N))
        assert leftovers(self.root / "g") == []


class Merging(Work):
    """Two stores that become one of other units."""

    def prepare(self):
        self.sources = [
            source(self.root / "a", torch.arange(9)),
            source(self.root / "b", torch.arange(9, N)),
        ]
        self.before = [contents(each) for each in self.sources]

    def do(self):
        merge(self.sources, self.root / "into", unit=5)

    def check(self):
        assert [contents(each) for each in self.sources] == self.before
        if (self.root / "into/manifest.json").exists():
            store = GradientStore.open(self.root / "into")
            assert_rows(store, torch.arange(len(store)))

    def check_done(self):
        assert_rows(GradientStore.open(self.root / "into"), torch.arange(N))
        assert leftovers(self.root / "into") == []


class Exporting(Work):
    """A store in files of another kind."""

    out, spared = "out", ("write", "replace")

    def prepare(self):
        self.store = GradientStore.open(source(self.root / "g", torch.arange(N)))

    def do(self):
        # A sync of the folder that fails comes after the files are whole, under their name.
        if not (self.root / self.out).exists():
            export(self.store, self.root / self.out)

    def check(self):
        if (self.root / self.out).exists():
            self.check_done()

    def check_done(self):
        assert leftovers(self.root) == []
        out, expected = self.root / self.out, batch(0, N)
        assert np.array_equal(np.load(out / "rows.npy"), expected.rows.numpy())
        assert np.array_equal(np.load(out / "ids.npy"), expected.ids.numpy())
        assert np.array_equal(np.load(out / "n.npy"), np.arange(N) + 5)
        assert json.loads((out / "group.names.json").read_text()) == ["g0", "g1", "g2"]
        assert len(list(out.iterdir())) == 5


class ExportingTable(Exporting):
    out, spared = "out.parquet", ("write", "replace", "mkdir")

    def check_done(self):
        assert leftovers(self.root) == []
        table = pytest.importorskip("pyarrow.parquet").read_table(self.root / self.out)
        assert table["id"].to_pylist() == batch(0, N).ids.tolist()
        assert table["group"].to_pylist() == [f"g{n % 3}" for n in range(N)]


class Indexing(Work):
    """Samples that are looked up, for which an index is left beside the shards if it can be."""

    spared = ("rename", "mkdir")

    def prepare(self):
        source(self.root / "g", torch.arange(N))

    def do(self):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pieces_of_stores, "WORTH_KEEPING", 1)
            store = GradientStore.open(self.root / "g")
            found = store.rows_by_id(batch(0, N).ids.flip(0))
        assert torch.equal(found, batch(0, N).rows.flip(0))

    def check(self):
        assert_rows(GradientStore.open(self.root / "g"), torch.arange(N))

    def check_done(self):
        self.check()
        assert (self.root / "g/index.safetensors").exists()
        assert leftovers(self.root / "g") == []


class Whitened(Work):
    """Second moments that are kept beside the rows."""

    def prepare(self):
        self.store = GradientStore.open(source(self.root / "g", torch.arange(N)))

    def do(self):
        for blocks in ("parameter", "all"):
            found = Whitening.of(self.store, 0.3, blocks)
            expected = Whitening.of(self.store, 0.3, blocks, save=False, renew=True)
            assert found.moments.keys() == expected.moments.keys()
            for name, moments in expected.moments.items():
                assert torch.equal(found.moments[name], moments)

    def check(self):
        assert_rows(self.store, torch.arange(N))

    def check_done(self):
        assert len(list((self.root / "g/whitening").iterdir())) == 2


class Logging(Work):
    """Two processes that log the same steps, with a checkpoint now and then."""

    def do(self):
        for rank in range(2):
            root = self.root / "logs" / f"{rank}"
            done = self.acknowledged.get(rank, 0)
            if (root / "log.json").exists():
                log = ScoreLog.resume(root, after=done)
            else:
                assert not done
                log = ScoreLog.create(root, unit=24)
            with log:
                for number in range(done + 1, 31):
                    log.append(step(number, rank))
                    if number % 7 == 0:
                        log.commit()
                        self.acknowledged[rank] = number
                log.commit()
                self.acknowledged[rank] = 30

    def check(self):
        for rank, done in self.acknowledged.items():
            log = ScoreLog.open(self.root / "logs" / f"{rank}")
            log.verify()
            assert (log.last or 0) >= done
        if len(self.acknowledged) == 2:
            self.check_joined(JoinedLog.open(self.root / "logs"))

    def check_joined(self, joined):
        joined.verify()
        for number, found in enumerate(joined, 1):
            each = [step(number, rank) for rank in range(2)]
            assert found.step == number
            assert torch.equal(found.ids, torch.cat([one.ids for one in each]))
            assert torch.equal(found.values, torch.cat([one.values for one in each]))
        assert joined.directions == NAMES

    def check_done(self):
        joined = JoinedLog.open(self.root / "logs")
        assert len(joined) == 30
        self.check_joined(joined)
        assert leftovers(self.root / "logs") == []


WORKS = (Joining, Merging, Exporting, ExportingTable, Indexing, Whitened, Logging)
