"""Follows values that are the same for all samples to where they meet the samples.

Positions that are looked up once for all samples, a table of relative positions, a class token or
the weight of a tied head are no rows of samples: autograd adds up what all samples do to them. Each
sample's part can be told where such a value meets the samples, in one row of a result:

    pos = wpe(arange(T))            `[T, d]`, of no sample: followed, whatever T and N are
    pos = pos * 0.5                 still of no sample
    x = wte(ids) + pos              they meet: row n of x belongs to sample n

In the backward pass, the gradient of x arrives unreduced. That of its row n alone, taken back to
the parameters through the graph that is there, is the gradient of sample n, whatever else is true
of the value: calling a value shared that is not costs time, and nothing else. Training is as it
was: the graph is the user's, with one identity more.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from ghost_core._torch import (
    FunctionMode,
    exchanged,
    in_backward,
    in_checkpoint,
    in_transform,
    saves_elsewhere,
    tensors_in,
    tree_map,
    version,
)
from ghost_core.capture.closed_forms import closed_forms, derived
from ghost_core.capture.functions import QUESTIONS, is_attribute, is_in_place, named, results
from ghost_core.capture.meeting import Meeting, give_up_costly, note_followed
from ghost_core.capture.ordinary import is_seen, on_samples_alone
from ghost_core.capture.own_backward import follow_function
from ghost_core.capture.parameters import Sources, may_have_rows
from ghost_core.capture.refusals import written_to_samples
from ghost_core.capture.rows_met import site_of
from ghost_core.capture.sources import CallSource, Form, ParameterSource, Shared, Source
from ghost_core.capture.state import CaptureState, Sharing
from ghost_core.capture.tap import tap
from ghost_core.errors import WrongSplitError
from ghost_core.split import Lift
from ghost_core.tracking import TrackedModule, parameter_of

Met = tuple[tuple[Tensor, Shared], ...]  # each with what stands for it in one operation alone


class SharedValues(FunctionMode, Sharing):
    """Follows shared values through one pass.

    Args:
        state: What the hooks on the model share.
        inputs: What the model is called on.
    """

    def __init__(self, state: CaptureState, inputs: Any) -> None:
        super().__init__()
        self._state = state
        self._sources = Sources(state)
        # Kept, so that their identities are not given away.
        self._shared: dict[int, Shared] = {}
        self._constant: dict[int, tuple[Tensor, int]] = {}  # each with how often it was written to
        # Of those that are gone by now, identities may be given away: none is one of these, then.
        self._samples = {id(value): ref(value) for value in tensors_in(inputs)}

    def depends(self, value: Tensor) -> bool:
        """Tell whether a value may belong to samples."""
        at = id(value)
        if at in self._shared:
            return False
        if at in self._constant:  # unless samples were written to it, or to what it is a view of
            return value.grad_fn is not None and version(value) != self._constant[at][1]
        return value.grad_fn is not None or (at in self._samples and self._samples[at]() is value)

    def is_shared_call(self, args: Any, kwargs: Any) -> bool:
        """Tell whether a module is called on nothing of the samples."""
        if type(args) is tuple and args and type(args[0]) is Tensor and self.depends(args[0]):
            return False  # as nearly all calls are
        return not any(map(self.depends, tensors_in((args, kwargs) if kwargs else args)))

    def returned(
        self, tracked: TrackedModule, args: Any, kwargs: Any, outputs: Sequence[Tensor], before: Any
    ) -> list[Tensor]:
        """Follow the outputs of a module that was called on nothing of the samples.

        Args:
            tracked: The module.
            args: Its positional inputs.
            kwargs: Its keyword inputs.
            outputs: Its outputs.
            before: What its sampler kept before the call.

        Returns:
            What takes their place.
        """
        own = {
            local: self._sources.of(parameter_of(tracked.module, local), stand_in=False)
            for local in tracked.parameters
        }
        self._state.shared_names |= {source.parameter.name for source in own.values()}
        form = None
        if len(outputs) == 1 and not tracked.sampler.replays:
            form = Form.of(self._state, tracked, (args, kwargs, outputs[0], before), own)
        return [self._follow(tracked, output, form, own.values()) for output in outputs]

    def is_returned(self, values: Any, lift: Lift, axis: int) -> bool:
        """Tell whether a call returns what is followed in it, and has to run again for that.

        Numbers, such as a temperature that a model returns beside embeddings, belong to no sample.
        Neither do values that have no rows, such as a slice of a table of positions: these are
        followed from there on.
        """
        for value in tensors_in(values):
            owned = self._sources.owners.get(id(value))
            if owned is not None and owned[2].name in lift.names:
                return True
        assert self._state.pass_ is not None
        n = self._state.pass_.n
        return any(may_have_rows(each, axis, n) for each in self._followed_in(lift, values))

    def keep_returned(self, values: Any, lift: Lift) -> None:
        """Follow for good what a call returns, which does not run again."""
        for each in list(self._followed_in(lift, values)):
            self._shared[id(each.value)] = self._sources.settled(each, lift)

    def _followed_in(self, lift: Lift, values: Any) -> Iterator[Shared]:
        """Yield what is followed in a call, among values that it returns."""
        for value in tensors_in(values):
            shared = self._shared.get(id(value)) if value.dim() else None
            if shared is not None and lift in shared.lifts():
                yield shared

    def _follow(
        self,
        tracked: TrackedModule,
        output: Tensor,
        form: Form | None,
        own: Iterable[ParameterSource],
    ) -> Tensor:
        given = self._shared.get(id(output))  # what the module was called on may be shared itself
        found: Iterable[Source] = (*(() if form else own), *(given.sources if given else ()))
        behind = tuple(dict.fromkeys(found))
        if form is None and not self._state.flags:
            self._shared[id(output)] = Shared(output, behind)
            return output
        account, tensor = f"{tracked.name}, an output", output
        if self._state.flags:
            tensor = output.detach().requires_grad_()
            account = self._sources.watch(account, tensor)
        source = CallSource(tensor, output, form, behind, account, self._state)
        self._sources.label(source, tracked.name)
        copy = source.copied()
        self._shared[id(copy.value)] = copy
        return copy.value

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and look at where its values come from."""
        kwargs = kwargs or {}
        if func in QUESTIONS:
            return func(*args, **kwargs)
        given = [*args, *kwargs.values()]
        plain = on_samples_alone(
            given, self._shared, self._constant, self._sources.owners, self._state
        )
        if plain and func is not torch.autograd.grad:  # as nearly all are
            result = func(*args, **kwargs)
            known = type(result) is Tensor and result.requires_grad  # its graph leads to samples
            return result if known or self._is_let_be(func) else self._noted(result, depends=True)
        if self._is_let_be(func):
            return func(*args, **kwargs)
        return self._followed(func, args, kwargs)

    def _is_let_be(self, func: Any) -> bool:
        """Tell whether nothing is noted of what a function does."""
        return self._state.paused or in_backward() or is_attribute(func)

    def _followed(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operation that may have to do with what is the same for all samples."""
        given = tensors_in((args, kwargs) if kwargs else args)
        following = torch.is_grad_enabled()
        if following:
            self._meet_functions(given)
        if func is torch.autograd.grad:  # which a Tap lets pass once
            self._state.give_up(run.lift for run in self._state.running if run.lift is not None)
        shared = self._shared_among(given) if following else {}
        depends = any(map(self.depends, given))
        if depends and is_in_place(func):
            self._state.give_up(lift for each in shared.values() for lift in each.lifts())
            if live := [each for each in shared.values() if each.live]:
                raise written_to_samples(named(func), self._sources.names(live))
            shared = {}
            for value in results(func, args, None):
                self._shared.pop(id(value), None)
        if shared:
            return self._combined(func, args, kwargs, shared, depends)
        return self._noted(func(*args, **kwargs), depends)

    def _combined(
        self, func: Any, args: Any, kwargs: Any, shared: Mapping[int, Shared], depends: bool
    ) -> Any:
        """Run an operation on shared values, which meet samples there if it depends on some.

        It may use the parameters that are in these. Where nothing comes of it that has a gradient,
        as of a shape, it was no use of them.
        """
        state, values = self._state, shared.values()
        found = [source for each in values for source in each.sources]
        sources = [each for each in found if isinstance(each, ParameterSource) and each.live]
        before = state.allowed
        try:
            state.allowed = frozenset([each.parameter.name for each in sources])
            if depends:
                stands = {at: each.value.view_as(each.value) for at, each in shared.items()}
            else:  # only what stands for a frozen parameter is another one than what was given
                stands = {at: each.value for at, each in shared.items() if id(each.value) != at}
            if stands:
                args = exchanged(args, stands)
                kwargs = dict(zip(kwargs, exchanged(kwargs.values(), stands), strict=True))
            if state.flags and getattr(func, "__name__", "") == "group_norm":
                args = self._with_graph(args)
            result = func(*args, **kwargs)
        finally:
            state.allowed = before
        used = [value for value in results(func, args, result) if value.requires_grad]
        if used:
            state.shared_names.update([s.parameter.name for s in sources if s.lift is None])
        if not depends:
            self._derive(func, args, used, values)
            return result
        met = tuple([(stands[at], each) for at, each in shared.items()])
        return tree_map(lambda leaf: self._met(func, args, kwargs, leaf, met), result)

    def _with_graph(self, args: Sequence[Any]) -> Sequence[Any]:
        """Let gradients reach the input of a group norm; see `ghost_core.differentiation`."""
        if not args or args[0].requires_grad:
            return args
        return *tap(lambda saved, grads: (), self._state.seed, [args[0]], (), ()), *args[1:]

    def note(self, given: Any, result: Any) -> None:
        """Note what came of something that ran unseen, without gradients."""
        self._noted(result, any(map(self.depends, tensors_in(given))))

    def _noted(self, result: Any, depends: bool) -> Any:
        """Note whether values without shared ones among them may belong to samples."""
        for value in tensors_in(result):
            if not depends:
                self._constant[id(value)] = value, version(value)
            elif not value.requires_grad:
                self._samples[id(value)] = ref(value)
        return result

    def _derive(
        self, func: Any, args: Any, values: Iterable[Tensor], shared: Collection[Shared]
    ) -> None:
        """Note values computed from shared ones alone."""
        made = [value for value in values if id(value) not in self._sources.owners]
        lifts = [lift for each in shared for lift in each.lifts()]
        for value in made if lifts else ():
            self._state.verifier.know(value, frozenset().union(*(each.names for each in lifts)))
        for value in made:
            self._shared[id(value)] = derived(func, args, shared, value)

    def _shared_among(self, given: Iterable[Tensor]) -> dict[int, Shared]:
        """Return shared values by the identity of what was given."""
        found: dict[int, Shared] = {}
        tries = self._state.verifier.watching  # only there it is being tried to follow anything
        for value in given:
            owned = self._sources.owners.get(id(value))
            plain = owned is None or owned[1] is self._state.runs_alone()
            if plain and id(value) not in self._shared:
                continue
            if tries:
                self._give_up_hidden(value)
            if owned is not None:
                if self._sources.is_lifted(value):
                    if self._state.flags and in_checkpoint():
                        self._state.recomputed.add(owned[2].name)
                    source = self._sources.of(value, stand_in=bool(self._state.flags))
                    found[id(value)] = Shared(source.tensor, (source,))
            elif self._shared[id(value)].live:
                found[id(value)] = self._shared[id(value)]
        return self._sources.whole(found)

    def _meet_functions(self, given: Iterable[Tensor]) -> None:
        """Follow what goes into custom functions, once their results are used."""
        batch = self._state.batch
        assert batch is not None
        for value in given:
            node: Any = value.grad_fn
            if node is None or is_seen(type(node)):
                continue
            if node not in batch.functions:
                entering = self._entering(node)
                batch.functions[node] = bool(entering)
                if entering:
                    sources = [each for shared in entering.values() for each in shared.reached()]
                    uses, names = self._noted_uses(sources), self._sources.names(entering.values())
                    follow_function(self._state, node, names, entering, uses)
            if batch.functions[node]:  # inside of it, it was not seen to come from samples
                self._constant.pop(id(value), None)

    def _entering(self, node: Any) -> dict[int, Shared]:
        """Return the shared values that go into a custom function, by position of its input.

        What modules do with their own parameters, and what is tried to follow, is not among them.
        """
        found: dict[int, Shared] = {}
        for at, (behind, number) in enumerate(node.next_functions):
            variable: Any = getattr(behind, "variable", None)
            if id(variable) in self._sources.owners and self._sources.is_lifted(variable):
                source = self._sources.of(variable, stand_in=False)
                found[at] = Shared(source.tensor, (source,))
            for shared in self._shared.values() if behind is not None else ():
                if shared.value.grad_fn is behind and shared.value.output_nr == number:
                    found[at] = shared
        return {at: each for at, each in found.items() if each.live and not any(each.lifts())}

    def _give_up_hidden(self, value: Tensor) -> None:
        """Run calls again that use what is followed where a Tap would not be what it is elsewhere.

        That is in parts of tensors, and where a checkpoint keeps nothing.
        """
        owned = self._sources.owners.get(id(value))
        lift = None if owned is None else self._state.lift_of(owned[2].name)
        lifts = [lift] if lift is not None else []
        if id(value) in self._shared:
            lifts += self._shared[id(value)].lifts()
        if lifts and (in_transform() or saves_elsewhere()):
            self._state.give_up(lifts)

    def _met(
        self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any, met: Met
    ) -> Any:
        """Put a Tap behind a result of shared values and samples."""
        if not isinstance(result, Tensor) or not result.requires_grad:
            return result
        state = self._state
        assert state.batch is not None
        assert state.pass_ is not None
        names = self._sources.names(each for _, each in met)
        try:
            site = site_of(state, result, names, "" if func is None else named(func))
        except WrongSplitError:
            state.give_up(lift for _, each in met for lift in each.lifts())
            if any(each.live for _, each in met):
                raise
            return result
        forms = closed_forms(func, args, kwargs, result, met)
        if state.verifier.watching:  # only there it is being tried to follow anything
            give_up_costly(state, site, met, forms)
        sources = [source for _, each in met for source in each.reached()]
        if not sources:
            return result
        lifts = [source.lift for source in sources if source.lift is not None]
        if len(lifts) == len(sources):
            site.lifts = tuple(lifts)
        state.batch.seen.update(names)
        state.add(site)
        state.told_apart = True
        versions = tuple([version(each.value) for _, each in met])
        note_followed(state.followed, site.operation, met, forms)
        corrected = self._noted_uses(sources)
        meeting = Meeting(
            state, state.batch, state.pass_, result, site, met, forms, versions, corrected
        )
        parameters, label = [source.tensor for source in corrected], ", ".join(names)
        (tapped,) = tap(meeting.deliver, state.seed, [result], parameters, (), label)
        return tapped

    def _noted_uses(self, sources: Sequence[ParameterSource]) -> tuple[ParameterSource, ...]:
        """Note the uses of parameters, and return those whose gradients need correction."""
        assert self._state.pass_ is not None
        for source in sources:
            self._state.pass_.use(source.parameter.name, shared=True)
        by_name = {source.parameter.name: source for source in sources}
        return tuple(by_name.values()) if self._state.reweights() else ()

    def returned_by_model(self, output: Any) -> Any:
        """Let shared values that a model returns meet the samples there.

        Raises:
            WrongSplitError: If one has no axis of samples.
        """
        self._meet_functions(tensors_in(output))

        def meet(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or not leaf.dim() or id(leaf) not in self._shared:
                return leaf  # a loss that uses a number for all samples is out of balance
            stand = leaf.view_as(leaf)
            return self._met(None, (), {}, stand, ((stand, self._shared[id(leaf)]),))

        return tree_map(meet, output)
