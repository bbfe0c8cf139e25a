"""`benchmarks.throughput` on a small shape: what it writes, and what it refuses."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks import calls, harness, report, throughput

SMALL = ["--random-weights", "llama-tiny", "--device", "cpu"]


def measured(folder: Path, what: str, *more: str) -> list[dict[str, Any]]:
    pieces = [] if what == "read" else ["--prefill-chunk-size", "16"]
    throughput.main([what, *SMALL, *pieces, "--streams", "3", "--output", str(folder), *more])
    (path,) = folder.glob(f"throughput-*-{what}-*.json")
    rows = harness.read_json(path)["rows"]
    assert {(row["what"], row["reason"]) for row in rows} == {(what, "")}
    return rows


def test_steady(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ("--capacities", "32", "--new-tokens", "8", "--others-new-tokens", "4", "--arms", "pool", "generate")
    rows = measured(tmp_path, "steady", *small)
    assert [(row["arm"], row["capacity"]) for row in rows] == [("pool", 32), ("generate", None)]
    for row in rows:
        assert row["tokens_per_second"] == pytest.approx(3e3 / row["step_ms"], rel=0.9)
        assert 0 < row["floor_ms"] < row["step_ms"] < row["time_to_first_token_ms"]
        assert row["cache_bytes"] > 0
    assert len(rows[1]["raw_step_ms"]) == 3
    assert "tokens_per_second" in capsys.readouterr().out
    results = report.Results([tmp_path])
    assert list(report.TABLES["pool"](results)["arm"]) == ["pool", "generate"]
    assert len(report.draw(results, tmp_path)) == 1


def test_one_pool(tmp_path: Path) -> None:
    (gap,) = measured(tmp_path, "gap", "--long-prompt", "200", "--capacities", "32")
    assert gap["step_ms_while"]["n"] >= 200 // 16
    (traffic,) = measured(tmp_path, "traffic", "--requests", "6", "--scale", "0.02", "--capacities", "32")
    assert 0 < traffic["share_of_ideal"] == pytest.approx(traffic["ideal_s"] / traffic["seconds"])
    (soak,) = measured(tmp_path, "soak", "--soak-steps", "300", "--capacities", "32")
    assert soak["checked"] == soak["the_same_alone"] >= 1
    assert len({state["nbytes"] for state in soak["states"]}) == 1
    results = report.Results([tmp_path])
    assert [len(report.TABLES[what](results)) for what in ("gap", "traffic", "soak")] == [1, 1, 1]


def test_read(tmp_path: Path) -> None:
    rows = measured(tmp_path, "read", "--text-tokens", "300", "--chunk-sizes", "32", "100", "--capacities", "64")
    assert [row["chunk_size"] for row in rows] == [32, 100]
    for row in rows:
        assert row["tokens_per_second"] == pytest.approx(3 * 300 / row["seconds"])


def test_rows(tmp_path: Path) -> None:
    rows = measured(tmp_path, "rows", "--new-tokens", "20", "--capacities", "64", "--rounds", "2")
    assert [row["rows"] for row in rows] == ["same", "differ", "half"]
    for row in rows:
        assert [len(turn) for turn in row["step_ms"]] == [20 - calls.WARM_UP_TOKENS] * 2
        assert 0 < row["p5_ms"] <= row["median_ms"] <= row["p95_ms"]
    lengths = {kind: throughput.prompt_lengths(kind, 8, 64, 40).tolist() for kind in throughput.KINDS}
    assert [len(set(lengths[kind])) for kind in ("same", "differ")] == [1, 8]
    assert min(lengths["same"] + lengths["differ"]) > 64
    assert sum(length + 40 < 64 for length in lengths["half"]) == 4
