"""The folder says what came of a config, and only a run that measures the same goes on with it."""

import json

import pytest
import torch
from run_kit import INPUTS, ids_of, losses_of, make, validation_of

from ghost_core import CaptureError
from ghost_engines import CosineEngine, Run, RunConfig
from ghost_engines.runs.description import describe

SHARED = {
    "layers": "*", "exclude": [], "verify": True, "generic": True, "lift": True, "batch_dim": {},
    "row_owner": {}, "units": [], "registry": None,
}  # fmt: skip


def trained(folder, scaler=None, **fields):
    """Make one step, saved, after those of the folder; return what the folder says."""
    model, optimizer = make()
    saved = {"model": model, "optimizer": optimizer}
    directions = {"val": validation_of(model)}
    config = {"folder": folder, "log_every": 1, **fields}
    with Run(model, optimizer, config, directions=directions, grad_scaler=scaler) as run:
        ids = ids_of(run.resume(**saved))
        with run.batch(ids):
            run.backward(losses_of(model, INPUTS[ids]), train_weight=0.25, validation_weight=0.2)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        run.save(**saved)
    return json.loads((folder / "run.json").read_text())


def rewrite(folder, change):
    """Change what the folder and its checkpoint say of the run."""
    path, checkpoint = folder / "run.json", folder / "checkpoint.pt"
    found, state = json.loads(path.read_text()), torch.load(checkpoint, weights_only=True)
    change(found)
    change(state["run"]["description"])
    path.write_text(json.dumps(found))
    torch.save(state, checkpoint)


def test_options_with_their_defaults_and_whether_values_are_credited(tmp_path):
    found = trained(
        tmp_path,
        method=["dot_product", "projection"],
        options={"projection": {"dim": 4}, "dot_product": {"exclude": ["*.bias"]}},
    )
    assert found["config"]["values"] is None
    assert found["effective"] == {
        "values": True,
        "scales": False,
        "policy": None,
        "options": {
            "dot_product": SHARED
            | {"mode": "exact", "norms": False, "per_token": False, "memory_budget": None}
            | {"exclude": ["*.bias"]},
            "projection": SHARED
            | {"dim": 4, "total_dim": None, "min_dim": 8, "dims": {}, "sketch": [], "seed": 0}
            | {"init": "gaussian", "dtype": "float32", "loss_weights": None, "unit_norm": False},
        },
        "not_written": {},
    }


@pytest.mark.parametrize("fields", [{"values": False}, {"method": "none"}], ids=str)
def test_nothing_is_credited(fields, tmp_path):
    assert trained(tmp_path, **fields)["effective"]["values"] is False


@pytest.mark.parametrize("enabled", [True, False])
def test_a_scaler_is_named_and_whether_it_scales(enabled, tmp_path):
    found = trained(tmp_path, torch.amp.GradScaler("cpu", init_scale=8.0, enabled=enabled))
    assert found["scaler"] == "torch.amp.grad_scaler.GradScaler"
    assert found["effective"]["scales"] is enabled
    other = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=not enabled)
    with pytest.raises(CaptureError, match=f"with effective scales={enabled}, and this one has"):
        trained(tmp_path, other)


def test_a_folder_of_before_goes_on(tmp_path):
    """One that has no word of it, and one of a version with other options."""
    trained(tmp_path)
    rewrite(tmp_path, lambda found: found.pop("effective"))
    trained(tmp_path)
    trained(tmp_path / "other")

    def change(found):
        options = found["effective"]["options"]["dot_product"]
        del options["lift"]
        options["gone"] = 3

    rewrite(tmp_path / "other", change)
    trained(tmp_path / "other")
    for folder in (tmp_path, tmp_path / "other"):
        assert torch.load(folder / "checkpoint.pt", weights_only=True)["run"]["steps"] == 2


def test_another_default_is_refused_by_its_name(tmp_path):
    trained(tmp_path)
    rewrite(tmp_path, lambda found: found["effective"]["options"]["dot_product"].update(lift=False))
    message = "with dot_product.lift=False, and this one has dot_product.lift=True"
    with pytest.raises(CaptureError, match=message):
        trained(tmp_path)


class Foreign(CosineEngine):
    """Has defaults that JSON cannot say."""

    def __init__(self, model, *, table=make, reach=float("inf"), power=2, **options):
        super().__init__(model, **options)


def test_what_json_cannot_say_is_named_not_made_a_text(tmp_path):
    model, optimizer = make()
    config = RunConfig(folder=tmp_path, method="norm")
    found = describe(config, model, optimizer, None, {"foreign": Foreign(model)}, False)
    written = found["effective"]["options"]["foreign"]
    assert written == SHARED | {"power": 2}
    assert found["effective"]["not_written"] == {"foreign": ["table", "reach"]}
