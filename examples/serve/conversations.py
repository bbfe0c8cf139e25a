"""Which conversation a request goes on with, and the tokens of it that no forward has seen."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from .engine import Turn

Said = tuple[str, str]  # a role and a content


def digests(messages: Sequence[Said]) -> list[bytes]:
    """A hash of each beginning of a conversation: of its first message, its first two …"""
    running, found = hashlib.sha256(), []
    for message in messages:
        running.update(json.dumps(message).encode())
        found.append(running.digest())
    return found


def home(body: bytes, replicas: int) -> int:
    """The number of the replica for a conversation: by its messages up to the first that is no system prompt."""
    try:
        messages = [(message["role"], message["content"]) for message in json.loads(body)["messages"]]
        first = next((n for n, (role, _) in enumerate(messages) if role not in ("system", "developer")), 0)
    except (KeyError, TypeError, ValueError):
        return 0  # which says what is wrong
    key = json.dumps(messages[: first + 1]).encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "big") % replicas


@dataclass
class Held:
    """A conversation that waits for its next turn.

    Attributes:
        turn (`Turn`): the last one, whose stream is idle.
        digest (`bytes`): of all messages, the answer included.
        messages (`int`): how many.
        tokens (`int`): how many, read and generated.
        eos (`int`, *optional*): the token with which the model ended the answer; None if it was cut off.
    """

    turn: Turn
    digest: bytes
    messages: int
    tokens: int
    eos: int | None


class Conversations:
    """Those that are held, at most `limit`; the longest idle first."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held: list[Held] = []

    def claim(self, messages: Sequence[Said]) -> Held | None:
        """Takes out the longest one with which these messages begin."""
        lengths = {digest: length for length, digest in enumerate(digests(messages))}
        known = [one for one in self._held if one.digest in lengths]
        if not known:
            return None
        longest = max(known, key=lambda one: lengths[one.digest])
        self._held.remove(longest)
        return longest

    def hold(self, one: Held) -> list[Held]:
        """Takes one in, as the last; returns those that have to go."""
        self._held.append(one)
        gone = self._held[: max(0, len(self._held) - self._limit)]
        del self._held[: len(gone)]
        return gone


class Template:
    """A tokenizer's chat template, as tokens.

    Raises:
        ValueError: if the tokenizer has no chat template, or cannot decode token by token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.chat_template:
            raise ValueError(f"{tokenizer.name_or_path} has no chat template; choose a model that is tuned for chat")
        if not tokenizer.is_fast:
            raise ValueError(
                f"{type(tokenizer).__name__} cannot decode token by token; the server needs a fast tokenizer"
            )
        self.tokenizer = tokenizer
        answered = self._text([("user", "?"), ("assistant", "ANSWER")])
        self._end = answered.rpartition("ANSWER")[2]  # what comes after an answer

    def tokens(self, messages: Sequence[Said]) -> list[int]:
        """The tokens of a conversation, up to where its next answer begins."""
        return self._ids(self._text(messages, asks=True))

    def news(self, messages: Sequence[Said], held: Held) -> list[int] | None:
        """The tokens after those that were read or generated; None if the template has rewritten what was said before."""
        before, text = self._text(messages[: held.messages]), self._text(messages, asks=True)
        if not text.startswith(before) or not before.endswith(self._end):
            return None
        ids = self._ids((self._end if held.eos is None else self._end.lstrip()) + text[len(before) :])
        if held.eos is None:
            return ids
        return ids[1:] if ids[:1] == [held.eos] else None  # generated already

    def _text(self, messages: Sequence[Said], asks: bool = False) -> str:
        chat = [{"role": role, "content": content} for role, content in messages]
        return self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=asks)  # type: ignore[return-value]

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids  # type: ignore[no-any-return]
