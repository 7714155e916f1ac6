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
    "gcn": OWNED,
    "gcn_undeclared": OWNED,
    "gcn_equal_graphs_undeclared": OWNED,
    "lstm_packed": FOLDED,
    "gru_packed": FOLDED,
    "gru_packed_root": FOLDED,
    "gru_head_on_packed_data": FOLDED,
}
"""What the pattern waits for."""

REFUSED: dict[str, str] = {
    "resnet_training": "norm normalises over the batch",
}
"""What the refusal says, where a pattern has no gradients by sample."""
