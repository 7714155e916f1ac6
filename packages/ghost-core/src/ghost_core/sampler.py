"""All that a layer needs to take part: a gradient sampler."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Size, Tensor, nn

from ghost_core.algebra import PerSampleGradient, Record
from ghost_core.errors import CaptureError


@dataclass(frozen=True)
class PastCall:
    """What is left of a call in the backward pass, where its module may have changed.

    Attributes:
        name: Dotted name of the module.
        shapes: The parameters asked for, by local name.
        static: What `record` set.
        batch_dim: Axis on which the module itself has its samples.
        autocast: Dtype of the autocast region that the module ran in; None outside of one.
    """

    name: str
    shapes: dict[str, Size]
    static: Any = None
    batch_dim: int = 0
    autocast: torch.dtype | None = None


@dataclass
class Call:
    """One execution of one tracked module.

    Attributes:
        name: Dotted name of the module.
        module: The module.
        args: Positional inputs of the module's `forward`, samples on axis 0.
        kwargs: Keyword inputs.
        outputs: The output's tensors that a gradient can reach, samples on axis 0.
        shapes: The parameters asked for, by local name. Frozen and unselected ones are absent.
        static: Whatever else the sampler needs in the backward pass, set by `record`. Tensors
            belong into records.
        batch_dim: Axis on which the module itself has its samples. Inputs and outputs with more
            axes than that come with it moved to the front.
        autocast: Dtype of the autocast region that the module ran in; None outside of one.
        before: What `prepare` returned.
    """

    name: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[Tensor, ...]
    shapes: dict[str, Size]
    static: Any = None
    batch_dim: int = 0
    autocast: torch.dtype | None = None
    before: Any = None

    def past(self) -> PastCall:
        """Return what the backward pass knows of it."""
        return PastCall(self.name, self.shapes, self.static, self.batch_dim, self.autocast)

    def argument(self, position: int, name: str) -> Any:
        """Return an input that may have come by position or by name."""
        if position < len(self.args):
            return self.args[position]
        if name in self.kwargs:
            return self.kwargs[name]
        raise CaptureError(f"{self.label} was called without its argument {name!r}")

    @property
    def label(self) -> str:
        """The module's name, for messages."""
        return self.name or "(root)"

    @property
    def or_exclude(self) -> str:
        """How to leave the module out, for the end of a remedy; nothing for the root."""
        return f", or leave it out with exclude={self.name!r}" if self.name else ""


class GradientSampler(ABC):
    """Knows what the per-sample gradients of one kind of layer look like.

    A sampler is stateless: one instance serves every layer of its kind. It never sees gradients
    of the loss before `gradients` and never touches parameters' gradients.

    Example: a linear layer in six lines.

        class LinearSampler(GradientSampler):
            parameters = ("weight", "bias")

            def record(self, call):
                return {"weight": Tokens(as_tokens(call.argument(0, "input")))}

            def gradients(self, call, records, grads):
                grad = as_tokens(grads[0])
                gradients = {"weight": Outer(records["weight"], grad, call.shapes["weight"])}
                ...
    """

    parameters: ClassVar[tuple[str, ...] | None]
    """Local names of the parameters it handles; None for whatever a module owns.

    A module that owns any other is not its kind. A dotted name such as `out_proj.weight` stands for
    a parameter of a module inside, which then needs no sampler of its own.
    """

    methods: ClassVar[tuple[str, ...]] = ("forward",)
    """Methods that make up the layer's call. A subclass that overrides one is another layer."""

    generic: ClassVar[bool] = False
    """Whether it handles any module at all, at a price, so that engines can do without it."""

    def owns(self, module: nn.Module) -> tuple[str, ...]:
        """Return the local names of the parameters it handles, of those that a module has."""
        names = own_parameters(module) if self.parameters is None else self.parameters
        present = {name for name, _ in nn.Module.named_parameters(module, remove_duplicate=False)}
        return tuple(name for name in names if name in present)

    def unfit(self, module: nn.Module) -> str | None:
        """Say why a module of the right class is another layer than the sampler is for, if it is.

        Such a module is left to the samplers of base classes, at last to those that run any module
        again; one that `refuse` refuses is left to nobody.
        """
        return None

    def refuse(self, module: nn.Module) -> str | None:
        """Say why a module of the right class cannot be handled, and what to do; None if it can."""
        return None

    replays: ClassVar[bool] = False
    """Whether it runs modules again. A graph that leads to parameters already is taken instead."""

    def batch_dims(self, module: nn.Module, outputs: int) -> tuple[int, ...] | None:
        """Return the axis of the samples in each output, where the layer itself defines it.

        Args:
            module: The module.
            outputs: Number of output tensors.

        Returns:
            One axis for each output; inputs then come as the module got them. By default None:
            samples are on the first axis, or on the one that the engine's `batch_dim` says.
        """
        return None

    def prepare(self, module: nn.Module) -> object:
        """Keep something of the state right before the module runs, as `Call.before`."""
        return None

    @abstractmethod
    def record(self, call: Call) -> Mapping[str, Record]:
        """Keep what the backward pass needs, right after the module ran.

        Args:
            call: The call, with its inputs and outputs. Inputs are to be kept as the kernel saw
                them: under autocast, in the dtype of the output.

        Returns:
            Records by parameter name, for parameters in `call.shapes` only. Those that need
            nothing but the output gradient may be left out. An `InputFactor` can be compressed in
            the forward pass; any other record is kept as it is.
        """

    @abstractmethod
    def gradients(
        self, call: PastCall, records: Mapping[str, Record], grads: Sequence[Tensor | None]
    ) -> Mapping[str, PerSampleGradient]:
        """Return the per-sample gradients.

        Args:
            call: What is left of the call.
            records: What `record` kept. A factor may come back compressed, as `Tokens`.
            grads: Gradient of the loss for each output, of its shape and dtype; None for outputs
                that the loss does not depend on, never for all of them.

        Returns:
            One entry for each parameter in `call.shapes`.
        """


def own_parameters(module: nn.Module) -> tuple[str, ...]:
    """Return the local names of a module's own parameters, dotted for those that it holds apart.

    A parametrised `weight` is computed from `parametrizations.weight.original`, and lists and
    dictionaries of parameters are modules, though nobody calls them. Names are those of modules and
    attributes, whatever a class with a `named_parameters` of its own says: torch's
    `checkpoint_wrapper` leaves itself out of them, as if it owned what is inside.
    """
    return tuple(
        name
        for name, _ in nn.Module.named_parameters(module, remove_duplicate=False)
        if name.startswith("parametrizations.") or _holders_only(module, name)
    )


def _holders_only(module: nn.Module, name: str) -> bool:
    """Tell whether there are only lists and dictionaries between a module and a parameter."""
    for part in name.split(".")[:-1]:
        module = module.get_submodule(part)
        if not isinstance(module, nn.ParameterList | nn.ParameterDict):
            return False
    return True


def as_tokens(values: Tensor) -> Tensor:
    """Fold all axes between samples and features into tokens: `[N, ..., d]` to `[N, T, 1, d]`."""
    if values.dim() == 3:  # as nearly all have
        return values.unsqueeze(2)
    shape = values.shape
    return values.reshape(shape[0], shape[1:-1].numel(), 1, shape[-1])
