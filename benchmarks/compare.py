"""One page on why two ways to measure a cache's gain disagree, from result files alone; nothing is measured here.

    python -m benchmarks.compare results/*.json

`benchmarks.latency` measures single steps at fixed contexts; `benchmarks.ppl` measures whole runs over a text, whose steps have
all contexts from 0 to the length of a sample. Where there are results of both for the same model, device, dtype, threads
and attention backend, the page shows for each capacity

    per token    dense(N) / sink(N), eager, at each context N
    whole run    measured: tokens per second of sink over those of dense
    predicted    the sum of the latency curve of dense over the run's contexts, over that of sink. Between the contexts that
                 were measured the curves are straight lines, below the least they are flat, and beyond the largest there
                 is no prediction. Unsynchronised times are taken where there are some, because a run does not wait for
                 the device after every step. The curve of sink is that of dense over what sink gains in turns with it,
                 in which what slows down both cancels; and in the first sample, whose lengths are all new but for those of
                 the warm-up, dense pays for that as much as `latency` measured, and so does sink until it is full

and says in sentences, computed from these numbers, where the difference comes from. Only runs of one token per step and
sample (`--mode step --batch-size 1`) are predicted, because that is what `latency` times. The same model need not have the
same weights: times do not depend on them. Where there are several latency results for a model, their ratios are compared, too.

Writes `report.md`, its plots, and `report.html`, which holds everything in one file.
"""

from __future__ import annotations

import base64
import html
import itertools
import statistics
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import NullLocator
from tabulate import tabulate

from . import harness
from .harness import BenchmarkError

AGREEMENT = 0.15  # of prediction and measurement
RUN_TO_RUN = 0.03  # of two latency results
NEW_LENGTHS_COST = 1.2  # from this ratio on, what new lengths cost is part of a prediction
WARM_UP_TOKENS, TURN_TOKENS = 32, 64  # of runs whose file does not say how many
PARTS_OF_A_RUN = 8  # its first and its last are compared
STYLE = (
    "body{font:16px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em}img{max-width:100%}"
    "table{border-collapse:collapse;font-size:90%;margin:1em 0}td,th{border:1px solid #ccc;padding:.2em .6em}"
)


# --- the two regimes -------------------------------------------------------------------------------------------------


class Curve:
    """Milliseconds of a step against the tokens before it, from the rows of a latency result."""

    def __init__(self, latency: dict[str, Any], arm: str, capacity: int | None = None) -> None:
        self.rows = {
            row["context"]: row
            for row in latency["rows"]
            if (row["arm"], row["compiled"], row["capacity"]) == (arm, False, capacity) and not row["reason"]
        }
        self.contexts = sorted(self.rows)

    def ms(self, synchronized: bool = True) -> list[float]:
        """Return the median of a step at each context; the unsynchronised one only where it was measured everywhere."""
        rows = [self.rows[context] for context in self.contexts]
        if synchronized or not all(row["unsynchronized_ms"] for row in rows):
            return [row["median_ms"] for row in rows]
        return [statistics.median(row["unsynchronized_ms"]) for row in rows]

    def ratio_to(self, other: Curve, context: int) -> dict[str, Any]:
        """Return what this arm takes over what `other` does in turns with it; unsynchronised turns if there are enough."""
        rows = self.rows[context], other.rows[context]
        free = [[[ms] for ms in row["unsynchronized_ms"] or ()] for row in rows]
        enough = min(map(len, free)) >= harness.FEWEST_ROUNDS
        return harness.ratio_of_rounds(*(free if enough else [row["step_ms"] for row in rows]))

    def ms_beside(self, other: Curve) -> list[float]:
        """Return the same, unsynchronised, as `other`'s median times the ratio to it, where both arms were measured."""
        found = dict(zip(self.contexts, self.ms(synchronized=False), strict=True))
        for context, ms in zip(other.contexts, other.ms(synchronized=False), strict=True):
            if context in found:
                found[context] = ms * self.ratio_to(other, context)["value"]
        return list(found.values())

    def sum_ms(
        self, tokens: int, factor: float = 1.0, new: slice = slice(0), ms: Sequence[float] | None = None
    ) -> float:
        """Return the time of reading so many tokens one by one, of which those at `new` lengths take `factor` times as long.

        `ms` are other times of a step at each context than those of `ms(synchronized=False)`.
        """
        steps = np.interp(np.arange(tokens), self.contexts, self.ms(synchronized=False) if ms is None else ms)
        steps[new] *= factor
        return float(steps.sum())

    def new_lengths(self) -> list[float]:
        """Return how many times longer a step is at a length never seen before, at each context that has such."""
        first = [row["first_time"] for row in self.rows.values() if row["first_time"]]
        return [one["median_ms"] / one["again_median_ms"] for one in first] or [1.0]


