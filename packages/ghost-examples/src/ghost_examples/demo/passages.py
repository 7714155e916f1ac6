"""Find the passages that a language model learns most alike from, by gradient, in a store."""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel

from ghost_engines import GradientStore, project_dataset
from ghost_examples.demo import once_more
from ghost_examples.demo.once_more import OnceMore
from ghost_examples.texts import DOMAINS, Passage, build_vocabulary, passages


@dataclass(frozen=True)
class Plan:
    """How large everything is.

    Attributes:
        length: Tokens of a passage.
        per_domain: Passages of each domain, spread evenly over it.
        every: One passage of so many is held out: it is a query, never trained on nor stored.
        depth: Layers of the model.
        width: Width of the model.
        steps: Training steps.
        batch: Passages per step.
        lr: Learning rate of AdamW.
        dim: Dimensions of a stored gradient, at most.
        dtype: Dtype of a stored gradient.
        neighbours: Passages to find for each query.
        shown: Queries to show of each domain.
        judged: Queries for which a step on one more passage is tried.
    """

    length: int = 128
    per_domain: int = 640
    every: int = 16
    depth: int = 2
    width: int = 96
    steps: int = 480
    batch: int = 8
    lr: float = 3e-3
    dim: int = 1024
    dtype: str = "float16"
    neighbours: int = 3
    shown: int = 1
    judged: int = 80


LAYERS = "*.attn.*.weight,*.mlp.*.weight"
"""What is projected: the matrices of the transformer's blocks."""


@dataclass(frozen=True)
class Neighbour:
    """A stored passage that was found.

    Attributes:
        passage: The passage.
        score: Cosine of its projected gradient with the query's.
    """

    passage: Passage
    score: float


@dataclass(frozen=True)
class Looked:
    """A query and what was found for it, nearest first."""

    query: Passage
    found: Sequence[Neighbour]


@dataclass(frozen=True)
class PassagesResult:
    """What was found.

    Attributes:
        plan: How large everything was.
        first_loss: Loss of the first training batch, in nats per token.
        final_loss: Mean loss of the held-out passages after training.
        stored: Number of stored passages by domain.
        columns: Numbers in a stored gradient.
        parameters: Numbers in an unprojected gradient of the same layers.
        looked: Every query with its neighbours.
        once_more: What a step on what was found does to some queries.
    """

    plan: Plan
    first_loss: float
    final_loss: float
    stored: Mapping[str, int]
    columns: int
    parameters: int
    looked: Sequence[Looked]
    once_more: OnceMore

    @property
    def own_share(self) -> dict[str, float]:
        """Share of queries whose nearest passage is of their own domain, by domain."""
        hits: Counter[str] = Counter()
        for each in self.looked:
            hits[each.query.domain] += each.found[0].passage.domain == each.query.domain
        asked = Counter(each.query.domain for each in self.looked)
        return {name: hits[name] / count for name, count in asked.items()}

    @property
    def share(self) -> float:
        """Share of all queries whose nearest passage is of their own domain."""
        same = [each.found[0].passage.domain == each.query.domain for each in self.looked]
        return sum(same) / len(same)

    @property
    def chance(self) -> float:
        """The same share if a stored passage were drawn at random."""
        total = sum(self.stored.values())
        drawn = [self.stored[each.query.domain] / total for each in self.looked]
        return sum(drawn) / len(drawn)

    @property
    def shown(self) -> list[Looked]:
        """The first queries of each domain."""
        seen: Counter[str] = Counter()
        chosen = []
        for each in self.looked:
            seen[each.query.domain] += 1
            if seen[each.query.domain] <= self.plan.shown:
                chosen.append(each)
        return chosen


def new_model(plan: Plan, device: str) -> GPT2LMHeadModel:
    """Return a small GPT-2 with random parameters, for the vocabulary of the texts."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=build_vocabulary().size,
        n_positions=plan.length,
        n_layer=plan.depth,
        n_embd=plan.width,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
    )
    model = GPT2LMHeadModel(config)
    nn.Module.to(model, device)  # in place; the method of transformers has another type
    return model


def per_sample_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return the mean loss over each passage's tokens, `[N, T]` to `[N]`."""
    logits = model(tokens).logits[:, :-1]
    return cross_entropy(logits.mT, tokens[:, 1:], reduction="none").mean(1)


