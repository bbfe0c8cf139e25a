"""`benchmarks.latency`: steps at the right context, timed in turns with the device waited for, and numbers that say why.

Clocks are not tested against wall time; what is checked is what runs between two readings, at which length, in which order,
and the arithmetic on times that are written out here.
"""

import functools
import gc
import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, LlamaConfig, PreTrainedModel, StaticCache

from benchmarks import arms, harness, latency, models, plots
from benchmarks.harness import Clock
from benchmarks.latency import BLOCK_LIMIT, Arm, Bench, CannotMeasure, Measurement, Settings
from sink_cache import SinkWindowCache

CPU = torch.device("cpu")
TRAINED = 256
QUICK = Settings(rounds=3, steps=2, min_seconds=0.0, warm_up_s=0.0)


def tiny_config(**changes: Any) -> LlamaConfig:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"num_key_value_heads": 2, "vocab_size": 61, "max_position_embeddings": TRAINED, "initializer_range": 0.3}
    return LlamaConfig(**(sizes | more | changes))


@pytest.fixture(autouse=True)
def _shapes_and_process_settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(models.SHAPES, "tiny", tiny_config)
    monkeypatch.setitem(models.SHAPES, "gpt2", lambda: GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=61))
    # Not the rates of this machine, so that floors can be written out by hand, and large products need not run.
    monkeypatch.setattr(harness.Hardware, "copy_bytes_per_s", lambda _: 1e9)
    monkeypatch.setattr(harness.Hardware, "matrix_flops_per_s", lambda _: 1e12)
    with torch._dynamo.config.patch(automatic_dynamic_shapes=True, recompile_limit=8):
        yield


def bench(shape: str = "tiny", longest: int = 256, capacities: Sequence[int] = (32,)) -> Bench:
    loaded = models.random_model(shape, torch.float32, CPU)
    return Bench(loaded, 4, 64, frozenset(capacities), frozenset([longest]), [*capacities, longest])


class FakeArm(Arm):
    """Notes what is done with it."""

    name = "fake"

    def __init__(self, done: list[Any], label: str = "step") -> None:
        super().__init__(bench())
        self.done, self.label = done, label

    def step(self) -> None:
        self.done.append(self.label)


# --- the arms are at the context that the row names ------------------------------------------------------------------


@pytest.mark.parametrize("kind", [arms.Dense, arms.DenseAtCapacity, arms.Sink, arms.Static])
def test_every_turn_begins_with_the_same_number_of_tokens(kind: type[Arm]) -> None:
    # Catches an arm whose context drifts with rounds, or that goes on from the state of the last context.
    arm = kind(bench(), 32 if kind.bounded else None)
    before = {"dense": lambda n: n, "dense-at-capacity": lambda n: min(n, 32), "static": lambda n: max(1, n - 64)}
    with torch.no_grad():
        for context in (16, 32, 100, 256):
            arm.fill(context)
            for _ in range(2):
                arm.rewind()
                seen = int(arm.cache.get_seq_length())
                if arm.name == "sink":
                    # A full cache costs the same whatever it has seen, so it may go on.
                    assert seen == context if context < 32 else seen >= context
                else:
                    assert seen == before[arm.name](context)
                for _ in range(min(BLOCK_LIMIT + 1, 4 if context < 64 else 64)):
                    arm.step()
                assert int(arm.cache.get_seq_length()) - seen == min(BLOCK_LIMIT + 1, 4 if context < 64 else 64)
            arm.release()


def test_a_static_cache_is_as_large_as_the_context_and_holds_the_prefill() -> None:
    arm, dense = arms.Static(shared := bench()), arms.Dense(shared)
    with torch.no_grad():
        arm.fill(256)
        arm.rewind()
        assert arm.cache.get_max_length() == 256
        dense.fill(256)
        dense.rewind()
        for ours, prefill in zip(arm.cache.layers, dense.cache.layers, strict=True):
            torch.testing.assert_close(ours.keys[:, :, :192], prefill.keys[:, :, :192])
            torch.testing.assert_close(ours.values[:, :, :192], prefill.values[:, :, :192])
            assert not ours.keys[:, :, 192:].any()


