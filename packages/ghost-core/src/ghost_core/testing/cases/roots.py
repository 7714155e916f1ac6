"""Small models around layers: for layers that share, repeat or dress up what they are given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ghost_core.testing.examples import VOCABULARY


class Unseen(torch.autograd.Function):
    """Returns what it is given, and nobody sees how: what is made of it cannot be followed."""

    @staticmethod
    def forward(ctx: Any, given: Tensor) -> Tensor:
        """Return a copy."""
        return given.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """Return the gradient."""
        return grad


class Around(nn.Module):
    """Has one layer, named `inner`."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner


class Wrapped(Around):
    """Calls one layer, and nothing else."""

    def forward(self, inputs: Tensor) -> Any:
        """Call the layer."""
        return self.inner(inputs)


class Repeated(Around):
    """Calls a layer that keeps shapes several times on its own output."""

    def __init__(self, inner: nn.Module, times: int = 2) -> None:
        super().__init__(inner)
        self.times = times

    def forward(self, inputs: Tensor) -> Any:
        """Call the layer, with a nonlinearity before every further call."""
        outputs = self.inner(inputs)
        for _ in range(self.times - 1):
            outputs = self.inner(torch.tanh(outputs))
        return outputs


class TwoViews(Around):
    """Calls a layer on its inputs and on another view of the samples."""

    def forward(self, inputs: Tensor) -> Any:
        """Return both outputs."""
        return self.inner(inputs), self.inner(inputs.flip(1)[:, :-1])


class Transposed(Around):
    """Gives a layer inputs whose last axes are exchanged, so that they are not contiguous."""

    def forward(self, inputs: Tensor) -> Any:
        """Call the layer."""
        return self.inner(inputs.mT)


class Sorted(Around):
    """Calls a layer on the samples in another order, which depends on them."""

    def forward(self, inputs: Tensor) -> Any:
        """Call the layer."""
        order = inputs.flatten(1).sum(1).argsort()
        return self.inner(inputs[order])[order.argsort()]


class Strided(Around):
    """Gives a layer every second entry of the last axis."""

    def forward(self, inputs: Tensor) -> Any:
        """Call the layer."""
        return self.inner(inputs[..., ::2])


class Expanded(Around):
    """Gives a layer one token three times, without copying it: `[N, d]` to `[N, 3, d]`."""

    def forward(self, inputs: Tensor) -> Any:
        """Call the layer, then make the tokens' gradients different."""
        outputs = self.inner(inputs.unsqueeze(1).expand(-1, 3, -1))
        return outputs * torch.arange(1, 4, dtype=outputs.dtype)[:, None]


class ChannelsLast(Around):
    """Gives a convolution inputs, and a weight, in the memory format with channels last."""

    def __init__(self, inner: nn.Module, memory_format: torch.memory_format) -> None:
        super().__init__(inner.to(memory_format=memory_format))  # type: ignore[call-overload]
        self.memory_format = memory_format

    def forward(self, inputs: Tensor) -> Any:
        """Call the layer."""
        inputs = inputs.contiguous(memory_format=self.memory_format)
        assert not inputs.is_contiguous()
        return self.inner(inputs)


class Named(Around):
    """Gives a layer its input by keyword."""

    def __init__(self, inner: nn.Module, name: str = "input") -> None:
        super().__init__(inner)
        self.name = name

    def forward(self, inputs: Tensor) -> Any:
        """Call the layer."""
        return self.inner(**{self.name: inputs})


class InPlace(Around):
    """Changes a layer's output in place."""

    def forward(self, inputs: Tensor) -> Any:
        """Call the layer."""
        outputs = self.inner(inputs)
        outputs *= 2
        return outputs.relu_() + 1


class Residual(Around):
    """Adds a layer's output in place to a copy of its input."""

    def forward(self, inputs: Tensor) -> Any:
        """Call the layer."""
        hidden = inputs.clone()
        hidden += self.inner(inputs)
        return hidden


class AsDict(Around):
    """Returns a layer's output in a mapping, beside one that nothing depends on."""

    def forward(self, inputs: Tensor) -> Any:
        """Call the layer."""
        outputs = self.inner(inputs)
        return {"hidden": outputs, "size": outputs.shape[0], "aside": outputs.detach()}


class AsTuple(Around):
    """Returns two functions of a layer's output."""

    def forward(self, inputs: Tensor) -> Any:
        """Call the layer."""
        outputs = self.inner(inputs)
        return outputs.sin(), [outputs.flatten(1).sum(1)]


class Gated(Around):
    """Multiplies a layer's output by a second, given input; a third one may be left out."""

    def forward(self, inputs: Tensor, gate: Tensor, shift: Tensor | None = None) -> Any:
        """Call the layer."""
        outputs = self.inner(inputs) * gate
        return outputs if shift is None else outputs + shift


