"""Compares the sum of all contributions with the gradients that autograd makes.

That they agree proves no split, but that they differ proves something missing: a result that a
module left in an attribute and the loss used, a layer that does not compute what its sampler takes
it for, a call that could not be run again as it was.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from math import hypot, inf, isfinite, isinf

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ghost_core._torch import gradient_hooks, in_use, is_in_parts, shards, tidy_gradient_hooks
from ghost_core.algebra import INSIDE, PerSampleGradient, Precision, floating_dtypes, weight_of
from ghost_core.errors import UnbalancedError
from ghost_core.model_hooks import Hook


@dataclass
class _Account:
    """What became of one parameter in a batch.

    Attributes:
        made: The gradient that autograd made; None if it made none.
        arrived: The sum of all contributions.
        norms: Sum of the norms of all contributions, which is read when the batch ends: a GPU would
            have to be waited for.
        dtypes: Floating dtypes that were seen.
    """

    made: Tensor | None = None
    arrived: Tensor | None = None
    norms: Tensor | None = None
    dtypes: set[torch.dtype] = field(default_factory=set)

    @property
    def scale(self) -> float:
        """Sum of the norms of all contributions."""
        return 0 if self.norms is None else float(self.norms)

    @property
    def off(self) -> float:
        """How far the sums are from each other; zero where there is nothing to compare.

        Infinitely far, if one of them is finite and the other is not. Where both are not, it is for
        the scores to tell.
        """
        if self.made is None:
            return 0
        arrived = torch.zeros_like(self.made) if self.arrived is None else self.arrived
        apart = float(torch.linalg.vector_norm(self.made - arrived))
        if isfinite(apart):
            return apart
        finite = [bool(each.isfinite().all()) for each in (self.made, arrived)]
        if not all(finite):
            return float("inf") if any(finite) else 0
        return apart


class Balance:
    """Compares sums of contributions with autograd's gradients, for one batch.

    Args:
        parameters: The parameters by name.
        counts: Whether a backward pass that runs is one whose gradients count.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], counts: Callable[[], bool]) -> None:
        self._counts = counts
        self._parameters: dict[str, Tensor] = {
            name: p for name, p in parameters.items() if p.requires_grad
        }
        self._accounts: dict[str, _Account] = defaultdict(_Account)
        self._without = [p for p in self._parameters.values() if not gradient_hooks(p)]
        self._in_parts: dict[str, Tensor] = {}
        self._forgotten: set[str] = set()  # whose gradients still arrive
        self._handles: list[RemovableHandle] = []

    def open(self) -> None:
        """Put hooks on the parameters. Whoever calls this can call `close` already."""
        for name, parameter in self._parameters.items():
            if is_in_parts(parameter):
                self._in_parts[name] = parameter
            else:
                self._handles.append(parameter.register_hook(Hook(partial(self._see, name))))

    def follow_parts(self, model: nn.Module) -> None:
        """Put hooks on what a pass computed with in place of parameters that are in parts."""
        known = shards(model) if self._in_parts else {}
        for name, parameter in list(self._in_parts.items()):
            leaf = in_use(known[parameter])  # type: ignore[index]
            if leaf is not None:
                del self._in_parts[name]
                self._parameters[name] = leaf  # whose dtype may be another
                if not gradient_hooks(leaf):
                    self._without.append(leaf)
                self._handles.append(leaf.register_hook(Hook(partial(self._see, name))))

    def watch(self, name: str, leaf: Tensor) -> str:
        """Compare contributions to another leaf too, which stands for a frozen parameter, say.

        Returns:
            The name it goes by: each leaf has an account of its own, as not all may be reached.
        """
        if name in self._parameters or name in self._forgotten:
            name = f"{name} ({len(self._handles)})"
        self._parameters[name] = leaf
        self._handles.append(leaf.register_hook(partial(self._see, name)))
        return name

    def forget(self, names: Iterable[str]) -> None:
        """Compare contributions to some leaves no more, since there will be none."""
        for name in names:
            self._parameters.pop(name, None)
            self._forgotten.add(name)

    @property
    def names(self) -> Collection[str]:
        """What contributions are compared of."""
        return self._parameters.keys()

    def compares(self, name: str) -> bool:
        """Tell whether contributions to a parameter are compared."""
        return name in self._parameters

    def add(
        self, name: str, gradient: PerSampleGradient, autocast: torch.dtype | None, whole: bool
    ) -> None:
        """Note what arrived for a parameter.

        Args:
            name: The parameter.
            gradient: The gradients of one use.
            autocast: Dtype of the autocast region that it was used in; None outside of one.
            whole: Whether these are the gradients themselves; nothing is compared if they were
                compressed in the forward pass.
        """
        if name not in self._parameters:
            return
        if not whole:
            del self._parameters[name]
            return
        account = self._accounts[name]
        # A sample that owns several rows has several contributions, which nobody needs to add up.
        reduced = weight_of(gradient)
        total, squared = reduced.total, reduced.squared_norms
        assert total is not None
        assert squared is not None
        account.arrived = total if account.arrived is None else account.arrived + total
        norms = squared.clamp(min=0).sqrt().sum()
        account.norms = norms if account.norms is None else account.norms + norms
        account.dtypes.update(floating_dtypes(gradient), () if autocast is None else (autocast,))

    def round(self, name: str, dtypes: Iterable[torch.dtype]) -> None:
        """Note dtypes that contributions to a parameter were rounded to on their way."""
        if name in self._parameters:
            self._accounts[name].dtypes.update(dtypes)

    def correct(self, name: str, correction: Tensor) -> None:
        """Note what an engine adds to the sum of what arrived for a parameter."""
        if name in self._parameters:
            account = self._accounts[name]
            account.arrived = (
                correction if account.arrived is None else account.arrived + correction
            )

    def check(self) -> None:
        """Raise if something is missing.

        Of two parameters, in float32:

            autograd 5.0, contributions 5.00001   rounding
            autograd 5.0, contributions 3.5       what is missing came another way: refused

        Raises:
            UnbalancedError: Naming the worst parameter.
        """
        accounts = {n: self._accounts[n] for n in self._parameters if n in self._accounts}
        scales = {name: account.scale for name, account in accounts.items()}
        whole = hypot(*filter(isfinite, scales.values()))
        wrong: dict[str, float] = {}
        for name, account in accounts.items():
            scale, off = scales[name], account.off
            if off <= INSIDE * scale < inf:  # which any precision allows
                continue
            precision = Precision.of({self._parameters[name].dtype, *account.dtypes})
            scale = max(scale, precision.floor * whole)
            # Where nothing arrived at all, any gradient is off.
            if isinf(off) or off > max(precision.tolerance, INSIDE) * scale:
                wrong[name] = off / scale if scale and isfinite(scale) else float("inf")
        if wrong:
            worst = max(wrong, key=lambda name: wrong[name])
            # What stands for a parameter or a module has an account named "it, ...".
            named = dict.fromkeys(name.partition(", ")[0] for name in wrong)
            raise UnbalancedError(
                f"the contributions of all samples do not add up to the gradient of {worst}: they "
                f"are {wrong[worst]:.1e} of their norms apart, and so are those of "
                f"{len(wrong) - 1} other parameters",
                reason="a part of it does not come through the outputs of the modules that own "
                "it, as where a result is left in an attribute or a penalty is computed on "
                "parameters, or a module computes something else in the backward pass than its "
                "sampler takes it for, or has backward hooks around values that are the same for "
                "all samples",
                remedy="return what the loss is computed from, compute penalties outside of "
                f"engine.batch(), or leave parameters out with exclude={','.join(named)!r}",
            )

    def close(self) -> None:
        """Take the hooks away, as far as there are any."""
        for handle in self._handles:
            handle.remove()
        for parameter in self._without:
            tidy_gradient_hooks(parameter)
        self._handles.clear()
        self._accounts.clear()

    def _see(self, name: str, grad: Tensor | None) -> None:
        if grad is not None and self._counts():  # a custom function may make none
            account = self._accounts[name]
            made = grad.detach().to_dense() if grad.layout is not torch.strided else grad.detach()
            account.made = made.clone() if account.made is None else account.made + made
