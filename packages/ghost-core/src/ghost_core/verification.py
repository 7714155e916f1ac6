"""Proves on the user's own model that gradients can be split by sample, or says why not.

That contributions sum to the batch gradient proves nothing: sequence-first layouts with as many
positions as samples, sorted rows, BatchNorm and folded rows all pass that check with wrong splits.
Two checks take its place:

* `UsageMode` watches the forward pass for operations on tracked parameters outside their modules,
  and for operations on a value computed once for all samples that would change if it were not.
* `Probe` sends NaN into the gradient of one sample's output and looks at which rows it reaches.
  NaN survives multiplication by zero, so mixing behind a zero-initialised gate is found as well;
  in half precision, only where it mixes the first sample into others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from ghost_core.errors import CaptureError, WrongSplitError
from ghost_core.tracking import TrackedModule
from ghost_core.usage import UsageMode


@dataclass
class Probe:
    """One backward pass with NaN in one row.

    Attributes:
        row: The sample whose output gradient is NaN.
        n: Number of samples.
        reached: Names of the modules that any gradient reached.
        mixed: Rows that NaN or anything else reached, by name of a module where these are not just
            the sample's own.
        half: Whether any gradient was in half precision.
    """

    row: int
    n: int
    reached: set[str] = field(default_factory=set)
    mixed: dict[str, list[int]] = field(default_factory=dict)
    half: bool = False

    def see(self, name: str, grads: Sequence[Tensor | None]) -> None:
        """Note which rows of a call's output gradients are not zero."""
        self.reached.add(name)
        for grad in grads:
            if grad is not None:
                self.half |= grad.dtype in (torch.bfloat16, torch.float16)
                hit = (grad != 0).flatten(1).any(1) if grad.dim() > 1 else grad != 0
                rows = hit.nonzero().flatten().tolist()
                if rows and rows != [self.row]:
                    self.mixed[name] = rows


