"""Joins a training batch and a validation batch into one that a model can be called on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ghost_core import CaptureError, UnknownNameError

Padding = float | Mapping[str, float] | None
"""What shorter sequences are filled up with: one value, one by dotted name, or nothing."""


class Joiner:
    """Joins two batches of the same structure.

    Args:
        n: Number of training samples N.
        m: Number of validation samples M.
        pad: What shorter sequences are filled up with, at their ends.
        dim: Axis of the samples.
    """

    def __init__(self, n: int, m: int, pad: Padding, dim: int) -> None:
        self._n, self._m = n, m
        self._pad = pad
        self._dim = dim
        self._names: list[str] = []

    def join(self, train: Any, validation: Any) -> Any:
        """Return both as one batch.

        Raises:
            CaptureError: If they differ in structure, or lengths do and there is no value to pad
                with.
            UnknownNameError: If there is a value for a name that is not there.
        """
        joined = self._joined(train, validation, "")
        if isinstance(self._pad, Mapping):
            for name in self._pad:
                if name not in self._names:
                    raise UnknownNameError("input to pad", name, self._names)
        return joined

    def _joined(self, train: Any, validation: Any, name: str) -> Any:
        if isinstance(train, Tensor) and isinstance(validation, Tensor):
            return self._tensor(train, validation, name)
        if type(train) is not type(validation):
            kinds = f"{type(train).__name__} and {type(validation).__name__}"
            raise _differ(name, f"they are {kinds}")
        if isinstance(train, Mapping):
            return self._mapping(train, validation, name)
        if isinstance(train, list | tuple):
            if len(train) != len(validation):
                raise _differ(name, f"they have {len(train)} and {len(validation)} entries")
            pairs = enumerate(zip(train, validation, strict=True))
            entries = [self._joined(*pair, _dotted(name, at)) for at, pair in pairs]
            return type(train)(*entries) if hasattr(train, "_fields") else type(train)(entries)
        if train is not validation and train != validation:
            raise _differ(name, f"they are {train!r} and {validation!r}")
        return train

    def _mapping(self, train: Any, validation: Any, name: str) -> Any:
        if train.keys() != validation.keys():
            odd = sorted(map(str, train.keys() ^ validation.keys()))
            raise _differ(name, f"only one of them has {', '.join(odd)}")
        entries = {
            key: self._joined(train[key], validation[key], _dotted(name, key)) for key in train
        }
        # Outputs of transformers are dataclasses that are dictionaries.
        kind: Any = type(train)
        if is_dataclass(train):
            return kind(**entries)
        return kind(entries)

    def _tensor(self, train: Tensor, validation: Tensor, name: str) -> Tensor:
        """Join the tensors under a name.

        Of 4 training samples and 2 of validation:

            [4, 7] and [2, 5]       [6, 7], where the shorter ones are filled up
            [7] and [7], the same   [7], as positions are
            [7] and [5]             refused
        """
        self._names.append(name)
        sizes = [each.shape[self._dim : self._dim + 1] for each in (train, validation)]
        if sizes != [(self._n,), (self._m,)]:
            same = train is validation
            if same or (train.shape == validation.shape and torch.equal(train, validation)):
                return train
            raise _differ(
                name,
                f"their shapes are {tuple(train.shape)} and {tuple(validation.shape)}, and the "
                f"batches have {self._n} and {self._m} samples",
            )
        if train.dim() != validation.dim() or train.dtype != validation.dtype:
            raise _differ(
                name,
                f"they are {train.dtype} {tuple(train.shape)} and "
                f"{validation.dtype} {tuple(validation.shape)}",
            )
        return torch.cat(self._of_one_length(train, validation, name), self._dim)

    def _of_one_length(self, train: Tensor, validation: Tensor, name: str) -> list[Tensor]:
        shape = [max(pair) for pair in zip(train.shape, validation.shape, strict=True)]
        filled = []
        for each in (train, validation):
            missing = [size - has for size, has in zip(shape, each.shape, strict=True)]
            missing[self._dim] = 0
            if any(missing):
                ends = [side for more in reversed(missing) for side in (0, more)]
                each = functional.pad(each, ends, value=self._value(train, validation, name))
            filled.append(each)
        return filled

    def _value(self, train: Tensor, validation: Tensor, name: str) -> float:
        value = self._pad.get(name) if isinstance(self._pad, Mapping) else self._pad
        if value is None:
            raise CaptureError(
                f"the training and the validation batch differ in length{_at(name)}: "
                f"{tuple(train.shape)} and {tuple(validation.shape)}",
                remedy="say what to fill the shorter one up with, as in "
                f"engine.concatenate(train, validation, pad={{{name or 'name'!r}: 0}}), and mask "
                "it in the model and in the losses",
            )
        return value


def count_of(batch: Any, dim: int, which: str) -> int:
    """Return the number of samples of a batch: the size of its first tensor.

    Raises:
        CaptureError: If there is no tensor with an axis of samples.
    """
    for leaf in _leaves(batch):
        if leaf.dim() > dim:
            return leaf.shape[dim]
    raise CaptureError(f"the {which} batch has no tensor of samples")


def _leaves(batch: Any) -> list[Tensor]:
    if isinstance(batch, Tensor):
        return [batch]
    if isinstance(batch, Mapping):
        batch = list(batch.values())
    if isinstance(batch, list | tuple):
        return [leaf for each in batch for leaf in _leaves(each)]
    return []


def _dotted(name: str, key: object) -> str:
    return f"{name}.{key}" if name else str(key)


def _at(name: str) -> str:
    return f" at {name}" if name else ""


def _differ(name: str, how: str) -> CaptureError:
    return CaptureError(
        f"the training and the validation batch cannot be joined{_at(name)}: {how}",
        remedy="give both the same structure, with the samples on the same axis",
    )
