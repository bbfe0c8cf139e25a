"""Tables, pictures, one page and the README's numbers, from result files alone; nothing is measured here."""

from __future__ import annotations

import base64
import functools
import itertools
import re
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
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

from . import harness, latency
from .harness import MIB, BenchmarkError, figure

ROOT = Path(__file__).parents[1]
SOURCES = ("results/h200", "results/cpu")
CAPACITY = 1024  # of tables that show a single capacity
CONTEXTS = (4096, 16384, 32768, 65536)
BESIDE_THE_STUDY = (4096, 8192)  # contexts; the study does not say which it measured
DOUBTS = "too wide|no conclusion"
NEW_LENGTHS_COST = 1.2  # predictions count the price of new lengths if it makes a step at least so many times slower
MARK = re.compile(r"(?<!`)(<!-- (table|figure): (.*?) -->)(.*?)(<!-- end -->)", re.DOTALL)
OTHERS = ROOT / "results" / "others"  # figures of the paper and of an earlier study

COLUMNS = [
    "shape", "device", "on", "attention", "file", "arm", "compiled", "context", "capacity", "name", "note", "warning", "what",
    "median_ms", "gpu_ms", "cache_bytes", "value", "gpu_value", "first_time_ms", "again_ms", "kernel_ms", "perplexity", "streams",
    "same_tokens", "text", "tokens", "measured", "predicted", "last step", "floor_ms", "tokens_per_second", "step_ms",
    "weight_bytes",
]  # of frames without rows  # fmt: skip

RECALL = ["task", "method", "n_sink", "capacity", "asked", "distance_tokens", "text_tokens", "questions"]
RECALL += ["accuracy", "accuracy_low", "accuracy_high", "nats_saved", "ms_per_question"]


class Results(list[dict[str, Any]]):
    """Result files, the smallest model and the oldest result first."""

    def __init__(self, paths: Sequence[str | Path]) -> None:
        folders = [sorted(Path(path).glob("*.json")) if Path(path).is_dir() else [Path(path)] for path in paths]
        for file in itertools.chain(*folders):
            try:
                self.append(harness.read_json(file) | {"file": file.stem})
            except BenchmarkError as error:
                print(f"left out: {error}", file=sys.stderr)
        self.sort(key=lambda result: (result["model"]["parameters"], result["date"]))
        self.frames: dict[str, pd.DataFrame] = {}

    def of(self, kind: str) -> list[dict[str, Any]]:
        """Return the results of one harness."""
        return [result for result in self if result["harness"] == kind]

    def frame(self, kind: str) -> pd.DataFrame:
        """Return all rows that have numbers of a harness, `latency`, `ppl` …, or `latency-ratios`."""
        if kind not in self.frames:
            rows = []
            for result in self.of(kind.removesuffix("-ratios")):
                about = {"shape": shape(result), "device": result["device"]["name"], "on": result["device"]["type"]}
                about |= {"attention": attention(result), "file": result["file"]}
                about["max_tokens"] = result.get("data", {}).get("max_tokens")
                about["weight_bytes"] = result["model"]["weight_bytes"]
                found = latency.ratios(result["rows"]) if kind == "latency-ratios" else result["rows"]
                rows += [{"note": "", "warning": "", **row, **about} for row in found if not row.get("reason")]
            self.frames[kind] = pd.DataFrame(rows, columns=None if rows else COLUMNS)
        return self.frames[kind]

    @functools.cached_property
    def cells(self) -> pd.DataFrame:
        """The figures of `latency`, each in a row of its own: `what` it is, its `value`, and the value as it is `shown`."""
        rows, gains = self.frame("latency"), self.frame("latency-ratios")
        how = {True: " compiled", False: ""}
        arm, gain = rows["arm"] + rows["compiled"].map(how), gains["name"] + gains["compiled"].map(how)
        by_clock = [rows.assign(what=arm + ", ms", value=rows["median_ms"]), gains.assign(what=gain)]
        of_gpu = rows.assign(what=arm + ", GPU ms", value=rows["gpu_ms"])
        gains_of_gpu = gains.assign(what=gain + ", GPU", value=gains["gpu_value"])
        cells = pd.concat([*by_clock, of_gpu, gains_of_gpu]).dropna(subset=["value"])
        wide = (cells["note"] + cells["warning"]).str.contains(DOUBTS)
        doubts = wide & ~cells["what"].str.contains("GPU")  # the spread is that of the clock
        shown = [figure(value, doubt) for value, doubt in zip(cells["value"], doubts, strict=True)]
        return cells.assign(shown=shown)


