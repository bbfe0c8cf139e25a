"""Decoding latency: milliseconds per token at fixed lengths of the text, eager and compiled, and what explains them."""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tqdm import tqdm
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from sink_cache import cache_kwargs

from . import harness, models
from .arms import Arm, CannotMeasure, choose, reason_for

EAGER = ("dense", "dense-at-capacity", "sink", "recompute")
COMPILED = ("static", "static-at-capacity", "sink", "recompute")
NAMES = tuple(dict.fromkeys(EAGER + COMPILED))
TURN_LIMIT = 63  # steps; with the untimed one before, a static cache keeps 64 slots free for them
WARM_UP_STEPS = {False: 3, True: 8}  # eager, and compiled: to compile, to record the graph, and some more
MAX_TURN_S = 2.0  # a slower arm takes fewer steps in its turn
EVENT_STEPS = PROFILED_STEPS = 5
NEW_LENGTHS = 16  # steps at lengths that the process has never seen
DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {"contexts": [256, 512, 1024, 2048, 4096], "capacities": [256], "compile": False, "rounds": 12},
    "cuda": {"contexts": [1024, 4096, 32768], "capacities": [1024], "compile": True, "rounds": 24},
}


# --- the arms ---


@dataclass
class Bench:
    """What all arms of a model share: the model, tokens, the dense prefill, and the static caches, which are large."""

    loaded: models.LoadedModel
    args: argparse.Namespace
    snapshots: dict[int, list[Any]] = field(default_factory=dict)
    known_lengths: set[int] = field(default_factory=set)  # that dense steps have had in this process

    def __post_init__(self) -> None:
        self.model: PreTrainedModel = self.loaded.model
        config = self.model.config.get_text_config(decoder=True)
        # As long as the text with all steps: generate() passes all tokens, and positions for all of them.
        shape = (1, max(self.args.contexts) + 2**16)
        tokens = torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
        self.tokens = tokens.to(self.model.device)
        self.positions = torch.arange(shape[1], device=self.model.device)[None]
        self.token = self.tokens[:, :1].clone()
        # What forward() and generate() call their cache, asked once and not within timed steps.
        (self.forward_name,), (self.generate_name,) = cache_kwargs(None, self.model), cache_kwargs(None)
        # As in generate(), where the model's forward has it.
        self.keep_last = {"logits_to_keep": 1} if self.model._supports_logits_to_keep() else {}
        self._dense, self._read, self._broken = DynamicCache(config=self.model.config), 0, ""

    def read(self, cache: Cache, start: int, stop: int) -> None:
        """Feed the tokens of the text from `start` to `stop` into a cache, in pieces."""
        pieces = range(start, stop, piece := 2048 if self.model.device.type == "cuda" else 512)
        for ids in (self.tokens[:, first : min(first + piece, stop)] for first in pieces):
            self.model(ids, **{self.forward_name: cache}, use_cache=True, **self.keep_last)

    def dense_layers(self, context: int) -> list[Any]:
        """Return the layers of a DynamicCache that has read `context` tokens; contexts must rise, or be capacities."""
        on_the_way = sorted(n for n in self.args.capacities if self._read < n < context)
        for stop in (*on_the_way, context):
            if stop in self.snapshots:
                continue
            if self._broken:
                raise CannotMeasure(self._broken)
            try:
                self.read(self._dense, self._read, stop)
            except Exception as error:
                self._broken, self._dense = reason_for(error), DynamicCache()
                raise
            self._read = stop
            self.snapshots = {n: layers for n, layers in self.snapshots.items() if n in self.args.capacities}
            # Copies of layers stay as they are: a dynamic layer makes new tensors and never writes into old ones.
            self.snapshots[stop] = [copy.copy(layer) for layer in self._dense.layers]
        return self.snapshots[context]

    def compiled_step(self, cache: Cache, seen: int) -> None:
        """Feed one token after `seen` others as `generate()` does with a cache that can be compiled."""
        inputs = self.model.prepare_inputs_for_generation(
            self.tokens[:, : seen + 1],
            next_sequence_length=1,
            **{self.generate_name: cache},
            attention_mask=None,
            position_ids=self.positions[:, : seen + 1],
            use_cache=True,
            **self.keep_last,
        )
        self.compiled_call(**inputs, return_dict=True)

    @functools.cached_property
    def compiled_call(self) -> Callable[..., Any]:
        """The model's forward, compiled as `generate()` does it."""
        return self.model.get_compiled_call(self.model.generation_config.compile_config)


