"""How a training run gets on: a line now and then, for a terminal or the log of a cluster."""

from __future__ import annotations

import time
from collections.abc import Callable

from torch import Tensor
from tqdm import tqdm

Say = Callable[[str], None]


class Pace:
    """Says loss, speed and the time that is left, at intervals.

    Args:
        first: Number of steps that were made before.
        last: Number of steps in all.
        tokens: Tokens of a step.
        every: Steps between lines.
        say: Is told of them.
    """

    def __init__(self, first: int, last: int, tokens: int, every: int, say: Say) -> None:
        self._first, self._last, self._tokens = first, last, tokens
        self._every, self._say = every, say
        self._began = time.perf_counter()

    def stepped(self, step: int, loss: Tensor) -> None:
        """Say something if it is time to; only then the loss is waited for."""
        if step % self._every and step != self._last:
            return
        found = loss.item()
        each = (time.perf_counter() - self._began) / (step - self._first)
        left = tqdm.format_interval(each * (self._last - step))
        speed = self._tokens / each
        self._say(f"step {step}/{self._last}  loss {found:.3f}  {speed:,.0f} tokens/s  {left} left")
