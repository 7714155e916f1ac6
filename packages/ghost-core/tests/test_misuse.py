"""What engines are given or told by mistake is refused in words: what, why not, what to do."""

from collections.abc import Callable
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ghost_core import CaptureError, GhostError, UnknownNameError
from ghost_core.batch import as_ids
from ghost_core.testing import GradientHolder, per_sample_gradients

N = 4
Hold = Callable[..., GradientHolder]


def loss(output: Tensor) -> Tensor:
    return output.square().sum()


def explained(error: GhostError) -> str:
    """Return what an error says, which is to have a reason and a remedy."""
    assert error.reason
    assert error.remedy
    return str(error)


# What it is given


@pytest.mark.parametrize("option", ["layers", "exclude"])
@pytest.mark.parametrize("given", [0, True, None, [0], b"first", {"first": 1}, iter(["first"])])
def test_patterns_are_text(hold: Hold, model: nn.Module, option: str, given: object) -> None:
    with pytest.raises(CaptureError, match=f"^{option} must be a glob") as caught:
        hold(model, **{option: given})
    explained(caught.value)


@pytest.mark.parametrize("given", [{"first"}, ("first",), ["first", ""]])
def test_patterns_come_in_any_collection(hold: Hold, model: nn.Module, given: object) -> None:
    names = [parameter.name for parameter in hold(model, layers=given).parameters]
    assert names == ["first.bias", "first.weight"]


@pytest.mark.parametrize("option", ["verify", "generic", "lift"])
@pytest.mark.parametrize("given", ["no", 0, None])
def test_switches_are_true_or_false(
    hold: Hold, model: nn.Module, option: str, given: object
) -> None:
    with pytest.raises(CaptureError, match=f"^{option} must be True or False, not {given!r}") as e:
        hold(model, **{option: given})
    explained(e.value)


@pytest.mark.parametrize(("option", "given"), [("registry", "mine"), ("grad_scaler", 8.0)])
def test_registries_and_scalers_are_what_they_are(
    model: nn.Module, option: str, given: object
) -> None:
    with pytest.raises(CaptureError, match=f"^{option} must be a .*, not {given!r}") as caught:
        GradientHolder(model, **{option: given})
    explained(caught.value)


def test_a_typo_in_batch_dim_lists_the_model_itself_too(hold: Hold, model: nn.Module) -> None:
    with pytest.raises(UnknownNameError, match=r"Available: '' \(the model\), first, second\."):
        hold(model, batch_dim={"none": 1})


def test_axes_are_whole_numbers_also_of_numpy(hold: Hold, model: nn.Module) -> None:
    engine = hold(model, batch_dim={"*": np.int64(1)})
    assert {tracked.batch_dim for tracked in engine.tracking.modules} == {1}
    assert {type(tracked.batch_dim) for tracked in engine.tracking.modules} == {int}
    for wrong in (True, 1.0, "1"):
        with pytest.raises(CaptureError, match=r"batch_dim of .* whole number"):
            hold(model, batch_dim={"*": wrong})


def test_samples_to_compare_are_a_whole_number(hold: Hold, model: nn.Module, x: Tensor) -> None:
    def losses() -> Tensor:
        return model(x).square().sum(1)

    assert hold(model).verify(losses, samples=np.int64(2)).samples == (0, 3)
    with pytest.raises(CaptureError, match=r"samples must be at least 1, a whole number, not 2\.0"):
        hold(model).verify(losses, samples=2.0)


# Ids


@pytest.mark.parametrize("ids", [8, np.int64(8), torch.tensor(8)])
def test_a_number_of_samples_is_no_ids(hold: Hold, model: nn.Module, ids: object) -> None:
    engine = hold(model)
    with engine, pytest.raises(CaptureError, match="one integer per sample") as caught:
        engine.batch(ids).__enter__()
    assert "range(8)" in explained(caught.value)


@pytest.mark.parametrize(
    "ids",
    [
        np.array([2**63, 1], dtype=np.uint64),
        torch.from_numpy(np.array([2**63, 1], dtype=np.uint64)),
        [2**63, 1],
        [np.uint64(2**63), 1],
        [-(2**63) - 1],
    ],
)
def test_ids_that_fit_no_int64_are_refused_as_such(ids: object) -> None:
    with pytest.raises(CaptureError, match=r"ids must be one .* that fits into int64") as caught:
        as_ids(ids)
    assert "position" in explained(caught.value)


