"""Whole data sets projected into stores: what is in them, however it got there."""

import re

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from ghost_core import CaptureError
from ghost_core.testing import assert_within, per_sample_gradients
from ghost_engines import GradientStore, ProjectionEngine, StoreError, project_dataset, with_ids
from ghost_engines.dataset import packed, windows, writing

N, OPTIONS = 20, {"dim": 6, "min_dim": 2, "dtype": "float64"}


@pytest.fixture
def classifier():
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Dropout(0.5), nn.Linear(7, 3)).double()


@pytest.fixture
def samples():
    return TensorDataset(torch.randn(N, 5, dtype=torch.float64), torch.arange(N) % 3)


def loss(model, batch):
    return cross_entropy(model(batch[0]), batch[1], reduction="none")


class Stream(IterableDataset):
    def __init__(self, samples):
        self.samples = samples

    def __iter__(self):
        return iter(self.samples)


KINDS = {
    "samples": lambda samples: samples,
    "stream": Stream,
    "loader": lambda samples: DataLoader(samples, batch_size=3),
    "batches": lambda samples: list(DataLoader(samples, batch_size=3)),
    "one batch": lambda samples: samples.tensors,
}


def oracle(model, samples):
    """Return losses and projected gradients of all samples."""
    model.eval()
    losses = loss(model, samples.tensors)
    gradients = per_sample_gradients(model, losses)
    model.train()
    return losses.detach(), ProjectionEngine(model, **OPTIONS).project(gradients)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_projected_gradients_of_own_losses(kind, classifier, samples, tmp_path):
    losses, rows = oracle(classifier, samples)
    data = KINDS[kind](samples)
    done = project_dataset(
        classifier, loss, data, tmp_path / "g", batch_size=4, unit=6,
        columns={"group": ("category", lambda ids: ["odd" if i % 2 else "even" for i in ids])},
        **OPTIONS,
    )  # fmt: skip
    store = done.store
    assert (done.samples, done.skipped) == (N, 0)
    assert store.ids.tolist() == list(range(N))
    assert_within(store.rows(), rows, 10 * rows.norm(dim=1)[:, None])
    assert_within(store.losses, losses, losses)
    norms = rows.norm(dim=1)
    assert_within(store.columns["norm"], norms, norms, tolerance=1e-6)  # in float32
    assert store.groups.equal("odd").tolist() == [bool(at % 2) for at in range(N)]
    assert store.manifest.engine["loss_weights"] == "sum"
    assert classifier.training
    assert all(parameter.grad is None for parameter in classifier.parameters())


class Causal(nn.Module):
    """A language model that sees earlier tokens only, so that padding at the end is nothing."""

    def __init__(self):
        super().__init__()
        self.tokens, self.head = nn.Embedding(19, 6), nn.Linear(6, 19)

    def forward(self, ids):
        return self.head(torch.tanh(self.tokens(ids).cumsum(1)))


class Sentences:
    """Samples of token ids of several lengths."""

    def __init__(self, n=11):
        generator = torch.Generator().manual_seed(3)
        lengths = torch.randint(2, 8, (n,), generator=generator).tolist()
        self.tokens = [torch.randint(0, 19, (size,), generator=generator) for size in lengths]

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, at):
        return {"input_ids": self.tokens[at]}


def language_loss(model, batch):
    ids = batch["input_ids"]
    mask = batch.get("attention_mask", torch.ones_like(ids))[:, 1:]
    each = cross_entropy(model(ids)[:, :-1].mT, ids[:, 1:], reduction="none")
    return (each * mask).sum(1) / mask.sum(1)


def test_rows_do_not_depend_on_how_samples_are_packed(tmp_path):
    model, sizes = Causal().double(), []

    def watched(model, batch):
        sizes.append(batch["input_ids"].numel())
        return language_loss(model, batch)

    alone = project_dataset(model, watched, Sentences(), tmp_path / "a", batch_size=1, **OPTIONS)
    assert len(sizes) >= 11
    sizes.clear()
    together = project_dataset(
        model, watched, Sentences(), tmp_path / "b", tokens_per_batch=16, **OPTIONS
    )
    assert max(sizes) <= 16
    assert len(sizes) < 9
    assert together.tokens == alone.tokens == sum(map(len, Sentences().tokens))
    assert together.store.ids.tolist() == list(range(11))
    expected = alone.store.rows()
    assert_within(together.store.rows(), expected, 10 * expected.norm(dim=1)[:, None])


