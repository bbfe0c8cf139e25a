"""Rows of different lengths: in one graph, over several turns, and from one cache to another. Each row is judged alone."""

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from sink_cache import SinkWindowCache, endless
from sink_cache.cache import stack_of
from sink_cache.rows import copy_row

from .families import tiny_model
from .oracle import relative_error, streamed_logits
from .test_exact import TOLERANCE, one_by_one, tokens
from .test_generate import PLAIN, WITH_LOGITS, alone, left_padded, texts
from .test_static import COMPILED_LAYERS, compiling

pytestmark = pytest.mark.usefixtures("_fresh_compiler")
N_SINK, WINDOW = 2, 6
LENGTHS = (9, 1, 4)  # longer than the cache; amid its sinks; in between


@pytest.fixture
def _fresh_compiler() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


@pytest.mark.parametrize(
    "model_type, attention",
    [("llama", "sdpa"), ("gpt_neox", "sdpa"), ("gemma3_text", "sdpa"), ("gemma3_text", "eager")],
)
def test_padded_rows_share_one_graph(model_type: str, attention: str) -> None:
    # Rows fill up and evict at different times. What is read on the host would be compiled anew when it changes.
    model, rows = tiny_model(model_type, layers=COMPILED_LAYERS), texts(*LENGTHS)
    model.set_attn_implementation(attention)
    cache = SinkWindowCache(N_SINK, WINDOW, compileable=True)
    out = model.generate(
        **left_padded(rows), past_key_values=cache, max_new_tokens=25, compile_config=compiling("aot_eager"),
        **PLAIN | WITH_LOGITS,
    )  # fmt: skip
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    for i, row in enumerate(rows):
        expected = alone(model, [row], out.sequences[i : i + 1, max(LENGTHS) :], N_SINK, WINDOW)
        assert relative_error(torch.stack(out.logits, dim=1)[i : i + 1], expected) <= TOLERANCE


def conversation(
    model: PreTrainedModel, turns: list[dict[str, torch.Tensor]], cache: SinkWindowCache, new: int, **more: Any
) -> list[torch.Tensor]:
    """The answers `[rows, new]` of `endless` to these turns. Turns after the first begin with the last token of an answer."""
    answers = []
    for turn in turns:
        inputs = dict(turn)
        if answers:
            last, mask = answers[-1][:, -1:], inputs["attention_mask"]
            # Padding comes first, then the token that has not been fed, then the turn.
            pads = (mask == 0).sum(1)
            ids = torch.cat([torch.zeros_like(last), inputs["input_ids"]], dim=1)
            ids[torch.arange(len(ids)), pads] = last[:, 0]
            inputs = {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) >= pads[:, None]).long()}
        out = model.generate(
            **inputs, past_key_values=cache, custom_generate=endless, max_new_tokens=new, keep_tokens=99,
            **PLAIN, **more,
        )  # fmt: skip
        answers.append(out[:, -new:])
    return answers


