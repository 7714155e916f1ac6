"""Samplers that run modules of transformers again, which is never imported here.

These modules use parameters of modules inside in other ways than by calling these, or look up one
row for all samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ghost_core import Dense, GradientSampler, PastCall, PerSampleGradient
from ghost_core._torch import start_of_backward
from ghost_core.sampler import own_parameters
from ghost_layers.replay import Forward, Plan, Replay, ReplaySampler, Way, floating
from ghost_layers.transformers.names import class_names

_TABLE = "relative_attention_bias.weight"


class RelativeBiasSampler(ReplaySampler):
    """Per-sample gradients of a table of relative position biases, as in T5 (arXiv:1910.10683).

    What is looked up is one row, `[1, heads, T, S]`, that the attention of every sample adds, in
    all layers of T5. The smallest module with rows of samples is run again with as many copies of
    that row as there are samples, whose gradients are those of each sample.
    """

    paths: ClassVar[tuple[str, ...]] = ("",)
    """Where the module that looks the table up may be."""

    method: ClassVar[str] = "compute_bias"
    """Its method that does; its first argument may have rows."""

    parameters: ClassVar[tuple[str, ...]] = (_TABLE,)

    def rewritten(self, module: nn.Module, count: int) -> Forward | None:
        """Run it with a row for each sample."""
        for path in self.paths:
            local = f"{path}.{_TABLE}" if path else _TABLE
            if local in self.owns(module):
                return partial(_returned, path, self.method, count)
        return None

    def replayed(
        self, plan: Plan, replay: Replay, call: PastCall, grads: Sequence[Tensor | None]
    ) -> Mapping[str, PerSampleGradient]:
        """Run the module again, and differentiate what was looked up, then the table."""
        if plan.rewritten is None or plan.way is not Way.REWRITTEN:
            return super().replayed(plan, replay, call, grads)
        ((local, shape),) = call.shapes.items()
        table = replay.values[plan.wanted[local]].detach().requires_grad_()
        total = table.new_zeros(replay.count, *shape)
        with torch.enable_grad(), plan.conditions():
            found: list[tuple[Tensor, Tensor]] = []
            function = partial(plan.rewritten, found=found)
            values = replay.values | {plan.wanted[local]: table}
            with replay.unproven():
                returned = floating(plan.called(function, values, plan.whole(replay.inputs)))
                looked_up = list(found)  # checkpointing inside looks it up once more
                outputs, slopes = plan.sloped(returned, replay, grads)
            rows = [each for _, each in looked_up]
            start = start_of_backward(outputs, slopes)
            arrived = torch.autograd.grad(start, rows, allow_unused=True)
            for (bias, _), grad in zip(looked_up, arrived, strict=True):
                if grad is not None:
                    (each,) = torch.autograd.grad(
                        bias, table, grad.unsqueeze(1), retain_graph=True, is_grads_batched=True
                    )
                    total += each
        if replay.rows is not None:
            total = total[replay.rows]
        return {local: Dense(total.unsqueeze(1))}


def _returned(
    path: str,
    method: str,
    count: int,
    module: nn.Module,
    *args: Any,
    found: list[tuple[Tensor, Tensor]] | None = None,
    **kwargs: Any,
) -> Any:
    """Run a copy of a module with a row of biases for each sample.

    Args:
        path: Where in it the table is looked up.
        method: By which method there.
        count: Number of samples N.
        module: The copy.
        args: Its positional inputs.
        found: Gets each bias that is looked up, `[1, ...]`, with its rows, `[N, ...]`.
        kwargs: Its keyword inputs.
    """
    owner = module.get_submodule(path)
    look_up = getattr(owner, method)

    def look_up_rows(first: Any, *rest: Any, **named: Any) -> Tensor:
        bias: Tensor = look_up(first[:1] if isinstance(first, Tensor) else first, *rest, **named)
        rows = bias.expand(count, *bias.shape[1:])
        if found is not None:
            found.append((bias, rows))
        return rows

    vars(owner)[method] = look_up_rows
    return module.forward(*args, **kwargs)


class StackBiasSampler(RelativeBiasSampler):
    """The same for stacks of layers that share what the first one looks up, as those of T5."""

    paths = (
        "block.0.layer.0.SelfAttention",
        "block.0.layer.0.LocalSelfAttention",
        "block.0.layer.0.TransientGlobalSelfAttention",
        "layer.0.self_attention.attention",
    )
    parameters = tuple(f"{path}.{_TABLE}" for path in paths)


class EncoderBiasSampler(RelativeBiasSampler):
    """The same for MPNet's encoder, which looks biases up for its inputs."""

    method = "compute_position_bias"


class MixerSampler(ReplaySampler):
    """Per-sample gradients of a Mamba mixer, or a gated delta net (arXiv:2312.00752, 2412.06464).

    It takes the weights of its convolution and of its time steps' projection from the modules that
    have them, without calling these.
    """

    inside: ClassVar[tuple[str, ...]] = (
        "conv1d.weight",
        "conv1d.bias",
        "dt_proj.weight",
        "dt_proj.bias",
    )

    def owns(self, module: nn.Module) -> tuple[str, ...]:
        """Return the module's own parameters and those that it takes from modules inside."""
        present = {name for name, _ in module.named_parameters(remove_duplicate=False)}
        return (*own_parameters(module), *(name for name in self.inside if name in present))


TRANSFORMERS_REPLAYS: Mapping[str | type[nn.Module], type[GradientSampler]] = {
    **dict.fromkeys(
        class_names("""
            longt5.LongT5Stack mt5.MT5Stack pix2struct.Pix2StructTextModel pop2piano.Pop2PianoStack
            switch_transformers.SwitchTransformersStack t5.T5Stack
        """),
        StackBiasSampler,
    ),
    **dict.fromkeys(class_names("umt5.UMT5Attention"), RelativeBiasSampler),
    **dict.fromkeys(class_names("mpnet.MPNetEncoder"), EncoderBiasSampler),
    **dict.fromkeys(
        class_names("""
            bamba.BambaMixer falcon_h1.FalconH1Mixer falcon_mamba.FalconMambaMixer
            granitemoehybrid.GraniteMoeHybridMambaLayer jamba.JambaMambaMixer mamba.MambaMixer
            mamba2.Mamba2Mixer nemotron_h.NemotronHMamba2Mixer olmo_hybrid.OlmoHybridGatedDeltaNet
            qwen3_5.Qwen3_5GatedDeltaNet qwen3_5_moe.Qwen3_5MoeGatedDeltaNet
            qwen3_next.Qwen3NextGatedDeltaNet qwen4_exp.Qwen4ExpTextGatedDeltaNet
            zamba.ZambaMambaMixer zamba2.Zamba2MambaMixer
        """),
        MixerSampler,
    ),
}
"""Samplers by dotted class name, for the classes whose code was read, in transformers 5.23."""
