"""Texts become domains of tokens: which go where, from which files, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ghost_engines import TokenCorpus, TokenMemmap
from ghost_examples import tokenize
from ghost_examples.language_models import open_tokenizer

DOCUMENTS = [f"Document {number} says {number * 7}.\n" for number in range(8)]


def jsonl(path: Path, field: str = "text") -> Path:
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in DOCUMENTS))
    return path


def decoded(path: Path) -> str:
    data = TokenMemmap(path)
    data.verify()
    tokens = [token for block in data for token in block["input_ids"].tolist()]
    return open_tokenizer(data.format.tokenizer).decode(tokens)


def test_documents_go_to_training_or_validation_as_a_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "corpus"
    given = f"docs={jsonl(tmp_path / 'x.jsonl', 'body')}"
    options = f"--field body --length 4 --val-every 4 --output {out}".split()
    tokenize.main([given, *options])
    said = capsys.readouterr().out
    assert "docs: 8 documents, blocks: " in said
    assert said.splitlines()[-1] == str(out)
    val = [DOCUMENTS[2], DOCUMENTS[6]]
    train = [text for text in DOCUMENTS if text not in val]
    for split, texts in (("train", train), ("val", val)):
        whole = "".join(f"{text}\0" for text in texts)
        found = decoded(out / f"{split}-docs.bin")
        assert whole.startswith(found)
        assert len(found) > len(whole) - 20  # less than a block is left over


def test_blocks_of_a_text_go_to_training_or_validation_and_domains_are_added(
    tmp_path: Path,
) -> None:
    text = "".join(DOCUMENTS)
    (tmp_path / "long.txt").write_text(text)
    options = ["--length", "4", "--val-every", "3", "--output", str(tmp_path / "corpus")]
    tokenize.main([str(tmp_path / "long.txt"), *options])
    tokenize.main([f"more={tmp_path / 'long.txt'}", *options])
    train, val = (TokenCorpus.open(tmp_path / "corpus", split) for split in ("train", "val"))
    assert list(train.domains) == ["long", "more"]
    assert train.domains["more"].ids[0] == val.domains["more"].ids[0] == 10**9
    blocks: list[int] = []
    rows = {split: iter(data.domains["long"]) for split, data in (("t", train), ("v", val))}
    total = len(train.domains["long"]) + len(val.domains["long"])
    for at in range(total):
        blocks.extend(next(rows["v" if at % 3 == 1 else "t"])["input_ids"].tolist())
    assert text.startswith(open_tokenizer("embedded").decode(blocks))
    assert total > 20


@pytest.mark.stress
def test_tables_and_data_sets_on_disk_with_a_tokenizer_on_disk(tmp_path: Path) -> None:
    datasets, pyarrow = pytest.importorskip("datasets"), pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    tokenizers, transformers = (pytest.importorskip(f"{x}") for x in ("tokenizers", "transformers"))
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(unk_token="?"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    trainer = tokenizers.trainers.WordLevelTrainer(special_tokens=["?", "END"])
    inner.train_from_iterator(DOCUMENTS, trainer)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="?", eos_token="END"
    )
    fast.save_pretrained(tmp_path / "tokenizer")
    parquet.write_table(pyarrow.table({"text": DOCUMENTS}), tmp_path / "a.parquet")
    datasets.Dataset.from_dict({"text": DOCUMENTS}).save_to_disk(tmp_path / "saved")
    options = ["--length", "3", "--val-every", "4"]
    paths = [str(tmp_path / "a.parquet"), f"b={tmp_path / 'saved'}"]
    places = ["--output", str(tmp_path / "out"), "--tokenizer", str(tmp_path / "tokenizer")]
    tokenize.main([*paths, *options, *places])
    corpus = TokenCorpus.open(tmp_path / "out", "val")
    expected = []
    for text in (DOCUMENTS[2], DOCUMENTS[6]):
        expected += [*fast.encode(text, add_special_tokens=False), fast.eos_token_id]
    for domain in ("a", "b"):
        found = [x for block in corpus.domains[domain] for x in block["input_ids"].tolist()]
        assert found == expected[: len(found)]
        assert len(found) > len(expected) - 3
    assert corpus.vocabulary == len(fast)


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        tokenize.main(arguments)
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_what_does_not_fit_is_said_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = str(jsonl(tmp_path / "x.jsonl")), ["--output", str(tmp_path / "out")]
    assert "at least one DOMAIN=PATH" in refused(out, capsys)
    assert "there is no nothing.txt" in refused(["a=nothing.txt", *out], capsys)
    assert "did you mean 'text'" in refused([path, "--field", "texts", *out], capsys)
    assert "too short: " in refused([path, "--length", "1000", *out], capsys)
    assert "there is no tokenizer in" in refused([path, "--tokenizer", "no", *out], capsys)
    (tmp_path / "empty").mkdir()
    empty = ["--tokenizer", str(tmp_path / "empty")]
    assert "the folder has nothing" in refused([path, *empty, *out], capsys)
    assert "of no kind that is known" in refused([str(tmp_path / "empty"), *out], capsys)
    assert "length must be at least 2" in refused([path, "--length", "1", *out], capsys)
    (tmp_path / "y.jsonl").write_text('{"text": 3}\n')
    assert "has no text in 'text'" in refused([str(tmp_path / "y.jsonl"), *out], capsys)
    assert not any((tmp_path / "out").glob("*"))
