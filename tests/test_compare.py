"""`benchmarks.compare`: the sum of a curve written out by hand, the right results put side by side, sentences that follow."""

import json
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import compare, harness
from benchmarks.compare import Comparison, Curve

MODEL = {"type": "llama", "parameters": 1000, "name": "tiny", "weight_bytes": 4000, "trained_context": 512}


def result(kind: str, **more: Any) -> dict[str, Any]:
    return harness.header(kind, f"a {kind} result", torch.device("cpu"), torch.float32, argv=[], model=MODEL) | more


def step_row(arm: str, context: int, ms: float, capacity: int | None = None, **more: Any) -> dict[str, Any]:
    row = {"arm": arm, "compiled": False, "context": context, "capacity": capacity, "median_ms": ms, "reason": ""}
    nothing = dict.fromkeys(("unsynchronized_ms", "first_time", "busy", "gpu_ms"))
    return row | {"step_ms": [[ms] * 3] * 6} | nothing | more


def latency_result(factor: float = 1.0, **more: Any) -> dict[str, Any]:
    """Dense: 1 ms up to 100 tokens, then 1 ms more per 100; sink: 1 ms. A step after 400 tokens gains 4×."""
    rows = [step_row("dense", n, factor * max(1, n / 100)) for n in (50, 100, 200, 400)]
    rows += [step_row("sink", n, 1.0, 100) for n in (50, 100, 200, 400)]
    rows += [step_row("dense-at-capacity", n, 1.0, 100) for n in (200, 400)]
    keys = {"capacity": 100, "compiled": False, "note": ""}
    ratios = [
        {"name": "achieved", "context": n, "value": v * factor, "low": v * 0.9, "high": v * 1.1, **keys}
        | {"gpu_value": v}
        for n, v in ((50, 1.0), (100, 1.0), (200, 2.0), (400, 4.0))
    ]
    return result("latency", rows=rows, ratios=ratios, protocol={"sdpa_backend": "auto"}) | more


def ppl_result(dense_s: float, sink_s: float, tokens: Sequence[int] = (300,), mode: str = "step") -> dict[str, Any]:
    rows = []
    for method, capacity, seconds in (("dense", None, dense_s), ("sink", 100, sink_s)):
        batches = [
            {"samples": [i], "seconds": seconds / len(tokens), "tokens_processed": n} for i, n in enumerate(tokens)
        ]
        row = {"method": method, "capacity": capacity, "seconds": seconds, "batches": batches}
        rows.append(row | {"tokens_per_second": sum(tokens) / seconds})
    chunk = {"step": 1, "chunk": 128}[mode]
    protocol = {"mode": mode, "chunk_size": chunk, "batch_size": 1, "sdpa_backend": "auto"}
    return result("ppl", rows=rows, protocol=protocol, data={"max_tokens": max(tokens)})


# By hand: contexts 0 to 100 take 1 ms, and 101 to 299 take n / 100 ms.
DENSE_MS = 101 + sum(n / 100 for n in range(101, 300))
SINK_MS = 300


def comparison(run: dict[str, Any], latency: dict[str, Any] | None = None) -> Comparison:
    (one,) = compare.comparisons([latency or latency_result(), run])
    return one


def test_a_run_is_the_sum_of_the_curve_over_its_contexts() -> None:
    # Off by one token, or the mean of the measured points for the mean over the run, would be other numbers.
    curve = Curve(latency_result(), "dense")
    assert curve.sum_ms(1) == 1.0
    assert curve.sum_ms(300) == pytest.approx(DENSE_MS)
    one = comparison(ppl_result(DENSE_MS / 1e3, SINK_MS / 1e3))
    assert one.predicted == pytest.approx(DENSE_MS / SINK_MS)
    assert one.measured == pytest.approx(DENSE_MS / SINK_MS)
    # Samples begin anew with an empty cache.
    parts = comparison(ppl_result(1.0, 1.0, tokens=(100, 100, 100)))
    assert parts.predicted == pytest.approx(1.0)


def test_steps_that_are_not_waited_for_make_the_prediction() -> None:
    latency = latency_result()
    for row in latency["rows"]:
        row["unsynchronized_ms"] = [row["median_ms"] / (4 if row["arm"] == "dense" else 2)] * 6
    one = comparison(ppl_result(1.0, 1.0), latency)
    assert one.predicted == pytest.approx(DENSE_MS / 4 / (SINK_MS / 2))
    assert any("makes a dense step 4.00 and a sink step 2.00 times as long" in text for text in compare.reasons(one))
    for row in latency["rows"]:  # too few for a ratio: then that of the others, which are waited for
        del row["unsynchronized_ms"][3:]
    assert comparison(ppl_result(1.0, 1.0), latency).predicted == pytest.approx(DENSE_MS / SINK_MS)


