"""How transformers names the classes of its models."""

from __future__ import annotations


def class_names(listed: str) -> list[str]:
    """Return the dotted names of classes of transformers, listed as `model.Class`."""
    pairs = (name.split(".") for name in listed.split())
    return [f"transformers.models.{model}.modeling_{model}.{kind}" for model, kind in pairs]
