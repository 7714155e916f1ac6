"""Four domains of real text, the vocabulary they share, and passages cut from them.

The texts ship with the package; `data/texts/NOTICE.md` says where each comes from and under which
licence. Nothing is downloaded: the vocabulary is counted from the texts in about a second.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files

VOCABULARY_SIZE = 1024
"""Size of the default vocabulary.

Byte by byte, a passage of 128 tokens is two short sentences; a thousand pieces more than double
what a model reads in each step and keep its embedding small beside its layers.
"""

_BYTES = 256

# Words keep the space before them and line breaks the indentation after them, so that a common
# word or indentation is one piece. The branches cover every character.
_WORD = re.compile(r"\n+ *| ?[^\W\d_]+| ?\d| ?[^\w\s]+|_+|\s+(?=\s)|\s+|.", re.DOTALL)

_SHA256 = {
    "scripture": "73438ec3ca208c162f1dc1f89281d4f704d5c9e375cc476eb700a19073e2ec01",
    "python": "fff09d54c5c617718481cad12ba3322547c6f1f8b8f1007d65e3c395790f89f1",
    "dictionary": "e4a4f95186e1a589b831fc7832dce938d1ea4f68acbc79f9660edfc0a4ff1870",
    "manual": "7d6ff5db23a01c6a234bcf600221ba91e8e152c556c646207b6aba029c8579ee",
}


@dataclass(frozen=True)
class Domain:
    """A kind of text.

    Attributes:
        name: What `load_domain` calls it.
        title: What it is, for a reader.
        licence: SPDX identifier, or "public domain".
    """

    name: str
    title: str
    licence: str


DOMAINS = (
    Domain("scripture", "King James Bible: Genesis, Ruth, Jonah, Mark", "public domain"),
    Domain("python", "Python standard library: source code", "PSF-2.0"),
    Domain("dictionary", "Ambrose Bierce: The Devil's Dictionary, A to S", "public domain"),
    Domain("manual", "scikit-learn: user guide", "BSD-3-Clause"),
)
"""Every domain that the package ships, in the order that `passages` keeps."""


def load_domain(name: str) -> str:
    r"""Read the text of a domain and check that it is the one that was shipped.

    Args:
        name: The name of one of `DOMAINS`.

    Returns:
        The whole text, lines ending in `\n`.

    Raises:
        ValueError: If no domain has that name, or if the text does not have the pinned SHA-256.
    """
    if name not in _SHA256:
        raise ValueError(f"unknown domain {name!r}. Available: {', '.join(_SHA256)}.")
    file = f"{name}.txt"
    content = (files("ghost_examples") / "data" / "texts" / file).read_bytes()
    # A checkout may have converted the line ends; that is the same text.
    content = content.replace(b"\r\n", b"\n")
    found = hashlib.sha256(content).hexdigest()
    if found != _SHA256[name]:
        raise ValueError(
            f"{file} is not the text that was shipped: "
            f"expected SHA-256 {_SHA256[name]}, found {found}. Install the package again."
        )
    return content.decode("utf-8")


@dataclass(frozen=True)
class Vocabulary:
    """Text to token ids and back, without loss for any text.

    Ids below 256 are single bytes; id `256 + i` is `pieces[i]`. Encoding takes the longest piece
    that fits inside the current word and falls back to bytes.

    Attributes:
        pieces: Strings that are one token each.
    """

    pieces: tuple[str, ...]

    @classmethod
    def train(cls, texts: Iterable[str], size: int) -> Vocabulary:
        """Build a vocabulary by joining, again and again, the most frequent neighbouring pieces.

        Args:
            texts: What to count. Each of their characters outside ASCII becomes a piece, so no
                character that occurs here is ever split.
            size: Number of token ids. Texts with little to join give a smaller vocabulary.

        Returns:
            The vocabulary; the same texts and size always give the same one.

        Raises:
            ValueError: If `size` cannot hold the bytes and the characters outside ASCII.
        """
        counts: Counter[str] = Counter()
        for text in texts:
            counts.update(_WORD.findall(text))
        pieces = sorted({char for word in counts for char in word if not char.isascii()})
        room = size - _BYTES - len(pieces)
        if room < 0:
            raise ValueError(f"size must be at least {_BYTES + len(pieces)}, got {size}")
        return cls((*pieces, *_merges(counts, room)))

    @property
    def size(self) -> int:
        """Number of token ids; what a model's `vocab_size` has to be."""
        return _BYTES + len(self.pieces)

    def encode(self, text: str) -> tuple[int, ...]:
        """Return the token ids of a text.

        Args:
            text: Any text.

        Returns:
            Ids below `size`, for which `decode` returns the text.
        """
        known: dict[str, tuple[int, ...]] = {}
        tokens: list[int] = []
        for word in _WORD.findall(text):
            if word not in known:
                known[word] = self._encode_word(word)
            tokens.extend(known[word])
        return tuple(tokens)

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the text of token ids.

        Args:
            tokens: Ids below `size`. A model may put bytes together that are no UTF-8; these
                become U+FFFD.

        Returns:
            The text.

        Raises:
            ValueError: If an id is outside the vocabulary.
        """
        parts: list[bytes] = []
        size = self.size
        for token in tokens:
            if not 0 <= token < size:
                raise ValueError(f"token id {token} is outside the vocabulary of {size}")
            parts.append(self._spellings[token])
        return b"".join(parts).decode("utf-8", errors="replace")

    @functools.cached_property
    def _ids(self) -> dict[str, int]:
        return {piece: _BYTES + i for i, piece in enumerate(self.pieces)}

    @functools.cached_property
    def _spellings(self) -> list[bytes]:
        singles = [bytes([byte]) for byte in range(_BYTES)]
        return [*singles, *(piece.encode("utf-8") for piece in self.pieces)]

    @functools.cached_property
    def _longest(self) -> int:
        return max(map(len, self.pieces), default=1)

    def _encode_word(self, word: str) -> tuple[int, ...]:
        tokens: list[int] = []
        start = 0
        while start < len(word):
            for end in range(min(len(word), start + self._longest), start, -1):
                token = self._ids.get(word[start:end])
                if token is not None:
                    tokens.append(token)
                    break
            else:
                end = start + 1
                tokens.extend(word[start:end].encode("utf-8"))
            start = end
        return tuple(tokens)


@functools.cache
def build_vocabulary(size: int = VOCABULARY_SIZE) -> Vocabulary:
    """Return the vocabulary that the four domains share, counted from all of them.

    Args:
        size: Number of token ids.

    Returns:
        The vocabulary; a second call with the same size returns the same object.
    """
    return Vocabulary.train((load_domain(domain.name) for domain in DOMAINS), size)


@dataclass(frozen=True)
class Passage:
    """A stretch of a domain with a fixed number of tokens.

    Attributes:
        domain: Name of the domain.
        index: Position among the passages of that domain, from 0.
        text: The text itself. Passages are cut by tokens, so it may begin inside a word.
        tokens: The token ids, which decode to `text`.
    """

    domain: str
    index: int
    text: str
    tokens: tuple[int, ...]


def passages(
    length: int,
    vocabulary: Vocabulary | None = None,
    *,
    domains: Sequence[str] | None = None,
    per_domain: int | None = None,
) -> tuple[Passage, ...]:
    """Cut each domain into consecutive passages; a rest shorter than a passage is dropped.

    Args:
        length: Tokens in every passage.
        vocabulary: What to cut with; `build_vocabulary()` if None.
        domains: Names of the domains to cut; all of `DOMAINS` if None.
        per_domain: How many passages of each domain to keep, spread evenly over it; all if None.
            A kept passage has the index that it has without this limit.

    Returns:
        Domain by domain, in the order of each text. Joined, the texts of all the passages of a
        domain are the beginning of that domain.

    Raises:
        ValueError: If a domain is unknown or too short, if `length` or `per_domain` is not
            positive, or if a cut falls inside a character, which a vocabulary can only do that
            was trained on other texts.
    """
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length}")
    if per_domain is not None and per_domain < 1:
        raise ValueError(f"per_domain must be at least 1, got {per_domain}")
    vocabulary = build_vocabulary() if vocabulary is None else vocabulary
    names = [domain.name for domain in DOMAINS] if domains is None else domains
    found: list[Passage] = []
    for name in names:
        cut = _cut(name, length, vocabulary)
        keep = len(cut) if per_domain is None else per_domain
        if not 0 < keep <= len(cut):
            raise ValueError(
                f"domain {name!r} has {len(cut)} passages of {length} tokens, "
                f"{max(keep, 1)} asked for"
            )
        found.extend(cut[i * len(cut) // keep] for i in range(keep))
    return tuple(found)


@functools.lru_cache(maxsize=16)
def _cut(name: str, length: int, vocabulary: Vocabulary) -> tuple[Passage, ...]:
    text = load_domain(name)
    tokens = vocabulary.encode(text)
    cut: list[Passage] = []
    position = 0
    for index in range(len(tokens) // length):
        part = tokens[index * length : (index + 1) * length]
        spelled = vocabulary.decode(part)
        if not text.startswith(spelled, position):
            raise ValueError(
                f"passage {index} of domain {name!r} is cut inside a character; "
                "use a vocabulary trained on this domain"
            )
        position += len(spelled)
        cut.append(Passage(name, index, spelled, part))
    return tuple(cut)


def _merges(counts: Counter[str], number: int) -> list[str]:
    """Return up to `number` pieces of at least two characters, the most useful first."""
    # A word that occurs once cannot make a pair frequent; half of all words are such.
    words = [(list(word), count) for word, count in counts.items() if count > 1 and len(word) > 1]
    pairs: Counter[tuple[str, str]] = Counter()
    users: defaultdict[tuple[str, str], set[int]] = defaultdict(set)
    for i, (parts, count) in enumerate(words):
        for pair in itertools.pairwise(parts):
            pairs[pair] += count
            users[pair].add(i)
    # Different pairs can spell the same piece; a dict keeps the order and drops the second.
    merged: dict[str, None] = {}
    while pairs and len(merged) < number:
        # The pair itself breaks ties, or the result would depend on the order of the counts.
        most = max(pairs.values())
        left, right = best = max(pair for pair, count in pairs.items() if count == most)
        merged[left + right] = None
        for i in users.pop(best):
            parts, count = words[i]
            for pair in itertools.pairwise(parts):
                pairs[pair] -= count
                if pairs[pair] == 0:
                    del pairs[pair]
            position = 0
            while position < len(parts) - 1:
                if (parts[position], parts[position + 1]) == best:
                    parts[position : position + 2] = [left + right]
                position += 1
            for pair in itertools.pairwise(parts):
                pairs[pair] += count
                users[pair].add(i)
    return list(merged)
