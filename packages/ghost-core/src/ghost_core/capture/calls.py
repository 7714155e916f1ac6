"""The hooks on a tracked module: they guard its calls, record them, and put a Tap behind."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_unflatten
from torch.utils.hooks import RemovableHandle

from ghost_core._torch import (
    address,
    backward_hooks,
    direct_parameters,
    in_backward,
    in_transform,
    innermost_hooks,
    saves_elsewhere,
    tensors_in,
    tree_flatten,
    unseen,
    without_gradients,
)
from ghost_core.algebra import precisely
from ghost_core.capture.delivery import Delivery, Kept, keep
from ghost_core.capture.refusals import (
    called_with_another,
    changed_before,
    declared_wrongly,
    hooked,
    in_parts,
    used_before,
)
from ghost_core.capture.rows_given import is_joined, is_lone_row
from ghost_core.capture.silence import silently
from ghost_core.capture.state import CaptureState, Running
from ghost_core.capture.tap import tap
from ghost_core.errors import CaptureError
from ghost_core.model_hooks import Hook
from ghost_core.sampler import Call, GradientSampler
from ghost_core.split import Lift, RowAxes, Site, describe, find_axes
from ghost_core.tracking import TrackedModule, owner_of, parameter_of


@dataclass
class CallHooks:
    """The hooks on one tracked module.

    Attributes:
        tracked: The module.
        state: What all hooks on the model share.
    """

    tracked: TrackedModule
    state: CaptureState
    _first: RemovableHandle = field(init=False)
    _last: RemovableHandle = field(init=False)
    _prepares: bool = field(init=False)
    _names: tuple[str, ...] = field(init=False)

    def install(self, handles: list[RemovableHandle]) -> None:
        """Put them on the module.

        Args:
            handles: Where what takes them away again is added, in the line that puts them there.
        """
        module = self.tracked.module
        self._prepares = type(self.tracked.sampler).prepare is not GradientSampler.prepare
        self._names = tuple(each.name for each in self.tracked.parameters.values())
        before, after = Hook(self._before), Hook(self._after)
        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        self._last = handles[-1]
        # First among the module's hooks: a user's hook may change the output.
        register = partial(module.register_forward_hook, prepend=True, with_kwargs=True)
        handles.append(register(after, always_call=True))
        self._first = handles[-1]

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not self.state.listens(module, self.tracked.module, begins=True):
            return
        if not self._prepares:  # no module runs
            unseen(self._begin, module, args, kwargs)
            return
        with self.state.silence():
            self._begin(module, args, kwargs)

    def _begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._guard(module)
        if in_transform() and torch.is_grad_enabled():
            raise in_parts(f"{self.tracked.label} was called", self.tracked.name)
        running = Running(self.tracked)
        self.state.running.append(running)
        if not torch.is_grad_enabled():
            return
        if not self.tracked.row_owner and self._let_share(args, kwargs):
            running.shared = True
            if self.state.flags:
                for local in self.tracked.parameters:
                    running.lend(parameter_of(module, local))
            if self._prepares and not self.tracked.sampler.replays:
                self._prepare(running)
            return
        if self.tracked.sampler.replays:
            running.lifted, running.lift = self._try_lift(args, kwargs)
            if running.lifted and running.lift is None:
                return
        if self._prepares:
            self._prepare(running)
        if self.state.withholds(self.tracked):
            for local in self.state.made(self.tracked):
                running.withhold(parameter_of(module, local))

    def _prepare(self, running: Running) -> None:
        """Let the sampler keep something of the state right before the module runs."""
        with self.tracked.blame:
            running.before = self.tracked.sampler.prepare(self.tracked.module)

    def _let_share(self, args: Any, kwargs: Any) -> bool:
        """Let the call be followed if it is on nothing of the samples; return whether it is."""
        name, sharing = self.tracked.name, self.state.sharing
        if in_backward():
            return name in self.state.shared_modules
        if sharing is None or not name:
            return False
        if not sharing.is_shared_call(args, kwargs):
            if not self.tracked.shared:
                return False
            given = tensors_in((args, kwargs))
            if self.state.flags and any(value.requires_grad for value in given):
                raise declared_wrongly(self.tracked.label)
        if any(backward_hooks(self.tracked.module)):
            raise hooked(self.tracked.label)
        self.state.shared_modules.add(name)
        return True

    def _try_lift(self, args: Any, kwargs: Any) -> tuple[bool, Lift | None]:
        """Decide, or try, to follow a module's parameters instead of running the call again.

        Returns:
            Whether they are, and what is noted of it where that is yet to be decided.
        """
        name, known = self.tracked.name, self.state.lifted
        if self.state.sharing is None or in_backward():
            return known.get(name, False), None
        if is_joined(self.state, self.tracked, args, kwargs):
            known[name] = True
            return True, None
        if not self.state.verifier.watching:
            return known.get(name, False), None
        # A closed form keeps what a checkpoint would not, and takes no rows of another number.
        tracked = self.tracked
        settled = not tracked.sampler.generic or bool(tracked.row_owner) or tracked.unit
        if settled or saves_elsewhere():
            known[name] = False
            return False, None
        lift = Lift(frozenset(each.name for each in self.tracked.parameters.values()))
        return True, lift

    def _guard(self, module: nn.Module) -> None:
        """Refuse calls that the hooks would not see as they are."""
        before, after = innermost_hooks(module)
        if after != self._first.id:
            raise changed_before(self.tracked.label)
        if before != self._last.id:
            raise used_before(self.tracked.label)
        for running in self.state.running:
            if running.tracked is self.tracked:
                raise CaptureError(
                    f"{self.tracked.label} called itself, which cannot be captured: exclude it"
                )
        own = direct_parameters(module)
        for local in self.tracked.parameters:
            parameter = own.get(local) if "." not in local else self._inside(module, local)
            if parameter is not None and not parameter.is_leaf:
                raise called_with_another(self.tracked.label, local)

    def _inside(self, module: nn.Module, local: str) -> nn.Parameter | None:
        owner, name = owner_of(module, local)
        return direct_parameters(owner).get(name)

    def _after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """Return what a module returned with a Tap behind it; None to leave it as it is."""
        if not self.state.listens(module, self.tracked.module):
            return None
        assert self.state.batch is not None
        try:
            return silently(self.state.batch.silence, self._ended, args, kwargs, output)
        except BaseException:
            # The root's own hooks go on, whoever failed: there is nothing left to verify.
            pass_, batch = self.state.pass_, self.state.batch
            if module is self.state.model and pass_ is not None and batch is not None:
                batch.passes.remove(pass_)
                self.state.pass_ = None
            raise

    def _ended(self, args: Any, kwargs: Any, output: Any) -> Any:
        ended = self._finished()
        if output is None:
            return None
        before = None
        if ended is not None:
            if self.state.settle(ended, output) if ended.lift is not None else ended.lifted:
                assert self.state.batch is not None
                self.state.batch.seen.add(self.tracked.name)
                return None
            before = ended.before
            if ended.shared:
                return self._followed(args, kwargs, output, before)
        if self._is_plain(args, kwargs, output):
            return unseen(self._tapped, args, kwargs, output, before)
        return self._tapped(args, kwargs, output, before)

    def _is_plain(self, args: Any, kwargs: Any, output: Any) -> bool:
        """Tell whether nothing but torch's own tensors is there, and no code of the user's runs."""
        if kwargs or type(output) is not Tensor or self.tracked.sampler.replays:
            return False
        return [*map(type, args)] == [Tensor] * len(args)

    def _finished(self) -> Running | None:
        """End the call, if its beginning was seen."""
        running = self.state.running
        if not running or running[-1].tracked is not self.tracked:
            return None
        if running[-1].withheld or running[-1].lent:
            running[-1].restore()
        return running.pop()

    def _followed(self, args: Any, kwargs: Any, output: Any, before: object) -> Any:
        """Follow what a module computed from nothing of the samples."""
        sharing = self.state.sharing
        if sharing is None:  # a recomputation
            return None
        leaves, structure = tree_flatten(output)
        taken = [at for at, leaf in enumerate(leaves) if _is_differentiable(leaf, False)]
        outputs = [leaves[at] for at in taken]
        followed = sharing.returned(self.tracked, args, kwargs, outputs, before)
        for at, value in zip(taken, followed, strict=True):
            leaves[at] = value
        return tree_unflatten(leaves, structure)

    def _tapped(self, args: Any, kwargs: Any, output: Any, before: object) -> Any:
        """Put a Tap behind the tensors of an output that gradients can reach."""
        batch = self.state.batch
        assert batch is not None
        name = self.tracked.name
        if not torch.is_grad_enabled():
            if self.state.pass_ is not None:
                batch.unseen.add(name)
            return None
        if self.state.pass_ is None and not in_backward():
            raise CaptureError(
                f"{name} was called outside a call of the model: call the module that the "
                "engine was made for, or close the batch first"
            )
        # Where parameters are frozen, outputs get a graph from their Tap.
        made = self.state.made(self.tracked)
        withheld = bool(made) and self.state.withholds(self.tracked)
        frozen = bool(self.state.flags) or withheld
        if type(output) is Tensor:  # as nearly all are: no tree to walk
            if not self._is_reached(output, frozen):
                batch.unseen.add(name)
                return None
            batch.seen.add(name)
            return self._record(args, kwargs, [output], before, made, withheld)[0]
        leaves, structure = tree_flatten(output)
        taken = [at for at, leaf in enumerate(leaves) if self._is_reached(leaf, frozen)]
        if not taken:
            batch.unseen.add(name)
            return None
        batch.seen.add(name)
        outputs = [leaves[at] for at in taken]
        tapped = self._record(args, kwargs, outputs, before, made, withheld)
        for at, value in zip(taken, tapped, strict=True):
            leaves[at] = value
        return tree_unflatten(leaves, structure)

    def _is_reached(self, leaf: object, frozen: bool) -> bool:
        """Tell whether gradients arrive at an output; refuse complex and nested ones."""
        if not isinstance(leaf, Tensor):
            return False
        if leaf.is_nested:
            raise CaptureError(
                f"{self.tracked.label} returned a nested tensor: pad it, or exclude it"
            )
        if leaf.is_complex():
            raise CaptureError(f"{self.tracked.label} returned complex numbers: exclude it")
        return (frozen or leaf.requires_grad) and leaf.is_floating_point()

    def _record(
        self,
        args: Any,
        kwargs: Any,
        outputs: list[Tensor],
        before: object,
        made: tuple[str, ...],
        withheld: bool,
    ) -> tuple[Tensor, ...]:
        """Record a call and return its outputs with a Tap behind them."""
        state, tracked, batch = self.state, self.tracked, self.state.batch
        assert batch is not None
        # A recomputation belongs to the last pass, or fails on the sizes of what it recomputes.
        pass_ = state.pass_ or batch.passes[-1]
        owner = pass_.owners[tracked.row_owner] if tracked.row_owner else None
        watching, routes = state.verifier.watching, state.verifier.routes
        routes = routes or (watching and is_lone_row(state, tracked, args, kwargs, pass_.n))
        axes, refusal = find_axes(
            tracked, outputs, pass_.n, owner, foldable=state.verifying, routes=routes
        )
        site = Site((tracked.name,), "", [axes], refusal)
        state.told_apart = state.told_apart or axes.tell_apart(outputs)
        call = describe(tracked, outputs, axes, args, kwargs, before)
        given = outputs
        outputs = self._expanded(outputs, axes) if watching else axes.expanded(outputs)
        ends = outputs[0], given[0]
        kept, saved = without_gradients(precisely, ends[0].device, self._kept, call, axes, *ends)
        if state.pass_ is not None:
            state.pass_.use(*self._names)
        parameters = [parameter_of(tracked.module, local) for local in made] if made else ()
        past = call.past()
        delivery = Delivery(state, batch, state.pass_, tracked, past, site, kept, made, withheld)
        state.add(site)
        tapped = tap(delivery.deliver, state.seed, outputs, parameters, saved, tracked.label)
        if outputs is not given and state.verifying:
            for output, was in zip(tapped, given, strict=True):
                if output.shape != was.shape:  # expanded from one row
                    state.verifier.watch(output, tracked)
        return tapped

    def _kept(
        self, call: Call, axes: RowAxes, output: Tensor, given: Tensor
    ) -> tuple[list[Kept], list[Tensor]]:
        """Let the sampler record a call, and the engines keep what it recorded.

        Args:
            call: The call.
            axes: Where it has its rows.
            output: The first of its outputs, with all rows.
            given: The same as the module returned it.
        """
        tracked, batch = self.tracked, self.state.batch
        assert batch is not None
        try:
            records = tracked.sampler.record(call)
        except Exception as error:
            tracked.blame.note(error)
            raise
        if output is not given and output.shape != given.shape:
            records = {local: record.expand(axes.count) for local, record in records.items()}
        return keep(batch.listeners, tracked, records)

    def _expanded(self, outputs: list[Tensor], axes: RowAxes) -> list[Tensor]:
        """Return outputs with all their rows, while the pass is watched.

        What was expanded has memory of its own then, so that an operation in place comes as far as
        being found; and so has a part of a parameter that a module returns, which is no use of the
        parameter from there on.
        """
        rows = axes.expanded(outputs)
        memory = {address(parameter) for parameter in self.tracked.module.parameters()}
        return [
            row.clone() if row.shape != was.shape or address(row) in memory else row
            for row, was in zip(rows, outputs, strict=True)
        ]


def _is_differentiable(leaf: object, frozen: bool) -> bool:
    """Tell whether gradients can arrive at an output; frozen ones get a graph from their Tap."""
    if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
        return False
    return frozen or leaf.requires_grad