def test_the_prefill_is_that_of_one_forward() -> None:
    # Read on from context to context, in pieces; a kept one must not be touched by what is read later.
    shared = bench(capacities=(32,))
    with torch.no_grad():
        for context in (100, 256):
            shared.dense_layers(context)
        for context in (32, 256):  # 32 is kept, although it was read over
            expected = shared.model(shared.tokens[:, :context], use_cache=True).past_key_values
            for ours, whole in zip(shared.dense_layers(context), expected.layers, strict=True):
                torch.testing.assert_close(ours.keys, whole.keys, rtol=1e-4, atol=1e-4)
                torch.testing.assert_close(ours.values, whole.values, rtol=1e-4, atol=1e-4)


def test_recompute_reads_the_window_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    arm = arms.Recompute(bench(), 32)
    calls: list[Any] = []
    monkeypatch.setattr(arm.bench, "model", lambda ids, **options: calls.append((ids.shape, options)))
    arm.step()
    assert calls == [((1, 32), {"use_cache": False, "logits_to_keep": 1})]
    arm.bench.contexts = [16, 64, 128]  # the first in which the window is full
    assert [context for context in arm.bench.contexts if arm.applies(context)] == [64]
    arm.bench.contexts = [8, 16]
    assert [context for context in arm.bench.contexts if arm.applies(context)] == [16]


@pytest.mark.parametrize("kind", [arms.StaticCompiled, arms.SinkCompiled])
def test_a_compiled_step_gets_what_generate_passes(monkeypatch: pytest.MonkeyPatch, kind: type[Arm]) -> None:
    # Without the 4-D mask that generate() builds outside of the graph, or with one that it builds in another way, another step
    # would be measured than users get. A full sink cache has none.
    shared = bench()
    model: PreTrainedModel = shared.model
    prepared: list[dict[str, Any]] = []
    calls: list[dict[str, Any]] = []
    prepare = model.prepare_inputs_for_generation

    @functools.wraps(prepare)  # generate() looks at its signature
    def preparing(ids: torch.Tensor, **inputs: Any) -> dict[str, Any]:
        prepared.append(inputs)
        return prepare(ids, **inputs)

    def compiled(_: Any) -> Any:
        return lambda **inputs: (calls.append(inputs), model(**inputs))[1]

    monkeypatch.setattr(model, "prepare_inputs_for_generation", preparing)
    monkeypatch.setattr(model, "get_compiled_call", compiled)
    monkeypatch.setattr(model, "_valid_auto_compile_criteria", lambda *_: True)
    static = kind is arms.StaticCompiled
    # A StaticCache of 256 is measured with 192 tokens in it; a SinkWindowCache of 32 from when it is full, here 6 times over.
    arm = kind(shared) if static else kind(shared, 32)
    cache = StaticCache(config=model.config, max_cache_len=256) if static else SinkWindowCache(4, 28, compileable=True)
    ids = shared.tokens[:, :192]
    model.generate(ids, past_key_values=cache, max_new_tokens=2, do_sample=False, attention_mask=torch.ones_like(ids))
    with torch.no_grad():
        arm.fill(256 if static else 192)
        arm.rewind()
        arm.step()
    _, of_generate, ours = prepared  # the first is the prompt's
    assert (ours["attention_mask"] is None) == (of_generate["attention_mask"] is None)
    if ours["attention_mask"] is not None:
        torch.testing.assert_close(ours["attention_mask"], of_generate["attention_mask"])
    of_generate, ours = calls
    assert static == (of_generate.get("attention_mask") is not None)
    for name in ("attention_mask", "position_ids") if static else ("position_ids",):
        torch.testing.assert_close(ours[name], of_generate[name])
        assert ours[name].stride() == of_generate[name].stride()
    assert ours["input_ids"].stride() == of_generate["input_ids"].stride()
    assert not static or ours["attention_mask"].ndim == 4
    assert ours.keys() - {"past_key_values"} == of_generate.keys() - {"past_key_values"}


def test_compiled_arms_that_are_not_measured_say_why() -> None:
    shared = bench()
    with pytest.raises(CannotMeasure, match="compile-static-at"):
        arms.StaticCompiled(shared).fill(100)
    with pytest.raises(CannotMeasure, match="full cache"):
        arms.SinkCompiled(shared, 32).fill(31)


