"""`benchmarks.report`: sums of a curve written out by hand, the right results side by side, and the numbers of the pages."""

import copy
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from benchmarks import all as whole_set
from benchmarks import calls, harness, latency, ppl, recall, report, throughput
from benchmarks.harness import BenchmarkError

ROOT = Path(__file__).parents[1]
MODEL = {
    "type": "llama",
    "parameters": 1000,
    "weight_bytes": 4000,
    "name": "tiny (random weights)",
    "weights": "random",
    "trained_context": 512,
}


@pytest.fixture(scope="module")
def results() -> report.Results:
    return report.Results([ROOT / source for source in report.SOURCES])


def result(kind: str, **more: Any) -> dict[str, Any]:
    setting = {"model": MODEL, "device": {"type": "cpu", "name": "a CPU"}, "dtype": "float32", "threads": 2}
    return {"harness": kind, "date": "2026-01-01T00:00:00+00:00", "file": kind, **setting} | more


def step_row(arm: str, context: int, ms: float, capacity: int | None = None, **more: Any) -> dict[str, Any]:
    row = {"arm": arm, "compiled": False, "context": context, "capacity": capacity, "median_ms": ms, "reason": ""}
    nothing = {"unsynchronized_ms": [], "first_time_ms": [], "again_ms": [], "gpu_ms": None, "warning": ""}
    return row | {"step_ms": [[ms] * 3] * 6, "cache_bytes": 2**20} | nothing | more


def latency_result(factor: float = 1.0, **more: Any) -> dict[str, Any]:
    """Dense: 1 ms up to 100 tokens, then 1 ms more per 100; sink: 1 ms. A step after 400 tokens gains 4×."""
    rows = [step_row("dense", n, factor * max(1, n / 100)) for n in (50, 100, 200, 400)]
    rows += [step_row("sink", n, 1.0, 100) for n in (50, 100, 200, 400)]
    return result("latency", rows=rows, protocol={"sdpa_backend": "auto"}) | more


def ppl_result(
    dense_s: float, sink_s: float, tokens: Sequence[int] = (300,), mode: str = "step", **more: Any
) -> dict[str, Any]:
    rows = []
    for arm, capacity, seconds in (("dense", None, dense_s), ("sink", 100, sink_s)):
        batches = [{"tokens_processed": n, "seconds": seconds * n / sum(tokens)} for n in tokens]
        row = {"arm": arm, "capacity": capacity, "batches": batches, "reason": "", "perplexity": 2.0}
        rows.append(row | {"tokens_per_second": sum(tokens) / seconds})
    protocol = {"mode": mode, "batch_size": 1, "sdpa_backend": "auto"}
    return result("ppl", rows=rows, protocol=protocol, run={"warm_up_tokens": 32}) | more


# A run of 300 tokens by hand: steps after 0 to 100 tokens take 1 ms, and steps after n = 101 to 299 tokens n / 100 ms.
DENSE_MS = 101 + sum(n / 100 for n in range(101, 300))
SINK_MS = 300


def results_of(*found: dict[str, Any]) -> report.Results:
    results = report.Results([])
    results.extend(found)
    return results


def regimes(*found: dict[str, Any]) -> list[dict[str, Any]]:
    return report.regimes(results_of(*found)).to_dict("records")


def test_a_run_is_the_sum_of_the_curve_over_its_contexts() -> None:
    # A sum that is off by one token, or a mean of the measured points, gives other numbers.
    curve = report.Curve(latency_result(), "dense")
    assert report.sum_ms(curve.ms, 1) == 1.0
    assert report.sum_ms(curve.ms, 300) == pytest.approx(DENSE_MS)
    (one,) = regimes(latency_result(), ppl_result(DENSE_MS / 1e3, SINK_MS / 1e3))
    assert [one["predicted"], one["measured"]] == pytest.approx([DENSE_MS / SINK_MS] * 2)
    assert one["last step"] == pytest.approx(2.0)  # 400 tokens are beyond the run
    # Each sample begins with an empty cache.
    first, later = regimes(latency_result(), ppl_result(1.0, 2.0, tokens=(100, 100, 100)))
    found = [first["predicted"], later["predicted"], first["measured"], later["measured"]]
    assert found == pytest.approx([1.0, 1.0, 0.5, 0.5])


