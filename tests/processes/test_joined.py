"""Concatenated mode and the second order: two processes find what one does on all samples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.processes.joined import FAULTS, HELD_OUT, MISTAKES, SCALE, TRAIN, step
from tests.processes.oracle import WORLD
from tests.processes.sharded import language, texts
from tests.processes.test_two_processes import check, close
from tests.processes.training import CURVED, JOINED, MADE, Case, held_out, losses, net, samples
from torch import Tensor, nn

from ghost_core.testing import per_sample_gradients

pytestmark = pytest.mark.stress

Found = list[dict[str, Any]]


@pytest.mark.parametrize("case", [*JOINED, *CURVED, *MADE], ids=lambda case: case.name)
def test_two_processes_are_one(joined: Found, case: Case) -> None:
    check(case, [each["runs"][case.name]["wrapper"] for each in joined])


@pytest.mark.parametrize("case", [*JOINED, *CURVED, *MADE], ids=lambda case: case.name)
def test_training_is_untouched(joined: Found, case: Case) -> None:
    for each in joined:
        plain, run = (each["runs"][case.name][how]["state"] for how in ("plain", "wrapper"))
        if "mode" not in case.engine:
            assert run == plain
        for name, value in plain.items():
            close(run[name], value, name)


@pytest.mark.parametrize("rank", range(WORLD))
@pytest.mark.parametrize("name", ["language", "scaled", "sharded", "sharded, fused"])
def test_a_language_model_with_checkpoints_and_a_tied_head(
    joined: Found, name: str, rank: int
) -> None:
    got, scale = joined[rank]["others"][name], SCALE if name == "scaled" else 1.0
    wanted = read(rank)
    close(got["scores"], wanted["scores"], "scores")
    close(got["cosines"], wanted["cosines"], "cosines")
    for found, gradient in zip(got["gradient"], wanted["gradient"], strict=True):
        close(found, [scale * each for each in gradient], "gradient")


@pytest.mark.parametrize("rank", range(WORLD))
def test_autocast(joined: Found, rank: int) -> None:
    got, wanted = (
        torch.tensor(each["scores"]) for each in (joined[rank]["others"]["half"], read(rank))
    )
    assert float((got - wanted).norm()) < 0.05 * float(wanted.norm())


def test_a_process_without_training_samples(joined: Found) -> None:
    got = [each["others"]["nobody"] for each in joined]
    direction = _mean([_mean_gradient(net(), held_out()[part]) for part in HELD_OUT])
    model, ids = net(), TRAIN[0]
    own = per_sample_gradients(model, losses(model(samples()[ids])))
    dots = torch.zeros(len(ids), dtype=torch.float64)
    for name, gradient in own.items():
        dots += (gradient * direction[name]).flatten(1).sum(1)
    close(got[0], (dots / len(ids) / WORLD).tolist(), "dots")
    assert got[1] == []


def test_values_are_gathered_from_processes_without_samples(joined: Found) -> None:
    one, other = (each["others"]["gathered"] for each in joined)
    assert list(one["own"]) == [str(sample) for sample in TRAIN[0]]
    assert other["own"] == {}
    for each in (one, other):
        assert each["found"] == [one["own"], one["own"]]
        assert each["counts"] == [[1, 1, 1, 0]] * len(TRAIN[0])


def read(rank: int) -> dict[str, Any]:
    """Return what one process finds of all texts."""
    model = language()
    direction, mean = (
        _mean([_mean_gradient(model, texts()[part]) for part in parts])
        for parts in (HELD_OUT, TRAIN)
    )
    gradients = per_sample_gradients(model, losses(model(texts()[TRAIN[rank]])))
    weight = len(TRAIN[rank]) * WORLD
    dots = sum((gradients[n] * direction[n]).flatten(1).sum(1) for n in gradients)
    squared = sum(gradients[n].flatten(1).square().sum(1) for n in gradients)
    norm = torch.stack([each.norm() for each in direction.values()]).norm()
    return {
        "scores": (dots / weight).tolist(),
        "cosines": (dots / squared.sqrt() / norm).tolist(),
        "gradient": [mean[name].flatten().tolist() for name, _ in model.named_parameters()],
    }


def _mean_gradient(model: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    loss = losses(model(inputs)).mean()
    names, leaves = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, leaves), strict=True))


def _mean(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([each[name] for each in parts]).mean(0) for name in parts[0]}


@pytest.mark.parametrize("rank", range(WORLD))
def test_a_direction_along_the_mean_of_steps(joined: Found, rank: int) -> None:
    model, ids = net(), TRAIN[rank]
    names, leaves = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(losses(model(held_out())).mean(), leaves, create_graph=True)
    moved = _mean([step(each) for each in range(WORLD)])
    slope = torch.stack(
        [(each * moved[name]).sum() for name, each in zip(names, gradients, strict=True)]
    ).sum()
    bent = torch.autograd.grad(slope, leaves, allow_unused=True)
    own = per_sample_gradients(model, losses(model(samples()[ids])))
    dots = torch.zeros(len(ids), dtype=torch.float64)
    for name, gradient, bend in zip(names, gradients, bent, strict=True):
        direction = gradient.detach() + (0 if bend is None else bend / 2)
        dots += (own[name] * direction).flatten(1).sum(1)
    close(joined[rank]["others"]["along a step"], (dots / len(ids) / WORLD).tolist(), "dots")


@pytest.mark.parametrize("rank", range(WORLD))
def test_tensors_of_a_closure_are_averaged_where_parameters_are_in_parts(
    joined: Found, rank: int
) -> None:
    model, ids = net(), TRAIN[rank]
    mean = _mean([step(each) for each in range(WORLD)])
    own = per_sample_gradients(model, losses(model(samples()[ids])))
    dots = torch.zeros(len(ids), dtype=torch.float64)
    for name, gradient in own.items():
        dots += (gradient * mean[name]).flatten(1).sum(1)
    close(joined[rank]["others"]["tensors"], (dots / len(ids) / WORLD).tolist(), "dots")


@pytest.mark.parametrize("mistake", MISTAKES)
def test_refused_in_every_process(joined: Found, mistake: str) -> None:
    for each, words in zip(joined, MISTAKES[mistake][1:], strict=True):
        assert words in each["refusals"][mistake]


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found(joined: Found, fault: str) -> None:
    with pytest.raises(AssertionError):
        check(FAULTS[fault][0], [each["faults"][fault] for each in joined])
