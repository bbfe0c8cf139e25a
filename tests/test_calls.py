"""`benchmarks.calls`: arms that take turns, their ratios, and long runs."""

import functools
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from benchmarks import calls, harness, models
from benchmarks.arms import Arm
from benchmarks.harness import BenchmarkError
from sink_cache import SinkWindowCache, cache_kwargs

from .families import tiny_model
from .oracle import streamed_logits

CPU = ["--device", "cpu"]
SMALL = [*CPU, "--capacities", "40", "--new-tokens", "18", "--rounds", "2", "--random-weights", "tiny"]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama", vocab_size=256, bos_token_id=None, eos_token_id=None, pad_token_id=None)


@pytest.fixture(autouse=True)
def _tiny(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model is tiny, and its text is read as bytes; long runs note 25 times."""
    monkeypatch.setattr(models, "chosen", lambda *_: [models.LoadedModel(model, None, "tiny")])
    monkeypatch.setattr(calls, "NOTES", 25)
    monkeypatch.setattr(calls.gc, "collect", lambda: 0)  # a call takes a tenth of a second within a test run


def measured(folder: Path, *arguments: str) -> dict[str, Any]:
    calls.main([*arguments, "--output", str(folder)])
    (path,) = folder.glob("*.json")
    return harness.read_json(path)


# --- steps ---


def test_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = measured(tmp_path, "steps", *SMALL, "--contexts", "20", "50", "--call-tokens", "9", "--compile")
    found = [(row["arm"], row["compiled"], row["context"]) for row in result["rows"]]
    compiled = [("static-at-capacity", True, 21), ("sink", True, 20), ("sink", True, 50), ("endless", True, 20)]
    assert found == [("dense", False, 20), ("sink", False, 20), *compiled]
    for row in result["rows"]:
        # Of 18 tokens, the first comes after the prompt, and 15 are warm-up.
        assert [len(turn) for turn in row["step_ms"]] == [2, 2]
        assert len(row["prompt_ms"]) == 2
        assert min(row["warm_up_ms"]) > 10 * min(map(min, row["step_ms"]))
        assert len(row["call_ms"]) == (2 if row["arm"] in ("dense", "endless") else 0)
        assert min(map(min, row["step_ms"])) <= row["median_ms"] <= max(map(max, row["step_ms"]))
    assert "endless / static-at-capacity" in capsys.readouterr().out


def test_ratios_are_of_what_they_say() -> None:
    # Eager steps over eager steps, compiled steps over compiled steps: no ratio mixes them.
    rows = [
        {"arm": arm, "compiled": compiled, "context": context, "capacity": 9 if arm != "dense" else None}
        | {"step_ms": [[ms] * 3] * 4}
        for arm, compiled, context, ms in (
            ("dense", False, 9, 8.0),
            ("sink", False, 9, 4.0),
            ("static-at-capacity", True, 5, 2.0),
            ("sink", True, 9, 4.0),
            ("sink", True, 90, 5.0),
            ("endless", True, 9, 1.0),
        )
    ]
    values = {(one["name"], one["context"], one["compiled"]): one["value"] for one in calls.ratios(rows)}
    assert values == {
        ("dense / sink", 9, False): 2.0,
        ("sink / static-at-capacity", 9, True): 2.0,
        ("sink / static-at-capacity", 90, True): 2.5,
        ("sink / sink after 9", 90, True): 1.25,
        ("endless / static-at-capacity", 9, True): 0.5,
    }


def test_interrupted_steps_keep_their_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call, made = calls.call, []

    def interrupted(*args: Any, **more: Any) -> None:
        made.append(1)
        if len(made) == 2 + 3 + 2:  # in the second round: two calls warm up, and the first round has three
            raise KeyboardInterrupt
        call(*args, **more)

    monkeypatch.setattr(calls, "call", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measured(tmp_path, "steps", *SMALL, "--contexts", "20", "--arms", "dense", "sink", "--call-tokens", "9")
    result = harness.read_json(next(tmp_path.glob("*.json")))
    assert result["interrupted"]
    assert len(result["rows"][-1]["step_ms"]) == 1
    assert all(row["median_ms"] > 0 for row in result["rows"])


@pytest.mark.parametrize("name, pieces", [("sink", [40, 40, 19, 1]), ("endless", [40, 40, 20]), ("dense", [100])])
def test_long_prompts_go_in_in_pieces(
    name: str, pieces: list[int], model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: list[int] = []
    forward = type(model).forward

    @functools.wraps(forward)  # generate() reads its signature
    def watched(model: PreTrainedModel, input_ids: torch.Tensor, **more: Any) -> Any:
        lengths.append(input_ids.shape[1])
        return forward(model, input_ids, **more)

    monkeypatch.setattr(type(model), "forward", watched)
    args = calls.parse(["steps", *SMALL])
    calls.call(model, Arm(name, None if name == "dense" else 40), 100, 3, args)
    assert lengths == [*pieces, 1, 1]


def test_kernels_are_those_of_the_steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # A prompt has 10 slow gemms, and 10 kernels of its own. Each step has 2 gemms, one attention, and one write of ours.
    lengths = iter((6, 18) * 4)

    def kernel_times(work: Any, clock: harness.Clock) -> dict[str, tuple[int, float]]:
        work()
        steps = next(lengths)
        return {
            "sm90_gemm": (10 + 2 * steps, 50 + 0.2 * steps),
            "fmha_cutlassF": (steps, 0.05 * steps),
            "triton_fused_cat_index_copy": (steps, 0.01 * steps),
            "prompt_only": (10, 5.0),
        }

    monkeypatch.setattr(harness, "kernel_times", kernel_times)
    monkeypatch.setattr(
        harness, "set_up", lambda _: (torch.device("cpu"), torch.float32)
    )  # which would refuse --profile here
    result = measured(tmp_path, "steps", *SMALL, "--profile", "--contexts", "100", "--compile", "--call-tokens", "9")
    sums = {row["arm"]: row["kernel_ms"] for row in result["rows"] if row["compiled"]}
    assert list(sums) == ["static-at-capacity", "sink", "endless"]
    expected = {"matrix products": 0.2, "attention": 0.05, "cache": 0.01, "other": 0, "all": 0.26, "kernels": 4}
    assert sums["sink"] == pytest.approx(expected)


# --- long runs ---

LONG = ["long", *CPU, "--capacities", "16"]


def test_generate(tmp_path: Path) -> None:
    result = measured(tmp_path, *LONG, "--tokens", "250")
    assert [row["tokens"] for row in result["rows"]] == list(range(10, 251, 10))


def test_each_pass_predicts_the_same_tokens(tmp_path: Path, model: PreTrainedModel) -> None:
    (text := tmp_path / "text").write_text("the same text, again and again. " * 5)
    options = ["--passes", "3", "--tokens", "100", "--chunk-size", "5", "--text-file", str(text)]
    result = measured(tmp_path / "results", *LONG, *options)
    assert [(row["pass"], row["tokens"]) for row in result["rows"]] == [(1, 100), (2, 200), (3, 300)]
    again = torch.tensor(list(text.read_bytes()[:100]) * 4)[None, :301]
    logits = streamed_logits(model, again[:, :-1], 4, 12)[0]
    losses = F.cross_entropy(logits, again[0, 1:], reduction="none").view(3, 100).double().mean(dim=1)
    assert [row["perplexity"] for row in result["rows"]] == pytest.approx(losses.exp().tolist(), rel=1e-5)
    # A rebase comes after each 64 tokens, also across the ends of passes, so positions stay small.
    assert max(row["next_position"] for row in result["rows"]) <= 16 + 12 + 2 * 64


def test_a_run_that_dies_keeps_what_it_has(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    note = calls.Notes.note

    def note_ten_times(notes: calls.Notes, **more: Any) -> None:
        if len(notes.result.rows) == 10:
            raise MemoryError
        note(notes, **more)

    monkeypatch.setattr(calls.Notes, "note", note_ten_times)
    with pytest.raises(MemoryError):
        measured(tmp_path, *LONG, "--tokens", "250")
    result = harness.read_json(next(tmp_path.glob("*.json")))
    assert (result["interrupted"], len(result["rows"])) == (True, 10)


def test_what_is_noted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: PreTrainedModel) -> None:
    moments = itertools.count(0.0, 0.5)  # each reading of the clock is half a second later
    monkeypatch.setattr(harness.Clock, "now", lambda _: next(moments))
    cache = SinkWindowCache(4, 12)
    with torch.no_grad():
        model(torch.ones(1, 7, dtype=torch.long), **cache_kwargs(cache, model))
    args = calls.parse([*LONG, "--output", str(tmp_path)])
    result = harness.Result("longrun", models.LoadedModel(model, None, "tiny"), args, [])
    notes = calls.Notes(cache, harness.Clock(torch.device("cpu")), 10, result)
    for tokens in (4, 4, 4, 10):
        notes.took(tokens)
    assert [(row["tokens"], row["next_position"]) for row in result.rows] == [(12, 7), (22, 7)]
    # Half a second passes from the start to the first row, and from the end of the first row to the second.
    assert [row["ms_per_token"] for row in result.rows] == pytest.approx([500 / 12, 500 / 10])


def test_a_slope_is_the_rise_over_the_run() -> None:
    rows = [{"tokens": 10 * i, "ms": 7 + 0.3 * i, "bytes": None, "same": 5} for i in range(1, 101)]
    for row in rows[:10]:
        row["ms"] = 1000  # the first tenth compiles
    fitted = calls.slope(rows, "ms")
    assert fitted is not None
    assert fitted["rise"] == pytest.approx(30)
    assert fitted["standard_error"] < 1e-6
    assert calls.slope(rows, "bytes") is None
    assert calls.slope(rows, "same") == {"rise": 0, "standard_error": 0, "mean": 5}


def test_neighbours_that_are_alike_are_no_trend() -> None:
    # The values wander, so neighbours are alike. A line through all of them would have far too small a standard error.
    generator, beyond = np.random.default_rng(0), 0
    for _ in range(200):
        noise = generator.normal(size=100)
        for i in range(1, 100):
            noise[i] += 0.5 * noise[i - 1]
        fitted = calls.slope([{"tokens": i + 1, "ms": value} for i, value in enumerate(noise)], "ms")
        assert fitted is not None
        beyond += abs(fitted["rise"]) > 2.31 * fitted["standard_error"]  # 5% of a t distribution, 8 degrees of freedom
    assert beyond / 200 <= 0.12


def test_a_text_that_is_too_short(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("short")
    with pytest.raises(BenchmarkError, match="text has 5 tokens, and --tokens asks for 200"):
        measured(tmp_path, *LONG, "--passes", "2", "--tokens", "200", "--text-file", str(tmp_path / "text"))
