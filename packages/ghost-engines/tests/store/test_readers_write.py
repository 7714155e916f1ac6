"""Files that readers leave beside a store, several of them at the same time."""

import os
import time

import pytest
import torch
from store_kit import batch, make

from ghost_engines.search import Whitening
from ghost_engines.store import GradientStore

N = 11


def look_up(root):
    """Look samples up, which leaves an index."""
    rows = GradientStore.open(root).rows_by_id(batch(0, N).ids.flip(0))
    assert torch.equal(rows, batch(0, N).rows.flip(0))


def whiten(root):
    """Take second moments, which are kept."""
    found = Whitening.of(GradientStore.open(root), blocks="all").moments["*"]
    rows = batch(0, N).rows.double()
    torch.testing.assert_close(found, rows.mT @ rows / N)


KEPT = {"index.safetensors": look_up, "whitening/all.safetensors": whiten}


@pytest.fixture(params=KEPT)
def kept(request, tmp_path, monkeypatch):
    """A store, what a reader of it does, and the file that it leaves."""
    monkeypatch.setattr("ghost_engines.store.pieces.WORTH_KEEPING", 3)
    make(tmp_path / "g", N)
    return tmp_path / "g", KEPT[request.param], tmp_path / "g" / request.param


@pytest.mark.parametrize("step", ["open", "fsync", "replace"])
def test_two_at_once_do_not_meet(kept, monkeypatch, step):
    """The second does all of it while the first is at one step."""
    root, act, path = kept
    real, met = getattr(os, step), []

    def other_first(*arguments, **named):
        if not met and (step != "open" or "ghost-tmp" in str(arguments[0])):
            met.append(True)
            act(root)
            assert path.is_file()
        return real(*arguments, **named)

    monkeypatch.setattr(os, step, other_first)
    act(root)
    assert met
    before = path.stat().st_ino
    act(root)
    assert path.stat().st_ino == before  # it is whole, and read
    assert not list(root.rglob("*.ghost-tmp"))


def test_what_a_killed_one_left_goes_once_nobody_can_be_at_it(kept):
    root, act, path = kept
    path.parent.mkdir(exist_ok=True)
    old, new = (path.with_name(f"{path.name}.{name}.ghost-tmp") for name in ("old", "new"))
    for each, age in ((old, 4000), (new, 3000)):
        each.write_bytes(b"half")
        os.utime(each, (time.time() - age,) * 2)
    act(root)
    assert path.is_file()
    assert new.exists()
    assert not old.exists()
