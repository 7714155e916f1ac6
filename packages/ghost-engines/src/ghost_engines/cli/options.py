"""Ghost's own commands: what each can be told, and its help; first those that run a model.

Nothing here imports torch, which takes seconds: what a command does is imported when it runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ghost_engines.cli.folder_options import Plugins, Store, Values
from ghost_engines.cli.own import Configured, Count, DType, Named, Own
from ghost_engines.cli.reading import DataOptions, Reading


@dataclass(frozen=True, kw_only=True)
class Verify(Own, Configured, DataOptions):
    """Compare ghost's per-sample gradients with one autograd call each, on a model of yours.

    Exits with 0 if all are exact; 1 if one is wrong, or ghost refuses the model; 2 if it could not
    be tried.

    Args:
        model: Folder of a checkpoint of transformers, or module:function that returns a module.
        data: File of texts (.txt, one a line; .jsonl; .parquet), of token ids [N, T] (.npy,
            .safetensors; negative ids are padding), folder of a data set of Hugging Face or of
            token memmaps (SPLIT-DOMAIN.bin), or module:function that returns a batch.
        loss: mean or sum over the next tokens of a sample, or module:function that takes model and
            batch and returns one loss per sample, [N]. The mean by default.
        samples: How many samples to compare.
        batch_size: How many samples to take from a file, from its start; 16 by default.
        truncate: Tokens to take of each sample in a file; by default 128 of a text, and not more
            than the model takes, unless --block or --domains is given. The output says how many
            texts are cut.
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
    dtype: DType = "float64"
    layers: Annotated[str, Named(metavar="GLOBS")] = "*"
    exclude: Annotated[str, Named(metavar="GLOBS")] = ""
    tolerance: Annotated[float | None, Named(metavar="FLOAT")] = None
    seed: int = 0
    train: bool = False
    device: str = "cpu"


