"""Bad input and what is not supported: an error at once that says what was given and what to do, and nothing half-changed."""

import copy
import gc
import pickle
import re
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AttentionInterface,
    DynamicCache,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    LogitsProcessor,
    PreTrainedModel,
)
from transformers.cache_utils import DynamicSlidingWindowLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from sink_cache import SinkWindowCache, stream, verify
from sink_cache.cache import stack_of

from .families import PLAIN, cache_name, tiny_model
from .oracle import relative_error, streamed_logits
from .test_exact import one_by_one, tokens

OTHER_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}}


@pytest.mark.parametrize(
    "arguments, error, says",
    [
        ((-1, 8), ValueError, "n_sink must be at least 0, but is -1"),
        ((4, 0), ValueError, "window must be at least 1, but is 0"),
        ((4, -3), ValueError, "window must be at least 1, but is -3"),
        ((4.0, 8), TypeError, "n_sink must be an integer, but is 4.0 of type float"),
        ((4, "8"), TypeError, "window must be an integer, but is '8' of type str"),
        ((True, 8), TypeError, "n_sink must be an integer, but is True of type bool"),
        ((4, None), TypeError, "window must be an integer, but is None"),
        ((4, 8, "llama"), TypeError, "config must be a model's config (model.config), but is a str"),
        ((4, 8, GPT2Config(n_layer=2)), NotImplementedError, "model type 'gpt2'"),
    ],
)
def test_constructor(arguments: tuple[Any, ...], error: type[Exception], says: str) -> None:
    n_sink, window, *config = arguments
    with pytest.raises(error, match=re.escape(says)):
        SinkWindowCache(n_sink, window, **({"config": config[0]} if config else {}))


def _used(model: PreTrainedModel) -> SinkWindowCache:
    cache = SinkWindowCache(4, 8)
    one_by_one(model, tokens(20), cache)
    return cache


def _with_grad(model: PreTrainedModel, cache: SinkWindowCache) -> None:
    with torch.enable_grad():
        model(tokens(1), past_key_values=cache)


def _after(seen: int) -> Callable[[PreTrainedModel, SinkWindowCache], None]:
    def use(model: PreTrainedModel, cache: SinkWindowCache) -> None:
        state = cache.layers[0].state
        before, state.fed = state.fed, seen
        try:
            model(tokens(1), past_key_values=cache)
        finally:
            state.fed = before

    return use


def _padded(batch: list[list[int]]) -> Callable[[PreTrainedModel, SinkWindowCache], None]:
    def use(model: PreTrainedModel, cache: SinkWindowCache) -> None:
        mask = torch.tensor(batch)
        model(tokens(1), past_key_values=cache, attention_mask=mask)

    return use


@pytest.mark.parametrize(
    "misuse, error, says",
    [
        (lambda m, c: m(tokens(1, batch_size=2), past_key_values=c), ValueError, "batch size of the keys is 2"),
        (
            lambda m, c: copy.deepcopy(m).double()(tokens(1), past_key_values=c),
            ValueError,
            "dtype of the keys is torch.float64",
        ),
        (
            lambda m, c: tiny_model("llama", num_key_value_heads=1)(tokens(1), past_key_values=c),
            ValueError,
            "number of key-value heads of the keys is 1",
        ),
        (
            lambda m, c: tiny_model("llama", head_dim=8)(tokens(1), past_key_values=c),
            ValueError,
            "head_dim of the keys is 8",
        ),
        (
            lambda m, c: c.update(torch.zeros(1, 2, 1, 16, device="meta"), torch.zeros(1, 2, 1, 16, device="meta"), 0),
            ValueError,
            "device of the keys is meta",
        ),
        (
            lambda m, c: m(tokens(1), past_key_values=c, position_ids=torch.arange(21)[None]),
            ValueError,
            "21 keys of 1 new tokens: position_ids must have one position for each",
        ),
        (_with_grad, NotImplementedError, "torch.no_grad()"),
        (_after(2**24), ValueError, "16,777,216 positions"),
        (_padded([[1]]), ValueError, "attention_mask covers 1 of the 21 tokens"),
        (_padded([[0] + [1] * 20]), ValueError, "begins with 1 zeros in row 0, but began with 0"),
        (_padded([[1] * 20 + [0]]), NotImplementedError, "left padding only"),
        (_padded([[1] * 5 + [0] + [1] * 15]), NotImplementedError, "Set tokenizer.padding_side = 'left'"),
        (lambda m, c: c.crop(-1), ValueError, "crop(-1) cannot bring back tokens that were evicted meanwhile"),
        (lambda m, c: c.crop(-21), ValueError, "crop(-21) takes back more than the 20 tokens that there are"),
        (lambda m, c: c.crop(1), ValueError, "minus the number of tokens to take back, but got 1"),
        (lambda m, c: c.batch_select_indices(torch.tensor([1])), IndexError, "index 1"),
        (lambda m, c: c.offload(0), NotImplementedError, "offloading"),
        (lambda m, c: c.prefetch(0), NotImplementedError, "offloading"),
        (
            lambda m, c: next(stream(m, tokens(3), c, chunk_size=0)),
            ValueError,
            "chunk_size must be at least 1, but is 0",
        ),
    ],
)
def test_misuse_leaves_the_cache_usable(llama: PreTrainedModel, misuse: Any, error: type[Exception], says: str) -> None:
    cache = _used(llama)
    expected = one_by_one(llama, tokens(20), copy.deepcopy(cache))
    with torch.no_grad(), pytest.raises(error, match=re.escape(says)):
        misuse(llama, cache)
    assert cache.get_seq_length() == 20
    assert torch.equal(one_by_one(llama, tokens(20), cache), expected)


