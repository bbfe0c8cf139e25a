"""The README's tables of times, written from the result files: `python -m benchmarks.readme`.

Each table stands between two comments that name it, and is made anew from the files below. A figure with a question mark is one
of which its file says that nothing can be concluded from it, mostly because the spread is too wide. A ratio of steps is a median
over rounds, and not the quotient of the medians beside it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from .endless import by_kind, label
from .harness import MIB, Parser, is_inconclusive, read_json, run

ROOT = Path(__file__).parents[1]
FOLDER = Path("results/h100")
CAPACITY = 1024  # of the tables that show one
CONTEXTS = (1024, 4096, 16384, 32768)
RECOMPUTED = "llama-2-7b"
# Per token, ms, of the study that this project grew out of: model and capacity, baseline → StreamingLLM by hooks, speed-up.
STUDY = {
    ("pythia-70m", 256): "3.022 ± 0.774 → 3.161 ± 1.239: 0.96×",
    ("pythia-70m", 512): "3.073 ± 0.696 → 3.080 ± 0.159: 1.00×",
    ("pythia-70m", 1024): "3.036 ± 0.203 → 3.244 ± 1.582: 0.94×",
    ("pythia-70m", 2048): "3.140 ± 0.788 → 3.094 ± 0.094: 1.01×",
    ("pythia-410m", 1024): "11.435 ± 4.969 → 10.632 ± 0.187: 1.08×",
}
BESIDE_THE_STUDY = 4096  # the context: it does not say which it had, and this is the first beyond all its capacities


def results(harness: str, folder: Path) -> list[dict[str, Any]]:
    """Return the results of a harness in a folder, the smallest model first."""
    found = [result for path in sorted(folder.glob("*.json")) if (result := read_json(path))["harness"] == harness]
    return sorted(found, key=lambda result: result["model"]["parameters"])


def shape(result: dict[str, Any]) -> str:
    """Return the name of a result's model, without what it says of the weights."""
    name: str = result["model"]["name"].removesuffix(" (random weights)")
    return name


def figure(value: float | None, doubtful: object = "", digits: int = 3) -> str:
    """Return a number with as many significant digits, and a question mark if it is doubtful; a dash for none."""
    if value is None:
        return "–"
    whole = len(str(int(abs(value)))) if abs(value) >= 1 else 0
    return f"{value:,.{max(0, digits - whole)}f}{' ?' if doubtful else ''}"


def cell(rows: Sequence[dict[str, Any]], **what: Any) -> dict[str, Any]:
    """Return the row that has these values, or one without numbers."""
    found = (row for row in rows if all(row[name] == value for name, value in what.items()))
    return next(found, {"median_ms": None, "warning": "", "cache_bytes": None})


def median(row: dict[str, Any]) -> str:
    """Return the median of a row's steps."""
    return figure(row["median_ms"], "too wide" in row["warning"])


def ratio(result: dict[str, Any], name: str, **what: Any) -> str:
    """Return one of a result's ratios."""
    found = [one for one in result["ratios"] if one["name"] == name and all(one[n] == v for n, v in what.items())]
    return figure(found[0]["value"], is_inconclusive(found[0])) if found else "–"


def calls(folder: Path) -> Iterator[dict[str, str]]:
    """Yield the rows of the table of whole calls."""
    for result in results("endless", folder):
        rows, contexts = result["rows"], result["protocol"]["contexts"]
        first, last = contexts[0], contexts[-1]
        static = cell(rows, arm="static")
        dense, sink, ours = (cell(rows, arm=arm, context=first) for arm in ("dense", "sink", "endless"))
        yield {
            "shape": shape(result),
            "dense, eager": median(dense),
            f"`StaticCache({CAPACITY:,})`": median(static),
            "sink": median(sink),
            f"sink after {last:,}": median(cell(rows, arm="sink", context=last)),
            "endless": median(ours),
            "sink / static": ratio(result, "step: sink / static", context=first),
            f"after {last:,}": ratio(result, "step: sink / static", context=last),
            f"sink after {last:,} / {first:,}": ratio(result, f"step: sink / sink after {first:,}", context=last),
            "endless / static": ratio(result, "step: endless / static", context=first),
            "whole call: dense / endless": ratio(result, "whole call: dense / endless", context=first),
        }


