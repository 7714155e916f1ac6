"""Reads corpora: domains of tokens as memory-mapped files."""

from ghost_engines.corpus.domains import TokenCorpus
from ghost_engines.corpus.errors import CorpusError
from ghost_engines.corpus.memmap import TokenMemmap
from ghost_engines.corpus.sidecar import BLOCKS_PER_DOMAIN, TokenFormat, domain_number, token_path
from ghost_engines.corpus.writer import TokenWriter

__all__ = [
    "BLOCKS_PER_DOMAIN",
    "CorpusError",
    "TokenCorpus",
    "TokenFormat",
    "TokenMemmap",
    "TokenWriter",
    "domain_number",
    "token_path",
]
