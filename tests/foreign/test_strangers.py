"""Other packages' faults, processes without ghost, and memory that must not wait."""

from __future__ import annotations

import gc
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from tests.foreign.foreign import curved
from tests.fresh import Fresh
from torch import nn

import ghost_core
import ghost_engines
import ghost_layers
from ghost_core.testing import GradientHolder

N = 4

SOURCES = [
    str(Path(package.__file__ or "").parents[1])
    for package in (ghost_core, ghost_layers, ghost_engines)
]

USE = """
import torch
from ghost_core.testing import GradientHolder
model = torch.nn.Linear(3, 2)
engine = GradientHolder(model)
with engine, engine.batch(range(4)) as batch:
    model(torch.randn(4, 3)).sum().backward()
print("used", batch.verified)
"""

BROKEN = {
    "not text": b"\xff\xfe\x00broken",
    "no section": b"an = entry:point\n",
    "no value": b"[ghost]\nentry\n",
    "a folder": None,
}

UNREADABLE = ("not text", "no value")


@pytest.mark.parametrize(
    "how",
    [
        "not text",
        *(pytest.param(name, marks=pytest.mark.stress) for name in BROKEN if name != "not text"),
    ],
)
def test_broken_entry_points_of_an_unrelated_package(
    fresh: Fresh, tmp_path: Path, how: str
) -> None:
    folder = tmp_path / "unrelated-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: unrelated\nVersion: 1.0\n")
    content = BROKEN[how]
    if content is None:
        (folder / "entry_points.txt").mkdir()
    else:
        (folder / "entry_points.txt").write_bytes(content)
    # torch, which looks for plugins itself, cannot be imported beside what it cannot read.
    ran = fresh(USE, paths=(tmp_path, *SOURCES))
    assert ran.returncode == 0, ran.stderr.splitlines()[-1]
    assert ran.stdout.split() == ["used", "True"]
    said = "the entry points of unrelated cannot be read, so it has no plugins" in ran.stderr
    assert said == (how in UNREADABLE)


def test_attached_models_load_where_ghost_is_not_installed(fresh: Fresh, tmp_path: Path) -> None:
    for frozen in (False, True):
        model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
        engine = GradientHolder(model)
        with engine.frozen() if frozen else engine:
            torch.save(model, tmp_path / f"{frozen}.pt")
    ran = fresh(
        "import sys\n"
        "sys.modules |= dict.fromkeys(['ghost_core', 'ghost_layers', 'ghost_engines'])\n"
        "import torch\n"
        "for frozen in (False, True):\n"
        f"    model = torch.load(f'{tmp_path}/{{frozen}}.pt', weights_only=False)\n"
        "    print(model(torch.ones(2, 3)).shape[1])"
    )
    assert ran.returncode == 0, ran.stderr.splitlines()[-1]
    assert ran.stdout.split() == ["4", "4"]


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale


def garbage_of_batches(frozen: bool, first: int) -> Counter[str]:
    """Return what only the collector frees after a batch, by type.

    Args:
        frozen: Whether the batch is frozen.
        first: How many batches run before that are not looked at.
    """
    model, x = nn.Sequential(nn.Linear(3, 4), Scale(), nn.Tanh(), nn.Linear(4, 2)), torch.ones(N, 3)
    engine = GradientHolder(model)

    def one() -> None:
        with engine.batch(range(N)):
            curved(model(x)).sum().backward()

    with engine.frozen() if frozen else nullcontext(engine.__enter__()):
        for _ in range(first):
            one()
        gc.collect()
        gc.disable()
        gc.set_debug(gc.DEBUG_SAVEALL)
        try:
            one()
            gc.collect()
            found = Counter(type(each).__name__ for each in gc.garbage)
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
            gc.enable()
    if not frozen:
        engine.__exit__(None, None, None)
    return found


@pytest.mark.parametrize("first", [0, 2])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_batch_leaves_no_cyclic_garbage(frozen: bool, first: int) -> None:
    """Tensors above all: memory must not wait for the collector."""
    plain = garbage_of_batches(frozen, first)
    assert sum(plain.values()) <= 10, plain.most_common(12)
