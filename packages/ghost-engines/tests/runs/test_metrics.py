"""Metrics are on disk once and whole, also after a write that failed."""

import json
import math
import resource
from contextlib import suppress
from itertools import count

import pytest
import torch
from interrupt_kit import Interrupt

from ghost_core import CaptureError
from ghost_engines.runs import metrics as module
from ghost_engines.runs.metrics import FILE, Metrics


def steps(folder):
    return [json.loads(line)["step"] for line in (folder / FILE).read_text().splitlines()]


@pytest.fixture
def short_files():
    """Let no file grow beyond 700 bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (700, before[1]))
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before)
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_write_that_failed_is_made_again(tmp_path, short_files):
    metrics = Metrics(tmp_path, 0)
    metrics.add(1, {"loss": 0.5})
    metrics.write()
    for step in range(2, 51):
        metrics.add(step, {"loss": 1 / step})
    with pytest.raises(OSError, match="large"):
        metrics.write()
    short_files()
    metrics.write()
    assert steps(tmp_path) == list(range(1, 51))
    Metrics(tmp_path, 40).write()
    assert steps(tmp_path) == list(range(1, 41))


@pytest.mark.parametrize("line", ['{"step": 1, "lo{"step": 1}', "[]", "{}", '{"step": null}'])
def test_a_line_that_has_no_metrics_is_named(line, tmp_path):
    (tmp_path / FILE).write_text('{"step": 1}\n' + line + '\n{"step": 2}\n')
    with pytest.raises(CaptureError, match=r"line 2 of .*metrics\.jsonl"):
        Metrics(tmp_path, 2)


@pytest.mark.parametrize(
    "wrong",
    [1j, torch.tensor(1j), "1", None, 10**5000, torch.ones(2), torch.ones((), device="meta")],
    ids=["complex", "tensor", "text", "none", "long", "two", "meta"],
)
def test_what_is_no_real_number_is_refused_at_once(wrong, tmp_path):
    metrics = Metrics(tmp_path, 0)
    metrics.add(1, {"loss": 0.5})
    with pytest.raises(CaptureError, match="one number, which is real"):
        metrics.add(1, {"loss": wrong})
    metrics.write()
    assert steps(tmp_path) == [1]


def test_what_is_not_finite_is_read_back(tmp_path):
    metrics = Metrics(tmp_path, 0)
    metrics.add(1, {"a": torch.tensor(math.nan), "b": math.inf, "c": torch.tensor(-math.inf)})
    metrics.write()
    found = json.loads((tmp_path / FILE).read_text())
    assert math.isnan(found["a"])
    assert (found["b"], found["c"]) == (math.inf, -math.inf)
    Metrics(tmp_path, 1)
    assert steps(tmp_path) == [1]


# Where a `with` block is interrupted as it ends, Python closes its file once nobody has it.
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_lines_are_there_once_wherever_a_write_was_interrupted(tmp_path):
    for at in count(1):
        (tmp_path / f"{at}").mkdir()
        metrics = Metrics(tmp_path / f"{at}", 0)
        metrics.add(1, {"loss": 0.5})
        metrics.write()
        metrics.add(2, {"loss": 0.25})
        with suppress(KeyboardInterrupt), Interrupt(at, (module.__file__,)) as interrupt:
            metrics.write()
        metrics.write()
        assert steps(tmp_path / f"{at}") == [1, 2]
        if interrupt.lines < at:
            break
    assert at > 10
