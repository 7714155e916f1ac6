"""Tokens in files: what is written is what is read, and damage is found."""

from __future__ import annotations

import hashlib
import json
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from ghost_core import UnknownNameError
from ghost_engines import CorpusError, TokenCorpus, TokenMemmap, TokenWriter
from ghost_engines.corpus import BLOCKS_PER_DOMAIN, domain_number, token_path


def write(
    folder: Path, domain: str, tokens: list[int], split: str = "train", vocabulary: int = 100
) -> Path:
    path = token_path(folder, split, domain)
    first = domain_number(folder, domain) * BLOCKS_PER_DOMAIN
    with TokenWriter(path, vocabulary=vocabulary, length=4, first_id=first) as writer:
        writer.append(tokens[:3])
        writer.append(np.array(tokens[3:]))
    return path


@pytest.mark.parametrize(
    ("vocabulary", "code"), [(100, "H"), (65_536, "H"), (65_537, "I"), (1 << 32, "I")]
)
def test_tokens_are_stored_as_the_vocabulary_needs(
    tmp_path: Path, vocabulary: int, code: str
) -> None:
    tokens = [0, 1, 2, vocabulary - 1, 5, 6, 7, 8, 9]
    path = write(tmp_path, "a", tokens, vocabulary=vocabulary)
    stored = struct.pack(f"<9{code}", *tokens)
    assert path.read_bytes() == stored
    assert sorted(each.name for each in tmp_path.iterdir()) == ["train-a.bin", "train-a.json"]
    assert json.loads(path.with_suffix(".json").read_text()) == {
        "dtype": {"H": "uint16", "I": "uint32"}[code],
        "vocabulary": vocabulary,
        "length": 4,
        "tokens": 9,
        "first_id": 0,
        "tokenizer": "",
        "sha256": hashlib.sha256(stored).hexdigest(),
        "version": 1,
    }
    data = TokenMemmap(path)
    data.verify()
    assert len(data) == 2  # the ninth token fills no block
    assert [data[at]["input_ids"].tolist() for at in (0, 1, -1)] == [
        tokens[:4], tokens[4:8], tokens[4:8],
    ]  # fmt: skip
    assert data[0]["input_ids"].dtype == torch.int64
    with pytest.raises(IndexError, match="2 blocks"):
        data[2]


def test_workers_read_blocks_with_their_ids(tmp_path: Path) -> None:
    write(tmp_path, "a", list(range(8)))
    write(tmp_path, "b", list(range(50, 62)))
    corpus = TokenCorpus.open(tmp_path)
    assert len(pickle.dumps(corpus)) < 5000  # a path, no tokens
    batches = list(DataLoader(corpus, batch_size=2, num_workers=1))
    ids = torch.cat([batch["sample_id"] for batch in batches]).tolist()
    assert ids == [0, 1, 10**9, 10**9 + 1, 10**9 + 2]
    rows = torch.cat([batch["input_ids"] for batch in batches])
    assert rows.flatten().tolist() == [*range(8), *range(50, 62)]
    assert [corpus.domain_of(sample) for sample in ids] == ["a", "a", "b", "b", "b"]
    assert corpus.by_id(10**9 + 1).tolist() == [54, 55, 56, 57]


def test_ids_stay_whatever_is_read_besides(tmp_path: Path) -> None:
    for domain in ("b", "a"):
        write(tmp_path, domain, list(range(8)))
    write(tmp_path, "c", list(range(8)), split="val")
    write(tmp_path, "c", list(range(8)))
    ids = {
        domain: [block["sample_id"] for block in TokenCorpus.open(tmp_path, "train", [domain])]
        for domain in "abc"
    }
    assert ids == {"b": [0, 1], "a": [10**9, 10**9 + 1], "c": [2 * 10**9, 2 * 10**9 + 1]}
    assert list(TokenCorpus.open(tmp_path).domains) == ["a", "b", "c"]


@pytest.mark.parametrize("tokens", [[3, 100], [-1], [1.5], [[1, 2]], [1, 2, 3, 4, 5, 100]], ids=str)
def test_what_is_no_token_is_refused_and_nothing_remains(tmp_path: Path, tokens: list[int]) -> None:
    with pytest.raises(CorpusError, match="token"):
        write(tmp_path, "a", tokens)
    assert list(tmp_path.iterdir()) == []


