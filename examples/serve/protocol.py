"""What comes in and goes out: requests, their refusals and the pieces of answers, in the shapes of OpenAI's chat completions."""

import json
import time
import uuid
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from transformers import GenerationConfig

# What the protocol has beyond `ChatRequest`, with the value that asks for nothing.
NEUTRAL: dict[str, Any] = {
    "frequency_penalty": 0, "logit_bias": {}, "logprobs": False, "modalities": ["text"], "n": 1, "presence_penalty": 0,
    "response_format": {"type": "text"}, "store": False, "tool_choice": "none", "tools": [],
}  # fmt: skip
IGNORED = {"metadata", "parallel_tool_calls", "prompt_cache_key", "safety_identifier", "service_tier", "user"}


class Refused(Exception):
    """A request that is refused: `status` of HTTP, and what OpenAI's errors say."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(status)
        kind = kind or ("server_error" if status >= 500 else "invalid_request_error")
        self.status, self.body = status, {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Part(BaseModel):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """What was said, and by whom."""

    model_config = ConfigDict(extra="allow")
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part] | None = None

    @model_validator(mode="after")
    def _refuse_what_is_not_there(self) -> "Message":
        for name, value in (self.model_extra or {}).items():
            if value:
                raise ValueError(f"messages with {name} are not supported")
        if self.content is None and self.role != "assistant":
            raise ValueError(f"a message of the {self.role} needs content")
        return self

    def said(self) -> tuple[str, str]:
        """The role and the content, as templates know them."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content or [])
        return "system" if self.role == "developer" else self.role, text


class StreamOptions(BaseModel):
    """What a stream of chunks has beyond the answer."""

    include_usage: bool = False


class ChatRequest(BaseModel):
    """The body of a request for an answer."""

    model_config = ConfigDict(extra="allow")
    model: str
    messages: list[Message] = Field(min_length=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    stop: list[str] = []
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)

    @field_validator("stop", mode="before")
    @classmethod
    def _list_stops(cls, stop: Any) -> Any:
        stops = [stop] if isinstance(stop, str) else stop or []
        if len(stops) > 4 or not all(stops):
            raise ValueError("at most 4 strings, none of them empty")
        return stops

    @model_validator(mode="after")
    def _refuse_what_is_not_there(self) -> "ChatRequest":
        for name, value in (self.model_extra or {}).items():
            if value is not None and name not in IGNORED and (name not in NEUTRAL or value != NEUTRAL[name]):
                raise ValueError(f"{name}={json.dumps(value)[:80]} is not supported; leave it out")
        return self

    def options(self, max_new_tokens: int) -> dict[str, Any]:
        """The options of a stream; `max_new_tokens` holds if the request gives no length.

        They come in a `GenerationConfig`, which stands for all that the turn before had.
        """
        temperature = 1.0 if self.temperature is None else self.temperature
        sampling = {"temperature": temperature, "top_p": 1.0 if self.top_p is None else self.top_p, "top_k": 0}
        config = GenerationConfig(
            do_sample=temperature > 0,
            max_new_tokens=self.max_completion_tokens or self.max_tokens or max_new_tokens,
            **(sampling if temperature > 0 else {}),
        )
        return {"generation_config": config, "seed": self.seed}


class Shapes:
    """Makes the JSON of one answer."""

    def __init__(self, model: str) -> None:
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, text: str, finish_reason: str, usage: dict[str, Any]) -> dict[str, Any]:
        """The answer in one piece."""
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish_reason}
        return {**self._head, "object": "chat.completion", "choices": [choice], "usage": usage}

    def chunk(self, delta: dict[str, Any], finish_reason: str | None = None) -> str:
        """One event of a stream."""
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return event({**self._head, "object": "chat.completion.chunk", "choices": [choice]})

    def usage(self, usage: dict[str, Any]) -> str:
        """The event with the numbers of tokens."""
        return event({**self._head, "object": "chat.completion.chunk", "choices": [], "usage": usage})


def event(data: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(data)}\n\n"


class StopStrings:
    """Finds stop strings in a text that comes in pieces."""

    def __init__(self, stops: list[str]) -> None:
        self._stops, self.rest = stops, ""  # which may be the beginning of a stop string
        self.found = False

    def take(self, piece: str) -> str:
        """Takes the next piece, and returns what is certainly no part of a stop string."""
        text = self.rest + piece
        ends = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if ends:
            self.found, self.rest = True, ""
            return text[: min(ends)]
        held = max((n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        self.rest = text[len(text) - held :]
        return text[: len(text) - held]
