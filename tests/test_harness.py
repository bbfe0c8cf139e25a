"""What the harnesses share: devices, memory, statistics, result files, errors."""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from benchmarks import endless, harness, latency, models
from benchmarks.harness import BenchmarkError


def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert harness.choose_device("auto") == torch.device("cpu")
    for name in ("cuda", "mps", "tpu", "meta"):
        with pytest.raises(BenchmarkError, match=name):
            harness.choose_device(name)


def test_mps_is_chosen_and_synchronised(monkeypatch: pytest.MonkeyPatch) -> None:
    # There is no such hardware in tests; what is checked is that a clock waits for the device, before every reading.
    waits = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "synchronize", lambda: waits.append("wait"))
    monkeypatch.setattr(torch.mps, "current_allocated_memory", lambda: 100 + 50 * len(waits))

    device = harness.choose_device("auto")
    assert device.type == "mps"
    clock = harness.Clock(device)
    assert clock.synchronization == "torch.mps.synchronize"
    waits.clear()
    with harness.PeakMemory(device) as peak:
        start = clock.now()
        assert clock.now() >= start
    assert len(waits) == 2
    assert peak.bytes == 100
    assert "mps" in peak.method


def test_peak_memory_sees_what_was_freed_again() -> None:
    with harness.PeakMemory(torch.device("cpu")) as peak:
        big = torch.ones(64 * harness.MIB // 4)
        time.sleep(5 * harness.PeakMemory.INTERVAL_S)  # memory is sampled
        del big
    assert 60 * harness.MIB < peak.bytes < 100 * harness.MIB


def test_cache_bytes() -> None:
    cache = DynamicCache()
    assert harness.cache_bytes(None) == harness.cache_bytes(cache) == 0
    cache.update(torch.zeros(2, 3, 5, 8), torch.zeros(2, 3, 5, 8), 0)
    assert harness.cache_bytes(cache) == 2 * (2 * 3 * 5 * 8) * 4


def test_interval_of_a_median() -> None:
    numbers = np.random.default_rng(1).normal(3.0, 0.3, 200)
    low, high = harness.median_interval(numbers)
    # By the theory of order statistics the interval of a normal median is ± 1.96 · 1.2533 · std / √n.
    assert (high - low) / 2 == pytest.approx(1.96 * 1.2533 * 0.3 / 200**0.5, rel=0.3)
    assert low < np.median(numbers) < high
    assert harness.median_interval(numbers) == (low, high)  # results can be reproduced
    few_low, few_high = harness.median_interval(numbers[:10])
    assert few_high - few_low > 2 * (high - low)


def turns_of_a_slowing_machine() -> tuple[list[list[float]], list[list[float]]]:
    """Of two arms, one of which takes twice as long.

    The machine gets three times slower meanwhile, one arm's turns are longer at the slow end, and three of them are disturbed.
    """
    drift = np.linspace(1, 3, 20).tolist()
    double = [[(20 if i in (3, 9, 12) else 2) * ms] * (9 if ms > 2 else 3) for i, ms in enumerate(drift)]
    return double, [[ms] * 3 for ms in drift]


def test_what_slows_down_both_arms_cancels() -> None:
    found = harness.ratio_of_rounds(*turns_of_a_slowing_machine())
    assert (found["value"], found["low"], found["high"], found["note"]) == pytest.approx((2, 2, 2, ""))


def test_both_harnesses_pair_rounds() -> None:
    double, one = turns_of_a_slowing_machine()
    row = {"compiled": False, "context": 9, "reason": "", "gpu_ms": None}
    dense, sink = (row | {"arm": "dense", "capacity": None}, row | {"arm": "sink", "capacity": 9})
    found = latency.ratios([dense | {"step_ms": double}, sink | {"step_ms": one}])
    assert {ratio["name"]: ratio["value"] for ratio in found} == pytest.approx({"achieved": 2, "overhead": 0.5})
    arms = (("sink", double), ("static", one))
    found = endless.ratios([{"arm": arm, "context": 9, "step_ms": turns, "call_ms": []} for arm, turns in arms])
    assert [ratio["value"] for ratio in found] == pytest.approx([2])


def test_a_disturbed_step_of_a_turn_moves_nothing() -> None:
    assert harness.ratio_of_rounds([[2.0] * 19 + [9.0]] * 5, [[1.0] * 20] * 5)["value"] == 2


def test_a_ratio_says_what_cannot_be_concluded() -> None:
    generator = np.random.default_rng(0)
    one, double = (generator.normal(size, 0.02, (10, 20)).tolist() for size in (1.0, 2.0))
    found = harness.ratio_of_rounds(double, one)
    assert found["low"] < 2 < found["high"]
    assert found["note"] == ""
    assert harness.ratio_of_rounds(one[::-1], one)["note"] == "no difference can be told"
    # One round in two is disturbed, or one step in two of every round.
    noisy = [[3 * ms for ms in turn] if i % 2 else turn for i, turn in enumerate(one)]
    assert harness.ratio_of_rounds(noisy, one)["note"].startswith("no conclusion")
    noisy = [[3 * ms if i % 2 else ms for i, ms in enumerate(turn)] for turn in one]
    for pair in ((noisy, one), (one, noisy)):
        assert harness.ratio_of_rounds(*pair)["note"] == harness.TOO_WIDE
    few = harness.ratio_of_rounds(double[:4], one[:4])
    assert few["note"] == "no conclusion: 4 round(s) are too few for an interval"
    assert harness.ratio_of_rounds(double[:5], one[:5])["note"] == ""
    assert harness.spread_warning([1.0] * 99 + [1.2]) == ""


def test_attention_kernels_by_their_names() -> None:
    # As torch.profiler shows them; those of cuDNN contain "flash", too.
    assert harness.attention_kernel(["gemv2T", "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma"]) == "cudnn"
    assert harness.attention_kernel(["void pytorch_flash::flash_fwd_splitkv_kernel"]) == "flash"
    assert harness.attention_kernel(["fmha_cutlassF_bf16_aligned_64x64_rf_sm80"]) == "efficient"
    assert harness.attention_kernel(["aten._softmax.default"]) == "math"
    assert harness.attention_kernel(["gemv2T"]) == "unknown"


def test_operators_and_backends_of_attention() -> None:
    states = torch.ones(1, 2, 4, 8)
    try:
        for choice, kernel in (("math", "math"), ("flash", "flash"), ("no-cudnn", "flash")):
            on = harness.choose_sdpa(choice)
            assert [name for name, is_on in on.items() if is_on] == (
                ["flash", "mem_efficient", "math"] if choice == "no-cudnn" else [choice]
            )
            with harness.Operators() as operators:
                torch.nn.functional.scaled_dot_product_attention(states, states, states)
            assert harness.attention_kernel(operators.names) == kernel
            assert harness.choose_sdpa("auto") == on
    finally:
        for backend in ("flash", "mem_efficient", "math", "cudnn"):
            getattr(torch.backends.cuda, f"enable_{backend}_sdp")(True)


def test_rates_of_the_hardware_are_of_bytes_and_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter(np.arange(1000.0))
    monkeypatch.setattr(harness.Clock, "now", lambda _: next(readings))  # everything takes one second
    hardware = harness.Hardware(torch.device("cpu"), torch.float32)
    assert hardware.copy_bytes_per_s() == 2 * 2**27  # read and written
    assert hardware.matrix_flops_per_s() == 2 * 1024**3


def test_summary() -> None:
    assert harness.summary([4.0, 1.0, 3.0, 2.0]) == pytest.approx(
        {"n": 4, "median": 2.5, "mean": 2.5, "std": 1.290994, "p5": 1.15, "p95": 3.85, "min": 1.0, "max": 4.0}
    )
    assert harness.summary([7.0])["std"] == 0.0


def test_a_result_file_is_complete_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    header = harness.header("ppl", "A title", torch.device("cpu"), torch.float32, argv=[], rows=[])
    harness.write_json(path, header)
    assert harness.read_json(path) == header
    with pytest.raises(ValueError, match="JSON"):
        harness.write_json(path, {**header, "rows": [{"perplexity": float("nan")}]})
    assert harness.read_json(path) == header
    assert list(tmp_path.iterdir()) == [path]


def test_raw_numbers_are_written_on_one_line(tmp_path: Path) -> None:
    content = {"schema": harness.SCHEMA, "schema_version": 1, "a": [[1.5, -2e-07], [3]], "text": "[1,\n 2]", "none": []}
    harness.write_json(tmp_path / "result.json", content)
    assert harness.read_json(tmp_path / "result.json") == content
    assert "[1.5, -2e-07]" in (tmp_path / "result.json").read_text()


@pytest.mark.parametrize("content", ["", "[]", "{}", json.dumps({"schema": harness.SCHEMA, "schema_version": 0})])
def test_what_is_not_a_result_file_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text(content)
    with pytest.raises(BenchmarkError, match=r"result\.json"):
        harness.read_json(path)


def test_the_command_names_no_folders_of_this_machine(tmp_path: Path) -> None:
    inside = Path.cwd() / "results" / "a.json"
    argv = ["--text-file", f"{tmp_path}/a.txt", f"--model={tmp_path}/model", "--output", str(inside), "--device", "cpu"]
    assert harness.command_line("ppl", argv) == (
        "python -m benchmarks.ppl --text-file a.txt --model=model --output results/a.json --device cpu"
    )


@pytest.mark.parametrize(
    "shape, parameters",  # as published
    [("pythia-70m", 70_426_624), ("pythia-6.9b", 6_857_302_016), ("llama-2-7b", 6_738_415_616)],
)
def test_shapes_are_those_of_the_published_models(shape: str, parameters: int) -> None:
    loaded = models.random_model(shape, torch.bfloat16, torch.device("meta"))
    assert loaded.description["parameters"] == parameters
    assert loaded.description["weight_bytes"] == 2 * parameters
    assert loaded.trained_context == (4096 if shape.startswith("llama") else 2048)


@pytest.mark.parametrize("device, dtype", [("cuda", torch.bfloat16), ("mps", torch.float32), ("cpu", torch.float32)])
def test_the_dtype_is_that_of_the_device(
    device: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "choose_device", lambda name: torch.device(name))
    args = argparse.Namespace(output=tmp_path, device=device, dtype=None, sdpa_backend="auto")
    folder, chosen, found, _ = harness.set_up(args)
    assert (folder, chosen.type, found) == (tmp_path, device, dtype)
    assert harness.set_up(argparse.Namespace(**vars(args) | {"dtype": "float16"}))[2] == torch.float16


def test_what_other_programs_use_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0 <= harness.cpu_share_of_others(0.01) <= 1
    monkeypatch.setattr(harness.psutil, "cpu_percent", lambda seconds: 97.0)
    assert "other programs used 97% of the CPU" in harness.busy_cpu(harness.cpu_share_of_others())
    assert harness.busy_cpu(harness.BUSY_CPU - 0.01) == ""
