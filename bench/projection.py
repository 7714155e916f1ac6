"""Projection of the linear layers in GPT-2's blocks, beside passes that do only what they must."""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear

from bench.case import Case, Setting, Way
from bench.language import gpt2
from bench.steps import Loss, plain, projected
from ghost_engines import project_dataset

WEIGHTS = "*.c_attn.weight,*.c_proj.weight,*.c_fc.weight"
"""Those of the linear layers in GPT-2's blocks."""


def frozen(setting: Setting) -> Mapping[str, Way]:
    """Make a pass without weight gradients, and ones that project or do a projection's products."""
    model, loss, n = gpt2(setting)
    ways = {"bare": bare(model, loss)}
    for named, side in zip(("16 by 16", "64 by 64"), sides(setting), strict=True):
        ways[f"{named}, products alone"] = by_hand(model, loss, n, side, frozen=True)
        ways[named] = projected(setting, model, loss, n, frozen=True, **selected(side))
    return ways


def training(setting: Setting) -> Mapping[str, Way]:
    """Make a plain step, and ones that project beside it or do a projection's products."""
    model, loss, n = gpt2(setting)
    side = sides(setting)[0]
    return {
        "plain": plain(model, loss),
        "products alone": by_hand(model, loss, n, side, frozen=False),
        "16 by 16": projected(setting, model, loss, n, frozen=False, **selected(side)),
    }


def whole(setting: Setting) -> Mapping[str, Way]:
    """Make bare passes over a data set, and `project_dataset` in the same batches."""
    made, _, n = gpt2(setting)
    model: Any = copy.deepcopy(made)
    longest = model.config.n_positions
    corpus = Corpus(model.config.vocab_size, longest, samples=2 * n if setting.tiny else 16 * n)
    root = Path(tempfile.mkdtemp())
    setting.stack.callback(shutil.rmtree, root)
    seen: list[Mapping[str, Tensor]] = []
    passing = frozen_copy(model)

    def noted(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        if not any(batch is each for each in seen):  # a batch that is verified is there twice
            seen.append(batch)
        return losses(model, batch)

    def project(loss: Any = losses) -> None:
        project_dataset(
            model, loss, corpus, root / "store",
            tokens_per_batch=n * longest, progress=False, **selected(sides(setting)[0]),
        )  # fmt: skip

    def clear() -> None:
        shutil.rmtree(root / "store", ignore_errors=True)

    project(noted)
    return {
        "bare": Way(lambda: [losses(passing, batch).sum().backward() for batch in seen]),
        "project_dataset": Way(project, clear),
    }


def sides(setting: Setting) -> tuple[int, int]:
    """Return what sides are projected to."""
    return (2, 4) if setting.tiny else (16, 64)


def selected(side: int) -> dict[str, Any]:
    """Return the options of an engine that projects both sides of the weights."""
    return {"layers": WEIGHTS, "dim": (side, side)}


def frozen_copy(model: Any) -> Any:
    """Return a copy whose gradients go through activations alone, back to the embeddings."""
    model = copy.deepcopy(model).requires_grad_(False)
    model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: output.requires_grad_()
    )
    return model


def bare(model: nn.Module, loss: Loss) -> Way:
    """Return a forward and a backward pass through activations alone."""
    model = frozen_copy(model)
    return Way(lambda: loss(model).backward())


def by_hand(model: nn.Module, loss: Loss, n: int, side: int, *, frozen: bool) -> Way:
    """Return a pass with the products of a projection in plain hooks, and nothing else.

    It checks nothing, and takes one call of each module on all samples for granted: no engine
    can cost less.
    """
    model = frozen_copy(model) if frozen else copy.deepcopy(model)
    names = [name.strip("*.").removesuffix(".weight") for name in WEIGHTS.split(",")]
    modules = [each for name, each in model.named_modules() if name.split(".")[-1] in names]
    rows = torch.zeros(len(modules), n, side, side)
    for module, row in zip(modules, rows, strict=True):
        d, p = module.weight.shape
        device = module.weight.device
        right, left = torch.randn(side, d, device=device), torch.randn(side, p, device=device)
        module.register_forward_hook(Products(left, right, row.to(device)))
    return Way(lambda: loss(model).backward(), model.zero_grad)


class Products:
    """A forward hook that multiplies both sides of a layer with a map, and then with each other.

    Args:
        left: `[k, p]`.
        right: `[k, d]`.
        row: Where the result goes, `[N, k, k]`.
    """

    def __init__(self, left: Tensor, right: Tensor, row: Tensor) -> None:
        self.left, self.right, self.row = left, right, row

    def __call__(self, module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        """Compress the input, and wait for the gradient."""
        with torch.no_grad():
            inputs = linear(args[0], self.right)  # [N, T, k]
        output.register_hook(lambda grad: self.arrived(inputs, grad))

    def arrived(self, inputs: Tensor, grad: Tensor) -> None:
        """Compress the gradient, and multiply."""
        with torch.no_grad():
            torch.bmm(linear(grad, self.left).mT, inputs, out=self.row)


class Corpus:
    """Samples of a quarter of the longest to the longest, in no order of length.

    Args:
        vocabulary: Number of tokens that there are.
        longest: Tokens of the longest sample.
        samples: How many there are.
    """

    def __init__(self, vocabulary: int, longest: int, samples: int) -> None:
        lengths = torch.randint(longest // 4, longest + 1, (samples,)).tolist()
        self.ids = [torch.randint(vocabulary, (length,)) for length in lengths]

    def __len__(self) -> int:
        """Return how many samples there are."""
        return len(self.ids)

    def __getitem__(self, at: int) -> Mapping[str, Tensor]:
        """Return a sample."""
        ids = self.ids[at]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def losses(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the mean loss over the tokens of each sample, `[N]`."""
    device = next(model.parameters()).device
    ids, mask = batch["input_ids"].to(device), batch["attention_mask"][:, 1:].to(device)
    logits = model(ids).logits[:, :-1]
    each = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return (each.view(mask.shape) * mask).sum(1) / mask.sum(1)


CASES = [
    Case(
        "projection_frozen",
        "GPT-2, 4 layers of 256, N = 8, T = 128, weights of the blocks' linear layers, without "
        "weight gradients",
        frozen,
        goals={"16 by 16": 1.04, "64 by 64": 1.12},
        needs=("transformers",),
    ),
    Case(
        "projection_training",
        "the same beside training",
        training,
        goals={"16 by 16": 1.05},
        needs=("transformers",),
    ),
    Case(
        "projection_dataset",
        "128 samples of 32 to 128 tokens to a store, 16 by 16: first batches, packing, writing",
        whole,
        needs=("transformers",),
    ),
]
