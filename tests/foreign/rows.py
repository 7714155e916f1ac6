"""Layers as the root, recurrent ones above all, and other things that rows can be."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from tests.foreign.blocks import Block
from tests.foreign.foreign import Batch, Foreign, curved
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence


class DPRNN(nn.Module):
    """Opacus' recurrent layer: a linear layer is called once for each step, and axes are swapped.

    Args:
        batch_first: Whether samples come first outside; inside they never do.
    """

    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ih, self.hh = nn.Linear(3, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor, h: Tensor) -> Tensor:
            return torch.tanh(self.ih(x) + self.hh(h))

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.cells, self.batch_first = nn.ModuleList([self.Cell()]), batch_first

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.transpose(0, 1) if self.batch_first else x
        h, outputs = x.new_zeros(x.shape[1], 8), []
        for step in x.unbind(0):
            h = self.cells[0](step, h)
            outputs.append(h)
        output = torch.stack(outputs)
        return output.transpose(0, 1) if self.batch_first else output, h[None]


class Recurrent(nn.Module):
    """A recurrent layer and a head, on padded or packed sequences."""

    def __init__(self, kind: type[nn.Module], *, packed: bool, batch_first: bool = True) -> None:
        super().__init__()
        self.rnn, self.head = kind(3, 8, batch_first=batch_first), nn.Linear(8, 2)
        self.packed, self.batch_first = packed, batch_first

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        if not self.packed:
            return self.head(self.rnn(x)[0])
        packed = pack_padded_sequence(
            x, lengths, batch_first=self.batch_first, enforce_sorted=False
        )
        return self.head(pad_packed_sequence(self.rnn(packed)[0], batch_first=self.batch_first)[0])


class PackedRoot(nn.Module):
    """A model that is called on a packed sequence; the last states come out."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(3, 8), nn.Linear(8, 2)

    def forward(self, packed: PackedSequence) -> Tensor:
        return self.head(self.rnn(packed)[1][0])


class HeadOnPackedData(Recurrent):
    """The head runs on the packed data itself, `[rows, 8]`, in order of time and length."""

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        output = self.rnn(packed)[0]
        return pad_packed_sequence(output._replace(data=self.head(output.data)), True)[0]


class S4D(nn.Module):
    """A kernel `[H, L]` computed from parameters alone, then a convolution by Fourier transform."""

    class Kernel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.log_dt = nn.Parameter(torch.rand(8))
            self.c, self.log_a = nn.Parameter(torch.randn(8, 2, 2)), nn.Parameter(torch.rand(8, 2))

        def forward(self, length: int) -> Tensor:
            decay = -self.log_a.exp() * self.log_dt.exp()[:, None]
            at = torch.arange(length, dtype=decay.dtype)
            power = (decay[..., None] * at).exp()
            return torch.einsum("hn,hnl->hl", self.c[..., 0] + self.c[..., 1], power)

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(3, 8), nn.Linear(8, 2)
        self.kernel, self.skip = self.Kernel(), nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        u = self.encoder(x).mT
        length = u.shape[-1]
        kernel = torch.fft.rfft(self.kernel(length), n=2 * length)
        y = torch.fft.irfft(torch.fft.rfft(u, n=2 * length) * kernel, n=2 * length)[..., :length]
        return self.decoder((y + u * self.skip[:, None]).mT)


class Wrapped(nn.Module):
    """Blocks in torch's checkpoint_wrapper, which forwards attributes and changes names."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(3, 8), nn.Linear(8, 2)
        self.blocks = nn.ModuleList([checkpoint_wrapper(Block()) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Sparse(nn.Module):
    """An embedding whose gradient is sparse."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.head = nn.Embedding(11, 8, sparse=True), nn.Linear(8, 2)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.emb(ids).tanh())


class Scalar(nn.Module):
    """A parameter without an axis, inside a module of its own or in the model."""

    class Temperature(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.value = nn.Parameter(torch.tensor(0.5))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.value.exp()

    def __init__(self, *, inside: bool) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(3, 8), nn.Linear(8, 2)
        self.scale = self.Temperature() if inside else nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x).tanh()
        return self.head(self.scale(x) if isinstance(self.scale, nn.Module) else x * self.scale)


class MultipliedRow(nn.Module):
    """A gate `[1, 8]`, computed from a constant for all samples, multiplies each of them."""

    def __init__(self, samples: int = 1) -> None:
        super().__init__()
        self.layer, self.gate, self.head = nn.Linear(3, 8), nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate(torch.ones(1, 4, dtype=x.dtype)).sigmoid()
        return self.head(self.layer(x).flatten(0, 1) * gate).view(*x.shape[:2], 2)


def _sequences(n: int, length: int = 5) -> Batch:
    return {"x": torch.randn(n, length, 3)}