def split(plan: Plan) -> tuple[list[Passage], list[Passage]]:
    """Return the passages to train on and store, and those that are held out."""
    cut = passages(plan.length, per_domain=plan.per_domain)
    held_out = [passage for at, passage in enumerate(cut) if at % plan.every == plan.every // 2]
    kept = [passage for at, passage in enumerate(cut) if at % plan.every != plan.every // 2]
    return kept, held_out


def as_tokens(texts: Sequence[Passage], device: str) -> Tensor:
    """Return the tokens of passages, `[n, T]`."""
    return torch.tensor([passage.tokens for passage in texts], device=device)


def train(model: nn.Module, tokens: Tensor, plan: Plan) -> float:
    """Train with a progress bar; return the first batch's loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=plan.lr)
    generator = torch.Generator().manual_seed(0)
    losses: list[float] = []
    with tqdm(range(plan.steps), desc="training GPT-2", disable=None) as bar:
        for _ in bar:
            ids = torch.randint(len(tokens), (plan.batch,), generator=generator)
            loss = per_sample_loss(model, tokens[ids]).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            bar.set_postfix(loss=f"{losses[-1]:.2f}")
    return losses[0]


def projected(folder: Path, model: nn.Module, tokens: Tensor, plan: Plan) -> GradientStore:
    """Return a store of the projected gradients of passages; one that is there is replaced."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        fresh = Path(scratch) / "new"
        project_dataset(
            model, per_sample_loss, tokens, fresh, batch_size=plan.batch, total_dim=plan.dim,
            dtype=plan.dtype, layers=LAYERS,
        )  # fmt: skip
        if folder.exists():
            folder.rename(Path(scratch) / "old")
        fresh.rename(folder)
    return GradientStore.open(folder)


def run(folder: Path, device: str, plan: Plan | None = None) -> PassagesResult:
    """Train the model, store gradients in a folder, and look up every held-out passage.

    Raises:
        FileExistsError: If the folder is there and is not a store, which would be replaced.
    """
    plan = plan or Plan()
    if folder.exists() and not (folder / "manifest.json").is_file():
        raise FileExistsError(f"{folder} is no store of gradients: choose another --output")
    kept, held_out = split(plan)
    tokens, queries = as_tokens(kept, device), as_tokens(held_out, device)
    model = new_model(plan, device)
    first_loss = train(model, tokens, plan)
    store = projected(folder, model, tokens, plan)
    with tempfile.TemporaryDirectory() as scratch:
        of_queries = projected(Path(scratch) / "queries", model, queries, plan)
        asked, losses = of_queries.rows().clone(), of_queries.losses
    assert losses is not None
    near = store.search(asked, k=plan.neighbours, by="cosine", progress=False)
    some = torch.linspace(0, len(asked) - 1, min(plan.judged, len(asked))).long()
    chosen = once_more.choose(store, asked[some], kept, [held_out[at] for at in some.tolist()])
    looked = [
        Looked(query, [Neighbour(kept[i], s) for i, s in zip(ids, scores, strict=True)])
        for query, ids, scores in zip(
            held_out, near.ids.tolist(), near.scores.tolist(), strict=True
        )
    ]
    return PassagesResult(
        plan=plan,
        first_loss=first_loss,
        final_loss=losses.mean().item(),
        stored=Counter(passage.domain for passage in kept),
        columns=store.k_total,
        parameters=sum(math.prod(each["shape"]) for each in store.manifest.engine["layers"]),
        looked=looked,
        once_more=once_more.judge(model, per_sample_loss, tokens, queries[some], chosen),
    )


def show(result: PassagesResult) -> None:
    """Print what was found."""
    print(
        f"Loss of held-out passages: {result.final_loss:.2f} nats per token, "
        f"{result.first_loss:.2f} before training."
    )
    print(
        f"{sum(result.stored.values())} gradients of {result.parameters:,} numbers each are stored "
        f"as {result.columns} numbers of {result.plan.dtype}."
    )
    print(
        f"The nearest stored passage is of the query's own domain for {result.share:.1%} of "
        f"{len(result.looked)} held-out passages; by chance {result.chance:.1%}."
    )
    titles = {domain.name: domain.title for domain in DOMAINS}
    for name, share in result.own_share.items():
        print(f"  {titles[name]:<50} {share:.1%}")
    for each in result.shown:
        print(f"  query    {each.query.domain:<11} {_start(each.query.text)}")
        for near in each.found[:1]:
            print(f"  nearest  {near.passage.domain:<11} {_start(near.passage.text)}")
    once_more.show(result.once_more)


def _start(text: str, length: int = 70) -> str:
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 1] + "…"
