"""How much memory searches take, in a process of their own."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
from pathlib import Path
import torch
from search_kit import Rows
from ghost_engines.search import Whitening, group_scores
from ghost_engines.store import GradientStore, StoredRows

root, n = Path(sys.argv[1]), int(sys.argv[2])
with GradientStore.create(root, Rows(torch.float16, 512)) as store:
    for start in range(0, n, 4096):
        rows = torch.randn(4096, 512).half()
        store.append(StoredRows(torch.arange(start, start + 4096), rows))
store = GradientStore.open(root)
queries = torch.randn(20, 512)
whitening = Whitening.of(store, blocks="all")
for by in ("dot", "cosine", whitening):
    store.search(queries, by=by)
group_scores(store, queries, torch.arange(n) % 7)
whitening.self_influence(store)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def megabytes(path, kit, n):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(path), str(n)],
        capture_output=True, text=True, check=True, cwd=kit,
    )  # fmt: skip
    return int(done.stdout)


@pytest.mark.stress
def test_memory_does_not_grow_with_the_store(tmp_path, request):
    kit = request.path.parents[1] / "kit"
    small = megabytes(tmp_path / "small", kit, 8 * 4096)
    large = megabytes(tmp_path / "large", kit, 256 * 4096)  # 1 GiB more
    assert large < small + 150
