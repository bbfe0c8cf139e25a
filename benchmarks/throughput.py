"""Many rows at once: tokens per second of a `StreamPool`, and of what transformers has for the same work."""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

import sink_cache
from sink_cache import SinkWindowCache, Stream, StreamPool, endless

from . import harness, models
from .arms import Arm, reason_for
from .calls import WARM_UP_TOKENS, StepTimes, generate, summarize

SAMPLING = {"do_sample": True, "temperature": 0.8, "top_k": 50, "top_p": 0.95}
ARMS = ("pool", "generate", "generate_batch")
OPTIONS = {
    "streams": ([64], "how many streams at once"),
    "prefill_chunk_size": (512, "tokens of a prompt that are read at once"),
    "prompt_tokens": (None, "tokens of each prompt (the capacity)"),
    "new_tokens": (300, "tokens that the pool's last stream, or each row, generates"),
    "others_new_tokens": (32, "tokens that each stream generates in the arms other than pool"),
    "rounds": (6, "how often each kind of rows has its turn"),
    "long_prompt": (32768, "tokens of the long text"),
    "requests": (256, "how many requests"),
    "scale": (1.0, "factor on the lengths of prompts and answers"),
    "soak_steps": (20000, "how many steps of the pool"),
    "text_tokens": (65536, "of each text"),
    "chunk_sizes": ([1020, 4096, 8192], "tokens per forward"),
}
MODES = {  # what each measures, and the options that only it or some of the modes have
    "steady": ("texts that begin at once and run without an end", ["prompt_tokens", "new_tokens", "others_new_tokens"]),
    "rows": ("steps in endless of batches whose rows have read different numbers of tokens", ["new_tokens", "rounds"]),
    "gap": ("steps of the others while a long text is read", ["prompt_tokens", "long_prompt"]),
    "traffic": ("requests that come at random", ["prompt_tokens", "requests", "scale"]),
    "read": ("tokens per second of stream()", ["text_tokens", "chunk_sizes"]),
    "soak": ("streams that join and leave: what grows, and whether each gets its own tokens", ["soak_steps"]),
}
KINDS = ("same", "differ", "half")  # of rows
PROMPTS, ANSWERS = (256, 4096), (128, 1024)  # tokens of traffic

Moments = list[float]  # when the tokens of a stream came, in seconds


