"""Tables, pictures, one page and the README's numbers, from result files alone; nothing is measured here."""

from __future__ import annotations

import base64
import itertools
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import partial
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
SOURCES = ("results/h200", "results/cpu")
CAPACITY = 1024  # of the tables that show one
CONTEXTS = (4096, 16384, 32768, 65536)
BESIDE_THE_STUDY = (4096, 8192)  # contexts: it does not say which it had
DOUBTS = "too wide|no conclusion"
NEW_LENGTHS_COST = 1.2  # from this ratio on, what new lengths cost is part of a prediction
MARK = re.compile(r"(?<!`)(<!-- (table|figure): (.*?) -->)(.*?)(<!-- end -->)", re.DOTALL)
OTHERS = ROOT / "results" / "others"  # figures of other people

COLUMNS = [
    "shape", "device", "on", "attention", "file", "arm", "compiled", "context", "capacity", "name", "note", "warning", "what",
    "median_ms", "gpu_ms", "cache_bytes", "value", "gpu_value", "first_time_ms", "again_ms", "kernel_ms", "perplexity", "streams",
    "same_tokens", "text", "tokens", "measured", "predicted", "last step", "floor_ms", "tokens_per_second", "step_ms",
]  # of frames without rows  # fmt: skip

RECALL = ["task", "method", "n_sink", "capacity", "asked", "distance_tokens", "text_tokens", "questions"]
RECALL += ["accuracy", "accuracy_low", "accuracy_high", "nats_saved", "ms_per_question"]


class Results(list[dict[str, Any]]):
    """Result files, the smallest model and the oldest result first."""

    def __init__(self, paths: Sequence[str | Path]) -> None:
        folders = [sorted(Path(path).glob("*.json")) if Path(path).is_dir() else [Path(path)] for path in paths]
        for file in itertools.chain(*folders):
            try:
                result = harness.read_json(file) | {"file": file.stem}
            except BenchmarkError as error:
                print(f"left out: {error}", file=sys.stderr)
            else:
                self += [result] if result["harness"] != "serve" else []  # which is no comparison
        self.sort(key=lambda one: (one["model"]["parameters"], one["date"]))
        self.made: dict[str, pd.DataFrame] = {}

    def of(self, kind: str) -> list[dict[str, Any]]:
        """Return the results of one harness."""
        return [one for one in self if one["harness"] == kind]

    def frame(self, kind: str) -> pd.DataFrame:
        """Return the rows that have numbers, of `latency`, `calls`, `ppl` …; or `latency-ratios`, `calls-ratios`."""
        if kind not in self.made:
            make = {"latency-ratios": latency.ratios, "calls-ratios": calls.ratios}.get(kind, list)
            found = []
            for one in self.of(kind.removesuffix("-ratios")):
                tags = {"shape": shape(one), "device": one["device"]["name"], "on": one["device"]["type"]}
                tags |= {"attention": attention(one), "file": one["file"]}
                tags |= {"max_tokens": one.get("data", {}).get("max_tokens")}
                found += [{"note": "", "warning": "", "reason": ""} | row | tags for row in make(one["rows"])]
            rows = [row for row in found if not row["reason"]]
            self.made[kind] = pd.DataFrame(rows) if rows else pd.DataFrame(columns=COLUMNS)
        return self.made[kind]

    def cells(self, kind: str) -> pd.DataFrame:
        """Return figures as a long table, one in a row: `what` it is, and how it is `shown`, of `latency` or `calls`."""
        if f"{kind} cells" not in self.made:
            rows, gains = self.frame(kind), self.frame(f"{kind}-ratios")
            rows, gains = (one.assign(how=one["compiled"].map({True: " compiled", False: ""})) for one in (rows, gains))
            arm, gain = rows["arm"] + rows["how"], gains["name"] + gains["how"]
            parts = [rows.assign(what=arm + ", ms", value=rows["median_ms"]), gains.assign(what=gain)]
            if kind == "latency":
                parts.append(rows.assign(what=arm + ", GPU ms", value=rows["gpu_ms"]))
                parts.append(rows.assign(what=rows["arm"] + ", cache MiB", value=rows["cache_bytes"] / MIB))
                parts.append(gains.assign(what=gain + ", GPU", value=gains["gpu_value"]))
            cells = pd.concat(parts).dropna(subset=["value"])
            wide = (cells["note"] + cells["warning"]).str.contains(DOUBTS)
            doubts = wide & ~cells["what"].str.contains("GPU|MiB")
            shown = [figure(value, doubt) for value, doubt in zip(cells["value"], doubts, strict=True)]
            self.made[f"{kind} cells"] = cells.assign(shown=shown)
        return self.made[f"{kind} cells"]


