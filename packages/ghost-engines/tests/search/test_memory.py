"""How much memory searches take, in a process of their own."""

import json
import shutil
import subprocess
import sys

import pytest
from memory_kit import printed

PROGRAM = """
import sys
from pathlib import Path
import torch
from memory_kit import kib
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
print(kib("VmHWM") // 1024)
"""


@pytest.mark.stress
def test_memory_does_not_grow_with_the_store(tmp_path):
    small = printed(PROGRAM, tmp_path / "small", 8 * 4096)
    large = printed(PROGRAM, tmp_path / "large", 256 * 4096)  # 1 GiB more
    assert large < small + 64  # megabytes


HELD = """
import sys
from pathlib import Path
import torch
from memory_kit import kib
from search_kit import Rows
from ghost_engines.store import GradientStore, StoredRows

root, n = Path(sys.argv[1]), 64 * 4096
with GradientStore.create(root, Rows(torch.float16, 512)) as store:
    for start in range(0, n, 4096):
        rows = torch.randn(4096, 512).half()
        store.append(StoredRows(torch.arange(start, start + 4096), rows))
store = GradientStore.open(root)
queries = torch.randn(30, 512)
for q in (1, 30):
    store.search(queries[:q])
before = kib("VmHWM")
held = store.held()
for q in (1, 30):
    held.search(queries[:q])
print((kib("VmHWM") - before) // 1024)
"""


@pytest.mark.stress
def test_a_store_that_is_held_takes_what_its_rows_take(tmp_path):
    found = printed(HELD, tmp_path / "store")
    shutil.rmtree(tmp_path / "store")  # pytest would keep it
    assert 256 - 32 < found < 256 + 64  # megabytes


LIMITED = """
import json, resource, sys
from pathlib import Path
import torch
from memory_kit import kib
from search_kit import Rows
from ghost_engines.search import Whitening, group_scores, near_duplicates
from ghost_engines.store import GradientStore, StoredRows, merge

root, (columns, n, unit, megabytes) = Path(sys.argv[1]), map(int, sys.argv[2:])
torch.ones(300, 300) @ torch.ones(300, 300)
limit = kib("VmData") * 2**10 + megabytes * 2**20
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

queries, there = torch.randn(5, columns), [7, n // 2, n - 3]
with GradientStore.create(root / "one", Rows(torch.float16, columns), unit=unit) as store:
    for start in range(0, n, unit):
        rows = torch.randn(unit, columns)
        for at in there:
            if start <= at < start + unit:
                rows[at - start] = 2 * queries[0]
        store.append(StoredRows(torch.arange(start, start + unit), rows.half()))
store = GradientStore.open(root / "one")
try:
    store.rows()
except RuntimeError as error:
    assert "can't allocate memory" in str(error), error
else:
    raise AssertionError("all rows fit into memory: nothing is shown")
found = {"bytes": store.size_on_disk, "limit": megabytes * 2**20}
if columns > 10_000:
    found["twins"] = near_duplicates(store, 0.99, block=unit).ids.tolist()
    ways = ("dot", "cosine")
else:
    whitening = Whitening.of(store, blocks="all")
    whitening.self_influence(store)
    group_scores(store, queries, torch.arange(n) % 7)
    ways = ("dot", "cosine", whitening)
for by in ways:
    near = store.search(queries, k=3, by=by, block=unit)
    found[str(by)[:10]] = near.ids[0].sort().values.tolist()
merged = merge([root / "one"], root / "merged")
found["merged"] = merged.search(queries, k=3, block=unit).ids[0].sort().values.tolist()
print(json.dumps(found))
"""


@pytest.mark.stress
@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not limit what is held")
@pytest.mark.parametrize(
    ("columns", "n", "unit", "megabytes"),
    [(512, 370 * 4096, 4096, 300), (2**18, 24 * 64, 64, 400)],
    ids=["many rows", "long rows and near-duplicates"],
)
def test_a_store_that_does_not_fit_into_memory_is_searched(
    tmp_path, request, columns, n, unit, megabytes
):
    kit = request.path.parents[1] / "kit"
    given = [str(tmp_path / "stores"), *map(str, (columns, n, unit, megabytes))]
    try:
        done = subprocess.run(
            [sys.executable, "-c", LIMITED, *given], capture_output=True, text=True, cwd=kit
        )
    finally:
        shutil.rmtree(tmp_path / "stores")  # pytest would keep gigabytes
    assert not done.returncode, done.stderr
    found = json.loads(done.stdout)
    assert found.pop("bytes") > 1.9 * found.pop("limit")
    planted = [7, n // 2, n - 3]
    if "twins" in found:
        assert found.pop("twins") == [planted[:2], [planted[0], planted[2]], planted[1:]]
    assert set(map(tuple, found.values())) == {tuple(planted)}
    assert len(found) >= 3
