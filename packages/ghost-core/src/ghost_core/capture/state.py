"""What the hooks on one model share while engines are attached to it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from enum import Enum
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from ghost_core._torch import in_backward, is_of_torch
from ghost_core.capture.batch import BatchCapture
from ghost_core.capture.freeze import Freeze
from ghost_core.capture.listener import Listener, Pass
from ghost_core.capture.refusals import in_another_thread
from ghost_core.capture.silence import is_silent, silent
from ghost_core.restoring import restored, undo
from ghost_core.split import Balance, Lift, Site, Verifier
from ghost_core.tracking import Followed, TrackedModule, parameter_of


class Audience(Enum):
    """Who the gradients of the backward pass that runs are for."""

    ENGINES = "engines"
    """The loss is backpropagated, and gradients become those of parameters."""
    PROBE = "probe"
    """The verification looks at which rows gradients reach."""
    NOBODY = "nobody"
    """They never become parameters' gradients, or are none of the batch's."""


@dataclass
class Running:
    """A tracked module's call on its way.

    Attributes:
        tracked: The module.
        before: What its sampler kept before the call.
        shared: Whether it is called on nothing of the samples.
        lifted: Whether its parameters are followed as if they were used outside of it.
        lift: What is known of that in a pass that is watched; None where it is settled.
        withheld: The parameters that do not require gradients meanwhile, since an engine makes
            these.
        lent: The frozen ones that do meanwhile, since what they compute is shared.
    """

    tracked: TrackedModule
    before: object = None
    shared: bool = False
    lifted: bool = False
    lift: Lift | None = None
    withheld: list[nn.Parameter] = field(default_factory=list)
    lent: list[nn.Parameter] = field(default_factory=list)

    def withhold(self, parameter: nn.Parameter) -> None:
        """Keep autograd from making a parameter's gradient."""
        if parameter.requires_grad:
            self.withheld.append(parameter)
            parameter.requires_grad_(False)

    def lend(self, parameter: nn.Parameter) -> None:
        """Let autograd take gradients back to a frozen parameter."""
        if not parameter.requires_grad:
            self.lent.append(parameter)
            parameter.requires_grad_(True)

    def restore(self) -> None:
        """Let all parameters be as they were."""
        for parameter in self.withheld:
            parameter.requires_grad_(True)
        for parameter in self.lent:
            parameter.requires_grad_(False)


class Sharing(ABC):
    """Follows values that are the same for all samples."""

    @abstractmethod
    def is_shared_call(self, args: Any, kwargs: Any) -> bool:
        """Tell whether a module is called on nothing of the samples."""

    @abstractmethod
    def returned(
        self, tracked: TrackedModule, args: Any, kwargs: Any, outputs: Sequence[Tensor], before: Any
    ) -> list[Tensor]:
        """Follow the outputs of such a call, and return what takes their place."""

    @abstractmethod
    def is_returned(self, values: Any, lift: Lift, axis: int) -> bool:
        """Tell whether a call returns what is followed in it, and has to run again for that."""

    @abstractmethod
    def keep_returned(self, values: Any, lift: Lift) -> None:
        """Follow for good what a call returns, which does not run again."""


