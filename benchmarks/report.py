"""Tables, pictures, one page and the README's numbers, from result files alone; nothing is measured here."""

from __future__ import annotations

import base64
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import StrMethodFormatter

from . import calls, harness, latency
from .harness import MIB, BenchmarkError, figure

ROOT = Path(__file__).parents[1]
SOURCES = ("results/h100", "results/h100/recompute", "results/h200", "results/cpu", "results")
CAPACITY = 1024  # of the tables that show one
CONTEXTS = (4096, 16384, 32768, 65536)
BESIDE_THE_STUDY = (4096, 8192)  # contexts: it does not say which it had
NEW_LENGTHS_COST = 1.2  # from this ratio on, what new lengths cost is part of a prediction
MARK = re.compile(r"(<!-- (table|figure): (.*?) -->)(.*?)(<!-- end -->)", re.DOTALL)
# The study that this project grew out of (Pythia, StreamingLLM by hooks): ms of the baseline and of StreamingLLM, and the gain;
# of whole runs of Pythia-70M the perplexity (dense: 40.2) and the gain; and its quality at 256, baseline and StreamingLLM.
STUDY_STEPS = pd.DataFrame(
    [
        ("pythia-70m", 256, "3.022 ± 0.774 → 3.161 ± 1.239: 0.96×"),
        ("pythia-70m", 512, "3.073 ± 0.696 → 3.080 ± 0.159: 1.00×"),
        ("pythia-70m", 1024, "3.036 ± 0.203 → 3.244 ± 1.582: 0.94×"),
        ("pythia-70m", 2048, "3.140 ± 0.788 → 3.094 ± 0.094: 1.01×"),
        ("pythia-70m", 4096, "nan → nan: nan"),
        ("pythia-410m", 1024, "11.435 ± 4.969 → 10.632 ± 0.187: 1.08×"),
        ("pythia-1.4b", 1024, "more than 1.5× expected"),
        ("pythia-6.9b", 1024, "more than 1.5× expected"),
    ],
    columns=["shape", "capacity", "the study, ms"],
)
STUDY_RUNS = pd.DataFrame(
    [(256, 48.3, 2.4), (512, 43.1, 2.6), (1024, 41.8, 2.7), (2048, 41.2, 2.9), (4096, 40.8, 3.1)],
    columns=["capacity", "the study: perplexity (dense: 40.2)", "the study: gain"],
)
STUDY_QUALITY = [
    ("Pythia-6.9B (the study)", "1,000 × 3", "12.41 → 12.74", "50.28% → 50.42%", "7.20 → 7.89"),
    ("Pythia-70M (the study)", "2,024 × 10", "39.99 → 43.06", "35.49% → 34.49%", "–"),
    ("Pythia-6.9B (the study)", "5,000 × 1", "54.08 → 31.92", "35.17% → 39.29%", "5.67 → 7.94"),
]
# The StreamingLLM paper, a 7B model on an A6000: ms a token of recomputation and of StreamingLLM. (Its 22.2× is 13B at 4,096.)
PAPER = pd.DataFrame(
    [(256, 63, 31), (512, 103, 31), (1024, 223, 35), (2048, 523, 45), (4096, 1411, 65)],
    columns=["capacity", "the paper: recomputation, ms", "the paper: StreamingLLM, ms"],
)
Row = dict[str, Any]


class Results(list[dict[str, Any]]):
    """Result files, the smallest model and the oldest result first, and frames of their rows and ratios."""

    def __init__(self, paths: Sequence[str | Path]) -> None:
        for file in (
            one for path in map(Path, paths) for one in ([path] if path.is_file() else sorted(path.glob("*.json")))
        ):
            try:
                self.append(harness.read_json(file) | {"file": file.stem})
            except BenchmarkError as error:
                print(f"left out: {error}", file=sys.stderr)
        self.sort(key=lambda one: (one["model"]["parameters"], one["date"]))
        self.made: dict[str, pd.DataFrame] = {}

    def of(self, kind: str) -> list[dict[str, Any]]:
        """Return the results of one harness."""
        return [one for one in self if one["harness"] == kind]

    def frame(self, kind: str) -> pd.DataFrame:
        """Return the rows that have numbers, of `latency`, `calls`, `ppl` …; or `latency ratios`, `calls ratios`."""
        if kind not in self.made:
            kind, _, ratios = kind.partition(" ")
            make = {"latency": latency.ratios, "calls": calls.ratios}[kind] if ratios else list
            names = ("shape", "device", "on", "attention", "file")
            tags = [
                (shape(one), one["device"]["name"], one["device"]["type"], attention(one), one["file"])
                for one in self.of(kind)
            ]
            found = [
                row | dict(zip(names, tag, strict=True))
                for one, tag in zip(self.of(kind), tags, strict=True)
                for row in make(one["rows"])
            ]
            frame = pd.DataFrame([row for row in found if not row.get("reason")])
            for column in {"median_ms", "value"} & set(frame):
                doubt = frame["note" if ratios else "warning"].astype(str).str.contains("too wide|no conclusion")
                frame[f"shown {column}"] = [figure(*one) for one in zip(frame[column], doubt, strict=True)]
            self.made[f"{kind} {ratios}".strip()] = frame
            return frame
        return self.made[kind]


