"""What a store makes of files that were tampered with."""

import hashlib
import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from store_kit import FakeEngine, make
from torch import Tensor

from ghost_engines.store import DamagedStoreError, GradientStore, StoreError
from ghost_engines.store.listing import shard_path

# Tampered files


def assert_damaged(root, *names: str) -> None:
    for act in (GradientStore.open, lambda path: GradientStore.resume(path, FakeEngine())):
        with pytest.raises(DamagedStoreError) as caught:
            act(root)
        for name in names:
            assert name in str(caught.value)


def rewrite(path, tensors: dict[str, Tensor] | None = None, **metadata: str) -> None:
    with safe_open(path, "pt") as file:
        kept = file.metadata()
    found = {name: tensor.clone() for name, tensor in load_file(path).items()}
    save_file(found if tensors is None else tensors, path, {**kept, **metadata})


def test_missing_shards_are_named(tmp_path):
    make(tmp_path / "g", 22)
    shard_path(tmp_path / "g", 1).unlink()
    shard_path(tmp_path / "g", 3).unlink()
    assert_damaged(tmp_path / "g", "g-00000001.safetensors is missing", "g-00000003.safetensors")


@pytest.mark.parametrize("unit", [0, 1, 2])
@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_shards_that_were_cut_off_are_named(tmp_path, unit, size):
    make(tmp_path / "g", 11)
    path = shard_path(tmp_path / "g", unit)
    path.write_bytes(path.read_bytes()[:size])
    assert_damaged(tmp_path / "g", f"{path} is cut off")


def test_a_shard_of_another_store_is_named(tmp_path):
    make(tmp_path / "g", 11)
    make(tmp_path / "other", 11, info={"model": "other"})
    shutil.copy(shard_path(tmp_path / "other", 1), shard_path(tmp_path / "g", 1))
    assert_damaged(tmp_path / "g", "g-00000001.safetensors belongs to another store")


def test_a_shard_in_another_ones_place_is_named(tmp_path):
    make(tmp_path / "g", 11)
    shutil.copy(shard_path(tmp_path / "g", 0), shard_path(tmp_path / "g", 1))
    assert_damaged(tmp_path / "g", "g-00000001.safetensors holds unit 0")


def test_a_shard_in_the_wrong_folder_is_named(tmp_path):
    make(tmp_path / "g", 11)
    wrong = tmp_path / "g/shards/00007/g-00000003.safetensors"
    wrong.parent.mkdir()
    shutil.copy(shard_path(tmp_path / "g", 0), wrong)
    assert_damaged(tmp_path / "g", str(wrong))


def test_a_partial_shard_before_the_last_is_named(tmp_path):
    make(tmp_path / "g", 11)
    path = shard_path(tmp_path / "g", 1)
    rewrite(path, {name: tensor[:2].clone() for name, tensor in load_file(path).items()})
    assert_damaged(tmp_path / "g", "g-00000001.safetensors holds 2 rows, not 4")


@pytest.mark.parametrize(
    "change",
    [
        lambda found: {"g": found["g"].int(), "ids": found["ids"]},
        lambda found: {"g": found["g"][:, :5].clone(), "ids": found["ids"]},
        lambda found: {"g": found["g"], "ids": found["ids"][:3].clone()},
        lambda found: {"g": found["g"]},
        lambda found: {**found, "more": found["ids"].clone()},
        lambda found: {**found, "loss": found["ids"].clone()},
        lambda found: {**found, "loss": torch.zeros(2)},
    ],
    ids=["dtype", "columns", "fewer ids", "no ids", "one more", "loss dtype", "fewer losses"],
)
def test_a_shard_with_other_contents_is_named(tmp_path, change):
    make(tmp_path / "g", 11)
    path = shard_path(tmp_path / "g", 1)
    rewrite(path, change({name: tensor.clone() for name, tensor in load_file(path).items()}))
    assert_damaged(tmp_path / "g", f"{path} was altered")


def test_losses_in_some_shards_only_are_named(tmp_path):
    make(tmp_path / "g", 11)
    path = shard_path(tmp_path / "g", 1)
    found = {name: tensor.clone() for name, tensor in load_file(path).items()}
    rewrite(path, {**found, "loss": torch.zeros(4)})
    assert_damaged(tmp_path / "g", "same kind of loss")


def test_altered_contents_are_found_by_their_hash(tmp_path):
    make(tmp_path / "g", 11)
    for unit in (0, 2):
        path = shard_path(tmp_path / "g", unit)
        data = bytearray(path.read_bytes())
        data[-3] ^= 1
        path.write_bytes(data)
    store = GradientStore.open(tmp_path / "g")
    with pytest.raises(DamagedStoreError) as caught:
        store.verify()
    for unit, named in enumerate([True, False, True]):
        assert (str(shard_path(tmp_path / "g", unit)) in str(caught.value)) == named


