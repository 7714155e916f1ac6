"""A run chooses what brute force chooses, and its steps are plain training on those chosen."""

import json

import pytest
import torch
from run_kit import INPUTS, losses_of, make, same_parameters, validation_of

from ghost_core import CaptureError, UnknownNameError
from ghost_core.state import RandomState
from ghost_core.testing.snapshots import traces
from ghost_engines import Run, RunConfig

STEPS, CANDIDATES, K = 5, 8, 3
TOP = {"top_k": {"k": K}}


def candidates_of(step):
    """Return the ids of a step's candidates."""
    return torch.arange(CANDIDATES) * 3 % len(INPUTS) + step % 3


def flat(gradients):
    return torch.cat([each.flatten() for each in gradients])


def brute_force(model, ids, wanted):
    """Return the positions of the best by one backward pass each, as the model is."""
    weights = list(model.parameters())
    model.eval()
    direction = flat(torch.autograd.grad(wanted(), weights))
    model.train()
    own = losses_of(model, INPUTS[ids])
    rows = [flat(torch.autograd.grad(each, weights, retain_graph=True)) for each in own]
    dots = torch.stack(rows) @ direction
    return dots.argsort(descending=True)[:K].tolist()


def step_on(model, optimizer, rows):
    losses_of(model, rows).mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def plain(choose, dropout=0.2):
    """Train without a run on what a function chooses; return the model and what was chosen."""
    model, optimizer = make(dropout)
    chosen = []
    for step in range(STEPS):
        ids = candidates_of(step)
        state = RandomState.now()
        at = choose(model, ids)
        state.restore()
        chosen.append(ids[at].tolist())
        step_on(model, optimizer, INPUTS[ids[at]])
    return model, chosen


