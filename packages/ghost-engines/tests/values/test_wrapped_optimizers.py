"""In-run values where another object makes the optimizer's steps."""

import pytest
import torch

from ghost_core import CaptureError
from ghost_engines import DotProductEngine, InRunValues


class Wrapper(torch.optim.Optimizer):
    """Steps as Accelerate's optimizer does: an optimizer by class that was never set up as one."""

    def __init__(self, optimizer, scaler=None):
        self.optimizer = optimizer
        self.scaler = scaler
        self.synchronises = True

    param_groups = property(lambda self: self.optimizer.param_groups)

    def zero_grad(self, set_to_none=True):
        if self.synchronises:
            self.optimizer.zero_grad(set_to_none)

    def step(self, closure=None):
        if not self.synchronises:
            return
        if self.scaler is None:
            self.optimizer.step(closure)
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()


def accelerated(optimizer, scaler=None):
    """Return Accelerate's own."""
    accelerate = pytest.importorskip("accelerate", exc_type=ImportError)
    accelerate.Accelerator(cpu=True)  # without one, there is no accelerated optimizer
    wrapper = accelerate.optimizer.AcceleratedOptimizer(optimizer, scaler=scaler)
    state = wrapper.gradient_state

    class Switch(type(wrapper)):
        """Sets what `accelerator.accumulate` sets."""

        synchronises = property(
            lambda self: state.sync_gradients,
            lambda self, value: state._set_sync_gradients(value),
        )

    wrapper.__class__ = Switch
    return wrapper


WRAPPERS = {"Accelerate": accelerated, "stand-in": Wrapper}


def losses(model, at):
    x = torch.full((2, 5), at + 1.0, dtype=model[0].weight.dtype)
    return (model(x) - 1).square().sum(1)


def engine_of(model, **options):
    engine = DotProductEngine(model, **options)
    direction = {name: torch.ones_like(each) for name, each in model.named_parameters()}
    engine.add_direction("ones", direction)
    return engine


def train(model, optimizer, engine, wrapper):
    """Make a step of two batches and one of a third; `wrapper` makes them if there is one."""
    values = InRunValues(engine, wrapper or optimizer)
    with engine, values:
        for at in range(3):
            if wrapper is not None:
                wrapper.synchronises = at > 0
            with engine.batch([2 * at, 2 * at + 1]):
                losses(model, at).sum().backward()
            if wrapper is not None or at > 0:
                (wrapper or optimizer).step()
                (wrapper or optimizer).zero_grad()
    assert values.steps == 2
    assert values.skipped_batches == 0
    return values.to_dict()


@pytest.mark.parametrize("name", WRAPPERS)
def test_accumulation_that_the_wrapper_counts(name, mlp):
    state = {key: value.clone() for key, value in mlp.state_dict().items()}
    optimizer = torch.optim.SGD(mlp.parameters(), lr=0.1)
    expected = train(mlp, optimizer, engine_of(mlp), None)
    mlp.load_state_dict(state)
    wrapped = WRAPPERS[name](torch.optim.SGD(mlp.parameters(), lr=0.1))
    assert train(mlp, None, engine_of(mlp), wrapped) == expected
    assert len(expected) == 6


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", WRAPPERS)
def test_steps_that_the_scaler_skips_are_none(name, fused, mlp):
    """A fused optimizer is called for these steps, and skips them itself."""
    mlp.float()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-120)
    optimizer = torch.optim.SGD(mlp.parameters(), lr=0.1, fused=fused)
    wrapped = WRAPPERS[name](optimizer, scaler)
    wrapped.synchronises = True
    engine = engine_of(mlp, grad_scaler=scaler)
    before = mlp[0].weight.detach().clone()
    with engine, InRunValues(engine, wrapped) as values:
        for at in range(2):
            wrapped.zero_grad()
            with engine.batch([2 * at, 2 * at + 1]):
                scaler.scale(100 * losses(mlp, 1).sum()).backward()
            wrapped.step()
            assert torch.equal(before, mlp[0].weight) == (at == 0)
    assert values.steps == 1
    assert values.skipped_batches == 1
    assert values.to_dict().keys() == {2, 3}
    assert torch.tensor(list(values.to_dict().values())).isfinite().all()


def test_what_tells_of_no_steps_is_refused(mlp):
    class Stepper:
        def step(self):
            raise AssertionError

    with pytest.raises(CaptureError, match="Stepper does not tell of its steps"):
        InRunValues(engine_of(mlp), Stepper())
    with pytest.raises(CaptureError, match="Wrapper does not tell of its steps"):
        InRunValues(engine_of(mlp), Wrapper(Stepper()))


def test_closing_leaves_the_wrapped_optimizer_as_it_was(mlp):
    optimizer = torch.optim.SGD(mlp.parameters(), lr=0.1)
    InRunValues(engine_of(mlp), Wrapper(optimizer)).close()
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
