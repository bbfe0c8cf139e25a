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
WARM_UP_TOKENS = 16  # the first tokens of a call, in which endless captures its graph
CALL_ROUNDS = 2
PROFILED_TOKENS = 48
NOTES = 100  # of a long run
STRETCHES = 10  # of a long run, whose means a line is fitted to
SLOPES = ("ms_per_token", "device_bytes", "host_bytes")


class StepTimes(BaseStreamer):
    """A streamer that notes the moment of each token. generate() waits for the device first, and begins with the prompt."""

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
    """Add to each row the percentiles of its raw times, and a warning if they are far apart."""
    for row in rows:
        times = [time for turn in row["step_ms"] for time in turn]
        found = harness.summary(times)
        row |= {f"{name}_ms": found[name] for name in ("median", "p5", "p95")}
        row["warning"] = harness.spread_warning(times)


# --- steps: arms that take turns ---


def call(
    model: PreTrainedModel, arm: Arm, context: int, new_tokens: int, args: argparse.Namespace, **more: Any
) -> None:
    """Generate with an arm and a new cache, after a prompt of `context` tokens. `more` goes to `generate`."""
    capacity = arm.capacity or context
    in_pieces = context > 2 * capacity
    cache, prompt = arm.make_cache(model, args.n_sink), random_text(model, 1, context)
    if arm.name == "endless":
        more["custom_generate"] = endless
        if in_pieces:
            more["prefill_chunk_size"] = capacity
    elif arm.name == "sink" and in_pieces:
        # generate() would compile the reading of pieces, which is not measured here.
        with torch.no_grad():
            for piece in prompt[:, :-1].split(capacity, dim=1):
                model(piece, **cache_kwargs(cache, model), logits_to_keep=1)
    generate(model, prompt, cache, new_tokens, **more)


def contexts_of(arm: Arm, args: argparse.Namespace) -> list[int]:
    """Return the lengths of an arm's prompts: all `--contexts` if its time could grow with them, else one."""
    if arm.name == "static-at-capacity":  # its slots must hold the new tokens, too
        return [arm.capacity - args.new_tokens - 1]
    return args.contexts if arm.name == "sink" and arm.compiled else args.contexts[:1]


def steps(model: PreTrainedModel, args: argparse.Namespace, result: harness.Result) -> None:
    """Measure the steps of each arm, in turns, and whole calls of `dense` and `endless`."""
    eager = choose([name for name in args.arms if name in ("dense", "sink") or not args.compile], args.capacities)
    compiled = choose([name for name in args.arms if name != "dense"], args.capacities, NAMES) if args.compile else []
    calls = [(arm, context) for arm in (*eager, *compiled) for context in contexts_of(arm, args)]
    for arm, context in calls:
        row = {"arm": arm.name, "compiled": arm.compiled, "context": context, "capacity": arm.capacity, "reason": ""}
        times = {name: [] for name in ("prompt_ms", "warm_up_ms", "step_ms", "call_ms")}
        result.rows.append({**row, "n_sink": arm.sinks(args.n_sink), **times})
    clock = harness.Clock(model.device)
    with harness.progress_bar(total=(args.rounds + 1) * len(calls), unit=" calls") as bar:
        for turn in range(args.rounds + 1):  # turn 0 compiles and warms up
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
    """Return the kernels of a step: the difference between a long call and a short call, over the steps between."""
    long = min(PROFILED_TOKENS, args.new_tokens)
    short = long // 3
    of_short, of_long = (harness.kernel_times(partial(generate, tokens), clock) for tokens in (short, long))
    per_step = {}
    for name, (times, ms) in of_long.items():
        times_of_short, ms_of_short = of_short.get(name, (0, 0.0))
        if times > times_of_short:
            per_step[name] = ((times - times_of_short) / (long - short), (ms - ms_of_short) / (long - short))
    return harness.kernel_sums(per_step)


