"""What happens between opening and closing a batch."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from threading import RLock, get_ident
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor
from torch.utils._pytree import tree_leaves

from ghost_core._torch import after_backward, backward_id
from ghost_core.capture.listener import Listener, Pass
from ghost_core.capture.refusals import broken_off
from ghost_core.errors import CaptureError
from ghost_core.split import Site, find_owner


@dataclass
class BatchCapture:
    """What happens between opening and closing a batch.

    Attributes:
        n: Number of samples that the engines expect.
        listeners: Engines that take part.
        passes: Calls of the root module so far.
        owners: What the batch was opened with for modules whose rows are not samples, by key.
        seen: Names of tracked modules that were called with gradients enabled.
        kinds: The same, with whether their rows are folded, as far as passes were verified.
        sites: Where gradients are told apart in the pass that is on its way.
        places: How many of these have the same modules and operation so far.
        joined: Whether the pass that is on its way has samples joined in one tensor, without an
            axis of theirs.
        functions: Nodes of custom functions that were met, with whether parameters are followed
            into them.
        unseen: Names of those called with gradients disabled.
        arrived: Whether any gradient arrived.
        unfinished: Backward passes that gradients arrived in and that are not complete.
        closed: Whether it is over.
        doubt: Why not every pass so far is verified, as far as engines verify; empty if they are.
        thread: The thread that it belongs to.
        silence: Stands for it where hooks are to let calls pass.
    """

    n: int
    listeners: list[Listener]
    passes: list[Pass] = field(default_factory=list)
    owners: dict[str, Tensor] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)
    kinds: set[tuple[str, bool]] = field(default_factory=set)
    sites: list[Site] = field(default_factory=list)
    places: dict[tuple[tuple[str, ...], str], int] = field(default_factory=dict)
    joined: bool = False
    functions: WeakKeyDictionary[Any, bool] = field(default_factory=WeakKeyDictionary)
    unseen: set[str] = field(default_factory=set)
    arrived: bool = False
    unfinished: set[int] = field(default_factory=set)
    closed: bool = False
    doubt: str = ""
    thread: int = field(default_factory=get_ident)
    silence: object = field(default_factory=object)
    _lock: RLock = field(default_factory=RLock)
    _unclear: CaptureError | None = None

    def begin(
        self, inputs: Iterable[Tensor], kwargs: Mapping[str, Any], dim: int, keys: Sequence[str]
    ) -> Pass:
        """Begin a pass.

        Args:
            inputs: The tensors that the model is called on.
            kwargs: The model's keyword inputs.
            dim: Axis of the samples in them.
            keys: Keys of the tensors that tell the sample of each row of some modules, sorted.

        Raises:
            CaptureError: If nothing tells how many samples there are, the batch was opened for
                others, or a tensor of owners is missing or wrong.
        """
        n = self._count(inputs, kwargs, dim, keys)
        started = Pass(n, self.next_start(n))
        for key in keys:
            started.owners[key] = find_owner(key, self.owners, kwargs, started.samples)
        self.sites, self.places = [], {}
        self.passes.append(started)
        return started

    def _count(
        self, inputs: Iterable[Tensor], kwargs: Mapping[str, Any], dim: int, keys: Sequence[str]
    ) -> int:
        """Return the number of samples that the model is called on.

        Inputs tell, or owners of their rows. Where neither does, as with graphs joined into one,
        all samples of the batch are taken to be there; the model's output shows whether they are.

        In a batch of 4 samples, the leading sizes of the inputs are

            4, 20   4 samples
            2       2 samples: a micro-batch
            9, 24   nodes and edges of joined graphs: 4 samples, if the model's output has these
        """
        # Nested tensors have sizes, and no shape.
        sizes = {each.size(dim) for each in inputs if each.dim() > dim}
        self.joined = bool(sizes) and self.n not in sizes
        if not self.joined:
            return self.n
        for owner in (kwargs.get(key) for key in keys if key not in self.owners):
            if isinstance(owner, Tensor) and owner.numel() and len(owner) in sizes:
                return int(owner.max()) + 1
        rest = self.n - sum(pass_.n for pass_ in self.passes)
        if self.owners and self._owners_fit(rest, sizes):
            return rest
        candidates = {size for size in sizes if self._owners_fit(size, sizes)}
        candidates = candidates - {1} or candidates
        if len(candidates) == 1:
            self.joined = False
            return candidates.pop()
        unclear = CaptureError(
            f"cannot tell how many samples the model is called on: its inputs have "
            f"{sorted(sizes)} rows, the batch was opened for {self.n}"
        )
        # Two such calls could be micro-batches.
        if self.passes or not any(each.verifies for each in self.listeners):
            raise unclear
        self._unclear = unclear
        return self.n

    def check_count(self, output: Any, dim: int) -> None:
        """Raise if inputs left the number of samples open and the model's output is no help.

        Args:
            output: What the model returned.
            dim: Axis of the samples in it.

        Raises:
            CaptureError: If no output has an entry for each sample.
        """
        if self._unclear is not None and not any(
            leaf.dim() > axis and leaf.shape[axis] == self.n
            for leaf in tree_leaves(output)
            if isinstance(leaf, Tensor)
            for axis in (0, dim)
        ):
            raise self._unclear

    def _owners_fit(self, n: int, sizes: Collection[int]) -> bool:
        """Tell whether tensors of owners have as many rows for the next n samples as inputs do."""
        start = sum(pass_.n for pass_ in self.passes)
        return all(
            start + n <= self.n and int(((owner >= start) & (owner < start + n)).sum()) in sizes
            for owner in self.owners.values()
        )

    def next_start(self, n: int) -> int:
        """Return the position of the first sample of a new pass.

        Passes as long as the batch are uses of the same samples; shorter ones are micro-batches
        that follow one another. In a batch of 4 samples:

            passes of 2, 2  begin at 0, 2: micro-batches
            passes of 4, 4  begin at 0, 0: uses of the same samples
            passes of 2, 4  are refused: either could be meant
        """
        covered = sum(pass_.n for pass_ in self.passes)
        if n == self.n:
            if any(pass_.n != n for pass_ in self.passes):
                raise CaptureError(f"a pass of {n} samples follows micro-batches of other sizes")
            return 0
        if n > self.n or covered + n > self.n:
            raise CaptureError(
                f"the model was called on {n} samples"
                + (f" after {covered} others" if covered else "")
                + f", but the batch was opened for {self.n}: give engine.batch() one id per "
                "sample, and evaluate outside of it"
            )
        return covered

    def told(self) -> AbstractContextManager[object]:
        """Let engines be told of a gradient: in one thread at a time, and autograd has several."""
        self.arrived = True
        number = backward_id()
        if number not in self.unfinished:
            self.unfinished.add(number)
            after_backward(partial(self.unfinished.discard, number))
        return self._lock

    def check_complete(self) -> None:
        """Raise if the passes do not make up the batch, or a backward pass broke off."""
        if self.unfinished:
            raise broken_off()
        if not self.passes:
            raise CaptureError(
                "the model was not called with gradients enabled inside engine.batch(). If it is "
                "compiled, attach the engine before torch.compile; if you call it through another "
                "object, give the engine the module that is called."
            )
        covered = sum(pass_.n for pass_ in self.passes)
        if covered % max(self.n, 1):
            raise CaptureError(
                f"{covered} of {self.n} samples went through the model: run all of them before the "
                "batch is closed, or give engine.batch() fewer ids"
            )
        if missing := self.unseen - self.seen:
            names = ", ".join(name or "(root)" for name in sorted(missing))
            raise CaptureError(
                f"{names} ran only with gradients disabled, so their "
                "gradients cannot be seen. With activation checkpointing, use "
                "use_reentrant=False; under torch.no_grad(), exclude these modules."
            )
        if self.n and not self.arrived:
            raise CaptureError(
                "no gradient arrived: run loss.backward() inside engine.batch(), on a loss that "
                "depends on the selected parameters. Gradients of autograd.grad() and of "
                "backward(inputs=...) do not count"
            )
