"""The contract: what a token attends to, at which distances. Every test names the bug that it catches."""

import copy

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from sink_cache import SinkWindowCache, stream, verify

from .families import tiny_model, tokens
from .oracle import fresh_logits, relative_error, streamed_logits

TOLERANCE = 1e-5
# capacity 1; one slot that turns over at every step; no sinks; a window shorter, longer than the sinks; never full
SIZES = [(0, 1), (4, 1), (0, 5), (5, 2), (2, 9), (1, 60)]


@torch.no_grad()
def one_by_one(model: PreTrainedModel, input_ids: torch.Tensor, cache: SinkWindowCache) -> torch.Tensor:
    steps = [model(input_ids[:, t : t + 1], past_key_values=cache).logits for t in range(input_ids.shape[1])]
    return torch.cat(steps, dim=1)


@pytest.mark.parametrize("n_sink, window", SIZES)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_one_layer_sees_sinks_and_window_and_nothing_else(n_sink: int, window: int, batch_size: int) -> None:
    # 40 tokens: before, at and far past the first eviction (off by one at the moment of being full; distances doubled)
    model = tiny_model("llama", layers=1)
    input_ids = tokens(40, batch_size)
    logits = one_by_one(model, input_ids, SinkWindowCache(n_sink, window))
    assert relative_error(logits, fresh_logits(model, input_ids, n_sink, window)) <= TOLERANCE


@pytest.mark.parametrize("n_sink, window", SIZES)
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("model_type", ["llama", "gpt_neox"])
def test_deep_model_streams_exactly(model_type: str, n_sink: int, window: int, batch_size: int) -> None:
    model = tiny_model(model_type)
    input_ids = tokens(40, batch_size)
    logits = one_by_one(model, input_ids, SinkWindowCache(n_sink, window))
    assert relative_error(logits, streamed_logits(model, input_ids, n_sink, window)) <= TOLERANCE


def test_the_two_oracles_agree() -> None:
    model, input_ids = tiny_model("llama", layers=1), tokens(30)
    assert relative_error(streamed_logits(model, input_ids, 3, 5), fresh_logits(model, input_ids, 3, 5)) <= TOLERANCE


