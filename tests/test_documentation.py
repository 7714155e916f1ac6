"""What the documentation says: its code runs, and the reference covers every public name."""

import ast
import re
import traceback
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import ghost_core
import ghost_engines
from ghost_engines import DotProductEngine, ProjectionEngine

ROOT = Path(__file__).parents[1]
QUICKSTART = "docs/quickstart.md"
VALUES = "docs/values.md"
DATASET = "docs/dataset.md"
PROJECT = "docs/project.md"
LOG = "docs/log.md"
SEARCH = "docs/search.md"
QUALITY = "docs/quality.md"
RUNS = "docs/runs.md"
FRAGMENTS = (
    "README.md",
    "docs/loop.md",
    "docs/selection.md",
    "docs/modes.md",
)  # their code needs names that the reader has already
BLOCK = re.compile(r"^```(?:python|py)\b[^\n]*\n(.*?)^```", re.M | re.S)
HEADING = re.compile(r"^#+ (.*)$", re.M)
DIRECTIVE = re.compile(r"^::: (\S+)\n(?:    options: \{ members: \[(.*)\] \}\n)?", re.M)

INSIDE_THE_LOOP = {"Gradient accumulation"}
"""Sections whose code stands where the engine is attached already."""

HEAD_ONLY = {"Validation directions"}
"""Sections whose code gives directions for the head alone, which then is all that is tracked."""

SEEING = "Where the samples are"
"""The section whose model has an encoder and sees images."""

NOT_RUN: dict[str, str] = {}
"""Reasons by section whose code cannot be run."""


class Block(NamedTuple):
    """Python code in a page, and the line where it starts."""

    page: str
    line: int
    section: str
    code: str


