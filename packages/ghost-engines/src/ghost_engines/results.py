"""What the results of all engines have in common."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, repr=False)
class Result:
    """What an engine found out about a batch.

    Whatever the engine, its result has `ids` and `verified`, `total` for whole gradients, and
    `by_parameter` and `by_layer` for their parts. A layer is all parameters that one module owns; a
    parameter shared by modules counts for the first of them.

    Attributes:
        ids: Sample ids, int64 `[N]`.
        verified: Whether the split by sample was verified on this model.
    """

    ids: Tensor
    verified: bool

    def __repr__(self) -> str:
        """Say what it is and how large."""
        verified = "verified" if self.verified else "not verified"
        return f"{type(self).__name__}({', '.join([*self._facts(), verified])})"

    def _facts(self) -> list[str]:
        """Return what `repr` says."""
        return [f"N={len(self.ids)}"]


@dataclass(frozen=True, kw_only=True, repr=False)
class SummedResult(Result):
    """A result whose numbers are sums over parameters.

    Attributes:
        by_parameter: The numbers by parameter name, with the samples as their first axis.
    """

    by_parameter: Mapping[str, Tensor]

    @property
    def total(self) -> Tensor:
        """Those of whole gradients."""
        return summed(self.by_parameter)

    @property
    def by_layer(self) -> dict[str, Tensor]:
        """Those by layer: the sum over the parameters that one module owns.

        A parameter shared by modules counts for the first of them.
        """
        return by_layer(self.by_parameter)

    def _facts(self) -> list[str]:
        return [*super()._facts(), f"{len(self.by_parameter)} parameters"]


def summed(by_parameter: Mapping[str, Tensor]) -> Tensor:
    """Sum over parameters, without another copy of all of them."""
    first, *others = by_parameter.values()
    total = first.clone()
    for values in others:
        total = total + values
    return total


def by_layer(by_parameter: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sum over the parameters that one module owns.

    A parameter shared by modules counts for the first of them.
    """
    return {
        layer: summed({name: by_parameter[name] for name in names})
        for layer, names in layers(by_parameter).items()
    }


def layers(parameters: Iterable[str]) -> dict[str, list[str]]:
    """Return the names of parameters by the module that owns them."""
    found: dict[str, list[str]] = {}
    for name in parameters:
        found.setdefault(name.rpartition(".")[0], []).append(name)
    return found


def cosines(products: Tensor, squared: Tensor, others: Tensor) -> Tensor:
    """Return the cosines that inner products stand for; NaN where a norm is zero or not finite.

    Args:
        products: Inner products, `[N, K]`.
        squared: Squared norms of the rows, `[N]`.
        others: Squared norms of the columns, `[K]`.
    """
    norms, other_norms = (_known(each.clamp(min=0).sqrt()) for each in (squared, others))
    cosine = products / norms[:, None] / other_norms
    return cosine.clamp(-1, 1)  # rounding may leave a little more


def _known(norms: Tensor) -> Tensor:
    return norms.where((norms > 0) & norms.isfinite(), torch.nan)
