"""Decoding latency: milliseconds per token at fixed lengths of the text, in eager and in compiled steps."""

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
TURN_LIMIT = 63  # steps of a turn; with the untimed step before, a static cache keeps 64 slots free
WARM_UP_STEPS = {False: 3, True: 8}  # of eager steps, and of compiled steps, which compile and record a graph first
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
    """What all arms of a model share: the model, its tokens, and the dense prefill."""

    loaded: models.LoadedModel
    args: argparse.Namespace
    snapshots: dict[int, list[Any]] = field(default_factory=dict)  # layers of the dense cache by its length
    known_lengths: set[int] = field(default_factory=set)  # lengths at which this process has made dense steps

    def __post_init__(self) -> None:
        self.model: PreTrainedModel = self.loaded.model
        config = self.model.config.get_text_config(decoder=True)
        # Longer than the text with all steps: generate() passes all tokens, and positions for all of them.
        shape = (1, max(self.args.contexts) + 2**16)
        tokens = torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
        self.tokens = tokens.to(self.model.device)
        self.positions = torch.arange(shape[1], device=self.model.device)[None]
        self.token = self.tokens[:, :1].clone()
        # The names by which forward() and generate() take a cache. Looked up here, and not within timed steps.
        (self.forward_name,), (self.generate_name,) = cache_kwargs(None, self.model), cache_kwargs(None)
        # generate() asks for the last logits only, where the model's forward can do that.
        self.keep_last = {"logits_to_keep": 1} if self.model._supports_logits_to_keep() else {}
        self._dense, self._read, self._broken = DynamicCache(config=self.model.config), 0, ""

    def read(self, cache: Cache, start: int, stop: int) -> None:
        """Feed the tokens of the text from `start` to `stop` into a cache, in pieces."""
        size = 2048 if self.model.device.type == "cuda" else 512
        for first in range(start, stop, size):
            ids = self.tokens[:, first : min(first + size, stop)]
            self.model(ids, **{self.forward_name: cache}, use_cache=True, **self.keep_last)

    def dense_layers(self, context: int) -> list[Any]:
        """Return the layers of a DynamicCache that has read `context` tokens.

        Each context must be longer than the one before, or a capacity: the layers at capacities are kept.
        """
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
            # Reading on does not change copied layers: a dynamic layer makes new tensors.
            self.snapshots[stop] = [copy.copy(layer) for layer in self._dense.layers]
        return self.snapshots[context]

    def compiled_step(self, cache: Cache, seen: int) -> None:
        """Feed one token after `seen` tokens, as `generate()` does with a cache that can be compiled."""
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
    """Steps of an arm: one `fill(context)`, then turns of one `rewind()` and several `step()`s. Only steps are timed."""

    turn_steps = 1

    def __init__(self, bench: Bench, arm: Arm) -> None:
        self.bench, self.arm = bench, arm
        self.cache: Cache | None = None
        self.seen = 0

    def applies(self, context: int) -> bool:
        """Whether the arm is measured at this context: an arm at-capacity is the dense arm while the text still fits."""
        return not self.arm.name.endswith("-at-capacity") or context > self.arm.capacity

    def length(self, context: int) -> int:
        """Return the number of tokens in the cache after a text of `context` tokens."""
        return min(context, self.arm.capacity or context)

    def fill(self, context: int) -> None:
        """Read `context` tokens, more than at the call before. Raises CannotMeasure where the arm is not measured."""

    def rewind(self) -> None:
        """Go back to the state after `fill`, or to a state whose steps cost the same."""

    def step(self) -> None:
        """Read one token."""
        if self.arm.compiled:
            self.bench.compiled_step(self.cache, self.seen)
        else:
            self.bench.model(self.bench.token, **{self.bench.forward_name: self.cache}, use_cache=True)
        self.seen += 1

    def release(self) -> None:
        """Free memory before the next context."""
        self.cache, self.layers = None, []


class Dense(Steps):
    """A DynamicCache that goes on from the shared prefill."""

    def fill(self, context: int) -> None:
        self.layers = self.bench.dense_layers(self.length(context))

    def rewind(self) -> None:
        self.cache = self.arm.make_cache(self.bench.model, 0)
        self.cache.layers = [copy.copy(layer) for layer in self.layers]


