"""What users do with an attached model: they copy, pickle, hook and parametrise it."""

import contextlib
import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ghost_core import CaptureError, WrongSplitError
from ghost_core.testing import per_sample_gradients

from .reused import D, Exact, Hold, N, Reused, T, inputs, squares


def test_copies_of_the_model_are_left_alone(hold: Hold) -> None:
    model, x = Reused().double(), inputs()
    engine = hold(model)
    with engine, engine.batch(range(N)) as batch:
        average = copy.deepcopy(model)
        squares(model(x)).sum().backward()
        squares(average(inputs(7, T, D))).sum().backward()
    assert len(batch.result.uses["layer.weight"]) == 3
    assert torch.equal(average(x), model(x))


def test_the_model_can_be_pickled_while_attached(hold: Hold) -> None:
    model, x = Reused().double(), inputs()
    with hold(model):
        data = pickle.dumps(model)
    twin = pickle.loads(data)
    assert torch.equal(twin(x), model(x))


def test_hooks_of_the_user_change_inputs_and_outputs_as_before(assert_exact: Exact) -> None:
    model, x = Reused().double(), inputs()
    model.layer.register_forward_hook(lambda module, args, output: 2 * output)
    model.layer.register_forward_pre_hook(lambda module, args: (3 * args[0],))
    assert_exact(model, lambda: squares(model(x)))


def test_a_hook_that_changes_the_output_before_it_is_seen_is_not_ignored(
    hold: Hold, assert_held
) -> None:
    plain, x = Reused().double(), inputs()
    plain.layer.register_forward_hook(lambda module, args, output: 2 * output)
    expected = per_sample_gradients(plain, squares(plain(x)))
    model = Reused().double()
    model.load_state_dict(plain.state_dict())
    engine = hold(model)
    try:
        with engine, engine.batch(range(N)) as batch:
            model.layer.register_forward_hook(lambda module, args, output: 2 * output, prepend=True)
            squares(model(x)).sum().backward()
    except CaptureError:  # a refusal is as good
        return
    assert_held(batch.result, expected)


def test_backward_hooks_of_the_user_see_nothing_new(hold: Hold) -> None:
    model, x = Reused().double(), inputs().requires_grad_()
    seen: list[Tensor] = []
    model.layer.register_full_backward_hook(lambda module, gi, go: seen.append(go[0]))
    squares(model(x)).sum().backward()
    plain = list(seen)
    engine = hold(model)
    with engine, engine.batch(range(N)):
        squares(model(x)).sum().backward()
    torch.testing.assert_close(seen[len(plain) :], plain)


def test_hooks_on_gradients_of_parameters_are_refused(hold: Hold) -> None:
    model = Reused().double()
    model.layer.weight.register_hook(lambda gradient: 0 * gradient)
    engine = hold(model)
    with engine, pytest.raises(CaptureError, match=r"layer\.weight has a hook"):  # noqa: SIM117
        with engine.batch(range(N)):
            squares(model(inputs())).sum().backward()


def test_other_values_for_parameters_are_refused(hold: Hold) -> None:
    model = Reused().double()
    twice = {name: 2 * parameter for name, parameter in model.named_parameters()}
    engine = hold(model)
    with engine, pytest.raises(CaptureError, match="functional_call"), engine.batch(range(N)):
        torch.func.functional_call(model, twice, inputs()).sum().backward()


def test_backward_hooks_see_no_probe_in_any_pass_of_a_batch(hold: Hold, x: Tensor) -> None:
    """The second pass does something that no pass before it did, and the third one fails."""

    class Varies(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.layer = nn.Linear(3, 3), nn.Linear(3, 3)
            self.double()

        def forward(self, x: Tensor, way: int) -> Tensor:
            y = self.first(x)
            if way == 2:
                raise KeyError
            return self.layer(y.flip(1) if way else y)

    model, seen = Varies(), []
    model.first.register_full_backward_hook(lambda module, gi, go: seen.append(go[0].clone()))
    model.first.register_full_backward_pre_hook(lambda module, go: seen.append(go[0].clone()))

    def step() -> None:
        for way in (0, 1, 2, 0, 1, 1):
            with contextlib.suppress(KeyError):
                model(x.clone().requires_grad_(), way).square().sum().backward()

    step()
    expected, hooks = list(seen), list(model.first._backward_hooks.values())
    seen.clear()
    engine = hold(model)
    with engine, engine.batch(range(len(x))):
        step()
    assert len(seen) == len(expected)
    assert all(map(torch.equal, seen, expected))
    assert list(model.first._backward_hooks.values()) == hooks


PARTS: dict[str, Callable[[nn.Linear, Tensor], Tensor]] = {
    "called by row": lambda layer, y: torch.vmap(layer)(y),
    "its weight by row": lambda layer, y: torch.vmap(lambda row: row @ layer.weight)(y),
    "differentiated": lambda layer, y: torch.func.vjp(layer, y)[0],
    "its gradient": lambda layer, y: torch.func.grad(lambda z: layer(z).sin().sum())(y),
}


class TakenApart(nn.Module):
    def __init__(self, use: str) -> None:
        super().__init__()
        self.first, self.layer, self.use = nn.Linear(3, 3), nn.Linear(3, 3), use
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return PARTS[self.use](self.layer, self.first(x))


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("use", PARTS)
def test_what_runs_inside_of_torch_func_is_refused_by_name(
    hold: Hold, x: Tensor, use: str, frozen: bool, verify: bool
) -> None:
    said = r"(?s)layer.* inside of torch.vmap.*units=.*exclude='layer"
    engine = hold(model := TakenApart(use), verify=verify)
    with engine.frozen() if frozen else engine:
        for _ in range(2):
            with pytest.raises(WrongSplitError, match=said), engine.batch(range(len(x))):
                model(x).square().sum().backward()


def test_what_runs_inside_of_torch_func_without_gradients_is_let_be(
    hold: Hold, assert_held: Callable[..., None], x: Tensor
) -> None:
    class Looks(TakenApart):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                super().forward(x)
            return self.layer(self.first(x))

    model = Looks("called by row")
    expected = per_sample_gradients(model, model(x).square().sum(1))
    with hold(model) as engine, engine.batch(range(len(x))) as batch:
        model(x).square().sum().backward()
    assert_held(batch.result, expected)
