"""Samples on another axis, folded with another axis, or owning rows in another number."""

import pytest
import torch
from torch import Tensor, nn

from ghost_core import CaptureError, UnknownNameError, WrongSplitError
from ghost_core.testing import per_sample_gradients

N, T, D = 4, 3, 5


class Folded(nn.Module):
    """Folds tokens into the batch around one layer; the next one has one row per sample."""

    def __init__(self, major: bool = True) -> None:
        super().__init__()
        self.a, self.b, self.major = nn.Linear(D, D), nn.Linear(D, D), major

    def forward(self, x: Tensor) -> Tensor:
        if self.major:
            return self.b(self.a(x.flatten(0, 1)).tanh().unflatten(0, x.shape[:2]))
        rows = x.transpose(0, 1).flatten(0, 1)
        return self.b(self.a(rows).tanh().unflatten(0, (x.shape[1], -1)).transpose(0, 1))


class SequenceFirst(nn.Module):
    """`[T, N, D]` throughout, with positions computed once, `[T, 1, D]`."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(7, D), nn.Embedding(N + T, D)
        self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, 7)

    def forward(self, ids: Tensor) -> Tensor:
        places = torch.arange(len(ids)).unsqueeze(1)
        hidden = self.tokens(ids) + self.positions(places)
        mixed = hidden.cumsum(0)  # over positions
        return self.head(self.norm(mixed))


class Pictures(nn.Module):
    """Several pictures a sample, whose features are added to its text."""

    def __init__(self) -> None:
        super().__init__()
        self.eye, self.text = nn.Linear(D, D), nn.Linear(D, D)

    def forward(
        self, text: Tensor, pictures: Tensor, picture_owner: Tensor | None = None
    ) -> Tensor:
        owner = self.owner if picture_owner is None else picture_owner
        seen = self.eye(pictures).tanh()
        return self.text(text).index_add(0, owner, seen)

    owner = torch.tensor([1, 0, 1, 3, 3, 3])


def losses_of(output: Tensor) -> Tensor:
    weights = torch.linspace(0.5, 1.5, output[0].numel(), dtype=torch.float64)
    return output.flatten(1).sin() @ weights


@pytest.mark.parametrize("tokens", [1, T, N])
@pytest.mark.parametrize("major", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_folded_rows_are_told_apart(hold, assert_held, major, tokens, frozen) -> None:
    model, x = Folded(major).double(), torch.randn(N, tokens, D, dtype=torch.float64)
    engine = hold(model)
    expected = per_sample_gradients(model, losses_of(model(x)))
    with engine.frozen() if frozen else engine:
        for _ in range(2):
            with engine.batch(range(N)) as batch:
                losses_of(model(x)).sum().backward()
            assert batch.verified
            assert_held(batch.result, expected)
        one = x[1:2]
        with engine.batch([7]) as batch:
            losses_of(model(one)).sum().backward()
        assert_held(batch.result, {name: rows[1:2] for name, rows in expected.items()})


def test_other_numbers_of_samples_and_tokens_need_no_new_probe(hold, assert_held) -> None:
    model = Folded().double()
    engine = hold(model)
    with engine:
        for n, tokens in ((4, 3), (6, 2), (2, 6), (3, 1)):
            x = torch.randn(n, tokens, D, dtype=torch.float64)
            with engine.batch(range(n)) as batch:
                losses_of(model(x)).sum().backward()
            assert_held(batch.result, per_sample_gradients(model, losses_of(model(x))))


def test_folded_rows_need_the_verification(hold) -> None:
    model = Folded()
    engine = hold(model, verify=False)
    named = pytest.raises(WrongSplitError, match=r"row_owner=\{'a': key\}")
    with engine, named, engine.batch(range(N)):
        model(torch.randn(N, T, D))


def test_folded_rows_of_which_few_matter(hold, assert_held) -> None:
    class First(Folded):
        def forward(self, x: Tensor) -> Tensor:
            hidden = self.a(x.flatten(0, 1)).unflatten(0, x.shape[:2])
            return self.b(hidden[:, 0])

    class Corner(Folded):
        """Rows 0 and 3 of four matter: sample 0's and 1's in either order."""

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.a(x.flatten(0, 1))
            return self.b(hidden[[0, -1]])

    x = torch.randn(N, T, D, dtype=torch.float64)
    # Rows 0, 3, 6, 9 are sample-major alone; of the corners, each is asked for by itself.
    for model, given in ((First().double(), x), (Corner().double(), x[:2, :2])):
        engine = hold(model)
        expected = per_sample_gradients(model, losses_of(model(given)))
        with engine, engine.batch(range(len(given))) as batch:
            losses_of(model(given)).sum().backward()
        assert_held(batch.result, expected)


@pytest.mark.parametrize("tokens", [T, N, 1])
@pytest.mark.parametrize("frozen", [True, False])
def test_samples_on_another_axis(hold, assert_held, tokens, frozen) -> None:
    model, ids = SequenceFirst().double(), torch.randint(0, 7, (tokens, N))
    engine = hold(model, batch_dim={"*": 1})

    def losses() -> Tensor:
        return losses_of(model(ids).transpose(0, 1))

    expected = per_sample_gradients(model, losses())
    with engine.frozen() if frozen else engine, engine.batch(range(N)) as batch:
        losses().sum().backward()
    assert batch.verified
    assert_held(batch.result, expected)


def test_an_axis_for_some_modules(hold, assert_held) -> None:
    class Turned(nn.Module):
        """Sequence-first inside, samples first outside."""

        def __init__(self) -> None:
            super().__init__()
            self.inside = SequenceFirst()
            self.last = nn.Linear(7, 2)

        def forward(self, ids: Tensor) -> Tensor:
            return self.last(self.inside(ids.mT).transpose(0, 1))

    model, ids = Turned().double(), torch.randint(0, 7, (N, T))
    engine = hold(model, batch_dim={"inside.*": 1})
    expected = per_sample_gradients(model, losses_of(model(ids)))
    with engine, engine.batch(range(N)) as batch:
        losses_of(model(ids)).sum().backward()
    assert_held(batch.result, expected)


def test_a_wrong_axis_is_refused(hold) -> None:
    model, ids = SequenceFirst(), torch.randint(0, 7, (N, N))
    for axes in ({}, {"*": 1, "norm": 0}):
        engine = hold(model, batch_dim=axes)
        with engine, pytest.raises(WrongSplitError), engine.batch(range(N)):
            model(ids).sum().backward()
    with pytest.raises(UnknownNameError, match=r"unknown module in batch_dim 'nrom'"):
        hold(model, batch_dim={"nrom": 1})


@pytest.mark.parametrize("given", ["inputs", "batch"])
@pytest.mark.parametrize("verify", [True, False])
def test_rows_in_another_number(hold, assert_held, given, verify) -> None:
    model = Pictures().double()
    text = torch.randn(N, D, dtype=torch.float64)
    pictures = torch.randn(6, D, dtype=torch.float64)
    engine = hold(model, row_owner={"eye": "picture_owner"}, verify=verify)
    inputs = {"picture_owner": model.owner} if given == "inputs" else {}
    owners = {} if given == "inputs" else {"picture_owner": model.owner}

    def losses() -> Tensor:
        return losses_of(model(text, pictures=pictures, **inputs))

    expected = per_sample_gradients(model, losses())
    with engine:
        for _ in range(2):
            with engine.batch(range(N), owners=owners) as batch:
                losses().sum().backward()
            assert_held(batch.result, expected)


def test_rows_of_micro_batches(hold, assert_held) -> None:
    model = Pictures().double()
    text = torch.randn(N, D, dtype=torch.float64)
    owner = torch.tensor([0, 1, 1, 2, 3, 3])
    pictures = torch.randn(6, D, dtype=torch.float64)
    engine = hold(model, row_owner={"eye": "pictures"})
    expected = per_sample_gradients(model, losses_of(model(text, pictures, owner)))
    with engine, engine.batch(range(N), owners={"pictures": owner}) as batch:
        for part, some, mine in (
            (slice(0, 2), slice(0, 3), [0, 1, 1]),
            (slice(2, 4), slice(3, 6), [0, 1, 1]),
        ):
            model.owner = torch.tensor(mine)
            losses_of(model(text[part], pictures=pictures[some])).sum().backward()
    assert_held(batch.result, expected)


def test_wrong_owners_are_refused(hold) -> None:
    model = Pictures()
    text, pictures = torch.randn(N, D), torch.randn(6, D)
    engine = hold(model, row_owner={"eye": "picture_owner"})

    def run(owners: dict[str, Tensor]) -> None:
        with engine, engine.batch(range(N), owners=owners):
            model(text, pictures).sum().backward()

    with pytest.raises(WrongSplitError, match=r"to the samples that .picture_owner. tells"):
        run({"picture_owner": model.owner.flip(0)})
    with pytest.raises(
        WrongSplitError, match=r"eye .* returned 6 rows, and 'picture_owner'.*of 5:"
    ):
        run({"picture_owner": model.owner[:5]})
    with pytest.raises(CaptureError, match=r"no tensor 'picture_owner' that tells the sample"):
        run({})
    with pytest.raises(CaptureError, match=r"must be signed integers \[R\], not torch.float32"):
        run({"picture_owner": model.owner.float()})
    beyond = pytest.raises(CaptureError, match=r"positions of samples, from 0 to 3")
    with engine, beyond, engine.batch(range(N)):
        model(text, pictures, picture_owner=model.owner + 1)


@pytest.mark.parametrize("swapped", [(0, 1), (1, 2), (2, 4)])
def test_every_owner_is_verified(hold, swapped) -> None:
    model = Pictures()
    model.owner = torch.tensor([0, 1, 2, 3, 4, 5])
    given = model.owner.clone()
    given[list(swapped)] = model.owner[list(reversed(swapped))]
    engine = hold(model, row_owner={"eye": "rows"})
    wrong = pytest.raises(WrongSplitError, match=r"samples that 'rows' tells")
    with engine, wrong, engine.batch(range(6), owners={"rows": given}):
        model(torch.randn(6, D), torch.randn(6, D))


def test_options_of_the_wrong_type_are_refused(hold) -> None:
    for options in ({"batch_dim": 1}, {"batch_dim": {"*": "1"}}, {"row_owner": "eye"}):
        with pytest.raises(CaptureError, match=r"batch_dim|row_owner"):
            hold(Pictures(), **options)


@pytest.mark.parametrize("before_head", [True, False])
@pytest.mark.parametrize(("tokens", "n"), [(T, N), (N, N), (T, D), (T, 1)])
def test_a_sequence_first_model_that_returns_one_row_per_sample(
    hold, assert_held, tokens, n, before_head
) -> None:
    class Pooled(SequenceFirst):
        def forward(self, ids: Tensor) -> Tensor:
            places = torch.arange(len(ids)).unsqueeze(1)
            hidden = self.norm((self.tokens(ids) + self.positions(places)).cumsum(0))
            return self.head(hidden.mean(0)) if before_head else self.head(hidden).mean(0)

    model, ids = Pooled().double(), torch.randint(0, 7, (tokens, n))
    engine = hold(model, batch_dim={"*": 1})
    expected = per_sample_gradients(model, losses_of(model(ids)))
    with engine, engine.batch(range(n)) as batch:
        losses_of(model(ids)).sum().backward()
    assert batch.verified
    assert_held(batch.result, expected)


def test_a_row_for_all_that_meets_other_rows(hold, assert_held) -> None:
    class Places(Pictures):
        """Adds one row, computed once, to all pictures."""

        def __init__(self) -> None:
            super().__init__()
            self.places = nn.Embedding(1, D)

        def forward(
            self, text: Tensor, pictures: Tensor, picture_owner: Tensor | None = None
        ) -> Tensor:
            place = self.places(torch.tensor([0]))
            return super().forward(text, pictures + place, picture_owner)

    model = Places().double()
    text = torch.randn(N, D, dtype=torch.float64)
    pictures = torch.randn(6, D, dtype=torch.float64)
    owners = {"picture_owner": model.owner}
    expected = per_sample_gradients(model, losses_of(model(text, pictures)))
    for told in ({}, {"places": "picture_owner"}):
        engine = hold(model, row_owner={"eye": "picture_owner", **told})
        with engine, engine.batch(range(N), owners=owners) as batch:
            losses_of(model(text, pictures)).sum().backward()
        assert_held(batch.result, expected)
    fits_not = pytest.raises(WrongSplitError, match=r"row_owner=\{'places': key\}")
    engine = hold(model, row_owner={"eye": "picture_owner"}, verify=False)
    with engine, fits_not, engine.batch(range(N), owners=owners):
        model(text, pictures)


def test_engines_must_agree(hold) -> None:
    model = SequenceFirst()
    second = hold(model)
    for axes, what in (({"": 1}, "of the model itself"), ({"norm": 1}, r"sampler of norm \[")):
        disagree = pytest.raises(CaptureError, match=what)
        with hold(model, batch_dim=axes), disagree:
            second.__enter__()
    with second:
        pass
