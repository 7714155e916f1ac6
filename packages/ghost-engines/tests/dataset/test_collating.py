"""Batches of samples of tokens, and of anything else."""

import pytest
import torch

from ghost_core import CaptureError
from ghost_engines.dataset import IGNORED, collated


def test_rows_of_tokens_are_padded_at_their_ends():
    samples = [
        {"input_ids": torch.tensor([3, 4, 5]), "labels": torch.tensor([IGNORED, 4, 5]), "n": 1},
        {"input_ids": [6, 7], "labels": [6, 7], "n": 2},
    ]
    batch = collated(samples)
    assert batch["input_ids"].tolist() == [[3, 4, 5], [6, 7, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 4, 5], [6, 7, IGNORED]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["n"].tolist() == [1, 2]


def test_a_mask_that_is_there_is_kept():
    samples = [
        {"input_ids": torch.arange(size), "attention_mask": torch.arange(size) % 2}
        for size in (2, 3)
    ]
    assert collated(samples)["attention_mask"].tolist() == [[0, 1, 0], [0, 1, 0]]


def test_samples_of_one_length_need_no_mask():
    batch = collated([{"input_ids": [1, 2]}, {"input_ids": [3, 4]}])
    assert {name: each.tolist() for name, each in batch.items()} == {"input_ids": [[1, 2], [3, 4]]}


@pytest.mark.parametrize("sizes", [(2, 2), (2, 3)])
@pytest.mark.parametrize("which", [0, 1])
def test_labels_of_some_samples_are_not_dropped(sizes, which):
    samples = [{"input_ids": torch.ones(size).long()} for size in sizes]
    samples[which]["labels"] = torch.full((sizes[which],), IGNORED)
    with pytest.raises(CaptureError, match="only one has labels"):
        collated(samples)


def test_other_samples_are_batched_as_torch_does():
    inputs, labels = collated([(torch.ones(2), 3), (torch.zeros(2), 4)])
    assert inputs.tolist() == [[1, 1], [0, 0]]
    assert labels.tolist() == [3, 4]
