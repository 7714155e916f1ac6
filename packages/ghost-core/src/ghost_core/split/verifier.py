"""Decides when the split by sample is proven on the user's own model: what is watched and probed.

That contributions sum to the batch gradient proves nothing: sequence-first models with as many
positions as samples, sorted rows, BatchNorm and folded rows all pass that check with wrong splits.
`UsageMode` and `Prober` take its place. Of a model that packs its rows by a mask:

    batch 1   nothing is known: watched and probed, and its rows are in order
    batch 2   the mask leaves nothing out, as in batch 1: nothing to do
    batch 3   it leaves rows out: these are asked whose they are, and all passes are from now on
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ghost_core._torch import in_use, shards, will_reach
from ghost_core.errors import WrongSplitError
from ghost_core.process import eagerly
from ghost_core.ranks import ALONE, Ranks
from ghost_core.split.moves import Moves
from ghost_core.split.nan import any_nan, is_finite
from ghost_core.split.owners import Fold, find_folds, is_in_place
from ghost_core.split.places import Outputs
from ghost_core.split.probe import Kind, Place, Places, Probe, Prober, probed_samples
from ghost_core.split.refusals import doubted, late_row, unclear_fold, unreached, wrong_split
from ghost_core.split.routes import Census
from ghost_core.split.sites import KnownAxes, Site, are_told
from ghost_core.split.usage import UsageMode
from ghost_core.tracking import TrackedModule

_Signature = tuple[object, ...]


class Verifier:
    """Verifies a model's passes: the first, and those in a new mix of modes or with new modules.

    Args:
        model: The root module.
        tracked: The tracked modules by name.
        seed: A scalar that every Tap depends on.
        batch_dim: Axis of the samples in the model's outputs.
        ranks: The processes that train the model.
    """

    def __init__(
        self,
        model: nn.Module,
        tracked: Mapping[str, TrackedModule],
        seed: Tensor,
        batch_dim: int = 0,
        ranks: Ranks = ALONE,
    ) -> None:
        self._model = model
        self._ranks = ranks
        self._modules = list(model.modules())
        self._tracked = tracked
        self._prober = Prober(model, seed)
        self._batch_dim = batch_dim
        self._leading = not batch_dim and not any(each.batch_dim for each in tracked.values())
        with torch.inference_mode(False):
            self._seed_node = torch.autograd.graph.get_gradient_edge(seed).node
        self._verified: dict[_Signature, set[Kind]] = {}
        self._met: dict[_Signature, set[object]] = {}  # calls, and operations met instead
        self._folds: dict[str, Fold] = {}
        self._axes = KnownAxes()
        self._places: dict[_Signature, dict[object, Place]] = {}
        self._in_place: set[tuple[object, ...]] = set()
        self._courses: dict[_Signature, frozenset[object]] = {}
        self._unreached: set[Kind] = set()
        self._unprobed: set[object] = set()
        self._unwatched: set[_Signature] = set()
        self._expands = False
        self._usage: UsageMode | None = None
        self._watching = ExitStack()
        self._checked: set[_Signature] = set()
        self.doubt = ""
        """Why nothing is proven by what was watched in the batch; empty if all is."""
        self.routes = False
        """Whether rows of samples are routed in this model, so that every pass is asked whose."""

    @property
    def probe(self) -> Probe | None:
        """The probe that is running; gradients that arrive meanwhile are its alone."""
        return self._prober.running

    @property
    def is_training(self) -> bool:
        """Whether the backward pass that runs is to reach every leaf, as `backward()` does.

        Gradients of `autograd.grad(loss, inputs)` never become parameters' gradients.
        """
        return will_reach(self._seed_node)

    def start(self, n: int, owned: Callable[[], frozenset[str]], frozen: bool) -> None:
        """Watch from now on to the end of the batch, if passes like it are not verified yet."""
        self._prober.shield_hooks()  # in each pass of a batch: probes go through all of them
        if self._usage is not None:
            return
        signature = self._signature(n)
        watched = signature in self._verified and signature not in self._unwatched
        if watched and not self._expands:  # what is expanded may be used otherwise than before
            return
        self._unwatched.discard(signature)
        self._checked.add(signature)
        parameters = dict(self._model.named_parameters(remove_duplicate=False))
        names = {
            parameter.name
            for tracked in self._tracked.values()
            for parameter in tracked.parameters.values()
        }
        # The memory of those under fully_shard is given away before the pass ends; their sums tell.
        passing = {in_use(shard) for shard in shards(self._model).values()}
        staying = {name: parameters[name] for name in names if parameters[name] not in passing}
        usage = UsageMode(staying, owned, frozen)
        self._watching.enter_context(eagerly())
        self._usage = self._watching.enter_context(usage)

    def check_reached(self, tracked: TrackedModule, folded: bool) -> None:
        """Raise if a gradient arrives where no probe did, so that nothing is known of its rows.

        Args:
            tracked: The module.
            folded: Whether its rows are folded.

        Raises:
            WrongSplitError: If no output of the model depended on it when that was verified, or
                its rows are folded and NaN hid how.
        """
        if (tracked.name, folded) in self._unreached:
            raise unreached(tracked)
        if folded and self.doubt and tracked.name not in self._folds and not tracked.row_owner:
            raise doubted(tracked, self.doubt)

    def fold(self, name: str) -> Fold | None:
        """Return how a module's rows are folded, as far as a probe told."""
        return self._folds.get(name)

    @property
    def watching(self) -> bool:
        """Whether a forward pass is being watched."""
        return self._usage is not None

    def watch(self, output: Tensor, tracked: TrackedModule) -> None:
        """Watch an output that was expanded from one row, in this pass and all later ones.

        Raises:
            WrongSplitError: If the pass is not watched, as no output was expanded before.
        """
        if self._usage is None:
            raise late_row(tracked)
        self._usage.watch(output, tracked)
        self._expands = True

    def know(self, value: Tensor, names: frozenset[str]) -> None:
        """Watch for operations on a value as for those on the parameters that it is computed from.

        Args:
            value: The value, which is kept alive as long as that is watched.
            names: The parameters.
        """
        if self._usage is not None:
            self._usage.know(value, names)

    def used_outside(self, names: frozenset[str]) -> bool:
        """Tell whether parameters were used by what nobody followed."""
        return self._usage is not None and self._usage.used_outside(names)

    def forget(self, names: frozenset[str]) -> None:
        """Forget where parameters were used, as it is known now how their gradients are told."""
        if self._usage is not None:
            self._usage.forget(names)

    def settle(self, names: Iterable[str]) -> None:
        """Take note that the custom functions which parameters went into are followed."""
        if self._usage is not None:
            self._usage.settle(names)

    def check_probed(self, site: Site) -> None:
        """Raise if a gradient arrives at an operation that no probe reached.

        Raises:
            WrongSplitError: If no output of the model depended on it when that was verified.
        """
        if site.place in self._unprobed:
            raise unreached(self._tracked[site.names[0]])

    def look(self, name: str, saved: Iterable[Tensor], grads: Iterable[Tensor | None]) -> None:
        """Doubt what is watched if NaN or infinite numbers arrive at a call.

        NaN is what a probe looks for, and comparisons of sums do not see it.

        Args:
            name: The module.
            saved: What is kept of the call.
            grads: The gradients of its outputs.
        """
        if self._usage is None or self.doubt:
            return
        if any_nan(saved):
            self.doubt = f"there is NaN in the inputs of {name}"
        elif not all(is_finite(grad) for grad in grads if grad is not None):
            self.doubt = f"gradients that are not finite arrived at {name}"

    def finish(self) -> None:
        """Raise if something was seen that makes numbers wrong, after a batch.

        Raises:
            WrongSplitError: Naming modules, parameters and operations.
        """
        if self._usage is not None:
            self._usage.check()

    def stop(self) -> None:
        """Stop to watch."""
        self._watching.close()
        self._usage = None
        self._prober.restore_hooks()
        if self.doubt:  # the next batch is verified in place of this one
            for signature in self._checked:
                for known in (self._verified, self._met, self._courses):
                    known.pop(signature, None)
            self._in_place = set()
        self._checked, self.doubt = set(), ""

    def check(self, output: Any, n: int, sites: Sequence[Site], called: set[Kind]) -> bool:
        """Check what was watched, and probe a pass that called modules not verified yet.

        Args:
            output: What the model returned.
            n: Number of samples.
            sites: Where gradients are told apart in the pass.
            called: The modules that ran in the batch before; those of the pass are added.

        Returns:
            Whether the pass is verified: not if modules ran for the first time in it, since nobody
            watched what became of their parameters. The next pass is watched.

        Raises:
            WrongSplitError: If gradients cannot be split by sample.
            CaptureError: If the graph cannot be probed.
        """
        self._prober.restore_hooks()
        if self._usage is not None:
            self._usage.check_returned(output)
            self._usage.check()
        clear = self.routes or self._axes.recall(sites, n)
        signature = self._signature(n)
        kinds = {kind for site in sites for kind in site.kinds(n)}
        if self.routes:
            kinds = {(name, False) for name, _ in kinds}
        outputs = self._outputs(output, n, sites, signature)
        moves = None if n < 2 or self.routes else outputs.moves()  # it is asked for there
        met = {(site.names, site.operation) for site in sites} <= self._met.get(signature, set())
        known = clear and met and not self.routes and called | kinds <= self._known(signature)
        placed = moves is None or self._is_placed(moves, sites, signature)
        with self._ranks.probing(not known or not placed) as probes:
            if probes and known:
                self._place(outputs, outputs.places(), moves)
            elif probes:
                return self._prove(outputs, called, kinds, moves)
        called |= kinds
        return signature not in self._unwatched

    def _outputs(self, output: Any, n: int, sites: Sequence[Site], like: _Signature) -> Outputs:
        axes = [axis for site in sites for axes in site.alternatives for axis in axes.outputs]
        leading = self._leading and Fold.SAMPLE_MINOR not in self._folds.values() and not any(axes)
        known = self._places.setdefault(like, {})
        given = output, n, self._batch_dim, self._prober, sites, self._tracked, self._seed_node
        return Outputs(*given, leading, known)

    def _is_placed(self, moves: Moves, sites: Sequence[Site], like: _Signature) -> bool:
        """Tell whether rows are where they were in a proven pass, and nothing else happens."""
        known = moves.course <= self._courses.get(like, frozenset())
        in_place = moves.told and moves.steps in self._in_place
        return known and (in_place or are_told(sites))

    def _learn(self, moves: Moves, n: int) -> None:
        """Remember what happened in a proven pass."""
        signature = self._signature(n)
        self._courses[signature] = self._courses.get(signature, frozenset()) | moves.course
        if moves.told:
            self._in_place.add(moves.steps)

    def _place(self, outputs: Outputs, places: Places, moves: Moves | None) -> None:
        """Find whose is each row where rows may have been moved or mixed since a proven pass.

        Raises:
            WrongSplitError: If rows belong to several samples.
        """
        n, sites = outputs.n, outputs.sites
        if any_nan(places):
            self.doubt = self.doubt or "there is NaN in the model's output"
            return
        for site in sites:
            site.spread_out()
        reached = self._find(places, n, sites)
        outputs.check_others({kind for site in sites for kind in site.kinds(n)} - reached)
        if not all(is_in_place(site, n, self._folds) for site in sites):
            self.routes = True
            return
        for site in sites:
            site.found = None
        if moves is not None:
            self._learn(moves, n)

    def _prove(
        self, outputs: Outputs, called: set[Kind], kinds: set[Kind], moves: Moves | None
    ) -> bool:
        """Probe a pass, as `check` does."""
        n, sites = outputs.n, outputs.sites
        signature = self._signature(n)
        verified = self._known(signature)
        if self._usage is None and not called | kinds <= verified:
            self._unwatched.add(signature)
        if any_nan(tree_leaves(outputs.output)):
            self.doubt = self.doubt or "there is NaN in the model's output"
        places = outputs.places()
        reached = self._find(places, n, sites) if self.routes else self._probe(places, n, sites)
        called |= {kind for site in sites for kind in site.kinds(n)}
        missed = called - reached
        outputs.check_others(missed)
        self._unreached -= reached
        if n > 1 and not self.routes:  # rows that nobody reached are known there
            self._unreached |= missed - verified
            self._unprobed |= {site.place for site in sites if site.operation and not site.probed}
        self._unprobed -= {site.place for site in sites if site.probed}
        self._axes.learn(sites, n)
        if not self.doubt:
            outputs.learn(places)
        if moves is not None and not self.routes and not self.doubt:
            if moves.told or are_told(sites):
                self._learn(moves, n)
            else:
                self._place(outputs, places, moves)
        self._verified[signature] = verified | called
        self._met.setdefault(signature, set()).update((s.names, s.operation) for s in sites)
        self._checked.add(signature)
        return self._usage is not None or signature not in self._unwatched

    def _find(self, places: Places, n: int, sites: Sequence[Site]) -> set[Kind]:
        """Find whose is each row, and return what was reached."""
        return Census(self._prober, places, n, self._tracked).find(sites).reached

    def _probe(self, places: Places, n: int, sites: Sequence[Site]) -> set[Kind]:
        """Probe some samples, and return what was reached.

        Raises:
            WrongSplitError: If gradients cannot be split by sample, not even by routes.
        """
        try:
            return self._probe_some(places, n, sites)
        except WrongSplitError as refusal:
            for site in sites:
                site.spread_out()
            try:
                reached = self._find(places, n, sites)
            except WrongSplitError:
                raise refusal from None
            self.routes = True
            return reached

    def _probe_some(self, places: Places, n: int, sites: Sequence[Site]) -> set[Kind]:
        # Owners that were given may be wrong for any sample.
        owned = any(self._tracked[name].row_owner for site in sites for name in site.names)
        chosen = range(n) if owned else probed_samples(n)
        probes = [self._run(places, sample, n) for sample in chosen]
        hits = [hit for probe in probes if not probe.mixed for hit in probe.hits]
        folds = find_folds(hits, n, self._tracked)
        for name, fold in folds.items():
            if self._folds.get(name, fold) is not fold:  # passes proven before have the other one
                raise unclear_fold(self._tracked[name], several=False)
        self._folds |= folds
        return {kind for probe in probes for kind in probe.reached}

    def _run(self, places: Places, sample: int, n: int) -> Probe:
        probe = self._prober.run_from(places, sample, n)
        if probe.mixed and not self.doubt:
            raise wrong_split(self._model, self._tracked, sample, probe.mixed, probe.scalars)
        probe.narrow()
        return probe

    def _known(self, signature: _Signature) -> set[Kind]:
        """Return what is verified; where every row is asked for, it does not matter how it was."""
        known = self._verified.get(signature, set())
        return known | {(name, False) for name, _ in known} if self.routes else known

    def _signature(self, n: int) -> _Signature:
        """Identify what a verification holds for: modes of all modules, one sample or more."""
        return (n > 1, *[module.training for module in self._modules])