@dataclass(frozen=True)
class Comparison:
    """A whole run with sink and with dense, and the curves of both, at one capacity."""

    run: dict[str, Any]
    latency: dict[str, Any]
    capacity: int

    def row(self, method: str) -> dict[str, Any] | None:
        """Return the run's row of `dense` or `sink`, if it was measured."""
        capacity = self.capacity if method == "sink" else None
        rows = [row for row in self.run["rows"] if (row["method"], row["capacity"]) == (method, capacity)]
        return rows[0] if rows and rows[0]["seconds"] else None

    @property
    def is_complete(self) -> bool:
        """Whether both methods were measured in both."""
        return bool(self.row("sink") and self.row("dense") and self.sink.contexts and self.dense.contexts)

    @property
    def dense(self) -> Curve:
        """The curve of dense."""
        return Curve(self.latency, "dense")

    @property
    def sink(self) -> Curve:
        """The curve of sink at this capacity."""
        return Curve(self.latency, "sink", self.capacity)

    @property
    def samples(self) -> list[int]:
        """The tokens read of each sample, when these were read one at a time."""
        return [batch["tokens_processed"] for batch in self.row("dense")["batches"]]

    @property
    def measured(self) -> float:
        """The speed-up of the whole run."""
        return self.row("sink")["tokens_per_second"] / self.row("dense")["tokens_per_second"]

    def not_predicted(self) -> str:
        """Return in words why the run cannot be predicted, or an empty string."""
        protocol = self.run["protocol"]
        if (protocol["mode"], protocol["batch_size"]) != ("step", 1):
            return (
                f"the run read {protocol['chunk_size']:,} tokens of {protocol['batch_size']} samples per forward, and one step "
                "of one sample is what the curve measures"
            )
        reach = min([self.dense.contexts[-1], max(self.sink.contexts[-1], self.capacity)])
        if max(self.samples) > reach:
            return f"the run reaches {max(self.samples):,} tokens, and the curve ends at {reach:,}"
        return ""

    def predicted_ms(self) -> dict[str, float]:
        """Return what the curves predict for the whole run with each method."""
        new = statistics.median(self.dense.new_lengths())
        factors = [new if new >= NEW_LENGTHS_COST and not i else 1.0 for i in range(len(self.samples))]
        runs = list(zip(self.samples, factors, strict=True))
        known = self.run["protocol"].get("warm_up_tokens", WARM_UP_TOKENS)
        dense, sink = self.dense, self.sink
        beside_dense, while_filling = sink.ms_beside(dense), slice(known, self.capacity)
        return {
            "dense": sum(dense.sum_ms(tokens, factor, slice(known, None)) for tokens, factor in runs),
            "sink": sum(sink.sum_ms(tokens, factor, while_filling, beside_dense) for tokens, factor in runs),
        }

    @property
    def predicted(self) -> float | None:
        """The speed-up of the whole run as the curves predict it."""
        if self.not_predicted():
            return None
        predicted = self.predicted_ms()
        return predicted["dense"] / predicted["sink"]

    def turns(self) -> list[tuple[float, float]]:
        """Return, for each turn of the run, the tokens before its middle, and what it gained; empty without turns."""
        found = []
        for dense, sink in zip(self.row("dense")["batches"], self.row("sink")["batches"], strict=True):
            seconds = [one.get("turn_seconds", [one["seconds"]]) for one in (dense, sink)]
            if len(seconds[0]) > 1:
                tokens = dense["tokens_processed"] / len(dense["samples"])
                starts = np.arange(0, tokens, self.run["protocol"].get("turn_tokens", TURN_TOKENS))
                middles = (starts + np.append(starts[1:], tokens)) / 2
                found += list(zip(middles.tolist(), np.divide(*seconds).tolist(), strict=True))
        return found

    def ratio(self, name: str, context: int) -> dict[str, Any] | None:
        """Return an eager ratio of the latency result, such as `achieved`."""
        wanted = (name, context, self.capacity, False)
        ratios = self.latency["ratios"]
        found = [one for one in ratios if (one["name"], one["context"], one["capacity"], one["compiled"]) == wanted]
        return found[0] if found else None


