"""The parameters that shared values may come from, each with what stands for it in one pass."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from torch import Tensor

from ghost_core._torch import base_of, direct_parameters, in_transform
from ghost_core.capture.ordinary import Owners
from ghost_core.capture.refusals import in_parts
from ghost_core.capture.sources import ParameterSource, Shared, Source
from ghost_core.capture.state import CaptureState
from ghost_core.split import Lift
from ghost_core.tracking import parameter_of


class Sources:
    """The sources of one pass.

    Args:
        state: What the hooks on the model share.

    Attributes:
        owners: The tracked parameters by identity.
    """

    def __init__(self, state: CaptureState) -> None:
        self._state = state
        self.owners: Owners = {}
        for tracked in state.tracked.values():
            direct = direct_parameters(tracked.module)
            for local, parameter in tracked.parameters.items():
                tensor = direct.get(local)
                if tensor is None:  # it is of a module inside
                    tensor = parameter_of(tracked.module, local)
                self.owners.setdefault(id(tensor), (tensor, tracked, parameter))
        self._made: dict[tuple[int, bool, Lift | None], ParameterSource] = {}
        self._labels: dict[Source, str] = {}

    def is_lifted(self, value: Tensor) -> bool:
        """Tell whether a parameter is used outside of the modules that own it."""
        _, _, parameter = self.owners[id(value)]
        return parameter.name not in self._state.owned()

    def of(self, value: Tensor, *, stand_in: bool) -> ParameterSource:
        """Return the source that a parameter is, or a leaf in its place that is not frozen.

        Raises:
            WrongSplitError: If it is used inside of a function of `torch.func`.
        """
        tensor, tracked, parameter = self.owners[id(value)]
        if in_transform():
            raise in_parts(f"{parameter.name} is used", parameter.name)
        lift = self._state.lift_of(parameter.name)
        key = id(value), stand_in, lift
        if key not in self._made:
            batch = self._state.batch
            assert batch is not None
            account = parameter.name
            if stand_in:
                tensor, account = tensor.detach().requires_grad_(), f"{account}, used elsewhere"
                account = self.watch(account, tensor)
                if lift is not None:
                    lift.accounts.add(account)
            elif self._state.flags:
                account += ", in a shared call"  # autograd makes no gradient to compare with
            self._made[key] = ParameterSource(tensor, parameter, account, self._state, batch, lift)
            self.label(self._made[key], tracked.name)
        return self._made[key]

    def whole(self, found: dict[int, Shared]) -> dict[int, Shared]:
        """Return shared values that are used, whole as they are.

        Raises:
            WrongSplitError: If they are used inside of a function of `torch.func`.
        """
        if found and in_transform():
            names = ",".join(self.names(found.values()))
            raise in_parts(f"what {names} computed is used", names)
        return found

    def watch(self, account: str, leaf: Tensor) -> str:
        """Compare what arrives for a leaf with its gradient: a use may go unseen."""
        balance = self._state.balance
        if balance is None:
            balance = self._state.compare({})
        return balance.watch(account, leaf)

    def settled(self, shared: Shared, lift: Lift) -> Shared:
        """Return a shared value that is followed for good, whatever becomes of a call."""
        sources: list[Source] = []
        for source in shared.sources:
            if isinstance(source, ParameterSource) and source.lift is lift:
                settled = replace(source, lift=None)
                self.label(settled, self._labels[source])
                sources.append(settled)
            else:
                sources.append(source)
        return Shared(shared.value, tuple(sources))

    def label(self, source: Source, name: str) -> None:
        """Note which module a source is of."""
        self._labels[source] = name

    def names(self, shared: Iterable[Shared]) -> tuple[str, ...]:
        """Return the modules whose parameters shared values come from."""
        labels = [self._labels[source] for each in shared for source in each.sources]
        return tuple(dict.fromkeys(labels))


def may_have_rows(shared: Shared, axis: int, n: int) -> bool:
    """Tell whether a value may have a row for each of n samples, as one that was expanded has.

    A part of a parameter has none, though it may have as many positions as there are samples.
    """
    value = shared.value
    size = value.shape[axis] if value.dim() > axis else 0
    if size != n or n == 1:
        return False
    return shared.narrow is not None or all(
        base_of(value) is not source.tensor for source in shared.sources
    )
