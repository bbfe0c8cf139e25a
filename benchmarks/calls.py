"""Whole calls of `generate()`: steps of several arms in turns, and very long runs with one cache."""

from __future__ import annotations

import argparse
import gc
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from scipy.stats import linregress
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from sink_cache import SinkWindowCache, cache_kwargs, endless, stream

from . import harness, models
from .arms import Arm, choose
from .harness import BenchmarkError

NAMES = ("dense", "static-at-capacity", "sink", "endless")
KINDS = {"steps": "steps of several arms, in turns", "long": "one cache, and a very long text"}
WARM_UP_TOKENS = 16  # of a call: in these, endless captures its graph
CALL_ROUNDS = 2
PROFILED_TOKENS = 48
SAMPLES, STRETCHES = 100, 10  # of a long run: how often something is noted, and the stretches that a line is fitted to
SLOPES = ("ms_per_token", "device_bytes", "host_bytes")


class StepTimes(BaseStreamer):
    """A streamer that notes when each token comes, which waits for the device. The first call brings the prompt."""

    def __init__(self) -> None:
        self.moments: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.moments.append(time.perf_counter())

    def end(self) -> None:
        pass

    def add_to(self, row: dict[str, Any]) -> None:
        """Add the times of a call to a row: of the prompt, of the first tokens, and of each token after them."""
        times = [round(1e3 * t, 4) for t in np.diff(self.moments)]
        row["prompt_ms"].append(times[0])
        row["warm_up_ms"].append(round(sum(times[1:WARM_UP_TOKENS]), 4))
        row["step_ms"].append(times[WARM_UP_TOKENS:])


def generate(model: PreTrainedModel, ids: torch.Tensor, cache: Any, new_tokens: int, **options: Any) -> None:
    """Generate without an end-of-text token; greedily if nothing else is asked for."""
    model.generation_config.eos_token_id = None
    options = {"do_sample": False, "max_new_tokens": new_tokens, "pad_token_id": 0} | options
    model.generate(ids, **cache_kwargs(cache), **options)


def random_text(model: PreTrainedModel, rows: int, tokens: int) -> torch.Tensor:
    """Return random tokens `[rows, tokens]`."""
    ids = torch.randint(1, model.config.vocab_size, (rows, tokens), generator=torch.Generator().manual_seed(0))
    return ids.to(model.device)


def summarize(rows: Sequence[dict[str, Any]]) -> None:
    """Add what the raw times of each row amount to."""
    for row in rows:
        steps = [one for turn in row["step_ms"] for one in turn]
        row |= {
            f"{name}_ms": value for name, value in harness.summary(steps).items() if name in ("median", "p5", "p95")
        }
        row["warning"] = harness.spread_warning(steps)


# --- steps: arms that take turns ---


def call(
    model: PreTrainedModel, arm: Arm, context: int, new_tokens: int, args: argparse.Namespace, **more: Any
) -> None:
    """Generate with one arm after a prompt of `context` tokens, with a cache of its own."""
    capacity = arm.capacity or context
    cache, prompt = arm.make_cache(model, args.n_sink), random_text(model, 1, context)
    if arm.name == "endless":
        more |= {"custom_generate": endless} | ({"prefill_chunk_size": capacity} if context > 2 * capacity else {})
    elif arm.name == "sink" and context > 2 * capacity:
        # Not by generate(), which would compile the pieces, too; they are not measured here.
        with torch.no_grad():
            for piece in prompt[:, :-1].split(capacity, dim=1):
                model(piece, **cache_kwargs(cache, model), logits_to_keep=1)
    generate(model, prompt, cache, new_tokens, **more)


def contexts_of(arm: Arm, args: argparse.Namespace) -> list[int]:
    """Return the lengths of prompts: a static cache can take as many tokens as its slots leave."""
    if arm.name == "static-at-capacity":
        return [int(arm.capacity or 0) - args.new_tokens - 1]
    return args.contexts if arm.name == "sink" and arm.compiled else args.contexts[:1]  # type: ignore[no-any-return]


