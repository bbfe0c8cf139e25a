"""Plots of result files, which are all that they need; nothing is measured here.

python -m benchmarks.plots results/ppl-*.json results/latency-*.json --output results
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from .harness import MIB, BenchmarkError, Parser, output_folder, read_json, run

COLORMAPS = {"sink": "Blues", "window": "Oranges", "recompute": "Greens"}
MARKERS = {"sink": "o", "window": "s", "recompute": "^"}
LABELS = {"sink": "sinks + window", "window": "window, no sinks", "recompute": "window, recomputed"}


def ppl_by_position(result: dict[str, Any], axes: Axes) -> None:
    """Draw perplexity against the number of tokens before, with the model's trained context marked."""
    capacities = sorted({row["capacity"] for row in result["rows"] if row["capacity"] is not None})
    for row in result["rows"]:
        # On its sample of tokens, recompute has too few in a bin to be compared with the others' bins.
        if row["perplexity"] is None or row["method"] in ("dense-batched", "recompute"):
            continue
        bins = row["by_position"]
        middles = [(one["start"] + one["stop"] - 1) / 2 for one in bins]
        label = "dense"
        colour: Any = "black"
        if row["capacity"] is not None:
            shade = 0.4 + 0.55 * (capacities.index(row["capacity"]) + 1) / len(capacities)
            colour = mpl.colormaps[COLORMAPS[row["method"]]](shade)
            label = f"{LABELS[row['method']]}, {row['n_sink']}+{row['capacity'] - row['n_sink']}"
        axes.plot(middles, [one["perplexity"] for one in bins], color=colour, label=label, marker=".", linewidth=1.5)
    trained = result["model"]["trained_context"]
    if trained is not None and trained <= result["data"]["max_tokens"]:
        axes.axvline(trained, color="grey", linestyle="--", label=f"trained context: {trained:,}")
    axes.set(xlabel="tokens before, in the sample", ylabel="perplexity", yscale="log")
    plain_ticks(axes)
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.01, 1))


def ppl_by_capacity(result: dict[str, Any], axes: Axes) -> None:
    """Draw perplexity against capacity for each method, with dense as a line across.

    `recompute` is slow and measured on a sample of the tokens; beside it stands `sink` on the same ones.
    """
    rows = [row for row in result["rows"] if row["perplexity"] is not None]
    sampled = result["protocol"]["recompute_tokens"]
    curves = [("sink", "perplexity"), ("window", "perplexity")]
    curves += (
        [("sink", "same_tokens"), ("recompute", "same_tokens")]
        if any(row["method"] == "recompute" for row in rows)
        else []
    )
    for method, tokens in curves:
        points = [
            (row["capacity"], row["perplexity"] if tokens == "perplexity" else row["same_tokens"]["perplexity"])
            for row in rows
            if row["method"] == method
        ]
        if points:
            axes.plot(
                *zip(*sorted(points), strict=True),
                color=mpl.colormaps[COLORMAPS[method]](0.75),
                marker=MARKERS[method],
                linestyle="-" if tokens == "perplexity" else ":",
                label=LABELS[method] + ("" if tokens == "perplexity" else f" ({sampled:,} sampled tokens)"),
            )
    for row in rows:
        if row["method"] == "dense":
            axes.axhline(row["perplexity"], color="black", linewidth=1, label="dense")
    axes.set(xlabel="capacity: sinks + window, tokens", ylabel="perplexity", xscale="log", yscale="log")
    capacities = sorted({row["capacity"] for row in rows if row["capacity"] is not None})
    axes.set_xticks(capacities, [f"{capacity:,}" for capacity in capacities])
    axes.xaxis.set_minor_locator(NullLocator())
    plain_ticks(axes)
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.01, 1))


def plain_ticks(axes: Axes) -> None:
    """Write a logarithmic axis in plain numbers, also where it spans less than a decade."""
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axes.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5)))
    axes.yaxis.set_minor_formatter(StrMethodFormatter("{x:,g}"))


