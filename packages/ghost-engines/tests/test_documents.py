"""Dots of documents that samples are packed of."""

import numpy as np
import pytest
import torch
from token_kit import DOCUMENTS, dots_of, engine_for, gradients_by_token, scored, token_losses
from torch.nn import functional

from ghost_core import CaptureError
from ghost_core.testing import assert_within, per_sample_gradients

# By document


@pytest.mark.parametrize("across", [False, True])
def test_document_masks_make_it_the_gradient_of_the_documents_loss(
    across, model, ids, draw_directions
):
    """A document's loss is that at its positions, with or without those that predict the next."""
    counted = functional.pad(DOCUMENTS[:, 1:] == DOCUMENTS[:, :-1], (0, 1)) | across

    def losses(logits):
        return token_losses(logits, ids) * counted

    directions = draw_directions(model, 3)
    scores = scored(engine_for(model, directions), model, ids, DOCUMENTS, losses=losses)
    segments = scores.by_segment(DOCUMENTS)
    assert segments.ids.tolist() == [2, 4, 7, 9]
    assert segments.ids.dtype == torch.int64
    assert segments.directions == tuple(directions)
    assert segments.verified
    outside = DOCUMENTS < 0
    own = [losses(model(ids, DOCUMENTS))[document == DOCUMENTS].sum() for document in (2, 4, 7, 9)]
    expected, scale = dots_of(per_sample_gradients(model, torch.stack(own)), directions, 1)
    assert_within(segments.total, expected, scale, what="documents")
    padding = losses(model(ids, DOCUMENTS))[outside].sum().unsqueeze(0)
    expected, scale = dots_of(per_sample_gradients(model, padding), directions, 1)
    assert_within(segments.outside, expected[0], scale[0], what="padding")
    parts = segments.total.sum(0) + segments.outside
    assert_within(parts, scores.total.sum(0), scores.by_token.abs().sum((0, 1)), what="sum")


def test_without_document_masks_it_is_the_share_by_position(model, ids, draw_directions):
    """Attention across documents carries losses from one to another: the number is another one."""
    directions, one = draw_directions(model, 2), torch.zeros_like(DOCUMENTS)

    def losses(logits):
        return token_losses(logits, ids)

    segments = scored(engine_for(model, directions), model, ids, one, losses=losses).by_segment(
        DOCUMENTS
    )
    by_token, scale = dots_of(gradients_by_token(model, ids, one), directions, leading=2)
    for row, document in enumerate((2, 4, 7, 9)):
        here = document == DOCUMENTS
        assert_within(segments.total[row], by_token[here].sum(0), scale[here].sum(0))
    own = [losses(model(ids, one))[document == DOCUMENTS].sum() for document in (2, 4, 7, 9)]
    of_losses, scale = dots_of(per_sample_gradients(model, torch.stack(own)), directions, 1)
    assert ((segments.total - of_losses).abs() > 1e-3 * scale).any()


CONVERSIONS = {
    "tensor": lambda ids: ids,
    "tensor of int32": lambda ids: ids.to(torch.int32),
    "array": lambda ids: ids.numpy(),
    "lists": lambda ids: ids.tolist(),
    "list of arrays": lambda ids: [row.numpy() for row in ids],
    "list of tensors": list,
}


@pytest.mark.parametrize("kind", CONVERSIONS)
def test_document_ids_of_every_kind(kind, mlp, sequences, draw_directions):
    scores = scored(engine_for(mlp, draw_directions(mlp, 2)), mlp, sequences)
    documents = torch.tensor([[0, 0, 1, 1], [1, 5, -1, 5], [-9, 2, 2, 2], [0, 1, 2, 5]])
    segments = scores.by_segment(CONVERSIONS[kind](documents))
    assert segments.ids.tolist() == [0, 1, 2, 5]
    expected = torch.stack(
        [scores.by_token[documents == document].sum(0) for document in (0, 1, 2, 5)]
    )
    assert_within(segments.total, expected, scores.by_token.abs().sum((0, 1)))
    assert_within(
        segments.outside, scores.by_token[documents < 0].sum(0), scores.by_token.abs().sum((0, 1))
    )


def test_overflow_stays_in_its_document(mlp, sequences, draw_directions):
    engine = engine_for(mlp, draw_directions(mlp, 1), verify=False)
    scores = scored(engine, mlp, sequences)
    scores.token_dots[2, 1] = torch.nan
    segments = scores.by_segment(torch.arange(4)[:, None].expand(4, 4))
    assert not segments.verified
    assert segments.total.isfinite().all(1).tolist() == [True, True, False, True]


ZEROS = np.zeros((4, 4), dtype=np.int64)


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        (ZEROS[:3], r"integers \[N, T\] = \[4, 4\], not int64 of shape \[3, 4\]"),
        (ZEROS[0], r"not int64 of shape \[4\]"),
        (torch.zeros(4, 5, dtype=torch.int64), r"not torch\.int64 of shape \[4, 5\]"),
        (torch.zeros(4, 4), r"not torch\.float32"),
        (torch.zeros(4, 4, dtype=torch.bfloat16), r"not torch\.bfloat16"),
        (torch.zeros(4, 4, dtype=torch.bool), r"not torch\.bool"),
        (ZEROS.astype(bool), r"not bool"),
        (ZEROS.astype(np.float64), r"not float64"),
        ([[0, 1, 2, None]] * 4, r"not object"),
        ([["a"] * 4] * 4, r"not <U1"),
        ([[0, 1, 2], [0, 1], [0], []], r"integers \[N, T\] = \[4, 4\]: "),
        (ZEROS.astype(np.uint64) + np.uint64(2**63), r"fit into int64"),
        (None, r"not object of shape \[\]"),
    ],
)
def test_document_ids_that_are_not_integers_by_token_are_refused(
    documents, message, mlp, sequences, draw_directions
):
    scores = scored(engine_for(mlp, draw_directions(mlp, 1)), mlp, sequences)
    with pytest.raises(CaptureError, match=message):
        scores.by_segment(documents)
