"""The server on two CPU cores: many clients at once, of whom a third leave in the middle.

    python -m benchmarks.serve

Starts `python -m examples.serve` with SmolLM2-135M-Instruct in float32. All clients ask at the same time and get streamed
greedy answers. Every third client closes its connection halfway. The other answers are compared with those that
`endless` gives to each question alone.

Writes `serve.json` in `--output`. `rows` has for each client the number of pieces of text that it got, the time to the
first piece in ms, and whether the text is that of `endless` (null for clients who left). `overhead` is the time from the
pool's step to the socket. It comes from the server's own histogram, whose buckets grow by 20%: upper bounds in ms for 50%
and 95% of the tokens.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pydoc_data.topics import topics
from typing import Any

import httpx
import openai
import psutil
import torch
from prometheus_client.parser import text_string_to_metric_families

from sink_cache import SinkWindowCache, cache_kwargs, endless

from . import harness, models, smollm2

N_SINK, WINDOW, NAME = 4, 252, "SmolLM2-135M-Instruct"


async def ask(client: openai.AsyncOpenAI, message: str, new_tokens: int, leaves: bool) -> dict[str, Any]:
    """Ask the server as one client, and return what the client got."""
    start, first, pieces = time.perf_counter(), 0.0, list[str]()
    async with await client.chat.completions.create(
        model=NAME, messages=[{"role": "user", "content": message}], stream=True, temperature=0, max_tokens=new_tokens
    ) as answer:
        async for chunk in answer:
            if piece := chunk.choices[0].delta.content:
                first = first or 1e3 * (time.perf_counter() - start)
                pieces.append(piece)
            if leaves and len(pieces) == new_tokens // 2:
                break
    return {
        "message": message,
        "left": leaves,
        "pieces": len(pieces),
        "first_ms": round(first, 1),
        "text": "".join(pieces),
    }


async def ask_all(url: str, messages: list[str], new_tokens: int) -> list[dict[str, Any]]:
    """Wait for the server, let all clients ask at once, and return what each got."""
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600) as client:
        for _ in range(600):
            try:
                await client.models.list()
                break
            except openai.APIConnectionError:
                await asyncio.sleep(0.2)
        return await asyncio.gather(*(ask(client, text, new_tokens, n % 3 == 2) for n, text in enumerate(messages)))


def overhead(url: str) -> dict[str, float]:
    """Return the number of tokens in the server's histogram, and upper bounds of its own time for a token."""
    families = {family.name: family for family in text_string_to_metric_families(httpx.get(f"{url}/metrics").text)}
    samples = families["sink_cache_token_overhead_seconds"].samples
    buckets = [(float(s.labels["le"]), s.value) for s in samples if s.name.endswith("_bucket")]
    tokens = buckets[-1][1]
    found = {f"p{n}_at_most_ms": 1e3 * next(le for le, count in buckets if count >= n / 100 * tokens) for n in (50, 95)}
    return {"tokens": tokens, **{name: round(ms, 3) for name, ms in found.items()}}


def alone(message: str, model: Any, tokenizer: Any, new_tokens: int) -> str:
    """Return the answer of `endless` to one message."""
    chat = [{"role": "user", "content": message}]
    ids = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).input_ids
    tokens = model.generate(
        ids, attention_mask=torch.ones_like(ids), custom_generate=endless, prefill_chunk_size=512, do_sample=False,
        keep_tokens=ids.shape[1] + new_tokens, max_new_tokens=new_tokens, **cache_kwargs(SinkWindowCache(N_SINK, WINDOW)),
    )  # fmt: skip
    text: str = tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True)
    return text


def main(argv: Sequence[str] | None = None) -> None:
    """Run the server and its clients, compare, and write the result file; see the module docstring."""
    parser = harness.Parser("serve", __doc__.partition("\n")[0], measures=False)
    parser.numbers(clients=(32, "how many at once"), new_tokens=(32, "tokens of each answer"))
    args = parser.parse_args(argv)
    args.module, args.name = "serve", "serve"
    if hasattr(os, "sched_setaffinity"):  # two cores for this process, and so for the server that it starts
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    torch.set_num_threads(2)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    sizes = {"n-sink": N_SINK, "window": WINDOW, "max-streams": args.clients}
    options = [f"--{name}={value}" for name, value in sizes.items()]
    options += [f"--model={smollm2.fetch()}", f"--port={port}", "--dtype=float32"]
    others = float(psutil.cpu_percent(0.5)) / 100
    messages = [f"What does Python's help say about {topic}?" for topic in sorted(topics)[: args.clients]]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "examples.serve", *options]
    server = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "2"})
    try:
        rows = asyncio.run(ask_all(url, messages, args.new_tokens))
        spent = overhead(url)
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(timeout=60)
    model, tokenizer = smollm2.load()
    for row in rows:
        row |= {"as_alone": None, "reason": ""}
        if not row["left"]:
            row["as_alone"] = row["text"] == alone(row["message"], model, tokenizer, args.new_tokens)
    stayed = [row["as_alone"] for row in rows if not row["left"]]
    loaded = models.LoadedModel(model, tokenizer, NAME)
    with harness.Result("serve", loaded, args, argv, sizes=sizes, cpu_share_of_others=others, overhead=spent) as result:
        result.data["versions"] |= {name: version(name) for name in ("fastapi", "uvicorn", "openai")}
        result.rows += rows
    print(f"{sum(stayed)} of {len(stayed)} that stayed got what they get alone; overhead of a token: {spent}")


if __name__ == "__main__":
    sys.exit(harness.run(main))
