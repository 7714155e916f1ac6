"""Records what tracked modules see, for one or several engines at once.

One recorder serves a model, however many engines are attached to it. It owns the hooks on the
model; everything else about a batch lives in `BatchCapture` and dies with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.hooks import RemovableHandle

from ghost_core._torch import in_backward
from ghost_core.algebra import full_precision
from ghost_core.capture.batch import BatchCapture
from ghost_core.capture.delivery import Arrival, keep
from ghost_core.capture.freeze import Freeze, Running, is_differentiable
from ghost_core.capture.listener import Listener, Pass
from ghost_core.capture.tap import Tap
from ghost_core.errors import CaptureError, WrongSplitError
from ghost_core.hooks import Hook
from ghost_core.split import Balance, Layout, Verifier, describe, expanded, lay_out
from ghost_core.tracking import TrackedModule, owner_of, parameter_of


class Recorder:
    """Hooks on one model, shared by the engines attached to it. Get it from `Recorder.of`."""

    _recorders: ClassVar[WeakKeyDictionary[nn.Module, Recorder]] = WeakKeyDictionary()

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._attached: dict[int, tuple[Listener, Freeze]] = {}
        self._tracked: dict[str, TrackedModule] = {}
        self._handles: list[RemovableHandle] = []
        self._first_hooks: set[int] = set()
        self._last_hooks: set[int] = set()
        self._flags: dict[nn.Parameter, bool] = {}
        with torch.inference_mode(False):
            self._seed = torch.zeros((), requires_grad=True)
        self._verifier = Verifier(model, {}, self._seed)
        self._batch: BatchCapture | None = None
        self._pass: Pass | None = None
        self._running: list[Running] = []
        self._paused = False
        self._dim = 0
        self._told_apart = False

    @classmethod
    def of(cls, model: nn.Module) -> Recorder:
        """Return the recorder of a model, a new one if no engine is attached."""
        return cls._recorders.get(model) or cls(model)

    @property
    def flags(self) -> Mapping[nn.Parameter, bool]:
        """What `requires_grad` was before parameters were frozen; empty if they are not."""
        return self._flags

    # Life cycle

    def attach(self, listener: Listener, freeze: Freeze) -> None:
        """Start to serve an engine.

        Raises:
            CaptureError: If it is attached already, a batch is open, or the engines that are
                attached treat weight gradients in another way.
        """
        modes = [mode for _, mode in self._attached.values()]
        if id(listener) in self._attached:
            raise CaptureError("this engine is attached already")
        if self._batch is not None:
            raise CaptureError("cannot attach an engine while a batch is open")
        if modes and (Freeze.PASS in modes) != (freeze is Freeze.PASS):
            raise CaptureError(
                "engines on one model must agree: use frozen() for all of them, or for none"
            )
        if freeze is Freeze.CALL and Freeze.CALL in modes:
            raise CaptureError("only one engine can make the weight gradients of a model")
        if not self._attached and freeze is Freeze.PASS:
            self._flags = {p: p.requires_grad for p in self._model.parameters()}
            for parameter in self._flags:
                parameter.requires_grad_(False)
        self._attached[id(listener)] = (listener, freeze)
        Recorder._recorders[self._model] = self
        try:
            self._install()
        except BaseException:
            self.detach(listener)
            raise

    def detach(self, listener: Listener) -> None:
        """Stop to serve an engine; after the last one the model is as it was found."""
        del self._attached[id(listener)]
        self._install()
        if not self._attached:
            Recorder._recorders.pop(self._model, None)
            for parameter, flag in self._flags.items():
                parameter.requires_grad_(flag)
            self._flags.clear()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the model alone for a while: for validation gradients and other graphs."""
        before, self._paused = self._paused, True
        flags = {p: p.requires_grad for p in self._flags}
        try:
            for parameter, flag in self._flags.items():
                parameter.requires_grad_(flag)
            yield
        finally:
            for parameter, flag in flags.items():
                parameter.requires_grad_(flag)
            self._paused = before

    @property
    def makes_gradients(self) -> bool:
        """Whether an engine makes weight gradients in place of autograd."""
        return any(mode is Freeze.CALL for _, mode in self._attached.values())

    @property
    def attached(self) -> bool:
        """Whether any engine is attached."""
        return bool(self._attached)

    @contextmanager
    def silence(self) -> Iterator[None]:
        """Ignore calls of modules for a while: a sampler runs them."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    @contextmanager
    def capture(
        self, listener: Listener, n: int, owners: Mapping[str, Tensor]
    ) -> Iterator[BatchCapture]:
        """Capture a batch of n samples for an engine.

        Args:
            listener: The engine.
            n: Number of samples.
            owners: For modules whose rows are not samples: the sample of each row, by key.

        Raises:
            CaptureError: If the model ran on other samples, or not at all.
        """
        batch = self._open(listener, n)
        batch.owners |= owners
        try:
            yield batch
            self._verifier.finish()
            batch.check_complete()
            if batch.balance is not None:
                batch.balance.check()
        finally:
            batch.listeners.remove(listener)
            if not batch.listeners:
                batch.closed = True
                if batch.balance is not None:
                    batch.balance.close()
                self._batch = None
                self._abandon()

    def _open(self, listener: Listener, n: int) -> BatchCapture:
        if id(listener) not in self._attached:
            raise CaptureError("attach the engine first: with engine: ...")
        if self._batch is None:
            self._batch = BatchCapture(n, [listener])
            return self._batch
        if any(other is listener for other in self._batch.listeners):
            raise CaptureError("a batch is open already")
        if self._batch.n != n:
            raise CaptureError(f"another engine opened this batch for {self._batch.n} samples")
        if self._batch.passes:
            raise CaptureError("open the batches of all engines before the model is called")
        self._batch.listeners.append(listener)
        return self._batch

    def _abandon(self) -> None:
        """Forget a pass that an exception cut short."""
        self._pass = None
        self._verifier.stop()
        while self._running:
            self._running.pop().restore()

    # Hooks

    def _install(self) -> None:
        """Put hooks on the modules that the attached engines track, and on no others."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._first_hooks.clear()
        self._last_hooks.clear()
        self._tracked.clear()
        for listener, _ in self._attached.values():
            for tracked in listener.tracking.modules:
                known = self._tracked.get(tracked.name, tracked)
                self._tracked[tracked.name] = known.joined(tracked)
        dims = {listener.tracking.batch_dim for listener, _ in self._attached.values()} or {0}
        if len(dims) > 1:
            raise CaptureError("engines on one model must agree on batch_dim of the model itself")
        self._dim = dims.pop()
        self._verifier = Verifier(self._model, self._tracked, self._seed, self._dim)
        if not self._attached:
            return
        add = self._handles.append
        root = self._model
        add(root.register_forward_pre_hook(Hook(self._before_root), with_kwargs=True))
        for tracked in self._tracked.values():
            module = tracked.module
            last = module.register_forward_pre_hook(Hook(partial(self._before_call, tracked)))
            add(last)
            self._last_hooks.add(last.id)
            # First among the module's hooks: a user's hook may change the output.
            first = module.register_forward_hook(
                Hook(partial(self._after_call, tracked)),
                prepend=True,
                with_kwargs=True,
                always_call=True,
            )
            add(first)
            self._first_hooks.add(first.id)
        add(root.register_forward_hook(Hook(self._after_root), always_call=True))

    def _listens(self, module: nn.Module, expected: nn.Module) -> bool:
        return module is expected and self._batch is not None and not self._paused

    def _before_root(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not self._listens(module, self._model) or not torch.is_grad_enabled() or in_backward():
            return
        batch = self._batch
        assert batch is not None
        if self._pass is not None:
            raise CaptureError("the model called itself")
        keys = {tracked.row_owner for tracked in self._tracked.values() if tracked.row_owner}
        self._pass = batch.begin(args, kwargs, self._dim, keys)
        self._told_apart = False
        if self._verifying:
            self._verifier.start(self._pass.n, self._owned, bool(self._flags))
            balanced = all(each.balanced for each in batch.listeners)
            if balanced and batch.balance is None and not self._flags and not self.makes_gradients:
                batch.balance = Balance(self._balanced(), self._counts)

    def _after_root(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self._listens(module, self._model) or in_backward() or self._pass is None:
            return
        pass_, self._pass = self._pass, None
        self._running.clear()
        batch = self._batch
        assert batch is not None
        if output is None:  # the forward pass failed
            batch.passes.remove(pass_)
        elif self._verifying and pass_.n:
            verified = self._verifier.check(output, pass_.n, batch.kinds)
            batch.verified = batch.verified and verified
        elif pass_.n > 1 and batch.seen and not self._told_apart:
            raise WrongSplitError(
                f"every tracked module returned one row for {pass_.n} samples: was the model "
                "called on one? Give engine.batch() the ids of the samples it is called on"
            )

    def _before_call(self, tracked: TrackedModule, module: nn.Module, args: Any) -> None:
        if not self._listens(module, tracked.module):
            return
        first = next(iter(module._forward_hooks), None)
        if first not in self._first_hooks or nn_module._global_forward_hooks:
            raise CaptureError(
                f"a forward hook on {tracked.label} runs before ghost's and may change the output: "
                "register it before the engine is attached, and no global forward hooks"
            )
        if next(reversed(module._forward_pre_hooks)) not in self._last_hooks:
            raise CaptureError(
                f"a forward pre-hook on {tracked.label} runs after ghost's and may use parameters: "
                "register it before the engine is attached"
            )
        if any(running.tracked is tracked for running in self._running):
            raise CaptureError(
                f"{tracked.label} called itself, which cannot be captured: exclude it"
            )
        for local in tracked.sites:
            owner, name = owner_of(module, local)
            parameter = owner._parameters.get(name)
            if parameter is not None and not parameter.is_leaf:
                raise CaptureError(
                    f"{tracked.label} was called with another value for its {local} (by "
                    "torch.func.functional_call?), whose gradient is not the parameter's"
                )
        running = Running(tracked)
        self._running.append(running)
        if torch.is_grad_enabled():
            with self.silence():
                running.before = tracked.sampler.prepare(module)
            for local in self._made(tracked):
                running.withhold(parameter_of(module, local))

    def _after_call(
        self, tracked: TrackedModule, module: nn.Module, args: Any, kwargs: Any, output: Any
    ) -> Any:
        if not self._listens(module, tracked.module):
            return None
        try:
            return self._captured(tracked, args, kwargs, output)
        except BaseException:
            # The root's own hooks go on, whoever failed: there is nothing left to verify.
            if module is self._model and self._pass is not None and self._batch is not None:
                self._batch.passes.remove(self._pass)
                self._pass = None
            raise

    def _captured(self, tracked: TrackedModule, args: Any, kwargs: Any, output: Any) -> Any:
        """Return what a module returned with a Tap behind it; None to leave it as it is."""
        before: object = None
        if self._running and self._running[-1].tracked is tracked:
            running = self._running.pop()
            running.restore()
            before = running.before
        batch = self._batch
        assert batch is not None
        if output is None:
            return None
        if not torch.is_grad_enabled():
            if self._pass is not None:
                batch.unseen.add(tracked.name)
            return None
        recomputing = in_backward()
        if self._pass is None and not recomputing:
            raise CaptureError(
                f"{tracked.name} was called outside a call of the model: call the module that the "
                "engine was made for, or close the batch first"
            )
        leaves, structure = tree_flatten(output)
        if any(isinstance(leaf, Tensor) and leaf.is_complex() for leaf in leaves):
            raise CaptureError(f"{tracked.label} returned complex numbers: exclude it")
        frozen = bool(self._flags) or bool(self._made(tracked))
        taken = [at for at, leaf in enumerate(leaves) if is_differentiable(leaf, frozen)]
        if not taken:
            batch.unseen.add(tracked.name)
            return None
        batch.seen.add(tracked.name)
        outputs = [leaves[at] for at in taken]
        for at, value in zip(
            taken, self._tap(batch, tracked, args, kwargs, outputs, before), strict=True
        ):
            leaves[at] = value
        return tree_unflatten(leaves, structure)

    def _tap(
        self,
        batch: BatchCapture,
        tracked: TrackedModule,
        args: Any,
        kwargs: Any,
        outputs: list[Tensor],
        before: object,
    ) -> tuple[Tensor, ...]:
        """Record a call and put a Tap behind its outputs."""
        # A recomputation belongs to the last pass, or fails on the sizes of what it recomputes.
        pass_ = self._pass or batch.passes[-1]
        owner = pass_.owners[tracked.row_owner] if tracked.row_owner else None
        layout = lay_out(tracked, outputs, pass_.n, owner, foldable=self._verifying)
        batch.kinds.add((tracked.name, layout.is_folded(pass_.n)))
        self._told_apart |= any(
            output.dim() > dim and output.shape[dim] == layout.rows
            for output, dim in zip(outputs, layout.dims, strict=True)
        )
        call = describe(tracked, layout.rows_first(outputs), layout, args, kwargs, before)
        given, outputs = outputs, self._expanded(tracked, outputs, layout)
        with full_precision(outputs[0].device), self.silence():
            records = dict(tracked.sampler.record(call))
            if outputs[0].shape != given[0].shape:
                records = {local: record.expand(layout.rows) for local, record in records.items()}
            views, saved = keep(batch.listeners, tracked, records)
        made = self._made(tracked)
        parameters = [parameter_of(tracked.module, local) for local in made]
        # Inputs and outputs live as long as the graph needs them, not as long as the call.
        call.module, call.args, call.kwargs, call.outputs, call.before = None, (), {}, (), None
        arrival = Arrival(
            self._verifier, batch, self._pass, tracked, call, layout, views, made, self.silence
        )
        tapped: tuple[Tensor, ...] = Tap.apply(  # type: ignore[no-untyped-call]
            arrival, self._seed, len(outputs), len(made), *outputs, *parameters, *saved
        )
        for output, was in zip(tapped, given, strict=True):
            if output.shape != was.shape and self._verifying:  # expanded from one row
                self._verifier.watch(output, tracked)
        return tapped

    def _expanded(
        self, tracked: TrackedModule, outputs: list[Tensor], layout: Layout
    ) -> list[Tensor]:
        """Return outputs with all their rows.

        While the pass is watched, what was expanded has memory of its own, so that an operation in
        place comes as far as being found; and so has a part of a parameter that a module returns,
        which is no use of the parameter from there on.
        """
        with self.silence():
            rows = [
                expanded(output, dim, layout.rows)
                for output, dim in zip(outputs, layout.dims, strict=True)
            ]
            if not self._verifier.watching:
                return rows
            memory = {p.untyped_storage().data_ptr() for p in tracked.module.parameters()}
            return [
                row.clone()
                if row.shape != was.shape or row.untyped_storage().data_ptr() in memory
                else row
                for row, was in zip(rows, outputs, strict=True)
            ]

    # State

    @property
    def _verifying(self) -> bool:
        return self._batch is not None and any(each.verifies for each in self._batch.listeners)

    def _made(self, tracked: TrackedModule) -> tuple[str, ...]:
        """Return the parameters whose gradients an engine makes in the open batch."""
        assert self._batch is not None
        names: set[str] = set()
        for listener in self._batch.listeners:
            if self._attached[id(listener)][1] is Freeze.CALL:
                names |= listener.tracking.names
        return tuple(local for local, site in tracked.sites.items() if site.parameter in names)

    def _counts(self) -> bool:
        """Tell whether gradients of the backward pass that runs are those of the batch."""
        return not self._paused and self._verifier.probe is None and self._verifier.is_training

    def _balanced(self) -> dict[str, nn.Parameter]:
        """Return parameters to compare: all while verifying, those without a formula always."""
        names = {
            site.parameter
            for tracked in self._tracked.values()
            for local, site in tracked.sites.items()
            if self._verifier.watching or tracked.sampler.generic or "." in local
        }
        parameters = dict(self._model.named_parameters())
        return {name: parameters[name] for name in names if name in parameters}

    def _owned(self) -> frozenset[str]:
        """Return the parameters that may be used now: those of modules that run, or are let be."""
        running = [each.tracked for each in self._running]
        return frozenset(
            site.parameter
            for tracked in (self._tracked.values() if self._paused else running)
            for site in tracked.sites.values()
        )