def steps(model: PreTrainedModel, args: argparse.Namespace, result: harness.Result) -> None:
    """Measure the steps of each arm, in turns, and whole calls of those that can go on."""
    eager = choose([n for n in args.arms if n in ("dense", "sink") or not args.compile], args.capacities)
    compiled = choose([n for n in args.arms if n != "dense"], args.capacities, NAMES) if args.compile else []
    calls = [(arm, context) for arm in (*eager, *compiled) for context in contexts_of(arm, args)]
    result.rows += [
        {"arm": arm.name, "compiled": arm.compiled, "context": context, "capacity": arm.capacity, "reason": ""}
        | {"n_sink": arm.sinks(args.n_sink), "prompt_ms": [], "warm_up_ms": [], "step_ms": [], "call_ms": []}
        for arm, context in calls
    ]
    clock = harness.Clock(model.device)
    with harness.progress_bar(total=(args.rounds + 1) * len(calls), unit=" calls") as bar:
        for turn in range(args.rounds + 1):  # the first compiles and warms up
            for (arm, context), row in zip(calls, result.rows, strict=True):
                bar.set_postfix_str(f"{arm}, {context:,} tokens")
                call(model, arm, context, args.new_tokens, args, streamer=(times := StepTimes()))
                if turn:
                    times.add_to(row)
                if arm.name in ("dense", "endless") and 1 <= turn <= CALL_ROUNDS:
                    start = clock.now()
                    call(model, arm, context, args.call_tokens, args)
                    row["call_ms"].append(1e3 * (clock.now() - start) / args.call_tokens)
                bar.update()
            if turn:
                summarize(result.rows)
                result.keep()
    if args.profile:
        for (arm, context), row in zip(calls, result.rows, strict=True):
            if arm.compiled:
                row["kernel_ms"] = kernels_of(model, partial(call, model, arm, context, args=args), clock, args)