def latency_per_token(result: dict[str, Any], axes: Axes) -> None:
    """Draw the time of a step against the context, for all arms, and of what the GPU does; what the hardware allows is dotted."""
    for (arm, compiled, capacity), rows, colour in _latency_curves(result):
        contexts, label = [row["context"] for row in rows], _latency_label(arm, compiled, capacity)
        if arm == "recompute" and len(result["protocol"]["capacities"]) > 1:
            continue  # there is a plot by capacity
        if arm == "recompute":
            axes.axhline(rows[0]["median_ms"], color=colour, label=f"{label}, at any context")
            continue
        style: dict[str, Any] = {"linestyle": "--" if compiled else "-", "marker": "x" if compiled else "o"}
        if arm == "dense-at-capacity":
            style, label = {"linestyle": "-.", "linewidth": 1}, f"dense, {capacity:,} tokens: what bounding can reach"
        axes.plot(contexts, [row["median_ms"] for row in rows], color=colour, label=label, markersize=5, **style)
        first = [(row["context"], row["first_time"]["median_ms"]) for row in rows if row["first_time"]]
        if first and arm == "dense":
            label = "dense, lengths never seen before"
            axes.plot(*zip(*first, strict=True), color=colour, linestyle="", marker="^", fillstyle="none", label=label)
        if arm in ("dense", "sink") and not compiled:
            axes.plot(contexts, [row["floor_ms"] for row in rows], color=colour, linestyle=":", linewidth=1)
            work = [(row["context"], row["gpu_ms"]) for row in rows if row["gpu_ms"]]
            if work:
                axes.plot(*zip(*work, strict=True), color=colour, linewidth=1)
    if any(row["gpu_ms"] for row in result["rows"]):
        axes.plot([], [], color="black", linewidth=1, label="thin: the GPU's own work")
    axes.plot([], [], color="black", linestyle=":", linewidth=1, label="floors: bytes read / bandwidth")
    axes.set(ylabel="ms per token, median", yscale="log")
    _context_axis(result, axes)
    plain_ticks(axes)


def latency_cache(result: dict[str, Any], axes: Axes) -> None:
    """Draw the memory of the cache against the context."""
    for (arm, compiled, capacity), rows, colour in _latency_curves(result):
        if arm in ("dense", "sink", "static") and not compiled:
            sizes = [row["cache_bytes"] / MIB for row in rows]
            label = _latency_label(arm, compiled, capacity)
            # Static is as large as dense, so its line must not cover the other's.
            line = {"linestyle": ":", "linewidth": 4} if arm == "static" else {"marker": "o"}
            axes.plot([row["context"] for row in rows], sizes, color=colour, label=label, **line)
    weights = result["model"]["weight_bytes"] / MIB
    axes.axhline(weights, color="grey", linestyle="-.", label="the model's weights, for comparison")
    axes.set(ylabel="MiB", yscale="log")
    _context_axis(result, axes)
    plain_ticks(axes)


def latency_by_capacity(result: dict[str, Any], axes: Axes) -> None:
    """Draw recomputation and sink steps against the capacity, as the paper's figure does; empty where it has one point."""
    rows = [row for row in result["rows"] if not row["reason"]]
    measured_at = {row["capacity"]: row["context"] for row in rows if row["arm"] == "recompute"}
    rows = [row for row in rows if row["context"] == measured_at.get(row["capacity"])]
    if len(measured_at) < 2:
        return
    for arm, compiled in (("recompute", False), ("sink", False), ("sink", True)):
        points = sorted(
            (r["capacity"], r["median_ms"], r["floor_ms"]) for r in rows if (r["arm"], r["compiled"]) == (arm, compiled)
        )
        if points:
            capacities, ms, floors = zip(*points, strict=True)
            style: dict[str, Any] = {"color": mpl.colormaps[COLORMAPS[arm]](0.75), "marker": MARKERS[arm]}
            axes.plot(
                capacities, ms, linestyle="--" if compiled else "-", label=_latency_label(arm, compiled, None), **style
            )
            if not compiled:
                floor = "arithmetic / matrix rate" if arm == "recompute" else "bytes read / bandwidth"
                axes.plot(capacities, floors, linestyle=":", color=style["color"], label=f"floor of {arm}: {floor}")
            axes.set_xticks(capacities, [f"{capacity:,}" for capacity in capacities])
    axes.set(xlabel="capacity: sinks + window, tokens", ylabel="ms per token, median", yscale="log")
    plain_ticks(axes)
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.01, 1))


