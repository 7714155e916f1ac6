"""The ways to find wrong labels that the demo compares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ghost_engines import InRunValues
from ghost_examples.demo import baselines
from ghost_examples.demo.annotator import Images
from ghost_examples.demo.convnet import dot_products, losses_and_norms


@dataclass(frozen=True)
class Method:
    """A way to choose the images to leave out.

    Attributes:
        title: Its short name.
        how: What makes an image suspicious, in one sentence.
        needs_clean: Whether it uses clean images.
        by_ghost: Whether it compares gradients with those of clean images, as ghost does.
    """

    title: str
    how: str
    needs_clean: bool = True
    by_ghost: bool = False


METHODS: Mapping[str, Method] = {
    "random": Method("random choice", "A random number.", needs_clean=False),
    "loss": Method("loss", "The trained network has a high loss on it.", needs_clean=False),
    "norm": Method("gradient norm", "The gradient of that loss is large.", needs_clean=False),
    "crossed": Method(
        "cross-validated SVM",
        "A support vector machine, fitted on other images as they were labelled, prefers another "
        "label.",
        needs_clean=False,
    ),
    "neighbours": Method(
        "nearest neighbour",
        "The nearest clean image of the given label is farther away than the nearest of another.",
    ),
    "machine": Method(
        "SVM on clean images",
        "A support vector machine, fitted on them alone, prefers another label.",
    ),
    "alone": Method(
        "ConvNet on clean images",
        "The same network, fitted on them alone, has a high loss on it.",
    ),
    "further": Method(
        "fine-tuned ConvNet",
        "The loss on it rises while the trained network is fine-tuned on the clean images.",
    ),
    "value": Method(
        "in-run value",
        "It raised the loss on the clean images while the network was trained.",
        by_ghost=True,
    ),
    "dot": Method(
        "dot product",
        "A step on it would raise the loss of the trained network on the clean images.",
        by_ghost=True,
    ),
}
"""By name; those that need least come first."""

CLASSIFIERS = ("neighbours", "machine", "alone")
"""Those that see clean images alone, and nothing of the training."""

BOUNDS: Mapping[str, str] = {
    "untouched": "nothing left out",
    "adapted": "nothing left out, fine-tuned",
    "oracle": "all mistakes left out",
}
"""What the accuracies are compared with."""

TITLES: Mapping[str, str] = {**{name: way.title for name, way in METHODS.items()}, **BOUNDS}


@dataclass(frozen=True)
class Suspects:
    """Images whose labels are in doubt, and what is known about them.

    Attributes:
        images: With the labels that they were given.
        model: Trained on them.
        seed: Of that training; all other random choices depend on it too.
        device: Where to compute.
    """

    images: Images
    model: nn.Module
    seed: int
    device: str

    def unaided(self) -> dict[str, Tensor]:
        """Return by method that needs no clean images how suspicious each is, `[n]`."""
        losses, norms = losses_and_norms(self.model, self.images)
        generator = torch.Generator().manual_seed(self.seed)
        return {
            "crossed": baselines.cross_validated(self.images),
            "loss": losses,
            "norm": norms,
            "random": torch.rand(len(self.images), generator=generator),
        }

    def aided(self, clean: Images, adapted: nn.Module, values: InRunValues) -> dict[str, Tensor]:
        """Return by method that needs clean images how suspicious each is, `[n]`.

        Args:
            clean: The clean images, the same for all methods.
            adapted: The model, trained further on these.
            values: In-run values that the images got while the model was trained.
        """
        by_id, images = values.to_dict(), self.images
        return {
            "neighbours": baselines.neighbours(clean, images),
            "machine": baselines.machine(clean, images),
            "alone": baselines.alone(clean, images, self.seed, self.device),
            "further": baselines.rise(self.model, adapted, images),
            "value": -torch.tensor([by_id[i] for i in range(len(images))]),
            "dot": -dot_products(self.model, images, clean),
        }

    def adapted(self, clean: Images) -> nn.Module:
        """Return the model, trained further on clean images."""
        return baselines.fitted_further(self.model, clean, self.seed, self.device)
