"""`python -m benchmarks.throughput` on a small shape: what it writes, and what it refuses."""

from pathlib import Path

import pytest

from benchmarks import harness, plots, throughput

SMALL = [
    "--random-weights", "llama-tiny", "--streams", "3", "--capacity", "32", "--new-tokens", "8", "--others-new-tokens", "4",
    "--prefill-chunk-size", "16", "--long-prompt", "200", "--requests", "6", "--scale", "0.02", "--soak-steps", "300",
    "--device", "cpu",
]  # fmt: skip


def test_what_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    throughput.main([*SMALL, "--what", *throughput.MODES, "--arms", "pool", "generate", "--output", str(tmp_path)])
    (path,) = tmp_path.iterdir()
    result = harness.read_json(path)
    assert [row["arm"] for row in result["rows"]] == ["pool", "generate"]
    for row in result["rows"]:
        assert row["tokens_per_second"] == pytest.approx(3e3 / row["step_ms"], rel=0.9)
        assert 0 < row["floor_ms"] < row["step_ms"] < row["time_to_first_token_ms"]
        assert row["cache_bytes"] > 0
    assert result["gap"]["step_ms_while"]["n"] >= 200 // 16
    traffic, soak = result["traffic"], result["soak"]
    assert 0 < traffic["share_of_ideal"] == pytest.approx(traffic["ideal_s"] / traffic["seconds"], rel=0.01)
    assert soak["checked"] == soak["the_same_alone"] >= 1
    assert len({state["nbytes"] for state in soak["states"]}) == 1
    assert "tokens_per_second" in capsys.readouterr().out
    (drawn,) = plots.plot(path, tmp_path)
    assert drawn.stat().st_size > 1000


@pytest.mark.parametrize(
    "argument, says",
    [
        (["--streams", "0"], "at least 1"),
        (["--streams", "1", "--what", "gap"], "at least 2"),
        (["--capacity", "4"], "--n-sink"),
    ],
)
def test_bad_input(argument: list[str], says: str) -> None:
    with pytest.raises(harness.BenchmarkError, match=says):
        throughput.main([*SMALL, *argument])
