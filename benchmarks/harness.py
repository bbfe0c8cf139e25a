"""What the harnesses share: options, devices, time, memory, statistics, result files, and errors for users.

The manual and the result format are in docs/benchmarks.md. Functions that measure return raw numbers and print nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import gc
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pandas as pd
import psutil
import torch
import transformers
from scipy.stats import bootstrap
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm
from transformers import Cache

from sink_cache import SinkWindowCache

from .arguments import at_least

SCHEMA, SCHEMA_VERSION = "sink_cache.benchmarks", 2
N_SINK = 4  # by default
QUANTIZE = ("no", "int8", "int4")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PACKAGES = ("torch", "transformers", "accelerate", "datasets", "evaluate", "numpy", "torchao", "sink-cache")
MIB = 2**20
BACKENDS = ("flash", "mem_efficient", "math", "cudnn")
SDPA_CHOICES = ("auto", "flash", "efficient", "math", "cudnn", "no-cudnn")
SPIN_CYCLES_PER_MS = 2_000_000  # the fastest GPUs have about 2 GHz
MAX_MISSES = 4
# A wider spread allows no conclusion. Standard deviation over mean, p95 - p5 over median, and interval over ratio.
WIDEST_STD, WIDEST_PERCENTILES, WIDEST_INTERVAL = 0.2, 0.5, 0.2
FEWEST_ROUNDS = 5  # for an interval: resampling four rounds covers 88% instead of 95%
RESAMPLES = 2000
NO_CONCLUSION = "no conclusion: "
TOO_WIDE = f"{NO_CONCLUSION}the spread is too wide"
# What a kernel does, by a pattern in its name. The first match counts: names of attention kernels match "cutlass", too.
KERNEL_KINDS = {
    "attention": "flash|fmha|attention",
    "matrix products": "gemm|gemv|nvjet|cutlass|splitk|cublas",
    "cache": "index_copy|index_put",  # writes keys and values, and moves sinks
    "other": "",
}
# Attention backends by a word in the names of their kernels. The first match counts: cuDNN's names contain "flash", too.
ATTENTION = {
    "cudnn": "cudnn",
    "flash": "flash",
    "fmha": "efficient",
    "efficient_attention": "efficient",
    "softmax": "math",
}


# --- options and errors ---


class BenchmarkError(Exception):
    """An error that the user can mend. The message is one sentence that says how."""


class Parser(argparse.ArgumentParser):
    """An argument parser with the options that all harnesses share; bad input gets one sentence."""

    def __init__(
        self, prog: str, says: str | None, *, measures: bool = True, output: str | None = "build/benchmarks"
    ) -> None:
        epilog = "The manual and the result format are in docs/benchmarks.md."
        super().__init__(f"python -m benchmarks.{prog}", description=says, epilog=epilog, allow_abbrev=False)
        self.add_argument("--output", default=output, help=f"folder to write to ({output or 'that of the part'})")
        if not measures:
            return
        source = self.add_argument_group("model and cache")
        source.add_argument("--model", help="an id on the hub or a folder, with trained weights")
        source.add_argument("--gguf-file", help="a GGUF file in the model's folder or repository")
        source.add_argument(
            "--random-weights", nargs="+", metavar="SHAPE", help="shapes of models, such as llama-3-8b; one run each"
        )
        source.add_argument("--offline", action="store_true", help="ask no hub: what is named must be here")
        source.add_argument(
            "--quantize",
            nargs="+",
            choices=QUANTIZE,
            default=["no"],
            help="how to round the weights; one run each (no)",
        )
        source.add_argument("--attn-implementation", help="sdpa or eager (the model's default)")
        source.add_argument(
            "--capacities", nargs="+", type=int, metavar="N", help="tokens in a bounded cache, sinks included"
        )
        source.add_argument("--n-sink", type=at_least(0), help=f"how many of these are sinks ({N_SINK})")
        machine = self.add_argument_group("machine and output")
        machine.add_argument("--device", default="auto", help="auto, cuda, mps or cpu (%(default)s)")
        machine.add_argument(
            "--dtype", choices=DTYPES, help="of weights and cache (bfloat16 on CUDA; CPU, ppl: float32)"
        )
        machine.add_argument(
            "--sdpa-backend", choices=SDPA_CHOICES, default="auto", help="of torch's attention (torch's choice)"
        )
        machine.add_argument("--name", help="name of the result file, without .json (made of what is measured)")

    def error(self, message: str) -> NoReturn:
        """Raise the message as a `BenchmarkError`."""
        raise BenchmarkError(f"{message} (--help lists all options)")

    def refuse(self, holds: object, reason: str) -> None:
        """Refuse the command line for this reason, if it holds."""
        if holds:
            self.error(reason)

    def numbers(self, **options: tuple[Any, ...]) -> None:
        """Add an option for each number: its default, its help, and its lowest value if that is not 1, or 0 of a float.

        A list as default makes the option take several numbers. An empty list is no default.
        """
        for name, (default, says, *lowest) in options.items():
            kind = float if isinstance(default, float) else int
            several = {"nargs": "+", "metavar": "N"} if isinstance(default, list) else {}
            number = at_least(lowest[0] if lowest else int(kind is int), kind=kind)
            says += f" ({' '.join(map(str, default if several else [default]))})" if default else ""
            flag = f"--{name.replace('_', '-')}"
            self.add_argument(flag, type=number, default=default or None, help=says, **several)

    def names(self, *flags: str, of: Sequence[str], default: Sequence[str] | None = None) -> None:
        """Add an option for some of the names `of`; by default for all."""
        says = f"{', '.join(of)} ({'all' if default is None else ', '.join(default)})"
        default = list(of if default is None else default)
        self.add_argument(*flags, nargs="+", choices=of, default=default, metavar="NAME", help=says)

    def parse(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """Parse, and refuse shared options that do nothing together."""
        args = self.parse_args(argv)
        args.module = self.prog.rpartition(".")[2].partition(" ")[0]
        several = len(args.random_weights or []) > 1 or len(args.quantize) > 1
        slow = "what the profiler attaches to CUDA would slow down the next"
        self.refuse(args.model and args.random_weights, "--model has trained weights: leave out it or --random-weights")
        self.refuse(args.gguf_file and not args.model, "--gguf-file is a file of --model: name that, too")
        self.refuse(args.name and several, "--name is for one result file: give one shape and one --quantize")
        self.refuse(several and getattr(args, "profile", False), f"--profile is for one shape: {slow}")
        return args

    def fill_in_sizes(self, args: argparse.Namespace, capacities: Sequence[int] | None = None) -> None:
        """Set the sizes of caches that were not given, and refuse capacities that the sinks fill."""
        fill_in(args, capacities=capacities, n_sink=N_SINK)
        least = min(args.capacities or [args.n_sink + 1])
        sinks = f"it includes the {args.n_sink} sinks of --n-sink"
        self.refuse(least <= args.n_sink, f"capacity {least} leaves no window: {sinks}")


def kind_of(argv: Sequence[str] | None, says: str | None, kinds: dict[str, str]) -> tuple[str, list[str]]:
    """Return the first argument, which names one of the `kinds`, and the other arguments; or print the kinds."""
    kind, *rest = (sys.argv[1:] if argv is None else list(argv)) or ["--help"]
    if kind in ("-h", "--help"):
        lines = [f"  {name:10} {what}" for name, what in kinds.items()]
        print(says, *lines, "Options: NAME --help", sep="\n")
        sys.exit(0)
    if kind not in kinds:
        raise BenchmarkError(f"what is to be measured comes first: {', '.join(kinds)}, not {kind!r}")
    return kind, rest


def fill_in(args: argparse.Namespace, **defaults: Any) -> None:
    """Set the options that were not given."""
    vars(args).update({name: value for name, value in defaults.items() if getattr(args, name) is None})


def run(main: Callable[[Sequence[str] | None], None], argv: Sequence[str] | None = None) -> int:
    """Call a harness's `main` and return its exit code: 2 with one sentence on bad input, 130 if interrupted."""
    try:
        main(argv)
    except BenchmarkError as error:
        if os.environ.get("RANK", "0") == "0":  # all processes of a distributed run fail alike
            print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch or Python means that memory ran out, on whatever device."""
    signs = ("out of memory", "can't allocate memory", "not enough memory")
    said = isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
    return said or isinstance(error, (torch.OutOfMemoryError, MemoryError))


# --- devices and time ---


def choose_device(name: str, index: int | None = None) -> torch.device:
    """Return the device called `auto`, `cuda`, `cuda:1`, `mps` or `cpu`; `auto` prefers cuda to mps, and mps to cpu.

    `index` is the number of the CUDA device if the name has none, for runs of several processes.
    """
    here = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    kind, _, number = name.partition(":")
    if kind == "auto":
        kind = next(kind for kind, devices in here.items() if devices)
    if kind not in here or not (number or "0").isdecimal():
        raise BenchmarkError(f"unknown device {name!r}: choose auto, cuda, mps or cpu")
    chosen = int(number or 0)
    if kind == "cuda" and not number and index is not None:
        chosen = index
    if chosen >= here[kind]:
        raise BenchmarkError(f"--device {name}: torch {torch.__version__} sees {here[kind]} such devices here")
    if kind != "cuda":
        return torch.device(kind)
    torch.cuda.set_device(chosen)
    return torch.device(kind, chosen)


def set_up(args: argparse.Namespace, index: int | None = None) -> tuple[torch.device, torch.dtype]:
    """Return the device and dtype of the options, make the folder of `--output`, and switch `--sdpa-backend`."""
    output_folder(args.output)
    device = choose_device(args.device, index)
    if getattr(args, "profile", False) and device.type != "cuda":
        raise BenchmarkError(f"--profile is for CUDA, but the device is {device.type}")
    fill_in(args, dtype="bfloat16" if device.type == "cuda" else "float32")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    args.sdpa_enabled = choose_sdpa(args.sdpa_backend)
    return device, DTYPES[args.dtype]


def choose_sdpa(name: str) -> dict[str, bool]:
    """Switch torch's attention backends for this process, and return which are on.

    `auto` changes nothing, `no-cudnn` switches off cuDNN, and any other name switches off all others.
    """
    for backend in BACKENDS if name != "auto" else ():
        on = backend != "cudnn" if name == "no-cudnn" else backend.endswith(name)
        getattr(torch.backends.cuda, f"enable_{backend}_sdp")(on)
    return {backend: bool(getattr(torch.backends.cuda, f"{backend}_sdp_enabled")()) for backend in BACKENDS}


def synchronize(device: torch.device) -> str:
    """Wait until the device has finished all work, and return the name of the function that waited."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return "torch.cuda.synchronize"
    if device.type == "mps":
        torch.mps.synchronize()
        return "torch.mps.synchronize"
    return "none: the CPU runs in order"


