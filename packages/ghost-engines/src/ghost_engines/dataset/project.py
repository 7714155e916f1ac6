"""Projects a whole data set into a store, which can be searched then."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from ghost_core import CaptureError
from ghost_core.arguments import module, whole
from ghost_core.restoring import graphs_kept
from ghost_core.state import RandomState, untouched
from ghost_engines.dataset.batches import Ids
from ghost_engines.dataset.columns import ColumnOf, check_columns, column_values
from ghost_engines.dataset.draws import warn_of_draws
from ghost_engines.dataset.known import KnownIds, MetIds
from ghost_engines.dataset.losses import PerSampleLoss, checked
from ghost_engines.dataset.windows import (
    Collate,
    Length,
    Window,
    Windows,
    batch_tokens,
    packing_of,
)
from ghost_engines.dataset.writing import Part, Writer, Written
from ghost_engines.digest import model_digest
from ghost_engines.progress import Progress
from ghost_engines.projection import ProjectionEngine, ProjectionOptions
from ghost_engines.store import MANIFEST, DataFile, GradientStore, Manifest


@dataclass(frozen=True, kw_only=True)
class ProjectedData:
    """What `project_dataset` did.

    Attributes:
        store: The store, open for reading.
        samples: Samples that were projected now.
        skipped: Samples that were in the store before.
        tokens: Tokens of the samples that were projected, as far as batches tell.
        seconds: How long it took.
    """

    store: GradientStore
    samples: int
    skipped: int
    tokens: int
    seconds: float


def project_dataset(
    model: nn.Module,
    per_sample_loss: PerSampleLoss,
    data: Any,
    into: str | os.PathLike[str],
    *,
    ids: Ids = None,
    batch_size: int | None = None,
    tokens_per_batch: int | None = None,
    length: Length | None = None,
    collate: Collate | None = None,
    columns: Mapping[str, tuple[str, ColumnOf]] = MappingProxyType({}),
    norms: bool = True,
    losses: bool = True,
    unit: int = 4096,
    part: tuple[int, int] | None = None,
    info: Mapping[str, Any] | None = None,
    files: Sequence[DataFile] | None = None,
    notes: Mapping[str, Any] | None = None,
    progress: bool | None = None,
    **options: Unpack[ProjectionOptions],
) -> ProjectedData:
    """Project the gradient of every sample's own loss into a store, in one pass.

    The pass makes no weight gradients. The model runs in evaluation mode, and is left as it was:
    modes, `.grad`, buffers and random number generators too.

    Where there is a store already, it goes on: samples that are in it are skipped, and a store of
    other weights, another engine or other data is refused. An interrupted pass keeps what is
    computed, in whole windows of up to 512 samples; one that is killed keeps what was committed,
    about every minute, and every full unit. What it writes when it goes on is what it would have
    written, bit by bit. One that fails before it has a row leaves no store, where it has made it
    alone, so that mended data or other options begin anew.

    Rows do not depend on the batches that samples are in, but for rounding. Where losses draw
    random numbers though the model is in evaluation mode, as `F.dropout` may, a warning says what
    does.

    Args:
        model: The module that `per_sample_loss` calls.
        per_sample_loss: Takes the model and a batch, and returns one loss per sample, `[N]`.
        data: The data set: see `score_dataset`.
        into: Folder of the store.
        ids: Where the ids of a batch's samples are: see `score_dataset`.
        batch_size: Samples of a batch at most, where they are batched here: 32 if
            `tokens_per_batch` is not given.
        tokens_per_batch: Tokens of a batch at most, padding included. Samples of like length share
            a batch then. A sample that is longer is alone.
        length: Tells the tokens of a sample; by default the length of its `input_ids`.
        collate: Makes a batch of a list of samples; by default torch's own, and samples with
            `input_ids` are padded.
        columns: What else to store of each sample, by name: a dtype, as a store declares it, and
            a function of sample ids that returns numbers or strings. Domains, say, are
            `{"group": ("category", corpus.groups)}`. None is called as those that are computed.
        norms: Whether to store norms, of rows before any `unit_norm`, as the column `norm`.
        losses: Whether to store losses.
        unit: Rows per file of the store.
        part: `(rank, world)`, where several processes project one data set: units are dealt out to
            them in turn, and none waits for another. Each returns the store as it is then.
        info: What else changes a value of a row; the digest of the model is among it anyway.
        files: The files that the data come from.
        notes: Whatever is worth remembering.
        progress: Whether to show a progress bar. By default at a terminal, if it takes long.
        options: Those of `ProjectionEngine`, but `loss_weights` and `grad_scaler`: the losses are
            the samples' own.

    Raises:
        CaptureError: If data is empty, an id comes more than once, losses are not one finite number
            per sample, or an option does not fit.
        StoreError: If there is a store of other rows, or another writer has it open.
        WrongSplitError: If gradients cannot be split by sample.
        OSError: If writing fails; what was acknowledged stays.
    """
    started = time.monotonic()
    for name in ("loss_weights", "grad_scaler"):
        if options.get(name) is not None:
            raise CaptureError(f"project_dataset takes no {name}: it calls the loss itself")
    options["loss_weights"] = "sum"
    engine = ProjectionEngine(module(model), **options)
    for name, count in {"batch_size": batch_size, "tokens_per_batch": tokens_per_batch}.items():
        if count is not None:
            whole(name, count, least=1)
    check_columns(columns, ["norm"] * norms + ["loss"] * losses)
    root = Path(into)
    resumed = (root / MANIFEST).exists()
    unit = Manifest.read(root).unit if resumed else whole("unit", unit, least=1)
    packing = packing_of(batch_size, tokens_per_batch, length, collate)
    windows = Windows(data, ids, packing, unit, (0, 1) if part is None else part)
    declared = {name: dtype for name, (dtype, _) in columns.items()}
    declared |= {"norm": "float32"} if norms else {}
    known = {"model": model_digest(model), **({} if info is None else info)}
    found = {name: function for name, (_, function) in columns.items()}
    job = _Job(per_sample_loss, engine, windows, found, norms, losses)
    with graphs_kept(True), untouched(model):
        model.eval()
        windows.begin()  # an empty data set leaves no store
        store = _opened(root, engine, part, unit, notes, columns=declared, info=known, data=files)
        with (
            Writer(store) as writer,
            engine.frozen(),
            Progress(windows.total, "project", progress, "sample") as bar,
        ):
            job.run(writer, bar)
    seconds = time.monotonic() - started
    return ProjectedData(
        store=GradientStore.open(root),
        samples=job.samples,
        skipped=job.skipped,
        tokens=job.tokens,
        seconds=seconds,
    )


def _opened(
    root: Path,
    engine: ProjectionEngine,
    part: tuple[int, int] | None,
    unit: int,
    notes: Mapping[str, Any] | None,
    **given: Any,
) -> GradientStore:
    """Open the store for writing, or make it."""
    if part is not None:
        return GradientStore.join(root, engine, part=part, unit=unit, notes=notes, **given)
    if (root / MANIFEST).exists():
        return GradientStore.resume(root, engine, **given)
    return GradientStore.create(root, engine, unit=unit, notes=notes, **given)


@dataclass
class _Job:
    """A pass over a data set.

    Attributes:
        per_sample_loss: Computes losses.
        engine: Makes rows of their gradients.
        windows: The data.
        columns: What else is stored of each sample.
        norms: Whether norms are.
        losses: Whether losses are.
        samples: Samples that were projected.
        skipped: Samples that were there.
        tokens: Tokens of those that were projected.
        looked: Whether it is known if losses draw random numbers.
    """

    per_sample_loss: PerSampleLoss
    engine: ProjectionEngine
    windows: Windows
    columns: Mapping[str, ColumnOf]
    norms: bool
    losses: bool
    samples: int = 0
    skipped: int = 0
    tokens: int = 0
    looked: bool = False

    def run(self, writer: Writer, bar: Progress) -> None:
        """Compute what is not in the store, and hand it over."""
        known, met = KnownIds(writer.store.ids), MetIds()

        def wanted(start: int, count: int) -> bool:
            if not self.windows.numbered or known.new(torch.arange(start, start + count)).any():
                return True
            self._skip(count, bar)
            return False

        for window in self.windows.among(wanted):
            met.add(window.ids)
            new = known.new(window.ids)
            if not new.any():
                self._skip(len(new), bar)
                continue
            self.skipped += int((~new).sum())
            self.samples += int(new.sum())
            parts = [self._project(window, each, batch, bar) for each, batch in window.batches]
            columns = {
                name: column_values(name, column, window.ids)
                for name, column in self.columns.items()
            }
            writer.put(Written(window.ids, new, parts, columns, self.norms, self.losses))

    def _skip(self, count: int, bar: Progress) -> None:
        self.skipped += count
        bar.advance(count)

    def _project(self, window: Window, positions: Tensor, batch: Any, bar: Progress) -> Part:
        """Project a batch, and once more if it was the first one in which a module ran."""
        ids = window.ids[positions]
        devices = {parameter.device for parameter in self.engine.parameters}
        before = None if self.looked else RandomState.now(devices)
        for last in (False, True):
            with self.engine.batch(ids) as found:
                losses = self._losses(batch, ids)
                losses.sum().backward()
            if last or found.verified or not self.engine.verifies:
                break
        if before is not None:
            self.looked = True
            if not found.result.random and RandomState.now(devices) != before:
                warn_of_draws(lambda: self.per_sample_loss(self.engine.model, batch), devices)
        tokens = batch_tokens(batch)
        self.tokens += tokens
        bar.advance(len(ids), tokens)
        return Part(positions, found.result, losses.detach())

    def _losses(self, batch: Any, ids: Tensor) -> Tensor:
        """Return losses; whether they are finite is for the writer to see, who waits for them."""
        losses = self.per_sample_loss(self.engine.model, batch)
        usable = isinstance(losses, Tensor) and losses.shape == ids.shape
        if usable and losses.is_floating_point() and losses.requires_grad:
            return losses
        return checked(losses, "data", ids)
