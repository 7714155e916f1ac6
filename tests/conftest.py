"""What the tests across packages share: small models and comparisons with autograd."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from ghost_core.testing import agreeing_gradients, assert_within
from ghost_engines import DotProductEngine, ProjectionEngine


@dataclass(frozen=True)
class Task:
    """A model in float64, a batch of N samples, and a validation loss.

    Attributes:
        model: The model, in evaluation mode.
        n: Number of samples N.
        losses: Runs the model on the samples `[n, ...]` at the given places and returns their
            losses, `[n]`.
        validation_loss: Runs the model on several other samples and returns their mean loss.
    """

    model: nn.Module
    n: int
    losses: Callable[[slice], Tensor]
    validation_loss: Callable[[], Tensor]

    def all_losses(self) -> Tensor:
        """Run the model on the whole batch."""
        return self.losses(slice(0, self.n))

    def reference(self) -> dict[str, Tensor]:
        """Return the gradients `[N, *shape]`, on which two oracles agree.

        One asks autograd for each sample's gradient over one forward pass, the other one runs
        every sample alone.
        """
        gradients = agreeing_gradients(
            self.model, self.all_losses(), lambda at: self.losses(slice(at, at + 1))[0]
        )
        assert gradients
        for name, gradient in gradients.items():
            nonzero = gradient.flatten(1).norm(dim=1) > 0
            assert nonzero.any(), f"the reference of {name} is zero, so nothing would be tested"
        return gradients

    def direction(self) -> dict[str, Tensor]:
        """Return the gradient of the validation loss by parameter name."""
        named = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        gradients = torch.autograd.grad(self.validation_loss(), list(named.values()))
        return dict(zip(named, gradients, strict=True))


def check_dots(
    task: Task, kind: type[DotProductEngine] = DotProductEngine, *, verify: bool = True
) -> None:
    """Assert that an engine's dots with a validation gradient are exact, for every parameter."""
    reference, direction = task.reference(), task.direction()
    generator = torch.Generator().manual_seed(0)
    drawn = {
        name: torch.randn(vector.shape, dtype=torch.float64, generator=generator)
        for name, vector in direction.items()
    }
    engine = kind(task.model, verify=verify)
    engine.add_direction("validation", task.validation_loss)
    engine.add_direction("random", drawn)
    with engine, engine.batch(range(task.n)) as batch:
        task.all_losses().sum().backward()
    task.model.zero_grad()
    assert batch.result.by_parameter.keys() == reference.keys()
    total = bound = torch.zeros(())
    for name, gradient in reference.items():
        rows = gradient.flatten(1)
        vectors = torch.stack([direction[name].flatten(), drawn[name].flatten()], 1)
        scale = rows.norm(dim=1)[:, None] * vectors.norm(dim=0)
        assert_within(
            batch.result.by_parameter[name], rows @ vectors, scale, what=f"dots of {name}"
        )
        total, bound = total + rows @ vectors, bound + scale
    assert_within(batch.result.total, total, bound, what="total")


def check_rows(
    task: Task, kind: type[ProjectionEngine] = ProjectionEngine, *, verify: bool = True
) -> None:
    """Assert that an engine's rows are `L g Rᵀ`, for every parameter, in training and frozen."""
    reference = task.reference()
    engine = kind(task.model, dim=24, min_dim=3, dtype="float64", verify=verify)
    with engine, engine.batch(range(task.n)) as beside:
        task.all_losses().sum().backward()
    task.model.zero_grad()
    with engine.frozen(), engine.batch(range(task.n)) as frozen:
        task.all_losses().sum().backward()
    assert {block.parameter for block in engine.layout} == reference.keys()
    assert any(block.size < block.shape.numel() for block in engine.layout)
    for block in engine.layout:
        left, right = engine.maps(block.parameter)
        matrices = reference[block.parameter].reshape(task.n, left.shape[1], right.shape[1])
        expected = (left @ matrices @ right.mT).flatten(1)
        maps = torch.linalg.matrix_norm(left, 2) * torch.linalg.matrix_norm(right, 2)
        scale = matrices.flatten(1).norm(dim=1)[:, None] * maps
        for how, batch in (("beside training", beside), ("frozen", frozen)):
            rows = batch.result.rows[:, block.columns]
            assert_within(rows, expected, scale, what=f"rows of {block.parameter}, {how}")