class Verifier:
    """Verifies a model's passes: the first, and those in a new mix of modes or with new modules.

    Args:
        model: The root module.
        tracked: The tracked modules by name.
        seed: A scalar that every Tap depends on.
    """

    def __init__(
        self, model: nn.Module, tracked: Mapping[str, TrackedModule], seed: Tensor
    ) -> None:
        self._model = model
        self._modules = list(model.modules())
        self._tracked = tracked
        self._seed = seed
        # Only a function's node leads to the one that collects a leaf's gradient.
        with torch.inference_mode(False), torch.enable_grad():
            view: Any = seed.view_as(seed).grad_fn
        self._seed_node = view.next_functions[0][0]
        self._verified: dict[tuple[object, ...], set[str]] = {}
        self._unwatched: set[tuple[object, ...]] = set()
        self._expandable: set[str] = set()
        self._usage: UsageMode | None = None
        self._probe: Probe | None = None
        self._hooks: list[tuple[dict[int, Any], dict[int, Any]]] = []

    @property
    def probe(self) -> Probe | None:
        """The probe that is running; gradients that arrive meanwhile are its alone."""
        return self._probe

    @property
    def is_training(self) -> bool:
        """Whether the backward pass that runs is to reach every leaf, as `backward()` does.

        Gradients of `autograd.grad(loss, inputs)` never become parameters' gradients.
        """
        try:
            return bool(torch._C._will_engine_execute_node(self._seed_node))
        except RuntimeError:  # it was given leaves to reach
            return False

    def start(self, n: int, owned: Callable[[], frozenset[str]], frozen: bool) -> None:
        """Watch from now on to the end of the batch, if passes like it are not verified yet."""
        if self._usage is not None:
            return
        signature = self._signature(n)
        if signature in self._verified and signature not in self._unwatched:
            return
        self._unwatched.discard(signature)
        parameters = dict(self._model.named_parameters(remove_duplicate=False))
        names = {
            site.parameter for tracked in self._tracked.values() for site in tracked.sites.values()
        }
        self._shield_backward_hooks()
        self._usage = UsageMode({name: parameters[name] for name in names}, owned, frozen)
        self._usage.__enter__()

    @property
    def watching(self) -> bool:
        """Whether a forward pass is being watched."""
        return self._usage is not None

    def watch(self, output: Tensor, tracked: TrackedModule) -> None:
        """Watch an output that was expanded from one row, if the pass is watched.

        Raises:
            WrongSplitError: If it is not, and no output of the module was in one that was.
        """
        if self._usage is not None:
            self._usage.watch(output, tracked)
            self._expandable.add(tracked.name)
        elif tracked.name not in self._expandable:
            raise WrongSplitError(
                f"{tracked.label} returned one row for all samples, which it did not when the "
                "model was verified\n"
                "Reason: what becomes of that row has not been checked.\n"
                "Remedy: return one row per sample always, or one row from the first batch on, or "
                "leave the module out with exclude=..."
            )

    def finish(self) -> None:
        """Raise if something was seen that makes numbers wrong, after a batch.

        Raises:
            WrongSplitError: Naming modules, parameters and operations.
        """
        if self._usage is not None:
            self._usage.check()

    def stop(self) -> None:
        """Stop to watch."""
        self._restore_hooks()
        usage, self._usage = self._usage, None
        if usage is not None:
            usage.__exit__(None, None, None)

    def _restore_hooks(self) -> None:
        for hooks, found in self._hooks:
            hooks.update(found)
        self._hooks.clear()

    def _shield_backward_hooks(self) -> None:
        """Keep the user's backward hooks from seeing probes.

        Modules take their hooks into the graph when they run; for this forward pass they get some
        that do nothing while a probe runs.
        """
        for module in self._modules:
            for hooks in (module._backward_hooks, module._backward_pre_hooks):
                if hooks:
                    self._hooks.append((hooks, dict(hooks)))
                    hooks.update({key: self._unless_probing(hook) for key, hook in hooks.items()})

    def _unless_probing(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        """Return a hook that does nothing while a probe runs."""

        def shielded(*args: Any) -> Any:
            return hook(*args) if self._probe is None else None

        return shielded

    def check(self, output: Any, n: int, called: set[str]) -> bool:
        """Check what was watched, and probe a pass that called modules not verified yet.

        Args:
            output: What the model returned.
            n: Number of samples.
            called: Names of the modules that ran.

        Returns:
            Whether the pass is verified: not if modules ran for the first time in it, since nobody
            watched what became of their parameters. The next pass is watched.

        Raises:
            WrongSplitError: If gradients cannot be split by sample.
            CaptureError: If the graph cannot be probed.
        """
        self._restore_hooks()
        if self._usage is not None:
            self._usage.check_returned(output)
            self._usage.check()
        signature = self._signature(n)
        verified = self._verified.get(signature, set())
        if called <= verified:
            return signature not in self._unwatched
        if self._usage is None:
            self._unwatched.add(signature)
        reached: set[str] = set()
        for row in probe_rows(n):
            reached |= self._run_probe(output, row, n)
        if unreached := called - reached:
            self._check_unreached(output, n, unreached)
        self._verified[signature] = verified | called
        return self._usage is not None

    def _signature(self, n: int) -> tuple[object, ...]:
        """Identify what a verification holds for: modes of all modules, one sample or more."""
        return (n > 1, *(module.training for module in self._modules))

    def _run_probe(self, output: Any, row: int, n: int) -> set[str]:
        """Probe one row and return the names of the modules that it reached."""
        outputs = outputs_by_row(output, n)
        probe = Probe(row, n)
        self._backward(probe, outputs, [_nan_in(leaf, row) for leaf in outputs])
        reached = probe.reached
        if probe.mixed and probe.half and row > 0:
            # Half-precision kernels of some CPUs load the head of the next row behind the tail of
            # a row, times zero. NaN leaks to the row before; numbers do not, and row 0 has none.
            probe = Probe(row, n)
            self._backward(probe, outputs, [_numbers_in(leaf, row) for leaf in outputs])
        if probe.mixed:
            raise wrong_split(self._model, probe, self._tracked)
        return reached

    def _check_unreached(self, output: Any, n: int, unreached: set[str]) -> None:
        """Raise if modules that no probe reached matter for outputs without one row per sample."""
        others = [leaf for leaf in differentiable(output) if leaf.dim() == 0 or len(leaf) != n]
        if not others:
            return
        probe = Probe(0, n)
        self._backward(probe, others, [torch.ones_like(leaf) for leaf in others])
        if found := sorted(unreached & probe.reached):
            modules = "\n".join(f"  {self._tracked[name].label}" for name in found)
            raise WrongSplitError(
                "gradients cannot be split by sample: these modules matter only for outputs of the "
                f"model that do not have one row per sample:\n{modules}\n"
                "Reason: nothing shows which sample is in which of their rows.\n"
                "Remedy: let the model return what the loss is computed from, or leave them out "
                "with exclude=..."
            )

    def _backward(self, probe: Probe, outputs: list[Tensor], gradients: list[Tensor]) -> None:
        try:
            self._probe = probe
            with torch.autograd.set_detect_anomaly(False):  # which takes NaN for a mistake
                torch.autograd.grad(
                    outputs, [self._seed], gradients, retain_graph=True, allow_unused=True
                )
        except RuntimeError as error:
            if "use_reentrant" in str(error):
                raise CaptureError(
                    "reentrant activation checkpointing hides calls from the graph: use "
                    "torch.utils.checkpoint with use_reentrant=False"
                ) from error
            raise
        finally:
            self._probe = None


def probe_rows(n: int) -> list[int]:
    """Choose rows to probe: first, middle and last find mixing with any one of them."""
    return sorted({0, n // 2, n - 1})


def differentiable(outputs: Any) -> list[Tensor]:
    """Return the tensors in an output that gradients can start from."""
    return [
        leaf
        for leaf in tree_leaves(outputs)
        if isinstance(leaf, Tensor) and leaf.requires_grad and leaf.is_floating_point()
    ]


def outputs_by_row(outputs: Any, n: int) -> list[Tensor]:
    """Return the outputs that have one row per sample.

    Raises:
        WrongSplitError: If there is none.
    """
    leaves = differentiable(outputs)
    rows = [leaf for leaf in leaves if leaf.dim() and leaf.shape[0] == n]
    if not rows:
        shapes = ", ".join(str(tuple(leaf.shape)) for leaf in leaves) or type(outputs).__name__
        raise WrongSplitError(
            f"the model's output does not tell {n} samples apart: no tensor of shape [{n}, ...] "
            f"that requires a gradient, only {shapes}. Let the model return its outputs and "
            "compute the loss outside of it, or pass verify=False, which every result records."
        )
    return rows


def _nan_in(output: Tensor, row: int) -> Tensor:
    gradient = torch.zeros_like(output)
    gradient[row] = float("nan")
    return gradient


def _numbers_in(output: Tensor, row: int) -> Tensor:
    gradient = torch.zeros_like(output)
    generator = torch.Generator().manual_seed(0)
    gradient[row] = torch.randn(output.shape[1:], generator=generator).to(output)
    return gradient


def wrong_split(
    model: nn.Module, probe: Probe, tracked: Mapping[str, TrackedModule]
) -> WrongSplitError:
    """Explain what a probe found.

    Args:
        model: The root module.
        probe: A probe that reached rows it should not have.
        tracked: The tracked modules by name.
    """
    modules = "\n".join(
        f"  {tracked[name].label}: rows {_listed(rows)}" for name, rows in probe.mixed.items()
    )
    normalizing = [
        f"{name!r} ({type(module).__name__})"
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None)
    ]
    if normalizing:
        reason = (
            f"{normalizing[0]} normalises over the batch in training mode, so every sample's loss "
            "depends on all others."
        )
        remedy = "Put BatchNorm layers into evaluation mode, or use GroupNorm."
    elif all(probe.row not in rows for rows in probe.mixed.values()):
        reason = "their rows are in another order than the samples, as after sorting or routing."
        remedy = "Keep samples in order, or leave these modules out with exclude=..."
    else:
        reason = (
            "either their first axis is not the samples (a sequence-first layout with as many "
            "positions as samples), or a later operation mixes samples."
        )
        remedy = "Put samples on the first axis, or leave these modules out with exclude=..."
    return WrongSplitError(
        f"gradients cannot be split by sample: changing the gradient of sample {probe.row}'s "
        f"output alone changes other rows at\n{modules}\nReason: {reason}\nRemedy: {remedy}"
    )


def wrong_rows(tracked: TrackedModule, rows: int, n: int) -> WrongSplitError:
    """Explain an output whose first axis does not have one entry per sample."""
    folded = f", {rows} = {n} * {rows // n}: rows folded into the batch?" if rows % n == 0 else ""
    return WrongSplitError(
        f"gradients cannot be split by sample: {tracked.label} returned "
        f"{rows} rows for {n} samples{folded}\n"
        "Reason: the first axis of its output is not the samples.\n"
        "Remedy: keep one row per sample, [N, ..., features]; give what is computed once for all "
        "samples, as positions are, one row, [1, ...]; or leave the module out with exclude=..."
    )


def _listed(rows: Sequence[int]) -> str:
    shown = ", ".join(map(str, rows[:6]))
    return f"{shown}, ..." if len(rows) > 6 else shown