# --- time ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["mps", "cuda"])
def test_the_device_is_waited_for_before_and_after_every_step(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Else a step would seem to take as long as its launch. There is no such hardware in tests, so the backend is faked.
    done: list[str] = []
    monkeypatch.setattr(torch.mps, "synchronize", lambda: done.append("wait"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: done.append("wait"))
    clock = Clock(torch.device(backend))
    assert clock.synchronization == f"torch.{backend}.synchronize"
    done.clear()
    assert len(harness.timed_steps(FakeArm(done).step, 2, clock)) == 2
    assert done == ["wait", "step", "wait"] * 2
    done.clear()
    harness.unsynchronized_step_ms(FakeArm(done).step, 3, clock)
    assert done == ["wait", "step", "step", "step", "wait"]


def test_a_run_on_mps_says_how_it_waited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.mps, "synchronize", lambda: None)
    monkeypatch.setattr(torch.mps, "current_allocated_memory", lambda: 0)
    clock = Clock(torch.device("mps"))
    arm = FakeArm([])
    ((_, measured),) = latency.measure_context([arm], 8, QUICK, clock, set(), harness.no_progress_bar())
    assert not measured.reason
    assert len(measured.unsynchronized) == 2  # in rounds 1 and 3
    header = harness.header("latency", "", torch.device("mps"), torch.float32, argv=[])
    assert header["synchronization"] == "torch.mps.synchronize"


def test_arms_take_turns_without_garbage_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    # Arms measured one after the other would differ by whatever the machine did meanwhile.
    done: list[str] = []
    arms = [FakeArm(done, "A"), FakeArm(done, "B")]
    collector: list[bool] = []
    timed_steps = harness.timed_steps

    def spy(*args: Any) -> list[float]:
        collector.append(gc.isenabled())
        return timed_steps(*args)

    monkeypatch.setattr(latency, "warm_up", lambda *_: 1e3)  # so slow that a turn is as short as it may be
    monkeypatch.setattr(latency, "look_closer", lambda *_: None)
    monkeypatch.setattr(harness, "timed_steps", spy)
    found = latency.measure_context(arms, 8, QUICK, Clock(CPU), set(), harness.no_progress_bar())
    # An untimed step and two timed ones for each turn.
    assert "".join(done) == "AAABBB" * QUICK.rounds
    assert [len(turn) for _, measured in found for turn in measured.rounds] == [2] * 6
    assert collector
    assert not any(collector)
    assert gc.isenabled()


def test_warm_up_is_by_count_and_by_time(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(harness, "timed_steps", lambda step, steps, _: [step() or 10.0] * steps)
    latency.warm_up(arm := FakeArm(done), Settings(1, 1, 0, warm_up_s=0.0), Clock(CPU))
    assert len(done) == 3
    latency.warm_up(arm, Settings(1, 1, 0, warm_up_s=0.5), Clock(CPU))
    assert len(done) == 3 + 3 + 50
    done.clear()
    monkeypatch.setattr(FakeArm, "compiled", True)  # the first steps compile and record
    latency.warm_up(arm, Settings(1, 1, 0, warm_up_s=0.0), Clock(CPU))
    assert len(done) == 8


def test_the_work_of_the_gpu_is_seen_without_its_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    # Events around a launch-bound step see the wall time; the GPU must be kept busy until the step is launched.
    done: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.name = "end" if Event.made % 2 else "start"
            Event.made += 1

        made = 0

        def record(self) -> None:
            done.append(self.name)

        def elapsed_time(self, end: Any) -> float:
            return 1.5

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: done.append("wait"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: done.append(f"spin {cycles:.0e}"), raising=False)
    clock = Clock(torch.device("cuda"))
    done.clear()
    launching = [0.003, 0.001, 0.001]  # seconds of the CPU
    monkeypatch.setattr(time, "perf_counter", lambda: sum(launching[: done.count("step")]))
    assert harness.gpu_times(FakeArm(done).step, 2, clock, queue_ms=2.5) == [1.5, 1.5]
    # The first launch outlasted its spinning, so that the GPU had to wait for it: that time is left out.
    launched = ["start", "step", "end", "wait"]
    assert done == ["wait", "spin 5e+06", *launched, *(["wait", "spin 1e+07", *launched] * 2)]
    done.clear()
    assert harness.event_ms(FakeArm(done).step, clock) == 1.5
    assert done == ["wait", *launched]
    # A step that waits for the GPU takes as long as any spinning.
    done.clear()
    monkeypatch.setattr(time, "perf_counter", lambda: 10.0 * done.count("step"))
    assert harness.gpu_times(FakeArm(done).step, 2, clock, queue_ms=2.5) == []
    # So does one that the queue is too short for, but at its end the CPU is far ahead of the GPU.
    done.clear()
    monkeypatch.setattr(time, "perf_counter", lambda: 10.0 * done.count("step") + 0.001 * done.count("wait"))
    assert harness.gpu_times(FakeArm(done).step, 2, clock, queue_ms=2.5) == [1.5, 1.5]


@pytest.mark.parametrize(
    "step_ms, steps",
    [(10.0, 4), (1.0, 25), (0.1, BLOCK_LIMIT), (700.0, 2), (5000.0, 1)],  # 0.2 s are to be had in 8 rounds
)
def test_short_steps_are_taken_more_often_and_long_ones_less(step_ms: float, steps: int) -> None:
    assert latency.steps_per_turn(step_ms, Settings(8, 4, 0.2, 0)) == steps


def test_lengths_are_new_only_once(monkeypatch: pytest.MonkeyPatch) -> None:
    # A length that any earlier step had is not new: its plan is built. Each pair is of one length.
    lengths: list[int] = []
    known: set[int] = set()
    with torch.no_grad():
        arm = arms.Dense(bench())
        arm.fill(100)
        arm.rewind()
        step = arm.step
        monkeypatch.setattr(arm, "step", lambda: (step(), lengths.append(arm.cache.get_seq_length())))
        pairs = latency.new_length_times(arm, known, 100, Clock(CPU))
        assert len(pairs) == latency.NEW_LENGTHS
        known_lengths, new = list(range(101, 105)), list(range(105, 105 + latency.NEW_LENGTHS))
        assert lengths == [*known_lengths, *known_lengths, *known_lengths, *new, *known_lengths, *new]
        assert latency.new_length_times(arm, known, 150, Clock(CPU)) == []  # turns at 100 reach 164
        arm.rewind()
        assert len(latency.new_length_times(arm, known, 230, Clock(CPU))) == latency.NEW_LENGTHS


# --- what goes wrong -------------------------------------------------------------------------------------------------


def test_one_arm_that_fails_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(FakeArm):
        def step(self) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    class Odd(FakeArm):
        def fill(self, context: int) -> None:
            raise NotImplementedError("not for\n this model")

    arms = [Full([]), Odd([]), FakeArm([])]
    found = latency.measure_context(arms, 8, QUICK, Clock(CPU), set(), harness.no_progress_bar())
    assert [measured.reason for _, measured in found] == [
        "out of memory",
        "NotImplementedError: not for this model",
        "",
    ]
    row = latency.make_row(arms[0], 8, found[0][1], {})
    assert row["median_ms"] is row["step_ms"] is row["floor_ms"] is None


def test_a_prefill_that_failed_is_not_gone_on_from(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = bench()
    with torch.no_grad():
        shared.dense_layers(32)

        def full(*_: Any) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory")

        monkeypatch.setattr(shared, "read", full)
        with pytest.raises(torch.OutOfMemoryError):
            shared.dense_layers(128)
        monkeypatch.undo()
        with pytest.raises(CannotMeasure, match="out of memory"):
            shared.dense_layers(256)
        assert shared.dense_layers(32)[0].keys.shape[2] == 32  # kept, for dense-at-capacity


# --- numbers ---------------------------------------------------------------------------------------------------------


def fake_row(arm: str, context: int, ms: float, capacity: int | None = None, **more: Any) -> dict[str, Any]:
    turns = [[ms, ms * 1.001, ms * 0.999]] * 4
    row = {"arm": arm, "compiled": False, "context": context, "capacity": capacity, "reason": ""}
    return row | {"median_ms": ms, "step_ms": turns, "floor_ms": ms / 2, "gpu_ms": None} | more


def test_ratios_written_out_by_hand() -> None:
    rows = [
        fake_row("dense", 256, 1.0),
        fake_row("sink", 256, 1.25, 256),
        fake_row("recompute", 256, 20.0, 256, floor_ms=12.0),
        fake_row("dense", 1024, 4.0, gpu_ms=3.0),
        fake_row("dense-at-capacity", 1024, 1.0, 256, gpu_ms=0.5),
        fake_row("sink", 1024, 2.0, 256),
        fake_row("static", 1024, 3.0),
        fake_row("sink", 4096, 2.0, 256),
        fake_row("dense", 4096, 0.0, reason="out of memory"),
    ]
    found = {(one["context"], one["name"]): one for one in latency.ratios(rows)}
    assert {key: one["value"] for key, one in found.items()} == {
        (256, "achieved"): 0.8,
        (256, "overhead"): 1.25,
        (256, "recompute_over_sink"): 16.0,
        (1024, "ceiling"): 4.0,
        (1024, "achieved"): 2.0,
        (1024, "overhead"): 2.0,
        (1024, "static_over_sink"): 1.5,
    }
    assert found[1024, "ceiling"]["gpu_value"] == 6.0
    assert found[1024, "overhead"]["gpu_value"] is None
    # 12 ms of arithmetic over 0.625 ms of bytes
    assert found[256, "recompute_over_sink"]["hardware_limit"] == pytest.approx(19.2)
    assert found[256, "recompute_over_sink"]["share_of_limit"] == pytest.approx(16 / 19.2)


def test_the_spread_of_the_original_study_is_refused() -> None:
    # 11.435 ± 4.969 ms against 10.632 ± 0.187 ms was published as 1.08×.
    generator = torch.Generator().manual_seed(0)
    noisy = (11.435 + 4.969 * torch.randn(10, 20, generator=generator)).clamp(min=1).tolist()
    calm = (10.632 + 0.187 * torch.randn(10, 20, generator=generator)).tolist()
    assert harness.ratio_of_rounds(noisy, calm)["note"].startswith("no conclusion")
    measured = Measurement(rounds=noisy, cache_bytes=0)
    row = latency.make_row(arms.Dense(bench()), 64, measured, {"copy_bytes_per_s": 1e9, "step_weight_bytes": 1})
    assert "too wide" in row["warning"]


def test_floors_are_bytes_or_operations_over_rates() -> None:
    machine = {"copy_bytes_per_s": 1e9, "matrix_flops_per_s": 1e12, "step_weight_bytes": 3_000_000}
    shared = bench()
    assert latency.floor_ms(arms.Dense(shared), 1_000_000, machine) == 4.0
    recompute = latency.floor_ms(arms.Recompute(shared, 32), 0, machine)
    assert recompute == pytest.approx(models.forward_flops(shared.model, 32) / 1e9)


@pytest.mark.parametrize("shape", ["tiny", "pythia-70m"])
def test_operations_are_those_that_torch_counts(shape: str) -> None:
    # Reference: torch's own counter over a real forward. It counts attention in full, ours only below the diagonal.
    model = models.random_model(shape, torch.float32, CPU, attn_implementation="eager").model
    tokens = 64
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, tokens, dtype=torch.long, device=CPU), use_cache=False, logits_to_keep=1)
    config = model.config
    attention = 4 * tokens**2 * config.hidden_size * config.num_hidden_layers
    # The counter also counts the few operations of the rotary angles.
    assert models.forward_flops(model, tokens) == pytest.approx(counter.get_total_flops() - attention / 2, rel=1e-3)


def test_weights_that_a_step_reads() -> None:
    for tied in (True, False):
        model = models.AutoModelForCausalLM.from_config(tiny_config(tie_word_embeddings=tied))
        table = 61 * 32 * 4
        everything = sum(parameter.nbytes for parameter in model.parameters())
        assert models.step_weight_bytes(model) == everything - (0 if tied else table)


# --- the command line ------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _no_plots(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "plots" not in request.node.name:  # they take longer than all the rest
        monkeypatch.setattr(plots, "plot", lambda *_: [])


SMALL = ("--device", "cpu", "--contexts", "16", "32", "300", "--capacities", "32", "--rounds", "2", "--steps", "2")


def run(output: Path, *more: str, shape: str = "tiny") -> int:
    timing = ("--min-seconds", "0", "--warm-up-seconds", "0", "--output", str(output))
    return harness.run(latency.main, ["--random-weights", shape, *SMALL, *timing, *more])


def result_in(output: Path) -> dict[str, Any]:
    (path,) = output.glob("latency-*.json")
    return harness.read_json(path)


def test_a_run_writes_tables_result_and_plots(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path) == 0
    printed = capsys.readouterr().out
    result = result_in(tmp_path)
    assert {path.stem.partition("float32-")[2] for path in tmp_path.glob("*.png")} == {"per-token", "cache"}
    assert "Capacity 32: recomputing the window takes" in printed
    assert "random weights" in result["title"]
    assert result["synchronization"] == "none: the CPU runs in order"
    assert set(result["protocol"]["sdpa_enabled"]) == {"flash", "mem_efficient", "math", "cudnn"}
    assert {(row["arm"], row["context"]) for row in result["rows"]} == {
        *((arm, context) for arm in ("dense", "sink", "static") for context in (16, 32, 300)),
        ("dense-at-capacity", 300),
        ("recompute", 32),
    }
    for row in result["rows"]:
        assert not row["reason"]
        assert row["arm"] in printed
        steps = [time for turn in row["step_ms"] for time in turn]
        assert [len(turn) for turn in row["step_ms"]] == [2, 2]
        assert row["n"] == 4
        assert row["p5_ms"] <= row["median_ms"] <= row["p95_ms"]
        assert row["mean_ms"] == pytest.approx(sum(steps) / 4, rel=1e-2)
        assert row["sdpa"] == "flash"
        assert row["busy"] is None
        # Beyond what the model was trained on, dense text is not worth its time.
        assert row["beyond_trained_context"] == (row["context"] > TRAINED and row["arm"] in ("dense", "static"))
    cells = {(row["arm"], row["context"]): row for row in result["rows"]}
    per_token = 2 * 2 * 2 * 8 * 4  # keys and values of two layers of two heads of 8 numbers of 4 bytes
    assert cells["dense", 300]["cache_bytes"] == (300 + 1) * per_token
    assert cells["dense-at-capacity", 300]["cache_bytes"] == (32 + 1) * per_token
    assert cells["static", 300]["cache_bytes"] == 300 * per_token
    assert cells["sink", 300]["cache_bytes"] == cells["sink", 16]["cache_bytes"]
    assert cells["recompute", 32]["cache_bytes"] == 0
    weights = result["machine"]["step_weight_bytes"]
    assert cells["dense", 300]["floor_ms"] == pytest.approx((weights + 301 * per_token) / 1e9 * 1e3)
    assert {one["name"] for one in result["ratios"]} == {
        *("ceiling", "achieved", "overhead", "static_over_sink", "recompute_over_sink")
    }
    assert "NaN" not in json.dumps(result)


def test_several_capacities_have_plots_by_capacity(tmp_path: Path) -> None:
    assert run(tmp_path, "--contexts", "32", "64", "--capacities", "32", "64", "--arms", "sink", "recompute") == 0
    assert len(list(tmp_path.glob("*-by-capacity.png"))) == 1
    rows = result_in(tmp_path)["rows"]
    recomputed = [(row["context"], row["capacity"]) for row in rows if row["arm"] == "recompute"]
    assert recomputed == [(32, 32), (64, 64)]


def test_a_window_that_no_context_fills_is_not_recomputed(tmp_path: Path) -> None:
    assert run(tmp_path, "--contexts", "16", "--capacities", "32", "--arms", "sink", "recompute") == 0
    reasons = {row["arm"]: row["reason"] for row in result_in(tmp_path)["rows"]}
    assert reasons == {"sink": "", "recompute": "no context fills its window"}


def test_what_is_not_measured_says_why_and_the_rest_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "--contexts", "80", "--arms", "dense", "sink", shape="gpt2") == 0
    rows = {row["arm"]: row for row in result_in(tmp_path)["rows"] if row["context"] == 80}
    assert rows["dense"]["median_ms"] > 0
    assert rows["sink"]["median_ms"] is None
    assert "'gpt2'" in rows["sink"]["reason"]
    assert "'gpt2'" in capsys.readouterr().out


