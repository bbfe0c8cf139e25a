"""`python -m benchmarks.rows` on a small shape: what it writes, and what it refuses."""

from pathlib import Path

import pytest

from benchmarks import harness, rows

SMALL = ["--random-weights", "llama-tiny", "--batch", "4", "--capacity", "64", "--new-tokens", "40", "--device", "cpu"]


@pytest.mark.parametrize("how", ["endless", "eager"])
def test_what_is_measured(tmp_path: Path, how: str, capsys: pytest.CaptureFixture[str]) -> None:
    rows.main([*SMALL, "--how", how, "--output", str(tmp_path)])
    (path,) = tmp_path.iterdir()
    found = harness.read_json(path)["rows"]
    assert [row["rows"] for row in found] == ["same", "differ", "half"]
    for row in found:
        assert len(row["step_ms"]) == 40 - 1 - rows.WARM_UP_TOKENS
        assert 0 < row["p5_ms"] <= row["median_ms"] <= row["p95_ms"]
    assert "median_ms" in capsys.readouterr().out


def test_lengths_are_what_their_names_say() -> None:
    lengths = {kind: rows.prompt_lengths(kind, 8, 64, 40).tolist() for kind in rows.KINDS}
    assert len(set(lengths["same"])) == 1
    assert len(set(lengths["differ"])) == 8
    assert min(lengths["same"] + lengths["differ"]) > 64
    assert sum(length + 40 < 64 for length in lengths["half"]) == 4


@pytest.mark.parametrize(
    "argument, says",
    [(["--batch", "0"], "at least 1"), (["--new-tokens", "5"], "at least 32"), (["--capacity", "9"], "--capacity")],
)
def test_bad_input(argument: list[str], says: str) -> None:
    with pytest.raises(harness.BenchmarkError, match=says):
        rows.main([*SMALL, *argument])
