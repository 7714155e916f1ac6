"""Functions of ghost's own are put into graphs as `apply` does it."""

import pytest
import torch
from torch.func import vmap

from ghost_core._torch import applied


class Times(torch.autograd.Function):
    """Multiplies by a number that is no tensor."""

    @staticmethod
    def forward(ctx, factor, x, y):
        ctx.factor = factor
        ctx.save_for_backward(y)
        return factor * x * y

    @staticmethod
    def backward(ctx, grad):
        (y,) = ctx.saved_tensors
        return None, ctx.factor * grad * y, None


class Given(torch.autograd.Function):
    """Notes whether it was given what a transform wrapped."""

    @staticmethod
    def forward(ctx, _, x, y):
        ctx.wrapped = torch._C._functorch.is_functorch_wrapped_tensor(y)
        return x.detach()


def test_it_is_a_node_of_the_graph():
    x, y = torch.randn(3, requires_grad=True), torch.randn(3)
    made, expected = applied(Times, 2.0, x, y), Times.apply(2.0, x, y)
    assert torch.equal(made, expected)
    assert type(made.grad_fn) is type(expected.grad_fn)
    made.sum().backward()
    assert torch.equal(x.grad, 2 * y)


def test_it_is_refused_inside_of_a_transform_as_apply_is():
    with pytest.raises(RuntimeError, match="functorch transforms"):
        vmap(lambda x: applied(Times, 2.0, x, x))(torch.randn(3, 2))


def test_what_is_left_of_a_transform_is_given_as_the_tensor_that_it_was():
    left = []
    torch.func.grad(lambda x: left.append(x * 1) or x.sum())(torch.ones(3))
    x = torch.ones(3, requires_grad=True)
    given = [applied(Given, None, x, left[0]), Given.apply(None, x, left[0])]
    assert [made.grad_fn.wrapped for made in given] == [False, False]
