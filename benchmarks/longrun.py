"""Long runs with one cache: does anything grow, slow down, or get worse, however long the text?

    python -m benchmarks.longrun --random-weights llama-tiny --tokens 1000000       # generate: one endless call
    python -m benchmarks.longrun --offline --passes 10 --tokens 100000              # read: a text, again and again
    python -m benchmarks.longrun --random-weights llama-tiny --until-the-end        # count: positions up to the last one

Generate. One call of `generate(custom_generate=sink_cache.endless)`, greedy, after a prompt of the cache's capacity.

Read (`--passes`). The first `--tokens` of a text (`--text-file`, or else the help topics of Python) go through the model in
chunks that are exact (`sink_cache.stream`), pass after pass, without a reset. Whenever the cache has turned over a few times
it is rebased, so that positions stay bounded. Every pass predicts the same tokens; after the last comes the first one again.

Count (`--until-the-end`). Nothing is rebased: positions count the tokens, as in plain `generate()`, up to 2**24, from where on
float32 cannot tell them apart. (Logits move long before: results/positions.json.) Chunks of `--chunk-size` tokens bring the text
near it, plain `generate()` takes it there, and the cache stops.

A hundred times in a run, or once in a pass, are noted: the time per token, the memory that tensors take on the device, the
resident memory of this process, and the position of the next token. Lines are fitted to the first three, the first tenth left
out, through the means of ten stretches of the run, as neighbours are alike. Rebases are timed by themselves, the device
synchronised before and after.

Results: a table here, and a JSON file and a plot in `--output` (header: `benchmarks.harness`), with `rows`, `slopes`, `rebases`.
"""

from __future__ import annotations

import argparse
import gc
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import psutil  # type: ignore[import-untyped]
import torch
import torch.nn.functional as F
from tabulate import tabulate
from transformers import LogitsProcessor, LogitsProcessorList

from sink_cache import SinkWindowCache, cache_kwargs, endless, stream

from . import harness, models, plots, texts
from .harness import BenchmarkError

SAMPLES = 100
STRETCHES = 10
LAST_TOKENS = 1000  # before the last position: generated
SLOPES = ("ms_per_token", "device_bytes", "host_bytes")
COLUMNS = ("tokens", "next_position", "ms_per_token", "device_bytes", "host_bytes", "perplexity")


class TimedCache(SinkWindowCache):
    """A `SinkWindowCache` that times its rebases."""

    rebase_ms: list[float]

    def __init__(self, n_sink: int, window: int, clock: harness.Clock, *, compileable: bool = False) -> None:
        super().__init__(n_sink, window, compileable=compileable)
        self.clock, self.rebase_ms = clock, []

    def rebase(self) -> int:
        """Rebase, and note how long it took."""
        start = self.clock.now()
        by = super().rebase()
        if by:
            self.rebase_ms.append(1e3 * (self.clock.now() - start))
        return by


class Notes(LogitsProcessor):
    """Notes time, memory and position every so many tokens; as a logits processor it changes nothing and makes nobody wait."""

    def __init__(self, cache: TimedCache, every: float, bar: Any, keep: Callable[[list[dict[str, Any]]], None]) -> None:
        self.cache, self.every, self.bar, self.keep = cache, every, bar, keep
        self.tokens = self.unnoted = 0
        self.rows: list[dict[str, Any]] = []
        self.started = cache.clock.now()

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
        now, device = self.cache.clock.now(), self.cache.clock.device
        gc.collect()  # what was left of the last note, above all
        self.tokens += self.unnoted
        row = {
            "tokens": self.tokens,
            "next_position": int(self.cache.next_position_ids().max()),
            "ms_per_token": 1e3 * (now - self.started) / self.unnoted,
            "device_bytes": torch.cuda.memory_allocated(device) if device.type == "cuda" else None,
            "host_bytes": psutil.Process().memory_info().rss,
            "rebases": len(self.cache.rebase_ms),
        }
        self.rows.append(row | more)
        self.keep(self.rows)
        self.bar.update(self.unnoted)
        self.unnoted, self.started = 0, self.cache.clock.now()


