"""Loads the model to verify: a checkpoint of transformers, or what a function returns."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import Any

from torch import nn

from ghost_engines.cli.errors import CommandError
from ghost_engines.cli.functions import find_function, raised
from ghost_engines.extras import needed


def load_model(text: str) -> nn.Module:
    """Load a model from a folder, or call a function that returns one.

    Args:
        text: A folder with `config.json` and weights, or `module:function`.

    Raises:
        CommandError: If neither gives a model.
        MissingExtraError: If transformers is needed and not installed.
    """
    if is_folder(text):
        return _load_checkpoint(Path(text))
    if ":" not in text:
        raise CommandError(f"MODEL: {text} is neither a folder nor module:function")
    model = find_function(text, "MODEL")()
    if not isinstance(model, nn.Module):
        raise CommandError(f"MODEL: {text} returned a {type(model).__name__}, no torch.nn.Module")
    return model


def load_tokenizer(folder: Path) -> Any:
    """Load a checkpoint's tokenizer, which can pad.

    Raises:
        CommandError: If there is none, or it has no token to pad with.
        MissingExtraError: If transformers is not installed.
    """
    transformers = needed("transformers", "transformers", "a tokenizer")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        raise CommandError(f"{folder} has no tokenizer that can be loaded: {error}") from error
    # Where its files are missing, transformers makes one that knows no word.
    files = list(tokenizer.vocab_files_names.values())
    if files and not any((folder / name).is_file() for name in files):
        raise CommandError(
            f"{folder} has no tokenizer that can be loaded: no file {' or '.join(files)}"
        )
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise CommandError(
                f"the tokenizer of {folder} has no token to pad with: give token ids instead"
            )
        tokenizer.pad_token = tokenizer.eos_token  # the attention mask tells them apart
    return tokenizer


def tokenizer_of(model: str, what: str) -> Any:
    """Return the tokenizer of a checkpoint, for texts.

    Args:
        model: What the model was loaded from.
        what: Where the texts are, for the error.

    Raises:
        CommandError: If it has none.
        MissingExtraError: If transformers is not installed.
    """
    if not is_folder(model):
        raise CommandError(
            f"{what} has texts, and only a checkpoint's folder has a tokenizer; {model} is none: "
            "give token ids"
        )
    return load_tokenizer(Path(model))


def positions_of(model: nn.Module) -> int | None:
    """Return how many tokens a model takes at most, if it says so."""
    found = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def is_folder(text: str) -> bool:
    """Tell whether a model is given as a folder."""
    return Path(text).is_dir()


def _load_checkpoint(folder: Path) -> nn.Module:
    config, name = _configuration(folder)
    transformers = needed("transformers", "transformers", "a checkpoint")
    try:
        kind: Any = getattr(transformers, name, None)
    except Exception as error:  # of what it is made with, which may not be installed
        raise CommandError(
            f"MODEL: {name}, of {folder}: {raised('importing it', error)}"
        ) from error
    is_model = isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)
    if not is_model or "auto_map" in config:
        raise CommandError(
            f"MODEL: the class {name} of {folder} is not one of transformers "
            f"{transformers.__version__} for models: write a function that loads it, and give "
            "module:function"
        )
    with _bars_at_a_terminal(transformers):
        try:
            loaded = kind.from_pretrained(
                folder, local_files_only=True, dtype="auto", output_loading_info=True
            )
        except Exception as error:
            raise CommandError(f"MODEL: {folder} cannot be loaded: {error}") from error
    model: nn.Module = loaded[0]
    if missing := sorted(loaded[1]["missing_keys"]):  # random numbers stand there
        raise CommandError(
            f"MODEL: {folder} has no weights for {shorten(', '.join(missing), 200)}, which the "
            f"class in 'architectures', {name}, has"
        )
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    return model


def _configuration(folder: Path) -> tuple[dict[str, Any], str]:
    """Return a checkpoint's configuration, and the name of the one class in it."""
    path = folder / "config.json"
    if not path.is_file():
        raise CommandError(f"MODEL: {folder} has no config.json, so it is no checkpoint")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        names = config["architectures"]
    except OSError as error:
        raise CommandError(f"MODEL: {path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CommandError(f"MODEL: {path} does not name one class in 'architectures'") from error
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise CommandError(f"MODEL: {path} does not name one class in 'architectures'")
    return config, names[0]


@contextmanager
def _bars_at_a_terminal(transformers: Any) -> Iterator[None]:
    """Let transformers show its progress bars at a terminal only."""
    logging = transformers.utils.logging
    hide = logging.is_progress_bar_enabled() and not sys.stderr.isatty()
    if hide:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if hide:
            logging.enable_progress_bar()