# Padding and rolling back that cannot be right: (n_sink, window), what leads there, the misuse, what it says.
def _pads_in(model: PreTrainedModel, cache: SinkWindowCache) -> None:
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1, :3] = 0
    model(tokens(6, batch_size=2), attention_mask=mask, past_key_values=cache)


def _next(mask: list[list[int]] | None) -> Callable[[PreTrainedModel, SinkWindowCache], None]:
    def use(model: PreTrainedModel, cache: SinkWindowCache) -> None:
        given = None if mask is None else torch.tensor(mask)
        model(tokens(1, batch_size=2), attention_mask=given, past_key_values=cache)

    return use


@pytest.mark.parametrize(
    "misuse, error, says",
    [
        (_next(None), ValueError, "every call needs the attention_mask of the whole text"),
        (_next([[1] * 7] * 2), ValueError, "begins with 0 zeros in row 1, but began with 3"),
        (_next([[1], [1]]), ValueError, "begins with 0 zeros in row 1, but began with 3"),
        (_next([[1] * 7, [0] * 4 + [1] * 3]), ValueError, "begins with 4 zeros in row 1, but began with 3"),
        (lambda m, c: c.crop(-1), NotImplementedError, "crop of padded batches"),
        (lambda m, c: next(stream(m, tokens(9, batch_size=2), c)), ValueError, "attention_mask of the whole text"),
    ],
)
def test_misuse_of_a_padded_cache(llama: PreTrainedModel, misuse: Any, error: type[Exception], says: str) -> None:
    cache = SinkWindowCache(4, 8)
    with torch.no_grad():
        _pads_in(llama, cache)
        with pytest.raises(error, match=re.escape(says)):
            misuse(llama, cache)
    assert cache.get_seq_length() == 6
    assert not cache.is_croppable


def test_padding_where_it_is_not_supported(llama: PreTrainedModel) -> None:
    for compileable in (False, True):
        cache = SinkWindowCache(4, 8, compileable=compileable)
        says = re.escape("stream() and assisted decoding do not support padded batches")
        with torch.no_grad(), stack_of(cache).exact_chunks(), pytest.raises(NotImplementedError, match=says):
            _pads_in(llama, cache)
        assert cache.get_seq_length() == 0


def test_recording_where_it_is_not_possible(llama: PreTrainedModel) -> None:
    cache = SinkWindowCache(4, 8)
    with pytest.raises(ValueError, match=r"needs a model: pass SinkWindowCache\(\.\.\., config=model\.config\)"):
        cache.activate_past_recording()
    cache = SinkWindowCache(4, 8, compileable=True)
    one_by_one(llama, tokens(3), cache)
    assert not cache.is_croppable
    for use in (cache.activate_past_recording, lambda: cache.crop(-1)):
        with pytest.raises(NotImplementedError, match="compileable=True"):
            use()
    with pytest.raises(NotImplementedError, match="assisted decoding with compileable=True"):
        llama.generate(
            tokens(3), past_key_values=SinkWindowCache(4, 8, compileable=True), prompt_lookup_num_tokens=2,
            max_new_tokens=5,
        )  # fmt: skip
    assert cache.get_seq_length() == 3


def test_rebase_where_it_is_not_possible(llama: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="needs a cache that a model has used"):
        SinkWindowCache(4, 8).rebase()
    cache = _used(llama)
    assert cache.rebase() == 8
    with (
        torch.no_grad(),
        pytest.raises(NotImplementedError, match=re.escape("after rebase(), use next_position_ids()")),
    ):
        llama(tokens(1), past_key_values=cache)
    assert cache.get_seq_length() == 20


def test_a_first_call_longer_than_the_trained_context_warns() -> None:
    model = tiny_model("llama", max_position_embeddings=16)
    with torch.no_grad(), pytest.warns(UserWarning, match=r"17 tokens.*16 positions.*prefill_chunk_size"):
        model(tokens(17), past_key_values=SinkWindowCache(2, 3))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        model(tokens(16), **{cache_name(model): SinkWindowCache(2, 3)})
        for _ in stream(model, tokens(40), SinkWindowCache(2, 3), chunk_size=40):
            pass  # no token sees more than the cache holds


@pytest.mark.parametrize(
    "model_type, reason",
    [
        ("gpt2", "positions are learned"),
        ("glm_moe_dsa", "its sparse attention looks keys up in an index of every token"),
    ],
)
def test_models_are_refused_with_name_reason_and_way_out(model_type: str, reason: str) -> None:
    model, cache = tiny_model(model_type), SinkWindowCache(4, 8)
    for use in (lambda: model(tokens(3), past_key_values=cache), lambda: verify(model)):
        with torch.no_grad(), pytest.raises(NotImplementedError) as refusal:
            use()
        assert all(part in str(refusal.value) for part in (repr(model_type), reason, "Use DynamicCache"))


def test_generate_without_use_cache_is_refused_and_nothing_is_remembered() -> None:
    # MPT's own default. The model must not be taken for one that cannot stream, now or with use_cache=True.
    model = tiny_model("mpt")
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    with pytest.raises(ValueError, match="pass use_cache=True"):
        model.generate(tokens(5), past_key_values=SinkWindowCache(2, 5), **options)
    out = model.generate(tokens(5), past_key_values=SinkWindowCache(2, 5), use_cache=True, **options)
    assert torch.equal(out[:, 5:], streamed_logits(model, out, 2, 5)[:, 4:-1].argmax(-1))


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_frequencies_that_depend_on_the_length_are_refused(rope_type: str) -> None:
    rope = {"rope_type": rope_type, "rope_theta": 1e4, "factor": 4.0}
    if rope_type == "longrope":
        rope |= {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "original_max_position_embeddings": 64}
    model = tiny_model("llama", max_position_embeddings=512, rope_parameters=rope)
    with (
        torch.no_grad(),
        pytest.raises(NotImplementedError, match=rf"no rotation of constant frequency.*'{rope_type}'"),
    ):
        model(tokens(3), past_key_values=SinkWindowCache(4, 8))


