"""Finds a way to run a recorded call again, sample by sample if possible, and proves it.

A way has to return what the call did, for all samples, and to give the first and the last sample
the gradients that the call as a whole gives them. Outputs do not show everything: behind a gate of
zero, or beside values that are hundreds of times larger, other random numbers go unseen, and a hook
or a branch inside may change gradients alone.

The call as a whole is proven by itself: it gives the same gradients twice, and NaN in one sample's
gradient reaches no other sample's inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

import torch
from torch import Generator, Tensor, nn

from ghost_core.split import nan_in, numbers_in
from ghost_layers.replay.before import Guard, RefusalError
from ghost_layers.replay.closeness import are_close, same_rows
from ghost_layers.replay.gradients import gradients
from ghost_layers.replay.plan import Leaf, Output, Plan, Replay, Way, floating, forward

_SMALL = 2**16
"""Elements up to which gradients of parameters that are not asked for are compared, as of gates."""
_AMBIGUOUS = 4
"""Input tensors up to which all choices of what samples share are tried."""
_HALF = (torch.float16, torch.bfloat16)


@dataclass
class Search:
    """Compares ways to run a call with each other and with the call.

    Two samples with a mask that has two rows as well, `out = mask @ x * scale`:

        VMAP, x and mask by sample    mask[n] @ x[n] does not return what the call did
        VMAP, mask shared             mask @ x[n] does, and gives the same gradients: taken
        BATCH                         if neither did

    Attributes:
        plan: The call, with neither way nor positions of outputs decided.
        replay: Its tensors.
        recorded: Its outputs, rows first, with what is no output with rows.
        axes: Axis of the rows in each output as the module returned it; None for a scalar.
        parameters: First dotted names of the parameters, and whether they require grad.
        flexible: Whether a tensor with as many rows as the call may be shared by samples all the
            same.
    """

    plan: Plan
    replay: Replay
    recorded: tuple[Tensor, ...]
    axes: tuple[int | None, ...]
    parameters: Mapping[str, bool]
    flexible: bool
    _expected: dict[str, Tensor] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        """Give copies of the parameters asked for, and of what shares memory with them."""
        values, wanted = self.replay.values, set(self.plan.wanted.values())
        memory = {_memory(values[key]) for key in wanted}
        self._real = {key: value for key, value in values.items() if _memory(value) in memory}
        copies = {
            key: value.clone().requires_grad_(self.parameters.get(key, False))
            for key, value in self._real.items()
        }
        self._values = {**values, **copies}
        tied = {id(values[key]) for key in wanted}
        self._aliases = {key for key in copies.keys() - wanted if id(values[key]) in tied}
        for key in self.parameters.keys() - copies.keys():
            self._values[key] = values[key].detach().requires_grad_(self.parameters[key])

    def known(self, plan: Plan) -> bool:
        """Tell whether a plan that was found for a call like this holds for this one."""
        try:
            outputs = self._run(plan)
        except (RefusalError, torch.OutOfMemoryError):
            raise
        except Exception:  # no batching rule, control flow by value, a batch of one
            return False
        return self._same_outputs(outputs, self._recorded(plan))

    def find(self) -> Plan:
        """Return a plan that is proven.

        Raises:
            RefusalError: If there is none.
        """
        plan = self._as_it_was()
        for other in self._candidates(plan) if plan.count > 1 else ():
            if self._holds(other) and self._gives_the_gradients_of(plan, other):
                if self._shares_gradients(plan, other):
                    self._check_unmixed(plan)
                return other
        if not self._gives_the_gradients_of(plan, plan):
            raise RefusalError(
                "it returns something else each time that it runs: it draws random numbers from "
                "a generator that is neither torch's, Python's or numpy's global one nor its own, "
                "or keeps a state",
                "make it depend on its inputs, parameters and buffers alone",
            )
        if plan.count > 1:
            self._check_unmixed(plan)
        return plan

    def tells_all(self, plan: Plan) -> bool:
        """Tell whether gradients have shown all that they can, so that the plan may be remembered.

        Behind two gates of zero neither has a gradient, until one of them has moved.
        """
        if plan.way is not Way.VMAP:
            return True
        return all(bool(each.any()) for each in (self._expected or {}).values())

    # The call as it was

    def _as_it_was(self) -> Plan:
        """Find the outputs among what the module returns, and assert that it returns them again."""
        plan = replace(self.plan, way=Way.BATCH)
        returned = self._returned(plan, differentiable=False)
        taken = list(range(len(returned)))
        if len(returned) != len(self.recorded):
            again = self._returned(plan, differentiable=True)
            taken = [at for at, value in enumerate(again) if value.requires_grad]
        if len(taken) != len(self.recorded):
            raise RefusalError(
                f"run again, it returned {len(returned)} tensors for {len(self.recorded)}"
            )
        autocast = plan.autocast[1] is not None
        plan = replace(
            plan,
            outputs=tuple(
                Output(index, at, axis, self.recorded[index].dtype if autocast else None)
                for index, (at, axis) in enumerate(zip(taken, self.axes, strict=True))
                if axis is not None
            ),
        )
        outputs = [returned[each.at].movedim(each.axis, 0) for each in plan.outputs]
        if not self._same_outputs(outputs, self._recorded(plan)):
            raise RefusalError(
                "run again, it returned something else: it draws random numbers from a generator "
                "that is neither torch's, Python's or numpy's global one nor its own, keeps a "
                "state, or writes into what it is given",
                "make it depend on its inputs, parameters and buffers alone",
            )
        return plan

    def _returned(self, plan: Plan, *, differentiable: bool) -> list[Tensor]:
        """Run the module as it was and return its floating tensors.

        Args:
            plan: The call.
            differentiable: Whether inputs require grad as those of the call did.
        """
        given = [value.detach() for value in plan.whole(self.replay.inputs)]
        if differentiable:
            for value, leaf in zip(self.replay.inputs, given, strict=True):
                leaf.requires_grad_(value.requires_grad)
        guard = self._guard({key: self._values[key] for key in self._aliases})
        owners = {key.rpartition(".")[0] for key in self._aliases}

        def run(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            for owner in owners:
                guard.enter_with(module.get_submodule(owner))
            return forward(module, *args, **kwargs)

        with self._watched(plan, guard):
            try:
                returned = floating(plan.called(run, self._values, given))
            except (RefusalError, torch.OutOfMemoryError):
                raise
            except Exception as error:
                raise _failed("running", error) from error
        return returned if differentiable else [value.detach() for value in returned]

    # Other ways

    def _candidates(self, plan: Plan) -> Iterator[Plan]:
        if plan.rewritten is not None:
            yield replace(plan, way=Way.REWRITTEN)
        for leaves in self._sharings(plan.leaves):
            yield replace(plan, way=Way.VMAP, leaves=leaves)

    def _sharings(self, leaves: tuple[Leaf, ...]) -> Iterator[tuple[Leaf, ...]]:
        """Yield the choices of what samples share, fewest first, that leave them something."""
        own = [at for at, leaf in enumerate(leaves) if leaf.own]
        most = len(own) - 1 if self.flexible else 0
        if len(own) > _AMBIGUOUS:
            most = min(most, 1)
        for size in range(most + 1) if own else ():
            for shared in combinations(own, size):
                yield tuple(
                    replace(leaf, own=leaf.own and at not in shared)
                    for at, leaf in enumerate(leaves)
                )

    def _holds(self, plan: Plan) -> bool:
        """Tell whether a way returns what the call did, as far as it can be run at all."""
        try:
            return self.known(plan)
        except RefusalError:
            return False

    def _shares_gradients(self, plan: Plan, other: Plan) -> bool:
        """Tell whether samples share rows that may be those of samples, and have a gradient."""
        rows = zip(plan.leaves, other.leaves, self.replay.inputs, strict=True)
        return any(a.own and not b.own and value.requires_grad for a, b, value in rows)

    # Gradients

    def _gives_the_gradients_of(self, plan: Plan, other: Plan) -> bool:
        """Tell whether another way, or the same one again, gives the gradients of a call."""
        if other.way is Way.REWRITTEN:  # by formulas that are known
            return True
        if self._expected is None:
            try:
                self._expected = self._gradients(plan, self.replay)
            except (RefusalError, torch.OutOfMemoryError):
                raise
            except Exception as error:
                raise _failed("differentiating", error) from error
        try:
            found = self._gradients(other, self.replay)
        except (RefusalError, torch.OutOfMemoryError):
            raise
        except Exception:  # a backward pass that cannot be vectorised
            if other is plan:
                raise
            return False
        return are_close(found, self._expected, self._dtypes())

    def _gradients(self, plan: Plan, replay: Replay) -> dict[str, Tensor]:
        """Return the gradients that the first and the last sample have for random slopes."""
        wanted = self._compared()
        plan = replace(plan, wanted={key: key for key in wanted})
        values = {key: value.detach() for key, value in replay.values.items()}
        replay = replace(replay, values=values).narrow(torch.tensor([0, plan.count - 1]))
        generator = Generator().manual_seed(0)
        slopes = {}
        for output in plan.outputs:
            like = self.recorded[output.index]
            slopes[output.index] = torch.randn(2, *like.shape[1:], generator=generator).to(like)
        shapes = {key: values[key].shape for key in wanted}
        # In a thread of its own, where the user's hooks on saved tensors, as checkpointing has
        # them, do not see this.
        with ThreadPoolExecutor(max_workers=1) as apart:
            return apart.submit(gradients, plan, replay, slopes, shapes).result()

    def _compared(self) -> list[str]:
        """Return the parameters asked for, and small ones that will move, as gates do."""
        trained = [
            key
            for key, trained in self.parameters.items()
            if trained
            and self._values[key].is_floating_point()
            and self._values[key].numel() <= _SMALL
        ]
        return list(dict.fromkeys([*self.plan.wanted.values(), *trained]))

    # Mixing

    def _check_unmixed(self, plan: Plan) -> None:
        """Assert that no row of the outputs depends on another sample's row of the inputs.

        Inputs without a gradient may be tables that have as many rows as there are samples by
        chance; nothing that is tracked depends on whether they are.
        """
        if not self.flexible:  # the layer itself defines what belongs to samples
            return
        own = [value for leaf, value in self._pairs(plan) if leaf.own]
        # Where it got one input without a gradient, its code may rely on that, and set the flag of
        # what it makes of it.
        alone = len(own) == 1 and not own[0].requires_grad
        mixes = self._mixes_values(plan) if alone else self._mixes_gradients(plan)
        if mixes:
            raise RefusalError(
                "a sample's output depends on other samples, as where something normalises over "
                "the batch",
                "put BatchNorm layers into evaluation mode, or say where the samples are, with "
                "batch_dim",
            )

    def _mixes_gradients(self, plan: Plan) -> bool:
        """Tell whether NaN in one sample's gradient reaches another sample's inputs."""
        # A kernel of recurrent layers cannot be differentiated unless its weights require grad.
        values = {
            key: value.detach().requires_grad_(key in self.parameters and value.is_floating_point())
            for key, value in self._values.items()
        }
        given, rows = [], []
        for leaf, value in self._pairs(plan):
            mine = leaf.own and value.is_floating_point() and value.requires_grad
            given.append(value.detach().requires_grad_(mine))
            rows += given[-1:] if mine else []
        if not rows:
            return False
        with self._watched(plan, self._guard({}, differentiable=True)):
            pairs = zip(plan.run_whole(values, given), plan.outputs, strict=True)
            outputs = [
                (value, each.axis)
                for value, each in pairs
                if value.requires_grad and value.shape[each.axis] > 1
            ]
            return any(_reaches_others(outputs, rows, row) for row in (0, plan.count - 1))

    def _mixes_values(self, plan: Plan) -> bool:
        """Tell whether a sample's output or gradients change with the other samples' inputs."""
        assert self._expected is not None
        for at, row in enumerate((0, plan.count - 1)):
            one = slice(row, row + 1)
            inputs = tuple(
                value.detach()[one].expand_as(value).clone() if leaf.own else value.detach()
                for leaf, value in self._pairs(plan)
            )
            replay = replace(self.replay, inputs=inputs)
            outputs = [value[one] for value in self._run(plan, inputs)]
            if not self._same_outputs(outputs, [value[one] for value in self._recorded(plan)]):
                return True
            found = {key: each[at] for key, each in self._gradients(plan, replay).items()}
            if not are_close(
                found, {key: each[at] for key, each in self._expected.items()}, self._dtypes()
            ):
                return True
        return False

    def _pairs(self, plan: Plan) -> Iterator[tuple[Leaf, Tensor]]:
        return zip(plan.leaves, self.replay.inputs, strict=True)

    # Running and comparing

    def _run(self, plan: Plan, inputs: Sequence[Tensor] | None = None) -> list[Tensor]:
        """Return detached outputs, rows first."""
        with self._watched(plan):
            given = [value.detach() for value in inputs or self.replay.inputs]
            return [value.detach() for value in plan.run(self._values, given)]

    def _guard(self, aliases: Mapping[str, Tensor], *, differentiable: bool = False) -> Guard:
        real = {name: self._real[key] for name, key in self.plan.wanted.items()}
        return Guard(real, aliases, differentiable=differentiable)

    def _watched(self, plan: Plan, guard: Guard | None = None) -> ExitStack:
        """Return a context to run a call in."""
        stack = ExitStack()
        stack.enter_context(plan.surroundings())
        stack.enter_context(torch.enable_grad())
        # Hooks of the user, such as checkpointing's, are for the graph of the call alone.
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(Tensor.detach, Tensor.detach))
        stack.enter_context(guard or self._guard({}))
        return stack

    def _recorded(self, plan: Plan) -> list[Tensor]:
        return [self.recorded[output.index] for output in plan.outputs]

    def _same_outputs(self, got: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
        pairs = zip(got, expected, strict=True)
        return all(same_rows(value, other, self._dtypes()) for value, other in pairs)

    def _dtypes(self) -> set[torch.dtype]:
        """Return the dtypes that the call may have computed in."""
        tensors = (*self._values.values(), *self.replay.inputs, *self.recorded)
        dtypes = {value.dtype for value in tensors if value.is_floating_point()}
        return dtypes if self.plan.autocast[1] is None else {*dtypes, self.plan.autocast[1]}


def _failed(doing: str, error: Exception) -> RefusalError:
    return RefusalError(f"{doing} it again failed with {type(error).__name__}: {error}")


def _reaches_others(
    outputs: Sequence[tuple[Tensor, int]], rows: Sequence[Tensor], row: int
) -> bool:
    """Send NaN, which survives multiplication by zero, into the gradient of one row.

    Args:
        outputs: Outputs, and where they have their rows.
        rows: Inputs with rows, rows first.
        row: The row.
    """
    tensors = [value for value, _ in outputs]
    if not tensors:
        return False
    for slope in (nan_in, numbers_in):
        slopes = [slope(value, row, axis) for value, axis in outputs]
        try:
            with torch.autograd.set_detect_anomaly(False):  # which takes NaN for a mistake
                found = torch.autograd.grad(
                    tensors, rows, slopes, retain_graph=True, allow_unused=True
                )
        except RuntimeError as error:
            raise RefusalError(f"whether it mixes samples cannot be told: {error}") from error
        hits = [(grad != 0).reshape(len(grad), -1).any(1) for grad in found if grad is not None]
        if not any(hit[:row].any() or hit[row + 1 :].any() for hit in hits):
            return False
        # Half-precision kernels of some CPUs let NaN leak to the row before; numbers do not, and
        # the first row has none.
        if row == 0 or not any(grad is not None and grad.dtype in _HALF for grad in found):
            return True
    return True


def _memory(value: Tensor) -> int:
    return value.untyped_storage().data_ptr() if value.numel() else id(value)