def shape(result: dict[str, Any]) -> str:
    """Return the name of a result's model, without what it says of the weights."""
    return str(result["model"]["name"].removesuffix(" (random weights)"))


def pick(frame: pd.DataFrame, **where: Any) -> pd.DataFrame:
    """Return the rows with these values; of a list, any of them. None is no value."""
    for name, wanted in where.items() if len(frame) else ():
        every = wanted if isinstance(wanted, (list, tuple)) else [wanted]
        known = frame[name].isin([one for one in every if one is not None])
        frame = frame[known | (frame[name].isna() & (None in every))]
    return frame


def pivot(cells: pd.DataFrame, index: Sequence[str], wanted: Sequence[str] = (), what: str = "what") -> pd.DataFrame:
    """Return the last figure for each index as rows, with what is `wanted` as columns in that order, or with all there is."""
    found = cells.groupby([*index, what], sort=False)["shown"].last().unstack(what, sort=False).reset_index()
    return found.reindex(columns=[*index, *wanted]) if wanted or found.empty else found


def arrow(frame: pd.DataFrame, before: str, after: str) -> Any:
    """Return two columns of figures as one, none where one is missing."""
    return frame[before].astype("string") + " → " + frame[after].astype("string")


# --- tables ---


def single_steps(results: Results, *, compiled: bool) -> pd.DataFrame:
    """Return single steps with one capacity, eager or compiled: no table holds both. The GPU's own work leads the eager ones."""
    wanted = {"dense, GPU ms": "dense, GPU ms", "sink, GPU ms": "ours, GPU ms", "achieved, GPU": "gain, GPU"}
    wanted |= {"achieved": "gain, clock"}
    if compiled:
        wanted = {"static compiled, ms": "dense, ms", "static-at-capacity compiled, ms": "dense of that capacity, ms"}
        wanted |= {"sink compiled, ms": "ours, ms", "achieved compiled": "gain"}
    cells = pick(results.cells("latency"), compiled=compiled, context=CONTEXTS, capacity=[CAPACITY, None], on="cuda")
    cells = cells.assign(**{"shape, tokens before": cells["shape"] + cells["context"].map(", {:,}".format)})
    found = pivot(cells, ["shape, tokens before"], list(wanted)).rename(columns=wanted)
    return found[found.iloc[:, 1:].notna().sum(axis=1) > 1]


def memory(results: Results) -> pd.DataFrame:
    """Return the bytes of the caches."""
    rows = pick(results.frame("latency"), context=CONTEXTS, capacity=[CAPACITY, None], on="cuda")
    rows = rows.assign(what=rows["arm"].replace("static", "dense"), shown=rows["cache_bytes"].astype(float) / MIB)
    found = pivot(rows, ["shape", "context"], ["dense", "sink"]).dropna()
    found = found.assign(ratio=found["dense"] / found["sink"])
    return found.set_axis(["shape", "tokens before", "dense, MiB", "ours, MiB", "times less"], axis=1)


def time_and_memory(results: Results) -> pd.DataFrame:
    """Return memory, the GPU's work in eager steps and compiled steps after the longest text, from a dense cache to ours."""
    key = "shape, tokens before"
    found = memory(results).drop_duplicates("shape", keep="last")
    found[key] = found["shape"] + found["tokens before"].map(", {:,}".format)
    found[["dense, MiB", "ours, MiB"]] = found[["dense, MiB", "ours, MiB"]].map("{:,.0f}".format)
    for compiled in (False, True):
        found = found.merge(single_steps(results, compiled=compiled), how="left", on=key)
    shown = {"cache, MiB": "MiB", "GPU's work, eager, ms": "GPU ms", "compiled step, ms": "ms"}
    columns = {name: arrow(found, f"dense, {unit}", f"ours, {unit}") for name, unit in shown.items()}
    return found[[key]].assign(**columns, gain=found["gain"])


def whole_calls(results: Results) -> pd.DataFrame:
    """Return compiled steps of `generate()` and of `endless`, beside the compiled StaticCache of the same size."""
    wanted = {f"{arm} compiled, ms": f"{arm}, ms" for arm in ("static-at-capacity", "sink", "endless")}
    wanted["endless / static-at-capacity compiled"] = "endless / static"
    cells = pick(results.cells("calls"), compiled=True, capacity=CAPACITY)
    return pivot(cells.drop_duplicates(["shape", "what"]), ["shape"], list(wanted)).rename(columns=wanted)


