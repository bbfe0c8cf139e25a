"""What the harnesses share: devices, time, memory, statistics, the header of a result file, and errors for users.

A result file is one JSON object. Its header is the same for every harness (`header`): `schema` and `schema_version`,
`harness`, `title`, `command`, `date`, `commit`, `versions`, `device`, `synchronization`, `dtype`, `threads`, and what
the harness adds, such as `model` and `data`. The measurements are under `rows`, one object per row. A number that does
not exist is `null`, with the reason in words beside it; NaN and infinity are never written.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import datetime
import gc
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import numpy as np
import psutil  # type: ignore[import-untyped]
import torch
import transformers
from huggingface_hub.errors import (
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm
from transformers import Cache

from sink_cache import SinkWindowCache

SCHEMA = "sink_cache.benchmarks"
SCHEMA_VERSION = 1
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PACKAGES = ("torch", "transformers", "accelerate", "datasets", "evaluate", "numpy", "sink-cache")
MIB = 2**20
SDPA_CHOICES = ("auto", "flash", "efficient", "math", "cudnn", "no-cudnn")
SPIN_CYCLES_PER_MS = 2_000_000  # of the fastest GPUs
MAX_MISSES = 4
# Beyond these spreads nothing is concluded; an earlier study's ± 43% is one of them.
WIDEST_STD, WIDEST_PERCENTILES, WIDEST_INTERVAL = 0.2, 0.5, 0.2
FEWEST_ROUNDS = 5  # for an interval that is made by resampling them: of four it would hold 88% instead of 95%
BUSY_CPU = 0.25  # from this share on that other programs use, results say so
RESAMPLES = 2000
NO_CONCLUSION = "no conclusion: "
TOO_WIDE = f"{NO_CONCLUSION}the spread is too wide"


# --- errors ----------------------------------------------------------------------------------------------------------


class BenchmarkError(Exception):
    """Something that the user can mend; the message is one sentence that says what and how."""


class Parser(argparse.ArgumentParser):
    """An argument parser that shows the module's docstring as its manual and answers bad input with one sentence."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Raise the message as a `BenchmarkError`."""
        raise BenchmarkError(f"{message} (--help lists all options)")


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


def hub_error(what: str, error: BaseException) -> BenchmarkError:
    """Say in one sentence why something could not be loaded by its id on the hub, or from its folder.

    Args:
        what (`str`): such as "the model gpt2".
        error: what `transformers` or `datasets` raised.
    """
    chain, cause = [error], error.__cause__ or error.__context__
    while cause is not None:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    if any(isinstance(e, RepositoryNotFoundError) for e in chain):
        return BenchmarkError(f"there is no such thing on the hub as {what}, or it is private")
    if any(isinstance(e, (LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError)) for e in chain):
        return BenchmarkError(
            f"cannot load {what}, because the hub cannot be reached and it is not in the local cache: use --offline, "
            "or a local folder for --model and a local file for --text-file"
        )
    if any(isinstance(e, HFValidationError) for e in chain):
        return BenchmarkError(f"cannot load {what}: there is no such folder, and it cannot be an id on the hub")
    return BenchmarkError(f"cannot load {what}: {' '.join(str(error).split())[:300] or type(error).__name__}")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch or Python means that memory ran out, on whatever device."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(
        sign in str(error) for sign in ("out of memory", "can't allocate memory", "not enough memory")
    )


# --- devices and time ------------------------------------------------------------------------------------------------


def choose_device(name: str, index: int | None = None) -> torch.device:
    """Return the device called `auto`, `cuda`, `cuda:1`, `mps` or `cpu`; auto takes the first of these that is there.

    Args:
        name (`str`): as the user wrote it.
        index (`int`, *optional*): which CUDA device `cuda` and `auto` mean, for runs of several processes.

    Raises:
        BenchmarkError: there is no such device.
    """
    has_cuda, has_mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if has_cuda else "mps" if has_mps else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cuda", "mps", "cpu"):
        raise BenchmarkError(f"unknown device {name!r}: choose auto, cuda, mps or cpu")
    if device.type == "cuda" and not has_cuda:
        raise BenchmarkError(f"--device {name} was asked for, but torch {torch.__version__} sees no CUDA GPU here")
    if device.type == "mps" and not has_mps:
        raise BenchmarkError(
            f"--device {name} was asked for, but torch {torch.__version__} sees no MPS (Apple GPU) here"
        )
    if device.type == "cuda":
        chosen = next(i for i in (device.index, index, torch.cuda.current_device()) if i is not None)
        if chosen >= torch.cuda.device_count():
            raise BenchmarkError(
                f"cuda:{chosen} was asked for, but there are {torch.cuda.device_count()} CUDA GPUs here"
            )
        device = torch.device("cuda", chosen)
        torch.cuda.set_device(device)
    return device


