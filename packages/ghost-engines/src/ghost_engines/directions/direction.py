"""One direction of an engine: where it comes from, and when it is renewed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ghost_core import CaptureError, TrackedParameter
from ghost_core.arguments import whole
from ghost_core.ranks import ALONE, Ranks
from ghost_core.restoring import graphs_kept
from ghost_engines.directions.closures import Closure, ClosureSource, check_closure
from ghost_engines.directions.factored import FactoredDirection, Factors, Uses, sum_of
from ghost_engines.directions.given import finite, given, widened
from ghost_engines.directions.transforms import Gradient, Transform


@dataclass
class Direction:
    """One direction.

    Attributes:
        name: Its name.
        source: What calls the closure; None if it was given as tensors.
        fixed: The tensors that it was given as; empty if it has a closure.
        transform: What is done to them.
        ranks: The processes that train the model.
        refresh: Batches after which it is renewed; None for never.
        tensors: The direction by parameter name; empty before it was made.
        age: Batches since it was made.
        factored: How it was given, if factors of it are to be captured before each batch.
        uses: Those factors by name of the parameters that `tensors` lacks.
    """

    name: str
    source: ClosureSource | None
    fixed: Gradient
    transform: Transform | None
    refresh: int | None
    ranks: Ranks = ALONE
    tensors: dict[str, Tensor] = field(default_factory=dict)
    age: int = 0
    factored: FactoredDirection | None = None
    uses: dict[str, Uses] = field(default_factory=dict)
    _arrived: Factors | None = None

    def keep(self, factors: Factors) -> None:
        """Take the factors that were captured for the coming batch."""
        self._arrived = factors

    @property
    def due(self) -> bool:
        """Whether it is time to make it anew."""
        return not self.tensors or (self.refresh is not None and self.age >= self.refresh)

    def renew(self) -> bool:
        """Make it anew if it is time to, and count the batch.

        Returns:
            Whether the direction changed.
        """
        if due := self.due:
            arrived, self._arrived = self._arrived, None
            self.uses = {} if arrived is None else dict(arrived.uses)
            self.tensors = self._made() if arrived is None else self._built(arrived)
            self.age = 0
        self.age += 1
        return due

    def curvature(self, step: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return `H step` with the Hessian of its loss.

        Raises:
            CaptureError: If it has none, or was transformed.
        """
        if self.transform is not None or self.source is None:
            raise CaptureError(
                f"direction {self.name!r} has no second order",
                reason="it was transformed, or given as tensors",
                remedy="give a closure that returns the loss, without a transform",
            )
        return self.source.curvature(step)

    def current(self) -> dict[str, Tensor]:
        """Return it as it is, or would be."""
        if not self.tensors and not self.uses:
            return self._made()
        built = self.tensors | {name: sum_of(uses) for name, uses in self.uses.items()}
        return {name: built[name] for name in self.fixed.leaves}

    def _built(self, factors: Factors) -> dict[str, Tensor]:
        """Return what was built, and refuse what is not finite, of factors too."""
        finite(
            self.name,
            {
                f"{name} ({at})": each
                for name, uses in factors.uses.items()
                for use in uses
                for at, each in (*use.factor.tensors().items(), ("gradient", use.grad))
            },
        )
        return finite(self.name, {key: widened(each) for key, each in factors.sums.items()})

    def _made(self) -> dict[str, Tensor]:
        raw = self.fixed
        if self.source is not None:
            raw = Gradient(self.source.tensors(), self.source, self.fixed.leaves)
        else:
            self.ranks.all_or_none(f"direction {self.name!r}", lambda: raw, _described)
        if self.transform is None:
            return dict(raw)
        with graphs_kept(False):
            made = self.transform(raw)
        return self._checked(made)

    def _checked(self, made: Any) -> dict[str, Tensor]:
        """Refuse what is no direction for the same parameters."""
        leaves = self.fixed.leaves
        if not isinstance(made, Mapping) or made.keys() != leaves.keys():
            got = f"of {', '.join(map(str, made))}" if isinstance(made, Mapping) else repr(made)
            raise CaptureError(
                f"direction {self.name!r}: the transform must return a tensor for each of "
                f"{', '.join(leaves)}, not {got}"
            )
        for key, tensor in made.items():
            if not isinstance(tensor, Tensor) or tensor.shape != leaves[key].shape:
                raise CaptureError(
                    f"direction {self.name!r}: the transform must return a tensor of shape "
                    f"{tuple(leaves[key].shape)} for {key}"
                )
        return finite(self.name, {key: widened(made[key].detach()) for key in leaves})

    def state_dict(self) -> dict[str, Any]:
        """Return what another process needs to go on as this one would."""
        kept = self.refresh is not None and self.refresh > 1
        # Copies: each is a part of what all directions share, and would bring all of that along.
        tensors = {name: each.clone() for name, each in self.tensors.items()} if kept else {}
        return {"age": self.age, "tensors": tensors}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on as the process did whose state it is."""
        self.age = state["age"]
        leaves = self.fixed.leaves
        self.tensors = {
            name: tensor.to(leaves[name].device, copy=True)
            for name, tensor in state["tensors"].items()
        }


def direction_of(
    name: str,
    given_as: Closure | FactoredDirection | Mapping[str, Tensor],
    model: nn.Module,
    parameters: Iterable[TrackedParameter],
    *,
    refresh: int | None,
    transform: Transform | None,
    training: bool,
    ranks: Ranks = ALONE,
    factors: bool = False,
) -> Direction:
    """Return a direction; see `ScoringEngine.add_direction`.

    Raises:
        UnknownNameError: If a name is no parameter of the model.
        CaptureError: If a tracked parameter is missing, a shape or value is wrong, the closure
            takes arguments, or an option does not go with what is given.
    """
    parameters = tuple(parameters)
    leaves = {each.name: model.get_parameter(each.name) for each in parameters}
    every = None if refresh is None else whole("refresh", refresh, least=1)
    if transform is not None and not callable(transform):
        raise CaptureError(
            f"direction {name!r}: transform must be a function of a direction, not "
            f"{type(transform).__name__}"
        )
    if isinstance(given_as, Mapping):
        if training:
            raise CaptureError("training=True goes with a closure; tensors call no model")
        if every is not None and transform is None:
            raise CaptureError("refresh goes with a closure; tensors stay as they are")
        fixed = Gradient(given(name, ranks.inside(given_as), model, parameters), None, leaves)
        renewed = (every or 1) if transform else None
        return Direction(name, None, fixed, transform, renewed, ranks)
    factored = given_as if isinstance(given_as, FactoredDirection) else None
    closure = given_as if factored is None else factored.loss
    if callable(closure):
        check_closure(name, closure)
        if factored is not None:
            factored = _kept(name, factored, every, transform, ranks, factors)
        source = ClosureSource(name, closure, model, parameters, training, ranks)
        fixed = Gradient({}, source, leaves)
        return Direction(name, source, fixed, transform, every or 1, ranks, factored=factored)
    raise CaptureError(
        f"direction {name!r} must be a closure or a mapping of tensors, not "
        f"{type(given_as).__name__}"
    )


def _kept(
    name: str,
    factored: FactoredDirection,
    refresh: int | None,
    transform: Transform | None,
    ranks: Ranks,
    factors: bool,
) -> FactoredDirection | None:
    """Return how factors are to be kept; None if the direction is to be built.

    Raises:
        CaptureError: If factors are asked for where there can be none.
    """
    if refresh not in (None, 1) and factored.keep != "built":
        raise CaptureError(
            f"direction {name!r}: factors are captured before each batch, and refresh={refresh} "
            "would keep them for longer",
            reason="they are no tensors by parameter name, which a state could be saved with",
            remedy="give the loss itself as a closure, or leave refresh out",
        )
    why = [
        reason
        for hindered, reason in (
            (transform is not None, "a transform needs the direction itself"),
            (ranks.several, "each process would have factors of its own, and they average"),
            (not factors, "this engine needs the direction itself"),
        )
        if hindered
    ]
    if why and factored.keep == "factors":
        raise CaptureError(
            f"direction {name!r} cannot be kept as factors",
            reason=why[0],
            remedy="use keep='cheaper', which builds it here, or a DotProductEngine by sample",
        )
    return None if why or factored.keep == "built" else factored


def _described(tensors: Mapping[str, Tensor]) -> list[tuple[str, float]]:
    """Return what tells whether tensors are those that another process has."""
    return [(name, each.sum(dtype=torch.float64).item()) for name, each in tensors.items()]
