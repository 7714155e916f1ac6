"""Tail-patch against a step that is written out."""

import copy
import os
import signal
import subprocess
import sys
from functools import partial

import pytest
import quality_kit
import torch
from quality_kit import asked, small_model, squared
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from ghost_core import CaptureError
from ghost_engines.quality import QualityError, tail_patch


def losses(model, batch):
    return cross_entropy(model(batch[0]), batch[1], reduction="none")


def checkpointed(model, batch):
    inputs = batch[0].requires_grad_()
    return losses(lambda x: checkpoint(model, x, use_reentrant=True), (inputs, batch[1]))


def batch(n):
    return torch.randn(n, 5), torch.randint(0, 3, (n,))


def test_it_is_what_a_step_does_and_leaves_no_trace():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3), nn.Linear(9, 9))
    model = model[:3].append(nn.Dropout(0.5)).train()
    model[0].bias.requires_grad_(False)
    model[2].weight.grad = torch.ones(3, 7)
    queries, found = [batch(2) for _ in range(4)], [batch(3) for _ in range(4)]
    before = copy.deepcopy(model)
    state = torch.get_rng_state()
    patched = tail_patch(model, losses, queries, found, lr=0.3, seed=7)
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in before.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
    assert torch.equal(model[2].weight.grad, torch.ones(3, 7))
    for at, (query, those) in enumerate(zip(queries, found, strict=True)):
        again = copy.deepcopy(before)
        torch.manual_seed(7)
        first = losses(again, query).mean().item()
        optimizer = torch.optim.SGD([p for p in again.parameters() if p.requires_grad], lr=0.3)
        optimizer.zero_grad()
        losses(again, those).mean().backward()
        optimizer.step()
        second = losses(again, query).mean().item()
        assert patched.before[at].item() == pytest.approx(first, abs=1e-6)
        assert patched.after[at].item() == pytest.approx(second, abs=1e-6)
        assert patched.gain[at].item() == pytest.approx(first - second, abs=1e-6)
    assert patched.mean == pytest.approx(patched.gain.mean().item())
    assert repr(patched).endswith("Q=4)")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"found": []}, "0 batches found for 1 queries"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"lr": float("inf")}, "lr must be positive"),
        ({"per_sample_loss": lambda m, b: losses(m, b).mean()}, r"\[N\], not \[\]"),
        ({"per_sample_loss": lambda m, b: losses(m, b) / 0}, "not finite"),
        ({"per_sample_loss": lambda m, b: b.size}, "the step for query 0 raised AttributeError"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"processes": 0}, "processes must be at least 1"),
        ({"processes": 2}, "the model or its loss cannot be sent to other processes"),
    ],
)
def test_what_does_not_fit_is_refused(given, message):
    model = nn.Linear(5, 3)
    weight = model.weight.detach().clone()
    whole = {"model": model, "queries": [batch(1)], "found": [batch(2)]}
    whole["per_sample_loss"] = lambda m, b: losses(m, b)
    with pytest.raises(QualityError, match=message):
        tail_patch(**whole | {"lr": 0.1} | given)
    assert torch.equal(model.weight, weight)


def test_reentrant_checkpoints_are_refused():
    with pytest.raises(CaptureError, match="reentrant activation checkpointing"):
        tail_patch(nn.Linear(5, 3), checkpointed, [batch(1)], [batch(2)], lr=0.1)


