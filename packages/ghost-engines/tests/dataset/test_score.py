"""Scores of a whole data set against one autograd call per sample."""

import logging

import numpy as np
import pytest
import torch
from dataset_kit import Broken, classifier, draw, losses, rows, samples
from torch import nn

from ghost_core import CaptureError, UnknownNameError, WrongSplitError
from ghost_core.testing import TinyTransformer, assert_within, next_token_losses
from ghost_core.testing.snapshots import assert_untouched, traces
from ghost_engines import GramEngine, score_dataset

TRAIN, VAL, TEST = draw(23), draw(7, seed=1), draw(4, seed=2)


@pytest.fixture
def model():
    return classifier()


def expected(model):
    """Return the samples' gradients `[N, size]`, and the targets' `[K, size]`."""
    targets = torch.stack([rows(model, VAL).mean(0), rows(model, TEST).mean(0)])
    return rows(model, TRAIN), targets


def check(table, gradients, targets):
    norms, others = gradients.norm(dim=1), targets.norm(dim=1)
    scale = norms[:, None] * others
    assert_within(torch.from_numpy(table.scores), gradients @ targets.mT, scale, what="scores")
    assert_within(torch.from_numpy(table.norms), norms, norms, what="norms")
    cosines = gradients @ targets.mT / scale
    assert_within(torch.from_numpy(table.cosines), cosines, 1.0, what="cosines")


def test_scores_norms_and_cosines_are_those_of_autograd(model):
    """Batches of targets are of different sizes: their gradient is that of the mean of samples."""
    val = [(VAL[0][:2], VAL[1][:2]), (VAL[0][2:], VAL[1][2:])]
    table = score_dataset(
        model, losses, samples(TRAIN), {"val": val, "test": samples(TEST)}, batch_size=5
    )
    check(table, *expected(model))
    assert table.ids.tolist() == list(range(23))
    assert table.names == ("val", "test")
    assert table.verified
    assert repr(table) == "ScoreTable(N=23, K=2 (val, test), norms, verified)"


def test_a_language_model_with_tied_weights_and_positions():
    model = TinyTransformer().double().eval()
    tokens = torch.randint(0, 19, (6, 7), generator=torch.Generator().manual_seed(1))

    def loss(model, batch):
        return next_token_losses(model(batch), batch)

    def gradients(batch):
        parameters = [each for each in model.parameters() if each.requires_grad]
        for at in range(len(batch)):
            own = torch.autograd.grad(loss(model, batch[at : at + 1]).sum(), parameters)
            yield torch.cat([part.flatten() for part in own])

    of_samples = torch.stack(list(gradients(tokens)))
    target = torch.stack(list(gradients(tokens.flip(0)[:2]))).mean(0, keepdim=True)
    table = score_dataset(model, loss, tokens, {"val": tokens.flip(0)[:2]}, batch_size=4)
    check(table, of_samples, target)


def test_without_norms_there_are_none(model):
    table = score_dataset(model, losses, TRAIN, {"val": VAL, "test": TEST}, norms=False)
    gradients, targets = expected(model)
    scale = gradients.norm(dim=1)[:, None] * targets.norm(dim=1)
    assert_within(torch.from_numpy(table.scores), gradients @ targets.mT, scale, what="scores")
    assert table.norms is None
    assert table.cosines is None
    assert list(table.columns()) == ["id", "score_val", "score_test"]


def test_the_model_is_left_as_it_was(model):
    """It is in training mode, has gradients, and random numbers are drawn by its dropout."""
    model.train()
    model[1].eval()
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    grads = [parameter.grad for parameter in model.parameters()]
    kept = [grad.clone() for grad in grads]
    values = [parameter.detach().clone() for parameter in model.parameters()]
    before, random_state = traces(model), torch.get_rng_state()
    with torch.no_grad():
        score_dataset(model, losses, samples(TRAIN), {"val": VAL})
    assert_untouched(before, model, "after scoring")
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [module.training for module in model] == [True, False, True, True]
    for parameter, grad, copy, value in zip(model.parameters(), grads, kept, values, strict=True):
        assert parameter.grad is grad
        assert torch.equal(grad, copy)
        assert torch.equal(parameter, value)


def test_the_model_is_left_as_it_was_where_the_data_fail(model):
    model.train()
    before = traces(model)
    with pytest.raises(RuntimeError, match="unreadable"):
        score_dataset(model, losses, Broken(), {"val": VAL}, batch_size=2)
    assert_untouched(before, model, "after an error")
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_engines_go_by_name(model):
    gradients, targets = expected(model)
    table = score_dataset(model, losses, TRAIN, {}, engine="norm")
    norms = gradients.norm(dim=1)
    assert_within(torch.from_numpy(table.scores[:, 0]), norms, norms, what="norms")
    assert (table.names, table.norms, table.signed) == (("norm",), None, False)
    for name in ("cosine", "dot_product"):
        table = score_dataset(model, losses, TRAIN, {"val": VAL, "test": TEST}, engine=name)
        check(table, gradients, targets)
    for name, what in [("gram", r"is \(23, 23\)"), ("projection", r"is \(23, \d+\)")]:
        with pytest.raises(CaptureError, match=f"engine '{name}' gives no table .*\n.*{what}"):
            score_dataset(model, losses, TRAIN, {}, engine=name)
    with pytest.raises(UnknownNameError, match="unknown engine 'nrom'; did you mean 'norm'"):
        score_dataset(model, losses, TRAIN, {}, engine="nrom")
    with pytest.raises(CaptureError, match=r"'norm' takes no targets\nReason: .*\nRemedy: give t"):
        score_dataset(model, losses, TRAIN, {"val": VAL}, engine="norm")


