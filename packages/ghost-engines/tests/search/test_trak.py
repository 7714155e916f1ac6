"""TRAK (Park et al., 2023): gradients of margins, whitened, of several models, times 1 - p."""

import logging

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from ghost_engines import ProjectionEngine, project_dataset, project_queries
from ghost_engines.search import Whitening, scores, search
from ghost_engines.store import StoreError

logger = logging.getLogger(__name__)

CLASSES = 10


def margins(model, batch):
    """Return log p / (1 - p) of each sample's own label, the output function of TRAK."""
    return margins_of(model(batch[0]), batch[1])


def margins_of(logits: Tensor, labels: Tensor) -> Tensor:
    own = one_hot(labels, logits.shape[1]).bool()
    return logits[own] - logits.masked_fill(own, -torch.inf).logsumexp(1)


def estimates(root, models, data, asked, dim, **given):
    """Return the stores of several models, their queries, and Q averaged over them, `[N]`."""
    stores, queries = [], []
    for seed, model in enumerate(models):
        stores.append(
            project_dataset(
                model, margins, data, root / str(seed), dim=dim, seed=seed, dtype="float64", **given
            ).store
        )
        engine = ProjectionEngine.from_manifest(model, stores[-1])
        queries.append(project_queries(engine, margins, asked))
    return stores, queries, torch.stack([torch.sigmoid(-each.losses) for each in stores]).mean(0)


def by_numpy(rows, queries, q):
    """Return the estimator as the paper has it (equation 17), `[Q, N]`, without thresholds."""
    terms = [
        asked @ np.linalg.inv(phi.T @ phi) @ phi.T for phi, asked in zip(rows, queries, strict=True)
    ]
    return np.mean(terms, axis=0) * np.mean(q, axis=0)


def test_it_is_the_papers_formula(tmp_path):
    models = [nn.Linear(5, 3, bias=False, dtype=torch.float64) for _ in range(3)]
    inputs, labels = torch.randn(50, 5, dtype=torch.float64), torch.arange(50) % 3
    data, asked = (inputs[:40], labels[:40]), (inputs[40:], labels[40:])
    stores, queries, q = estimates(tmp_path, models, data, asked, (2, 4))
    each = [Whitening.of(store, damping=0, blocks="all") for store in stores]
    given = {"by": each, "weights": [1 / 3 / 40] * 3, "row_weights": q}
    found = scores(stores, queries, **given)
    with torch.no_grad():
        p = [model(data[0]).softmax(1).gather(1, data[1][:, None])[:, 0] for model in models]
    expected = by_numpy(
        [store.rows().numpy() for store in stores],
        [each.rows.numpy() for each in queries],
        [1 - each.numpy() for each in p],
    )
    np.testing.assert_allclose(found.scores.numpy(), expected, atol=1e-9 * abs(expected).max())
    near = search(stores, queries, 4, block=7, **given)
    order = np.argsort(-expected, axis=1)[:, :4]
    assert near.ordinals.numpy().tolist() == order.tolist()


@pytest.mark.parametrize(
    "wrong",
    [torch.ones(39), torch.ones(1), torch.full((40,), torch.nan), torch.ones(40).int(), 2.0],
)
def test_there_is_one_finite_weight_for_each_row(tmp_path, wrong):
    data = torch.randn(40, 5), torch.arange(40) % 3
    store = project_dataset(nn.Linear(5, 3), margins, data, tmp_path / "g", dim=4).store
    with pytest.raises(StoreError, match="row_weights must be finite") as caught:
        search(store, torch.randn(1, store.k_total), row_weights=wrong)
    assert "[40]" in str(caught.value)


def trained(images: Tensor, labels: Tensor) -> nn.Module:
    """Fit a logistic regression with L2 penalty."""
    model = nn.Linear(64, CLASSES, bias=False, dtype=torch.float64)
    nn.init.zeros_(model.weight)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=60, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        found = nn.functional.cross_entropy(model(images), labels, reduction="sum")
        found = found + model.weight.square().sum() / 2
        found.backward()
        return found

    optimizer.step(loss)
    return model


def correlations(table: Tensor, subsets: Tensor, outputs: Tensor) -> float:
    """Return the mean rank correlation of sums of scores with outputs after training, the LDS."""
    predicted, ranked = (
        each.argsort(1).argsort(1).double() for each in (table @ subsets.T, outputs)
    )
    pairs = zip(predicted, ranked, strict=True)
    return float(np.mean([np.corrcoef(one, other)[0, 1] for one, other in pairs]))


@pytest.mark.stress
def test_it_orders_subsets_of_digits_as_training_does(tmp_path):
    sklearn = pytest.importorskip("sklearn.datasets")
    images, labels = sklearn.load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    images, labels = torch.tensor(images)[order] / 16, torch.tensor(labels)[order]
    data, asked = (images[:1200], labels[:1200]), (images[1200:1230], labels[1200:1230])
    generator = torch.Generator().manual_seed(1)

    def half() -> Tensor:
        return torch.randperm(1200, generator=generator)[:600]

    models = [trained(*(each[part] for each in data)) for part in (half() for _ in range(5))]
    stores, queries, q = estimates(tmp_path, models, data, asked, (9, 16))
    by = [Whitening.of(store, damping=0, blocks="all") for store in stores]
    subsets = torch.zeros(40, 1200, dtype=torch.float64)
    outputs = []
    for subset in subsets:
        taken = half()
        subset[taken] = 1
        with torch.no_grad():
            outputs.append(margins(trained(*(each[taken] for each in data)), asked))
    after = torch.stack(outputs, 1)
    found = {
        "TRAK": scores(stores, queries, by, row_weights=q),
        "without Q": scores(stores, queries, by),
        "one model": scores(stores[0], queries[0], by[0], row_weights=q),
        "dot": scores(stores, queries),
    }
    lds = {name: correlations(each.scores, subsets, after) for name, each in found.items()}
    logger.info("LDS: %s", lds)
    assert lds["TRAK"] > 0.65
    assert lds["TRAK"] > max(lds["without Q"], lds["one model"]) + 0.1
    assert lds["without Q"] > lds["dot"] + 0.1
