"""What the harnesses share: devices, memory, statistics, result files, errors."""

import argparse
import importlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from benchmarks import harness, models
from benchmarks.harness import BenchmarkError


def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert harness.choose_device("auto") == torch.device("cpu")
    monkeypatch.undo()
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert harness.choose_device("auto").type == ("cuda" if torch.cuda.device_count() else "mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for name in ("cuda", "mps", "tpu", "meta", "cpu:x", "cpu:1"):
        with pytest.raises(BenchmarkError, match=name):
            harness.choose_device(name)


def test_peak_memory_is_that_of_the_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = iter([100, 5100])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: next(peaks))
    for device, expected in (("cuda", 5000), ("cpu", None)):
        with harness.PeakMemory(torch.device(device)) as memory:
            pass
        assert memory.bytes == expected


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
    """Return turns of two arms, of which the first takes twice as long.

    Meanwhile the machine becomes three times slower, turns of the first arm get longer, and three of them are disturbed.
    """
    drift = np.linspace(1, 3, 20).tolist()
    double = [[(20 if i in (3, 9, 12) else 2) * ms] * (9 if ms > 2 else 3) for i, ms in enumerate(drift)]
    return double, [[ms] * 3 for ms in drift]


def test_what_slows_down_both_arms_cancels() -> None:
    found = harness.ratio_of_rounds(*turns_of_a_slowing_machine())
    assert (found["value"], found["low"], found["high"], found["note"]) == pytest.approx((2, 2, 2, ""))


def test_a_disturbed_step_of_a_turn_moves_nothing() -> None:
    assert harness.ratio_of_rounds([[2.0] * 19 + [9.0]] * 5, [[1.0] * 20] * 5)["value"] == 2


def test_a_ratio_says_what_cannot_be_concluded() -> None:
    generator = np.random.default_rng(0)
    one, double = (generator.normal(size, 0.02, (10, 20)).tolist() for size in (1.0, 2.0))
    found = harness.ratio_of_rounds(double, one)
    assert found["low"] < 2 < found["high"]
    assert found["note"] == ""
    assert harness.ratio_of_rounds(one[::-1], one)["note"] == "no difference can be told"
    # Every second round is disturbed, and then every second step of every round.
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
    # Names as torch.profiler shows them. Those of cuDNN contain "flash", too.
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
            attend = torch.nn.functional.scaled_dot_product_attention
            assert harness.attention_of(lambda: attend(states, states, states)) == kernel  # noqa: B023
            assert harness.choose_sdpa("auto") == on
    finally:
        for backend in ("flash", "mem_efficient", "math", "cudnn"):
            getattr(torch.backends.cuda, f"enable_{backend}_sdp")(True)


def test_the_rate_of_the_machine_is_of_bytes_read_and_written(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter(np.arange(1000.0))
    monkeypatch.setattr(harness.Clock, "now", lambda _: next(readings))  # everything takes one second
    assert harness.machine_rates(torch.device("cpu"))["copy_bytes_per_s"] == 2 * 2**27


def test_summary() -> None:
    assert harness.summary([4.0, 1.0, 3.0, 2.0]) == pytest.approx(
        {"median": 2.5, "mean": 2.5, "std": 1.290994, "p5": 1.15, "p95": 3.85}
    )
    assert harness.summary([7.0])["std"] == 0.0


def test_a_result_file_is_complete_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    result = {"schema": harness.SCHEMA, "schema_version": 2, "harness": "ppl", "rows": []}
    harness.write_json(path, result)
    assert harness.read_json(path) == result
    with pytest.raises(ValueError, match="JSON"):
        harness.write_json(path, {**result, "rows": [{"perplexity": float("nan")}]})
    assert harness.read_json(path) == result
    assert list(tmp_path.iterdir()) == [path]
    harness.write_json(path, result | {"a": [[1.5, -2e-07], [3]], "text": "[1,\n 2]"})
    assert harness.read_json(path)["text"] == "[1,\n 2]"
    assert "[1.5, -2e-07]" in path.read_text()  # raw numbers on one line


def test_ctrl_c_keeps_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    loaded = models.random_model("llama-tiny", torch.float32, torch.device("meta"))
    loaded.model.to_empty(device="cpu")
    args = argparse.Namespace(module="ppl", output=tmp_path, name=None, text_file=str(tmp_path / "a.txt"))
    argv = ["--text-file", str(tmp_path / "a.txt")]
    swap = iter([0, 120 * harness.MIB])
    monkeypatch.setattr(harness.psutil, "swap_memory", lambda: argparse.Namespace(used=next(swap)))
    result = harness.Result("ppl", loaded, args, argv, ("a text",), data={"name": "a"})
    result.rows.append({"reason": ""})
    with pytest.raises(KeyboardInterrupt), result:
        raise KeyboardInterrupt
    found = harness.read_json(tmp_path / "ppl-llama-tiny-random-weights-a-text-cpu-float32.json")
    assert (found["interrupted"], found["rows"], found["data"]) == (True, [{"reason": ""}], {"name": "a"})
    assert found["command"] == "python -m benchmarks.ppl --text-file a.txt"
    assert found["protocol"] == {"text_file": "a.txt"}
    assert {"schema_version", "date", "versions", "device", "synchronization", "dtype", "threads"} <= set(found)
    assert "the machine swapped 120 MiB" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["", "[]", "{}", json.dumps({"schema": harness.SCHEMA, "schema_version": 1})])
