"""Values inside TRL's trainers, with LoRA and with all parameters."""

import copy
import functools

import pytest
import torch
from trainer_kit import assert_goes_on, breaking, brute_force, equal, recording

from ghost_core import CaptureError
from ghost_engines import IdCollator, RunConfig

pytestmark = [
    pytest.mark.stress,
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v2:FutureWarning"),
]
WORDS = "abcdefghijklmnop"
RATE = 0.1
HEAD = "lm_head*"
EVALUATES = {"eval_strategy": "steps", "eval_steps": 1}


@pytest.fixture
def trl():
    pytest.importorskip("peft")
    pytest.importorskip("datasets")
    return pytest.importorskip("trl")


def model(tied=False):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=19, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=tied, pad_token_id=0,
        eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: at for at, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def text(length, seed):
    drawn = torch.randint(0, 16, (length,), generator=torch.Generator().manual_seed(seed))
    return " ".join(WORDS[at] for at in drawn)


def validation(model):
    tokens = torch.tensor([[3, 4, 5, 6, 7], [9, 8, 7, 6, 5]])
    return model(input_ids=tokens, labels=tokens).loss


def full_logits(outputs, labels, num_items_in_batch):
    from transformers.loss.loss_utils import ForCausalLMLoss

    size = outputs.logits.shape[-1]
    return ForCausalLMLoss(outputs.logits, labels, size, num_items_in_batch=num_items_in_batch)


def arguments(folder, **changes):
    return {
        "output_dir": folder, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2,
        "num_train_epochs": 1, "learning_rate": RATE, "optim": "sgd", "report_to": "none",
        "remove_unused_columns": False, "use_cpu": True, "bf16": False, "save_strategy": "no",
        "gradient_checkpointing": False, "disable_tqdm": True, "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant", "logging_steps": 1,
    } | changes  # fmt: skip


def lora():
    from peft import LoraConfig

    return LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def sft(trl, trainer_class, folder, loss=None, given=None, **changes):
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    rows = [{"text": text(4 + at % 3, at)} for at in range(12)]
    return trainer_class(
        model=model(),
        args=trl.SFTConfig(**arguments(folder, **changes)),
        data_collator=IdCollator(DataCollatorForLanguageModeling(pad_token_id=0)),
        compute_loss_func=loss,
        **shared(rows, **given or {}),
    )


def dpo(trl, trainer_class, folder, loss=None, given=None, **changes):
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    given = given or {}
    rows = [
        {"prompt": "a b", "chosen": f" {text(3, at)}", "rejected": f" {text(2 + at % 3, 99 + at)}"}
        for at in range(12)
    ]
    return trainer_class(
        model=model(),
        ref_model=None if given.get("peft") else model(),
        args=trl.DPOConfig(**arguments(folder, **changes)),
        data_collator=IdCollator(DataCollatorForPreference(pad_token_id=0)),
        **shared(rows, **given),
    )


def shared(rows, peft=None, callbacks=(), optimizer=None):
    """Return what both trainers are given alike."""
    from datasets import Dataset

    data = Dataset.from_list([row | {"sample_id": at} for at, row in enumerate(rows)])
    return {
        "train_dataset": data, "eval_dataset": data.select(range(3)), "peft_config": peft,
        "processing_class": tokenizer(), "callbacks": list(callbacks),
        "optimizers": (optimizer, None),
    }  # fmt: skip


def sft_losses(trainer):
    """Return what gives the loss of a step with the labels of one sample alone, for each."""

    def losses(model, parts):
        found = []
        for part in parts:
            for at in range(len(part["ids"])):
                inputs = copy.copy(part["inputs"])
                inputs["labels"] = torch.full_like(inputs["labels"], -100)
                inputs["labels"][at] = part["inputs"]["labels"][at]
                loss = trainer.compute_loss(model, inputs, num_items_in_batch=part["items"])
                found.append(loss)
        return found

    return losses


def dpo_losses(trainer):
    """Return what gives the loss of one pair alone; a step takes the mean over all."""

    def losses(model, parts):
        found = []
        for part in parts:
            n = len(part["ids"])
            for at in range(n):
                inputs = {name: each[[at, n + at]] for name, each in part["inputs"].items()}
                loss = trainer.compute_loss(model, inputs)
                found.append(loss / n / len(parts))
        return found

    return losses


def classes(trl, make):
    """Return TRL's own trainer, and ghost's."""
    from ghost_engines import frameworks

    if make is sft:
        return trl.SFTTrainer, frameworks.GhostSFTTrainer
    return trl.DPOTrainer, frameworks.GhostDPOTrainer


def ghost(trl, make, folder, run, wraps=None, given=None, options=None, **changes):
    """Return ghost's trainer, whose callback has a run in that folder."""
    trainer_class = classes(trl, make)[1]
    callback = watching(folder / run, lambda: validation(trainer.model), options)
    trainer = make(
        trl, trainer_class if wraps is None else wraps(trainer_class), folder / "out",
        given=(given or {}) | {"callbacks": [callback]}, **changes,
    )  # fmt: skip
    return trainer


