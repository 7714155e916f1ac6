"""What a file of tokens holds: the JSON beside it, and the names of both."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final, Self

import numpy as np

from ghost_engines.corpus.errors import CorpusError
from ghost_engines.files import read_regular, write_json

VERSION: Final = 1
DTYPES: Final[Mapping[str, np.dtype[Any]]] = {
    "uint16": np.dtype("<u2"),
    "uint32": np.dtype("<u4"),
}
"""How token ids are stored: little-endian, whatever the machine."""

BLOCKS_PER_DOMAIN: Final = 10**9
"""Domain k of a corpus has the ids from k times this on; decimal, so that people can read them."""

_LONGEST = 1 << 20
_NAME = re.compile(r"(?P<split>\w+)-(?P<domain>\w[\w.-]*)", re.ASCII)


@dataclass(frozen=True)
class TokenFormat:
    """What a file of tokens holds.

    Attributes:
        dtype: How ids are stored: `uint16` or `uint32`, little-endian.
        vocabulary: Number of token ids; every stored one is smaller.
        length: Tokens of a block.
        tokens: Tokens of the file. What does not fill a block at the end is never read.
        first_id: Sample id of the first block; the others follow.
        tokenizer: Where the tokenizer is, for whoever wants to read the text; may be empty.
        sha256: Of the file's bytes, in hexadecimal.
        version: Version of this format.
    """

    dtype: str
    vocabulary: int
    length: int
    tokens: int
    first_id: int
    tokenizer: str
    sha256: str
    version: int = VERSION

    @property
    def blocks(self) -> int:
        """Number of whole blocks."""
        return self.tokens // self.length

    @property
    def bytes(self) -> int:
        """Size of the file of tokens."""
        return self.tokens * DTYPES[self.dtype].itemsize

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read the sidecar of a file of tokens.

        Args:
            path: The file of tokens, `{split}-{domain}.bin`.

        Raises:
            CorpusError: If it is not there, or is none.
        """
        sidecar = path.with_suffix(".json")
        try:
            content = json.loads(read_regular(sidecar, _LONGEST))
        except FileNotFoundError as error:
            raise missing(sidecar, path.parent) from error
        except (OSError, ValueError, RecursionError) as error:
            raise CorpusError(f"{sidecar} cannot be read: {error}") from error
        names = {entry.name for entry in fields(cls)}
        if not isinstance(content, dict) or content.keys() != names:
            has = sorted(content) if isinstance(content, dict) else type(content).__name__
            raise CorpusError(
                f"{sidecar} does not describe tokens",
                reason=f"it has {has}, and should have {sorted(names)}",
                remedy="make both files again with python -m ghost_examples.tokenize",
            )
        found = cls(**content)
        found._check(sidecar)
        return found

    def write(self, path: Path) -> None:
        """Write the sidecar of a file of tokens.

        Raises:
            OSError: If that fails.
        """
        write_json(path.with_suffix(".json"), asdict(self), path.parent)

    def _check(self, sidecar: Path) -> None:
        def demand(fits: bool, name: str, expected: str) -> None:
            if not fits:
                raise CorpusError(f"{sidecar}: {name} is {getattr(self, name)!r}, not {expected}")

        demand(self.version == VERSION, "version", f"{VERSION}, which this version of ghost reads")
        demand(isinstance(self.dtype, str) and self.dtype in DTYPES, "dtype", " or ".join(DTYPES))
        for name, least in (("vocabulary", 1), ("length", 1), ("tokens", 0), ("first_id", 0)):
            value: Any = getattr(self, name)
            demand(type(value) is int and value >= least, name, f"a number of at least {least}")
        most = largest(self.dtype) + 1
        demand(self.vocabulary <= most, "vocabulary", f"at most {most}, as {self.dtype} allows")
        for name in ("tokenizer", "sha256"):
            demand(isinstance(getattr(self, name), str), name, "a text")


def largest(dtype: str) -> int:
    """Return the largest id that can be stored."""
    return int(np.iinfo(DTYPES[dtype]).max)


def token_path(folder: str | Path, split: str, domain: str) -> Path:
    """Return where the tokens of a domain are: `{split}-{domain}.bin`.

    Raises:
        CorpusError: If a name cannot be part of that: a split has letters, digits and
            underscores, a domain dots and hyphens too.
    """
    name = f"{split}-{domain}"
    found = _NAME.fullmatch(name)
    if found is None or found["split"] != split:
        raise CorpusError(
            f"{split!r} and {domain!r} cannot be the names of a split and a domain",
            reason="a split has letters, digits and underscores, a domain dots and hyphens too, "
            "though not as the first",
        )
    return Path(folder) / f"{name}.bin"


def named(folder: Path) -> dict[tuple[str, str], Path]:
    """Return the files of tokens in a folder by split and domain, where one of a pair is there."""
    found = {}
    for path in sorted([*folder.glob("*.bin"), *folder.glob("*.json")]):
        if match := _NAME.fullmatch(path.stem):
            found[match["split"], match["domain"]] = path.with_suffix(".bin")
    return found


def domain_number(folder: str | Path, domain: str) -> int:
    """Return the number of a domain in a corpus: the one that it has, or the next that is free.

    Raises:
        CorpusError: If a sidecar cannot be read.
    """
    taken = {
        name: TokenFormat.read(path).first_id // BLOCKS_PER_DOMAIN
        for (_, name), path in named(Path(folder)).items()
        if path.with_suffix(".json").exists()  # what a writer left that was stopped has no number
    }
    return taken.get(domain, max(taken.values(), default=-1) + 1)


def missing(path: Path, folder: Path) -> CorpusError:
    """Return the error that says which file is missing, and what there is."""
    if not folder.is_dir():
        there = "there is no such folder"
    else:
        names = sorted(each.name for each in folder.iterdir() if each.suffix in (".bin", ".json"))
        shown = ", ".join(names[:20]) + (" ..." if len(names) > 20 else "")
        there = f"the folder has {shown}" if names else "the folder has no .bin and no .json file"
    return CorpusError(
        f"there is no {path}",
        reason=f"tokens of a domain are a pair of files, {{split}}-{{domain}}.bin and .json; "
        f"{there}",
        remedy="python -m ghost_examples.tokenize makes them; a .bin without its .json is what "
        "a writer left that was stopped, or comes from elsewhere: TokenWriter writes both",
    )