def shape(result: dict[str, Any]) -> str:
    """Return the name of a result's model, without the note on its weights."""
    return str(result["model"]["name"].removesuffix(" (random weights)"))


def pick(frame: pd.DataFrame, **where: Any) -> pd.DataFrame:
    """Return the rows whose columns have these values, or any value of a list. None stands for a missing value."""
    for name, wanted in where.items() if len(frame) else ():
        values = wanted if isinstance(wanted, (list, tuple)) else [wanted]
        found = frame[name].isin([value for value in values if value is not None])
        if None in values:
            found |= frame[name].isna()
        frame = frame[found]
    return frame


def pivot(cells: pd.DataFrame, index: Sequence[str], wanted: Sequence[str] = (), what: str = "what") -> pd.DataFrame:
    """Return one row for each value of the `index` columns, and one column of `shown` figures for each value of `what`.

    `wanted` chooses and orders the columns. Of several figures for the same place, the last one is taken.
    """
    # Not by `unstack(sort=False)`: pandas 2, which is the newest for Python 3.10, puts figures into wrong places.
    cells = cells.dropna(subset=[*index, what])
    found = cells[[*index]].drop_duplicates(ignore_index=True)
    figures = cells.dropna(subset=["shown"]).drop_duplicates([*index, what], keep="last")
    for name in wanted or cells[what].drop_duplicates():
        column = figures.loc[figures[what] == name, [*index, "shown"]].rename(columns={"shown": name})
        found = found.merge(column, how="left")
    return found


def arrow(frame: pd.DataFrame, before: str, after: str) -> Any:
    """Return two columns of figures as one column "before → after", missing where either is missing."""
    return frame[before].astype("string") + " → " + frame[after].astype("string")


# --- tables ---


def single_steps(results: Results, *, compiled: bool) -> pd.DataFrame:
    """Return single steps at one capacity, either eager or compiled: no table holds both."""
    if compiled:
        wanted = {
            "static compiled, ms": "dense, ms",
            "static-at-capacity compiled, ms": "dense of that capacity, ms",
            "sink compiled, ms": "ours, ms",
            "achieved compiled": "gain",
        }
    else:
        wanted = {
            "dense, GPU ms": "dense, GPU ms",
            "sink, GPU ms": "ours, GPU ms",
            "achieved, GPU": "gain, GPU",
            "achieved": "gain, clock",
        }
    cells = pick(results.cells, compiled=compiled, context=CONTEXTS, capacity=[CAPACITY, None], on="cuda")
    cells = cells.assign(**{"shape, tokens before": cells["shape"] + cells["context"].map(", {:,}".format)})
    found = pivot(cells, ["shape, tokens before"], list(wanted)).rename(columns=wanted)
    return found[found.iloc[:, 1:].notna().sum(axis=1) > 1]  # one figure alone compares nothing


def memory(results: Results) -> pd.DataFrame:
    """Return the sizes of the caches."""
    rows = pick(results.frame("latency"), context=CONTEXTS, capacity=[CAPACITY, None], on="cuda")
    rows = rows.assign(what=rows["arm"].replace("static", "dense"), shown=rows["cache_bytes"].astype(float) / MIB)
    found = pivot(rows, ["shape", "context"], ["dense", "sink"]).dropna()
    found = found.assign(ratio=found["dense"] / found["sink"])
    return found.set_axis(["shape", "tokens before", "dense, MiB", "ours, MiB", "times less"], axis=1)