class Steps:
    """Steps of an arm: `fill(context)`, then turns of `rewind()` and some `step()`s, of which only steps are timed.

    `fill` reads a text of so many tokens (contexts only rise) or raises CannotMeasure; `rewind` goes back to the state that it
    left, or to one that costs the same; `release` lets go of memory before the next context.
    """

    turn_steps = 1

    def __init__(self, bench: Bench, arm: Arm) -> None:
        self.bench, self.arm = bench, arm
        self.cache: Cache | None = None
        self.seen = 0

    def applies(self, context: int) -> bool:
        # Up to the capacity, caches of it would be dense themselves.
        return self.arm.capacity is None or context > self.arm.capacity or not self.arm.name.endswith("-at-capacity")

    def length(self, context: int) -> int:
        return min(context, self.arm.capacity or context)

    def fill(self, context: int) -> None:
        pass

    def rewind(self) -> None:
        pass

    def step(self) -> None:
        if self.arm.compiled:
            self.bench.compiled_step(self.cache, self.seen)
        else:
            self.bench.model(self.bench.token, **{self.bench.forward_name: self.cache}, use_cache=True)
        self.seen += 1

    def release(self) -> None:
        self.cache, self.layers = None, []


class Dense(Steps):
    """From the shared prefill on."""

    def fill(self, context: int) -> None:
        self.layers = self.bench.dense_layers(self.length(context))

    def rewind(self) -> None:
        self.cache = self.arm.make_cache(self.bench.model, 0)
        self.cache.layers = [copy.copy(layer) for layer in self.layers]


class Static(Steps):
    """A StaticCache with as many slots as tokens, of which the steps fill the last."""

    def fill(self, context: int) -> None:
        if self.arm.capacity is None and context not in self.bench.args.compile_static_at:
            raise CannotMeasure("it would have to be compiled for this length alone: see --compile-static-at")
        slots = self.length(context)
        self.layers = self.bench.dense_layers(slots)
        if any(type(layer) is not DynamicLayer for layer in self.layers):
            raise CannotMeasure("only models of full-attention layers are measured with a StaticCache")
        self.filled = slots - min(TURN_LIMIT + 1, slots - 1)
        self.cache = self.arm.make_cache(self.bench.model, 0, slots)

    def rewind(self) -> None:
        self.cache.reset()
        for index, layer in enumerate(self.layers):
            self.cache.update(layer.keys[:, :, : self.filled], layer.values[:, :, : self.filled], index)
        self.seen = self.filled


class Sink(Steps):
    """A SinkWindowCache, fed on from context to context; when it is full, every further token costs the same."""

    unfilled: Cache | None = None

    def fill(self, context: int) -> None:
        if self.arm.compiled and context < self.arm.capacity:
            raise CannotMeasure("compiled steps are measured from a full cache on")
        if self.cache is None:
            self.cache = self.arm.make_cache(self.bench.model, self.bench.args.n_sink)
        self.rewind()
        self.bench.read(self.cache, self.seen, context)
        self.seen = self.context = max(self.seen, context)
        self.unfilled = copy.deepcopy(self.cache) if context < self.arm.capacity else None

    def rewind(self) -> None:
        if self.unfilled is not None:
            self.cache, self.seen = copy.deepcopy(self.unfilled), self.context

    def release(self) -> None:
        pass  # it is small, and read on


class Recompute(Steps):
    """No cache: the window is read anew."""

    def applies(self, context: int) -> bool:
        # It does not depend on the context, so once is enough: at the first that fills its window.
        contexts = self.bench.args.contexts
        return context == min((n for n in contexts if n >= self.arm.capacity), default=max(contexts))

    def fill(self, context: int) -> None:
        if context < self.arm.capacity:
            raise CannotMeasure("no context fills its window")

    def step(self) -> None:
        call = self.bench.compiled_call if self.arm.compiled else self.bench.model
        call(self.bench.tokens[:, : self.arm.capacity], use_cache=False, **self.bench.keep_last)


STEPS = {"dense": Dense, "dense-at-capacity": Dense, "static": Static, "static-at-capacity": Static, "sink": Sink}


def make_steps(bench: Bench, names: Sequence[str], compiled: bool) -> list[Steps]:
    """Return the arms that are asked for, in the order in which they take turns."""
    arms = choose([n for n in names if n in EAGER], bench.args.capacities)
    arms += choose([n for n in names if n in COMPILED], bench.args.capacities, COMPILED) if compiled else []
    return [STEPS.get(arm.name, Recompute)(bench, arm) for arm in arms]


