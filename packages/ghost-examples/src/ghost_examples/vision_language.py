"""Values of samples with several images each, for a tiny LLaVA that is to name digits.

Each sample has one to three images of handwritten digits, and a text that names them. Batches are
dictionaries, whose images have rows of their own: `row_owner` says which rows of which modules
are images, and each batch whose they are. The same loop goes through exact and concatenated mode,
with evaluation between steps, and scores are compared with one autograd call per sample:

    python -m ghost_examples.vision_language
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from ghost_core import CaptureError
from ghost_core.testing import per_sample_gradients
from ghost_engines import GroupValues, Run, RunConfig
from ghost_examples.command_line import read_options, refusals

MOST = 3
"""Images of a sample, at most."""

PATCHES = 4  # of an image: two by two, without the class token
PAD, FIRST_DIGIT, END, IMAGE = 0, 1, 11, 12
LENGTH = PATCHES * MOST + MOST + 1
IMAGES = {"model.vision_tower*": "owners", "model.multi_modal_projector*": "owners"}
"""Rows of these modules are images; whose they are, the batch says under this name."""

MODES = ("exact", "concatenated")
"""Validation samples have a pass of their own, or go through the model with those of training."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options.

    Attributes:
        steps: Training steps in each mode.
        batch: Samples of a step.
        validation: Samples that scores and values are for.
        test: Samples that the loss is measured on, between steps.
        eval_every: Steps between these measurements.
        lr: Learning rate of plain gradient descent.
        seed: Of parameters and samples.
    """

    steps: int = 40
    batch: int = 8
    validation: int = 8
    test: int = 64
    eval_every: int = 20
    lr: float = 0.03
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "validation", "test", "eval_every"):
            if getattr(self, name) < 1:
                raise CaptureError(f"{name} must be at least 1, not {getattr(self, name)}")


@dataclass(frozen=True)
class Samples:
    """Texts with images.

    Attributes:
        text: `input_ids` and `attention_mask`, `[N, T]`.
        images: Images of all samples, one after another, `[I, 3, 8, 8]`.
        owners: The sample of each image, counted from 0, `[I]`.
    """

    text: Mapping[str, Tensor]
    images: Tensor
    owners: Tensor

    def __len__(self) -> int:
        return len(self.text["input_ids"])

    @property
    def counts(self) -> Tensor:
        """Number of images of each sample, `[N]`."""
        return torch.bincount(self.owners, minlength=len(self))


def draw(count: int, generator: torch.Generator) -> Samples:
    """Draw samples of one to three images of digits, each with a text that names these."""
    digits = load_digits()
    pictures = torch.tensor(digits.images / 16)[:, None].expand(-1, 3, -1, -1)
    labels = torch.tensor(digits.target)
    counts = torch.randint(1, MOST + 1, (count,), generator=generator)
    drawn = torch.randint(len(labels), (int(counts.sum()),), generator=generator)
    tokens = torch.full((count, LENGTH), PAD)
    for at, own in enumerate(drawn.split(counts.tolist())):
        row = [IMAGE] * (PATCHES * len(own)) + (labels[own] + FIRST_DIGIT).tolist() + [END]
        tokens[at, : len(row)] = torch.tensor(row)
    text = {"input_ids": tokens, "attention_mask": (tokens != PAD).long()}
    return Samples(text, pictures[drawn], torch.arange(count).repeat_interleave(counts))


def llava(seed: int) -> nn.Module:
    """Return a LLaVA with parameters drawn from a seed, in float64."""
    torch.manual_seed(seed)
    language = LlamaConfig(
        vocab_size=IMAGE + 1,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=END,
    )
    vision = CLIPVisionConfig(
        image_size=8,
        patch_size=4,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    options: dict[str, Any] = {"image_token_id": IMAGE}  # which its types do not know
    config = LlavaConfig(
        text_config=language, vision_config=vision, vision_feature_layer=-1, **options
    )
    model: nn.Module = LlavaForConditionalGeneration(config)
    return model.double()


def losses(model: nn.Module, text: Mapping[str, Tensor], images: Tensor) -> Tensor:
    """Return the mean loss of each sample over the digits that it names and the end, `[N]`."""
    logits = model(**text, pixel_values=images, use_cache=False).logits[:, :-1]
    targets = text["input_ids"][:, 1:]
    said = (targets != IMAGE) & (targets != PAD)
    each = cross_entropy(logits.mT, targets, reduction="none")
    return (each * said).sum(1) / said.sum(1)


@torch.no_grad()
def evaluate(model: nn.Module, samples: Samples) -> float:
    """Return the mean loss of samples, with the model in evaluation mode."""
    model.eval()
    found = losses(model, samples.text, samples.images).mean().item()
    model.train()
    return found


@dataclass(frozen=True)
class Outcome:
    """What training in one mode came to.

    Attributes:
        deviation: Of scores from autograd, sample by sample, over the product of norms; the largest
            of the first and the last step.
        measured: Loss of the test samples by step, before the first and then now and then.
        values: Values by number of images.
        losses: Loss of each step.
        model: What was trained.
    """

    deviation: float
    measured: dict[int, float]
    values: GroupValues
    losses: list[float]
    model: nn.Module


def train(mode: str, asked: Options) -> Outcome:
    """Train in a mode, evaluate between steps, and compare scores with autograd."""
    generator = torch.Generator().manual_seed(asked.seed)
    test, val = draw(asked.test, generator), draw(asked.validation, generator)
    model = llava(asked.seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=asked.lr)
    images: dict[int, int] = {}
    seen, measured, deviations = [], {0: evaluate(model, test)}, []
    with TemporaryDirectory() as folder, _run(mode, model, optimizer, val, folder) as run:
        for step in range(asked.steps):
            batch = draw(asked.batch, generator)
            ids = torch.arange(asked.batch) + step * asked.batch
            images |= dict(zip(ids.tolist(), batch.counts.tolist(), strict=True))
            compared = step in (0, asked.steps - 1)
            expected = reference(model, batch, val) if compared else None
            optimizer.zero_grad()
            scores, loss = make_gradients(run, model, ids, batch, val)
            seen.append(loss)
            if expected is not None:
                dots, norms = expected
                deviations.append(float(((scores - dots).abs() / norms).max()))
            optimizer.step()
            if (step + 1) % asked.eval_every == 0 or step + 1 == asked.steps:
                measured[step + 1] = evaluate(model, test)
        by_images = run.values.by_group(lambda sample: f"{images[sample]} images")
    return Outcome(max(deviations), measured, by_images, seen, model)


def _run(
    mode: str, model: nn.Module, optimizer: torch.optim.Optimizer, val: Samples, folder: str
) -> Run:
    options = {"dot_product": {"row_owner": IMAGES}}
    config = RunConfig(folder=Path(folder) / "run", mode=mode, options=options)
    separate = {"val": lambda: losses(model, val.text, val.images).mean()}
    return Run(model, optimizer, config, directions={} if mode == "concatenated" else separate)


def make_gradients(
    run: Run, model: nn.Module, ids: Tensor, batch: Samples, val: Samples
) -> tuple[Tensor, float]:
    """Make the gradients of a batch; return its scores, `[N]`, and its loss."""
    count = len(batch)
    # Texts are joined row by row; images, of which samples have several, one after another.
    text, images, owners = run.join(batch.text, val.text), batch.images, batch.owners
    if len(text["input_ids"]) > count:
        images = torch.cat([images, val.images])
        owners = torch.cat([owners, val.owners + count])
    with run.batch(ids, owners={"owners": owners}) as batches:
        each = losses(model, text, images)
        run.backward(each, train_weight=1 / count, validation_weight=1 / len(val))
    return batches["dot_product"].result.total[:, 0], each[:count].mean().item()


def reference(model: nn.Module, batch: Samples, val: Samples) -> tuple[Tensor, Tensor]:
    """Return scores of a batch by autograd, one by one, and the products of norms, both `[N]`."""
    each = per_sample_gradients(model, losses(model, batch.text, batch.images) / len(batch))
    target = per_sample_gradients(model, losses(model, val.text, val.images).mean()[None])
    rows, direction = (
        torch.cat([found[name].flatten(1) for name in each], 1) for found in (each, target)
    )
    return rows @ direction[0], rows.norm(dim=1) * direction[0].norm()


def run(asked: Options) -> dict[str, Outcome]:
    """Train in both modes, and print what came of it."""
    found = {}
    for mode in MODES:
        found[mode] = outcome = train(mode, asked)
        print(
            f"{mode}: test loss {outcome.measured[0]:.3f} to {outcome.measured[asked.steps]:.3f}; "
            f"scores are within {outcome.deviation:.1e} of autograd's",
            flush=True,
        )
        for name, (value,), count in zip(
            outcome.values.groups, outcome.values.values, outcome.values.samples, strict=True
        ):
            print(f"  {name}: {count} samples, in-run value {value:.3f}")
    return found


def main(arguments: list[str] | None = None) -> None:
    """Run from the command line; exits with 2 where options or data do not fit."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    with refusals():
        run(read_options(Options, arguments, name="vision_language", description=__doc__))


if __name__ == "__main__":
    main()
