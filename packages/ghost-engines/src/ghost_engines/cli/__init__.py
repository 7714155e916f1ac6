"""The command `ghost`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro

from ghost_core import GhostError
from ghost_core.plugins import installed
from ghost_engines.cli.tables import one_line, print_table, stop_printing
from ghost_engines.cli.verify_command import verify
from ghost_engines.store import DamagedStoreError, GradientStore
from ghost_engines.store.manifest import version

_app = tyro.extras.SubcommandApp()
_app.command(verify)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: What follows the command's name; by default what the shell gave.

    Returns:
        The exit status: 0; 1 if a check found damage, or gradients that are not exact; 2 if the
        command could not do its work.

    Raises:
        SystemExit: After `--help`, or if the arguments cannot be understood.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        if arguments == ["--version"]:
            print(f"ghost {version('ghost-engines')}")
            return 0
        status: int = _app.cli(
            prog="ghost",
            description="Per-sample gradients for PyTorch. `ghost --version` prints the version.",
            args=arguments,
            config=(tyro.conf.FlagCreatePairsOff,),
        )
        sys.stdout.flush()
    except BrokenPipeError:
        stop_printing()
        return 0
    except (GhostError, OSError) as error:
        print(f"ghost: {one_line(error)}", file=sys.stderr)
        return 2
    return status


@_app.command
def plugins() -> int:
    """List the installed plugins, what they offer, and whether they work.

    Into a pipe, each plugin is one line with fields separated by tabs, below a line of titles. At a
    terminal, many offers of one kind are counted instead.
    """
    shown = _counted if sys.stdout.isatty() else ", ".join
    print_table(
        ("plugin", "version", "offers", "status"),
        (
            (plugin.name, plugin.version, shown(plugin.offers) or "-", plugin.status)
            for plugin in installed().plugins
        ),
    )
    return 0


@_app.command
def store(path: Path, /, verify: bool = False) -> int:
    """Describe a store of gradients.

    Args:
        path: Folder of the store.
        verify: Compare all that is on disk with its hashes; exit with status 1 if it is damaged.
    """
    try:
        opened = GradientStore.open(path)
        if verify:
            opened.verify()
    except DamagedStoreError as error:
        if not verify:
            raise
        for problem in str(error).splitlines():
            print(f"damaged: {problem}")
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


def _counted(offers: Sequence[str]) -> str:
    by_kind: dict[str, list[str]] = {}
    for offer in offers:
        by_kind.setdefault(offer.split()[0], []).append(offer)
    return ", ".join(
        f"{len(alike)} {kind}s" if len(alike) > 3 else ", ".join(alike)
        for kind, alike in by_kind.items()
    )


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
