"""Columns beside the rows: numbers or names, one for each sample, declared when a store is made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ghost_engines.store.dtypes import STORAGE_DTYPES
from ghost_engines.store.errors import StoreError
from ghost_engines.store.given import check_tensor
from ghost_engines.store.labels import Labels, Names

LOSS = "loss"
"""The column that a store may also have without declaring it."""

CATEGORY = "category"
"""What a column of names is declared as."""

COLUMN_DTYPES: Mapping[str, torch.dtype] = {
    "int64": torch.int64,
    "int32": torch.int32,
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
"""Dtypes of columns of numbers, by name."""

_TAKEN = ("g", "ids", "__metadata__")
"""What a shard has anyway."""

_EXPORTED = ("id", "row", "rows")
"""What files that a store is exported to have anyway."""

_LISTED = ", ".join((*_TAKEN, *_EXPORTED))

ColumnValues = Tensor | np.ndarray[Any, Any] | Sequence[str] | Labels
"""A tensor or an array of numbers `[N]`, or N strings."""


@dataclass(frozen=True)
class Column:
    """What a column holds.

    Attributes:
        dtype: A name in `COLUMN_DTYPES`, or `category` for strings of which there are few.
        finite: Whether NaN and infinity are refused.
    """

    dtype: str
    finite: bool = True

    @property
    def torch_dtype(self) -> torch.dtype:
        """Dtype of its numbers; those of names are int32."""
        return COLUMN_DTYPES.get(self.dtype, torch.int32)

    @property
    def is_category(self) -> bool:
        """Whether it holds names."""
        return self.dtype == CATEGORY


def declared(columns: Mapping[str, str | Column] | None) -> dict[str, dict[str, Any]]:
    """Return columns as a manifest holds them.

    Raises:
        StoreError: If a name cannot be one, or a dtype does not exist.
    """
    if columns is not None and not isinstance(columns, Mapping):
        raise StoreError(f'columns must be a mapping like {{"norm": "float32"}}, not {columns!r}')
    found = {}
    for name, column in (columns or {}).items():
        column = column if isinstance(column, Column) else Column(column)
        if not isinstance(name, str) or not name.isidentifier() or name in _TAKEN:
            raise StoreError(
                f"{name!r} cannot be the name of a column",
                reason=f"a name has letters, digits and underscores, and is none of {_LISTED}",
                remedy='choose another, as in columns={"norm": "float32"}',
            )
        if name == LOSS and column.dtype not in STORAGE_DTYPES:
            raise StoreError(f"losses are one of {', '.join(STORAGE_DTYPES)}, not {column.dtype}")
        if column.dtype not in (*COLUMN_DTYPES, CATEGORY) or type(column.finite) is not bool:
            raise StoreError(
                f"column {name!r} cannot be declared as {column}",
                reason=f"there are {', '.join(COLUMN_DTYPES)}, and {CATEGORY!r} for strings",
                remedy='choose one of these, as in columns={"norm": "float32"}',
            )
        found[name] = {"dtype": column.dtype, "finite": column.finite}
    return dict(sorted(found.items()))


def check_new(columns: Iterable[str]) -> None:
    """Refuse, in a new store, names that exported files need for the rows and their ids.

    Stores that were made before may have such columns, and are read and gone on with.

    Raises:
        StoreError: If a column has one.
    """
    if wrong := sorted(set(columns) & set(_EXPORTED)):
        raise StoreError(
            f"{wrong[0]!r} cannot be the name of a column",
            reason=f"a file that the rows are exported to has {', '.join(_EXPORTED)} of its own",
            remedy='choose another, as in columns={"norm": "float32"}',
        )


def checked_columns(
    n: int,
    given: Mapping[str, ColumnValues],
    columns: Mapping[str, Column],
    names: Mapping[str, Names],
) -> dict[str, Tensor | Labels]:
    """Return the columns of a batch in the dtypes of the store.

    Args:
        n: Number of rows of the batch.
        given: Values by name.
        columns: What the store's columns are.
        names: The writer's table of names for each column of names, to which new ones are added.

    Raises:
        StoreError: If one is missing, unknown, or does not fit.
    """
    if missing := sorted(columns.keys() - given.keys()):
        raise StoreError(
            f"the batch has no column {', '.join(missing)}",
            reason="the store was made with it, and every row has every column",
            remedy=f'append(batch, columns={{"{missing[0]}": ...}})',
        )
    if unknown := sorted(map(str, given.keys() - columns.keys())):
        raise StoreError(
            f"the store has no column {', '.join(unknown)}; it has {', '.join(columns) or 'none'}",
            reason="columns are declared when a store is made",
            remedy=f'GradientStore.create(..., columns={{"{unknown[0]}": "float32"}})',
        )
    return {
        name: _labels(name, given[name], n, names[name])
        if column.is_category
        else _numbers(name, given[name], n, column)
        for name, column in columns.items()
    }


def _labels(name: str, values: ColumnValues, n: int, names: Names) -> Labels:
    strings: Any = values
    if isinstance(values, np.ndarray):
        strings = values.tolist()
    if isinstance(strings, str) or not isinstance(strings, Sequence) or len(strings) != n:
        raise StoreError(f"column {name} must have {n} strings, one for each row, not {values!r}")
    if isinstance(strings, Labels):
        _check_strings(name, strings.names)
        return Labels(strings.numbered(names), names)
    _check_strings(name, strings)
    return Labels(names.numbers(strings), names)


def _check_strings(name: str, strings: Sequence[Any]) -> None:
    """Refuse what is no text: other objects, and lone surrogates, which no file can hold."""
    for value in strings:
        if not isinstance(value, str):
            raise StoreError(f"column {name} must have strings, not {value!r}")
    try:
        "".join(strings).encode()
    except UnicodeEncodeError as error:
        raise StoreError(
            f"column {name} has {error.object[error.start : error.end]!r}, which is no text",
            reason=f"it cannot be written in UTF-8: {error.reason}",
            remedy='repair the string, as in text.encode(errors="replace").decode()',
        ) from error


def _numbers(name: str, values: ColumnValues, n: int, column: Column) -> Tensor:
    tensor = values
    if isinstance(values, np.ndarray) and values.dtype.name in COLUMN_DTYPES:
        tensor = torch.from_numpy(values if values.flags.writeable else values.copy())
    if not isinstance(tensor, Tensor):
        found = f"an array of {values.dtype}" if isinstance(values, np.ndarray) else repr(values)
        raise StoreError(f"column {name} must be a tensor or an array of numbers, not {found}")
    check_tensor(f"column {name}", tensor)
    if tensor.shape != (n,) or tensor.dtype != column.torch_dtype:
        raise StoreError(
            f"column {name} must be {column.dtype} [{n}], not {tensor.dtype} of shape "
            f"{list(tensor.shape)}: nothing is cast here"
        )
    if column.finite and not (finite := tensor.isfinite()).all():
        at = (~finite).nonzero().flatten().tolist()
        raise StoreError(
            f"column {name} is not finite in rows {at[:20]} of the batch; no row was stored",
            reason="the column is declared as one of finite numbers",
            remedy=f'declare it as "{name}": Column("{column.dtype}", finite=False)',
        )
    return tensor
