"""Writes rows into a store in a thread of its own, so that the device need not wait for disks."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from ghost_core import CaptureError
from ghost_engines.projected import ProjectedRows
from ghost_engines.store import GradientStore

logger = logging.getLogger(__name__)

_WAITING = 2
"""Windows that wait to be written, at most."""

_COMMIT_AFTER = 60.0  # seconds


@dataclass(frozen=True)
class Part:
    """Some rows of a window, on any device.

    Attributes:
        positions: Where in the window they are, int64 `[n]`.
        rows: What the engine found.
        losses: `[n]`.
    """

    positions: Tensor
    rows: ProjectedRows
    losses: Tensor


@dataclass(frozen=True)
class Written:
    """A window to be written.

    Attributes:
        ids: Sample ids, int64 `[n]`.
        new: Which of them are to be stored, bool `[n]`.
        parts: All of its rows.
        columns: What else is stored of each sample, by name.
        norms: Whether norms are stored.
        losses: Whether losses are stored.
    """

    ids: Tensor
    new: Tensor
    parts: list[Part]
    columns: Mapping[str, Any]
    norms: bool
    losses: bool

    def append_to(self, store: GradientStore) -> None:
        """Put the rows in their order and append those that are new.

        Raises:
            CaptureError: If a loss is not finite.
            StoreError: If the store refuses them.
            OSError: If writing fails.
        """
        losses = self._ordered([part.losses for part in self.parts])
        if wrong := (~losses.isfinite()).nonzero().flatten().tolist():
            raise CaptureError(
                f"data: the loss of sample {int(self.ids[wrong[0]])} is {losses[wrong[0]].item()}",
                remedy="leave such samples out, or compute in a wider dtype",
            )
        rows = self._ordered([part.rows.rows for part in self.parts])
        columns = {name: _chosen(values, self.new) for name, values in self.columns.items()}
        if self.norms:
            norms = [part.rows.norms for part in self.parts if part.rows.norms is not None]
            columns["norm"] = self._ordered(norms)[self.new].float()
        first = self.parts[0].rows
        store.append(
            replace(first, ids=self.ids[self.new], rows=rows[self.new], norms=None),
            losses[self.new] if self.losses else None,
            columns=columns,
        )

    def _ordered(self, parts: list[Tensor]) -> Tensor:
        """Return values of samples in the order of the window, on the CPU."""
        found = torch.empty(len(self.ids), *parts[0].shape[1:], dtype=parts[0].dtype)
        for part, values in zip(self.parts, parts, strict=True):
            found[part.positions] = values.to("cpu")
        return found


def _chosen(values: Any, new: Tensor) -> Any:
    """Return the values of some samples: of a tensor or an array, or of a list of names."""
    if isinstance(values, Tensor):
        return values[new]
    if isinstance(values, np.ndarray):
        return values[new.numpy()]
    return [value for value, wanted in zip(values, new.tolist(), strict=True) if wanted]


class Writer:
    """Appends windows to a store in a thread of its own, in the order in which they come.

    A context manager. Leaving it writes all that waits, and commits; that holds after an interrupt
    too. A store that was made for it, and has no row when an error ends it, is withdrawn. An error
    of the thread is raised by the next call.

    Args:
        store: The store, open for writing; closed in the end.
    """

    def __init__(self, store: GradientStore) -> None:
        self.store = store
        self._queue: queue.Queue[Written | None] = queue.Queue(_WAITING)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="ghost writer", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def put(self, window: Written) -> None:
        """Hand over a window, once there is room for it.

        Raises:
            BaseException: What the thread raised.
        """
        self._raise()
        self._queue.put(window)

    def __exit__(self, kind: object, exception: BaseException | None, traceback: object) -> None:
        if isinstance(exception, KeyboardInterrupt):
            logger.warning("interrupted: the rows that are computed are being written")
        self._queue.put(None)
        self._thread.join()
        # What was interrupted is to go on: only an error leaves no store without rows.
        failed = isinstance(exception if self._error is None else self._error, Exception)
        try:
            if failed:
                self.store.withdraw()
            else:
                self.store.close()
        except BaseException as error:
            first = exception if self._error is None else self._error
            if first is None:
                raise
            first.add_note(f"rows could not be written to {self.store.path}: {error}")
        if exception is None:
            self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        committed = time.monotonic()
        while (window := self._queue.get()) is not None:
            if self._error is not None:
                continue  # so that nobody waits for room for ever
            try:
                window.append_to(self.store)
                if time.monotonic() - committed > _COMMIT_AFTER:
                    self.store.commit()
                    committed = time.monotonic()
            except BaseException as error:  # of the store, or of the device: raised by whoever asks
                self._error = error