def setting(result: dict[str, Any]) -> tuple[Any, ...]:
    """Return what two results must share to be compared."""
    device = result["device"]
    threads = result["threads"] if device["type"] == "cpu" else None
    attention = result["protocol"].get("sdpa_backend", "auto")  # results of older versions of `ppl` do not have it
    return result["model"]["type"], result["model"]["parameters"], device["name"], result["dtype"], threads, attention


def comparisons(results: Sequence[dict[str, Any]]) -> list[Comparison]:
    """Return all runs that have a latency result of the same setting, for each capacity that both have.

    Of several that have the capacity it is the one nearest in time, because what else a machine does changes its times.
    """
    found = []
    for run in (one for one in results if one["harness"] == "ppl"):
        latencies = [one for one in results if one["harness"] == "latency" and setting(one) == setting(run)]
        latencies.sort(key=partial(time_between, run))
        for capacity in sorted({row["capacity"] for row in run["rows"] if row["method"] == "sink"}):
            possible = (Comparison(run, latency, capacity) for latency in latencies)
            nearest = next((one for one in possible if one.is_complete), None)
            if nearest is not None:
                found.append(nearest)
    return found


def time_between(first: dict[str, Any], second: dict[str, Any]) -> timedelta:
    """Return the time between two results."""
    return abs(datetime.fromisoformat(first["date"]) - datetime.fromisoformat(second["date"]))


# --- why they differ -------------------------------------------------------------------------------------------------


def doubt(ratio: dict[str, Any] | None) -> str:
    """Return the note of a ratio in brackets, if it has one."""
    return f" ({ratio['note']})" if ratio is not None and ratio["note"] else ""


