"""What `ghost store` does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ghost_engines.cli.tables import plain, print_table
from ghost_engines.store import DamagedStoreError, GradientStore


def describe(path: Path, *, verify: bool) -> int:
    """Print what a store holds, and return the exit status."""
    try:
        opened = GradientStore.open(path)
        if verify:
            opened.verify()
    except DamagedStoreError as error:
        if not verify:
            raise
        for problem in str(error).splitlines():
            print(plain(f"damaged: {problem}"))
        return 1
    print_table(("property", "value"), _described(opened))
    layers = opened.manifest.engine.get("layers")
    if isinstance(layers, list) and layers and all(isinstance(layer, dict) for layer in layers):
        titles = list(dict.fromkeys(title for layer in layers for title in layer))
        print()
        print_table(titles, ([_cell(layer.get(key)) for key in titles] for layer in layers))
    if verify:
        print("\nverified: every shard fits its hash")
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
        *((key, _cell(value)) for key, value in engine.items() if key != "dtype"),
        *((f"info: {key}", _cell(value)) for key, value in manifest.info.items()),
        *((f"note: {key}", _cell(value)) for key, value in manifest.notes.items()),
        *((f"made with {name}", number) for name, number in manifest.versions.items()),
        ("fingerprint", manifest.fingerprint),
    ]


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