def shape(result: dict[str, Any]) -> str:
    """Return the name of a result's model, without what it says of the weights."""
    return str(result["model"]["name"].removesuffix(" (random weights)"))


def pick(frame: pd.DataFrame, **where: Any) -> pd.DataFrame:
    """Return the rows with these values; of a list, any of them. None is no value."""
    for name, wanted in where.items() if len(frame) else ():
        every = list(wanted) if isinstance(wanted, (list, tuple)) else [wanted]
        frame = frame[
            frame[name].isin([one for one in every if one is not None]) | (frame[name].isna() & (None in every))
        ]
    return frame


def wide(frame: pd.DataFrame, index: Sequence[str], column: str, value: str, says: str = "{}") -> pd.DataFrame:
    """Return the last value of each index and column as a table of their own, its columns named as `says`."""
    if frame.empty or value not in frame:
        return pd.DataFrame(
            index=pd.MultiIndex.from_tuples([], names=index) if len(index) > 1 else pd.Index([], name=index[0])
        )
    found = frame.dropna(subset=[value]).groupby([*index, column], sort=False)[value].last().unstack(column, sort=False)
    return found.rename(columns=says.format)


# --- tables ---


def steps(results: Results, index: Sequence[str], capacities: Sequence[Any], **where: Any) -> pd.DataFrame:
    """Return steps at fixed contexts: ms by arm, the gains, the GPU's own work, and the bytes of caches."""
    rows = pick(results.frame("latency"), capacity=capacities, **where)
    rows = rows.assign(MiB=rows["cache_bytes"] / MIB) if len(rows) else rows
    if "capacity" in index:  # what has no capacity stands beside each
        bounded = rows.dropna(subset=["capacity"])
        free = (
            rows[rows["capacity"].isna()]
            .drop(columns="capacity")
            .merge(bounded[["shape", "capacity"]].drop_duplicates(), on="shape")
        )
        rows = pd.concat([bounded, free])
    gains = pick(results.frame("latency ratios"), capacity=[one for one in capacities if one], **where)
    parts = [wide(rows, index, "arm", "shown median_ms", "{}, ms"), wide(gains, index, "name", "shown value")]
    parts += [
        wide(rows, index, "arm", "gpu_ms", "{}: GPU's own, ms"),
        wide(pick(rows, arm=["dense", "static", "sink"]), index, "arm", "MiB", "{}, MiB"),
    ]
    return pd.concat(parts, axis=1).drop(
        columns=["recompute, ms", "recompute: GPU's own, ms", "recompute_over_sink"], errors="ignore"
    )


def single_steps(results: Results, *, compiled: bool) -> pd.DataFrame:
    """Return single steps with one capacity, eager or compiled: no table holds both."""
    where = {"compiled": compiled, "context": CONTEXTS, "on": "cuda"}
    return steps(results, ["shape", "context"], [CAPACITY, None], **where).dropna(subset=["sink, ms"]).reset_index()


def whole_calls(results: Results) -> pd.DataFrame:
    """Return compiled steps of `generate()`, beside the compiled StaticCache of the same size."""
    rows, index = pick(results.frame("calls"), compiled=True, capacity=[CAPACITY, None]), ["shape"]
    rows = rows.assign(
        step=[f"{arm} after {n:,}" if n > CAPACITY else arm for arm, n in zip(rows.arm, rows.context, strict=True)]
    )
    gains = pick(results.frame("calls ratios"), compiled=True)
    gains = gains.assign(named=[f"{name} at {n:,}" for name, n in zip(gains.name, gains.context, strict=True)])
    return (
        wide(rows, index, "step", "shown median_ms", "{}, ms")
        .join(wide(gains, index, "named", "shown value"))
        .reset_index()
    )


def kernels(results: Results) -> pd.DataFrame:
    """Return what the GPU does in a step, kernel by kernel."""
    rows = pd.concat([results.frame("calls"), results.frame("latency")])
    rows = pick(rows, capacity=[CAPACITY, None]).dropna(subset=["kernel_ms"]) if "kernel_ms" in rows else pd.DataFrame()
    sums = pd.DataFrame(list(rows.get("kernel_ms", ())), index=rows.index)
    return rows[["shape", "arm", "compiled", "context"]].join(sums) if len(rows) else rows


def study_steps(results: Results) -> pd.DataFrame:
    """Return the study's steps, which were eager, beside the same here."""
    context = max(
        set(pick(results.frame("latency"), shape="pythia-70m", arm="dense")["context"]) & set(BESIDE_THE_STUDY),
        default=0,
    )
    found = steps(
        results, ["shape", "capacity"], [*STUDY_STEPS["capacity"], None], compiled=False, context=context, on="cuda"
    )
    return STUDY_STEPS.assign(context=context).merge(found.reset_index(), how="left", on=["shape", "capacity"])


def study_runs(results: Results) -> pd.DataFrame:
    """Return the study's whole runs of Pythia-70M beside ours."""
    found = pick(regimes(results), shape="pythia-70m")
    found = found[found["tokens"] >= 4096] if len(found) else found
    parts = [wide(found, ["capacity"], "device", value, f"{{}}: {value}") for value in ("measured", "predicted")]
    return STUDY_RUNS.merge(pd.concat(parts, axis=1).reset_index(), how="left", on="capacity")


def study_quality(results: Results) -> pd.DataFrame:
    """Return the study's perplexities and accuracies beside those of SmolLM2, whose trained context is 8,192 tokens."""
    lines = list(STUDY_QUALITY)
    for one in results.of("ppl"):
        if one["protocol"]["mode"] == "step" and one["model"]["weights"] == "trained":
            both = [
                pick(pd.DataFrame(one["rows"]), arm=arm, capacity=k).iloc[-1]
                for arm, k in (("dense", None), ("sink", 256))
            ]
            shown = [
                " → ".join(f"{row[name]:{style}}" for row in both)
                for name, style in (("perplexity", ".2f"), ("accuracy", ".2%"), ("tokens_per_second", ".0f"))
            ]
            lines.append(
                (
                    f"{shape(one)}, {one['device']['name']}",
                    f"{one['data']['max_tokens']:,} × {one['data']['samples']}",
                    *shown,
                )
            )
    lines.sort(key=lambda line: line[1].replace("2,024", "2,000"))
    return pd.DataFrame(
        lines, columns=["model", "tokens × samples", "perplexity, dense → 4+252", "accuracy", "tokens/s"]
    )


def quality(results: Results) -> pd.DataFrame:
    """Return perplexities by capacity, of the last run that scores tokens far from the start of a text only."""
    runs = [one for one in results.of("ppl") if (one["data"] | one["protocol"]).get("score_from", 1) > 1]
    rows = pick(results.frame("ppl"), file=[one["file"] for one in runs[-1:]])
    rows = rows.assign(
        capacity=rows["capacity"].map(figure), same=[(one or {}).get("perplexity") for one in rows["same_tokens"]]
    )
    parts = (
        wide(rows, ["capacity"], "arm", "perplexity"),
        wide(pick(rows, arm=["sink", "dense"]), ["capacity"], "arm", "same", "{}, tokens of recompute"),
    )
    return (
        parts[0]
        .join(parts[1])
        .drop(columns="dense-batched", errors="ignore")
        .reset_index()
        .sort_values("capacity", key=lambda c: c.str.len() + (c == "–") * -9)
    )


def paper(results: Results) -> pd.DataFrame:
    """Return the paper's recomputation beside that of Llama-2-7B here: eager steps, compiled ones, and the GPU's own work."""
    where = {"shape": "llama-2-7b", "capacity": list(PAPER["capacity"])}
    rows, gains = (pick(results.frame(name), **where) for name in ("latency", "latency ratios"))
    gains = pick(gains, name="recompute_over_sink")
    index, kinds = ["capacity"], {False: "eager", True: "compiled"}
    rows, gains = (one.assign(steps=one["compiled"].map(kinds)) for one in (rows, gains))
    rows = rows.assign(steps=rows["arm"] + ", " + rows["steps"])
    parts = [
        wide(pick(rows, arm=["recompute", "sink"]), index, "steps", "shown median_ms", "{}, ms"),
        wide(gains, index, "steps", "shown value", "gain, {}"),
    ]
    parts.append(wide(gains, index, "steps", "gpu_value", "gain of the GPU's own work, {}"))
    theirs = PAPER.assign(gain=[f"{a / b:.1f}×" for a, b in zip(PAPER.iloc[:, 1], PAPER.iloc[:, 2], strict=True)])
    return theirs.merge(pd.concat(parts, axis=1).reset_index(), how="left", on="capacity")


def new_lengths(results: Results) -> pd.DataFrame:
    """Return what a dense step takes at a length that the process has never seen, and when it comes again."""
    rows = pick(results.frame("latency"), arm="dense", attention="auto")
    rows = rows[rows["first_time_ms"].map(bool)] if len(rows) else rows
    for name in ("first_time_ms", "again_ms") if len(rows) else ():
        rows = rows.assign(**{name: rows[name].map(statistics.median)})
    return rows[["shape", "device", "context", "first_time_ms", "again_ms"]].drop_duplicates(
        ["shape", "device", "context"], keep="last"
    )


def long_runs(results: Results) -> pd.DataFrame:
    """Return what long runs noted, what rose meanwhile, and the perplexity of the first and last pass over a text."""
    lines = []
    for one in results.of("longrun"):
        rows, rise = one["rows"], {f"rise of {name}": line["rise"] for name, line in one["slopes"].items() if line}
        line = {
            "run": one["file"],
            "tokens": rows[-1]["tokens"],
            "ms per token": statistics.median(row["ms_per_token"] for row in rows),
        }
        lines.append(
            line
            | rise
            | {f"perplexity, {i}": rows[j].get("perplexity") for i, j in (("first pass", 0), ("last pass", -1))}
        )
    return pd.DataFrame(lines)


# --- the two regimes ---


class Curve:
    """Milliseconds of an eager step against the tokens before it, not synchronised where that was measured."""

    def __init__(self, result: dict[str, Any], arm: str, capacity: int | None = None) -> None:
        rows = [
            row for row in result["rows"] if (row["arm"], row["compiled"], row["capacity"]) == (arm, False, capacity)
        ]
        self.rows = {row["context"]: row for row in rows if not row["reason"]}
        free = self.rows and all(row["unsynchronized_ms"] for row in self.rows.values())
        self.ms = {
            n: statistics.median(r["unsynchronized_ms"]) if free else r["median_ms"]
            for n, r in sorted(self.rows.items())
        }

    def ratio_to(self, other: Curve, context: int) -> dict[str, Any]:
        """Return what this arm takes over what `other` does in turns with it; unsynchronised turns if there are enough."""
        rows = self.rows[context], other.rows[context]
        free = [[[ms] for ms in row["unsynchronized_ms"] or ()] for row in rows]
        enough = min(map(len, free)) >= harness.FEWEST_ROUNDS
        return harness.ratio_of_rounds(*(free if enough else [row["step_ms"] for row in rows]))

    def beside(self, other: Curve) -> dict[int, float]:
        """Return the same as `other`'s median times the ratio to it, in which what slows down both cancels."""
        return {n: other.ms[n] * self.ratio_to(other, n)["value"] if n in other.ms else ms for n, ms in self.ms.items()}

    def new_length_factor(self) -> float:
        """Return how many times longer a step is at a length never seen before; 1 if that is not worth counting."""
        rows = [row for row in self.rows.values() if row.get("first_time_ms")]
        factors = [statistics.median(row["first_time_ms"]) / statistics.median(row["again_ms"]) for row in rows] or [
            1.0
        ]
        factor = statistics.median(factors)
        return factor if factor >= NEW_LENGTHS_COST else 1.0


def sum_ms(ms: dict[int, float], tokens: int, factor: float = 1.0, new: slice = slice(0)) -> float:
    """Return the time of reading so many tokens one by one, of which those at `new` lengths take `factor` times as long."""
    times = np.interp(np.arange(tokens), list(ms), list(ms.values()))
    times[new] *= factor
    return float(times.sum())


def attention(result: dict[str, Any]) -> str:
    """Return which attention backends were asked for."""
    return str(result["protocol"].get("sdpa_backend", "auto"))


def setting(result: dict[str, Any]) -> tuple[Any, ...]:
    """Return what two results must share to be compared. Times do not depend on the values of weights."""
    device, model = result["device"], result["model"]
    threads = result["threads"] if device["type"] == "cpu" else None
    return model["type"], model["parameters"], device["name"], result["dtype"], threads, attention(result)


def regimes(results: Results) -> pd.DataFrame:
    """Return whole runs beside steps: the gain that was measured, and that which the steps, summed over the run, predict.

    Of several latency results it is the one nearest in time. Only runs of one token per step and sample are predicted, up to
    the last context that was measured. All lengths of the first sample but those of the warm-up are new for a dense cache, and
    for a bounded one until it is full.
    """
    lines = []
    runs = [one for one in results.of("ppl") if (one["protocol"]["mode"], one["protocol"]["batch_size"]) == ("step", 1)]
    pairs = [(one, row) for one in runs for row in one["rows"] if row["arm"] == "sink" and not row["reason"]]
    for run, sink_row in pairs:
        capacity, moment = sink_row["capacity"], datetime.fromisoformat(run["date"])
        dense_row = next((row for row in run["rows"] if row["arm"] == "dense" and not row["reason"]), None)
        near = [one for one in results.of("latency") if setting(one) == setting(run)]
        near.sort(key=lambda one: abs(datetime.fromisoformat(one["date"]) - moment))
        curves = ((Curve(one, "dense"), Curve(one, "sink", capacity)) for one in near)
        dense, sink = next((both for both in curves if both[0].ms and both[1].ms), (None, None))
        if dense is None or sink is None or dense_row is None:
            continue
        samples = [batch["tokens_processed"] for batch in dense_row["batches"]]
        known, of_sink = run["run"]["warm_up_tokens"], sink.beside(dense)
        ms = [0.0, 0.0]
        for number, tokens in enumerate(samples):
            factor = dense.new_length_factor() if number == 0 else 1.0
            ms[0] += sum_ms(dense.ms, tokens, factor, slice(known, None))
            ms[1] += sum_ms(of_sink, tokens, factor, slice(known, capacity))
        last = max((n for n in dense.ms if n in sink.ms and n <= max(samples)), default=min(sink.ms))
        measured = sink_row["tokens_per_second"] / dense_row["tokens_per_second"]
        predicted = ms[0] / ms[1] if max(samples) <= min(max(dense.ms), max(*sink.ms, capacity)) else None
        line = {
            "shape": shape(run),
            "device": run["device"]["name"],
            "attention": attention(run),
            "tokens": max(samples),
        }
        line |= {"samples": len(samples), "capacity": capacity, "last step": dense.ratio_to(sink, last)["value"]}
        line |= {"measured": measured, "predicted": predicted}
        lines.append(line | {"difference": f"{predicted / measured - 1:+.0%}" if predicted else None})
    return pd.DataFrame(lines)


TABLES: dict[str, Callable[[Results], pd.DataFrame]] = {
    "compiled steps": lambda results: single_steps(results, compiled=True),
    "eager steps": lambda results: single_steps(results, compiled=False),
    "whole calls": whole_calls,
    "kernels": kernels,
    "regimes": regimes,
    "new lengths": new_lengths,
    "the study's steps": study_steps,
    "the study's runs": study_runs,
    "the study's quality": study_quality,
    "quality": quality,
    "the paper": paper,
    "long runs": long_runs,
}


# --- pictures: each part draws on axes and returns a title that says the finding, or nothing if there are no numbers ---

OURS = "sinks + window (ours)"


def line(axes: Axes, x: Any, y: Any, label: str) -> None:
    """Draw a line, with plain numbers on both axes."""
    axes.plot(x, y, label=label, marker="o", markersize=4)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axes.legend(fontsize="small")


def by_position(results: Results, axes: Axes) -> str:
    """Draw perplexity by position on the longest text that was read beyond the trained context."""
    runs = [one for one in results.of("ppl") if one["model"]["weights"] == "trained"]
    run = max(runs, key=lambda one: one["data"]["max_tokens"], default=None)
    if run is None or run["data"]["max_tokens"] <= run["model"]["trained_context"]:
        return ""
    for arm, label in (("dense", "dense cache"), ("window", "window without sinks"), ("sink", OURS)):
        for row in [row for row in run["rows"] if row["arm"] == arm][:1]:
            bins = row["by_position"]
            line(axes, [(one["start"] + one["stop"]) / 2 for one in bins], [one["perplexity"] for one in bins], label)
    axes.axvline(run["model"]["trained_context"], color="grey", linestyle=":")
    axes.set(xlabel="tokens before", ylabel="perplexity (lower is better)", yscale="log")
    return "Beyond the trained context only sinks + window holds"


def by_context(results: Results, axes: Axes, column: str) -> str:
    """Draw a column of latency by context for the largest shape that has dense and bounded caches at several contexts."""
    compiled = (
        pick(results.frame("latency"), compiled=True, arm="static")
        .groupby("shape", sort=False)["context"]
        .nunique()
        .gt(1)
    )
    shapes = (
        compiled[compiled].index
        if column == "median_ms"
        else pick(results.frame("latency"), arm="dense")["shape"].unique()
    )
    is_compiled = len(shapes) > 0 and column == "median_ms"
    shapes, column = (
        (shapes, column) if len(shapes) else (pick(results.frame("latency"), arm="dense")["shape"].unique(), "gpu_ms")
    )
    ends = []
    for arm, capacity, label in (("static" if is_compiled else "dense", None, "dense cache"), ("sink", CAPACITY, OURS)):
        found = pick(results.frame("latency"), shape=shapes[-1], arm=arm, capacity=capacity, compiled=is_compiled)
        found = found.dropna(subset=[column]).drop_duplicates("context", keep="last")
        line(axes, found["context"], found[column] / (MIB if column == "cache_bytes" else 1), label)
        ends += list(found[column][-1:])
    what = {
        "cache_bytes": "cache, MiB",
        "median_ms": "ms per token, compiled",
        "gpu_ms": "ms per token, GPU's own work",
    }[column]
    axes.set(xlabel="context, tokens", ylabel=f"{what} (lower is better)", ylim=(0, None))
    word = "Memory" if column == "cache_bytes" else "Time per token"
    return f"{word} stays flat: {ends[0] / ends[1]:.2g} times less ({shapes[-1]})" if len(ends) == 2 else ""


def by_capacity(results: Results, axes: Axes) -> str:
    """Draw perplexity by capacity."""
    rows = pick(quality(results), window=None)
    rows = quality(results).dropna(subset=["sink"])
    for arm, label in (("window", "window without sinks"), ("sink", OURS)):
        line(axes, rows["capacity"], rows[arm], label)
    axes.axhline(quality(results)["dense"].max(), color="black", label="dense cache")
    axes.legend(fontsize="small")
    axes.set(xlabel="capacity, tokens", ylabel="perplexity (lower is better)")
    return "Four sinks make up for most of what a window loses" if len(rows) else ""


def two_regimes(results: Results, axes: Axes) -> str:
    """Draw the gain of a step, and of whole runs as measured and as predicted from steps."""
    rows = regimes(results)
    labels = {
        "last step": "a step at the end",
        "measured": "whole run, measured",
        "predicted": "whole run, predicted from steps",
    }
    for (column, label), marker in zip(labels.items(), "osx", strict=True):
        axes.plot(rows[column], range(len(rows)), marker, label=label)
    names = [
        f"{one.shape}, {one.device.split()[-1]}, {one.capacity:,} of {one.tokens:,} ({one.attention})"
        for one in rows.itertuples()
    ]
    axes.set_yticks(range(len(rows)), names, fontsize="x-small")
    axes.set(xlabel="times as fast as a dense cache (higher is better)")
    axes.legend(fontsize="small")
    return "Whole runs gain what their steps gain, summed over all lengths" if len(rows) else ""


def price_of_new_lengths(results: Results, axes: Axes) -> str:
    """Draw what a dense step takes at new lengths, and again, where that differs most."""
    rows = new_lengths(results)
    worst = rows.loc[(rows["first_time_ms"] / rows["again_ms"]).idxmax()] if len(rows) else None
    rows = pick(rows, shape=worst["shape"], device=worst["device"]) if worst is not None else rows
    for column, label in (("first_time_ms", "at a length never seen"), ("again_ms", "at the same length again")):
        line(axes, rows["context"], rows[column], label)
    axes.set(xlabel="context, tokens", ylabel="ms per token, dense cache (lower is better)", yscale="log")
    return f"A dense cache pays for every new length, a ring has one ({worst['shape']})" if worst is not None else ""


PICTURES: dict[str, Sequence[Callable[[Results, Axes], str]]] = {
    "hero": (
        by_position,
        lambda results, axes: by_context(results, axes, "cache_bytes"),
        lambda results, axes: by_context(results, axes, "median_ms"),
    ),
    "quality": (by_capacity,),
    "regimes": (two_regimes,),
    "new-lengths": (price_of_new_lengths,),
}


def draw(results: Results, folder: Path) -> list[Path]:
    """Draw the pictures that there are numbers for, and return their paths."""
    written = []
    for name, parts in PICTURES.items():
        drawn, panels = plt.subplots(
            1, len(parts), figsize=(2 + 5 * len(parts), 4.5), layout="constrained", squeeze=False
        )
        titles = [part(results, axes) for part, axes in zip(parts, panels[0], strict=True)]
        for axes, title in zip(panels[0], titles, strict=True):
            axes.set_title(title, fontsize="medium")
        if all(titles):
            written.append(folder / f"{name}.png")
            drawn.savefig(written[-1], dpi=110)
        plt.close(drawn)
    return written


# --- the page, and the README ---


def number(results: Results, query: str) -> str:
    """Return one figure: a frame, what its row must have, and a column, as in `latency shape=pythia-70m arm=sink median_ms`."""
    kind, *wanted, column = query.split()
    where = {
        name: {"True": True, "False": False}.get(v, int(v) if v.isdecimal() else v)
        for name, v in (w.split("=") for w in wanted)
    }
    found = pick(results.frame(kind.replace("-", " ")), **where)
    if found.empty or pd.isna(found[column].iloc[-1]):
        raise BenchmarkError(f"no result has the figure {query!r}")
    shown = f"shown {column}"
    return str(found[shown].iloc[-1]) if shown in found else figure(found[column].iloc[-1].item())


def write(text: str, results: Results) -> str:
    """Return a text with its marked tables and figures made anew."""

    def fill(found: re.Match[str]) -> str:
        if found[2] == "figure":
            return found[1] + number(results, found[3]) + found[5]
        if found[3] not in TABLES:
            raise BenchmarkError(f"unknown table {found[3]!r}: choose {', '.join(TABLES)}")
        return f"{found[1]}\n{harness.table(TABLES[found[3]](results))}\n{found[5]}"

    return MARK.sub(fill, text)


def page(results: Results, pictures: Sequence[Path]) -> str:
    """Return one HTML page that holds everything."""
    frames = {name: table(results).astype(object).map(figure) for name, table in TABLES.items()}
    tables = {name: frame.to_html(index=False) for name, frame in frames.items() if len(frame)}
    images = {path.stem: base64.b64encode(path.read_bytes()).decode() for path in pictures}
    template = jinja2.Template((Path(__file__).parent / "page.html").read_text(encoding="utf-8"), autoescape=True)
    return template.render(tables=tables, images=images, results=results)


def main(argv: Sequence[str] | None = None) -> None:
    """Write the pictures and the page, or the tables and figures of a text."""
    parser = harness.Parser("report", __doc__, measures=False)
    parser.add_argument("results", nargs="*", metavar="FILE|FOLDER", help=f"({' '.join(SOURCES)})")
    parser.add_argument(
        "--output", default="build/benchmarks", help="folder of report.html and its pictures (%(default)s)"
    )
    parser.add_argument(
        "--write", nargs="+", metavar="FILE.md", help="instead, the marked tables and figures of these texts"
    )
    args = parser.parse_args(argv)
    results = Results(args.results or [ROOT / source for source in SOURCES])
    if not results:
        raise BenchmarkError("there are no results in these files")
    for path in map(Path, args.write or ()):
        path.write_text(write(path.read_text(encoding="utf-8"), results), encoding="utf-8")
    if not args.write:
        folder = harness.output_folder(args.output)
        (folder / "report.html").write_text(page(results, draw(results, folder)), encoding="utf-8")
        print(f"wrote {folder / 'report.html'}")


if __name__ == "__main__":
    sys.exit(harness.run(main))
