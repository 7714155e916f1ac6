"""What an engine must leave as it was: hooks, flags, random number generators, memory."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from ghost_core.state import random_state_kept, seed_generators


def traces(model: nn.Module) -> dict[str, object]:
    """Describe what an engine could leave behind on a model: hooks, attributes and flags."""
    found: dict[str, object] = {}
    for name, module in model.named_modules():
        found[f"attributes of {name or 'the model'}"] = sorted(vars(module))
        for attribute, value in vars(module).items():
            if "_hooks" in attribute and isinstance(value, dict):
                found[f"{attribute} of {name or 'the model'}"] = sorted(value)
    for name, parameter in model.named_parameters():
        found[f"requires_grad of {name}"] = parameter.requires_grad
        found[f"attributes of {name}"] = sorted(vars(parameter))
        for attribute in ("_backward_hooks", "_post_accumulate_grad_hooks"):
            found[f"{attribute} of {name}"] = len(getattr(parameter, attribute) or ())
    return found


def assert_untouched(before: dict[str, object], model: nn.Module, when: str) -> None:
    """Assert that a model is as `traces` found it.

    Raises:
        AssertionError: Naming what changed.
    """
    after = traces(model)
    for what in before.keys() | after.keys():
        if before.get(what) != after.get(what):
            raise AssertionError(
                f"{when}: {what} changed from {before.get(what)} to {after.get(what)}"
            )


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed every global random number generator inside; restore them afterwards."""
    with random_state_kept():
        seed_generators(seed)
        yield


class Watched:
    """Watches the storages of all activations of a model and of their gradients.

    Looking at storages, not at tensors, also finds what the graph or a view keeps alive.
    """

    def __init__(self, model: nn.Module) -> None:
        self._storages: dict[str, list[StorageWeakRef]] = {}
        self._model = model

    def __enter__(self) -> Watched:
        self._handles = [
            module.register_forward_hook(self._hook(name), with_kwargs=True)
            for name, module in self._model.named_modules()
            if not list(module.children())
        ]
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()

    @property
    def count(self) -> int:
        """Number of storages seen."""
        return sum(map(len, self._storages.values()))

    def alive(self) -> list[str]:
        """Return what is alive still."""
        gc.collect()
        return [
            what
            for what, storages in self._storages.items()
            if any(not storage.expired() for storage in storages)
        ]

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            for leaf in tree_leaves((args, kwargs)):
                self._see(f"input of {name}", leaf)
            for leaf in tree_leaves(output):
                self._see(f"output of {name}", leaf)
                if isinstance(leaf, Tensor) and leaf.requires_grad:
                    leaf.register_hook(lambda grad: self._see(f"gradient of {name}", grad))

        return hook

    def _see(self, what: str, value: object) -> None:
        if isinstance(value, Tensor) and value.is_floating_point():
            storage = StorageWeakRef(value.untyped_storage())
            self._storages.setdefault(what, []).append(storage)


def live_tensors() -> int:
    """Return how many tensors Python can reach."""
    gc.collect()
    return sum(issubclass(type(each), Tensor) for each in gc.get_objects())
