"""Values inside Hugging Face's Trainer are those of a brute-force run, and training is its own."""

import pytest
import torch
from trainer_kit import (
    LENGTH,
    RATE,
    assert_goes_on,
    breaking,
    brute_force,
    equal,
    recording,
    rows,
    tiny,
)

from ghost_core import CaptureError
from ghost_engines import IdCollator, RunConfig, ScoreLog, with_ids

TRAIN, VALIDATION = rows(14, seed=1), rows(3, seed=2)
CLIP = 0.5


@pytest.fixture(autouse=True)
def _installed():
    pytest.importorskip("accelerate")
    pytest.importorskip("transformers")


def make(
    trainer_class, folder, model=None, callbacks=(), data=TRAIN, collate=None, optimizer=None,
    **changes,
):  # fmt: skip
    """Return a trainer: four steps of two micro-batches an epoch, the last of them uneven."""
    from transformers import TrainingArguments, default_data_collator

    given = {
        "output_dir": folder, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
        "num_train_epochs": 2, "learning_rate": RATE, "optim": "sgd", "max_grad_norm": CLIP,
        "lr_scheduler_type": "constant", "report_to": "none", "remove_unused_columns": False,
        "use_cpu": True, "save_strategy": "no", "logging_steps": 2, "disable_tqdm": True,
        "eval_strategy": "steps", "eval_steps": 3,
    } | changes  # fmt: skip
    return trainer_class(
        model=tiny() if model is None else model,
        args=TrainingArguments(**given),
        train_dataset=with_ids(data),
        eval_dataset=with_ids(VALIDATION),
        data_collator=IdCollator(collate or default_data_collator),
        callbacks=list(callbacks),
        optimizers=(optimizer, None),
    )


def ghost(folder, directions=VALIDATION, **fields):
    """Return the callback."""
    from ghost_engines.frameworks import GhostCallback

    return GhostCallback(RunConfig(folder=folder, **fields), {"val": directions})


def ghost_trainer(folder, callback, **changes):
    from ghost_engines.frameworks import GhostTrainer

    return make(GhostTrainer, folder / "out", callbacks=[callback], **changes)


def plain(folder, **changes):
    import transformers

    trainer = make(recording(transformers.Trainer), folder / "plain", eval_strategy="no", **changes)
    trainer.seen = []
    trainer.train()
    return trainer


def losses(model, parts):
    """The trainer divides the summed losses of a step by how many labels it has, shifted or not."""
    tokens = torch.cat([each["inputs"]["input_ids"] for each in parts])
    own = [model(input_ids=one[None], labels=one[None]).loss * (LENGTH - 1) for one in tokens]
    return [each / tokens.numel() for each in own]


def validation(model):
    tokens = torch.stack([each["input_ids"] for each in VALIDATION])
    return model(input_ids=tokens, labels=tokens).loss


def test_values_and_parameters_with_accumulation_clipping_and_evaluation(tmp_path):
    before = plain(tmp_path)
    callback = ghost(tmp_path / "run")
    trainer = ghost_trainer(tmp_path, callback)
    named = set()
    trainer.model.register_forward_pre_hook(
        lambda model, args, kwargs: named.update(kwargs), with_kwargs=True
    )
    trainer.train()
    assert named == {"input_ids", "labels", "num_items_in_batch"}  # and no ids
    assert equal(trainer.model, before.model)
    expected = brute_force(tiny(), before.seen, losses, validation, clip=CLIP)
    assert sorted(expected) == list(range(len(TRAIN)))
    assert callback.values.to_dict() == pytest.approx(expected, rel=1e-4)  # logits are float32
    assert callback.run.steps == trainer.state.global_step == 8
    logged = [each for each in trainer.state.log_history if "ghost_value_val" in each]
    assert [each["step"] for each in logged] == [2, 4, 6, 8]
    credited = sum(each["ghost_value_val"] for each in logged)
    assert credited == pytest.approx(sum(expected.values()))
    assert any("eval_loss" in each for each in trainer.state.log_history)
    assert not trainer.model._forward_hooks
    assert len(trainer.model._forward_pre_hooks) == 1


