"""Files of tensors next to those of the safetensors library."""

import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from ghost_engines.store import DamagedStoreError
from ghost_engines.store.hashes import HASHES, hash_of
from ghost_engines.store.tensor_files import TensorFile, write_tensors

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
DTYPES = [*FLOATS, torch.int64, torch.int32, torch.uint8]


def tensors(n=5):
    found = {str(dtype)[6:]: (torch.randn(n, 3) * 100).to(dtype) for dtype in DTYPES}
    return {**found, "a": torch.arange(n), "z": torch.randn(n).half()}


def assert_same(found, expected):
    assert set(found) == set(expected)
    assert all(found[name].dtype == expected[name].dtype for name in expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("n", [0, 1, 5, 2000])
def test_each_reads_what_the_other_writes(tmp_path, monkeypatch, n):
    expected = tensors(n)
    write_tensors(tmp_path / "ours", expected, {"unit": "3"}, tmp_path)
    assert_same(load_file(tmp_path / "ours"), expected)
    save_file(expected, tmp_path / "theirs", {"unit": "3"})
    for worth in (0, 1 << 30):
        monkeypatch.setattr("ghost_engines.store.tensor_files._WORTH_MAPPING", worth)
        for name in ("ours", "theirs"):
            with TensorFile(tmp_path / name) as file:
                assert file.metadata["unit"] == "3"
                found = {name: file.get_tensor(name) for name in file.places if n or worth}
                assert_same({name: file.read_tensor(name) for name in file.places}, expected)
            if n:
                assert_same(found, expected)  # also once the file is closed


@pytest.mark.parametrize("kind", HASHES)
def test_the_bytes_of_a_file_depend_on_its_tensors_alone(tmp_path, kind):
    found = tensors()
    for name in ("one", "other"):
        write_tensors(tmp_path / name, found, {"unit": "3"}, tmp_path, kind)
        found = dict(reversed(found.items()))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()
    with TensorFile(tmp_path / "one") as file:
        assert (file.kind, file.metadata[kind]) == (kind, hash_of(found, kind))


def entry(**changed):
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changed}


@pytest.mark.parametrize(
    "header",
    [
        [],
        {"g": []},
        {"g": {}},
        {"g": entry(shape=[3])},
        {"g": entry(shape=[2.0])},
        {"g": entry(shape=[-2])},
        {"g": entry(shape=[True, 2])},
        {"g": entry(data_offsets=[0, 4], shape=[1])},
        {"g": entry(data_offsets=[8, 0])},
        {"g": entry(data_offsets=[0, 16], shape=[4])},
        {"g": entry(data_offsets=[4, 12])},
        {"g": entry(data_offsets=[-8, 0])},
        {"g": entry(), "h": entry()},
        {"g": entry(), "__metadata__": []},
        {"g": entry(dtype=3)},
    ],
)
def test_a_header_that_does_not_fit_is_refused(tmp_path, header):
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (tmp_path / "file").write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    with pytest.raises(DamagedStoreError, match="cut off or not a shard"):
        TensorFile(tmp_path / "file")


def test_a_tensor_that_would_not_be_aligned_is_refused(tmp_path):
    text = json.dumps({"g": entry()}).encode()
    text += b" " * (1 - len(text) % 8)
    (tmp_path / "file").write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    with pytest.raises(DamagedStoreError, match="does not fit"):
        TensorFile(tmp_path / "file")
