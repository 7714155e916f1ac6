"""Files of token ids as data sets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import Dataset

from ghost_core.errors import told
from ghost_engines.cli.errors import CommandError
from ghost_engines.files import check_waits_for_nobody

TOKENS = (".npy", ".safetensors")
"""Kinds of files that token ids are read from."""

_AT_ONCE = 1024
"""Rows that are checked together."""


def open_tokens(path: Path, option: str, truncate: int | None) -> TokenRows:
    """Open a file of token ids.

    Args:
        path: The file, .npy or .safetensors.
        option: The option that names it, for errors.
        truncate: Tokens to take of each row; all by default.

    Raises:
        CommandError: If there is none in it, or it holds something else.
        OSError: If it cannot be read.
    """
    what = f"{option}: {path}"
    check_waits_for_nobody(path)
    read = _from_numpy if path.suffix == ".npy" else _from_safetensors
    return TokenRows(what, *read(path, what), truncate)


@dataclass(frozen=True)
class TokenRows(Dataset[dict[str, Tensor]]):
    """Token ids `[N, T]` on disk; where there is no mask, negative ids are padding.

    Attributes:
        what: The option and the file, for errors.
        n: Number of rows.
        ids: Returns the ids of rows, int64 `[n, T]`.
        mask: Which are none of padding, `[N, T]`, if the file says so.
        truncate: Tokens to take of each row.
    """

    what: str
    n: int
    ids: Callable[[Sequence[int]], Tensor]
    mask: Tensor | None
    truncate: int | None

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return a row, without the padding at its end.

        Raises:
            CommandError: If it has no token to predict.
        """
        ids, mask = (each[0] for each in self._taken([index]))
        end = int(mask.nonzero().max()) + 1
        return {"input_ids": ids[:end], "attention_mask": mask[:end]}

    def check(self) -> None:
        """Refuse what taking a row would, before any work is done.

        Raises:
            CommandError: If a row has no token to predict.
        """
        for start in range(0, len(self), _AT_ONCE):
            self._taken(range(start, min(start + _AT_ONCE, len(self))))

    def _taken(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return ids and mask of rows, int64 `[n, T]`."""
        ids = self.ids(rows)[:, : self.truncate]
        if self.mask is None:
            mask = ids >= 0
        else:
            mask = self.mask[list(rows), : self.truncate]
            if not mask.isfinite().all():
                raise CommandError(f"{self.what}: 'attention_mask' is not finite")
            mask = mask != 0
        predicted = (mask[:, 1:] & mask[:, :-1]).any(1)
        if not predicted.all():
            row = rows[int(predicted.logical_not().nonzero()[0])]
            raise CommandError(
                f"{self.what}: row {row} has no token to predict",
                reason="no two tokens of it stand beside each other",
                remedy="leave it out of the data, or take more tokens",
            )
        return ids.clamp(min=0), mask.long()


_Found = tuple[int, Callable[[Sequence[int]], Tensor], Tensor | None]
"""Number of rows, what returns their ids, and their mask."""


def _from_numpy(path: Path, what: str) -> _Found:
    try:
        values = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError:
        raise
    except Exception as error:  # a broken header is found out in many ways
        raise CommandError(f"{what} is no array of numbers: {told(error)}") from error
    if not isinstance(values, np.ndarray):
        raise CommandError(f"{what} holds several arrays: give one, integers [N, T]")
    if values.dtype.kind not in "iu" or values.ndim != 2:
        raise CommandError(
            f"{what} must hold token ids, integers [N, T], not {values.dtype} of shape "
            f"{values.shape}"
        )
    _check_any(values.size, what)

    def ids(rows: Sequence[int]) -> Tensor:
        found = values[list(rows)]
        _check_size(int(found.max()), what)
        return torch.from_numpy(found.astype(np.int64))

    return len(values), ids, None


def _from_safetensors(path: Path, what: str) -> _Found:
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            key = "input_ids" if "input_ids" in names else names[0] if len(names) == 1 else None
            if key is None:
                raise CommandError(
                    f"{what} must hold 'input_ids' or just one tensor, not "
                    f"{', '.join(names) or 'none'}"
                )
            values: Tensor = file.get_tensor(key)
            mask = file.get_tensor("attention_mask") if "attention_mask" in names else None
    except SafetensorError as error:
        raise CommandError(f"{what} cannot be read: {error}") from error
    if values.dtype.is_floating_point or values.dtype == torch.bool or values.dim() != 2:
        kind = str(values.dtype).removeprefix("torch.")
        raise CommandError(
            f"{what}: {key!r} must be token ids, integers [N, T], not {kind} of shape "
            f"{tuple(values.shape)}"
        )
    if mask is not None and mask.shape != values.shape:
        raise CommandError(
            f"{what}: 'attention_mask' has shape {tuple(mask.shape)}, 'input_ids' "
            f"{tuple(values.shape)}"
        )
    _check_any(values.numel(), what)

    def ids(rows: Sequence[int]) -> Tensor:
        found = values[list(rows)]
        _check_size(int(found.cpu().numpy().max()), what)
        return found.long()

    return len(values), ids, mask


def _check_size(largest: int, what: str) -> None:
    if largest > torch.iinfo(torch.int64).max:
        raise CommandError(f"{what} has the id {largest}, which does not fit into int64")


def _check_any(count: int, what: str) -> None:
    if not count:
        raise CommandError(f"{what} has no token")