def test_what_is_done_is_not_done_again(tmp_path):
    log, folder, given = tmp_path / "log", tmp_path / "kept", asked(4) | {"lr": 0.1}
    limit, loss = log.with_suffix(".limit"), partial(squared, log=log)
    limit.write_text("7")  # two queries and a third of the next one
    with pytest.raises(QualityError, match="step for query 2 raised RuntimeError: the machine"):
        tail_patch(small_model(), loss, **given, folder=folder)
    assert len(list(folder.glob("*.json"))) == 2 + 1
    limit.unlink()
    log.unlink()
    found = tail_patch(small_model(), loss, **given, folder=folder)
    assert len(log.read_text().splitlines()) == 2 * 3
    whole = tail_patch(small_model(), squared, **given)
    assert torch.equal(found.before, whole.before)
    assert torch.equal(found.after, whole.after)
    assert len(set(found.gain.tolist())) == 4
    turned = given | {each: given[each][::-1] for each in ("queries", "found")}
    log.unlink()
    assert torch.equal(
        tail_patch(small_model(), loss, **turned, folder=folder).after, whole.after.flip(0)
    )
    assert not log.exists()
    swapped = given | {"found": given["queries"]}  # other steps for the same queries
    tail_patch(small_model(), loss, **swapped, folder=folder)
    assert len(log.read_text().splitlines()) == 4 * 3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lr": 0.2}, "with another learning rate\n"),
        ({"seed": 1}, "with another seed\n"),
        ({"model": small_model().double()}, "with another model\n"),
        ({"model": small_model().eval()}, "with another model\n"),
        ({"model": small_model().requires_grad_(False)}, "with another model\n"),
        ({"per_sample_loss": partial(squared, log=None)}, "with other arguments or attributes"),
        ({"per_sample_loss": quality_kit.weighed}, "not by tail_patch with quality_kit:weighed"),
        ({"per_sample_loss": lambda m, b: b}, "per_sample_loss cannot be told from other func"),
        ({"queries": [(i for i in ())]}, "the step for query 0 cannot be told from others"),
    ],
)
def test_a_folder_belongs_to_one_model_loss_and_step(tmp_path, given, message):
    whole = asked(1) | {"model": small_model(), "per_sample_loss": squared, "lr": 0.1}
    tail_patch(**whole, folder=tmp_path)
    with pytest.raises(QualityError, match=message) as caught:
        tail_patch(**whole | given, folder=tmp_path)
    assert "folder" in caught.value.remedy


SCRIPT = """
import sys
from functools import partial
from pathlib import Path
from quality_kit import asked, small_model, squared
from ghost_core import CaptureError
from ghost_engines.quality import tail_patch

folder, log, processes = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
if __name__ == "__main__":
    loss = partial(squared, log=log)
    tail_patch(small_model(), loss, **asked(5), lr=0.1, folder=folder, processes=processes)
"""


@pytest.mark.stress  # each imports torch
@pytest.mark.parametrize(("processes", "victim"), [(1, "self"), (2, "self"), (2, "parent")])
def test_killed_in_the_middle_it_goes_on(tmp_path, processes, victim):
    folder, log, script = tmp_path / "kept", tmp_path / "log", tmp_path / "script.py"
    script.write_text(SCRIPT)
    log.with_suffix(f".{victim}").write_text("8")
    kit = os.path.dirname(quality_kit.__file__)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([kit, os.environ.get("PYTHONPATH", "")])
    }
    command = [sys.executable, str(script), str(folder), str(log), str(processes)]
    # Returns once all processes have closed their output: one that stayed would be waited for.
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    one_died = processes == 2 and victim == "self"
    assert ended.returncode == (1 if one_died else -signal.SIGKILL), ended.stderr
    assert ("has died" in ended.stderr) is one_died
    kept = len(list(folder.glob("*.json"))) - 1
    assert kept < 5
    log.with_suffix(f".{victim}").unlink()
    log.unlink()
    loss = partial(squared, log=log)
    found = tail_patch(small_model(), loss, **asked(5), lr=0.1, folder=folder, processes=processes)
    assert len(log.read_text().splitlines()) == (5 - kept) * 3
    whole = tail_patch(small_model(), squared, **asked(5), lr=0.1)
    assert torch.equal(found.before, whole.before)
    assert torch.equal(found.after, whole.after)
    assert len(list(folder.glob("*.json"))) == 5 + 1
