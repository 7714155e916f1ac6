"""From a command line to a finished run: processes, device, options, files."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed.nn  # its default arguments hold the group that there is by then
from torch import distributed

from ghost_engines import ValueTable
from ghost_engines.processes import process_rank
from ghost_examples.kept_options import check_options
from ghost_examples.language_models.data import Corpora, open_corpora
from ghost_examples.language_models.meaning import compare, report_meaning
from ghost_examples.language_models.metrics import Curves, read_curves
from ghost_examples.language_models.options import Options
from ghost_examples.language_models.report import report_losses, report_values
from ghost_examples.language_models.training import Plan, Trainer

RUN, WITHOUT = "run", "without-"
FREE = ("results_dir", "log_every", "save_every", "workers", "shown", "check_domains", "device")
"""Options that may differ where a run is gone on with."""


@contextmanager
def processes(device: str) -> Iterator[torch.device]:
    """Join the other processes if `torchrun` has started several; yield where to compute."""
    on_gpu = device.startswith("cuda") if device else torch.cuda.is_available()
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    place = torch.device(device or ("cuda" if on_gpu else "cpu"))
    if several and on_gpu and place.index is None:
        place = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(place)
    if several:
        distributed.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield place
    finally:
        if several:
            distributed.destroy_process_group()
            # Wrappers that refer to themselves still hold the group. Its threads let tensors go,
            # for which they need Python: they have to end before it does, or the process aborts.
            gc.collect()


def run(asked: Options) -> None:
    """Train, or go on, and write and print what came of it."""
    folder = asked.results_dir.absolute()
    with processes(asked.device) as device:
        check_options(
            asked,
            folder,
            free=FREE,
            flag="--results-dir",
            begun=(folder / RUN).exists(),
            writes=process_rank() == 0,
        )
        corpora = open_corpora(asked.corpus, asked.names, asked.length, folder)
        _say(f"{corpora.train}\n{corpora.val}")
        if corpora.tokenizer is None:  # which also fails here if it is gone, not after training
            _say("no tokenizer is known: passages are shown as token ids")
        values, curves = _train(asked, corpora, device, folder / RUN)
        if process_rank() == 0:
            _say("\n" + report_losses(curves, folder))
            if values is not None:
                _say("\n" + report_values(values, corpora, asked.shown, folder))
        if asked.check_domains and values is not None:
            without = {}
            for domain in corpora.train.domains:
                _say(f"\nTraining without {domain}")
                place = folder / f"{WITHOUT}{domain}"
                _, without[domain] = _train(asked, corpora, device, place, without=domain)
            if process_rank() == 0:
                by_domain = values.by_group(corpora.train.domain_of)
                _say("\n" + report_meaning(compare(by_domain, curves, without), folder))
        _say(f"\n{folder}")


def _train(
    asked: Options, corpora: Corpora, device: torch.device, folder: Path, without: str | None = None
) -> tuple[ValueTable | None, Curves]:
    method = asked.method if without is None else "none"
    trainer = Trainer(Plan(asked, corpora, folder, method, without), device)
    values = trainer.train(_say)
    return values, read_curves(trainer.folder)


def _say(text: str) -> None:
    """Print on the first process."""
    if process_rank() == 0:
        print(text, flush=True)