class Checkpointed(Around):
    """Recomputes a layer in the backward pass."""

    def __init__(self, inner: nn.Module, use_reentrant: bool = False) -> None:
        super().__init__(inner)
        self.use_reentrant = use_reentrant

    def forward(self, inputs: Tensor) -> Any:
        """Call the layer."""
        return checkpoint(self.inner, inputs, use_reentrant=self.use_reentrant)


class PartlyDetached(Around):
    """Uses a layer three times: with gradients, detached, and with gradients disabled."""

    def forward(self, inputs: Tensor) -> Any:
        """Call the layer."""
        with torch.no_grad():
            first = self.inner(inputs)
        return self.inner(inputs) * first + self.inner(-inputs).detach()


class Tied(nn.Module):
    """A table of embeddings whose weight is that of the head."""

    def __init__(self, bias: bool = False, width: int = 6, padding_idx: int | None = None) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, width, padding_idx=padding_idx)
        self.head = nn.Linear(width, VOCABULARY, bias=bias)
        self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Any:
        """Return logits."""
        return self.head(torch.tanh(self.table(tokens)))


class TiedBag(nn.Module):
    """A table of bags whose weight is that of a table of embeddings and of the head."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(VOCABULARY, 6, mode=mode)
        self.table = nn.Embedding(VOCABULARY, 6)
        self.head = nn.Linear(6, VOCABULARY, bias=False)
        self.table.weight = self.head.weight = self.bag.weight

    def forward(self, tokens: Tensor) -> Any:
        """Return logits."""
        hidden = self.table(tokens) + self.bag(tokens).unsqueeze(1)
        return self.head(torch.tanh(hidden))


class TwoNames(nn.Module):
    """One layer under two names."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.first = self.second = inner

    def forward(self, inputs: Tensor) -> Any:
        """Call the layer under both."""
        return self.second(torch.tanh(self.first(inputs)))


class Sharing(nn.Module):
    """Two layers in a row, of which the second takes some parameters of the first."""

    def __init__(self, first: nn.Module, second: nn.Module, *names: str) -> None:
        super().__init__()
        self.first, self.second = first, second
        for name in names:
            setattr(second, name, getattr(first, name))

    def forward(self, inputs: Tensor) -> Any:
        """Call both."""
        return self.second(torch.tanh(self.first(inputs)))


class OneStorage(nn.Module):
    """Two linear maps whose weights are separate parameters in one storage, one transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 6)
        self.second.weight = nn.Parameter(self.first.weight.detach().mT)

    def forward(self, inputs: Tensor) -> Any:
        """Call both."""
        return self.second(torch.tanh(self.first(inputs)))


class WithPositions(Around):
    """Adds embeddings of positions, which are computed once for all samples."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__(inner)
        self.positions = nn.Embedding(5, 6)

    def forward(self, inputs: Tensor) -> Any:
        """Call the layer on inputs with positions."""
        places = torch.arange(inputs.shape[1], device=inputs.device)[None]
        return self.inner(inputs + self.positions(places))


class Branches(nn.Module):
    """Calls layers on one input and adds what they return."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, inputs: Tensor) -> Any:
        """Call all of them."""
        return torch.stack([layer(inputs) for layer in self.layers]).sum(0)


class SequenceFirst(Around):
    """Gives a layer the samples on axis 1, as in `[T, N, d]`; takes and returns `[N, T, ...]`."""

    def forward(self, inputs: Tensor, *others: Tensor) -> Any:
        """Call the layer, and return its first output."""
        outputs = self.inner(*(each.transpose(0, 1) for each in (inputs, *others)))
        outputs = outputs[0] if isinstance(outputs, tuple) else outputs
        return outputs.transpose(0, 1)


class Folded(Around):
    """Folds the first two axes, `[N, T, d]` or `[T, N, d]`, into rows."""

    def forward(self, inputs: Tensor) -> Any:
        """Call the layer on the rows, and unfold its output."""
        outputs = self.inner(inputs.flatten(0, 1))
        return outputs.unflatten(0, inputs.shape[:2])


class SeveralRows(Around):
    """Gives a layer rows, `[R, ...]`, of which samples own any number, and adds them up."""

    def forward(self, inputs: Tensor, rows: Tensor, owner: Tensor) -> Any:
        """Add the sum of the sample's rows to its input, `[N, p]`."""
        return inputs.index_add(0, owner, self.inner(rows).flatten(1))


def around(
    root: Callable[..., nn.Module], make: Callable[[], nn.Module], *arguments: Any
) -> Callable[[], nn.Module]:
    """Return a function that makes a layer and puts it into a model."""
    return lambda: root(make(), *arguments)


def evaluated(norm: nn.Module) -> nn.Module:
    """Put a norm into evaluation mode, with running statistics that are not zeros and ones."""
    mean, variance = norm.get_buffer("running_mean"), norm.get_buffer("running_var")
    mean.copy_(torch.linspace(-1, 1, len(mean)))
    variance.copy_(torch.linspace(0.5, 2, len(variance)))
    return norm.eval()
