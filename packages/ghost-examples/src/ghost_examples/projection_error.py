"""How far inner products of projected gradients are from those of the gradients themselves.

A small network learns to read digits; then the gradients of some images are projected to fewer and
fewer dimensions, with maps of several kinds, drawn anew from several seeds. Beside the error that
was measured stands the one that a formula predicts for Gaussian maps.

    python -m ghost_examples.projection_error --output results/projection_error
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ghost_engines import Block, ProjectionEngine
from ghost_examples import mlp
from ghost_examples.command_line import read_options

KINDS = ("gaussian", "rademacher", "orthonormal")
"""Kinds of maps that are compared."""


@dataclass(frozen=True)
class Options:
    """Options.

    Attributes:
        dims: Dimensions that each parameter is projected to, about.
        samples: Images whose gradients are compared, all with all.
        seeds: Maps that are drawn of each kind.
        steps: Training steps before.
        output: Folder to write the numbers and the picture to.
    """

    dims: tuple[int, ...] = (4, 16, 64, 256, 1024)
    samples: int = 32
    seeds: int = 20
    steps: int = 100
    output: Path | None = None


@dataclass(frozen=True)
class Row:
    """What was found with maps of one size.

    Attributes:
        dim: Dimensions of each parameter, about.
        columns: Dimensions of a whole row.
        errors: Root mean square of `(⟨row, row'⟩ - ⟨g, g'⟩) / (‖g‖ ‖g'‖)` by kind of maps.
        predicted: The same for Gaussian maps by the formula.
    """

    dim: int
    columns: int
    errors: Mapping[str, float]
    predicted: float


def gradients_of(options: Options) -> tuple[nn.Module, dict[str, Tensor]]:
    """Train a network; return it and the whole gradients of some images, `[N, *shape]`."""
    setup = mlp.Options(steps=options.steps, train_batch=64, val_batch=options.samples)
    model, (train, images) = mlp.build(setup), mlp.load(setup)
    mlp.train(model, train, setup)
    model.double()
    engine = ProjectionEngine(model, dim="whole", dtype="float64")
    with engine.frozen(), engine.batch(images.ids):
        logits = model(images.inputs.double())
        cross_entropy(logits, images.labels, reduction="none").sum().backward()
    parts = engine.collect().by_parameter
    shapes = {block.parameter: block.shape for block in engine.layout}
    return model, {name: part.unflatten(1, shapes[name]) for name, part in parts.items()}


def predicted_variance(first: Tensor, second: Tensor, block: Block) -> float:
    """Return the variance of `⟨L A Rᵀ, L B Rᵀ⟩` for Gaussian maps L and R.

    With `E[SXS] = X + (Xᵀ + tr(X)) / k` for `S = RᵀR`, and likewise for L. A side that keeps all
    its dimensions is no map, and adds nothing. For `A = B` of rank one and norm one it is
    `(1 + 2 / k_left) (1 + 2 / k_right) - 1`.

    Args:
        first: A, of the parameter's shape.
        second: B.
        block: How many dimensions there are.
    """
    a, b = (each.reshape(block.matrix) for each in (first, second))
    left, right = (
        0.0 if k == n else 1 / k
        for k, n in zip((block.k_left, block.k_right), block.matrix, strict=True)
    )
    cross, ga, gb = b.mT @ a, a.mT @ a, b.mT @ b
    trace = cross.trace() ** 2
    squares, turned = cross.square().sum(), (cross * cross.mT).sum()
    through = (ga * gb).sum()
    by_right = right * (squares + turned)
    by_left = left * (
        through + turned + right * (through + ga.trace() * gb.trace() + squares + trace)
    )
    return float(by_right + by_left)


def measure(options: Options) -> list[Row]:
    """Return a row for each size of maps."""
    model, gradients = gradients_of(options)
    flat = torch.cat([gradients[name].flatten(1) for name in sorted(gradients)], dim=1)
    exact, norms = flat @ flat.mT, flat.norm(dim=1)
    above = torch.triu_indices(len(flat), len(flat), offset=1)
    scale = (norms[:, None] * norms)[*above]
    rows = []
    for dim in options.dims:
        errors = {}
        for kind in KINDS:
            squares = []
            for seed in range(options.seeds):
                engine = ProjectionEngine(
                    model, dim=dim, min_dim=1, seed=seed, init=kind, dtype="float64"
                )
                found = engine.project(gradients)
                squares.append((((found @ found.mT) - exact)[*above] / scale).square().mean())
            errors[kind] = math.sqrt(float(torch.stack(squares).mean()))
        predicted = _predicted(gradients, engine.layout, above, scale)
        rows.append(Row(dim, engine.k_total, errors, predicted))
    return rows


def _predicted(
    gradients: Mapping[str, Tensor], layout: Sequence[Block], above: Tensor, scale: Tensor
) -> float:
    squares = [
        sum(
            predicted_variance(gradients[block.parameter][i], gradients[block.parameter][j], block)
            for block in layout
        )
        for i, j in above.mT.tolist()
    ]
    relative = torch.tensor(squares, dtype=torch.float64) / scale.square()
    return math.sqrt(float(relative.mean()))


def show(rows: Sequence[Row]) -> None:
    """Print a line for each size."""
    print(f"{'dim':>6}{'columns':>9}" + "".join(f"{kind:>13}" for kind in KINDS) + "    predicted")
    for row in rows:
        errors = "".join(f"{row.errors[kind]:>13.4f}" for kind in KINDS)
        print(f"{row.dim:>6}{row.columns:>9}{errors}{row.predicted:>13.4f}")


def write(rows: Sequence[Row], options: Options, folder: Path) -> None:
    """Write the numbers as JSON, and the picture."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {**asdict(options), "output": str(folder)}
    content = {"config": config, "rows": [asdict(row) for row in rows]}
    (folder / "errors.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    columns = [row.columns for row in rows]
    for kind in KINDS:
        axes.plot(columns, [row.errors[kind] for row in rows], marker="o", label=kind)
    predicted = [row.predicted for row in rows]
    axes.plot(columns, predicted, color="black", linestyle="--", label="predicted, gaussian")
    axes.set(
        xscale="log", yscale="log", xlabel="columns of a row", ylabel="error, relative to norms"
    )
    axes.legend()
    figure.savefig(folder / "errors.svg")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write."""
    options = read_options(Options, arguments, name="projection_error", description=__doc__)
    rows = measure(options)
    show(rows)
    if options.output is not None:
        write(rows, options, options.output)


if __name__ == "__main__":
    main()
