"""What a foreign pattern is, and how ghost's answer to it is compared with autograd's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ghost_core import GhostError
from ghost_core.testing import GradientHolder, assert_within, per_sample_gradients
from ghost_core.testing.snapshots import assert_untouched, seeded, traces

Batch = Mapping[str, Any]
"""Inputs of the model by name, and what else its losses need."""

WAYS = ("attached", "frozen", "verify")
"""The three ways to the same numbers."""

FLOOR = 1e-12
"""Gradients below this part of a sample's whole gradient are rounding."""


@dataclass(frozen=True)
class Foreign:
    """A pattern of other people's code, tiny and random.

    Attributes:
        name: Where it comes from, and what is special about it.
        make_model: Makes the model, in float32; it is compared in float64.
        make_batch: Makes a batch of N samples.
        per_sample_loss: Runs the model on a batch and returns one loss per sample, `[N]`.
        n: Number of samples N.
        options: Options of the engine.
        owners: Keys of the batch that `row_owner` names and the model is not given by keyword.
        training: Whether the model is in training mode.
        everyday: Whether it is among the most used, and compared in the default tests.
    """

    name: str
    make_model: Callable[[], nn.Module]
    make_batch: Callable[[int], Batch]
    per_sample_loss: Callable[[nn.Module, Batch], Tensor]
    n: int = 4
    options: Mapping[str, Any] = field(default_factory=dict)
    owners: tuple[str, ...] = ()
    training: bool = False
    everyday: bool = False

    def case(self) -> Case:
        """Make the model and a batch, in float64."""
        with seeded(0):
            model = shuffled(self.make_model()).double().train(self.training)
            batch = {name: widened(value) for name, value in self.make_batch(self.n).items()}
        return Case(self, model, batch)


@dataclass(frozen=True)
class Case:
    """A foreign model and a batch of N samples for it."""

    foreign: Foreign
    model: nn.Module
    batch: Batch

    def losses(self) -> Tensor:
        """Run the model and return one loss per sample, `[N]`; the same numbers every time."""
        with seeded(1):
            losses = self.foreign.per_sample_loss(self.model, self.batch)
        assert losses.shape == (self.foreign.n,)
        assert losses.dtype == torch.float64
        return losses

    def reference(self) -> dict[str, Tensor]:
        """Return the gradients `[N, *shape]` of one autograd call per sample, without hooks."""
        return per_sample_gradients(self.model, self.losses())

    def trained(self) -> dict[str, Tensor | None]:
        """Return what a backward pass leaves in `.grad`, by parameter name, and clear it."""
        self.losses().sum().backward()
        return self._taken()

    def held(self, *, frozen: bool) -> tuple[dict[str, Tensor], dict[str, Tensor | None]]:
        """Return ghost's gradients `[N, *shape]` and what it left in `.grad`."""
        engine = GradientHolder(self.model, **self.foreign.options)
        owners = {key: self.batch[key] for key in self.foreign.owners}
        attached = engine.frozen() if frozen else engine
        with attached, engine.batch(range(self.foreign.n), owners=owners) as batch:
            self.losses().sum().backward()
        assert batch.verified
        return batch.result.materialize(), self._taken()

    def verify(self) -> None:
        """Let the engine compare itself with autograd."""
        engine = GradientHolder(self.model, **self.foreign.options)
        owners = {key: self.batch[key] for key in self.foreign.owners}
        engine.verify(self.losses, owners=owners).raise_if_wrong()

    def _taken(self) -> dict[str, Tensor | None]:
        gradients = {name: each.grad for name, each in self.model.named_parameters()}
        self.model.zero_grad()
        return gradients