def kernels(results: Results) -> pd.DataFrame:
    """Return what the GPU does in a compiled step, in ms, kernel by kernel."""
    rows = results.frame("latency").reindex(columns=COLUMNS).dropna(subset=["kernel_ms"])
    rows = pick(rows, compiled=True, arm=["static", "static-at-capacity", "sink"], capacity=[CAPACITY, None])
    sums = pd.DataFrame(list(rows["kernel_ms"]), rows.index, ["attention", "matrix products", "cache", "other"])
    sums["rest"] = sums.pop("cache") + sums.pop("other")
    return rows[["shape", "arm"]].join(sums)


def study_steps(results: Results) -> pd.DataFrame:
    """Return the study's steps, which were eager, beside the same here: by the clock, and the GPU's own work."""
    theirs, found = pd.read_csv(OTHERS / "study-steps.csv"), pick(results.cells("latency"), compiled=False, on="cuda")
    found = pick(found, context=BESIDE_THE_STUDY, capacity=[*theirs["capacity"], None])
    dense = pivot(pick(found, arm="dense"), ["shape"], ["dense, ms", "dense, GPU ms"])
    wanted = ["sink, ms", "sink, GPU ms", "achieved", "achieved, GPU"]
    ours = pivot(found.dropna(subset=["capacity"]), ["shape", "capacity"], wanted)
    every = theirs.merge(dense, how="left", on="shape").merge(ours, how="left", on=["shape", "capacity"])
    clock = arrow(every, "dense, ms", "sink, ms") + ": " + every["achieved"].astype("string") + "×"
    gpu = arrow(every, "dense, GPU ms", "sink, GPU ms") + ": " + every["achieved, GPU"].astype("string") + "×"
    return theirs.assign(**{"here, ms": clock, "here, GPU ms": gpu})


def study_runs(results: Results) -> pd.DataFrame:
    """Return the study's whole runs of Pythia-70M beside ours on the CPU."""
    theirs, found = pd.read_csv(OTHERS / "study-runs.csv"), regimes(results)
    found = pick(found, shape="pythia-70m", text="first", tokens=found["tokens"].max()).drop_duplicates("capacity")
    found = found.reindex(columns=["capacity", "measured", "predicted"])
    return theirs.merge(found.set_axis(["capacity", "our gain, measured", "our gain, predicted"], axis=1), how="left")


def study_quality(results: Results) -> pd.DataFrame:
    """Return the study's perplexities and accuracies beside those of SmolLM2, whose trained context is 8,192 tokens."""
    lines, styles = [], {"perplexity": ".2f", "accuracy": ".2%", "tokens_per_second": ".1f"}
    for one in results.of("ppl"):
        if one["protocol"]["mode"] == "step" and one["model"]["weights"] == "trained":
            both = [row for row in one["rows"] if (row["arm"], row["capacity"]) in (("dense", None), ("sink", 256))]
            shown = [" → ".join(f"{row[name]:{style}}" for row in both) for name, style in styles.items()]
            data, name = one["data"], f"{shape(one)}, {one['device']['name']}"
            lines.append([name, f"{data['max_tokens']:,} × {data['samples']}", *shown])
    theirs = pd.read_csv(OTHERS / "study-quality.csv")
    found = pd.concat([theirs, pd.DataFrame(lines, columns=theirs.columns)])
    return found.sort_values("tokens × samples", key=lambda shown: shown.str[0], kind="stable")


def quality(results: Results) -> pd.DataFrame:
    """Return perplexities by capacity, of the last run that scores tokens far from the start of a text only."""
    runs = [one for one in results.of("ppl") if (one["data"] | one["protocol"]).get("score_from", 1) > 1]
    runs = [one for one in runs if not one["protocol"].get("n_sinks")]
    rows = pick(results.frame("ppl"), file=[one["file"] for one in runs[-1:]]).sort_values("capacity")
    rows = rows[rows["arm"] != "dense-batched"].assign(shown=rows["perplexity"])
    rows["capacity"] = ["dense" if pd.isna(one) else int(one) for one in rows["capacity"]]
    rows["arm"] = rows["arm"].replace("dense", "sink")  # in one column: its row says that it is dense
    same = rows[rows["arm"] == "sink"]
    same = same.assign(shown=[(one or {}).get("perplexity") for one in same["same_tokens"]])
    return pivot(pd.concat([rows, same.assign(arm="this row, same tokens")]), ["capacity"], what="arm")


