"""Values inside TRL's trainers, with LoRA and with all parameters."""

import copy
import functools

import pytest
import torch
from trainer_kit import brute_force, recording

from ghost_engines import IdCollator, RunConfig

pytestmark = [
    pytest.mark.stress,
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v2:FutureWarning"),
]
WORDS = "abcdefghijklmnop"
RATE = 0.1
HEAD = "lm_head*"


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


def sft(trl, trainer_class, folder, peft=None, callbacks=(), evaluates=False, loss=None, **changes):
    from datasets import Dataset
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    rows = [{"text": text(4 + at % 3, at), "sample_id": at} for at in range(12)]
    return trainer_class(
        model=model(),
        args=trl.SFTConfig(**arguments(folder, **changes)),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[:3]) if evaluates else None,
        processing_class=tokenizer(),
        data_collator=IdCollator(DataCollatorForLanguageModeling(pad_token_id=0)),
        peft_config=peft,
        callbacks=list(callbacks),
        compute_loss_func=loss,
    )


def dpo(trl, trainer_class, folder, peft=None, callbacks=(), loss=None, **changes):
    from datasets import Dataset
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    rows = [
        {"prompt": "a b", "chosen": f" {text(3, at)}", "rejected": f" {text(2 + at % 3, 99 + at)}"}
        | {"sample_id": at}
        for at in range(12)
    ]
    return trainer_class(
        model=model(),
        ref_model=None if peft else model(),
        args=trl.DPOConfig(**arguments(folder, **changes)),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
        data_collator=IdCollator(DataCollatorForPreference(pad_token_id=0)),
        peft_config=peft,
        callbacks=list(callbacks),
    )


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


def traced(trl, make, folder, tuned, loss, options):
    """Train with ghost and without; return values, the brute force, and both models."""
    from ghost_engines import frameworks

    is_sft = make is sft
    classes = (trl.SFTTrainer, trl.DPOTrainer)
    before = make(
        trl, recording(classes[not is_sft]), folder / "a", peft=lora() if tuned else None, loss=loss
    )
    before.seen = []
    before.train()
    config = RunConfig(folder=folder / "run", options={"dot_product": options})
    callback = frameworks.GhostCallback(config, {"val": lambda: validation(trainer.model)})
    ghosts = (frameworks.GhostSFTTrainer, frameworks.GhostDPOTrainer)
    trainer = make(
        trl, ghosts[not is_sft], folder / "b", peft=lora() if tuned else None, loss=loss,
        callbacks=[callback],
    )  # fmt: skip
    trainer.train()
    pairs = zip(before.model.parameters(), trainer.model.parameters(), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)
    losses = (sft_losses if is_sft else dpo_losses)(before)
    expected = brute_force(
        before.model, before.seen, losses, validation, rate=RATE,
        measured=lambda name: "exclude" not in options or "lm_head" not in name,
    )  # fmt: skip
    return callback.values, expected


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


def test_a_run_is_resumed_with_evaluation_between(trl, tmp_path):
    from ghost_engines.frameworks import GhostCallback, GhostSFTTrainer

    def trainer(folder, run):
        config = RunConfig(folder=tmp_path / run)
        callback = GhostCallback(config, {"val": lambda: validation(made.model)})
        made = sft(
            trl, GhostSFTTrainer, tmp_path / folder, peft=lora(), callbacks=[callback],
            evaluates=True, eval_strategy="steps", eval_steps=1, save_strategy="steps",
            save_steps=1, num_train_epochs=2,
        )  # fmt: skip
        return made, callback

    whole, expected = trainer("a", "whole")
    whole.train()
    again, values = trainer("a", "again")
    again.train(resume_from_checkpoint=str(tmp_path / "a/checkpoint-2"))
    pairs = zip(whole.model.parameters(), again.model.parameters(), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)
    assert values.values.to_dict() == expected.values.to_dict()
    assert values.values.steps == 4