def kernels_of(
    model: PreTrainedModel, generate: Callable[..., None], clock: harness.Clock, args: argparse.Namespace
) -> dict[str, float]:
    """Return the kernels of a step: what a longer call has more of."""
    long = min(PROFILED_TOKENS, args.new_tokens)
    of_short, of_long = (harness.kernel_times(partial(generate, tokens), clock) for tokens in (long // 3, long))
    more, per_step = {}, 1 / (long - long // 3)
    for name, (times, ms) in of_long.items():
        before, ms_before = of_short.get(name, (0, 0.0))
        if times > before:
            more[name] = ((times - before) * per_step, (ms - ms_before) * per_step)
    return harness.kernel_sums(more)


def ratios(rows: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield what arms that took turns say about each other: eager over eager, compiled over compiled."""
    cells = {(row["arm"], row["compiled"], row["context"], row["capacity"]): row for row in rows}
    for (arm, compiled, context, capacity), row in cells.items():
        baseline = "static-at-capacity" if compiled else "dense"
        bases = {k: row for (a, is_compiled, _, k), row in cells.items() if (a, is_compiled) == (baseline, compiled)}
        base = bases.get(capacity, bases.get(None))
        where = {"context": context, "capacity": capacity, "compiled": compiled}
        if base is not None and arm in ("sink", "endless"):
            above, below = (row, base) if compiled else (base, row)
            found = harness.ratio_of_rounds(above["step_ms"], below["step_ms"])
            yield {"name": f"{above['arm']} / {below['arm']}"} | where | found
        first = min(c for a, is_compiled, c, k in cells if (a, is_compiled, k) == (arm, compiled, capacity))
        if context > first:
            found = harness.ratio_of_rounds(row["step_ms"], cells[arm, compiled, first, capacity]["step_ms"])
            yield {"name": f"{arm} / {arm} after {first:,}"} | where | found


# --- long runs ---


class Notes(LogitsProcessor):
    """Notes time, memory and position every so many tokens; as a logits processor it changes nothing and makes nobody wait."""

    def __init__(self, cache: SinkWindowCache, clock: harness.Clock, every: float, result: harness.Result) -> None:
        self.cache, self.clock, self.every, self.result = cache, clock, every, result
        self.tokens = self.unnoted = 0
        self.started = clock.now()

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Count a token."""
        self.took(1)
        return scores

    def took(self, tokens: int) -> None:
        """Count tokens, and note where we are if it is time."""
        self.unnoted += tokens
        if self.unnoted >= self.every:
            self.note()

    def note(self, **more: Any) -> None:
        """Note where we are."""
        now, device = self.clock.now(), self.clock.device
        gc.collect()  # what was left of the last note, above all
        self.tokens += self.unnoted
        row = {
            "tokens": self.tokens,
            "next_position": int(self.cache.next_position_ids().max()),
            "ms_per_token": 1e3 * (now - self.started) / self.unnoted,
            "device_bytes": torch.cuda.memory_allocated(device) if device.type == "cuda" else None,
            "host_bytes": psutil.Process().memory_info().rss,
            "reason": "",
        }
        self.result.rows.append(row | more)
        self.result.keep()
        self.unnoted, self.started = 0, self.clock.now()


def read(loaded: models.LoadedModel, args: argparse.Namespace, notes: Notes, text: models.Text) -> None:
    """Read `--tokens` of a text `--passes` times, and note the perplexity of each pass."""
    cache = notes.cache
    ids = models.tokenize(text, loaded.tokenizer)[: args.tokens].to(loaded.model.device)[None]
    if ids.shape[1] < args.tokens:
        raise BenchmarkError(f"{text.name} has {ids.shape[1]:,} tokens, and --tokens asks for {args.tokens:,}")
    wanted = ids[0].roll(-1)  # after the last token comes the first one again
    stretch = max(4 * args.capacities[0], args.chunk_size)  # between rebases: each key is rotated at most once by them
    since_rebase = 0
    for number in range(1, args.passes + 1):
        loss, done = 0.0, 0
        for piece in ids.split(stretch, dim=1):
            for logits in stream(loaded.model, piece, cache, chunk_size=args.chunk_size):
                targets = wanted[done : done + logits.shape[1]]
                loss += F.cross_entropy(logits[0].float(), targets, reduction="sum").item()
                done += logits.shape[1]
            notes.took(piece.shape[1])
            since_rebase += piece.shape[1]
            if since_rebase >= stretch:
                cache.rebase()
                since_rebase = 0
        notes.note(**{"pass": number, "perplexity": math.exp(loss / done)})


def slope(rows: Sequence[dict[str, Any]], name: str) -> dict[str, float] | None:
    """Fit a line through the means of ten stretches, as neighbours are alike, the first tenth left out.

    Returns its rise over the run, its standard error, and the mean.
    """
    rest = rows[math.ceil(len(rows) / 10) :]
    values = np.array([row[name] for row in rest], dtype=np.float64)  # nan for None
    if len(rest) < 2 * STRETCHES or not np.isfinite(values).all():
        return None
    mean = float(values.mean())
    if np.ptp(values) == 0:
        return {"rise": 0.0, "standard_error": 0.0, "mean": mean}
    run = np.array([row["tokens"] for row in rest], dtype=np.float64) / rows[-1]["tokens"]
    line = linregress(*(np.array([part.mean() for part in np.array_split(one, STRETCHES)]) for one in (run, values)))
    return {"rise": float(line.slope), "standard_error": float(line.stderr), "mean": mean}


def long(
    loaded: models.LoadedModel, args: argparse.Namespace, result: harness.Result, text: models.Text | None
) -> None:
    """Generate, or read a text again and again, with one cache."""
    clock, (capacity,) = harness.Clock(loaded.model.device), args.capacities
    arm = Arm("sink", capacity, compiled=clock.device.type == "cuda" and text is None)
    cache = arm.make_cache(loaded.model, args.n_sink)
    with torch.no_grad(), harness.garbage_collector_off():
        notes = Notes(cache, clock, math.inf if text else args.tokens // SAMPLES, result)
        if text is not None:
            read(loaded, args, notes, text)
        else:
            options = {"custom_generate": endless, "logits_processor": LogitsProcessorList([notes])}
            generate(loaded.model, random_text(loaded.model, 1, capacity), cache, args.tokens, **options)


# --- command line ---


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check the command line: what is measured comes first."""
    kind, rest = harness.kind_of(argv, __doc__, KINDS)
    parser = harness.Parser(f"calls {kind}", KINDS[kind])
    if kind == "long":
        models.add_text_options(parser)
        parser.numbers(
            tokens=(100_000, "tokens to generate, or to read in each pass"),
            passes=(None, "how often to read a text, instead of generating"),
            chunk_size=(None, "tokens per forward when reading (512)"),
        )
        args = parser.parse(rest)
        named = args.text_file or args.dataset or args.dataset_config or args.split
        lowest = 2 if args.passes else 10 * SAMPLES
        parser.refuse(
            {
                "--passes measures perplexity, which means nothing with --random-weights": args.passes
                and args.random_weights,
                "a text would change nothing without --passes": named and not args.passes,
                "--chunk-size would change nothing without --passes": args.chunk_size and not args.passes,
                f"--tokens must be at least {lowest}, but is {args.tokens}": args.tokens < lowest,
                "calls long has one cache: give one of --capacities": len(args.capacities or [1]) > 1,
            }
        )
        harness.fill_in(args, capacities=[1024], chunk_size=512)
    else:
        parser.numbers(
            new_tokens=(220, "tokens that each timed call generates"),
            rounds=(6, "how often each arm has its turn"),
            contexts=([4096], "tokens of the prompts"),
            call_tokens=(1024, "tokens that each whole call generates"),
        )
        parser.least["new_tokens"] = WARM_UP_TOKENS + 2
        parser.names("--arms", of=NAMES)
        parser.add_argument(
            "--compile", action=argparse.BooleanOptionalAction, help="measure compiled steps, too (on CUDA)"
        )
        parser.add_argument("--profile", action="store_true", help="in the end, the kernels of a step; CUDA, one shape")
        args = parser.parse(rest)
        harness.fill_in(args, capacities=[1024])
        least = args.new_tokens + args.n_sink + 8
        limit = f"--capacities must be at least --new-tokens + --n-sink + 8 = {least}"
        parser.refuse({f"{limit}, but one is {min(args.capacities)}": min(args.capacities) < least})
    args.kind = kind
    return args


def tables(result: dict[str, Any]) -> str:
    """Return some of the rows, ratios and slopes as text tables."""
    rows = result["rows"] if len(result["rows"]) <= 20 else result["rows"][9::10]
    if result["harness"] == "calls":
        more = list(ratios(rows))
    else:
        found = {name: slope(result["rows"], name) for name in SLOPES}
        more = [{"slope of": name} | line for name, line in found.items() if line]
    return "\n\n".join([harness.table(rows, hidden=("n_sink", "reason")), harness.table(more)])


def main(argv: Sequence[str] | None = None) -> None:
    """Measure each model, print its tables, and write its result file."""
    args = parse(argv)
    device, dtype = harness.set_up(args)
    if args.kind == "steps":
        harness.fill_in(args, compile=device.type == "cuda")
        for loaded in models.chosen(args, dtype, device, "pythia-70m"):
            with harness.Result("calls", loaded, args, argv) as result:
                steps(loaded.model, args, result)
                print(tables(result.data))
        return
    text = models.chosen_text(args) if args.passes else None
    for loaded in models.chosen(args, dtype, device, "HuggingFaceTB/SmolLM2-135M-Instruct" if text else "llama-tiny"):
        data = text.description if text else None
        with harness.Result("longrun", loaded, args, argv, ["read" if text else "generate"], data=data) as result:
            long(loaded, args, result, text)
            print(tables(result.data))


if __name__ == "__main__":
    sys.exit(harness.run(main))
