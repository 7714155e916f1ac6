"""What a record is for a language model: a text, a prompt and its completion, a conversation."""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ghost_engines.corpus.errors import CorpusError


@dataclass(frozen=True)
class TextTokens:
    """Tokens of a record.

    Attributes:
        ids: Token ids.
        learnt: Whether each one is part of the loss.
    """

    ids: list[int]
    learnt: list[bool]

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self.ids)

    def taken(
        self, what: str, *, truncate: int | None, positions: int | None, instead: str = ""
    ) -> TextTokens:
        """Return those that a model gets: all, unless it was said that they may be cut.

        Args:
            what: What the record is called, for errors.
            truncate: Tokens to take at most; None for all.
            positions: Tokens that the model takes at most, if that is known.
            instead: What else may be done about too many, for the error.

        Raises:
            CorpusError: If there are more than the model takes, or none to predict.
        """
        found = TextTokens(self.ids[:truncate], self.learnt[:truncate])
        if positions is not None and len(found) > positions:
            raise CorpusError(
                f"{what} has {len(found)} tokens, and the model takes {positions}",
                remedy=f"cut what is longer (--truncate {positions}){instead}",
            )
        if not any(found.learnt[1:]):
            raise CorpusError(
                f"{what} has no token to predict",
                reason=f"of its {len(self)} tokens, {len(found)} are taken, and none after the "
                "first of these is part of the loss"
                if len(self)
                else "it has no tokens",
                remedy="leave it out of the data, or take more tokens",
            )
        return found


class Form(ABC):
    """Which fields of a record are read, and which of their tokens are part of the loss.

    Attributes:
        whole: Whether all tokens are, whatever the record.
    """

    whole: ClassVar[bool] = False

    @abstractmethod
    def tokens(self, record: Mapping[str, Any], tokenizer: Any, what: str) -> TextTokens:
        """Return the tokens of a record.

        Args:
            record: The record.
            tokenizer: One of transformers.
            what: What the record is called, for errors.

        Raises:
            CorpusError: If a field is missing, or holds something else.
        """

    @abstractmethod
    def shown(self, record: Mapping[str, Any], what: str) -> str:
        """Return a record as a text for people.

        Raises:
            CorpusError: As `tokens` does.
        """


@dataclass(frozen=True)
class TextForm(Form):
    """A text, of which every token is part of the loss.

    Attributes:
        field: The field that it is under.
    """

    whole: ClassVar[bool] = True

    field: str = "text"

    def tokens(self, record: Mapping[str, Any], tokenizer: Any, what: str) -> TextTokens:
        """Return the text's tokens, with those that the tokenizer adds."""
        ids = list(tokenizer(self.shown(record, what))["input_ids"])
        return TextTokens(ids, [True] * len(ids))

    def shown(self, record: Mapping[str, Any], what: str) -> str:
        """Return the text."""
        return _text(record, self.field, what)


@dataclass(frozen=True)
class PromptForm(Form):
    """A prompt with its completion, which alone is part of the loss, with the token of its end.

    Attributes:
        prompt: The field that the prompt is under.
        completion: The field that the completion is under.
    """

    prompt: str = "prompt"
    completion: str = "completion"

    def tokens(self, record: Mapping[str, Any], tokenizer: Any, what: str) -> TextTokens:
        """Return the tokens of both, which are not joined across the border."""
        before = list(tokenizer(_text(record, self.prompt, what))["input_ids"])
        answer = tokenizer(_text(record, self.completion, what), add_special_tokens=False)
        after = list(answer["input_ids"])
        if tokenizer.eos_token_id is not None:
            after.append(tokenizer.eos_token_id)
        return TextTokens(before + after, [False] * len(before) + [True] * len(after))

    def shown(self, record: Mapping[str, Any], what: str) -> str:
        """Return both, the completion on a line of its own unless there is space between them."""
        before, after = (_text(record, name, what) for name in (self.prompt, self.completion))
        apart = not before or before[-1].isspace() or after[:1].isspace()
        return f"{before}{after}" if apart else f"{before}\n{after}"


@dataclass(frozen=True)
class MessagesForm(Form):
    """A conversation by the tokenizer's chat template; answers of the assistant are the loss.

    Attributes:
        field: The field that the messages are under, each with a role and its content.
    """

    field: str = "messages"

    def tokens(self, record: Mapping[str, Any], tokenizer: Any, what: str) -> TextTokens:
        """Return the tokens of the whole conversation.

        Raises:
            CorpusError: If the tokenizer has no template, or its template writes what was said
                before in another way once there is an answer.
        """
        messages = self._messages(record, what)
        if not getattr(tokenizer, "chat_template", None):
            raise CorpusError(
                f"{what}: the tokenizer has no chat template",
                reason="nobody knows how a conversation is written for this model",
                remedy="give the tokenizer of a model for conversations, or read texts",
            )
        ids = _rendered(tokenizer, messages, prompt=False)
        learnt = [False] * len(ids)
        for at, message in enumerate(messages):
            if message.get("role") != "assistant":
                continue
            before = _rendered(tokenizer, messages[:at], prompt=True)
            after = _rendered(tokenizer, messages[: at + 1], prompt=False)
            if ids[: len(after)] != after or after[: len(before)] != before:
                raise CorpusError(
                    f"{what}: answer {at + 1} cannot be told from the rest of the conversation",
                    reason="the chat template writes what was said before in another way once "
                    "there is an answer",
                    remedy="write conversations with one answer each, or give prompts and "
                    "completions",
                )
            learnt[len(before) : len(after)] = [True] * (len(after) - len(before))
        return TextTokens(ids, learnt)

    def shown(self, record: Mapping[str, Any], what: str) -> str:
        """Return what was said, a line for each message."""
        messages = self._messages(record, what)
        return "\n".join(f"{each['role']}: {each['content']}" for each in messages)

    def _messages(self, record: Mapping[str, Any], what: str) -> list[dict[str, Any]]:
        found = _value(record, self.field, what)
        fits = isinstance(found, list) and all(
            isinstance(each, Mapping) and {"role", "content"} <= each.keys() for each in found
        )
        if not fits or not any(each["role"] == "assistant" for each in found):
            raise CorpusError(
                f"{self.field!r} of {what} is no conversation",
                reason="it is no list of messages, each with a role and its content, with an "
                "answer of the assistant among them",
                remedy="""give messages as in '[{"role": "user", "content": "..."}, """
                """{"role": "assistant", "content": "..."}]'""",
            )
        return [dict(each) for each in found]


def _rendered(tokenizer: Any, messages: list[dict[str, Any]], *, prompt: bool) -> list[int]:
    if not messages:
        return []
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _value(record: Mapping[str, Any], field: str, what: str) -> Any:
    if field in record:
        return record[field]
    near = difflib.get_close_matches(field, record, n=1)
    meant = f"; did you mean {near[0]!r}?" if near else ""
    raise CorpusError(
        f"{what} has no field {field!r}, but {', '.join(map(repr, record)) or 'none'}{meant}"
    )


def _text(record: Mapping[str, Any], field: str, what: str) -> str:
    found = _value(record, field, what)
    if not isinstance(found, str):
        raise CorpusError(f"{field!r} of {what} is a {type(found).__name__}, no text")
    return found
