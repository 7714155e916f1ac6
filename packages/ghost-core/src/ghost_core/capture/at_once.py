"""Differentiates for all samples at once, where a graph is known to allow it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ghost_core._torch import taken_back, vmap
from ghost_core.errors import WrongSplitError

_KNOWN = {
    *("torch::autograd::AccumulateGrad", "AddBackward0", "AddmmBackward0", "BmmBackward0"),
    *("CatBackward0", "ClampBackward1", "ClampMaxBackward0", "ClampMinBackward0", "CloneBackward0"),
    *("AbsBackward0", "CosBackward0", "CumsumBackward0", "DivBackward0", "MeanBackward1"),
    *("ExpBackward0", "ExpandBackward0", "GeluBackward0", "IndexBackward0", "LogBackward0"),
    *("MmBackward0", "MulBackward0", "NegBackward0", "PermuteBackward0", "PowBackward0"),
    *("RsqrtBackward0", "SoftmaxBackward0", "SoftplusBackward0", "SqrtBackward0", "WhereBackward0"),
    *("ReluBackward0", "RepeatBackward0", "ReshapeAliasBackward0", "SelectBackward0"),
    *("SigmoidBackward0", "SiluBackward0", "SinBackward0", "SliceBackward0", "SqueezeBackward1"),
    *("ReciprocalBackward0", "RsubBackward1", "StackBackward0", "SubBackward0", "SumBackward0"),
    *("SumBackward1", "TBackward0"),
    *("TanhBackward0", "ToCopyBackward0", "TransposeBackward0", "UnsafeViewBackward0"),
    *("UnsqueezeBackward0", "ViewBackward0"),
}
"""Nodes that run for all samples at once as they do for each. No function of a user's is one."""


def all_at_once(
    value: Tensor, tensors: Sequence[Tensor], gradients: Tensor
) -> list[Tensor | None] | None:
    """Differentiate for all samples in one backward pass.

        0.5 * table[:T]             multiplied and sliced: one pass for all samples
        MyFunction.apply(table)     None: whoever wrote it may look at numbers

    Args:
        value: A value with its graph, which is kept.
        tensors: What to differentiate for.
        gradients: The gradient of the value for each of N samples, `[N, *shape]`.

    Returns:
        `[N, *shape]` for each tensor, None for those that the value does not depend on; or None, if
        anything in the graph is not known to allow it, or a hook of the user's in it does not.
    """
    if len(gradients) < 2 or not tensors or not _is_known(value, tensors):
        return None
    reached: list[bool] = []

    def one(row: list[Tensor]) -> list[Tensor]:
        found = taken_back(value, row[0], tensors)
        reached[:] = [each is not None for each in found]
        return [each for each in found if each is not None]

    try:
        made = iter(vmap(one, [gradients], "error"))
    except (RuntimeError, WrongSplitError):
        # Nodes do not show the hooks on tensors, which may read what has no numbers here, nor what
        # a checkpoint runs again. One sample after the other, what is wrong shows as it is.
        return None
    return [next(made) if hit else None for hit in reached]


def _is_known(value: Tensor, tensors: Sequence[Tensor]) -> bool:
    """Tell whether only known nodes lead from a value to what it is computed from."""
    ends = {tensor.grad_fn for tensor in tensors}
    seen, waiting = set(ends), [value.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        if node.name() not in _KNOWN:
            return False
        seen.add(node)
        waiting += [following for following, _ in node.next_functions]
    return True