@dataclass(frozen=True, kw_only=True)
class Coverage(Own, Configured):
    """List which sampler handles which module of a model; no data are needed.

    Exits with 0; 1 if a module has no sampler; 2 if it could not be tried.

    Args:
        model: Folder of a checkpoint of transformers, or module:function that returns a module.
        layers: Globs over names of modules or parameters, separated by commas: what to track.
        exclude: Globs, separated by commas: what to leave out of it.
        seed: Seed of the random number generators.
    """

    model: Annotated[tyro.conf.Positional[str], Named(metavar="MODEL")]
    layers: Annotated[str, Named(metavar="GLOBS")] = "*"
    exclude: Annotated[str, Named(metavar="GLOBS")] = ""
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Score(Own, Configured, DataOptions):
    """Score every sample of a data set against targets: which would help, and which would hurt?

    A score is the dot product of the gradient of the sample's own loss with that of the target's
    mean loss. Positive means that a small step on the sample lowers the target's loss. Prints the
    samples with the highest and lowest scores, and writes all of them with --out.

    Exits with 0; 1 if ghost refuses the model; 2 if it could not be tried; 130 if interrupted.

    Args:
        model: Folder of a checkpoint of transformers, or module:function that returns a module.
        data: File of texts (.txt, one a line; .jsonl; .parquet), of token ids [N, T] (.npy,
            .safetensors; negative ids are padding), folder of a data set of Hugging Face or of
            token memmaps (SPLIT-DOMAIN.bin), or module:function that returns a data set, a loader,
            a list of batches, or one batch.
        targets: Data to score against, as NAME=DATA, one or several; DATA as for --data, and read
            in the same way.
        engine: Name of the engine to score with, of ghost or of a plugin: see `ghost plugins`.
        loss: mean or sum over the next tokens of a sample, or module:function that takes model and
            batch and returns one loss per sample, [N]. The mean by default.
        out: File to write all scores to: .csv, .jsonl or .parquet.
        plot: File to draw a picture into: .png, .svg or .pdf.
        top: How many of the highest and lowest scores to print.
        no_norms: Leave norms and cosines out.
        ids: Key of a batch that its samples' ids are under; by default they are numbered from 0.
        batch_size: Samples in a batch.
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
    dtype: DType = "as-is"
    layers: Annotated[str, Named(metavar="GLOBS")] = "*"
    exclude: Annotated[str, Named(metavar="GLOBS")] = ""
    seed: int = 0
    device: str = "cpu"


@dataclass(frozen=True, kw_only=True)
class Project(Own, Configured, DataOptions):
    """Project the gradient of every sample's own loss into a store, which can be searched then.

    Goes on where a store has some of the samples. Ctrl-C keeps what is computed.

    Exits with 0; 1 if ghost refuses the model; 2 if it could not be tried; 130 if interrupted.

    Args:
        model: Folder of a checkpoint of transformers, or module:function that returns a module.
        data: File of texts (.txt, one a line; .jsonl; .parquet), of token ids [N, T] (.npy,
            .safetensors; negative ids are padding), folder of a data set of Hugging Face or of
            token memmaps (SPLIT-DOMAIN.bin), or module:function that returns a data set.
        store: Folder of the store.
        loss: mean or sum over the next tokens of a sample, or module:function that takes model and
            batch and returns one loss per sample, [N].
        domains: Names of domains in the folder of the data, separated by commas: of token memmaps,
            or of files of texts (DOMAIN.jsonl, ...). They are told apart in the store.
        ids: Key of a batch that its samples' ids are under, for module:function; by default they
            are numbered from 0.
        dim: Dimensions per parameter, or whole; 256 if --total-dim is not given.
        total_dim: Dimensions of a whole row instead.
        min_dim: The least that an axis is projected to.
        dims: Dimensions of some parameters, as GLOB=DIM, GLOB=LEFTxRIGHT or GLOB=whole; 0 leaves
            them out.
        sketch: Globs, separated by commas: which parameters to sketch as a whole.
        init: Name of the projection, of ghost or of a plugin: see `ghost plugins`.
        storage: Dtype of the rows.
        unit_norm: Divide each row by its norm.
        batch_size: Samples of a batch at most; 16 if --tokens-per-batch is not given.
        tokens_per_batch: Tokens of a batch at most, padding included; samples of like length share
            a batch.
        unit: Rows per file of the store.
        dtype: What to cast model and batches to; by default nothing is cast.
        layers: Globs over names of modules or parameters, separated by commas: what to project.
        exclude: Globs, separated by commas: what to leave out of it.
        seed: Seed of the maps, and of the random number generators.
        device: Where to compute: cpu, cuda, cuda:1, ...
    """

    model: Annotated[tyro.conf.Positional[str], Named(metavar="MODEL")]
    data: Annotated[str, Named(metavar="DATA")]
    store: Annotated[Path, Named(metavar="FOLDER")]
    loss: Annotated[str, Named(metavar="LOSS")] = "mean"
    ids: Annotated[str | None, Named(metavar="KEY")] = None
    dim: Annotated[str | None, Named(metavar="DIM")] = None
    total_dim: Count = None
    min_dim: int = 8
    dims: Annotated[tuple[str, ...], Named(metavar="GLOB=DIM ...")] = ()
    sketch: Annotated[str, Named(metavar="GLOBS")] = ""
    init: Annotated[str, Named(metavar="NAME")] = "gaussian"
    storage: Literal["float64", "float32", "bfloat16", "float16"] = "float32"
    unit_norm: bool = False
    batch_size: Count = None
    tokens_per_batch: Count = None
    unit: int = 4096
    dtype: DType = "as-is"
    layers: Annotated[str, Named(metavar="GLOBS")] = "*"
    exclude: Annotated[str, Named(metavar="GLOBS")] = ""
    seed: int = 0
    device: str = "cpu"


@dataclass(frozen=True, kw_only=True)
class Query(Own, Configured, Reading):
    """Find the samples in a store that a model learns most alike from as from a text.

    Projects the gradient of the query's loss as the rows of the store were projected, and compares
    it with all of them. A positive score says that a small step on the sample lowers the query's
    loss. At a terminal prints tables; into a pipe, fields separated by tabs.

    Exits with 0; 2 if it could not be tried, as when the model is not the one that the store was
    made with.

    Args:
        store: Folder of the store.
        model: Folder of a checkpoint of transformers, or module:function that returns a module.
        text: Texts to ask for, one or several; with --file, the field of the text.
        prompt: Prompt to ask for, with its completion; with --file, the field of a prompt. Only the
            completion is part of the loss then.
        completion: Completion of the prompt; with --file, its field.
        messages: Conversation to ask for, as JSON, for the tokenizer's chat template:
            '[{"role": "user", "content": "..."}, ...]'; with --file, its field. Only the answers
            are part of the loss then.
        file: Data to ask for instead: a file of texts (.txt, one a line; .jsonl; .parquet), of
            token ids [N, T] (.npy, .safetensors; negative ids are padding), folder of a data set of
            Hugging Face or of token memmaps (SPLIT-DOMAIN.bin), or module:function that returns a
            batch.
        data: Data that the store was made of, to print what is found: the sample with id 0 is the
            first one. Read as the store says, else as texts. By default what the store names.
        data_text: Field of the text in --data, where the store does not say; text by default.
        k: How many samples to find for each query.
        by: dot, of gradients as they are; cosine; or whitened, where directions count less in which
            all gradients are long: their second moments are kept in the store's folder.
        damping: Of whitened: what to add to these moments, relative to their mean eigenvalue.
        parameters: Globs over names of modules or parameters, separated by commas: what to compare.
        smallest: Find the smallest scores instead of the largest.
        by_layer: Say what each layer adds to a score.
        html: File to write a page to, which needs nothing but a browser.
        json: Print JSON.
        loss: mean or sum over the next tokens of a query, or module:function that takes model and
            batch and returns one loss per sample, [N]. By default that of the store if it says so,
            else the mean.
        dtype: What to cast model and batch to; by default nothing is cast.
        seed: Seed of the random number generators, for a function that makes the model.
        device: Where to compute: cpu, cuda, cuda:1, ...
    """

    store: Annotated[tyro.conf.Positional[Path], Named(metavar="STORE")]
    model: Annotated[tyro.conf.Positional[str], Named(metavar="MODEL")]
    text: Annotated[tuple[str, ...], Named(metavar="TEXT ...")] = ()
    prompt: Annotated[str | None, Named(metavar="TEXT")] = None
    completion: Annotated[str | None, Named(metavar="TEXT")] = None
    messages: Annotated[str | None, Named(metavar="JSON")] = None
    file: Annotated[str | None, Named(metavar="DATA")] = None
    data: Annotated[str | None, Named(metavar="DATA")] = None
    data_text: Annotated[str | None, Named(metavar="FIELD")] = None
    k: Annotated[int, Named(aliases=("-k",))] = 10
    by: Literal["dot", "cosine", "whitened"] = "dot"
    damping: float = 0.1
    parameters: Annotated[str | None, Named(metavar="GLOBS")] = None
    smallest: bool = False
    by_layer: bool = False
    html: Annotated[Path | None, Named(metavar="FILE")] = None
    json: bool = False
    loss: Annotated[str | None, Named(metavar="LOSS")] = None
    dtype: DType = "as-is"
    seed: int = 0
    device: str = "cpu"


COMMANDS: Mapping[str, type[Own]] = {
    kind.__name__.lower(): kind
    for kind in (Verify, Coverage, Score, Project, Query, Plugins, Store, Values)
}
"""The commands by name."""
