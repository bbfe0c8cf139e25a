"""From requests to answers: admission, the conversation that goes on, and the text that comes."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

from jinja2 import TemplateError
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

from sink_cache import StreamPool

from .conversations import Conversations, Held, Template, digests
from .engine import Engine, Turn, log
from .protocol import ChatRequest, Refused, StopStrings


class Metrics:
    """What Prometheus is told."""

    def __init__(self, pool: StreamPool) -> None:
        self.registry = CollectorRegistry()
        streams = Gauge(
            "sink_cache_streams",
            "Streams: active ones get tokens, queued ones wait for their first, idle ones for their next turn; parked ones are "
            "idle and have no row",
            ["state"],
            registry=self.registry,
        )
        states = {"active": ("running",), "queued": ("queued", "reading"), "idle": ("idle",), "parked": ("parked",)}
        for state, names in states.items():
            streams.labels(state).set_function(lambda names=names: sum(pool.counts[name] for name in names))
        size = Gauge(
            "sink_cache_cache_bytes", "Bytes of the cache of all rows, and of the reader", registry=self.registry
        )
        size.set_function(lambda: pool.nbytes)
        self.generated = Counter("sink_cache_generated_tokens", "Tokens generated", registry=self.registry)
        self.prompt = Counter("sink_cache_prompt_tokens", "Tokens of prompts", ["source"], registry=self.registry)
        self.overhead = Histogram(
            "sink_cache_token_overhead_seconds",
            "From the pool's step to the socket: the server's own time for a token of a streamed answer",
            buckets=[0.00005 * 1.2**n for n in range(55)],
            registry=self.registry,
        )


class Chats:
    """All conversations over one pool.

    Args:
        pool (`StreamPool`): steps in a thread of its own from the first request on.
        tokenizer (`PreTrainedTokenizerBase`): a fast one, with a chat template.
        max_queue (`int`): requests that wait while all rows are taken; further ones are refused.
        max_idle (`int`): conversations that are held between turns; the longest idle are dropped.
        max_new_tokens (`int`): of an answer, if its request gives no length.
    """

    def __init__(
        self, pool: StreamPool, tokenizer: PreTrainedTokenizerBase, max_queue: int, max_idle: int, max_new_tokens: int
    ) -> None:
        self.engine, self.template, self.metrics = Engine(pool), Template(tokenizer), Metrics(pool)
        self.conversations = Conversations(max_idle)
        self.max_active, self.max_new_tokens = pool.max_streams + max_queue, max_new_tokens
        self.active = 0

    def hold(self, held: Held) -> None:
        """Keeps a conversation for its next turn."""
        for gone in self.conversations.hold(held):
            self.engine.close(gone.turn)


class Answer:
    """An answer in the making. `begin` it, iterate over its pieces of text, and `close` it in any case.

    Attributes:
        finish_reason (`str`): after the last piece: "stop" or "length".
        usage (`dict`): numbers of tokens; `cached_tokens` are those that were not read again.
    """

    def __init__(self, chats: Chats, request: ChatRequest) -> None:
        self._chats, self._request = chats, request
        self._messages = [message.said() for message in request.messages]
        self._turn: Turn | None = None  # as long as it has to be closed
        self._is_active = False
        self._read = self._known = self._generated = 0

    async def begin(self) -> None:
        """Finds the conversation, and posts what is new of it to the engine.

        Raises:
            Refused: with the reason.
        """
        chats, engine = self._chats, self._chats.engine
        if chats.active >= chats.max_active:
            raise Refused(429, f"all {chats.max_active} places are taken, those of the queue included; try again later")
        chats.active += 1
        self._is_active = True
        ids = None
        held = chats.conversations.claim(self._messages)
        try:
            if held is not None:
                self._turn = held.turn
                ids = await asyncio.to_thread(chats.template.news, self._messages, held)
                if ids is None:
                    chats.hold(held)
                else:
                    self._turn = turn = Turn(held.turn.stream)
                    self._known = held.tokens
            if ids is None:
                self._turn = None
                ids = await asyncio.to_thread(chats.template.tokens, self._messages)
                self._turn = turn = Turn()
            self._read = len(ids)
            await engine.begin(turn, ids, self._request.options(chats.max_new_tokens))
        except TemplateError as error:
            raise Refused(400, f"the model's chat template takes no such messages: {error}", "messages") from error
        except (TypeError, ValueError, NotImplementedError) as error:
            raise Refused(400, str(error)) from error
        except RuntimeError as error:
            raise Refused(503, str(error)) from error
        chats.metrics.prompt.labels("read").inc(self._read)
        chats.metrics.prompt.labels("held").inc(self._known)

    async def __aiter__(self) -> AsyncIterator[str]:
        """Yields the text in pieces, each as soon as it is known; some are empty.

        Raises:
            Refused: if the stream fails.
        """
        chats, turn = self._chats, self._turn
        assert turn is not None
        decoder, tokenizer = DecodeStream(skip_special_tokens=True), chats.template.tokenizer.backend_tokenizer
        stops, text, token = StopStrings(self._request.stop), "", None
        while True:
            next_token, detail = await turn.events.get()
            if next_token is None:
                break
            token = next_token
            self._generated += 1
            chats.metrics.generated.inc()
            piece = stops.take(decoder.step(tokenizer, token) or "")
            text += piece
            yield piece
            chats.metrics.overhead.observe(time.perf_counter() - detail)
            if stops.found:  # the stream has tokens that are not in the answer, so that nothing can go on from it
                self.finish_reason = "stop"
                return
        if detail not in ("eos", "length"):
            log.error("a stream has failed", exc_info=turn.error)
            raise Refused(503 if turn.error is None else 500, f"the answer was broken off: {turn.error or detail}")
        self.finish_reason = "stop" if detail == "eos" else "length"
        conversation = [*self._messages, ("assistant", text + stops.rest)]
        size = self._known + self._read + self._generated
        eos = token if detail == "eos" else None
        self._turn = None  # before the client knows the end, and sends the next turn
        chats.hold(Held(turn, digests(conversation)[-1], len(conversation), size, eos))
        yield stops.rest

    @property
    def usage(self) -> dict[str, Any]:
        """Numbers of tokens until now."""
        prompt = self._known + self._read
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self._generated,
            "total_tokens": prompt + self._generated,
            "prompt_tokens_details": {"cached_tokens": self._known},
        }

    def close(self) -> None:
        """Frees what the answer has, if it has not ended; does nothing the second time."""
        self._chats.active -= self._is_active
        self._is_active = False
        if self._turn is not None:
            self._chats.engine.close(self._turn)
            self._turn = None