def watching(folder, closure, options=None):
    from ghost_engines.frameworks import GhostCallback

    config = RunConfig(folder=folder, options={"dot_product": options or {}})
    return GhostCallback(config, {"val": closure})


def traced(trl, make, folder, tuned, loss, options, evaluates=False):
    """Train with ghost and without; return the values and those of brute force.

    Evaluation between is on ghost's side alone.
    """
    given = {"peft": lora() if tuned else None}
    before = make(trl, recording(classes(trl, make)[0]), folder / "a", loss=loss, given=given)
    before.seen = []
    before.train()
    changes = {"loss": loss} | (EVALUATES if evaluates else {})
    trainer = ghost(trl, make, folder, "run", given=given, options=options, **changes)
    trainer.train()
    assert any("eval_loss" in each for each in trainer.state.log_history) == evaluates
    assert equal(before.model, trainer.model)
    losses = (sft_losses if make is sft else dpo_losses)(before)
    expected = brute_force(
        before.model, before.seen, losses, validation, rate=RATE,
        measured=lambda name: "exclude" not in options or "lm_head" not in name,
    )  # fmt: skip
    return trainer.ghost.values, expected


@pytest.mark.parametrize("make", [sft, dpo])
@pytest.mark.parametrize("tuned", [True, False], ids=["lora", "all"])
def test_values_are_those_of_brute_force(make, tuned, trl, tmp_path):
    """The fused head's, too."""
    check(*traced(trl, make, tmp_path, tuned, None, {}))


@pytest.mark.parametrize("make", [sft, dpo])
def test_values_where_the_head_sees_valid_tokens_only(make, trl, tmp_path, monkeypatch):
    """As it does on a GPU."""
    monkeypatch.setattr("trl.trainer.utils._use_triton", lambda device: True)
    check(*traced(trl, make, tmp_path, False, None, {}))


@pytest.mark.parametrize("make", [sft, dpo])
def test_values_of_a_head_that_is_tied_to_the_embedding(make, trl, tmp_path, monkeypatch):
    tied = functools.partial(model, tied=True)
    monkeypatch.setattr(f"{__name__}.model", tied)
    check(*traced(trl, make, tmp_path, False, None, {}))


@pytest.mark.parametrize("make", [sft, dpo])
def test_the_head_can_be_left_out(make, trl, tmp_path):
    check(*traced(trl, make, tmp_path, False, None, {"exclude": HEAD}))


def check(values, expected):
    scale = max(map(abs, expected.values()))
    assert scale > 1e-6
    assert values.to_dict() == pytest.approx(expected, rel=1e-3, abs=1e-3 * scale)
    assert values.columns()["times_seen"].tolist() == [1] * 12


def test_the_head_is_measured_where_the_model_makes_logits(trl, tmp_path):
    check(*traced(trl, sft, tmp_path, False, full_logits, {}))


@pytest.mark.parametrize("make", [sft, dpo])
def test_evaluation_between_changes_nothing(make, trl, tmp_path):
    check(*traced(trl, make, tmp_path, False, None, {}, evaluates=True))


@pytest.mark.parametrize("make", [sft, dpo])
def test_a_run_is_resumed_with_evaluation_between(make, trl, tmp_path):
    changes = EVALUATES | {"save_strategy": "steps", "save_steps": 1, "num_train_epochs": 2}
    whole, again = (
        ghost(trl, make, tmp_path, run, given={"peft": lora()}, **changes)
        for run in ("whole", "again")
    )
    whole.train()
    again.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-2"))
    assert equal(whole.model, again.model)
    values = again.ghost.values
    assert values.to_dict() == whole.ghost.values.to_dict()
    assert any(values.to_dict().values())
    assert values.steps == 4


@pytest.mark.parametrize("inside", ["loss", "model"])
@pytest.mark.parametrize("make", [sft, dpo])
def test_training_goes_on_after_a_step_that_broke(make, inside, trl, tmp_path):
    wraps = functools.partial(breaking, inside=inside)
    plain = make(trl, wraps(classes(trl, make)[0]), tmp_path / "plain")
    trainer = ghost(trl, make, tmp_path, "run", wraps=wraps)
    again = watching(tmp_path / "again", lambda: validation(trainer.model))
    assert_goes_on(plain, trainer, again)


@pytest.mark.parametrize("make", [sft, dpo])
def test_mistakes_say_what_to_do(make, trl, tmp_path):
    removed = ghost(trl, make, tmp_path, "removed", remove_unused_columns=True)
    with pytest.raises(CaptureError, match="remove_unused_columns=False") as raised:
        removed.train()
    assert "a sample has no 'sample_id'" in str(raised.value)
    optimizer = torch.optim.SGD(model().parameters(), lr=RATE)
    other = ghost(trl, make, tmp_path, "other", given={"optimizer": optimizer})
    with pytest.raises(CaptureError, match="the optimizer"):
        other.train()
