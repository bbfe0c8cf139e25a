"""`benchmarks.longrun`: what it notes, in runs that are short and on models that are tiny."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from benchmarks import harness, longrun, plots
from benchmarks.harness import BenchmarkError
from benchmarks.models import LoadedModel

from .families import tiny_model
from .oracle import streamed_logits

SMALL = ["--capacity", "16", "--device", "cpu"]


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, model: PreTrainedModel, *arguments: str) -> dict[str, Any]:
    """The one result file of a run on this model; its text is read as bytes."""
    monkeypatch.setattr(longrun, "load", lambda *_: LoadedModel(model, None, "tiny"))
    longrun.main([*arguments, *SMALL, "--output", str(folder)])
    (path,) = folder.glob("*.json")
    assert path.with_name(f"{path.stem}-over-time.png").is_file()
    result: dict[str, Any] = json.loads(path.read_text())
    return result


@pytest.fixture(autouse=True)
def _few_notes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(longrun, "SAMPLES", 25)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama", vocab_size=256, bos_token_id=None, eos_token_id=None, pad_token_id=None)


def test_generate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: PreTrainedModel) -> None:
    monkeypatch.setattr("sink_cache.steps._REBASE_EVERY", 48)
    result = run(monkeypatch, tmp_path, model, "--random-weights", "tiny", "--tokens", "250")
    assert [row["tokens"] for row in result["rows"]] == list(range(10, 251, 10))
    assert max(row["next_position"] for row in result["rows"]) <= 16 + 12 + 48
    assert result["rebases"]["count"] == 250 // 48
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
    again = torch.tensor(list(text.read_bytes()[:200]) * 4)[None, :601]
    logits = streamed_logits(model, again[:, :-1], 4, 12)[0]
    losses = F.cross_entropy(logits, again[0, 1:], reduction="none").view(3, 200).double().mean(dim=1)
    assert [row["perplexity"] for row in result["rows"]] == pytest.approx(losses.exp().tolist(), rel=1e-5)
    assert max(row["next_position"] for row in result["rows"]) <= 16 + 12 + 48 + 200 % 48
    assert result["rebases"]["count"] == 200 // 48 * 3


def test_positions_count_up_to_the_last_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(longrun, "LAST_TOKENS", 30)
    model = tiny_model("gptj", n_positions=500, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    result = run(monkeypatch, tmp_path, model, "--random-weights", "tiny", "--until-the-end", "--chunk-size", "10")
    assert result["end"]["position"] == 500
    assert "500 positions" in result["end"]["message"]
    assert result["rebases"] is None


def test_positions_stay_bounded_in_a_text_that_is_short(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: PreTrainedModel
) -> None:
    (tmp_path / "text").write_text("a text that is shorter than the way between rebases")
    options = ["--passes", "12", "--tokens", "40", "--text-file", str(tmp_path / "text"), "--chunk-size", "8"]
    result = run(monkeypatch, tmp_path / "results", model, "--offline", *options)
    assert max(row["next_position"] for row in result["rows"]) <= 16 + 12 + 48 + 40
    assert result["rebases"]["count"] == result["rows"][-1]["rebases"] == 12 * 40 // 80


def test_another_refusal_is_not_taken_for_the_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = tiny_model("gptj", n_positions=500, bos_token_id=None, eos_token_id=None, pad_token_id=None)

    def generate(*_: Any, **__: Any) -> None:
        raise ValueError("something else")

    monkeypatch.setattr(model, "generate", generate)
    with pytest.raises(ValueError, match="something else"):
        run(monkeypatch, tmp_path, model, "--random-weights", "tiny", "--until-the-end")


def test_an_interrupted_run_keeps_what_it_has(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: PreTrainedModel
) -> None:
    note = longrun.Notes.note

    def note_ten_times(notes: longrun.Notes, **more: Any) -> None:
        if len(notes.rows) == 10:
            raise KeyboardInterrupt
        note(notes, **more)

    monkeypatch.setattr(longrun.Notes, "note", note_ten_times)
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, tmp_path, model, "--random-weights", "tiny", "--tokens", "250")
    (path,) = tmp_path.glob("*.json")
    result = harness.read_json(path)
    assert (result["interrupted"], len(result["rows"])) == (True, 10)


def test_a_run_that_dies_leaves_what_it_has_and_can_be_plotted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: PreTrainedModel
) -> None:
    took = longrun.Notes.took

    def took_until_memory_is_out(notes: longrun.Notes, tokens: int) -> None:
        if len(notes.rows) == 10:
            raise MemoryError
        took(notes, tokens)

    monkeypatch.setattr(longrun.Notes, "took", took_until_memory_is_out)
    with pytest.raises(MemoryError):
        run(monkeypatch, tmp_path, model, "--random-weights", "tiny", "--tokens", "250")
    (path,) = tmp_path.glob("*.json")
    assert harness.read_json(path)["interrupted"]
    assert [one.suffix for one in plots.plot(path, tmp_path)] == [".png"]


def test_what_is_noted(monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel) -> None:
    moments = itertools.count(0.0, 0.5)  # seconds at which the clock is looked at
    monkeypatch.setattr(harness.Clock, "now", lambda _: next(moments))
    cache = longrun.TimedCache(4, 12, harness.Clock(torch.device("cpu")))
    with torch.no_grad():
        model(torch.ones(1, 7, dtype=torch.long), past_key_values=cache)
    kept: list[int] = []
    notes = longrun.Notes(cache, 10, harness.no_progress_bar(), lambda rows: kept.append(len(rows)))
    for tokens in (4, 4, 4, 10):
        notes.took(tokens)
    assert [(row["tokens"], row["next_position"]) for row in notes.rows] == [(12, 7), (22, 7)]
    # From the start of the first to its note half a second, and again from the end of that note to the next.
    assert [row["ms_per_token"] for row in notes.rows] == pytest.approx([500 / 12, 500 / 10])
    assert kept == [1, 2]


def test_a_slope_is_the_rise_over_the_run() -> None:
    rows = [{"tokens": 10 * i, "ms": 7 + 0.3 * i, "bytes": None, "same": 5} for i in range(1, 101)]
    for row in rows[:10]:
        row["ms"] = 1000  # the first tenth compiles
    fitted = longrun.slope(rows, "ms")
    assert fitted is not None
    assert fitted["rise"] == pytest.approx(30)
    assert fitted["standard_error"] < 1e-6
    assert longrun.slope(rows, "bytes") is None
    assert longrun.slope(rows, "same") == {"rise": 0, "standard_error": 0, "mean": 5}


def test_neighbours_that_are_alike_are_no_trend() -> None:
    # Values that wander from one to the next: a line through all of them would be much surer of its rise than it can be.
    generator = np.random.default_rng(0)
    beyond = 0
    for _ in range(200):
        noise = generator.normal(size=100)
        for i in range(1, 100):
            noise[i] += 0.5 * noise[i - 1]
        fitted = longrun.slope([{"tokens": i + 1, "ms": value} for i, value in enumerate(noise)], "ms")
        assert fitted is not None
        beyond += (
            abs(fitted["rise"]) > 2.31 * fitted["standard_error"]
        )  # 5% of a t distribution with 8 degrees of freedom
    assert beyond / 200 <= 0.12


def test_the_share_of_rebases() -> None:
    rows = [{"tokens": 100 * i, "ms_per_token": 2.0, "rebases": 2 * i} for i in range(1, 11)]
    times = [
        1000.0,
        1000.0,
        *[4.0] * 18,
        77.0,
        77.0,
    ]  # the first tenth is not counted, and the last came after the last row
    found = longrun.rebases(times, rows)
    assert found == {"count": 20, "median_ms": 4.0, "ms_apart": 100.0, "share": 0.04}
    assert longrun.rebases([], [{**row, "rebases": 0} for row in rows]) is None


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "give one of"),
        (["--offline", "--random-weights", "llama-tiny"], "give one of"),
        (["--offline", "--passes", "2", "--until-the-end"], "different runs"),
        (["--random-weights", "llama-tiny", "--passes", "2"], "means nothing"),
        (["--offline", "--tokens", "10"], "--tokens must be at least 250, but is 10"),
        (["--offline", "--tokens", "0"], "--tokens must be at least 250, but is 0"),
        (["--offline", "--text-file", "text"], "--text-file would change nothing"),
        (["--offline", "--chunk-size", "9"], "--chunk-size would change nothing"),
        (["--random-weights", "llama-tiny", "--until-the-end", "--tokens", "9"], "--tokens would change nothing"),
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