@pytest.fixture
def assert_dots() -> Callable[..., None]:
    return check_dots


@pytest.fixture
def assert_rows() -> Callable[..., None]:
    return check_rows


@pytest.fixture
def make_task() -> type[Task]:
    return Task


@pytest.fixture
def convolutions(make_task: type[Task]) -> Task:
    """A small ConvNet with in-place activations, groups, dilation and a pooled head."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 8, 3, padding=2, dilation=2, groups=2, bias=False),
        nn.GroupNorm(2, 8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 6, (3, 2), stride=(2, 1)),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(24, 5),
    )
    return classification(model.double().eval(), torch.randn(6, 2, 8, 7, dtype=torch.float64))


def classification(model: nn.Module, inputs: Tensor) -> Task:
    """Make a task of sorting inputs into five classes."""
    labels = torch.arange(len(inputs)) % 5
    others = inputs.flip(-1) * 0.7 + 0.1

    def losses(samples: slice) -> Tensor:
        logits = model(inputs[samples])
        return nn.functional.cross_entropy(logits, labels[samples], reduction="none")

    def validation_loss() -> Tensor:
        return nn.functional.cross_entropy(model(others), labels)

    return Task(model, len(inputs), losses, validation_loss)


def language_task(
    model: nn.Module, vocabulary: int, n: int, length: int, padding_side: str = "right"
) -> Task:
    """Make a next-token task on padded sequences with attention masks; lengths differ."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, vocabulary, (n, length), generator=generator)
    others = torch.randint(1, vocabulary, (3, length), generator=generator)
    mask, others_mask = torch.ones_like(tokens), torch.ones_like(others)
    for sample in range(n):
        padding = sample % (length - 2)
        mask[sample, :padding] = 0
    others_mask[1, :2] = 0
    if padding_side == "right":
        mask, others_mask = mask.flip(1), others_mask.flip(1)
    tokens, others = tokens * mask, others * others_mask

    def next_token_losses(ids: Tensor, attention: Tensor) -> Tensor:
        logits = model(input_ids=ids, attention_mask=attention).logits
        assert logits.dtype == torch.float64
        targets = ids.masked_fill(attention == 0, -100)[:, 1:]
        each = nn.functional.cross_entropy(logits[:, :-1].mT, targets, reduction="none")
        return each.sum(1) / (targets != -100).sum(1)

    def losses(samples: slice) -> Tensor:
        return next_token_losses(tokens[samples], mask[samples])

    def validation_loss() -> Tensor:
        return next_token_losses(others, others_mask).mean()

    return Task(model, n, losses, validation_loss)


def tiny_gpt2(**options: object) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=23, n_positions=16, n_embd=12, n_layer=2, n_head=2,
        bos_token_id=1, eos_token_id=1, **options,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def tiny_llama(**options: object) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=23, hidden_size=12, intermediate_size=20, num_hidden_layers=2,
        num_attention_heads=3, max_position_embeddings=32,
        bos_token_id=1, eos_token_id=1, **options,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


MODELS: dict[str, Callable[..., nn.Module]] = {"gpt2": tiny_gpt2, "llama": tiny_llama}


@pytest.fixture
def make_model() -> Callable[..., nn.Module]:
    """Make a tiny language model of transformers by name, with default options."""
    return lambda name, **options: MODELS[name](**options)


@pytest.fixture
def make_language_task() -> Callable[..., Task]:
    """Make a task for a tiny language model in float64."""

    def make(name: str, n: int = 5, length: int = 8, padding_side: str = "right") -> Task:
        return language_task(MODELS[name]().double().eval(), 23, n, length, padding_side)

    return make
