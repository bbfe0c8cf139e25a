"""The application on Ray Serve: a deployment for each replica, and a router before them.

Each replica is a deployment of its own, because Ray chooses freely among the replicas of one. The router sends a conversation to
the replica that the hash of its beginning names, so that each turn reaches the pool that holds it.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from ray import serve as ray_serve
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from .app import load_app
from .conversations import home


class Replica:
    """The application without sockets: a request comes as a call, and the answer is what the application sends."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._app = load_app(**options)

    def check_health(self) -> None:
        """Lets Ray start the replica again when a step has failed."""
        if (error := self._app.state.engine.error) is not None:
            raise error

    async def respond(self, scope: dict[str, Any], body: bytes) -> AsyncIterator[dict[str, Any]]:
        """Yields the messages of ASGI. If nobody wants them any more, Ray cancels this call, and the answer with it."""
        sent: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        received: asyncio.Queue[dict[str, Any]] = (
            asyncio.Queue()
        )  # the next `get` waits for ever: no disconnect is seen
        received.put_nowait({"type": "http.request", "body": body, "more_body": False})
        task = asyncio.ensure_future(self._app(scope, received.get, sent.put))
        task.add_done_callback(lambda _: sent.put_nowait({"type": "end"}))
        try:
            while (message := await sent.get())["type"] != "end":
                yield message
            task.result()
        finally:
            task.cancel()


class Router:
    """Sends each request to the replica that holds its conversation."""

    def __init__(self, *replicas: DeploymentHandle) -> None:
        self._replicas = [replica.options(stream=True) for replica in replicas]

    async def __call__(self, request: Request) -> Response:
        """Answers one request."""
        if request.url.path == "/metrics":
            answers = [await self._ask(number, request, b"") for number in range(len(self._replicas))]
            texts = [await _body(one) for one in answers]
            return Response(generate_latest(_Families(texts)), media_type=CONTENT_TYPE_LATEST)  # type: ignore[arg-type]
        if request.url.path == "/health":
            answers = [await self._ask(number, request, b"") for number in range(len(self._replicas))]
            statuses = [one.status_code for one in answers]
            return JSONResponse({"replicas": statuses}, max(statuses))
        body = await request.body()
        return await self._ask(home(body, len(self._replicas)), request, body)

    async def _ask(self, number: int, request: Request, body: bytes) -> StreamingResponse:
        names = ("type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string", "headers")
        scope = {name: request.scope[name] for name in names if name in request.scope}
        messages = self._replicas[number].respond.remote(scope, body)
        start = await anext(messages)

        async def parts() -> AsyncIterator[bytes]:
            try:
                async for message in messages:
                    yield message.get("body", b"")
            finally:
                messages.cancel()

        response = StreamingResponse(parts(), start["status"])
        response.raw_headers = list(start["headers"])
        return response


async def _body(response: StreamingResponse) -> str:
    return b"".join([part async for part in response.body_iterator]).decode()


class _Families:
    """The metrics of all replicas, with the label `replica`."""

    def __init__(self, texts: list[str]) -> None:
        self._texts = texts

    def collect(self) -> Iterator[Metric]:
        found: dict[str, Metric] = {}
        for number, text in enumerate(self._texts):
            for family in text_string_to_metric_families(text):
                kept = found.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                for sample in family.samples:
                    kept.add_sample(sample.name, {**sample.labels, "replica": str(number)}, sample.value)
        yield from found.values()


def application(replicas: int, options: dict[str, Any]) -> Any:
    """Makes the application for `ray.serve.run`; `options` are those of `load_app`."""
    needs = {"num_cpus": 1, "num_gpus": int(options["device"].startswith("cuda"))}
    # No request waits in Ray, which would refuse none: a full pool says so by itself.
    deployment = ray_serve.deployment(max_ongoing_requests=10_000)
    nodes = [
        deployment(Replica).options(name=f"replica-{number}", ray_actor_options=needs).bind(options)
        for number in range(replicas)
    ]
    return deployment(Router).options(ray_actor_options={"num_cpus": 0}).bind(*nodes)


def serve(replicas: int, host: str, port: int, options: dict[str, Any]) -> None:
    """Starts Ray on this machine, or joins the cluster of `RAY_ADDRESS`, and serves until Ctrl-C."""
    app = application(replicas, options)
    try:
        ray_serve.start(http_options={"host": host, "port": port})
        ray_serve.run(app, blocking=True)
    except KeyboardInterrupt:  # before all replicas are there; afterwards Ray sees to it
        ray_serve.shutdown()
