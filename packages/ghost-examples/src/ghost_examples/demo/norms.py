"""An engine in thirty lines: the norm of each sample's gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from ghost_core import Batch, CaptureError, Engine, Pass, PerSampleGradient, Site


class NormEngine(Engine[Tensor]):
    """Norms of per-sample gradients, `[N]`, of models that use each parameter once.

    Backpropagate the sum of per-sample losses to get the norm of each sample's own gradient.
    """

    def on_start(self, batch: Batch[Tensor]) -> None:
        """Start from zero."""
        self._squares = torch.zeros(batch.n, device=self.sites[0].device)
        self._arrived: set[tuple[int, str]] = set()

    def on_gradient(self, pass_: Pass, site: Site, gradient: PerSampleGradient) -> None:
        """Add the squared norms of one parameter's gradients.

        Raises:
            CaptureError: If the parameter is used twice: `‖g + h‖²` is not `‖g‖² + ‖h‖²`.
        """
        use = (pass_.rows.start, site.parameter)
        if use in self._arrived:
            raise CaptureError(f"{site.parameter} is used twice, which has no norm here")
        self._arrived.add(use)
        self._squares[pass_.rows] += gradient.paired(gradient)

    def on_end(self, batch: Batch[Tensor]) -> Tensor:
        """Return the norms."""
        return self._squares.sqrt()