def paper(results: Results) -> pd.DataFrame:
    """Return the paper's recomputation of Llama-2-7B beside that of the same shape here, in eager steps."""
    theirs = pd.read_csv(OTHERS / "paper.csv")
    cells = pick(results.cells("latency"), shape="llama-2-7b", compiled=False, capacity=list(theirs["capacity"]))
    wanted = ["recompute, ms", "sink, ms", "recompute_over_sink"]
    every = theirs.merge(pivot(cells, ["capacity"], wanted), how="left", on="capacity")
    here = arrow(every, "recompute, ms", "sink, ms")
    return theirs.assign(**{"here: recompute → sinks, ms": here, "gain here": every["recompute_over_sink"]})


def new_lengths(results: Results) -> pd.DataFrame:
    """Return what a dense step takes on a GPU at a length that the process has never seen, and when it comes again."""
    rows = pick(results.frame("latency"), arm="dense", attention="auto", on="cuda")
    rows = rows[rows["first_time_ms"].map(len) > 0].drop_duplicates(["shape", "context"], keep="last")
    rows = rows.assign(**{name: rows[name].map(statistics.median) for name in ("first_time_ms", "again_ms")})
    rows["order"] = pd.factorize(rows["shape"])[0]
    return rows.sort_values(["order", "context"])[["shape", "context", "first_time_ms", "again_ms"]]


def throughput_rows(results: Results, what: str, columns: dict[str, str]) -> pd.DataFrame:
    """Return some columns of what `benchmarks.throughput` measured, with names for a reader."""
    rows = pick(pd.json_normalize(results.frame("throughput").to_dict("records")), what=what)
    rows = rows.reindex(columns=list(dict.fromkeys(["shape", "streams", *columns])))
    rows["streams"] = [
        f"{name} × {n:.0f}" if n > 0 else name for name, n in zip(rows["shape"], rows["streams"], strict=True)
    ]
    return rows.rename(columns={"streams": "shape × streams"} | columns).drop(columns="shape")


THROUGHPUT = {
    "pool": ("steady", {"arm": "arm", "tokens_per_second": "tokens/s", "step_ms": "step, ms", "floor_ms": "floor, ms"}),
    "gap": (
        "gap",
        {
            "step_ms_before.median": "step before, ms",
            "step_ms_while.median": "step while a text is read, ms",
            "step_ms_while.max": "longest, ms",
        },
    ),
    "traffic": (
        "traffic",
        {
            "requests": "requests",
            "share_of_ideal": "share of no waiting",
            "time_to_first_token_s.p50": "first token, s",
            "time_to_first_token_s.p95": "95% of them, s",
        },
    ),
    "soak": (
        "soak",
        {"steps": "steps", "streams_finished": "streams", "checked": "checked", "the_same_alone": "the same alone"},
    ),
    "reading": ("read", {"chunk_size": "tokens a forward", "tokens_per_second": "tokens/s"}),
    "rows": ("rows", {"rows": "lengths of rows", "median_ms": "step, ms", "p5_ms": "5%", "p95_ms": "95%"}),
}


def recall(results: Results, task: str = "copy") -> pd.DataFrame:
    """Return the rows of a task of `recall` at the capacity of the tables, of each model's last run."""
    rows = results.frame("recall").reindex(columns=[*RECALL, "shape", "file"])
    rows = pick(rows, task=task, capacity=[CAPACITY, None] if task == "copy" else list(rows["capacity"].unique()))
    return rows[rows["file"].isin(rows.drop_duplicates(["shape", "n_sink"], keep="last")["file"])]


def recall_table(results: Results, task: str, index: str) -> pd.DataFrame:
    """Return accuracies and their intervals, the methods side by side; `index` is what a reader calls that which was asked."""
    rows = recall(results, task)
    rows = rows[rows["file"] == rows["file"].iloc[-1]] if len(rows) else rows
    spans = rows[["accuracy_low", "accuracy_high"]].astype(float).itertuples(index=False)
    known = [f" ({low:.2f}–{high:.2f})" if low == low else "" for low, high in spans]
    shown = [f"{one:.2f}{span}" for one, span in zip(rows["accuracy"], known, strict=True)]
    return pivot(rows.assign(shown=shown, **{index: rows["asked"].astype(int)}), [index], what="method")


def one_text(results: Results) -> pd.DataFrame:
    """Return ms of a question about a long text, by how the cache comes to know the text."""
    return recall(results, "questions")[["shape", "text_tokens", "capacity", "method", "ms_per_question"]]