@dataclass(frozen=True)
class Clock:
    """Wall time at moments when the device is idle: `start = clock.now(); ...; seconds = clock.now() - start`."""

    device: torch.device

    def now(self) -> float:
        """Synchronise the device and return the time in seconds, from an arbitrary origin."""
        synchronize(self.device)
        return time.perf_counter()


def timed_steps(step: Callable[[], Any], steps: int, clock: Clock) -> list[float]:
    """Return the time of each step in ms. The device is synchronised before and after every step."""
    times = []
    for _ in range(steps):
        start = clock.now()
        step()
        times.append(1e3 * (clock.now() - start))
    return times


def unsynchronized_step_ms(step: Callable[[], Any], steps: int, clock: Clock) -> float:
    """Return the mean time of a step in ms. The device is synchronised before the first step and after the last."""
    start = clock.now()
    for _ in range(steps):
        step()
    return 1e3 * (clock.now() - start) / steps


def gpu_times(step: Callable[[], Any], steps: int, clock: Clock, queue_ms: float) -> list[float]:
    """Return the GPU's own work for a step, in ms, `steps` times. Each step is launched while the GPU is still spinning.

    The GPU spins for `queue_ms`, and twice as long after each launch that outlasted the spinning. A step that itself
    waits for the GPU cannot be queued: then fewer times are returned than `steps`, or none.
    """
    times: list[float] = []
    misses = 0
    while len(times) < steps and misses < MAX_MISSES:
        clock.now()
        torch.cuda._sleep(int(queue_ms * SPIN_CYCLES_PER_MS))
        work, launching, waiting = event_ms(step, clock)
        # A queue holds about 1,000 kernels, so the last ones of a longer step are launched while the GPU already works.
        # If the CPU then waits for more than half of the work, the GPU never waited for the CPU.
        if launching < queue_ms or waiting > work / 2:
            times.append(work)
        else:
            queue_ms, misses = 2 * queue_ms, misses + 1
    return times