class Static(Steps):
    """A StaticCache of as many slots as the text has tokens. The prefill leaves the last slots to the steps."""

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
    """A SinkWindowCache that reads on from context to context. Once it is full, every further token costs the same."""

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
        """Keep the cache: it is small, and the next context goes on from it."""


class Recompute(Steps):
    """No cache: the window is read anew."""

    def applies(self, context: int) -> bool:
        """Whether this is the first context that fills the window. One is enough: the time does not depend on it."""
        contexts = self.bench.args.contexts
        return context == min((n for n in contexts if n >= self.arm.capacity), default=max(contexts))

    def fill(self, context: int) -> None:
        if context < self.arm.capacity:
            raise CannotMeasure("no context fills its window")

    def step(self) -> None:
        call = self.bench.compiled_call if self.arm.compiled else self.bench.model
        call(self.bench.tokens[:, : self.arm.capacity], use_cache=False, **self.bench.keep_last)


STEPS = {"dense": Dense, "static": Static, "sink": Sink, "recompute": Recompute}


def make_steps(bench: Bench, names: Sequence[str], compiled: bool) -> list[Steps]:
    """Return the arms of these names, in the order in which they take turns: eager arms, then compiled arms."""
    arms = choose([name for name in names if name in EAGER], bench.args.capacities)
    if compiled:
        arms += choose([name for name in names if name in COMPILED], bench.args.capacities, COMPILED)
    return [STEPS[arm.name.removesuffix("-at-capacity")](bench, arm) for arm in arms]


# --- measuring ---

Row = dict[str, Any]  # of the result file


def new_row(steps: Steps, context: int) -> Row:
    """Return the row of an arm at a context. Its numbers are still missing; `summarize` adds those made of raw numbers."""
    arm, trained = steps.arm, steps.bench.loaded.trained_context
    later = ("median_ms", "mean_ms", "std_ms", "p5_ms", "p95_ms", "event_ms", "gpu_ms", "kernel_ms", "floor_ms")
    later += ("busy", "cache_bytes", "peak_bytes_over_weights")
    raw = ("step_ms", "unsynchronized_ms", "first_time_ms", "again_ms")
    return {
        "arm": arm.name,
        "compiled": arm.compiled,
        "context": context,
        "capacity": arm.capacity,
        "n_sink": arm.sinks(steps.bench.args.n_sink),
        "reason": "",
        "warning": "",
        **dict.fromkeys(later),
        **{name: [] for name in raw},
        "sdpa": "compiled",
        "beyond_trained_context": trained is not None and steps.length(context) > trained,
    }


