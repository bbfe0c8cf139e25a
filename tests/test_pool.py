"""A pool of streams: each gets what it gets alone in `endless`, whatever the others do."""

import itertools
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig, LlamaForCausalLM, LogitsProcessorList, PreTrainedModel

from sink_cache import SinkWindowCache, Stream, StreamPool, cache_kwargs, endless
from sink_cache.sampling import BLOCK

from .families import VOCAB, tiny_model
from .test_exact import tokens
from .test_static import compiling

N_SINK, WINDOW, PIECE = 2, 6, 5
LENGTHS = (1, 2, 3, 8, 9, 30)  # amid the sinks, just full, longer than the cache, in several pieces


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    model = tiny_model("llama")
    model.generation_config.eos_token_id = None
    return model


def pool_of(model: PreTrainedModel, rows: int = 2, **more: Any) -> StreamPool:
    sizes = {"n_sink": N_SINK, "window": WINDOW, "prefill_chunk_size": PIECE, **more}
    return StreamPool(model, max_streams=rows, **sizes)


def text(length: int, seed: int = 0) -> list[int]:
    found: list[int] = tokens(length, seed=seed)[0].tolist()
    return found


def run(pool: StreamPool) -> dict[Stream, list[int]]:
    """Runs the pool to its end; returns what it handed out."""
    found: dict[Stream, list[int]] = {}
    for stream, token in pool:
        found.setdefault(stream, []).append(token)
    return found


class Alone:
    """The reference: one text in `endless`, in turns."""

    def __init__(self, model: PreTrainedModel, n_sink: int = N_SINK, window: int = WINDOW, piece: int = PIECE) -> None:
        self.model, self.cache, self.piece = model, SinkWindowCache(n_sink, window), piece
        self.text: list[int] = []

    def turn(self, new: list[int], **options: Any) -> list[int]:
        shown = self.text + new
        ids = torch.tensor([shown])
        out = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), custom_generate=endless, prefill_chunk_size=self.piece,
            pad_token_id=0, keep_tokens=10_000, **cache_kwargs(self.cache), **{"do_sample": False, **options},
        )  # fmt: skip
        self.text = out[0].tolist()
        return self.text[len(shown) :]


# --- the same tokens as alone ---


@pytest.mark.parametrize("model_type", ["llama", "gpt_neox", "gemma3_text"])
@pytest.mark.parametrize("rows", [1, 3])
def test_each_stream_gets_what_it_gets_alone(model_type: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # More streams than rows, all lengths, rebases at other times than alone, turns, and rows that are parked in between.
    monkeypatch.setattr("sink_cache.steps._REBASE_EVERY", 7)
    model = tiny_model(model_type)
    model.generation_config.eos_token_id = None
    pool = pool_of(model, rows)
    streams = [pool.add(text(n, seed=n), max_new_tokens=7 + 3 * n % 11, do_sample=False) for n in LENGTHS]
    alone = [Alone(model) for _ in LENGTHS]
    handed_out = run(pool)
    for stream, reference, n in zip(streams, alone, LENGTHS, strict=True):
        assert handed_out[stream] == stream.tokens == reference.turn(text(n, seed=n), max_new_tokens=7 + 3 * n % 11)
        assert (stream.status, stream.finish_reason) == ("idle", "length")
    for turn in (4, 1, 13):
        for stream in reversed(streams):
            stream.send(text(turn, seed=turn), max_new_tokens=9)
        handed_out = run(pool)
        for stream, reference in zip(streams, alone, strict=True):
            assert handed_out[stream] == stream.tokens == reference.turn(text(turn, seed=turn), max_new_tokens=9)


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, 20), st.integers(1, 12)),
        st.tuples(st.just("send"), st.integers(0, 9), st.integers(1, 8)),
        st.tuples(st.just("close"), st.integers(0, 9), st.just(0)),
        st.tuples(st.just("stop"), st.integers(0, 9), st.just(0)),
        st.tuples(st.just("step"), st.integers(1, 9), st.just(0)),
    ),
    max_size=14,
)