def test_the_oracle_tells_sinks_that_stay_behind(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    # If sinks that are not repositioned passed too, none of the tests above would mean anything.
    input_ids, cache = tokens(40), SinkWindowCache(3, 5)
    one_by_one(llama, input_ids[:, :1], cache)  # the model is examined before the cache is broken
    cache.reset()
    monkeypatch.setattr("sink_cache.storage.SharedStorage.rotate_sinks", lambda self, shift: None)
    assert relative_error(one_by_one(llama, input_ids, cache), streamed_logits(llama, input_ids, 3, 5)) > 1e-2


@pytest.mark.parametrize("scaling", ["linear", "llama3", "yarn"])
def test_scaled_rotary_embeddings(scaling: str) -> None:
    # YaRN's attention factor is in the keys already: applying it again lets them grow with every shift
    rope = {"rope_type": scaling, "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
    rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if scaling == "llama3" else {}
    model = tiny_model("llama", rope_parameters=rope)
    input_ids = tokens(60)
    logits = one_by_one(model, input_ids, SinkWindowCache(4, 8))
    assert relative_error(logits, streamed_logits(model, input_ids, 4, 8)) <= TOLERANCE


def test_frequencies_changed_after_loading_are_found() -> None:
    # model.bfloat16() rounds inv_freq; a rotation learned from the config alone would be silently off
    model = tiny_model("llama")
    model.model.rotary_emb.inv_freq.copy_(model.model.rotary_emb.inv_freq.bfloat16().float() * 0.9)
    input_ids = tokens(40)
    logits = one_by_one(model, input_ids, SinkWindowCache(3, 5))
    assert relative_error(logits, streamed_logits(model, input_ids, 3, 5)) <= TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_once(dtype: torch.dtype, llama: PreTrainedModel) -> None:
    # Rotating in place adds up rounding errors: after 400 evictions the sinks would be off by ten times as much.
    cache = SinkWindowCache(4, 8)
    half = copy.deepcopy(llama).to(dtype)
    one_by_one(half, tokens(400), cache)
    layer = cache.layers[1]
    exact = layer.sink_keys.double()
    rotation = layer.rotation
    frequency, partner = torch.tensor(rotation.frequency).double(), torch.tensor(rotation.partner)
    shift = 400 - 12
    expected = exact * torch.cos(shift * frequency) + exact[..., partner] * torch.sin(shift * frequency)
    error = (layer.keys[:, :, :4].double() - expected).norm() / expected.norm()
    assert error < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("prompt", [1, 4, 11, 12, 13, 40])  # capacity is 12: shorter, just full, one more, much longer
def test_generate_equals_a_loop_by_hand(llama: PreTrainedModel, prompt: int) -> None:
    input_ids = tokens(prompt, batch_size=2)
    generated = llama.generate(
        input_ids, past_key_values=SinkWindowCache(4, 8), max_new_tokens=50, do_sample=False, eos_token_id=None
    )
    cache, by_hand, new = SinkWindowCache(n_sink=4, window=8), input_ids, input_ids
    with torch.no_grad():
        for _ in range(50):
            new = llama(new, past_key_values=cache).logits[:, -1:].argmax(-1)
            by_hand = torch.cat([by_hand, new], dim=1)
    assert torch.equal(generated, by_hand)
    assert cache.get_seq_length() == prompt + 49


def test_generate_in_turns_and_in_pieces(llama: PreTrainedModel) -> None:
    # generate() slices each turn's prompt with get_seq_length(); a bounded value would feed old tokens again.
    greedy = {"do_sample": False, "eos_token_id": None}
    prompt, cache = tokens(30), SinkWindowCache(4, 8)
    first = llama.generate(prompt, past_key_values=cache, max_new_tokens=15, prefill_chunk_size=7, **greedy)
    second_prompt = torch.cat([first, tokens(9, seed=1)], dim=1)
    second = llama.generate(second_prompt, past_key_values=cache, max_new_tokens=15, **greedy)
    by_hand, fed = SinkWindowCache(4, 8), 0
    with torch.no_grad():
        for length in (7, 14, 21, 28, 30, *range(31, 45), 54, *range(55, 69)):
            logits = llama(second[:, fed:length], past_key_values=by_hand).logits[:, -1]
            if length >= 54 or 30 <= length < 45:
                assert second[0, length] == logits.argmax()
            fed = length
    assert cache.get_seq_length() == by_hand.get_seq_length() == 68


def test_equals_dynamic_cache_until_full(llama: PreTrainedModel) -> None:
    input_ids = tokens(20, batch_size=2)
    with torch.no_grad():
        for split in (1, 7, 20):
            ours, theirs = SinkWindowCache(4, 16), DynamicCache(config=llama.config)
            for part in input_ids.split(split, dim=1):
                expected = llama(part, past_key_values=theirs).logits
                assert relative_error(llama(part, past_key_values=ours).logits, expected) <= 1e-6


@torch.no_grad()
def test_a_call_with_several_tokens_sees_sinks_window_and_itself(llama: PreTrainedModel) -> None:
    # All queries of the call share the first one's distance to the sinks, and the call is dense within itself.
    n_sink, window, seen, new = 3, 6, 30, 5
    input_ids = tokens(seen + new)
    cache = SinkWindowCache(n_sink, window)
    one_by_one(llama, input_ids[:, :seen], cache)
    model = tiny_model("llama", layers=1)
    cache = SinkWindowCache(n_sink, window)
    model(input_ids[:, :seen], past_key_values=cache)
    logits = model(input_ids[:, seen:], past_key_values=cache).logits
    kept = [*range(n_sink), *range(seen - window + 1, seen + new)]
    expected = model(input_ids[:, kept], use_cache=False).logits[:, -new:]
    assert relative_error(logits, expected) <= TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("n_sink, window", [(3, 6), (0, 4), (4, 1)])
@pytest.mark.parametrize("turns", [(2, 1, 9), (30, 6, 1, 20), (9, 9, 9), (1, 40, 3)])
def test_what_is_kept_after_calls_of_any_length(n_sink: int, window: int, turns: tuple[int, ...]) -> None:
    # A second turn, a turn as long as the window, a turn that ends amid the sinks: the next token must see the right keys.
    model = tiny_model("llama", layers=1)
    input_ids = tokens(sum(turns) + 1)
    cache, seen = SinkWindowCache(n_sink, window), 0
    for turn in turns:
        model(input_ids[:, seen : seen + turn], past_key_values=cache)
        seen += turn
    logits = model(input_ids[:, seen:], past_key_values=cache).logits
    assert relative_error(logits, fresh_logits(model, input_ids, n_sink, window)[:, -1:]) <= TOLERANCE


@pytest.mark.parametrize("chunk_size", [1, 2, 7, 50])
@pytest.mark.parametrize("n_sink, window", SIZES)
def test_stream_equals_one_token_at_a_time(llama: PreTrainedModel, n_sink: int, window: int, chunk_size: int) -> None:
    input_ids = tokens(50, batch_size=2)
    cache = SinkWindowCache(n_sink, window)
    logits = torch.cat(list(stream(llama, input_ids, cache, chunk_size=chunk_size)), dim=1)
    assert relative_error(logits, streamed_logits(llama, input_ids, n_sink, window)) <= TOLERANCE


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "mistral"])
def test_stream_with_other_layers_and_masks(model_type: str, attention: str) -> None:
    # Gemma 3 mixes sliding and full layers, which need different masks; eager attention adds its mask.
    model = tiny_model(model_type)
    model.set_attn_implementation(attention)
    input_ids = tokens(40)
    cache = SinkWindowCache(2, 5)
    logits = torch.cat(list(stream(model, input_ids, cache, chunk_size=9)), dim=1)
    assert relative_error(logits, streamed_logits(model, input_ids, 2, 5)) <= TOLERANCE


