"""How far ghost's gradients are from those of autograd, and what follows from it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ghost_core.algebra import Precision
from ghost_core.compare.remainder import Remainder
from ghost_core.errors import CaptureError, WrongSplitError
from ghost_core.tracking import TrackedModule


@dataclass(frozen=True)
class ParameterCheck:
    """How far ghost's gradients of one parameter are from those of autograd.

    Attributes:
        parameter: Its name.
        module: Class of the module that owns it; several where modules share it.
        sampler: Class of its sampler; several where these differ.
        shape: Its shape.
        error: Largest `‖got − expected‖` of a sample, relative to `‖expected‖` or to the floor
            (see `Precision`), whichever is larger. Infinite where `got` is not finite.
        sample: Position of that sample in the batch.
        tolerance: Error allowed.
        norm: Largest `‖expected‖` of a sample.
        tested: Whether a gradient of zero would have been found wrong. It would not where the
            expected one is zero, or too small to be told from rounding, for all samples compared.
    """

    parameter: str
    module: str
    sampler: str
    shape: tuple[int, ...]
    error: float
    sample: int
    tolerance: float
    norm: float
    tested: bool

    @property
    def ok(self) -> bool:
        """Whether the error is within the tolerance."""
        return self.error <= self.tolerance

    @property
    def cells(self) -> tuple[str, ...]:
        """The check as text, under the titles of `Comparison.lines`."""
        return (
            self.parameter,
            self.module,
            self.sampler,
            "×".join(map(str, self.shape)) or "-",
            f"{self.error:.1e}",
            str(self.sample),
            f"{self.tolerance:.0e}",
            "WRONG" if not self.ok else "yes" if self.tested else "too small to tell",
        )


@dataclass(frozen=True, repr=False)
class Comparison:
    """What a comparison with autograd found.

    Attributes:
        n: Number of samples N in the batch.
        samples: Positions of the samples that were compared.
        parameters: One check per tracked parameter, worst first.
        verified: Whether the split by sample was verified too, as it is in every batch by default.
        reason: Why numbers are wrong, as far as that was found out; empty if none is.
        remedy: What to do about it; likewise.
    """

    n: int
    samples: tuple[int, ...]
    parameters: tuple[ParameterCheck, ...]
    verified: bool
    reason: str = ""
    remedy: str = ""

    def __repr__(self) -> str:
        """Say what was found."""
        verified = "verified" if self.verified else "not verified"
        return f"{type(self).__name__}({self.verdict}; {verified})"

    @property
    def wrong(self) -> tuple[ParameterCheck, ...]:
        """The parameters whose gradients are wrong, worst first."""
        return tuple(check for check in self.parameters if not check.ok)

    @property
    def ok(self) -> bool:
        """Whether all errors are within their tolerances."""
        return not self.wrong

    @property
    def verdict(self) -> str:
        """What was found, in one sentence."""
        worst, count = self.parameters[0], len(self.parameters)
        compared = f"the gradients of {len(self.samples)} of {self.n} samples"
        most = (
            f"{worst.error:.1e} of the norm, at {worst.parameter}, sample {worst.sample} "
            f"(tolerance {worst.tolerance:.0e})"
        )
        if not self.ok:
            return (
                f"wrong: {compared} differ from one autograd call each at {len(self.wrong)} of "
                f"{count} parameters, at most by {most}"
            )
        small = sum(not check.tested for check in self.parameters)
        besides = f" ({small} of them too small to tell)" if small else ""
        return (
            f"exact: {compared} agree with one autograd call each at all {count} parameters"
            f"{besides}; the largest error is {most}"
        )

    def lines(self) -> list[tuple[str, ...]]:
        """Return the checks as text, worst first, below a line of titles."""
        titles = ("parameter", "class", "sampler", "shape", "error", "sample", "tolerance", "ok")
        return [titles, *(check.cells for check in self.parameters)]

    def table(self) -> str:
        """Return the checks as an aligned table, worst first."""
        lines = self.lines()
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        )

    def raise_if_wrong(self) -> None:
        """Do nothing if all is well.

        Raises:
            WrongSplitError: With the verdict, the worst parameters and the reason, if it is not.
        """
        if self.ok:
            return
        listed = [
            f"  {check.parameter} ({check.module}, {check.sampler}): error {check.error:.1e}, "
            f"sample {check.sample}"
            for check in self.wrong
        ]
        more = [f"  and {len(listed) - 10} more"] if len(listed) > 10 else []
        what = "\n".join([self.verdict, *listed[:10], *more])
        raise WrongSplitError(what, reason=self.reason, remedy=self.remedy)


def check_parameters(
    remainders: Sequence[Remainder],
    modules: Iterable[TrackedModule],
    dtypes: Mapping[str, Iterable[torch.dtype]],
    tolerance: float | None = None,
) -> tuple[ParameterCheck, ...]:
    """Turn what is left of gradients into errors, worst first.

    Args:
        remainders: What is left for each group of samples.
        modules: The tracked modules.
        dtypes: Dtypes that were seen besides the parameter's own, by parameter.
        tolerance: Error allowed; by default that of `Precision.of` their dtypes.

    Raises:
        CaptureError: If all expected gradients are zero, and those found are.
    """
    owners: dict[str, list[TrackedModule]] = {}
    for tracked in modules:
        for parameter in tracked.parameters.values():
            owners.setdefault(parameter.name, []).append(tracked)
    samples = [sample for remainder in remainders for sample in remainder.samples]
    norms = {name: _joined(each.norms[name] for each in remainders) for name in owners}
    whole = torch.stack(list(norms.values())).square().sum(0).sqrt()
    checks = []
    for name, owned in owners.items():
        precision = _precision(owned, dtypes)
        allowed = precision.tolerance if tolerance is None else tolerance
        scale = torch.maximum(norms[name], precision.floor * whole)
        off = _joined(each.off(name) for each in remainders)
        errors = torch.where(off == 0, off, off / scale).nan_to_num(torch.inf, torch.inf)
        worst = int(errors.argmax())
        checks.append(
            ParameterCheck(
                parameter=name,
                module=_listed(type(tracked.module) for tracked in owned),
                sampler=_listed(type(tracked.sampler) for tracked in owned),
                shape=tuple(remainders[0].left[name].shape[1:]),
                error=float(errors[worst]),
                sample=samples[worst],
                tolerance=allowed,
                norm=float(norms[name].max()),
                tested=bool((norms[name] > allowed * scale).any()),
            )
        )
    if all(check.ok and not check.tested for check in checks):
        raise CaptureError(
            "the gradients of all samples compared are zero at the tracked parameters: there is "
            "nothing to compare"
        )
    return tuple(sorted(checks, key=lambda check: -check.error / check.tolerance))


def _precision(
    owners: Iterable[TrackedModule], dtypes: Mapping[str, Iterable[torch.dtype]]
) -> Precision:
    """Return what can be asked of a parameter, given the modules that own it."""
    parameters = [parameter for tracked in owners for parameter in tracked.parameters.values()]
    seen = {parameter.dtype for parameter in parameters}.union(
        *(dtypes.get(parameter.name, ()) for parameter in parameters)
    )
    return Precision.of(seen)


def _joined(values: Iterable[Tensor]) -> Tensor:
    return torch.cat([each.cpu() for each in values])


def _listed(kinds: Iterable[type]) -> str:
    return ", ".join(dict.fromkeys(kind.__name__ for kind in kinds))
