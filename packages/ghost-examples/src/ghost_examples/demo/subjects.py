"""The demo's two models as subjects of the receipt."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ghost_examples.demo import convnet, passages
from ghost_examples.demo.annotator import annotate
from ghost_examples.demo.receipt import Subject


def digits_subject(recipe: convnet.Recipe, device: str) -> Subject:
    """Return the convolutional network before training, as the first part trains it."""
    data = annotate(0, device=device)

    def losses(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(model(images), labels, reduction="none")

    return Subject(
        name="ConvNet on digits",
        model=convnet.new_model(0, device),
        inputs=data.train.images,
        labels=data.train.labels,
        held_out=(data.clean.images, data.clean.labels),
        losses=losses,
        batch=recipe.batch,
        lr=recipe.lr,
    )


def passages_subject(plan: passages.Plan, device: str) -> Subject:
    """Return the GPT-2 before training, all parameters tracked."""
    kept, held_out = passages.split(plan)
    tokens = passages.as_tokens(kept[:: max(1, len(kept) // 256)], device)
    queries = passages.as_tokens(held_out[:: max(1, len(held_out) // plan.batch)], device)

    def losses(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        return passages.per_sample_loss(model, inputs)

    return Subject(
        name="GPT-2 on passages",
        model=passages.new_model(plan, device),
        inputs=tokens,
        labels=tokens,
        held_out=(queries, queries),
        losses=losses,
        batch=plan.batch,
        lr=0.1,
    )