def test_a_second_run_in_a_folder_says_how_a_trainer_goes_on(tmp_path):
    for again in (False, True):
        trainer = ghost_trainer(tmp_path, ghost(tmp_path / "run"), max_steps=1, eval_strategy="no")
        if not again:
            trainer.train()
            continue
        with pytest.raises(CaptureError, match="there is a run in") as caught:
            trainer.train()
        assert "train(resume_from_checkpoint=True)" in caught.value.remedy
        assert "choose another folder" in caught.value.remedy
        assert "run.resume" not in str(caught.value)
        assert not trainer.model._forward_hooks


@pytest.mark.stress
def test_a_run_is_resumed_from_a_checkpoint(tmp_path):
    """The run that is resumed was killed two steps after its last checkpoint."""
    saved = {"save_strategy": "steps", "save_steps": 3, "eval_strategy": "no"}
    whole = ghost(tmp_path / "whole")
    expected = ghost_trainer(tmp_path / "a", whole, **saved)
    expected.train()
    killed = ghost_trainer(tmp_path / "b", ghost(tmp_path / "run"), **saved)
    killed.add_callback(_stops_at(5))
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    assert not killed.model._forward_hooks
    resumed = ghost(tmp_path / "run")
    trainer = ghost_trainer(tmp_path / "b", resumed, **saved)
    trainer.train(resume_from_checkpoint=True)
    assert equal(trainer.model, expected.model)
    assert resumed.values.to_dict() == whole.values.to_dict()
    assert any(whole.values.to_dict().values())
    table = ScoreLog.open(tmp_path / "run/log").totals()
    assert table.steps.tolist() == list(range(1, 9))
    other = ghost(tmp_path / "other", mode="fused")
    with pytest.raises(CaptureError, match="mode='exact', and this one has mode='fused'"):
        ghost_trainer(tmp_path / "b", other, **saved).train(resume_from_checkpoint=True)
    checkpoint = tmp_path / "b/out/checkpoint-6"
    (checkpoint / "ghost.pt").unlink()
    with pytest.raises(CaptureError, match="was saved without ghost"):
        ghost_trainer(tmp_path / "b", ghost(tmp_path / "run"), **saved).train(str(checkpoint))


@pytest.mark.stress
@pytest.mark.parametrize("inside", ["loss", "model"])
def test_training_goes_on_after_a_step_that_broke(inside, tmp_path):
    from transformers import Trainer

    from ghost_engines.frameworks import GhostTrainer

    changes = {"eval_strategy": "no", "num_train_epochs": 1}
    plain = make(breaking(Trainer, inside), tmp_path / "plain", **changes)
    callbacks = [ghost(tmp_path / "run")]
    broken = breaking(GhostTrainer, inside)
    trainer = make(broken, tmp_path / "out", callbacks=callbacks, **changes)
    assert_goes_on(plain, trainer, ghost(tmp_path / "again"))


