"""What people would do instead of asking ghost: each function says how suspicious labels are.

Settings are those that found most wrong labels in the grids of `ghost_examples.demo.tuning`, with
seeds that the demo does not use: the other ways are given their best, ghost's have none.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from sklearn.model_selection import cross_val_predict
from sklearn.svm import SVC
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ghost_examples.demo.annotator import Images
from ghost_examples.demo.convnet import Recipe, train


@dataclass(frozen=True)
class Machine:
    """A support vector machine with a Gaussian kernel.

    Attributes:
        cost: What a training image on the wrong side costs, `C` of scikit-learn.
        width: Of the kernel, `gamma` of scikit-learn.
    """

    cost: float
    width: float | str = "scale"

    def new(self) -> SVC:
        """Return one that is not fitted."""
        return SVC(C=self.cost, gamma=self.width)


@dataclass(frozen=True)
class Fitting:
    """How a network is fitted on few clean images.

    Attributes:
        steps: Steps of gradient descent, to a whole number of epochs.
        lr: Learning rate at the start; it falls to zero.
        weight_decay: Pulls the parameters towards zero.
    """

    steps: int
    lr: float
    weight_decay: float = 0.0

    def fit(
        self, clean: Images, seed: int, device: str, model: nn.Module | None = None
    ) -> nn.Module:
        """Return a new network, or the given one trained further, fitted on clean images."""
        batch = Recipe.batch
        epochs = max(1, round(self.steps / math.ceil(len(clean) / batch)))
        recipe = Recipe(epochs, batch, self.lr, self.weight_decay)
        return train(clean, recipe, seed, device, model)


NEIGHBOURS = 1
ON_CLEAN = Machine(10.0)
ON_GIVEN = Machine(1.0)
ALONE = Fitting(steps=1000, lr=0.3, weight_decay=0.01)
FURTHER = Fitting(steps=30, lr=0.03)


def neighbours(clean: Images, suspects: Images, count: int = NEIGHBOURS) -> Tensor:
    """Compare the distance to clean images of the given label with that to any other's, `[n]`.

    A distance is the mean over the nearest `count` images of a label.
    """
    distances = torch.cdist(suspects.images.flatten(1), clean.images.flatten(1)).cpu()
    labels = clean.labels.cpu()
    by_label = [
        distances[:, labels == digit].topk(count, largest=False).values.mean(1)
        for digit in range(10)
    ]
    # The logarithm makes a difference of what is compared as a ratio.
    return disagreement(-torch.stack(by_label, dim=1).log(), suspects.labels)


def machine(clean: Images, suspects: Images, setting: Machine = ON_CLEAN) -> Tensor:
    """Ask a support vector machine that was fitted on clean images, `[n]`."""
    fitted = setting.new().fit(_rows(clean), clean.labels.cpu().numpy())
    return disagreement(torch.tensor(fitted.decision_function(_rows(suspects))), suspects.labels)


def cross_validated(suspects: Images, setting: Machine = ON_GIVEN) -> Tensor:
    """Ask machines that were fitted on the given labels of the other images, `[n]`.

    Five machines, each fitted on four fifths of the images and asked about the rest.
    """
    decisions = cross_val_predict(
        setting.new(),
        _rows(suspects),
        suspects.labels.cpu().numpy(),
        cv=5,
        method="decision_function",
    )
    return disagreement(torch.tensor(decisions), suspects.labels)


def alone(
    clean: Images, suspects: Images, seed: int, device: str, setting: Fitting = ALONE
) -> Tensor:
    """Ask the same network, fitted on clean images alone, for its loss, `[n]`."""
    return losses(setting.fit(clean, seed, device), suspects)


def fitted_further(
    model: nn.Module, clean: Images, seed: int, device: str, setting: Fitting = FURTHER
) -> nn.Module:
    """Return a copy of a trained network that was trained further on clean images."""
    return setting.fit(clean, seed, device, copy.deepcopy(model))


def rise(model: nn.Module, adapted: nn.Module, images: Images) -> Tensor:
    """Return by how much each image's loss rose while the model was trained further, `[n]`."""
    return losses(adapted, images) - losses(model, images)


def losses(model: nn.Module, images: Images) -> Tensor:
    """Return each image's loss, `[n]`."""
    with torch.no_grad():
        return cross_entropy(model(images.images), images.labels, reduction="none").cpu()


def disagreement(decisions: Tensor, given: Tensor) -> Tensor:
    """Return by how much the best other label beats the given one.

    Args:
        decisions: How well each label fits, `[n, 10]`.
        given: Labels `[n]`.

    Returns:
        `[n]`, positive where another label fits better.
    """
    given = given.cpu().unsqueeze(1)
    others = decisions.scatter(1, given, -math.inf).max(dim=1).values
    return others - decisions.gather(1, given)[:, 0]


def _rows(images: Images) -> object:
    """Return the grey values as scikit-learn wants them, `[n, 64]`."""
    return images.images.flatten(1).cpu().numpy()