READS = {
    "g": [
        lambda store: store.rows(),
        lambda store: list(store.blocks()),
        lambda store: store.search(torch.ones(1, 6)),
    ],
    "ids": [lambda store: store.ids, lambda store: store.rows()],
    "loss": [lambda store: store.losses, lambda store: store.rows()],
}


@pytest.mark.parametrize("unit", [0, 2])
@pytest.mark.parametrize("name", READS)
def test_altered_contents_are_found_when_they_are_first_read(tmp_path, unit, name):
    make(tmp_path / "g", 11, with_loss=True)
    path = shard_path(tmp_path / "g", unit)
    tensors = {each: tensor.clone() for each, tensor in load_file(path).items()}
    tensors[name].view(torch.uint8)[0] ^= 1
    rewrite(path, tensors)
    store = GradientStore.open(tmp_path / "g")
    for read in READS[name]:
        with pytest.raises(DamagedStoreError, match=f"{path.name} was altered"):
            read(store)
    unchecked = GradientStore.open(tmp_path / "g", check=False)
    assert len(unchecked.rows()) == len(unchecked.ids) == len(unchecked.losses) == 11
    with pytest.raises(DamagedStoreError, match=f"{path.name} was altered"):
        unchecked.verify()


def test_a_shard_that_is_altered_after_it_was_read_is_compared_again(tmp_path):
    make(tmp_path / "g", 11)
    store = GradientStore.open(tmp_path / "g")
    store.rows()
    path = shard_path(tmp_path / "g", 1)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.unlink()
    path.write_bytes(data)
    with pytest.raises(DamagedStoreError, match="was altered"):
        store.rows()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("unit", 4.0),
        ("unit", True),
        ("unit", "4"),
        ("k_total", [6]),
        ("k_total", 0),
        ("dtype", ["float32"]),
        ("dtype", 3),
        ("engine", []),
        ("info", "x"),
        ("notes", 3),
        ("versions", None),
        ("columns", {"norm": {"dtype": "float3"}}),
        ("columns", {"norm": "float32"}),
        ("data", [{"path": 3, "digest": "x"}]),
    ],
)
def test_wrong_types_in_a_manifest_are_named_although_its_fingerprint_fits(tmp_path, key, value):
    make(tmp_path / "g", 11)
    path = tmp_path / "g/manifest.json"
    content = {**json.loads(path.read_text()), key: value}
    identity = {
        each: content[each] for each in content if each not in ("notes", "versions", "fingerprint")
    }
    canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    content["fingerprint"] = hashlib.sha256(canonical.encode()).hexdigest()
    path.write_text(json.dumps(content))
    assert_damaged(tmp_path / "g", str(path), f"{key} is")


def test_a_file_that_goes_missing_later_is_named(tmp_path):
    make(tmp_path / "g", 11)
    store = GradientStore.open(tmp_path / "g")
    shard_path(tmp_path / "g", 1).unlink()
    for act in (store.rows, store.verify, lambda: store.ids, lambda: list(store.blocks())):
        with pytest.raises(DamagedStoreError, match=r"g-00000001\.safetensors is missing"):
            act()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:-20], "is not JSON"),
        (lambda text: "", "is not JSON"),
        (lambda text: "[1]", "is not a store's manifest"),
        (lambda text: "{}", "is not a store's manifest"),
        (lambda text: text.replace('"seed": 42', '"seed": 43'), "was altered"),
        (lambda text: text.replace('"unit": 4', '"unit": 5'), "was altered"),
        (lambda text: text.replace('"unit"', '"units"'), "is not a store's manifest"),
    ],
    ids=["cut off", "empty", "list", "nothing in it", "seed", "unit", "key"],
)
def test_a_manifest_that_was_altered_is_named(tmp_path, change, message):
    make(tmp_path / "g", 11)
    path = tmp_path / "g/manifest.json"
    path.write_text(change(path.read_text()))
    assert_damaged(tmp_path / "g", str(path), message)


def test_a_newer_format_is_told_from_damage(tmp_path):
    make(tmp_path / "g", 3)
    path = tmp_path / "g/manifest.json"
    path.write_text(path.read_text().replace('"schema": 2', '"schema": 3'))
    with pytest.raises(
        StoreError, match="format version 3, this version of ghost reads 1 and 2"
    ) as caught:
        GradientStore.open(tmp_path / "g")
    assert not isinstance(caught.value, DamagedStoreError)