def reasons(one: Comparison) -> list[str]:
    """Return sentences, made of the numbers, on why the speed-up of a step and of a run differ."""
    dense, sink, capacity = one.dense, one.sink, one.capacity
    samples = one.samples
    both = set(dense.contexts) & set(sink.contexts)
    largest = max((context for context in both if context <= max(samples)), default=max(both))
    achieved, ceiling = one.ratio("achieved", largest), one.ratio("ceiling", largest)
    step = dense.rows[largest]["median_ms"] / sink.rows[largest]["median_ms"] if achieved is None else achieved["value"]
    found = [
        f"A step after {largest:,} tokens (the last measured context that the run reaches) gains {step:.2f}×{doubt(achieved)}, "
        f"the whole run {one.measured:.2f}×."
    ]

    far, near = dense.rows[largest], Curve(one.latency, "dense-at-capacity", capacity).rows.get(largest)
    if near is not None:
        best = far["median_ms"] / near["median_ms"] if ceiling is None else ceiling["value"]
        found.append(
            f"**What can be won.** A dense step after {largest:,} tokens takes {far['median_ms']:.2f} ms, and "
            f"{near['median_ms']:.2f} ms with {capacity:,} tokens in the cache: taken in turns, {1 / best:.0%} of it. "
            + ("Only the rest depends on the context, so a" if best > 1 else "Nothing of it grows with the context: a")
            + f" dense cache cut to this size would gain {best:.2f}×{doubt(ceiling)}; this one gains {step:.2f}×"
            + f"{doubt(achieved)}."
        )
    if far["busy"] is not None:
        bound = "bound by launching kernels" if far["busy"] < 0.7 else "bound by the GPU's own work"
        found.append(
            f"**Launching.** During that step the GPU works {far['busy']:.0%} of the time: the step is {bound}"
            + (", which a smaller cache does not shorten." if far["busy"] < 0.7 else ".")
        )
        if work := sink.rows[largest]["gpu_ms"]:
            found[-1] += (
                f" Its own work is {far['gpu_ms']:.2f} ms, and {work:.2f} ms with sink: {far['gpu_ms'] / work:.2f}×."
            )
    contexts = np.concatenate([np.arange(tokens) for tokens in samples])
    batch = one.run["protocol"]["batch_size"]
    if batch == 1:
        found.append(
            f"**Integration.** The steps of the run have 0 to {contexts.max():,} tokens before them, {contexts.mean():,.0f} on "
            f"average; {(contexts < capacity).mean():.0%} of them come before the cache of {capacity:,} is full, where nothing "
            "is bounded yet."
        )
    turns = one.turns()
    parts = [
        [gain for middle, gain in turns if low <= middle * PARTS_OF_A_RUN / max(samples) < low + 1]
        for low in (0, PARTS_OF_A_RUN - 1)
    ]
    if all(parts):
        found.append(
            f"**Along the run.** Its own turns, dense and sink one after the other, gain {statistics.median(parts[0]):.2f}× in "
            f"the first of {PARTS_OF_A_RUN} parts and {statistics.median(parts[1]):.2f}× in the last (medians)."
        )
    at_contexts = dense.new_lengths()
    new, span = statistics.median(at_contexts), f"{min(at_contexts):.2f} to {max(at_contexts):.2f}"
    found.append(
        f"**New lengths.** A dense step at a length never seen before takes {new:.2f} times as long as the same step again (the "
        f"median over contexts, at which it is {span}). "
        + (
            f"All lengths of the first of {len(samples)} sample(s) but those of the warm-up are new, and a sink cache has no new "
            "lengths once it is full."
            if new >= NEW_LENGTHS_COST
            else f"That is less than {NEW_LENGTHS_COST}, and is not counted as a part of the difference."
        )
    )
    waits = [curve.ms()[-1] / curve.ms(synchronized=False)[-1] for curve in (dense, sink)]
    if far["unsynchronized_ms"]:
        found.append(
            f"**Synchronisation.** Waiting for the device after every step makes a dense step {waits[0]:.2f} and a sink step "
            f"{waits[1]:.2f} times as long{' (below 1 is noise)' if min(waits) < 1 else ''}. The run waits after a turn only, "
            "so the prediction is made of steps that do not wait."
        )
    else:
        found.append("**Synchronisation.** There is none on this device, so it is no part of the difference.")
    if why := one.not_predicted():
        return [*found, f"**No prediction:** {why}."]
    ms = one.predicted_ms()
    predicted = ms["dense"] / ms["sink"]
    off = predicted / one.measured - 1
    measured_ms = {method: 1e3 * one.row(method)["seconds"] for method in ms}
    parts = ", ".join(
        f"{method} {measured_ms[method] / sum(samples):.2f} ms measured, {ms[method] / sum(samples):.2f} predicted"
        for method in ms
    )
    verdict = f"more than {AGREEMENT:.0%}, so something else differs between the two"
    if abs(off) <= AGREEMENT:
        verdict = f"within {AGREEMENT:.0%}, as it must be if both regimes measure one thing at different places"
        if abs(one.measured - 1) <= AGREEMENT:
            verdict += "; but a gain so close to 1 would be predicted by chance, too"
        elif max(abs(ms[method] / measured_ms[method] - 1) for method in ms) > AGREEMENT:
            verdict += "; but the times themselves are further off, and their errors cancel in the ratio"
    unsure = sum(harness.is_inconclusive(sink.ratio_to(dense, context)) for context in both)
    if unsure:
        verdict += (
            f"; at {unsure} of the {len(both)} contexts nothing can be concluded from the ratio that this is made of"
        )
    return [
        *found,
        f"**The sum.** Over the contexts of the run the curves predict {predicted:.2f}×, which is {abs(off):.0%} "
        f"{'more' if off > 0 else 'less'} than the {one.measured:.2f}× measured: {verdict}. Per token of the run: {parts}.",
    ]


