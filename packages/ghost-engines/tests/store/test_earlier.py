"""Stores that earlier versions wrote: the same schema, with one hash a shard and no record."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import save_file
from store_kit import FakeEngine, assert_holds, batch, fill

from ghost_engines.store import DamagedStoreError, GradientStore
from ghost_engines.store.listing import shard_path


def write_earlier(root, n, unit=4):
    """Write what version 0.1 wrote, without code of the store's."""
    identity = {
        "k_total": 6,
        "dtype": "float32",
        "unit": unit,
        "engine": json.loads(json.dumps(FakeEngine().manifest())),
        "info": {},
        "schema": 1,
    }
    canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    fingerprint = hashlib.sha256(canonical.encode()).hexdigest()
    root.mkdir()
    content = {**identity, "notes": {}, "versions": {}, "fingerprint": fingerprint}
    (root / "manifest.json").write_text(json.dumps(content))
    for number, start in enumerate(range(0, n, unit)):
        rows = batch(start, min(start + unit, n))
        tensors = {"g": rows.rows, "ids": rows.ids, "loss": rows.ids / 7}
        digest = hashlib.sha256()
        for name in sorted(tensors):
            digest.update(tensors[name].numpy().tobytes())
        path = shard_path(root, number)
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"fingerprint": fingerprint, "unit": str(number), "sha256": digest.hexdigest()}
        save_file(tensors, path, metadata)


def test_it_is_read_checked_and_resumed(tmp_path):
    write_earlier(tmp_path / "g", 10)
    store = GradientStore.open(tmp_path / "g")
    assert_holds(store, 10)
    assert torch.equal(store.losses, batch(0, 10).ids / 7)
    store.verify()
    with GradientStore.resume(tmp_path / "g", FakeEngine()) as store:
        fill(store, 15, with_loss=True)
    assert_holds(GradientStore.open(tmp_path / "g"), 15)


@pytest.mark.parametrize(
    "read", [lambda s: s.ids, lambda s: s.losses, lambda s: s.rows()], ids=["ids", "losses", "rows"]
)
def test_its_altered_shards_are_found_when_they_are_read(tmp_path, read):
    write_earlier(tmp_path / "g", 10)
    path = shard_path(tmp_path / "g", 1)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # in the rows, which its only hash covers together with the ids
    path.write_bytes(data)
    with pytest.raises(DamagedStoreError, match="was altered"):
        read(GradientStore.open(tmp_path / "g"))