def _time_first(n: int, length: int = 5) -> Batch:
    return {"x": torch.randn(length, n, 3)}


def _lengths(n: int) -> Batch:
    return {"x": torch.randn(n, 4, 3), "lengths": torch.arange(n) % 3 + 2}


def _states(n: int) -> Batch:
    return {"x": torch.randn(5, n, 3), "h": torch.randn(2, n, 8)}


def _ids(n: int) -> Batch:
    return {"ids": torch.randint(11, (n, 4))}


def _attended(n: int) -> Batch:
    return {"query": torch.randn(n, 4, 8)}


def _curved(model: nn.Module, batch: Batch) -> Tensor:
    return curved(model(*batch.values()))


def _of_first(model: nn.Module, batch: Batch) -> Tensor:
    return curved(model(*batch.values())[0])


def _of_first_by_time(model: nn.Module, batch: Batch) -> Tensor:
    return curved(model(*batch.values())[0].transpose(0, 1))


def _self_attention(model: nn.Module, batch: Batch) -> Tensor:
    query = batch["query"]
    return curved(model(query, query, query)[0])


def _self_attention_by_time(model: nn.Module, batch: Batch) -> Tensor:
    query = batch["query"].transpose(0, 1)
    return curved(model(query, query, query)[0].transpose(0, 1))


def _packed(model: nn.Module, batch: Batch) -> Tensor:
    packed = pack_padded_sequence(
        batch["x"], batch["lengths"], batch_first=True, enforce_sorted=False
    )
    return curved(model(packed))


_BY_TIME: dict[str, Any] = {"options": {"batch_dim": {"": 1}}}
_TWO = partial(nn.GRU, 3, 8, num_layers=2)

ROWS = [
    Foreign("gru_root", partial(nn.GRU, 3, 8, batch_first=True), _sequences, _of_first),
    Foreign("gru_root_time_first", partial(nn.GRU, 3, 8), _time_first, _of_first_by_time),
    Foreign(
        "gru_root_time_first_declared",
        partial(nn.GRU, 3, 8),
        _time_first,
        _of_first_by_time,
        **_BY_TIME,
    ),
    Foreign("gru_root_as_many_samples_as_steps", partial(nn.GRU, 3, 8), _time_first,
            _of_first_by_time, n=5, **_BY_TIME),
    Foreign("gru_root_as_many_samples_as_states", _TWO, _states, _of_first_by_time, n=2,
            **_BY_TIME),
    Foreign("gru_root_states", _TWO, _states, _of_first_by_time, **_BY_TIME),
    Foreign("attention_root", partial(nn.MultiheadAttention, 8, 2, batch_first=True), _attended,
            _self_attention),
    Foreign("attention_root_as_many_samples_as_tokens",
            partial(nn.MultiheadAttention, 8, 2, batch_first=True), _attended, _self_attention,
            n=4),
    Foreign("attention_root_time_first", partial(nn.MultiheadAttention, 8, 2), _attended,
            _self_attention_by_time, n=3, **_BY_TIME),
    Foreign("attention_root_time_first_square", partial(nn.MultiheadAttention, 8, 2), _attended,
            _self_attention_by_time, n=4, **_BY_TIME),
    Foreign("opacus_dprnn", partial(DPRNN, False), _time_first, _of_first_by_time, **_BY_TIME),
    Foreign("opacus_dprnn_batch_first", partial(DPRNN, True), _sequences, _of_first),
    Foreign("opacus_dprnn_batch_first_square", partial(DPRNN, True), _sequences, _of_first, n=5),
    Foreign("lstm_padded", partial(Recurrent, nn.LSTM, packed=False), _lengths, _curved),
    Foreign("lstm_packed", partial(Recurrent, nn.LSTM, packed=True), _lengths, _curved),
    Foreign("gru_packed", partial(Recurrent, nn.GRU, packed=True), _lengths, _curved),
    Foreign("gru_packed_root", PackedRoot, _lengths, _packed),
    Foreign("gru_head_on_packed_data", partial(HeadOnPackedData, nn.GRU, packed=True), _lengths,
            _curved),
    Foreign("s4d", S4D, _sequences, _curved),
    Foreign("s4d_as_many_samples_as_features", S4D, _sequences, _curved, n=8),
    Foreign("checkpoint_wrapper", Wrapped, _sequences, _curved),
    Foreign("sparse_embedding", Sparse, _ids, _curved),
    Foreign("scalar_parameter", partial(Scalar, inside=False), _sequences, _curved),
    Foreign("scalar_parameter_in_a_module", partial(Scalar, inside=True), _sequences, _curved),
    Foreign("one_row_that_multiplies_folded_rows", MultipliedRow, _sequences, _curved),
]  # fmt: skip
