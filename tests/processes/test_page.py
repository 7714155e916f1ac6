"""The code of docs/processes.md runs, as one process alone."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

PAGE = Path(__file__).parents[2] / "docs" / "processes.md"
BLOCK = re.compile(r"^```python\n(.*?)^```", re.M | re.S)


@pytest.fixture
def namespace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run the whole page in an empty folder, and return its names."""
    store = distributed.HashStore()
    init = partial(distributed.init_process_group, store=store, rank=0, world_size=1)
    monkeypatch.setattr(distributed, "init_process_group", init)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    try:
        with torch.random.fork_rng(devices=[]):
            for block in BLOCK.findall(PAGE.read_text(encoding="utf-8")):
                exec(compile(block, str(PAGE), "exec"), names)
        yield names
    finally:
        distributed.destroy_process_group()


def test_the_page_runs(namespace: dict[str, Any]) -> None:
    values = namespace["values"]
    for name in ("values", "joined_values", "sharded_values"):
        assert sorted(namespace[name].to_dict()) == list(range(96))
        assert namespace[name].steps == 6
    for name in ("table", "same", "everything"):
        assert dict(zip(namespace[name].ids, namespace[name].values[:, 0], strict=True)) == (
            values.to_dict()
        )
