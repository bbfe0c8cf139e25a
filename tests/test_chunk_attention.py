"""Exact chunks whose sinks attention merges: they give what copies of the sinks give, and only plain attention does it."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, GPTJForCausalLM, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import sink_cache.layers
from sink_cache import SinkWindowCache, model_scheme, stream, verify
from sink_cache.cache import error_of
from sink_cache.chunk_attention import merge_sinks, window_attention
from sink_cache.layers import RingLayer
from sink_cache.rotary import ForwardRotation, Rotation, rotate

from .families import tiny_model, tokens
from .oracle import relative_error, streamed_logits
from .test_exact import TOLERANCE, one_by_one


@contextmanager
def roads_taken(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """By which roads chunks that evict tokens are read: "merged" or "copied"."""
    roads: set[str] = set()

    def noting(name: str, road: str) -> Any:
        method = getattr(RingLayer, name)
        return lambda *args: (roads.add(road), method(*args))[1]

    with monkeypatch.context() as patch:
        patch.setattr(RingLayer, "_window_beside_sinks", noting("_window_beside_sinks", "merged"))
        patch.setattr(RingLayer, "_with_sinks_per_query", noting("_with_sinks_per_query", "copied"))
        yield roads


def attends_plainly(model: PreTrainedModel) -> bool:
    return model_scheme.attends_plainly(model, error_of)


def read(model: PreTrainedModel, input_ids: torch.Tensor, cache: SinkWindowCache, chunk_size: int) -> torch.Tensor:
    return torch.cat(list(stream(model, input_ids, cache, chunk_size=chunk_size)), dim=1)


MERGED = ["llama", "qwen2", "mistral", "gpt_neox", "gemma3_text", "llama4_text", "gemma3n_text"]
# A softcap, learned sinks (both eager), latents instead of keys, and attention that is not looked up.
COPIED = ["gemma2", "gpt_oss", "deepseek_v2", "falcon"]
(MERGED if GPTJForCausalLM._supports_sdpa else COPIED).append("gptj")  # from transformers 5.24 on


@pytest.mark.parametrize("model_type, road", [*((m, "merged") for m in MERGED), *((m, "copied") for m in COPIED)])
def test_each_kind_of_attention_takes_its_road_and_is_exact(
    model_type: str, road: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, input_ids = tiny_model(model_type), tokens(30, batch_size=2)
    if model_type == "gemma3n_text":  # reads chunks otherwise than steps, in float32 by up to 1.4e-5 with a dense cache
        model = copy.deepcopy(model).double()
    one_by_one(model, input_ids[:, :1], SinkWindowCache(2, 4))  # the twin takes roads, too
    assert attends_plainly(model) == (road == "merged")
    with roads_taken(monkeypatch) as roads:
        logits = read(model, input_ids, SinkWindowCache(2, 4), chunk_size=7)
    assert roads == {road}
    assert relative_error(logits, streamed_logits(model, input_ids, 2, 4)) <= TOLERANCE


@pytest.mark.parametrize("compileable", [False, True])
@pytest.mark.parametrize("n_sink", [0, 1, 4])
@pytest.mark.parametrize("chunk_size", [2, 5, 6, 7, 17])  # the window is 6, the largest capacity 10
def test_chunks_of_any_size(
    llama: PreTrainedModel, n_sink: int, chunk_size: int, compileable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Sinks amid the first chunk, a window that begins in the cache, in the chunk, or exactly between them.
    input_ids = tokens(40, batch_size=2)
    with roads_taken(monkeypatch) as roads:
        logits = read(llama, input_ids, SinkWindowCache(n_sink, 6, compileable=compileable), chunk_size)
    assert roads == {"merged"}
    assert relative_error(logits, streamed_logits(llama, input_ids, n_sink, 6)) <= TOLERANCE


# Amid the sinks, just these, almost full, full, long since full
@pytest.mark.parametrize("first", [1, 3, 4, 9, 10, 25])
def test_a_prefix_then_a_chunk_then_a_second_turn(llama: PreTrainedModel, first: int) -> None:
    input_ids, cache = tokens(70), SinkWindowCache(4, 6)
    expected = streamed_logits(llama, input_ids, 4, 6)
    logits = [one_by_one(llama, input_ids[:, :first], cache), read(llama, input_ids[:, first:45], cache, 33)]
    logits += [one_by_one(llama, input_ids[:, 45:50], cache), read(llama, input_ids[:, 50:], cache, 9)]
    assert relative_error(torch.cat(logits, dim=1), expected) <= TOLERANCE


def test_half_precision_is_as_good_as_with_copies(llama: PreTrainedModel) -> None:
    half, input_ids = copy.deepcopy(llama).bfloat16(), tokens(400)
    half.model.rotary_emb = llama.model.rotary_emb
    exact = streamed_logits(copy.deepcopy(half).float(), input_ids, 4, 12)
    half.train()  # so that the sinks are copied; there is no dropout
    assert not attends_plainly(half)
    copied = read(half, input_ids, SinkWindowCache(4, 12), 64) - exact
    half.eval()
    assert attends_plainly(half)
    merged = read(half, input_ids, SinkWindowCache(4, 12), 64) - exact
    assert merged.pow(2).mean() <= 1.1 * copied.pow(2).mean()


def test_attention_that_cannot_be_known_takes_copies(llama: PreTrainedModel) -> None:
    assert attends_plainly(llama)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not attends_plainly(llama)
    model = copy.deepcopy(llama)
    model.set_attn_implementation("eager")
    assert not attends_plainly(model)
    model.set_attn_implementation("sdpa")
    assert attends_plainly(model)
    # Whatever this hook may do, verify() sees single tokens only.
    model.model.layers[1].self_attn.register_forward_hook(lambda *_: None)
    verify(model)
    assert not attends_plainly(model)


def test_another_function_registered_as_sdpa_takes_copies(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def doubled(*args: Any, **kwargs: Any) -> Any:
        output, weights = sdpa_attention_forward(*args, **kwargs)
        return 2 * output, weights

    input_ids, before = tokens(30), AttentionInterface()["sdpa"]
    AttentionInterface.register("sdpa", doubled)
    try:
        with roads_taken(monkeypatch) as roads:
            logits = read(llama, input_ids, SinkWindowCache(2, 4), 7)
        expected = streamed_logits(llama, input_ids, 2, 4)
    finally:
        AttentionInterface.register("sdpa", before)
    assert roads == {"copied"}
    assert relative_error(logits, expected) <= TOLERANCE
    assert attends_plainly(llama)


@pytest.mark.parametrize("model_type", COPIED)
def test_sinks_that_attention_has_not_merged_are_noticed(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Should a model get here that is not plain, its logits must never be seen.
    monkeypatch.setattr("sink_cache.streaming.attends_plainly", lambda *_: True)
    model, cache = tiny_model(model_type), SinkWindowCache(2, 4)
    with pytest.raises(NotImplementedError, match="have not seen the sinks"):
        next(stream(model, tokens(9), cache, chunk_size=9))
    with torch.no_grad(), pytest.raises(ValueError, match=r"interrupted. Call reset\(\)"):
        model(tokens(1), past_key_values=cache)
    cache.reset()
    monkeypatch.undo()
    logits = read(model, tokens(20), cache, 9)
    assert relative_error(logits, streamed_logits(model, tokens(20), 2, 4)) <= TOLERANCE


def test_a_wrong_merge_does_not_pass_the_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    # The proof must be able to fail: here the window is one token too short.
    class Short(sink_cache.layers.ExactChunk):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.window -= 1

    monkeypatch.setattr("sink_cache.twin._remembered", {})
    monkeypatch.setattr("sink_cache.layers.ExactChunk", Short)
    assert not attends_plainly(tiny_model("llama"))


@pytest.mark.parametrize("queries, before, window", [(1, 0, 1), (5, 3, 4), (130, 9, 10), (300, 64, 65), (200, 0, 500)])
def test_window_attention_is_a_softmax_over_the_window(queries: int, before: int, window: int) -> None:
    # More queries than a block has, fewer keys than a window
    torch.manual_seed(0)
    query = torch.randn(2, 6, queries, 8)
    keys, values = torch.randn(2, 3, before + queries, 8), torch.randn(2, 3, before + queries, 4)
    output, total = window_attention(query, keys, values, window, 0.5)
    position, token = torch.arange(before, before + queries)[:, None], torch.arange(before + queries)
    scores = 0.5 * query @ keys.repeat_interleave(2, dim=1).transpose(2, 3)
    scores = scores.masked_fill((token > position) | (token <= position - window), -torch.inf)
    expected = (scores.softmax(dim=-1) @ values.repeat_interleave(2, dim=1)).transpose(1, 2)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(total, scores.logsumexp(dim=-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", [0, 2, 5, 9000])
def test_sinks_are_merged_at_each_querys_own_distance(count: int) -> None:
    n_sink, capacity, queries = 3, 8, 6
    rotation = Rotation((1, 0, 3, 2, 4), (-1.0, 1.0, -0.01, 0.01, 0.0))  # of which one dimension does not turn
    torch.manual_seed(count)
    query, values = torch.randn(2, 4, queries, 5), torch.randn(2, 2, n_sink, 5)
    keys, windowed = torch.randn(2, 2, n_sink, 5), torch.randn(2, queries, 4, 5)
    window_total = torch.randn(2, 4, queries)
    turns = ForwardRotation([rotation], torch.device("cpu")).turns(keys, count + 1 - capacity, queries)
    merged = merge_sinks(query, turns[0], values, turns[1], windowed, window_total, 0.5, count)
    for i in range(queries):
        seen = slice(0, min(n_sink, count + i + 1))
        moved = rotate(keys[:, :, seen], rotation, max(0, count + i + 1 - capacity)).repeat_interleave(2, dim=1)
        scores = 0.5 * (moved @ query[:, :, i, :, None])[..., 0]
        scores = torch.cat([scores, window_total[:, :, i, None]], dim=-1)
        seen_values = values[:, :, seen].repeat_interleave(2, dim=1)
        shown = torch.cat([seen_values, windowed[:, i, :, None]], dim=2)
        expected = (scores.softmax(dim=-1)[:, :, None] @ shown)[:, :, 0]
        torch.testing.assert_close(merged[:, i], expected, rtol=1e-4, atol=1e-5)


def test_a_compiled_model_merges_too(llama: PreTrainedModel) -> None:
    compiled, input_ids = copy.deepcopy(llama), tokens(40)
    for layer in compiled.model.layers:
        layer.compile(backend="eager")
    logits = read(compiled, input_ids, SinkWindowCache(2, 4), 4)
    assert relative_error(logits, streamed_logits(llama, input_ids, 2, 4)) <= TOLERANCE


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernels need a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch_size, head_dim, n_sink, count", [(1, 128, 4, 5000), (3, 96, 1, 3), (2, 64, 5, 0)])
def test_the_kernels_give_what_plain_operations_give(
    dtype: torch.dtype, batch_size: int, head_dim: int, n_sink: int, count: int
) -> None:
    torch.manual_seed(0)
    half, window, queries = head_dim // 2, 200, 300
    slow = tuple(10000 ** (-i / half) for i in range(half))
    rotation = Rotation((*range(half, head_dim), *range(half)), (*(-f for f in slow), *slow))
    forward = ForwardRotation([rotation], torch.device("cuda"))
    cached = min(count, window - 1)

    def states(heads: int, length: int) -> torch.Tensor:
        return torch.randn(batch_size, length, heads, head_dim, dtype=dtype, device="cuda").transpose(1, 2)

    query, sink_keys, sink_values = states(8, queries), states(2, n_sink), states(2, n_sink)
    length = cached + queries - max(0, n_sink - count)
    keys, values = states(2, length), states(2, length)
    outputs = []
    for kind in (dtype, torch.float32):
        chunk = sink_cache.layers.ExactChunk(sink_keys.to(kind), sink_values.to(kind), forward, count, window, set())
        outputs.append(chunk.attend(query.to(kind), keys.to(kind), values.to(kind), head_dim**-0.5))
    torch.testing.assert_close(outputs[0].float(), outputs[1], rtol=0, atol=4 * torch.finfo(dtype).eps)