def draw(group: Sequence[Comparison], path: Path) -> None:
    """Draw the speed-up of a step against the context, and that of the whole run, measured and predicted, across."""
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    for index, one in enumerate(group):
        colour = f"C{index}"
        points = [(n, ratio) for n in one.dense.contexts if (ratio := one.ratio("achieved", n)) is not None]
        values = [ratio["value"] for _, ratio in points]
        errors = [[r["value"] - r["low"] for _, r in points], [r["high"] - r["value"] for _, r in points]]
        label = f"capacity {one.capacity:,}: a step"
        axes.errorbar([n for n, _ in points], values, errors, color=colour, marker="o", capsize=3, label=label)
        if turns := one.turns():
            style = {"color": colour, "s": 8, "alpha": 0.5, "label": f"capacity {one.capacity:,}: turns of the run"}
            axes.scatter(*zip(*turns, strict=True), **style)
        axes.axhline(one.measured, color=colour, linestyle="--", label=f"the whole run, measured: {one.measured:.2f}×")
        if one.predicted is not None:
            axes.axhline(one.predicted, color=colour, linestyle=":", label=f"predicted: {one.predicted:.2f}×")
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set(xlabel="context: tokens of text before", ylabel="speed-up over dense", xscale="log")
    contexts = group[0].dense.contexts
    axes.set_xticks(contexts, [f"{context:,}" for context in contexts], rotation=30)
    axes.xaxis.set_minor_locator(NullLocator())
    # Lines across do not widen the axes by themselves, and the span of the run would.
    lowest = min([line for one in group for line in (one.measured, one.predicted) if line] + [axes.get_ylim()[0]])
    axes.set_ylim(bottom=lowest * 0.95)
    limits = axes.get_xlim()
    axes.axvspan(limits[0], group[0].run["data"]["max_tokens"], color="grey", alpha=0.15, label="contexts of the run")
    axes.set_xlim(limits)
    axes.set_title("\n".join(textwrap.wrap(group[0].run["title"], 60)))
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.01, 1))
    figure.savefig(path, dpi=120)
    plt.close(figure)


# --- the page --------------------------------------------------------------------------------------------------------


class Page:
    """Headings, sentences, tables and plots, written as Markdown and as one HTML file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.markdown: list[str] = []
        self.html: list[str] = []

    def heading(self, text: str, level: int = 2) -> None:
        """Add a heading."""
        self.markdown.append(f"{'#' * level} {text}")
        self.html.append(f"<h{level}>{html.escape(text)}</h{level}>")

    def sentences(self, texts: Sequence[str]) -> None:
        """Add a paragraph for each text; **double stars** make a part of it bold."""
        for text in texts:
            self.markdown.append(text)
            marked = html.escape(text)
            for mark, tag in (("**", "b"), ("`", "code")):
                parts = marked.split(mark)
                marked = "".join(f"<{tag}>{part}</{tag}>" if i % 2 else part for i, part in enumerate(parts))
            self.html.append(f"<p>{marked}</p>")

    def table(self, rows: Sequence[Sequence[str]], headers: Sequence[str]) -> None:
        """Add a table of strings."""
        for format, lines in (("pipe", self.markdown), ("html", self.html)):
            lines.append(str(tabulate(rows, headers, tablefmt=format, disable_numparse=True, missingval="–")))

    def image(self, path: Path, description: str) -> None:
        """Add a PNG file of the page's folder; the HTML file takes it in."""
        self.markdown.append(f"![{description}]({path.name})")
        data = base64.b64encode(path.read_bytes()).decode()
        self.html.append(f'<img alt="{html.escape(description)}" src="data:image/png;base64,{data}">')

    def write(self, title: str) -> list[Path]:
        """Write both files, and return their paths."""
        head = f"<!DOCTYPE html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title><style>{STYLE}</style>"
        contents = {"report.md": "\n\n".join(self.markdown) + "\n", "report.html": "\n".join([head, *self.html]) + "\n"}
        for name, text in contents.items():
            (self.folder / name).write_text(text, encoding="utf-8")
        return [self.folder / name for name in contents]


