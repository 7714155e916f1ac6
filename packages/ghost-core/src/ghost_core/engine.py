"""What all engines share: attachment, batches, results."""

from __future__ import annotations

import inspect
import logging
import reprlib
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from operator import attrgetter
from types import MappingProxyType
from typing import Generic, NoReturn, Self, TypedDict

import torch
from torch import Tensor, nn

from ghost_core._torch import any_gradient_hooks, parameters_by_name
from ghost_core.arguments import module, scaler, switch
from ghost_core.batch import Batch, ResultT, SampleIds, as_ids
from ghost_core.capture import Freeze, Listener, Recorder, changed_since, not_attached, open_already
from ghost_core.compare import Comparison, compare
from ghost_core.errors import CaptureError, UnknownOptionError
from ghost_core.model_hooks import check_unhooked
from ghost_core.plugins import select
from ghost_core.ranks import Ranks, unwrapped
from ghost_core.restoring import Leave, restored
from ghost_core.tracking import (
    Patterns,
    SamplerRegistry,
    TrackedParameter,
    Tracking,
    coverage,
    track,
)

logger = logging.getLogger(__name__)


class EngineOptions(TypedDict, total=False):
    """The options that all engines take; `Engine` says what they mean.

    An engine with options of its own takes these as `**options: Unpack[EngineOptions]`.
    """

    layers: Patterns
    exclude: Patterns
    grad_scaler: torch.amp.GradScaler | None
    verify: bool
    generic: bool
    lift: bool
    batch_dim: Mapping[str, int | None]
    row_owner: Mapping[str, str]
    units: Patterns
    registry: SamplerRegistry | None


