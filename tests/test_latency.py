"""`benchmarks.latency`: steps at the right context, timed in turns with the device waited for, and numbers that say why.

Clocks are not tested against wall time; what is checked is what runs between two readings, at which length, in which order,
and the arithmetic on times that are written out here.
"""

import functools
import gc
import json
import shlex
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, LlamaConfig, PreTrainedModel, StaticCache

from benchmarks import harness, latency, models
from benchmarks.arms import Arm, CannotMeasure
from benchmarks.harness import Clock
from benchmarks.latency import TURN_LIMIT, Bench, Dense, Recompute, Sink, Static, Steps
from sink_cache import SinkWindowCache

CPU = torch.device("cpu")
TRAINED = 256
QUICK = shlex.split("--rounds 3 --steps 2 --min-seconds 0 --warm-up-seconds 0 --n-sink 4 --device cpu")
NO_BAR = harness.progress_bar(disable=True)


def tiny_config(**changes: Any) -> LlamaConfig:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"num_key_value_heads": 2, "vocab_size": 61, "max_position_embeddings": TRAINED, "initializer_range": 0.3}
    return LlamaConfig(**(sizes | more | changes))


@pytest.fixture(autouse=True)
def _shapes_and_process_settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    gpt2, shape_config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=61), models.shape_config
    tiny = {"tiny": tiny_config(), "gpt2": gpt2}
    monkeypatch.setattr(models, "shape_config", lambda shape: tiny[shape] if shape in tiny else shape_config(shape))
    # Not the rate of this machine, so that floors can be written out by hand.
    monkeypatch.setattr(harness, "machine_rates", lambda _: {"copy_bytes_per_s": 1e9, "cpu_share_of_others": 0.0})
    with torch._dynamo.config.patch(automatic_dynamic_shapes=True, recompile_limit=8):
        yield


@pytest.fixture(scope="module")
def loaded() -> models.LoadedModel:
    torch.manual_seed(0)
    return models.LoadedModel(models.AutoModelForCausalLM.from_config(tiny_config()).eval(), None, "tiny")


def bench(loaded: models.LoadedModel, contexts: Sequence[int] = (32, 256), capacities: Sequence[int] = (32,)) -> Bench:
    args = latency.parse([*QUICK, "--contexts", *map(str, contexts), "--capacities", *map(str, capacities)])
    args.compile_static_at = [contexts[-1]]
    return Bench(loaded, args)


class FakeSteps(Steps):
    """Notes what is done with it."""

    def __init__(
        self, loaded: models.LoadedModel, done: list[Any], label: str = "step", *, compiled: bool = False
    ) -> None:
        super().__init__(bench(loaded), Arm("dense", compiled=compiled))
        self.done, self.label = done, label

    def step(self) -> None:
        self.done.append(self.label)


# --- the arms are at the context that the row names ---


@pytest.mark.parametrize(
    "kind, name", [(Dense, "dense"), (Dense, "dense-at-capacity"), (Sink, "sink"), (Static, "static")]
)
def test_every_turn_begins_with_the_same_number_of_tokens(
    loaded: models.LoadedModel, kind: type[Steps], name: str
) -> None:
    # Catches an arm whose context drifts with rounds, or that goes on from the state of the last context.
    shared = bench(loaded)
    shared.args.compile_static_at = [16, 32, 100, 256]
    arm = kind(shared, Arm(name, None if name in ("dense", "static") else 32))
    before = {"dense": lambda n: n, "dense-at-capacity": lambda n: min(n, 32), "static": lambda n: max(1, n - 64)}
    with torch.no_grad():
        for context in (16, 32, 100):
            arm.fill(context)
            for _ in range(2):
                arm.rewind()
                seen = int(arm.cache.get_seq_length())
                if name == "sink" and context >= 32:
                    assert seen >= context  # a full cache costs the same whatever it has seen, so it may go on
                else:
                    assert seen == before.get(name, int)(context)
                for _ in range(4):
                    arm.step()
                assert int(arm.cache.get_seq_length()) - seen == 4
            arm.release()