def test_alibi_is_refused_although_it_looks_like_no_positions() -> None:
    # Falcon with ALiBi takes position_ids and leaves its keys unrotated, as a model without positions would.
    model = tiny_model("falcon", alibi=True)
    with (
        torch.no_grad(),
        pytest.raises(NotImplementedError, match=r"attention biases \(ALiBi\) for the whole text"),
    ):
        one_by_one(model, tokens(20), SinkWindowCache(4, 8))


def test_a_table_of_positions_ends() -> None:
    # GPT-J looks angles up in a table; past its end a GPU would only report a device-side assert.
    model = tiny_model("gptj", n_positions=512)
    cache = SinkWindowCache(4, 8, config=model.config)
    for layer in (layer for layer in cache.layers if hasattr(layer, "max_position")):
        assert layer.max_position == 512
    with torch.no_grad(), pytest.raises(ValueError, match="more than the 512 positions"):
        one_by_one(model, tokens(513), cache)


def test_a_table_of_angles_that_was_rounded(tmp_path: Path) -> None:
    model = tiny_model("gptj")
    model.save_pretrained(tmp_path)
    message = "embed_positions was rounded to torch.bfloat16: load it with dtype=torch.bfloat16"
    with torch.no_grad(), pytest.raises(NotImplementedError, match=message):
        model.to(torch.bfloat16)(tokens(9), past_key_values=SinkWindowCache(4, 8))
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    with torch.no_grad():
        loaded(tokens(9), past_key_values=SinkWindowCache(4, 8))


def test_capacity_beyond_a_native_sliding_window() -> None:
    model = tiny_model("mistral", sliding_window=8)
    with torch.no_grad(), pytest.raises(ValueError, match=re.escape("Choose n_sink + window <= 8")):
        model(tokens(3), past_key_values=SinkWindowCache(4, 5))
    with torch.no_grad():
        model(tokens(3), past_key_values=SinkWindowCache(4, 4))


@pytest.mark.parametrize(
    "name", ["tokens_until_full", "tokens_between_rebases", "max_position", "rebase_step", "rebase"]
)
def test_before_a_model_has_used_it(name: str) -> None:
    with pytest.raises(ValueError, match="needs a cache that a model has used"):
        getattr(SinkWindowCache(4, 8), name)()


@pytest.mark.parametrize("compileable", [False, True])
def test_attention_whose_masks_do_not_hide_empty_slots(compileable: bool) -> None:
    model, cache = tiny_model("llama"), SinkWindowCache(3, 9, compileable=compileable)
    AttentionInterface.register("no_masks", sdpa_attention_forward)
    expected = streamed_logits(model, tokens(20), 3, 9)
    model.set_attn_implementation("no_masks")
    if compileable:
        with pytest.raises(NotImplementedError, match="not possible with attn_implementation 'no_masks'"):
            one_by_one(model, tokens(20), cache)
    else:
        assert relative_error(one_by_one(model, tokens(20), cache), expected) <= 1e-5


def test_padded_rows_of_chunked_attention_need_their_mask_for_ever() -> None:
    model, cache = tiny_model("llama4_text"), SinkWindowCache(1, 2)
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1, :3] = 0
    with torch.no_grad():
        model(tokens(6, 2), attention_mask=mask, past_key_values=cache)
        for _ in range(40):
            with pytest.raises(ValueError, match="padding that is not yet out of sight"):
                model(tokens(1, 2), past_key_values=cache)
            mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], dim=1)
            model(tokens(1, 2), attention_mask=mask, position_ids=cache.next_position_ids(), past_key_values=cache)


def test_sliding_layers_take_back_only_what_they_still_have() -> None:
    # The rings of 64 are not full, but transformers' own layers of 8 have let go of tokens.
    model, cache = tiny_model("gemma3_text"), SinkWindowCache(4, 60)
    with torch.no_grad():
        model(tokens(20), past_key_values=cache)
        with pytest.raises(ValueError, match="cannot bring back tokens that were evicted"):
            cache.crop(-3)
        cache.activate_past_recording()
        model(tokens(2), past_key_values=cache)
        with pytest.raises(ValueError, match="cannot bring back tokens that were evicted"):
            cache.crop(-5)
        cache.crop(-2)
        with pytest.raises(ValueError, match="cannot bring back tokens that were evicted"):
            cache.crop(-2)
        cache.crop(0)
        dense = DynamicCache(config=model.config)
        model(tokens(20), past_key_values=dense)
        logits, expected = (model(tokens(4), past_key_values=one).logits for one in (cache, dense))
    assert torch.allclose(logits, expected, atol=1e-5)


def test_outside_of_a_model() -> None:
    cache = SinkWindowCache(4, 8)
    with pytest.raises(ValueError, match=r"cannot see a transformers model.*config=model\.config"):
        cache.update(torch.zeros(1, 2, 1, 16), torch.zeros(1, 2, 1, 16), 0)
    assert cache.get_seq_length() == 0
    assert cache.nbytes == 0


