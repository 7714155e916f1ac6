"""Records of files, what they are for a language model, and samples made of them."""

import json
import logging

import pytest
import torch

from ghost_engines.corpus import (
    Blocks,
    CorpusError,
    Examples,
    MessagesForm,
    Mixture,
    NoRecordError,
    PromptForm,
    TextForm,
    open_records,
)

WORDS = ["<eos>", "the", "a", "cat", "dog", "sat", "ran", "user:", "assistant:"]


class Tokenizer:
    """Knows a few words, and a template for conversations."""

    eos_token_id = 0
    chat_template = "user: ... assistant: ... <eos>"

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [WORDS.index(word) for word in text.split()]}

    def decode(self, ids):
        return " ".join(WORDS[each] for each in ids)

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        assert not tokenize
        parts = [f"{each['role']}: {each['content']} <eos>" for each in messages]
        return " ".join([*parts, *(["assistant:"] if add_generation_prompt else [])])


def lines(path, *records):
    path.write_text("".join(json.dumps(each) + "\n" for each in records))
    return open_records(path)


# Records


def test_lines_are_read_where_they_are(tmp_path):
    data = b'\xef\xbb\xbf{"text": "the cat"}\n\n  \n{"text": "a d\xc3\xb6g"}\r\n{"text": "end"}'
    (tmp_path / "a.jsonl").write_bytes(data)
    records = open_records(tmp_path / "a.jsonl")
    assert [records[at]["text"] for at in range(len(records))] == ["the cat", "a dög", "end"]
    begins, ends = records.places
    assert json.loads(data[begins[1] : ends[1]]) == {"text": "a dög"}
    assert data[begins[0] : ends[0]] == b'{"text": "the cat"}\n'
    assert len(open_records(tmp_path / "a.jsonl", limit=2)) == 2
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa\n")
    assert open_records(tmp_path / "a.txt")[0] == {"text": "a"}
    assert open_records(tmp_path / "a.csv") is None


@pytest.mark.parametrize("line", ["[1]", "a", "3"])
def test_lines_that_are_no_objects(line, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' + line)
    with pytest.raises(NoRecordError, match=r"text 2 of .*a\.jsonl is no JSON object"):
        open_records(tmp_path / "a.jsonl")[1]


@pytest.mark.stress
def test_rows_of_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"text": [f"t{at}" for at in range(10)], "n": list(range(10))})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=4)
    records = open_records(tmp_path / "a.parquet")
    assert len(records) == 10
    assert [records[at] for at in (9, 0, 4)] == [{"text": f"t{at}", "n": at} for at in (9, 0, 4)]
    (tmp_path / "b.parquet").write_bytes(b"nonsense")
    with pytest.raises(CorpusError, match="is no Parquet file"):
        open_records(tmp_path / "b.parquet")


@pytest.mark.stress
def test_items_of_a_data_set_on_disk(tmp_path):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"text": ["a", "b", "c"]})
    data.save_to_disk(tmp_path / "d")
    records = open_records(tmp_path / "d")
    assert [records[at]["text"] for at in range(len(records))] == ["a", "b", "c"]
    assert records.files
    datasets.DatasetDict({"train": data}).save_to_disk(tmp_path / "several")
    with pytest.raises(CorpusError, match="several data sets: train"):
        open_records(tmp_path / "several")


# Forms


def learnt(form, record):
    found = form.tokens(record, Tokenizer(), "record 1")
    return " ".join(
        f"[{WORDS[each]}]" if own else WORDS[each]
        for each, own in zip(found.ids, found.learnt, strict=True)
    )


def test_all_of_a_text_is_learnt():
    assert learnt(TextForm("body"), {"body": "the cat sat"}) == "[the] [cat] [sat]"


def test_completions_are_learnt_with_their_end():
    form = PromptForm("ask", "answer")
    assert learnt(form, {"ask": "the cat", "answer": "sat"}) == "the cat [sat] [<eos>]"


@pytest.mark.parametrize(
    ("ask", "answer", "shown"),
    [
        ("a cat", "sat", "a cat\nsat"),
        ("a ", "cat", "a cat"),
        ("a", " cat", "a cat"),
        ("", "a", "a"),
    ],
)
def test_prompts_are_shown_apart_from_completions(ask, answer, shown):
    assert PromptForm("ask", "answer").shown({"ask": ask, "answer": answer}, "record 1") == shown