def time_and_memory(results: Results) -> pd.DataFrame:
    """Return memory, the GPU's work in eager steps, and compiled steps, each "dense → ours", after the longest text."""
    key = "shape, tokens before"
    found = memory(results).drop_duplicates("shape", keep="last")
    found[key] = found["shape"] + found["tokens before"].map(", {:,}".format)
    found[["dense, MiB", "ours, MiB"]] = found[["dense, MiB", "ours, MiB"]].map("{:,.0f}".format)
    for compiled in (False, True):
        found = found.merge(single_steps(results, compiled=compiled), how="left", on=key)
    shown = {"cache, MiB": "MiB", "GPU's work, eager, ms": "GPU ms", "compiled step, ms": "ms"}
    columns = {name: arrow(found, f"dense, {unit}", f"ours, {unit}") for name, unit in shown.items()}
    return found[[key]].assign(**columns, gain=found["gain"])


def kernels(results: Results) -> pd.DataFrame:
    """Return the GPU's work in a compiled step, in ms, by the kind of kernel."""
    rows = results.frame("latency").reindex(columns=COLUMNS).dropna(subset=["kernel_ms"])
    rows = pick(rows, compiled=True, arm=["static", "static-at-capacity", "sink"], capacity=[CAPACITY, None])
    sums = pd.DataFrame(list(rows["kernel_ms"]), rows.index, ["attention", "matrix products", "cache", "other"])
    sums["rest"] = sums.pop("cache") + sums.pop("other")
    return rows[["shape", "arm"]].join(sums)


def quantised(results: Results) -> pd.DataFrame:
    """Return the steps of models with quantised weights, and of the same models without, dense and in `endless`."""
    rows = results.frame("calls")
    base = rows["shape"].str.replace(r" int[48]$", "", regex=True)
    rows = rows[base.isin(base[base != rows["shape"]])]
    doubts = rows["warning"].str.contains(DOUBTS)
    shown = [figure(value, doubt) for value, doubt in zip(rows["median_ms"], doubts, strict=True)]
    names = rows["shape"] + ", " + rows["device"]
    rows = rows.assign(shown=shown, what=rows["arm"] + ", ms", **{"model, device": names})
    rows["weights, MiB"] = rows["weight_bytes"].map(lambda size: figure(size / MIB))
    return pivot(rows, ["model, device", "weights, MiB"], ["dense, ms", "endless, ms"])


def study_steps(results: Results) -> pd.DataFrame:
    """Return the study's eager steps beside ours: by the clock, and the GPU's own work."""
    theirs = pd.read_csv(OTHERS / "study-steps.csv")
    capacities = [*theirs["capacity"], None]
    found = pick(results.cells, compiled=False, on="cuda", context=BESIDE_THE_STUDY, capacity=capacities)
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
    """Return the study's perplexities and accuracies beside ours of a trained model, in the order of the texts' lengths."""
    theirs = pd.read_csv(OTHERS / "study-quality.csv")
    ours = []
    for result in results.of("ppl"):
        if result["protocol"]["mode"] == "step" and result["model"]["weights"] == "trained":
            data = result["data"]
            line = [f"{shape(result)}, {result['device']['name']}", f"{data['max_tokens']:,} × {data['samples']}"]
            both = [row for row in result["rows"] if (row["arm"], row["capacity"]) in (("dense", None), ("sink", 256))]
            for name, style in (("perplexity", ".2f"), ("accuracy", ".2%"), ("tokens_per_second", ".1f")):
                line.append(" → ".join(f"{row[name]:{style}}" for row in both))
            ours.append(line)
    found = pd.concat([theirs, pd.DataFrame(ours, columns=theirs.columns)])
    return found.sort_values("tokens × samples", key=lambda shown: shown.str[0], kind="stable")


def quality(results: Results) -> pd.DataFrame:
    """Return perplexities by capacity, of the last run that scores only tokens far from the start of a text."""
    far = [run for run in results.of("ppl") if run["protocol"].get("score_from", 1) > 1]
    files = [run["file"] for run in far if not run["protocol"].get("n_sinks")]
    rows = pick(results.frame("ppl"), file=files[-1:]).sort_values("capacity")
    rows = rows[rows["arm"] != "dense-batched"].assign(shown=rows["perplexity"])
    rows["capacity"] = ["dense" if pd.isna(capacity) else int(capacity) for capacity in rows["capacity"]]
    rows["arm"] = rows["arm"].replace("dense", "sink")  # the same column: the row's capacity says that it is dense
    same = rows[rows["arm"] == "sink"].assign(arm="this row, same tokens")
    same["shown"] = [tokens["perplexity"] if tokens else None for tokens in same["same_tokens"]]
    return pivot(pd.concat([rows, same]), ["capacity"], what="arm")


