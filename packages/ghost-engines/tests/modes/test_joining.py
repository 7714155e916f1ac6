"""Two batches joined into one: structures, lengths, and what does not fit."""

from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass

import pytest
import torch

from ghost_core import CaptureError, UnknownNameError
from ghost_engines.modes.joining import Joiner, count_of

Pair = namedtuple("Pair", "one other")


@dataclass
class Output(OrderedDict):
    """A dataclass that is a dictionary, as outputs of transformers are."""

    hidden: torch.Tensor = None
    mask: torch.Tensor = None

    def __post_init__(self):
        self.update(hidden=self.hidden, mask=self.mask)


def join(train, validation, pad=None, dim=0):
    n, m = count_of(train, dim, "training"), count_of(validation, dim, "validation")
    return Joiner(n, m, pad, dim).join(train, validation)


def test_nested_structures_keep_their_types():
    a, b = torch.arange(6.0).reshape(3, 2), torch.arange(4.0).reshape(2, 2) + 10
    flat = torch.cat([a, b])
    joined = join(
        {"x": a, "more": [a, (a, None)], "pair": Pair(a, 3), "user": UserDict(x=a)},
        {"x": b, "more": [b, (b, None)], "pair": Pair(b, 3), "user": UserDict(x=b)},
    )
    assert torch.equal(joined["x"], flat)
    assert torch.equal(joined["more"][0], flat)
    assert torch.equal(joined["more"][1][0], flat)
    assert joined["more"][1][1] is None
    assert isinstance(joined["pair"], Pair)
    assert torch.equal(joined["pair"].one, flat)
    assert isinstance(joined["user"], UserDict)
    assert torch.equal(joined["user"]["x"], flat)
    output = join(Output(a, a > 1), Output(b, b > 1))
    assert isinstance(output, Output)
    assert torch.equal(output.hidden, flat)
    assert torch.equal(output.mask, flat > 1)


def test_what_transformers_return_and_take():
    transformers = pytest.importorskip("transformers")
    outputs = transformers.modeling_outputs.BaseModelOutput
    a, b = torch.zeros(3, 4, 2), torch.ones(1, 4, 2)
    joined = join({"encoder": outputs(a)}, {"encoder": outputs(b)})["encoder"]
    assert isinstance(joined, outputs)
    assert torch.equal(joined.last_hidden_state, torch.cat([a, b]))
    encoding = transformers.BatchEncoding
    joined = join(encoding({"ids": a}), encoding({"ids": b}))
    assert isinstance(joined, encoding)
    assert torch.equal(joined["ids"], torch.cat([a, b]))


def test_shorter_sequences_are_filled_up_as_told():
    train = {"ids": torch.ones(2, 3), "labels": torch.ones(2, 3)}
    validation = {"ids": torch.full((1, 5), 2.0), "labels": torch.full((1, 5), 2.0)}
    joined = join(train, validation, pad={"ids": 0, "labels": -100})
    assert joined["ids"].tolist() == [[1, 1, 1, 0, 0]] * 2 + [[2] * 5]
    assert joined["labels"].tolist() == [[1, 1, 1, -100, -100]] * 2 + [[2] * 5]
    other = join(validation["ids"], train["ids"], pad=7)
    assert other.tolist() == [[2] * 5] + [[1, 1, 1, 7, 7]] * 2
    sequence_first = join(torch.ones(3, 2), torch.zeros(4, 1), pad=5, dim=1)
    assert sequence_first.tolist() == [[1, 1, 0]] * 3 + [[5, 5, 0]]


def test_what_is_the_same_for_all_samples_stays_one():
    positions, table = torch.arange(4), torch.ones(2, 2)
    joined = join(
        {"x": torch.zeros(2, 4), "positions": positions, "table": table, "use_cache": False},
        {
            "x": torch.zeros(3, 4),
            "positions": positions.clone(),
            "table": table,
            "use_cache": False,
        },
    )
    assert torch.equal(joined["positions"], positions)
    assert joined["table"] is table
    assert joined["use_cache"] is False


X = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("train", "validation", "message"),
    [
        ({"x": X}, {"x": X, "y": X}, "only one of them has y"),
        ([X], [X, X], "1 and 2 entries"),
        ({"x": X}, [X], "dict and list"),
        ((X, 1), (X, 2), "at 1: they are 1 and 2"),
        ({"x": X, "y": torch.zeros(5)}, {"x": X, "y": torch.zeros(6)}, "at y: their shapes"),
        ({"x": X}, {"x": X.double() + 1}, "float32.*float64"),
        ({"x": X}, {"x": torch.zeros(2, 4)}, "differ in length at x"),
        (3, 4, "training batch has no tensor"),
    ],
)
def test_what_does_not_fit_is_refused(train, validation, message):
    with pytest.raises(CaptureError, match=message):
        join(train, validation)


def test_padding_for_an_unknown_name_is_refused():
    with pytest.raises(UnknownNameError, match="idz"):
        join({"ids": X}, {"ids": X + 1}, pad={"idz": 0})