def generate(loaded: models.LoadedModel, args: argparse.Namespace, notes: Notes) -> None:
    """Generate `--tokens` tokens in one endless call."""
    model = loaded.model
    model.generate(
        torch.randint(1, model.config.vocab_size, (1, args.capacity), device=model.device),
        **cache_kwargs(notes.cache),
        custom_generate=endless,
        max_new_tokens=args.tokens,
        do_sample=False,
        logits_processor=LogitsProcessorList([notes]),
    )


def read(loaded: models.LoadedModel, args: argparse.Namespace, notes: Notes, text: texts.Text) -> None:
    """Read `--tokens` of a text `--passes` times, and note the perplexity of each pass."""
    cache = notes.cache
    ids = texts.tokenize(text, loaded.tokenizer)[: args.tokens].to(loaded.model.device)[None]
    if ids.shape[1] < args.tokens:
        raise BenchmarkError(f"{text.name} has {ids.shape[1]:,} tokens, and --tokens asks for {args.tokens:,}")
    wanted = ids[0].roll(-1)  # after the last token comes the first one again
    # Each key is rotated at most once by rebases that are at least a `rebase_step` apart, and reading is fast.
    stretch = max(4 * cache.rebase_step, args.chunk_size)
    since_rebase = 0
    for number in range(1, args.passes + 1):
        loss, done = 0.0, 0
        for piece in ids.split(stretch, dim=1):
            for logits in stream(loaded.model, piece, cache, chunk_size=args.chunk_size):
                loss += F.cross_entropy(
                    logits[0].float(), wanted[done : done + logits.shape[1]], reduction="sum"
                ).item()
                done += logits.shape[1]
            notes.took(piece.shape[1])
            since_rebase += piece.shape[1]
            if since_rebase >= stretch:
                cache.rebase()
                since_rebase = 0
        notes.note(**{"pass": number, "perplexity": math.exp(loss / done)})