def test_what_is_not_a_result_file_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text(content)
    with pytest.raises(BenchmarkError, match=r"result\.json"):
        harness.read_json(path)


def test_of_two_installed_versions_that_which_is_imported_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [SimpleNamespace(metadata={"Name": "torch"}, version=version) for version in ("2", "1")]
    monkeypatch.setattr(harness, "distributions", lambda: iter(found))
    assert harness.versions()["torch"] == "2"  # the first on the path


def test_a_table() -> None:
    shown = ("–", "0.348", "26.5", "16,384", "4,096", "text", "False")
    assert [*map(harness.figure, (None, 0.34812, 26.502, 16384.2, 4096, "text", False))] == [*shown]
    assert harness.figure(float("nan")) == "–"
    assert harness.figure(26.502, "wide") == "26.5 ?"
    assert harness.figure(np.True_) == "True"
    rows = [{"arm": "a", "cache_bytes": 2**20, "step_ms": [1.0], "reason": ""}, {"arm": "b", "more": {"n": 3}}]
    header, _, *lines = [line.split("|")[1:-1] for line in harness.table(rows).splitlines()]
    assert [one.strip() for one in header] == ["arm", "cache, MiB", "more.n"]
    assert [[one.strip() for one in line] for line in lines] == [["a", "1.00", "–"], ["b", "–", "3.00"]]


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
    monkeypatch.setattr(harness, "choose_device", lambda name, index: torch.device(name))
    args = argparse.Namespace(output=tmp_path, device=device, dtype=None, sdpa_backend="auto")
    assert harness.set_up(args) == (torch.device(device), dtype)
    assert harness.set_up(argparse.Namespace(**vars(args) | {"dtype": "float16"}))[1] == torch.float16


OF_TEXT = "ppl --random-weights llama-tiny --max-tokens 64 --text-file {folder}"


