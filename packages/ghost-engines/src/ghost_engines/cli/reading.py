"""How commands read data: the options that they share.

Nothing here imports torch: see `options.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from ghost_engines.cli.own import Count, Named


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How data are read from files and folders.

    Args:
        prompt: Field of a prompt. Only the completion is part of the loss then.
        completion: Field of its completion.
        messages: Field of a conversation, for the tokenizer's chat template. Only the answers are
            part of the loss then.
        truncate: Tokens to take of each sample; without it, one that is too long for the model is
            an error.
        block: Pack all texts into blocks of so many tokens instead.
        domains: Names of domains in the folder of the data, separated by commas: of token memmaps,
            or of files of texts (DOMAIN.jsonl, ...).
        split: Which token memmaps of a folder to read.
    """

    prompt: Annotated[str | None, Named(metavar="FIELD")] = None
    completion: Annotated[str | None, Named(metavar="FIELD")] = None
    messages: Annotated[str | None, Named(metavar="FIELD")] = None
    truncate: Count = None
    block: Count = None
    domains: Annotated[str | None, Named(metavar="NAMES")] = None
    split: str = "train"


@dataclass(frozen=True, kw_only=True)
class DataOptions(Reading):
    """How data are read, whose texts are under a field.

    Args:
        text: Field of the text; text by default.
    """

    text: Annotated[str | None, Named(metavar="FIELD")] = None