def warm_up(steps: Steps, clock: harness.Clock) -> float:
    """Step a number of times, and then for `--warm-up-seconds`; return the time of a step in ms."""
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
    """Return times in ms of steps at lengths that are new to this process, and of the same steps again.

    Both lists are empty if any of the lengths that the arm's turns will reach is known already.
    """
    lengths = range(steps.length(context) + 1, steps.length(context) + TURN_LIMIT + 2)
    new = steps.bench.known_lengths.isdisjoint(lengths)
    steps.bench.known_lengths.update(lengths)
    first_time: list[float] = []
    again: list[float] = []
    # Two untimed passes over some lengths allocate memory. Then two equal passes go on to lengths that are timed.
    for times in (None, None, first_time, again) if new else ():
        steps.rewind()
        for _ in range(NEW_LENGTHS // 2):
            steps.step()
        if times is not None:
            times += harness.timed_steps(steps.step, NEW_LENGTHS, clock)
    return first_time, again


def start_arm(steps: Steps, row: Row, clock: harness.Clock) -> None:
    """Bring an arm to the row's context, time its steps at new lengths, and warm it up."""
    steps.fill(row["context"])
    steps.rewind()
    if isinstance(steps, Dense):
        row["first_time_ms"], row["again_ms"] = map(rounded, new_length_times(steps, row["context"], clock))
    skipped = compile_counter("inductor", "cudagraph_skips")
    steps.turn_steps = steps_per_turn(warm_up(steps, clock), steps.bench.args)
    if clock.device.type == "cuda" and compile_counter("inductor", "cudagraph_skips") > skipped:
        row["warning"] = "torch.compile left out CUDA graphs"


def take_turn(steps: Steps, row: Row, clock: harness.Clock) -> None:
    """Add one turn of an arm to its row, and in every second round also a turn without synchronisation (not on a CPU)."""
    two_turns = clock.device.type != "cpu" and len(row["step_ms"]) % 2 == 0
    for synchronized in (True, False) if two_turns else (True,):
        steps.rewind()
        if not isinstance(steps, Recompute):
            steps.step()
        if synchronized:
            row["step_ms"].append(rounded(harness.timed_steps(steps.step, steps.turn_steps, clock)))
        else:
            row["unsynchronized_ms"].append(harness.unsynchronized_step_ms(steps.step, steps.turn_steps, clock))


def look_closer(steps: Steps, row: Row, clock: harness.Clock) -> None:
    """Measure memory, and on CUDA the GPU's own work, in steps that are not among the timed ones."""
    steps.rewind()
    steps.step()
    row["cache_bytes"] = harness.cache_bytes(steps.cache)
    with harness.PeakMemory(clock.device) as peak:
        for _ in range(2):
            steps.step()
        clock.now()
    row["peak_bytes_over_weights"] = None if peak.bytes is None else row["cache_bytes"] + peak.bytes
    if not steps.arm.compiled:
        row["sdpa"] = harness.attention_of(steps.step)
    if clock.device.type == "cuda":
        row["event_ms"] = statistics.median(harness.event_ms(steps.step, clock)[0] for _ in range(EVENT_STEPS))
        work = harness.gpu_times(steps.step, EVENT_STEPS, clock, queue_ms=2 * row["event_ms"] + 1)
        row["gpu_ms"] = statistics.median(work) if work else None


def profile_last(steps: Steps, row: Row, clock: harness.Clock) -> None:
    """Profile an arm after all times are taken: what the profiler attaches to CUDA stays, and slows down launches."""
    steps.rewind()
    steps.step()
    kernels = harness.kernel_times(lambda: [steps.step() for _ in range(PROFILED_STEPS)], clock)
    per_step = {name: (times / PROFILED_STEPS, ms / PROFILED_STEPS) for name, (times, ms) in kernels.items()}
    row["kernel_ms"], row["sdpa"] = harness.kernel_sums(per_step), harness.attention_kernel(kernels)


def summarize(row: Row, machine: dict[str, float]) -> None:
    """Add to a row the statistics of its raw times, its floor and its warnings."""
    times = [time for turn in row["step_ms"] for time in turn]
    row |= {f"{name}_ms": value for name, value in harness.summary(times).items()}
    if row["gpu_ms"]:
        row["busy"] = row["gpu_ms"] / row["median_ms"]
    if row["arm"] != "recompute":
        row["floor_ms"] = 1e3 * (machine["step_weight_bytes"] + row["cache_bytes"]) / machine["copy_bytes_per_s"]
    row["warning"] = row["warning"] or harness.spread_warning(times)
    if row["event_ms"] and abs(row["event_ms"] / row["median_ms"] - 1) > 0.1:
        row["warning"] += f" CUDA events saw {row['event_ms']:.3f} ms, the clock {row['median_ms']:.3f} ms"


def measure_context(arms: Sequence[Steps], context: int, clock: harness.Clock, bar: tqdm[Any], last: bool) -> list[Row]:
    """Measure all arms at one context, in turns; at the `last` context profile them, if the options say so."""
    applying = [arm for arm in arms if arm.applies(context)]
    rows = {arm: new_row(arm, context) for arm in applying}

    def for_each(work: Callable[[Steps, Row, harness.Clock], None]) -> None:
        for arm in applying:
            if not rows[arm]["reason"]:
                bar.set_postfix_str(f"{context:,} tokens, {arm.arm}", refresh=False)
                try:
                    work(arm, rows[arm], clock)
                # Any failure, of a compiler too, ends this arm only: the times of the other arms are kept.
                except Exception as error:
                    rows[arm] = new_row(arm, context) | {"reason": reason_for(error)}
            bar.update()

    args = arms[0].bench.args
    with torch.no_grad(), harness.garbage_collector_off():
        if clock.device.type == "cuda":
            torch.cuda.empty_cache()  # the last context has left memory in pieces
        for_each(start_arm)
        compiled_before = compile_counter("stats", "unique_graphs")
        for _ in range(args.rounds):
            for_each(take_turn)
        if compile_counter("stats", "unique_graphs") > compiled_before:
            for arm in applying:
                if arm.arm.compiled:
                    rows[arm]["warning"] += " graphs were compiled while it was timed"
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
    """Return times in ms, rounded to a tenth of a microsecond to keep result files small."""
    return [round(time, 4) for time in times]


def ratios(rows: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the ratios of arms that took turns: eager over eager steps, compiled over compiled steps.

    At N tokens `achieved` is dense(N) / sink(N), `ceiling` dense(N) / dense(capacity), `overhead` sink(N) /
    dense(capacity), and `recompute_over_sink` recompute / sink(N). In compiled steps the static arms are the dense ones.
    `gpu_value` is the same ratio of the GPU's own work.
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
                where = {"name": name, "context": context, "capacity": capacity, "compiled": compiled}
                found = harness.ratio_of_rounds(above["step_ms"], below["step_ms"])
                both = above["gpu_ms"] and below["gpu_ms"]
                yield {**where, **found, "gpu_value": above["gpu_ms"] / below["gpu_ms"] if both else None}


COLUMNS = ["context", "arm", "compiled", "capacity", "median_ms", "p5_ms", "p95_ms", "gpu_ms"]
COLUMNS += ["busy", "floor_ms", "sdpa", "cache_bytes", "reason", "warning"]


# --- command line ---


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = harness.Parser("latency", __doc__)
    parser.numbers(
        contexts=([], "tokens of text before a step", 2),
        rounds=(None, "how often each arm has its turn at each context (24; 12 on a CPU)"),
        steps=(4, "least number of steps in a turn"),
        min_seconds=(0.25, "least time of all turns of an arm together"),
        warm_up_seconds=(0.1, "how long an arm is warmed up, after its first steps"),
    )
    parser.names("--arms", of=NAMES)
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="measure compiled steps, too (on CUDA)"
    )
    at = "contexts whose static cache is compiled; each takes long (the largest)"
    parser.add_argument("--compile-static-at", nargs="*", type=int, metavar="N", help=at)
    profile = "in the end, kernels at the largest context; CUDA, one shape"
    parser.add_argument("--profile", action="store_true", help=profile)
    args = parser.parse(argv)
    parser.fill_in_sizes(args)  # capacities depend on the device
    useless = args.compile is False and args.compile_static_at
    most = f"--steps must be at most {TURN_LIMIT}, but is {args.steps}: take more --rounds"
    parser.refuse(useless, "--compile-static-at names contexts of compiled steps, which --no-compile leaves out")
    parser.refuse(args.steps > TURN_LIMIT, most)
    return args


def measure_model(args: argparse.Namespace, loaded: models.LoadedModel, result: harness.Result) -> None:
    """Measure a model at all contexts, and write the result file after each."""
    bench, clock = Bench(loaded, args), harness.Clock(loaded.model.device)
    arms = make_steps(bench, args.arms, args.compile)
    floor = result.data["machine"] | {"step_weight_bytes": loaded.description["step_weight_bytes"]}
    turns = (args.rounds + 2) * sum(arm.applies(context) for arm, context in itertools.product(arms, args.contexts))
    with harness.progress_bar(total=turns, desc=loaded.name, unit=" turns") as bar:
        with torch.no_grad():  # the first step of a process is slow: take it at a length that is not measured
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
    # Each length gets a graph of its own, as in a process with this length only. No length falls back to eager silently.
    torch._dynamo.config.automatic_dynamic_shapes = False
    torch._dynamo.config.recompile_limit = 1000
    machine = harness.machine_rates(device)
    for loaded in models.chosen(args, dtype, device, "pythia-70m"):
        with harness.Result("latency", loaded, args, argv, machine=machine) as result:
            measure_model(args, loaded, result)
            print(harness.table(result.rows, COLUMNS), harness.table(list(ratios(result.rows))), sep="\n\n")
        del loaded  # frees its memory before the next model is made


if __name__ == "__main__":
    sys.exit(harness.run(main))