def test_steps_that_are_not_waited_for_make_the_prediction() -> None:
    steps = latency_result()
    for row in steps["rows"]:
        row["unsynchronized_ms"] = [row["median_ms"] / (4 if row["arm"] == "dense" else 2)] * 6
    (one,) = regimes(steps, ppl_result(1.0, 1.0))
    assert one["predicted"] == pytest.approx(DENSE_MS / 4 / (SINK_MS / 2))
    for row in steps["rows"]:  # too few for a ratio, so synchronised steps make it
        del row["unsynchronized_ms"][3:]
    assert regimes(steps, ppl_result(1.0, 1.0))[0]["predicted"] == pytest.approx(DENSE_MS / SINK_MS)


@pytest.mark.parametrize("times, price", [(10.0, 9.0), (1.05, 0.0)])
def test_only_the_first_text_pays_for_new_lengths(times: float, price: float) -> None:
    steps = latency_result()
    for row in steps["rows"]:
        if row["arm"] == "dense":  # at one length a slow machine triples the times of new and of known lengths
            slow = 3.0 if row["context"] == 100 else 1.0
            row |= {"first_time_ms": [times * slow] * 3, "again_ms": [slow] * 3}
    price *= 1.5  # the median of dense steps of 1, 1, 2 and 4 ms
    run = ppl_result(1.0, 1.0, tokens=(300, 300))
    for warm_up in (32, 10):
        # The lengths of the warm-up are not new. To a sink cache, lengths from there to its capacity of 100 are new.
        run["run"]["warm_up_tokens"] = warm_up
        first, later = regimes(steps, run)
        predicted = (DENSE_MS + price * (300 - warm_up)) / (SINK_MS + price * (100 - warm_up))
        assert first["predicted"] == pytest.approx(predicted)
        assert later["predicted"] == pytest.approx(DENSE_MS / SINK_MS)
    (short,) = regimes(steps, ppl_result(1.0, 1.0, tokens=(50,)))  # which does not fill the sink cache
    assert short["predicted"] == pytest.approx(1.0)


def test_what_cannot_be_predicted_is_not() -> None:
    assert regimes(latency_result(), ppl_result(1.0, 1.0, mode="chunk")) == []
    (far,) = regimes(latency_result(), ppl_result(1.0, 1.0, tokens=(401,)))  # beyond the last context that was measured
    assert pd.isna(far["predicted"])
    assert regimes(latency_result(), ppl_result(1.0, 1.0, tokens=(400,)))[0]["predicted"] > 1


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "bfloat16"},
        {"threads": 97},
        {"model": MODEL | {"parameters": 1001}},
        {"model": MODEL | {"weight_bytes": 1000}},  # quantised
        {"device": {"type": "cpu", "name": "another"}},
        {"protocol": {"sdpa_backend": "no-cudnn"}},
    ],
)
def test_only_results_of_one_setting_are_put_side_by_side(change: dict[str, Any]) -> None:
    assert not regimes(latency_result(**change), ppl_result(1.0, 1.0))


def test_what_slows_down_both_arms_is_not_predicted_as_a_gain() -> None:
    # In two rounds of three the machine is twice as slow. Fast turns of sink have more steps, so its median is that of
    # the fast turns; dense has its median from slow turns.
    steps = latency_result()
    for row in steps["rows"]:
        ms, short, long = row["median_ms"], 2, 5 if row["arm"] == "sink" else 2
        row["step_ms"] = [[2 * ms] * short, [2 * ms] * short, [ms] * long] * 2
        row["median_ms"] = 2 * ms if row["arm"] == "dense" else ms
    run = ppl_result(1.0, 1.0)
    assert regimes(steps, run)[0]["predicted"] == pytest.approx(regimes(latency_result(), run)[0]["predicted"])


def test_the_latency_result_nearest_in_time_is_taken() -> None:
    found = [
        latency_result(ms, date=f"2026-0{month}-01T00:00:00+00:00") for month, ms in ((1, 1.0), (3, 2.0), (8, 3.0))
    ]
    for order in (found, found[::-1]):
        (one,) = regimes(*order, ppl_result(1.0, 1.0, date="2026-04-01T00:00:00+00:00"))
        assert one["last step"] == pytest.approx(4.0)