def _latency_curves(result: dict[str, Any]) -> list[tuple[tuple[str, bool, int | None], list[dict[str, Any]], Any]]:
    """Return for each arm what it is (name, compiled, capacity), its rows by context, and its colour."""
    curves: dict[tuple[str, bool, int | None], list[dict[str, Any]]] = {}
    for row in result["rows"]:
        if not row["reason"]:
            curves.setdefault((row["arm"], row["compiled"], row["capacity"]), []).append(row)
    capacities = sorted({capacity for _, _, capacity in curves if capacity is not None})
    order = ("dense", "dense-at-capacity", "static", "recompute", "sink")
    curves = dict(
        sorted(
            curves.items(), key=lambda curve: (*((curve[0][0] != arm) for arm in order), curve[0][1], curve[0][2] or 0)
        )
    )
    colours: list[Any] = []
    for arm, _, capacity in curves:
        shade = 0.4 + 0.55 * (capacities.index(capacity) + 1) / len(capacities) if capacity else 0.8
        named = {"dense": "Greys", "dense-at-capacity": "Greys", "static": "Purples"}
        colours.append(mpl.colormaps[named.get(arm) or COLORMAPS.get(arm, "Reds")](1.0 if arm == "dense" else shade))
    return [
        (what, sorted(rows, key=lambda row: row["context"]), colour)
        for (what, rows), colour in zip(curves.items(), colours, strict=True)
    ]


def _latency_label(arm: str, compiled: bool, capacity: int | None) -> str:
    return arm + (f", {capacity:,} tokens" if capacity else "") + (", compiled" if compiled else "")


def _context_axis(result: dict[str, Any], axes: Axes) -> None:
    contexts = sorted({row["context"] for row in result["rows"]})
    axes.set(xlabel="context: tokens of text before", xscale="log")
    axes.set_xticks(contexts, [f"{context:,}" for context in contexts], rotation=30)
    axes.xaxis.set_minor_locator(NullLocator())
    trained = result["model"]["trained_context"]
    if trained is not None and trained < contexts[-1]:
        axes.axvline(trained, color="grey", linestyle="--", linewidth=1, label=f"trained context: {trained:,}")
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.01, 1))


def endless_steps(result: dict[str, Any], axes: Axes) -> None:
    """Draw the spread of step times of each arm and context as boxes."""
    labels = [f"{row['arm']}\n{row['context']:,}" for row in result["rows"]]
    steps = [[one for turn in row["step_ms"] for one in turn] for row in result["rows"]]
    axes.boxplot(steps, tick_labels=labels, whis=(5, 95), showfliers=False)
    axes.set(ylabel="ms per token", xlabel="arm, tokens of context", yscale="log")
    plain_ticks(axes)
    axes.grid(axis="y", alpha=0.3)