def shown(ratio: dict[str, Any] | None) -> str | None:
    """Return a ratio as text, with its interval."""
    if ratio is None:
        return None
    return f"{ratio['value']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]" + (
        " ?" if harness.is_inconclusive(ratio) else ""
    )


def add_comparison(page: Page, group: Sequence[Comparison], plot: Path) -> None:
    """Add one run beside its latency result, with all capacities."""
    run, latency = group[0].run, group[0].latency
    page.heading(run["title"])
    threads = f", {run['threads']} thread(s)" if run["device"]["type"] == "cpu" else ""
    count = sum(len(batch["samples"]) for batch in group[0].row("dense")["batches"])
    left = " (interrupted)" if run.get("interrupted") else ""
    others = harness.busy_cpu(latency.get("machine", {}).get("cpu_share_of_others", 0.0))
    page.sentences(
        [
            f"{count:,} sample(s) of {run['data']['max_tokens']:,} tokens{left}. {run['device']['name']}{threads}, "
            f"{run['dtype']}, {run['date']}. Steps: {latency['title']}, {latency['date']}{others and '; ' + others}."
        ]
    )
    contexts = [n for n in group[0].dense.contexts if any(one.ratio("achieved", n) for one in group)]
    page.sentences(
        ["Speed-up of one step, dense(N) / sink(N), with its 95% interval (? where nothing can be concluded):"]
    )
    body = [[f"{n:,}", *(shown(one.ratio("achieved", n)) for one in group)] for n in contexts]
    page.table(body, ["context N", *(f"capacity {one.capacity:,}" for one in group)])
    page.sentences(["Speed-up of the whole run:"])
    body = []
    for one in group:
        predicted = one.predicted
        off = None if predicted is None else f"{predicted / one.measured - 1:+.0%}"
        body.append([f"{one.capacity:,}", f"{one.measured:.2f}", predicted and f"{predicted:.2f}", off])
    page.table(body, ["capacity", "measured", "predicted", "predicted / measured - 1"])
    draw(group, plot)
    page.image(plot, "Speed-up of a step by context, and of the whole run")
    for one in group:
        page.heading(f"Capacity {one.capacity:,}", 3)
        page.sentences(reasons(one))