def test_compiled_models(llama: PreTrainedModel) -> None:
    expected = one_by_one(llama, tokens(20), SinkWindowCache(4, 8))
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(copy.deepcopy(llama), backend="eager")
        assert torch.allclose(one_by_one(compiled, tokens(20), SinkWindowCache(4, 8)), expected, atol=1e-5)
        compiled = torch.compile(copy.deepcopy(llama), backend="eager", fullgraph=True)
        for config, way_out in (
            (None, "SinkWindowCache(..., config=model.config)"),
            (llama.config, "without fullgraph=True"),
        ):
            cache = SinkWindowCache(4, 8, config=config)
            with pytest.raises(torch._dynamo.exc.Unsupported, match=re.escape(way_out)):
                compiled(tokens(3), past_key_values=cache)
            assert cache.get_seq_length() == 0


@pytest.mark.parametrize("compileable", [False, True])
def test_positions_after_rebase_are_looked_at_at_every_step(llama: PreTrainedModel, compileable: bool) -> None:
    # Not only at the first one: generate() after a loop that passed the right ones.
    cache = SinkWindowCache(4, 8, compileable=compileable)
    one_by_one(llama, tokens(40), cache)
    with torch.no_grad():
        assert cache.rebase()
        for one in (cache, copy.deepcopy(cache)):
            with pytest.raises(NotImplementedError, match=re.escape("after rebase(), use next_position_ids()")):
                llama(tokens(1), past_key_values=one)
        llama(tokens(1), position_ids=cache.next_position_ids(), past_key_values=cache)
        with pytest.raises(NotImplementedError, match=re.escape("after rebase(), use next_position_ids()")):
            llama.generate(tokens(42), past_key_values=cache, max_new_tokens=3)
    assert cache.get_seq_length() == 41


@pytest.mark.parametrize("compileable", [False, True])
@pytest.mark.parametrize("prompt", [1, 5])
def test_wrong_positions_of_a_loop_are_noticed_at_its_first_step(
    llama: PreTrainedModel, compileable: bool, prompt: int
) -> None:
    cache = SinkWindowCache(4, 8, compileable=compileable)
    with torch.no_grad():
        llama(tokens(prompt), past_key_values=cache)
        with pytest.raises(NotImplementedError, match="positions that rise by one"):
            llama(tokens(1), position_ids=torch.tensor([[99]]), past_key_values=cache)
        llama(tokens(1), past_key_values=cache)
    assert cache.get_seq_length() == prompt + 1


@pytest.mark.parametrize("compileable", [False, True])
@pytest.mark.parametrize(
    "other", [{"rope_parameters": {"rope_type": "default", "rope_theta": 777.0}}, {"layers": 2}, {"layers": 4}]
)
def test_another_model_in_the_middle_of_a_text(
    llama: PreTrainedModel, compileable: bool, other: dict[str, Any]
) -> None:
    # Its keys would be rotated in the way of the first one.
    cache = SinkWindowCache(4, 8, compileable=compileable)
    with torch.no_grad():
        llama(tokens(5), past_key_values=cache)
        for new_tokens in (1, 3):
            with pytest.raises(ValueError, match="holds 5 tokens of another model than this LlamaModel"):
                tiny_model("llama", **other)(tokens(new_tokens), past_key_values=cache)
        copy.deepcopy(llama)(tokens(3), past_key_values=cache)  # one that is the same
    assert cache.get_seq_length() == 8


def test_another_model_at_the_address_of_the_first() -> None:
    # Python gives the address of an object that is gone to the next one of its size, and id() is the address. Now and then
    # something else gets it first, so this is tried again.
    config = tiny_model("llama", **OTHER_ROPE).config
    for _ in range(20):
        cache, text = SinkWindowCache(4, 8), tiny_model("llama").model
        with torch.no_grad():
            text(tokens(5), past_key_values=cache)
        address = id(text)
        del text
        gc.collect()
        others = [LlamaModel.__new__(LlamaModel) for _ in range(10_000)]
        if other := next((other for other in others if id(other) == address), None):
            break
    assert other is not None, "no model got the address of the first one, so nothing was tested"
    other.__init__(config)
    with torch.no_grad(), pytest.raises(ValueError, match="holds 5 tokens of another model than this LlamaModel"):
        other(tokens(3), past_key_values=cache)
    assert cache.get_seq_length() == 5


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_copies_know_their_model(llama: PreTrainedModel, copied: Callable[[SinkWindowCache], SinkWindowCache]) -> None:
    expected = streamed_logits(llama, tokens(40), 4, 8)[:, 20:]
    cache = SinkWindowCache(4, 8)
    one_by_one(llama, tokens(40)[:, :20], cache)
    again = copied(cache)
    with torch.no_grad(), pytest.raises(ValueError, match="holds 20 tokens of another model"):
        tiny_model("llama", **OTHER_ROPE)(tokens(3), past_key_values=again)
    assert relative_error(one_by_one(llama, tokens(40)[:, 20:], again), expected) <= 1e-5


@pytest.mark.parametrize("tokens_to_remove", ["x", -2.5, None])
def test_crop_takes_numbers_of_tokens(llama: PreTrainedModel, tokens_to_remove: Any) -> None:
    cache = SinkWindowCache(4, 8)
    one_by_one(llama, tokens(5), cache)
    with pytest.raises(TypeError, match="crop takes a number of tokens, but got"):
        cache.crop(tokens_to_remove)
    assert cache.get_seq_length() == 5


@pytest.mark.parametrize("input_ids, given", [("text", "str"), (torch.ones(3), r"of shape \[3\]"), ({}, "dict")])
def test_stream_takes_a_batch_of_tokens(llama: PreTrainedModel, input_ids: Any, given: str) -> None:
    with pytest.raises(TypeError, match=f"input_ids must be a tensor .* but is {given}"):
        next(stream(llama, input_ids, SinkWindowCache(4, 8)))


def test_verify_takes_a_model() -> None:
    with pytest.raises(TypeError, match="must be a transformers model, but is a str"):
        verify("HuggingFaceTB/SmolLM2-135M")