def kernels(folder: Path) -> Iterator[dict[str, str]]:
    """Yield the rows of the table of what the GPU does in a step of `generate()`.

    Floors are of the same shape's single steps. Of some shapes the kernels were measured by themselves, of some only in a
    version that built masks.
    """
    floors = {
        shape(result): 1e3 * machine["step_weight_bytes"] / machine["copy_bytes_per_s"]
        for result in results("latency", folder)
        if (machine := result["machine"])
    }
    masked, profiled = (
        {shape(result): result for where in places for result in results("endless", where) if "kernels" in result}
        for places in ([folder / "with-masks"], [folder, folder / "kernels"])
    )
    for name, result in sorted((masked | profiled).items(), key=lambda one: int(one[1]["model"]["parameters"])):
        first = result["protocol"]["contexts"][0]
        rows = {label(row["arm"], row["context"], first): row for row in result["rows"]}
        for sums in by_kind(result["kernels"]):
            numbers = {kind: figure(sums[kind]) for kind in ("attention", "matrix products", "cache", "other")}
            with_mask = name not in profiled and sums["arm"] == "sink"
            yield {
                "shape": name,
                "step": sums["arm"] + (" with masks" if with_mask else ""),
                "kernels": f"{sums['kernels']:.0f}",
                **numbers,
                "all kernels": figure(sums["all"]),
                "whole step": median(rows[sums["arm"]]),
                "reading the weights": figure(floors.get(name)),
            }


def step(result: dict[str, Any], context: int, capacity: int) -> dict[str, str]:
    """Return the cells that compare a step with a bounded cache with a dense one."""
    rows, at = result["rows"], {"context": context}
    dense = cell(rows, arm="dense", compiled=False, **at)
    sink, compiled = (cell(rows, arm="sink", compiled=c, capacity=capacity, **at) for c in (False, True))
    eager = {"capacity": capacity, "compiled": False}
    held = [one["cache_bytes"] and f"{one['cache_bytes'] / MIB:,.0f}" for one in (dense, sink)]
    return {
        "dense, eager": median(dense),
        "sink, eager": median(sink),
        **{name: ratio(result, name, **at, **eager) for name in ("achieved", "ceiling", "overhead")},
        "sink, compiled": median(compiled),
        "GPU's own work of these": " / ".join(figure(one.get("gpu_ms")) for one in (dense, sink, compiled)),
        "cache, MiB": " → ".join(one or "–" for one in held),
    }


def steps(folder: Path) -> Iterator[dict[str, str]]:
    """Yield the rows of the table of single steps at fixed contexts."""
    for result in results("latency", folder):
        for context in sorted({row["context"] for row in result["rows"] if not row["reason"]} & set(CONTEXTS)):
            yield {"shape": shape(result), "context": f"{context:,}", **step(result, context, CAPACITY)}


def study(folder: Path) -> Iterator[dict[str, str]]:
    """Yield the rows of the table that has the study's steps beside the same here."""
    found = {shape(result): result for result in results("latency", folder)}
    for (name, capacity), theirs in STUDY.items():
        if name in found:
            of = {"shape": name, "capacity": f"{capacity:,}", "the study's, ms": theirs}
            yield of | step(found[name], BESIDE_THE_STUDY, capacity)


def recomputation(folder: Path) -> Iterator[dict[str, str]]:
    """Yield the rows of the table of recomputation, the paper's baseline, at the longest context of each capacity."""
    table: dict[int, dict[str, str]] = {}
    for result in (*results("latency", folder), *results("latency", folder / "recompute")):
        if shape(result) != RECOMPUTED:
            continue
        for gain in sorted(result["ratios"], key=lambda one: int(one["context"])):
            if (gain["name"], gain["compiled"]) == ("recompute_over_sink", True):
                capacity = gain["capacity"]
                compiled = {"arm": "sink", "compiled": True, "capacity": capacity, "context": gain["context"]}
                table[capacity] = {
                    "capacity": f"{capacity:,}",
                    "recomputed, ms": median(cell(result["rows"], arm="recompute", capacity=capacity)),
                    "sink, compiled, ms": median(cell(result["rows"], **compiled)),
                    "gain": figure(gain["value"], is_inconclusive(gain)),
                    "its arithmetic / a step's bytes": figure(gain["hardware_limit"]),
                    "gain over that": f"{gain['share_of_limit']:.0%}",
                }
    yield from (table[capacity] for capacity in sorted(table))


TABLES: dict[str, Callable[[Path], Iterator[dict[str, str]]]] = {
    "whole calls": calls,
    "kernels": kernels,
    "single steps": steps,
    "the study's steps": study,
    "recomputation": recomputation,
}


def write(readme: str, folder: Path) -> str:
    """Return the README with its tables made anew."""
    for name, rows in TABLES.items():
        begin, end = f"<!-- {name}: written by python -m benchmarks.readme -->", f"<!-- end of {name} -->"
        before, rest = readme.split(begin)
        table = tabulate(list(rows(folder)), "keys", "pipe", disable_numparse=True)
        readme = f"{before}{begin}\n{table}\n{end}{rest.split(end)[1]}"
    return readme


def main(argv: Sequence[str] | None = None) -> None:
    """Write the tables."""
    Parser(prog="python -m benchmarks.readme", description=__doc__).parse_args(argv)
    path = ROOT / "README.md"
    path.write_text(write(path.read_text(), ROOT / FOLDER))


if __name__ == "__main__":
    sys.exit(run(main))
