"""The command `ghost query`, run as a user or a script runs it."""

import json

import pytest
import torch
from command_kit import parts
from torch import nn
from torch.nn.functional import cross_entropy

from ghost_core.testing import per_sample_gradients
from ghost_engines import GradientStore, ProjectionEngine, cli, project_dataset
from ghost_engines.search import Whitening, scores

N = 40


def query(*arguments):
    return cli.main(["query", *map(str, arguments)])


def data():
    generator = torch.Generator().manual_seed(2)
    return {"inputs": torch.randn(N, 5, generator=generator), "labels": torch.arange(N) % 3}


def losses(model, batch):
    return cross_entropy(model(batch["inputs"]), batch["labels"], reduction="none")


def model_of(seed=0):
    """Return the model that `subjects:mlp` returns after the command has seeded."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


@pytest.fixture
def made(tmp_path):
    """Return the folder of a store of whole gradients in float64, with domains."""
    names = {"group": ("category", lambda ids: [f"domain {id_ % 2}" for id_ in ids.tolist()])}
    project_dataset(
        model_of(), losses, [data()], tmp_path / "g", columns=names, dim=10**6, dtype="float64"
    )
    return tmp_path / "g"


ASKED = ("subjects:mlp", "--file", "subjects:batch", "--loss", "subjects:cross_entropy")


def exact():
    """Return the inner products of six queries with all samples, `[6, N]`, by autograd."""
    model, generator = model_of(), torch.Generator().manual_seed(1)
    batch = {"inputs": torch.randn(6, 5, generator=generator), "labels": torch.arange(6) % 3}
    ours, theirs = (
        torch.cat([each.flatten(1) for each in per_sample_gradients(model, of).values()], 1)
        for of in (losses(model, batch), losses(model, data()))
    )
    return ours.double() @ theirs.double().T


def test_it_finds_the_samples_whose_gradients_are_most_alike(made, capsys):
    assert query(made, *ASKED, "-k", 3) == 0
    (summary, found), _ = parts(capsys.readouterr().out + "\n\n")
    assert dict(summary[1:])["by"] == "dot"
    assert found[0] == ["query", "rank", "score", "sign", "sample", "group", "text"]
    expected = exact()
    best = expected.topk(3)
    assert [int(row[4]) for row in found[1:]] == best.indices.flatten().tolist()
    for row, score in zip(found[1:], best.values.flatten().tolist(), strict=True):
        assert float(row[2]) == pytest.approx(score, rel=1e-4)
        assert row[3] == "helps"
        assert row[5] == f"domain {int(row[4]) % 2}"


def test_json_has_the_smallest_and_what_each_layer_adds(made, capsys):
    assert query(made, *ASKED, "-k", 2, "--smallest", "--by-layer", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    worst = exact().topk(2, largest=False)
    for q, each in enumerate(said["queries"]):
        assert [found["id"] for found in each["found"]] == worst.indices[q].tolist()
        for found in each["found"]:
            assert found["sign"] == "hurts"
            assert list(found["layers"]) == ["0", "2"]
            assert sum(found["layers"].values()) == pytest.approx(found["score"], rel=1e-4)
    assert said["smallest"] is True


@pytest.mark.parametrize("by", ["cosine", "whitened"])
def test_other_metrics_and_some_parameters(made, capsys, by):
    given = ("--by", by, "--parameters", "2", "--by-layer", "--json", "-k", 4)
    assert query(made, *ASKED, *given) == 0
    said = json.loads(capsys.readouterr().out)
    store, model = GradientStore.open(made), model_of()
    generator = torch.Generator().manual_seed(1)
    batch = {"inputs": torch.randn(6, 5, generator=generator), "labels": torch.arange(6) % 3}
    engine = ProjectionEngine.from_manifest(model, store)
    with engine.frozen(), engine.batch(range(6)):
        losses(model, batch).sum().backward()
    how = Whitening.of(store) if by == "whitened" else by
    table = scores(store, engine.collect(), how, parameters="2").scores
    for q, each in enumerate(said["queries"]):
        found = each["found"]
        assert [one["id"] for one in found] == table[q].topk(4).indices.tolist()
        assert found[0]["score"] == pytest.approx(table[q].max().item(), rel=1e-4)
        assert list(found[0]["layers"]) == ["2"]
        assert found[0]["layers"]["2"] == pytest.approx(found[0]["score"], rel=1e-4)


def test_another_model_is_refused(made, capsys):
    assert query(made, *ASKED, "--seed", 1) == 2
    said = capsys.readouterr().err
    assert "is not the model that the store" in said
    assert said.count("\n") == 1


def test_a_store_that_does_not_say_of_which_model_it_is(made, tmp_path, capsys, caplog):
    engine = ProjectionEngine(model_of(), layers="2")
    with GradientStore.create(tmp_path / "h", engine) as store:
        with engine, engine.batch(range(N)):
            losses(engine.model, data()).sum().backward()
        store.append(engine.collect())
    assert query(tmp_path / "h", *ASKED, "--seed", 1) == 0
    assert "does not say with which model" in caplog.text
    assert query(tmp_path / "h", "subjects:tiny", *ASKED[1:]) == 2
    assert "MODEL does not fit the store" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("subjects:mlp",), "--messages or --file: what is asked for"),
        ((*ASKED, "--text", "a"), "--text is for texts: subjects:batch decides itself"),
        ((*ASKED, "--text", "a", "b"), "--text is the field of the text: give one"),
        (("subjects:mlp", "--text", "a", "--prompt", "a"), "--text and --prompt exclude each"),
        (("subjects:mlp", "--prompt", "a"), "--prompt and --completion go together"),
        (("subjects:mlp", "--messages", "a"), "--messages is no JSON"),
        (("subjects:mlp", "--text", "a", "--block", "3"), "--block is for --file"),
        (("subjects:mlp", "--text", "a"), "only a checkpoint's folder has a tokenizer"),
        ((*ASKED, "-k", "0"), "-k must be at least 1"),
        ((*ASKED, "--parameters", "9"), "unknown layer '9'"),
        ((*ASKED, "--html", "nowhere/a.html"), "there is no folder"),
        ((*ASKED, "--truncate", "0"), "--truncate must be"),
        ((*ASKED[:3], "--loss", "subjects:mean"), "one loss per sample"),
        ((*ASKED[:3], "--loss", "subjects:broken"), "subjects:broken raised"),
        ((*ASKED, "--data", "subjects.py"), "subjects.py is neither a .txt, .jsonl, .parquet"),
    ],
)  # fmt: skip
def test_what_cannot_be_answered_is_one_line(made, capsys, given, message):
    assert query(made, *given) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert said.err.count("\n") == 1
    assert said.out == ""
    assert query(made.parent / "nothing", *ASKED) == 2
    assert "there is no store" in capsys.readouterr().err


def test_the_page_has_everything_and_runs_nothing(made, tmp_path, capsys):
    assert query(made, *ASKED, "--by-layer", "--html", tmp_path / "out.html") == 0
    capsys.readouterr()
    page = (tmp_path / "out.html").read_text()
    assert page.count("<h2>Query") == 6
    assert page.count("<li>") == 60
    assert "domain 1" in page
    assert "by layer" in page
    assert "<script" not in page
    assert "http" not in page
