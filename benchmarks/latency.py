"""Decoding latency: milliseconds per token at a fixed length of the text, and why it is what it is.

    python -m benchmarks.latency                                         # as below, on what this machine has
    python -m benchmarks.latency --random-weights pythia-70m pythia-6.9b --device cuda --dtype bfloat16
    python -m benchmarks.latency --model FOLDER --contexts 512 4096 --capacities 256 1024

The text is read up to a context of N tokens; then single tokens are fed and timed, with the device synchronised before and
after every step: `torch.cuda.synchronize`, `torch.mps.synchronize`, or nothing on the CPU, which runs in order. (MPS is
tested with a faked backend only; it has not run on hardware here.) The time of a step does not depend on the values of
weights, so random ones of a named shape are the default, and no hub is asked. Arms:

    dense               DynamicCache: a step reads N tokens of cache
    dense-at-capacity   DynamicCache of `capacity` tokens, measured beside the others at every N: what bounding can reach
    sink                SinkWindowCache(n_sink, capacity - n_sink)
    static              StaticCache of max_cache_len = N, whose last slots are being filled
    recompute           no cache: the last `capacity` tokens are read anew for every token, the paper's baseline. It does
                        not depend on N and is measured once, at the first N of at least `capacity`

Eager steps are plain `model(token, past_key_values=cache)`. Compiled ones (`--compile`; static and sink) are the steps of
`generate()`: `prepare_inputs_for_generation`, which builds the mask if there is one, then `model.get_compiled_call`.

How it is measured: each arm is warmed up by count and by time; then, at each N, all arms take turns, a few steps each, in
`--rounds` rounds, so that drift of the machine hits all alike. The garbage collector is off. Before each turn an arm goes back to
N tokens, untimed, and takes one untimed step. So lengths repeat; what dense needs at lengths that this process has
never seen is measured by itself, because some attention backends build a plan for every new length. Turns without
synchronisation between the steps follow in every second round (not on the CPU): a device that is never waited for may be faster.

What explains it: `ceiling` = dense(N) / dense(capacity) is what a dense cache cut to that size would win, `achieved` = dense(N) /
sink(N), `overhead` = sink(N) / dense(capacity): the median over rounds of the ratio within a round, in which what slows down both
cancels, with a 95% bootstrap interval; and as `gpu_value` that of the GPU's own work, which a busy CPU does not touch. `busy` is
the share of the step in which the GPU worked: below 1 the step waits for the CPU to launch kernels. `floor_ms` is what the
hardware allows: for a step, the bytes of weights and cache read, at the measured copy bandwidth; for recompute, its arithmetic,
at the measured rate of a large matrix product.

Results: tables here, and for each model in the `--output` folder a JSON file (for its header see `benchmarks.harness`) and two
plots, or three with recompute at several capacities. Besides `machine` (the measured rates, and the share of the CPU that other
programs used at the start) and `ratios` it has `rows` with

    arm, compiled, context, capacity, n_sink, beyond_trained_context
    median_ms, mean_ms, std_ms, p5_ms, p95_ms, n     of the steps
    step_ms                 all of them, round by round
    unsynchronized_ms       per token, one number for each such turn, or null
    first_time              median_ms at lengths never seen before, and again_median_ms, of the same steps taken again; dense
    event_ms                the same by CUDA events, in other steps
    gpu_ms, busy            by CUDA events around steps that were launched while the GPU was still spinning: its own work,
                            without waiting for launches; and the share of that in median_ms
    profiler_ms             with --profile, at the largest context: the sum of all kernels by torch.profiler
    sdpa                    the attention kernel that ran; of compiled steps it is known with --profile only
    cache_bytes, peak_bytes_over_weights    in a pass of their own: the cache, and with what a step needs besides
    floor_ms, warning, reason               reason: in words, why there are no numbers

A compiled step's working memory is set aside when its graph is recorded and is not in its `peak_bytes_over_weights`.
"""

from __future__ import annotations

import argparse
import gc
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from tabulate import tabulate
from tqdm import tqdm
from transformers import DynamicCache

from . import harness, models, plots
from .arms import ARM_NAMES, BLOCK_LIMIT, Arm, Bench, CannotMeasure, Dense, Recompute, Sink, make_arms, reason_for
from .harness import MIB, BenchmarkError

