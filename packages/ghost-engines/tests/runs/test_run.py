"""A run measures what engines measure on their own, whatever the method."""

import json

import pytest
import torch
from run_kit import (
    INPUTS,
    STEPS,
    VALIDATION,
    ids_of,
    losses_of,
    make,
    plain,
    same_parameters,
    validation_of,
)
from torch import nn

from ghost_core import CaptureError, UnknownNameError
from ghost_core.testing.snapshots import assert_untouched, traces
from ghost_engines import Run, RunConfig, ScoreLog, StoreError, cli
from ghost_engines.log import open_log
from ghost_engines.runs import folder


def trained(folder, dropout=0.2, accumulate=False, clip=None, scale=False, **fields):
    """Train in a run; return the model, the run and the batches of the last step."""
    model, optimizer = make(dropout)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0) if scale else None
    config = RunConfig(folder=folder, **fields)
    directions = {} if config.mode == "concatenated" else {"val": validation_of(model)}
    with Run(model, optimizer, config, directions=directions, grad_scaler=scaler) as run:
        for step in range(STEPS):
            ids = ids_of(step)
            for part in (ids[:2], ids[2:]) if accumulate else (ids,):
                inputs = run.join(INPUTS[part], VALIDATION)
                with run.batch(part, loss_weights=1 / len(ids)) as batches:
                    losses = losses_of(model, inputs)
                    run.backward(
                        losses, train_weight=1 / len(ids), validation_weight=1 / len(VALIDATION)
                    )
            if scaler is not None:
                scaler.unscale_(optimizer)
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
            optimizer.zero_grad()
            run.record(loss=losses.detach().sum())
    return model, run, batches


def close(values, expected):
    assert values.keys() == expected.keys()
    assert all(values[each] == pytest.approx(expected[each], rel=1e-9) for each in expected)
    assert any(expected.values())


def test_values_and_parameters_are_those_of_a_loop_of_ones_own(tmp_path):
    expected, values = plain()
    model, run, _ = trained(tmp_path)
    assert same_parameters(model, expected)
    assert run.values.to_dict() == values.to_dict()
    assert run.steps == STEPS
    log = ScoreLog.open(tmp_path / "log")
    assert len(log) == STEPS
    assert sum(log.totals().values[:, 0]) == pytest.approx(sum(values.to_dict().values()))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert all(line["loss"] > 0 for line in lines)


