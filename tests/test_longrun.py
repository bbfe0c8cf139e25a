"""`benchmarks.longrun`: what it notes, in runs that are short and on models that are tiny."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from benchmarks import harness, longrun
from benchmarks.harness import BenchmarkError
from benchmarks.models import LoadedModel

from .families import tiny_model

SMALL = ["--capacity", "16", "--device", "cpu"]


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, model: PreTrainedModel, *arguments: str) -> dict[str, Any]:
    """The one result file of a run on this model; its text is read as bytes."""
    monkeypatch.setattr(longrun, "load", lambda *_: LoadedModel(model, None, "tiny"))
    longrun.main([*arguments, *SMALL, "--output", str(folder)])
    (path,) = folder.glob("*.json")
    assert path.with_name(f"{path.stem}-over-time.png").is_file()
    result: dict[str, Any] = json.loads(path.read_text())
    return result


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama", vocab_size=256, bos_token_id=None, eos_token_id=None, pad_token_id=None)


def test_generate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: PreTrainedModel) -> None:
    monkeypatch.setattr("sink_cache.endless_loop._REBASE_EVERY", 48)
    result = run(monkeypatch, tmp_path, model, "--random-weights", "tiny", "--tokens", "1000")
    assert [row["tokens"] for row in result["rows"]] == list(range(10, 1001, 10))
    assert max(row["next_position"] for row in result["rows"]) <= 16 + 12 + 48
    assert result["rebases"]["count"] == 1000 // 48
    assert set(result["slopes"]) == {"ms_per_token", "device_bytes", "host_bytes"}
    assert result["slopes"]["device_bytes"] is None


def test_each_pass_predicts_the_same_tokens(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: PreTrainedModel
) -> None:
    text = tmp_path / "text"
    text.write_text("the same text, again and again and again. " * 20)
    options = ["--passes", "3", "--tokens", "200", "--chunk-size", "5", "--text-file", str(text)]
    result = run(monkeypatch, tmp_path / "results", model, "--offline", *options)
    assert [(row["pass"], row["tokens"]) for row in result["rows"]] == [(1, 200), (2, 400), (3, 600)]
    first, second, third = (row["perplexity"] for row in result["rows"])
    assert third == pytest.approx(second, rel=1e-5)
    assert first != pytest.approx(second, rel=1e-5)
    assert max(row["next_position"] for row in result["rows"]) <= 16 + 12 + 48 + 200 % 48
    assert result["rebases"]["count"] == 200 // 48 * 3


def test_positions_count_up_to_the_last_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(longrun, "LAST_TOKENS", 30)
    model = tiny_model("gptj", n_positions=500, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    result = run(monkeypatch, tmp_path, model, "--random-weights", "tiny", "--until-the-end", "--chunk-size", "10")
    assert (result["end"]["position"], result["end"]["last_position"]) == (500, 500)
    assert "500 positions" in result["end"]["message"]
    assert result["rebases"] is None


def test_a_slope_is_the_rise_over_the_run() -> None:
    rows = [{"tokens": 10 * i, "ms": 7 + 0.3 * i, "bytes": None} for i in range(1, 101)]
    fitted = longrun.slope(rows, "ms")
    assert fitted is not None
    assert fitted["rise"] == pytest.approx(30)
    assert fitted["standard_error"] < 1e-6
    assert longrun.slope(rows, "bytes") is None


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "give one of"),
        (["--offline", "--random-weights", "llama-tiny"], "give one of"),
        (["--offline", "--passes", "2", "--until-the-end"], "different runs"),
        (["--random-weights", "llama-tiny", "--passes", "2"], "means nothing"),
        (["--offline", "--tokens", "10"], "--tokens must be at least 1000, but is 10"),
        (["--offline", "--n-sink", "9", "--capacity", "9"], "--capacity must be at least 10, but is 9"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert harness.run(longrun.main, arguments) == 2
    assert message in capsys.readouterr().err


def test_a_text_that_is_too_short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: PreTrainedModel) -> None:
    (tmp_path / "text").write_text("short")
    with pytest.raises(BenchmarkError, match="text has 5 tokens, and --tokens asks for 200"):
        run(
            monkeypatch,
            tmp_path,
            model,
            "--offline",
            "--passes",
            "2",
            "--tokens",
            "200",
            "--text-file",
            str(tmp_path / "text"),
        )