def test_one_position_for_several_tokens(llama: PreTrainedModel) -> None:
    # Models would give it to all of them.
    cache = SinkWindowCache(4, 8)
    for seen in (0, 3):
        with torch.no_grad(), pytest.raises(ValueError, match=re.escape("one position for 3 tokens")):
            llama(tokens(3), position_ids=cache.next_position_ids(), past_key_values=cache)
        with torch.no_grad():
            llama(tokens(3), position_ids=cache.next_position_ids(3), past_key_values=cache)
        assert cache.get_seq_length() == seen + 3


def test_rows_that_were_padded_do_not_stream(llama: PreTrainedModel) -> None:
    # Full rows need no attention_mask any more, but they evict at different times.
    cache, mask = SinkWindowCache(3, 5), torch.ones(2, 20, dtype=torch.long)
    mask[0, :4] = 0
    with torch.no_grad():
        llama(tokens(20, 2), attention_mask=mask, past_key_values=cache)
        with pytest.raises(NotImplementedError, match="do not support padded batches"):
            next(stream(llama, tokens(5, 2), cache))
    assert cache.get_seq_length() == 20


def test_what_came_while_nobody_recorded_is_not_taken_back(llama: PreTrainedModel) -> None:
    cache = SinkWindowCache(3, 5)
    one_by_one(llama, tokens(20), cache)
    cache.activate_past_recording()
    one_by_one(llama, tokens(2), cache)
    for layer in cache.layers:
        layer.record_past = False  # as transformers does at the end of generate()
    one_by_one(llama, tokens(3), cache)
    with pytest.raises(ValueError, match="cannot bring back tokens that were evicted meanwhile"):
        cache.crop(-2)
    for layer in cache.layers:
        layer.record_past = True
    one_by_one(llama, tokens(1), cache)
    with pytest.raises(ValueError, match="cannot bring back tokens that were evicted meanwhile"):
        cache.crop(-2)
    cache.crop(-1)
    assert cache.get_seq_length() == 25


@pytest.mark.parametrize("compileable", [False, True])
def test_another_sliding_window_after_reset(compileable: bool) -> None:
    # The same rotations, and layers that keep too little for it.
    cache = SinkWindowCache(3, 5, compileable=compileable)
    one_by_one(tiny_model("gemma3_text", sliding_window=4), tokens(20), cache)
    cache.reset()
    model = tiny_model("gemma3_text", sliding_window=8)
    assert relative_error(one_by_one(model, tokens(30), cache), streamed_logits(model, tokens(30), 3, 5)) <= 1e-5


@pytest.mark.parametrize("model_type", ["llama", "smollm3", "gemma3_text", "cohere2"])
@pytest.mark.parametrize("seen, new", [(0, 9), (20, 1), (20, 5)])
def test_an_interrupted_forward_is_noticed(model_type: str, seen: int, new: int) -> None:
    # Ctrl-C in a notebook, out of memory: the first layers have taken in tokens that the last ones have not.
    model = tiny_model(model_type, layers=4)
    layers = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    for stop in range(1, 4):
        cache = SinkWindowCache(4, 8)
        if seen:
            one_by_one(model, tokens(seen), cache)
        interrupt = layers[stop].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with torch.no_grad(), pytest.raises(KeyboardInterrupt):
            model(tokens(new), past_key_values=cache)
        interrupt.remove()
        for retry in (new, 1):
            with torch.no_grad(), pytest.raises(ValueError, match=re.escape("interrupted. Call reset()")):
                model(tokens(retry), past_key_values=cache)
        cache.reset()
        one_by_one(model, tokens(3), cache)


def test_a_cache_is_for_the_model_that_uses_it(llama: PreTrainedModel) -> None:
    # Another model after a reset, a config that is not the model's, frequencies that are not the config's: all silent.
    other = tiny_model("llama", rope_parameters={"rope_type": "default", "rope_theta": 50.0})
    rounded = copy.deepcopy(llama).bfloat16().float()
    caches = [SinkWindowCache(4, 8), SinkWindowCache(4, 8, config=llama.config)]
    one_by_one(llama, tokens(20), caches[0])
    caches[0].reset()
    for model, cache in [(other, caches[0]), (other, caches[1]), (rounded, SinkWindowCache(4, 8, config=llama.config))]:
        assert relative_error(one_by_one(model, tokens(60), cache), streamed_logits(model, tokens(60), 4, 8)) <= 1e-5


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "qwen3_next"])
@pytest.mark.parametrize("other_type", ["llama", "gemma3_text", "qwen3_next"])
def test_a_model_of_another_kind_after_reset(model_type: str, other_type: str) -> None:
    # Whichever of its layers is the first to take in tokens: one of ours, a sliding one, or one after recurrent ones.
    change = {} if other_type == "gemma3_text" else OTHER_ROPE
    model, other = (
        tiny_model(model_type),
        tiny_model(other_type, **change, num_attention_heads=2, num_key_value_heads=2),
    )
    cache = SinkWindowCache(4, 8)
    with torch.no_grad():
        model(tokens(20), past_key_values=cache)
        cache.reset()
        found = other(tokens(20), past_key_values=cache).logits
    assert relative_error(found, other(tokens(20)).logits) <= 1e-5


def test_other_frequencies_where_the_first_layers_are_not_ours() -> None:
    model, other = tiny_model("gemma3_text"), tiny_model("gemma3_text", query_pre_attn_scalar=16)
    for name, buffer in other.model.rotary_emb.named_buffers():
        if "inv_freq" in name:
            buffer.mul_(0.9)
    cache = SinkWindowCache(4, 8)
    one_by_one(model, tokens(20), cache)
    cache.reset()
    assert relative_error(one_by_one(other, tokens(40), cache), streamed_logits(other, tokens(40), 4, 8)) <= 1e-5


