"""What the library takes for granted of transformers beyond what a `Cache` subclass may rely on.

When transformers moves, the tests of this file fail first, each with a sentence that says which assumption broke and what in
sink_cache/ rests on it. They use transformers alone, so that a failure here is never ours.
"""

import copy
import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import accelerate
import pytest
import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModel,
    CompileConfig,
    DynamicCache,
    GenerationConfig,
    PreTrainedModel,
    StaticCache,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionAndFullAttentionLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from .families import cache_name, tiny_model
from .multimodal import tiny_multimodal
from .test_exact import tokens

# One model from modular code, one that is older, one with layers of two kinds, one of a model with vision.
MODELS = pytest.mark.parametrize("model_type", ["llama", "gpt_neox", "gemma3_text", "gemma3"])


@contextmanager
def assumed(sentence: str) -> Iterator[None]:
    """For what may no longer be there at all."""
    try:
        yield
    except Exception as failure:
        raise AssertionError(sentence) from failure


class Watched(DynamicCache):
    """Shows the frames of its callers, innermost first, to a function."""

    def __init__(self, watch: Callable[[str, list[Any]], None], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.watch = watch

    def _show(self, method: str) -> None:
        frames, frame = [], sys._getframe(2)
        while frame is not None:
            frames.append(frame)
            frame = frame.f_back
        self.watch(method, frames)

    def update(self, *args: Any, **kwargs: Any) -> Any:
        self._show("update")
        return super().update(*args, **kwargs)

    def get_mask_sizes(self, *args: Any, **kwargs: Any) -> Any:
        self._show("get_mask_sizes")
        return super().get_mask_sizes(*args, **kwargs)


# --- frames ---


@MODELS
@torch.no_grad()
def test_a_forward_keeps_its_arguments_in_locals(model_type: str) -> None:
    model, input_ids = tiny_model(model_type), tokens(6)
    mask, positions = torch.ones_like(input_ids), torch.arange(6)[None]
    seen: set[str] = set()

    def watch(method: str, frames: list[Any]) -> None:
        if method != "update":
            return
        for frame in frames:
            owner = frame.f_locals.get("self")
            if isinstance(owner, PreTrainedModel) and frame.f_code.co_varnames[:1] == ("self",):
                seen.add("self")
                for name, value in (("attention_mask", mask), ("position_ids", positions)):
                    local = frame.f_locals.get(name)
                    if isinstance(local, torch.Tensor) and local.ndim == 2 and torch.equal(local, value):
                        seen.add(name)

    model(input_ids, attention_mask=mask, position_ids=positions, past_key_values=Watched(watch))
    for name in ("self", "attention_mask", "position_ids"):
        assert name in seen, (
            f"When {type(model).__name__} calls Cache.update, no forward of a PreTrainedModel among the callers has a local "
            f"variable {name!r} with what it was called with: sink_cache.discovery finds model, padding and positions there."
        )


@MODELS
@torch.no_grad()
def test_positions_are_in_a_frame_where_none_are_given(model_type: str) -> None:
    seen: list[list[int]] = []

    def watch(method: str, frames: list[Any]) -> None:
        if method == "update":
            found = (frame.f_locals.get("position_ids") for frame in frames if frame.f_locals.get("self") is not None)
            seen.extend(one.flatten().tolist() for one in found if isinstance(one, torch.Tensor) and one.ndim == 2)

    cache = Watched(watch)
    model = tiny_model(model_type)
    model(tokens(5), past_key_values=cache)
    model(tokens(2), past_key_values=cache)
    assert [0, 1, 2, 3, 4] in seen, "A forward no longer numbers tokens from 0 in a local variable position_ids."
    assert [5, 6] in seen, (
        "A forward no longer numbers tokens from cache.get_seq_length() in a local variable position_ids: SinkWindowCache "
        "counts tokens seen, so that models number them right."
    )


@torch.no_grad()
def test_a_text_model_with_several_axes_keeps_them_in_a_local() -> None:
    model = tiny_multimodal("qwen2_vl.Qwen2VLForConditionalGeneration")
    axes = torch.stack([torch.arange(5), torch.arange(5), torch.tensor([0, 1, 1, 2, 3]), torch.arange(5)])[:, None]
    seen: dict[str, bool] = {}

    def watch(method: str, frames: list[Any]) -> None:
        owned = [frame for frame in frames if isinstance(frame.f_locals.get("self"), PreTrainedModel)]
        local = next((f.f_locals["position_ids"] for f in owned if f.f_locals.get("position_ids") is not None), None)
        seen[method] = local is not None and torch.equal(local, axes[1:])

    model(tokens(5), position_ids=axes, past_key_values=Watched(watch))
    for method in ("get_mask_sizes", "update"):
        assert seen[method], (
            f"When Qwen2-VL calls Cache.{method}, its text model no longer has the three axes of positions in a local variable "
            "position_ids: internals.positions_of_caller finds images there."
        )


@torch.no_grad()
def test_masks_are_sized_where_the_padding_mask_is(llama: PreTrainedModel) -> None:
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    sized: list[bool] = []

    def watch(method: str, frames: list[Any]) -> None:
        if method == "get_mask_sizes":
            local = frames[0].f_locals.get("attention_mask")
            sized.append(local is not None and torch.equal(local.long(), mask))
            assert "block_sequence_ids" in frames[1].f_code.co_varnames, (
                "Two frames above Cache.get_mask_sizes there is no longer a function with the argument block_sequence_ids: "
                "discovery.shows_blocks_of_tokens looks there whether tokens of an image see what follows them."
            )

    llama(tokens(4, 2), attention_mask=mask, past_key_values=Watched(watch))
    assert sized, "A forward with a padding mask no longer asks its cache for get_mask_sizes before its layers run."
    assert all(sized), (
        "The function that calls Cache.get_mask_sizes no longer has the 2-D padding mask as its local attention_mask: "
        "discovery.padding_mask_of_caller looks there at every step."
    )


def test_generate_tells_a_cache_that_it_was_given_it(llama: PreTrainedModel) -> None:
    told: list[str] = []

    class Told(DynamicCache):
        def __setattr__(self, name: str, value: Any) -> None:
            told.append(name)
            super().__setattr__(name, value)

    cache = Told(config=llama.config)
    told.clear()
    llama.generate(tokens(3), past_key_values=cache, max_new_tokens=1)
    assert told[:1] == ["_is_user_defined"], (
        "generate() no longer begins by setting _is_user_defined on a cache that it was given: internals.GivenToGenerate refuses "
        "encoder-decoders there."
    )


def test_what_generate_hands_to_nobody_is_in_its_locals(llama: PreTrainedModel) -> None:
    found: dict[str, Any] = {}

    class Streamer:
        def put(self, _: torch.Tensor) -> None: ...
        def end(self) -> None: ...

    def loop(model: Any, input_ids: torch.Tensor, own: int | None = None, **kwargs: Any) -> Any:
        frame = sys._getframe(1)
        while frame is not None and frame.f_code.co_name != "generate":
            frame = frame.f_back
        assert frame is not None, "No function called generate is among the callers of a custom_generate function."
        found.update(frame.f_locals, module=frame.f_globals["__name__"], kwargs=kwargs, own=own)
        return input_ids

    streamer = Streamer()
    llama.generate(
        tokens(3), custom_generate=loop, streamer=streamer, past_key_values=DynamicCache(), pad_token_id=0, own=1
    )
    assert found["module"].startswith("transformers."), "generate() is no longer defined in a module of transformers."
    assert found.get("streamer") is streamer, (
        "generate() no longer has a local variable streamer, where sink_cache.endless finds what it is not given."
    )
    assert found.get("has_default_max_length") is True, (
        "generate() no longer has a local variable has_default_max_length: sink_cache.endless cannot tell a max_length that "
        "nobody asked for, and would stop at it."
    )
    config = found["kwargs"].get("generation_config")
    assert isinstance(config, GenerationConfig), "custom_generate functions are no longer given a generation_config."
    assert found.get("generation_config") is config, (
        "generate() no longer has a local variable generation_config: SinkWindowCache would not notice use_cache=False."
    )
    assert isinstance(getattr(config, "_pad_token_tensor", None), torch.Tensor), (
        "generation_config no longer has a _pad_token_tensor, with which sink_cache.endless fills rows that are finished."
    )
    assert found["own"] == 1, "generate() no longer hands a custom_generate function the arguments that only it has."
    assert {"logits_processor", "stopping_criteria"} <= set(found["kwargs"]), (
        "custom_generate functions are no longer given logits_processor and stopping_criteria by keyword."
    )


# --- masks ---


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_mask_functions_are_given_what_the_cache_says(monkeypatch: pytest.MonkeyPatch, attention: str) -> None:
    calls: list[dict[str, Any]] = []
    build = AttentionMaskInterface()[attention]

    def spy(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return build(*args, **kwargs)

    class Offset(int):
        """Not a plain integer."""

    class OffsetCache(DynamicCache):
        def get_query_offset(self, layer_idx: int = 0) -> int:
            return offset

    assert build is not None, f"AttentionMaskInterface has no mask function for {attention!r} to be wrapped."
    with monkeypatch.context() as patch:
        patch.setattr(AttentionMaskInterface, "_global_mapping", dict(AttentionMaskInterface._global_mapping))
        AttentionMaskInterface.register(attention, spy)
        model, offset = tiny_model("llama"), Offset(0)
        model.set_attn_implementation(attention)
        model(tokens(5), past_key_values=OffsetCache())
    assert calls, (
        f"The mask function registered for {attention!r} is not called: stream() cannot show queries their sinks."
    )
    names = ("q_offset", "q_length", "kv_length", "batch_size", "device", "dtype")
    assert set(names) <= set(calls[0]), (
        f"Mask functions are no longer given {names} by keyword, as sink_cache.masks reads them."
    )
    assert calls[0]["q_offset"] is offset, (
        "What Cache.get_query_offset returns no longer comes to mask functions as it is: sink_cache.masks.ChunkOffset gets lost."
    )
    assert (calls[0]["q_length"], calls[0]["kv_length"]) == (5, 5)


@torch.no_grad()
def test_attention_gets_no_mask_where_the_mask_function_makes_none() -> None:
    model, masks = tiny_model("llama"), []

    def attention(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> Any:
        masks.append(attention_mask)
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register("assumed_maskless", attention)
    AttentionMaskInterface.register("assumed_maskless", lambda **_: None)
    model.set_attn_implementation("assumed_maskless")
    model(tokens(5), past_key_values=StaticCache(config=model.config, max_cache_len=8))
    assert len(masks) == 3, "The attention function of a model is no longer called for each layer."
    assert all(mask is None for mask in masks), (
        "A mask function that returns None no longer leaves the mask out: endless steps of a full cache rely on that."
    )


@torch.no_grad()
def test_generate_keeps_its_prompt_in_a_local(llama: PreTrainedModel) -> None:
    lengths: list[list[int]] = []

    def watch(method: str, frames: list[Any]) -> None:
        if method == "get_mask_sizes":
            calls = [frame for frame in frames if frame.f_code.co_name == "generate"]
            lengths.extend([frame.f_locals["input_ids"].shape[1]] for frame in calls if "input_ids" in frame.f_locals)

    options = {"prompt_lookup_num_tokens": 2, "max_new_tokens": 4, "do_sample": False}
    llama.generate(tokens(9), past_key_values=Watched(watch), **options)
    assert lengths, (
        "generate() no longer has a local variable input_ids: the first call of assisted decoding looks there."
    )
    assert all(one == [9] for one in lengths), (
        "generate() no longer keeps the prompt in its local variable input_ids: what is more in the first call of assisted "
        "decoding is taken for candidates."
    )


# --- compiling ---


@torch.no_grad()
def test_generate_can_be_asked_whether_and_how_it_compiles(llama: PreTrainedModel) -> None:
    cache = StaticCache(config=llama.config, max_cache_len=16)
    everywhere = CompileConfig(backend="eager", fullgraph=False)
    everywhere._compile_all_devices = True
    (generate_name,) = names_of(GenerationMixin.prepare_inputs_for_generation)
    choices = ({}, {"compile_config": everywhere}, {"compile_config": everywhere, "disable_compile": True})
    with assumed(
        "model._valid_auto_compile_criteria no longer says whether generate() would compile: endless steps ask it."
    ):
        configs = [GenerationConfig(**choice) for choice in choices]
        criteria = [llama._valid_auto_compile_criteria({generate_name: cache}, config) for config in configs]
        assert criteria == [False, True, False]
    with assumed("model.get_compiled_call no longer gives the model's forward, compiled: endless steps run with it."):
        compiled = llama.get_compiled_call(everywhere)
        logits = compiled(tokens(4), position_ids=torch.arange(4)[None]).logits
        assert torch.allclose(logits, llama(tokens(4)).logits, atol=1e-5)
    assert hasattr(torch.compile(llama), "_orig_mod"), (
        "A module from torch.compile no longer has the original as _orig_mod, which sink_cache.verify examines."
    )


# --- cache layers ---


def test_a_dynamic_cache_knows_the_layers_of_a_config() -> None:
    def kinds(model_type: str) -> list[type]:
        return [type(layer) for layer in DynamicCache(config=tiny_model(model_type).config).layers]

    says = (
        "DynamicCache(config=config).layers no longer has one layer of the known class for each layer of the model: it decides "
        "which layers a SinkWindowCache replaces (twin.bounded_layers)."
    )
    assert kinds("llama") == [DynamicLayer] * 3, says
    assert set(kinds("gemma3_text")) == {DynamicLayer, DynamicSlidingWindowLayer}, says
    assert set(kinds("mistral")) == {DynamicSlidingWindowLayer}, says
    assert LinearAttentionAndFullAttentionLayer in kinds("zamba2"), says
    assert DynamicLayer.__module__ == "transformers.cache_utils", says


@torch.no_grad()
def test_sliding_layers_hold_what_is_saved_and_moved() -> None:
    model = tiny_model("gemma3_text")
    model(tokens(30), past_key_values=(cache := DynamicCache(config=model.config)))
    layer = next(layer for layer in cache.layers if type(layer) is DynamicSlidingWindowLayer)
    held = (layer.keys.shape[2], layer.values.shape[2], layer.cumulative_length, layer.sliding_window)
    window = model.config.sliding_window
    assert held == (window - 1, window - 1, 30, window), (
        "A DynamicSlidingWindowLayer no longer keeps the last sliding_window - 1 keys and values, and counts tokens in "
        "cumulative_length: saving.py writes these, and rebase() moves the keys."
    )


@torch.no_grad()
def test_layers_forget_at_reset() -> None:
    model, input_ids = tiny_model("gemma3_text"), tokens(12)
    cache = DynamicCache(config=model.config)
    model(tokens(20, seed=5), past_key_values=cache)
    cache.reset()
    with assumed(
        "transformers' own layers no longer forget everything at reset(), as before 5.18: neither do these of ours."
    ):
        logits = model(input_ids, past_key_values=cache).logits
        assert torch.allclose(logits, model(input_ids, use_cache=False).logits, atol=1e-5)


@torch.no_grad()
def test_recording_layers_take_back() -> None:
    model, input_ids = tiny_model("gemma3_text"), tokens(24)
    cache = DynamicCache(config=model.config)
    model(input_ids[:, :20], past_key_values=cache)
    with assumed(
        "transformers' own sliding layers no longer record several calls, as before 5.18, or crop(-n) no longer takes back the "
        "last n tokens: SinkWindowCache.crop leaves them to it."
    ):
        cache.activate_past_recording()
        for t in range(4):
            model(tokens(1, seed=t), past_key_values=cache)
        cache.crop(-4)
        logits = model(input_ids[:, 20:], past_key_values=cache).logits
        assert torch.allclose(logits, model(input_ids, use_cache=False).logits[:, 20:], atol=1e-5)


def test_hybrid_layers_are_made_as_ours_make_them() -> None:
    layers = DynamicCache(config=tiny_model("zamba2").config).layers
    theirs = next(layer for layer in layers if isinstance(layer, LinearAttentionAndFullAttentionLayer))
    assert isinstance(getattr(theirs, "number_of_states", None), int), (
        "Layers of attention beside a recurrent state no longer have number_of_states: variants.py makes ours with it."
    )


# --- models ---


@MODELS
def test_the_text_decoder_is_known_by_its_config(model_type: str) -> None:
    model = tiny_model(model_type)
    config = model.config.get_text_config(decoder=True)
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel) and part.config is config]
    assert parts, "No part of a model has config.get_text_config(decoder=True) for its config: discovery.text_model."
    decoder = parts[0].base_model
    assert "position_ids" in inspect.signature(type(decoder).forward).parameters, (
        "The base_model of a decoder is no longer what takes position_ids: the twin of a model would be refused."
    )
    frequencies = [name for name, _ in decoder.named_buffers() if "inv_freq" in name]
    assert frequencies, (
        "Rotary frequencies are no longer buffers of the decoder: those that were changed after loading would not be noticed."
    )
    numbered = {part.layer_idx for part in decoder.modules() if isinstance(getattr(part, "layer_idx", None), int)}
    assert numbered == set(range(config.num_hidden_layers)), (
        "Attention modules no longer have a layer_idx: SinkWindowCache.load would not know on which device a layer is."
    )


@MODELS
@torch.no_grad()
def test_the_attention_is_the_innermost_module_that_calls_a_cache(model_type: str) -> None:
    model, users = tiny_model(model_type), []

    def watch(method: str, frames: list[Any]) -> None:
        owners = (frame.f_locals.get("self") for frame in frames if frame.f_code.co_varnames[:1] == ("self",))
        if method == "update":
            users.append(next(type(owner).__name__ for owner in owners if isinstance(owner, torch.nn.Module)))

    model(tokens(3), **{cache_name(model): Watched(watch, config=model.config)})
    assert users, "attention no longer calls Cache.update"
    assert all("Attention" in user for user in users), f"the innermost module that calls Cache.update is {set(users)}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, None])
def test_a_part_is_made_in_the_dtype_of_its_config(dtype: torch.dtype | None) -> None:
    config = copy.deepcopy(tiny_model("llama").config)
    config.dtype = dtype
    made = AutoModel.from_config(config).dtype
    assert made == (dtype or torch.float32), (
        "AutoModel.from_config no longer takes config.dtype as None for the default"
    )


def test_accelerate_keeps_the_forward_before_its_own() -> None:
    rotary = copy.deepcopy(tiny_model("llama").model.rotary_emb)
    accelerate.hooks.add_hook_to_module(rotary, accelerate.hooks.ModelHook())
    sentence = "accelerate no longer keeps a module's forward as _old_forward beneath a partial function of its own"
    assert isinstance(rotary.forward, functools.partial), sentence
    assert rotary.forward.func.__globals__["__name__"].startswith("accelerate."), sentence
    assert rotary._old_forward.__func__ is type(rotary).forward, sentence