def paper(results: Results) -> pd.DataFrame:
    """Return the paper's gain over recomputation with Llama-2-7B beside ours with the same shape, in eager steps."""
    theirs = pd.read_csv(OTHERS / "paper.csv")
    cells = pick(results.cells, shape="llama-2-7b", compiled=False, capacity=list(theirs["capacity"]))
    wanted = ["recompute, ms", "sink, ms", "recompute_over_sink"]
    every = theirs.merge(pivot(cells, ["capacity"], wanted), how="left", on="capacity")
    here = arrow(every, "recompute, ms", "sink, ms")
    return theirs.assign(**{"here: recompute → sinks, ms": here, "gain here": every["recompute_over_sink"]})


def new_lengths(results: Results) -> pd.DataFrame:
    """Return the times of dense steps on a GPU at lengths that are new to the process, and at the same lengths again."""
    rows = pick(results.frame("latency"), arm="dense", attention="auto", on="cuda")
    rows = rows[rows["first_time_ms"].map(len) > 0].drop_duplicates(["shape", "context"], keep="last")
    rows = rows.assign(**{name: rows[name].map(statistics.median) for name in ("first_time_ms", "again_ms")})
    rows["order"] = pd.factorize(rows["shape"])[0]
    return rows.sort_values(["order", "context"])[["shape", "context", "first_time_ms", "again_ms"]]


def throughput_rows(results: Results, what: str, columns: dict[str, str]) -> pd.DataFrame:
    """Return some columns of a mode of `benchmarks.throughput`, renamed for readers."""
    rows = pick(pd.json_normalize(results.frame("throughput").to_dict("records")), what=what)
    rows = rows.reindex(columns=["shape", "streams", *columns])
    both = zip(rows.pop("shape"), rows.pop("streams"), strict=True)
    # Older results do not have the streams of every mode.
    rows.insert(
        0, "shape × streams", [name if pd.isna(streams) else f"{name} × {streams:.0f}" for name, streams in both]
    )
    return rows.rename(columns=columns)


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
    """Return the rows of a task of `recall`, of the last run of each model; of copy at the capacity of the tables."""
    rows = results.frame("recall").reindex(columns=[*RECALL, "shape", "file"])
    rows = pick(rows, task=task)
    if task == "copy":
        rows = pick(rows, capacity=[CAPACITY, None])
    return rows[rows["file"].isin(rows.drop_duplicates(["shape", "n_sink"], keep="last")["file"])]


def recall_table(results: Results, task: str, index: str) -> pd.DataFrame:
    """Return accuracies and their intervals, the methods side by side. `index` is the title of the column `asked`."""
    rows = recall(results, task)
    rows = pick(rows, file=list(rows["file"][-1:]))
    shown = []
    for row in rows.itertuples():
        interval = "" if pd.isna(row.accuracy_low) else f" ({row.accuracy_low:.2f}–{row.accuracy_high:.2f})"
        shown.append(f"{row.accuracy:.2f}{interval}")
    return pivot(rows.assign(shown=shown, **{index: rows["asked"].astype(int)}), [index], what="method")


def one_text(results: Results) -> pd.DataFrame:
    """Return the time of a question about a long text, by the way in which a cache gets the text."""
    return recall(results, "questions")[["shape", "text_tokens", "capacity", "method", "ms_per_question"]]


def sink_runs(results: Results, **where: Any) -> pd.DataFrame:
    """Return the perplexities of runs with several numbers of sinks. The column `text` names the model and the text."""
    rows = []
    for run in results.of("ppl"):
        if run["protocol"].get("n_sinks"):
            text = f"{shape(run)}, {run['data']['name']}"
            rows += [{"text": text, "shown": row["perplexity"], **row} for row in run["rows"] if not row["reason"]]
    return pick(pd.DataFrame(rows, columns=["text", "arm", "n_sink", "capacity", "shown"]), **where)


