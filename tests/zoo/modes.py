"""Compares the modes of the dot product engine on a case with autograd."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from tests.zoo.compare import EXACT, FLOAT32, ROUNDING, matches, training_gradients
from tests.zoo.family import Case
from torch import Tensor

from ghost_core.testing import assert_within, per_sample_gradients
from ghost_core.testing.oracle import norms
from ghost_core.tracking import as_patterns
from ghost_engines import DotProductEngine, Scores

Gradients = Mapping[str, Tensor]

MODES = ("exact", "fused", "concatenated")
"""Every mode by name."""

MADE_BY_ENGINE = 1e-12
"""How far `.grad` may be off that of plain training, relative to its samples' norms, in float64."""

SUMMED_IN_FLOAT32 = ("*.mixer.A_log", "*.mixer.D", "*.mixer.dt_proj.bias")
"""Parameters whose gradient is rounded to float32 on its way, by Mamba's own code: that of a sum is
not the sum of the samples' gradients. The engine adds up what is in float64."""

VALIDATION, VALIDATION_WEIGHT = 2, 0.5
"""How many samples are of validation in concatenated mode, and what their losses are weighted with.
"""


def compare_mode(case: Case, mode: str) -> None:
    """Assert that dots, norms and `.grad` of every trainable parameter are autograd's.

    Two batches of the same samples are compared: the first, which is probed, and one after it, in
    which autograd makes no weight gradient unless the mode is exact. In concatenated mode the last
    two samples are those of validation.
    """
    excluded = tuple(as_patterns(case.family.options.get("exclude", ())))
    own = per_sample_gradients(case.model, case.losses())
    own = {
        name: each.reshape(len(each), -1)
        for name, each in own.items()
        if not matches(name, excluded)
    }
    reference = (_concatenated if mode == "concatenated" else _beside)(case, own)
    engine = _engine(case, mode, reference.directions)
    with engine:
        for what in ("the first batch", "the next batch"):
            reference.check_scores(_scores(engine, case, mode, reference.n), what)
            reference.check_training(mode, what)


def _scores(engine: DotProductEngine, case: Case, mode: str, n: int) -> Scores:
    """Run a batch, and return what the engine makes of its n training samples."""
    concatenated = mode == "concatenated"
    if concatenated:  # the case's batch is joined already: the engine is told of the sizes
        engine.concatenate(torch.zeros(n, 1), torch.zeros(VALIDATION, 1))
    owners = {key: case.batch[key] for key in case.family.options.get("row_owner", {}).values()}
    with engine.batch(range(n), owners=owners) as batch:
        if concatenated:
            engine.backward(case.losses(), train_weight=1, validation_weight=VALIDATION_WEIGHT)
        else:
            case.losses().sum().backward()
    assert batch.verified
    return batch.result


@dataclass(frozen=True)
class Reference:
    """What autograd says.

    Attributes:
        case: The case, whose training samples come first.
        n: Number of training samples N.
        own: Gradients of the training samples, `[N, size]` by parameter name.
        directions: Directions, `[K, size]` by parameter name.
        trained: What plain training leaves in `.grad`, by name.
    """

    case: Case
    n: int
    own: Gradients
    directions: Gradients
    trained: Mapping[str, Tensor | None]

    @property
    def error(self) -> float:
        """Error allowed relative to norms."""
        return FLOAT32 if self.case.family.in_float32 else EXACT

    def scale(self, name: str) -> Tensor:
        """Return the norms of a parameter's gradients; of whole ones where it plays no part."""
        whole = torch.stack([norms(each) for each in self.own.values()]).norm(dim=0)
        family, own = self.case.family, norms(self.own[name])
        if matches(name, family.zero + family.unused):
            return whole
        assert (own > ROUNDING * whole).any(), f"{name}: nothing would be tested"
        return own

    def check_scores(self, scores: Scores, what: str) -> None:
        """Assert that dots and norms are those of the gradients."""
        assert scores.by_parameter.keys() == self.own.keys()
        assert scores.squared_norms is not None
        for name, rows in self.own.items():
            scale, columns = self.scale(name), self.directions[name].mT
            dots = rows.double() @ columns
            assert_within(
                scores.by_parameter[name].double(),
                dots,
                scale[:, None] * columns.norm(dim=0),
                self.error,
                f"{what}: dots of {name}",
            )
            assert_within(
                scores.squared_norms[name].double(),
                rows.double().square().sum(1),
                scale.square(),
                2 * self.error,
                f"{what}: norms of {name}",
            )

    def check_training(self, mode: str, what: str) -> None:
        """Assert that `.grad` is that of plain training, and clear it."""
        exact = mode == "exact"
        for name, parameter in self.case.model.named_parameters():
            wanted, found = self.trained[name], parameter.grad
            if exact and wanted is not None:
                assert torch.equal(found, wanted), f"{what}: {name}.grad changed"
            elif wanted is None:
                assert found is None or not found.any(), f"{what}: {name} got a gradient"
            else:
                scale = wanted.norm() if name not in self.own else self.scale(name).sum()
                rounded = self.case.family.in_float32 or matches(name, SUMMED_IN_FLOAT32)
                error = FLOAT32 if rounded else MADE_BY_ENGINE
                assert_within(found, wanted, scale, error, f"{what}: {name}.grad")
        self.case.model.zero_grad()


def _beside(case: Case, own: Gradients) -> Reference:
    """Take all samples for those of training, and random directions."""
    generator = torch.Generator().manual_seed(0)
    directions = {
        name: torch.randn(2, rows.shape[1], dtype=torch.float64, generator=generator).to(
            rows.device
        )
        for name, rows in own.items()
    }
    return Reference(case, case.n, own, directions, training_gradients(case))


def _concatenated(case: Case, own: Gradients) -> Reference:
    """Take the last samples for those of validation."""
    n = case.n - VALIDATION
    directions = {
        name: VALIDATION_WEIGHT * rows[n:].double().sum(0, keepdim=True)
        for name, rows in own.items()
    }
    case.losses()[:n].sum().backward()
    trained = {name: parameter.grad for name, parameter in case.model.named_parameters()}
    case.model.zero_grad()
    train = {name: rows[:n] for name, rows in own.items()}
    return Reference(case, n, train, directions, trained)


def _engine(case: Case, mode: str, directions: Gradients) -> DotProductEngine:
    """Make the engine; directions are its own in concatenated mode."""
    engine = DotProductEngine(case.model, mode=mode, norms=True, **case.family.options)
    if mode == "concatenated":
        return engine
    for at in range(2):
        parameters = dict(case.model.named_parameters())
        given = {
            name: each[at].reshape(parameters[name].shape) for name, each in directions.items()
        }
        engine.add_direction(f"random {at}", given)
    return engine
