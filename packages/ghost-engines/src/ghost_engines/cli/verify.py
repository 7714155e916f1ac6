"""What `ghost verify` does."""

from __future__ import annotations

import logging
import random
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from tqdm import tqdm

from ghost_core import GhostError, UnsupportedLayerError, WrongSplitError
from ghost_core.compare import Comparison, compare
from ghost_core.plugins import select
from ghost_engines.cli.batches import load_batch
from ghost_engines.cli.errors import CommandError
from ghost_engines.cli.functions import find_function, raised, reporting
from ghost_engines.cli.losses import next_token_losses
from ghost_engines.cli.models import load_model
from ghost_engines.cli.options import Verify
from ghost_engines.cli.tables import print_table, while_read

logger = logging.getLogger(__name__)

_SHOWN = 20  # rows of a table at a terminal


def verify(options: Verify) -> int:
    """Compare, print what was found, and return the exit status."""
    if not 0 <= options.seed < 2**32:
        raise CommandError(f"--seed must be from 0 to 2**32 - 1, not {options.seed}")
    random.seed(options.seed)
    np.random.seed(options.seed)
    torch.manual_seed(options.seed)
    subject = _load(options)
    reporting(subject.model.train, "MODEL: its method train")(options.train)
    described = reporting(lambda: [*subject.described()], "MODEL: looking at it")()
    with while_read():
        print_table(("property", "value"), described)
    bar = tqdm(total=options.samples, desc="samples", disable=None, delay=1.0, leave=False)
    try:
        with bar:
            found = compare(
                subject.model,
                subject.losses,
                select(options.layers, options.exclude),
                samples=options.samples,
                tolerance=options.tolerance,
                progress=bar.update,
            )
    except (UnsupportedLayerError, WrongSplitError) as error:
        with while_read():
            print(f"\nrefused: {error}")
        return 1
    except GhostError:
        raise
    except Exception as error:  # of torch, such as out of memory, or of the model
        logger.debug("the comparison failed", exc_info=True)
        raise CommandError(raised("the comparison", error)) from error
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
            shape = " × ".join(map(str, mask.shape))
            yield "batch", f"{shape} tokens, {padding:.0f} % padding"
        yield "loss", loss
        yield "mode", "training" if self.model.training else "evaluation"


def _load(options: Verify) -> _Subject:
    """Load model, batch and loss, the cheapest first."""
    default = "mean cross-entropy of each sample's next tokens"
    if options.loss is None:
        function = reporting(next_token_losses, "the model")
    else:
        function = find_function(options.loss, "--loss")
    loaded = load_model(options.model)
    batch = load_batch(
        options.data,
        options.model,
        loaded,
        field=options.field,
        batch_size=options.batch_size,
        max_tokens=options.max_tokens,
    )
    wanted = None if options.dtype == "as-is" else getattr(torch, options.dtype)
    try:
        loaded.to(device=options.device, dtype=wanted)
        batch = tree_map(lambda leaf: _moved(leaf, options.device, wanted), batch)
    except Exception as error:  # torch was built without the device, and says so in many ways
        what = f"--device {options.device}: moving model and batch there"
        raise CommandError(raised(what, error)) from error
    names = options.model, options.data, options.loss or default
    return _Subject(names, loaded, batch, function)


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
