"""Adds up what arrives by token, and refuses what has no tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from ghost_core import CaptureError, Pass

_LISTED = 10
"""How many parameters an error lists by name."""


class TokenSum:
    """Adds up dots by token over the parameters and passes of a batch.

    Args:
        zeros: Dots of a batch without tokens, `[N, 0, K]`, which say dtype and device.
    """

    def __init__(self, zeros: Tensor) -> None:
        self._sum = zeros
        self._passes: list[tuple[Pass, dict[int, dict[str, None]]]] = []

    def add(self, pass_: Pass, parameter: str, dots: Tensor) -> None:
        """Add the dots `[N, T, K]` of one use of a parameter."""
        tokens = dots.shape[1]
        if not self._passes:
            self._sum = self._sum.new_zeros(len(self._sum), tokens, self._sum.shape[2])
        self._seen(pass_).setdefault(tokens, {})[parameter] = None
        if self._sum.shape[1] == tokens:  # else `total` raises
            self._sum[pass_.samples] += dots

    def total(self) -> Tensor:
        """Return the sums, `[N, T, K]`.

        Raises:
            CaptureError: If parameters or passes have different numbers of tokens.
        """
        for _, seen in self._passes:
            if len(seen) > 1:
                raise _different_tokens(seen)
        lengths = sorted({tokens for _, seen in self._passes for tokens in seen})
        if len(lengths) > 1:
            raise CaptureError(
                "gradients cannot be split by token: the passes of this batch had different "
                f"numbers of tokens, {', '.join(map(str, lengths))}",
                reason="position t of one need not be position t of another",
                remedy="pad them to one length, or open a batch for each pass",
            )
        return self._sum

    def _seen(self, pass_: Pass) -> dict[int, dict[str, None]]:
        """Return the parameters that a pass used, by their number of tokens."""
        for other, seen in self._passes:
            if other is pass_:
                return seen
        self._passes.append((pass_, {}))
        return self._passes[-1][1]


def _different_tokens(seen: Mapping[int, Mapping[str, None]]) -> CaptureError:
    """Say which parameters have another number of tokens than most have."""
    usual = max(seen, key=lambda tokens: (tokens > 1, len(seen[tokens]), tokens))
    others = {tokens: sorted(names) for tokens, names in sorted(seen.items()) if tokens != usual}
    counts = ", ".join(f"{_listed(names)}: {tokens}" for tokens, names in others.items())
    left_out = sorted({name for names in others.values() for name in names})
    return CaptureError(
        f"gradients cannot be split by token: most parameters have {usual} tokens, such as "
        f"{min(seen[usual])}, but not these: {counts}",
        reason="a parameter that was used once for a whole sample (1 token), in a layer that "
        "cannot tell tokens apart (1), or at other positions has no part at each token",
        remedy=f"leave them out with exclude={','.join(left_out)!r}, or make the engine without "
        "per_token=True",
    )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
