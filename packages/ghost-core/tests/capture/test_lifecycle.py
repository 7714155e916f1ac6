"""Attaching, batches, and leaving: at the wrong time an error, after an error no trace."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ghost_core import Batch, CaptureError
from ghost_core.testing import GradientHolder, Held, per_sample_gradients
from ghost_core.testing.snapshots import assert_untouched, traces

N, D = 4, 3
Hold = Callable[..., GradientHolder]


def loss(output: Tensor) -> Tensor:
    return output.square().sum()


def test_the_model_is_as_found(hold: Hold, model: nn.Module, x: Tensor) -> None:
    model.first.bias.requires_grad_(False)
    model.register_forward_hook(lambda *_: None)
    found, engine = traces(model), hold(model)
    with engine:
        assert traces(model) != found
        with engine.batch(range(N)):
            loss(model(x)).backward()
    assert_untouched(found, model, "after leaving")
    with engine.frozen(), engine.batch(range(N)):
        loss(model(x)).backward()
    assert_untouched(found, model, "after frozen()")


def fail(engine: GradientHolder, model: nn.Module, x: Tensor, where: str) -> Batch[Held]:
    """Run a batch that ends with an exception."""
    with pytest.raises(KeyError), engine.batch(range(N)) as batch:  # noqa: PT012
        model.broken = where == "forward"
        output = model(x)
        if where == "batch":
            raise KeyError
        output.register_hook(_raise)
        loss(output).backward()
    model.broken = False
    return batch


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("where", ["forward", "batch", "backward"])
def test_an_exception_leaves_no_trace_and_no_result(
    hold: Hold, assert_held, model: nn.Module, x: Tensor, where: str, frozen: bool
) -> None:
    found, engine = traces(model), hold(model)
    with engine.frozen() if frozen else engine:
        batch = fail(engine, model, x, where)
        with pytest.raises(CaptureError, match="an exception ended it"):
            batch.result  # noqa: B018
        with pytest.raises(CaptureError, match="an exception ended it"):
            engine.collect()
        with engine.batch(range(N)) as batch:
            loss(model(x)).backward()
    assert_untouched(found, model, "after leaving")
    assert_held(batch.result, per_sample_gradients(model, model(x).square().sum(1)))


def _raise(grad: Tensor) -> None:
    raise KeyError


def test_a_failed_call_that_the_user_repeats_counts_once(
    hold: Hold, assert_held, model: nn.Module, x: Tensor
) -> None:
    engine = hold(model)
    with engine, engine.batch(range(N)) as batch:
        model.broken = True
        with pytest.raises(KeyError):
            model(x)
        model.broken = False
        loss(model(x)).backward()
    assert_held(batch.result, per_sample_gradients(model, model(x).square().sum(1)))


def test_backward_outside_the_batch_is_an_error(hold: Hold, model: nn.Module, x: Tensor) -> None:
    engine = hold(model)
    with engine:
        with pytest.raises(CaptureError, match="no gradient arrived"), engine.batch(range(N)):
            output = model(x)
        with pytest.raises(CaptureError, match="after its batch was closed"):
            loss(output).backward()


def test_a_submodule_called_directly_is_an_error(hold: Hold, model: nn.Module, x: Tensor) -> None:
    engine = hold(model)
    with (
        engine,
        pytest.raises(CaptureError, match="second was called outside a call of the model"),
        engine.batch(range(N)),
    ):
        model.second(x)


def test_the_model_must_be_called(hold: Hold, model: nn.Module) -> None:
    engine = hold(model)
    with (
        engine,
        pytest.raises(CaptureError, match="the model was not called"),
        engine.batch(range(N)),
    ):
        pass


def test_calls_without_gradients_are_left_alone(
    hold: Hold, assert_held, model: nn.Module, x: Tensor
) -> None:
    engine = hold(model)
    with engine:
        plain = model(x)
        assert plain.grad_fn is not None
        loss(plain).backward()
        with engine.batch(range(N)) as batch:
            with torch.no_grad():
                torch.testing.assert_close(model(x[:2]), plain[:2].detach())
            loss(model(x)).backward()
    assert_held(batch.result, per_sample_gradients(model, model(x).square().sum(1)))


def test_paused_leaves_the_model_alone(hold: Hold, model: nn.Module, x: Tensor) -> None:
    engine = hold(model)
    with engine.frozen(), engine.batch(range(N)) as batch:
        with engine.paused():
            (grad,) = torch.autograd.grad(loss(model(x[:1])), model.first.weight)
            model.second(x)
        assert not model.first.weight.requires_grad
        loss(model(x)).backward()
    assert grad.any()
    assert len(batch.result.uses["first.weight"]) == 1
    with engine.paused():
        model(x)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([N + 1], "called on 5 samples, but the batch was opened for 4"),
        ([1, 2], "3 of 4 samples went through the model"),
        ([3, 3], "called on 3 samples after 3"),
        ([1, N], "a pass of 4 samples follows micro-batches"),
        ([N, 1], "called on 1 samples after"),
    ],
)
def test_other_samples_than_announced_are_an_error(
    hold: Hold, model: nn.Module, rows: list[int], message: str
) -> None:
    engine, parts = hold(model), [torch.randn(n, D, dtype=torch.float64) for n in rows]
    with engine, pytest.raises(CaptureError, match=message), engine.batch(range(N)):
        sum(loss(model(part)) for part in parts).backward()


def test_an_unclear_number_of_samples_is_an_error(hold: Hold) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(D, D)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.layer(x) + y.sum()

    engine = hold(model := Two())
    with (
        engine,
        pytest.raises(CaptureError, match=r"cannot tell how many samples .* \[2, 3\] rows"),
        engine.batch(range(N)),
    ):
        model(torch.randn(2, D), torch.randn(3))


def test_attaching_at_the_wrong_time(hold: Hold, model: nn.Module, x: Tensor) -> None:
    engine, other = hold(model), hold(model)
    with pytest.raises(CaptureError, match="attach the engine first"), engine.batch(range(N)):
        pass
    with pytest.raises(CaptureError, match="there was no batch yet"):
        engine.collect()
    with engine:
        with pytest.raises(CaptureError, match="attached already"), engine:
            pass
        with pytest.raises(CaptureError, match="must agree"), other.frozen():
            pass
        with engine.batch(range(N)):
            with pytest.raises(CaptureError, match="while a batch is open"), other:
                pass
            loss(model(x)).backward()
    with engine.frozen(), pytest.raises(CaptureError, match="must agree"), other:
        pass


def test_a_second_batch_does_not_touch_the_open_one(
    hold: Hold, assert_held, model: nn.Module, x: Tensor
) -> None:
    engine = hold(model)
    with engine, engine.batch(range(N)) as batch:
        loss(model(x)).backward()
        with pytest.raises(CaptureError, match="a batch is open already"), engine.batch([1]):
            pass
    assert_held(batch.result, per_sample_gradients(model, model(x).square().sum(1)))
    assert engine.collect() is batch.result


def test_a_model_that_changed_needs_a_new_engine(hold: Hold, model: nn.Module, x: Tensor) -> None:
    engine = hold(model)
    model.first = nn.Linear(D, D).double()
    with pytest.raises(CaptureError, match="make a new engine"), engine:
        pass
    engine = hold(model)
    model.second.bias.requires_grad_(False)
    with pytest.raises(CaptureError, match="make a new engine"), engine:
        pass


@pytest.mark.parametrize("how", ["attached", "with a hook", "frozen"])
def test_a_layer_taken_out_while_attached_is_named(
    hold: Hold, model: nn.Module, x: Tensor, how: str
) -> None:
    engine = hold(model)
    with engine.frozen() if how == "frozen" else engine:
        with engine.batch(range(N)):
            loss(model(x)).backward()
        if how == "with a hook":
            model.second.weight.register_hook(lambda gradient: gradient)
        model.first = nn.Identity()
        gone = r"first\.weight is gone, first\.bias is gone: make a new engine"
        with pytest.raises(CaptureError, match=gone), engine.batch(range(N)):
            pass


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("options", [{"exclude": "first"}, {"layers": "second.*"}])
def test_a_layer_that_nobody_tracks_may_be_taken_out_while_attached(
    hold: Hold, assert_held, model: nn.Module, x: Tensor, frozen: bool, options: dict[str, str]
) -> None:
    engine = hold(model, **options)
    with engine.frozen() if frozen else engine:
        for first in (model.first, nn.Identity()):
            model.first = first
            with engine.batch(range(N)) as batch:
                loss(model(x)).backward()
    expected = per_sample_gradients(model, model(x).square().sum(1))
    assert_held(batch.result, {name: expected[name] for name in engine.tracking.names})


@pytest.mark.parametrize("frozen", [False, True])
def test_what_nobody_tracks_may_be_frozen_and_added_while_attached(
    hold: Hold, model: nn.Module, x: Tensor, frozen: bool
) -> None:
    engine = hold(model, exclude="first")
    with engine.frozen() if frozen else engine:
        model.first.requires_grad_(False)
        model.other = nn.Linear(D, D).requires_grad_(False)
        with engine.batch(range(N)) as batch:
            loss(model(x)).backward()
    assert batch.verified


class Renamed(nn.Sequential):
    """Calls its parameters by names of its own."""

    def named_parameters(self, prefix="", recurse=True, remove_duplicate=True):
        for name, parameter in super().named_parameters(prefix, recurse, remove_duplicate):
            yield f"own.{name}", parameter


def test_hooks_are_refused_by_the_names_that_a_model_gives_its_parameters(
    hold: Hold, x: Tensor
) -> None:
    model = Renamed(nn.Linear(D, D).double())
    engine = hold(model)
    assert engine.tracking.names == {"own.0.weight", "own.0.bias"}
    with engine:
        with engine.batch(range(N)):
            loss(model(x)).backward()
        model[0].weight.register_hook(lambda gradient: gradient)
        with (
            pytest.raises(CaptureError, match=r"own\.0\.weight has a hook"),
            engine.batch(range(N)),
        ):
            pass


def test_a_layer_that_patterns_choose_is_named_where_it_was_taken_out(
    hold: Hold, model: nn.Module
) -> None:
    engine = hold(model, layers="first.*")
    with engine:
        model.first = nn.Identity()
        with pytest.raises(CaptureError, match=r"first\.weight is gone"), engine.batch(range(N)):
            pass


def test_a_parameter_frozen_while_attached_is_an_error(
    hold: Hold, model: nn.Module, x: Tensor
) -> None:
    engine = hold(model)
    with engine:
        model.first.bias.requires_grad_(False)
        with pytest.raises(CaptureError, match=r"first\.bias no longer require"):
            engine.batch(range(N)).__enter__()


@pytest.mark.filterwarnings("default")  # the compiler's own
@pytest.mark.parametrize(("called_before", "verify"), [(True, False), (False, True)])
def test_compiling_is_exact_or_refused(
    hold: Hold, assert_held, model: nn.Module, x: Tensor, called_before: bool, verify: bool
) -> None:
    engine = hold(model, verify=verify)
    expected = per_sample_gradients(model, model(x).square().sum(1))
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager")
    if called_before:
        compiled(x)
    with engine:
        for _ in range(2):
            try:
                with engine.batch(range(N)) as batch:
                    loss(compiled(x)).backward()
            except CaptureError:
                assert called_before, "attached before compiling, it has to work"
                return
            assert_held(batch.result, expected)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_engines_can_be_attached_where_gradients_are_off(
    hold: Hold, assert_held, model: nn.Module, x: Tensor, mode
) -> None:
    expected = per_sample_gradients(model, model(x).square().sum(1))
    with mode():
        engine = hold(model)
        with (
            engine,
            engine.batch(range(N)) as batch,
            torch.inference_mode(False),
            torch.enable_grad(),
        ):
            loss(model(x)).backward()
    assert_held(batch.result, expected)


class Failing:
    """A hook on a gradient that fails the first time."""

    def __init__(self) -> None:
        self.armed = False

    def __call__(self, grad: Tensor) -> None:
        if self.armed:
            self.armed = False
            raise KeyError


@pytest.mark.parametrize("again", ["backward", "both", "nothing"])
def test_a_backward_pass_that_failed_halfway_is_refused(
    hold: Hold, model: nn.Module, x: Tensor, again: str
) -> None:
    """What had arrived would count twice, or what had not would be missing."""
    engine, failing = hold(model), Failing()

    def hook(module: nn.Module, args: object, output: Tensor) -> None:
        if failing.armed:
            output.register_hook(failing)

    model.first.register_forward_hook(hook)

    def run() -> None:
        failing.armed = True
        with engine.batch(range(N)):
            output = model(x)
            with pytest.raises(KeyError):
                loss(output).backward(retain_graph=True)
            if again == "backward":
                loss(output).backward()
            if again == "both":
                loss(model(x)).backward()

    with engine:
        with engine.batch(range(N)):
            loss(model(x)).backward()
        with pytest.raises(CaptureError, match="a backward pass was not completed") as caught:
            run()
        assert "another" in caught.value.remedy
        with engine.batch(range(N)):
            loss(model(x)).backward()


def test_a_backward_pass_that_fails_before_anything_arrived_may_be_repeated(
    hold: Hold, assert_held, model: nn.Module, x: Tensor
) -> None:
    engine, failing = hold(model), Failing()
    with engine, engine.batch(range(N)) as batch:
        output = model(x)
        failing.armed = True
        output.register_hook(failing)
        with pytest.raises(KeyError):
            loss(output).backward(retain_graph=True)
        loss(output).backward()
    assert_held(batch.result, per_sample_gradients(model, model(x).square().sum(1)))


@pytest.mark.parametrize("which", ["its own", "another"])
def test_leaving_an_engine_before_a_batch_is_closed_is_refused(
    hold: Hold, model: nn.Module, x: Tensor, which: str
) -> None:
    """Nobody watched what came after; and nothing of ghost's is left on the model, nor a mode."""
    found, engine, other = traces(model), hold(model), hold(model)

    def run() -> Batch[Held]:
        with engine.batch(range(N)) as batch:
            loss(model(x)).backward()
            (engine if which == "its own" else other).__exit__(None, None, None)
            assert torch._C._len_torch_dispatch_stack() == 0
            assert torch._C._len_torch_function_stack() == 0
        return batch

    engine.__enter__()
    other.__enter__()
    with pytest.raises(CaptureError, match="was left while this batch was open"):
        run()
    with pytest.raises(CaptureError, match="an exception ended it"):
        engine.collect()
    (other if which == "its own" else engine).__exit__(None, None, None)
    assert_untouched(found, model, "after leaving")
