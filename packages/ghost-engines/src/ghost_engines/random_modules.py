"""Finds the modules that draw random numbers in training mode, as dropout does."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn


def random_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return, by name, modules that are set up to drop something at random in training mode.

    They are told by their settings: a positive probability with "drop" in its name, as
    `nn.MultiheadAttention.dropout`, or `p` in a class with "drop" in its name.
    """
    return {name or "(root)": module for name, module in model.named_modules() if _drops(module)}


def drawing(modules: Mapping[str, nn.Module]) -> tuple[str, ...]:
    """Return the names of those that are in training mode."""
    return tuple(name for name, module in modules.items() if module.training)


def _drops(module: nn.Module) -> bool:
    is_dropout = "drop" in type(module).__name__.lower()
    return any(
        isinstance(value, float | int) and not isinstance(value, bool) and 0 < value <= 1
        for key, value in vars(module).items()
        if "drop" in key or (is_dropout and key == "p")
    )
