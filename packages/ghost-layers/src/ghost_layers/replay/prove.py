"""Finds a way to run a recorded call again, sample by sample if possible, and proves it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import torch
from torch import Generator, Tensor, nn

from ghost_layers.replay.before import Guard, RefusalError
from ghost_layers.replay.plan import Leaf, Output, Plan, Replay, Way, floating, forward
from ghost_layers.replay.proof import same_gradients

_ROUNDINGS = {torch.float64: 1000, torch.float32: 1000, torch.float16: 8, torch.bfloat16: 8}
_TF32 = 2.0**-10
_SMALL = 2**16
"""Elements up to which parameters that are not asked for are moved."""
_AMBIGUOUS = 4
"""Input tensors up to which all choices of what samples share are tried."""


@dataclass
class Search:
    """Compares ways to run a call with each other and with the call.

    Values of a call say little about gradients: behind a gate of zero or 1e-6, as layer scales
    start from, nothing is seen of another dropout mask or of mixed samples. So ways are compared
    with other parameters than the call's.

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
            outputs = self._run(plan, self._values)
        except (RefusalError, torch.OutOfMemoryError):
            raise
        except Exception:
            return False
        return self._matches(outputs, self._recorded(plan))

    def find(self) -> Plan:
        """Return a plan that is proven.

        Raises:
            RefusalError: If there is none.
        """
        plan = self._as_it_was()
        moved, reference = self._moved(plan)
        if moved is not self._values and plan.count > 1:
            for other in self._candidates(plan):
                if self._holds(other, moved, reference) and same_gradients(
                    plan, other, replace(self.replay, values=moved), self.recorded
                ):
                    if self._shares_gradients(plan, other):
                        self._check_unmixed(plan, moved)
                    return other
        self._check_repeatable(plan, moved, reference)
        if plan.count > 1:
            self._check_unmixed(plan, moved)
        return plan

    def _shares_gradients(self, plan: Plan, other: Plan) -> bool:
        """Tell whether samples share rows that may be those of samples, and have a gradient."""
        rows = zip(plan.leaves, other.leaves, self.replay.inputs, strict=True)
        return any(a.own and not b.own and value.requires_grad for a, b, value in rows)

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
        if not self._matches(outputs, self._recorded(plan)):
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
                raise RefusalError(
                    f"running it again failed with {type(error).__name__}: {error}"
                ) from error
        return returned if differentiable else [value.detach() for value in returned]

    def _recorded(self, plan: Plan) -> list[Tensor]:
        return [self.recorded[output.index] for output in plan.outputs]

    # Other parameters

    def _moved(self, plan: Plan) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Return other parameters, away from zero, and the outputs that they give.

        They are those of the call where others do not give finite outputs. Of parameters that were
        not asked for, small ones are moved, as gates are.
        """
        outputs = self._run(plan, self._values)
        finite = [value.isfinite() for value in outputs]
        wanted = set(self.plan.wanted.values())
        small = {
            key
            for key, value in self._values.items()
            if key in self.parameters and value.is_floating_point() and value.numel() <= _SMALL
        }
        for size in (1.0, 1e-2):
            values = dict(self._values)
            for seed, key in enumerate(sorted(wanted | small)):
                values[key] = _away(values[key].detach(), size, seed)
            try:
                others = self._run(plan, values)
            except (RefusalError, torch.OutOfMemoryError):
                raise
            except Exception:  # such as a decomposition of what is no covariance any more
                continue
            pairs = zip(others, finite, strict=True)
            if all(torch.equal(value.isfinite(), before) for value, before in pairs):
                return values, others
        return self._values, outputs

    def _candidates(self, plan: Plan) -> Iterator[Plan]:
        if plan.rewritten is not None:
            yield replace(plan, way=Way.REWRITTEN)
        ways = [Way.VMAP] if plan.random is not None else [Way.VMAP, Way.LOOP]
        for way in ways:
            for leaves in self._sharings(plan.leaves):
                yield replace(plan, way=way, leaves=leaves)

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

    def _holds(self, plan: Plan, moved: Mapping[str, Tensor], reference: Sequence[Tensor]) -> bool:
        try:
            outputs = self._run(plan, moved)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # no batching rule, control flow by value, a batch of one
            return False
        return self._matches(outputs, reference, exact=True) and self.known(plan)

    # The batch as a whole

    def _check_repeatable(
        self, plan: Plan, values: Mapping[str, Tensor], reference: Sequence[Tensor]
    ) -> None:
        if not self._matches(self._run(plan, values), reference, exact=True):
            raise RefusalError(
                "it returns something else each time that it runs: it draws random numbers from "
                "a generator that is neither torch's, Python's or numpy's global one nor its own, "
                "or keeps a state",
                "make it depend on its inputs, parameters and buffers alone",
            )

    def _check_unmixed(self, plan: Plan, values: Mapping[str, Tensor]) -> None:
        """Assert that no row of the outputs depends on another sample's row of the inputs.

        Inputs without a gradient may be tables that have as many rows as there are samples by
        chance; nothing that is tracked depends on whether they are.
        """
        if not self.flexible:  # the layer itself defines what belongs to samples
            return
        # A kernel of recurrent layers cannot be differentiated unless its weights require grad.
        values = {
            key: value.detach().requires_grad_(key in self.parameters and value.is_floating_point())
            for key, value in values.items()
        }
        own = [value for leaf, value in self._pairs(plan) if leaf.own]
        if len(own) == 1 and not own[0].requires_grad:
            # Its code may rely on that, and set the flag of what it makes of it.
            self._check_unmixed_by_value(plan, values)
            return
        given, rows = [], []
        for leaf, value in self._pairs(plan):
            mine = leaf.own and value.is_floating_point() and value.requires_grad
            given.append(value.detach().requires_grad_(mine))
            rows += given[-1:] if mine else []
        for row in {0, plan.count - 1} if rows else ():
            with self._watched(plan, self._guard({}, differentiable=True)):
                outputs = plan.run_whole(values, given)
                chosen = [
                    value.select(each.axis, row)
                    for value, each in zip(outputs, plan.outputs, strict=True)
                    if value.requires_grad and value.shape[each.axis] > 1
                ]
                if not chosen:
                    return
                slopes = [_away(torch.zeros_like(value), 1.0, 0) for value in chosen]
                try:
                    found = torch.autograd.grad(chosen, rows, slopes, allow_unused=True)
                except RuntimeError as error:
                    raise RefusalError(
                        f"whether it mixes samples cannot be told: {error}"
                    ) from error
            if any(each is not None and _reaches_others(each, row) for each in found):
                raise _mixed()

    def _check_unmixed_by_value(self, plan: Plan, values: Mapping[str, Tensor]) -> None:
        """Assert the same by giving all samples the inputs of one."""
        reference = self._run(plan, values)
        for row in (0, plan.count - 1):
            one = slice(row, row + 1)
            inputs = [
                value.detach()[one].expand_as(value).clone() if leaf.own else value.detach()
                for leaf, value in self._pairs(plan)
            ]
            with self._watched(plan):
                outputs = [value.detach()[one] for value in plan.run(values, inputs)]
            if not self._matches(outputs, [value[one] for value in reference], exact=True):
                raise _mixed()

    def _pairs(self, plan: Plan) -> Iterator[tuple[Leaf, Tensor]]:
        return zip(plan.leaves, self.replay.inputs, strict=True)

    # Running and comparing

    def _run(self, plan: Plan, values: Mapping[str, Tensor]) -> list[Tensor]:
        """Return detached outputs, rows first."""
        with self._watched(plan):
            inputs = [value.detach() for value in self.replay.inputs]
            return [value.detach() for value in plan.run(values, inputs)]

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

    def _matches(
        self, got: Sequence[Tensor], expected: Sequence[Tensor], *, exact: bool = False
    ) -> bool:
        """Tell whether outputs are the same but for rounding.

        Args:
            got: Outputs, rows first.
            expected: What they should be; one row stands for any number.
            exact: Whether both ran with ghost's precision; the call itself may have run with TF32.
        """
        tensors = (*self._values.values(), *self.replay.inputs, *expected)
        dtypes = {value.dtype for value in tensors} | {self.plan.autocast[1]}
        tolerance = max(
            roundings * torch.finfo(dtype).eps
            for dtype, roundings in _ROUNDINGS.items()
            if dtype in dtypes
        )
        if not exact and torch.float32 in dtypes and expected[0].device.type != "cpu":
            tolerance = max(tolerance, 8 * _TF32)
        return all(
            _is_close(value, other, tolerance) for value, other in zip(got, expected, strict=True)
        )


def _mixed() -> RefusalError:
    return RefusalError(
        "a sample's output depends on other samples, as where something normalises over the batch",
        "put BatchNorm layers into evaluation mode, or say where the samples are, with batch_dim",
    )


def _is_close(got: Tensor, expected: Tensor, tolerance: float) -> bool:
    if got.shape[1:] != expected.shape[1:] or got.dtype != expected.dtype:
        return False
    if 1 not in (len(got), len(expected)) and len(got) != len(expected):
        return False
    mine, theirs = got.double(), expected.double()
    same = (mine == theirs) | (mine.isnan() & theirs.isnan())
    scale = theirs.nan_to_num(0, 0, 0).abs().reshape(len(theirs), -1)
    if not scale.shape[1]:
        return True
    bound = tolerance * scale.amax(1).reshape(-1, *[1] * (mine.dim() - 1))
    return bool((same | ((mine - theirs).abs() <= bound)).all())


def _away(value: Tensor, size: float, seed: int) -> Tensor:
    """Return a tensor moved away from zero, its signs kept, by about as much as it would have.

    That is about one over the root of how many inputs it sums for a matrix.
    """
    generator = Generator().manual_seed(seed)
    step = torch.rand(value.shape, generator=generator, device="cpu") + 0.5
    inputs = math.prod(value.shape[1:])
    step = (size / 2 / math.sqrt(max(1, inputs)) * step).to(value.device, value.dtype)
    return torch.where(value < 0, value - step, value + step)


def _reaches_others(gradient: Tensor, row: int) -> bool:
    hit = gradient.nan_to_num().reshape(len(gradient), -1).any(1)
    hit[row] = False
    return bool(hit.any())


def _memory(value: Tensor) -> int:
    return value.untyped_storage().data_ptr() if value.numel() else id(value)