def blocks(page):
    """Return the blocks of a page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [
        Block(
            page, text.count("\n", 0, found.start(1)) + 1,
            HEADING.findall(text, 0, found.start())[-1], found[1],
        )
        for found in BLOCK.finditer(text)
    ]  # fmt: skip


def run(block, namespace):
    """Run a block; a failure names its page and line."""
    path = str(ROOT / block.page)
    code = "\n" * (block.line - 1) + block.code
    try:
        exec(compile(code, path, "exec", dont_inherit=True), namespace)
    except SyntaxError as error:
        raise AssertionError(f"{block.page}:{error.lineno}: {error!r}") from error
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        line = [frame.lineno for frame in frames if frame.filename == path][-1]
        raise AssertionError(f"{block.page}:{line}: {error!r}") from error


class Model(nn.Module):
    """Maps `[N, 6]` to scores of 3 classes, `[N, 3]`."""

    def __init__(self):
        super().__init__()
        self.attn = nn.Linear(6, 8)
        self.mlp = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, inputs):
        return self.head(torch.relu(self.mlp(torch.tanh(self.attn(inputs)))))


class Seeing(Model):
    """Has an encoder, and sees four images, of the samples that the page tells."""

    def __init__(self):
        super().__init__()
        self.encoder, self.vision = nn.Sequential(nn.Linear(6, 6)), nn.Sequential(nn.Linear(5, 6))

    def forward(self, inputs):
        seen = self.vision(torch.linspace(-1, 1, 20).reshape(4, 5))
        owner = torch.tensor([0, 0, 1, 3])
        return super().forward(self.encoder(inputs).index_add(0, owner, seen))


def per_sample_loss(model, batch):
    """Return `[N]`; a batch holds features and, in the last column, labels."""
    return cross_entropy(model(batch[:, :-1]), batch[:, -1].long(), reduction="none")


def loss_fn(model, batch):
    return per_sample_loss(model, batch).mean()


def draw(n):
    return torch.cat([torch.randn(n, 6), torch.randint(0, 3, (n, 1)).float()], 1)


def prepared(section):
    """Return the names that a reader who is in the middle of a program has."""
    torch.manual_seed(0)
    model, val_batch = Seeing() if section == SEEING else Model(), draw(16)
    engines = {
        name: DotProductEngine(model, layers="head" if section in HEAD_ONLY else "*")
        for name in ("engine", "dots")
    }
    for engine in engines.values():
        engine.add_direction("val", lambda: loss_fn(model, val_batch))
    return {
        "DotProductEngine": DotProductEngine,
        "adam": torch.optim.AdamW(model.parameters()),
        "b": torch.randn(3),
        "draw": draw,
        "batch": draw(32),
        "ids": range(32),
        "loader": [(torch.arange(32) + 32 * step, draw(32)) for step in range(3)],
        "loss_fn": loss_fn,
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "per_sample_loss": per_sample_loss,
        "projections": ProjectionEngine(model, dim=16),
        "val_batch": val_batch,
        "torch": torch,
        "w": torch.randn(3, 8),
        **engines,
    }


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# Code


def test_quickstart_runs_as_it_is():
    found, namespace = blocks(QUICKSTART), {}
    assert len(found) >= 2
    with torch.random.fork_rng(devices=[]):
        for block in found:
            run(block, namespace)
    scores = namespace["scored"].result
    assert scores.total.shape == (8, 1)
    torch.testing.assert_close(sum(scores.by_layer.values()), scores.total)
    assert namespace["neighbours"].ids.shape == (16, 3)


def test_values_are_kept_as_the_page_says():
    pytest.importorskip("pandas")
    pytest.importorskip("matplotlib")
    namespace, found = {}, blocks(VALUES)
    assert len(found) == 6
    with torch.random.fork_rng(devices=[]):
        for block in found:
            run(block, namespace)
    values, table, groups = (namespace[name] for name in ("values", "table", "groups"))
    assert sorted(table["id"]) == list(range(96))
    (columns,) = re.findall(r"to_pandas.*# (.*)", found[1].code)
    assert ", ".join(table) == columns
    assert values.steps == 18
    assert values.history.labels == ("epoch 1", "epoch 2", "epoch 3")
    assert groups.values.shape == (2, 2)
    assert (
        min(Path(name).stat().st_size for name in ("values.csv", "values.svg", "groups.svg")) > 1000
    )


def test_values_are_the_first_page_after_the_quickstart():
    pages = re.findall(r"^  - .*: (\w+)\.md$", (ROOT / "mkdocs.yml").read_text(), re.M)
    assert pages[pages.index("quickstart") + 1] == "values"


def test_a_data_set_is_scored_as_the_page_says():
    pytest.importorskip("pandas")
    pytest.importorskip("matplotlib")
    namespace = {}
    with torch.random.fork_rng(devices=[]):
        for block in blocks(DATASET):
            run(block, namespace)
    table, again = namespace["table"], namespace["again"]
    assert repr(table) in blocks(DATASET)[0].code
    (columns,) = re.findall(r"scores.csv.*# (.*)", blocks(DATASET)[1].code)
    assert ", ".join(table.columns()) == columns
    assert namespace["worst"]["id"].tolist() == table.scores[:, 0].argsort()[:10].tolist()
    assert again.ids.tolist() == namespace["order"].tolist()
    assert Path("scores.svg").stat().st_size > 1000


def test_a_corpus_is_projected_and_asked_as_the_page_says():
    namespace = {}
    with torch.random.fork_rng(devices=[]):
        for block in blocks(PROJECT):
            run(block, namespace)
    store = ghost_engines.GradientStore.open("gradients")
    assert f"# {len(store)} rows of {store.k_total} float32" in blocks(PROJECT)[0].code
    assert 2 in namespace["found"].ids[0].tolist()  # which counts in threes, as the query does
    assert namespace["done"].store.groups.equal("odd").sum() == 100


def test_a_log_is_written_resumed_and_read_as_the_page_says():
    pytest.importorskip("matplotlib")
    namespace = prepared("")
    with torch.random.fork_rng(devices=[]):
        for block in blocks(LOG):
            run(block, namespace)
    table = namespace["table"]
    assert namespace["log"].last == 3
    assert sorted(table.ids.tolist()) == list(range(96))
    (columns,) = re.findall(r"values.csv.*# (.*)", blocks(LOG)[2].code)
    assert ", ".join(table.columns()) == columns
    assert Path("values.svg").stat().st_size > 1000


def test_a_run_is_as_the_page_says():
    namespace = {}
    with torch.random.fork_rng(devices=[]):
        first, *rest = blocks(RUNS)
        run(first, namespace)
        table = namespace["table"]
        for block in rest:
            run(block, namespace)
    assert sorted(table.ids.tolist()) == list(range(96))
    assert len(table.steps) == 18
    written = set(re.findall(r"^\| `([\w.]+)/?` ", (ROOT / RUNS).read_text(), re.M))
    assert {each.name for each in Path("runs/a").iterdir()} == written
    assert len(list(Path("runs").iterdir())) == 5
    assert (len(namespace["chosen"]), namespace["chosen"].direction) == (8, "val")


def test_a_store_is_searched_as_the_page_says():
    namespace = {}
    with torch.random.fork_rng(devices=[]):
        for block in blocks(SEARCH):
            run(block, namespace)
    near, table, parts = (namespace[name] for name in ("near", "table", "parts"))
    assert near.ids.shape == (20, 5)
    assert table.scores.shape == (20, 400)
    assert namespace["unlike_others"].shape == (400,)
    torch.testing.assert_close(0.011 * near.scores, namespace["traced"].scores)
    torch.testing.assert_close(sum(parts.values()), near.scores)
    assert namespace["by_domain"].names == ("even", "odd")


def test_scores_are_judged_as_the_page_says():
    pytest.importorskip("matplotlib")
    namespace = {}
    with torch.random.fork_rng(devices=[]):
        for block in blocks(QUALITY):
            run(block, namespace)
    assert namespace["found"].mean > 0.2
    assert (namespace["curve"].gap > 0).all()
    assert namespace["patched"].mean > 0
    assert Path("removal.svg").stat().st_size > 1000


@pytest.mark.parametrize(
    "block",
    [
        pytest.param(
            block,
            id=f"{block.page}:{block.line}",
            marks=[pytest.mark.skip(NOT_RUN[block.section])] if block.section in NOT_RUN else [],
        )
        for page in FRAGMENTS
        for block in blocks(page)
    ],
)
def test_code_runs_in_a_program(block):
    if "to_pandas" in block.code:
        pytest.importorskip("pandas")
    namespace = prepared(block.section)
    with ExitStack() as attached, torch.random.fork_rng(devices=[]):
        if block.section in INSIDE_THE_LOOP:
            attached.enter_context(namespace["engine"])
        run(block, namespace)
    if "values" in namespace:
        assert sorted(namespace["values"].to_dict()) == list(range(96))
    if "neighbours" in namespace:
        assert namespace["neighbours"].ids.shape == (32, 10)
    if "scored" in namespace:
        assert namespace["scored"].result.total.shape == (32, 1)
    if "chosen" in namespace:
        assert repr(namespace["chosen"]).startswith("Chosen(8 of 32 for val by ")
    if "projected" in namespace:
        assert namespace["projected"].result.rows.shape == (32, namespace["projections"].k_total)


def test_every_page_still_has_its_code():
    assert len(blocks("README.md")) >= 2
    assert len(blocks("docs/loop.md")) >= 5
    sections = {block.section for page in FRAGMENTS for block in blocks(page)}
    assert sections >= INSIDE_THE_LOOP | HEAD_ONLY | NOT_RUN.keys()


def test_failing_code_names_page_and_line():
    for code, kind in (("x = 1\n1 / 0\n", "ZeroDivisionError"), ("x = 1\nx = (\n", "SyntaxError")):
        with pytest.raises(AssertionError, match=rf"README\.md:8: {kind}"):
            run(Block("README.md", 7, "", code), {})
    with pytest.raises(AssertionError, match=r"README\.md:7: DeprecationWarning"):
        run(Block("README.md", 7, "", "import warnings; warnings.warn('', DeprecationWarning)"), {})


# Reference


def origins(package):
    """Return the module that each public name of a package is imported from."""
    tree = ast.parse(Path(package.__file__).read_text(encoding="utf-8"))
    return {
        alias.asname or alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


def documented(name, package, module):
    """Tell whether a page of the reference renders a public name."""
    for page in (ROOT / "docs" / "reference").glob("*.md"):
        for rendered, members in DIRECTIVE.findall(page.read_text(encoding="utf-8") + "\n"):
            chosen = not members or name in members.split(", ")
            if (rendered in (package, module) and chosen) or rendered == f"{module}.{name}":
                return True
    return False


@pytest.mark.parametrize("package", [ghost_core, ghost_engines], ids=lambda each: each.__name__)
def test_every_public_name_is_in_the_reference(package):
    found = origins(package)
    assert package.__all__
    missing = [
        f"{name} of {found[name]}"
        for name in package.__all__
        if not documented(name, package.__name__, found[name])
    ]
    assert not missing, f"docs/reference does not show {', '.join(missing)}"
    assert not documented("NoSuchName", "ghost_core", "ghost_core.nowhere")
    assert not documented("BatchCapture", "", "ghost_core.capture.batch")