def check(foreign: Foreign, way: str) -> None:
    """Assert that one way gives autograd's numbers for every parameter, and leaves no trace.

    Raises:
        AssertionError: Where numbers, or the training, are others.
        GhostError: Where the model is refused.
    """
    case = foreign.case()
    expected, plain, found = case.reference(), case.trained(), traces(case.model)
    assert_tells(expected)
    try:
        if way == "verify":
            case.verify()
        else:
            held, trained = case.held(frozen=way == "frozen")
            assert_same(held, expected)
            if way == "attached":
                assert_same_training(trained, plain)
    finally:
        assert_untouched(found, case.model, way)


def outcome(foreign: Foreign, way: str) -> str:
    """Return `exact`, or what else becomes of a pattern with the first line of the reason."""
    try:
        check(foreign, way)
    except AssertionError as error:
        return f"wrong: {_first_line(error)}"
    except GhostError as error:
        return f"refused: {_first_line(error)}"
    except Exception as error:  # what must not happen, and is reported
        return f"crashed: {type(error).__name__}: {_first_line(error)}"
    return "exact"


def assert_same(held: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Assert that gradients `[N, *shape]` are as expected, relative to each sample's whole one."""
    assert held.keys() == expected.keys()
    whole = sample_norms(expected)
    for name, gradient in expected.items():
        own = row_norms(gradient)
        scale = torch.where(own > FLOOR * whole, own, whole)
        shaped = scale.reshape(-1, *[1] * (gradient.dim() - 1))
        assert_within(held[name], gradient, shaped, 1e-9, name)


def assert_same_training(
    trained: Mapping[str, Tensor | None], plain: Mapping[str, Tensor | None]
) -> None:
    """Assert that `.grad` is bit by bit what it is without ghost, None included."""
    for name, gradient in plain.items():
        got = trained[name]
        same = got is gradient if got is None or gradient is None else identical(got, gradient)
        assert same, f".grad of {name} is not what it is without ghost"


def assert_tells(expected: Mapping[str, Tensor]) -> None:
    """Assert that the batch tells wrong numbers from right ones: samples' gradients differ."""
    whole = sample_norms(expected)
    assert (whole > 0).all(), "a sample has no gradient"
    moving = [g for g in expected.values() if (row_norms(g) > FLOOR * whole).any()]
    assert moving, "no parameter has a gradient"
    assert not any(
        all(torch.equal(g[0], g[other]) for g in moving) for other in range(1, len(whole))
    )


def sample_norms(gradients: Mapping[str, Tensor]) -> Tensor:
    """Return the norm of each sample's whole gradient, `[N]`."""
    return torch.stack([row_norms(gradient) for gradient in gradients.values()]).norm(dim=0)


def row_norms(gradient: Tensor) -> Tensor:
    """Return the norm of each row, `[N, *shape]` to `[N]`."""
    return gradient.reshape(len(gradient), -1).norm(dim=1)


def identical(first: Tensor, second: Tensor) -> bool:
    """Tell whether two gradients are equal bit by bit, sparse ones too."""
    if first.layout is not second.layout:
        return False
    return torch.equal(first.to_dense(), second.to_dense())


def shuffled(model: nn.Module) -> nn.Module:
    """Move parameters away from zeros and ones, behind which gradients may vanish."""
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def widened(value: Any) -> Any:
    """Return a floating tensor in float64, and anything else as it is."""
    is_floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.double() if is_floating else value


def curved(values: Tensor) -> Tensor:
    """Return a loss per sample, `[N, ...]` to `[N]`, whose slope differs for every element."""
    flat = values.flatten(1)
    slopes = torch.linspace(0.5, 1.5, flat.shape[1], dtype=flat.dtype)
    return (torch.sin(flat * slopes) + 0.3 * flat.square() * slopes.flip(0)).sum(1)


def tokens(n: int, length: int, vocabulary: int = 11) -> Tensor:
    """Return N rows of T token ids."""
    return torch.randint(vocabulary, (n, length))


def next_token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Return the mean loss of each row's next tokens, `[N, T, V]` to `[N]`."""
    each = nn.functional.cross_entropy(logits[:, :-1].mT, ids[:, 1:], reduction="none")
    return each.mean(1)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]
