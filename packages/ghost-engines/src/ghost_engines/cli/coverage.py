"""What `ghost coverage` does."""

from __future__ import annotations

from ghost_core import UnsupportedLayerError
from ghost_engines.cli.models import load_model
from ghost_engines.cli.options import Coverage
from ghost_engines.cli.places import seed
from ghost_engines.cli.subject import refused, tracked_of
from ghost_engines.cli.tables import print_table, while_read
from ghost_engines.dot_product import DotProductEngine


def run(options: Coverage) -> int:
    """Print which sampler handles which module, and return the exit status."""
    seed(options.seed)
    model = load_model(options.model)
    try:
        engine = DotProductEngine(model, layers=options.layers, exclude=options.exclude)
    except UnsupportedLayerError as error:
        return refused(error)
    with while_read():
        print_table(
            ("module", "class", "sampler", "parameters", "numbers"),
            (
                (
                    tracked.name or "(root)",
                    type(tracked.module).__name__,
                    type(tracked.sampler).__name__,
                    ", ".join(tracked.parameters),
                    str(sum(each.shape.numel() for each in tracked.parameters.values())),
                )
                for tracked in engine.tracking.modules
            ),
        )
        print(f"\n{tracked_of(model, len(engine.parameters))}")
    return 0
