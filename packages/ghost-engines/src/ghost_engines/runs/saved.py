"""What a checkpoint has beside the run's own state: the user's objects, and random numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from ghost_core import CaptureError
from ghost_core.state import generators_to_save, load_generators


class Stateful(Protocol):
    """What a checkpoint can have: a model, an optimizer, a schedule, a scaler."""

    def state_dict(self) -> dict[str, Any]:
        """Return its state."""
        ...

    def load_state_dict(self, state: Any, /) -> object:
        """Go on with a state."""
        ...


def state_beside(objects: Mapping[str, Stateful]) -> dict[str, Any]:
    """Return the states of objects by name, and those of torch's random number generators."""
    return {
        "objects": {name: each.state_dict() for name, each in objects.items()},
        "random": generators_to_save(),
    }


def check_objects(objects: Mapping[str, Stateful], state: Mapping[str, Any]) -> None:
    """Refuse objects that are others than those saved.

    Raises:
        CaptureError: If they are.
    """
    if objects.keys() != state["objects"].keys():
        raise CaptureError(
            f"the checkpoint has {', '.join(state['objects']) or 'nothing'}, and "
            f"{', '.join(objects) or 'nothing'} is to be resumed",
            remedy="give run.resume(...) what run.save(...) was given",
        )


def load_beside(objects: Mapping[str, Stateful], state: Mapping[str, Any]) -> None:
    """Go on with what `state_beside` returned."""
    for name, each in objects.items():
        each.load_state_dict(state["objects"][name])
    load_generators(state["random"])