@pytest.mark.parametrize("times, in_the_first_sample", [(10.0, 10.0), (1.05, 1.0)])
def test_only_the_first_sample_pays_for_new_lengths(times: float, in_the_first_sample: float) -> None:
    latency = latency_result()
    for row in latency["rows"]:
        if row["arm"] == "dense":
            row["first_time"] = {"median_ms": times * row["median_ms"], "again_median_ms": row["median_ms"]}
    one = comparison(ppl_result(1.0, 1.0, tokens=(300, 300)), latency)
    # The 32 lengths of the warm-up, of 1 ms each, are not new; with a sink cache those from there to its capacity of 100 are.
    dense_ms = 32 + in_the_first_sample * (DENSE_MS - 32) + DENSE_MS
    sink_ms = 32 + in_the_first_sample * 68 + 200 + SINK_MS
    assert one.predicted == pytest.approx(dense_ms / sink_ms)
    one.run["protocol"]["warm_up_tokens"] = 10
    dense_ms = 10 + in_the_first_sample * (DENSE_MS - 10) + DENSE_MS
    sink_ms = 10 + in_the_first_sample * 90 + 200 + SINK_MS
    assert one.predicted == pytest.approx(dense_ms / sink_ms)


def test_the_turns_of_a_run_are_told_apart() -> None:
    run = ppl_result(1.0, 1.0, tokens=(320, 320))
    assert comparison(run).turns() == []  # each batch at once, as runs before there were turns
    assert not any("Along the run" in text for text in compare.reasons(comparison(run)))
    for row, turn_seconds in zip(run["rows"], ([1.0, 2.0, 3.0, 4.0, 6.0], [1.0, 1.0, 1.0, 1.0, 2.0]), strict=True):
        for batch in row["batches"]:
            batch["turn_seconds"] = turn_seconds
    one = comparison(run)
    assert one.turns() == [(32, 1.0), (96, 2.0), (160, 3.0), (224, 4.0), (288, 3.0)] * 2
    assert any("gain 1.00× in the first of 8 parts and 3.00× in the last" in text for text in compare.reasons(one))
    for row in run["rows"]:  # of two samples each, and a last turn that is shorter
        for batch in row["batches"]:
            batch |= {"tokens_processed": 2 * 140, "samples": [0, 1]}
    run["protocol"]["turn_tokens"] = 30
    assert [middle for middle, _ in comparison(run).turns()] == [15, 45, 75, 105, 130] * 2


def test_nothing_to_win_and_new_lengths_that_scatter_are_said_so() -> None:
    latency = latency_result()
    latency["ratios"].append(latency["ratios"][2] | {"name": "ceiling", "value": 0.98})
    for row, new in zip((row for row in latency["rows"] if row["arm"] == "dense"), (1.0, 0.3, 1.1, 1.2), strict=True):
        row["first_time"] = {"median_ms": new, "again_median_ms": 1.0}
    text = " ".join(compare.reasons(comparison(ppl_result(1.0, 1.0), latency)))
    assert "taken in turns, 102% of it. Nothing of it grows with the context: a dense cache cut to this size" in text
    assert "1.05 times as long as the same step again (the median over contexts, at which it is 0.30 to 1.20)" in text


def test_the_page_says_how_much_a_run_read_and_what_else_ran(tmp_path: Path) -> None:
    page = compare.Page(tmp_path)
    run, latency = ppl_result(1.0, 1.0, tokens=(300, 300)), latency_result(machine={"cpu_share_of_others": 0.8})
    compare.add_comparison(page, [comparison(run | {"interrupted": True}, latency)], tmp_path / "plot.png")
    text = " ".join(page.markdown)
    assert "2 sample(s) of 300 tokens (interrupted)." in text
    assert "; other programs used 80% of the CPU when this began" in text
    page = compare.Page(tmp_path)
    compare.add_comparison(page, [comparison(run, latency_result())], tmp_path / "plot.png")
    assert "2 sample(s) of 300 tokens. " in " ".join(page.markdown)
    assert "other programs" not in " ".join(page.markdown)


