"""Two processes of Hugging Face's Trainer find what one finds on the samples of both."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from process_kit import succeed_together

pytestmark = pytest.mark.stress
KIT = Path(__file__).parents[1] / "kit"


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Return what each process found, and then what it found when it was resumed."""
    folder = tmp_path_factory.mktemp("two")
    command = [sys.executable, str(KIT / "trainer_worker.py")]
    succeed_together(
        [[*command, str(rank), str(folder)] for rank in range(2)], stdout=subprocess.DEVNULL
    )
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_their_values_are_those_of_one(found, tmp_path):
    pytest.importorskip("accelerate")
    from trainer_worker import train

    one = train(tmp_path / "one", 4)
    values = {}
    for each, _ in found:
        for sample, value in each["values"].items():
            values[int(sample)] = values.get(int(sample), 0.0) + value
        for name, parameter in one["parameters"].items():
            wanted = torch.tensor(parameter, dtype=torch.float64)
            got = torch.tensor(each["parameters"][name], dtype=torch.float64)
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)
    assert sorted(values) == list(range(16))
    assert values == pytest.approx(one["values"], rel=1e-3)


def test_each_resumes_its_own(found):
    for first, resumed in found:
        assert first["files"] == ["ghost-0.pt", "ghost-1.pt"]
        assert resumed == first
