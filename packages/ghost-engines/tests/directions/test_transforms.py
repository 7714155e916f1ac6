"""What is made of directions, against autograd's own Hessian and torch's own steps."""

import copy

import pytest
import torch
from engine_kit import gradient, squares, train

from ghost_core import CaptureError
from ghost_core.testing import assert_within, per_sample_gradients
from ghost_engines import DotProductEngine, adam_aware, second_order, unit_norm


def loss_of(mlp, inputs):
    return lambda: squares(torch.tanh(mlp(inputs + 1))).mean()


def flat(tensors):
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def hessian(mlp, loss):
    """Return the Hessian of a loss over all parameters in order of their names."""
    named = dict(mlp.named_parameters())
    leaves = [named[name] for name in sorted(named)]
    slopes = torch.autograd.grad(loss(), leaves, create_graph=True)
    rows = [
        torch.cat([row.flatten() for row in torch.autograd.grad(each, leaves, retain_graph=True)])
        for each in torch.cat([slope.flatten() for slope in slopes])
    ]
    return torch.stack(rows)


@pytest.mark.parametrize("late", [False, True])
def test_second_order_adds_half_the_curvature_along_a_step(late, mlp, inputs, draw_directions):
    step, loss = draw_directions(mlp, 1)["random 0"], loss_of(mlp, inputs)
    engine = DotProductEngine(mlp)
    engine.add_direction("plain", loss)
    engine.add_direction("curved", loss, transform=second_order((lambda: step) if late else step))
    expected = flat(gradient(mlp, loss())) + hessian(mlp, loss) @ flat(step) / 2
    assert_within(flat(engine.direction("curved")), expected, expected.norm())
    slopes = per_sample_gradients(mlp, squares(mlp(inputs)))
    rows = torch.cat([slopes[name].flatten(1) for name in sorted(slopes)], 1)
    scores = train(engine, mlp, inputs)
    assert_within(scores.total[:, 1], rows @ expected, rows.norm(dim=1) * expected.norm())
    assert not torch.allclose(scores.total[:, 0], scores.total[:, 1], rtol=1e-3)


def test_second_order_of_a_linear_loss_is_its_gradient(mlp, inputs, draw_directions):
    head = mlp[2]
    engine = DotProductEngine(mlp, layers="2")
    step = {name: torch.ones_like(each) for name, each in head.named_parameters(prefix="2")}
    engine.add_direction("linear", lambda: mlp(inputs).sum(), transform=second_order(step))
    engine.add_direction("plain", lambda: mlp(inputs).sum())
    assert flat(engine.direction("linear")).equal(flat(engine.direction("plain")))


@pytest.mark.parametrize("shape", [None, (1,)])
def test_a_step_that_is_none_of_the_parameters_is_refused(mlp, inputs, draw_directions, shape):
    step = dict(draw_directions(mlp, 1)["random 0"])
    name = next(iter(step))
    del step[name]
    if shape is not None:
        step[name] = torch.ones(shape, dtype=torch.float64)
    engine = DotProductEngine(mlp)
    engine.add_direction("curved", loss_of(mlp, inputs))
    with pytest.raises(CaptureError, match=f"'curved, along a step' has .* for {name}"):
        engine.curvature("curved", step)


def test_tensors_have_no_second_order(mlp, draw_directions):
    engine, step = DotProductEngine(mlp), draw_directions(mlp, 1)["random 0"]
    engine.add_direction("given", step, transform=second_order(step))
    with pytest.raises(CaptureError, match=r"no second order.*\nReason: it was given as tensors"):
        engine.direction("given")
    engine.add_direction("given", lambda: step, transform=second_order(step))
    with pytest.raises(CaptureError, match="'given' has no second order"):
        engine.direction("given")


def test_unit_norm(mlp, inputs):
    engine = DotProductEngine(mlp)
    engine.add_direction("unit", loss_of(mlp, inputs), transform=unit_norm)
    expected = flat(gradient(mlp, loss_of(mlp, inputs)()))
    assert_within(flat(engine.direction("unit")), expected / expected.norm(), torch.ones(()))
    zeros = {name: torch.zeros_like(each) for name, each in mlp.named_parameters()}
    engine.add_direction("zero", zeros, transform=unit_norm)
    with pytest.raises(CaptureError, match="zeros"):
        engine.direction("zero")


def moments(optimizer):
    """Let second moments stay as they are: many steps were made, and none changes them by much."""
    for group in optimizer.param_groups:
        group["betas"] = (1 - 1e-6, 1 - 1e-15)
        for leaf in group["params"]:
            v = (1 + torch.rand_like(leaf)) * 1e-3  # of 1e6 (1 + ...): gradients are small to it
            optimizer.state[leaf] = {
                "step": torch.tensor(1e6),
                "exp_avg": torch.zeros_like(leaf),
                "exp_avg_sq": v,
                "max_exp_avg_sq": 2 * v,
            }