def test_generate_goes_on_after_stream(llama: PreTrainedModel) -> None:
    input_ids, cache = tokens(60), SinkWindowCache(4, 8)
    for _ in stream(llama, input_ids[:, :-1], cache, chunk_size=16):
        pass
    out = llama.generate(input_ids, past_key_values=cache, max_new_tokens=20, do_sample=False, eos_token_id=None)
    cache = SinkWindowCache(4, 8)
    logits = one_by_one(llama, out[:, :-1], cache)
    assert torch.equal(out[:, 60:], logits[:, 59:].argmax(-1))


@torch.no_grad()
def test_reset_and_deepcopy(llama: PreTrainedModel) -> None:
    first, second = tokens(30), tokens(30, batch_size=3, seed=1)
    cache = SinkWindowCache(4, 8)
    expected = one_by_one(llama, first, cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    one_by_one(llama, second, cache)  # after a reset the batch size is free
    cache.reset()
    assert torch.equal(one_by_one(llama, first, cache), expected)

    for prefilled in (1, 25):  # before and after the layers share their storage
        cache.reset()
        one_by_one(llama, first[:, :prefilled], cache)
        one_by_one(llama, second[:1], copy.deepcopy(cache))  # must leave the original alone
        for continuing in (copy.deepcopy(cache), cache):
            assert torch.equal(one_by_one(llama, first[:, prefilled:], continuing), expected[:, prefilled:])


def test_inference_mode_and_no_grad_mix(llama: PreTrainedModel) -> None:
    # Tensors made in inference mode cannot be written to outside of it.
    input_ids, cache = tokens(40), SinkWindowCache(4, 8)
    with torch.inference_mode():
        llama(input_ids[:, :20], past_key_values=cache)
        llama(input_ids[:, 20:21], past_key_values=cache)
    logits = one_by_one(llama, input_ids[:, 21:], cache)
    reference = SinkWindowCache(4, 8)
    with torch.no_grad():
        llama(input_ids[:, :20], past_key_values=reference)
    assert relative_error(logits, one_by_one(llama, input_ids[:, 20:], reference)[:, 1:]) <= 1e-6


@torch.inference_mode()
def _copy_in_inference_mode(cache: SinkWindowCache) -> SinkWindowCache:
    return copy.deepcopy(cache)


def test_a_copy_made_in_inference_mode_goes_on_outside_of_it(llama: PreTrainedModel) -> None:
    cache = SinkWindowCache(4, 8)
    one_by_one(llama, tokens(20), cache)
    expected = one_by_one(llama, tokens(20, seed=1), copy.deepcopy(cache))
    assert torch.equal(one_by_one(llama, tokens(20, seed=1), _copy_in_inference_mode(cache)), expected)


def test_the_config_alone_is_enough(llama: PreTrainedModel) -> None:
    input_ids = tokens(40)
    logits = one_by_one(llama, input_ids, SinkWindowCache(3, 5, config=llama.config))
    assert torch.equal(logits, one_by_one(llama, input_ids, SinkWindowCache(3, 5)))


def test_the_callers_random_numbers_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(
        "llama", seed=5, rope_parameters={"rope_type": "default", "rope_theta": 777.0}
    )  # never seen before
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("the GPUs were seeded"))
        one_by_one(model, tokens(4), SinkWindowCache(1, 2))
    assert torch.equal(torch.rand(4), expected)


def test_nbytes_is_the_formula_and_constant(tiny_llama: PreTrainedModel) -> None:
    n_sink, window, layers, heads, head_dim, itemsize = 4, 28, 2, 1, 8, 4
    capacity = n_sink + window
    expected = 2 * layers * heads * capacity * head_dim * itemsize + layers * heads * n_sink * head_dim * itemsize
    cache = SinkWindowCache(n_sink, window)
    generator = torch.Generator().manual_seed(0)
    for total in (10, 1_000, 20_000):
        text = torch.randint(64, (1, total - cache.get_seq_length()), generator=generator)
        for _ in stream(tiny_llama, text, cache, chunk_size=512):
            pass
        assert cache.get_seq_length() == total
        assert cache.nbytes == expected
    assert "n_sink=4, window=28, seen=20000, nbytes=" in repr(cache)


@torch.no_grad()
def test_one_token_update_allocates_nothing_that_stays(llama: PreTrainedModel) -> None:
    cache = SinkWindowCache(4, 8)
    one_by_one(llama, tokens(30), cache)
    slots = [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in cache.layers]
    one_by_one(llama, tokens(30), cache)
    assert [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in cache.layers] == slots
    key_states = torch.randn_like(cache.layers[0].keys[:, :, :1])
    keys, values = cache.layers[0].update(key_states, key_states)
    assert (keys.data_ptr(), values.data_ptr()) == slots[0]


def test_verify(llama: PreTrainedModel) -> None:
    assert verify(llama) <= TOLERANCE
    assert verify(copy.deepcopy(llama).bfloat16(), n_sink=2, window=5, tokens=20) < 0.1
    assert not llama.training
