"""What the commands can be told that read what is installed or on disk, and need no model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ghost_engines.cli.own import Configured, Count, Named, Own


@dataclass(frozen=True)
class Plugins(Own):
    """List the installed plugins, what they offer, and whether they work.

    Into a pipe, each offer is one line with fields separated by tabs, below a line of titles. At a
    terminal, each plugin is one line, and many offers of one kind are counted.
    """


@dataclass(frozen=True)
class Values(Own, Configured):
    """Add up a score log: the most helpful and the most harmful samples of a training run.

    Exits with 0; 1 if --verify finds damage; 2 if there is no log, or a file cannot be written.

    Args:
        path: Folder of the log, or with the logs of several processes in the folders inside.
        top: How many of the highest and lowest values to print.
        out: File to write the values of all samples to: .csv, .jsonl or .parquet.
        plot: File to draw a picture into: .png, .svg or .pdf.
        verify: Compare all that is on disk with its hashes first.
    """

    path: Annotated[tyro.conf.Positional[Path], Named(metavar="LOG")]
    top: int = 10
    out: Annotated[Path | None, Named(metavar="FILE")] = None
    plot: Annotated[Path | None, Named(metavar="FILE")] = None
    verify: bool = False


@dataclass(frozen=True)
class StoreInfo(Configured):
    """Describe a store: its rows, what is beside them, and how they were made.

    Exits with 0; 2 if there is no store that can be read.

    Args:
        path: Folder of the store.
    """

    path: Annotated[tyro.conf.Positional[Path], Named(metavar="STORE")]


@dataclass(frozen=True)
class StoreVerify(Configured):
    """Compare all that a store has on disk with its hashes.

    Exits with 0; 1 if it is damaged; 2 if there is no store, or it cannot be read.

    Args:
        path: Folder of the store.
    """

    path: Annotated[tyro.conf.Positional[Path], Named(metavar="STORE")]


@dataclass(frozen=True)
class StoreMerge(Configured):
    """Copy the rows of stores of one kind, or of the parts of one, into a store with one writer.

    The stores stay as they are. Goes on where it was if it was interrupted.

    Exits with 0; 2 if the rows are of several kinds, several stores have a sample, or a file cannot
    be read or written.

    Args:
        paths: Folders of the stores, in the order of their rows.
        into: Folder of the new store.
        unit: Rows per shard; by default as in the first store.
        replace: Let the later row count where several have a sample.
    """

    paths: Annotated[tyro.conf.Positional[tuple[Path, ...]], Named(metavar="STORE ...")]
    into: Annotated[Path, Named(metavar="FOLDER")]
    unit: Count = None
    replace: bool = False


@dataclass(frozen=True)
class StoreExport(Configured):
    """Write the rows, ids, losses and columns of a store for other programs.

    Exits with 0; 2 if there is something at the place already, or a file cannot be read or written.

    Args:
        path: Folder of the store.
        out: File to write: .parquet; or a folder to make, for .npy files.
    """

    path: Annotated[tyro.conf.Positional[Path], Named(metavar="STORE")]
    out: Annotated[Path, Named(metavar="FILE")]


@dataclass(frozen=True)
class Store(Own):
    """Describe, verify, merge or export stores of gradients."""

    what: Annotated[
        Annotated[StoreInfo, tyro.conf.subcommand("info", prefix_name=False)]
        | Annotated[StoreVerify, tyro.conf.subcommand("verify", prefix_name=False)]
        | Annotated[StoreMerge, tyro.conf.subcommand("merge", prefix_name=False)]
        | Annotated[StoreExport, tyro.conf.subcommand("export", prefix_name=False)],
        Named(name=""),
    ]


STORE = {"info": StoreInfo, "verify": StoreVerify, "merge": StoreMerge, "export": StoreExport}
"""What can be done with stores, by name."""
