"""Ends of jobs in a folder, which belongs to one work."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from ghost_engines.files import make_root, read_regular, remove_temporaries, write_json
from ghost_engines.quality.errors import QualityError

_LONGEST = 1 << 28


@dataclass(frozen=True)
class Kept:
    """What jobs ended with, a file for each.

    Attributes:
        root: The folder.
        size: How many numbers a job ends with.
    """

    root: Path
    size: int

    @classmethod
    def opened(cls, root: Path, whose: Mapping[str, str], size: int) -> Self:
        """Make a folder, or go on in it if it is of the same work.

        Raises:
            QualityError: If it is of another one, or nobody knows of which.
            OSError: If it cannot be made.
        """
        make_root(root)
        remove_temporaries(root)
        path = root / "train.json"
        if path.exists():
            _check_same(path, whose)
        else:
            write_json(path, whose, root, indent=None)
        return cls(root, size)

    def read(self, name: str) -> np.ndarray | None:
        """Return what a job ended with, float64 `[size]`; None if it is not done.

        Raises:
            QualityError: If its file has something else.
            OSError: If it cannot be read.
        """
        path = self.root / f"{name}.json"
        if not path.exists():
            return None
        try:
            losses = np.array(json.loads(read_regular(path, _LONGEST))["losses"], dtype=np.float64)
        except (ValueError, KeyError, TypeError) as error:
            raise QualityError(f"{path} does not hold a training: remove it") from error
        if losses.shape != (self.size,):
            raise QualityError(
                f"{path} has {losses.size} losses, not {self.size}",
                reason="it is of other queries",
                remedy="choose another folder",
            )
        return losses

    def write(self, name: str, about: Mapping[str, Any], losses: np.ndarray) -> None:
        """Keep what a job ended with.

        Raises:
            OSError: If that fails.
        """
        content = {**about, "losses": losses.tolist()}
        write_json(self.root / f"{name}.json", content, self.root, indent=None)


def _check_same(path: Path, now: Mapping[str, str]) -> None:
    """Refuse a folder of another work."""
    try:
        found = dict(json.loads(read_regular(path, _LONGEST)))
        name = found["train"]
    except (ValueError, KeyError, TypeError) as error:
        raise QualityError(
            f"{path} does not say whose trainings are in its folder",
            reason="it is damaged, or of something else",
            remedy="choose another folder",
        ) from error
    if name != now["train"]:
        raise QualityError(
            f"{path.parent} has trainings by {name}, not by {now['train']}",
            reason="what others returned cannot be compared",
            remedy="choose another folder for each function",
        )
    other = [each for each in sorted(found.keys() | now.keys()) if found.get(each) != now.get(each)]
    if "pickle" in other:
        raise QualityError(
            f"{path.parent} has trainings by {name} with other arguments or attributes",
            reason="they are compared by their pickle, in which the order of sets and dictionaries "
            "counts, and what a training changed in them",
            remedy="choose another folder for each function; if it is the same one, have "
            "__getstate__ return only what tells it apart, in a fixed order",
        )
    if other:
        raise QualityError(
            f"{path.parent} has trainings by {name} with another {', another '.join(other)}",
            reason="what others ended with cannot be compared",
            remedy="choose another folder for each",
        )
