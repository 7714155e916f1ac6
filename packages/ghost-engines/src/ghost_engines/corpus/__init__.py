"""Reads corpora: domains of tokens as memory-mapped files, texts and tables as samples."""

from ghost_engines.corpus.domains import TokenCorpus
from ghost_engines.corpus.errors import CorpusError
from ghost_engines.corpus.examples import Blocks, Examples
from ghost_engines.corpus.forms import Form, MessagesForm, PromptForm, TextForm, TextTokens
from ghost_engines.corpus.memmap import TokenMemmap
from ghost_engines.corpus.mixture import Mixture
from ghost_engines.corpus.records import SUFFIXES, TEXT, NoRecordError, Records, open_records
from ghost_engines.corpus.sidecar import (
    BLOCKS_PER_DOMAIN,
    TokenFormat,
    domain_number,
    named,
    token_path,
)
from ghost_engines.corpus.writer import TokenWriter

__all__ = [
    "BLOCKS_PER_DOMAIN",
    "SUFFIXES",
    "TEXT",
    "Blocks",
    "CorpusError",
    "Examples",
    "Form",
    "MessagesForm",
    "Mixture",
    "NoRecordError",
    "PromptForm",
    "Records",
    "TextForm",
    "TextTokens",
    "TokenCorpus",
    "TokenFormat",
    "TokenMemmap",
    "TokenWriter",
    "domain_number",
    "named",
    "open_records",
    "token_path",
]
