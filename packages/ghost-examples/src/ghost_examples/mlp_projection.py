"""Projected per-sample gradients of an MLP, and two checks of them.

The modes: `project` prints what a row is made of. `non_interference` trains twice, with and without
the engine, and fails unless all parameters are bit-identical. `naive_check` builds each sample's
gradient by autograd and multiplies it with the maps, and fails unless the rows agree.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ghost_engines import ProjectionEngine
from ghost_examples import mlp
from ghost_examples.command_line import read_options

Mode = Literal["project", "non_interference", "naive_check"]

TOLERANCE = 1e-9
"""Error that `naive_check` allows, in float64, relative to the norm of a row."""


@dataclass(frozen=True)
class Options(mlp.Options):
    """Options.

    Attributes:
        mode: What to do.
        steps: Training steps.
        train_batch: Samples in each training step.
        val_batch: Validation samples, which are kept out of training.
        lr: Learning rate of plain gradient descent.
        seed: Seed of the parameters, of the order of the samples and of the maps.
        device: Where to compute: cpu, cuda, cuda:1, ...
        dim: Dimensions that each parameter's gradient is projected to, about.
        min_dim: The least that an axis is projected to.
        init: Name of the projection, such as gaussian, rademacher or orthonormal.
    """

    mode: Mode = "project"
    dim: int = 64
    min_dim: int = 4
    init: str = "gaussian"


def new_engine(
    model: nn.Module, options: Options, dtype: torch.dtype = torch.float32
) -> ProjectionEngine:
    """Return the engine that the options describe, with rows of a dtype."""
    return ProjectionEngine(
        model,
        dim=options.dim,
        min_dim=options.min_dim,
        seed=options.seed,
        init=options.init,
        dtype=dtype,
    )


def project(options: Options) -> bool:
    """Train with the engine attached; print the shape of the rows and what their columns are."""
    model, (digits, _) = mlp.build(options), mlp.load(options)
    engine = new_engine(model, options)
    with engine:
        mlp.train(model, digits, options, lambda step: engine.batch(step.ids))
    rows = engine.collect().rows
    print(f"rows of step {options.steps}: {tuple(rows.shape)}, {rows.dtype}")
    for block in engine.layout:
        columns = f"{block.columns.start}:{block.columns.stop}"
        shape = " × ".join(map(str, block.shape))
        print(
            f"  {columns:>9}  {block.parameter:<14} {shape:>7} → {block.k_left} × {block.k_right}"
        )
    return True


def non_interference(options: Options) -> bool:
    """Train with and without the engine; tell whether all parameters are bit-identical."""
    plain, watched = mlp.build(options), mlp.build(options)
    digits, _ = mlp.load(options)
    mlp.train(plain, digits, options)
    engine = new_engine(watched, options)
    with engine:
        mlp.train(watched, digits, options, lambda step: engine.batch(step.ids))
    same = True
    for (name, ours), theirs in zip(watched.named_parameters(), plain.parameters(), strict=True):
        equal = torch.equal(ours, theirs)
        same &= equal
        difference = (ours - theirs).abs().max().item()
        print(f"  {name:<14} {'identical' if equal else f'differs by up to {difference:.3g}'}")
    print(f"parameters after {options.steps} steps: {'identical' if same else 'NOT identical'}")
    return same


def naive_check(options: Options) -> bool:
    """Compare the rows of each training step with per-sample gradients by autograd, in float64."""
    model, (digits, _) = mlp.build(options).double(), mlp.load(options)
    digits = mlp.Digits(digits.inputs.double(), digits.labels)
    engine = new_engine(model, options, torch.float64)
    errors: list[Tensor] = []

    @contextmanager
    def checked(step: mlp.Step) -> Iterator[None]:
        with engine.batch(step.ids):
            yield
        naive = naive_rows(model, step.batch, engine)
        difference = engine.collect().rows - naive
        errors.append(difference.norm(dim=1) / naive.norm(dim=1))

    with engine:
        mlp.train(model, digits, options, checked)
    relative = torch.cat(errors)
    agreed = bool((relative <= TOLERANCE).all())  # NaN is no agreement
    print(f"worst relative error of {len(relative)} rows: {relative.max().item():.2e}")
    print(f"rows {'agree' if agreed else 'DO NOT agree'} within {TOLERANCE:g}")
    return agreed


def naive_rows(model: nn.Module, batch: mlp.Digits, engine: ProjectionEngine) -> Tensor:
    """Return `P_o g_n P_iᵀ`, one parameter after the other, from one backward pass a sample.

    The loss is the batch's mean, so that a sample contributes its own gradient divided by N.
    """
    parameters = dict(model.named_parameters())
    rows = []
    for n in range(len(batch)):
        loss = mlp.loss_of(model, batch[n : n + 1]) / len(batch)
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        by_name = dict(zip(parameters, gradients, strict=True))
        parts = []
        for block in engine.layout:
            left, right = engine.maps(block.parameter)
            matrix = by_name[block.parameter].reshape(block.shape[0], -1)
            parts.append((left @ matrix @ right.T).flatten())
        rows.append(torch.cat(parts))
    return torch.stack(rows)


MODES: Mapping[Mode, Callable[[Options], bool]] = {
    "project": project,
    "non_interference": non_interference,
    "naive_check": naive_check,
}
"""What each mode runs; it returns whether all is well."""


def main(arguments: list[str] | None = None) -> None:
    """Run from the command line; a check that fails exits with 1."""
    options = read_options(Options, arguments, name="mlp_projection", description=__doc__)
    print(f"{options.mode}: {options.steps} steps of {options.train_batch} samples")
    sys.exit(0 if MODES[options.mode](options) else 1)


if __name__ == "__main__":
    main()