def stepped(mlp, optimizer, slopes):
    """Return where a step of an optimizer leads, from a copy of all."""
    model = copy.deepcopy(mlp)
    group = optimizer.param_groups[0]
    other = type(optimizer)(model.parameters(), lr=group["lr"], amsgrad=group["amsgrad"])
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for name, leaf in model.named_parameters():
        leaf.grad = slopes[name].clone()
    other.step()
    return {name: leaf.detach() for name, leaf in model.named_parameters()}


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_adam_aware_dots_are_parts_of_a_step_that_adam_makes(kind, amsgrad, mlp, inputs):
    """The oracle is torch's optimizer: two steps, with and without a sample's contribution."""
    optimizer = kind(mlp.parameters(), lr=1.0, amsgrad=amsgrad)
    moments(optimizer)
    engine = DotProductEngine(mlp)
    loss = loss_of(mlp, inputs)
    engine.add_direction("adam", loss, transform=adam_aware(optimizer))
    scores = train(engine, mlp, inputs)
    each = per_sample_gradients(mlp, squares(mlp(inputs)))
    direction = gradient(mlp, loss())
    whole = stepped(mlp, optimizer, {name: rows.sum(0) for name, rows in each.items()})
    for sample in range(len(inputs)):
        rest = {name: rows.sum(0) - rows[sample] for name, rows in each.items()}
        without = stepped(mlp, optimizer, rest)
        expected = sum(((without[n] - whole[n]) * direction[n]).sum() for n in direction)
        assert scores.total[sample, 0].item() == pytest.approx(expected.item(), rel=1e-4)


def test_adam_aware_says_once_that_there_are_no_moments_yet(mlp, inputs, caplog):
    optimizer = torch.optim.AdamW(mlp.parameters())
    engine = DotProductEngine(mlp)
    engine.add_direction("adam", loss_of(mlp, inputs), transform=adam_aware(optimizer))
    for _ in range(2):
        assert not train(engine, mlp, inputs).total.any()
    assert caplog.text.count("made no step yet") == 1
    optimizer.step()
    assert train(engine, mlp, inputs).total.all()


def test_adam_aware_follows_wrappers_and_refuses_others(mlp):
    class Wrapper:
        def __init__(self, optimizer):
            self.optimizer = optimizer

    assert callable(adam_aware(Wrapper(torch.optim.Adam(mlp.parameters()))))
    for other in (torch.optim.SGD(mlp.parameters()), object()):
        with pytest.raises(CaptureError, match="Adam and AdamW, not for"):
            adam_aware(other)


def test_a_users_function_is_given_the_direction(mlp, inputs):
    def masked(found):
        assert isinstance(found, dict)
        assert found.leaves.keys() == found.keys()
        return {name: each * ("bias" not in name) for name, each in found.items()}

    engine = DotProductEngine(mlp)
    engine.add_direction("masked", loss_of(mlp, inputs), transform=masked)
    expected = gradient(mlp, loss_of(mlp, inputs)())
    for name, tensor in engine.direction("masked").items():
        assert torch.equal(tensor, expected[name] * ("bias" not in name))


def test_transforms_follow_one_another(mlp, inputs, draw_directions):
    step = draw_directions(mlp, 1)["random 0"]
    engine = DotProductEngine(mlp)
    loss = loss_of(mlp, inputs)
    engine.add_direction("both", loss, transform=lambda g: unit_norm(second_order(step)(g)))
    engine.add_direction("curved", loss, transform=second_order(step))
    expected = flat(engine.direction("curved"))
    assert_within(flat(engine.direction("both")), expected / expected.norm(), torch.ones(()))


def test_transforms_of_tensors_are_renewed(mlp, inputs, draw_directions):
    calls = []

    def counted(found):
        calls.append(1)
        return {name: each * len(calls) for name, each in found.items()}

    given = draw_directions(mlp, 1)["random 0"]
    engine = DotProductEngine(mlp)
    engine.add_direction("given", given, transform=counted, refresh=2)
    seen = []
    for _ in range(4):
        train(engine, mlp, inputs)
        seen.append(flat(engine.direction("given")))
    assert len(calls) == 2
    for each, factor in zip(seen, (1, 1, 2, 2), strict=True):
        assert torch.equal(each, factor * flat(given))


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (lambda found: None, "a tensor for each of 0.bias, .*, not None"),
        (lambda found: {"0.bias": found["0.bias"]}, "not of 0.bias"),
        (lambda found: {name: each.sum() for name, each in found.items()}, r"shape \(7,\) for"),
        (lambda found: {name: each / 0 for name, each in found.items()}, "is not finite at"),
        (lambda found: dict.fromkeys(found, 1.0), r"a tensor of shape \(7,\) for"),
    ],
    ids=["nothing", "missing", "shape", "not finite", "numbers"],
)
def test_what_transforms_return_is_checked(transform, message, mlp, inputs):
    engine = DotProductEngine(mlp)
    engine.add_direction("wrong", loss_of(mlp, inputs), transform=transform)
    with pytest.raises(CaptureError, match=f"direction 'wrong'.*{message}"):
        train(engine, mlp, inputs)


def test_a_transform_must_be_a_function(mlp, inputs):
    with pytest.raises(CaptureError, match="a function of a direction, not str"):
        DotProductEngine(mlp).add_direction("x", loss_of(mlp, inputs), transform="unit")
