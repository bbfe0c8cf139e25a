"""Whole calls of `generate()`: compiled static shapes and the endless loop. (For very long ones see `benchmarks.longrun`.)

    python -m benchmarks.endless --random-weights pythia-70m pythia-410m

All arms go through `model.generate()`, which compiles by itself on CUDA (and nothing on the CPU), take turns in `--rounds`
rounds, greedy and without an end-of-text token. Arms:

    dense      DynamicCache after a prompt of the first of `--contexts`
    static     StaticCache(capacity), compiled: what a cache of fixed length can reach, but only for `capacity` tokens
    sink       SinkWindowCache(compileable=True), compiled, after prompts of each of `--contexts`
    endless    the same cache in `custom_generate=sink_cache.endless`, after a prompt of the first context

`step_ms` are times between tokens, taken where a streamer gets them (which waits for the device), after the first 16 tokens;
`prompt_ms` the time to the first of these (of `sink` after a long prompt, which is read before, that of its last token), and
`warm_up_ms` from there to the sixteenth, in which endless captures its graph;
`call_ms` is the time of a whole call of `--call-tokens` without a streamer, prompt included, per new token (dense and endless,
in the first two rounds). The prompt of `static` is as long as its capacity allows. With `--profile` (CUDA) the kernels of a step
follow, as `kernels`: those that a call of 48 tokens (or `--new-tokens`) has more of than one of a third of that.

Results: tables here, and a JSON file for each model and kind in `--output` (header: `benchmarks.harness`), with `rows`.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tabulate import tabulate
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.generation.streamers import BaseStreamer

from sink_cache import SinkWindowCache, cache_kwargs, endless

from . import harness, models, plots

WARM_UP_TOKENS = 16
CALL_ROUNDS = 2
PROFILED_TOKENS = 48
KINDS = {  # the first whose sign is in a kernel's name; attention kernels have signs of matrix products, too
    "attention": "flash|fmha|attention",
    "matrix products": "gemm|gemv|nvjet|cutlass|splitk|cublas",
    "cache": "index_copy|index_put",  # writing keys and values, and moving sinks (but for a cosine and a sine a step)
}


class StepTimes(BaseStreamer):
    """A streamer that notes when each token comes."""

    def __init__(self) -> None:
        self.moments: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Note the time; the first call brings the prompt."""
        self.moments.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to do."""

    def add_to(self, row: dict[str, Any]) -> None:
        """Add the times of a call to those of others: of the prompt, of the first tokens, and of each token after them."""
        times = [round(1e3 * t, 4) for t in np.diff(self.moments)]
        row["prompt_ms"].append(times[0])
        row["warm_up_ms"].append(sum(times[1:WARM_UP_TOKENS]))
        row["step_ms"].append(times[WARM_UP_TOKENS:])


@dataclass
class Arm:
    """A way of calling `generate()`, with a cache of its own in every call."""

    name: str
    context: int
    make: Callable[[], Any]
    options: dict[str, Any]

    def call(self, model: PreTrainedModel, text: torch.Tensor, new_tokens: int, capacity: int, **more: Any) -> None:
        """Generate after a prompt of `context` tokens."""
        cache, prompt = self.make(), text[:, : self.context]
        if self.context > 2 * capacity and self.name == "endless":
            more["prefill_chunk_size"] = capacity
        elif self.context > 2 * capacity and self.name == "sink":
            # Not by generate(), which would compile the pieces, too; they are not measured here.
            with torch.no_grad():
                for piece in prompt[:, :-1].split(capacity, dim=1):
                    model(piece, **cache_kwargs(cache, model), logits_to_keep=1)
        model.generate(
            prompt, **cache_kwargs(cache), do_sample=False, max_new_tokens=new_tokens, **self.options, **more
        )


def arms_of(model: PreTrainedModel, args: argparse.Namespace) -> list[Arm]:
    """Return the arms in the order in which they take turns; see the module docstring."""

    def sink() -> SinkWindowCache:
        return SinkWindowCache(args.n_sink, args.capacity - args.n_sink, compileable=model.device.type == "cuda")

    first = args.contexts[0]
    arms = [
        Arm("dense", first, lambda: DynamicCache(config=model.config), {}),
        Arm(
            "static",
            args.capacity - args.new_tokens - 1,
            lambda: StaticCache(config=model.config, max_cache_len=args.capacity),
            {},
        ),
        *(Arm("sink", context, sink, {}) for context in args.contexts),
        Arm("endless", first, sink, {"custom_generate": endless}),
    ]
    return [arm for arm in arms if arm.name in args.arms]


def calls(loaded: models.LoadedModel, args: argparse.Namespace, keep: Callable[[Any], None]) -> None:
    """After each round, hand the rows to `keep`: one for each arm and context, with raw times of all rounds so far."""
    model, arms = loaded.model, arms_of(loaded.model, args)
    text = random_text(model, args)
    compiled = model.device.type == "cuda"
    rows: list[dict[str, Any]] = [
        {"arm": arm.name, "compiled": compiled and arm.name != "dense", "context": arm.context}
        | {
            "capacity": args.capacity,
            "prompt_ms": [],
            "warm_up_ms": [],
            "step_ms": [],
            "call_ms": [],
            "n_sink": args.n_sink,
            "new_tokens": args.new_tokens,
        }
        for arm in arms
    ]
    clock = harness.Clock(model.device)
    with harness.progress_bar((args.rounds + 1) * len(arms), loaded.name, " calls") as bar:
        for turn in range(args.rounds + 1):  # the first compiles and warms up
            for arm, row in zip(arms, rows, strict=True):
                bar.set_postfix_str(f"{arm.name}, {arm.context:,} tokens")
                times = StepTimes()
                arm.call(model, text, args.new_tokens, args.capacity, streamer=times)
                if turn:
                    times.add_to(row)
                if arm.name in ("dense", "endless") and 1 <= turn <= CALL_ROUNDS:
                    start = clock.now()
                    arm.call(model, text, args.call_tokens, args.capacity)
                    row["call_ms"].append(1e3 * (clock.now() - start) / args.call_tokens)
                bar.update()
            if turn:
                summarize(rows)
                keep(rows)


def summarize(rows: Sequence[dict[str, Any]]) -> None:
    """Add what the raw times of each row amount to."""
    for row in rows:
        steps = [one for turn in row["step_ms"] for one in turn]
        row |= {
            f"{name}_ms": value for name, value in harness.summary(steps).items() if name in ("median", "p5", "p95")
        }
        row["warning"] = harness.spread_warning(steps)


def random_text(model: PreTrainedModel, args: argparse.Namespace) -> torch.Tensor:
    """Return the tokens of all prompts, `[1, tokens]`."""
    return torch.randint(1, model.config.vocab_size, (1, max(*args.contexts, args.capacity)), device=model.device)


def kernels_of(loaded: models.LoadedModel, args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Return by `label`, for each arm but dense, the kernels of a step, the longest first: what a longer call has more of."""
    model, clock = loaded.model, harness.Clock(loaded.model.device)
    text, found = random_text(model, args), {}
    longest = min(PROFILED_TOKENS, args.new_tokens)
    lengths = longest // 3, longest
    steps = lengths[1] - lengths[0]
    for arm in arms_of(model, args):
        if arm.name == "dense":
            continue
        short, long = (
            harness.kernel_times(partial(arm.call, model, text, tokens, args.capacity), clock) for tokens in lengths
        )
        rows = []
        for name, (times, ms) in long.items():
            before = short.get(name, (0, 0.0))
            if times > before[0]:
                per_step = {"times": (times - before[0]) / steps, "ms": (ms - before[1]) / steps}
                rows.append({"kernel": name[:200], **per_step})
        found[label(arm.name, arm.context, args.contexts[0])] = sorted(rows, key=lambda row: -row["ms"])
    return found


