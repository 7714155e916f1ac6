"""What each command can be told, and its help."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

DType = Literal["float64", "float32", "bfloat16", "float16", "as-is"]
Named = tyro.conf.arg
Count = Annotated[int | None, Named(metavar="INT")]


@dataclass(frozen=True, kw_only=True)
class Verify:
    """Compare ghost's per-sample gradients with one autograd call each, on a model of yours.

    Exits with 0 if all are exact; 1 if one is wrong, or ghost refuses the model; 2 if it could not
    be tried.

    Args:
        model: Folder of a checkpoint of transformers, or module:function that returns a module.
        data: File of texts (.txt, one a line; .jsonl) or of token ids [N, T] (.npy, .safetensors;
            negative ids are padding), or module:function that returns a batch.
        loss: module:function that takes model and batch and returns one loss per sample, [N]. By
            default each sample's mean cross-entropy of next tokens.
        samples: How many samples to compare.
        batch_size: How many samples to take from a file, from its start; 16 by default.
        max_tokens: Tokens to take of each sample in a file; 128 by default for texts.
        field: Key of the text in lines of JSON (.jsonl); text by default.
        dtype: What to cast model and batch to. Only float64 tells rounding from mistakes.
        layers: Globs over names of modules or parameters, separated by commas: what to track.
        exclude: Globs, separated by commas: what to leave out of it.
        tolerance: Error allowed, relative to norms; by default 1e-9 in float64.
        seed: Seed of the random number generators.
        train: Verify in training mode, with dropout.
        device: Where to compute: cpu, cuda, cuda:1, ...
    """

    model: Annotated[tyro.conf.Positional[str], Named(metavar="MODEL")]
    data: Annotated[str, Named(metavar="DATA")]
    loss: Annotated[str | None, Named(metavar="LOSS")] = None
    samples: int = 8
    batch_size: Count = None
    max_tokens: Count = None
    field: Annotated[str | None, Named(metavar="KEY")] = None
    dtype: DType = "float64"
    layers: Annotated[str, Named(metavar="GLOBS")] = "*"
    exclude: Annotated[str, Named(metavar="GLOBS")] = ""
    tolerance: Annotated[float | None, Named(metavar="FLOAT")] = None
    seed: int = 0
    train: bool = False
    device: str = "cpu"


@dataclass(frozen=True, kw_only=True)
class Score:
    """Score every sample of a data set against targets: which would help, and which would hurt?

    A score is the dot product of the gradient of the sample's own loss with that of the target's
    mean loss. Positive means that a small step on the sample lowers the target's loss. Prints the
    samples with the highest and lowest scores, and writes all of them with --out.

    Exits with 0; 1 if ghost refuses the model; 2 if it could not be tried.

    Args:
        model: Folder of a checkpoint of transformers, or module:function that returns a module.
        data: File of texts (.txt, one a line; .jsonl) or of token ids [N, T] (.npy, .safetensors;
            negative ids are padding), or module:function that returns a data set, a loader, a list
            of batches, or one batch.
        targets: Data to score against, as NAME=DATA, one or several; DATA as for --data.
        engine: Name of the engine to score with, of ghost or of a plugin: see `ghost plugins`.
        loss: module:function that takes model and batch and returns one loss per sample, [N]. By
            default each sample's mean cross-entropy of next tokens.
        out: File to write all scores to: .csv, .jsonl or .parquet.
        plot: File to draw a picture into: .png, .svg or .pdf.
        top: How many of the highest and lowest scores to print.
        no_norms: Leave norms and cosines out.
        ids: Key of a batch that its samples' ids are under; by default they are numbered from 0.
        batch_size: Samples in a batch.
        max_tokens: Tokens to take of each sample in a file; 128 by default for texts.
        field: Key of the text in lines of JSON (.jsonl); text by default.
        dtype: What to cast model and batches to; by default nothing is cast.
        layers: Globs over names of modules or parameters, separated by commas: what to track.
        exclude: Globs, separated by commas: what to leave out of it.
        seed: Seed of the random number generators, for a function that makes the model.
        device: Where to compute: cpu, cuda, cuda:1, ...
    """

    model: Annotated[tyro.conf.Positional[str], Named(metavar="MODEL")]
    data: Annotated[str, Named(metavar="DATA")]
    targets: Annotated[tuple[str, ...], Named(metavar="NAME=DATA ...")] = ()
    engine: Annotated[str, Named(metavar="NAME")] = "dot_product"
    loss: Annotated[str | None, Named(metavar="LOSS")] = None
    out: Annotated[Path | None, Named(metavar="FILE")] = None
    plot: Annotated[Path | None, Named(metavar="FILE")] = None
    top: int = 10
    no_norms: bool = False
    ids: Annotated[str | None, Named(metavar="KEY")] = None
    batch_size: int = 16
    max_tokens: Count = None
    field: Annotated[str | None, Named(metavar="KEY")] = None
    dtype: DType = "as-is"
    layers: Annotated[str, Named(metavar="GLOBS")] = "*"
    exclude: Annotated[str, Named(metavar="GLOBS")] = ""
    seed: int = 0
    device: str = "cpu"


@dataclass(frozen=True)
class Plugins:
    """List the installed plugins, what they offer, and whether they work.

    Into a pipe, each offer is one line with fields separated by tabs, below a line of titles. At a
    terminal, each plugin is one line, and many offers of one kind are counted.
    """


@dataclass(frozen=True)
class Values:
    """Add up a score log: the most helpful and the most harmful samples of a training run.

    Exits with 0; 1 if --verify finds damage; 2 if there is no log, or a file cannot be written.

    Args:
        path: Folder of the log.
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
class Store:
    """Describe a store of gradients.

    Args:
        path: Folder of the store.
        verify: Compare all that is on disk with its hashes; exit with status 1 if it is damaged.
    """

    path: tyro.conf.Positional[Path]
    verify: bool = False