class Engine(Listener, Generic[ResultT]):
    """Consumes per-sample gradients while the user's own forward and backward passes run.

    A subclass writes `on_gradient` and `on_end`. It is a context manager: entering puts hooks on
    the model, leaving removes every trace. Inside, `batch` marks the forward and backward passes
    to capture; whatever runs outside of a batch is left alone.

    Args:
        model: The module that the training loop calls; for names, what is inside of a DDP.
        layers: Globs over dotted names of modules or parameters: what to track.
        exclude: Globs over dotted names: what to leave out of it.
        grad_scaler: The scaler that multiplies the loss, whose scale engines divide out.
        verify: Whether to verify, on the first batch and whenever modules change between training
            and evaluation mode, that gradients can be split by sample. It costs about two training
            steps, and gradients of NaN pass through hooks that the model's own code puts on
            tensors; hooks on modules do not see them. Without it, ghost trusts that samples do not
            mix and that what is computed once for all of them is just added.
        generic: Whether layers without a sampler of their own may be replayed by one that handles
            any module. `coverage()` shows which are.
        lift: Whether values that are the same for all samples, and parameters used outside of the
            modules that own them, may be followed to where they meet the samples. It costs a
            backward pass of the operation for each sample where that has no closed form; without
            it, they are refused.
        batch_dim: Axis of the samples, by glob over names of modules, where it is not the first:
            `{"*": 1}` for a sequence-first model, `""` for the model's own inputs and outputs.
            None stands for modules that are called on nothing of the samples. Later entries win.
        row_owner: For modules whose rows belong to samples in another number, as with several
            images a sample: by glob over names of modules, the key of a tensor `[R]` of integers
            that tells the position in the batch of each row's sample. The tensor is one of the
            model's keyword inputs, or given to `batch`.
        units: Globs over dotted names of modules that run again as one, with all that is inside of
            them, for the gradients of all their parameters: in place of formulas, and of following
            parameters that are used outside of their modules. `coverage()` shows the price.
        registry: Where samplers are found; by default those of all installed plugins.

    Raises:
        UnknownNameError: If a glob matches nothing.
        UnsupportedLayerError: If a selected parameter belongs to a module without a sampler.
        CaptureError: If no trainable parameter is selected, or one is in a compiled module.
    """

    freeze: Freeze = Freeze.NEVER
    """What happens to weight gradients while the engine is attached by `with engine:`."""

    _given: Mapping[str, object]
    """The options that it was made with, but for those that are the defaults."""

    def __new__(cls, *_: object, **options: object) -> Self:
        """Refuse unknown options before `__init__` does, with a list of those that exist."""
        defaults = cls.options()
        for name in options:
            if name not in defaults:
                raise UnknownOptionError(f"option of {cls.__name__}", name, defaults)
        engine = super().__new__(cls)
        engine._given = {
            name: value
            for name, value in options.items()
            if name != "model" and str(value) != str(defaults[name])
        }
        return engine

    @classmethod
    def options(cls) -> dict[str, object]:
        """Return the options that it takes beside the model, with their defaults."""
        own = dict(inspect.signature(cls.__init__).parameters)
        if any(each.kind is each.VAR_KEYWORD for each in own.values()):
            own = {**inspect.signature(Engine.__init__).parameters, **own}
        return {
            name: each.default
            for name, each in own.items()
            if name not in ("self", "model") and each.kind is not each.VAR_KEYWORD
        }

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: Patterns = "*",
        exclude: Patterns = (),
        grad_scaler: torch.amp.GradScaler | None = None,
        verify: bool = True,
        generic: bool = True,
        lift: bool = True,
        batch_dim: Mapping[str, int | None] = MappingProxyType({}),
        row_owner: Mapping[str, str] = MappingProxyType({}),
        units: Patterns = (),
        registry: SamplerRegistry | None = None,
    ) -> None:
        self.model, self.ranks = unwrapped(model), Ranks.of(module(model))
        self.verifies = switch("verify", verify)
        self.loss_scale = 1.0
        """What the loss of the open batch was multiplied with, by the gradient scaler."""
        self._grad_scaler = scaler(grad_scaler)
        self.selection = select(
            layers,
            exclude,
            generic=generic,
            lift=lift,
            batch_dim=batch_dim,
            row_owner=row_owner,
            units=units,
            registry=registry,
        )
        self.tracking: Tracking = self._track()
        self._flags = {n: p.requires_grad for n, p in parameters_by_name(self.model).items()}
        self._recorder: Recorder | None = None
        self._attachment = ExitStack()
        self._leaving = closing(self._attachment)
        self._batch: Batch[ResultT] | None = None
        self._open = False
        self._said: set[str] = set()

    def __repr__(self) -> str:
        """Say what it is, what it was made with, and whether it is at work."""
        state = "open" if self._open else "attached" if self._recorder else "detached"
        kind, model = type(self).__name__, type(self.model).__name__
        given = [f"{name}={reprlib.repr(value)}" for name, value in self._given.items()]
        return (
            f"<{', '.join([f'{kind}: {model}, {len(self.parameters)} parameters', *given, state])}>"
        )

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Refuse to be copied or pickled.

        Raises:
            CaptureError: Always.
        """
        raise CaptureError(
            f"{type(self).__name__} belongs to the model it was made for, as closures that it was "
            "given do: copy or save the model, and make a new engine for the copy"
        )

    @property
    def parameters(self) -> tuple[TrackedParameter, ...]:
        """The tracked parameters, in order of their names."""
        return self.tracking.parameters

    @property
    def is_open(self) -> bool:
        """Whether a batch is open."""
        return self._open

    @property
    def makes_gradients(self) -> bool:
        """Whether what `on_gradient` returns becomes the parameters' gradients."""
        recorder = self._recorder
        return self.freeze is Freeze.CALL and recorder is not None and not recorder.flags

    # For users

    def __enter__(self) -> Self:
        stack = ExitStack()
        try:
            self._attach(self.freeze, stack)
            self._attachment.push(stack)
            return self
        except BaseException:
            stack.close()
            raise

    __exit__: Callable[..., None] = Leave(attrgetter("_leaving.__exit__"))

    @contextmanager
    def frozen(self) -> Iterator[Self]:
        """Attach for a pass without training: parameters are frozen, no weight gradient is made.

        Every per-sample gradient is as without it, for less time and memory.
        """
        with self.ranks.apart(), restored() as stack:
            self._attach(Freeze.PASS, stack)
            yield self

    @contextmanager
    def batch(
        self, ids: SampleIds, *, owners: Mapping[str, Tensor] = MappingProxyType({})
    ) -> Iterator[Batch[ResultT]]:
        """Capture the forward and backward passes of one batch.

        Several passes inside are either uses of the same N samples, which add up, or micro-batches
        of fewer samples, which follow one another. Several backward passes add up.

        Args:
            ids: One integer per sample, `[N]`.
            owners: Tensors that `row_owner` names: for each row, the position in `ids` of its
                sample, integers `[R]`.

        Yields:
            The batch, whose result is there once it is closed.

        Raises:
            CaptureError: If the engine is not attached, the model ran on other samples, or no
                gradient arrived.
            WrongSplitError: If gradients cannot be split by sample.
        """
        if self._recorder is None:
            raise not_attached()
        if self._open:
            raise open_already()
        self._check_flags(frozen=bool(self._recorder.flags))
        batch = self.new_batch(as_ids(ids))
        self.loss_scale = 1.0 if self._grad_scaler is None else self._grad_scaler.get_scale()
        try:
            self._batch, self._open = batch, True
            self.on_start(batch)
            with self._recorder.capture(self, self.called_on(batch), owners) as capture:
                yield batch
            if batch.verified and capture.doubt:
                batch.verified = False
                self._say(f"{capture.doubt} in a batch, which is not verified")
            batch.finish(self.on_end(batch))
        finally:
            self._open = False
            self.on_close()

    def collect(self) -> ResultT:
        """Return the result of the last batch.

        Raises:
            CaptureError: If there is none.
        """
        if self._batch is None:
            raise CaptureError("there was no batch yet: with engine.batch(ids): ...")
        return self._batch.result

    def verify(
        self,
        losses: Callable[[], Tensor],
        *,
        samples: int = 8,
        tolerance: float | None = None,
        owners: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> Comparison:
        """Compare ghost's gradients of some samples with one autograd call per sample.

        It leaves no trace, and is called outside of a batch:

            engine.verify(lambda: per_sample_loss(model, batch)).raise_if_wrong()

        Args:
            losses: Runs the model and returns one loss per sample, floating `[N]`; see `compare`.
            samples: How many samples to compare, spread over the batch, first and last included.
            tolerance: Error allowed relative to a sample's gradient; by default by dtype.
            owners: Tensors that `row_owner` names, as `batch` takes them.

        Returns:
            The errors by parameter: `table()`, `verdict`, `ok`, `raise_if_wrong()`.

        Raises:
            CaptureError: If an option does not fit, or there is nothing to compare.
            WrongSplitError: If the split by sample is refused.
        """
        if difference := self.tracking.difference(self._track()):
            raise CaptureError(
                f"the model changed since the engine was made ({difference}): make a new engine"
            )
        with self.ranks.apart("engine.verify"):
            return compare(
                self.model,
                losses,
                self.selection,
                verify=self.verifies,
                samples=samples,
                tolerance=tolerance,
                owners=owners,
            )

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the model alone inside, also where a batch is open."""
        if self._recorder is None:
            yield
        else:
            with self._recorder.paused():
                yield

    def coverage(self) -> str:
        """Return a table of the tracked modules, their samplers and their parameters.

        After a batch, a second table has what was followed as the same for all samples.
        """
        return coverage(self.tracking, Recorder.followed(self.model))

    def _say(self, message: str) -> None:
        """Log a warning, once."""
        if message not in self._said:
            self._said.add(message)
            logger.warning(message)

    # For subclasses

    def new_batch(self, ids: Tensor) -> Batch[ResultT]:
        """Return the object that `batch` yields, for ids `[N]`."""
        return Batch(ids, self.verifies)

    def called_on(self, batch: Batch[ResultT]) -> int:
        """Return how many samples the model is called on for a batch; by default its own."""
        return batch.n

    def on_start(self, batch: Batch[ResultT]) -> None:
        """Prepare for a batch."""

    @abstractmethod
    def on_end(self, batch: Batch[ResultT]) -> ResultT:
        """Return the result of a batch, after its last backward pass."""

    def on_close(self) -> None:
        """Release what was held for a batch, also after an exception."""

    # Attachment

    def _track(self) -> Tracking:
        return track(self.ranks.settled(self.model), self.selection, Recorder.of(self.model).flags)

    def _attach(self, freeze: Freeze, stack: ExitStack) -> None:
        """Attach the engine, for as long as the stack is not closed."""
        recorder = Recorder.of(self.model)
        names = self.tracking.names if freeze is Freeze.PASS else ()
        self.ranks.check_way("frozen()", names)
        if difference := self.tracking.difference(self._track()):
            raise CaptureError(
                f"the model changed since the engine was made ({difference}): make a new engine"
            )
        stack.enter_context(recorder.serving(self, freeze))
        stack.callback(setattr, self, "_recorder", None)
        self._recorder = recorder

    def _check_flags(self, *, frozen: bool) -> None:
        """Refuse parameters frozen or unfrozen since: scores would not be those of the training."""
        found = parameters_by_name(self.ranks.settled(self.model))
        before, now = self._flags, {name: leaf.requires_grad for name, leaf in found.items()}
        if frozen:  # by ghost, so that only names can tell
            now |= {name: before[name] for name in before.keys() & now.keys()}
        if now != before:
            changed = {n: now.get(n) for n in before | now if before.get(n) != now.get(n)}
            tracked = not self.tracking.names.isdisjoint(changed)
            # Where all are gone, nobody is asked: patterns that left them out find nothing now.
            if tracked or (now.keys() & changed and self._track() != self.tracking):
                raise changed_since(changed)
        if any_gradient_hooks(found.values()):
            leaves = dict(self.model.named_parameters())  # which a class may have its own of
            for parameter in self.parameters:
                check_unhooked(parameter.name, leaves[parameter.name])
