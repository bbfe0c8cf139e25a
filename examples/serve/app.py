"""The HTTP application: paths, keys, errors and streaming."""

import asyncio
import hmac
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import uvicorn
from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from sink_cache import StreamPool

from .chats import Answer, Chats
from .protocol import ChatRequest, Refused, Shapes, event


def create_app(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    *,
    n_sink: int,
    window: int,
    max_streams: int,
    prefill_chunk_size: int,
    max_queue: int,
    max_idle: int,
    max_new_tokens: int,
    api_key: str | None = None,
) -> FastAPI:
    """Makes the application over one new `StreamPool`.

    Args:
        model, n_sink, window, max_streams, prefill_chunk_size: as for `StreamPool`.
        tokenizer, max_queue, max_idle, max_new_tokens: as for `Chats`.
        name (`str`): of the model, for clients.
        api_key (`str`, *optional*): which clients have to give.

    Raises:
        TypeError, ValueError, NotImplementedError: as `StreamPool` and `Template`.
    """
    pool = StreamPool(
        model, n_sink=n_sink, window=window, max_streams=max_streams, prefill_chunk_size=prefill_chunk_size
    )
    chats = Chats(pool, tokenizer, max_queue, max_idle, max_new_tokens)
    card = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "sink_cache"}

    def check_key(request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if api_key is not None and not hmac.compare_digest(given.encode(), api_key.encode()):
            raise Refused(401, "the API key is missing or wrong", code="invalid_api_key")

    def check_model(asked: str) -> None:
        if asked != name:
            raise Refused(404, f"there is no model {asked!r} here, but {name!r}", "model", "model_not_found")

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await chats.engine.stop()

    app = FastAPI(title="sink_cache", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.engine = chats.engine
    v1 = APIRouter(prefix="/v1", dependencies=[Depends(check_key)])

    @app.exception_handler(Refused)
    async def refuse(request: Request, error: Refused) -> Response:
        return JSONResponse(error.body, error.status)

    @app.exception_handler(HTTPException)
    async def refuse_path(request: Request, error: HTTPException) -> Response:
        return await refuse(request, Refused(error.status_code, f"{request.url.path}: {error.detail}"))

    @app.exception_handler(RequestValidationError)
    async def refuse_body(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:])
        return await refuse(request, Refused(400, f"{where}: {first['msg']}".removeprefix(": "), where or None))

    @app.get("/health")
    async def health() -> Response:
        error = chats.engine.error
        return JSONResponse(
            {"status": "ok"} if error is None else {"status": str(error)}, 200 if error is None else 503
        )

    @app.get("/metrics")
    async def metrics() -> Response:
        return PlainTextResponse(generate_latest(chats.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @v1.get("/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    @v1.get("/models/{asked:path}")
    async def model_card(asked: str) -> dict[str, Any]:
        check_model(asked)
        return card

    @v1.post("/chat/completions")
    async def complete(body: ChatRequest, request: Request) -> Response:
        check_model(body.model)
        answer = Answer(chats, body)
        try:
            await answer.begin()
            if body.stream:
                return _Stream(answer, body)
            text = await _unless_disconnected(_text(answer), request)
        except BaseException:
            answer.close()
            raise
        answer.close()
        if text is None:
            return Response(status_code=499)  # nobody sees it
        return JSONResponse(Shapes(body.model).whole(text, answer.finish_reason, answer.usage))

    app.include_router(v1)
    return app


def load_app(model: str, name: str, device: str, dtype: str, **options: Any) -> FastAPI:
    """Loads a model and makes the application; `options` are those of `create_app`."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).to(device)
    return create_app(loaded, AutoTokenizer.from_pretrained(model), name, **options)


class Server(uvicorn.Server):
    """Breaks off the answers that are under way when it goes down: some would go on for long."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Ends the engine, and then all connections."""
        await self.config.app.state.engine.stop()  # type: ignore[union-attr]  # a FastAPI
        await super().shutdown(sockets)


async def _text(answer: Answer) -> str:
    return "".join([piece async for piece in answer])


async def _unless_disconnected(work: Any, request: Request) -> Any:
    """Awaits `work`, and gives it up for None if the client goes."""

    async def until_disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(until_disconnected())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()


class _Stream(StreamingResponse):
    """An answer as server-sent events. It is closed whatever happens, also before its first event."""

    def __init__(self, answer: Answer, request: ChatRequest) -> None:
        super().__init__(self._events(request), media_type="text/event-stream", headers={"cache-control": "no-cache"})
        self.answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.answer.close()

    async def _events(self, request: ChatRequest) -> AsyncIterator[str]:
        shapes = Shapes(request.model)
        yield shapes.chunk({"role": "assistant", "content": ""})
        try:
            async for piece in self.answer:
                if piece:
                    yield shapes.chunk({"content": piece})
        except Refused as error:
            yield event(error.body)
            return
        self.answer.close()  # before the client knows the end
        yield shapes.chunk({}, self.answer.finish_reason)
        if request.stream_options is not None and request.stream_options.include_usage:
            yield shapes.usage(self.answer.usage)
        yield "data: [DONE]\n\n"