class Bench:
    """A model, texts for it, and a pool for each number of streams."""

    def __init__(self, model: PreTrainedModel, args: argparse.Namespace, bytes_per_ms: float) -> None:
        self.model, self.args, self.bytes_per_ms = model, args, bytes_per_ms
        self.capacity, self.random = args.capacities[0], np.random.default_rng(args.seed)
        self.vocab_size = model.config.get_text_config().vocab_size
        self.pools: dict[int, StreamPool] = {}

    def text(self, tokens: int) -> list[int]:
        """Return a text of random tokens."""
        return [int(token) for token in self.random.integers(1, self.vocab_size, tokens)]

    def pool(self, streams: int) -> StreamPool:
        """Return an empty pool whose graphs are compiled. Calls with equal `streams` return the same pool."""
        if streams not in self.pools:
            sizes = {"n_sink": self.args.n_sink, "window": self.capacity - self.args.n_sink, "max_streams": streams}
            chunk = self.args.prefill_chunk_size
            pool = self.pools[streams] = StreamPool(self.model, **sizes, prefill_chunk_size=chunk)
            for length in (1, chunk, 2 * self.capacity):
                pool.add(self.text(length), max_new_tokens=12, **SAMPLING)
            list(pool)
        self.pools[streams].close()
        return self.pools[streams]

    def running_pool(self, streams: int) -> tuple[StreamPool, list[Stream]]:
        """Return a pool and its streams. All of them run, and none ends."""
        pool = self.pool(streams)
        added = [pool.add(self.text(self.args.prompt_tokens), seed=seed, **SAMPLING) for seed in range(streams)]
        while pool.counts["running"] < streams:
            pool.step()
        return pool, added

    # --- steady ---

    def steady(self, arm: str, streams: int) -> dict[str, Any]:
        """Return the rate of an arm, the time of a step, and the floor: reading the weights and the cache once.

        Only the time in which all streams run counts. It begins when the last stream gets its first token, and ends when
        the first stream gets its last token.
        """
        run = {"pool": self._pool, "generate": self._generate, "generate_batch": self._generate_batch}[arm]
        start, moments, cache_bytes = run(streams)
        begin, end = max(times[0] for times in moments), min(times[-1] for times in moments)
        within = [np.diff([moment for moment in times if begin <= moment <= end]) for times in moments]
        found = {
            "time_to_first_token_ms": 1e3 * float(np.median([times[0] - start for times in moments])),
            "cache_bytes": cache_bytes,
            "floor_ms": (models.step_weight_bytes(self.model) + (cache_bytes or 0)) / self.bytes_per_ms,
            "raw_step_ms": (1e3 * within[-1]).round(4).tolist(),  # of the last stream
            "tokens_per_second": None,
        }
        if len(steps := 1e3 * np.concatenate(within)):
            found["step_ms"], found["step_p99_ms"] = float(np.median(steps)), float(np.percentile(steps, 99))
            found["tokens_per_second"] = len(steps) / (end - begin)
        return found

    # Each arm returns the moment of its start, the moments of each stream's tokens, and the bytes of its cache.

    def _pool(self, streams: int) -> tuple[float, list[Moments], int]:
        pool, texts = self.pool(streams), [self.text(self.args.prompt_tokens) for _ in range(streams)]
        start = time.perf_counter()
        moments: dict[Stream, Moments] = {pool.add(text, seed=i, **SAMPLING): [] for i, text in enumerate(texts)}
        last = list(moments.values())[-1]
        for stream, _ in pool:
            moments[stream].append(time.perf_counter())
            if len(last) > self.args.new_tokens:
                break
        return start, list(moments.values()), pool.nbytes

    def _generate(self, streams: int) -> tuple[float, list[Moments], int]:
        ids = torch.tensor([self.text(self.args.prompt_tokens) for _ in range(streams)], device=self.model.device)
        for new_tokens in (3, self.args.others_new_tokens):  # the first call warms up
            cache = DynamicCache(config=self.model.config)
            generate(self.model, ids, cache, new_tokens, streamer=(noted := StepTimes()), **SAMPLING)
        return noted.moments[0], [noted.moments[1:]] * streams, harness.cache_bytes(cache)

    def _generate_batch(self, streams: int) -> tuple[float, list[Moments], None]:
        texts, new_tokens = [self.text(self.args.prompt_tokens) for _ in range(streams)], self.args.others_new_tokens
        config = GenerationConfig(max_new_tokens=new_tokens, eos_token_id=-1, pad_token_id=0, **SAMPLING)
        start = time.perf_counter()
        found = self.model.generate_batch(texts, generation_config=config, record_timestamps=True)  # type: ignore[operator]
        moments = [list(output.timestamps) for output in found.values() if output.timestamps]
        if len(moments) < streams:
            raise RuntimeError(f"generate_batch answered {len(moments)} of {streams} requests")
        return start, moments, None

    def rows(self, batch: int) -> list[dict[str, Any]]:
        """Return the times of steps in `endless`, in turns: of batches whose rows have read as `prompt_lengths` says."""
        chunk, inputs, found = self.args.prefill_chunk_size, [], list[dict[str, Any]]()
        for kind in KINDS:
            lengths = prompt_lengths(kind, batch, self.capacity, self.args.new_tokens)
            ids = torch.tensor([self.text(int(lengths.max())) for _ in range(batch)], device=self.model.device)
            is_text = torch.arange(ids.shape[1]) >= (ids.shape[1] - lengths)[:, None]  # after padding on the left
            inputs.append((ids, {} if kind == "same" else {"attention_mask": is_text.long().to(ids.device)}))
            found.append({"rows": kind, "prompt_ms": [], "warm_up_ms": [], "step_ms": []})
        for turn in range(self.args.rounds + 1):  # turn 0 compiles
            for (ids, mask), row in zip(inputs, found, strict=True):
                cache, times = Arm("endless", self.capacity).make_cache(self.model, self.args.n_sink), StepTimes()
                options = {"custom_generate": endless, "prefill_chunk_size": chunk, "streamer": times, **mask}
                generate(self.model, ids, cache, self.args.new_tokens, **options)
                if turn:
                    times.add_to(row)
        summarize(found)
        return found

    def read(self, batch: int) -> list[dict[str, Any]]:
        """Return how fast `stream` reads texts, by the number of tokens in a forward."""
        found = []
        for size in self.args.chunk_sizes:
            for tokens in (2 * size, self.args.text_tokens):  # the first text warms up
                ids = torch.tensor([self.text(tokens) for _ in range(batch)], device=self.model.device)
                cache = SinkWindowCache(self.args.n_sink, self.capacity - self.args.n_sink)
                harness.synchronize(self.model.device)
                start = time.perf_counter()
                for _ in sink_cache.stream(self.model, ids, cache, chunk_size=size):
                    pass
                harness.synchronize(self.model.device)
                seconds = time.perf_counter() - start
            found.append({"chunk_size": size, "seconds": seconds, "tokens_per_second": batch * tokens / seconds})
        return found

    # --- one pool ---

    def gap(self, streams: int) -> dict[str, Any]:
        """Return the times between steps of running streams while a long text is read, and before."""
        (pool, added), found = self.running_pool(streams), dict[str, Any]()
        added[0].close()
        for name in ("before", "while"):
            length = self.args.long_prompt if name == "while" else 1
            long, times = pool.add(self.text(length), max_new_tokens=1, do_sample=False), list[float]()
            while long.is_active or len(times) < 50:
                start = time.perf_counter()
                pool.step()  # returns tokens, so it has waited for the device
                times.append(1e3 * (time.perf_counter() - start))
            long.close()
            found[f"step_ms_{name}"] = harness.summary(times) | {"max": max(times), "n": len(times)}
        return {"streams": streams - 1, "prefill_chunk_size": self.args.prefill_chunk_size, **found}

    def traffic(self, streams: int) -> dict[str, Any]:
        """Return how long requests take that arrive at random over the first half of `ideal_s`.

        `ideal_s` is the time to read all prompts, and then to generate all answers with every row taken.
        """
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
        arrivals = np.sort(self.random.random(requests) * ideal / 2)
        texts = [self.text(int(length)) for length in prompts]
        arrived, waits = dict[Stream, float](), dict[Stream, float]()  # when, and how long for the first token
        states, done = list[dict[str, Any]](), 0
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
                states.append({"seconds": time.perf_counter() - start, **self._state()})
        seconds = time.perf_counter() - start
        found = {"requests": requests, "prompt_tokens": int(prompts.sum()), "answer_tokens": int(answers.sum())}
        rates = {"reading_tokens_per_second": float(reading), "steady_tokens_per_second": steady}
        times = {"ideal_s": ideal, "seconds": seconds, "share_of_ideal": ideal / seconds, "states": states}
        firsts = {f"p{p}": float(np.percentile(list(waits.values()), p)) for p in (50, 95)}
        return {**found, **rates, **times, "time_to_first_token_s": firsts}

    def soak(self, streams: int) -> dict[str, Any]:
        """Let streams join and leave. Return memory and graphs over time, and how many checked streams are right.

        A checked stream is right if its text gets the same tokens when it runs alone.
        """
        pool, steps, most = self.pool(streams), self.args.soak_steps, self.capacity
        texts, checked, states = dict[Stream, list[int]](), list[tuple[list[int], list[int]]](), list[dict[str, Any]]()
        finished, start = 0, time.perf_counter()
        for step in range(1, steps + 1):
            if len(texts) < streams + 2 and self.random.random() < 0.3:  # sometimes two streams wait for a row
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
        found = {"steps": steps, "seconds": time.perf_counter() - start, "streams_finished": finished}
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


