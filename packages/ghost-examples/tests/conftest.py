"""What tests share: small sizes, a corpus, findings of a demo."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pandas
import pytest
import torch

from ghost_examples.demo.__main__ import Sizes
from ghost_examples.demo.convnet import Recipe
from ghost_examples.demo.digits import DigitsResult, Flagged, SeedResult
from ghost_examples.demo.methods import BOUNDS, METHODS
from ghost_examples.demo.once_more import WAYS, OnceMore
from ghost_examples.demo.passages import Looked, Neighbour, PassagesResult, Plan
from ghost_examples.demo.receipt import Receipt
from ghost_examples.demo.report import Findings
from ghost_examples.demo.threads import one_thread
from ghost_examples.language_models import Cut, open_tokenizer, write_domain
from ghost_examples.texts import Passage, load_domain


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two domains of forty blocks of 16 tokens."""
    folder = tmp_path_factory.mktemp("corpus")
    for name in ("python", "scripture"):
        text = load_domain(name)[:2200]
        write_domain(folder, name, [text], open_tokenizer("embedded"), Cut(16, 4, by_block=True))
    return folder


@pytest.fixture
def sizes() -> Sizes:
    """Everything as small as it gets."""
    plan = Plan(
        length=32, per_domain=8, every=4, depth=1, width=32, steps=2, batch=4, dim=256, shown=1
    )
    return Sizes(Recipe(epochs=1, batch=100), plan)


@pytest.fixture
def findings() -> Findings:
    """What a demo that went well might have found."""
    found = dict.fromkeys(METHODS, 0.5) | {"value": 0.9, "dot": 0.85}
    precision = {20: found, 200: found | {"neighbours": 0.92}}
    accuracy = dict.fromkeys(
        [20, 200], dict.fromkeys({**METHODS, **BOUNDS}, 0.875) | {"value": 0.95}
    )
    flips = found | {"value": 0.88, "loss": 0.96}
    flagged = [
        Flagged(7, torch.rand(8, 8), 8, 3, -0.25),
        Flagged(9, torch.zeros(8, 8), 1, 1, -0.125),
    ]
    table = pandas.DataFrame({"id": [7, 9], "value": [-0.25, -0.125], "given": [8, 1]})
    seed = SeedResult(2, precision, accuracy, flips, flagged, table)
    query = Passage("python", 3, "if a < b: <script>alert(1)</script>", (1, 2))
    near = Neighbour(Passage("manual", 4, "a & b\n  'quoted'", (3, 4)), 0.75)
    return Findings(
        digits=DigitsResult(Recipe(), [seed]),
        passages=PassagesResult(
            plan=Plan(),
            first_loss=7.0,
            final_loss=5.0,
            stored={"python": 30, "manual": 10},
            columns=1008,
            parameters=393216,
            looked=[Looked(query, [near])],
            once_more=OnceMore({way: [at, at + 2.0] for at, way in enumerate(WAYS)}),
        ),
        receipts=[Receipt("a model", 8, 1e-16, 2e-16, True, 10, 2.0, 4.0, 6.0)],
        parameters={"seeds": 1, "clean": [20, 200], "device": "cpu"},
        seconds=12.0,
    )
