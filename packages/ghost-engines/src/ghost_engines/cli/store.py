"""What `ghost store` does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ghost_engines.cli.folder_options import (
    Store,
    StoreExport,
    StoreInfo,
    StoreMerge,
    StoreVerify,
)
from ghost_engines.cli.given import given, is_config
from ghost_engines.cli.tables import plain, print_table
from ghost_engines.store import DamagedStoreError, GradientStore, export, merge


def run(options: Store) -> int:
    """Do what is asked of stores, and return the exit status."""
    match options.what:
        case StoreInfo(path):
            return _describe(path)
        case StoreVerify(path):
            return _verify(path)
        case StoreMerge(paths, into, unit, replace):
            duplicates = "replace" if replace else "error"
            merged = merge(paths, into, unit=unit, duplicates=duplicates)
            print(plain(f"{len(merged)} rows in {into}"))
        case StoreExport(path, out):
            opened = GradientStore.open(path)
            export(opened, out)
            print(plain(f"{len(opened)} rows in {out}"))
    return 0


def _verify(path: Path) -> int:
    try:
        GradientStore.open(path).verify()
    except DamagedStoreError as error:
        for problem in str(error).splitlines():
            print(plain(f"damaged: {problem}"))
        return 1
    print("verified: every shard fits its hash")
    return 0


def _describe(path: Path) -> int:
    opened = GradientStore.open(path)
    print_table(("property", "value"), _described(opened))
    layers = opened.manifest.engine.get("layers")
    if isinstance(layers, list) and layers and all(isinstance(layer, dict) for layer in layers):
        titles = list(dict.fromkeys(title for layer in layers for title in layer))
        print()
        print_table(titles, ([_cell(layer.get(key)) for key in titles] for layer in layers))
    return 0


def _described(opened: GradientStore) -> list[tuple[str, str]]:
    manifest = opened.manifest
    engine = {key: value for key, value in manifest.engine.items() if key != "layers"}
    return [
        ("path", str(opened.path)),
        ("rows", str(len(opened))),
        ("dimensions", str(manifest.k_total)),
        ("dtype", manifest.dtype),
        ("losses", "no" if opened.loss_dtype is None else _cell(str(opened.loss_dtype))),
        ("size on disk", f"{opened.size_on_disk} bytes"),
        ("rows per shard", str(manifest.unit)),
        ("writers", str(opened.writers)),
        ("duplicates", manifest.duplicates),
        *((f"column: {name}", column.dtype) for name, column in manifest.declared.items()),
        *((f"data: {file.path}", file.digest) for file in manifest.data_files),
        *((key, _cell(value)) for key, value in engine.items() if key != "dtype"),
        *((f"info: {key}", _cell(value)) for key, value in manifest.info.items()),
        *(
            (f"note: {key}", line)
            for key, value in manifest.notes.items()
            for line in _lines(value)
        ),
        *((f"made with {name}", number) for name, number in manifest.versions.items()),
        ("fingerprint", manifest.fingerprint),
    ]


def _lines(note: Any) -> list[str]:
    """Return a note in one line, or an option on each."""
    return [*given(note)] if is_config(note) else [_cell(note)]


def _cell(value: Any) -> str:
    match value:
        case None:
            return "-"
        case bool():
            return "yes" if value else "no"
        case list():
            return "×".join(map(str, value))
        case _:
            return str(value).removeprefix("torch.")