def beside_the_paper(results: Results, file: str, index: str, **where: Any) -> pd.DataFrame:
    """Return two models from one of the paper's tables beside ours. `where` chooses our rows."""
    theirs, ours = pd.read_csv(OTHERS / file).iloc[:, :3], sink_runs(results, arm="sink", **where)
    return theirs.merge(pivot(ours, [index], what="text"), how="left", on=index) if len(ours) else theirs


def line_breaks(results: Results) -> pd.DataFrame:
    """Return perplexities without sinks, with the first tokens as sinks, and with line breaks as sinks: paper, then ours."""
    rows = sink_runs(results, n_sink=[0, 4], capacity=CAPACITY)
    names = {("sink", 0): "no sinks", ("sink", 4): "first tokens", ("line-breaks", 4): "line breaks"}
    rows = rows.assign(what=[names[row.arm, row.n_sink] for row in rows.itertuples()])
    return pd.concat([pd.read_csv(OTHERS / "paper-line-breaks.csv"), pivot(rows, ["text"])])


# --- the two regimes ---


class Curve:
    """Eager steps of an arm in one result: `ms` is the time of a step by the number of tokens before it.

    The times are those without synchronisation, if they were measured.
    """

    def __init__(self, result: dict[str, Any], arm: str, capacity: int | None = None) -> None:
        wanted = {"arm": arm, "compiled": False, "capacity": capacity, "reason": ""}
        rows = [row for row in result["rows"] if all(row[name] == value for name, value in wanted.items())]
        rows.sort(key=lambda row: row["context"])
        self.rows = {row["context"]: row for row in rows}
        self.ms = {row["context"]: row["median_ms"] for row in rows}
        if all(row["unsynchronized_ms"] for row in rows):
            self.ms = {row["context"]: statistics.median(row["unsynchronized_ms"]) for row in rows}

    def ratio_to(self, other: Curve, context: int) -> float:
        """Return the ratio of this arm's steps to the `other` arm's. Takes unsynchronised turns if there are enough."""
        rows = self.rows[context], other.rows[context]
        turns = [[[ms] for ms in row["unsynchronized_ms"] or ()] for row in rows]  # None in older files
        if min(map(len, turns)) < harness.FEWEST_ROUNDS:
            turns = [row["step_ms"] for row in rows]
        return harness.ratio_of_rounds(*turns)["value"]

    def beside(self, other: Curve) -> dict[int, float]:
        """Return this arm's times as the `other` arm's times their ratio. A slow machine cancels in the ratio."""
        return self.ms | {n: other.ms[n] * self.ratio_to(other, n) for n in self.ms if n in other.ms}

    def new_length_ms(self) -> float:
        """Return how much longer a step takes at a length that is new to the process; 0 if that is not worth counting.

        The extra time, for planning kernels, does not depend on the length. It is measured as a ratio of neighbouring
        steps: a machine that is slow for some seconds slows down both.
        """
        factors = list[float]()
        for row in self.rows.values():
            factors += np.divide(row.get("first_time_ms", []), row.get("again_ms", [])).tolist()
        factor = statistics.median(factors or [1.0])
        return (factor - 1) * statistics.median(self.ms.values()) if factor >= NEW_LENGTHS_COST else 0.0


def sum_ms(ms: dict[int, float], tokens: int) -> float:
    """Return the time of reading `tokens` tokens one by one, from the times of steps by the number of tokens before."""
    return float(np.interp(np.arange(tokens), list(ms), list(ms.values())).sum())


def attention(result: dict[str, Any]) -> str:
    """Return the `--sdpa-backend` of a result."""
    return str(result["protocol"].get("sdpa_backend", "auto"))


def setting(result: dict[str, Any]) -> tuple[Any, ...]:
    """Return what two results must share to be compared. Times depend on how weights are stored, not on their values."""
    device, model = result["device"], result["model"]
    threads = result["threads"] if device["type"] == "cpu" else None
    weights = model["type"], model["parameters"], model["weight_bytes"]
    return *weights, device["name"], result["dtype"], threads, attention(result)