@pytest.mark.parametrize(
    "command, complaint",
    [
        ("latency --arms sinks", "'sinks'"),
        ("latency --capacities 4", "capacity 4 leaves no window"),
        ("latency --contexts 1", "--contexts: must be at least 2, but is 1"),
        ("latency --steps 64", "--steps must be at most 63"),
        ("latency --n-sink -1", "--n-sink: must be at least 0, but is -1"),
        ("latency --random-weights pythia-70m pythia-1b --profile", "--profile is for one shape"),
        ("latency --random-weights pythia-70m pythia-1b --name one", "--name is for one result file"),
        ("latency --no-compile --compile-static-at 32", "--no-compile leaves out"),
        ("latency --model here --random-weights pythia-70m", "--model has trained weights"),
        ("latency --gguf-file file", "--gguf-file is a file of --model"),
        ("latency --min-seconds -0.1", "--min-seconds: must be at least 0, but is -0.1"),
        ("latency --min-seconds nan", "--min-seconds: must be at least 0, but is nan"),
        ("latency --rounds 2.5", "--rounds: invalid int value: '2.5'"),
        ("latency --device tpu", "unknown device 'tpu'"),
        ("latency --profile", "--profile is for CUDA, but the device is cpu"),
        ("latency --random-weights llama-tiny --attn-implementation fast", "--attn-implementation fast: "),
        ("latency --random-weights llama-tiny gpt-5", "unknown shape 'gpt-5'"),
        ("latency --output {folder}/one.txt", "cannot make the folder"),
        ("ppl --n-sink 4 --n-sinks 0 4", "--n-sink and --n-sinks both give numbers of sinks"),
        ("ppl --n-sinks 0 -1", "--n-sinks: must be at least 0, but is -1"),
        ("ppl --mode step --chunk-size 4", "--chunk-size is for --mode chunk"),
        ("ppl --arms dense --recompute-tokens 9", "--recompute-tokens is for the arm recompute"),
        ("ppl --max-tokens 0", "--max-tokens: must be at least 1, but is 0"),
        ("ppl --n-sinks 0 1 --arms dense window", "--n-sinks is for the arms sink, line-breaks"),
        ("ppl --n-sinks 0 8 --capacities 8", "capacity 8 leaves no window: it includes the 8 sinks of --n-sinks"),
        ("ppl --text-file {folder}/one.txt --dataset one", "are different texts"),
        ("ppl --text-file {folder}/text.txt --model {folder}/none", "cannot load the model"),
        ("ppl --model here --random-weights gpt-5", "--model has trained weights"),
        (f"{OF_TEXT}/text.txt --num-samples 4", "4 samples of 64 need 257"),
        (f"{OF_TEXT}/text.txt --score-from 65", "--score-from 65 leaves nothing"),
        (f"{OF_TEXT}/empty.txt", "empty.txt is empty"),
        (f"{OF_TEXT}/one.txt", "one.txt has 1 tokens"),
        (f"{OF_TEXT}/latin-1.txt", "not UTF-8"),
        ("calls step", "what is to be measured comes first: steps, long, not 'step'"),
        ("calls steps --capacities 40 --new-tokens 38", "--new-tokens + --n-sink + 8 = 50, but one is 40"),
        ("calls steps --new-tokens 9", "--new-tokens: must be at least 18, but is 9"),
        ("calls long --capacities 300 400", "calls long has one cache"),
        ("calls long --random-weights llama-tiny --passes 2", "means nothing"),
        ("calls long --tokens 10", "--tokens must be at least 1000, but is 10"),
        ("calls long --text-file text", "a text would change nothing"),
        ("calls long --chunk-size 9", "--chunk-size would change nothing"),
        ("throughput gap --streams 1", "--streams: must be at least 2, but is 1"),
        ("throughput steady --capacities 8 9", "one capacity"),
        ("throughput rows --capacities 40 --new-tokens 38", "--new-tokens + --n-sink + 8 = 50"),
        ("throughput gap --requests 9", "unrecognized arguments: --requests"),
        ("recall --further 5", "--further is for --task pinned"),
        ("recall --text-file a.txt", "--text-file is for --task pinned, questions"),
        ("recall --split test", "--split is for --task pinned, questions, choices"),
        ("recall --task questions --arms sink", "--arms is for --task copy"),
        ("recall --task streameval --segment 9", "--segment is for --task copy, pinned"),
        ("recall --task pinned --question-tokens 9", "--question-tokens is for --task questions"),
        ("recall --task questions --batch-size 2", "--batch-size is for --task copy, streameval, pinned"),
        ("recall --task choices --chunk-size 2", "--chunk-size is for --task copy, streameval, pinned, questions"),
        ("recall --task choices --seed 0", "--seed is for --task copy, streameval, pinned"),
        ("recall --task choices --arms recompute", "--task choices asks a cache"),
        ("recall --task questions --capacities 512 1024", "has one cache"),
        ("recall --distances 9 --segment 10", "distance 9 is less than"),
        ("recall --task pinned --n-sink 70", "at least 180"),
        ("recall --task pinned --n-sink 4", "at least 180"),  # the default of other tasks
        ("recall --task streameval --random-weights llama-tiny", "made of words"),
        ("recall --task streameval --num-samples 1", "--num-samples 1 is too few for 7"),
        ("recall --task pinned --random-weights llama-tiny --offline --further 100 120", "--further 120 lies within"),
        ("recall --random-weights llama-tiny --max-tokens 200 --distances 300", "no text of 200 tokens"),
    ],
)
def test_bad_input_gets_one_sentence_and_exit_code_2(command: str, complaint: str, capsys: Any, tmp_path: Path) -> None:
    texts = {"text.txt": b"w" * 200, "empty.txt": b"", "one.txt": b"w", "latin-1.txt": "caf\xe9".encode("latin-1")}
    for name, content in texts.items():
        (tmp_path / name).write_bytes(content)
    module, *argv = command.format(folder=tmp_path).split()
    kind = [argv.pop(0)] if module in ("calls", "throughput") else []
    shared = ["--device", "cpu", "--output", str(out := tmp_path / "out")]
    assert harness.run(importlib.import_module(f"benchmarks.{module}").main, [*kind, *shared, *argv]) == 2
    error = capsys.readouterr().err.strip()
    assert complaint in error
    assert error.startswith("error: ")
    assert len(error.splitlines()) == 1
    assert not list(out.glob("*"))
