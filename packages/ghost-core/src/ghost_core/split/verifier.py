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
from typing import Any

import torch
from torch import Tensor, nn

from ghost_core._torch import backward_hooks, will_reach
from ghost_core.errors import CaptureError, WrongSplitError
from ghost_core.split.owners import Fold
from ghost_core.split.probe import (
    Kind,
    Probe,
    differentiable,
    nan_in,
    numbers_in,
    outputs_by_sample,
    probed_samples,
    samples_axis,
)
from ghost_core.split.reasons import unclear_fold, wrong_split
from ghost_core.split.usage import UsageMode
from ghost_core.state import buffers_kept
from ghost_core.tracking import TrackedModule


class Verifier:
    """Verifies a model's passes: the first, and those in a new mix of modes or with new modules.

    Args:
        model: The root module.
        tracked: The tracked modules by name.
        seed: A scalar that every Tap depends on.
        batch_dim: Axis of the samples in the model's outputs.
    """

    def __init__(
        self,
        model: nn.Module,
        tracked: Mapping[str, TrackedModule],
        seed: Tensor,
        batch_dim: int = 0,
    ) -> None:
        self._model = model
        self._modules = list(model.modules())
        self._tracked = tracked
        self._seed = seed
        self._dim = batch_dim
        with torch.inference_mode(False):
            self._seed_node = torch.autograd.graph.get_gradient_edge(seed).node
        self._verified: dict[tuple[object, ...], set[Kind]] = {}
        self._folds: dict[str, Fold] = {}
        self._unreached: set[Kind] = set()
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
        return will_reach(self._seed_node)

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
            parameter.name
            for tracked in self._tracked.values()
            for parameter in tracked.parameters.values()
        }
        self._shield_backward_hooks()
        self._usage = UsageMode({name: parameters[name] for name in names}, owned, frozen)
        self._usage.__enter__()

    def check_reached(self, tracked: TrackedModule, folded: bool) -> None:
        """Raise if a gradient arrives where no probe did, so that nothing is known of its rows.

        Args:
            tracked: The module.
            folded: Whether its rows are folded.

        Raises:
            WrongSplitError: If no output of the model depended on it when that was verified.
        """
        if (tracked.name, folded) in self._unreached:
            raise WrongSplitError(
                f"gradients cannot be split by sample: the loss depends on {tracked.label}, on "
                "which the model's output did not depend when it was verified",
                reason="nothing shows which sample is in which of its rows",
                remedy="let the model return what the loss is computed from, or leave the module "
                "out with exclude=...",
            )

    def fold(self, name: str) -> Fold | None:
        """Return how a module's rows are folded, as far as a probe told."""
        return self._folds.get(name)

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
                "model was verified",
                reason="what becomes of that row has not been checked",
                remedy="return one row per sample always, or one row from the first batch on, or "
                "leave the module out with exclude=...",
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
            hooks.update({key: hook for key, hook in found.items() if key in hooks})
        self._hooks.clear()

    def _shield_backward_hooks(self) -> None:
        """Keep the user's backward hooks from seeing probes.

        Modules take their hooks into the graph when they run; for this forward pass they get some
        that do nothing while a probe runs.
        """
        for module in self._modules:
            for hooks in backward_hooks(module):
                if hooks:
                    self._hooks.append((hooks, dict(hooks)))
                    hooks.update({key: self._unless_probing(hook) for key, hook in hooks.items()})

    def _unless_probing(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        """Return a hook that does nothing while a probe runs."""

        def shielded(*args: Any) -> Any:
            return hook(*args) if self._probe is None else None

        return shielded

    def check(self, output: Any, n: int, called: set[Kind]) -> bool:
        """Check what was watched, and probe a pass that called modules not verified yet.

        Args:
            output: What the model returned.
            n: Number of samples.
            called: The modules that ran.

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
        # Owners that were given may be wrong for any sample.
        owned = any(self._tracked[name].row_owner for name, _ in called)
        chosen = range(n) if owned else probed_samples(n)
        probes = [self._run_probe(output, sample, n) for sample in chosen]
        reached = {kind for probe in probes for kind in probe.reached}
        if unreached := called - reached:
            self._check_unreached(output, n, unreached)
        self._unreached -= reached
        if n > 1:
            self._unreached |= unreached - verified
        self._folds |= self._find_folds(probes, n)
        self._verified[signature] = verified | called
        return self._usage is not None

    def _signature(self, n: int) -> tuple[object, ...]:
        """Identify what a verification holds for: modes of all modules, one sample or more."""
        return (n > 1, *(module.training for module in self._modules))

    def _run_probe(self, output: Any, sample: int, n: int) -> Probe:
        """Probe one sample and return what was seen."""
        outputs = outputs_by_sample(output, n, self._dim)
        probe = Probe(sample, n)
        self._backward(
            probe, outputs, [nan_in(leaf, sample, self._axis(leaf, n)) for leaf in outputs]
        )
        if probe.mixed and probe.half and sample > 0:
            # Half-precision kernels of some CPUs load the head of the next row behind the tail of
            # a row, times zero. NaN leaks to the row before; numbers do not, and row 0 has none.
            reached, probe = probe.reached, Probe(sample, n)
            numbers = [numbers_in(leaf, sample, self._axis(leaf, n)) for leaf in outputs]
            self._backward(probe, outputs, numbers)
            probe.reached |= reached
        if probe.mixed:
            raise wrong_split(self._model, probe, self._tracked)
        return probe

    def _axis(self, output: Tensor, n: int) -> int:
        axis = samples_axis(output, n, self._dim)
        assert axis is not None
        return axis

    def _find_folds(self, probes: Sequence[Probe], n: int) -> dict[str, Fold]:
        """Return the order of folded rows that all probes allow, by name of the module.

        Raises:
            WrongSplitError: If there is none, or more than one.
        """
        possible: dict[tuple[str, int], set[int]] = {}
        for probe in probes:
            for name, layout, rows in probe.hits:
                if n > 1 and layout.is_folded(n):
                    sizes = layout.outer_sizes(rows, probe.sample, n)
                    possible[name, layout.rows] = possible.get((name, layout.rows), sizes) & sizes
        folds: dict[str, Fold] = {}
        for (name, count), sizes in possible.items():
            known = {1: Fold.SAMPLE_MAJOR, count // n: Fold.SAMPLE_MINOR}
            if len(sizes) != 1 or not sizes <= known.keys():
                raise unclear_fold(self._tracked[name], len(sizes) > 1)
            fold = known[sizes.pop()]
            if folds.setdefault(name, fold) is not fold:
                raise unclear_fold(self._tracked[name], False)
        return folds

    def _check_unreached(self, output: Any, n: int, unreached: set[Kind]) -> None:
        """Raise if modules that no probe reached matter for outputs without one row per sample."""
        others = [
            leaf for leaf in differentiable(output) if samples_axis(leaf, n, self._dim) is None
        ]
        if not others:
            return
        probe = Probe(0, n)
        self._backward(probe, others, [torch.ones_like(leaf) for leaf in others])
        if found := sorted(unreached & probe.reached):
            modules = "\n".join(f"  {self._tracked[name].label}" for name, _ in found)
            raise WrongSplitError(
                "gradients cannot be split by sample: these modules matter only for outputs of the "
                f"model that do not have one row per sample:\n{modules}",
                reason="nothing shows which sample is in which of their rows",
                remedy="let the model return what the loss is computed from, or leave them out "
                "with exclude=...",
            )

    def _backward(self, probe: Probe, outputs: list[Tensor], gradients: list[Tensor]) -> None:
        self._probe = probe
        try:
            with (
                # What is recomputed under checkpointing may write buffers.
                buffers_kept(self._modules, by_copies=True),
                torch.autograd.set_detect_anomaly(False),  # which takes NaN for a mistake
            ):
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