def regimes(results: Results) -> pd.DataFrame:
    """Return the measured gains of whole runs beside the gains that their steps, summed over the run, predict.

    Only runs that read one token of one sample per step are predicted.
    """
    lines = []
    for run in results.of("ppl"):
        if (run["protocol"]["mode"], run["protocol"]["batch_size"]) == ("step", 1):
            rows = [row for row in run["rows"] if not row["reason"]]
            for dense_row, sink_row in itertools.product(rows, rows):
                if (dense_row["arm"], sink_row["arm"]) == ("dense", "sink"):
                    lines += regimes_of_run(results, run, dense_row, sink_row)
    return pd.DataFrame(lines, columns=None if lines else COLUMNS)


def regimes_of_run(
    results: Results, run: dict[str, Any], dense_row: dict[str, Any], sink_row: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Yield the lines of `regimes` for the first text of a run, and for the later texts together.

    Steps are those of the latency result with the same setting that is nearest in time. They predict nothing beyond their
    last context. To the first text of a process all lengths but those of the warm-up are new: to a dense cache up to the
    end of the text, to a bounded cache until it is full.
    """
    capacity, moment = sink_row["capacity"], datetime.fromisoformat(run["date"])
    near = [result for result in results.of("latency") if setting(result) == setting(run)]
    near.sort(key=lambda result: abs(datetime.fromisoformat(result["date"]) - moment))
    curves = [(Curve(result, "dense"), Curve(result, "sink", capacity)) for result in near]
    curves = [(dense, sink) for dense, sink in curves if dense.ms and sink.ms]
    if not curves:
        return
    dense, sink = curves[0]
    for text, some in (("first", slice(0, 1)), ("later", slice(1, None))):
        dense_batches, sink_batches = dense_row["batches"][some], sink_row["batches"][some]
        if not dense_batches:
            continue
        tokens = dense_batches[0]["tokens_processed"]
        last = max((n for n in dense.ms if n in sink.ms and n <= tokens), default=min(sink.ms))
        predicted = None
        if tokens <= min(max(dense.ms), max(*sink.ms, capacity)):
            dense_ms, sink_ms = sum_ms(dense.ms, tokens), sum_ms(sink.beside(dense), tokens)
            if text == "first":
                known, price = run["run"]["warm_up_tokens"], dense.new_length_ms()
                dense_ms += price * max(0, tokens - known)
                sink_ms += price * max(0, min(capacity, tokens) - known)
            predicted = dense_ms / sink_ms
        yield {
            "shape": shape(run),
            "device": run["device"]["name"],
            "capacity": capacity,
            "text": text,
            "tokens": tokens,
            "last step": dense.ratio_to(sink, last),
            "measured": sum(b["seconds"] for b in dense_batches) / sum(b["seconds"] for b in sink_batches),
            "predicted": predicted,
        }


def two_regimes(results: Results) -> pd.DataFrame:
    """Return `regimes` in five columns."""
    rows = regimes(results)
    sizes = rows["capacity"].map("{:,.0f}".format) + rows["tokens"].map(" of {:,.0f}".format)
    rows["shape, device"] = rows["shape"] + ", " + rows["device"]
    rows["run"] = rows["text"] + " text, " + sizes
    return rows[["shape, device", "run", "last step", "measured", "predicted"]]


TABLES: dict[str, Callable[[Results], pd.DataFrame]] = {
    "compiled steps": partial(single_steps, compiled=True),
    "eager steps": partial(single_steps, compiled=False),
    "memory": memory,
    "time and memory": time_and_memory,
    "kernels": kernels,
    "quantised": quantised,
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


# --- pictures: each part draws on axes and returns a title made of the numbers, or nothing if there are no numbers ---

OURS = "sinks + window (ours)"
COLOURS = {"dense cache": "C0", OURS: "C1", "window without sinks": "C2"}  # in all pictures


def line(axes: Axes, x: Any, y: Any, label: str) -> None:
    """Draw a line, with plain numbers on both axes."""
    axes.plot(x, y, label=label, marker="o", markersize=4, color=COLOURS.get(label))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axes.legend(fontsize="small")


def by_position(results: Results, axes: Axes) -> str:
    """Draw perplexity by position on the longest text that was read beyond the trained context."""
    runs = [result for result in results.of("ppl") if result["model"]["weights"] == "trained"]
    run = max(runs, key=lambda result: result["data"]["max_tokens"], default=None)
    if run is None or run["data"]["max_tokens"] <= run["model"]["trained_context"]:
        return ""
    beyond = []
    for arm, label in (("dense", "dense cache"), ("window", "window without sinks"), ("sink", OURS)):
        for row in [row for row in run["rows"] if row["arm"] == arm and not row["reason"]][:1]:
            bins = pd.DataFrame(row["by_position"])
            line(axes, (bins["start"] + bins["stop"]) / 2, bins["perplexity"], label)
            name = {"sink": "ours", "window": "no sinks"}.get(arm, arm)
            beyond.append(f"{name} {figure(row['beyond_trained_context']['perplexity'])}")
    axes.axvline(run["model"]["trained_context"], color="grey", linestyle=":")
    axes.set(xlabel="tokens before", ylabel="perplexity (lower is better)", yscale="log")
    return f"Perplexity beyond the trained context: {', '.join(beyond)}"


def by_context(results: Results, axes: Axes, column: str) -> str:
    """Draw `cache_bytes` or `median_ms` by context, of the largest shape.

    Times are of compiled steps. Where no dense cache was compiled at several contexts, they are the GPU's own work.
    """
    rows = pick(results.frame("latency"), capacity=[CAPACITY, None])
    contexts = pick(rows, compiled=True, arm="static").groupby("shape", sort=False)["context"].nunique()
    shapes = list(contexts[contexts > 1].index)
    is_compiled = column == "median_ms" and bool(shapes)
    if not is_compiled:
        column = "gpu_ms" if column == "median_ms" else column
        shapes = list(pick(rows, arm="dense").dropna(subset=[column])["shape"].unique())
    ends = []
    for arm, label in (("static" if is_compiled else "dense", "dense cache"), ("sink", OURS)) if shapes else ():
        found = pick(rows, shape=shapes[-1], arm=arm, compiled=is_compiled).dropna(subset=[column])
        found = found.drop_duplicates("context", keep="last")
        line(axes, found["context"], found[column] / (MIB if column == "cache_bytes" else 1), label)
        ends += list(found[column][-1:])
    if len(ends) < 2:
        return ""
    what, unit = {
        "cache_bytes": ("Cache", "cache, MiB"),
        "median_ms": ("Ms per token", "ms per token, compiled"),
        "gpu_ms": ("Ms per token", "ms per token, GPU's own work"),
    }[column]
    axes.set(xlabel="context, tokens", ylabel=f"{unit} (lower is better)", ylim=(0, None))
    return f"{what}: {ends[0] / ends[1]:.2g} times less in the end ({shapes[-1]})"


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
    if rows.empty:
        return ""
    last = rows.iloc[-1]
    with_sinks, without = figure(last["sink"]), figure(last["window"])
    return f"Perplexity at {last['capacity']:,} tokens: {with_sinks} with sinks, {without} without"


def by_regime(results: Results, axes: Axes) -> str:
    """Draw the gain of a step, and of whole runs as measured and as predicted from steps."""
    rows = two_regimes(results)
    for column, label, marker in (
        ("last step", "a step at the end", "o"),
        ("measured", "whole run, measured", "s"),
        ("predicted", "whole run, predicted from steps", "x"),
    ):
        axes.plot(rows[column], range(len(rows)), marker, label=label)
    axes.set_yticks(range(len(rows)), rows["shape, device"] + "\n" + rows["run"], fontsize="x-small")
    axes.set(xlabel="times as fast as a dense cache (higher is better)")
    axes.legend(fontsize="small")
    errors = (rows["predicted"] / rows["measured"] - 1).abs().dropna()
    if errors.empty:
        return ""
    off = f"{errors.median():.0%} off (median), at most {errors.max():.0%}"
    return f"Gains of whole runs, predicted from their steps: {off}"


def price_of_new_lengths(results: Results, axes: Axes) -> str:
    """Draw the times of dense steps at new lengths, and at the same lengths again, of the shape where they differ most."""
    rows = new_lengths(results)
    if rows.empty:
        return ""
    times = rows["first_time_ms"] / rows["again_ms"]
    worst = rows["shape"][times.idxmax()]
    rows = pick(rows, shape=worst)
    for column, label in (("first_time_ms", "at a length never seen"), ("again_ms", "at the same length again")):
        line(axes, rows["context"], rows[column], label)
    axes.set(xlabel="context, tokens", ylabel="ms per token, dense cache (lower is better)", ylim=(0, None))
    return f"At a new length a dense step takes up to {figure(times.max())} times as long ({worst})"


def by_streams(results: Results, axes: Axes) -> str:
    """Draw tokens per second of many streams, and the limit of the pool: weights and cache are read once a step."""
    columns = ["shape", "arm", "streams", "tokens_per_second", "floor_ms"]
    rows = pick(results.frame("throughput"), what="steady").reindex(columns=columns)
    rows = rows.dropna(subset=["tokens_per_second"])
    rows = pick(rows, shape=list(rows["shape"][-1:])).sort_values("streams")
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
    """Draw how much of a segment that comes back is recalled, by its distance. The dotted line is the capacity."""
    rows = recall(results)
    rows = pick(rows, file=list(rows["file"][-1:]))
    axes.set_xscale("log", base=2)
    # Recomputation is left out: it is asked too few questions for a line.
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
    """Draw the pictures whose parts all have numbers, and return their paths."""
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
    """Return one figure by its query: a frame, conditions on its row, and a column.

    An example is `latency shape=pythia-70m arm=sink median_ms`. A column may lie within another column, as in
    `same_tokens.perplexity`; `_mib` stands for `_bytes` in MiB. Of several rows, the last one is taken.
    """
    kind, *wanted, column = query.split()
    found = pick(results.frame(kind), **conditions(wanted))
    row = None if found.empty else found.iloc[-1]
    value: Any = row
    for name in column.replace("_mib", "_bytes").split("."):
        value = value.get(name) if hasattr(value, "get") else None
    if value is None or pd.isna(value):
        raise BenchmarkError(f"no result has the figure {query!r}")
    doubtful = column in ("value", "median_ms") and re.search(DOUBTS, row["note"] + row["warning"])
    return figure(value / MIB if column.endswith("_mib") else value, doubtful)


def conditions(wanted: Sequence[str]) -> dict[str, Any]:
    """Return conditions such as `context=4096` and `compiled=True` as arguments of `pick`."""
    found: dict[str, Any] = dict(condition.split("=") for condition in wanted)
    for name, value in found.items():
        if value in ("True", "False"):
            found[name] = value == "True"
        elif value.isdecimal():
            found[name] = int(value)
    return found


def some_table(results: Results, query: str) -> pd.DataFrame:
    """Return a table by its query: its name, conditions on rows and names of columns, after `; ` each.

    An example is `eager steps; context=32768; shape; sink, ms`. Without columns in the query, all are taken.
    """
    name, *wanted = query.split("; ")
    if name not in TABLES:
        raise BenchmarkError(f"unknown table {name!r}: choose {', '.join(TABLES)}")
    found = TABLES[name](results)
    missing = {word.partition("=")[0] for word in wanted} - {*found.columns}
    if missing and len(found):
        raise BenchmarkError(f"the table {name!r} has {', '.join(found.columns)}, but not {', '.join(sorted(missing))}")
    found = pick(found, **conditions([word for word in wanted if "=" in word]))
    columns = [word for word in wanted if "=" not in word]
    return found.reindex(columns=columns) if columns else found


def write(text: str, results: Results) -> str:
    """Return a text whose marked tables and figures are made anew."""

    def fill(found: re.Match[str]) -> str:
        if found[2] == "figure":
            return found[1] + number(results, found[3]) + found[5]
        return f"{found[1]}\n{harness.table(some_table(results, found[3]))}\n{found[5]}"

    return MARK.sub(fill, text)


def page(results: Results, pictures: Sequence[Path]) -> str:
    """Return one HTML page with all tables, pictures and sources."""
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