@given(STEPS, st.integers(1, 3), st.booleans())
@settings(max_examples=40, deadline=None)
def test_joins_and_leaves_at_random(
    model: PreTrainedModel, steps: list[tuple[str, int, int]], rows: int, keeps: bool
) -> None:
    pool = pool_of(model, rows)
    texts: list[tuple[Stream, list[tuple[list[int], list[int]]]]] = []  # turns: what was sent, and what came

    def note(found: dict[Stream, list[int]] | list[tuple[Stream, int]]) -> None:
        for stream, token in found:
            next(turns for other, turns in texts if other is stream)[-1][1].append(token)

    for what, number, length in steps:
        stream, turns = texts[number % len(texts)] if texts else (None, [])
        if what == "add":
            new = text(number, seed=number)
            texts.append((pool.add(new, max_new_tokens=length, do_sample=False), [(new, [])]))
        elif what == "step":
            for _ in range(number):
                note(pool.step())
        elif stream is None:
            continue
        elif what == "send" and stream.status == "idle":
            new = text(length, seed=length)
            turns.append((new, []))
            stream.send(new, max_new_tokens=length)
        elif what == "close":
            stream.close()
        elif what == "stop":
            stream.stop()
    note(list(pool))
    counts = pool.counts
    assert not counts["queued"] + counts["reading"] + counts["running"]
    for stream, turns in texts:
        reference = Alone(model)
        for new, came in turns:
            if not came:
                break  # closed before its first token
            assert came == reference.turn(new, max_new_tokens=len(came))
        if stream.status == "idle" and keeps:
            stream.send([9], max_new_tokens=5)
            run(pool)
            assert stream.tokens == reference.turn([9], max_new_tokens=5)


def test_a_thousand_steps_of_one_stream(tiny_llama: LlamaForCausalLM) -> None:
    # Positions stay bounded and nothing grows, while others come and go.
    pool = StreamPool(tiny_llama, n_sink=2, window=14, max_streams=3, prefill_chunk_size=8)
    endlessly = pool.add([1, 2, 3], do_sample=False)
    came: list[int] = []
    nbytes = None
    for step in range(1000):
        if step % 9 == 0:
            pool.add([step % 60] * (step % 31 + 1), max_new_tokens=step % 17 + 1, do_sample=False).stop()
        for stream, token in pool.step():
            if stream is endlessly:
                came.append(token)
            elif stream.status == "idle":
                stream.close()
        if step == 100:
            nbytes = pool.nbytes
    assert pool.nbytes == nbytes
    assert len(endlessly.tokens) == 16  # keep_tokens
    assert int(pool._cache.next_position_ids().max()) < 16 + 14 + 1024 + 14
    assert came == Alone(tiny_llama, 2, 14, 8).turn([1, 2, 3], max_new_tokens=len(came))