WARM_UP_STEPS = {False: 3, True: 8}  # eager, and compiled: to compile, to record the graph, and some more
MAX_TURN_S = 2.0  # a slower arm takes fewer steps in its turn
EVENT_STEPS = PROFILED_STEPS = 5
NEW_LENGTHS = 8  # steps at lengths that the process has never seen
DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {"longest": 4096, "capacities": [256], "compile": False, "rounds": 12},
    "cuda": {"longest": 32768, "capacities": [1024], "compile": True, "rounds": 24},
}


# --- measuring -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """How much is measured; see the module docstring."""

    rounds: int
    steps: int
    min_seconds: float
    warm_up_s: float
    deadline: float = math.inf  # by time.perf_counter()
    profile_at: int | None = None  # the context at whose end the profiler runs


@dataclass
class Measurement:
    """The raw numbers of one arm at one context, times in ms."""

    turn_steps: int = 1
    rounds: list[list[float]] = field(default_factory=list)
    unsynchronized: list[float] = field(default_factory=list)
    first_time: list[tuple[float, float]] = field(default_factory=list)
    event_ms: float | None = None
    gpu_ms: float | None = None
    profiler_ms: float | None = None
    sdpa: str = "compiled"
    cache_bytes: int | None = None
    peak_bytes: int | None = None
    warnings: list[str] = field(default_factory=list)
    reason: str = ""


def warm_up(arm: Arm, settings: Settings, clock: harness.Clock) -> float:
    """Step until nothing is new, by count and by time, and return the time of a step in ms."""
    times: list[float] = []
    while len(times) < WARM_UP_STEPS[arm.compiled] or sum(times[3:]) < 1e3 * settings.warm_up_s:
        if len(times) % BLOCK_LIMIT == 0:
            arm.rewind()
        times += harness.timed_steps(arm.step, 1, clock)
    return min(times[-3:])


def steps_per_turn(step_ms: float, settings: Settings) -> int:
    """Return how many steps make a turn: `steps`, more if they are short, fewer if they are very long."""
    wanted = max(settings.steps, math.ceil(1e3 * settings.min_seconds / settings.rounds / step_ms))
    return max(1, min(wanted, BLOCK_LIMIT, int(1e3 * MAX_TURN_S / step_ms)))


