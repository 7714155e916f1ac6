"""The processes that train one model together, as far as its wrapper tells."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar
from zlib import crc32

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from ghost_core._distributed import calling_wrapper, is_joining, unreduced
from ghost_core.errors import CaptureError

_Made = TypeVar("_Made")

_FAILED = -1

_REFUSED = {
    "FullyShardedDataParallel": "its parameters are parts of flat ones, whose samples nobody can "
    "tell apart",
    "DeepSpeedEngine": "it keeps, sums and moves gradients in its own way, which is not followed",
}
"""Wrappers by the name of their class, and why they are refused."""


@dataclass(frozen=True)
class Ranks:
    """The processes whose gradients are averaged into those of one model.

    What asks them, asks all of them: each process calls it at the same place.

    Attributes:
        count: How many there are.
        group: Their group; None where there is one process, alone.
        wrapper: What averages their gradients.
    """

    count: int = 1
    group: Any = None
    wrapper: DistributedDataParallel | None = None

    @classmethod
    def of(cls, model: nn.Module) -> Ranks:
        """Return the processes that a model is wrapped for.

        Raises:
            CaptureError: If its wrapper is one of those that are not followed, or is not outermost.
        """
        for name, module in model.named_modules():
            kinds = {kind.__name__ for kind in type(module).__mro__}
            for kind, reason in _REFUSED.items():
                if kind in kinds:
                    raise _refused(name, kind, reason)
            if name and isinstance(module, DistributedDataParallel):
                raise _refused(name, "DistributedDataParallel", "it wraps a part of the model only")
        if not isinstance(model, DistributedDataParallel):
            return cls()
        return cls(distributed.get_world_size(model.process_group), model.process_group, model)

    @property
    def several(self) -> bool:
        """Whether there is more than one process."""
        return self.count > 1

    def all_or_none(
        self, what: str, make: Callable[[], _Made], describe: Callable[[_Made], object]
    ) -> _Made:
        """Make something that all processes make, or raise in all of them.

        Args:
            what: What is made, for the error.
            make: Makes it.
            describe: Says what must be the same in all processes.

        Raises:
            CaptureError: If it cannot be made in another process, or differs there; whatever
                `make` raises in this one.
        """
        if not self.several:
            return make()
        try:
            made = make()
        except Exception:
            self._same(_FAILED)
            raise
        if not self._same(crc32(repr(describe(made)).encode())):
            raise CaptureError(
                f"{what} is not the same in all processes, or could not be made in one of them",
                reason="each process adds its part to a sum, and waits for the others'",
                remedy="add the same directions in the same order in every process, renew them in "
                "the same batches, and look at the errors of the other processes",
            )
        return made

    def average(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the means over all processes, in the memory of what is given."""
        if self.several:
            with torch.no_grad():
                waiting = [
                    distributed.all_reduce(each, group=self.group, async_op=True)
                    for each in tensors.values()
                ]
                for each in waiting:
                    assert each is not None  # this process belongs to the group
                    each.wait()
                for tensor in tensors.values():
                    tensor /= self.count
        return dict(tensors)

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Let the model be called meanwhile without gradients being averaged afterwards.

        Raises:
            CaptureError: If processes may have run out of data, and wait for others inside `join`.
        """
        wrapper = self.wrapper
        if wrapper is None:
            yield
            return
        if is_joining(wrapper):
            raise CaptureError(
                "the model is called inside DistributedDataParallel's join()",
                reason="processes that ran out of data take part in what the wrapper asks of them, "
                "but not in what ghost does",
                remedy="give all processes as many batches, as DistributedSampler does",
            )
        with unreduced(wrapper):
            yield

    def inside(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return tensors by the names in the model inside, which the wrapper puts a word before."""
        if self.wrapper is None:
            return tensors
        known = {name for name, _ in self.wrapper.module.named_parameters(remove_duplicate=False)}
        return {
            name if name in known else name.removeprefix("module."): each
            for name, each in tensors.items()
        }

    def check_caller(self) -> None:
        """Raise if the model is called by a wrapper that these processes were not found from.

        Raises:
            CaptureError: If it averages gradients of several processes.
        """
        caller = calling_wrapper()
        if caller is None or caller is self.wrapper:
            return
        if distributed.get_world_size(caller.process_group) > 1:
            raise CaptureError(
                "the model is called by DistributedDataParallel, which the engine was not given",
                reason="it averages gradients over processes, and each sample has its part in the "
                "average",
                remedy="give the engine the wrapper, DotProductEngine(ddp) for ddp(batch); names "
                "of parameters are those of the model inside",
            )

    def _same(self, code: int) -> bool:
        """Tell whether a number is the same in all processes, and stands for no failure."""
        assert self.wrapper is not None
        device = next(self.wrapper.parameters()).device
        found = torch.tensor([code, -code], dtype=torch.int64, device=device)
        distributed.all_reduce(found, distributed.ReduceOp.MAX, group=self.group)
        most, least = found.tolist()
        return bool(most == -least != _FAILED)


ALONE = Ranks()
"""One process."""


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside of `DistributedDataParallel`, or the model."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def _refused(name: str, kind: str, reason: str) -> CaptureError:
    return CaptureError(
        f"{name or 'the model'} is a {kind}",
        reason=reason,
        remedy="wrap the whole model in DistributedDataParallel, and give that to the engine",
    )