def test_a_writer_that_was_stopped_leaves_nothing_that_is_read(tmp_path: Path) -> None:
    path = token_path(tmp_path, "train", "a")
    path.write_bytes(b"\1\0" * 8)  # killed between the file and its sidecar
    with pytest.raises(CorpusError, match=r"no .*train-a\.json") as refused:
        TokenCorpus.open(tmp_path)
    assert "the folder has train-a.bin" in str(refused.value)
    write(tmp_path, "a", list(range(4)))
    assert TokenMemmap(path)[0]["input_ids"].tolist() == [0, 1, 2, 3]
    with pytest.raises(CorpusError, match="already"):
        write(tmp_path, "a", list(range(4)))


def change(path: Path, **entries: object) -> None:
    sidecar = path.with_suffix(".json")
    sidecar.write_text(json.dumps({**json.loads(sidecar.read_text()), **entries}))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"dtype": "int8"}, "dtype is 'int8', not uint16 or uint32"),
        ({"version": 2}, "version is 2"),
        ({"length": 0}, "length is 0"),
        ({"tokens": 9}, "has 16 bytes, its sidecar says 18"),
        ({"vocabulary": 70000}, "at most 65536"),
        ({"more": 1}, "does not describe tokens"),
    ],
)
def test_sidecars_that_do_not_fit_are_refused(
    tmp_path: Path, entries: dict[str, object], message: str
) -> None:
    path = write(tmp_path, "a", list(range(8)))
    change(path, **entries)
    with pytest.raises(CorpusError, match=message):
        TokenMemmap(path)


def test_damage_is_found(tmp_path: Path) -> None:
    path = write(tmp_path, "a", list(range(8)))
    path.write_bytes(struct.pack("<8H", 0, 1, 2, 3, 4, 5, 100, 7))
    data = TokenMemmap(path)
    assert data[0]["input_ids"].tolist() == [0, 1, 2, 3]
    with pytest.raises(CorpusError, match="block 1 has the token id 100"):
        data[1]
    with pytest.raises(CorpusError, match="was altered"):
        data.verify()
    path.with_suffix(".json").write_text("{")
    with pytest.raises(CorpusError, match=r"train-a\.json cannot be read"):
        TokenMemmap(path)
    path.unlink()
    with pytest.raises(CorpusError, match="cannot be read"):
        TokenCorpus.open(tmp_path)


def test_missing_files_name_what_is_expected_and_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="there is no such folder"):
        TokenCorpus.open(tmp_path / "none")
    write(tmp_path, "a", list(range(8)))
    with pytest.raises(CorpusError, match=r"no .*val-DOMAIN\.bin") as refused:
        TokenCorpus.open(tmp_path, "val")
    assert "the folder has train-a.bin, train-a.json" in str(refused.value)
    with pytest.raises(UnknownNameError, match="did you mean 'a'"):
        TokenCorpus.open(tmp_path, domains=["aa"])
    with pytest.raises(CorpusError, match="at least one domain"):
        TokenCorpus.open(tmp_path, domains=[])
    token_path(tmp_path, "train", "a").unlink()
    with pytest.raises(CorpusError, match=r"there is no .*train-a\.bin"):
        TokenCorpus.open(tmp_path)


def test_domains_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    one, other = (write(tmp_path, domain, list(range(8))) for domain in "ab")
    change(other, first_id=1)
    with pytest.raises(CorpusError, match="'a' and 'b' share the ids from 1"):
        TokenCorpus.open(tmp_path)
    change(one, vocabulary=200)
    with pytest.raises(CorpusError, match=r"one vocabulary, not \{'a': 200, 'b': 100\}"):
        TokenCorpus.open(tmp_path)


@pytest.mark.parametrize(("split", "domain"), [("a-b", "c"), ("", "c"), ("a", ""), ("a", "../c")])
def test_names_that_no_file_can_have_are_refused(split: str, domain: str) -> None:
    with pytest.raises(CorpusError, match="cannot be the names"):
        token_path("x", split, domain)
