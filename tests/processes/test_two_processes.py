"""Two processes find what one finds on the union of their samples."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from itertools import chain
from typing import Any

import pytest
import torch
from tests.processes.oracle import WORLD, Expected, expected
from tests.processes.training import DDP, FSDP, Case, held_out, losses, net, samples
from tests.processes.wrapped import FAULTS, MINE, MISTAKES, UNEVEN

from ghost_core.testing import per_sample_gradients
from ghost_engines import JoinedLog, NormEngine, ProjectionEngine

pytestmark = pytest.mark.stress

Found = list[dict[str, Any]]
"""What each process found."""


def close(found: object, wanted: object, what: str) -> None:
    """Assert that numbers are equal up to rounding in float64."""
    one, other = (torch.tensor(each, dtype=torch.float64) for each in (found, wanted))
    assert one.shape == other.shape, what
    assert bool(other.any()), f"{what}: there is nothing to compare"
    assert float((one - other).norm()) <= 1e-9 * float(other.norm()), what


def check(case: Case, by_rank: list[Mapping[str, Any]]) -> None:
    """Assert that both processes found what one would: scores, values, parameters."""
    wanted = expected(case)
    for rank, got in enumerate(by_rank):
        for name, parameter in wanted.parameters.items():
            close(got["state"][name], parameter.tolist(), name)
        for scores, one in zip(got["scores"], wanted.scores[rank], strict=True):
            assert list(scores) == [str(sample) for sample in one]
            close(list(scores.values()), list(one.values()), f"scores of process {rank}")
        if case.engine.get("norms"):
            cosines = [list(chain(*each)) for each in (got["cosines"], wanted.cosines[rank])]
            close(*cosines, f"cosines of process {rank}")
        values = wanted.values[rank]
        assert got["values"].keys() == {str(sample) for sample in values}
        close([got["values"][str(each)] for each in values], list(values.values()), "values")
        check_gathered(got, wanted)
        assert all(altered == 0 for *_, altered in got["seen"].values())


def check_gathered(got: Mapping[str, Any], wanted: Expected) -> None:
    """Assert that the values of both processes were found in one."""
    values: dict[int, float] = defaultdict(float)
    for each in wanted.values:
        for sample, value in each.items():
            values[sample] += value
    assert got["gathered"].keys() == {str(sample) for sample in values}
    close([got["gathered"][str(each)] for each in values], list(values.values()), "all values")
    close(sum(got["steps"]), sum(values.values()), "values by step")


@pytest.mark.parametrize("case", [*DDP, *FSDP], ids=lambda case: case.name)
def test_two_processes_are_one(found: Found, case: Case) -> None:
    for how in ("wrapper", "inside") if case in DDP else ("wrapper",):
        check(case, [each["runs"][case.name][how] for each in found])


@pytest.mark.parametrize("case", [*DDP, *FSDP], ids=lambda case: case.name)
def test_training_is_untouched(found: Found, case: Case) -> None:
    for each in found:
        runs = each["runs"][case.name]
        for how in runs.keys() - {"plain"}:
            if case.engine.get("mode") == "fused":  # which makes gradients up to rounding
                for name, value in runs["plain"]["state"].items():
                    close(runs[how]["state"][name], value, name)
            else:
                assert runs[how]["state"] == runs["plain"]["state"]


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found(found: Found, fault: str) -> None:
    with pytest.raises(AssertionError):
        check(UNEVEN, [each["faults"][fault] for each in found])


def test_logs_of_both_are_read_as_one(
    found: Found, tmp_path_factory: pytest.TempPathFactory
) -> None:
    log = JoinedLog.open(tmp_path_factory.getbasetemp() / "logs")
    table, wanted = log.totals(), expected(UNEVEN)
    values = wanted.values[0] | wanted.values[1]
    assert sorted(table.ids.tolist()) == sorted(values)
    close(table.values[:, 0].tolist(), [values[each] for each in table.ids.tolist()], "values")
    assert [sorted(each.ids.tolist()) for each in log] == [
        sorted(sample for part in step[0] for sample in part) for step in UNEVEN.steps
    ]
    both = [each["runs"][UNEVEN.name]["wrapper"]["values"] for each in found]
    for sample, value in zip(table.ids.tolist(), table.values[:, 0].tolist(), strict=True):
        assert value in [each.get(str(sample)) for each in both]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_refused_in_every_process(found: Found, mistake: str) -> None:
    for each in found:
        assert MISTAKES[mistake][1] in each["refusals"][mistake]


@pytest.mark.parametrize("rank", range(WORLD))
def test_other_engines(found: Found, rank: int) -> None:
    got, ids, model = found[rank]["others"], MINE[rank], net()
    projection, norms = (
        ProjectionEngine(model, dim=4, min_dim=2),
        NormEngine(model, loss_weights="sum"),
    )
    with projection.frozen(), projection.batch(ids):
        losses(model(samples()[ids])).sum().backward()
    with norms, norms.batch(ids):
        losses(model(samples()[ids])).sum().backward()
    gradients = per_sample_gradients(model, losses(model(samples()[ids])))
    direction = per_sample_gradients(model, losses(model(held_out())))
    dots = sum((gradients[name] * direction[name].mean(0)).flatten(1).sum(1) for name in gradients)
    assert isinstance(dots, torch.Tensor)
    for batch in range(2):
        close(got["rows"][batch], projection.collect().rows.tolist(), "rows")
        close(got["norms"][batch], norms.collect().total.tolist(), "norms")
        close(got["candidates"][batch], dots.tolist(), "candidates")
    assert got["verified"]


def test_gradients_are_averaged_afterwards(found: Found) -> None:
    model = net()
    both = [losses(model(samples()[ids])).mean() for ids in MINE]
    wanted = torch.autograd.grad(torch.stack(both).mean(), list(model.parameters()))
    for each in found:
        for got, gradient in zip(each["others"]["gradient"], wanted, strict=True):
            close(got, gradient.tolist(), "gradient")