# --- measuring ---

Row = dict[str, Any]  # of the result file: raw numbers come first, `summarize` adds the rest


def new_row(steps: Steps, context: int) -> Row:
    """Return the row of an arm at a context, without numbers."""
    arm, trained = steps.arm, steps.bench.loaded.trained_context
    row = {"arm": arm.name, "compiled": arm.compiled, "context": context, "capacity": arm.capacity}
    row |= {"n_sink": arm.sinks(steps.bench.args.n_sink), "reason": "", "warning": ""}
    row |= {f"{name}_ms": None for name in ("median", "mean", "std", "p5", "p95", "event", "gpu", "kernel", "floor")}
    row |= {"step_ms": [], "unsynchronized_ms": [], "first_time_ms": [], "again_ms": []}
    row |= dict.fromkeys(("busy", "cache_bytes", "peak_bytes_over_weights")) | {"sdpa": "compiled"}
    return row | {"beyond_trained_context": trained is not None and steps.length(context) > trained}


def warm_up(steps: Steps, clock: harness.Clock) -> float:
    """Step until nothing is new, by count and by time, and return the time of a step in ms."""
    times: list[float] = []
    while len(times) < WARM_UP_STEPS[steps.arm.compiled] or sum(times[3:]) < 1e3 * steps.bench.args.warm_up_seconds:
        if len(times) % TURN_LIMIT == 0:
            steps.rewind()
        times += harness.timed_steps(steps.step, 1, clock)
    return min(times[-3:])


def steps_per_turn(step_ms: float, args: argparse.Namespace) -> int:
    """Return how many steps make a turn: `--steps`, more if they are short, fewer if they are very long."""
    wanted = max(args.steps, math.ceil(1e3 * args.min_seconds / args.rounds / step_ms))
    return max(1, min(wanted, TURN_LIMIT, int(1e3 * MAX_TURN_S / step_ms)))


