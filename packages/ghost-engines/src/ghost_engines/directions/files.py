"""Directions on disk: a safetensors file for each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from ghost_core import CaptureError
from ghost_engines.files import write_atomically


def save_direction(path: str | Path, direction: Mapping[str, Tensor]) -> None:
    """Write a direction to a safetensors file, as a whole or not at all.

    Args:
        path: The file, in a folder that is there; one of the same name is replaced.
        direction: A tensor for each parameter by name, such as `engine.direction(name)`.

    Raises:
        OSError: If it cannot be written.
    """
    path = Path(path)
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in direction.items()}
    write_atomically(path, save(whole, {"format": "ghost-direction-1"}), path.parent)


def load_direction(path: str | Path) -> dict[str, Tensor]:
    """Read a direction, to give to `add_direction`.

    Returns:
        A tensor for each parameter by name, on the CPU, as it was saved.

    Raises:
        CaptureError: If it is no safetensors file, or cut off.
        OSError: If it cannot be read.
    """
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CaptureError(
            f"{path} is no direction",
            reason=f"it is cut off, or no safetensors file: {error}",
            remedy="give a file that save_direction, or safetensors, has written",
        ) from error
