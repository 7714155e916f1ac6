"""Project a corpus with a language model, look passages up, and see whether they would help.

A small GPT-2 learns the texts that come with this package. The gradients of the passages that it
learned from are projected into a store; for each held-out passage the nearest one is looked up, in
the store, by words (TF-IDF), and at random. What was found is judged by tail-patch: one step on it,
and how much lower the held-out passage's loss is then.

    python -m ghost_examples.lm_projection --output results/lm_projection

In the folder are the store, the checkpoint, the config and what was measured.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ghost_engines import ProjectionEngine, project_dataset, project_queries, quality
from ghost_examples import demo as lm
from ghost_examples.command_line import read_options
from ghost_examples.texts import Passage


@dataclass(frozen=True)
class Options:
    """Options.

    Attributes:
        output: Folder to write to. What is there is gone on with.
        per_domain: Passages of each of the four domains.
        steps: Training steps.
        dim: Dimensions of a row, about.
        layers: Globs over names of modules and parameters: what to project.
        queries: Held-out passages to ask for, of all domains alike.
        lr: Learning rate of the step on what was found.
        device: Where to compute: cpu, cuda, cuda:1, ...
    """

    output: Path
    per_domain: int = 640
    steps: int = 480
    dim: int = 4096
    layers: str = lm.LAYERS
    queries: int = 80
    lr: float = lm.LR
    device: str = "cpu"

    @property
    def plan(self) -> lm.Plan:
        """What the demo calls these."""
        return lm.Plan(per_domain=self.per_domain, steps=self.steps, dim=self.dim)


class Passages(Dataset[Tensor]):
    """Passages as samples of tokens."""

    def __init__(self, passages: Sequence[Passage], device: str) -> None:
        self.passages = passages
        self.tokens = lm.as_tokens(passages, device)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> Tensor:
        return self.tokens[index]

    def domains(self, ids: Tensor) -> list[str]:
        """Return the domain of each passage."""
        return [self.passages[number].domain for number in ids.tolist()]


def trained(options: Options, corpus: Passages) -> nn.Module:
    """Return the model, from the folder if it was trained before."""
    model: nn.Module = lm.new_model(options.plan, options.device)
    path = options.output / "model.pt"
    if path.exists():
        model.load_state_dict(torch.load(path, map_location=options.device, weights_only=True))
    else:
        lm.train(model, corpus.tokens, options.plan)
        torch.save(model.state_dict(), path)
    return model.eval()


def run(options: Options) -> dict[str, quality.TailPatch]:
    """Train or load, project or go on, look up, judge; write what was measured."""
    options.output.mkdir(parents=True, exist_ok=True)
    config = {**asdict(options), "output": str(options.output)}
    (options.output / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    kept, held_out = lm.split(options.plan)
    corpus = Passages(kept, options.device)
    model = trained(options, corpus)
    done = project_dataset(
        model, lm.per_sample_loss, corpus, options.output / "store", batch_size=32,
        total_dim=options.dim, layers=options.layers,
        columns={"group": ("category", corpus.domains)},
    )  # fmt: skip
    queries = _spread(held_out, options.queries)
    asked = lm.as_tokens(queries, options.device)
    started = time.monotonic()
    engine = ProjectionEngine.from_manifest(model, done.store)
    rows = project_queries(engine, lm.per_sample_loss, asked).rows.cpu()
    ways = lm.choose(done.store, rows, kept, queries)
    seconds = {"project": done.seconds, "look up": time.monotonic() - started}
    result = lm.step_on_each(model, lm.per_sample_loss, corpus.tokens, asked, ways, options.lr)
    losses = done.store.losses
    assert losses is not None
    statistics = {
        "samples": len(done.store),
        "projected_now": done.samples,
        "tokens": corpus.tokens.numel(),
        "columns": done.store.k_total,
        "mean_loss": float(losses.mean()),
        "query_loss": float(next(iter(result.values())).before.mean()),
        "seconds": seconds,
        "domains": Counter(passage.domain for passage in kept),
        "gain_in_millinats": {way: 1000 * each.mean for way, each in result.items()},
        "standard_error": {way: 1000 * each.error for way, each in result.items()},
        "own_domain": {way: _own_share(corpus, queries, found) for way, found in ways.items()},
    }
    path = options.output / "statistics.json"
    path.write_text(json.dumps(statistics, indent=1) + "\n")
    show(statistics)
    return result


def _spread(held_out: Sequence[Passage], count: int) -> list[Passage]:
    """Return so many passages, spread evenly."""
    count = min(count, len(held_out))
    return [held_out[at * len(held_out) // count] for at in range(count)]


def _own_share(corpus: Passages, queries: Sequence[Passage], found: Sequence[int]) -> float:
    same = [
        corpus.passages[number].domain == query.domain
        for number, query in zip(found, queries, strict=True)
    ]
    return sum(same) / len(same)


def show(statistics: Mapping[str, object]) -> None:
    """Print what was measured."""
    print(f"{statistics['samples']} passages, rows of {statistics['columns']}")
    print(f"{'found by':<22}{'gain, milli-nats':>20}{'own domain':>13}")
    gains, errors = statistics["gain_in_millinats"], statistics["standard_error"]
    own = statistics["own_domain"]
    assert isinstance(gains, Mapping)
    assert isinstance(errors, Mapping)
    assert isinstance(own, Mapping)
    for way, gain in gains.items():
        print(f"{way:<22}{f'{gain:.1f} ± {errors[way]:.1f}':>20}{own[way]:>13.0%}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the example."""
    run(read_options(Options, arguments, name="lm_projection", description=__doc__))


if __name__ == "__main__":
    main()
