"""`benchmarks.endless`: arms that take turns, what they say about each other, and the kernels of a step."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from benchmarks import endless, harness
from benchmarks.models import LoadedModel

from .families import tiny_model

SMALL = [
    "--contexts",
    "20",
    "50",
    "--capacity",
    "40",
    "--new-tokens",
    "18",
    "--call-tokens",
    "9",
    "--rounds",
    "2",
    "--device",
    "cpu",
]


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", bos_token_id=None, eos_token_id=None, pad_token_id=None)
    monkeypatch.setattr(endless.models, "random_model", lambda *_: LoadedModel(model, None, "tiny"))


def measured(folder: Path, *arguments: str) -> dict[str, Any]:
    endless.main([*SMALL, "--device", "cpu", *arguments, "--output", str(folder)])
    (path,) = folder.glob("*.json")
    return harness.read_json(path)


def test_what_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = measured(tmp_path)
    arms = [("dense", 20), ("static", 21), ("sink", 20), ("sink", 50), ("endless", 20)]
    assert [(row["arm"], row["context"]) for row in result["rows"]] == arms
    for row in result["rows"]:
        # Of 18 tokens, the first comes after the prompt, and 15 are warm-up.
        assert [len(turn) for turn in row["step_ms"]] == [2, 2]
        assert len(row["prompt_ms"]) == 2
        assert min(row["warm_up_ms"]) > 10 * min(map(min, row["step_ms"]))
        assert len(row["call_ms"]) == (2 if row["arm"] in ("dense", "endless") else 0)
        assert min(map(min, row["step_ms"])) <= row["median_ms"] <= max(map(max, row["step_ms"]))
    names = {(one["name"], one["context"]) for one in result["ratios"]}
    assert names == {
        ("step: sink / static", 20),
        ("step: sink / static", 50),
        ("step: sink / sink after 20", 50),
        ("step: endless / static", 20),
        ("step: dense / sink", 20),
        ("step: dense / sink", 50),
        ("step: dense / endless", 20),
        ("whole call: dense / endless", 20),
    }
    assert "whole call: dense / endless" in capsys.readouterr().out
    assert next(tmp_path.glob("*-steps.png")).stat().st_size > 10_000


def test_ratios_are_of_what_they_say() -> None:
    rows = [
        {"arm": arm, "context": context, "step_ms": [[ms] * 3] * 4, "call_ms": [call] * 4 if call else []}
        for arm, context, ms, call in (
            ("dense", 9, 8.0, 12.0),
            ("static", 9, 2.0, None),
            ("sink", 9, 4.0, None),
            ("sink", 90, 5.0, None),
            ("endless", 9, 1.0, 3.0),
        )
    ]
    values = {(one["name"], one["context"]): one["value"] for one in endless.ratios(rows)}
    assert values == {
        ("step: sink / static", 9): 2.0,
        ("step: sink / static", 90): 2.5,
        ("step: sink / sink after 9", 90): 1.25,
        ("step: endless / static", 9): 0.5,
        ("step: dense / sink", 9): 2.0,
        ("step: dense / sink", 90): 1.6,
        ("step: dense / endless", 9): 8.0,
        ("whole call: dense / endless", 9): 4.0,
    }


def test_whole_calls_are_too_few_for_an_interval() -> None:
    compared = endless.ratio_of_calls([10.0, 11.0], [2.0, 2.1])
    assert compared == {"value": 10.5 / 2.05, "low": 10 / 2.1, "high": 5.5, "note": ""}
    for calls in ([10.0], [10.0, 13.0]):
        assert harness.is_inconclusive(endless.ratio_of_calls(calls, [2.0, 2.1]))


def test_interrupted_runs_keep_their_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call, calls = endless.Arm.call, []

    def interrupted(*args: Any, **more: Any) -> None:
        calls.append(1)
        if len(calls) == 5 + 7 + 2:  # in the second round: five calls warm up, seven are the first
            raise KeyboardInterrupt
        call(*args, **more)

    monkeypatch.setattr(endless.Arm, "call", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measured(tmp_path)
    (path,) = tmp_path.glob("*.json")
    result = harness.read_json(path)
    assert all(len(row["step_ms"]) == 1 and row["median_ms"] > 0 for row in result["rows"])
    assert all("too few" in ratio["note"] for ratio in result["ratios"] if ratio["name"].startswith("step"))


@pytest.mark.parametrize("name", ["sink", "endless", "dense"])
def test_long_prompts_go_in_in_pieces(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = endless.models.random_model("tiny", torch.float32, torch.device("cpu"))
    args = endless.parse(["--contexts", "100", "--capacity", "40", "--new-tokens", "18", "--arms", name])
    (arm,) = endless.arms_of(loaded.model, args)
    lengths: list[int] = []
    forward = type(loaded.model).forward

    @functools.wraps(forward)  # generate() reads its signature
    def watched(model: PreTrainedModel, input_ids: torch.Tensor, **more: Any) -> Any:
        lengths.append(input_ids.shape[1])
        return forward(model, input_ids, **more)

    monkeypatch.setattr(type(loaded.model), "forward", watched)
    arm.call(loaded.model, endless.random_text(loaded.model, args), 3, 40)
    pieces = {"sink": [40, 40, 19, 1], "endless": [40, 40, 20], "dense": [100]}[name]
    assert lengths == [*pieces, 1, 1]


def test_kernels_are_those_of_the_steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # 10 kernels of a prompt, whose gemm is slower than that of a step; of a step, 2 gemms, one attention, and our write.
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
    result = measured(tmp_path, "--profile", "--contexts", "100", "300")
    assert list(result["kernels"]) == ["static", "sink", "sink after 300", "endless"]
    for rows in result["kernels"].values():
        assert [(row["kernel"], row["times"]) for row in rows] == [
            ("sm90_gemm", 2),
            ("fmha_cutlassF", 1),
            ("triton_fused_cat_index_copy", 1),
        ]
        assert [row["ms"] for row in rows] == pytest.approx([0.2, 0.05, 0.01])
    (table, *_) = endless.by_kind(result["kernels"])
    assert table["all"] == pytest.approx(0.26)
    kinds = ("matrix products", "attention", "cache", "other")
    assert [table[kind] for kind in kinds] == [pytest.approx(0.2), pytest.approx(0.05), pytest.approx(0.01), 0]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--capacity", "40", "--new-tokens", "38"], "capacity 40 must leave room for 38 new tokens"),
        (["--contexts", "9", "0"], "contexts must be at least 1, but one is 0"),
        (["--rounds", "0"], "--rounds must be at least 1, but is 0"),
        (["--new-tokens", "9"], "--new-tokens must be at least 18, but is 9"),
        (["--profile", "--random-weights", "pythia-70m", "pythia-410m"], "--profile is for one shape"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert harness.run(endless.main, arguments) == 2
    assert message in capsys.readouterr().err