def trained(folder, dropout=0.2, until=STEPS, targets=("val",), **fields):
    """Train in a run, from its checkpoint if there is one."""
    model, optimizer = make(dropout)
    config = RunConfig(**{"folder": folder, "policy": TOP, "log_every": 1} | fields)
    directions = {name: validation_of(model) for name in targets}
    saved = {"model": model, "optimizer": optimizer}
    chosen = []
    with Run(model, optimizer, config, directions=directions) as run:
        for step in range(run.resume(**saved), until):
            ids = candidates_of(step)
            found = run.select(lambda ids=ids: losses_of(model, INPUTS[ids]), ids)
            chosen.append(found.ids.tolist())
            with run.batch(found.ids):
                losses_of(model, INPUTS[ids[found.indices]]).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            run.save(**saved)
    return model, run, chosen


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"mode": "fused"},
        {"method": ["projection", "dot_product"], "options": {"projection": {"dim": 4}}},
        {"values": False, "method": "cosine"},
        {"refresh": 2},  # one for the choice and the step
    ],
    ids=str,
)
def test_the_choice_is_brute_force_and_the_step_is_plain_training(fields, tmp_path):
    expected, chosen = plain(lambda model, ids: brute_force(model, ids, validation_of(model)))
    model, run, found = trained(tmp_path, **fields)
    assert found == chosen
    if "mode" in fields:
        for one, other in zip(model.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(one, other)
    else:
        assert same_parameters(model, expected)
    assert run.steps == STEPS
    if fields.get("values") is not False:
        credited = {each for ids in chosen for each in ids}
        assert set(run.values.to_dict()) == credited
        assert len(credited) < len({each for at in range(STEPS) for each in candidates_of(at)})


@pytest.mark.parametrize(("refresh", "calls"), [(1, 4), (2, 2)])
def test_a_direction_may_serve_the_choice_and_the_step(refresh, calls, tmp_path):
    model, optimizer = make()
    made, loss = [], validation_of(model)
    directions = {"val": lambda: made.append(1) or loss()}
    config = RunConfig(folder=tmp_path, policy=TOP, refresh=refresh)
    with Run(model, optimizer, config, directions=directions) as run:
        for _ in range(2):
            ids = run.select(lambda: losses_of(model, INPUTS[:6]), range(6)).ids
            with run.batch(ids):
                losses_of(model, INPUTS[ids]).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert len(made) == calls


def test_random_choices_need_no_method_and_are_the_same_with_one(tmp_path):
    drawn = {"policy": {"random": {"k": K}}}
    _, none, found = trained(tmp_path / "none", method="none", **drawn)
    assert none.steps == STEPS
    torch.manual_seed(0)
    make()
    again = torch.randperm(CANDIDATES)[:K]
    assert found[0] == candidates_of(0)[again].tolist()
    model, _, other = trained(tmp_path / "dots", **drawn)
    assert found == other
    assert all(len(set(each)) == K for each in found)
    assert same_parameters(model, trained(tmp_path / "again", method="none", **drawn)[0])


def test_a_choice_leaves_no_trace(tmp_path):
    model, optimizer = make()
    config = RunConfig(folder=tmp_path, policy=TOP)
    with Run(model, optimizer, config, directions={"val": validation_of(model)}) as run:
        step_on(model, optimizer, INPUTS[:4])
        losses_of(model, INPUTS[:2]).sum().backward()
        before = traces(model), RandomState.now()
        kept = [(each.grad, each.grad.clone()) for each in model.parameters()]
        values = [each.detach().clone() for each in model.parameters()]
        chosen = run.select(lambda: losses_of(model, INPUTS[:6]), range(6))
        assert chosen.verified
        assert traces(model) == before[0]
        assert RandomState.now() == before[1]
        assert all(
            each.grad is grad and torch.equal(grad, copy)
            for each, (grad, copy) in zip(model.parameters(), kept, strict=True)
        )
        assert all(map(torch.equal, model.parameters(), values))
        assert run.steps == 1


@pytest.mark.parametrize(
    "fields", [{}, {"policy": {"random": {"k": K}}, "method": "none"}], ids=["top_k", "random"]
)
def test_a_resumed_run_chooses_as_one_that_was_never_interrupted(fields, tmp_path):
    whole, _, chosen = trained(tmp_path / "whole", **fields)
    _, _, before = trained(tmp_path / "run", until=2, **fields)
    model, run, after = trained(tmp_path / "run", **fields)
    assert before + after == chosen
    assert same_parameters(model, whole)
    assert run.steps == STEPS


def test_options_may_come_with_each_choice_and_a_choice_is_for_one_direction(tmp_path):
    model, optimizer = make()
    weights = dict(model.named_parameters())
    zero = {name: torch.zeros_like(each) for name, each in weights.items()}
    directions = {"none": zero, "val": validation_of(model)}
    given = {"folder": tmp_path, "policy": {"greedy": {"k": 2}}, "target": "val"}

    def own():
        return losses_of(model, INPUTS[:6])

    with Run(model, optimizer, given, directions=directions) as run:
        chosen = run.select(own, range(6), lr=0.5)
        assert repr(chosen).startswith("Chosen(2 of 6 for val by Greedy(k=2, lr=0.5): [")
        with pytest.raises(CaptureError, match="missing 1 required positional argument: 'lr'"):
            run.select(own, range(6))
        with pytest.raises(CaptureError, match="unexpected keyword argument 'rate'"):
            run.select(own, range(6), rate=0.5)
        with pytest.raises(CaptureError, match="a batch is open"), run.batch(range(6)):
            run.select(own, range(6), lr=0.5)
    found = json.loads((tmp_path / "run.json").read_text())
    assert found["config"]["policy"] == found["effective"]["policy"] == {"greedy": {"k": 2}}
    assert found["config"]["target"] == "val"
    with pytest.raises(CaptureError, match="for one of them"):
        Run(model, optimizer, given | {"target": None}, directions=directions)
    with pytest.raises(UnknownNameError, match="unknown target 'vall'; did you mean 'val'"):
        Run(model, optimizer, given | {"target": "vall"}, directions=directions)


def test_the_folder_says_defaults_and_another_policy_is_refused(tmp_path):
    trained(tmp_path, until=1, policy="threshold")
    found = json.loads((tmp_path / "run.json").read_text())
    assert found["config"]["policy"] == {"threshold": {}}
    assert found["effective"]["policy"] == {"threshold": {"value": 0.0}}
    with pytest.raises(CaptureError, match=r"a run with policy=.*, and this one has policy="):
        trained(tmp_path, until=1)


def test_a_policy_that_nobody_asks_is_said(tmp_path, caplog):
    model, optimizer = make()
    for asked in (True, False):
        config = {"folder": tmp_path / str(asked), "method": "none", "policy": {"random": {"k": 1}}}
        with Run(model, optimizer, config) as run:
            if asked:
                run.select(lambda: losses_of(model, INPUTS), range(24))
        assert ("policy 'random' chose nothing" in caplog.text) is not asked


def test_without_a_policy_or_an_entered_run_nothing_is_chosen(tmp_path):
    model, optimizer = make()
    run = Run(model, optimizer, {"folder": tmp_path, "method": "none"})
    with pytest.raises(CaptureError, match="not entered"):
        run.select(lambda: losses_of(model, INPUTS), range(24))
    with run, pytest.raises(CaptureError, match="no policy to choose by") as raised:
        run.select(lambda: losses_of(model, INPUTS), range(24))
    assert "policy={'top_k': {'k': 8}}" in str(raised.value)