def label(arm: str, context: int, first: int) -> str:
    """Return the name of an arm, with its context if that is another than the `first`."""
    return f"{arm} after {context:,}" if arm == "sink" and context != first else arm


def kind_of(kernel: str) -> str:
    """Return what a kernel does, as far as its name tells."""
    for kind, sign in KINDS.items():
        if re.search(sign, kernel, re.IGNORECASE):
            return kind
    return "other"


def ratios(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what arms that took turns say about each other."""
    by_arm = {(row["arm"], row["context"]): row for row in rows}
    first = min((context for arm, context in by_arm if arm == "sink"), default=None)
    found = []
    for (arm, context), row in by_arm.items():
        if arm == "sink" and context != first:
            flat = harness.ratio_of_rounds(row["step_ms"], by_arm[arm, first]["step_ms"])
            found.append({"name": f"step: sink / sink after {first:,}", "context": context, **flat})
        for other in ("static", "dense"):
            base = next((r for (a, _), r in by_arm.items() if a == other), None)
            if base is None or arm not in ("sink", "endless"):
                continue
            above, below = (row, base) if other == "static" else (base, row)
            compared = harness.ratio_of_rounds(above["step_ms"], below["step_ms"])
            found.append({"name": f"step: {above['arm']} / {below['arm']}", "context": context, **compared})
            if other == "dense" and row["call_ms"] and base["call_ms"]:
                name = {"name": "whole call: dense / endless", "context": context}
                found.append(name | ratio_of_calls(base["call_ms"], row["call_ms"]))
    return found


def ratio_of_calls(above: Sequence[float], below: Sequence[float]) -> dict[str, Any]:
    """Compare whole calls, too few for an interval: `low` and `high` are of the calls that are furthest apart."""
    value = float(np.median(above) / np.median(below))
    low, high = min(above) / max(below), max(above) / min(below)
    doubtful = len(above) < 2 or (high - low) / value > harness.WIDEST_INTERVAL
    return {"value": value, "low": low, "high": high, "note": harness.TOO_WIDE if doubtful else ""}


def by_kind(kernels: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return the time of a step's kernels in ms, summed by what they do, a row for each arm."""
    table = []
    for arm, rows in kernels.items():
        sums = {kind: sum(row["ms"] for row in rows if kind_of(row["kernel"]) == kind) for kind in (*KINDS, "other")}
        table.append({"arm": arm, **sums, "all": sum(sums.values()), "kernels": sum(row["times"] for row in rows)})
    return table


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = harness.Parser(prog="python -m benchmarks.endless", description=__doc__)
    parser.add_argument("--random-weights", nargs="+", metavar="SHAPE", default=["pythia-70m"], help="(%(default)s)")
    parser.add_argument("--contexts", nargs="+", type=int, default=[4096], help="lengths of prompts (%(default)s)")
    parser.add_argument("--capacity", type=int, default=1024, help="of the cache, sinks included (%(default)s)")
    parser.add_argument("--n-sink", type=int, default=4, help="(%(default)s)")
    parser.add_argument("--new-tokens", type=int, default=256, help="of each call (%(default)s)")
    parser.add_argument("--call-tokens", type=int, default=1024, help="of each whole call (%(default)s)")
    parser.add_argument("--rounds", type=int, default=6, help="(%(default)s)")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help="(all)")
    parser.add_argument("--profile", action="store_true", help="in the end, the kernels of a step; CUDA, one shape")
    parser.add_argument("--sdpa-backend", choices=harness.SDPA_CHOICES, default="auto", help="(auto)")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu (%(default)s)")
    parser.add_argument("--dtype", help=f"{', '.join(harness.DTYPES)} (bfloat16 on CUDA, else float32)")
    parser.add_argument("--output", default="build/benchmarks", help="folder for JSON files and plots (%(default)s)")
    args = parser.parse_args(argv)
    if min(args.contexts) < 1:
        parser.error(f"contexts must be at least 1, but one is {min(args.contexts)}")
    if not args.n_sink < args.capacity - args.new_tokens - 1:
        parser.error(f"capacity {args.capacity} must leave room for {args.new_tokens} new tokens of a StaticCache")
    if args.profile and len(args.random_weights) > 1:
        parser.error("--profile is for one shape: what the profiler attaches to CUDA would slow down the next")
    for name, least in {"rounds": 1, "call_tokens": 1, "new_tokens": WARM_UP_TOKENS + 2, "capacity": 2}.items():
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, but is {getattr(args, name)}")
    return args


