"""Results read alike, whatever the engine."""

import pytest
import torch

from ghost_core import CaptureError
from ghost_core.plugins import installed
from ghost_engines import (
    CosineEngine,
    DotProductEngine,
    GramEngine,
    NormEngine,
    ProjectionEngine,
    Result,
)

N, M, K = 4, 3, 2

ENGINES = {
    "dot product": DotProductEngine,
    "cosine": CosineEngine,
    "norm": NormEngine,
    "gram": GramEngine,
    "projection": ProjectionEngine,
}
"""Every engine that ghost ships, by name."""

SHAPES = {
    "dot product": (N, K),
    "cosine": (N, K),
    "norm": (N,),
    "gram": (N, N),
    "projection": (N, 21),
}

SAID = {
    "dot product": "Scores(N=4, 4 parameters, K=2 (random 0, random 1), verified)",
    "cosine": "Cosines(N=4, 4 parameters, K=2 (random 0, random 1), verified)",
    "norm": "Norms(N=4, 4 parameters, verified)",
    "gram": "Gram(N=4, 4 parameters, verified)",
    "projection": "ProjectedRows(N=4, 4 parameters, k_total=21, float64, verified)",
}

LAYERS = {"0": ["0.bias", "0.weight"], "2": ["2.bias", "2.weight"]}


@pytest.fixture
def make(mlp, draw_directions):
    """Make an engine by name."""

    def made(name, **options):
        if name in ("norm", "gram"):
            options = {"loss_weights": "sum", **options}
        if name == "projection":
            options = {"total_dim": 24, "min_dim": 1, "dtype": torch.float64, **options}
        engine = ENGINES[name](mlp, **options)
        if name in ("dot product", "cosine"):
            for direction, tensors in draw_directions(mlp, K).items():
                engine.add_direction(direction, tensors)
        return engine

    return made


def run(engine, n=N):
    inputs = torch.randn(n, 5, dtype=torch.float64)
    with engine, engine.batch(range(10, 10 + n)) as batch:
        engine.model(inputs).square().sum().backward()
    return batch


def joined(name, parts):
    """Put the parts of a whole together, as the result says that they belong together."""
    if name == "norm":
        return torch.stack(parts).square().sum(0).sqrt()
    return torch.cat(parts, 1) if name == "projection" else torch.stack(parts).sum(0)


def test_no_engine_of_this_package_is_left_out():
    offered = installed().engines.values()
    assert {each for each in offered if each.__module__.startswith("ghost_engines.")} == set(
        ENGINES.values()
    )


@pytest.mark.parametrize("name", ENGINES)
def test_every_result_has_the_same_words(make, name):
    engine = make(name)
    batch = run(engine)
    result = batch.result
    assert engine.collect() is result
    assert isinstance(result, Result)
    assert result.ids.tolist() == [10, 11, 12, 13]
    assert result.verified is True
    assert result.total.shape == SHAPES[name]
    assert sorted(result.by_parameter) == [name for names in LAYERS.values() for name in names]
    assert sorted(result.by_layer) == sorted(LAYERS)
    for layer, names in LAYERS.items():
        own = joined(name, [result.by_parameter[each] for each in names])
        torch.testing.assert_close(result.by_layer[layer], own, rtol=1e-12, atol=1e-12)
    whole = joined(name, [result.by_parameter[each] for each in sorted(result.by_parameter)])
    torch.testing.assert_close(result.total, whole, rtol=1e-12, atol=1e-12)
    assert result.total.any()


@pytest.mark.parametrize("name", ENGINES)
def test_every_result_says_what_it_is(make, name):
    batch = run(make(name))
    assert repr(batch.result) == SAID[name]
    assert repr(batch) == f"<Batch: N=4, {SAID[name]}>"
    unverified = run(make(name, verify=False)).result
    assert repr(unverified) == SAID[name].replace("verified", "not verified")


@pytest.mark.parametrize("name", ["dot product", "cosine"])
def test_cosines_with_directions_read_as_dots_do(make, name):
    result = run(make(name, **({"norms": True} if name == "dot product" else {}))).result
    assert result.cosines.shape == result.total.shape
    assert result.cosines_by_parameter.keys() == result.by_parameter.keys()
    assert result.cosines_by_layer.keys() == result.by_layer.keys()
    squared = sum(result.squared_norms[each] for each in LAYERS["2"])
    others = sum(result.squared_direction_norms[each] for each in LAYERS["2"])
    expected = result.by_layer["2"] / (squared[:, None] * others).sqrt()
    torch.testing.assert_close(result.cosines_by_layer["2"], expected)


def test_products_with_a_reference_read_as_those_of_a_batch(make):
    engine = make("gram")
    inputs = torch.randn(M, 5, dtype=torch.float64)
    with engine, engine.reference(range(M)):
        engine.model(inputs).square().sum().backward()
    gram = run(engine).result
    between = gram.between
    assert between.ids.tolist() == gram.ids.tolist()
    assert between.reference_ids.tolist() == [0, 1, 2]
    assert between.total.shape == between.cosines.shape == (N, M)
    assert gram.total.shape == gram.cosines.shape == (N, N)
    assert between.by_parameter.keys() == gram.by_parameter.keys()
    assert between.by_layer.keys() == gram.by_layer.keys()
    assert between.verified is gram.verified is True
    assert repr(gram) == "Gram(N=4, 4 parameters, M=3, verified)"
    assert repr(between) == "Between(N=4, 4 parameters, M=3, verified)"


def test_documents_read_as_samples(make, mlp):
    engine = make("dot product", per_token=True)
    with engine, engine.batch(range(N)) as batch:
        mlp(torch.randn(N, 6, 5, dtype=torch.float64)).square().sum().backward()
    segments = batch.result.by_segment(torch.arange(6).expand(N, 6) // 2)
    assert isinstance(segments, Result)
    assert segments.ids.tolist() == [0, 1, 2]
    assert segments.total.shape == (3, K)
    assert repr(segments) == "SegmentScores(S=3, K=2 (random 0, random 1), verified)"


@pytest.mark.parametrize("name", ENGINES)
def test_a_batch_has_its_result_and_no_other_name_for_it(make, name):
    batch = run(make(name))
    public = {each for each in dir(batch) if not each.startswith("_")}
    assert public == {"ids", "n", "result", "verified", "finish"}


@pytest.mark.parametrize("name", ENGINES)
def test_an_open_batch_has_no_result(make, name):
    engine = make(name)
    with engine, engine.batch(range(N)) as batch:
        with pytest.raises(CaptureError, match="no result"):
            _ = batch.result
        assert repr(batch) == "<Batch: N=4, no result>"
        engine.model(torch.randn(N, 5, dtype=torch.float64)).square().sum().backward()
    assert batch.result.total.any()


def test_many_directions_are_not_all_listed(make, mlp, draw_directions):
    engine = make("dot product")
    for at, direction in enumerate(draw_directions(mlp, 30).values()):
        engine.add_direction(f"another direction {at}", direction)
    said = repr(run(engine).result)
    assert "K=32 (" in said
    assert len(said) < 100
