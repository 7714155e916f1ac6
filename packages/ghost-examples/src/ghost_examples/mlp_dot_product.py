"""Dot products of every training sample's gradient with the validation gradient, step by step.

A positive number means that the sample's part of the step lowers the validation loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ghost_engines import DotProductEngine, Scores
from ghost_examples.command_line import read_options
from ghost_examples.mlp import Options, Step, build, load, loss_of, train


def run(options: Options) -> float:
    """Train and print the dots of each step; return the final validation loss."""
    model = build(options)
    digits, validation = load(options)
    engine = DotProductEngine(model)
    engine.add_direction("validation", lambda: loss_of(model, validation))

    @contextmanager
    def scored(step: Step) -> Iterator[None]:
        with engine.batch(step.ids) as batch:
            yield
        print(f"\nstep {step.number}")
        show(batch.result)

    with engine:
        train(model, digits, options, scored)
    with torch.no_grad():
        loss = loss_of(model, validation).item()
    print(f"\nvalidation loss after {options.steps} steps: {loss:.4f}")
    return loss


def show(scores: Scores) -> None:
    """Print the dots with the only direction: a column per sample, a row per parameter."""
    names = [*scores.by_parameter, "total", "sample"]
    width = max(map(len, names))
    print("  " + "sample".ljust(width), *(f"{sample:>9}" for sample in scores.ids.tolist()))
    for name, dots in scores.by_parameter.items():
        print("  " + name.ljust(width), _cells(dots))
    print("  " + "total".ljust(width), _cells(scores.total))


def _cells(dots: Tensor) -> str:
    return " ".join(f"{value:>+9.5f}" for value in dots[:, 0].tolist())


def main(arguments: list[str] | None = None) -> None:
    """Run from the command line."""
    run(read_options(Options, arguments, name="mlp_dot_product", description=__doc__))


if __name__ == "__main__":
    main()