def new_length_times(steps: Steps, context: int, clock: harness.Clock) -> tuple[list[float], list[float]]:
    """Return times in ms of steps at lengths that this process has never seen, and of the same steps again."""
    lengths = range(steps.length(context) + 1, steps.length(context) + 1 + TURN_LIMIT + 1)  # all that turns will reach
    new = steps.bench.known_lengths.isdisjoint(lengths)
    steps.bench.known_lengths.update(lengths)
    turns: tuple[list[float], list[float]] = [], []
    # The first lengths come often enough for memory to be there; then the next ones come twice, in the same way.
    for turn in (None, None, *turns) if new else ():
        steps.rewind()
        for _ in range(NEW_LENGTHS // 2):
            steps.step()
        if turn is not None:
            turn += harness.timed_steps(steps.step, NEW_LENGTHS, clock)
    return turns


def start_arm(steps: Steps, row: Row, clock: harness.Clock) -> None:
    """Bring an arm to the row's context, measure lengths never seen before, and warm it up."""
    steps.fill(row["context"])
    steps.rewind()
    if isinstance(steps, Dense):
        row["first_time_ms"], row["again_ms"] = map(rounded, new_length_times(steps, row["context"], clock))
    skipped = compile_counter("inductor", "cudagraph_skips")
    steps.turn_steps = steps_per_turn(warm_up(steps, clock), steps.bench.args)
    if clock.device.type == "cuda" and compile_counter("inductor", "cudagraph_skips") > skipped:
        row["warning"] = "torch.compile left out CUDA graphs"


def take_turn(steps: Steps, row: Row, clock: harness.Clock) -> None:
    """Add one turn of an arm to its row, and in every second round one that is not waited for (not on the CPU)."""
    for synchronized in (True, False) if clock.device.type != "cpu" and len(row["step_ms"]) % 2 == 0 else (True,):
        steps.rewind()
        if not isinstance(steps, Recompute):
            steps.step()
        if synchronized:
            row["step_ms"].append(rounded(harness.timed_steps(steps.step, steps.turn_steps, clock)))
        else:
            row["unsynchronized_ms"].append(harness.unsynchronized_step_ms(steps.step, steps.turn_steps, clock))


def look_closer(steps: Steps, row: Row, clock: harness.Clock) -> None:
    """Measure memory, and on CUDA what the GPU does, in passes whose steps are not timed."""
    steps.rewind()
    steps.step()
    row["cache_bytes"] = harness.cache_bytes(steps.cache)
    with harness.PeakMemory(clock.device) as peak:
        for _ in range(2):
            steps.step()
        clock.now()
    row["peak_bytes_over_weights"] = None if peak.bytes is None else row["cache_bytes"] + peak.bytes
    row["sdpa"] = row["sdpa"] if steps.arm.compiled else harness.attention_of(steps.step)
    if clock.device.type == "cuda":
        row["event_ms"] = statistics.median(harness.event_ms(steps.step, clock)[0] for _ in range(EVENT_STEPS))
        work = harness.gpu_times(steps.step, EVENT_STEPS, clock, queue_ms=2 * row["event_ms"] + 1)
        row["gpu_ms"] = statistics.median(work) if work else None


def profile_last(steps: Steps, row: Row, clock: harness.Clock) -> None:
    """Profile an arm when all times are taken: what the profiler attaches to CUDA stays, and slows down launches."""
    steps.rewind()
    steps.step()
    kernels = harness.kernel_times(lambda: [steps.step() for _ in range(PROFILED_STEPS)], clock)
    per_step = {name: (times / PROFILED_STEPS, ms / PROFILED_STEPS) for name, (times, ms) in kernels.items()}
    row["kernel_ms"], row["sdpa"] = harness.kernel_sums(per_step), harness.attention_kernel(kernels)


def summarize(row: Row, machine: dict[str, float]) -> None:
    """Add to a row what its raw numbers amount to."""
    times = [time for turn in row["step_ms"] for time in turn]
    row |= {f"{name}_ms": value for name, value in harness.summary(times).items()}
    row["busy"] = row["gpu_ms"] and row["gpu_ms"] / row["median_ms"]
    if row["arm"] != "recompute":
        row["floor_ms"] = 1e3 * (machine["step_weight_bytes"] + row["cache_bytes"]) / machine["copy_bytes_per_s"]
    row["warning"] = row["warning"] or harness.spread_warning(times)
    if row["event_ms"] and abs(row["event_ms"] / row["median_ms"] - 1) > 0.1:
        row["warning"] += f" CUDA events saw {row['event_ms']:.3f} ms, the clock {row['median_ms']:.3f} ms"


def measure_context(arms: Sequence[Steps], context: int, clock: harness.Clock, bar: tqdm[Any], last: bool) -> list[Row]:
    """Measure all arms at one context, taking turns; profile them in the end, if this is the `last` one."""
    applying = [arm for arm in arms if arm.applies(context)]
    rows = {arm: new_row(arm, context) for arm in applying}

    def for_each(work: Callable[[Steps, Row, harness.Clock], None]) -> None:
        for arm in applying:
            if not rows[arm]["reason"]:
                bar.set_postfix_str(f"{context:,} tokens, {arm.arm}", refresh=False)
                try:
                    work(arm, rows[arm], clock)
                # Whatever fails, compilers included, fails for one arm; the others and their machine time are kept.
                except Exception as error:
                    rows[arm] = new_row(arm, context) | {"reason": reason_for(error)}
            bar.update()

    args = arms[0].bench.args
    with torch.no_grad(), harness.garbage_collector_off():
        if clock.device.type == "cuda":
            torch.cuda.empty_cache()  # of what the last context has left in pieces
        for_each(start_arm)
        compiled_before = compile_counter("stats", "unique_graphs")
        for _ in range(args.rounds):
            for_each(take_turn)
        if compile_counter("stats", "unique_graphs") > compiled_before:
            for arm in applying:
                rows[arm]["warning"] += " graphs were compiled while it was timed" if arm.arm.compiled else ""
        for_each(look_closer)
        if last and args.profile:
            for_each(profile_last)
    for arm in applying:
        arm.release()
    return list(rows.values())


def compile_counter(group: str, name: str) -> int:
    """Return one of torch.compile's own counters, such as how many graphs this process has compiled."""
    return int(torch._dynamo.utils.counters[group][name])


# --- reporting ---


def rounded(times: Sequence[float]) -> list[float]:
    """Return times in ms to a tenth of a microsecond: result files stay small, and clocks are not finer."""
    return [round(time, 4) for time in times]


def ratios(rows: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield what arms say about each other that took turns: eager over eager steps, compiled over compiled ones.

    `achieved` is dense(N) / sink(N), `ceiling` dense(N) / dense(capacity), `overhead` sink(N) / dense(capacity), and
    `recompute_over_sink` what the name says; the compiled dense cache is a static one. `gpu_value` is of the GPU's own work.
    """
    cells = {(row["arm"], row["compiled"], row["context"], row["capacity"]): row for row in rows if not row["reason"]}
    for (arm, compiled, context, capacity), sink in cells.items():
        if arm != "sink":
            continue
        dense = "static" if compiled else "dense"
        far = cells.get((dense, compiled, context, None))
        near = far if context <= capacity else cells.get((f"{dense}-at-capacity", compiled, context, capacity))
        pairs = {
            "achieved": (far, sink),
            "ceiling": (far, near if context > capacity else None),
            "overhead": (sink, near),
            "recompute_over_sink": (cells.get(("recompute", compiled, context, capacity)), sink),
        }
        for name, (above, below) in pairs.items():
            if above is not None and below is not None:
                work = above["gpu_ms"], below["gpu_ms"]
                where = {"name": name, "context": context, "capacity": capacity, "compiled": compiled}
                value = harness.ratio_of_rounds(above["step_ms"], below["step_ms"])
                yield where | value | {"gpu_value": work[0] / work[1] if all(work) else None}


COLUMNS = ["context", "arm", "compiled", "capacity", "median_ms", "p5_ms", "p95_ms", "gpu_ms"]
COLUMNS += ["busy", "floor_ms", "sdpa", "cache_bytes", "reason", "warning"]


# --- command line ---


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = harness.Parser("latency", __doc__)
    parser.numbers(
        contexts=(None, "tokens of text before a step"),
        rounds=(None, "how often each arm has its turn at each context (24; 12 on a CPU)"),
        steps=(4, "least number of steps in a turn"),
        min_seconds=(0.25, "least time of all turns of an arm together"),
        warm_up_seconds=(0.1, "how long an arm is warmed up, after its first steps"),
    )
    parser.least["contexts"] = 2
    parser.names("--arms", of=NAMES)
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="measure compiled steps, too (on CUDA)"
    )
    at = "contexts whose static cache is compiled; each takes long (the largest)"
    parser.add_argument("--compile-static-at", nargs="*", type=int, metavar="N", help=at)
    profile = "in the end, kernels at the largest context; CUDA, one shape"
    parser.add_argument("--profile", action="store_true", help=profile)
    args = parser.parse(argv)
    useless = args.compile is False and args.compile_static_at
    parser.refuse(
        {
            "--compile-static-at names contexts of compiled steps, which --no-compile leaves out": useless,
            f"--steps must be at most {TURN_LIMIT}, but is {args.steps}: take more --rounds": args.steps > TURN_LIMIT,
        }
    )
    return args


def measure_model(args: argparse.Namespace, loaded: models.LoadedModel, result: harness.Result) -> None:
    """Measure a model at all contexts; rows are kept as they come."""
    bench, clock = Bench(loaded, args), harness.Clock(loaded.model.device)
    arms = make_steps(bench, args.arms, args.compile)
    floor = result.data["machine"] | {"step_weight_bytes": loaded.description["step_weight_bytes"]}
    turns = (args.rounds + 2) * sum(arm.applies(context) for arm, context in itertools.product(arms, args.contexts))
    with harness.progress_bar(total=turns, desc=loaded.name, unit=" turns") as bar:
        with torch.no_grad():  # the process's first steps, at a length that is not asked for
            bench.read(DynamicCache(config=bench.model.config), 0, 1)
        for context in args.contexts:
            rows = measure_context(arms, context, clock, bar, context == args.contexts[-1])
            for row in rows:
                if not row["reason"]:
                    summarize(row, floor)
            result.rows += rows
            result.keep()


def main(argv: Sequence[str] | None = None) -> None:
    """Measure each model, print its tables, and write its result file."""
    args = parse(argv)
    device, dtype = harness.set_up(args)
    harness.fill_in(args, **DEFAULTS["cuda" if device.type == "cuda" else "cpu"])
    args.contexts = sorted(set(args.contexts))
    harness.fill_in(args, compile_static_at=[args.contexts[-1]])
    # Each length is compiled by itself, as in a process that has only this one; and none falls back to eager silently.
    torch._dynamo.config.automatic_dynamic_shapes = False
    torch._dynamo.config.recompile_limit = 1000
    machine = harness.machine_rates(device)
    for loaded in models.chosen(args, dtype, device, "pythia-70m"):
        with harness.Result("latency", loaded, args, argv, machine=machine) as result:
            measure_model(args, loaded, result)
            print(harness.table(result.rows, COLUMNS), harness.table(list(ratios(result.rows))), sep="\n\n")
        del loaded


if __name__ == "__main__":
    sys.exit(harness.run(main))
