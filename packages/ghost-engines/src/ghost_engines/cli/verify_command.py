"""The command `ghost verify`."""

from __future__ import annotations

import random
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from tqdm import tqdm

from ghost_core import UnsupportedLayerError, WrongSplitError
from ghost_core.compare import Comparison, compare
from ghost_core.plugins import select
from ghost_engines.cli.batches import load_batch
from ghost_engines.cli.errors import CommandError
from ghost_engines.cli.functions import find_function, importable_from_here, reporting
from ghost_engines.cli.losses import next_token_losses
from ghost_engines.cli.models import load_model
from ghost_engines.cli.tables import print_table, while_read

DType = Literal["float64", "float32", "bfloat16", "float16", "as-is"]
Named = tyro.conf.arg
Count = Annotated[int | None, Named(metavar="INT")]

_SHOWN = 20  # rows of a table at a terminal


def verify(
    model: Annotated[str, Named(metavar="MODEL")],
    /,
    *,
    data: Annotated[str, Named(metavar="DATA")],
    loss: Annotated[str | None, Named(metavar="LOSS")] = None,
    samples: int = 8,
    batch_size: Count = None,
    max_tokens: Count = None,
    field: str = "text",
    dtype: DType = "float64",
    layers: Annotated[str, Named(metavar="GLOBS")] = "*",
    exclude: Annotated[str, Named(metavar="GLOBS")] = "",
    tolerance: Annotated[float | None, Named(metavar="FLOAT")] = None,
    seed: int = 0,
    train: bool = False,
    device: str = "cpu",
) -> int:
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
        field: Key of the text in lines of JSON.
        dtype: What to cast model and batch to. Only float64 tells rounding from mistakes.
        layers: Globs over names of modules or parameters, separated by commas: what to track.
        exclude: Globs, separated by commas: what to leave out of it.
        tolerance: Error allowed, relative to norms; by default 1e-9 in float64.
        seed: Seed of the random number generators.
        train: Verify in training mode, with dropout.
        device: Where to compute: cpu, cuda, cuda:1, ...
    """
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    with importable_from_here():
        subject = _load(model, data, loss, dtype, device, batch_size, max_tokens, field)
        subject.model.train(train)
        mode = "training" if train else "evaluation"
        with while_read():
            print_table(("property", "value"), [*subject.described(), ("mode", mode)])
        try:
            with tqdm(total=samples, desc="samples", disable=None, delay=1.0, leave=False) as bar:
                found = compare(
                    subject.model,
                    subject.losses,
                    select(layers, exclude),
                    samples=samples,
                    tolerance=tolerance,
                    progress=bar.update,
                )
        except (UnsupportedLayerError, WrongSplitError) as error:
            with while_read():
                print(f"\nrefused: {error}")
            return 1
        except RuntimeError as error:  # of torch: out of memory, not twice differentiable
            raise CommandError(f"the comparison raised {type(error).__name__}: {error}") from error
    with while_read():
        _print_findings(subject.model, found)
    return 0 if found.ok else 1


@dataclass(frozen=True)
class _Subject:
    """What is verified.

    Attributes:
        names: What was given for model, data and loss.
        model: The model.
        batch: What the loss gets.
        loss: Returns one loss per sample.
    """

    names: tuple[str, str, str]
    model: nn.Module
    batch: Any
    loss: Callable[[nn.Module, Any], Any]

    def losses(self) -> Any:
        return self.loss(self.model, self.batch)

    def described(self) -> Iterable[tuple[str, str]]:
        model, data, loss = self.names
        parameters = list(self.model.parameters())
        yield "model", f"{model} ({type(self.model).__name__})"
        yield "parameters", str(sum(map(Tensor.numel, parameters)))
        yield "dtype", _listed(str(each.dtype).removeprefix("torch.") for each in parameters)
        yield "device", _listed(str(each.device) for each in parameters)
        yield "data", data
        if isinstance(self.batch, Mapping) and isinstance(self.batch.get("attention_mask"), Tensor):
            mask = self.batch["attention_mask"]
            padding = 100 * float((mask == 0).double().mean())
            yield "batch", f"{len(mask)} × {mask.shape[1]} tokens, {padding:.0f} % padding"
        yield "loss", loss


def _load(
    model: str,
    data: str,
    loss: str | None,
    dtype: DType,
    device: str,
    batch_size: int | None,
    max_tokens: int | None,
    field: str,
) -> _Subject:
    """Load model, batch and loss, the cheapest first."""
    default = "mean cross-entropy of each sample's next tokens"
    function = (
        reporting(next_token_losses, "the model") if loss is None else find_function(loss, "--loss")
    )
    loaded = load_model(model)
    batch = load_batch(
        data, model, loaded, field=field, batch_size=batch_size, max_tokens=max_tokens
    )
    wanted = None if dtype == "as-is" else getattr(torch, dtype)
    try:
        loaded.to(device=device, dtype=wanted)
        batch = tree_map(lambda leaf: _moved(leaf, device, wanted), batch)
    except (RuntimeError, AssertionError) as error:  # torch was built without the device
        raise CommandError(f"--device {device}: {error}") from error
    return _Subject((model, data, loss or default), loaded, batch, function)


def _moved(leaf: Any, device: str, dtype: torch.dtype | None) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    return leaf.to(device=device, dtype=dtype if leaf.is_floating_point() else None)


def _print_findings(model: nn.Module, found: Comparison) -> None:
    trainable = [each for each in model.parameters() if each.requires_grad]
    frozen = sum(not each.requires_grad for each in model.parameters())
    numbers: dict[tuple[str, str], list[int]] = defaultdict(list)
    for check in found.parameters:
        numbers[check.module, check.sampler].append(prod(check.shape))
    print()
    print_table(
        ("class", "sampler", "parameters", "numbers"),
        ((*key, str(len(sizes)), str(sum(sizes))) for key, sizes in sorted(numbers.items())),
    )
    besides = f", besides {frozen} frozen" if frozen else ""
    rows = ", ".join(map(str, found.samples))
    print(f"\ntracked: {len(found.parameters)} of {len(trainable)} trainable parameters{besides}")
    print(f"compared: samples {rows} of {found.n}\n")
    titles, *checks = found.rows()
    shown = max(_SHOWN, len(found.wrong)) if sys.stdout.isatty() else len(checks)
    print_table(titles, checks[:shown])
    if len(checks) > shown:
        print(f"... and {len(checks) - shown} more, which are within their tolerances")
    print(f"\n{found.verdict}")
    if found.reason:
        print(found.reason)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(names)) or "-"