@pytest.mark.parametrize("model_type, change", [("zaya", {"sliding_window": 6}), ("falcon_h1", OTHER_ROPE)])
@pytest.mark.parametrize("before", ["reset", "config"])
def test_another_model_whose_first_layer_is_a_hybrid(model_type: str, change: dict[str, Any], before: str) -> None:
    # Its recurrent half keeps something before its attention does.
    model, other = tiny_model(model_type), tiny_model(model_type, **change)
    cache = SinkWindowCache(4, 28, config=model.config if before == "config" else None)
    with torch.no_grad():
        if before == "reset":
            model(tokens(20), past_key_values=cache)
            cache.reset()
        found = [other(tokens(20)[:, :10], past_key_values=cache).logits]
        found += [other(token, past_key_values=cache).logits for token in tokens(20)[:, 10:].split(1, dim=1)]
        expected = other(tokens(20), use_cache=False).logits
    assert relative_error(torch.cat(found, dim=1), expected) <= 1e-5


@pytest.mark.parametrize(
    "model_type, compileable",
    [("qwen3_next", False), ("qwen3_next", True), ("falcon_h1", False), ("falcon_h1", True), ("zaya", False)],
)
@pytest.mark.parametrize("seen, refused", [(0, 3), (20, 3), (20, 1)])
def test_a_refused_call_of_a_hybrid_is_noticed(model_type: str, compileable: bool, seen: int, refused: int) -> None:
    # Recurrent layers come before the one that refuses, and keep what they were given.
    model, cache = tiny_model(model_type), SinkWindowCache(4, 8, compileable=compileable)
    if seen:
        one_by_one(model, tokens(seen), cache)
    with pytest.raises(NotImplementedError, match="inference only"):
        model(tokens(refused), past_key_values=cache)
    for new in (1, 3):
        with torch.no_grad(), pytest.raises(ValueError, match="interrupted"):
            model(tokens(new), past_key_values=cache)
    cache.reset()
    with torch.no_grad():
        found = model(tokens(20), past_key_values=cache).logits
    assert relative_error(found, model(tokens(20), use_cache=False).logits) <= 1e-5


def test_a_refused_generate_without_cache_of_a_hybrid_is_noticed() -> None:
    model, cache = tiny_model("qwen3_next"), SinkWindowCache(4, 60)
    with pytest.raises(ValueError, match="pass use_cache=True"):
        model.generate(tokens(12), past_key_values=cache, max_new_tokens=5, use_cache=False)
    with pytest.raises(ValueError, match=re.escape("interrupted. Call reset()")):
        model.generate(tokens(12), past_key_values=cache, max_new_tokens=5)


@pytest.mark.parametrize("other_type", ["gemma3_text", "gpt_oss"])
@pytest.mark.parametrize("before", ["reset", "config"])
def test_another_model_begins_with_stream(other_type: str, before: str) -> None:
    # Its masks are made before any of its layers comes.
    model, other = tiny_model("gemma3_text", sliding_window=4), tiny_model(other_type, sliding_window=8)
    cache = SinkWindowCache(4, 8, compileable=True, config=model.config if before == "config" else None)
    if before == "reset":
        one_by_one(model, tokens(20), cache)
        cache.reset()
    found = torch.cat(list(stream(other, tokens(40), cache, chunk_size=20)), dim=1)
    assert relative_error(found, streamed_logits(other, tokens(40), 4, 8)) <= 1e-5


@pytest.mark.parametrize("model_type, other_type", [("gemma3_text", "gemma3n_text"), ("gpt_oss", "qwen3_next")])
def test_another_order_of_layers_begins_with_one_token(model_type: str, other_type: str) -> None:
    # transformers asks the cache which of its layers to make masks for, and must not ask that of the model before.
    model, other = tiny_model(model_type), tiny_model(other_type)
    cache = SinkWindowCache(4, 28, compileable=True)
    one_by_one(model, tokens(20), cache)
    cache.reset()
    found = one_by_one(other, tokens(20), cache)
    assert relative_error(found, other(tokens(20), use_cache=False).logits) <= 1e-5


def test_positions_that_do_not_count_tokens_are_refused(llama: PreTrainedModel) -> None:
    # Images and packed texts number several tokens alike; sinks move by tokens, so they would end up elsewhere.
    cache = SinkWindowCache(4, 8)
    for positions in ([0, 1, 1, 2], [0, 2, 4, 6], [3, 2, 1, 0]):
        with torch.no_grad(), pytest.raises(NotImplementedError, match="rise by one"):
            llama(tokens(4), position_ids=torch.tensor([positions]), past_key_values=cache)
    with torch.no_grad():
        llama(tokens(4), position_ids=torch.tensor([[7, 8, 9, 10]]), past_key_values=cache)
        with pytest.raises(NotImplementedError, match="rise by one with every token of a row, from 11 on"):
            llama(tokens(2), position_ids=torch.tensor([[4, 5]]), past_key_values=cache)


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "gpt_oss"])
@pytest.mark.parametrize("compileable", [False, True])
@pytest.mark.parametrize(
    "wrong, message",
    [
        ("positions", "positions that rise by one"),
        ("gradients", "inference only"),
        ("batch size", "the batch size of the keys is 2"),
        ("dtype", "the dtype of the keys is torch.float64|of another model"),
    ],
)
def test_a_refused_call_changes_nothing(model_type: str, compileable: bool, wrong: str, message: str) -> None:
    # Also where the first layers are natively sliding and none of ours.
    model, cache = tiny_model(model_type), SinkWindowCache(4, 8, compileable=compileable)
    one_by_one(model, tokens(20), cache)
    after = tokens(30)[:, 20:]
    for new in (2,) if wrong == "positions" else (1, 2):  # of single tokens, positions are not read every time
        inputs: dict[str, Any] = {"input_ids": after[:, :new].repeat(2 if wrong == "batch size" else 1, 1)}
        if wrong == "positions":
            inputs["position_ids"] = torch.tensor([[25, 26]])
        one = copy.deepcopy(model).double() if wrong == "dtype" else model
        with (
            torch.set_grad_enabled(wrong == "gradients"),
            pytest.raises((NotImplementedError, ValueError), match=message),
        ):
            one(**inputs, past_key_values=cache)
    with torch.no_grad():
        found = [model(token, past_key_values=cache).logits for token in after.split(1, dim=1)]
    expected = streamed_logits(model, tokens(30), 4, 8)[:, 20:]
    assert relative_error(torch.cat(found, dim=1), expected) <= 1e-5