def ratios(rows: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the ratios of arms that took turns: eager over eager, compiled over compiled.

    `sink` and `endless` are compared with `dense`, or compiled with `static-at-capacity`; and each arm with itself at
    its shortest context.
    """

    def ratio(above: dict[str, Any], below: dict[str, Any], after: str = "") -> dict[str, Any]:
        found = harness.ratio_of_rounds(above["step_ms"], below["step_ms"])
        where = {name: row[name] for name in ("context", "capacity", "compiled")}
        return {"name": f"{above['arm']} / {below['arm']}{after}", **where, **found}

    for row in rows:
        baseline = "static-at-capacity" if row["compiled"] else "dense"
        for base in rows if row["arm"] in ("sink", "endless") else ():
            same_steps = (base["arm"], base["compiled"]) == (baseline, row["compiled"])
            if same_steps and base["capacity"] in (row["capacity"], None):
                yield ratio(row, base) if row["compiled"] else ratio(base, row)
        arm = (row["arm"], row["compiled"], row["capacity"])
        same_arm = [other for other in rows if (other["arm"], other["compiled"], other["capacity"]) == arm]
        first = min(same_arm, key=lambda other: other["context"])
        if row["context"] > first["context"]:
            yield ratio(row, first, after=f" after {first['context']:,}")


# --- long runs ---


class Notes(LogitsProcessor):
    """Notes time, memory and position after `every` tokens. As a logits processor it changes no scores."""

    def __init__(self, cache: SinkWindowCache, clock: harness.Clock, every: float, result: harness.Result) -> None:
        self.cache, self.clock, self.every, self.result = cache, clock, every, result
        self.tokens = self.unnoted = 0
        self.started = clock.now()

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Count a token."""
        self.took(1)
        return scores

    def took(self, tokens: int) -> None:
        """Count tokens, and add a row if there are enough."""
        self.unnoted += tokens
        if self.unnoted >= self.every:
            self.note()

    def note(self, **more: Any) -> None:
        """Add a row with the time of the tokens since the last row, and the memory now. `more` are entries to add."""
        now, device = self.clock.now(), self.clock.device
        gc.collect()  # or garbage of the last note would count as memory
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
    wanted = ids[0].roll(-1)  # after the last token comes the first token of the next pass
    # Tokens between rebases: so many that a rebase, which rotates all keys, hardly counts.
    stretch = max(4 * args.capacities[0], args.chunk_size)
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
    """Fit a line to a column, and return its `rise` over the run, the `standard_error` of the rise, and the `mean`.

    The first tenth of the rows is left out. The line goes through means of stretches: neighbouring rows are not
    independent, and a line through all of them would seem too certain. None for few rows, or for missing values.
    """
    rest = rows[math.ceil(len(rows) / 10) :]
    values = np.array([row[name] for row in rest], dtype=np.float64)  # nan for None
    if len(rest) < 2 * STRETCHES or not np.isfinite(values).all():
        return None
    mean = float(values.mean())
    if np.ptp(values) == 0:  # linregress would give nan
        return {"rise": 0.0, "standard_error": 0.0, "mean": mean}
    share_of_run = np.array([row["tokens"] / rows[-1]["tokens"] for row in rest])
    x, y = ([part.mean() for part in np.array_split(column, STRETCHES)] for column in (share_of_run, values))
    line = linregress(x, y)
    return {"rise": float(line.slope), "standard_error": float(line.stderr), "mean": mean}


def long(
    loaded: models.LoadedModel, args: argparse.Namespace, result: harness.Result, text: models.Text | None
) -> None:
    """Generate, or read a text again and again, with one cache."""
    clock, (capacity,) = harness.Clock(loaded.model.device), args.capacities
    arm = Arm("sink", capacity, compiled=clock.device.type == "cuda" and text is None)
    cache = arm.make_cache(loaded.model, args.n_sink)
    with torch.no_grad(), harness.garbage_collector_off():
        notes = Notes(cache, clock, math.inf if text else args.tokens // NOTES, result)
        if text is not None:
            read(loaded, args, notes, text)
        else:
            options = {"custom_generate": endless, "logits_processor": LogitsProcessorList([notes])}
            generate(loaded.model, random_text(loaded.model, 1, capacity), cache, args.tokens, **options)


# --- command line ---


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check the command line, whose first word is one of `KINDS`."""
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
        lowest = 2 if args.passes else 10 * NOTES
        nothing = "means nothing with --random-weights"
        parser.refuse(args.passes and args.random_weights, f"--passes measures perplexity, which {nothing}")
        parser.refuse(named and not args.passes, "a text would change nothing without --passes")
        parser.refuse(args.chunk_size and not args.passes, "--chunk-size would change nothing without --passes")
        parser.refuse(args.tokens < lowest, f"--tokens must be at least {lowest}, but is {args.tokens}")
        parser.fill_in_sizes(args, [1024])
        parser.refuse(len(args.capacities) > 1, "calls long has one cache: give one of --capacities")
        harness.fill_in(args, chunk_size=512)
    else:
        parser.numbers(
            new_tokens=(220, "tokens that each timed call generates", WARM_UP_TOKENS + 2),
            rounds=(6, "how often each arm has its turn"),
            contexts=([4096], "tokens of the prompts"),
            call_tokens=(1024, "tokens that each whole call generates"),
        )
        parser.names("--arms", of=NAMES)
        parser.add_argument(
            "--compile", action=argparse.BooleanOptionalAction, help="measure compiled steps, too (on CUDA)"
        )
        parser.add_argument("--profile", action="store_true", help="in the end, the kernels of a step; CUDA, one shape")
        args = parser.parse(rest)
        parser.fill_in_sizes(args, [1024])
        least, smallest = args.new_tokens + args.n_sink + 8, min(args.capacities)
        limit = f"--capacities must be at least --new-tokens + --n-sink + 8 = {least}"
        parser.refuse(smallest < least, f"{limit}, but one is {smallest}")
    args.kind = kind
    return args


def tables(result: dict[str, Any]) -> str:
    """Return the rows (every tenth of many) and their ratios, or the slopes of a long run, as text tables."""
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