def add_run_to_run(page: Page, first: dict[str, Any], second: dict[str, Any]) -> None:
    """Add by how much the ratios of two latency results of one setting differ."""
    keys = ("name", "context", "capacity", "compiled")
    sides = [{tuple(ratio[key] for key in keys): ratio for ratio in one["ratios"]} for one in (first, second)]
    both = sorted(sides[0].keys() & sides[1].keys())
    if not both:
        return
    values = {key: [[side[key].get(name) for side in sides] for name in ("value", "gpu_value")] for key in both}
    away = {key: [None if None in pair else pair[1] / pair[0] - 1 for pair in pairs] for key, pairs in values.items()}
    page.heading(f"Two runs of the same: {first['model']['name']}, {first['dtype']}, {first['device']['name']}")
    versions = [one.get("commit") or "unknown" for one in (first, second)]
    sentences = [f"{first['date']} (version {versions[0]}) and {second['date']} (version {versions[1]})."]
    if versions[0] != versions[1]:
        sentences[0] += " What changed between the versions is in the differences, too."
    what = ("median ratios", "ratios of the GPU's own work")
    for compiled, index in itertools.product((False, True), range(len(what))):
        apart = {key: one[index] for key, one in away.items() if one[index] is not None and key[3] == compiled}
        if apart:
            worst = max(apart, key=lambda key: abs(apart[key]))
            within = sum(abs(one) <= RUN_TO_RUN for one in apart.values())
            sentences.append(
                f"{'Compiled' if compiled else 'Eager'}: {within} of {len(apart)} {what[index]} agree within {RUN_TO_RUN:.0%}, "
                f"and the furthest apart is {worst[0]} at {worst[1]:,} tokens, capacity {worst[2]:,}, by {abs(apart[worst]):.1%}."
            )
    page.sentences(sentences)
    body = []
    for key in both:
        arm = "sink compiled" if key[3] else "sink"
        differences = [None if one is None else f"{one:+.1%}" for one in away[key]]
        line = [key[0], arm, f"{key[2]:,}", f"{key[1]:,}", *(shown(side[key]) for side in sides), *differences]
        body.append(line)
    page.table(body, ["ratio", "arm", "capacity", "context", "first", "second", "difference", "difference, GPU's work"])


def complete(result: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return a result that has all that results are compared by."""
    missing = {"harness", "title", "date", "device", "dtype", "threads", "model", "protocol", "rows"} - result.keys()
    if missing:
        raise BenchmarkError(f"{path} is not complete: it has no {', '.join(sorted(missing))}")
    return result


def main(argv: Sequence[str] | None = None) -> None:
    """Read the result files and write the page; see the module docstring."""
    parser = harness.Parser(prog="python -m benchmarks.compare", description=__doc__)
    parser.add_argument("results", nargs="+", metavar="FILE.json")
    parser.add_argument("--output", help="folder for the page and its plots (that of the first file)")
    args = parser.parse_args(argv)
    results, left_out = [], []
    for path in dict.fromkeys(Path(name).resolve() for name in args.results):
        try:
            results.append(complete(harness.read_json(path), path))
        except BenchmarkError as error:
            left_out.append(str(error))
    for complaint in left_out:
        print(f"left out: {complaint}", file=sys.stderr)
    by_setting: Callable[[dict[str, Any]], str] = lambda one: str(setting(one))  # noqa: E731
    latencies = sorted((one for one in results if one["harness"] == "latency"), key=by_setting)
    repeated = [list(same) for _, same in itertools.groupby(latencies, by_setting)]
    found = comparisons(results)
    if not found and all(len(same) < 2 for same in repeated):
        raise BenchmarkError(
            "nothing to compare: there must be a result of benchmarks.ppl and one of benchmarks.latency with the same model, "
            "device, dtype, threads, attention backend and a common capacity, with dense and sink measured in both"
        )
    page = Page(harness.output_folder(args.output or Path(args.results[0]).parent))
    title = "Per token and whole run: two ways to measure what a bounded cache gains"
    page.heading(title, 1)
    page.sentences(
        ["Made by python -m benchmarks.compare from result files; every number and sentence is computed from them."]
    )
    page.sentences(
        [
            "achieved: a step with DynamicCache over one with SinkWindowCache, after N tokens. ceiling: DynamicCache after N "
            "over DynamicCache after `capacity`. overhead: SinkWindowCache after N over DynamicCache after `capacity`. "
            "static_over_sink, recompute_over_sink: a step with StaticCache, or one that reads the window anew, over one with "
            "SinkWindowCache."
        ]
    )
    for index, (_, group) in enumerate(itertools.groupby(found, lambda one: (id(one.run), id(one.latency))), 1):
        add_comparison(page, list(group), page.folder / f"report-{index}.png")
    for same in repeated:
        for first, second in itertools.pairwise(sorted(same, key=lambda one: one["date"])):
            add_run_to_run(page, first, second)
    for written in page.write(title):
        print(f"wrote {written}")


if __name__ == "__main__":
    sys.exit(harness.run(main))