def test_later_layers_are_asked_what_would_go_unnoticed(llama: PreTrainedModel) -> None:
    cache = SinkWindowCache(4, 8)
    one_by_one(llama, tokens(20, 2), cache)
    keys, values = (tensor[:, :, :1].clone() for tensor in (cache.layers[0].keys, cache.layers[0].values))
    for message, *wrong in (
        ("the batch size of the keys is 1", keys[:1], values[:1]),
        ("inference only", keys, values.clone().requires_grad_()),
        ("inference only", keys.clone().requires_grad_(), values),
    ):
        one = copy.deepcopy(cache)
        one.update(keys, values, 0)
        with pytest.raises((ValueError, NotImplementedError), match=message):
            one.update(*wrong, 1)


def test_a_refused_call_is_no_start_of_a_row(llama: PreTrainedModel) -> None:
    # Neither its positions nor its padding count for the calls after it.
    two, cache = tokens(30, 2), SinkWindowCache(4, 8)
    positions = torch.arange(30)[None] + torch.tensor([[0], [5]])
    with torch.no_grad():
        llama(two[:, :20], past_key_values=cache, position_ids=positions[:, :20])
        with pytest.raises(ValueError, match="batch size"):
            llama(two[:1, 20:22], past_key_values=cache, position_ids=positions[:1, 20:22])
        llama(two[:, 20:22], past_key_values=cache, position_ids=positions[:, 20:22])
    cache, mask = SinkWindowCache(4, 8), torch.ones(2, 6, dtype=torch.long)
    mask[0, :2] = 0
    with pytest.raises(NotImplementedError, match="inference only"):
        llama(two[:, :6], past_key_values=cache, attention_mask=mask)
    with torch.no_grad():
        found = llama(two[:, :6], past_key_values=cache).logits
        assert relative_error(found, llama(two[:, :6]).logits) <= 1e-5


def test_autocast_where_layers_differ() -> None:
    # Rotated keys come in float32, those of layers without positions in bfloat16.
    model, cache = tiny_model("afmoe", layers=4), SinkWindowCache(2, 5)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = [model(part, past_key_values=cache).logits for part in tokens(12).split((6, 1, 2, 3), dim=1)]
    assert all(logits.isfinite().all() for logits in found)
    assert cache.get_seq_length() == 12


class _Guide(LogitsProcessor):
    """Adds the scores of another model, which has a cache of its own."""

    def __init__(self, model: PreTrainedModel, cache: SinkWindowCache) -> None:
        self.model, self.cache = model, cache

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        new = input_ids[:, self.cache.get_seq_length() :]
        return scores + self.model(new, past_key_values=self.cache).logits[:, -1]


@pytest.mark.parametrize(
    "outer_type, guide_type", [("gpt2", "llama"), ("llama", "qwen3_next"), ("llama", "gemma3_text")]
)
@pytest.mark.parametrize("before", ["config", "reset"])
def test_a_model_within_another_models_generate(outer_type: str, guide_type: str, before: str) -> None:
    # The cache is asked for its length where only the outer model is to be seen, which is not the one that uses it.
    outer, guide = tiny_model(outer_type), tiny_model(guide_type, layers=4)
    cache = SinkWindowCache(4, 100, config=guide.config if before == "config" else None)
    if before == "reset":
        one_by_one(guide, tokens(5), cache)
        cache.reset()
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    found = outer.generate(tokens(6), logits_processor=[_Guide(guide, cache)], **options)
    dense = DynamicCache(config=guide.config)
    assert torch.equal(found, outer.generate(tokens(6), logits_processor=[_Guide(guide, dense)], **options))


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_refused_assisted_decoding_is_over(model_type: str) -> None:
    # A cache that still records would give each token of the long turn its own sinks, which plain generate() does not.
    model, caches = tiny_model(model_type), [SinkWindowCache(4, 12) for _ in range(2)]
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    for cache in caches:
        one_by_one(model, tokens(5), cache)
    with pytest.raises(NotImplementedError, match="positions that rise by one"):
        model.generate(tokens(30), past_key_values=caches[0], prompt_lookup_num_tokens=3, **options)
    texts = [model.generate(tokens(30), past_key_values=cache, **options) for cache in caches]
    assert torch.equal(*texts)


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_assisted_decoding_is_over_in_the_next_turn(model_type: str) -> None:
    # transformers leaves the cache recording. The next turn was not the one of plain turns, and sliding layers kept every token.
    model, caches = tiny_model(model_type), [SinkWindowCache(4, 12) for _ in range(2)]
    options: dict[str, Any] = {"max_new_tokens": 20, **PLAIN}
    texts = []
    for cache, helped in zip(caches, ({"prompt_lookup_num_tokens": 3}, {}), strict=True):
        text = model.generate(tokens(10), past_key_values=cache, **helped, **options)
        text = torch.cat([text, tokens(9, seed=1)], dim=1)
        texts.append(model.generate(text, past_key_values=cache, **options))
    assert torch.equal(*texts)
    assert caches[0].nbytes == caches[1].nbytes


