"""Gradients of rows that are not samples one by one: folded, or owned in another number."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Size, Tensor

from ghost_core.algebra.gradients import PerSampleGradient, built_gram, built_paired
from ghost_core.algebra.numerics import chunks
from ghost_core.algebra.reduced import Reduced


@dataclass(frozen=True)
class Owned(PerSampleGradient):
    """The gradients of samples that own several rows each, or none.

    Attributes:
        rows: The gradients of R rows.
        owner: The sample of each row, int64 `[R]`.
        samples: Number of samples N.
    """

    rows: PerSampleGradient
    owner: Tensor
    samples: int
    shape: Size = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", self.rows.shape)

    @property
    def n(self) -> int:
        """Number of samples N."""
        return self.samples

    def token_dot(self, directions: Tensor) -> Tensor:
        """Return the dots, `[N, T, K]`: rows are further tokens where all samples own as many."""
        counts = torch.bincount(self.owner, minlength=self.samples)
        if not self.samples or (counts != counts[0]).any():
            return self.dot(directions).unsqueeze(1)
        dots = self.rows.token_dot(directions)[self.owner.argsort(stable=True)]
        tokens = int(counts[0]) * dots.shape[1]
        return dots.reshape(self.samples, tokens, dots.shape[2])

    def dot(self, directions: Tensor) -> Tensor:
        """Return `⟨g_n, v_k⟩`, `[N, K]`."""
        return self._by_sample(self.rows.dot(directions))

    def gram(self, other: PerSampleGradient) -> Tensor:
        """Return `⟨g_n, h_m⟩`, `[N, M]`."""
        return built_gram(self, other)

    def paired(self, other: PerSampleGradient) -> Tensor:
        """Return `⟨g_n, h_n⟩`, `[N]`."""
        return built_paired(self, other)

    def project(self, left: Tensor | None, right: Tensor | None) -> Tensor:
        """Return `L g_n Rᵀ`, `[N, k_left, k_right]`."""
        return self._by_sample(self.rows.project(left, right))

    def sum(self, weights: Tensor | None = None) -> Tensor:
        """Return the weighted gradient of the batch."""
        return self.rows.sum(None if weights is None else weights[self.owner])

    def reduce(
        self, directions: Tensor | None = None, *, norms: bool = False, total: bool = False
    ) -> Reduced:
        """Reduce rows, and add up dots by sample; norms of sums are no sums of norms."""
        found = self.rows.reduce(directions, total=total)
        return Reduced(
            found.total,
            None if found.dots is None else self._by_sample(found.dots),
            self.paired(self) if norms else None,
        )

    def materialize(self) -> Tensor:
        """Build the gradients, `[N, *shape]`."""
        total: Tensor | None = None
        for part in chunks(self.rows.n, self.shape.numel()):
            built = self.rows.narrow(part).materialize()
            if total is None:
                total = built.new_zeros(self.samples, *self.shape)
            total.index_add_(0, self.owner[part], built)
        assert total is not None
        return total

    def narrow(self, samples: slice | Tensor) -> Owned:
        """Return the gradients of some of the samples."""
        kept = torch.arange(self.samples, device=self.owner.device)[samples]
        # Rows by sample: a sample that is asked for twice has its rows twice.
        by_sample = self.owner.argsort(stable=True)
        counts = torch.bincount(self.owner, minlength=self.samples)
        first = counts.cumsum(0) - counts
        owner = torch.arange(len(kept), device=kept.device).repeat_interleave(counts[kept])
        before = counts[kept].cumsum(0) - counts[kept]
        within = torch.arange(len(owner), device=kept.device) - before[owner]
        index = by_sample[first[kept][owner] + within]
        return Owned(self.rows.narrow(index), owner, len(kept))

    def _by_sample(self, values: Tensor) -> Tensor:
        """Add what belongs to one sample: `[R, ...]` to `[N, ...]`."""
        return values.new_zeros(self.samples, *values.shape[1:]).index_add_(0, self.owner, values)