def event_ms(step: Callable[[], Any], clock: Clock) -> tuple[float, float, float]:
    """Return three times in ms: of a step between two CUDA events, of launching it, and of waiting for its end."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before = time.perf_counter()
    start.record()
    step()
    end.record()
    launched = time.perf_counter()
    waited = clock.now()
    return start.elapsed_time(end), 1e3 * (launched - before), 1e3 * (waited - launched)


def kernel_times(work: Callable[[], Any], clock: Clock) -> dict[str, tuple[int, float]]:
    """Return for each kernel how often it runs in `work`, and its total ms, by torch.profiler."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        work()
        clock.now()
    events = [event for event in profiler.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA]
    kernels = [event for event in events if not event.is_user_annotation]
    return {kernel.key: (kernel.count, kernel.self_device_time_total / 1e3) for kernel in kernels}


def kernel_sums(kernels: dict[str, tuple[float, float]]) -> dict[str, float]:
    """Return the ms of each of `KERNEL_KINDS`, the ms of `all` kernels, and the number of `kernels`.

    Takes for each kernel how often it ran, and its total ms.
    """
    sums = dict.fromkeys(KERNEL_KINDS, 0.0)
    for name, (_, ms) in kernels.items():
        sums[next(kind for kind, sign in KERNEL_KINDS.items() if re.search(sign, name, re.IGNORECASE))] += ms
    return sums | {"all": sum(sums.values()), "kernels": sum(times for times, _ in kernels.values())}


