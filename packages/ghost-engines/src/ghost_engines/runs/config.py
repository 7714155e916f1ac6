"""What a run does, as fields that can be written to a file, and are checked one by one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from ghost_core import CaptureError, Engine, UnknownNameError, UnknownOptionError
from ghost_core.arguments import switch, text, whole
from ghost_core.plugins import installed
from ghost_engines.extras import read_yaml
from ghost_engines.modes import as_mode
from ghost_engines.runs.choosing import NamedPolicy
from ghost_engines.runs.plain import plain
from ghost_engines.scoring import ScoringEngine

NONE = "none"
"""The method that measures nothing, for the run to compare with."""

DOTS = "dot_product"
"""The engine that has modes."""

ELSEWHERE = {"mode", "grad_scaler"}
"""Options of engines that are given in another place."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What a `Run` does. Each field is checked, and an unknown one is refused.

        RunConfig(folder="runs/a", method=["dot_product", "projection"])
        RunConfig.of({"folder": "runs/a", "mode": "fused"})
        RunConfig.read("run.yaml")

    Attributes:
        folder: Where the run writes what it measures.
        method: "none", or the name of an engine that a plugin offers, or several, which then share
            one capture.
        mode: How dot products come about: "exact", "fused" or "concatenated".
        options: Options of engines by the engine's name, such as
            `{"dot_product": {"exclude": "*.bias"}}`: what can be written to a file.
        values: Whether to add up in-run values and to log each step; by default where an engine
            scores.
        order: Order of the values: 1, or 2 for curvature.
        history: Whether to keep values over time: see `InRunValues`.
        refresh: Batches after which directions are made anew.
        policy: What `Run.select` chooses candidates by: the name of a policy that a plugin offers,
            or a mapping of the name to its options, such as `{"top_k": {"k": 8}}`.
        target: Name of the direction that candidates are chosen for, where there are several.
        log_every: Steps after which the log and the metrics are safe on disk.

    Raises:
        UnknownOptionError: If there is no such field, or no such option of an engine or policy.
        UnknownNameError: If there is no such method, mode or policy, or options are of no engine of
            it.
        CaptureError: If a value is of another type, or fields do not go together.
    """

    folder: str | Path
    method: str | Sequence[str] = DOTS
    mode: str = "exact"
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    values: bool | None = None
    order: int = 1
    history: bool | int = False
    refresh: int = 1
    log_every: int = 100
    policy: str | Mapping[str, Mapping[str, Any]] | None = None
    target: str | None = None

    def __new__(cls, **given: object) -> Self:
        """Refuse unknown fields, with a list of those that exist."""
        cls._check_names(given)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        path = str(self.folder) if isinstance(self.folder, str | Path) else ""
        if not path or "\0" in path:
            raise CaptureError(f"folder must be a path, not {self.folder!r}")
        engines = self.engines
        as_mode(self.mode)
        if self.mode != "exact" and DOTS not in engines:
            raise CaptureError(
                f"mode={self.mode!r} does not go with method={self.method!r}",
                reason=f"only the engine {DOTS} has modes",
                remedy=f"leave it out, or add {DOTS} to the methods",
            )
        self._check_options(engines)
        self._check_policy(engines)
        # Numpy's own become Python's: they are written as JSON, and asked for with `is`.
        python: dict[str, object] = {}
        if self.values is not None:
            python["values"] = switch("values", self.values)
        if not isinstance(self.history, bool):
            python["history"] = whole("history", self.history, least=1)
        for name in ("order", "refresh", "log_every"):
            python[name] = whole(name, getattr(self, name), least=1)
        for name, value in python.items():
            object.__setattr__(self, name, value)  # it is frozen
        if self.order > 2:
            raise CaptureError(f"order must be 1 or 2, not {self.order!r}")

    @property
    def engines(self) -> tuple[str, ...]:
        """Names of the engines; there is none where the method is "none"."""
        given = [self.method] if isinstance(self.method, str) else self.method
        texts = isinstance(given, list | tuple) and all(isinstance(name, str) for name in given)
        if not texts or not given:
            raise CaptureError(f"method must be a name or a list of names, not {self.method!r}")
        known = installed().engines
        for name in given:
            if name not in known and name != NONE:
                raise UnknownNameError("method", name, [NONE, *known])
        if len(set(given)) < len(given) or (NONE in given and len(given) > 1):
            raise CaptureError(
                f"method={list(given)} names one twice, or {NONE!r} beside others",
                remedy="name each engine once",
            )
        return tuple(name for name in given if name != NONE)

    @property
    def chooses(self) -> NamedPolicy | None:
        """The policy that candidates are chosen by, if there is one."""
        return None if self.policy is None else NamedPolicy.of(self.policy)

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Self:
        """Return the config of a mapping.

        Raises:
            CaptureError: If it is none, `folder` is missing, or a value does not fit.
            UnknownNameError: If there is no such field, method or mode.
        """
        if not isinstance(given, Mapping):
            raise CaptureError(f"a config is a mapping of fields, not {given!r}")
        cls._check_names(given)
        if "folder" not in given:
            raise CaptureError("the config has no folder", remedy="say where the run writes to")
        return cls(**given)

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Return the config of a YAML file.

        Raises:
            MissingExtraError: If pyyaml is not installed.
            CaptureError: If it is no YAML, or as in `of`.
            UnknownNameError: As in `of`.
            OSError: If it cannot be read.
        """
        return cls.of(read_yaml(Path(path), "a config in YAML", str(path), CaptureError))

    def to_dict(self) -> dict[str, Any]:
        """Return every field, defaults included, as JSON and YAML can say it."""
        options = {name: plain(given) for name, given in self.options.items()}
        method = list(self.engines) or NONE
        named = self.chooses
        given = {each.name: getattr(self, each.name) for each in fields(self)}
        return given | {
            "folder": str(self.folder),
            "method": method,
            "options": options,
            "policy": None if named is None else {named.name: plain(named.options)},
        }

    @classmethod
    def _check_names(cls, given: Iterable[object]) -> None:
        names = [each.name for each in fields(cls)]
        for name in given:
            if name not in names:
                raise UnknownOptionError(f"field of {cls.__name__}", name, names)

    def _check_options(self, engines: tuple[str, ...]) -> None:
        if not isinstance(self.options, Mapping):
            raise CaptureError(f"options must be a mapping by engine, not {self.options!r}")
        for name, given in self.options.items():
            if name not in engines:
                raise UnknownNameError("engine in options", name, engines)
            if not isinstance(given, Mapping):
                raise CaptureError(f"options of {name} must be a mapping by name, not {given!r}")
            if taken := ELSEWHERE & given.keys():
                raise CaptureError(
                    f"options of {name} have {', '.join(sorted(taken))}",
                    remedy="mode is a field of its own; give the scaler to Run(grad_scaler=...)",
                )
            if issubclass(kind := installed().engine(name), Engine):
                _check_known(given, kind)
            plain(given, name)

    def _check_policy(self, engines: tuple[str, ...]) -> None:
        """Refuse a policy that nothing here can score candidates for."""
        named = self.chooses
        scores = named is not None and named.kind.needs_dots
        if self.target is not None and not (text("target", self.target) and scores):
            raise CaptureError(
                f"target={self.target!r} without a policy that chooses for it",
                remedy="name one, such as policy={'top_k': {'k': 8}}, or leave target out",
            )
        if named is None or not scores:
            return
        kinds: list[type] = [installed().engine(name) for name in engines]
        if not any(issubclass(kind, ScoringEngine) for kind in kinds):
            raise CaptureError(
                f"policy {named.name!r} chooses by scores, and method={self.method!r} has none",
                remedy=f"add {DOTS} to the methods, or take policy 'random' to compare with",
            )
        if self.mode == "concatenated":
            raise CaptureError(
                f"policy {named.name!r} does not go with mode='concatenated'",
                reason="its direction comes with each batch, and there is none before",
                remedy="take mode='exact' or mode='fused'",
            )


def _check_known(given: Iterable[object], kind: type[Engine[Any]]) -> None:
    """Refuse options that an engine does not take, before there is a model to make it for."""
    known = [name for name in kind.options() if name not in ELSEWHERE]
    for name in given:
        if name not in known:
            raise UnknownOptionError(f"option of {kind.__name__}", name, known)