def count(loaded: models.LoadedModel, args: argparse.Namespace, notes: Notes) -> dict[str, Any]:
    """Feed chunks and then generate, without ever rebasing, until the cache stops; return where and with which words."""
    model, cache = loaded.model, notes.cache
    chunk = torch.randint(1, model.config.vocab_size, (1, args.chunk_size), device=model.device)
    length = max(2, cache.max_position - LAST_TOKENS)
    # The length of the text is all that generate() reads of what the cache has seen.
    text = chunk.repeat(1, -(-length // args.chunk_size))[:, :length]
    for piece in text[:, :-1].split(args.chunk_size, dim=1):
        model(piece, **cache_kwargs(cache, model), logits_to_keep=1)
        notes.took(piece.shape[1])
    try:
        model.generate(text, **cache_kwargs(cache), do_sample=False, max_new_tokens=2 * LAST_TOKENS)
    except ValueError as refusal:
        if cache.get_seq_length() != cache.max_position:
            raise
        return {"position": cache.get_seq_length(), "message": str(refusal)}
    raise BenchmarkError(f"the cache went on to position {cache.get_seq_length():,}, beyond {cache.max_position:,}")


def slope(rows: Sequence[dict[str, Any]], name: str) -> dict[str, float] | None:
    """Fit a line to what was noted, as the module docstring says: its rise over the run, its standard error, and the mean."""
    rest = rows[math.ceil(len(rows) / 10) :]
    values = np.array([row[name] for row in rest], dtype=np.float64)  # nan for None
    if len(rest) < 2 * STRETCHES or not np.isfinite(values).all():
        return None
    mean = float(values.mean())
    if np.ptp(values) == 0:
        return {"rise": 0.0, "standard_error": 0.0, "mean": mean}
    run = np.array([row["tokens"] for row in rest], dtype=np.float64) / rows[-1]["tokens"]
    x, y = (np.array([part.mean() for part in np.array_split(one, STRETCHES)]) for one in (run, values))
    (rise, _), covariance = np.polyfit(x, y, 1, cov=True)
    return {"rise": float(rise), "standard_error": float(np.sqrt(covariance[0, 0])), "mean": mean}


def rebases(times_ms: Sequence[float], rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Return how many rebases there were until the last row, their median time in ms, and their share of the time."""
    number = rows[-1]["rebases"]
    if not number:
        return None
    # The first tenth left out here, too: it allocates, and loads kernels.
    median = statistics.median(times_ms[number // 10 : number])
    apart = statistics.median(row["ms_per_token"] for row in rows) * rows[-1]["tokens"] / number
    return {"count": number, "median_ms": median, "ms_apart": apart, "share": median / apart}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = harness.Parser(prog="python -m benchmarks.longrun", description=__doc__)
    parser.add_argument("--model", help="an id on the hub or a folder")
    parser.add_argument("--gguf-file", help="a GGUF file in the model's folder or repository")
    parser.add_argument("--random-weights", metavar="SHAPE", help=", ".join(models.SHAPES))
    parser.add_argument("--offline", action="store_true", help="SmolLM2-135M: no hub is asked")
    parser.add_argument("--tokens", type=int, help="to generate, or of each pass (100,000)")
    parser.add_argument("--passes", type=int, help="read a text so many times")
    parser.add_argument("--text-file", help="a text in UTF-8 (Python's help topics)")
    parser.add_argument("--until-the-end", action="store_true", help="count positions up to the last one")
    parser.add_argument("--chunk-size", type=int, help="tokens per forward when reading and counting (512)")
    parser.add_argument("--capacity", type=int, default=1024, help="of the cache, sinks included (%(default)s)")
    parser.add_argument("--n-sink", type=int, default=4, help="(%(default)s)")
    parser.add_argument("--sdpa-backend", choices=harness.SDPA_CHOICES, default="auto", help="(auto)")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu (%(default)s)")
    parser.add_argument("--dtype", help=f"{', '.join(harness.DTYPES)} (bfloat16 on CUDA, else float32)")
    parser.add_argument("--output", default="build/benchmarks", help="folder for the JSON file and plot (%(default)s)")
    args = parser.parse_args(argv)
    if sum(map(bool, (args.model, args.random_weights, args.offline))) != 1:
        parser.error("give one of --model, --random-weights and --offline")
    if args.passes is not None and args.until_the_end:
        parser.error("--passes and --until-the-end are different runs: give one of them")
    if args.passes is not None and args.random_weights:
        parser.error("--passes measures perplexity, which means nothing with --random-weights")
    for option, value, is_used in (
        ("--tokens", args.tokens, not args.until_the_end),
        ("--text-file", args.text_file, args.passes),
        ("--chunk-size", args.chunk_size, args.passes or args.until_the_end),
    ):
        if value is not None and not is_used:
            parser.error(f"{option} would change nothing in this run: see --help for what it belongs to")
    args.tokens = 100_000 if args.tokens is None else args.tokens
    args.chunk_size = 512 if args.chunk_size is None else args.chunk_size
    least = {"passes": 1, "chunk_size": 1, "n_sink": 0, "capacity": args.n_sink + 1}
    for name, lowest in {**least, "tokens": 2 if args.passes else 10 * SAMPLES}.items():
        if (value := getattr(args, name)) is not None and value < lowest:
            parser.error(f"--{name.replace('_', '-')} must be at least {lowest}, but is {value}")
    return args


def load(args: argparse.Namespace, dtype: torch.dtype, device: torch.device) -> models.LoadedModel:
    """Load what the command line asks for."""
    if args.random_weights:
        loaded = models.random_model(args.random_weights, dtype, device)
    elif args.offline:
        loaded = models.load_offline(dtype, device)
    else:
        loaded = models.load(args.model, dtype, device, gguf_file=args.gguf_file)
    loaded.model.generation_config.eos_token_id = None
    return loaded


def main(argv: Sequence[str] | None = None) -> None:
    """Run, print the table, and write the result file and its plot; see the module docstring."""
    args = parse(argv)
    kind = "count" if args.until_the_end else "read" if args.passes else "generate"
    folder, device, dtype, sdpa = harness.set_up(args)
    dtype_name = str(dtype).removeprefix("torch.")
    loaded = load(args, dtype, device)
    text = texts.text_file(args.text_file) if args.text_file else texts.embedded()
    what = {
        "generate": "one endless call",
        "read": f"{args.passes} passes over {text.name}",
        "count": "up to the last position",
    }[kind]
    title = f"{what}: {loaded.name}, {dtype_name}, {harness.device_name(device)}"
    protocol = {name: getattr(args, name) for name in ("tokens", "passes", "chunk_size", "capacity", "n_sink")}
    protocol |= {"kind": kind, "sdpa_backend": args.sdpa_backend, "sdpa_enabled": sdpa}
    result = harness.header(
        "longrun",
        title,
        device,
        dtype,
        argv=argv,
        model=loaded.description,
        protocol=protocol,
        interrupted=False,
        slopes={},
    )
    if kind == "read":
        result["data"] = text.description
    path = folder / f"{harness.file_stem('longrun', kind, loaded.name, device.type, dtype_name)}.json"
    print(title, flush=True)
    compiled = kind == "generate" and device.type == "cuda"
    cache = TimedCache(args.n_sink, args.capacity - args.n_sink, harness.Clock(device), compileable=compiled)
    cache.prepare_for(loaded.model)
    total = {"generate": args.tokens, "read": args.tokens * (args.passes or 0), "count": cache.max_position}[kind]

    def keep(rows: list[dict[str, Any]]) -> None:
        harness.write_json(path, result | {"rows": rows, "interrupted": True})

    with torch.no_grad(), harness.garbage_collector_off(), harness.progress_bar(total, loaded.name) as bar:
        notes = Notes(cache, math.inf if kind == "read" else total // SAMPLES, bar, keep)
        try:
            if kind == "generate":
                generate(loaded, args, notes)
            elif kind == "read":
                read(loaded, args, notes, text)
            else:
                result["end"] = count(loaded, args, notes)
        except KeyboardInterrupt:
            result["interrupted"] = True
    if not notes.rows:
        raise KeyboardInterrupt
    result["rows"] = notes.rows
    result["slopes"] = {name: slope(notes.rows, name) for name in SLOPES}
    result["rebases"] = rebases(cache.rebase_ms, notes.rows)
    print(report(result))
    harness.write_json(path, result)
    for written in [path, *plots.plot(path, folder)]:
        print(f"wrote {written}")
    if result["interrupted"]:
        raise KeyboardInterrupt


def report(result: dict[str, Any]) -> str:
    """Return a table of some of the rows, and what was fitted to all, in words."""
    rows = result["rows"]
    shown = rows if len(rows) <= 20 else rows[9::10]
    columns = [name for name in COLUMNS if rows[0].get(name) is not None]
    lines = [tabulate([[row[name] for name in columns] for row in shown], columns, floatfmt=".4f", intfmt=",")]
    for name, fitted in result["slopes"].items():
        if fitted is not None:
            rise = f"{fitted['rise']:,.4g} ± {fitted['standard_error']:,.3g}"
            lines.append(f"{name}: mean {fitted['mean']:,.4g}, rise over the run {rise}")
    if (timed := result["rebases"]) is not None:
        lines.append(
            f"{timed['count']:,} rebases of {timed['median_ms']:.3g} ms, one in {timed['ms_apart']:,.4g} ms: "
            f"{timed['share']:.2%} of the time"
        )
    if "end" in result:
        lines.append(f"stopped at position {result['end']['position']:,}: {result['end']['message']}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(harness.run(main))