def test_the_time_limit_says_what_was_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "--time-limit", "0") == 2
    assert "nothing could be measured: not measured: the time limit was used up" in capsys.readouterr().err
    assert all("time limit" in row["reason"] for row in result_in(tmp_path)["rows"])


def test_ctrl_c_keeps_what_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure_context = latency.measure_context

    def interrupted(arms: Any, context: int, *more: Any) -> Any:
        if context > 32:
            raise KeyboardInterrupt
        return measure_context(arms, context, *more)

    monkeypatch.setattr(latency, "measure_context", interrupted)
    assert run(tmp_path, "--arms", "dense", "sink") == 130
    result = result_in(tmp_path)
    assert result["interrupted"]
    assert {row["context"] for row in result["rows"]} == {16, 32}


def test_several_shapes_write_a_file_each(tmp_path: Path) -> None:
    assert run(tmp_path, "gpt2", "--arms", "dense") == 2  # a stray word
    argv = ["--random-weights", "tiny", "gpt2", *SMALL, "--arms", "dense", "--output", str(tmp_path)]
    assert harness.run(latency.main, [*argv, "--min-seconds", "0", "--contexts", "40"]) == 0
    names = {path.name for path in tmp_path.glob("*.json")}
    assert names == {f"latency-{name}-random-weights-cpu-float32.json" for name in ("tiny", "gpt2")}