def test_no_table_holds_eager_and_compiled_steps() -> None:
    rows = [
        step_row("dense", 4096, 9.0, gpu_ms=9.0),
        step_row("sink", 4096, 3.0, 1024, gpu_ms=1.0),
        step_row("static", 4096, 4.0, compiled=True, gpu_ms=0.8),
        step_row("sink", 4096, 2.0, 1024, compiled=True, gpu_ms=0.6),
    ]
    one = results_of(result("latency", rows=rows, protocol={}, device={"type": "cuda", "name": "a GPU"}))
    compiled, eager = (report.single_steps(one, compiled=compiled).iloc[0] for compiled in (True, False))
    assert (compiled["dense, ms"], compiled["ours, ms"], compiled["gain"]) == ("4.00", "2.00", "2.00")
    assert (eager["dense, GPU ms"], eager["ours, GPU ms"], eager["gain, clock"]) == ("9.00", "1.00", "3.00")


def test_the_rows_of_the_study_are_complete(results: report.Results) -> None:
    steps = report.study_steps(results)
    assert list(steps["capacity"]) == [256, 512, 1024, 2048, 4096, 1024, 1024, 1024]
    assert steps["the study, ms"].iloc[4] == "nan → nan: nan"
    assert list(report.study_runs(results)["capacity"]) == [256, 512, 1024, 2048, 4096]
    assert list(report.paper(results)["its gain"])[-1] == 21.7
    assert len(report.study_quality(results)) >= 3


def test_the_streams_that_were_measured_are_shown(results: report.Results) -> None:
    found = report.TABLES["pool"](results)
    llama = found[found["shape × streams"] == "llama-3-8b × 64"].set_index("arm")
    assert llama.loc["pool", "tokens/s"] > 10 * llama.loc["generate", "tokens/s"]
    assert report.TABLES["traffic"](results)["share of no waiting"].max() <= 1
    gap, soak = (report.TABLES[what](results) for what in ("gap", "soak"))
    assert len(gap) == len(soak) == 1
    assert soak.notna().all(axis=None)
    assert list(soak["shape × streams"]) == ["llama-tiny"]  # this result does not have its streams


def test_a_table_has_five_columns_at_most(results: report.Results) -> None:
    columns = {name: len(table(results).columns) for name, table in report.TABLES.items()}
    assert [name for name, number in columns.items() if number > 5] == []


def recall_row(method: str, asked: int, accuracy: float, capacity: int | None, **more: Any) -> dict[str, Any]:
    numbers = {"distance_tokens": asked, "accuracy": accuracy, "accuracy_low": accuracy / 2, "accuracy_high": 1.0}
    row = {"task": "copy", "method": method, "n_sink": 4, "capacity": capacity, "asked": asked, "reason": ""}
    return row | numbers | more


def test_recall_is_shown_by_distance_at_one_capacity() -> None:
    rows = [recall_row("dense", 64, 0.6, None), recall_row("dense", 2048, 0.5, None)]
    rows += [recall_row("sink", 64, 0.5, 1024), recall_row("sink", 2048, 0.0, 1024), recall_row("sink", 64, 0.1, 256)]
    rows += [recall_row("window", 64, 0.2, 1024, accuracy_low=None)]
    rows += [recall_row("window", 2048, 0.0, 1024, reason="none")]
    pinned = [recall_row("sink", 10_000, 0.4, 2024, task="pinned", n_sink=1000)]
    files = result("recall", rows=rows, protocol={}), result("recall", rows=pinned, protocol={}, file="pinned")
    one = results_of(*files)
    (near, far), (of_pinned,) = (report.TABLES[name](one).to_dict("records") for name in ("recall", "pinned"))
    assert near == {"distance, tokens": 64, "dense": "0.60 (0.30–1.00)", "sink": "0.50 (0.25–1.00)", "window": "0.20"}
    assert far["sink"] == "0.00 (0.00–1.00)"
    assert pd.isna(far["window"])
    assert of_pinned == {"tokens after the sinks": 10_000, "sink": "0.40 (0.20–1.00)"}
    axes = plt.figure().subplots()
    assert report.by_distance(one, axes) == "Within the window up to 50% are recalled, beyond it 0%"
    assert [list(one.get_ydata()) for one in axes.lines[:3]] == [[0.6, 0.5], [0.5, 0.0], [0.2]]


def test_of_several_runs_of_recall_the_last_is_shown() -> None:
    older = [recall_row("sink", asked, 0.1, 1024) for asked in (64, 128)]
    newer = [recall_row("sink", 64, 0.7, 1024)]
    files = [result("recall", rows=rows, protocol={}, file=file) for file, rows in (("a", older), ("b", newer))]
    (row,) = report.TABLES["recall"](results_of(*files)).to_dict("records")
    assert row["sink"] == "0.70 (0.35–1.00)"


def test_quality_is_not_of_runs_with_several_numbers_of_sinks(results: report.Results) -> None:
    assert {"sink", "window", "recompute"} <= set(report.quality(results).columns)


