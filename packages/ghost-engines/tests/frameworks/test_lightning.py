"""Values inside Lightning's Trainer, with automatic optimization."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from trainer_kit import brute_force

from ghost_core import CaptureError, UnknownNameError
from ghost_engines import IdCollator, RunConfig, with_ids

pytestmark = [
    pytest.mark.stress,
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* is not empty:UserWarning"),
]
RATE = 0.2
INPUTS = torch.randn(20, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
VALIDATION = torch.randn(5, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.fixture
def lightning():
    return pytest.importorskip("lightning.pytorch")


def loss_of(net, inputs):
    return net(inputs).square().sum(1)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()


def module(lightning, calls_itself, seen=None, stops_at=None):
    """Return a LightningModule; it calls itself, or what it has inside."""

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = net()

        def forward(self, inputs):
            return self.net(inputs)

        def training_step(self, batch, index):
            if seen is not None:
                at, ids = self.trainer.global_step, batch.pop("sample_id").tolist()
                parameters = copy.deepcopy(self.net.state_dict())
                seen.append({"at": at, "ids": ids, "parameters": parameters})
            if self.trainer.global_step == stops_at:
                raise ZeroDivisionError
            assert batch.keys() == {"x"}
            return loss_of(self if calls_itself else self.net, batch["x"]).mean()

        def validation_step(self, batch, index):
            self.log("val_loss", loss_of(self, batch["x"]).mean())

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=RATE)

    return Module()


def loader(inputs=INPUTS):
    data = with_ids([{"x": each} for each in inputs])
    return DataLoader(data, batch_size=3, collate_fn=IdCollator())


def fit(lightning, folder, model, callbacks, checkpoint=None, **changes):
    """Train: four steps of two micro-batches an epoch, the last of them of two samples."""
    given = {
        "accelerator": "cpu", "max_epochs": 2, "accumulate_grad_batches": 2, "logger": False,
        "gradient_clip_val": 0.05, "enable_progress_bar": False, "enable_model_summary": False,
        "enable_checkpointing": False, "default_root_dir": folder, "callbacks": callbacks,
        "log_every_n_steps": 1,
    } | changes  # fmt: skip
    trainer = lightning.Trainer(**given)
    trainer.fit(model, loader(), loader(VALIDATION), ckpt_path=checkpoint)
    return trainer


def ghost(folder, model, calls_itself):
    from ghost_engines.frameworks import GhostLightning

    inner = "" if calls_itself else "net"
    direction = {"val": lambda: loss_of(model if calls_itself else model.net, VALIDATION).mean()}
    return GhostLightning(RunConfig(folder=folder), direction, module=inner)


def losses(model, parts):
    """Micro-batches of three, and of two at last, each divided by two."""
    return [
        loss_of(model, INPUTS[[one]]).sum() / len(part["ids"]) / 2
        for part in parts
        for one in part["ids"]
    ]


@pytest.mark.parametrize("calls_itself", [True, False], ids=["self", "net"])
def test_values_and_parameters_with_accumulation_and_clipping(lightning, calls_itself, tmp_path):
    seen = []
    before = module(lightning, calls_itself, seen)
    fit(lightning, tmp_path, before, [])
    model = module(lightning, calls_itself)
    callback = ghost(tmp_path / "run", model, calls_itself)
    trainer = fit(lightning, tmp_path, model, [callback])
    assert all(map(torch.equal, model.parameters(), before.parameters()))

    def validation(one):
        return loss_of(one, VALIDATION).mean()

    expected = brute_force(net(), seen, losses, validation, rate=RATE, clip=0.05)
    assert sorted(expected) == list(range(20))
    assert callback.values.to_dict() == pytest.approx(expected, rel=1e-9)
    assert (callback.values.columns()["altered"] == 0).all()
    assert callback.values.steps == trainer.global_step == 8
    assert "ghost_value_val" in trainer.callback_metrics
    assert "val_loss" in trainer.callback_metrics
    assert not model._forward_hooks


def test_a_run_is_resumed_from_lightnings_checkpoint(lightning, tmp_path):
    whole = module(lightning, True)
    expected = ghost(tmp_path / "whole", whole, True)
    fit(lightning, tmp_path, whole, [expected])
    saves = lightning.callbacks.ModelCheckpoint(tmp_path / "saved", every_n_epochs=1)
    saving = {"enable_checkpointing": True}
    first = module(lightning, True, stops_at=6)
    with pytest.raises(ZeroDivisionError):
        fit(lightning, tmp_path, first, [ghost(tmp_path / "run", first, True), saves], **saving)
    assert not first._forward_hooks
    (checkpoint,) = (tmp_path / "saved").glob("*.ckpt")
    second = module(lightning, True)
    callback = ghost(tmp_path / "run", second, True)
    fit(lightning, tmp_path, second, [callback, saves], str(checkpoint), **saving)
    assert all(map(torch.equal, second.parameters(), whole.parameters()))
    assert callback.values.to_dict() == expected.values.to_dict()
    assert callback.values.steps == 8


def test_mistakes_say_what_to_do(lightning, tmp_path):
    model = module(lightning, True)
    manual = module(lightning, True)
    manual.automatic_optimization = False
    for given, changes, message in (
        (manual, {"gradient_clip_val": None, "accumulate_grad_batches": 1}, "automatic"),
        (model, {}, "has no 'sample_id'"),
    ):
        callback = ghost(tmp_path / message[:4], given, True)
        trainer = lightning.Trainer(
            accelerator="cpu", max_epochs=1, logger=False, enable_progress_bar=False,
            enable_model_summary=False, enable_checkpointing=False, callbacks=[callback], **changes,
        )  # fmt: skip
        rows = DataLoader([{"x": each} for each in INPUTS], batch_size=4)
        with pytest.raises(CaptureError, match=message):
            trainer.fit(given, rows, loader(VALIDATION))
        assert not given._forward_hooks
    with pytest.raises(CaptureError, match="before training begins"):
        ghost(tmp_path, model, True).values.to_dict()


def test_an_optimizer_of_another_model_is_named(lightning, tmp_path):
    model = module(lightning, True)
    model.configure_optimizers = lambda: torch.optim.SGD(net().parameters(), lr=RATE)
    with pytest.raises(
        CaptureError, match=r"the optimizer holds none of .* net\.0\.bias"
    ) as caught:
        fit(lightning, tmp_path, model, [ghost(tmp_path / "run", model, True)])
    assert "another model" in caught.value.reason
    assert not model._forward_hooks


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", r"net\.0 was called outside a call of the model: call the module"),
        ("wrapper", r"0\.0 was called outside a call of the model: call the module"),
        ("other", "the model was not called .* give the engine the module that is called"),
    ],
)
def test_a_module_that_is_not_called_is_named(lightning, name, message, tmp_path):
    """What is called is inside of the module and of a wrapper, or is another network."""
    from ghost_engines.frameworks import GhostLightning

    model = module(lightning, False)
    model.wrapper, model.other = nn.Sequential(model.net), net()
    direction = {"val": lambda: loss_of(model.get_submodule(name), VALIDATION).mean()}
    callback = GhostLightning(RunConfig(folder=tmp_path / "run"), direction, module=name)
    with pytest.raises(CaptureError, match=message) as caught:
        fit(lightning, tmp_path, model, [callback])
    (note,) = caught.value.__notes__
    assert note.startswith(f"GhostLightning measures calls of {name or 'the LightningModule'}")
    assert "module='net'" in note
    assert not any(each._forward_hooks for each in model.modules())


def test_a_module_that_is_not_there_is_named_with_those_that_are(lightning, tmp_path):
    from ghost_engines.frameworks import GhostLightning

    model = module(lightning, False)
    callback = GhostLightning(RunConfig(folder=tmp_path / "run"), {"val": None}, module="nett")
    with pytest.raises(UnknownNameError, match=r"unknown module 'nett'; did you mean 'net'"):
        fit(lightning, tmp_path, model, [callback])