def prompt_lengths(kind: str, batch: int, capacity: int, new_tokens: int) -> torch.Tensor:
    """Return how many tokens each row reads, `[batch]`: equal or different numbers, or `half` of the rows with a full cache."""
    full = capacity + capacity // 16
    if kind == "same":
        return torch.full((batch,), full)
    if kind == "differ":
        return torch.linspace(full, 2 * capacity, batch).long()
    short = torch.linspace(4, capacity - new_tokens - 4, batch).long()  # still not full when the call ends
    return torch.where(torch.arange(batch) % 2 == 0, short, full)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check the command line, whose first word is one of `MODES`."""
    what, rest = harness.kind_of(argv, __doc__, {name: says for name, (says, _) in MODES.items()})
    parser = harness.Parser(f"throughput {what}", MODES[what][0])
    options = OPTIONS | {
        "read": {"streams": ([1], "texts at once")},
        "gap": {"streams": (*OPTIONS["streams"], 2)},
        "rows": {"new_tokens": (*OPTIONS["new_tokens"], WARM_UP_TOKENS + 2)},
    }.get(what, {})
    shared = ("streams",) if what == "read" else ("streams", "prefill_chunk_size")
    parser.numbers(**{name: options[name] for name in (*shared, *MODES[what][1])})
    parser.add_argument("--seed", type=int, default=0, help="seed of the random texts (%(default)s)")
    if what == "steady":
        parser.names("--arms", of=ARMS)
    args = parser.parse(rest)
    args.what = what
    parser.fill_in_sizes(args, [1024])
    parser.refuse(len(args.capacities) > 1, "a pool has one capacity: give one of --capacities")
    if "prompt_tokens" in args:
        harness.fill_in(args, prompt_tokens=args.capacities[0])
    if what == "rows":
        least = args.new_tokens + args.n_sink + 8
        says = f"--capacities must be at least --new-tokens + --n-sink + 8 = {least}"
        parser.refuse(args.capacities[0] < least, says)
    return args


def measure(bench: Bench, result: harness.Result) -> None:
    """Measure one of `MODES`. An arm of transformers that cannot run gets a row with the reason."""
    what, capacity = bench.args.what, bench.capacity
    arms = bench.args.arms if what == "steady" else [{"rows": "endless", "read": "stream"}.get(what, "pool")]
    for streams, arm in itertools.product(bench.args.streams, arms):
        if bench.model.device.type == "cuda":
            torch.cuda.empty_cache()
        row = {"what": what, "arm": arm, "streams": streams, "reason": "", "warning": ""}
        row["capacity"] = None if arm.startswith("generate") else capacity
        try:
            found = bench.steady(arm, streams) if what == "steady" else getattr(bench, what)(streams)
        except (RuntimeError, ValueError, ImportError, AttributeError, TypeError) as error:
            if not arm.startswith("generate"):
                raise
            found = {"reason": reason_for(error)}
        several = found if isinstance(found, list) else [found]
        result.rows += [row | numbers for numbers in several]
        result.keep()


def main(argv: Sequence[str] | None = None) -> None:
    """Measure each model, print its table, and write its result file."""
    args = parse(argv)
    device, dtype = harness.set_up(args)
    machine = harness.machine_rates(device)
    for loaded in models.chosen(args, dtype, device, "llama-3-8b"):
        loaded.model.generation_config = GenerationConfig()
        with harness.Result(
            "throughput", loaded, args, argv, (args.what,), machine=machine, sampling=SAMPLING
        ) as result:
            measure(Bench(loaded.model, args, machine["copy_bytes_per_s"] / 1e3), result)
            print(harness.table(result.rows))


if __name__ == "__main__":
    sys.exit(harness.run(main))
