"""Lets several processes go through one backward pass together, parameter by parameter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from zlib import crc32

import torch
from torch import Tensor, distributed

from ghost_core import CaptureError, TrackedParameter
from ghost_core._torch import after_backward, own_group
from ghost_core.algebra import accumulation_dtype
from ghost_core.ranks import Ranks
from ghost_core.restoring import graphs_kept

# What a process says, in rising order: the number of the parameter that it is at, or one of these.
_READY = (1 << 20) - 1  # it is about to begin one without words
_END = 1 << 20  # its backward pass is over
_DONE = _END + 1  # so is all that follows
_START = 1 << 33  # plus 32 bits that tell what it begins
_FAILED = 1 << 40


class Together:
    """Averages gradients over processes, while each runs a backward pass of its own.

    Processes need not come to the same parameters, nor in the same order, as where each uses a head
    of its own. So each says where it is before anything is averaged. Where all are at the same
    parameter, its gradient is averaged there and then; where not, it is left for the end.

    They speak in a group that nobody else does: the wrapper averages its buckets meanwhile, at
    moments that may differ between processes. At the end of its backward pass the wrapper waits for
    the buckets of all others. So no backward pass ends before all of them do, and one that has come
    to its end goes on listening.

    Where parameters are in parts, processes wait for those of others inside of a backward pass,
    whatever they use of them, and nobody may wait for a word meanwhile: all is left for the end.

    Args:
        ranks: The processes.
        parameters: The parameters whose gradients are averaged, the same in all processes.
    """

    def __init__(self, ranks: Ranks, parameters: tuple[TrackedParameter, ...]) -> None:
        self._ranks = ranks
        self._tracked = parameters
        self._places = {each.name: at for at, each in enumerate(parameters)}
        self._device = parameters[0].device
        self._known: BaseException | None = None

    @contextmanager
    def telling(self) -> Iterator[None]:
        """Tell the others if this process fails inside, which would wait for it otherwise."""
        try:
            yield
        except Exception as error:
            told = error is self._known
            self._known = None  # an error keeps what was captured
            if self._ranks.several and not told:
                self._said(_FAILED)
            raise

    def start(self, scale: float) -> None:
        """Begin a batch.

        Args:
            scale: What losses are multiplied with, the same in all processes.

        Raises:
            CaptureError: If it is not, or another process failed, or begins no batch.
        """
        if self._ranks.several and not self._say(_START + crc32(repr(scale).encode())):
            raise self._apart("they begin no batch at once, or have losses of different scales")

    def backward(self, loss: Tensor) -> None:
        """Backpropagate, to an end that all processes come to.

        Raises:
            CaptureError: If another process failed.
        """
        if self._ranks.sharded is not None:
            self._unheard(loss)
            return
        if self._ranks.several:
            # The first that runs, and so before the wrapper has asked for a call at the end.
            loss.register_hook(lambda _: after_backward(self._listen))
        loss.backward()

    def _unheard(self, loss: Tensor) -> None:
        """Backpropagate where nobody speaks: who failed would wait for those who wait for it."""
        if self._ranks.several:
            self._say(_READY)
        try:
            loss.backward()
        except Exception as error:
            self._known = error
            raise

    def averages(self, name: str, gradient: Tensor) -> bool:
        """Average a gradient, in its memory, if all processes are known to be at its parameter.

            process 0 is at weight 3, 1 at weight 3   both average it
            process 0 is at weight 4, 1 at weight 6   neither does: both leave theirs for the end
            process 0 has failed                      process 1 raises

        Returns:
            Whether it is averaged. It is to be left for the end if not.

        Raises:
            CaptureError: If another process failed.
        """
        if not self._ranks.several:
            return True
        if self._ranks.sharded is not None or not self._say(self._places[name]):
            return False
        self._average(gradient)
        return True

    def rest(self, left: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the means of what was left for the end, in any of the processes.

        Args:
            left: What this process has left, `[1, *shape]` by parameter name.
        """
        if not self._ranks.several:
            return dict(left)
        anywhere = torch.tensor([int(each.name in left) for each in self._tracked])
        self._reduce(anywhere, distributed.ReduceOp.MAX)
        found = {}
        for at in anywhere.nonzero().flatten().tolist():
            each = self._tracked[at]
            nothing = _nothing(each)
            found[each.name] = left[each.name].to(nothing.dtype) if each.name in left else nothing
            self._average(found[each.name])
        return found

    def done(self) -> None:
        """End the batch's backward pass, and what belongs to it.

        Raises:
            CaptureError: If another process failed meanwhile.
        """
        if self._ranks.several and not self._say(_DONE):
            raise self._apart("another one is at another place")

    def _listen(self) -> None:
        """Wait until all processes are at the end of their backward passes."""
        while not self._say(_END):
            pass

    def _say(self, word: int) -> bool:
        """Say a word, and tell whether it is what all say.

        Raises:
            CaptureError: If another process failed, or is in no backward pass where this one is.
        """
        most, least = self._said(word)
        if most == _FAILED:
            raise self._apart("another one failed, and says why itself")
        if word <= _END < most:
            raise self._apart("another one has left its backward pass, or is not in it yet")
        return most == least

    def _said(self, word: int) -> tuple[int, int]:
        """Return the highest and the lowest of all words that are said."""
        words = torch.tensor([word, -word])
        self._reduce(words, distributed.ReduceOp.MAX)
        most, least = words.tolist()
        return most, -least

    def _average(self, tensor: Tensor) -> None:
        with graphs_kept(False):
            self._reduce(tensor, distributed.ReduceOp.SUM)
            tensor /= self._ranks.count

    def _reduce(self, tensor: Tensor, how: distributed.ReduceOp.RedOpType) -> None:
        try:
            group = own_group(self._ranks.group, self._device, tensor.device)
            distributed.all_reduce(tensor, how, group=group)
        except Exception as error:  # nobody is there to be told
            self._known = error
            raise

    def _apart(self, reason: str) -> CaptureError:
        """Return the error that all processes raise."""
        error = CaptureError(
            f"the {self._ranks.count} processes do not go through this batch together",
            reason=f"{reason}; each adds the gradient of its validation samples to an average, and "
            "waits for the others'",
            remedy="call concatenate, batch and backward equally often in every process, and look "
            "at the errors of the others",
        )
        self._known = error
        return error


def _nothing(parameter: TrackedParameter) -> Tensor:
    dtype = accumulation_dtype(parameter.dtype)
    return torch.zeros(1, *parameter.shape, dtype=dtype, device=parameter.device)