def test_ids_of_any_kind_of_integer_are_taken() -> None:
    wide = 2**62
    for ids in ([np.uint64(wide), 1], [np.int8(1), wide], np.array([wide, 1], dtype=np.uint64)):
        assert sorted(as_ids(ids).tolist()) == [1, wide]


@pytest.mark.parametrize(
    "ids",
    [
        {1: 2}, {1, 2}, iter([1, 2]), None, [None], [[1], [2, 3]], [1.5], [2, True],
        [2, np.bool_(True)], [2, torch.tensor(True)], [2, torch.tensor(3.0)], [2, np.float64(3)],
        torch.arange(2, device="meta"), torch.arange(2).to_sparse(),
    ],
)  # fmt: skip
def test_what_is_no_ids_is_explained(ids: object) -> None:
    with pytest.raises(CaptureError, match="ids must be one integer per sample") as caught:
        as_ids(ids)
    explained(caught.value)


# At the wrong time


def test_what_comes_at_the_wrong_time_says_what_to_do(
    hold: Hold, model: nn.Module, x: Tensor
) -> None:
    engine, other = hold(model), hold(model)

    def refused(context: object, message: str) -> str:
        with pytest.raises(CaptureError, match=message) as caught, ExitStack() as stack:
            stack.enter_context(context)
        return explained(caught.value)

    assert "with engine: ..." in refused(engine.batch(range(N)), "attach the engine first")
    with engine:
        assert "once around" in refused(engine, "attached already")
        assert "once around" in refused(engine.frozen(), "attached already")
        refused(other.frozen(), "must agree")
        with engine.batch(range(N)):
            loss(model(x)).backward()
            assert "close it" in refused(engine.batch(range(N)), "a batch is open already")
            refused(other, "while a batch is open")


# A model that changes


@pytest.mark.parametrize("when", ["before the batch", "before the pass", "between passes"])
@pytest.mark.parametrize("way", ["attached", "frozen"])
def test_a_module_replaced_while_attached_is_named(
    hold: Hold, model: nn.Module, x: Tensor, when: str, way: str
) -> None:
    engine = hold(model)

    def replaced(now: str) -> None:
        if when == now:
            model.second = nn.Linear(3, 3).double().requires_grad_(way == "attached")

    def train() -> None:
        replaced("before the batch")
        with engine.batch(range(N)):
            replaced("before the pass")
            loss(model(x)).backward()
            replaced("between passes")
            loss(model(x)).backward()

    context = engine.frozen() if way == "frozen" else engine
    with context, pytest.raises(CaptureError, match="second is another module") as caught:
        train()
    assert "make a new engine" in explained(caught.value)


def test_a_module_around_a_tracked_one_must_stay_too(hold: Hold, x: Tensor) -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 3)), nn.Tanh()).double()
    engine = hold(model)
    with engine, engine.batch(range(N)) as batch:
        model[1] = nn.Sigmoid()  # which has nothing to track
        loss(model(x)).backward()
    expected = per_sample_gradients(model, model(x).square().sum(1))
    assert torch.allclose(batch.result.materialize()["0.0.weight"], expected["0.0.weight"])
    with engine, engine.batch(range(N)):
        loss(model(x)).backward()
        model[0] = nn.Sequential(nn.Linear(3, 3).double())
        with pytest.raises(CaptureError, match=r"^0 is another module"):
            model(x)


def test_a_module_that_is_gone_is_named(hold: Hold, x: Tensor) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).double()
    engine = hold(model)
    with engine, engine.batch(range(N)):
        loss(model(x)).backward()
        del model[1]
        with pytest.raises(CaptureError, match=r"^1 is gone"):
            model(x)


def test_a_module_that_stands_in_two_places_must_stay_in_both(hold: Hold, x: Tensor) -> None:
    layer = nn.Linear(3, 3)
    model = nn.Sequential(layer, nn.Tanh(), layer).double()
    engine = hold(model)
    with engine, engine.batch(range(N)):
        loss(model(x)).backward()
        model[2] = nn.Linear(3, 3).double()
        with pytest.raises(CaptureError, match=r"^2 is another module"):
            model(x)


def test_leaving_leaves_nothing_public_behind(hold: Hold, model: nn.Module, x: Tensor) -> None:
    engine = hold(model)
    assert not hasattr(engine, "thing")
    with ExitStack() as stack:
        stack.enter_context(engine)
        with engine.batch(range(N)) as batch:
            loss(model(x)).backward()
    assert repr(engine).endswith("detached>")
    assert batch.result.uses