def test_a_bar_shows_samples_and_tokens_in_a_second(tmp_path, capsys):
    model = Causal().double()
    given = {"tokens_per_batch": 16, "progress": True}
    project_dataset(model, language_loss, Sentences(), tmp_path / "g", **given, **OPTIONS)
    last = capsys.readouterr().err.rsplit("\r", 1)[-1]
    assert "11.0/11.0" in last
    assert re.search(r"\d([kM]?sample/s|s/sample)", last)
    assert re.search(r"\d[kM]? tokens/s", last)


def test_packing_keeps_to_the_budget_and_forgets_nobody():
    lengths = [3, 9, 1, 4, 4, 30, 2]
    batches = packed(lengths, 12, 3)
    assert sorted(at for batch in batches for at in batch) == list(range(7))
    assert [5] in batches
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[at] for at in batch) <= 12
        assert len(batch) <= 3
    assert max(map(len, batches)) == 3


def test_samples_keep_ids_of_their_own(classifier, samples, tmp_path):
    data = with_ids(samples, key=lambda sample: int(100 * sample[0][0].abs()) * 50)
    expected = [data[at].sample_id for at in range(N)]
    done = project_dataset(classifier, loss, data, tmp_path / "g", **OPTIONS)
    assert done.store.ids.tolist() == expected
    again = project_dataset(classifier, loss, data, tmp_path / "g", **OPTIONS)
    assert (again.samples, again.skipped) == (0, N)


@pytest.mark.parametrize("at_once", [3, 512])
def test_an_id_that_comes_again_is_an_error_each_time(
    at_once, classifier, samples, tmp_path, monkeypatch
):
    """Its sample is not taken for the one that is stored, when the pass is tried again."""
    monkeypatch.setattr(windows, "_AT_ONCE", at_once)
    numbers = torch.tensor([*range(16), *range(5, 9)])
    data = TensorDataset(*samples.tensors, numbers)
    for _ in range(2):
        with pytest.raises(CaptureError, match=r"sample ids 5.* come more than once"):
            project_dataset(
                classifier, loss, data, tmp_path / "g",
                ids=lambda batch: batch[2], unit=6, **OPTIONS,
            )  # fmt: skip


class Rarely(nn.Module):
    """Has a layer that runs for batches with certain samples only."""

    def __init__(self):
        super().__init__()
        self.always, self.rarely = nn.Linear(5, 3), nn.Linear(5, 3)

    def forward(self, inputs):
        outputs = self.always(inputs)
        if (chosen := inputs[:, :1] > 0).any():
            outputs = outputs + self.rarely(inputs) * chosen
        return outputs


def test_a_batch_in_which_a_module_runs_first_is_verified_by_a_second_run(tmp_path):
    model, calls = Rarely().double(), []
    inputs = torch.randn(12, 5, dtype=torch.float64)
    inputs[:, 0] = torch.tensor([-1.0] * 6 + [1.0] * 6)
    samples = TensorDataset(inputs, torch.arange(12) % 3)

    def watched(model, batch):
        calls.append(len(batch[0]))
        return loss(model, batch)

    done = project_dataset(model, watched, samples, tmp_path / "g", batch_size=3, **OPTIONS)
    assert len(calls) == 5
    _, rows = oracle(model, samples)
    assert_within(done.store.rows(), rows, 10 * rows.norm(dim=1)[:, None])


# Interrupted


def stopping(at, error):
    """Return a loss that raises at a batch."""
    calls = iter(range(10**6))

    def stopped(model, batch):
        if next(calls) == at:
            raise error
        return loss(model, batch)

    return stopped


def shards(root):
    return {path.name: path.read_bytes() for path in sorted(root.rglob("*.safetensors"))}


