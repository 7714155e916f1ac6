"""Registers the engines, projections, policies and commands of this package."""

from __future__ import annotations

from typing import Any

from ghost_core import Command, Engine, Policy, Projection, hookimpl
from ghost_engines.cosine import CosineEngine
from ghost_engines.dot_product import DotProductEngine
from ghost_engines.gram import GramEngine
from ghost_engines.norms import NormEngine
from ghost_engines.projection import ProjectionEngine
from ghost_engines.random_projections import (
    GaussianProjection,
    OrthonormalProjection,
    RademacherProjection,
)
from ghost_engines.selection import Greedy, Random, Threshold, TopK


@hookimpl
def ghost_engines() -> dict[str, type[Engine[Any]]]:
    """Contribute the engines of this package."""
    return {
        "cosine": CosineEngine,
        "dot_product": DotProductEngine,
        "gram": GramEngine,
        "norm": NormEngine,
        "projection": ProjectionEngine,
    }


@hookimpl
def ghost_projections() -> dict[str, type[Projection]]:
    """Contribute the projections of this package."""
    return {
        "gaussian": GaussianProjection,
        "orthonormal": OrthonormalProjection,
        "rademacher": RademacherProjection,
    }


@hookimpl
def ghost_policies() -> dict[str, type[Policy]]:
    """Contribute the policies of this package."""
    return {"greedy": Greedy, "random": Random, "threshold": Threshold, "top_k": TopK}


@hookimpl
def ghost_commands() -> dict[str, type[Command]]:
    """Contribute the commands of this package."""
    # Where what they need is not there, as in a plain checkout, engines and projections still are.
    from ghost_engines.cli import COMMANDS

    return dict(COMMANDS)
