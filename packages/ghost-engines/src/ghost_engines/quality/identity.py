"""Tells functions that train a model apart, also those of one name with other arguments."""

from __future__ import annotations

import functools
import hashlib
import pickle
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from ghost_core.errors import told
from ghost_engines.quality.errors import QualityError


def identity(function: Callable[..., Any], what: str) -> dict[str, str]:
    """Return what a folder says of the function whose trainings it has: its name and a digest.

    The digest is of its pickle, which has the arguments of a `functools.partial`, and the
    attributes of an object. A function of a module is in it by name, whatever its code says.

    Args:
        function: The function.
        what: What it is, for the error.

    Raises:
        QualityError: If it cannot be pickled.
    """
    try:
        digest = digest_of(function)
    except Exception as error:
        raise QualityError(
            f"{what} cannot be told from other functions: {told(error)}",
            reason="a folder belongs to one function, which is known by its pickle",
            remedy="write it as a function of a module, or as a class with __call__, not as a "
            "lambda or inside a function; or leave folder out",
        ) from error
    return {"train": _called(function), "pickle": digest}


def digest_of(value: object) -> str:
    """Return the sha256 of a value's pickle, in which tensors stand by their contents.

    Raises:
        Exception: Whatever it raises if it cannot be pickled.
    """
    written = _Digest()
    _Pickler(written, protocol=5).dump(value)
    return written.sha256.hexdigest()


def pickled(value: object, what: str) -> bytes:
    """Return what can be sent to another process.

    Args:
        value: What to send.
        what: What of it the user gave, for the error.

    Raises:
        QualityError: If it cannot be pickled.
    """
    try:
        return pickle.dumps(value)
    except Exception as error:
        raise QualityError(
            f"{what} cannot be sent to other processes: {told(error)}",
            reason="it is pickled, by the name of its module",
            remedy="write it as a function of a module, or as a class with __call__, not inside a "
            "function or a notebook; or run with processes=1",
        ) from error


class _Digest:
    """A file whose contents are hashed as they are written."""

    def __init__(self) -> None:
        self.sha256 = hashlib.sha256()

    def write(self, data: Any) -> None:
        self.sha256.update(data)


class _Pickler(pickle.Pickler):
    """Pickles tensors by their contents: torch names their memory by its address.

    Functions go by name, as ever, but need not be found again: those of a notebook's cell or of a
    script that is executed are known as well. Lambdas and nested ones share theirs, and are not.
    """

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, FunctionType) and "<" not in value.__qualname__:
            return tuple, ((value.__module__, value.__qualname__),)
        if not isinstance(value, Tensor):
            return NotImplemented
        flat = value.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
        content = hashlib.sha256(flat.view(torch.uint8).numpy().data).hexdigest()
        return tuple, ((str(value.dtype), tuple(value.shape), content),)


def _called(train: Callable[..., Any]) -> str:
    while isinstance(train, functools.partial):
        train = train.func
    named: Any = train if hasattr(train, "__qualname__") else type(train)
    return f"{named.__module__}:{named.__qualname__}"