def test_numbers_of_sinks_stand_beside_those_of_the_paper() -> None:
    numbers = itertools.product([("sink", 0), ("sink", 4), ("line-breaks", 4)], [512, 1024])
    rows = [
        {"arm": arm, "n_sink": n_sink, "capacity": capacity, "perplexity": n_sink + capacity / 1000, "reason": ""}
        for (arm, n_sink), capacity in numbers
    ]
    rows[-1]["perplexity"] = 9.0
    one = results_of(result("ppl", rows=rows, protocol={"n_sinks": [0, 4]}, data={"name": "a book"}))
    sinks, sizes = report.TABLES["the paper's sinks"](one), report.TABLES["the paper's sizes"](one)
    breaks = report.TABLES["line breaks"](one)
    assert list(sinks["n_sink"]) == [0, 1, 2, 4, 8]
    assert list(sinks["tiny, a book"].dropna()) == [0 + 1024 / 1000, 4 + 1024 / 1000]
    assert list(sizes.set_index("capacity")["tiny, a book"].dropna()) == [4 + 512 / 1000, 4 + 1024 / 1000]
    assert list(breaks.columns) == ["text", "no sinks", "first tokens", "line breaks"]
    assert list(breaks.iloc[1]) == ["tiny, a book", 1.024, 5.024, 9.0]
    assert sinks["the paper: Llama-2-7B"].iloc[0] > 3000
    assert breaks["line breaks"].iloc[0] == 5.60


def test_quantised_weights_stand_beside_the_same_model_without() -> None:
    files = []
    for name, size in (("tiny", 4), ("tiny int8", 2), ("another", 8)):
        rows = [
            step_row("dense", 100, 2.0 * size),
            step_row("endless", 100, size, 50, warning="the spread is too wide"),
        ]
        files.append(
            result("calls", rows=rows, protocol={}, model=MODEL | {"name": name, "weight_bytes": size * 2**20})
        )
    whole, rounded = report.TABLES["quantised"](results_of(*files)).to_dict("records")
    assert list(whole.values()) == ["tiny, a CPU", "4.00", "8.00", "4.00 ?"]
    assert list(rounded.values()) == ["tiny int8, a CPU", "2.00", "4.00", "2.00 ?"]


# --- the README and docs/, pictures, the page, the whole set ---


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))])
def test_the_numbers_of_a_page_are_those_of_the_results(page: str, results: report.Results) -> None:
    text = (ROOT / page).read_text()
    assert report.write(text, results) == text, "run python -m benchmarks.report --write README.md docs/*.md"
    assert page != "README.md" or len(report.MARK.findall(text)) >= 4


def test_results_that_change_change_the_text() -> None:
    one = results_of(latency_result())
    where = "latency shape=tiny arm=sink context=400 median_ms"
    text = f"It takes <!-- figure: {where} -->9<!-- end --> ms.\n<!-- table: new lengths -->\nold\n<!-- end -->\n"
    written = report.write(text, one)
    assert f"It takes <!-- figure: {where} -->1.00<!-- end --> ms." in written
    assert "old" not in written
    assert report.write(f"`<!-- figure: {where} -->` <!-- end -->", one) == f"`<!-- figure: {where} -->` <!-- end -->"
    for bad in ("<!-- figure: latency arm=none median_ms -->", "<!-- table: none -->"):
        with pytest.raises(BenchmarkError, match="none"):
            report.write(f"{bad}<!-- end -->", one)


def test_a_marker_chooses_rows_and_columns_and_figures_within_others(monkeypatch: pytest.MonkeyPatch) -> None:
    frame = pd.DataFrame({"shape": ["a", "b", "b"], "step, ms": [1.0, 2.0, 3.0], "n": [7, 8, 9]})
    monkeypatch.setitem(report.TABLES, "some", lambda results: frame)
    found = report.some_table(results_of(), "some; shape=b; n; step, ms")
    assert found.to_dict("list") == {"n": [8, 9], "step, ms": [2.0, 3.0]}
    assert report.some_table(results_of(), "some; n=7")["step, ms"].tolist() == [1.0]
    for bad in ("some; n; m", "some; m=1"):
        with pytest.raises(BenchmarkError, match="has shape, step, ms, n, but not m"):
            report.some_table(results_of(), bad)

    of_ppl = ppl_result(1.0, 1.0) | {"data": {"max_tokens": 300}}
    of_ppl["rows"][1] |= {"cache_bytes": 3 * 2**20, "same_tokens": {"perplexity": 25.0}}
    one = results_of(of_ppl)
    assert report.number(one, "ppl arm=sink max_tokens=300 cache_mib") == "3.00"
    assert report.number(one, "ppl arm=sink same_tokens.perplexity") == "25.0"
    with pytest.raises(BenchmarkError, match="no result has the figure"):
        report.number(one, "ppl arm=dense same_tokens.perplexity")