def attention_of(step: Callable[[], Any]) -> str:
    """Return which attention an eager step runs, by its operators: profiling CUDA would slow down later steps."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    return attention_kernel({event.name for event in profiler.events()})


def attention_kernel(names: Iterable[str]) -> str:
    """Return which attention backend the names of kernels or operators belong to."""
    every = "\n".join(names).lower()
    return next((backend for word, backend in ATTENTION.items() if word in every), "unknown")


@contextlib.contextmanager
def garbage_collector_off() -> Iterator[None]:
    """Collect garbage, and switch the collector off for the `with` block."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


# A progress bar on stderr that leaves no line behind when closed.
progress_bar = functools.partial(tqdm, unit=" tokens", unit_scale=True, leave=False, mininterval=0.5)


def machine_rates(device: torch.device) -> dict[str, float]:
    """Return the bytes per second that a large copy reads and writes, and the share of the CPU that other programs use."""
    source = torch.ones((2**30 if device.type != "cpu" else 2**27) // 4, device=device)
    target = torch.empty_like(source)
    best_ms = min(timed_steps(lambda: target.copy_(source), 10, Clock(device))[2:])
    others = float(psutil.cpu_percent(0.5)) / 100  # this process sleeps meanwhile
    return {"copy_bytes_per_s": 2e3 * source.nbytes / best_ms, "cpu_share_of_others": others}


# --- memory ---


def cache_bytes(cache: Cache | None) -> int:
    """Return the bytes of a cache's tensors: of all allocated slots, used or not."""
    if cache is None:
        return 0
    if isinstance(cache, SinkWindowCache):
        return cache.nbytes
    tensors = (getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values"))
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor))


class PeakMemory:
    """A context that measures memory on CUDA: afterwards `bytes` is the peak minus what was in use before.

    `bytes` is None on other devices: their allocators keep no peak, and sampling would disturb the times of steps.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes: int | None = None

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.max_memory_allocated(self.device)
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self.before


# --- statistics ---


def summary(values: Sequence[float]) -> dict[str, float]:
    """Return `median`, `mean`, `std`, `p5` and `p95` of raw numbers, in their unit."""
    p5, median, p95 = (float(q) for q in np.percentile(values, (5, 50, 95)))
    std = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return {"median": median, "mean": float(np.mean(values)), "std": std, "p5": p5, "p95": p95}


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95% bootstrap interval of the median of independent numbers. Equal numbers give equal intervals."""
    if len(values) < 2:
        return values[0], values[0]
    rng = np.random.default_rng(0)
    found = bootstrap((values,), np.median, n_resamples=RESAMPLES, method="percentile", rng=rng).confidence_interval
    return float(found.low), float(found.high)


def percentile_spread(numbers: dict[str, float]) -> float:
    """Return (p95 - p5) / median of a `summary`. A few outliers do not change it."""
    return (numbers["p95"] - numbers["p5"]) / numbers["median"]


