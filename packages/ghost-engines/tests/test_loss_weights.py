"""The weights of losses: what they do to norms, and which are refused."""

import pytest
import torch
from engine_kit import check_norms, measure, rows, squares, sum_of_squares

from ghost_core import CaptureError, UnknownNameError
from ghost_core.testing import assert_within, per_sample_gradients
from ghost_engines import NormEngine

# Loss scaling


def test_the_scale_of_a_grad_scaler_is_divided_out(mlp, inputs):
    expected = per_sample_gradients(mlp, squares(mlp(inputs)))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1)
    optimizer = torch.optim.SGD(mlp.parameters(), lr=0.0)
    engine = NormEngine(mlp, loss_weights="mean", grad_scaler=scaler)
    with engine:
        for _ in range(2):
            with engine.batch(range(4)) as batch:
                scaler.scale(squares(mlp(inputs)).mean()).backward()
                scaler.step(optimizer)
                scaler.update()
            check_norms(batch.result, expected)


def test_overflow_gives_norms_that_are_not_finite(mlp, inputs):
    mlp.float()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    engine = NormEngine(mlp, loss_weights="sum", grad_scaler=scaler)
    with engine, engine.batch(range(4)) as batch:
        scaler.scale((100 * squares(mlp(inputs.float()))).sum()).backward()
    assert not batch.result.finite.any()
    assert not batch.result.total.isfinite().any()


# Weights


def test_weight_zero_gives_nan(mlp, inputs):
    weights = torch.tensor([1.0, 0.0, 2.0, 0.0])
    expected = per_sample_gradients(mlp, squares(mlp(inputs)))
    norms = measure(
        mlp, inputs, lambda outputs: (weights * squares(outputs)).sum(), "given", weights
    )
    assert norms.finite.tolist() == [True, False, True, False]
    assert norms.total.isnan().tolist() == [False, True, False, True]
    total = rows(expected).norm(dim=1)
    assert_within(norms.total[::2], total[::2], total[::2])


def test_weight_zero_of_a_sample_with_a_gradient_is_refused(mlp, inputs):
    weights = torch.tensor([1.0, 0.0, 2.0, 0.0])
    with pytest.raises(CaptureError, match=r"zero for samples \[1, 3\], whose gradients are not"):
        measure(mlp, inputs, sum_of_squares, "given", weights)


def test_weights_are_copied(mlp, inputs):
    expected = per_sample_gradients(mlp, squares(mlp(inputs)))
    weights = torch.full((4,), 2.0, dtype=torch.float64)
    engine = NormEngine(mlp, loss_weights="given")
    with engine, engine.batch(range(4), loss_weights=weights) as batch:
        (weights * squares(mlp(inputs))).sum().backward()
        weights.fill_(7.0)
    check_norms(batch.result, expected)


def test_mean_is_refused_where_micro_batches_leave_it_open(mlp, inputs):
    engine = NormEngine(mlp, loss_weights="mean")
    with engine:
        refused = pytest.raises(CaptureError, match=r"which mean, in a batch of 4 .* of 2")
        with refused, engine.batch(range(4)):
            squares(mlp(inputs[:2])).mean().backward()
        with engine.batch(range(4)) as batch:
            squares(mlp(inputs)).mean().backward()
    check_norms(batch.result, per_sample_gradients(mlp, squares(mlp(inputs))))


def test_batch_that_cannot_be_opened_leaves_the_open_one_its_weights(mlp, inputs):
    engine = NormEngine(mlp, loss_weights="given")
    with engine, engine.batch(range(4), loss_weights=2.0) as batch:
        with pytest.raises(CaptureError, match="open already"):
            engine.batch(range(4), loss_weights=5.0).__enter__()
        (2 * squares(mlp(inputs))).sum().backward()
    check_norms(batch.result, per_sample_gradients(mlp, squares(mlp(inputs))))


def test_loss_weights_have_no_default(mlp):
    with pytest.raises(CaptureError, match=r"NormEngine needs loss_weights.* 'sum', 'mean'"):
        NormEngine(mlp)


@pytest.mark.parametrize("kind", ["average", "", "Mean"])
def test_unknown_loss_weights_list_what_exists(kind, mlp):
    with pytest.raises(UnknownNameError, match="Available: given, mean, sum"):
        NormEngine(mlp, loss_weights=kind)


@pytest.mark.parametrize("kind", [torch.ones(4), 0.5])
def test_weights_at_the_wrong_place_are_refused(kind, mlp):
    with pytest.raises(CaptureError, match=r"loss_weights='given'.*engine\.batch"):
        NormEngine(mlp, loss_weights=kind)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, r"open batches with engine\.batch\(ids, loss_weights=\.\.\.\)"),
        (torch.ones(3), r"\[4\].*float32 of shape \(3,\)"),
        (torch.ones(1), r"of shape \(1,\)"),
        (torch.ones(4, 1), r"of shape \(4, 1\)"),
        (torch.ones(4, dtype=torch.bool), "not torch.bool"),
        (torch.ones(4, dtype=torch.complex64), "not torch.complex64"),
        ([1.0] * 4, "not list"),
        (True, "not bool"),
        ("mean", "not str"),
        (torch.tensor([1.0, torch.nan, 1.0, 1.0]), "not finite"),
        (torch.inf, "not finite"),
    ],
)
def test_wrong_weights_are_refused(given, message, mlp, inputs):
    engine = NormEngine(mlp, loss_weights="given")
    with engine:
        with pytest.raises(CaptureError, match=message):
            engine.batch(range(4), loss_weights=given).__enter__()
        with engine.batch(range(4), loss_weights=1.0) as batch:
            squares(mlp(inputs)).sum().backward()
    check_norms(batch.result, per_sample_gradients(mlp, squares(mlp(inputs))))


@pytest.mark.parametrize("kind", ["mean", "sum"])
def test_weights_that_nobody_asked_for_are_refused(kind, mlp):
    engine = NormEngine(mlp, loss_weights=kind)
    with engine, pytest.raises(CaptureError, match=f"was made with loss_weights='{kind}'"):
        engine.batch(range(4), loss_weights=torch.ones(4)).__enter__()