ARMS = ("dense", "static", "sink", "endless")


def measure(
    loaded: models.LoadedModel,
    args: argparse.Namespace,
    sdpa: dict[str, bool],
    argv: Sequence[str] | None,
    folder: Path,
) -> None:
    """Measure a model and write its result file and plots."""
    loaded.model.generation_config.eos_token_id = None
    device, dtype = loaded.model.device, loaded.model.dtype
    dtype_name = str(dtype).removeprefix("torch.")
    title = f"calls of generate(): {loaded.name}, {dtype_name}, {harness.device_name(device)}"
    names = ("contexts", "capacity", "n_sink", "new_tokens", "call_tokens", "rounds")
    protocol = {name: getattr(args, name) for name in names} | {"sdpa_backend": args.sdpa_backend, "sdpa_enabled": sdpa}
    result = harness.header("endless", title, device, dtype, argv=argv, model=loaded.description, protocol=protocol)
    path = folder / f"{harness.file_stem('endless', loaded.name, device.type, dtype_name)}.json"
    print(title, flush=True)

    def keep(rows: list[dict[str, Any]]) -> None:
        result.update(rows=rows, ratios=ratios(rows))
        harness.write_json(path, result)

    calls(loaded, args, keep)
    columns = (
        "arm",
        "compiled",
        "context",
        "median_ms",
        "p5_ms",
        "p95_ms",
        "prompt_ms",
        "warm_up_ms",
        "call_ms",
        "warning",
    )
    table = [[row[name] for name in columns] for row in result["rows"]]
    for line in table:
        line[6:9] = [float(np.median(times)) if times else None for times in line[6:9]]
    print(tabulate(table, columns, floatfmt=".3f"))
    columns = ("name", "context", "value", "low", "high", "note")
    print(tabulate([[ratio.get(name) for name in columns] for ratio in result["ratios"]], columns, floatfmt=".3f"))
    if args.profile:
        result["kernels"] = kernels_of(loaded, args)
        print(tabulate(by_kind(result["kernels"]), "keys", floatfmt=".4f"))
        harness.write_json(path, result)
    for written in [path, *plots.plot(path, folder)]:
        print(f"wrote {written}")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure each model, print its tables, and write its result file and plots; see the module docstring."""
    args = parse(argv)
    folder, device, dtype, sdpa = harness.set_up(args)
    for shape in args.random_weights:
        measure(models.random_model(shape, dtype, device), args, sdpa, argv, folder)
        torch.compiler.reset()
        if device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(harness.run(main))
