"""What is resumed is bit for bit what was never interrupted, and nothing else is resumed."""

import json

import pytest
import torch
from run_kit import INPUTS, STEPS, losses_of, make, same_parameters, trained, validation_of

from ghost_core import CaptureError
from ghost_engines import Run, ScoreLog, StoreError


class KilledError(Exception):
    """Stands for what ends a process."""


def train(folder, until=STEPS, **given):
    """Train, and raise an error after a step; see `trained`."""

    def after_step(run):
        if run.steps == until < STEPS:
            raise KilledError

    return trained(folder, after_step=after_step, **given)


def logged(folder):
    log = ScoreLog.open(folder / "log")
    return [(each.step, each.ids.tolist(), each.values.tolist()) for each in log]


@pytest.mark.parametrize("until", [1, 3, 4])
def test_a_resumed_run_is_one_run(until, tmp_path):
    """A process that ends after step 1 or 3 lost what it did since its checkpoint."""
    whole, expected = train(tmp_path / "whole")
    with pytest.raises(KilledError):
        train(tmp_path / "run", until)
    with (tmp_path / "run/metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')  # cut off where the process was
    model, run = train(tmp_path / "run")
    assert same_parameters(model, whole)
    assert run.values.to_dict() == expected.values.to_dict()
    assert any(run.values.to_dict().values())
    found, other = run.values.history.columns(), expected.values.history.columns()
    assert all((found[name] == other[name]).all() for name in other)
    assert logged(tmp_path / "run") == logged(tmp_path / "whole")
    metrics = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("run", "whole")]
    assert metrics[0] == metrics[1]
    assert metrics[0].count("\n") == STEPS


def test_a_state_moves_to_another_folder(tmp_path):
    _, run = train(tmp_path / "a")
    state = torch.load(tmp_path / "a/checkpoint.pt", weights_only=True)["run"]
    model, optimizer = make()
    config = run.config.to_dict() | {"folder": str(tmp_path / "b")}
    with Run(model, optimizer, config, directions={"val": validation_of(model)}) as other:
        other.load_state_dict(state)
        assert other.steps == STEPS
        with pytest.raises(CaptureError, match="has begun"):
            other.load_state_dict(state)
    assert other.values.to_dict() == run.values.to_dict()


def test_the_folder_says_what_the_run_is(tmp_path):
    train(tmp_path)
    found = json.loads((tmp_path / "run.json").read_text())
    assert found["config"] == {
        "folder": str(tmp_path), "method": ["dot_product"], "mode": "exact", "options": {},
        "values": None, "order": 1, "history": 2, "refresh": 4, "log_every": 1,
        "policy": None, "target": None,
    }  # fmt: skip
    assert found["model"] == "torch.nn.modules.container.Sequential"
    assert found["dtypes"] == {"float64": 4}
    assert found["optimizer"] == "torch.optim.sgd.SGD"
    assert found["scaler"] is None
    assert found["directions"] == ["val"]
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"].keys() == {
        "python", "torch", "ghost-core", "ghost-engines", "ghost-layers"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("method", ["dot_product", "projection"]),
        ("mode", "fused"),
        ("options", {"dot_product": {"norms": True}}),
        ("values", True),
        ("order", 2),
        ("history", 3),
        ("refresh", 1),
        ("log_every", 2),
        ("policy", "threshold"),
    ],
)
def test_another_config_is_refused_by_the_name_of_the_field(name, value, tmp_path):
    with pytest.raises(KilledError):
        train(tmp_path, until=2)
    before = logged(tmp_path)
    with pytest.raises(CaptureError, match=f"a run with {name}=.*, and this one has {name}="):
        train(tmp_path, **{name: value})
    assert logged(tmp_path) == before


def test_a_folder_with_a_run_is_not_begun_anew(tmp_path):
    train(tmp_path)
    model, optimizer = make()
    again = Run(model, optimizer, {"folder": tmp_path}, directions={"val": validation_of(model)})
    with pytest.raises(CaptureError, match="there is a run in"), again, again.batch([1]):
        pass
    assert len(logged(tmp_path)) == STEPS


def test_other_models_and_objects_are_refused(tmp_path, caplog):
    train(tmp_path)
    config = json.loads((tmp_path / "run.json").read_text())["config"]
    model, optimizer = make()
    model.float()
    directions = {"val": lambda: losses_of(model, INPUTS.float()).mean()}
    with (
        Run(model, optimizer, config, directions=directions) as run,
        pytest.raises(CaptureError, match=r"dtypes=\{'float64': 4\}.*dtypes=\{'float32': 4\}"),
    ):
        run.resume(model=model, optimizer=optimizer, schedule=optimizer)
    with (
        Run(model, optimizer, config, directions=directions) as run,
        pytest.raises(CaptureError, match="model, optimizer, schedule, and model is to be"),
    ):
        run.resume(model=model)


def test_other_versions_are_told(tmp_path, caplog):
    train(tmp_path)
    path = tmp_path / "run.json"
    path.write_text(path.read_text().replace(torch.__version__, "1.0"))
    train(tmp_path)
    assert "was written with other versions: {" in caplog.text
    assert "'torch': '1.0'" in caplog.text


@pytest.mark.parametrize("text", [
    "{", "[]", "{}", '{"config": {}, "versions": 1}',
    '{"config": {}, "versions": {}, "effective": {}}',
    '{"config": {}, "versions": {}, "effective": {"options": {"norm": []}}}',
])  # fmt: skip
def test_a_damaged_description_is_named(text, tmp_path):
    train(tmp_path)
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(CaptureError, match=r"run\.json (is no JSON|does not say what a run was)"):
        train(tmp_path)


def test_two_runs_do_not_write_one_folder(tmp_path):
    """Also where there is no log, which has a lock of its own."""
    with Run(*make(), {"folder": tmp_path, "method": "none"}) as one:
        one.record(loss=1.0)
        other = Run(*make(), {"folder": tmp_path, "method": "none"})
        with pytest.raises(StoreError, match=f"another writer has {tmp_path} open"), other:
            other.resume()
        one.save()
    (tmp_path / "run.json").write_text("{")
    for _ in range(2):  # a refused one lets go of the folder
        with pytest.raises(CaptureError, match="is no JSON"):
            resumed(tmp_path)


def test_a_checkpoint_is_not_read_while_another_process_writes(tmp_path):
    """What it is going to write is not there yet."""
    checkpoint = tmp_path / "checkpoint.pt"
    with Run(*make(), {"folder": tmp_path, "method": "none"}) as one:
        one.save()
        checkpoint.rename(tmp_path / "aside.pt")
        checkpoint.write_text("half of it")
        with pytest.raises(StoreError, match=f"another writer has {tmp_path} open"):
            resumed(tmp_path)
        with pytest.raises(CaptureError, match="the run has begun"):
            one.resume()
    with pytest.raises(CaptureError, match="is no checkpoint, or damaged"):
        resumed(tmp_path)
    (tmp_path / "aside.pt").replace(checkpoint)
    resumed(tmp_path)  # what was refused has let go of the folder


def resumed(folder):
    with Run(*make(), {"folder": folder, "method": "none"}) as run:
        run.resume()
