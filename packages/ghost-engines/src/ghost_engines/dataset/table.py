"""The scores of a data set, as a table."""

from __future__ import annotations

import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ghost_engines.plots import sample_figure, save
from ghost_engines.tables import Columns, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class ScoreTable(Table):
    """Scores of a data set, a row for each sample in the order in which they came.

    A positive score means that a small step of gradient descent on the sample lowers the target's
    mean loss, a negative one that it raises it.

    Attributes:
        ids: Sample ids, int64 `[N]`.
        names: What the K columns of scores are called: the targets.
        scores: `⟨g_n, g_target⟩`, float64 `[N, K]`: g_n is the gradient of the sample's own loss,
            g_target that of the target's mean loss. For other engines, what they measure.
        norms: Norms of the samples' gradients, float64 `[N]`, if they were asked for.
        cosines: Cosines of the samples' gradients with the targets', float64 `[N, K]`, if norms
            were asked for. NaN where a gradient is zero.
        signed: Whether they are scores with targets: positive is helpful, and negative harmful.
        verified: Whether the split by sample was verified in every batch.
    """

    ids: np.ndarray
    names: tuple[str, ...]
    scores: np.ndarray
    norms: np.ndarray | None = None
    cosines: np.ndarray | None = None
    signed: bool
    verified: bool

    def __len__(self) -> int:
        """Return the number of samples N."""
        return len(self.ids)

    def __repr__(self) -> str:
        """Say how large it is and what is in it."""
        norms = [] if self.norms is None else ["norms"]
        verified = "verified" if self.verified else "not verified"
        targets = f"K={len(self.names)} ({reprlib.repr(', '.join(self.names))[1:-1]})"
        return f"ScoreTable({', '.join([f'N={len(self)}', targets, *norms, verified])})"

    def columns(self) -> Columns:
        """Return the columns: `id`, `score_NAME` for each target, `norm`, `cosine_NAME`."""
        found = {"id": self.ids}
        found |= {f"score_{name}": self.scores[:, at] for at, name in enumerate(self.names)}
        if self.norms is not None:
            found["norm"] = self.norms
        if self.cosines is not None:
            found |= {f"cosine_{name}": self.cosines[:, at] for at, name in enumerate(self.names)}
        return found

    def plot(self, path: str | Path | None = None, *, top: int = 10) -> Figure:
        """Draw the most helpful and most harmful samples, and how scores are distributed.

        Args:
            path: Where to write the picture, if anywhere: .png, .svg, .pdf.
            top: How many samples to name of each.

        Returns:
            A figure with a row for each column of scores.

        Raises:
            MissingExtraError: If matplotlib is not installed.
            OSError: If the file cannot be written.
        """
        figure = sample_figure(
            self.ids, self.scores, self.names, "score", signed=self.signed, top=top
        )
        return save(figure, path)
