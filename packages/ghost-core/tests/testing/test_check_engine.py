"""The conformance test of engines passes what is right, and sees each fault."""

import copy
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ghost_core.testing
from ghost_core import Batch, Engine, Freeze, Pass, PerSampleGradient, TrackedParameter
from ghost_core.testing import (
    GradientHolder,
    Held,
    TinyTransformer,
    check_engine,
    plain_registry,
)


def hold(model: nn.Module, **options: object) -> GradientHolder:
    return GradientHolder(model, registry=plain_registry(), **options)


class Norms(Engine[Tensor]):
    """Squared norms per sample, of each use for itself."""

    def on_start(self, batch: Batch[Tensor]) -> None:
        self._total = torch.zeros(batch.n)

    def on_gradient(
        self, pass_: Pass, parameter: TrackedParameter, gradient: PerSampleGradient
    ) -> Tensor | None:
        self._total[pass_.samples] += gradient.paired(gradient)
        return None

    def on_end(self, batch: Batch[Tensor]) -> Tensor:
        return self._total


class Fused(Norms):
    """Makes the weight gradients as well."""

    freeze = Freeze.CALL

    def on_gradient(
        self, pass_: Pass, parameter: TrackedParameter, gradient: PerSampleGradient
    ) -> Tensor:
        super().on_gradient(pass_, parameter, gradient)
        return gradient.sum()


def make(kind: type[Engine]) -> Callable[[nn.Module], Engine]:
    return lambda model: kind(model, registry=plain_registry())


def test_engines_without_faults_pass() -> None:
    check_engine(hold, covers=lambda held: held.n, result_holds_capture=True, steps=3)
    check_engine(make(Norms), steps=3)
    check_engine(make(Fused), gradient_error=1e-5, steps=2)


class Scales(Norms):
    """Doubles a gradient on its way."""

    def on_gradient(
        self, pass_: Pass, parameter: TrackedParameter, gradient: PerSampleGradient
    ) -> Tensor | None:
        if parameter.name == "attend.bias":
            gradient.terms.mul_(2)
        return super().on_gradient(pass_, parameter, gradient)


class Draws(Norms):
    """Uses a global random number generator."""

    source = staticmethod(torch.rand)

    def on_start(self, batch: Batch[Tensor]) -> None:
        super().on_start(batch)
        self.source(1)


class DrawsNumpy(Draws):
    source = staticmethod(np.random.rand)


class DrawsPython(Draws):
    source = staticmethod(random.getrandbits)


class Hoards(Norms):
    """Keeps gradients."""

    def __init__(self, model: nn.Module, **options: object) -> None:
        super().__init__(model, **options)
        self.kept: list[PerSampleGradient] = []

    def on_gradient(
        self, pass_: Pass, parameter: TrackedParameter, gradient: PerSampleGradient
    ) -> Tensor | None:
        self.kept.append(gradient)
        return super().on_gradient(pass_, parameter, gradient)


class Counts(Hoards):
    """Keeps something small of every batch."""

    def on_gradient(
        self, pass_: Pass, parameter: TrackedParameter, gradient: PerSampleGradient
    ) -> Tensor | None:
        result = super().on_gradient(pass_, parameter, gradient)
        self.kept[-1] = self._total.clone()
        return result


class Hooks(Norms):
    """Leaves a hook behind."""

    def on_start(self, batch: Batch[Tensor]) -> None:
        super().on_start(batch)
        self.model.attend.register_forward_hook(lambda *_: None)


class Marks(Norms):
    """Hangs state on a parameter."""

    def on_start(self, batch: Batch[Tensor]) -> None:
        super().on_start(batch)
        self.model.attend.weight.seen = True


class Freezes(Norms):
    """Freezes a parameter for good."""

    def on_end(self, batch: Batch[Tensor]) -> Tensor:
        self.model.attend.bias.requires_grad_(False)
        return super().on_end(batch)


class Short(Norms):
    """Loses a row."""

    def on_end(self, batch: Batch[Tensor]) -> Tensor:
        return super().on_end(batch)[1:]


class TakesAll(Norms):
    """Takes any option."""

    def __new__(cls, *_: object, **options: object) -> "TakesAll":
        return object.__new__(cls)

    def __init__(self, model: nn.Module, **options: object) -> None:
        super().__init__(model, registry=plain_registry())


class FusedWrongly(Fused):
    """Makes gradients that are too large."""

    def on_gradient(
        self, pass_: Pass, parameter: TrackedParameter, gradient: PerSampleGradient
    ) -> Tensor:
        return 1.01 * super().on_gradient(pass_, parameter, gradient)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Scales, "changed training: .* differs by up to|do not add up to the gradient"),
        (Fused, "changed training|two engines"),
        (Draws, "drew from the generator of torch"),
        (DrawsNumpy, "drew from the generator of numpy"),
        (DrawsPython, "drew from the generator of python"),
        (Hoards, "captured tensors are alive: .*gradient of"),
        (Counts, "memory grows"),
        (Hooks, "_forward_hooks of attend changed"),
        (Marks, "attributes of attend.weight changed"),
        (Freezes, "requires_grad of attend.bias changed|no longer require"),
        (Short, "holds no tensor with 64 rows"),
        (TakesAll, "takes an option that does not exist"),
    ],
)
def test_a_fault_in_an_engine(kind: type[Engine], message: str) -> None:
    with pytest.raises((AssertionError, ghost_core.GhostError), match=message):
        check_engine(make(kind), steps=2)


def test_a_fault_in_an_engine_that_makes_gradients() -> None:
    with pytest.raises(AssertionError, match=r"in float32, \S+\.grad: .* entries are off"):
        check_engine(make(FusedWrongly), gradient_error=1e-5, steps=2)
    check_engine(make(FusedWrongly), gradient_error=None, steps=2)


def test_rows_can_be_counted_by_the_caller() -> None:
    with pytest.raises(AssertionError, match="covers 63 samples of 64"):
        check_engine(make(Norms), covers=lambda norms: len(norms) - 1, steps=2)


def test_what_the_holder_holds() -> None:
    model, x = nn.Sequential(nn.Linear(2, 2)).double(), torch.randn(3, 2, dtype=torch.float64)
    engine = hold(model)
    with engine, engine.batch([5, 6, 7]) as batch:
        model(x).sum().backward()
    held = batch.result
    assert isinstance(held, Held)
    assert held.n == 3
    assert held.uses.keys() == {"0.bias", "0.weight"}
    assert held.uses["0.weight"][0].samples == slice(0, 3)
    torch.testing.assert_close(held.materialize()["0.weight"], x[:, None].expand(3, 2, 2))


def test_the_tiny_transformer_is_as_it_says() -> None:
    model = TinyTransformer()
    assert model(torch.randint(0, 19, (2, 8))).shape == (2, 8, 19)
    assert model.head.weight is model.tokens.weight
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["last.bias"]
    twin = copy.deepcopy(model)
    assert twin.head.weight is twin.tokens.weight
