"""What tells two examples apart, other than their sizes."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from ghost_core.testing.examples import LayerExample, losses
from ghost_core.tracking import dotted_name

_SIZES = {
    "in_features", "out_features", "in1_features", "in2_features", "in_channels", "out_channels",
    "num_embeddings", "embedding_dim", "num_features", "num_channels", "embed_dim", "head_dim",
    "num_heads", "kdim", "vdim", "input_size", "hidden_size", "normalized_shape", "num_groups",
    "groups", "kernel_size",
}  # fmt: skip
"""Attributes that are sizes, or of which `_relations` says what is no size in them."""

_SAMPLES = 11
"""Number of samples that keys are found with; no other size in the table is as large by chance."""

_MODES = {"p", "dropout", "track_running_stats"}
"""Attributes by which a module that does not count batches differs between its modes."""


def semantic_key(example: LayerExample) -> Hashable:
    """Return what an example is, without names and sizes: equal keys, equal semantics.

    It is made of the classes of all modules and their options, in which numbers count as none,
    one or several; the modes of those that have any; the rank, flag and sharing of
    each parameter; and how each module is called: how often, with inputs of which structure,
    dtypes, ranks and memory layouts, on which axis the samples are, and whether there are as many
    tokens as samples.
    """
    n = example.n if example.refusal is not None else _SAMPLES
    module, inputs = example.build(), example.draw(n)
    calls = _watched_calls(module, n)
    known: dict[nn.Parameter, int] = {}
    # Looked at before the call, which may change buffers, modes of lazy layers and the like.
    described = [(each, _described(each, known)) for each in module.modules()]
    try:
        losses(example, module, inputs)
    except Exception as error:
        if example.refusal is None:
            raise
        calls[module].append((type(error).__name__,))
    finally:
        for handle in calls.pop(None, []):
            handle.remove()
    modules = tuple((*what, tuple(calls.get(each, ()))) for each, what in described)
    return (
        modules,
        tuple(f"{name}={value}" for name, value in sorted(example.options.items())),
        example.refusal is None,
    )


def _described(module: nn.Module, known: dict[nn.Parameter, int]) -> tuple[Hashable, ...]:
    parameters = tuple(
        (name, parameter.dim(), parameter.requires_grad, known.setdefault(parameter, len(known)))
        for name, parameter in module.named_parameters(recurse=False)
    )
    names = ", ".join(name for name, _ in module.named_buffers(recurse=False))
    children = tuple(module._modules)
    return (
        dotted_name(type(module)),
        tuple(_options(module)),
        tuple(_relations(module)),
        parameters,
        names,
        len(children),
        module.training if _has_modes(module) else None,
    )


def _has_modes(module: nn.Module) -> bool:
    return any(getattr(module, name, 0) not in (0, False) for name in _MODES) or any(
        hasattr(module, name) for name in ("running_mean", "n_power_iterations")
    )


def _options(module: nn.Module) -> Iterator[tuple[str, Hashable]]:
    for name, value in sorted(vars(module).items()):
        if not name.startswith("_") and name not in (*_SIZES, "training"):
            index = name == "padding_idx" and value is not None
            yield name, "a row" if index else _option(value)


def _option(value: object) -> Hashable:
    """Describe a value of an attribute by what is not a size in it."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, int):
        return _count(value)
    if isinstance(value, float):
        return value if value in (0, 1, 2, math.inf) else "number"
    if isinstance(value, tuple | list):
        every = tuple(_option(each) for each in value)
        return every[0] if len(set(every)) == 1 else every
    return getattr(value, "__qualname__", type(value).__qualname__)


def _count(value: int) -> str:
    return str(value) if value in (0, 1) else "several"


def _relations(module: Any) -> Iterator[tuple[str, Hashable]]:
    """Describe how sizes of a module relate to each other."""
    groups = getattr(module, "groups", None)
    if groups is not None and groups > 1:
        depthwise, multiplied = groups == module.in_channels, module.out_channels > groups
        yield "groups", ("depthwise" if depthwise else "some", depthwise and multiplied)
    if hasattr(module, "num_groups"):
        one, each = module.num_groups == 1, module.num_groups == module.num_channels
        yield "num_groups", "one" if one else "channels" if each else "some"
    if hasattr(module, "normalized_shape"):
        yield "normalized axes", len(module.normalized_shape)
    if isinstance(getattr(module, "kernel_size", None), tuple):
        same = module.padding == "same"
        yield "kernel", tuple(k % 2 == 0 if same else _count(k) for k in module.kernel_size)
        gaps = [s > k for s, k in zip(module.stride, module.kernel_size, strict=True)]
        yield "beyond the kernel", any(gaps)
    if isinstance(module, nn.MultiheadAttention):
        yield "one width", module.kdim == module.vdim == module.embed_dim


def _watched_calls(module: nn.Module, n: int) -> dict[Any, list[Any]]:
    """Watch how modules are called; the handles of the hooks are under None."""
    calls: dict[Any, list[Any]] = {None: [], module: []}

    def watch(each: nn.Module) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            leaves, structure = tree_flatten((args, kwargs))
            inputs = tuple(_leaf(leaf, n) for leaf in leaves)
            calls.setdefault(each, []).append(
                (str(structure), inputs, _tokens(each, args, output, n))
            )

        return hook

    for each in module.modules():
        if each is module or list(each.parameters(recurse=False)):
            calls[None].append(each.register_forward_hook(watch(each), with_kwargs=True))
    return calls


def _leaf(leaf: object, n: int) -> Hashable:
    """Describe an input: kind, dtype, rank, layout, and where its samples are."""
    if not isinstance(leaf, Tensor):
        return _option(leaf)
    samples = next((axis for axis, size in enumerate(leaf.shape) if size == n), None)
    if n > 1 and leaf.dim() and leaf.shape[0] == 1:
        samples = -1  # one row for all
    return (str(leaf.dtype), leaf.dim(), _layout(leaf), samples, torch.is_grad_enabled())


def _layout(leaf: Tensor) -> str:
    if leaf.is_contiguous():
        return "contiguous"
    sizes = zip(leaf.shape, leaf.stride(), strict=True)
    if any(stride == 0 for size, stride in sizes if size > 1):
        return "expanded"
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if leaf.dim() in formats and leaf.is_contiguous(memory_format=formats[leaf.dim()]):
        return "channels last"
    return "strided"


def _tokens(module: nn.Module, args: tuple[Any, ...], output: Any, n: int) -> bool:
    """Tell whether a call has as many tokens, positions or entries of bags as samples."""
    if isinstance(module, nn.EmbeddingBag):
        return bool(args[0].shape[1:].numel() == n > 1)
    if not isinstance(output, Tensor) or output.dim() < 3:
        return False
    channels = {"in_channels", "num_channels", "num_features"}
    positions = output.shape[2:] if channels & vars(module).keys() else output.shape[1:-1]
    return positions.numel() == n > 1
