"""Handwritten digits, and the annotators who label them: a careless one and a random one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch import Tensor

CONFUSIONS: Mapping[int, int] = {3: 8, 9: 4, 1: 7}
"""What the careless annotator takes some digits for."""

SHARE = 0.4
"""Share of the images of such a digit that get the wrong label."""

PER_DIGIT = 20
"""Clean images of each digit."""

Annotator = Callable[[Tensor, torch.Generator], Tensor]
"""Returns the labels given to images with true labels `[n]`."""


@dataclass(frozen=True)
class Images:
    """Images with a label each.

    Attributes:
        images: Grey values from 0 to 1, `[n, 1, 8, 8]`.
        labels: `[n]`.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, samples: Tensor | slice) -> Images:
        return Images(self.images[samples], self.labels[samples])

    def to(self, device: str) -> Images:
        """Return the images on a device."""
        return Images(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Annotated:
    """Digits in three parts that share no image.

    Attributes:
        train: To train on, with the labels that the annotator gave.
        truth: The true labels of `train`, `[n]`; only to see what was found.
        clean: Images with true labels that tell what the model should be good at. They are ordered
            so that the first n, for any n that ten divides, hold n / 10 of each digit.
        test: Clean images that nothing is decided with.
        positions: Where the images of the three parts stand in the data set.
    """

    train: Images
    truth: Tensor
    clean: Images
    test: Images
    positions: tuple[Tensor, Tensor, Tensor]

    @property
    def mislabelled(self) -> Tensor:
        """Which training images have a wrong label, bool `[n]` on the CPU."""
        return (self.train.labels != self.truth).cpu()


def careless(truth: Tensor, generator: torch.Generator) -> Tensor:
    """Mistake some 3s for 8s, 9s for 4s and 1s for 7s; never the other way round."""
    given = truth.clone()
    for digit, mistaken in CONFUSIONS.items():
        of_digit = (truth == digit).nonzero()[:, 0]
        order = torch.randperm(len(of_digit), generator=generator)
        given[of_digit[order[: round(SHARE * len(of_digit))]]] = mistaken
    return given


def random_flips(truth: Tensor, generator: torch.Generator) -> Tensor:
    """Give any other label to as many images as the careless annotator gets wrong, any digit."""
    count = int((careless(truth, generator) != truth).sum())
    chosen = torch.randperm(len(truth), generator=generator)[:count]
    given = truth.clone()
    given[chosen] = (truth[chosen] + torch.randint(1, 10, (count,), generator=generator)) % 10
    return given


def annotate(
    seed: int,
    annotator: Annotator = careless,
    *,
    n_train: int = 1200,
    per_digit: int = PER_DIGIT,
    device: str = "cpu",
) -> Annotated:
    """Split the digits and have the training part labelled.

    Args:
        seed: Decides the split and the mistakes; another annotator gets the same split.
        annotator: Gives the training labels.
        n_train: Training images.
        per_digit: Clean images of each digit. What remains is the test part.
        device: Where the images go.

    Raises:
        ValueError: If nothing would remain.
    """
    bundle = load_digits()
    images = torch.tensor(bundle.images / 16, dtype=torch.float32).unsqueeze(1)
    digits = Images(images, torch.tensor(bundle.target))
    n_clean = 10 * per_digit
    n_test = len(digits) - n_train - n_clean
    if min(n_train, n_clean, n_test) < 1:
        raise ValueError(f"{len(digits)} digits cannot be split {n_train} + {n_clean} + rest")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(digits), generator=generator)
    clean = _some_of_each(order, digits.labels, per_digit)
    train, test = order[~torch.isin(order, clean)].split([n_train, n_test])
    truth = digits[train].labels
    return Annotated(
        train=Images(digits[train].images, annotator(truth, generator)).to(device),
        truth=truth.to(device),
        clean=digits[clean].to(device),
        test=digits[test].to(device),
        positions=(train, clean, test),
    )


def _some_of_each(order: Tensor, labels: Tensor, count: int) -> Tensor:
    """Return the first positions of each digit in an order: all first ones, all second ones, ..."""
    of_digit = [order[labels[order] == digit] for digit in range(10)]
    if min(map(len, of_digit)) < count:
        raise ValueError(f"there are not {count} images of each digit")
    return torch.stack([positions[:count] for positions in of_digit], dim=1).flatten()
