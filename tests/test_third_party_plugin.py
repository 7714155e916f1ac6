"""A plugin of a third party does all that ghost's own packages do, through public API alone."""

import json
import subprocess
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ghost_core.plugins import installed
from ghost_core.testing import (
    LAYERS,
    assert_within,
    check_engine,
    check_projection,
    check_sampler,
    per_sample_gradients,
)
from ghost_engines import DotProductEngine, ProjectionEngine, Run, RunConfig, score_dataset

sample = pytest.importorskip("ghost_plugin_sample")

NAME = "ghost-plugin-sample:sample"
OFFERS = {
    "command agreement",
    "engine sign_agreement",
    "policy above_median",
    "projection coordinates",
    "sampler ghost_plugin_sample.Scale",
}


@pytest.fixture
def model():
    """A model with a layer that only the plugin knows."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), sample.Scale(6), nn.Tanh(), nn.Linear(6, 3)).double()
    with torch.no_grad():
        model[1].weight.copy_(torch.randn(6))
    return model


@pytest.fixture
def inputs():
    return torch.randn(4, 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def squares(outputs):
    return outputs.square().flatten(1).sum(1) + outputs.flatten(1).sum(1)


def run(engine, model, inputs):
    with engine, engine.batch(range(len(inputs))) as batch:
        squares(model(inputs)).sum().backward()
    return batch.result


def test_it_is_found_with_all_it_offers():
    found = installed()
    (plugin,) = [plugin for plugin in found.plugins if plugin.name == NAME]
    assert plugin.status == "loaded"
    assert set(plugin.offers) == OFFERS
    assert found.engines["sign_agreement"] is sample.SignAgreementEngine
    assert found.projection("coordinates") is sample.CoordinateProjection
    assert found.policy("above_median") is sample.AboveMedian
    assert type(found.samplers.find(sample.Scale(3)).sampler) is sample.ScaleSampler


def test_every_other_plugin_loaded_too():
    statuses = {plugin.name: plugin.status for plugin in installed().plugins}
    assert {"ghost-engines:engines", "ghost-layers:layers", NAME} <= statuses.keys()
    assert {name: status for name, status in statuses.items() if status != "loaded"} == {}


def test_its_sampler_is_exact():
    layer = sample.Scale(4)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(4, generator=torch.Generator().manual_seed(0)))
    inputs = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(1))
    for uses in (1, 2):
        check_sampler(sample.ScaleSampler, layer, inputs, uses=uses)
    check_sampler(sample.ScaleSampler, layer, inputs[:, 0])


def test_a_wrong_sampler_would_be_found():
    class Wrong(sample.ScaleSampler):
        def gradients(self, call, records, grads):
            return super().gradients(call, records, [2 * grads[0]])

    with pytest.raises(AssertionError, match=r"Scale\.weight, materialize"):
        check_sampler(Wrong, sample.Scale(4), torch.randn(5, 3, 4))


def test_its_layer_is_scored_by_the_engine_of_ghost(model, inputs):
    expected = per_sample_gradients(model, squares(model(inputs)))
    direction = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    engine = DotProductEngine(model)
    engine.add_direction("random", direction)
    scores = run(engine, model, inputs)
    assert scores.by_parameter.keys() == expected.keys()
    for name, gradient in expected.items():
        rows = gradient.flatten(1)
        scale = rows.norm(dim=1) * direction[name].norm()
        assert gradient.any()
        assert_within(
            scores.by_parameter[name][:, 0], rows @ direction[name].flatten(), scale, what=name
        )


def agreement(gradients):
    """Add up the signs of all entries that are not lost in rounding."""
    rows = torch.stack(
        [
            torch.cat([each[n].flatten() for each in gradients.values()])
            for n in range(len(next(iter(gradients.values()))))
        ]
    )
    lost = rows.abs() <= 1e-6 * rows.abs().max(dim=1, keepdim=True).values
    return rows.masked_fill(lost, 0).sign().sum(1)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
def test_its_engine_keeps_what_every_engine_promises():
    check_engine(sample.SignAgreementEngine, expected=agreement)


def test_its_engine_scores_a_data_set_by_its_name(model, inputs):
    expected = agreement(per_sample_gradients(model, squares(model(inputs))))
    table = score_dataset(
        model, lambda model, batch: squares(model(batch)), inputs, {}, engine="sign_agreement"
    )
    assert table.scores[:, 0].tolist() == expected.tolist()
    assert table.names == ("sign_agreement",)


def test_signs_of_uses_instead_of_their_sum_would_be_found():
    class Wrong(sample.SignAgreementEngine):
        def on_start(self, batch):
            super().on_start(batch)
            self.signs = torch.zeros(batch.n, dtype=torch.float64)

        def on_gradient(self, pass_, parameter, gradient):
            rows = gradient.materialize().reshape(gradient.n, parameter.shape.numel())
            self.signs[pass_.samples] += rows.sign().sum(1)

        def on_end(self, batch):
            return self.signs

    tied = {"tied": LAYERS["embedding tied to a head"]}
    with pytest.raises(AssertionError, match=r"embedding tied to a head: .* entries are off"):
        check_engine(Wrong, expected=agreement, examples=tied)


def test_its_engine_agrees_with_brute_force(model, inputs):
    expected = per_sample_gradients(model, squares(model(inputs)))
    signs = torch.stack([gradient.sign().flatten(1).sum(1) for gradient in expected.values()])
    assert signs.any()
    result = run(sample.SignAgreementEngine(model), model, inputs)
    assert torch.equal(result, signs.sum(0))


def test_its_projection_keeps_the_contract():
    check_projection(sample.CoordinateProjection)


def test_its_projection_serves_the_engine_of_ghost(model, inputs):
    expected = per_sample_gradients(model, squares(model(inputs)))
    engine = ProjectionEngine(model, dim=6, min_dim=2, init="coordinates", dtype="float64")
    rows = run(engine, model, inputs).rows
    assert engine.manifest()["projection"] == "coordinates"
    for block in engine.layout:
        left, right = engine.maps(block.parameter)
        gradient = expected[block.parameter]
        matrices = gradient.reshape(len(inputs), left.shape[1], right.shape[1])
        projected = (left @ matrices @ right.mT).flatten(1)
        scale = left.norm() * right.norm() * gradient.flatten(1).norm(dim=1)[:, None]
        assert_within(rows[:, block.columns], projected, scale, what=block.parameter)
        # Coordinates are kept as they are: every number of a row is one of the gradient, scaled.
        assert all((each != 0).sum(1).tolist() == [1] * len(each) for each in (left, right))


def test_its_policy_chooses_among_candidates(model, inputs):
    expected = per_sample_gradients(model, squares(model(inputs)))
    engine = DotProductEngine(model)
    engine.add_direction("ones", {n: torch.ones_like(p) for n, p in model.named_parameters()})
    with engine.scoring():
        scores = engine.score(lambda: squares(model(inputs)), range(len(inputs)))
    dots = torch.stack([gradient.flatten(1).sum(1) for gradient in expected.values()]).sum(0)
    chosen = scores.choose("above_median", factor=0.5)
    assert chosen.indices.tolist() == (dots > 0.5 * dots.median()).nonzero().flatten().tolist()
    assert f"{len(chosen)} of 4 for ones by AboveMedian(factor=0.5)" in repr(chosen)


def test_a_run_chooses_by_its_policy(model, inputs, tmp_path):
    dots = per_sample_gradients(model, squares(model(inputs)))
    sums = torch.stack([gradient.flatten(1).sum(1) for gradient in dots.values()]).sum(0)
    ones = {name: torch.ones_like(each) for name, each in model.named_parameters()}
    config = RunConfig(folder=tmp_path, policy={"above_median": {"factor": 0.5}})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Run(model, optimizer, config, directions={"ones": ones}) as run:
        chosen = run.select(lambda: squares(model(inputs)), range(len(inputs)))
    assert chosen.indices.tolist() == (sums > 0.5 * sums.median()).nonzero().flatten().tolist()
    assert json.loads((tmp_path / "run.json").read_text())["effective"]["policy"] == {
        "above_median": {"factor": 0.5}
    }


def test_the_command_lists_it():
    command = Path(sysconfig.get_path("scripts")) / "ghost"
    listing = subprocess.run([command, "plugins"], capture_output=True, text=True, check=True)
    rows = [line.split("\t") for line in listing.stdout.splitlines() if line.startswith(NAME)]
    assert {row[2] for row in rows} == OFFERS
    assert {row[3] for row in rows} == {"loaded"}


def ghost(*arguments):
    command = Path(sysconfig.get_path("scripts")) / "ghost"
    return subprocess.run([command, *map(str, arguments)], capture_output=True, text=True)


def test_its_command_is_one_of_ghost(tmp_path):
    assert "Print the signs of each row of a file" in " ".join(ghost("--help").stdout.split())
    np.save(tmp_path / "rows.npy", np.array([[1.0, -2.0, 3.0], [0.0, 0.0, -1.0]]))
    done = ghost("agreement", "--path", tmp_path / "rows.npy")
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n-1\n", "")


def test_what_goes_wrong_in_its_command_names_it(tmp_path):
    done = ghost("agreement", "--path", tmp_path / "none.npy")
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"ghost: the command agreement of the plugin {NAME}: FileNotFoundError")