@pytest.mark.parametrize("compileable, compiles", [(False, False), (True, False), (True, True)])
def test_endless_goes_on_with_rows_of_different_lengths(
    llama: PreTrainedModel, compileable: bool, compiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A row's new tokens after padding in the middle of its text; rows that rebase by different numbers.
    monkeypatch.setattr("sink_cache.steps._REBASE_EVERY", 7)
    lengths = [LENGTHS, (2, 5, 1), (1, 1, 6)]
    turns = [[tokens(n, seed=10 * i + j) for j, n in enumerate(turn)] for i, turn in enumerate(lengths)]
    more = {"compile_config": compiling("aot_eager")} if compiles else {}
    cache = SinkWindowCache(N_SINK, WINDOW, compileable=compileable)
    together = conversation(llama, [left_padded(turn) for turn in turns], cache, 15, **more)
    if compiles:
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2  # rows not full, and rows all full
    for j in range(3):
        one = SinkWindowCache(N_SINK, WINDOW)
        by_itself = conversation(llama, [left_padded([turn[j]]) for turn in turns], one, 15)
        for answer, expected in zip(together, by_itself, strict=True):
            assert torch.equal(answer[j : j + 1], expected)
    assert int(cache.next_position_ids().max()) <= N_SINK + 2 * WINDOW + 9 + 8  # bounded for each row


def test_rows_of_different_lengths_read_in_pieces(llama: PreTrainedModel) -> None:
    # A piece may be all padding of one row, and begin with that of another. Nothing is evicted, so pieces see what a turn sees.
    turns = [left_padded([tokens(n, seed=j) for j, n in enumerate(lengths)]) for lengths in ((9, 1, 4), (2, 8, 1))]
    answers = [
        conversation(llama, turns, SinkWindowCache(4, 60, compileable=compileable), 5, prefill_chunk_size=chunk)
        for compileable, chunk in ((False, None), (False, 3), (True, 3))
    ]
    assert all(torch.equal(*pair) for other in answers[1:] for pair in zip(answers[0], other, strict=True))


def test_rows_of_different_lengths_where_other_layers_would_take_in_padding() -> None:
    model, cache = tiny_model("gemma3_text"), SinkWindowCache(N_SINK, WINDOW)
    turns = [left_padded(texts(9, 4)), left_padded(texts(2, 5))]
    with pytest.raises(NotImplementedError, match="compileable=True makes layers that can"):
        conversation(model, turns, cache, 3)


@torch.no_grad()
@pytest.mark.parametrize("n_sink, window", [(2, 6), (4, 12)])  # as many slots as the sliding layers have, and others
def test_sliding_layers_of_rows_of_different_lengths(n_sink: int, window: int) -> None:
    # A query that sees cached or new tokens beyond the sliding window; one mask for both kinds of layer.
    model, first, second = tiny_model("gemma3_text"), tokens(9, 2), tokens(11, 2, seed=1)
    together = SinkWindowCache(n_sink, window, compileable=True)
    model(first, past_key_values=together)
    padded = torch.cat([second[:1], torch.cat([tokens(2, seed=2), second[1:, :9]], dim=1)])
    positions = 9 + (torch.arange(11) - torch.tensor([[0], [2]])).clamp(min=0)
    with stack_of(together).rows_of_any_length((0, 2)):
        logits = model(padded, position_ids=positions, past_key_values=together).logits[:, -1]
    for row, length in enumerate((11, 9)):
        alone = SinkWindowCache(n_sink, window)
        model(first[row : row + 1], past_key_values=alone)
        expected = model(second[row : row + 1, :length], past_key_values=alone).logits[:, -1]
        assert relative_error(logits[row : row + 1], expected) <= TOLERANCE


@pytest.mark.parametrize("compileable", [False, True])
@pytest.mark.parametrize("chunk", [None, 1])
def test_rows_amid_their_sinks_in_a_padded_turn(llama: PreTrainedModel, compileable: bool, chunk: int | None) -> None:
    # Padding that counts as a token: sinks that are never kept, positions that run ahead.
    turns = [[tokens(n, seed=10 * i + j) for j, n in enumerate(turn)] for i, turn in enumerate([(9, 1), (9, 1)])]
    size, new = {"prefill_chunk_size": chunk}, 40
    cache = SinkWindowCache(6, 6, compileable=compileable)
    together = conversation(llama, [left_padded(turn) for turn in turns], cache, 1, **size)
    together += conversation(llama, [{"input_ids": answer_to(together)}], cache, new)
    for j in range(2):
        one = SinkWindowCache(6, 6)
        by_itself = conversation(llama, [left_padded([turn[j]]) for turn in turns], one, 1, **size)
        by_itself += conversation(llama, [{"input_ids": answer_to(by_itself)}], one, new)
        for answer, expected in zip(together, by_itself, strict=True):
            assert torch.equal(answer[j : j + 1], expected)
        ahead = int(cache.next_position_ids()[j]) - int(one.next_position_ids())
        assert ahead % cache.window == 0  # by whole windows, as rebases come at other times


def answer_to(answers: list[torch.Tensor]) -> torch.Tensor:
    return answers[-1][:, -1:]


def test_padded_turns_of_a_model_that_counts_keys_are_refused() -> None:
    model, cache = tiny_model("mpt"), SinkWindowCache(2, 10)
    with torch.no_grad():
        model(tokens(5, 2), past_key_values=cache)
        with (
            pytest.raises(NotImplementedError, match="it would count the padding"),
            stack_of(cache).rows_of_any_length((0, 4)),
        ):
            pass


@pytest.mark.parametrize("compileable", [False, True])
def test_the_padding_of_a_refused_first_call_is_forgotten(llama: PreTrainedModel, compileable: bool) -> None:
    cache, text = SinkWindowCache(N_SINK, WINDOW, compileable=compileable), tokens(20, 2)
    with pytest.raises(NotImplementedError, match="inference only"):
        llama(**left_padded(texts(6, 3, 5)), past_key_values=cache)
    logits = one_by_one(llama, text, cache)
    assert relative_error(logits, streamed_logits(llama, text, N_SINK, WINDOW)) <= TOLERANCE
    cache = SinkWindowCache(N_SINK, WINDOW, compileable=compileable)
    with pytest.raises(NotImplementedError, match="inference only"):
        llama(**left_padded(texts(6, 3, 5)), past_key_values=cache)
    with torch.no_grad():
        found = llama(**left_padded(texts(4, 6)), past_key_values=cache).logits
    assert relative_error(found[1:], llama(texts(4, 6)[1]).logits) <= TOLERANCE


def test_recording_padded_rows_is_refused(llama: PreTrainedModel) -> None:
    cache = SinkWindowCache(N_SINK, WINDOW)
    with torch.no_grad():
        llama(**left_padded(texts(12, 9)), past_key_values=cache)
        cache.activate_past_recording()
        with pytest.raises(NotImplementedError, match="do not support padded batches"):
            llama(tokens(1, 2), past_key_values=cache)
    assert cache.get_seq_length() == 12


@torch.no_grad()
@pytest.mark.parametrize("compileable", [False, True])
@pytest.mark.parametrize("seen, others", [(3, 20), (20, 3), (40, 11), (1, 9)])
def test_a_row_goes_on_in_another_cache(llama: PreTrainedModel, compileable: bool, seen: int, others: int) -> None:
    # Sinks, window and position of a row that is longer or shorter than those that it joins; also after a rebase.
    source = SinkWindowCache(N_SINK, WINDOW, compileable=compileable)
    target = SinkWindowCache(N_SINK, WINDOW, compileable=compileable)
    stream, strangers = tokens(seen + 12, 2, seed=1), tokens(others + 12, 3, seed=2)
    one_by_one(llama, stream[:, :seen], source)
    one_by_one(llama, strangers[:, :others], target)
    source.rebase()
    addresses = [tensor.data_ptr() for layer in target.layers for tensor in layer.tensors().values()]
    left_alone = copy.deepcopy(source)
    copy_row(source, 1, target, 2)
    assert addresses == [tensor.data_ptr() for layer in target.layers for tensor in layer.tensors().values()]
    logits = []
    for t in range(12):
        new = strangers[:, others + t : others + t + 1].clone()
        new[2] = stream[1, seen + t]
        with (
            nullcontext() if compileable else stack_of(target).rows_of_any_length()
        ):  # no padding mask says that a row is longer than others
            logits.append(llama(new, position_ids=target.next_position_ids(), past_key_values=target).logits)
        if t == 8:
            target.rebase()
    for row, text, length in ((0, strangers[:1], others), (2, stream[1:], seen)):
        expected = streamed_logits(llama, text, N_SINK, WINDOW)[:, length:]
        assert relative_error(torch.cat(logits, dim=1)[row : row + 1], expected) <= TOLERANCE
    assert left_alone.get_seq_length() == source.get_seq_length() == seen


@torch.no_grad()
def test_rows_that_cannot_be_copied(llama: PreTrainedModel) -> None:
    cache, other, wider = SinkWindowCache(2, 6), SinkWindowCache(2, 6), SinkWindowCache(2, 7)
    with pytest.raises(ValueError, match="one of these has not been used yet"):
        copy_row(cache, 0, other, 0)
    for one in (cache, other, wider):
        one_by_one(llama, tokens(4, 2), one)
    with pytest.raises(IndexError, match="the rows 0 to 1"):
        copy_row(cache, 2, other, 0)
    with pytest.raises(ValueError, match="the same n_sink and window"):
        copy_row(cache, 0, wider, 0)
    sliding = [SinkWindowCache(2, 6), SinkWindowCache(2, 6)]
    for one in sliding:
        one_by_one(tiny_model("gemma3_text"), tokens(4, 2), one)
    with pytest.raises(NotImplementedError, match="other than full attention"):
        copy_row(sliding[0], 0, sliding[1], 0)
    recurrent = [SinkWindowCache(2, 6), SinkWindowCache(2, 6)]
    for one in recurrent:
        one_by_one(tiny_model("falcon_h1"), tokens(4, 2), one)
    with pytest.raises(NotImplementedError, match="other than full attention"):
        copy_row(recurrent[0], 0, recurrent[1], 0)  # which would leave the states beside the rings behind
    other.activate_past_recording()
    with pytest.raises(NotImplementedError, match="while a cache records"):
        copy_row(cache, 0, other, 0)
