"""Attaches engines to a model, and opens and closes their batches.

One recorder serves a model, however many engines are attached to it. It owns the hooks on the
model; what these share is a `CaptureState`, and what belongs to a batch dies with it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from ghost_core._torch import called_compiled, in_backward, tensors_in
from ghost_core.capture.aside import Spare, Suspended
from ghost_core.capture.batch import BatchCapture
from ghost_core.capture.calls import CallHooks
from ghost_core.capture.freeze import Freeze
from ghost_core.capture.fused import FusedModules
from ghost_core.capture.listener import Listener
from ghost_core.capture.own_run import OwnRun
from ghost_core.capture.places import Places
from ghost_core.capture.refusals import (
    attached_already,
    attached_late,
    disagreeing,
    explain,
    left_alone,
    left_early,
    not_attached,
    open_already,
)
from ghost_core.capture.shared import SharedValues
from ghost_core.capture.state import CaptureState
from ghost_core.errors import CaptureError, WrongSplitError
from ghost_core.model_hooks import Hook
from ghost_core.ranks import Ranks
from ghost_core.restoring import undone
from ghost_core.split import Verifier
from ghost_core.state import flags_set
from ghost_core.tracking import Followed, joined

logger = logging.getLogger(__name__)


class Recorder:
    """Hooks on one model, shared by the engines attached to it. Get it from `Recorder.of`."""

    _recorders: ClassVar[WeakKeyDictionary[nn.Module, Recorder]] = WeakKeyDictionary()
    _followed: ClassVar[WeakKeyDictionary[nn.Module, Followed]] = WeakKeyDictionary()

    def __init__(self, model: nn.Module) -> None:
        with torch.inference_mode(False):
            seed = torch.zeros((), requires_grad=True)
        known = Recorder._followed.setdefault(model, {})
        self._ranks = Ranks.of(model)
        self._state = CaptureState(model, seed, Verifier(model, {}, seed), followed=known)
        self._handles: list[RemovableHandle] = []
        self._told_compiled = False
        self._own_run: OwnRun | None = None
        self._suspended: Suspended | None = None
        self._spare: Spare | None = None
        self._fused = self._fused_modules()
        self._following: SharedValues | None = None
        self._modes = ExitStack()
        self._places = Places(model, ())
        self._owner_keys: list[str] = []

    @classmethod
    def of(cls, model: nn.Module) -> Recorder:
        """Return the recorder of a model, a new one if no engine is attached."""
        return cls._recorders.get(model) or cls(model)

    @classmethod
    def followed(cls, model: nn.Module) -> Followed:
        """Return what batches of a model followed so far; see `Followed`."""
        return cls._followed.get(model, {})

    @property
    def flags(self) -> Mapping[nn.Parameter, bool]:
        """What `requires_grad` was before parameters were frozen; empty if they are not."""
        return self._state.flags

    @property
    def attached(self) -> bool:
        """Whether any engine is attached."""
        return bool(self._state.attached)

    # Attachment

    @contextmanager
    def serving(self, listener: Listener, freeze: Freeze) -> Iterator[None]:
        """Serve an engine for a while; after the last one the model is as it was found.

        Raises:
            CaptureError: If it is attached already, a batch is open, or the engines that are
                attached treat weight gradients in another way.
        """
        self._check(listener, freeze)
        with undone(self._detach, listener):
            self._attach(listener, freeze)
            yield

    def _check(self, listener: Listener, freeze: Freeze) -> None:
        """Refuse an engine that cannot be attached now."""
        state = self._state
        modes = [mode for _, mode in state.attached]
        if self._serves(listener):
            raise attached_already()
        if state.batch is not None or self._suspended is not None:
            raise attached_late()
        if modes and (Freeze.PASS in modes) != (freeze is Freeze.PASS):
            raise disagreeing()
        if freeze is Freeze.CALL and Freeze.CALL in modes:
            raise CaptureError("only one engine can make the weight gradients of a model")

    def _attach(self, listener: Listener, freeze: Freeze) -> None:
        state = self._state
        if not state.attached and freeze is Freeze.PASS:
            state.freeze()
        state.attached.append((listener, freeze))
        Recorder._recorders[state.model] = self
        self._install()

    def _detach(self, listener: Listener) -> None:
        """Take away all that `_attach` did for an engine, or began to do."""
        state = self._state
        if state.batch is not None:
            self._close(state.batch)
        self._resume()
        state.attached[:] = [each for each in state.attached if each[0] is not listener]
        self._install()
        if not state.attached:
            state.thaw()
            Recorder._recorders.pop(state.model, None)

    @contextmanager
    def aside(self, listener: Listener) -> Iterator[None]:
        """Serve another listener for a while in place of those attached, which hear of nothing.

        Parameters are frozen meanwhile, so that no weight gradient is made and no hook on one runs.

        Args:
            listener: It tracks what one of those attached does, if any is.

        Raises:
            CaptureError: If a batch is open, or the model is left alone.
        """
        if not self.attached:
            with self.serving(listener, Freeze.PASS):
                yield
            return
        if self._state.resting:
            raise left_alone()
        if self._state.batch is not None or self._suspended is not None:
            raise attached_late()
        with undone(self._resume):
            self._suspend(listener)
            yield

    def _suspend(self, listener: Listener) -> None:
        state = self._state
        self._suspended = Suspended.of(state, self._own_run)
        state.attached[:] = [(listener, Freeze.PASS)]
        if not state.flags:
            state.freeze()
        if self._spare is None or self._spare.flags != state.flags:
            self._spare = Spare.of(state, self._fused)
        state.verifier, self._own_run = self._spare.verifier, self._spare.own_run

    def _resume(self) -> None:
        """Serve again those that were attached."""
        if self._suspended is not None:
            self._own_run = self._suspended.own_run
            self._suspended.restore(self._state)
            self._suspended = None

    def _serves(self, listener: Listener) -> bool:
        return any(each is listener for each, _ in self._state.attached)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the model alone for a while: for validation gradients and other graphs."""
        with self._state.pause(), flags_set(self._state.flags):
            yield

    def _install(self) -> None:
        """Put hooks on the modules that the attached engines track, and on no others."""
        state = self._state
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._own_run, self._spare = None, None
        tracked = joined(listener.tracking for listener, _ in state.attached)
        dims = {listener.tracking.batch_dim for listener, _ in state.attached} or {0}
        if len(dims) > 1:
            raise CaptureError("engines on one model must agree on batch_dim of the model itself")
        state.dim = dims.pop()
        state.tracked = tracked
        state.lifted.clear()
        state.shares = None  # others may be tracked now
        state.verifier = Verifier(state.model, tracked, state.seed, state.dim, self._ranks)
        if not state.attached:
            return
        root = state.model
        self._places = Places(root, (each.module for each in tracked.values()))
        self._owner_keys = sorted({each.row_owner for each in tracked.values() if each.row_owner})
        self._fused = self._fused_modules()
        if state.flags:
            self._own_run = OwnRun.of(state, self._fused)
        before, after = Hook(self._before_root), Hook(self._after_root)
        # Each in one line with what remembers it, so that no interrupt comes in between.
        self._handles.append(root.register_forward_pre_hook(before, with_kwargs=True))
        self._handles += self._fused.install()
        for each in tracked.values():
            CallHooks(each, state).install(self._handles)
        self._handles.append(root.register_forward_hook(after, always_call=True))

    # Batches

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
        if not n:  # others would wait for its part in verifying
            self._ranks.check_way("a batch without samples")
        batch, state = self._batch_for(listener, n), self._state
        with undone(self._leave, batch, listener):
            state.batch = batch
            batch.listeners.append(listener)
            batch.owners |= owners
            try:
                yield batch
            except RuntimeError as error:
                explain(error, state.recomputed)
                raise
            if batch.closed:
                raise left_early()
            state.verifier.finish()
            batch.check_complete()
            if state.balance is not None:
                state.balance.check()
            batch.doubt = state.verifier.doubt or batch.doubt

    def _batch_for(self, listener: Listener, n: int) -> BatchCapture:
        """Return the batch that is open, or a new one, for an engine that may take part in it."""
        if not self._serves(listener):
            raise not_attached()
        batch = self._state.batch
        if batch is None:
            return BatchCapture(n, [])
        if any(other is listener for other in batch.listeners):
            raise open_already()
        if batch.n != n:
            raise CaptureError(f"another engine opened this batch for {batch.n} samples")
        if batch.passes:
            raise CaptureError("open the batches of all engines before the model is called")
        return batch

    def _leave(self, batch: BatchCapture, listener: Listener) -> None:
        """Let an engine out of a batch; the last one closes it."""
        batch.listeners[:] = [each for each in batch.listeners if each is not listener]
        if not batch.listeners and self._state.batch is batch:
            self._close(batch)

    def _close(self, batch: BatchCapture) -> None:
        """End a batch, whoever still takes part in it."""
        state = self._state
        batch.closed = True
        self._stop_following()
        state.verifier.stop()
        if state.balance is not None:
            state.balance.close()
        state.balance = None
        state.forget_pass()
        state.batch = None

    # Calls of the root

    def _before_root(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        state = self._state
        listens = state.listens(module, state.model, begins=True)
        if not listens or not torch.is_grad_enabled() or in_backward():
            return
        batch = state.batch
        assert batch is not None
        if state.pass_ is not None:
            raise CaptureError("the model called itself")
        self._places.check()
        for listener in batch.listeners:
            listener.on_call()
        if not self._told_compiled and called_compiled():
            self._told_compiled = True
            logger.warning(
                "the model was compiled, and runs as if it was not while ghost is attached: scores "
                "are exact, the training is the uncompiled one, and nothing is faster. Call the "
                "compiled model where no engine is attached, or compile what is not tracked"
            )
        inputs = tensors_in((args, kwargs))
        state.pass_ = batch.begin(inputs, kwargs, state.dim, self._owner_keys)
        state.told_apart = False
        if state.verifying:
            state.verifier.start(state.pass_.n, state.usable, bool(state.flags))
            if state.balance is None and state.comparable:
                state.compare(state.balanced()).open()
        self._follow(inputs)
        if self._own_run is not None:
            self._own_run.start((args, kwargs))

    def _fused_modules(self) -> FusedModules:
        flags = self._state.flags
        return FusedModules(
            self._state.model,
            trainable=lambda parameter: flags.get(parameter, parameter.requires_grad),
            would=self._would,
            note=self._note_unseen,
        )

    def _would(self, values: Any) -> bool | None:
        """Tell whether any of some values requires gradients without ghost."""
        if self._own_run is not None:
            return self._own_run.would(values)
        leaves = tree_leaves(values)
        return any(isinstance(leaf, Tensor) and bool(leaf.requires_grad) for leaf in leaves)

    def _note_unseen(self, given: Any, result: Any) -> None:
        """Let those who follow values know of what ran without function modes."""
        if self._own_run is not None:
            self._own_run.note(result, would=False)
        if self._following is not None:
            self._following.note(given, result)

    def _follow(self, inputs: list[Tensor]) -> None:
        """Follow shared values through this pass, unless it is known that there are none.

        Where the model is not called on samples, nothing tells what belongs to them.
        """
        state = self._state
        if not state.verifier.watching and state.shares is False:
            return
        lifted = all(listener.tracking.lift for listener, _ in state.attached)
        if lifted and state.called_on_samples(inputs):
            self._following = self._modes.enter_context(SharedValues(state, inputs))
            state.sharing = self._following

    def _stop_following(self) -> SharedValues | None:
        self._fused.stop()
        if self._own_run is not None:
            self._own_run.stop()  # the modes in the order in which they came
        self._modes.close()
        following, self._following = self._following, None
        if following is not None:
            self._state.sharing = None
        return following

    def _after_root(self, module: nn.Module, args: Any, output: Any) -> Any:
        state = self._state
        if not state.listens(module, state.model) or in_backward():
            return None
        following = self._stop_following()
        if state.pass_ is None:
            return None
        pass_, batch = state.pass_, state.batch
        try:
            if following is not None and output is not None:
                output = following.returned_by_model(output)
                state.shares = bool(state.shared_names)
        finally:
            state.forget_pass()
        assert batch is not None
        if state.balance is not None:
            state.balance.follow_parts(state.model)
        if output is None:  # the forward pass failed
            batch.passes.remove(pass_)
        elif (state.verifying or state.verifier.routes) and pass_.n:
            batch.check_count(output, state.dim)
            if not state.verifier.check(output, pass_.n, batch.sites, batch.kinds):
                batch.doubt = "modules ran for the first time"
        elif pass_.n > 1 and batch.seen and not state.told_apart:
            raise WrongSplitError(
                f"every tracked module returned one row for {pass_.n} samples: was the model "
                "called on one? Give engine.batch() the ids of the samples it is called on"
            )
        return output