def spread_warning(values: Sequence[float]) -> str:
    """Return in words that measurements are too far apart for a conclusion, or an empty string."""
    numbers = summary(values)
    std, percentiles = numbers["std"] / numbers["mean"], percentile_spread(numbers)
    wide = std > WIDEST_STD or percentiles > WIDEST_PERCENTILES
    return f"spread too wide: std / mean {std:.0%}, (p95 - p5) / median {percentiles:.0%}" if wide else ""


def ratio_of_rounds(above: Sequence[Sequence[float]], below: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Compare two arms that took turns, given the raw numbers of each turn.

    Each round has a ratio: of the medians of its two turns. A machine that is slow for longer than a round slows down
    both turns, and its slowness cancels. Returns `value`, the median of these ratios; `low` and `high`, its 95% interval
    over resampled rounds; and `note`, in words what cannot be concluded, or an empty string. Nothing can be concluded
    from an interval that is too wide, nor from turns whose steps are too far apart.
    """
    of_rounds = [float(np.median(turn) / np.median(other)) for turn, other in zip(above, below, strict=True)]
    value = float(np.median(of_rounds))
    low, high = median_interval(of_rounds)
    disturbed = False
    for turns in (above, below):
        steps_over_median = [step / float(np.median(turn)) for turn in turns for step in turn]
        disturbed |= percentile_spread(summary(steps_over_median)) > WIDEST_PERCENTILES
    note = "no difference can be told" if low <= 1 <= high else ""
    if len(of_rounds) < FEWEST_ROUNDS:
        note = f"{NO_CONCLUSION}{len(of_rounds)} round(s) are too few for an interval"
    elif disturbed or (high - low) / value > WIDEST_INTERVAL:
        note = TOO_WIDE
    return {"value": value, "low": low, "high": high, "note": note}


# --- result files ---


class Result:
    """A result file that grows: what was run where, and `rows`. Ctrl-C keeps the rows so far, marked `interrupted`.

    `what` are words for the name of the file. `more` are further entries of the file.
    """

    def __init__(self, harness: str, model: Any, args: Any, argv: Any, what: Sequence[str] = (), **more: Any) -> None:
        device, dtype = model.model.device, str(model.model.dtype).removeprefix("torch.")
        elsewhere = ("output", "name", "device", "dtype", "module")  # options that `protocol` leaves out
        words = " ".join([harness, model.name, *what, device.type, dtype]).lower()
        stem = args.name or re.sub(r"[^a-z0-9.]+", "-", words).strip("-")
        self.path = output_folder(args.output) / f"{stem}.json"
        self.swapped = psutil.swap_memory().used
        given = sys.argv[1:] if argv is None else argv
        self.rows: list[dict[str, Any]] = []
        self.data = {
            "schema": SCHEMA,
            "schema_version": SCHEMA_VERSION,
            "harness": harness,
            "command": shlex.join(["python", "-m", f"benchmarks.{args.module}", *map(portable, given)]),
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "commit": commit(),
            "versions": versions(),
            "device": describe_device(device),
            "synchronization": synchronize(device),
            "dtype": dtype,
            "threads": torch.get_num_threads(),
            "model": model.description,
            "protocol": {name: portable(value) for name, value in vars(args).items() if name not in elsewhere},
            "interrupted": False,
            "swapped_bytes": 0,
            **more,
            "rows": self.rows,
        }

    def keep(self) -> None:
        """Write the file with the rows so far."""
        self.data["swapped_bytes"] = max(0, psutil.swap_memory().used - self.swapped)
        write_json(self.path, self.data)

    def __enter__(self) -> Result:
        model, device = self.data["model"], self.data["device"]
        print(f"{self.data['harness']}: {model['name']}, {self.data['dtype']}, {device['name']}", flush=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.data["interrupted"] = kind is not None
        if self.rows:
            self.keep()
            print(f"wrote {self.path}")
        if self.data["swapped_bytes"] > 64 * MIB:
            print(f"the machine swapped {self.data['swapped_bytes'] / MIB:,.0f} MiB meanwhile: do not trust the times")
        torch.compiler.reset()  # frees the graphs of this model
        gc.collect()
        if self.data["device"]["type"] == "cuda":
            torch.cuda.empty_cache()
        if kind is None and all(row["reason"] for row in self.rows):
            raise BenchmarkError(f"nothing could be measured: {self.rows[0]['reason']}")


def portable(argument: Any) -> Any:
    """Return an argument without this machine's folders: of an absolute path the part below here, or only the name."""
    option, equals, value = argument.rpartition("=") if isinstance(argument, str) else ("", "", "")
    path = Path(value)
    if not path.is_absolute():
        return argument
    shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path.name
    return f"{option}{equals}{shown}"


def describe_device(device: torch.device) -> dict[str, Any]:
    """Return type, name and memory of a device, and the version of the software that drives it."""
    described = {"type": device.type, "platform": platform.platform(terse=True)}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        described |= {"name": properties.name, "memory_bytes": properties.total_memory}
        return described | {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    name = found[1].strip() if found else platform.processor() or platform.machine()
    return described | {"name": name, "memory_bytes": psutil.virtual_memory().total}


def versions() -> dict[str, str | None]:
    """Return the versions of Python and of `PACKAGES`, None where a package is not installed."""
    # Of two installed versions `import` takes the first. A dictionary keeps the last, so the order is reversed.
    found = {package.metadata["Name"].lower(): package.version for package in reversed([*distributions()])}
    return {"python": platform.python_version(), **{name: found.get(name) for name in PACKAGES}}


def commit() -> str | None:
    """Return the commit of this checkout, ending in "-dirty" if files were changed since."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        return subprocess.run(git, capture_output=True, text=True, timeout=10).stdout.strip() or None
    return None


def output_folder(path: str | Path) -> Path:
    """Return the folder for results; make it if need be."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BenchmarkError(f"cannot make the folder {folder} for the results: {error.strerror}") from None
    if not os.access(folder, os.W_OK):
        raise BenchmarkError(f"cannot write results into the folder {folder}")
    return folder


def write_json(path: Path, result: dict[str, Any]) -> None:
    """Write a result file in one rename, so that a reader never sees half of it and an interruption loses nothing."""
    text = json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False)
    # A list of numbers goes on one line. JSON strings have no line ends, so none of them is touched.
    text = re.sub(r"\[\n([-+.e\d,\s]+)\]", lambda found: f"[{' '.join(found[1].split())}]", text)
    unfinished = path.with_name(f"{path.name}.tmp")
    unfinished.write_text(text + "\n", encoding="utf-8")
    unfinished.replace(path)


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a result file of this version."""
    try:
        result = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BenchmarkError(f"cannot read the result file {path}: {error}") from None
    if not isinstance(result, dict) or result.get("schema") != SCHEMA or result.get("schema_version") != SCHEMA_VERSION:
        raise BenchmarkError(f"{path} is not a result file of {SCHEMA} version {SCHEMA_VERSION}")
    return result


# --- tables ---


def figure(value: Any, doubtful: object = "") -> str:
    """Return a float with three significant digits, and a question mark if it is doubtful; a missing value as a dash."""
    if pd.isna(value):
        return "–"
    if isinstance(value, (str, bool, np.bool_)):
        return str(value)
    if isinstance(value, (int, np.integer)):
        return f"{value:,}"
    digits_before_point = len(str(int(abs(value)))) if abs(value) >= 1 else 0
    return f"{value:,.{max(0, 3 - digits_before_point)}f}{' ?' if doubtful else ''}"


def table(rows: Any, columns: Sequence[str] = (), hidden: Sequence[str] = (), **more: Any) -> str:
    """Return rows, or some `columns` of them, as a Markdown table of figures; `more` are columns to add, with values.

    Bytes are shown in MiB. Columns without any value, and columns of lists, are left out.
    """
    frame = rows if isinstance(rows, pd.DataFrame) else pd.json_normalize(rows)
    shown = [name for name in columns or frame if name in frame and name not in hidden]
    frame = frame[shown].assign(**more)
    for name in [name for name in frame if name.endswith("_bytes")]:
        frame[name] = frame[name].astype(float) / MIB
        frame = frame.rename(columns={name: f"{name.removesuffix('_bytes')}, MiB"})
    frame = frame.astype(object).replace("", None).dropna(axis=1, how="all")
    frame = frame.loc[:, ~frame.map(lambda value: isinstance(value, list)).any()]
    return str(frame.map(figure).to_markdown(index=False, disable_numparse=True)) if len(frame) else ""