def test_options_reach_the_engine(model):
    table = score_dataset(model, losses, TRAIN, {"val": VAL}, layers="3", verify=False)
    size = sum(parameter.numel() for parameter in model[3].parameters())
    own, target = rows(model, TRAIN)[:, -size:], rows(model, VAL)[:, -size:].mean(0)
    scale = own.norm(dim=1) * target.norm()
    assert_within(torch.from_numpy(table.scores[:, 0]), own @ target, scale, what="head alone")
    assert not table.verified
    with pytest.raises(CaptureError, match="takes no grad_scaler"):
        score_dataset(model, losses, TRAIN, {"val": VAL}, grad_scaler=torch.amp.GradScaler("cpu"))


def test_samples_that_mix_are_refused():
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6, track_running_stats=False)).double()
    with pytest.raises(WrongSplitError):
        score_dataset(model, losses, TRAIN, {"val": VAL})


# What cannot be scored


def spoilt(value, at=4):
    inputs = TRAIN[0].clone()
    inputs[at] = value
    return inputs, TRAIN[1]


def shared(model, batch):
    return losses(model, batch).mean()


def elsewhere(model, batch):
    return batch[0].sum(1).requires_grad_()


def two_each(model, batch):
    return losses(model, batch).repeat(2)


@pytest.mark.parametrize(
    ("train", "targets", "loss", "what"),
    [
        ([], {"val": VAL}, losses, "train is empty\nReason: .*\nRemedy: give data with at least"),
        (samples(draw(0)), {"val": VAL}, losses, "train is empty"),
        (draw(0), {"val": VAL}, losses, "train is empty"),
        (TRAIN, {"val": iter(())}, losses, "target 'val' is empty"),
        ([TRAIN, draw(0)], {"val": VAL}, losses, "train: a batch after 23 samples is empty"),
        (TRAIN, {}, losses, "there are no targets to score against\nRemedy: give targets="),
        (
            spoilt(torch.nan),
            {"val": VAL},
            losses,
            "train: the loss of sample 4 is nan\nReason: 1",
        ),
        (TRAIN, {"val": spoilt(torch.inf)}, losses, "target 'val': the loss of sample 4 is nan"),
        (
            TRAIN,
            {"val": VAL},
            shared,
            r"target 'val': losses are float64 of shape \(\): ",
        ),
        (TRAIN, {"val": VAL}, elsewhere, "depends on none of the selected parameters"),
        ([TRAIN], {"val": VAL}, two_each, "train: there are 46 losses for 23 samples\nRemedy: re"),
        (3, {"val": VAL}, losses, "train is of type int\nReason: samples are read"),
        (TRAIN, {"val": "text"}, losses, "target 'val' is of type str"),
    ],
)
def test_what_cannot_be_scored_is_said(model, train, targets, loss, what):
    before = traces(model)
    with pytest.raises(CaptureError, match=what):
        score_dataset(model, loss, train, targets, batch_size=64)
    assert_untouched(before, model, "after a refusal")


def test_a_target_without_a_gradient_is_refused(model):
    with torch.no_grad():
        model[3].weight.zero_()
        model[3].bias.zero_()

    def flat(model, batch):
        return (model(batch[0]) * 0).sum(1)

    with pytest.raises(CaptureError, match="'val': the gradient of its mean loss is zero\n"):
        score_dataset(model, flat, TRAIN, {"val": VAL})


def test_ids_that_come_again_are_said(model, caplog):
    with caplog.at_level(logging.WARNING):
        table = score_dataset(model, losses, TRAIN, {"val": VAL}, ids=lambda batch: batch[1])
    assert table.ids.tolist() == TRAIN[1].tolist()
    assert [record.message for record in caplog.records] == [
        "20 samples came under an id that another one had before"
    ]


def test_scores_that_overflow_are_said(caplog):
    model = nn.Linear(5, 3)
    data = TRAIN[0].float() * 1e20, TRAIN[1]
    with caplog.at_level(logging.WARNING):
        table = score_dataset(
            model, lambda model, batch: model(batch[0]).sum(1), data, {"val": data}, norms=False
        )
    assert not np.isfinite(table.scores).all()
    (record,) = caplog.records
    assert record.message.endswith("of 23 samples are not finite")


def test_an_engine_that_is_attached_already_stays(model):
    engine = GramEngine(model, loss_weights="sum")
    with engine:
        with pytest.raises(CaptureError):
            score_dataset(model, losses, TRAIN, {"val": VAL})
        with engine.batch(range(23)) as batch:
            losses(model.eval(), TRAIN).sum().backward()
    assert batch.result.total.shape == (23, 23)