@pytest.mark.parametrize(
    "at", [1, 3, *(pytest.param(at, marks=pytest.mark.stress) for at in (0, 2, 4, 6, 9))]
)
def test_an_interrupted_pass_goes_on_bit_by_bit(at, classifier, samples, tmp_path, monkeypatch):
    monkeypatch.setattr(windows, "_AT_ONCE", 3)
    given = {"batch_size": 2, "unit": 6, **OPTIONS}
    project_dataset(classifier, loss, samples, tmp_path / "whole", **given)
    monkeypatch.setattr(writing, "_COMMIT_AFTER", 0.0)  # units that are not full are written too
    with pytest.raises(KeyboardInterrupt):
        project_dataset(
            classifier, stopping(at, KeyboardInterrupt), samples, tmp_path / "g", **given
        )
    kept = len(GradientStore.open(tmp_path / "g"))
    assert kept == at // 2 * 3
    done = project_dataset(classifier, loss, samples, tmp_path / "g", **given)
    assert (done.samples, done.skipped) == (N - kept, kept)
    assert shards(tmp_path / "g") == shards(tmp_path / "whole")


def of_nothing(model, batch):
    return loss(model, batch) * torch.nan


@pytest.mark.parametrize("failing", [stopping(0, ValueError("no batch")), of_nothing])
def test_a_pass_that_fails_without_a_row_leaves_no_store(failing, classifier, samples, tmp_path):
    """The second loss is refused by the thread that writes. Other options are taken after."""
    with pytest.raises((ValueError, CaptureError)):
        project_dataset(classifier, failing, samples, tmp_path / "g", **OPTIONS)
    with pytest.raises(StoreError, match="there is no store"):
        GradientStore.open(tmp_path / "g")
    assert [each.name for each in (tmp_path / "g").iterdir()] == [".lock"]
    done = project_dataset(classifier, loss, samples, tmp_path / "g", **OPTIONS | {"dim": 5})
    assert len(done.store) == N


def test_a_pass_that_fails_with_rows_or_in_a_store_of_another_keeps_it(
    classifier, samples, tmp_path, monkeypatch
):
    monkeypatch.setattr(windows, "_AT_ONCE", 3)
    fails = stopping(2, ValueError("no batch"))
    with pytest.raises(ValueError, match="no batch"):
        project_dataset(
            classifier, fails, samples, tmp_path / "rows", batch_size=2, unit=6, **OPTIONS
        )
    assert len(GradientStore.open(tmp_path / "rows")) == 3
    root, at_once = tmp_path / "another", stopping(0, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        project_dataset(classifier, at_once, samples, root, **OPTIONS)
    with pytest.raises(ValueError, match="no batch"):
        project_dataset(classifier, stopping(0, ValueError("no batch")), samples, root, **OPTIONS)
    assert len(GradientStore.open(root)) == 0


def test_several_processes_share_units_out(classifier, samples, tmp_path):
    """One of them breaks off and goes on; whoever comes first, the files are the same."""
    given = {"batch_size": 2, "unit": 3, **OPTIONS}
    for rank in (0, 1):
        project_dataset(classifier, loss, samples, tmp_path / "whole", part=(rank, 2), **given)
    root = tmp_path / "g"
    stopped = stopping(3, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        project_dataset(classifier, stopped, samples, root, part=(1, 2), **given)
    assert GradientStore.open(root).ids.tolist() == [3, 4, 5]
    done = project_dataset(classifier, loss, samples, root, part=(0, 2), **given)
    assert (done.samples, done.skipped) == (3 + 3 + 3 + 2, 0)
    done = project_dataset(classifier, loss, samples, root, part=(1, 2), **given)
    assert (done.samples, done.skipped) == (6, 3)
    assert done.store.ids.tolist() == list(range(N))
    _, rows = oracle(classifier, samples)
    assert_within(done.store.rows(), rows, 10 * rows.norm(dim=1)[:, None])
    parts = [f"parts/0000{rank}-of-00002" for rank in (0, 1)]
    for part in parts:
        assert shards(root / part) == shards(tmp_path / "whole" / part) != {}
    with pytest.raises(CaptureError, match="cannot be dealt out"):
        project_dataset(classifier, loss, Stream(samples), tmp_path / "h", part=(0, 2), **given)


def test_an_error_of_the_writer_is_raised_and_loses_nothing(
    classifier, samples, tmp_path, monkeypatch
):
    monkeypatch.setattr(windows, "_AT_ONCE", 3)
    append, calls = GradientStore.append, iter(range(100))

    def failing(self, *given, **named):
        if next(calls) == 3:
            raise OSError("the disk is full")
        append(self, *given, **named)

    monkeypatch.setattr(GradientStore, "append", failing)
    with pytest.raises(OSError, match="the disk is full"):
        project_dataset(classifier, loss, samples, tmp_path / "g", unit=6, **OPTIONS)
    assert GradientStore.open(tmp_path / "g").ids.tolist() == list(range(9))


def test_a_loss_that_is_not_finite_is_named(classifier, samples, tmp_path):
    def broken(model, batch):
        return loss(model, batch) / (batch[1] != 2)

    with pytest.raises(CaptureError, match="the loss of sample 2 is inf"):
        project_dataset(classifier, broken, samples, tmp_path / "g", **OPTIONS)


def test_a_store_of_other_weights_is_refused(classifier, samples, tmp_path):
    project_dataset(classifier, loss, samples, tmp_path / "g", **OPTIONS)
    with torch.no_grad():
        classifier[0].weight += 1
    with pytest.raises(StoreError, match=r"info\.model"):
        project_dataset(classifier, loss, samples, tmp_path / "g", **OPTIONS)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"loss_weights": "mean"}, "takes no loss_weights"),
        ({"tokens_per_batch": 9}, "nobody knows how many tokens"),
    ],
)
def test_what_does_not_fit_is_refused(given, told, classifier, samples, tmp_path):
    with pytest.raises(CaptureError, match=told):
        project_dataset(classifier, loss, samples, tmp_path / "g", **given, **OPTIONS)


