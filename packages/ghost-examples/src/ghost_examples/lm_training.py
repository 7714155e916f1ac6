"""Trains a causal language model and says what each passage did for the validation losses.

On four domains of text that ship with this package, in less than a minute:

    python -m ghost_examples.lm_training

On a corpus of one's own, on four GPUs, GPT-2 small:

    python -m ghost_examples.tokenize web=web.jsonl code=code.parquet --output corpus
    torchrun --nproc-per-node 4 -m ghost_examples.lm_training --corpus corpus --preset small

The same command goes on with a run that was killed. Ends with values by domain and validation
domain, the passages that helped most and least, tables and plots in --results-dir.
"""

from __future__ import annotations

import logging

from ghost_examples.command_line import read_options, refusals
from ghost_examples.language_models import Options, run


def main(arguments: list[str] | None = None) -> None:
    """Run from the command line; exits with 2 where options or data do not fit."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    with refusals():
        run(read_options(Options, arguments, name="lm_training", description=__doc__))


if __name__ == "__main__":
    main()
