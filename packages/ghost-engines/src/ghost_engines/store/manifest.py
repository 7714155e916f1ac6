"""What a store's rows are: everything that changes a value of them, with its fingerprint."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, Self

import torch

from ghost_core import UnknownNameError
from ghost_core.arguments import whole
from ghost_engines.files import read_regular, write_json
from ghost_engines.store.beside import Column, declared
from ghost_engines.store.data_files import DataFile, as_entries
from ghost_engines.store.dtypes import STORAGE_DTYPES
from ghost_engines.store.errors import DamagedStoreError, MissingStoreError, StoreError
from ghost_engines.store.hashes import FAST
from ghost_engines.versions import version

SCHEMA = 2
"""Version of the format. The one before has no columns but the losses, and shards with sha256."""

MANIFEST = "manifest.json"
LIBRARIES = ("ghost-core", "ghost-layers", "ghost-engines", "torch", "numpy", "safetensors")
_SCHEMAS = (1, SCHEMA)
_SINCE_2 = ("columns", "data", "duplicates")

DUPLICATES = ("error", "replace")
"""What becomes of a sample that is stored already."""


_ABSENT = object()
_LONGEST = 1 << 28
_MOST = 1 << 48


class RowEngine(Protocol):
    """What a store needs to know of the engine that makes its rows."""

    @property
    def k_total(self) -> int:
        """Number of columns of a row."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the rows."""

    def manifest(self) -> dict[str, Any]:
        """Return, as JSON-able values, everything that changes a value of a row."""