def sink_runs(results: Results, **where: Any) -> pd.DataFrame:
    """Return the perplexities of runs with several numbers of sinks; `text` is the model and the text."""
    runs = [one for one in results.of("ppl") if one["protocol"].get("n_sinks")]
    rows = [row | {"text": f"{shape(one)}, {one['data']['name']}"} for one in runs for row in one["rows"]]
    found = pd.DataFrame(rows, columns=["text", "arm", "n_sink", "capacity", "perplexity"]).dropna(
        subset=["perplexity"]
    )
    return pick(found.assign(shown=found["perplexity"]), **where)


def beside_the_paper(results: Results, file: str, index: str, **where: Any) -> pd.DataFrame:
    """Return two models of one of the paper's tables beside ours."""
    theirs, ours = pd.read_csv(OTHERS / file).iloc[:, :3], sink_runs(results, arm="sink", **where)
    return theirs.merge(pivot(ours, [index], what="text"), how="left", on=index) if len(ours) else theirs


def line_breaks(results: Results) -> pd.DataFrame:
    """Return the paper's perplexities with sinks that are line breaks beside ours."""
    rows = pd.concat([sink_runs(results, n_sink=n, capacity=CAPACITY) for n in (0, 4)])
    names = {("sink", 0): "no sinks", ("sink", 4): "first tokens", ("line-breaks", 4): "line breaks"}
    rows = rows.assign(what=[names.get(both) for both in zip(rows["arm"], rows["n_sink"], strict=True)])
    ours = pivot(rows.dropna(subset=["what"]), ["text"])
    return pd.concat([pd.read_csv(OTHERS / "paper-line-breaks.csv"), ours])


# --- the two regimes ---


