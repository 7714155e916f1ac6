"""The page on plugins: it shows the sample plugin as it is, and its code does what it says."""

import functools
from pathlib import Path

import pytest
import torch
from tests.test_documentation import blocks, run
from torch import nn

import ghost_core.testing
from ghost_core.testing import LAYERS, check_engine, check_sampler
from ghost_core.testing.results import check_results
from ghost_layers.linear import LinearSampler

ROOT = Path(__file__).parents[1]
PAGE = "docs/plugins.md"
SAMPLE = ROOT / "tests/plugins/ghost-plugin-sample"

A_FEW = ("linear, tokens", "linear, used twice", "embedding tied to a head")


class ClampedScale(nn.Module):
    """What the page's second sampler is for."""

    low, high = -0.5, 0.5

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.1, -0.2, 0.9, -0.4]))

    def forward(self, inputs):
        return inputs * self.weight.clamp(self.low, self.high)


def namespace():
    """Run the page's code, and return its names."""
    names = {"__name__": "page", "nn": nn, "torch": torch, "LinearSampler": LinearSampler}
    with torch.random.fork_rng(devices=[]):
        for block in blocks(PAGE):
            run(block, names)
    return names


@pytest.mark.parametrize("file", ["pyproject.toml", "src/ghost_plugin_sample/__init__.py"])
def test_the_page_shows_the_sample_as_it_is(file):
    assert f"\n{(SAMPLE / file).read_text()}```\n" in (ROOT / PAGE).read_text(encoding="utf-8")


def few(monkeypatch):
    """Let the page's checks run over a few configurations."""
    examples = {name: LAYERS[name] for name in A_FEW}
    monkeypatch.setattr(
        ghost_core.testing,
        "check_engine",
        functools.partial(check_engine, examples=examples, steps=2),
    )
    monkeypatch.setattr(ghost_core.testing, "of_class", lambda kind: dict([*examples.items()][:2]))


def test_its_code_runs_over_a_few_configurations(monkeypatch):
    few(monkeypatch)
    names = namespace()
    inputs = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0))
    check_sampler(names["ClampedScaleSampler"], ClampedScale(), inputs)
    check_results(
        functools.partial(names["LargestNormEngine"], loss_weights="sum"),
        lambda gradients: torch.stack(
            [rows.flatten(1).norm(dim=1) for rows in gradients.values()]
        ).amax(0),
        None,
        {name: LAYERS[name] for name in A_FEW[:2]},
        1e-6,
    )


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.stress
def test_its_code_runs():
    assert "agreement" in namespace()