@dataclass(frozen=True)
class Manifest:
    """What a store's rows are.

    Attributes:
        k_total: Number of columns of a row.
        dtype: Name of the rows' dtype.
        unit: Rows per shard.
        engine: The engine's own manifest.
        info: What else changes a value: digests of the model and the data, the loss.
        columns: What is stored beside the rows: `{"norm": {"dtype": "float32", "finite": True}}`.
        data: Where samples come from: `[{"path": ..., "digest": ...}]`; without the paths, part of
            the fingerprint.
        duplicates: Whether a sample that is stored already is an `error`, or its later row is to
            `replace` the earlier one for whoever reads the store.
        notes: Whatever is worth remembering; not part of the fingerprint.
        versions: Library versions at creation; not part of the fingerprint.
        schema: Version of the format.
    """

    k_total: int
    dtype: str
    unit: int
    engine: dict[str, Any]
    info: dict[str, Any]
    columns: dict[str, dict[str, Any]] = field(default_factory=dict)
    data: list[dict[str, Any]] = field(default_factory=list)
    duplicates: str = "error"
    notes: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    schema: int = SCHEMA

    @classmethod
    def of(
        cls,
        engine: RowEngine,
        *,
        unit: int,
        info: Mapping[str, Any] | None = None,
        notes: Mapping[str, Any] | None = None,
        columns: Mapping[str, str | Column] | None = None,
        data: Sequence[DataFile] | None = None,
        duplicates: str = "error",
        schema: int = SCHEMA,
    ) -> Self:
        """Describe the rows that an engine makes.

        Raises:
            UnknownNameError: If there is no such way to treat duplicates.
            StoreError: If what is given makes no rows, a number is not positive, the dtype cannot
                be stored, or a value has no JSON form.
        """
        _check_engine(engine)
        if duplicates not in DUPLICATES:
            raise UnknownNameError("way to treat duplicates", duplicates, DUPLICATES)
        dtype = str(engine.dtype).removeprefix("torch.")
        if dtype not in STORAGE_DTYPES:
            raise StoreError(
                f"rows of dtype {dtype} cannot be stored; choose {', '.join(STORAGE_DTYPES)}"
            )
        return cls(
            whole("the engine's k_total", engine.k_total, least=1, error=StoreError),
            dtype,
            whole("unit", unit, least=1, error=StoreError),
            plain("the engine's manifest", engine.manifest()),
            plain("info", {} if info is None else info),
            declared(columns),
            as_entries(data),
            duplicates,
            plain("notes", {} if notes is None else notes),
            {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
            schema,
        )

    def renewed(
        self,
        engine: RowEngine,
        *,
        columns: Mapping[str, str | Column] | None = None,
        info: Mapping[str, Any] | None = None,
        data: Sequence[DataFile] | None = None,
    ) -> Self:
        """Describe the rows that an engine would append, with what is not given as it is here.

        Raises:
            StoreError: As of `of`.
        """
        return self.of(
            engine,
            unit=self.unit,
            info=info,
            columns=self.declared if columns is None else columns,
            data=self.data_files if data is None else data,
            duplicates=self.duplicates,
            schema=self.schema,
        )

    @classmethod
    def read(cls, root: Path) -> Self:
        """Read the manifest of a store.

        Raises:
            StoreError: If there is no store, or a newer version of ghost wrote it.
            DamagedStoreError: If the file was altered.
        """
        path = root / MANIFEST
        try:
            content = json.loads(read_regular(path, _LONGEST))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise MissingStoreError(
                f"there is no store at {root}",
                remedy="make one with GradientStore.create(path, engine)",
            ) from error
        except (ValueError, RecursionError) as error:
            raise DamagedStoreError(f"{path} is not JSON: {error}") from error
        if isinstance(content, dict) and content.get("schema", SCHEMA) not in _SCHEMAS:
            raise StoreError(
                f"{path} has format version {content['schema']}, this version of ghost reads "
                f"{' and '.join(map(str, _SCHEMAS))}: use the one that wrote it "
                f"({content.get('versions')})"
            )
        try:
            fingerprint = content.pop("fingerprint")
            manifest = cls(**content)
            manifest._check_types()
            intact = manifest.fingerprint == fingerprint
        except (AttributeError, KeyError, TypeError, RecursionError) as error:
            raise DamagedStoreError(f"{path} is not a store's manifest: {error!r}") from error
        if not intact:
            raise DamagedStoreError(f"{path} was altered: its fingerprint does not fit")
        return manifest

    def write(self, root: Path) -> None:
        """Write it into the folder of a store.

        Raises:
            OSError: If that fails.
        """
        write_json(root / MANIFEST, {**asdict(self), "fingerprint": self.fingerprint}, root)

    @cached_property
    def fingerprint(self) -> str:
        """Sha256, in hexadecimal, of the canonical JSON of all that changes a value."""
        canonical = json.dumps(self.identity(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def identity(self) -> dict[str, Any]:
        """Return what the fingerprint is made of."""
        free = ("notes", "versions", *(_SINCE_2 if self.schema == 1 else ()))
        found = {
            entry.name: getattr(self, entry.name)
            for entry in fields(self)
            if entry.name not in free
        }
        if "data" in found:
            found["data"] = [file["digest"] for file in self.data]
        return found

    def differences(self, other: Manifest) -> list[str]:
        """Return a line for each entry in which another manifest's rows differ from these.

        What a row is as a whole comes first, then its layers one by one.
        """
        ours, theirs = self.identity(), other.identity()
        files: Iterator[str] = iter(())
        if len(self.data) == len(other.data):  # a digest alone would not say which file it is
            files = _changed(self.data_files, other.data_files)
            for each in (ours, theirs):
                each.pop("data", None)
        return sorted(
            [*files, *differences("", ours, theirs)],
            key=lambda line: (line.startswith("engine.layers"), line[:6] == "engine"),
        )

    def _check_types(self) -> None:
        """Check what was read from a file.

        Raises:
            TypeError: If an entry is none of its kind.
        """
        for name, kind in (("engine", dict), ("info", dict), ("notes", dict), ("versions", dict)):
            if not isinstance(getattr(self, name), kind):
                raise TypeError(f"{name} is {getattr(self, name)!r}")
        for name, again in (
            ("columns", lambda: declared(self.declared)),
            ("data", lambda: as_entries(self.data_files)),
        ):
            try:
                intact = again() == getattr(self, name)
            except (AttributeError, StoreError, TypeError):
                intact = False
            if not intact:
                raise TypeError(f"{name} is {getattr(self, name)!r}")
        if self.duplicates not in DUPLICATES:
            raise TypeError(f"duplicates is {self.duplicates!r}")
        if self.schema == 1 and (self.columns or self.data or self.duplicates != "error"):
            raise TypeError("a store of format version 1 has no columns")
        for name in ("k_total", "unit"):
            number = getattr(self, name)
            if type(number) is not int or not 1 <= number <= _MOST:
                raise TypeError(f"{name} is {number!r}")
        if not isinstance(self.dtype, str) or self.dtype not in STORAGE_DTYPES:
            raise TypeError(f"dtype is {self.dtype!r}")

    @property
    def torch_dtype(self) -> torch.dtype:
        """Dtype of the rows."""
        return STORAGE_DTYPES[self.dtype]

    @cached_property
    def declared(self) -> dict[str, Column]:
        """What is stored beside the rows, by name."""
        return {name: Column(**what) for name, what in self.columns.items()}

    @property
    def data_files(self) -> list[DataFile]:
        """Where the samples come from."""
        return [DataFile(**file) for file in self.data]

    @property
    def hash(self) -> str:
        """Name of the hash that shards have."""
        return "sha256" if self.schema == 1 else FAST


def _check_engine(engine: object) -> None:
    """Refuse what makes no rows."""
    remedy = "give the engine that makes the rows, such as ProjectionEngine(model, dim=256)"
    if isinstance(engine, type):
        raise StoreError(
            f"{engine.__name__} is a class, not an engine",
            reason="only an engine that was made for a model knows its rows",
            remedy=remedy,
        )
    missing = [name for name in ("k_total", "dtype", "manifest") if not hasattr(engine, name)]
    if missing:
        raise StoreError(
            f"a {type(engine).__name__} makes no rows to store",
            reason=f"it has no {', '.join(missing)}",
            remedy=remedy,
        )


def plain(name: str, value: Mapping[str, Any]) -> dict[str, Any]:
    """Return a mapping as it is read back from JSON.

    Args:
        name: What it is, for the error.
        value: The mapping.

    Raises:
        StoreError: If it is none, or a value has no JSON form.
    """
    if not isinstance(value, Mapping):
        raise StoreError(
            f"{name} must be a mapping, not {value!r}",
            reason="its entries are compared by name",
            remedy=f'give a name to each, as in {name}={{"run": "run1"}}',
        )
    try:
        plain = json.loads(json.dumps(dict(value), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise StoreError(f"{name} has a value without a JSON form: {error}") from error
    assert isinstance(plain, dict)
    return plain


def differences(name: str, ours: object, theirs: object) -> Iterator[str]:
    """Yield a line for each entry in which what is now differs from what is in the store.

    Args:
        name: Name of what is compared, with dots.
        ours: What is in the store, as read from JSON.
        theirs: What is now, in the same form.
    """
    match ours, theirs:
        case dict(), dict():
            for key in sorted({*ours, *theirs}):
                inner = f"{name}.{key}" if name else str(key)
                yield from differences(inner, ours.get(key, _ABSENT), theirs.get(key, _ABSENT))
        case list(), list() if len(ours) == len(theirs):
            for index, pair in enumerate(zip(ours, theirs, strict=True)):
                yield from differences(f"{name}[{index}]", *pair)
        case list(), list():
            yield f"{name}: {len(ours)} entries in the store, {len(theirs)} now"
        case _ if ours != theirs or type(ours) is not type(theirs):
            yield f"{name}: {_shown(ours)} in the store, {_shown(theirs)} now"


def _changed(ours: Sequence[DataFile], theirs: Sequence[DataFile]) -> Iterator[str]:
    """Yield a line for each file whose content is another one now; it may have moved."""
    for at, (here, there) in enumerate(zip(ours, theirs, strict=True)):
        if here.digest != there.digest:
            moved = "" if here.path == there.path else f"; it was {here.path}"
            yield f"data[{at}]: {there.path} has other content than in the store{moved}"


def _shown(value: object) -> str:
    return "absent" if value is _ABSENT else json.dumps(value)