@pytest.mark.stress
def test_values_are_logged_to_tensorboard(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    callback = ghost(tmp_path / "run")
    ghost_trainer(tmp_path, callback, report_to="tensorboard").train()
    board = EventAccumulator(str(tmp_path / "board")).Reload()
    found = [each.value for each in board.Scalars("train/ghost_value_val")]
    assert len(found) == 4
    assert sum(found) == pytest.approx(sum(callback.values.to_dict().values()), rel=1e-5)


@pytest.mark.stress
@pytest.mark.parametrize(
    "fields",
    [
        {"mode": "fused"},
        {"method": ["projection", "dot_product"], "options": {"projection": {"dim": 4}}},
        {"method": "none"},
    ],
    ids=str,
)
def test_every_method_goes_with_the_trainer(fields, tmp_path):
    before = plain(tmp_path)
    callback = ghost(tmp_path / "run", **fields)
    trainer = ghost_trainer(tmp_path, callback)
    trainer.train()
    if "mode" in fields:
        for one, other in zip(trainer.model.parameters(), before.model.parameters(), strict=True):
            torch.testing.assert_close(one, other)
    else:
        assert equal(trainer.model, before.model)
    if fields != {"method": "none"}:
        expected = brute_force(tiny(), before.seen, losses, validation, clip=CLIP)
        assert callback.values.to_dict() == pytest.approx(expected, rel=1e-4)


def masking(samples):
    """Leave labels out at random, as collators for masked language models do."""
    from transformers import default_data_collator

    batch = default_data_collator(samples)
    batch["labels"] = batch["labels"].masked_fill(torch.rand(batch["labels"].shape) < 0.3, -100)
    return batch


@pytest.mark.stress
def test_training_is_its_own_in_bfloat16_and_where_collators_draw(tmp_path):
    changes = {"collate": masking, "bf16": True}
    before = plain(tmp_path, model=tiny(torch.float32), **changes)
    callback = ghost(tmp_path / "run")
    changes |= {"eval_strategy": "no"}  # which draws as well
    trainer = ghost_trainer(tmp_path, callback, model=tiny(torch.float32), **changes)
    trainer.train()
    assert equal(trainer.model, before.model)
    assert sorted(callback.values.to_dict()) == list(range(len(TRAIN)))


def _stops_at(step):
    import transformers

    class Stops(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == step:
                raise KeyboardInterrupt

    return Stops()


def test_mistakes_say_what_to_do(tmp_path):
    import transformers

    from ghost_engines.frameworks import GhostMixin

    callback = ghost(tmp_path / "run")
    removed = ghost_trainer(tmp_path, callback, remove_unused_columns=True)
    with pytest.raises(CaptureError, match=r"remove_unused_columns=False") as raised:
        removed.train()
    assert "a sample has no 'sample_id'" in str(raised.value)
    without = make(transformers.Trainer, tmp_path / "out", callbacks=[ghost(tmp_path / "run")])
    with pytest.raises(CaptureError, match="GhostCallback needs a trainer that opens batches"):
        without.train()
    behind = type("Behind", (transformers.Trainer, GhostMixin), {})
    wrong = make(behind, tmp_path / "out", callbacks=[ghost(tmp_path / "run")])
    with pytest.raises(CaptureError, match=r"class YourTrainer\(GhostMixin, \.\.\.\)"):
        wrong.train()
    trainer = ghost_trainer(tmp_path, callback)
    with pytest.raises(CaptureError, match="has 0 callbacks"):
        make(type(trainer), tmp_path / "out").train()
    with pytest.raises(CaptureError, match="auto_find_batch_size=False"):
        ghost_trainer(tmp_path, ghost(tmp_path / "run"), auto_find_batch_size=True).train()
    compiled = ghost_trainer(tmp_path, ghost(tmp_path / "run"))
    compiled.args.torch_compile = True  # as an argument it would set the environment
    with pytest.raises(CaptureError, match="torch_compile=False"):
        compiled.train()
    other = torch.optim.SGD(tiny().parameters(), lr=RATE)
    with pytest.raises(CaptureError, match="the optimizer"):
        ghost_trainer(tmp_path, ghost(tmp_path / "run"), optimizer=other).train()
    searching = ghost_trainer(tmp_path, ghost(tmp_path / "run"))
    searching.hp_search_backend = "some"
    with pytest.raises(CaptureError, match="hyperparameter_search"):
        searching.train()
    unprepared = ghost(tmp_path / "run", [{"text": "not made into tokens"}])
    with pytest.raises(CaptureError, match="no batch of the samples of direction 'val'") as raised:
        ghost_trainer(tmp_path, unprepared, collate=masking).train()
    assert "they have text, sample_id: KeyError" in str(raised.value)
    with pytest.raises(CaptureError, match="chooses nothing inside a trainer"):
        ghost(tmp_path / "run", policy="threshold")
    with pytest.raises(CaptureError, match="before training begins"):
        ghost(tmp_path / "run").values.to_dict()