class Curve:
    """Milliseconds of an eager step against the tokens before it, not synchronised where that was measured."""

    def __init__(self, result: dict[str, Any], arm: str, capacity: int | None = None) -> None:
        wanted = (arm, False, capacity, "")
        rows = [
            row for row in result["rows"] if (row["arm"], row["compiled"], row["capacity"], row["reason"]) == wanted
        ]
        self.rows = {row["context"]: row for row in sorted(rows, key=lambda row: row["context"])}
        free = all(row["unsynchronized_ms"] for row in rows)
        self.ms = {
            n: statistics.median(r["unsynchronized_ms"]) if free else r["median_ms"] for n, r in self.rows.items()
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

    def new_length_ms(self) -> float:
        """Return what a step pays more at a length that the process has never seen; 0 if that is not worth counting.

        The price, a plan for the kernels, does not depend on the length. A machine that is twice as slow for some seconds doubles
        it, and doubles a small step, too. So the ratio of both, taken within a second, is what is measured best.
        """
        known = [(row.get("first_time_ms", ()), row.get("again_ms", ())) for row in self.rows.values()]
        factors = [first / again for pair in known for first, again in zip(*pair, strict=True)]
        factor = statistics.median(factors or [1.0])
        return (factor - 1) * statistics.median(self.ms.values()) if factor >= NEW_LENGTHS_COST else 0.0


def sum_ms(ms: dict[int, float], tokens: int, new: range = range(0), new_length_ms: float = 0.0) -> float:
    """Return the time of reading so many tokens one by one, of which those at `new` lengths take so much longer."""
    return float(np.interp(np.arange(tokens), list(ms), list(ms.values())).sum()) + len(new) * new_length_ms


def attention(result: dict[str, Any]) -> str:
    """Return which attention backends were asked for."""
    return str(result["protocol"].get("sdpa_backend", "auto"))


def setting(result: dict[str, Any]) -> tuple[Any, ...]:
    """Return what two results must share to be compared. Times depend on how weights are stored, and not on their values."""
    device, model = result["device"], result["model"]
    threads = result["threads"] if device["type"] == "cpu" else None
    weights = model["type"], model["parameters"], model["weight_bytes"]
    return *weights, device["name"], result["dtype"], threads, attention(result)


def regimes(results: Results) -> pd.DataFrame:
    """Return whole runs beside steps: the gain that was measured, and that which the steps, summed over the run, predict.

    Of several latency results it is the one nearest in time. Only runs of one token per step and sample are predicted, up to
    the last context that was measured. To the first text of a process all lengths are new but those of the warm-up: for a dense
    cache, and for a bounded one until it is full. To later texts none is.
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
        where = {"shape": shape(run), "device": run["device"]["name"], "capacity": capacity}
        batches = pd.DataFrame(dense_row["batches"]).assign(
            sink_seconds=[one["seconds"] for one in sink_row["batches"]]
        )
        known, of_sink, price = run["run"]["warm_up_tokens"], sink.beside(dense), dense.new_length_ms()
        for name, some in (("first", batches[:1]), ("later", batches[1:])):
            if some.empty:
                continue
            tokens, ms = int(some["tokens_processed"].iloc[0]), price if name == "first" else 0.0
            times = (
                sum_ms(dense.ms, tokens, range(known, tokens), ms),
                sum_ms(of_sink, tokens, range(known, min(capacity, tokens)), ms),
            )
            last = max((n for n in dense.ms if n in sink.ms and n <= tokens), default=min(sink.ms))
            measured = some["seconds"].sum() / some["sink_seconds"].sum()
            predicted = times[0] / times[1] if tokens <= min(max(dense.ms), max(*sink.ms, capacity)) else None
            line = {"text": name, "tokens": tokens, "last step": dense.ratio_to(sink, last)["value"]}
            lines.append(where | line | {"measured": measured, "predicted": predicted})
    return pd.DataFrame(lines) if lines else pd.DataFrame(columns=COLUMNS)


def two_regimes(results: Results) -> pd.DataFrame:
    """Return `regimes` in five columns."""
    rows = regimes(results)
    rows["shape, device"] = rows["shape"] + ", " + rows["device"]
    rows["run"] = (
        rows["text"] + " text, " + rows["capacity"].map("{:,.0f}".format) + rows["tokens"].map(" of {:,.0f}".format)
    )
    return rows[["shape, device", "run", "last step", "measured", "predicted"]]


TABLES: dict[str, Callable[[Results], pd.DataFrame]] = {
    "compiled steps": partial(single_steps, compiled=True),
    "eager steps": partial(single_steps, compiled=False),
    "memory": memory,
    "time and memory": time_and_memory,
    "whole calls": whole_calls,
    "kernels": kernels,
    "regimes": two_regimes,
    "new lengths": new_lengths,
    "the study's steps": study_steps,
    "the study's runs": study_runs,
    "the study's quality": study_quality,
    "quality": quality,
    "the paper": paper,
    **{name: partial(throughput_rows, what=what, columns=columns) for name, (what, columns) in THROUGHPUT.items()},
    "recall": partial(recall_table, task="copy", index="distance, tokens"),
    "streameval": partial(recall_table, task="streameval", index="distance, lines"),
    "pinned": partial(recall_table, task="pinned", index="tokens after the sinks"),
    "questions": one_text,
    "the paper's sinks": partial(beside_the_paper, file="paper-sinks.csv", index="n_sink", capacity=CAPACITY),
    "the paper's sizes": partial(beside_the_paper, file="paper-sizes.csv", index="capacity", n_sink=4),
    "line breaks": line_breaks,
}


# --- pictures: each part draws on axes and returns a title that says the finding, or nothing if there are no numbers ---

OURS = "sinks + window (ours)"
COLOURS = {"dense cache": "C0", OURS: "C1", "window without sinks": "C2"}  # the same in all panels


def line(axes: Axes, x: Any, y: Any, label: str) -> None:
    """Draw a line, with plain numbers on both axes."""
    axes.plot(x, y, label=label, marker="o", markersize=4, color=COLOURS.get(label))
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
    return "Dense breaks beyond its training; without sinks a window is worse throughout"


def by_context(results: Results, axes: Axes, column: str) -> str:
    """Draw bytes of the cache, or ms per token (or the GPU's own work where only that is known), of the largest shape."""
    rows = pick(results.frame("latency"), capacity=[CAPACITY, None])
    compiled = pick(rows, compiled=True, arm="static").groupby("shape", sort=False)["context"].nunique().gt(1)
    is_compiled = column == "median_ms" and compiled.any()
    column = "gpu_ms" if column == "median_ms" and not is_compiled else column
    eager = pick(rows, arm="dense").dropna(subset=[column])["shape"].unique()
    chosen, ends = next(reversed(compiled[compiled].index if is_compiled else eager), None), []
    for arm, label in (("static" if is_compiled else "dense", "dense cache"), ("sink", OURS)) if chosen else ():
        found = pick(rows, shape=chosen, arm=arm, compiled=is_compiled).dropna(subset=[column])
        found = found.drop_duplicates("context", keep="last")
        line(axes, found["context"], found[column] / (MIB if column == "cache_bytes" else 1), label)
        ends += list(found[column][-1:])
    units = {
        "cache_bytes": "cache, MiB",
        "median_ms": "ms per token, compiled",
        "gpu_ms": "ms per token, GPU's own work",
    }
    axes.set(xlabel="context, tokens", ylabel=f"{units[column]} (lower is better)", ylim=(0, None))
    if len(ends) < 2:
        return ""
    what = units[column].split(",")[0].capitalize()
    return f"{what}: {ends[0] / ends[1]:.2g} times less in the end ({chosen})"


def by_capacity(results: Results, axes: Axes) -> str:
    """Draw perplexity by capacity."""
    every = quality(results).reindex(columns=["capacity", "sink", "window"])
    rows = every[every["capacity"] != "dense"]
    for arm, label in (("window", "window without sinks"), ("sink", OURS)):
        line(axes, rows["capacity"], rows[arm].astype(float), label)
    for dense in pick(every, capacity="dense")["sink"]:
        axes.axhline(dense, color="black", label="dense cache")
    axes.legend(fontsize="small")
    axes.set(xlabel="capacity, tokens", ylabel="perplexity (lower is better)")
    return "Four sinks make up for most of what a window loses" if len(rows) else ""


def by_regime(results: Results, axes: Axes) -> str:
    """Draw the gain of a step, and of whole runs as measured and as predicted from steps."""
    rows = two_regimes(results)
    for column, label, marker in (
        ("last step", "a step at the end", "o"),
        ("measured", "whole run, measured", "s"),
        ("predicted", "whole run, predicted from steps", "x"),
    ):
        axes.plot(rows[column], range(len(rows)), marker, label=label)
    where = [f"{one}\n{run}" for one, run in zip(rows["shape, device"], rows["run"], strict=True)]
    axes.set_yticks(range(len(rows)), where, fontsize="x-small")
    axes.set(xlabel="times as fast as a dense cache (higher is better)")
    axes.legend(fontsize="small")
    return "Whole runs gain what their steps gain, summed over all lengths" if len(rows) else ""


def price_of_new_lengths(results: Results, axes: Axes) -> str:
    """Draw what a dense step takes at new lengths, and again, where that differs most."""
    rows = new_lengths(results)
    worst = rows.loc[(rows["first_time_ms"] / rows["again_ms"]).idxmax()] if len(rows) else None
    rows = pick(rows, shape=worst["shape"]) if worst is not None else rows
    for column, label in (("first_time_ms", "at a length never seen"), ("again_ms", "at the same length again")):
        line(axes, rows["context"], rows[column], label)
    axes.set(xlabel="context, tokens", ylabel="ms per token, dense cache (lower is better)", ylim=(0, None))
    return f"A dense cache pays for every new length, a ring has one ({worst['shape']})" if worst is not None else ""


def by_streams(results: Results, axes: Axes) -> str:
    """Draw tokens per second of many streams, and what reading weights and cache once a step allows the pool."""
    rows = pick(results.frame("throughput"), what="steady").reindex(
        columns=["shape", "arm", "streams", "tokens_per_second", "floor_ms"]
    )
    rows = rows.dropna(subset=["tokens_per_second"])
    rows = rows[rows["shape"] == rows["shape"].iloc[-1]].sort_values("streams") if len(rows) else rows
    pool = pick(rows, arm="pool")
    limit, label = 1e3 * pool["streams"] / pool["floor_ms"], "limit of the pool:\nmemory is read once a step"
    if rows["streams"].nunique() == 1:  # bars, because a line needs two points
        axes.barh([*rows["arm"], *[label] * len(limit)], [*rows["tokens_per_second"], *limit])
        axes.set(xlabel=f"tokens per second of {rows['streams'].iloc[0]:.0f} streams (higher is better)")
    else:
        for arm in rows["arm"].unique():
            found = pick(rows, arm=arm)
            line(axes, found["streams"], found["tokens_per_second"], arm)
        line(axes, pool["streams"], limit, label)
        axes.set(xlabel="streams", ylabel="tokens per second (higher is better)", ylim=(0, None))
    if pool.empty:
        return ""
    share = pool["tokens_per_second"].iloc[-1] / limit.iloc[-1]
    return f"A pool makes {share:.0%} of the tokens that memory allows ({rows['shape'].iloc[-1]})"


def by_distance(results: Results, axes: Axes) -> str:
    """Draw what is recalled of a segment that comes back, by its distance; the dotted line is the capacity."""
    rows = recall(results)
    rows = rows[rows["file"] == rows["file"].iloc[-1]] if len(rows) else rows
    axes.set_xscale("log", base=2)
    # Without recomputation, which is asked too few questions for a line.
    for method, label in (("dense", "dense cache"), ("sink", OURS), ("window", "window without sinks")):
        found = pick(rows, method=method).sort_values("distance_tokens")
        line(axes, found["distance_tokens"], found["accuracy"].astype(float), label)
    axes.axvline(CAPACITY, color="grey", linestyle=":")
    axes.set(xlabel="distance, tokens", ylabel="accuracy of what comes again (higher is better)", ylim=(0, None))
    sink = pick(rows, method="sink")
    near, far = (sink[within]["accuracy"].max() for within in (sink["asked"] < CAPACITY, sink["asked"] >= CAPACITY))
    return f"Within the window up to {near:.0%} are recalled, beyond it {far:.0%}" if len(sink) else ""


PICTURES: dict[str, Sequence[Callable[[Results, Axes], str]]] = {
    "hero": (by_position, partial(by_context, column="cache_bytes"), partial(by_context, column="median_ms")),
    "quality": (by_capacity,),
    "regimes": (by_regime,),
    "new-lengths": (price_of_new_lengths,),
    "streams": (by_streams,),
    "recall": (by_distance,),
}


def draw(results: Results, folder: Path) -> list[Path]:
    """Draw the pictures that there are numbers for, and return their paths."""
    written = []
    for name, parts in PICTURES.items():
        size = (2 + 5 * len(parts), 4.5)
        drawn, panels = plt.subplots(1, len(parts), figsize=size, layout="constrained", squeeze=False)
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
    """Return one figure: a frame, what its row must have, and a column, as in `latency shape=pythia-70m arm=sink median_ms`.

    A column may lie within another (`same_tokens.perplexity`), and `_mib` stands for `_bytes` in MiB.
    """
    kind, *wanted, column = query.split()
    found = pick(results.frame(kind), **conditions(wanted))
    value: Any = None if found.empty else found.iloc[-1]
    for name in column.replace("_mib", "_bytes").split("."):
        value = value.get(name) if hasattr(value, "get") else None
    if value is None or pd.isna(value):
        raise BenchmarkError(f"no result has the figure {query!r}")
    last = found.iloc[-1]
    doubtful = column in ("value", "median_ms") and re.search(DOUBTS, last["note"] + last["warning"])
    value = value.item() if isinstance(value, np.generic) else value
    return figure(value / MIB if column.endswith("_mib") else value, doubtful)


def conditions(wanted: Sequence[str]) -> dict[str, Any]:
    """Return what `context=4096`, `compiled=True` and the like ask of a row, for `pick`."""
    values = {"True": True, "False": False}
    pairs = dict(one.split("=") for one in wanted)
    return {name: values.get(v, int(v) if v.isdecimal() else v) for name, v in pairs.items()}


def some_table(results: Results, query: str) -> pd.DataFrame:
    """Return a table by its name, and of it what is asked for after that: `eager steps; context=32768; shape; sink, ms`."""
    name, *wanted = query.split("; ")
    if name not in TABLES:
        raise BenchmarkError(f"unknown table {name!r}: choose {', '.join(TABLES)}")
    rows, columns = [one for one in wanted if "=" in one], [one for one in wanted if "=" not in one]
    every = TABLES[name](results)
    if missing := {one.partition("=")[0] for one in wanted} - {*every.columns} if len(every) else set():
        raise BenchmarkError(f"the table {name!r} has {', '.join(every.columns)}, but not {', '.join(sorted(missing))}")
    found = pick(every, **conditions(rows))
    return found.reindex(columns=columns) if columns else found


def write(text: str, results: Results) -> str:
    """Return a text with its marked tables and figures made anew."""

    def fill(found: re.Match[str]) -> str:
        if found[2] == "figure":
            return found[1] + number(results, found[3]) + found[5]
        return f"{found[1]}\n{harness.table(some_table(results, found[3]))}\n{found[5]}"

    return MARK.sub(fill, text)


def page(results: Results, pictures: Sequence[Path]) -> str:
    """Return one HTML page that holds everything."""
    frames = {name: table(results).dropna(axis=1, how="all") for name, table in TABLES.items()}
    shown = {name: frame.astype(object).map(figure) for name, frame in frames.items() if len(frame)}
    tables = {name: frame.to_html(index=False) for name, frame in shown.items()}
    images = {path.stem: base64.b64encode(path.read_bytes()).decode() for path in pictures}
    template = jinja2.Template((Path(__file__).parent / "page.html").read_text(encoding="utf-8"), autoescape=True)
    return template.render(tables=tables, images=images, results=results)


def main(argv: Sequence[str] | None = None) -> None:
    """Write the pictures and the page, or the tables and figures of a text."""
    parser = harness.Parser("report", __doc__, measures=False)
    parser.add_argument("results", nargs="*", metavar="FILE|FOLDER", help=f"({' '.join(SOURCES)})")
    says = "instead, the marked tables and figures of these texts"
    parser.add_argument("--write", nargs="+", metavar="FILE.md", help=says)
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