def test_batches_cannot_be_packed_and_data_are_not_empty(classifier, samples, tmp_path):
    with pytest.raises(CaptureError, match="come in batches"):
        project_dataset(
            classifier, loss, samples.tensors, tmp_path / "g", tokens_per_batch=5, **OPTIONS
        )
    for empty in (TensorDataset(torch.zeros(0, 5)), [], Stream([])):
        with pytest.raises(CaptureError, match="empty"):
            project_dataset(classifier, loss, empty, tmp_path / "g", **OPTIONS)
        assert not (tmp_path / "g").exists()


def names(ids):
    return ["a" for _ in ids]


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        ([("group", names)], "columns is a list"),
        ({"c": "int64"}, "'c' is 'int64'.*pair of a dtype and a function"),
        ({"c": ("int64", None)}, "pair of a dtype and a function"),
        ({"norm": ("float64", torch.Tensor.double)}, "'norm' is what the pass itself computes"),
        ({"loss": ("float64", torch.Tensor.double)}, "'loss' is what the pass itself computes"),
        ({"row": ("int64", torch.clone)}, "'row' cannot be the name of a column"),
        ({"__metadata__": ("int64", torch.clone)}, "'__metadata__' cannot be the name"),
    ],
)
def test_columns_that_cannot_be_are_refused_before_there_is_a_store(
    columns, told, classifier, samples, tmp_path
):
    with pytest.raises((CaptureError, StoreError), match=f"(?s){told}"):
        project_dataset(classifier, loss, samples, tmp_path / "g", columns=columns, **OPTIONS)
    assert not (tmp_path / "g").exists()


def test_columns_may_have_the_names_of_what_is_left_out(classifier, samples, tmp_path):
    columns = {"norm": ("float64", torch.Tensor.double), "loss": ("float64", torch.Tensor.double)}
    store = project_dataset(
        classifier, loss, samples, tmp_path / "g",
        columns=columns, norms=False, losses=False, **OPTIONS,
    ).store  # fmt: skip
    expected = torch.arange(N, dtype=torch.float64)
    assert torch.equal(store.columns["norm"], expected)
    assert torch.equal(store.losses, expected)


@pytest.mark.parametrize(
    ("column", "told"),
    [
        (lambda ids: ["a"] * (len(ids) - 1), "a list of 19 values for 20 samples"),
        (lambda ids: ids[:3], "a Tensor of 3 values for 20 samples"),
        (lambda ids: ids.sum(), "a Tensor for 20 samples"),
        (lambda ids: None, "a NoneType for 20 samples"),
        (lambda ids: "a" * len(ids), "a str for 20 samples"),
    ],
)
def test_a_function_of_ids_returns_one_value_for_each(column, told, classifier, samples, tmp_path):
    columns = {"c": ("category", column)}
    with pytest.raises(CaptureError, match=f"the function of 'c' returned {told}"):
        project_dataset(classifier, loss, samples, tmp_path / "g", columns=columns, **OPTIONS)
