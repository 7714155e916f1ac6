"""What has no gradients by sample, or none that can be seen, and must be refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor, nn

from ghost_core.testing.cases import roots
from ghost_core.testing.examples import VOCABULARY, N, indices, named, normal
from ghost_core.testing.examples import LayerExample as Example


class Centred(roots.Around):
    """Subtracts the mean over the batch."""

    def forward(self, inputs: Tensor) -> Any:
        """Call the layer."""
        outputs = self.inner(inputs)
        return outputs - outputs.mean(0)


class OwnNorm(nn.BatchNorm1d):
    """Normalises over the batch by code of its own."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Normalise."""
        return (inputs - inputs.mean(0)) * self.weight + self.bias


class Contrasted(roots.Around):
    """Compares all samples with each other, as contrastive losses do."""

    def forward(self, inputs: Tensor) -> Any:
        """Return similarities, `[N, N]`."""
        outputs = self.inner(inputs)
        return outputs @ outputs.mT


class WithoutGradients(roots.Around):
    """Calls a layer with gradients disabled, and one with gradients."""

    def __init__(self, inner: nn.Module, head: nn.Module) -> None:
        super().__init__(inner)
        self.head = head

    def forward(self, inputs: Tensor) -> Any:
        """Call both."""
        with torch.no_grad():
            outputs = self.inner(inputs)
        return self.head(outputs)


_GENERATOR = Generator().manual_seed(0)


class Noise(nn.Module):
    """Draws from a generator that is neither global nor its own, and has to be run again."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, inputs: Tensor) -> Any:
        """Multiply by noise."""
        noise = torch.rand(inputs.shape, dtype=inputs.dtype, generator=_GENERATOR)
        return inputs * roots.Unseen.apply(self.scale) * noise  # type: ignore[no-untyped-call]


def _replaced() -> nn.Module:
    """Make a linear layer whose `forward` was replaced by a function that holds its weight."""
    module = nn.Linear(6, 7, bias=False)
    weight = module.weight
    module.forward = lambda inputs: inputs @ roots.Unseen.apply(weight).mT  # type: ignore[method-assign,assignment,no-untyped-call]
    return roots.Wrapped(module)


class Recursive(nn.Module):
    """Calls itself."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6))

    def forward(self, inputs: Tensor, depth: int = 2) -> Any:
        """Multiply, as often as told."""
        outputs = torch.tanh(inputs @ self.weight)
        return self(outputs, depth - 1) if depth > 1 else outputs


_TOKENS, _FLAT = (normal(N, 3, 6),), (normal(N, 6),)
_linear = partial(nn.Linear, 6, 7)
_BATCH = r"normalises over the batch"
_FIRST_AXIS = r"first axis (of its output )?is not the samples"
_NO_SAMPLES = r"without an axis for samples"


def _over_the_batch() -> Iterator[Example]:
    yield Example("batch norm 1d in training", lambda: nn.BatchNorm1d(6), _FLAT, refusal=_BATCH)
    yield Example(
        "batch norm 2d in training",
        lambda: nn.BatchNorm2d(6),
        (normal(N, 6, 2, 3),),
        refusal=_BATCH,
    )
    yield Example(
        "batch norm without running statistics",
        lambda: nn.BatchNorm1d(6, track_running_stats=False).eval(),
        _FLAT,
        refusal=_BATCH,
    )
    yield Example(
        "linear, behind a batch norm in training",
        lambda: nn.Sequential(_linear(), nn.BatchNorm1d(7, affine=False)),
        _FLAT,
        refusal=_BATCH,
    )
    yield Example(
        "normalised by its own code",
        lambda: nn.Sequential(nn.Linear(6, 6), OwnNorm(6)),
        _FLAT,
        refusal=_BATCH,
    )
    yield Example("centred over the batch", lambda: Centred(_linear()), _TOKENS, refusal="mixes")
    yield Example(
        "contrasted over the batch", lambda: Contrasted(_linear()), _FLAT, refusal="mixes"
    )


def _other_axes() -> Iterator[Example]:
    yield Example(
        "sequence first, undeclared",
        lambda: roots.SequenceFirst(_linear()),
        _TOKENS,
        refusal=_FIRST_AXIS,
    )
    yield Example(
        "sequence first, undeclared, as many tokens as samples",
        lambda: roots.SequenceFirst(_linear()),
        (normal(N, N, 6),),
        refusal=_FIRST_AXIS,
    )
    unbatched: dict[str, tuple[Callable[[], nn.Module], int, tuple[int, ...]]] = {
        "linear": (lambda: nn.Linear(6, 6), 6, (N,)),
        "conv1d": (lambda: nn.Conv1d(4, 4, 2), 4, (N, 5)),
        "conv2d": (lambda: nn.Conv2d(4, 4, 2), 4, (N, 5, 3)),
        "layer norm": (lambda: nn.LayerNorm((3, 2)), 3, (N, 2)),
        "instance norm": (lambda: nn.InstanceNorm1d(4, affine=True), 4, (N, 5)),
    }
    for name, (make, n, shape) in unbatched.items():
        yield Example(f"{name}, unbatched", make, (normal(*shape),), n=n, refusal=_NO_SAMPLES)


def _tables() -> Iterator[Example]:
    inputs, by_frequency = (indices(N, 6),), "set scale_grad_by_freq=False"
    yield Example(
        "embedding, scaled by frequency",
        lambda: nn.Embedding(VOCABULARY, 5, scale_grad_by_freq=True),
        inputs,
        refusal=by_frequency,
    )
    yield Example(
        "embedding bag, scaled by frequency",
        lambda: nn.EmbeddingBag(VOCABULARY, 5, scale_grad_by_freq=True),
        inputs,
        refusal=by_frequency,
    )


def _unseen() -> Iterator[Example]:
    square = partial(nn.Linear, 6, 6)
    yield Example(
        "gradients disabled",
        lambda: WithoutGradients(square(), _linear()),
        _TOKENS,
        refusal="only with gradients disabled",
    )
    yield Example(
        "recomputed by reentrant checkpointing",
        lambda: roots.Checkpointed(_linear(), use_reentrant=True),
        _TOKENS,
        refusal="use_reentrant=False",
    )
    yield Example("generator of the program", Noise, _TOKENS, refusal="generator")
    yield Example(
        "forward that holds the layer", _replaced, _TOKENS, refusal="another place than its param"
    )
    with_hooks: dict[str, Callable[[nn.Module], nn.Module]] = {
        "weight norm": nn.utils.weight_norm,
        "spectral norm": nn.utils.spectral_norm,
    }
    for name, add in with_hooks.items():
        yield Example(
            f"{name}, by a hook", partial(_by_hook, add), _TOKENS, refusal="parametrizations"
        )
    yield Example("recursive", Recursive, _TOKENS, refusal="called itself")


def _by_hook(add: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """Make a layer whose weight is computed by a hook, as torch did before parametrisations."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return add(_linear())


REFUSED = named("refused", [*_over_the_batch(), *_other_axes(), *_tables(), *_unseen()])