def test_the_default_needs_no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    args = latency.parse(["--offline"])
    latency.fill_in_defaults(args, CPU)
    assert (args.random_weights, args.compile, args.contexts[-1]) == (["pythia-70m"], False, 4096)
    args = latency.parse([])
    latency.fill_in_defaults(args, torch.device("cuda"))
    assert (args.compile, args.contexts) == (True, [2**power for power in range(8, 16)])


@pytest.mark.parametrize(
    "options, complaint",
    [
        (["--arms", "sinks"], "'sinks'"),
        (["--capacities", "4"], "capacity 4 leaves no window"),
        (["--contexts", "1"], "contexts must be at least 2"),
        (["--contexts", "many"], "'many'"),
        (["--rounds", "0"], "--rounds must be at least 1"),
        (["--steps", "0"], "--steps must be at least 1"),
        (["--steps", "64"], "--steps must be at most 63"),
        (["--n-sink", "-1"], "--n-sink must be at least 0"),
        (["--min-seconds", "-1"], "--min-seconds must be at least 0"),
        (["--dtype", "int8"], "unknown dtype 'int8'"),
        (["--device", "tpu"], "unknown device 'tpu'"),
        (["--sdpa-backend", "fast"], "'fast'"),
        (["--random-weights", "tiny", "gpt2", "--profile"], "--profile is for one model"),
        (["--profile"], "--profile is for CUDA, but --device is cpu"),
        (["--attn-implementation", "fast"], "--attn-implementation fast: "),
        (["--random-weights", "tiny", "gpt-5"], "unknown shape 'gpt-5'"),
        (["--model", "here"], "--model is for a model with weights"),
        (["--output", "{file}"], "cannot make the folder"),
    ],
)
def test_bad_input_gets_one_sentence_and_exit_code_2(
    options: Sequence[str], complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (file := tmp_path / "file").touch()
    assert run(tmp_path / "out", *(option.format(file=file) for option in options)) == 2
    error = capsys.readouterr().err.strip()
    assert complaint in error
    assert error.startswith("error: ")
    assert len(error.splitlines()) == 1
    assert not list(tmp_path.glob("out/*"))


def test_a_model_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--model", str(tmp_path / "none"), "--device", "cpu", "--output", str(tmp_path)]
    assert harness.run(latency.main, argv) == 2
    assert "there is no such folder" in capsys.readouterr().err
    assert math.isinf(latency.parse([]).time_limit)