def test_no_second_graph_as_rows_join_fill_and_leave(model: PreTrainedModel) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    pool = pool_of(model, 3, compile_config=compiling("aot_eager"))
    streams = [pool.add(text(n, seed=n), max_new_tokens=20 - n // 2, do_sample=False) for n in LENGTHS]
    run(pool)
    for stream in streams:
        stream.send(text(3), max_new_tokens=5)
    run(pool)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    for stream, n in zip(streams, LENGTHS, strict=True):
        reference = Alone(model)
        reference.turn(text(n, seed=n), max_new_tokens=20 - n // 2)
        assert stream.tokens == reference.turn(text(3), max_new_tokens=5)


# --- how tokens are chosen ---


def test_a_stream_samples_the_same_whatever_else_runs(model: PreTrainedModel) -> None:
    # Its own random numbers, over more than one block of them, and options of its own row.
    options: dict[str, Any] = {
        "do_sample": True,
        "temperature": 2.0,
        "top_k": 40,
        "top_p": 0.95,
        "repetition_penalty": 1.2,
    }
    new = BLOCK + 30
    alone, beside = pool_of(model, 1), pool_of(model, 3)
    expected = alone.add(text(4), seed=5, max_new_tokens=new, **options)
    run(alone)
    others = [beside.add(text(n, seed=n), max_new_tokens=9, do_sample=n % 2 == 0, temperature=0.5) for n in (2, 3, 7)]
    found = beside.add(text(4), seed=5, max_new_tokens=new, **options)
    for _ in range(100):
        beside.step()
    others.append(beside.add(text(8), do_sample=True, seed=5, max_new_tokens=100))
    run(beside)
    assert found.tokens == expected.tokens
    assert len(set(found.tokens)) > 50  # it did sample
    assert others[-1].tokens != expected.tokens[:100]
    for pool, stream in ((alone, expected), (beside, found)):
        stream.send(text(3), max_new_tokens=20)
        run(pool)
    assert found.tokens == expected.tokens


def test_a_pool_without_seeds_follows_the_global_one(model: PreTrainedModel) -> None:
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        pool = pool_of(model)
        streams = [pool.add(text(3), do_sample=True, max_new_tokens=12) for _ in range(2)]
        run(pool)
        found.append([stream.tokens for stream in streams])
    assert found[0] == found[1] != found[2]
    assert found[0][0] != found[0][1]


@pytest.mark.parametrize("keep_tokens", [None, 3, 50])
def test_repetition_penalty_sees_the_last_tokens(model: PreTrainedModel, keep_tokens: int | None) -> None:
    # Greedy, with a penalty so strong that a token that is seen does not come again. Beside it, rows with others.
    pool, reference = pool_of(model, 3, keep_tokens=keep_tokens), SinkWindowCache(N_SINK, WINDOW)
    options: dict[str, Any] = {"do_sample": False, "repetition_penalty": 5.0}
    pool.add(text(5, seed=1), do_sample=True, max_new_tokens=60)
    stream = pool.add(text(7), max_new_tokens=30, **options)
    pool.add(text(5, seed=2), max_new_tokens=60, **options | {"repetition_penalty": 1.1})
    handed_out = run(pool)
    kept = keep_tokens or N_SINK + WINDOW
    came: list[int] = []

    class Note:
        def put(self, ids: torch.Tensor) -> None:
            came.extend(ids.flatten().tolist())

        def end(self) -> None: ...

    out = model.generate(
        torch.tensor([text(7)]), custom_generate=endless, prefill_chunk_size=PIECE, pad_token_id=0, max_new_tokens=30,
        keep_tokens=kept, streamer=Note(), **cache_kwargs(reference), **options,
    )  # fmt: skip
    assert handed_out[stream] == came[7:]
    # The next turn goes on from all of the last tokens, as endless does when it is given what it returned.
    stream.send(text(3, seed=9), max_new_tokens=12)
    again = torch.cat([out, torch.tensor([text(3, seed=9)])], dim=1)
    came.clear()
    model.generate(
        again, custom_generate=endless, prefill_chunk_size=PIECE, pad_token_id=0, max_new_tokens=12, keep_tokens=kept,
        streamer=Note(), **cache_kwargs(reference), **options,
    )  # fmt: skip
    run(pool)
    assert stream.tokens == came[again.shape[1] :]


def test_ends_of_turns(model: PreTrainedModel) -> None:
    pool = pool_of(model, 3)
    plain = Alone(model).turn(text(4), max_new_tokens=12)
    stops_at = pool.add(
        text(4), max_new_tokens=12, eos_token_id=[plain[5], min(set(range(VOCAB)) - set(plain))], do_sample=False
    )
    one = pool.add(text(4), max_new_tokens=1, do_sample=False)
    by_length = pool.add(text(4), max_length=9, do_sample=False)
    run(pool)
    assert stops_at.tokens == plain[: plain.index(plain[5]) + 1]
    assert (one.tokens, by_length.tokens) == (plain[:1], plain[:5])
    assert [stream.finish_reason for stream in (stops_at, one, by_length)] == ["eos", "length", "length"]
    one.send([], max_new_tokens=11)  # no new tokens: it goes on where it was
    run(pool)
    assert one.tokens == plain[1:]


def test_options_of_a_generation_config_and_of_the_model(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Alone(model).turn(text(4), max_new_tokens=12)
    monkeypatch.setattr(model.generation_config, "eos_token_id", plain[3])
    pool = pool_of(model)
    by_model = pool.add(text(4), max_new_tokens=12, do_sample=False)
    config = GenerationConfig(max_new_tokens=7, eos_token_id=plain[2], do_sample=False)
    by_config = pool.add(text(4), config)
    run(pool)
    assert by_model.tokens == plain[: plain.index(plain[3]) + 1]
    assert by_config.tokens == plain[: plain.index(plain[2]) + 1]


# --- more streams than rows ---


def test_a_turn_of_one_token_needs_no_row(model: PreTrainedModel) -> None:
    # It ends when it has been read, while all rows run, and must not keep the next text from being read.
    pool = pool_of(model, 1)
    endlessly = pool.add(text(3), do_sample=False)
    short = [pool.add(text(n), max_new_tokens=1, do_sample=False) for n in (4, 5)]
    ended: list[Stream] = []
    for stream, _ in pool:
        if stream.finish_reason:
            assert not stream.is_active
            ended.append(stream)
        if len(ended) == 2:
            break
    assert ended == short
    endlessly.close()
    short[0].send([7], max_new_tokens=5)
    run(pool)
    reference = Alone(model)
    reference.turn(text(4), max_new_tokens=1)
    assert short[0].tokens == reference.turn([7], max_new_tokens=5)


@pytest.mark.parametrize("on_disk", [False, True])
def test_many_conversations_on_few_rows(model: PreTrainedModel, on_disk: bool, tmp_path: Path) -> None:
    pool = pool_of(model, 2, park_to=tmp_path if on_disk else None)
    streams = [pool.add(text(n % 13 + 1, seed=n), max_new_tokens=3, do_sample=False) for n in range(25)]
    run(pool)
    assert pool.counts == {"queued": 0, "reading": 0, "running": 0, "idle": 25, "parked": 23}
    assert len(list(tmp_path.iterdir())) == (23 if on_disk else 0)
    for stream in streams[::-2]:
        stream.send([3, 4], max_new_tokens=6)
    run(pool)
    for n, stream in list(enumerate(streams))[::-2]:
        reference = Alone(model)
        reference.turn(text(n % 13 + 1, seed=n), max_new_tokens=3)
        assert stream.tokens == reference.turn([3, 4], max_new_tokens=6)
    pool.close()
    assert not list(tmp_path.iterdir())
    assert sum(pool.counts.values()) == 0


def test_a_lost_file_fails_its_stream_alone(model: PreTrainedModel, tmp_path: Path) -> None:
    pool = pool_of(model, 1, park_to=tmp_path)
    lost, kept = (pool.add(text(4, seed=n), max_new_tokens=3, do_sample=False) for n in (1, 2))
    run(pool)
    next(tmp_path.iterdir()).unlink()
    lost.send([5])
    kept.send([5])
    run(pool)
    assert (lost.status, lost.finish_reason, kept.status) == ("failed", "failed", "idle")
    assert isinstance(lost.error, FileNotFoundError)
    with pytest.raises(RuntimeError, match="failed"):
        lost.send([5])


# --- what goes wrong ---


def test_a_stream_that_fails_harms_no_other(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = pool_of(model, 3)
    good = pool.add(text(9), max_new_tokens=20, do_sample=False)
    bad = pool.add(text(12, seed=1), max_new_tokens=20, do_sample=False)

    def fail(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        ids = args[0] if args else kwargs["input_ids"]
        if ids.shape[1] == 2:  # the last piece of the second
            raise MemoryError("no room")

    hook = model.register_forward_pre_hook(fail, with_kwargs=True)
    run(pool)
    hook.remove()
    assert (bad.status, str(bad.error)) == ("failed", "no room")
    assert good.tokens == Alone(model).turn(text(9), max_new_tokens=20)
    after = pool.add(text(12, seed=1), max_new_tokens=4, do_sample=False)
    run(pool)
    assert after.tokens == Alone(model).turn(text(12, seed=1), max_new_tokens=4)


def test_a_forward_that_fails_midway_harms_no_other(model: PreTrainedModel) -> None:
    # Layers that have taken in different numbers of tokens.
    pool = pool_of(model, 2)
    good = pool.add(text(9), max_new_tokens=12, do_sample=False)
    bad = pool.add(text(12, seed=1), max_new_tokens=12, do_sample=False)

    def fail(module: Any, args: Any) -> None:
        if args[0].shape[1] == 2:
            raise MemoryError("no room")

    hook = model.model.layers[1].mlp.register_forward_pre_hook(fail)  # type: ignore[union-attr]
    run(pool)
    hook.remove()
    assert bad.status == "failed"
    again = pool.add(text(30, seed=2), max_new_tokens=5, do_sample=False)
    run(pool)
    assert good.tokens == Alone(model).turn(text(9), max_new_tokens=12)
    assert again.tokens == Alone(model).turn(text(30, seed=2), max_new_tokens=5)


@pytest.mark.parametrize("failing", range(2, 9))  # of the calls: some read a prompt, the others are steps
def test_a_step_that_fails_after_the_last_attention_can_be_repeated(model: PreTrainedModel, failing: int) -> None:
    # The cache had taken the tokens in, and took them in once more.
    pool, calls = pool_of(model, 3), itertools.count(1)
    idle = pool.add(text(4, seed=2), max_new_tokens=1, do_sample=False)
    run(pool)
    streams = [pool.add(text(length), max_new_tokens=12, do_sample=False) for length in (3, 4)]

    def fail(*_: Any) -> None:
        if next(calls) == failing:
            raise MemoryError("no room")

    hook = model.lm_head.register_forward_pre_hook(fail)  # type: ignore[union-attr]
    try:
        run(pool)
    except MemoryError:
        run(pool)
    hook.remove()
    idle.send([], max_new_tokens=4)
    run(pool)
    for stream, length in zip(streams, (3, 4), strict=True):
        if stream.status != "failed":
            assert stream.tokens == Alone(model).turn(text(length), max_new_tokens=12)
    assert idle.tokens == Alone(model).turn(text(4, seed=2), max_new_tokens=5)[1:]


def test_steps_that_fail_do_not_count_as_warm_up(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    # After interrupts while it compiles, a step would be captured that has not been compiled, and so would a choice.
    pool = pool_of(model)
    stream = pool.add(text(9), max_new_tokens=12, do_sample=False)
    batch = pool._batch
    monkeypatch.setattr(batch, "_compiles_choice", True)
    left = batch._step.warm_up, batch._warm_up
    hook = model.register_forward_pre_hook(lambda *_: _interrupt() if stream.status == "running" else None)
    with pytest.raises(KeyboardInterrupt):
        run(pool)
    hook.remove()
    assert (batch._step.warm_up, batch._warm_up) == left
    with monkeypatch.context() as patched:
        patched.setattr("sink_cache.batch.choose", _interrupt)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                run(pool)
    assert batch._warm_up == left[1]
    monkeypatch.setattr(batch, "_compiles_choice", False)
    run(pool)
    assert stream.tokens == Alone(model).turn(text(9), max_new_tokens=12)


def test_an_interrupt_waits_for_the_step(model: PreTrainedModel) -> None:
    pool = pool_of(model)
    stream = pool.add(text(9), max_new_tokens=30, do_sample=False)
    calls = []

    def interrupt(*_: Any) -> None:
        calls.append(0)
        if len(calls) in (1, 5, 6):
            signal.raise_signal(signal.SIGINT)

    hook = model.model.layers[1].register_forward_pre_hook(interrupt)  # type: ignore[union-attr]
    came, interrupts = [], 0
    while pool.is_active:
        try:
            came += [token for _, token in pool]
        except KeyboardInterrupt:
            interrupts += 1
    hook.remove()
    assert interrupts == 3
    assert stream.tokens == Alone(model).turn(text(9), max_new_tokens=30)
    assert len(came) <= 30


def test_a_loop_that_is_left_loses_no_token(model: PreTrainedModel) -> None:
    pool = pool_of(model, 3)
    streams = [pool.add(text(n), max_new_tokens=9, do_sample=False) for n in (3, 4, 5)]
    came: dict[Stream, list[int]] = {stream: [] for stream in streams}
    while pool.is_active or pool._undelivered:
        for stream, token in pool:
            came[stream].append(token)
            break
    for stream, n in zip(streams, (3, 4, 5), strict=True):
        assert came[stream] == Alone(model).turn(text(n), max_new_tokens=9)


def test_threads_that_add_and_close_while_another_steps(model: PreTrainedModel) -> None:
    pool = pool_of(model, 2)
    ends: list[tuple[int, Stream]] = []

    def client(first: int) -> None:
        for n in range(first, first + 6):
            stream = pool.add(text(n % 11 + 1, seed=n), max_new_tokens=8, do_sample=False)
            if n % 3 == 0:
                stream.close()
            ends.append((n, stream))

    threads = [threading.Thread(target=client, args=(first,)) for first in (0, 6, 12)]
    for thread in threads:
        thread.start()
    assert pool.wait(timeout=30)
    while any(thread.is_alive() for thread in threads) or pool.is_active:
        run(pool)
    for n, stream in ends:
        if n % 3 == 0:
            assert stream.status == "closed"
        else:
            assert stream.tokens == Alone(model).turn(text(n % 11 + 1, seed=n), max_new_tokens=8)
    assert not pool.wait(timeout=0)


def test_only_one_thread_steps(model: PreTrainedModel) -> None:
    pool = pool_of(model)
    pool.add(text(3), max_new_tokens=4)
    found: list[BaseException] = []

    def other() -> None:
        try:
            pool.step()
        except RuntimeError as error:
            found.append(error)

    def meanwhile(*_: Any) -> None:
        if not found:
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()

    hook = model.register_forward_pre_hook(meanwhile)
    run(pool)
    hook.remove()
    assert "in the middle of a step" in str(found[0])


@pytest.mark.parametrize(
    "options, kind, says",
    [
        ({"input_ids": []}, ValueError, "no token"),
        ({"input_ids": "words"}, TypeError, "is str"),
        ({"input_ids": [1.5]}, TypeError, "1.5"),
        ({"input_ids": [1, VOCAB]}, ValueError, f"token {VOCAB} is none of the model's {VOCAB}"),
        ({"input_ids": [-1]}, ValueError, "token -1"),
        ({"input_ids": torch.ones(2, 3, dtype=torch.long)}, ValueError, "have 2 rows"),
        ({"input_ids": torch.ones(1, 3)}, TypeError, "float32"),
        ({"num_beams": 2}, ValueError, "num_beams is 2"),
        ({"num_return_sequences": 2, "do_sample": True}, ValueError, "one text"),
        ({"temperature": -1.0, "do_sample": True}, ValueError, "temperature"),
        ({"typical_p": 0.5, "do_sample": True}, NotImplementedError, "TypicalLogitsWarper"),
        ({"no_repeat_ngram_size": 2}, NotImplementedError, "NoRepeatNGramLogitsProcessor"),
        ({"logits_processor": LogitsProcessorList([lambda ids, scores: scores])}, NotImplementedError, "function"),
        ({"max_time": 1.0}, NotImplementedError, "MaxTimeCriteria"),
        ({"stop_strings": "x"}, NotImplementedError, "Stream.stop"),
        ({"streamer": object()}, NotImplementedError, "iterate over the pool"),
        ({"attention_mask": torch.ones(1, 3)}, NotImplementedError, "without padding"),
        ({"output_scores": True}, ValueError, "output_scores"),
        ({"prefill_chunk_size": 3}, NotImplementedError, "of the StreamPool"),
        ({"nonsense": 3}, ValueError, "nonsense"),
        ({"seed": 1.5}, TypeError, "seed"),
    ],
)
def test_bad_input_leaves_the_pool_as_it_was(model: PreTrainedModel, options: Any, kind: type, says: str) -> None:
    pool = pool_of(model)
    running = pool.add(text(5), max_new_tokens=12, do_sample=False)
    idle = pool.add(text(6), max_new_tokens=1, do_sample=False)
    for _ in range(4):
        pool.step()
    ids = options.pop("input_ids", [3])
    before = pool.counts
    with pytest.raises(kind, match=says):
        pool.add(ids, **options)
    if ids != []:
        with pytest.raises(kind, match=says):
            idle.send(ids, **options)
    with pytest.raises(RuntimeError, match="is running"):
        running.send([3])
    assert pool.counts == before
    idle.send([4], max_new_tokens=5)
    run(pool)
    reference = Alone(model)
    reference.turn(text(6), max_new_tokens=1)
    assert idle.tokens == reference.turn([4], max_new_tokens=5)
    assert running.tokens == Alone(model).turn(text(5), max_new_tokens=12)


@pytest.mark.parametrize(
    "arguments, kind, says",
    [
        ({"max_streams": 0}, ValueError, "max_streams"),
        ({"prefill_chunk_size": None}, ValueError, "prefill_chunk_size"),
        ({"keep_tokens": 0}, ValueError, "keep_tokens"),
        ({"window": 0}, ValueError, "window"),
        ({"park_to": "/no/such/folder"}, FileNotFoundError, "/no/such/folder"),
    ],
)
def test_pools_that_cannot_be(model: PreTrainedModel, arguments: dict[str, Any], kind: type, says: str) -> None:
    with pytest.raises(kind, match=says):
        StreamPool(model, **{"n_sink": 2, "window": 6, "max_streams": 2, **arguments})


@pytest.mark.parametrize(
    "model_type, says",
    [
        ("gpt2", "does not support model type"),
        ("qwen3_next", "all attention"),
        ("falcon_h1", "all attention"),  # a recurrent state beside the ring of the same layer
    ],
)
def test_models_that_cannot_be(model_type: str, says: str) -> None:
    with pytest.raises(NotImplementedError, match=says):
        StreamPool(tiny_model(model_type), n_sink=2, window=6, max_streams=2)


def test_pieces_that_are_too_long_for_the_masks_of_the_model() -> None:
    model = tiny_model("mistral")  # sliding_window = 8
    with pytest.raises(ValueError, match="prefill_chunk_size must be at most 3"):
        StreamPool(model, n_sink=2, window=4, max_streams=2, prefill_chunk_size=4)
    pool = StreamPool(model, n_sink=2, window=4, max_streams=2, prefill_chunk_size=3)
    stream = pool.add(text(17), max_new_tokens=9, do_sample=False)
    run(pool)
    assert stream.tokens == Alone(model, 2, 4, 3).turn(text(17), max_new_tokens=9)


def test_closed_streams(model: PreTrainedModel) -> None:
    pool = pool_of(model, 1)
    running, queued = pool.add(text(3), do_sample=False), pool.add(text(4), do_sample=False)
    for _ in range(3):
        pool.step()
    queued.close()
    running.close()
    running.close()
    assert not pool.is_active
    assert (running.finish_reason, queued.finish_reason) == ("closed", "closed")
    with pytest.raises(RuntimeError, match="is closed"):
        running.send([3])
    assert pool.step() == []


# --- seeds, positions, parking and interrupts between turns ---


def test_random_numbers_go_on_in_the_next_turn(model: PreTrainedModel) -> None:
    # The last number of a turn was used again by the first token of the next turn.
    pool = pool_of(model)
    at_once = pool.add(text(9), max_new_tokens=12, do_sample=True, seed=5)
    in_turns = pool.add(text(9), max_new_tokens=6, do_sample=True, seed=5)
    found = run(pool)
    in_turns.send([])
    assert found[in_turns] + run(pool)[in_turns] == found[at_once]


def test_a_turn_is_read_from_low_positions_on() -> None:
    # GPT-J has a table of positions. Before the turn, the cache may stand anywhere in it.
    model = tiny_model("gptj", max_position_embeddings=64)
    model.generation_config.eos_token_id = None
    pool = pool_of(model)
    for before in (40, 46, 52, 57):
        stream, alone = pool.add(text(3), max_new_tokens=before, do_sample=False), Alone(model)
        run(pool)
        stream.send(text(20, seed=1), max_new_tokens=5)
        run(pool)
        assert (stream.status, stream.error) == ("idle", None)
        alone.turn(text(3), max_new_tokens=before)
        assert stream.tokens == alone.turn(text(20, seed=1), max_new_tokens=5)
        stream.close()


def test_a_folder_that_cannot_be_written_to(model: PreTrainedModel, tmp_path: Path) -> None:
    # The stream that joined failed, for want of a file of the one that had to leave its row.
    folder = tmp_path / "parked"
    folder.mkdir()
    pool = pool_of(model, 1, park_to=folder)
    folder.rmdir()
    first, second = (pool.add(text(9, seed=seed), max_new_tokens=4, do_sample=False) for seed in (1, 2))
    with pytest.warns(UserWarning, match=r"cannot be written.*parked in memory"):
        run(pool)
    assert (first.status, second.status) == ("idle", "idle")
    first.send(text(2), max_new_tokens=4)
    with pytest.warns(UserWarning, match="parked in memory"):
        run(pool)
    alone = Alone(model)
    alone.turn(text(9, seed=1), max_new_tokens=4)
    assert first.tokens == alone.turn(text(2), max_new_tokens=4)


def test_made_in_inference_mode_and_run_outside_of_it(model: PreTrainedModel) -> None:
    with torch.inference_mode():
        pool = pool_of(model)
    stream = pool.add(text(9), max_new_tokens=12, do_sample=False)
    run(pool)
    assert stream.tokens == Alone(model).turn(text(9), max_new_tokens=12)


def test_an_interrupt_in_the_middle_of_reading(model: PreTrainedModel) -> None:
    # As while a graph is compiled, when an interrupt does not wait. The text was left half read, and its stream failed.
    pool = pool_of(model)
    stream = pool.add(text(4 * PIECE), max_new_tokens=4, do_sample=False)
    pool.step()
    handle = model.register_forward_pre_hook(_interrupt)
    with pytest.raises(KeyboardInterrupt):
        pool.step()
    handle.remove()
    assert stream.status == "queued"
    run(pool)
    assert stream.tokens == Alone(model).turn(text(4 * PIECE), max_new_tokens=4)


@pytest.mark.parametrize("do_sample", [False, True])
def test_an_interrupt_after_the_last_piece(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, do_sample: bool
) -> None:
    # The text counted as read without its first new token, so that the last token of the prompt was fed again.
    options = {"max_new_tokens": 6, "do_sample": do_sample, "seed": 3}
    pool = pool_of(model)
    undisturbed = pool_of(model)
    expected = undisturbed.add(text(PIECE), **options)
    run(undisturbed)
    stream = pool.add(text(PIECE), **options)
    with monkeypatch.context() as patched:
        patched.setattr("sink_cache.batch.choose" if do_sample else "torch.Tensor.argmax", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            pool.step()
    run(pool)
    assert stream.tokens == expected.tokens


def test_an_interrupt_before_the_first_piece(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    # The reader still held the text before, and the new stream went on with that.
    pool = pool_of(model)
    pool.add(text(PIECE), max_new_tokens=1)
    run(pool)
    stream = pool.add(text(9), max_new_tokens=6, do_sample=False)
    with monkeypatch.context() as patched:
        patched.setattr(pool._reader, "begin", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            pool.step()
    run(pool)
    assert stream.tokens == Alone(model).turn(text(9), max_new_tokens=6)


def _interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt
