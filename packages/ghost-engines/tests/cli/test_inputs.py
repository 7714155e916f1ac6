"""All kinds of data, as every command reads them: against autograd on tokens that are known."""

import json
import shutil

import pytest
import torch
from command_kit import batch_of, parts, project, score, verify

from ghost_engines import cli
from ghost_engines.cli.models import load_model
from ghost_engines.corpus import TokenWriter, token_path

WORDS = ["<unk>", "<eos>", "the", "a", "cat", "dog", "sat", "ran", "on", "mat", "and"]
TEXTS = ["the cat sat", "a dog ran on", "the dog"]
PAIRS = [("", "a dog ran"), ("the cat", "sat on"), ("a dog", "ran")]
"""The first has nothing that is not learnt."""


def tokens(text, *, learnt=True):
    return [(WORDS.index(word), learnt) for word in text.split()]


PLAIN = [tokens(text) for text in TEXTS]
ANSWERS = [tokens(ask, learnt=False) + tokens(say) + [(1, True)] for ask, say in PAIRS]
CHATS = [
    [*tokens(f"the {ask} <eos> a", learnt=False), *tokens(say), (1, True)] for ask, say in PAIRS
]
PACKED = [tokens("the cat sat <eos>"), tokens("a dog ran on"), tokens("<eos> the dog <eos>")]


def records(kind):
    """Return records with other fields than those that are looked for by default."""
    if kind == "texts":
        return [{"body": text} for text in TEXTS]
    if kind == "pairs":
        return [{"ask": ask, "say": say} for ask, say in PAIRS]
    return [
        {"chat": [{"role": "user", "content": ask}, {"role": "assistant", "content": say}]}
        for ask, say in PAIRS
    ]


def lines(path, kind):
    path.with_suffix(".jsonl").write_text("".join(json.dumps(r) + "\n" for r in records(kind)))
    return path.with_suffix(".jsonl")


def table(path, kind):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(records(kind)), path.with_suffix(".parquet"))
    return path.with_suffix(".parquet")


def saved(path, kind):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(records(kind)).save_to_disk(path)
    return path


def memmaps(path, kind):
    for at, words in enumerate(TEXTS[:2]):
        ids = [number for number, _ in tokens(words)][:3]
        target = token_path(path, "train", f"domain{at}")
        with TokenWriter(target, vocabulary=16, length=3, first_id=at * 10**9) as writer:
            writer.append(ids)
    return path


def domains(path, kind):
    path.mkdir()
    for at, record in enumerate(records(kind)):
        (path / f"{at}.jsonl").write_text(json.dumps(record) + "\n")
    return path


PAIR = ("--prompt", "ask", "--completion", "say")
KINDS = {
    "texts in Parquet": (table, "texts", ("--text", "body"), PLAIN),
    "texts of a data set": (saved, "texts", ("--text", "body"), PLAIN),
    "texts in blocks": (lines, "texts", ("--text", "body", "--block", 4), PACKED),
    "texts of domains": (domains, "texts", ("--text", "body", "--domains", "0,1,2"), PLAIN),
    "pairs in Parquet": (table, "pairs", PAIR, ANSWERS),
    "pairs in lines": (lines, "pairs", PAIR, ANSWERS),
    "conversations": (lines, "chats", ("--messages", "chat"), CHATS),
    "memmaps": (memmaps, "", (), [tokens(text)[:3] for text in TEXTS[:2]]),
}


@pytest.fixture(scope="session")
def talking(checkpoint, tmp_path_factory):
    """A copy of the checkpoint with a template for conversations."""
    pytest.importorskip("jinja2")
    folder = shutil.copytree(checkpoint, tmp_path_factory.mktemp("talking") / "checkpoint")
    (folder / "chat_template.jinja").write_text(
        "{% for each in messages %}"
        "{{ 'the' if each.role == 'user' else 'a' }} {{ each.content }} <eos> {% endfor %}"
        "{% if add_generation_prompt %}a {% endif %}"
    )
    return folder


def gradients(model, samples):
    """Return the gradient of each sample's mean loss over what is learnt, `[N, parameters]`."""
    found = []
    for sample in samples:
        ids, learnt = (torch.tensor(each) for each in zip(*sample, strict=True))
        logits = model(input_ids=ids[None]).logits[0]
        each = torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="none")
        parts = torch.autograd.grad(each[learnt[1:]].mean(), list(model.parameters()))
        found.append(torch.cat([part.reshape(-1) for part in parts]))
    return torch.stack(found)


@pytest.fixture
def model(talking):
    return load_model(str(talking)).double().eval()


AGAIN = {"texts of a data set", "pairs in lines", "texts of domains"}
"""Kinds whose parts others of the default tests have: a container, or what is in it."""


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=pytest.mark.stress if kind in AGAIN else ()) for kind in KINDS],
)
def test_every_command_reads_it(kind, talking, model, tmp_path, capsys):
    write, what, how, samples = KINDS[kind]
    data = write(tmp_path / "data", what)
    exact, own = gradients(model, samples), ("--dtype", "float64")
    target = ("--targets", f"val={data}")
    assert score(talking, "--data", data, *target, *how, *own, "--out", "s.jsonl") == 0
    rows = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    assert [row["score_val"] for row in rows] == pytest.approx(
        (exact @ exact.mean(0)).tolist(), rel=1e-7
    )
    whole = ("--store", "g", "--dim", "whole", "--storage", "float64")
    assert project(talking, "--data", data, *how, *own, *whole) == 0
    capsys.readouterr()
    asked = ("query", "g", str(talking), "--file", str(data), *map(str, how), *own, "--json")
    assert cli.main([*asked]) == 0
    queries = json.loads(capsys.readouterr().out)["queries"]
    assert len(queries) == len(samples)
    for query, expected in zip(queries, exact @ exact.T, strict=True):
        scores = {found["id"]: found["score"] for found in query["found"]}
        assert scores == pytest.approx(
            dict(zip([row["id"] for row in rows], expected.tolist(), strict=True)), rel=1e-4
        )
        (own_text,) = {each["text"] for each in query["found"] if each["text"] == query["text"]}
        assert own_text
    assert verify(talking, "--data", data, *how) == 0
    longest = max(map(len, samples))
    summary = parts(capsys.readouterr().out)[0][0]
    assert dict(summary[1:])["batch"].startswith(f"{len(samples)} × {longest} tokens, ")


def test_what_is_given_itself_is_asked_for(talking, model, tmp_path, capsys):
    given = ("--dim", "whole", "--storage", "float64", "--dtype", "float64", "--store", "g")
    assert project(talking, "--data", lines(tmp_path / "a", "texts"), "--text", "body", *given) == 0
    stored = gradients(model, PLAIN)
    chat = json.dumps(records("chats")[1]["chat"])
    for asked, samples, said in (
        (("--text", *TEXTS[:2]), PLAIN[:2], TEXTS[:2]),
        (("--prompt", "the cat", "--completion", "sat on"), ANSWERS[1:2], ["the cat\nsat on"]),
        (("--messages", chat), CHATS[1:2], ["user: the cat\nassistant: sat on"]),
    ):
        capsys.readouterr()
        command = ("query", "g", str(talking), *asked, "--dtype", "float64", "--json")
        assert cli.main([*command]) == 0
        queries = json.loads(capsys.readouterr().out)["queries"]
        assert [query["text"] for query in queries] == said
        for query, expected in zip(queries, gradients(model, samples) @ stored.T, strict=True):
            scores = {found["id"]: found["score"] for found in query["found"]}
            assert scores == pytest.approx(dict(enumerate(expected.tolist())), rel=1e-4)
    command = ("query", "g", str(talking), "--dtype", "float64", "--messages")
    assert cli.main([*command, '[{"role": "user", "content": "a"}]']) == 2
    said = capsys.readouterr().err
    assert "--messages: 'messages' of it is no conversation" in said
    assert "is no conversation. Reason: it is no list of messages" in said
    assert """Remedy: give messages as in '[{"role": "user", "content": "..."}, """ in said


def test_domains_are_scored_apart(talking, model, tmp_path, capsys):
    (tmp_path / "d").mkdir()
    for name, texts in (("web", TEXTS[:2]), ("code", TEXTS[2:])):
        (tmp_path / "d" / f"{name}.txt").write_text("\n".join(texts) + "\n")
    given = ("--data", "d", "--domains", "web,code", "--targets", "all=d", "--dtype", "float64")
    assert score(talking, *given) == 0
    table = parts(capsys.readouterr().out + "\n\n")[0][2]
    exact = gradients(model, PLAIN)
    scores, norms = exact @ exact.mean(0), exact.norm(dim=1)
    assert table[0] == ["domain", "samples", "mean score all", "mean norm"]
    assert [row[:2] for row in table[1:]] == [["web", "2"], ["code", "1"]]
    for row, there in zip(table[1:], (slice(0, 2), slice(2, 3)), strict=True):
        means = [scores[there].mean().item(), norms[there].mean().item()]
        assert [float(each) for each in row[2:]] == pytest.approx(means, rel=1e-5)


def test_verify_looks_at_answers_alone(talking, tmp_path):
    data = lines(tmp_path / "a", "pairs")
    batch = batch_of(data, talking, prompt="ask", completion="say")
    labels = [[number if learnt else -100 for number, learnt in each] for each in ANSWERS]
    assert batch["labels"].tolist() == [each + [-100] * (5 - len(each)) for each in labels]
    assert batch["attention_mask"].sum(1).tolist() == [4, 5, 4]


def test_a_field_of_texts_is_for_data_that_have_fields(talking, model, tmp_path, capsys):
    data = lines(tmp_path / "a", "texts")
    (tmp_path / "b.txt").write_text("\n".join(TEXTS) + "\n")
    (tmp_path / "mine.py").write_text(
        "import torch\n\ndef ids():\n    return torch.tensor([[2, 4, 6], [3, 5, 7]])\n"
    )
    targets = ("--targets", f"a={data}", "b=b.txt", "c=mine:ids")
    given = (talking, "--data", data, *targets, "--dtype", "float64")
    assert score(*given, "--text", "body", "--out", "s.jsonl") == 0
    rows = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    exact = gradients(model, PLAIN)
    mine = gradients(model, [tokens("the cat sat"), tokens("a dog ran")]).mean(0)
    for name, expected in (("a", exact.mean(0)), ("b", exact.mean(0)), ("c", mine)):
        assert [row[f"score_{name}"] for row in rows] == pytest.approx((exact @ expected).tolist())
    capsys.readouterr()
    assert score(talking, "--data", "b.txt", "--targets", "b=b.txt", "--text", "body") == 2
    assert "--data: text 1 of b.txt has no field 'body'" in capsys.readouterr().err
