from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter
from pathlib import Path

import pytest

from ghost_examples import texts
from ghost_examples.texts import (
    DOMAINS,
    VOCABULARY_SIZE,
    Passage,
    Vocabulary,
    build_vocabulary,
    load_domain,
    passages,
)

NAMES = [domain.name for domain in DOMAINS]
LENGTH = 128


@pytest.fixture(scope="module")
def everything() -> tuple[Passage, ...]:
    return passages(LENGTH)


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the data that a test may change, and that the module reads."""
    folder = tmp_path / "data" / "texts"
    folder.mkdir(parents=True)
    for name in NAMES:
        (folder / f"{name}.txt").write_bytes(load_domain(name).encode())
    monkeypatch.setattr(texts, "files", lambda _: tmp_path)
    return folder


def test_the_domains_are_four_and_distinct() -> None:
    assert len(NAMES) == len(set(NAMES)) == 4
    assert len({load_domain(name) for name in NAMES}) == 4
    # No line of ten words is shared, so no domain quotes another.
    lines = [
        {line for line in load_domain(n).splitlines() if len(line.split()) >= 10} for n in NAMES
    ]
    assert sum(map(len, lines)) == len(set().union(*lines))


@pytest.mark.parametrize("name", NAMES)
def test_a_domain_is_clean_text_of_the_promised_size(name: str) -> None:
    text = load_domain(name)
    assert 250_000 <= len(text.encode()) <= 350_000
    assert unicodedata.is_normalized("NFC", text)
    assert not [c for c in set(text) if unicodedata.category(c)[0] == "C" and c != "\n"]
    assert text.endswith("\n")
    assert not [line for line in text.split("\n") if line != line.rstrip()]


@pytest.mark.parametrize("name", NAMES)
def test_every_licence_is_in_the_notice(name: str) -> None:
    notice = (Path(texts.__file__).parent / "data" / "texts" / "NOTICE.md").read_text("utf-8")
    digest = hashlib.sha256(load_domain(name).encode()).hexdigest()
    assert f"`{name}.txt`" in notice
    assert digest in notice
    (domain,) = (domain for domain in DOMAINS if domain.name == name)
    assert domain.licence.lower() in notice.lower()


def test_an_unknown_name_lists_what_exists() -> None:
    with pytest.raises(ValueError, match=r"'poetry'.*scripture, python, dictionary, manual"):
        load_domain("poetry")
    with pytest.raises(ValueError, match="unknown domain"):
        load_domain("../texts/python")


@pytest.mark.parametrize("name", NAMES)
def test_a_changed_text_is_refused(name: str, copied: Path) -> None:
    file = copied / f"{name}.txt"
    assert load_domain(name)
    expected = hashlib.sha256(file.read_bytes()).hexdigest()
    file.write_bytes(file.read_bytes().replace(b"the", b"teh", 1))
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    with pytest.raises(ValueError, match=rf"{name}\.txt.*{expected}.*{found}"):
        load_domain(name)


def test_converted_line_ends_are_the_same_text(copied: Path) -> None:
    text = load_domain("python")
    (copied / "python.txt").write_bytes(text.replace("\n", "\r\n").encode())
    assert load_domain("python") == text


def test_the_vocabulary_is_always_the_same() -> None:
    vocabulary = build_vocabulary()
    assert vocabulary.size == VOCABULARY_SIZE == len(set(vocabulary.pieces)) + 256
    assert build_vocabulary() is vocabulary
    # Model checkpoints depend on the ids: a new digest makes every saved model unreadable.
    digest = hashlib.sha256("\0".join(vocabulary.pieces).encode()).hexdigest()
    assert digest == "075b2fb81355c9904e7c875246f79f3226d8273f79b0ff42019062ad7ac6af36"


def test_any_text_survives_the_vocabulary() -> None:
    vocabulary = build_vocabulary()
    for text in ("", " ", "\n\n    x_y__ = 1\t", "día, 猫 and 🐈\r\n", "é\u0301\x00"):
        tokens = vocabulary.encode(text)
        assert all(0 <= token < vocabulary.size for token in tokens)
        assert vocabulary.decode(tokens) == text


def test_ids_outside_the_vocabulary_are_refused() -> None:
    vocabulary = build_vocabulary()
    for token in (-1, vocabulary.size):
        with pytest.raises(ValueError, match="outside the vocabulary"):
            vocabulary.decode([token])


def test_bytes_that_are_no_text_decode_to_replacements() -> None:
    assert build_vocabulary().decode([255, 65]) == "\ufffdA"


def test_a_vocabulary_joins_what_is_frequent() -> None:
    vocabulary = Vocabulary.train(["na na nana ö"] * 3, 300)
    assert vocabulary.pieces[0] == "ö"
    assert "na" in vocabulary.pieces
    assert len(vocabulary.pieces) < 300 - 256
    assert len(vocabulary.encode("nana ö")) < len("nana ö")
    with pytest.raises(ValueError, match="at least 257"):
        Vocabulary.train(["ö"], 256)


def test_passages_have_the_length_and_round_trip(everything: tuple[Passage, ...]) -> None:
    vocabulary = build_vocabulary()
    for passage in everything:
        assert len(passage.tokens) == LENGTH
        assert 0 <= min(passage.tokens) <= max(passage.tokens) < vocabulary.size
        assert vocabulary.decode(passage.tokens) == passage.text


@pytest.mark.parametrize("name", NAMES)
def test_passages_do_not_overlap(name: str, everything: tuple[Passage, ...]) -> None:
    own = [passage for passage in everything if passage.domain == name]
    assert [passage.index for passage in own] == list(range(len(own)))
    text = load_domain(name)
    joined = "".join(passage.text for passage in own)
    assert text.startswith(joined)
    assert len(build_vocabulary().encode(text[len(joined) :])) < 2 * LENGTH
    assert len(own) >= 500


def test_the_domains_use_the_pieces_differently(everything: tuple[Passage, ...]) -> None:
    used = {name: Counter[int]() for name in NAMES}
    for passage in everything:
        used[passage.domain].update(passage.tokens)
    shares = {
        name: {token: n / count.total() for token, n in count.items()}
        for name, count in used.items()
    }
    for a in NAMES:
        for b in NAMES:
            if a < b:
                every = shares[a].keys() | shares[b].keys()
                apart = sum(abs(shares[a].get(t, 0) - shares[b].get(t, 0)) for t in every) / 2
                assert apart > 0.3, (a, b, apart)


def test_a_limit_spreads_over_the_domain(everything: tuple[Passage, ...]) -> None:
    some = passages(LENGTH, domains=["manual", "python"], per_domain=10)
    assert [p.domain for p in some] == ["manual"] * 10 + ["python"] * 10
    assert set(some) <= set(everything)
    total = sum(p.domain == "manual" for p in everything)
    assert [p.index for p in some[:10]] == [i * total // 10 for i in range(10)]


def test_passages_refuse_what_they_cannot_cut() -> None:
    with pytest.raises(ValueError, match="length must be at least 1"):
        passages(0)
    with pytest.raises(ValueError, match="per_domain must be at least 1"):
        passages(LENGTH, per_domain=0)
    with pytest.raises(ValueError, match="unknown domain"):
        passages(LENGTH, domains=["poetry"])
    with pytest.raises(ValueError, match="has 0 passages of 1000000 tokens"):
        passages(1_000_000, domains=["python"])
    with pytest.raises(ValueError, match="asked for"):
        passages(LENGTH, domains=["python"], per_domain=10**6)
    with pytest.raises(ValueError, match="cut inside a character"):
        passages(1, Vocabulary(()), domains=["manual"])