@dataclass
class CaptureState:
    """What the hooks on one model share.

    Attributes:
        model: The root module.
        seed: A scalar that requires grad, which every Tap takes.
        attached: Listeners and what they do to weight gradients, in order of attachment.
        tracked: The modules that any of them tracks, by name.
        flags: What `requires_grad` was before parameters were frozen; empty if they are not.
        verifier: Proves the split by sample.
        balance: Compares contributions with autograd's gradients; None where nothing is compared.
        batch: The open batch.
        pass_: The call of the root that is on its way.
        running: Calls of tracked modules that are on their way, the innermost last.
        sharing: Follows shared values in this pass; None where there are none.
        shares: Whether passes of this model have shared values; None as long as nobody looked.
        shared_names: The parameters that are used in shared values.
        allowed: Those that the operation which runs may use, since it is followed.
        shared_modules: The modules that are called on nothing of the samples.
        lifted: The modules whose parameters are followed, instead of running them again; false for
            those that were tried.
        followed: What parameters met the samples in, by name; see `Followed`.
        recomputed: The frozen parameters that are followed where a checkpoint runs code again.
        dim: Axis of the samples in the root's inputs and outputs.
        told_apart: Whether a module in this pass had a row for each sample.
        resting: Whether the user runs the model, so that hooks let everything pass.
        corrections: What a parameter gets beside what autograd makes for it, by name, while
            gradients of a shared value are told apart.
    """

    model: nn.Module
    seed: Tensor
    verifier: Verifier
    attached: list[tuple[Listener, Freeze]] = field(default_factory=list)
    tracked: dict[str, TrackedModule] = field(default_factory=dict)
    flags: dict[nn.Parameter, bool] = field(default_factory=dict)
    balance: Balance | None = None
    batch: BatchCapture | None = None
    pass_: Pass | None = None
    running: list[Running] = field(default_factory=list)
    sharing: Sharing | None = None
    shares: bool | None = None
    shared_names: set[str] = field(default_factory=set)
    allowed: frozenset[str] = frozenset()
    shared_modules: set[str] = field(default_factory=set)
    lifted: dict[str, bool] = field(default_factory=dict)
    followed: Followed = field(default_factory=dict)
    recomputed: set[str] = field(default_factory=set)
    dim: int = 0
    told_apart: bool = False
    resting: bool = False
    corrections: dict[str, Tensor] = field(default_factory=dict)

    @property
    def paused(self) -> bool:
        """Whether hooks let everything pass that runs in this thread."""
        return self.resting or (self.batch is not None and is_silent(self.batch.silence))

    @property
    def audience(self) -> Audience:
        """Who the gradients of the backward pass that runs are for."""
        verifier, batch = self.verifier, self.batch
        if verifier.probe is not None:
            return Audience.PROBE
        if self.resting or (batch is not None and is_silent(batch.silence)):  # as `paused` says
            return Audience.NOBODY
        return Audience.ENGINES if verifier.is_training else Audience.NOBODY

    @property
    def verifying(self) -> bool:
        """Whether the open batch is to be verified."""
        if self.batch is not None:
            for listener in self.batch.listeners:  # no generator: it is asked for each Tap
                if listener.verifies:
                    return True
        return False

    def listens(self, module: nn.Module, expected: nn.Module, *, begins: bool = False) -> bool:
        """Tell whether a hook is to look at a call.

        Not at one of a copy, nor where it is paused, nor in a thread that the batch is not of. What
        is recomputed is in threads of autograd's.

        Args:
            module: The module that is called.
            expected: The one that the hook was made for.
            begins: Whether the call begins, so that one with gradients is refused in a thread that
                the batch is not of.
        """
        batch = self.batch
        if module is not expected or batch is None:
            return False
        if self.resting or is_silent(batch.silence):  # as `paused` says
            return False
        if batch.thread == get_ident() or in_backward():
            return True
        if begins and torch.is_grad_enabled():
            raise in_another_thread()
        return False

    def made(self, tracked: TrackedModule) -> tuple[str, ...]:
        """Return the parameters whose gradients an engine makes in the open batch, local names."""
        assert self.batch is not None
        for listener, freeze in self.attached:
            if freeze is Freeze.CALL and listener in self.batch.listeners:
                names = listener.tracking.names  # there is only one such engine
                kept = tracked.parameters.items()
                return tuple(local for local, parameter in kept if parameter.name in names)
        return ()

    def withholds(self, tracked: TrackedModule) -> bool:
        """Tell whether autograd is kept from making the gradients that an engine makes.

        In a pass that is watched it makes all, to compare with. In a module that code of the user's
        runs in, too: a checkpoint there runs it again when the module is over, and has to find
        parameters as they were.
        """
        inside = tracked.sampler.replays and not is_of_torch(tracked.module)
        return not self.verifier.watching and not inside

    def reweights(self) -> bool:
        """Tell whether an engine makes other gradients in the open batch than autograd does."""
        assert self.batch is not None
        return any(
            freeze is Freeze.CALL and not listener.plain_sums
            for listener, freeze in self.attached
            if listener in self.batch.listeners
        )

    def correct(self, account: str, name: str, correction: Tensor) -> None:
        """Note what a parameter gets beside what autograd makes for it."""
        if self.balance is not None:
            self.balance.correct(account, correction)
        before = self.corrections.get(name)
        self.corrections[name] = correction if before is None else before + correction

    def add(self, site: Site) -> None:
        """Add a site to the pass that is on its way; a recomputation adds none."""
        assert self.batch is not None
        if self.pass_ is not None:
            batch, same = self.batch, (site.names, site.operation)
            number = batch.places.get(same, 0)
            site.place = *same, number
            batch.places[same] = number + 1
            batch.sites.append(site)
            if site.axes.routed:
                self.verifier.routes = True

    def freeze(self) -> None:
        """Let no parameter require gradients, and remember which did."""
        self.flags |= {each: each.requires_grad for each in self.model.parameters()}
        for parameter in self.flags:
            parameter.requires_grad_(False)

    def thaw(self) -> None:
        """Let parameters require gradients as they did before."""
        for parameter, flag in self.flags.items():
            parameter.requires_grad_(flag)
        self.flags.clear()

    @property
    def comparable(self) -> bool:
        """Whether autograd makes the gradients that contributions of the open batch add up to."""
        assert self.batch is not None
        balanced = all(each.balanced for each in self.batch.listeners)
        engines_make = any(freeze is Freeze.CALL for _, freeze in self.attached)
        return balanced and not self.flags and (self.verifier.watching or not engines_make)

    def compare(self, parameters: Mapping[str, nn.Parameter]) -> Balance:
        """Compare what arrives for parameters with autograd's gradients, once that is opened."""
        self.balance = Balance(parameters, lambda: self.audience is Audience.ENGINES)
        return self.balance

    def balanced(self) -> dict[str, nn.Parameter]:
        """Return parameters to compare: all while verifying, those without a formula always."""
        found: dict[str, nn.Parameter] = {}
        watching, shared = self.verifier.watching, self.shared_names
        for tracked in self.tracked.values():
            every = watching or tracked.sampler.generic
            for local, parameter in tracked.parameters.items():
                if every or "." in local or parameter.name in shared:  # as `compares_always`
                    found[parameter.name] = parameter_of(tracked.module, local)
        return found

    def compares_always(self, tracked: TrackedModule, local: str) -> bool:
        """Tell whether a parameter is compared in every batch, where autograd makes its gradient.

        Only there may the comparison share the engines' work: dots are rounded in one way, then,
        in a batch that is watched and in later ones, so that a run that is resumed is as it was.
        """
        shared = tracked.parameters[local].name in self.shared_names
        return tracked.sampler.generic or "." in local or shared

    def called_on_samples(self, inputs: Iterable[Tensor]) -> bool:
        """Tell whether the model is called on samples, given its inputs.

        It is where they are joined in some tensor, too, or said not to be in others.
        """
        assert self.batch is not None
        assert self.pass_ is not None
        n = self.pass_.n
        for value in inputs:  # no generators: it is asked for in each pass
            for axis in (0, self.dim):
                if value.dim() > axis and value.size(axis) == n:
                    return True
        return self.batch.joined or any(each.shared for each in self.tracked.values())

    def owned(self) -> frozenset[str]:
        """Return the parameters of the modules that run."""
        names: set[str] = set()
        for running in self.running:  # no generator: it is asked for each use of a parameter
            if not running.lifted:
                names.update([each.name for each in running.tracked.parameters.values()])
        return frozenset(names)

    def runs_alone(self) -> TrackedModule | None:
        """Return the module whose parameters are its own to use now; none where any are tried."""
        if not self.running or self.running[-1].lifted:
            return None
        for running in self.running:  # no generator: it is asked for each function of torch
            if running.lift is not None:
                return None
        return self.running[-1].tracked

    def lift_of(self, name: str) -> Lift | None:
        """Return the call in which it is being tried whether a parameter can be followed."""
        for running in reversed(self.running):
            lift = running.lift
            if running.lifted and lift is not None and name in lift.names:
                return lift
        return None

    def give_up(self, lifts: Iterable[Lift]) -> None:
        """Leave parameters to be told by running calls again, in place of following them."""
        for lift in lifts:
            lift.given_up = True
            for running in self.running:
                running.lifted = running.lifted and running.lift is not lift
            if self.batch is not None:
                self.batch.sites[:] = sites = [site for site in self.batch.sites if site.counts]
                self.batch.places = Counter((site.names, site.operation) for site in sites)
            if self.balance is not None:
                self.balance.forget(lift.accounts)

    def settle(self, ended: Running, output: Any) -> bool:
        """Settle whether what a call did with its parameters is followed, now that it is over."""
        lift, name = ended.lift, ended.tracked.name
        if lift is None:
            return ended.lifted
        hidden, axis = self.verifier.used_outside(lift.names), ended.tracked.batch_dim
        self.verifier.forget(lift.names)
        if hidden or (self.sharing is not None and self.sharing.is_returned(output, lift, axis)):
            self.give_up([lift])
        if not lift.given_up:
            if self.sharing is not None:
                self.sharing.keep_returned(output, lift)
            self.shared_names |= lift.names
            for parameter, operations in lift.operations.items():
                self.followed.setdefault(parameter, {}).update(operations)
        self.lifted[name] = not lift.given_up and self.lifted.get(name, True)
        return not lift.given_up

    def usable(self) -> frozenset[str]:
        """Return the parameters that may be used now: of modules that run, shared, or let be."""
        if self.paused:
            return frozenset(
                parameter.name
                for tracked in self.tracked.values()
                for parameter in tracked.parameters.values()
            )
        return self.owned() | self.allowed

    def silence(self) -> AbstractContextManager[None]:
        """Let calls of modules pass for a while: a sampler runs them, outside of foreign modes."""
        return silent(object() if self.batch is None else self.batch.silence)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Let calls of modules pass for a while: the user runs them."""
        with restored() as stack:
            undo(stack, setattr, self, "resting", self.resting)
            self.resting = True
            yield

    def forget_pass(self) -> None:
        """Forget a pass that an exception cut short, and give back what its calls withheld."""
        self.pass_ = None
        while self.running:
            self.running[-1].restore()
            self.running.pop()
