"""What commands have in common: the model, its loss, and what is said of both."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ghost_core import GhostError
from ghost_engines.cli.functions import reporting
from ghost_engines.cli.losses import load_loss
from ghost_engines.cli.models import load_model
from ghost_engines.cli.options import Project, Query, Score, Verify
from ghost_engines.cli.places import Place, seed
from ghost_engines.cli.tables import plain, while_read


@dataclass(frozen=True)
class Subject:
    """A model with its loss, where a command computes.

    Attributes:
        model: The model.
        place: Where it is, and in which dtype.
        loss: Returns one loss per sample, `[N]`, of the model and a batch that is there.
        loss_name: What the loss is.
    """

    model: nn.Module
    place: Place
    loss: Callable[[nn.Module, Any], Any]
    loss_name: str

    @classmethod
    def load(
        cls, options: Verify | Score | Project | Query, loss: str | None, device: str
    ) -> Subject:
        """Load the model and the loss that options name, the cheapest first.

        Args:
            options: Those of the command.
            loss: Which loss; None for that of language models.
            device: Where to compute.

        Raises:
            CommandError: If there is no such model or loss, the model cannot be moved there, or the
                seed is none.
            MissingExtraError: If transformers is needed and not installed.
        """
        seed(options.seed)
        function, name = load_loss(loss)
        model = load_model(options.model)
        place = Place(device, options.dtype)
        place.model(model)
        return cls(model, place, function, name)

    def losses(self, model: nn.Module, batch: Any) -> Any:
        """Return the losses of a batch that may be elsewhere."""
        return self.loss(model, self.place.batch(batch))

    def described(self, given: str) -> list[tuple[str, str]]:
        """Return what the model and its parameters are, and where.

        Args:
            given: What it was loaded from.
        """
        return reporting(lambda: [*_described(given, self.model)], "MODEL: looking at it")()  # type: ignore[no-any-return]


def refused(error: GhostError) -> int:
    """Say that ghost refuses a model, and return the exit status."""
    with while_read():
        print(plain(f"refused: {error}"))
    return 1


def tracked_of(model: nn.Module, tracked: int) -> str:
    """Say how many of a model's parameters are tracked."""
    trainable = [each for each in model.parameters() if each.requires_grad]
    frozen = sum(not each.requires_grad for each in model.parameters())
    besides = f", besides {frozen} frozen" if frozen else ""
    return f"tracked: {tracked} of {len(trainable)} trainable parameters{besides}"


def _described(given: str, model: nn.Module) -> Iterable[tuple[str, str]]:
    parameters = list(model.parameters())
    yield "model", f"{given} ({type(model).__name__})"
    yield "parameters", str(sum(map(Tensor.numel, parameters)))
    yield "dtype", _listed(str(each.dtype).removeprefix("torch.") for each in parameters)
    yield "device", _listed(str(each.device) for each in parameters)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(names)) or "-"