def test_reset_ends_recording_in_every_layer() -> None:
    cache, model = SinkWindowCache(4, 12), tiny_model("gemma3_text")
    one_by_one(model, tokens(1), cache)
    cache.activate_past_recording()
    cache.reset()
    one_by_one(model, tokens(30), cache)
    sliding = [layer for layer in cache.layers if isinstance(layer, DynamicSlidingWindowLayer)]
    assert {layer.keys.shape[2] for layer in sliding} == {layer.sliding_window - 1 for layer in sliding}


@pytest.mark.parametrize("prompt", [1, 10])
def test_convolutions_go_on_after_they_have_recorded(prompt: int) -> None:
    # A layer that records keeps as many inputs as there are tokens. Without recording, it writes into as many as its kernel has.
    cache, model = SinkWindowCache(4, 12), tiny_model("lfm2")
    options: dict[str, Any] = {"max_new_tokens": 2, **PLAIN}
    text = model.generate(tokens(prompt), past_key_values=cache, prompt_lookup_num_tokens=2, **options)
    text = torch.cat([text, tokens(2, seed=1)], dim=1)
    turn = model.generate(text, past_key_values=cache, **options)
    assert torch.equal(turn, model.generate(text, **options))

    cache.activate_past_recording()
    one_by_one(model, tokens(9), cache)
    cache.reset()
    assert torch.equal(model.generate(text, past_key_values=cache, **options), turn)


def test_the_first_step_of_generate_is_read(llama: PreTrainedModel) -> None:
    # Without its mask, a padded text is numbered wrongly. A turn of one token was taken for the next step of the turn before.
    cache = SinkWindowCache(2, 16, compileable=True)
    input_ids = tokens(7, batch_size=2)
    mask = torch.tensor([[0] * 3 + [1] * 4, [1] * 7])
    options: dict[str, Any] = {"past_key_values": cache, "max_new_tokens": 3, **PLAIN}
    text = llama.generate(input_ids, attention_mask=mask, **options)
    seen = cache.get_seq_length()
    with pytest.raises(ValueError, match="now begins with 0 zeros in row 0, but began with 3"):
        llama.generate(text, attention_mask=torch.ones_like(text), **options)
    assert cache.get_seq_length() == seen


def test_a_long_call_on_natively_sliding_layers_is_refused() -> None:
    # Their own mask counts from the end of the call, and would cut off the sinks.
    model, cache = tiny_model("mistral", sliding_window=12), SinkWindowCache(4, 8)
    one_by_one(model, tokens(30), cache)
    with torch.no_grad(), pytest.raises(ValueError, match=re.escape("sink_cache.stream")):
        model(tokens(6), past_key_values=cache)
    logits = torch.cat([one_by_one(model, tokens(1), cache), *stream(model, tokens(6), cache, chunk_size=6)], dim=1)
    assert torch.isfinite(logits).all()


def test_a_refused_model_is_not_kept_alive() -> None:
    model = tiny_model("gpt2", n_positions=513)
    with torch.no_grad(), pytest.raises(NotImplementedError):
        model(tokens(3), past_key_values=SinkWindowCache(4, 8))
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


def test_verify_finds_a_model_that_is_not_what_its_config_says() -> None:
    class Shifted(LlamaForCausalLM):
        """Its live instance scores by absolute position, which no twin built from class and config knows."""

        def forward(self, *args: Any, position_ids: torch.Tensor | None = None, **kwargs: Any) -> Any:
            if getattr(self, "odd", False):
                kwargs["inputs_embeds"] = self.model.embed_tokens(kwargs.pop("input_ids")) * (
                    1 + position_ids[..., None]
                )
            return super().forward(*args, position_ids=position_ids, **kwargs)

    config = LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=64
    )
    torch.manual_seed(0)
    model = Shifted(config)
    assert verify(model) < 1e-5
    model.odd = True
    with pytest.raises(NotImplementedError, match="not exact on this Shifted"):
        verify(model)


def test_verify_and_stream_arguments(llama: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match=re.escape("tokens > n_sink + window = 16")):
        verify(llama, tokens=16)
    with pytest.raises(TypeError, match="DynamicCache"):
        next(stream(llama, tokens(3), DynamicCache()))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"chunk_size must be an integer, but is 2\.5"):
        next(stream(llama, tokens(3), SinkWindowCache(4, 8), chunk_size=2.5))  # type: ignore[arg-type]
    with pytest.raises(NotImplementedError, match="linear-attention"):
        next(stream(tiny_model("jamba"), tokens(3), SinkWindowCache(4, 8)))


@pytest.mark.parametrize("model_type", ["openai-gpt", "rwkv"])
def test_stream_through_a_model_without_a_cache(model_type: str) -> None:
    # Each chunk was read as a text of its own, and its logits were returned as if they went on.
    cache = SinkWindowCache(2, 4)
    with pytest.raises(NotImplementedError, match="has not used its cache"):
        next(stream(tiny_model(model_type), tokens(16), cache, chunk_size=4))
    assert cache.get_seq_length() == 0


def test_prepared_for_another_model_in_the_middle_of_a_text() -> None:
    # The layers were made anew, and the next call attended to zeros in the place of the text.
    cache, other = SinkWindowCache(2, 4), tiny_model("gptj")
    one_by_one(tiny_model("llama"), tokens(5), cache)
    with pytest.raises(ValueError, match="holds 5 tokens of another model"):
        cache.prepare_for(other)
    cache.reset()
    cache.prepare_for(other)