def parse_dtype(name: str) -> torch.dtype:
    """Return the torch dtype called `name`.

    Raises:
        BenchmarkError: there is no such dtype among `DTYPES`.
    """
    if name not in DTYPES:
        raise BenchmarkError(f"unknown dtype {name!r}: choose {', '.join(DTYPES)}")
    return DTYPES[name]


def set_up(args: argparse.Namespace) -> tuple[Path, torch.device, torch.dtype, dict[str, bool]]:
    """Return what `--output`, `--device`, `--dtype` (bfloat16 on CUDA, else float32) and `--sdpa-backend` ask for.

    Raises:
        BenchmarkError: one of them is not possible here.
    """
    folder, device = output_folder(args.output), choose_device(args.device)
    dtype = parse_dtype(args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    transformers.utils.logging.set_verbosity_error()
    return folder, device, dtype, choose_sdpa(args.sdpa_backend)


def synchronize(device: torch.device) -> str:
    """Wait until the device has done everything that it was given, and return how that was done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return "torch.cuda.synchronize"
    if device.type == "mps":
        torch.mps.synchronize()
        return "torch.mps.synchronize"
    return "none: the CPU runs in order"


class Clock:
    """Wall time at moments when the device is idle: `start = clock.now(); ...; seconds = clock.now() - start`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.synchronization = synchronize(device)

    def now(self) -> float:
        """Synchronise the device and return the time in seconds, from an arbitrary origin."""
        synchronize(self.device)
        return time.perf_counter()


def timed_steps(step: Callable[[], Any], steps: int, clock: Clock) -> list[float]:
    """Return the time of each step in ms, the device being synchronised before and after every one."""
    times = []
    for _ in range(steps):
        start = clock.now()
        step()
        times.append(1e3 * (clock.now() - start))
    return times


def unsynchronized_step_ms(step: Callable[[], Any], steps: int, clock: Clock) -> float:
    """Return the time of a step in ms when the device is synchronised only before the first and after the last."""
    start = clock.now()
    for _ in range(steps):
        step()
    return 1e3 * (clock.now() - start) / steps


def event_ms(step: Callable[[], Any], clock: Clock) -> float:
    """Return the time of a step in ms by CUDA events. Around a launch-bound step they see the launches, too."""
    clock.now()
    return _event_ms(step, clock)[0]


def gpu_times(step: Callable[[], Any], steps: int, clock: Clock, queue_ms: float) -> list[float]:
    """Return times in ms that the GPU itself works for a step, which is launched while the GPU is still spinning.

    Args:
        queue_ms (`float`): how long it spins at first; longer, when the CPU has needed more than that to launch a step.

    Returns:
        `list[float]`: for `steps` steps; fewer or none of steps that wait for the GPU, as these cannot be queued.
    """
    times: list[float] = []
    misses = 0
    while len(times) < steps and misses < MAX_MISSES:
        clock.now()
        torch.cuda._sleep(int(queue_ms * SPIN_CYCLES_PER_MS))
        work, launching, waiting = _event_ms(step, clock)
        # A step of more kernels than a queue holds (about 1,000) is launched to the end while the GPU is at work already. It
        # has not waited for the CPU, which is slower, if that was far ahead at the end.
        if launching < queue_ms or waiting > work / 2:
            times.append(work)
        else:
            queue_ms, misses = 2 * queue_ms, misses + 1
    return times


def _event_ms(step: Callable[[], Any], clock: Clock) -> tuple[float, float, float]:
    """Return in ms the time of a step by CUDA events, and by the clock that of launching it and that of waiting then."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before = time.perf_counter()
    start.record()
    step()
    end.record()
    launched = time.perf_counter()
    waited = clock.now()
    return start.elapsed_time(end), 1e3 * (launched - before), 1e3 * (waited - launched)


def kernel_times(work: Callable[[], Any], clock: Clock) -> dict[str, tuple[int, float]]:
    """Return for each kernel that runs in `work` how often, and for how many ms in all, by torch.profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        work()
        clock.now()
    found: dict[str, tuple[int, float]] = {}
    for one in profiler.events():
        if one.device_type == torch.autograd.DeviceType.CUDA and not one.is_user_annotation:
            times, ms = found.get(one.name, (0, 0.0))
            found[one.name] = times + 1, ms + one.time_range.elapsed_us() / 1e3
    return found


@contextlib.contextmanager
def garbage_collector_off() -> Iterator[None]:
    """Within, Python does not stop to look for garbage; it is collected before."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def progress_bar(total: int, description: str, unit: str = " tokens", *, disable: bool = False) -> tqdm[NoReturn]:
    """Return a progress bar on stderr that shows units per second and leaves no line behind when closed."""
    return tqdm(
        total=total, desc=description, unit=unit, unit_scale=True, leave=False, disable=disable, mininterval=0.5
    )


def no_progress_bar() -> tqdm[NoReturn]:
    """Return a progress bar that shows nothing."""
    return tqdm(disable=True)


class Hardware:
    """What a device can do at most, measured: nothing on it is faster than these rates allow."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.large = device.type != "cpu"

    def copy_bytes_per_s(self) -> float:
        """Return bytes read and written per second when a large tensor is copied."""
        source = torch.ones((2**30 if self.large else 2**27) // 4, device=self.device)
        target = torch.empty_like(source)
        return 2 * source.nbytes / self._best_seconds(lambda: target.copy_(source))

    def matrix_flops_per_s(self) -> float:
        """Return floating-point operations per second of a large matrix product."""
        size = 8192 if self.large else 1024
        left, right = (torch.randn(size, size, device=self.device, dtype=self.dtype) for _ in range(2))
        return 2 * size**3 / self._best_seconds(lambda: left @ right)

    def _best_seconds(self, work: Callable[[], Any]) -> float:
        clock, times = Clock(self.device), []
        for _ in range(10):
            start = clock.now()
            work()
            times.append(clock.now() - start)
        return min(times[2:])


# --- attention -------------------------------------------------------------------------------------------------------


def choose_sdpa(name: str) -> dict[str, bool]:
    """Switch torch's attention backends for this process, and return which are on.

    Args:
        name (`str`): `auto` changes nothing, `no-cudnn` leaves out one, any other of `SDPA_CHOICES` is the only one left.
    """
    on = {}
    for backend in ("flash", "mem_efficient", "math", "cudnn"):
        if name != "auto":
            enable = getattr(torch.backends.cuda, f"enable_{backend}_sdp")
            enable(backend != "cudnn" if name == "no-cudnn" else backend.endswith(name))
        on[backend] = bool(getattr(torch.backends.cuda, f"{backend}_sdp_enabled")())
    return on


def attention_kernel(names: Collection[str]) -> str:
    """Return which attention kernel is among the names of kernels or operators."""
    # In this order: the kernels of cuDNN call themselves flash, too.
    signs = {
        "cudnn": "cudnn",
        "flash": "flash",
        "fmha": "efficient",
        "efficient_attention": "efficient",
        "softmax": "math",
    }
    return next((kernel for sign, kernel in signs.items() if any(sign in name.lower() for name in names)), "unknown")


class Operators(TorchDispatchMode):
    """A context that notes the names of all operators that run within."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


# --- memory ----------------------------------------------------------------------------------------------------------


def cache_bytes(cache: Cache | None) -> int:
    """Return the bytes of the keys and values that a cache holds (of the allocated slots, not the used ones)."""
    if cache is None:
        return 0
    if isinstance(cache, SinkWindowCache):
        return cache.nbytes
    tensors = (getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values"))
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor))


def weight_bytes(model: torch.nn.Module) -> int:
    """Return the bytes of a model's parameters, tied ones counted once."""
    return sum(parameter.nbytes for parameter in model.parameters())


class PeakMemory:
    """A context that measures by how much memory in use grew at most, over what was in use when it was entered.

    On CUDA this is the allocator's own high-water mark. MPS and the CPU keep none that can be reset, so a thread reads
    what tensors take (MPS) or the resident size of this process (CPU) every few milliseconds: leave it out of
    passes whose single steps are timed.

    Attributes:
        bytes (`int`): the growth, after the context was left.
        method (`str`): where the number came from.
        swapped_bytes (`int`): by how much the machine's use of swap space grew meanwhile.
    """

    INTERVAL_S = 0.02

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes = self.swapped_bytes = 0
        self._before = self._peak = self._swap_before = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.method = {
            "cuda": "torch.cuda.max_memory_allocated",
            "mps": "torch.mps.current_allocated_memory, sampled",
            "cpu": "resident size of the process, sampled",
        }[device.type]

    def _in_use(self) -> int:
        if self.device.type == "mps":
            return torch.mps.current_allocated_memory()
        return int(psutil.Process().memory_info().rss)

    def _sample(self) -> None:
        while not self._stop.wait(self.INTERVAL_S):
            self._peak = max(self._peak, self._in_use())

    def __enter__(self) -> PeakMemory:
        _return_freed_memory()
        self._swap_before = psutil.swap_memory().used
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        else:
            self._before = self._peak = self._in_use()
            self._stop.clear()
            self._thread = threading.Thread(target=self._sample, daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._thread is None:
            self._peak = torch.cuda.max_memory_allocated(self.device)
        else:
            self._stop.set()
            self._thread.join()
            self._peak = max(self._peak, self._in_use())
        self.bytes = max(0, self._peak - self._before)
        self.swapped_bytes = max(0, psutil.swap_memory().used - self._swap_before)


def _return_freed_memory() -> None:
    # The C library keeps freed memory for itself; used again, it would not show as growth of the process.
    with contextlib.suppress(AttributeError, OSError, TypeError):  # only glibc has this
        ctypes.CDLL(None).malloc_trim(0)


def cpu_share_of_others(seconds: float = 0.5) -> float:
    """Return which share of all CPU cores other programs use, while this one sleeps."""
    return float(psutil.cpu_percent(seconds)) / 100


def busy_cpu(share_of_others: float) -> str:
    """Return in words whether other programs use so much of the CPU that times say little, or an empty string."""
    if share_of_others < BUSY_CPU:
        return ""
    return (
        f"other programs used {share_of_others:.0%} of the CPU when this began: they slow down some arms more than others, so "
        "that ratios are not to be trusted either"
    )


def memory_pressure(swapped_bytes: int) -> str:
    """Return in words whether the machine swapped so much or is nearly out of memory, or an empty string."""
    available = psutil.virtual_memory().available
    if swapped_bytes > 64 * MIB:
        return f"the machine swapped {swapped_bytes / MIB:,.0f} MiB meanwhile: do not trust the times"
    if available < psutil.virtual_memory().total * 0.03:
        return f"only {available / MIB:,.0f} MiB of memory were left"
    return ""


# --- statistics ------------------------------------------------------------------------------------------------------


def summary(values: Sequence[float]) -> dict[str, float]:
    """Return `n`, `median`, `mean`, `std`, `p5`, `p95`, `min` and `max` of raw numbers, in their unit."""
    array = np.asarray(values, dtype=np.float64)
    p5, median, p95 = (float(q) for q in np.percentile(array, (5, 50, 95)))
    return {
        "n": len(array),
        "median": median,
        "mean": float(array.mean()),
        "std": float(array.std(ddof=1)) if len(array) > 1 else 0.0,
        "p5": p5,
        "p95": p95,
        "min": float(array.min()),
        "max": float(array.max()),
    }


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95% percentile bootstrap interval of the median of independent numbers, the same at every call."""
    array, generator = np.asarray(values, dtype=np.float64), np.random.default_rng(0)
    medians = np.median(array[generator.integers(len(array), size=(RESAMPLES, len(array)))], axis=1)
    low, high = np.quantile(medians, (0.025, 0.975))
    return float(low), float(high)


def percentile_spread(numbers: dict[str, float]) -> float:
    """Return (p95 - p5) / median of a `summary`, which a few numbers far away do not change."""
    return (numbers["p95"] - numbers["p5"]) / numbers["median"]


def spread_warning(values: Sequence[float]) -> str:
    """Return in words that measurements are too far apart to conclude anything from them, or an empty string."""
    numbers = summary(values)
    spreads = {
        "std / mean": (numbers["std"] / numbers["mean"], WIDEST_STD),
        "(p95 - p5) / median": (percentile_spread(numbers), WIDEST_PERCENTILES),
    }
    wide = [f"{what} is {spread:.0%}" for what, (spread, widest) in spreads.items() if spread > widest]
    return f"the spread is too wide to conclude from this median ({', '.join(wide)})" if wide else ""


def ratio_of_rounds(above: Sequence[Sequence[float]], below: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Compare two arms that took turns.

    Each round is a pair: the ratio of the medians of its two turns. What slows down the machine for longer than a round
    is in both and cancels, as it does not in the medians of all steps.

    Args:
        above, below: for each round, the raw numbers of that arm's turn.

    Returns:
        `value`, the median of the rounds' ratios; `low` and `high`, its 95% interval when rounds are resampled; `note`, in
        words what cannot be concluded, or an empty string: nothing if that interval is too wide, or the steps of turns (if
        there are several) are too far apart for their median to mean anything.
    """
    of_rounds = [float(np.median(turn) / np.median(other)) for turn, other in zip(above, below, strict=True)]
    value = float(np.median(of_rounds))
    low, high = median_interval(of_rounds)
    within_turns = [[number / float(np.median(turn)) for turn in side for number in turn] for side in (above, below)]
    disturbed = any(percentile_spread(summary(numbers)) > WIDEST_PERCENTILES for numbers in within_turns)
    note = ""
    if len(of_rounds) < FEWEST_ROUNDS:
        note = f"{NO_CONCLUSION}{len(of_rounds)} round(s) are too few for an interval"
    elif disturbed or (high - low) / value > WIDEST_INTERVAL:
        note = TOO_WIDE
    elif low <= 1 <= high:
        note = "no difference can be told"
    return {"value": value, "low": low, "high": high, "note": note}


def is_inconclusive(ratio: dict[str, Any]) -> bool:
    """Whether nothing can be concluded from a ratio of a result file; its note says why."""
    note: str = ratio["note"]
    return note.startswith(NO_CONCLUSION)


# --- result files ----------------------------------------------------------------------------------------------------


def header(
    harness: str,
    title: str,
    device: torch.device,
    dtype: torch.dtype,
    *,
    argv: Sequence[str] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Return the part of a result file that says what was run where; see the module docstring.

    Args:
        harness (`str`): the module's name, such as `ppl`.
        title (`str`): one line for tables and plots: model, text, and what a reader must not overlook.
        argv: the arguments that the harness got, by default those of this process.
        more: what the harness adds, such as `model` and `data`.
    """
    return {
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "harness": harness,
        "title": title,
        "command": command_line(harness, sys.argv[1:] if argv is None else argv),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "device": describe_device(device),
        "synchronization": synchronize(device),
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        **more,
    }


def command_line(harness: str, argv: Sequence[str]) -> str:
    """Return the command as others can type it: absolute paths are cut to what does not depend on this machine."""
    return " ".join(["python -m benchmarks." + harness, *(_portable(argument) for argument in argv)])


def _portable(argument: str) -> str:
    option, equals, value = argument.rpartition("=")
    path = Path(value)
    if not path.is_absolute():
        return argument
    value = str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else path.name
    return option + equals + value


def describe_device(device: torch.device) -> dict[str, Any]:
    """Return type, name and memory of a device, and the version of the software that drives it."""
    described: dict[str, Any] = {"type": device.type, "platform": platform.platform(terse=True)}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        described |= {"name": properties.name, "memory_bytes": properties.total_memory, "cuda": torch.version.cuda}
        described["cudnn"] = torch.backends.cudnn.version()
    else:
        described |= {"name": _processor(), "memory_bytes": psutil.virtual_memory().total}
    return described


def device_name(device: torch.device) -> str:
    """Return what a device is called in titles, such as `NVIDIA H100 80GB HBM3` or `AMD EPYC, 2 threads`."""
    name: str = describe_device(device)["name"]
    threads = torch.get_num_threads()
    return name if device.type == "cuda" else f"{name}, {threads} thread{'s' if threads > 1 else ''}"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(git, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def output_folder(path: str | Path) -> Path:
    """Return the folder for results, made if need be.

    Raises:
        BenchmarkError: it cannot be made or written to.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BenchmarkError(f"cannot make the folder {folder} for the results: {error.strerror}") from None
    if not os.access(folder, os.W_OK):
        raise BenchmarkError(f"cannot write results into the folder {folder}")
    return folder


def file_stem(*parts: str) -> str:
    """Return a file name, without its ending, made of words: `ppl-pythia-70m-random-weights-…`."""
    return re.sub(r"[^a-z0-9.]+", "-", " ".join(parts).lower()).strip("-")


def write_json(path: Path, result: dict[str, Any]) -> None:
    """Write a result file in one rename, so that a reader never sees half of it and an interruption loses nothing."""
    text = json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False)
    # Raw numbers on one line; strings have no line ends in JSON.
    text = re.sub(r"\[\n([-+.e\d,\s]+)\]", lambda found: f"[{' '.join(found[1].split())}]", text)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False, encoding="utf-8") as temporary:
        temporary.write(text + "\n")
    # A temporary file is private to its owner; a result is for everybody.
    os.chmod(temporary.name, 0o644)
    os.replace(temporary.name, path)


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a result file.

    Raises:
        BenchmarkError: it is not there, or not a result file of this schema.
    """
    try:
        result = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BenchmarkError(f"cannot read the result file {path}: {error}") from None
    if not isinstance(result, dict) or (result.get("schema"), result.get("schema_version")) != (SCHEMA, SCHEMA_VERSION):
        raise BenchmarkError(f"{path} is not a result file of {SCHEMA} version {SCHEMA_VERSION}")
    return result
