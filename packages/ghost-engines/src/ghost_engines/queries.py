"""Rows to search with: projected gradients of queries, also as an optimizer sees them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ghost_core import CaptureError, SampleIds
from ghost_core.arguments import switch
from ghost_core.batch import as_ids
from ghost_core.compare import check_losses
from ghost_core.differentiation import check_differentiable
from ghost_core.restoring import graphs_kept
from ghost_core.state import untouched
from ghost_engines.digest import model_digest
from ghost_engines.directions import Gradient, Transform
from ghost_engines.projected import ProjectedRows
from ghost_engines.projection import ProjectionEngine


def project_queries(
    engine: ProjectionEngine,
    per_sample_loss: Callable[[nn.Module, Any], Tensor],
    batch: Any,
    *,
    ids: SampleIds | None = None,
    transform: Transform | None = None,
    digest: bool = True,
) -> ProjectedRows:
    """Project the gradients of a few samples, to search a store with them.

    The gradient of each is made by autograd and held as it is, one at a time, so that it can be
    preconditioned before it is projected: with `transform=adam_aware(optimizer)`, the score with a
    row of the store is what a step of Adam along the row's gradient does to the query's loss (Xia
    et al., 2024). The model runs in evaluation mode, and is left as it was.

    Args:
        engine: The engine of the store: see `ProjectionEngine.from_manifest`.
        per_sample_loss: Takes the model and a batch, and returns one loss per sample, `[Q]`.
        batch: The queries.
        ids: One integer per query; by default they are numbered from 0.
        transform: What to make of each gradient: `adam_aware(optimizer)`, `unit_norm`, or any
            function of a direction by parameter name.
        digest: Whether to take a digest of the model, so that a store by another one refuses the
            rows. False to ask another model on purpose, such as a later checkpoint.

    Returns:
        Rows `[Q, k_total]`, with the manifest by which a store tells rows of other engines, and the
        digest by which it tells those of other models.

    Raises:
        CaptureError: If losses are not one per sample, there are none, or there is another number
            of ids.
    """
    known = model_digest(engine.model) if switch("digest", digest) else None
    model, names = engine.model, [each.name for each in engine.parameters]
    leaves = {
        name: leaf
        for name, leaf in model.named_parameters(remove_duplicate=False)
        if name in set(names)
    }
    parts: list[Tensor] = []
    with graphs_kept(True), untouched(model):
        model.eval()
        losses = check_losses(per_sample_loss(model, batch))
        found = torch.arange(len(losses)) if ids is None else as_ids(ids)
        if not len(losses) or len(found) != len(losses):
            raise CaptureError(f"there are {len(found)} ids for {len(losses)} losses of queries")
        check_differentiable(losses)
        for loss in losses:
            given = torch.autograd.grad(
                loss, [leaves[name] for name in names], retain_graph=True, materialize_grads=True
            )
            gradient = Gradient(dict(zip(names, given, strict=True)), None, leaves)
            seen = gradient if transform is None else transform(gradient)
            parts.append(engine.project({name: seen[name][None] for name in names}))
    rows = torch.cat(parts)
    return ProjectedRows(
        ids=found,
        verified=True,
        rows=rows.to(engine.dtype),
        layout=engine.layout,
        manifest=engine.manifest(),
        model=known,
    )
