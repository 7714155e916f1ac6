"""What every number is compared with: autograd, asked for one sample at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


def per_sample_gradients(
    model: nn.Module,
    losses: Tensor | Callable[[int], Tensor],
    names: Sequence[str] | None = None,
    *,
    n: int | None = None,
) -> dict[str, Tensor]:
    """Return each sample's gradient by autograd alone, without hooks.

    Args:
        model: The model; its `.grad` stay as they are.
        losses: One loss per sample, `[N]`, from one forward pass: the oracle for whatever the
            model does with a batch. Or a function that runs the model on sample n alone and
            returns its loss, a scalar: for models in which nothing couples samples.
        names: Parameters by their first dotted name; by default all that require gradients.
        n: Number of samples N; needed where `losses` is a function.

    Returns:
        `[N, *shape]` by first parameter name, zero where a loss does not depend on it.

    Raises:
        ValueError: If a name is unknown or frozen, `losses` is not `[N]`, or N is not given.
    """
    parameters = _selected(model, names)
    rows: list[tuple[Tensor | None, ...]] = []
    if isinstance(losses, Tensor):
        if losses.dim() != 1:
            raise ValueError(f"losses must be [N], not {tuple(losses.shape)}")
        for loss in losses:
            rows.append(_gradients(loss, parameters))
    else:
        if n is None:
            raise ValueError("give the number of samples, n=..., with a function of the sample")
        for sample in range(n):
            rows.append(_gradients(losses(sample), parameters))
    gradients = {
        name: parameter.new_zeros(len(rows), *parameter.shape)
        for name, parameter in parameters.items()
    }
    for at, row in enumerate(rows):
        for name, gradient in zip(parameters, row, strict=True):
            if gradient is not None:
                gradients[name][at] = gradient.to_dense()
    return gradients


def agreeing_gradients(
    model: nn.Module,
    losses: Tensor,
    loss_of: Callable[[int], Tensor],
    names: Sequence[str] | None = None,
    *,
    tolerance: float = 1e-9,
) -> dict[str, Tensor]:
    """Return each sample's gradient after asserting that both oracles find the same.

    They differ if the model couples samples, or if `losses` are not the samples' own.

    Args:
        model: The model, in float64.
        losses: One loss per sample, `[N]`, from one forward pass.
        loss_of: Runs the model on sample n alone and returns its loss, a scalar.
        names: Parameters by their first dotted name; by default all that require gradients.
        tolerance: Error allowed relative to the norm of a sample's gradient.

    Returns:
        `[N, *shape]` by first parameter name.

    Raises:
        AssertionError: If they differ.
    """
    together = per_sample_gradients(model, losses, names)
    alone = per_sample_gradients(model, loss_of, names, n=len(losses))
    for name, gradient in together.items():
        assert_within(
            alone[name],
            gradient,
            per_row(norms(gradient), gradient),
            tolerance,
            f"{name}, alone against in a batch",
        )
    return together


def assert_within(
    got: Tensor,
    expected: Tensor,
    scale: Tensor | float,
    tolerance: float = 1e-9,
    what: str = "result",
) -> None:
    """Assert `|got - expected| <= tolerance · scale` for every entry. NaN never passes.

    Args:
        got: The values to check.
        expected: The reference, of the same shape.
        scale: What the error is relative to, broadcast to that shape; `‖g_n‖ ‖h_m‖` for the inner
            product of `g_n` and `h_m`. An error relative to the product itself would be
            unbounded, because products cancel.
        tolerance: Error allowed relative to the scale.
        what: Parameter and operation, for the message.

    Raises:
        AssertionError: Showing the worst entry, its error and its bound.
    """
    if got.shape != expected.shape:
        raise AssertionError(f"{what}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}")
    if not expected.numel():
        return
    reference = expected.detach().double().cpu()
    scales = torch.as_tensor(scale, dtype=torch.float64).detach().cpu().expand(reference.shape)
    values = got.detach().double().cpu()
    error, bound = (values - reference).abs(), tolerance * scales
    within = error <= bound
    if within.all() and bound.isfinite().all():  # so that the reference is finite, too
        return
    if not (reference.isfinite().all() and scales.isfinite().all()):
        raise AssertionError(f"{what}: the reference or its scale is not finite")
    wrong = ~within
    excess = torch.where(error.isnan(), float("inf"), error - bound)
    at = tuple(int(i) for i in torch.unravel_index(excess.argmax(), excess.shape))
    raise AssertionError(
        f"{what}: {int(wrong.sum())} of {wrong.numel()} entries are off; worst at {list(at)}: "
        f"got {values[at].item():.9g}, expected {reference[at].item():.9g}, "
        f"error {error[at].item():.3g} > bound {bound[at].item():.3g} "
        f"= {tolerance:g} * {scales[at].item():.3g}"
    )


def norms(gradients: Tensor) -> Tensor:
    """Return the norm of each row, `[N, ...]` to float64 `[N]`."""
    n = gradients.shape[0]
    flat = gradients.double().reshape(n, gradients.shape[1:].numel())
    return flat.square().sum(1).sqrt()


def per_row(values: Tensor, like: Tensor) -> Tensor:
    """Give `[N]` trailing axes, so that it broadcasts against `[N, ...]`."""
    return values.reshape(-1, *[1] * (like.dim() - 1))


def _selected(model: nn.Module, names: Sequence[str] | None) -> dict[str, nn.Parameter]:
    known = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if names is None:
        return known
    if missing := [name for name in names if name not in known]:
        raise ValueError(
            f"{', '.join(missing)}: not the first name of a trainable parameter; "
            f"there are {', '.join(known) or 'none'}"
        )
    return {name: known[name] for name in names}


def _gradients(loss: Tensor, parameters: dict[str, nn.Parameter]) -> tuple[Tensor | None, ...]:
    if not loss.requires_grad or not parameters:
        return (None,) * len(parameters)
    return torch.autograd.grad(
        loss, list(parameters.values()), retain_graph=True, allow_unused=True
    )