def test_answers_of_a_conversation_are_learnt():
    messages = [
        {"role": "user", "content": "the cat"},
        {"role": "assistant", "content": "sat"},
        {"role": "user", "content": "a dog"},
        {"role": "assistant", "content": "ran"},
    ]
    assert learnt(MessagesForm(), {"messages": messages}) == (
        "user: the cat <eos> assistant: [sat] [<eos>] user: a dog <eos> assistant: [ran] [<eos>]"
    )


def test_a_template_that_rewrites_what_was_said_is_refused():
    class Rewriting(Tokenizer):
        def apply_chat_template(self, messages, **options):
            return super().apply_chat_template(messages[-2:], **options)

    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "dog"}]
    with pytest.raises(CorpusError, match="cannot be told from the rest"):
        MessagesForm().tokens({"messages": said * 2}, Rewriting(), "record 1")


@pytest.mark.parametrize(
    ("form", "record", "told"),
    [
        (TextForm("body"), {"bodi": "a"}, "no field 'body', but 'bodi'; did you mean 'bodi'"),
        (TextForm(), {"text": 3}, "'text' of record 1 is a int, no text"),
        (PromptForm(), {"prompt": "a"}, "no field 'completion'"),
        (MessagesForm(), {"messages": "a"}, "no conversation"),
        (MessagesForm(), {"messages": [{"role": "user", "content": "a"}]}, "no conversation"),
    ],
)
def test_records_of_another_form_are_refused(form, record, told):
    with pytest.raises(CorpusError, match=told):
        form.tokens(record, Tokenizer(), "record 1")


# Samples


def test_samples_are_cut_only_where_that_was_said(tmp_path):
    records = lines(tmp_path / "a.jsonl", {"text": "the cat sat"}, {"text": "a"})
    cut = Examples(records, TextForm(), Tokenizer(), truncate=2)
    assert cut[0]["input_ids"].tolist() == [1, 3]
    assert cut.text(0) == "the cat sat"
    with pytest.raises(CorpusError, match=r"3 tokens, and the model takes 2[\s\S]*--truncate 2"):
        Examples(records, TextForm(), Tokenizer(), positions=2)[0]
    with pytest.raises(CorpusError, match="no token to predict"):
        cut[1]


def test_labels_leave_out_what_is_not_learnt(tmp_path):
    records = lines(tmp_path / "a.jsonl", {"prompt": "the cat", "completion": "sat"})
    sample = Examples(records, PromptForm(), Tokenizer())[0]
    assert sample["labels"].tolist() == [-100, -100, 5, 0]
    alone = lines(tmp_path / "c.jsonl", {"prompt": "", "completion": "the cat"})
    sample = Examples(alone, PromptForm(), Tokenizer())[0]  # shares a batch with others
    assert sample["labels"].tolist() == sample["input_ids"].tolist() == [1, 3, 0]
    block = Blocks(alone, PromptForm(), Tokenizer(), block=2)[0]
    assert block["labels"].tolist() == [1, 3]
    assert (
        "labels"
        not in Examples(lines(tmp_path / "b.jsonl", {"text": "a dog"}), TextForm(), Tokenizer())[0]
    )
    with pytest.raises(CorpusError, match="no token to predict"):
        Examples(records, PromptForm(), Tokenizer(), truncate=2)[0]


def test_blocks_are_all_texts_one_after_another(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    records = lines(tmp_path / "a.jsonl", {"text": "the cat sat"}, {"text": "a dog ran"})
    blocks = Blocks(records, TextForm(), Tokenizer(), block=3)
    assert torch.stack([blocks[at]["input_ids"] for at in range(len(blocks))]).tolist() == [
        [1, 3, 5], [0, 2, 4]
    ]  # fmt: skip
    assert blocks.text(0) == "the cat sat"
    assert "the last 2 tokens fill no block" in caplog.text
    with pytest.raises(CorpusError, match="8 tokens, no block of 9"):
        Blocks(records, TextForm(), Tokenizer(), block=9)


def test_domains_keep_their_ids_apart(tmp_path):
    web = Examples(lines(tmp_path / "w.jsonl", {"text": "a cat"}), TextForm(), Tokenizer())
    code = Examples(lines(tmp_path / "c.jsonl", *[{"text": "a dog"}] * 2), TextForm(), Tokenizer())
    mixture = Mixture({"web": web, "code": code})
    ids = torch.tensor([mixture[at]["sample_id"] for at in range(len(mixture))])
    assert ids.tolist() == [0, 10**9, 10**9 + 1]
    assert mixture.groups(ids) == ["web", "code", "code"]
    assert mixture.text(10**9 + 1) == "a dog"
    assert mixture[2]["input_ids"].tolist() == [2, 4]