def test_what_cannot_be_predicted_says_why() -> None:
    chunks = comparison(ppl_result(1.0, 1.0, mode="chunk"))
    assert chunks.predicted is None
    assert "128 tokens of 1 samples per forward" in chunks.not_predicted()
    far = comparison(ppl_result(1.0, 1.0, tokens=(401,)))
    assert far.predicted is None
    assert "reaches 401 tokens, and the curve ends at 400" in far.not_predicted()
    assert any("No prediction" in text for text in compare.reasons(far))
    assert comparison(ppl_result(1.0, 1.0, tokens=(400,))).predicted is not None


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "bfloat16"},
        {"threads": 97},
        {"model": MODEL | {"parameters": 1001}},
        {"device": {"type": "cpu", "name": "another"}},
    ],
)
def test_only_results_of_one_setting_are_put_side_by_side(change: dict[str, Any]) -> None:
    run = ppl_result(1.0, 1.0)
    assert compare.comparisons([latency_result(), run])
    assert not compare.comparisons([latency_result(**change), run])
    # The same shape with other weights takes the same time.
    assert compare.comparisons([latency_result(model=MODEL | {"name": "tiny (random weights)"}), run])


def test_what_slows_down_both_arms_is_not_predicted_as_a_gain() -> None:
    # In two rounds of three the machine is twice as slow; of sink's turns the fast ones are longer, so its median is of those.
    latency, steady = latency_result(), latency_result()
    for row in latency["rows"]:
        ms, short, long = row["median_ms"], 2, 5 if row["arm"] == "sink" else 2
        row["step_ms"] = [[2 * ms] * short, [2 * ms] * short, [ms] * long] * 2
        row["median_ms"] = 2 * ms if row["arm"] == "dense" else ms
    run = ppl_result(1.0, 1.0)
    assert comparison(run, latency).predicted == pytest.approx(comparison(run, steady).predicted)


def test_the_latency_result_nearest_in_time_is_taken() -> None:
    results = [
        latency_result(ms, date=f"2026-0{month}-01T00:00:00+00:00") for month, ms in ((1, 1.0), (3, 2.0), (8, 3.0))
    ]
    for order in (results, results[::-1]):
        (one,) = compare.comparisons([*order, ppl_result(1.0, 1.0) | {"date": "2026-04-01T00:00:00+00:00"}])
        assert one.latency is results[1]


def test_sentences_follow_from_the_numbers() -> None:
    text = " ".join(compare.reasons(comparison(ppl_result(DENSE_MS / 1e3, SINK_MS / 1e3))))
    # 400 tokens are beyond the run of 300.
    assert (
        "A step after 200 tokens (the last measured context that the run reaches) gains 2.00×, the whole run 1.66×"
        in text
    )
    assert "takes 2.00 ms, and 1.00 ms with 100 tokens in the cache: taken in turns, 50%" in text
    assert "0 to 299 tokens before them, 150 on average; 33% of them" in text
    assert "not counted as a part of the difference" in text  # no new lengths
    assert "within 15%, as it must be if both regimes measure one thing at different places. Per token" in text
    assert "works" not in text  # no share of a GPU on a CPU
    text = " ".join(compare.reasons(comparison(ppl_result(1.5 * DENSE_MS / 1e3, SINK_MS / 1e3))))
    assert "something else differs" in text
    twice_as_slow = ppl_result(2 * DENSE_MS / 1e3, 2 * SINK_MS / 1e3)
    assert "the times themselves are further off, and their errors cancel" in " ".join(
        compare.reasons(comparison(twice_as_slow))
    )
    flat = latency_result()
    for row in flat["rows"]:
        row |= {"median_ms": 1.0, "step_ms": [[1.0] * 3] * 6}
    flat["ratios"][2] |= {"value": 1.0, "note": "no conclusion: the spread is too wide"}
    text = " ".join(compare.reasons(comparison(ppl_result(0.3, 0.3), flat)))
    assert "a gain so close to 1 would be predicted by chance, too" in text
    found = "gains 1.00× (no conclusion: the spread is too wide), the whole run 1.00×"
    assert f"after 200 tokens (the last measured context that the run reaches) {found}" in text
    latency = latency_result()
    for row in latency["rows"]:
        row |= {"busy": 0.25, "gpu_ms": row["median_ms"] / 4}
    text = " ".join(compare.reasons(comparison(ppl_result(1.0, 1.0), latency)))
    assert "the GPU works 25% of the time: the step is bound by launching kernels" in text
    assert "Its own work is 0.50 ms, and 0.25 ms with sink: 2.00×" in text