def test_pictures_and_the_page_need_nothing_but_result_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(plt.Figure, "savefig", lambda figure, path, **_: (drawn.append(figure), path.write_bytes(b"")))
    monkeypatch.setattr(plt, "close", lambda _: None)
    assert harness.run(report.main, ["--output", str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text()
    assert {path.stem for path in tmp_path.glob("*.png")} >= {"hero", "quality", "regimes", "streams"}
    assert "the study" in page
    for axes in (axes for figure in drawn for axes in figure.axes):
        assert axes.get_title()
        assert "better)" in axes.get_xlabel() + axes.get_ylabel()
        legend = axes.get_legend()
        assert len(legend.get_texts() if legend else axes.patches) <= 4  # lines or bars
    plt.close("all")
    assert harness.run(report.main, [str(ROOT / "setup.cfg")]) == 2


@pytest.mark.parametrize("kind", ["", "latency", "ppl", "throughput"])
def test_what_there_are_no_results_of_is_left_out(results: report.Results, kind: str, tmp_path: Path) -> None:
    some = results_of(*results.of(kind))
    for table in report.TABLES.values():
        table(some)
    assert len(report.draw(some, tmp_path)) < len(report.PICTURES)


def test_a_title_says_what_the_numbers_say(results: report.Results) -> None:
    # Here a window without sinks is the better one, nothing breaks, and new lengths cost nothing.
    other = results_of(*copy.deepcopy([*results]))
    for row in (row for one in other if one["harness"] in ("ppl", "latency") for row in one["rows"]):
        if row["arm"] in ("dense", "sink", "window") and row.get("beyond_trained_context"):
            row["beyond_trained_context"] = {"perplexity": {"dense": 7.0, "sink": 9.0, "window": 8.0}[row["arm"]]}
        if row["arm"] in ("sink", "window") and "perplexity" in row:
            row["perplexity"] = {"sink": 9.0, "window": 8.0}[row["arm"]]
        if row.get("first_time_ms"):
            row["first_time_ms"] = row["again_ms"]
    titles = {part: part(other, plt.figure().subplots()) for part in (report.by_position, report.by_capacity)}
    assert titles[report.by_position] == "Perplexity beyond the trained context: dense 7.00, no sinks 8.00, ours 9.00"
    assert titles[report.by_capacity] == "Perplexity at 2,048 tokens: 9.00 with sinks, 8.00 without"
    title = report.price_of_new_lengths(other, plt.figure().subplots())
    assert title.startswith("At a new length a dense step takes up to 1.00 times as long")
    run = ppl_result(DENSE_MS / 1e3, 2 * SINK_MS / 1e3)  # the whole run gains half of what its steps say
    title = report.by_regime(results_of(latency_result(), run), plt.figure().subplots())
    assert title.endswith("100% off (median), at most 100%")
    plt.close("all")


def test_the_commands_of_the_whole_set_are_understood_and_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[list[str]] = []
    done = type("Done", (), {"returncode": 0})
    monkeypatch.setattr(whole_set.subprocess, "run", lambda command: (ran.append(command), done)[1])
    for part in "123456":
        whole_set.main(["--output", str(tmp_path), "--part", part])
    modules = {"latency": latency, "ppl": ppl, "calls": calls, "throughput": throughput, "recall": recall}
    for _, _, module, *argv in ran:
        modules[module.removeprefix("benchmarks.")].parse(argv)
    lines = [line.split() for line in whole_set.SET.strip().splitlines()]
    assert len(ran) == len(lines) == len({name for _, _, name, *_ in lines})
    for part in "12345":
        assert sum(int(seconds) for one, seconds, *_ in lines if one == part) < 9 * 60
    harness.write_json(tmp_path / "run-70m.json", {"schema": harness.SCHEMA, "schema_version": 2, "interrupted": False})
    capsys.readouterr()
    whole_set.main(["--output", str(tmp_path), "--list"])
    assert "run-410m" in (listed := capsys.readouterr().out)
    assert "run-70m" not in listed
