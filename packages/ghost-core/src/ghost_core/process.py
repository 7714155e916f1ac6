"""What ghost sets in the whole process for a while, whatever other threads do meanwhile.

Some of the names of torch are private: they are there from torch 2.11 to 2.13.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import torch
from torch.nn.utils import parametrize

from ghost_core.restoring import restored, undo
from ghost_core.switches import Switch, Switches

# float32 products


def _exact_products() -> Iterator[Switch]:
    # Reading the older settings is an error once the newer ones were used; this way both work.
    # `torch.backends` calls these functions, at six times the time, and they are called often.
    read, write = torch._C._get_fp32_precision_getter, torch._C._set_fp32_precision_setter
    backends = {"cuda": ("matmul", "conv", "rnn"), "mkldnn": ("matmul", "conv", "rnn")}
    for backend, operations in backends.items():
        for each in operations:
            yield Switch(partial(read, backend, each), partial(write, backend, each), "ieee")


_EXACT = Switches(*_exact_products())
_AS_THEY_ARE = ("ieee", "none")


def products_are_exact(kind: str) -> bool:
    """Tell whether float32 is multiplied as it is already, on a kind of device, and will be.

    Not while other threads see to it, which will put back what was before.
    """
    if kind != "cpu" or _EXACT.in_use:
        return False
    read = torch._C._get_fp32_precision_getter  # what an operation does not have set, it inherits
    return (
        read("mkldnn", "matmul") in _AS_THEY_ARE
        and read("mkldnn", "conv") in _AS_THEY_ARE
        and read("mkldnn", "rnn") in _AS_THEY_ARE
    )


def exact_products() -> AbstractContextManager[None]:
    """Multiply float32 as it is meanwhile, not as TF32 or bfloat16."""
    return _EXACT.thrown()


# Kernels and the compiler

_WITHOUT_CUDNN = Switches(Switch(torch._C._get_cudnn_enabled, torch._C._set_cudnn_enabled, False))


def without_cudnn() -> AbstractContextManager[None]:
    """Let cuDNN not be used meanwhile.

    `torch.backends.cudnn.enabled` is read-only after `torch.backends.disable_global_flags()`, and
    `torch.backends.cudnn.flags`, which is not, sets all other flags too.
    """
    return _WITHOUT_CUDNN.thrown()


_REPLAYABLE = Switches(
    Switch(torch.backends.mha.get_fastpath_enabled, torch.backends.mha.set_fastpath_enabled, False),
    Switch.of(lambda: warnings.catch_warnings(action="ignore")),
)


def replayable() -> AbstractContextManager[None]:
    """Run a call once more meanwhile: without kernels that have no gradients, nor warnings.

    The user has seen the warnings, or they are about vmap.
    """
    return _REPLAYABLE.thrown()


_EAGER = Switches(Switch.of(lambda: torch.compiler.set_stance("force_eager")))


@contextmanager
def eagerly() -> Iterator[None]:
    """Let nothing compiled run meanwhile.

    What is compiled and first runs under a mode would never be used again, mode or not.
    """
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with _EAGER.thrown():
        yield


# Parametrised values


@contextmanager
def parametrizations_computed() -> Iterator[None]:
    """Compute parametrised values anew at each use, also in `parametrize.cached()`.

    That counts who is inside, in any thread. So is here, down instead of up, whoever else comes and
    goes meanwhile.
    """
    taken: list[int] = []
    with restored() as stack:
        undo(stack, _give_back, taken)
        taken[:], parametrize._cache_enabled = [parametrize._cache_enabled], 0
        yield


def _give_back(taken: list[int]) -> None:
    while taken:
        parametrize._cache_enabled += taken.pop()
