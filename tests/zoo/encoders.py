"""Language models that read both ways, and the one that writes what it read."""

from __future__ import annotations

import torch
import transformers
from tests.zoo.decoders import SPECIAL, VOCABULARY, different, text_losses, texts
from tests.zoo.family import Batch, Family, curved, lengths_of, mask_of
from torch import Tensor, nn


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=12, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=20, max_position_embeddings=32, pad_token_id=0,
    )  # fmt: skip
    return transformers.BertForPreTraining(config)


def distilbert() -> nn.Module:
    config = transformers.DistilBertConfig(
        vocab_size=VOCABULARY, dim=12, n_layers=2, n_heads=2, hidden_dim=20,
        max_position_embeddings=32, pad_token_id=0,
    )  # fmt: skip
    return transformers.DistilBertForMaskedLM(config)


def t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=12, d_kv=6, d_ff=20, num_layers=3, num_heads=2,
        decoder_start_token_id=0, **SPECIAL,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def two_sentences(n: int, tokens: int) -> Batch:
    """Make N texts of two segments."""
    batch = dict(texts()(n, tokens))
    return batch | {"token_type_ids": (torch.arange(tokens) > 1).long().expand(n, -1)}


def questions_and_answers(n: int, tokens: int) -> Batch:
    """Make N texts of up to T tokens to read, and others to write, longer by one unless N = T."""
    written = tokens if n == tokens else tokens + 1
    mask = mask_of(lengths_of(n, written).flip(0), written)
    return {
        **texts()(n, tokens),
        "decoder_input_ids": different(n, written) * mask,
        "decoder_attention_mask": mask,
    }


def masked_losses(model: nn.Module, batch: Batch) -> Tensor:
    """Return each text's mean loss of naming its own tokens."""
    logits = model(**batch).logits
    return text_losses(logits, batch["input_ids"], batch["attention_mask"])


def pretraining_losses(model: nn.Module, batch: Batch) -> Tensor:
    """Return each text's mean loss of naming its tokens, and one of its pooled output."""
    outputs = model(**batch)
    named = text_losses(outputs.prediction_logits, batch["input_ids"], batch["attention_mask"])
    return named + curved(outputs.seq_relationship_logits)


def written_losses(model: nn.Module, batch: Batch) -> Tensor:
    """Return each text's mean loss over the next tokens that are written."""
    logits = model(**batch).logits
    written, mask = batch["decoder_input_ids"], batch["decoder_attention_mask"]
    return text_losses(logits[:, :-1], written[:, 1:], mask[:, 1:])


ENCODERS = {
    "bert": Family(
        bert,
        two_sentences,
        pretraining_losses,
        stochastic=True,
        # A constant added to all scores of a query leaves its softmax as it is.
        zero=("*.key.bias",),
    ),
    "distilbert": Family(
        distilbert, texts(), masked_losses, stochastic=True, zero=("*.k_lin.bias",)
    ),
    "t5": Family(t5, questions_and_answers, written_losses, stochastic=True),
}