def new_length_times(arm: Dense, known: set[int], context: int, clock: harness.Clock) -> list[tuple[float, float]]:
    """Return pairs of times in ms: a step at a length that this process has never seen, and the same step again."""
    lengths = range(arm.length(context) + 1, arm.length(context) + 1 + BLOCK_LIMIT + 1)  # all that turns will reach
    new = known.isdisjoint(lengths)
    known.update(lengths)
    if not new:
        return []
    # The first lengths come often enough for memory to be there; then the next ones come twice, in the same way.
    turns = [[], []]
    for turn in (None, None, *turns):
        arm.rewind()
        for _ in range(NEW_LENGTHS // 2):
            arm.step()
        if turn is not None:
            turn += harness.timed_steps(arm.step, NEW_LENGTHS, clock)
    return list(zip(*turns, strict=True))


def start_arm(arm: Arm, context: int, settings: Settings, clock: harness.Clock, known: set[int]) -> Measurement:
    """Bring an arm to a context, measure lengths never seen before, and warm it up."""
    if time.perf_counter() > settings.deadline:
        raise CannotMeasure("not measured: the time limit was used up")
    measured = Measurement()
    arm.fill(context)
    arm.rewind()
    if isinstance(arm, Dense):
        measured.first_time = new_length_times(arm, known, context, clock)
    skipped = compile_counter("inductor", "cudagraph_skips")
    measured.turn_steps = steps_per_turn(warm_up(arm, settings, clock), settings)
    if clock.device.type == "cuda" and compile_counter("inductor", "cudagraph_skips") > skipped:
        measured.warnings.append("torch.compile left out CUDA graphs")
    return measured


def take_turn(arm: Arm, measured: Measurement, clock: harness.Clock) -> None:
    """Add one turn of an arm to what was measured of it."""
    # An unsynchronised turn in every second round; on the CPU there is no difference.
    for synchronized in (True, False) if clock.device.type != "cpu" and len(measured.rounds) % 2 == 0 else (True,):
        arm.rewind()
        if not isinstance(arm, Recompute):
            arm.step()
        if synchronized:
            measured.rounds.append(harness.timed_steps(arm.step, measured.turn_steps, clock))
        else:
            measured.unsynchronized.append(harness.unsynchronized_step_ms(arm.step, measured.turn_steps, clock))


def look_closer(arm: Arm, measured: Measurement, clock: harness.Clock) -> None:
    """Measure memory, and on CUDA what the GPU does, in passes whose steps are not timed."""
    arm.rewind()
    arm.step()
    measured.cache_bytes = harness.cache_bytes(arm.cache)
    with harness.PeakMemory(clock.device) as peak:
        for _ in range(2):
            arm.step()
        clock.now()
    measured.peak_bytes = measured.cache_bytes + peak.bytes
    pressure = harness.memory_pressure(peak.swapped_bytes)
    measured.warnings += [pressure] if pressure else []
    if not arm.compiled:
        with harness.Operators() as operators:
            arm.step()
        measured.sdpa = harness.attention_kernel(operators.names)
    if clock.device.type == "cuda":
        measured.event_ms = statistics.median(harness.event_ms(arm.step, clock) for _ in range(EVENT_STEPS))
        work = harness.gpu_times(arm.step, EVENT_STEPS, clock, queue_ms=2 * measured.event_ms + 1)
        measured.gpu_ms = statistics.median(work) if work else None


def profile_last(arm: Arm, measured: Measurement, clock: harness.Clock) -> None:
    """Profile an arm when all times are taken: what the profiler attaches to CUDA stays, and slows down launches."""
    arm.rewind()
    arm.step()
    kernels = harness.kernel_times(lambda: [arm.step() for _ in range(PROFILED_STEPS)], clock)
    measured.profiler_ms = sum(ms for _, ms in kernels.values()) / PROFILED_STEPS or None
    measured.sdpa = harness.attention_kernel(kernels)


def measure_context(
    arms: Sequence[Arm], context: int, settings: Settings, clock: harness.Clock, lengths: set[int], bar: tqdm[Any]
) -> list[tuple[Arm, Measurement]]:
    """Measure all arms at one context, taking turns.

    Args:
        lengths: those that dense steps have had in this process; it is added to.
    """
    applying = [arm for arm in arms if arm.applies(context)]
    found = {arm: Measurement() for arm in applying}

    def for_each(work: Callable[[Arm], None]) -> None:
        for arm in applying:
            if not found[arm].reason:
                bar.set_postfix_str(
                    f"{context:,} tokens, {arm.name}{' compiled' if arm.compiled else ''}", refresh=False
                )
                try:
                    work(arm)
                # Whatever fails, compilers included, fails for one arm; the others and their machine time are kept.
                except Exception as error:
                    found[arm] = Measurement(reason=reason_for(error))
            bar.update()

    def start(arm: Arm) -> None:
        found[arm] = start_arm(arm, context, settings, clock, lengths)

    with torch.no_grad(), harness.garbage_collector_off():
        if clock.device.type == "cuda":
            torch.cuda.empty_cache()  # of what the last context has left in pieces
        for_each(start)
        compiled_before = compile_counter("stats", "unique_graphs")
        for _ in range(settings.rounds):
            for_each(lambda arm: take_turn(arm, found[arm], clock))
        if compile_counter("stats", "unique_graphs") > compiled_before:
            for arm in applying:
                found[arm].warnings += ["graphs were compiled while it was timed"] if arm.compiled else []
        for_each(lambda arm: look_closer(arm, found[arm], clock))
        if context == settings.profile_at:
            for_each(lambda arm: profile_last(arm, found[arm], clock))
    for arm in applying:
        arm.release()
    return list(found.items())


def compile_counter(group: str, name: str) -> int:
    """Return one of torch.compile's own counters, such as how many graphs this process has compiled."""
    return int(torch._dynamo.utils.counters[group][name])


# --- reporting -------------------------------------------------------------------------------------------------------


def floor_ms(arm: Arm, cache_bytes: int, machine: dict[str, float]) -> float:
    """Return the shortest time that the measured rates of the hardware allow for a step."""
    seconds = (machine["step_weight_bytes"] + cache_bytes) / machine["copy_bytes_per_s"]
    if isinstance(arm, Recompute):
        seconds = models.forward_flops(arm.bench.model, int(arm.capacity or 0)) / machine["matrix_flops_per_s"]
    return 1e3 * seconds


def make_row(arm: Arm, context: int, measured: Measurement, machine: dict[str, float]) -> dict[str, Any]:
    """Return a row of the result file; see the module docstring."""
    trained, capacity = arm.bench.loaded.trained_context, arm.capacity
    numbers = ("median_ms", "mean_ms", "std_ms", "p5_ms", "p95_ms", "n", "step_ms", "unsynchronized_ms", "first_time")
    more = ("event_ms", "gpu_ms", "profiler_ms", "busy", "sdpa", "cache_bytes", "peak_bytes_over_weights", "floor_ms")
    row: dict[str, Any] = {
        "arm": arm.name,
        "compiled": arm.compiled,
        "context": context,
        "capacity": capacity,
        "n_sink": arm.bench.n_sink if isinstance(arm, Sink) else None,
        "beyond_trained_context": trained is not None and arm.length(context) > trained,
        **dict.fromkeys((*numbers, *more)),
        "warning": "",
        "reason": measured.reason,
    }
    if measured.reason:
        return row
    steps = [time for turn in measured.rounds for time in turn]
    statistic = harness.summary(steps)
    row |= {f"{name}_ms": statistic[name] for name in ("median", "mean", "std", "p5", "p95")}
    if wide := harness.spread_warning(steps):
        measured.warnings.append(wide)
    if measured.event_ms and abs(measured.event_ms / statistic["median"] - 1) > 0.1:
        measured.warnings.append(f"CUDA events saw {measured.event_ms:.3f} ms, the clock {statistic['median']:.3f} ms")
    return row | {
        "n": len(steps),
        "step_ms": [rounded(turn) for turn in measured.rounds],
        "unsynchronized_ms": rounded(measured.unsynchronized) or None,
        "first_time": first_time(measured.first_time),
        "event_ms": measured.event_ms,
        "gpu_ms": measured.gpu_ms,
        "profiler_ms": measured.profiler_ms,
        "busy": measured.gpu_ms and measured.gpu_ms / statistic["median"],
        "sdpa": measured.sdpa,
        "cache_bytes": measured.cache_bytes,
        "peak_bytes_over_weights": measured.peak_bytes,
        "floor_ms": floor_ms(arm, measured.cache_bytes or 0, machine),
        "warning": "; ".join(measured.warnings),
    }


def first_time(pairs: Sequence[tuple[float, float]]) -> dict[str, Any] | None:
    """Return what a result file says about lengths never seen before, or None if there were none."""
    if not pairs:
        return None
    new, again = (list(times) for times in zip(*pairs, strict=True))
    medians = {"median_ms": statistics.median(new), "again_median_ms": statistics.median(again)}
    return medians | {"step_ms": rounded(new), "again_step_ms": rounded(again)}


def rounded(times: Sequence[float]) -> list[float]:
    """Return times in ms to a tenth of a microsecond: result files stay small, and clocks are not finer."""
    return [round(time, 4) for time in times]


def ratios(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what arms say about each other that took turns, for each sink arm; see the module docstring."""
    cells = {(row["arm"], row["compiled"], row["context"], row["capacity"]): row for row in rows}

    def cell(arm: str, capacity: int | None, compiled: bool = False) -> dict[str, Any] | None:
        row = cells.get((arm, compiled, context, capacity))
        return row if row is not None and not row["reason"] else None

    found = []
    for row in rows:
        if row["arm"] == "sink" and not row["reason"]:
            context, capacity, compiled = row["context"], row["capacity"], row["compiled"]
            far = cell("dense", None)
            near = far if context <= capacity else cell("dense-at-capacity", capacity)
            static, recompute = cell("static", None, compiled), cell("recompute", capacity)
            pairs = {
                "ceiling": (far, near if context > capacity and not compiled else None),
                "achieved": (far, row),
                "overhead": (row, near),
                "static_over_sink": (static, row),
                "recompute_over_sink": (recompute, row),
            }
            for name, (above, below) in pairs.items():
                if above is not None and below is not None:
                    ratio = {"name": name, "context": context, "capacity": capacity, "compiled": compiled}
                    found.append(ratio | harness.ratio_of_rounds(above["step_ms"], below["step_ms"]))
                    work = above["gpu_ms"], below["gpu_ms"]
                    found[-1]["gpu_value"] = work[0] / work[1] if all(work) else None
                    if name == "recompute_over_sink":
                        limit = above["floor_ms"] / below["floor_ms"]
                        found[-1] |= {"hardware_limit": limit, "share_of_limit": found[-1]["value"] / limit}
    return found


def tables(result: dict[str, Any]) -> str:
    """Return the rows and the ratios as text tables, with what must be known in words below."""
    headers = ["context", "arm", "capacity", "ms", "p5 – p95", "unsync.", "new length", "floor", "busy", "attention"]
    lines, notes = [], []
    for row in result["rows"]:
        arm = row["arm"] + (" compiled" if row["compiled"] else "")
        if row["reason"] or row["warning"]:
            which = arm if row["capacity"] is None else f"{arm} {row['capacity']:,}"
            notes.append((f"{which}: {row['reason'] or row['warning']}", f"{row['context']:,}"))
        if row["reason"]:
            continue
        first, free = row["first_time"], row["unsynchronized_ms"]
        lines.append(
            [
                f"{row['context']:,}" + ("*" if row["beyond_trained_context"] else ""),
                arm,
                row["capacity"],
                f"{row['median_ms']:.3f}",
                f"{row['p5_ms']:.3f} – {row['p95_ms']:.3f}",
                free and f"{statistics.median(free):.3f}",
                first and f"{first['median_ms']:.3f} / {first['again_median_ms']:.3f}",
                f"{row['floor_ms']:.3f}",
                row["busy"] and f"{row['busy']:.0%}",
                row["sdpa"],
                f"{row['cache_bytes'] / MIB:,.1f}",
                f"{row['peak_bytes_over_weights'] / MIB:,.0f}",
            ]
        )
    headers += ["cache MiB", "peak MiB"]
    text = [
        tabulate(lines, headers, disable_numparse=True, colalign=["right", "left", *["right"] * 10], missingval="–")
    ]
    text.append("* beyond the trained context." if any("*" in line[0] for line in lines) else "")
    text.append(
        "ms: median of a step. unsync.: the device is not waited for in between. new length: at lengths never seen before / "
        "again. floor: what the hardware allows. busy: the share of a step in which the GPU works."
    )
    names = list(dict.fromkeys(ratio["name"] for ratio in result["ratios"]))
    cells: dict[tuple[Any, ...], dict[str, str]] = {}
    for ratio in result["ratios"]:
        key = f"{ratio['context']:,}", "sink compiled" if ratio["compiled"] else "sink", ratio["capacity"]
        sign = "?" if harness.is_inconclusive(ratio) else ""
        work = "" if ratio["gpu_value"] is None else f" GPU {ratio['gpu_value']:.3g}"
        cells.setdefault(key, {})[ratio["name"]] = (
            f"{ratio['value']:.3g} [{ratio['low']:.3g}, {ratio['high']:.3g}]{sign}{work}"
        )
    if cells:
        body = [[*key, *(of.get(name) for name in names)] for key, of in cells.items()]
        text.append(tabulate(body, ["context", "arm", "capacity", *names], disable_numparse=True, missingval="–"))
        text.append(
            "In brackets the 95% interval; ? where nothing can be concluded (the file says why). A ratio is the median of those "
            "within a round, and not the quotient of the medians above, which mix fast and slow rounds."
        )
        if any(ratio["gpu_value"] for ratio in result["ratios"]):
            text.append("GPU: the ratio of the GPU's own work.")
    for ratio in result["ratios"]:
        if ratio["name"] == "recompute_over_sink":
            arm = "sink compiled" if ratio["compiled"] else "sink"
            text.append(
                f"Capacity {ratio['capacity']:,}: recomputing the window takes {ratio['value']:.3g} times as long as {arm}; "
                f"the floors of both allow {ratio['hardware_limit']:.3g}, of which this is {ratio['share_of_limit']:.0%}."
            )
    text.append(harness.busy_cpu(result["machine"].get("cpu_share_of_others", 0.0)))
    for note in dict.fromkeys(note for note, _ in notes):
        text.append(f"{note} ({', '.join(where for one, where in notes if one == note)})")
    return "\n".join(line for line in text if line)


# --- command line ----------------------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = harness.Parser(prog="python -m benchmarks.latency", description=__doc__)
    source = parser.add_argument_group("model")
    source.add_argument("--model", help="an id on the hub or a folder (random weights)")
    source.add_argument("--random-weights", nargs="+", metavar="SHAPE", help=f"{', '.join(models.SHAPES)} (pythia-70m)")
    source.add_argument("--offline", action="store_true", help="ask no hub: as without --model")
    what = parser.add_argument_group("what is measured")
    what.add_argument("--contexts", nargs="+", type=int, metavar="N", help="(256, 512 … 32,768; 4,096 on a CPU)")
    what.add_argument("--capacities", nargs="+", type=int, metavar="N", help="sinks included (1024; 256 on a CPU)")
    what.add_argument("--n-sink", type=int, default=4, help="(%(default)s)")
    what.add_argument("--arms", nargs="+", choices=ARM_NAMES, default=list(ARM_NAMES), metavar="ARM", help="(all)")
    what.add_argument("--compile", action=argparse.BooleanOptionalAction, help="also compiled steps (on CUDA)")
    what.add_argument(
        "--compile-static-at",
        nargs="*",
        type=int,
        metavar="N",
        help="each takes long (the capacities, largest context)",
    )
    what.add_argument(
        "--profile", action="store_true", help="in the end, kernel times by torch.profiler; CUDA, one model"
    )
    what.add_argument("--sdpa-backend", choices=harness.SDPA_CHOICES, default="auto", help="(auto)")
    how = parser.add_argument_group("how, and where to")
    how.add_argument("--rounds", type=int, help="turns of each arm at each context (24; 12 on a CPU)")
    how.add_argument("--steps", type=int, default=4, help="steps of a turn, at least (%(default)s)")
    how.add_argument("--min-seconds", type=float, default=0.25, help="time of all turns of an arm (%(default)s)")
    how.add_argument("--warm-up-seconds", type=float, default=0.1, help="after the first steps (%(default)s)")
    how.add_argument(
        "--time-limit", type=float, default=math.inf, metavar="S", help="for each model; then no more arms"
    )
    how.add_argument("--device", default="auto", help="auto, cuda, mps or cpu (%(default)s)")
    how.add_argument("--dtype", help=f"{', '.join(harness.DTYPES)} (bfloat16 on CUDA, else float32)")
    how.add_argument("--attn-implementation", help="sdpa or eager (the model's default)")
    how.add_argument("--output", default="build/benchmarks", help="folder for JSON files and plots (%(default)s)")
    args = parser.parse_args(argv)
    if args.model is not None and (args.offline or args.random_weights):
        parser.error("--model is for a model with weights: leave out --offline and --random-weights")
    for name, least in {"steps": 1, "n_sink": 0, "min_seconds": 0, "warm_up_seconds": 0}.items():
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, but is {getattr(args, name)}")
    if args.rounds is not None and args.rounds < 1:
        parser.error(f"--rounds must be at least 1, but is {args.rounds}")
    if args.profile and len(args.random_weights or [1]) > 1:
        parser.error("--profile is for one model: what the profiler attaches to CUDA would slow down the next")
    if args.profile and args.device in ("cpu", "mps"):
        parser.error(f"--profile is for CUDA, but --device is {args.device}")
    if args.steps > BLOCK_LIMIT:
        parser.error(f"--steps must be at most {BLOCK_LIMIT}, but is {args.steps}: take more --rounds")
    for capacity in args.capacities or []:
        if capacity <= args.n_sink:
            parser.error(f"capacity {capacity} leaves no window: it includes the {args.n_sink} sinks")
    if min(args.contexts or [2]) < 2:
        parser.error(f"contexts must be at least 2, but one is {min(args.contexts)}")
    return args


def fill_in_defaults(args: argparse.Namespace, device: torch.device) -> None:
    """Set what depends on the device and was not asked for."""
    defaults = DEFAULTS["cuda" if device.type == "cuda" else "cpu"]
    powers = [2**power for power in range(8, 16) if 2**power <= defaults["longest"]]
    for name, value in {**defaults, "contexts": powers, "random_weights": ["pythia-70m"]}.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)


def measure_model(
    args: argparse.Namespace, loaded: models.LoadedModel, result: dict[str, Any], keep: Callable[[], None]
) -> None:
    """Measure a model at all contexts; rows and ratios are added to the result as they come, and `keep` is called."""
    contexts = sorted(set(args.contexts))
    device = loaded.model.device
    bench = Bench(
        loaded,
        args.n_sink,
        piece_tokens=2048 if device.type == "cuda" else 512,
        kept_contexts=frozenset(args.capacities),
        static_compiled_contexts=frozenset(
            [*args.capacities, contexts[-1]] if args.compile_static_at is None else args.compile_static_at
        ),
        contexts=contexts,
    )
    arms = make_arms(bench, args.arms, args.capacities, args.compile)
    deadline = time.perf_counter() + args.time_limit
    profile_at = contexts[-1] if args.profile and device.type == "cuda" else None
    settings = Settings(args.rounds, args.steps, args.min_seconds, args.warm_up_seconds, deadline, profile_at)
    clock = harness.Clock(device)
    lengths: set[int] = set()
    blocks = (args.rounds + 2) * sum(arm.applies(context) for arm in arms for context in contexts)
    with harness.progress_bar(blocks, loaded.name, " turns") as bar:
        with torch.no_grad():  # the process's first steps, at a length that is not asked for
            bench.read(DynamicCache(config=bench.model.config), 0, 1)
        for context in contexts:
            found = measure_context(arms, context, settings, clock, lengths, bar)
            rows = [make_row(arm, context, measured, result["machine"]) for arm, measured in found]
            result["rows"] += rows
            result["ratios"] += ratios(rows)
            keep()


def main(argv: Sequence[str] | None = None) -> None:
    """Measure each model, print its tables, and write its result file and plots; see the module docstring."""
    args = parse(argv)
    folder, device, dtype, sdpa = harness.set_up(args)
    fill_in_defaults(args, device)
    for shape in args.random_weights:
        models.shape_config(shape)  # refuse a wrong name before the first is measured
    transformers.utils.logging.disable_progress_bar()
    # Each length is compiled by itself, as in a process that has only this one; and none falls back to eager silently.
    torch._dynamo.config.automatic_dynamic_shapes = False
    torch._dynamo.config.recompile_limit = 1000
    attention = args.attn_implementation
    hardware = harness.Hardware(device, dtype)
    rates = {"cpu_share_of_others": harness.cpu_share_of_others()}
    rates |= {"copy_bytes_per_s": hardware.copy_bytes_per_s(), "matrix_flops_per_s": hardware.matrix_flops_per_s()}
    for name in [args.model] if args.model else args.random_weights:
        if args.model:
            loaded = models.load(name, dtype, device, attn_implementation=attention)
        else:
            loaded = models.random_model(name, dtype, device, attn_implementation=attention)
        dtype_name = str(dtype).removeprefix("torch.")
        title = f"decoding with {loaded.name}, {dtype_name}, {harness.device_name(device)}"
        result = harness.header(
            "latency",
            title,
            device,
            dtype,
            argv=argv,
            model=loaded.description,
            protocol={
                name: getattr(args, name)
                for name in ("contexts", "capacities", "n_sink", "arms", "compile", "rounds", "steps", "min_seconds")
            }
            | {"batch_size": 1, "sdpa_backend": args.sdpa_backend, "sdpa_enabled": sdpa},
            machine=rates | {"step_weight_bytes": models.step_weight_bytes(loaded.model)},
            interrupted=False,
            ratios=[],
            rows=[],
        )
        path = folder / f"{harness.file_stem('latency', loaded.name, device.type, dtype_name)}.json"
        print(result["title"], flush=True)
        try:
            measure_model(args, loaded, result, lambda: harness.write_json(path, result))  # noqa: B023
        except KeyboardInterrupt:
            result["interrupted"] = True
            if result["rows"]:
                harness.write_json(path, result)
        if result["rows"]:
            print(tables(result))
            if all(row["reason"] for row in result["rows"]):
                raise BenchmarkError(f"nothing could be measured: {result['rows'][0]['reason']}")
            for written in [path, *plots.plot(path, folder)]:
                print(f"wrote {written}")
        if result["interrupted"]:
            raise KeyboardInterrupt
        del loaded
        torch.compiler.reset()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(harness.run(main))