def over_time(result: dict[str, Any], axes: Axes) -> None:
    """Draw time per token and memory against the number of tokens, and write the perplexity of passes beside their points."""
    rows, slopes = result["rows"], result["slopes"]
    tokens, times = ([row[name] for row in rows] for name in ("tokens", "ms_per_token"))
    axes.plot(tokens, times, color="black", marker="." if len(rows) <= 20 else None, label="ms per token")
    # Up to where the first ones, in which all is compiled, do not squeeze the others.
    axes.set(xlabel="tokens", ylabel="ms per token", ylim=(0, 2.5 * float(np.median(times))))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    for row in rows:
        if "perplexity" in row:
            where = (row["tokens"], row["ms_per_token"])
            axes.annotate(
                f"perplexity\n{row['perplexity']:.3f}",
                where,
                (0, 8),
                textcoords="offset points",
                ha="center",
                fontsize=7,
            )
    memory = axes.twinx()
    for name, colour in {"device_bytes": "tab:blue", "host_bytes": "tab:orange"}.items():
        values = [row[name] / MIB for row in rows if row[name] is not None]
        if values:
            label = f"{name.removesuffix('_bytes')} memory: {np.median(values):,.1f} MiB"
            if (fitted := slopes.get(name)) is not None:
                label += f", rising by {round(fitted['rise'] / MIB, 3) + 0.0} MiB"
            memory.plot(tokens, values, color=colour, label=label)
    memory.set_ylabel("MiB")
    memory.set_ylim(0, 1.5 * memory.get_ylim()[1])
    axes.figure.legend(loc="outside lower center", ncols=3, fontsize="small")


def throughput(result: dict[str, Any], axes: Axes) -> None:
    """Draw tokens per second against the number of streams, and what reading weights and cache once a step allows the pool."""
    rows = [row for row in result["rows"] if row["tokens_per_second"] is not None]
    for arm in dict.fromkeys(row["arm"] for row in rows):
        points = sorted((row["streams"], row["tokens_per_second"]) for row in rows if row["arm"] == arm)
        axes.plot(*zip(*points, strict=True), marker="o", label=arm)
    floor = sorted((row["streams"], 1e3 * row["streams"] / row["floor_ms"]) for row in rows if row["arm"] == "pool")
    if floor:
        axes.plot(*zip(*floor, strict=True), marker="_", linestyle="--", color="grey", label="floor of the pool")
    axes.set(xlabel="streams", ylabel="tokens per second", xscale="log", yscale="log")
    plain_ticks(axes)
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)


PLOTS: dict[str, dict[str, Callable[[dict[str, Any], Axes], None]]] = {
    "ppl": {"by-position": ppl_by_position, "by-capacity": ppl_by_capacity},
    "endless": {"steps": endless_steps},
    "longrun": {"over-time": over_time},
    "throughput": {"by-streams": throughput},
    "latency": {"per-token": latency_per_token, "cache": latency_cache, "by-capacity": latency_by_capacity},
}


def plot(path: Path, folder: Path) -> list[Path]:
    """Make the plots of a result file, named after it, and return their paths.

    Raises:
        BenchmarkError: it is not a result file, or one without plots.
    """
    result = read_json(path)
    if result["harness"] not in PLOTS:
        raise BenchmarkError(f"{path} is a result of {result['harness']}, for which there are no plots")
    written = []
    for name, draw in PLOTS[result["harness"]].items():
        figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
        draw(result, axes)
        figure.suptitle("\n".join(textwrap.wrap(result["title"], 80)))
        if axes.has_data():
            written.append(folder / f"{path.stem}-{name}.png")
            figure.savefig(written[-1], dpi=120)
        plt.close(figure)
    return written


def main(argv: Sequence[str] | None = None) -> None:
    """Make the plots of all files on the command line."""
    parser = Parser(prog="python -m benchmarks.plots", description=__doc__)
    parser.add_argument("results", nargs="+", metavar="FILE.json")
    parser.add_argument("--output", help="folder for the PNG files (that of each result)")
    args = parser.parse_args(argv)
    for name in args.results:
        folder = output_folder(args.output) if args.output else Path(name).parent
        for written in plot(Path(name), folder):
            print(f"wrote {written}")


if __name__ == "__main__":
    sys.exit(run(main))
