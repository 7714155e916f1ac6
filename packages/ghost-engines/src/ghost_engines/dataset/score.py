"""Scores a whole data set against targets, exact and unprojected, in one pass."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor, nn

from ghost_core import Batch, CaptureError, Engine, EngineOptions
from ghost_core.arguments import module, whole
from ghost_core.plugins import installed
from ghost_core.restoring import graphs_kept
from ghost_core.state import untouched
from ghost_engines.dataset.batches import Batches, Ids
from ghost_engines.dataset.losses import PerSampleLoss, checked, target_gradient
from ghost_engines.dataset.table import ScoreTable
from ghost_engines.dot_product import DotProductEngine
from ghost_engines.holding import HoldingEngine
from ghost_engines.progress import Progress
from ghost_engines.results import Result
from ghost_engines.scores import Scores
from ghost_engines.scoring import ScoringEngine

logger = logging.getLogger(__name__)


def score_dataset(
    model: nn.Module,
    per_sample_loss: PerSampleLoss,
    train: Any,
    targets: Mapping[str, Any],
    *,
    norms: bool = True,
    engine: str = "dot_product",
    ids: Ids = None,
    batch_size: int = 32,
    progress: bool | None = None,
    **options: Unpack[EngineOptions],
) -> ScoreTable:
    """Score every sample of a data set against targets, exactly, in one pass.

    The score of a sample with a target is the dot product of two gradients: of the sample's own
    loss, and of the target's mean loss. **Positive means that a small step on the sample lowers the
    target's loss.**

    The model runs in evaluation mode, and is left as it was: modes, `.grad`, buffers and random
    number generators too. No weight gradient is made but those of the targets.

    Data sets are given as a map-style or iterable data set, which is batched here; as a
    `DataLoader`, a list or another iterable of batches; or as one batch, a tensor, mapping or tuple
    of all samples, which is cut. What a batch is, and where it must be, is for `per_sample_loss` to
    say.

    Args:
        model: The module that `per_sample_loss` calls.
        per_sample_loss: Takes the model and a batch, and returns one loss per sample, floating
            `[N]`.
        train: The data set to score.
        targets: Data sets by name. Each is gone through once, before `train`.
        norms: Whether the engine of dot products is to measure norms and cosines too. Gradients of
            parameters that are used several times are then held until a batch is done.
        engine: Name of the engine to score with, of this package or a plugin: its `total` is the
            score. What is no `ScoringEngine` takes no targets.
        ids: Where the ids of a batch's samples are: under a key of it, in what a function returns
            for it; by default those that `with_ids` gave to samples, which losses do not see. Else
            samples are numbered from 0 in their order.
        batch_size: Samples in a batch, where they are batched here.
        progress: Whether to show a progress bar. By default at a terminal, if it takes long.
        options: What all engines take: see `Engine`. There is no `grad_scaler`: no loss is scaled.

    Returns:
        A row for each sample.

    Raises:
        CaptureError: If a data set is empty, losses are not one finite number per sample, a target
            has no gradient, or an option does not fit.
        UnknownNameError: If there is no such engine or a glob matches nothing.
        UnsupportedLayerError: If a selected parameter belongs to a module without a sampler.
        WrongSplitError: If gradients cannot be split by sample.
    """
    model, batch_size = module(model), whole("batch_size", batch_size, least=1)
    scorer = _engine(model, engine, norms, targets, options)
    parts: list[_Part] = []
    with graphs_kept(True), untouched(model):
        model.eval()
        if isinstance(scorer, ScoringEngine):
            _add_targets(scorer, targets, per_sample_loss, batch_size, progress)
        data = Batches(train, "train", batch_size)
        with scorer.frozen(), Progress(data.total, "score", progress, "sample") as bar:
            for found, batch in data.with_ids(ids):
                with scorer.batch(found) as scored:
                    checked(per_sample_loss(model, batch), "train", found).sum().backward()
                parts.append(_Part.of(scored, engine))
                bar.advance(len(found))
    return _table(parts, signed=isinstance(scorer, ScoringEngine))


def _engine(
    model: nn.Module,
    name: str,
    norms: bool,
    targets: Mapping[str, Any],
    options: EngineOptions,
) -> Engine[Any]:
    """Make the engine to score with."""
    if options.get("grad_scaler") is not None:
        raise CaptureError("score_dataset takes no grad_scaler: it scales no loss")
    kind: type[Any] = installed().engine(name)
    given: dict[str, Any] = {**options}
    if issubclass(kind, DotProductEngine):
        given["norms"] = norms
    if issubclass(kind, HoldingEngine):
        given["loss_weights"] = "sum"
    if issubclass(kind, ScoringEngine) and not targets:
        raise CaptureError(
            "there are no targets to score against",
            remedy="give targets={name: data}; the gradient of a target's mean loss is what the "
            "samples' gradients are multiplied with",
        )
    if not issubclass(kind, ScoringEngine) and targets:
        raise CaptureError(
            f"engine {name!r} takes no targets",
            reason=f"{kind.__name__} is no ScoringEngine, which multiplies with directions",
            remedy="give targets={}, or choose another engine",
        )
    with installed().blame("engine", name):
        made: Engine[Any] = kind(model, **given)
    return made


def _add_targets(
    engine: ScoringEngine[Any],
    targets: Mapping[str, Any],
    per_sample_loss: PerSampleLoss,
    batch_size: int,
    progress: bool | None,
) -> None:
    for name, data in targets.items():
        batches = Batches(data, f"target {name!r}", batch_size)
        with Progress(batches.total, f"target {name}", progress, "sample") as bar:
            direction = target_gradient(
                name, batches, engine.model, per_sample_loss, engine.parameters, bar.advance
            )
        engine.add_direction(name, direction)


@dataclass(frozen=True)
class _Part:
    """What is kept of a batch, on the CPU."""

    ids: Tensor
    names: tuple[str, ...]
    scores: Tensor
    norms: Tensor | None
    cosines: Tensor | None
    verified: bool

    @classmethod
    def of(cls, batch: Batch[Any], name: str) -> _Part:
        """Take the result of any engine that gives one number per sample, or one per direction."""
        result = batch.result
        total = getattr(result, "total", None) if isinstance(result, Result) else result
        names = tuple(getattr(result, "directions", ()))
        if isinstance(total, Tensor) and total.shape == (batch.n,):
            total, names = total[:, None], (name,)
        if not isinstance(total, Tensor) or total.shape != (batch.n, len(names)):
            found = tuple(total.shape) if isinstance(total, Tensor) else type(total).__name__
            raise CaptureError(
                f"engine {name!r} gives no table by sample",
                reason=f"the result of a batch of {batch.n} samples is {found}, not one number "
                "per sample or per sample and direction",
                remedy="use it in a loop of your own, which knows what to do with its results",
            )
        norms = cosines = None
        if isinstance(result, Scores) and result.squared_norms is not None:
            norms, cosines = _wide(result.norms), _wide(result.cosines)
        return cls(batch.ids, names, _wide(total), norms, cosines, batch.verified)


def _wide(values: Tensor) -> Tensor:
    return values.detach().to("cpu", torch.float64)


def _table(parts: list[_Part], *, signed: bool) -> ScoreTable:
    ids = torch.cat([part.ids for part in parts]).numpy()
    scores = torch.cat([part.scores for part in parts]).numpy()
    if doubled := len(ids) - len(np.unique(ids)):
        logger.warning("%d samples came under an id that another one had before", doubled)
    if wrong := int((~np.isfinite(scores)).any(1).sum()):
        logger.warning("the scores of %d of %d samples are not finite", wrong, len(ids))
    return ScoreTable(
        ids=ids,
        names=parts[0].names,
        scores=scores,
        norms=_joined([part.norms for part in parts]),
        cosines=_joined([part.cosines for part in parts]),
        signed=signed,
        verified=all(part.verified for part in parts),
    )


def _joined(columns: list[Tensor | None]) -> np.ndarray | None:
    there = [each for each in columns if each is not None]
    return torch.cat(there).numpy() if there else None
