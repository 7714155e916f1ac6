"""What is not exact yet, by name, with the work that it waits for; and what never will be."""

from __future__ import annotations

SHARED = "issue: shared calls, made from nothing of the batch"
LIFTED = "issue: lifting, a parameter used without calling its module"
CLOSED = "issue: closed form of a tracked parameter outside its module"
ROUTED = "issue: lifting of routed rows"
FOLDED = "issue: rows of outputs and packed sequences"
OWNED = "issue: samples counted from ids and owners"
BAGS = "issue: bags with offsets, and their maximum"
CRASH = "issue: crashes"

PENDING: dict[str, str] = {
    "nanogpt": SHARED,
    "nanogpt_as_many_samples_as_tokens": SHARED,
    "nanogpt_twice_as_many_tokens": SHARED,
    "nanogpt_untied": SHARED,
    "nanogpt_with_targets": SHARED,
    "torchtune_llama_tied": CLOSED,
    "llama_tied_transposed": CLOSED,
    "x_transformers_positions": SHARED,
    "x_transformers_positions_square": SHARED,
    "x_transformers_relative": SHARED,
    "x_transformers_relative_square": SHARED,
    "x_transformers_dynamic_bias": SHARED,
    "x_transformers_dynamic_bias_11": SHARED,
    "x_transformers_learned_slopes": SHARED,
    "x_transformers_tied": CLOSED,
    "litgpt_mixtral": ROUTED,
    "litgpt_adapter": LIFTED,
    "litgpt_adapter_square": LIFTED,
    "litgpt_adapter_v2_prompt": LIFTED,
    "word_model_flat": FOLDED,
    "word_model_flat_time_first": FOLDED,
    "linear_cross_entropy_loss": LIFTED,
    "torchvision_swin": LIFTED,
    "swin_v2": SHARED,
    "swin_v2_7_samples": SHARED,
    "beit": LIFTED,
    "eva": LIFTED,
    "maxvit": LIFTED,
    "detr": LIFTED,
    "detr_as_many_samples_as_queries": LIFTED,
    "xcit": CRASH,
    "gcn": OWNED,
    "gcn_undeclared": OWNED,
    "gcn_equal_graphs_undeclared": OWNED,
    "gat": OWNED,
    "gin": OWNED,
    "gin_plain": OWNED,
    "gin_plain_undeclared": OWNED,
    "dlrm_sum": BAGS,
    "dlrm_mean": BAGS,
    "dlrm_max": BAGS,
    "dlrm_sparse": BAGS,
    "dora_odd_batch": SHARED,
    "prompt_tuning_repeated": CRASH,
    "p_tuning_repeated": CRASH,
    "p_tuning_without_axis": SHARED,
    "p_tuning_square": SHARED,
    "gru_root_time_first": FOLDED,
    "attention_root_time_first_square": FOLDED,
    "lstm_packed": FOLDED,
    "gru_packed": FOLDED,
    "gru_packed_root": FOLDED,
    "gru_head_on_packed_data": FOLDED,
    "s4d": SHARED,
    "s4d_as_many_samples_as_features": SHARED,
    "sparse_embedding": CRASH,
    "one_row_that_multiplies_folded_rows": CRASH,
}
"""What the pattern waits for."""

REFUSED: dict[str, str] = {
    "resnet_training": "norm normalises over the batch",
}
"""What the refusal says, where a pattern has no gradients by sample."""
