"""The processes that train one model together, as far as its wrapper tells."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar
from zlib import crc32

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from ghost_core._torch import (
    averages,
    calling_wrapper,
    is_joining,
    is_waiting,
    kept_whole,
    mesh_of,
    sharded_modules,
    shards,
    unreduced,
    whole,
)
from ghost_core.errors import CaptureError
from ghost_core.restoring import graphs_kept

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
        wrapper: What averages their gradients, if that is `DistributedDataParallel`.
        sharded: The model, if `fully_shard` keeps its parameters in parts.
    """

    count: int = 1
    group: Any = None
    wrapper: DistributedDataParallel | None = None
    sharded: nn.Module | None = None

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
        if isinstance(model, DistributedDataParallel):
            group = model.process_group
            return cls(distributed.get_world_size(group), group, model)
        if not sharded_modules(model):
            return cls()
        return cls(*_sharded_over(model), sharded=model)

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
            with graphs_kept(False):
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

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over all processes, in the memory of what is given."""
        if self.several:
            distributed.all_reduce(tensor, group=self.group)
        return tensor

    def anywhere(self, here: bool) -> bool:
        """Tell whether something is so in any of the processes."""
        if not self.several:
            return here
        return bool(self.sum(torch.tensor(int(here), device=self._device)))

    @contextmanager
    def probing(self, wanted: bool) -> Iterator[bool]:
        """Let backward passes run that only some processes want, or each in a number of its own.

        Where parameters are in parts, backward passes put them together, which all processes do at
        the same places. So all learn whether any of them probes; then parameters are whole
        meanwhile, and each of the processes is to run a backward pass at least.

        Args:
            wanted: Whether this process wants any.

        Yields:
            Whether it is to run any.
        """
        if self.sharded is None or not self.several:
            yield wanted
            return
        if not self.anywhere(wanted):
            yield False
            return
        with kept_whole(self.sharded):
            yield True

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Let parameters that are in parts be whole meanwhile; all processes ask for it."""
        if self.sharded is None:
            yield
            return
        with kept_whole(self.sharded):
            yield

    @contextmanager
    def apart(self, what: str = "") -> Iterator[None]:
        """Let the model be called meanwhile without gradients being averaged afterwards.

        Args:
            what: What calls it, if that needs whole parameters.

        Raises:
            CaptureError: If processes may have run out of data, and wait for others inside `join`;
                or gradients of parameters in parts wait to be averaged.
        """
        wrapper = self.wrapper
        if what:
            self.check_way(what)
        if self.sharded is not None:
            self._check_averaged(self.settled(self.sharded))
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

    def settled(self, model: nn.Module) -> nn.Module:
        """Return a model whose parameters are in the optimizer's hands, not whole after a call."""
        if self.sharded is not None:
            for module in sharded_modules(model):
                module.reshard()
        return model

    def check_way(self, what: str, names: Collection[str] | None = None) -> None:
        """Raise if parameters are in parts, and something needs them whole, or frozen.

        Args:
            what: What needs them, for the error.
            names: Which it needs; all by default.

        Raises:
            CaptureError: If any are in parts.
        """
        if self.sharded is None:
            return
        known = shards(self.settled(self.sharded))
        leaves = dict(self.sharded.named_parameters(remove_duplicate=False))
        if any(leaves[name] in known for name in (leaves if names is None else names)):
            raise CaptureError(
                f"{what} is not for a model under fully_shard",
                reason="it needs parameters whole for longer than their modules run, or frozen",
                remedy="attach an engine by with engine:, in any mode, or do this before the model "
                "is sharded",
            )

    def check_averaged(self) -> None:
        """Raise if gradients are not averaged at once over all processes.

        Raises:
            CaptureError: If they wait for a later backward pass, or are divided in another way.
        """
        if self.sharded is not None:
            self._check_averaged(self.sharded)

    def _check_averaged(self, model: nn.Module) -> None:
        if not averages(model) or any(map(is_waiting, shards(model).values())):
            raise CaptureError(
                "gradients are not averaged in each backward pass",
                reason="set_requires_gradient_sync(False) lets them wait, or "
                "set_gradient_divide_factor divides them in another way, and what becomes of them "
                "is not followed",
                remedy="leave both as they are: accumulate with one batch for each micro-batch",
            )

    def inside(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return tensors by the names in the model inside, whole.

        The wrapper puts a word before names.
        """
        if self.sharded is not None:
            return {name: whole(each.detach()) for name, each in tensors.items()}
        if self.wrapper is None:
            return tensors
        known = {name for name, _ in self.wrapper.module.named_parameters(remove_duplicate=False)}
        return {
            name if name in known else name.removeprefix("module."): each
            for name, each in tensors.items()
        }

    def check_caller(self) -> None:
        """Raise if the model is not called by the wrapper that these processes were found from.

        Raises:
            CaptureError: If another averages gradients of several processes, or the model inside of
                this one is called, so that none does.
        """
        caller = calling_wrapper()
        if caller is self.wrapper or (caller is None and not self.several):
            return
        if caller is None:
            raise CaptureError(
                "the model inside of DistributedDataParallel is called in a batch",
                reason="only calls of the wrapper average gradients over processes",
                remedy="call the wrapper, ddp(batch), as you would without ghost",
            )
        if distributed.get_world_size(caller.process_group) > 1:
            raise CaptureError(
                "the model is called by DistributedDataParallel, which the engine was not given",
                reason="it averages gradients over processes, and each sample has its part in the "
                "average",
                remedy="give the engine the wrapper, DotProductEngine(ddp) for ddp(batch); names "
                "of parameters are those of the model inside",
            )

    @property
    def _device(self) -> torch.device:
        """Where several processes have the model."""
        model = self.wrapper if self.sharded is None else self.sharded
        assert model is not None
        return next(model.parameters()).device

    def _same(self, code: int) -> bool:
        """Tell whether a number is the same in all processes, and stands for no failure."""
        found = torch.tensor([code, -code], dtype=torch.int64, device=self._device)
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


def _sharded_over(model: nn.Module) -> tuple[int, Any]:
    """Return how many processes share the parameters of a model, and their group.

    Raises:
        CaptureError: If some of the trainable ones belong to no shards.
    """
    for module in sharded_modules(model):
        module.reshard()
    known = shards(model)
    meshes = {mesh_of(leaf) for leaf in known}
    if len(meshes) != 1 or any(mesh.ndim != 1 for mesh in meshes):
        raise CaptureError(
            "parameters are sharded in several ways",
            reason="each way averages gradients over other processes",
            remedy="call fully_shard with one mesh of one dimension for all modules",
        )
    (mesh,) = meshes
    apart = [n for n, p in model.named_parameters() if p.requires_grad and p not in known]
    if apart and mesh.size() > 1:
        raise CaptureError(
            f"{apart[0]} is not sharded, and so are {len(apart) - 1} other parameters",
            reason="nobody averages its gradients over processes",
            remedy="call fully_shard on the model itself, after its blocks",
        )
    return mesh.size(), mesh.get_group()