def test_one_loop_does_for_all_methods(tmp_path):
    expected, values = plain(dropout=0.0)
    model, none, _ = trained(tmp_path / "none", dropout=0.0, method="none")
    assert same_parameters(model, expected)
    assert none.steps == STEPS
    with pytest.raises(CaptureError, match="no values"):
        none.values.to_dict()
    for mode in ("exact", "fused", "concatenated"):
        model, run, _ = trained(tmp_path / mode, dropout=0.0, mode=mode)
        close(run.values.to_dict(), values.to_dict())
        for one, other in zip(model.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(one, other)


def test_several_engines_share_a_capture(tmp_path):
    expected, values = plain()
    model, run, batches = trained(
        tmp_path,
        method=["projection", "dot_product", "norm"],
        options={"projection": {"dim": 8}, "norm": {"loss_weights": "given"}},
    )
    assert same_parameters(model, expected)
    assert run.values.to_dict() == values.to_dict()
    assert batches["projection"].result.rows.shape == (4, run.engines["projection"].k_total)
    assert batches["norm"].result.ids.tolist() == ids_of(STEPS - 1)


def test_rows_are_of_own_losses_where_the_engine_is_told_to_divide(tmp_path):
    def last(**options):
        options = {"projection": {"dim": 8, "dtype": "float64"} | options}
        folder = tmp_path / "-".join(options["projection"])
        methods = ["projection", "dot_product"]
        _, _, batches = trained(folder, dropout=0.0, method=methods, options=options)
        return batches["projection"].result.rows

    torch.testing.assert_close(last(loss_weights="given"), len(ids_of(0)) * last())


def test_accumulation_clipping_and_a_scaler_are_the_loops_own(tmp_path):
    _, values = plain(dropout=0.0)
    _, run, _ = trained(tmp_path / "a", dropout=0.0, accumulate=True, scale=True)
    close(run.values.to_dict(), values.to_dict())
    _, clipped, _ = trained(tmp_path / "b", dropout=0.0, clip=1e-3)
    parts = {"dropout": 0.0, "clip": 1e-3, "scale": True, "accumulate": True}
    _, same, _ = trained(tmp_path / "c", **parts)
    close(same.values.to_dict(), clipped.values.to_dict())
    assert abs(clipped.values[0]) < abs(values[0]) / 10


def test_evaluation_is_left_alone_where_a_batch_is_open(tmp_path):
    model, optimizer = make(dropout=0.0)
    rows = INPUTS[1:3]
    weights = list(model.parameters())
    wanted = torch.autograd.grad(validation_of(model)(), weights)
    gradients = [torch.autograd.grad(losses_of(model, row[None]).sum(), weights) for row in rows]
    dots = [sum((g * v).sum() for g, v in zip(each, wanted, strict=True)) for each in gradients]
    run = Run(model, optimizer, {"folder": tmp_path}, directions={"val": validation_of(model)})
    with run:
        with run.batch([1, 2]) as batches:
            loss = losses_of(model, rows).sum()
            with run.evaluation():
                losses_of(model, INPUTS[5:]).sum().backward()
                optimizer.zero_grad()
            loss.backward()
        optimizer.step()
    torch.testing.assert_close(batches["dot_product"].result.total[:, 0], torch.stack(dots))


def test_the_log_and_metrics_are_safe_every_so_many_steps(tmp_path):
    model, optimizer = make()
    config = RunConfig(folder=tmp_path, log_every=2)
    lasts = []
    with Run(model, optimizer, config, directions={"val": validation_of(model)}) as run:
        for step in range(5):
            with run.batch(ids_of(step)):
                losses_of(model, INPUTS[ids_of(step)]).mean().backward()
            optimizer.step()
            run.record(number=step)
            lasts.append(ScoreLog.open(tmp_path / "log").last)
        assert lasts == [None, 2, 2, 4, 4]
        assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 3
    assert ScoreLog.open(tmp_path / "log").last == 5
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 5


def fail_after(run, model, optimizer, steps):
    with run:
        for step in range(steps + 1):
            with run.batch(ids_of(step)):
                losses_of(model, INPUTS[ids_of(step)]).mean().backward()
                if step == steps:
                    raise ZeroDivisionError
            optimizer.step()


def test_an_exception_leaves_nothing_but_what_was_logged(tmp_path):
    model, optimizer = make()
    before = traces(model)
    run = Run(model, optimizer, {"folder": tmp_path}, directions={"val": validation_of(model)})
    with pytest.raises(ZeroDivisionError):
        fail_after(run, model, optimizer, 3)
    optimizer.zero_grad()
    assert_untouched(before, model, "an exception")
    assert not optimizer._optimizer_step_post_hooks
    assert not optimizer._optimizer_step_pre_hooks
    assert ScoreLog.open(tmp_path / "log").last == 3
    assert len(run.values) > 0
    with pytest.raises(CaptureError, match="entered once"):
        run.__enter__()


@pytest.mark.parametrize(
    ("fields", "directions", "message"),
    [
        ({}, {}, "nothing to score samples against"),
        ({"method": "projection"}, {"val": None}, "none of projection scores"),
        ({"method": "none", "values": True}, {}, "no method scores"),
        ({"mode": "concatenated"}, {"val": None}, "cannot be added in concatenated mode"),
        ({"options": {"dot_product": {"layer": "0"}}}, {"val": None}, "did you mean 'layers'"),
        ({"methods": "gram"}, {}, "did you mean 'method'"),
    ],
)
def test_what_does_not_go_together_is_refused(fields, directions, message, tmp_path):
    model, optimizer = make()
    directions = dict.fromkeys(directions, validation_of(model))
    with pytest.raises((CaptureError, UnknownNameError), match=message):
        Run(model, optimizer, {"folder": tmp_path} | fields, directions=directions)
    assert not list(tmp_path.iterdir())


def test_the_wrong_optimizer_or_no_with_is_named(tmp_path):
    model, _ = make()
    other = torch.optim.SGD([nn.Parameter(torch.zeros(1))])
    run = Run(model, other, {"folder": tmp_path}, directions={"val": validation_of(model)})
    with pytest.raises(CaptureError, match="not entered"), run.batch([1]):
        pass
    with pytest.raises(CaptureError, match=r"the optimizer holds none of .* 0\.bias"), run:
        pass
    model(INPUTS)  # nothing is left attached
    with pytest.raises(CaptureError, match="a metric has a name but 'step', and one number"):
        _recorded(tmp_path)


def _recorded(folder):
    model, optimizer = make()
    with Run(model, optimizer, {"folder": folder, "method": "none"}) as run:
        run.record(loss=torch.ones(2))


def test_logs_of_several_processes_are_read_as_one(tmp_path, monkeypatch, capsys):
    """Each of two processes trains alone here, and writes where one of two does."""
    monkeypatch.setattr(folder, "several", lambda: True)
    for rank in range(2):
        monkeypatch.setattr(folder, "process_rank", lambda rank=rank: rank)
        _, run, _ = trained(tmp_path)
    log = open_log(tmp_path)
    assert len(log) == STEPS
    twice = {sample: 2 * value for sample, value in run.values.to_dict().items()}
    close(dict(zip(log.totals().ids.tolist(), log.totals().values[:, 0], strict=True)), twice)
    assert cli.main(["values", str(tmp_path)]) == 0
    assert f"steps\t{STEPS}\n" in capsys.readouterr().out
    (tmp_path / "rank-0").rename(tmp_path / "rank-2")
    with pytest.raises(StoreError, match="has no log of rank-0"):
        open_log(tmp_path)