def test_a_static_cache_holds_the_prefill_and_is_as_large_as_its_name_says(loaded: models.LoadedModel) -> None:
    for arm, slots, filled in ((Arm("static"), 256, 192), (Arm("static-at-capacity", 100), 100, 36)):
        shared = bench(loaded, capacities=(100,))
        steps = Static(shared, arm)
        with torch.no_grad():
            steps.fill(256)
            steps.rewind()
            assert steps.cache.get_max_length() == slots
            for ours, prefill in zip(steps.cache.layers, shared.dense_layers(256), strict=True):
                torch.testing.assert_close(ours.keys[:, :, :filled], prefill.keys[:, :, :filled])
                torch.testing.assert_close(ours.values[:, :, :filled], prefill.values[:, :, :filled])
                assert not ours.keys[:, :, filled:].any()


def test_the_prefill_is_that_of_one_forward(loaded: models.LoadedModel) -> None:
    # The text is read in pieces, from context to context. Reading on must not change layers that are kept.
    shared = bench(loaded)
    with torch.no_grad():
        for context in (100, 256):
            shared.dense_layers(context)
        for context in (32, 256):  # 32 is a capacity, so its layers are kept
            expected = shared.model(shared.tokens[:, :context], use_cache=True).past_key_values
            for ours, whole in zip(shared.dense_layers(context), expected.layers, strict=True):
                torch.testing.assert_close(ours.keys, whole.keys, rtol=1e-4, atol=1e-4)
                torch.testing.assert_close(ours.values, whole.values, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("compiled", [False, True])
def test_recompute_reads_the_window_anew(loaded: models.LoadedModel, compiled: bool) -> None:
    shared = bench(loaded, contexts=(16, 64, 128))
    arm = Recompute(shared, Arm("recompute", 32, compiled))
    calls: list[Any] = []
    spy = lambda ids, **options: calls.append((ids.shape, options))  # noqa: E731
    shared.__dict__["compiled_call" if compiled else "model"] = spy
    arm.step()
    assert calls == [((1, 32), {"use_cache": False, "logits_to_keep": 1})]
    assert [arm.applies(context) for context in (16, 64, 128)] == [False, True, False]  # 64 is the first to fill it
    shared.args.contexts = [8, 16]
    assert [arm.applies(context) for context in (8, 16)] == [False, True]
    with pytest.raises(CannotMeasure, match="no context fills"):
        arm.fill(16)


@pytest.mark.parametrize("static", [True, False])
def test_a_compiled_step_gets_what_generate_passes(
    loaded: models.LoadedModel, monkeypatch: pytest.MonkeyPatch, static: bool
) -> None:
    # generate() builds a 4-D mask outside of the graph; a full sink cache has none. Another mask, or no mask, would make
    # another step than users get.
    shared = bench(loaded)
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
    # A StaticCache of 256 slots is measured after 192 tokens. A SinkWindowCache of 32 is long full by then.
    arm = Static(shared, Arm("static", None, True)) if static else Sink(shared, Arm("sink", 32, True))
    cache = StaticCache(config=model.config, max_cache_len=256) if static else SinkWindowCache(4, 28, compileable=True)
    ids = shared.tokens[:, :192]
    model.generate(ids, past_key_values=cache, max_new_tokens=2, do_sample=False, attention_mask=torch.ones_like(ids))
    with torch.no_grad():
        arm.fill(256 if static else 192)
        arm.rewind()
        arm.step()
    _, of_generate, ours = prepared  # the first call is that of the prompt
    assert (ours["attention_mask"] is None) == (of_generate["attention_mask"] is None)
    of_generate, ours = calls
    assert static == (of_generate.get("attention_mask") is not None)
    for name in ("attention_mask", "position_ids") if static else ("position_ids",):
        torch.testing.assert_close(ours[name], of_generate[name])
        assert ours[name].stride() == of_generate[name].stride()
    assert ours["input_ids"].stride() == of_generate["input_ids"].stride()
    assert not static or ours["attention_mask"].ndim == 4
    assert ours.keys() - {"past_key_values"} == of_generate.keys() - {"past_key_values"}


def test_compiled_arms_that_are_not_measured_say_why(loaded: models.LoadedModel) -> None:
    with pytest.raises(CannotMeasure, match="compile-static-at"):
        Static(bench(loaded), Arm("static", None, True)).fill(100)
    with pytest.raises(CannotMeasure, match="full cache"):
        Sink(bench(loaded), Arm("sink", 32, True)).fill(31)


def test_arms_are_eager_or_compiled(loaded: models.LoadedModel) -> None:
    shared = bench(loaded, capacities=(32, 64))
    eager = [str(steps.arm) for steps in latency.make_steps(shared, latency.NAMES, False)]
    at_capacities = [f"{name} {n}" for name in ("dense-at-capacity", "sink", "recompute") for n in (32, 64)]
    assert eager == ["dense", *at_capacities]
    both = [str(steps.arm) for steps in latency.make_steps(shared, ("static", "sink"), True)]
    assert both == ["sink 32", "sink 64", "static compiled", "sink 32 compiled", "sink 64 compiled"]


# --- time ---


@pytest.mark.parametrize("backend", ["mps", "cuda"])
def test_the_device_is_waited_for_before_and_after_every_step(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Without waiting, a step would seem to take as long as its launch. Tests have no such hardware, so it is faked.
    done: list[str] = []
    monkeypatch.setattr(torch.mps, "synchronize", lambda: done.append("wait"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: done.append("wait"))
    clock = Clock(torch.device(backend))
    assert harness.synchronize(clock.device) == f"torch.{backend}.synchronize"
    done.clear()
    assert len(harness.timed_steps(lambda: done.append("step"), 2, clock)) == 2
    assert done == ["wait", "step", "wait"] * 2
    done.clear()
    harness.unsynchronized_step_ms(lambda: done.append("step"), 3, clock)
    assert done == ["wait", "step", "step", "step", "wait"]


def test_arms_take_turns_without_garbage_collector(loaded: models.LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    # Without turns, a machine that slows down during the run would make the last arm look slow.
    done: list[str] = []
    arms = [FakeSteps(loaded, done, "A"), FakeSteps(loaded, done, "B")]
    collector: list[bool] = []
    timed_steps = harness.timed_steps

    def spy(*args: Any) -> list[float]:
        collector.append(gc.isenabled())
        return timed_steps(*args)

    monkeypatch.setattr(latency, "warm_up", lambda *_: 1e3)  # so slow that a turn is as short as it may be
    monkeypatch.setattr(latency, "look_closer", lambda *_: None)
    monkeypatch.setattr(harness, "timed_steps", spy)
    rows = latency.measure_context(arms, 8, Clock(CPU), NO_BAR, True)
    # Each turn has an untimed step and two timed steps.
    assert "".join(done) == "AAABBB" * 3
    assert [len(turn) for row in rows for turn in row["step_ms"]] == [2] * 6
    assert set(collector) == {False}
    assert gc.isenabled()
    # On MPS and CUDA rounds 1 and 3 have a turn without synchronisation, too.
    monkeypatch.setattr(torch.mps, "synchronize", lambda: None)
    (row,) = latency.measure_context(arms[:1], 8, Clock(torch.device("mps")), NO_BAR, True)
    assert len(row["unsynchronized_ms"]) == 2


def test_warm_up_is_by_count_and_by_time(loaded: models.LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(harness, "timed_steps", lambda step, steps, _: [step() or 10.0] * steps)
    latency.warm_up(arm := FakeSteps(loaded, done), Clock(CPU))
    assert len(done) == 3
    arm.bench.args.warm_up_seconds = 0.5
    latency.warm_up(arm, Clock(CPU))
    assert len(done) == 3 + 3 + 50
    done.clear()
    latency.warm_up(FakeSteps(loaded, done, compiled=True), Clock(CPU))  # the first steps compile and record
    assert len(done) == 8


def test_the_work_of_the_gpu_is_seen_without_its_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    # CUDA events around a step measure its launch, too, unless the GPU is busy until the step is launched.
    done: list[str] = []

    class Event:
        made = 0

        def __init__(self, enable_timing: bool) -> None:
            self.name = "end" if Event.made % 2 else "start"
            Event.made += 1

        def record(self) -> None:
            done.append(self.name)

        def elapsed_time(self, end: Any) -> float:
            return 1.5

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: done.append("wait"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: done.append(f"spin {cycles:.0e}"), raising=False)
    clock = Clock(torch.device("cuda"))
    done.clear()

    def step() -> None:
        done.append("step")

    launching = [0.003, 0.001, 0.001]  # seconds of the CPU
    monkeypatch.setattr(time, "perf_counter", lambda: sum(launching[: done.count("step")]))
    assert harness.gpu_times(step, 2, clock, queue_ms=2.5) == [1.5, 1.5]
    # The first launch outlasted the spinning, so the GPU waited for it. That time is left out.
    launched = ["start", "step", "end", "wait"]
    assert done == ["wait", "spin 5e+06", *launched, *(["wait", "spin 1e+07", *launched] * 2)]
    # A step that waits for the GPU outlasts any spinning.
    done.clear()
    monkeypatch.setattr(time, "perf_counter", lambda: 10.0 * done.count("step"))
    assert harness.gpu_times(step, 2, clock, queue_ms=2.5) == []
    # A step of too many kernels for the queue outlasts it, too, but at its end the CPU is far ahead of the GPU.
    done.clear()
    monkeypatch.setattr(time, "perf_counter", lambda: 10.0 * done.count("step") + 0.001 * done.count("wait"))
    assert harness.gpu_times(step, 2, clock, queue_ms=2.5) == [1.5, 1.5]


@pytest.mark.parametrize(
    "step_ms, steps",
    [(10.0, 4), (1.0, 25), (0.1, TURN_LIMIT), (700.0, 2), (5000.0, 1)],  # 0.2 s in 8 rounds
)
def test_short_steps_are_taken_more_often_and_long_ones_less(step_ms: float, steps: int) -> None:
    args = latency.parse(["--rounds", "8", "--steps", "4", "--min-seconds", "0.2"])
    assert latency.steps_per_turn(step_ms, args) == steps


def test_lengths_are_new_only_once(loaded: models.LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    # A length of any earlier step is not new, because its plan is built. `new` and `again` have the same lengths.
    lengths: list[int] = []
    with torch.no_grad():
        arm = Dense(bench(loaded), Arm("dense"))
        arm.fill(100)
        arm.rewind()
        step = arm.step
        monkeypatch.setattr(arm, "step", lambda: (step(), lengths.append(arm.cache.get_seq_length())))
        new, again = latency.new_length_times(arm, 100, Clock(CPU))
        assert len(new) == len(again) == latency.NEW_LENGTHS
        first = 101 + latency.NEW_LENGTHS // 2
        known_lengths, timed = list(range(101, first)), list(range(first, first + latency.NEW_LENGTHS))
        assert lengths == [*known_lengths, *known_lengths, *known_lengths, *timed, *known_lengths, *timed]
        assert latency.new_length_times(arm, 150, Clock(CPU)) == ([], [])  # turns at 100 reach 164
        arm.rewind()
        assert len(latency.new_length_times(arm, 230, Clock(CPU))[0]) == latency.NEW_LENGTHS


# --- what goes wrong ---


def test_one_arm_that_fails_leaves_the_others(loaded: models.LoadedModel) -> None:
    class Full(FakeSteps):
        def step(self) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    class Odd(FakeSteps):
        def fill(self, context: int) -> None:
            raise NotImplementedError("not for\n this model")

    arms = [Full(loaded, []), Odd(loaded, []), FakeSteps(loaded, [])]
    rows = latency.measure_context(arms, 8, Clock(CPU), NO_BAR, True)
    assert [row["reason"] for row in rows] == ["out of memory", "NotImplementedError: not for this model", ""]
    assert rows[0]["median_ms"] is rows[0]["floor_ms"] is None
    assert rows[0]["step_ms"] == []


def test_a_prefill_that_failed_is_not_gone_on_from(loaded: models.LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = bench(loaded)
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


# --- numbers ---


def row(arm: str, context: int, ms: float, capacity: int | None = None, **more: Any) -> dict[str, Any]:
    turns = [[ms, ms * 1.001, ms * 0.999]] * 4
    found = {"arm": arm, "compiled": False, "context": context, "capacity": capacity, "reason": ""}
    return found | {"step_ms": turns, "gpu_ms": None} | more


def test_ratios_written_out_by_hand() -> None:
    compiled = {"compiled": True}
    rows = [
        row("dense", 256, 1.0),
        row("sink", 256, 1.25, 256),
        row("recompute", 256, 20.0, 256),
        row("dense", 1024, 4.0, gpu_ms=3.0),
        row("dense-at-capacity", 1024, 1.0, 256, gpu_ms=0.5),
        row("sink", 1024, 2.0, 256),
        row("static", 1024, 3.0, **compiled),
        row("static-at-capacity", 1024, 0.75, 256, **compiled),
        row("sink", 1024, 0.5, 256, **compiled),
        row("dense", 4096, 0.0, reason="out of memory"),
        row("sink", 4096, 2.0, 256),
    ]
    found = {(one["context"], one["compiled"], one["name"]): one for one in latency.ratios(rows)}
    # Eager steps are compared with eager steps, and compiled steps with compiled steps.
    expected = {
        (256, False): {"achieved": 0.8, "overhead": 1.25, "recompute_over_sink": 16.0},
        (1024, False): {"achieved": 2.0, "ceiling": 4.0, "overhead": 2.0},
        (1024, True): {"achieved": 6.0, "ceiling": 4.0, "overhead": pytest.approx(2 / 3)},
    }
    by_hand = {(*where, name): value for where, values in expected.items() for name, value in values.items()}
    assert {key: one["value"] for key, one in found.items()} == by_hand
    assert found[1024, False, "ceiling"]["gpu_value"] == 6.0
    assert found[1024, False, "overhead"]["gpu_value"] is None


# --- the command line ---


def run(output: Path, *more: str, shape: str = "tiny") -> int:
    small = ("--contexts", "16", "32", "300", "--capacities", "32", "--rounds", "2")
    return harness.run(latency.main, ["--random-weights", shape, *QUICK, *small, "--output", str(output), *more])


def result_in(output: Path) -> dict[str, Any]:
    (path,) = output.glob("latency-*.json")
    return harness.read_json(path)


def test_a_run_writes_tables_and_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path) == 0
    printed = capsys.readouterr().out
    result = result_in(tmp_path)
    assert result["command"].startswith("python -m benchmarks.latency --random-weights tiny ")
    assert result["synchronization"] == "none: the CPU runs in order"
    assert set(result["protocol"]["sdpa_enabled"]) == {"flash", "mem_efficient", "math", "cudnn"}
    assert {(row["arm"], row["context"]) for row in result["rows"]} == {
        *((arm, context) for arm in ("dense", "sink") for context in (16, 32, 300)),
        ("dense-at-capacity", 300),
        ("recompute", 32),
    }
    for row in result["rows"]:
        assert not row["reason"]
        assert row["arm"] in printed
        assert [len(turn) for turn in row["step_ms"]] == [2, 2]
        assert row["p5_ms"] <= row["median_ms"] <= row["p95_ms"]
        assert row["mean_ms"] == pytest.approx(sum(sum(turn) for turn in row["step_ms"]) / 4, rel=1e-2)
        assert row["sdpa"] == "flash"
        assert row["busy"] is None
        # Only a dense cache can hold more tokens than the model was trained on.
        assert row["beyond_trained_context"] == (row["context"] > TRAINED and row["arm"] == "dense")
    cells = {(row["arm"], row["context"]): row for row in result["rows"]}
    per_token = 2 * 2 * 2 * 8 * 4  # keys and values of two layers of two heads of 8 numbers of 4 bytes
    assert cells["dense", 300]["cache_bytes"] == (300 + 1) * per_token
    assert cells["dense-at-capacity", 300]["cache_bytes"] == (32 + 1) * per_token
    assert cells["sink", 300]["cache_bytes"] == cells["sink", 16]["cache_bytes"]
    assert cells["recompute", 32]["cache_bytes"] == 0
    weights = result["model"]["step_weight_bytes"]  # without the embedding, which is not the output layer here
    assert weights == result["model"]["weight_bytes"] - 61 * 32 * 4
    assert cells["dense", 300]["floor_ms"] == pytest.approx((weights + 301 * per_token) / 1e9 * 1e3)
    assert "NaN" not in json.dumps(result)
    assert "achieved" in printed


def test_what_is_not_measured_says_why_and_the_rest_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "--contexts", "80", "--arms", "dense", "sink", shape="gpt2") == 0
    rows = {row["arm"]: row for row in result_in(tmp_path)["rows"]}
    assert rows["dense"]["median_ms"] > 0
    assert rows["sink"]["median_ms"] is None
    assert "'gpt2'" in rows["sink"]["reason"]
    assert run(tmp_path, "--contexts", "80", "--arms", "sink", shape="gpt2") == 2
    assert "nothing could be measured" in capsys.readouterr().err
