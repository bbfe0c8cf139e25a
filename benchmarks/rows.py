"""Steps of a batch: what rows of different lengths cost.

    python -m benchmarks.rows --random-weights llama-3-8b --batch 64

Rows, one kind after the other, all greedy and without an end-of-text token:

    same       every row has read as many tokens, more than the cache holds
    differ     every row is full, and each has read another number of tokens
    half       every other row is not full

`--how endless` (default) measures the steps of `custom_generate=sink_cache.endless`, compiled on CUDA; `generate` those of plain
`generate()` with `compileable=True`, compiled on CUDA; `eager` those of plain `generate()`. A step is the time between two
tokens, taken where a stopping criterion gets them (which waits for the device), after the first 30 of the second call.

Results: a table here, and a JSON file in `--output` (header: `benchmarks.harness`), with `rows`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tabulate import tabulate
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from sink_cache import SinkWindowCache, cache_kwargs, endless

from . import harness, models

WARM_UP_TOKENS = 30
KINDS = ("same", "differ", "half")
COLUMNS = ("rows", "batch", "median_ms", "p5_ms", "p95_ms")


class StepTimes(StoppingCriteria):
    """Notes when each token comes, and stops nothing."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.moments = device, list[float]()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Wait for the device, and note the time."""
        harness.synchronize(self.device)
        self.moments.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def prompt_lengths(kind: str, batch: int, capacity: int, new_tokens: int) -> torch.Tensor:
    """Return how many tokens each row reads, `[batch]`."""
    full = capacity + capacity // 16
    if kind == "same":
        return torch.full((batch,), full)
    if kind == "differ":
        return torch.linspace(full, 2 * capacity, batch).long()
    short = torch.linspace(4, capacity - new_tokens - 4, batch).long()  # not full at the end of the call either
    return torch.where(torch.arange(batch) % 2 == 0, short, full)


def step_times(model: PreTrainedModel, kind: str, args: argparse.Namespace) -> list[float]:
    """Return the times of steps in ms, of the second of two calls, so that nothing is compiled meanwhile."""
    lengths = prompt_lengths(kind, args.batch, args.capacity, args.new_tokens)
    longest, generator = int(lengths.max()), torch.Generator().manual_seed(0)
    ids = torch.randint(1, model.config.vocab_size, (args.batch, longest), generator=generator)
    mask = (torch.arange(longest) >= (longest - lengths)[:, None]).long()
    inputs = {"input_ids": ids, **({} if kind == "same" else {"attention_mask": mask})}
    options = {"custom_generate": endless, "prefill_chunk_size": 512} if args.how == "endless" else {}
    for _ in range(2):
        times = StepTimes(model.device)
        cache = SinkWindowCache(args.n_sink, args.capacity - args.n_sink, compileable=args.how != "eager")
        model.generate(
            **{name: tensor.to(model.device) for name, tensor in inputs.items()}, **cache_kwargs(cache), **options,
            do_sample=False, max_new_tokens=args.new_tokens, stopping_criteria=StoppingCriteriaList([times]),
            pad_token_id=0,
        )  # fmt: skip
    return [1e3 * step for step in np.diff(times.moments)[WARM_UP_TOKENS:]]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = harness.Parser(prog="python -m benchmarks.rows", description=__doc__)
    parser.add_argument("--random-weights", metavar="SHAPE", default="llama-3-8b", help="(%(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="rows (%(default)s)")
    parser.add_argument("--rows", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND", help="(all)")
    parser.add_argument("--how", choices=("endless", "generate", "eager"), default="endless", help="(%(default)s)")
    parser.add_argument("--capacity", type=int, default=1024, help="of the cache, sinks included (%(default)s)")
    parser.add_argument("--n-sink", type=int, default=4, help="(%(default)s)")
    parser.add_argument("--new-tokens", type=int, default=220, help="of each call (%(default)s)")
    parser.add_argument("--sdpa-backend", choices=harness.SDPA_CHOICES, default="auto", help="(auto)")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu (%(default)s)")
    parser.add_argument("--dtype", help=f"{', '.join(harness.DTYPES)} (bfloat16 on CUDA, else float32)")
    parser.add_argument("--output", default="build/benchmarks", help="folder for the JSON file (%(default)s)")
    args = parser.parse_args(argv)
    if args.batch < 1:
        parser.error(f"--batch must be at least 1, but is {args.batch}")
    if args.new_tokens < WARM_UP_TOKENS + 2:
        parser.error(f"--new-tokens must be at least {WARM_UP_TOKENS + 2}, but is {args.new_tokens}")
    if args.capacity < args.new_tokens + args.n_sink + 8:
        parser.error(f"--capacity must be at least --new-tokens + --n-sink + 8, but is {args.capacity}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Measure each kind of rows, print the table, and write the result file; see the module docstring."""
    args = parse(argv)
    folder, device, dtype, sdpa = harness.set_up(args)
    loaded = models.random_model(args.random_weights, dtype, device)
    loaded.model.generation_config.eos_token_id = None
    dtype_name = str(dtype).removeprefix("torch.")
    title = f"steps of rows, {args.how}: {loaded.name}, {dtype_name}, {harness.device_name(device)}"
    protocol = {name: getattr(args, name) for name in ("how", "batch", "capacity", "n_sink", "new_tokens")}
    protocol |= {"sdpa_backend": args.sdpa_backend, "sdpa_enabled": sdpa}
    result = harness.header("rows", title, device, dtype, argv=argv, model=loaded.description, protocol=protocol)
    path = folder / f"{harness.file_stem(f'rows-{args.how}-{args.batch}', loaded.name, device.type, dtype_name)}.json"
    print(title, flush=True)
    result["rows"] = []
    for kind in args.rows:
        times = step_times(loaded.model, kind, args)
        p5, median, p95 = np.percentile(times, (5, 50, 95)).round(4).tolist()
        row = {"rows": kind, "batch": args.batch, "median_ms": median, "p5_ms": p5, "p95_ms": p95}
        result["rows"].append(row | {"step_ms": [round(step, 4) for step in times]})
        harness.write_json(path, result)
    print(tabulate([[row[name] for name in COLUMNS] for row in result["rows"]], COLUMNS, floatfmt=".3f"))
    print(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(harness.run(main))
