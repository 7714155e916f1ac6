"""Libraries that need not be there: they are imported where they are used."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from ghost_core import GhostError, MissingExtraError
from ghost_core.errors import told
from ghost_engines.files import check_waits_for_nobody


def needed(module: str, extra: str, purpose: str, *, package: str | None = None) -> Any:
    """Return a module of a library that need not be there.

    Args:
        module: Name of the module.
        extra: The extra of this package that installs it.
        purpose: What needs it, for the error.
        package: What the library is called, if not as its module.

    Raises:
        MissingExtraError: If it cannot be imported.
    """
    try:
        return import_module(module)
    except ImportError as error:
        name = package or module.partition(".")[0]
        raise MissingExtraError(name, f"ghost-engines[{extra}]", purpose) from error


def read_yaml(path: Path, purpose: str, what: str, refusal: type[GhostError]) -> Any:
    """Return what a file of YAML says.

    Args:
        path: The file.
        purpose: What needs it, for the error.
        what: What the file is called in errors.
        refusal: What to raise if it is none.

    Raises:
        MissingExtraError: If pyyaml is not installed.
        GhostError: Of the kind given, if it is no YAML.
        OSError: If it cannot be read.
    """
    yaml = needed("yaml", "yaml", purpose, package="pyyaml")
    check_waits_for_nobody(path)
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_loader(yaml))
    except OSError:
        raise
    except Exception as error:  # of what makes values of it, too, which raises whatever it likes
        raise refusal(f"{what} is no YAML: {told(error)}") from error


def _loader(yaml: Any) -> Any:
    """Return a loader of plain values, which refuses a name that is there twice."""

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            for at, name in enumerate(names):
                if name in names[:at]:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"{name!r} is there twice", node.start_mark
                    )
            return super().construct_mapping(node, deep)

    return Loader