def test_sentences_are_of_the_ratios_and_not_of_the_medians() -> None:
    latency = latency_result()
    latency["ratios"][2]["value"] = 2.5
    latency["ratios"].append(latency["ratios"][2] | {"name": "ceiling", "value": 1.7, "note": "no conclusion: too few"})
    text = " ".join(compare.reasons(comparison(ppl_result(1.0, 1.0), latency)))
    assert "after 200 tokens (the last measured context that the run reaches) gains 2.50×, the whole" in text
    assert "taken in turns, 59%" in text
    assert "would gain 1.70× (no conclusion: too few); this one gains 2.50×" in text
    latency["ratios"] = []
    text = " ".join(compare.reasons(comparison(ppl_result(1.0, 1.0), latency)))
    assert "after 200 tokens (the last measured context that the run reaches) gains 2.00×, the whole" in text


def test_a_prediction_of_too_few_rounds_says_so() -> None:
    latency, run = latency_result(), ppl_result(DENSE_MS / 1e3, SINK_MS / 1e3)
    for row in latency["rows"]:
        if row["context"] < 200:
            del row["step_ms"][2:]
    text = " ".join(compare.reasons(comparison(run, latency)))
    assert "at 2 of the 4 contexts nothing can be concluded from the ratio that this is made of" in text
    # A context that only dense was measured at is predicted all the same.
    latency["rows"] = [row for row in latency["rows"] if (row["arm"], row["context"]) != ("sink", 50)]
    assert comparison(run, latency).predicted == pytest.approx(DENSE_MS / SINK_MS)


def test_the_nearest_result_that_has_the_capacity_is_taken() -> None:
    near, far = latency_result(), latency_result(date="2000-01-01T00:00:00+00:00")
    near["rows"] = [row for row in near["rows"] if row["arm"] == "dense"]
    (one,) = compare.comparisons([near, far, ppl_result(1.0, 1.0)])
    assert one.latency is far


class Reader(HTMLParser):
    """Collects what a page would have to fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]


def test_the_page_holds_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slower = latency_result(1.1, date="2000-01-01T00:00:00+00:00", commit=None)
    slower["ratios"] += [one | {"compiled": True} for one in slower["ratios"]]
    results = {"ppl": ppl_result(0.6, 0.3), "latency": latency_result(commit="abc-dirty"), "again": slower}
    results["latency"]["ratios"] += [one | {"compiled": True} for one in results["latency"]["ratios"]]
    results["ppl"]["title"] = "a <b> & c"
    for name, content in results.items():
        harness.write_json(tmp_path / f"{name}.json", content)
    (tmp_path / "other.json").write_text(json.dumps({"rows": []}))
    files = sorted(str(path) for path in tmp_path.glob("*.json"))
    assert harness.run(compare.main, files) == 0
    markdown, page = ((tmp_path / name).read_text() for name in ("report.md", "report.html"))
    assert "left out: " in (complaint := capsys.readouterr().err)
    assert "other.json" in complaint
    assert str(tmp_path) not in markdown + page
    assert (tmp_path / "report-1.png").exists()
    assert "(report-1.png)" in markdown
    reader = Reader()
    reader.feed(page)
    assert reader.tags.count("table") == 3
    assert reader.sources
    assert all(source.startswith("data:image/png;base64,") for source in reader.sources)
    assert "a &lt;b&gt; &amp; c" in page
    assert "4.00 [3.60, 4.40]" in markdown
    # Every ratio of the older file is 10% larger.
    assert "Eager: 0 of 4 median ratios agree within 3%" in markdown
    assert "by 9.1%.\n\nEager: 4 of 4 ratios of the GPU's own work agree within 3%" in markdown
    assert "Compiled: 0 of 4 median ratios agree" in markdown
    assert "(version unknown) and" in markdown
    assert "(version abc-dirty). What changed between the versions" in markdown


@pytest.mark.parametrize("present", [["ppl"], ["latency"], []])
def test_nothing_to_compare_is_an_error(
    present: Sequence[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "none.json").write_text("{}")
    for name in present:
        content = {"ppl": ppl_result(1.0, 1.0), "latency": latency_result()}[name]
        harness.write_json(tmp_path / f"{name}.json", content)
    assert harness.run(compare.main, [str(path) for path in tmp_path.glob("*.json")]) == 2
    complaints = capsys.readouterr().err
    assert "nothing to compare" in complaints
    assert "none.json is not a result file" in complaints
    assert not list(tmp_path.glob("report*"))


def test_a_file_is_not_compared_with_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "latency.json"
    harness.write_json(path, latency_result())
    assert harness.run(compare.main, [str(path), str(tmp_path / "." / "latency.json")]) == 2
    del (cut := latency_result())["device"]
    harness.write_json(tmp_path / "cut.json", cut)
    assert harness.run(compare.main, [str(tmp_path / "cut.json")]) == 2
    assert "cut.json is not complete: it has no device" in capsys.readouterr().err
