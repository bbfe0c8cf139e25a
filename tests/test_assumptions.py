"""What the library takes for granted of transformers beyond what a `Cache` subclass may rely on.

When transformers moves, the tests of this file fail first, each with a sentence that says which assumption broke and what in
sink_cache/ rests on it. They use transformers alone, so that a failure here is never ours.

sink_cache/internals.py writes down every assumption after the words "Relies on". `@guards` names the definitions whose
assumptions a test checks, and the last test compares the two lists.
"""

import ast
import copy
import dataclasses
import functools
import importlib
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.utils import prune
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModel,
    BartConfig,
    BartForCausalLM,
    BartForConditionalGeneration,
    CompileConfig,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    LlamaForCausalLM,
    PreTrainedModel,
    StaticCache,
    StoppingCriteriaList,
    cache_utils,
)
from transformers.generation import utils as generation_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.auto import modeling_auto

from .families import cache_name, tiny_model, tokens
from .multimodal import tiny_multimodal

INTERNALS = Path(__file__).parents[1] / "sink_cache" / "internals.py"
GUARDED: dict[str, list[str]] = {}  # what in internals.py relies on something -> the tests of it


def guards(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Marks a test of what these definitions of sink_cache/internals.py rely on; an import goes by its module's name."""

    def mark(test: Callable[..., None]) -> Callable[..., None]:
        for name in names:
            GUARDED.setdefault(name, []).append(test.__name__)
        return test

    return mark


# One model from modular code, one that is older, one with layers of two kinds, one of a model with vision.
MODELS = pytest.mark.parametrize("model_type", ["llama", "gpt_neox", "gemma3_text", "gemma3"])


@contextmanager
def assumed(sentence: str) -> Iterator[None]:
    """For what may no longer be there at all."""
    try:
        yield
    except Exception as failure:
        raise AssertionError(sentence) from failure


def names_of(function: Callable[..., Any]) -> set[str]:
    """Which names of a cache a function has among its arguments."""
    return {"cache", "past_key_values"} & inspect.signature(function).parameters.keys()


def generate_name() -> str:
    """What `generate()` calls its cache."""
    with assumed(
        "GenerationMixin.prepare_inputs_for_generation no longer has exactly one of the arguments `cache` and `past_key_values`: "
        "internals.cache_kwargs reads there what generate() calls its cache."
    ):
        (name,) = names_of(GenerationMixin.prepare_inputs_for_generation)
    return name


@contextmanager
def no_renaming() -> Iterator[None]:
    """Fails where transformers warns of a name that it has renamed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*past_key_values.*is deprecated", category=FutureWarning)
        yield


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


# --- imports ---


def imports() -> list[tuple[str, str]]:
    """What sink_cache/internals.py imports from modules within transformers."""
    statements = ast.parse(INTERNALS.read_text()).body
    modules = [s for s in statements if isinstance(s, ast.ImportFrom) and (s.module or "").startswith("transformers.")]
    return [(module.module or "", alias.name) for module in modules for alias in module.names]


@guards("transformers.cache_utils", "transformers.models.auto.modeling_auto")
@pytest.mark.parametrize("module, name", imports())
def test_what_is_imported_is_there(module: str, name: str) -> None:
    with assumed(f"{module} no longer has {name}, which internals.py imports: sink_cache cannot even be imported."):
        assert hasattr(importlib.import_module(module), name)


# --- names of arguments ---


@guards("cache_kwargs", "takes_argument")
@MODELS
@torch.no_grad()
def test_a_forward_shows_its_arguments_and_what_it_calls_its_cache(model_type: str) -> None:
    model = tiny_model(model_type)
    decoder = model.base_model
    for owner in (type(model), type(decoder)):
        parameters = inspect.signature(owner.forward).parameters
        assert {"input_ids", "attention_mask", "position_ids"} <= parameters.keys(), (
            f"The signature of {owner.__name__}.forward no longer shows its arguments: internals.takes_argument reads from it "
            "whether a model can be told positions."
        )
        assert len(names_of(owner.forward)) == 1, (
            f"{owner.__name__}.forward no longer has exactly one of the names `cache` and `past_key_values` for its cache: "
            "internals.cache_kwargs would not find the one to call it by."
        )
        (name,) = names_of(owner.forward)
        cache = DynamicCache(config=model.config)
        with assumed(
            f"{owner.__name__}.forward no longer takes its cache by the name {name!r} that its signature has, or warns of it: "
            "stream() and endless() call models by the name that internals.cache_kwargs reads there."
        ):
            with no_renaming():
                (model if owner is type(model) else decoder)(tokens(3), **{name: cache})
            assert cache.get_seq_length() == 3


@guards("cache_kwargs")
@pytest.mark.parametrize("wrapper", ["peft", "torch.compile"])
@torch.no_grad()
def test_a_forward_that_names_no_cache_hands_it_on(wrapper: str) -> None:
    model = wrapped(wrapper)
    assert not names_of(type(model).forward)  # or it would be no example
    (name,) = names_of(LlamaForCausalLM.forward)
    cache = DynamicCache()
    with assumed(
        f"The forward of a model inside {wrapper} no longer gets the keyword {name!r} from the forward around it, which names no "
        "cache: internals.cache_kwargs takes the name that the text decoder has."
    ):
        with no_renaming():
            model(tokens(3), **{name: cache})
        assert cache.get_seq_length() == 3


@guards("cache_kwargs", "take_cache", "by_both_names", "generate_output")
def test_generate_and_its_loops_call_a_cache_by_one_name(llama: PreTrainedModel) -> None:
    name, cache, given = generate_name(), DynamicCache(), {}

    def loop(model: Any, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        given.update(kwargs)
        return input_ids

    # As a loop shows it that is to take `cache` before transformers 5.24.
    signature = inspect.signature(loop)
    own = inspect.Parameter("own", inspect.Parameter.KEYWORD_ONLY, default=None)
    *positional, keywords = signature.parameters.values()
    loop.__signature__ = signature.replace(parameters=[*positional, own, keywords])  # type: ignore[attr-defined]
    options = {"pad_token_id": 0, "max_new_tokens": 2, "do_sample": False}
    with (
        assumed(
            f"generate() no longer takes its cache, without a warning, by the name {name!r}: internals.cache_kwargs."
        ),
        no_renaming(),
    ):
        llama.generate(tokens(3), custom_generate=loop, own=1, **{name: cache}, **options)
    assert given.get(name) is cache, (
        f"generate() no longer hands a custom_generate function its cache by the name {name!r}: internals.take_cache, without "
        "which endless() finds no cache."
    )
    assert given.get("own") == 1, (
        "generate() no longer hands a custom_generate function an argument that only the function's __signature__ names: "
        "internals.by_both_names lets endless() take `cache` this way where generate() itself does not."
    )
    fields = {field.name for field in dataclasses.fields(generation_utils.GenerateDecoderOnlyOutput)}
    assert {"sequences", name} <= fields, (
        f"GenerateDecoderOnlyOutput no longer has the fields `sequences` and {name!r}: internals.generate_output makes it for "
        "endless()."
    )
    out = llama.generate(tokens(3), return_dict_in_generate=True, **{name: cache}, **options)
    assert type(out) is generation_utils.GenerateDecoderOnlyOutput, (
        "generate(return_dict_in_generate=True) no longer returns a GenerateDecoderOnlyOutput, which endless() returns too "
        "(internals.generate_output)."
    )
    assert out[name] is cache, (
        f"What generate() returns no longer has its cache as {name!r}: internals.generate_output."
    )


# --- frames ---


@guards("calling_model", "calling_tensor")
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

    model(input_ids, attention_mask=mask, position_ids=positions, **{generate_name(): Watched(watch)})
    for name in ("self", "attention_mask", "position_ids"):
        assert name in seen, (
            f"When {type(model).__name__} calls Cache.update, no forward of a PreTrainedModel among the callers has a local "
            f"variable {name!r} with what it was called with: internals.calling_model and calling_tensor find model, padding and "
            "positions there."
        )


@guards("calling_tensor")
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
    model(tokens(5), **{generate_name(): cache})
    model(tokens(2), **{generate_name(): cache})
    assert [0, 1, 2, 3, 4] in seen, (
        "A forward no longer numbers tokens from 0 in a local variable position_ids, where internals.calling_tensor looks for "
        "gaps."
    )
    assert [5, 6] in seen, (
        "A forward no longer numbers tokens from cache.get_seq_length() in a local variable position_ids: SinkWindowCache "
        "counts tokens seen, so that models number them right (internals.calling_tensor)."
    )


@guards("modules_that_use_a_cache")
@MODELS
@torch.no_grad()
def test_the_attention_is_the_innermost_module_that_calls_a_cache(model_type: str) -> None:
    model, users = tiny_model(model_type), []

    def watch(method: str, frames: list[Any]) -> None:
        owners = (frame.f_locals.get("self") for frame in frames if frame.f_code.co_varnames[:1] == ("self",))
        if method == "update":
            users.append(next(type(owner).__name__ for owner in owners if isinstance(owner, torch.nn.Module)))

    model(tokens(3), **{cache_name(model): Watched(watch, config=model.config)})
    rests = "live_model.py compares these modules with the twin's (internals.modules_that_use_a_cache)."
    assert users, f"No module of attention calls Cache.update any more: {rests}"
    assert all("Attention" in user for user in users), (
        f"The innermost module that calls Cache.update is no longer the attention, but one of {set(users)}: {rests}"
    )


@guards("positions_of_caller")
@torch.no_grad()
def test_a_text_model_with_several_axes_keeps_them_in_a_local() -> None:
    model = tiny_multimodal("qwen2_vl.Qwen2VLForConditionalGeneration")
    axes = torch.stack([torch.arange(5), torch.arange(5), torch.tensor([0, 1, 1, 2, 3]), torch.arange(5)])[:, None]
    seen: dict[str, bool] = {}

    def watch(method: str, frames: list[Any]) -> None:
        owned = [frame for frame in frames if isinstance(frame.f_locals.get("self"), PreTrainedModel)]
        local = next((f.f_locals["position_ids"] for f in owned if f.f_locals.get("position_ids") is not None), None)
        seen[method] = local is not None and torch.equal(local, axes[1:])

    model(tokens(5), position_ids=axes, **{generate_name(): Watched(watch)})
    for method in ("get_mask_sizes", "update"):
        assert seen[method], (
            f"When Qwen2-VL calls Cache.{method}, its text model no longer has the three axes of positions in a local variable "
            "position_ids: internals.positions_of_caller finds images there."
        )


@guards("padding_mask_of_caller", "_mask_making_local")
@torch.no_grad()
def test_masks_are_sized_where_the_padding_mask_is(llama: PreTrainedModel) -> None:
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    sized: list[list[Any]] = []

    def watch(method: str, frames: list[Any]) -> None:
        if method == "get_mask_sizes":
            makers = mask_makers(frames)
            sized.append([frame.f_locals.get("attention_mask") for frame in makers[:1]])

    llama(tokens(4, 2), attention_mask=mask, **{generate_name(): Watched(watch)})
    assert sized, (
        "A forward with a padding mask no longer asks its cache for get_mask_sizes before its layers run: "
        "internals.padding_mask_of_caller is asked there."
    )
    assert all(sized), (
        "Cache.get_mask_sizes is no longer called by a function of the module transformers.masking_utils: "
        "internals._mask_making_local looks for its local variables."
    )
    for (local,) in sized:
        assert local is not None, (
            "The function that calls Cache.get_mask_sizes no longer has a local attention_mask: internals.padding_mask_of_caller "
            "looks there at every step."
        )
        assert torch.equal(local.long(), mask), (
            "The local attention_mask of the function that calls Cache.get_mask_sizes is no longer the 2-D padding mask: "
            "internals.padding_mask_of_caller looks there at every step."
        )


@guards("shows_blocks_of_tokens", "_mask_making_local")
@pytest.mark.parametrize("has_image", [False, True])
@torch.no_grad()
def test_blocks_of_tokens_are_in_a_local_of_mask_makers(has_image: bool) -> None:
    model, found = tiny_model("gemma3"), []

    def watch(method: str, frames: list[Any]) -> None:
        if method == "get_mask_sizes":
            makers = [frame for frame in mask_makers(frames) if "block_sequence_ids" in frame.f_code.co_varnames]
            found.extend(frame.f_locals["block_sequence_ids"] is not None for frame in makers[:1])

    image = {"token_type_ids": torch.tensor([[0, 1, 1, 0, 0]])} if has_image else {}
    model(tokens(5), **image, **{generate_name(): Watched(watch, config=model.config)})
    assert found, (
        "No function of transformers.masking_utils among the callers of Cache.get_mask_sizes has the argument "
        "block_sequence_ids: internals.shows_blocks_of_tokens looks there whether tokens of an image see what follows."
    )
    assert any(found) == has_image, (
        "The local block_sequence_ids of the function that makes masks no longer tells whether there are tokens of an image: "
        "internals.shows_blocks_of_tokens would let the cache show them the wrong tokens."
    )


@guards("GivenToGenerate")
def test_generate_tells_a_cache_that_it_was_given_it(llama: PreTrainedModel) -> None:
    told: list[str] = []

    class Told(DynamicCache):
        def __setattr__(self, name: str, value: Any) -> None:
            told.append(name)
            super().__setattr__(name, value)

    cache = Told(config=llama.config)
    told.clear()
    llama.generate(tokens(3), max_new_tokens=1, **{generate_name(): cache})
    assert told[:1] == ["_is_user_defined"], (
        "generate() no longer begins by setting _is_user_defined on a cache that it was given: internals.GivenToGenerate refuses "
        "encoder-decoders there."
    )


def mask_makers(frames: list[Any]) -> list[Any]:
    """The innermost functions that make masks and call each other."""
    names = [frame.f_globals.get("__name__") == "transformers.masking_utils" for frame in frames]
    first = names.index(True) if True in names else len(names)
    return frames[first : first + [*names[first:], False].index(False)]


@guards("generate_call", "pad_token_of", "by_both_names", "stops_at_token", "keeps_processes_in_step")
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

    streamer, criteria = Streamer(), StoppingCriteriaList()
    options = {"pad_token_id": 0, "eos_token_id": 1, "synced_gpus": False, generate_name(): DynamicCache()}
    llama.generate(tokens(3), custom_generate=loop, streamer=streamer, stopping_criteria=criteria, own=1, **options)
    assert found["module"].startswith("transformers."), (
        "generate() is no longer defined in a module of transformers, by whose name internals.generate_call knows it."
    )
    assert found.get("streamer") is streamer, (
        "generate() no longer has a local variable streamer, where endless() finds what it is not given "
        "(internals.generate_call)."
    )
    assert found.get("stopping_criteria") is criteria, (
        "generate() no longer keeps the stopping_criteria that it was given in a local variable of this name: endless() would "
        "not know which MaxLengthCriteria somebody asked for (internals.generate_call)."
    )
    assert found.get("has_default_max_length") is True, (
        "generate() no longer has a local variable has_default_max_length: endless() cannot tell a max_length that nobody asked "
        "for, and would stop at it (internals.generate_call)."
    )
    assert found.get("synced_gpus") is False, (
        "generate() no longer has a local variable synced_gpus: endless() would ignore it (internals.keeps_processes_in_step)."
    )
    config = found["kwargs"].get("generation_config")
    assert isinstance(config, GenerationConfig), (
        "custom_generate functions are no longer given a generation_config: endless() reads what it should do there."
    )
    assert found.get("generation_config") is config, (
        "generate() no longer has a local variable generation_config: SinkWindowCache would not notice use_cache=False "
        "(internals.generate_call)."
    )
    assert isinstance(getattr(config, "_pad_token_tensor", None), torch.Tensor), (
        "generation_config no longer has a _pad_token_tensor, with which endless() fills rows that are finished "
        "(internals.pad_token_of)."
    )
    assert found["own"] == 1, (
        "generate() no longer hands a custom_generate function the arguments that only it has, such as keep_tokens of endless() "
        "(internals.by_both_names)."
    )
    assert {"logits_processor", "stopping_criteria"} <= set(found["kwargs"]), (
        "custom_generate functions are no longer given logits_processor and stopping_criteria by keyword, as endless() "
        "takes them."
    )
    assert any(hasattr(criterion, "eos_token_id") for criterion in found["kwargs"]["stopping_criteria"]), (
        "The stopping criterion that generate() makes for an eos_token_id no longer has an attribute of this name: endless() "
        "would not fill rows that are finished (internals.stops_at_token)."
    )


@guards("keeps_processes_in_step")
def test_generate_keeps_processes_in_step_by_itself(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    for processes, shared in ((1, True), (2, False), (2, True)):
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda *_, n=processes: n)
        monkeypatch.setattr(llama, "_is_fsdp_managed_module", shared, raising=False)
        found = llama._extract_generation_mode_kwargs(None, {}, None, None, None)["synced_gpus"]
        assert found == (processes > 1 and shared), (
            "generate() has another rule for synced_gpus that is not given: endless() would ignore it "
            "(internals.keeps_processes_in_step)."
        )


@guards("warper_options")
def test_generate_makes_known_processors_in_a_known_order(llama: PreTrainedModel) -> None:
    found: list[Any] = []

    def loop(model: Any, input_ids: torch.Tensor, logits_processor: Any, **kwargs: Any) -> torch.Tensor:
        found.extend(logits_processor)
        return input_ids

    options = {"repetition_penalty": 1.5, "temperature": 0.5, "top_k": 3, "top_p": 0.25, "min_p": 0.125}
    llama.generate(tokens(3), custom_generate=loop, do_sample=True, pad_token_id=0, **options)
    expected = {
        "RepetitionPenaltyLogitsProcessor": ("repetition_penalty", "penalty"),
        "TemperatureLogitsWarper": ("temperature", "temperature"),
        "TopKLogitsWarper": ("top_k", "top_k"),
        "TopPLogitsWarper": ("top_p", "top_p"),
        "MinPLogitsWarper": ("min_p", "min_p"),
    }
    assert [type(one).__name__ for one in found] == list(expected), (
        f"generate() makes the logits processors {[type(one).__name__ for one in found]} of the options of sampling. A pool of "
        f"streams does what {list(expected)} did, in this order (internals.warper_options)."
    )
    for one, (option, attribute) in zip(found, expected.values(), strict=True):
        assert getattr(one, attribute, None) == options[option], (
            f"{type(one).__name__} no longer keeps {option} in its attribute {attribute} (internals.warper_options)."
        )


@guards("takes_logits_to_keep")
def test_forwards_have_an_argument_logits_to_keep(llama: PreTrainedModel) -> None:
    assert "logits_to_keep" in inspect.signature(llama.forward).parameters, (
        "A causal language model's forward has no argument logits_to_keep: a pool of streams would compute the logits of all "
        "tokens that it reads (internals.takes_logits_to_keep)."
    )


@guards("prompt_length")
@torch.no_grad()
def test_generate_keeps_its_prompt_in_a_local(llama: PreTrainedModel) -> None:
    lengths: list[int | None] = []

    def watch(method: str, frames: list[Any]) -> None:
        if method == "get_mask_sizes":
            prompts = [frame.f_locals.get("input_ids") for frame in frames if frame.f_code.co_name == "generate"]
            lengths.extend(prompt.shape[1] if isinstance(prompt, torch.Tensor) else None for prompt in prompts)

    options = {"prompt_lookup_num_tokens": 2, "max_new_tokens": 4, "do_sample": False}
    llama.generate(tokens(9), **{generate_name(): Watched(watch)}, **options)
    assert lengths, (
        "No function called generate is among the callers of Cache.get_mask_sizes in assisted decoding: internals.prompt_length "
        "looks there."
    )
    assert set(lengths) == {9}, (
        "generate() no longer keeps the prompt in its local variable input_ids to its end: what the first call of assisted "
        "decoding has beyond the prompt are candidates, and SinkWindowCache must be able to take them back "
        "(internals.prompt_length)."
    )


# --- masks ---


@guards("mask_functions")
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
        model(tokens(5), **{generate_name(): OffsetCache()})
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
    assert (calls[0]["q_length"], calls[0]["kv_length"]) == (5, 5), (
        "Mask functions are no longer given the number of queries and of keys as q_length and kv_length: sink_cache.masks."
    )


@guards("attention_functions")
@torch.no_grad()
def test_attention_functions_are_called_as_ours_is() -> None:
    model, calls = tiny_model("llama"), []

    def attention(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> Any:
        calls.append((key, kwargs))
        output, weights = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        calls[-1] += (output.shape, weights, query.shape)
        return output, weights

    AttentionInterface.register("assumed_attention", attention)
    AttentionMaskInterface.register("assumed_attention", AttentionMaskInterface()["sdpa"])
    model.set_attn_implementation("assumed_attention")
    cache = StaticCache(config=model.config, max_cache_len=8)
    model(tokens(5), **{generate_name(): cache})
    key, kwargs, shape, weights, (batch, heads, queries, head_dim) = calls[0]
    assert key is cache.layers[0].keys, (
        "Attention functions are no longer given the very tensor that Cache.update returned as their key: masks._RingAttention "
        "knows the slots of a static ring by their class."
    )
    assert kwargs.get("scaling") == head_dim**-0.5, (
        "Attention functions are no longer given scaling by keyword: masks._RingAttention would scale otherwise."
    )
    assert (tuple(shape), weights) == ((batch, queries, heads, head_dim), None), (
        "SDPA's attention function no longer returns [batch, queries, heads, head_dim] and None, as masks._RingAttention does."
    )


@guards("is_own_sdpa")
@torch.no_grad()
def test_what_transformers_own_sdpa_computes() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, heads, 5, 8) for heads in (4, 2, 2))
    module = tiny_model("llama").model.layers[0].self_attn
    others = {"sliding_window": 2, "s_aux": torch.ones(4), "position_ids": torch.zeros(2, 5), "is_causal": True}
    output, _ = sdpa_attention_forward(module, query, key, value, None, scaling=0.3, dropout=0.0, **others)
    scores = 0.3 * query @ key.repeat_interleave(2, dim=1).transpose(2, 3)
    weights = scores.masked_fill(torch.ones(5, 5, dtype=torch.bool).triu(1), -torch.inf).softmax(dim=-1)
    expected = (weights @ value.repeat_interleave(2, dim=1)).transpose(1, 2)
    assert torch.allclose(output, expected, atol=1e-5), (
        "transformers' SDPA function computes something else than causal attention: sink_cache.chunk_attention stands for it "
        "where it is given the keys and values of an exact chunk, no mask, and neither position_bias, softcap nor dropout."
    )
    tensors = {"module", "query", "key", "value", "attention_mask"}
    # `cache` is in 5.23 only. It is a paged cache, which makes no exact chunks.
    options = {"dropout", "scaling", "is_causal", "position_bias", "cache", "kwargs"}
    assert inspect.signature(sdpa_attention_forward).parameters.keys() <= tensors | options, (
        "transformers' SDPA function has new arguments, which sink_cache.chunk_attention.chunk_of_attention does not know of."
    )


@guards("mask_functions")
@torch.no_grad()
def test_attention_gets_no_mask_where_the_mask_function_makes_none() -> None:
    model, masks = tiny_model("llama"), []

    def attention(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> Any:
        masks.append(attention_mask)
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register("assumed_maskless", attention)
    AttentionMaskInterface.register("assumed_maskless", lambda **_: None)
    model.set_attn_implementation("assumed_maskless")
    model(tokens(5), **{generate_name(): StaticCache(config=model.config, max_cache_len=8)})
    assert len(masks) == 3, (
        "The attention function that AttentionInterface has for a model is no longer called for each layer, so that nothing "
        "can be said of masks."
    )
    assert all(mask is None for mask in masks), (
        "A mask function that returns None no longer leaves the mask out: endless steps of a full cache rely on that."
    )


# --- compiling ---


@guards("would_compile", "compiled_forward")
@torch.no_grad()
def test_generate_can_be_asked_whether_and_how_it_compiles(llama: PreTrainedModel) -> None:
    kwargs = {generate_name(): StaticCache(config=llama.config, max_cache_len=16)}
    everywhere = CompileConfig(backend="eager", fullgraph=False)
    everywhere._compile_all_devices = True
    choices = ({}, {"compile_config": everywhere}, {"compile_config": everywhere, "disable_compile": True})
    with assumed(
        "model._valid_auto_compile_criteria(model_kwargs, generation_config) no longer says whether generate() would compile: "
        "endless() asks it (internals.would_compile)."
    ):
        configs = [GenerationConfig(**choice) for choice in choices]
        assert [llama._valid_auto_compile_criteria(kwargs, config) for config in configs] == [False, True, False]
    with assumed(
        "model.get_compiled_call(compile_config) no longer gives the model's forward, compiled: steps of endless() run with it "
        "(internals.compiled_forward)."
    ):
        compiled = llama.get_compiled_call(everywhere)
        logits = compiled(tokens(4), position_ids=torch.arange(4)[None]).logits
        assert torch.allclose(logits, llama(tokens(4)).logits, atol=1e-5)


@guards("without_compiler")
def test_a_compiled_module_has_the_original(llama: PreTrainedModel) -> None:
    assert getattr(torch.compile(llama), "_orig_mod", None) is llama, (
        "A module from torch.compile no longer has the original as _orig_mod, which verify() examines "
        "(internals.without_compiler)."
    )


# --- cache layers ---


@guards("layers_of", "transformers.cache_utils")
def test_a_dynamic_cache_knows_the_layers_of_a_config() -> None:
    def kinds(model_type: str) -> list[type]:
        return [type(layer) for layer in DynamicCache(config=tiny_model(model_type).config).layers]

    says = (
        "DynamicCache(config=config).layers no longer has one layer of the known class for each layer of the model: it decides "
        "which layers a SinkWindowCache replaces (internals.layers_of, twin.bounded_layers)."
    )
    assert kinds("llama") == [cache_utils.DynamicLayer] * 3, says
    assert set(kinds("gemma3_text")) == {cache_utils.DynamicLayer, cache_utils.DynamicSlidingWindowLayer}, says
    assert set(kinds("mistral")) == {cache_utils.DynamicSlidingWindowLayer}, says
    assert set(kinds("lfm2")) == {cache_utils.LinearAttentionLayer, cache_utils.DynamicLayer}, says
    assert set(kinds("zamba2")) == {
        cache_utils.LinearAttentionLayer,
        cache_utils.LinearAttentionAndFullAttentionLayer,
    }, says


@guards("layer_class_is_known")
def test_layers_of_one_model_alone_are_defined_elsewhere() -> None:
    general = cache_utils.DynamicLayer.__module__
    modules = {
        model_type: {type(layer).__module__ for layer in DynamicCache(config=tiny_model(model_type).config).layers}
        for model_type in ("llama", "gemma3_text", "zamba2", "deepseek_v4", "minimax_m3_vl_text")
    }
    of_one_model = [model_type for model_type, found in modules.items() if found != {general}]
    assert of_one_model == ["deepseek_v4", "minimax_m3_vl_text"], (
        f"It is no longer so that general cache layers are defined in {general}, and those that one model alone "
        "has in other modules: internals.layer_class_is_known refuses the latter."
    )


@guards("has_indexer")
def test_layers_with_an_index_of_every_token_can_be_told() -> None:
    def have_it(model_type: str) -> set[bool]:
        return {hasattr(layer, "update_indexer") for layer in DynamicCache(config=tiny_model(model_type).config).layers}

    says = (
        "It is no longer so that the cache layers of sparse attention, and no others, have a method update_indexer: "
        "internals.has_indexer knows by it which models a SinkWindowCache must refuse."
    )
    assert have_it("deepseek_v32") == have_it("glm_moe_dsa") == {True}, says
    assert have_it("llama") == have_it("deepseek_v3") == have_it("gemma3_text") == have_it("zamba2") == {False}, says


@guards("is_recurrent_only", "transformers.cache_utils")
def test_recurrent_states_and_keys_can_be_told_apart() -> None:
    kinds = {
        cache_utils.DynamicLayer: (True, False),
        cache_utils.DynamicSlidingWindowLayer: (True, False),
        cache_utils.LinearAttentionLayer: (False, True),
        cache_utils.LinearAttentionAndFullAttentionLayer: (True, True),
    }
    for layer_class, expected in kinds.items():
        has = (
            issubclass(layer_class, cache_utils.CacheLayerMixin),
            issubclass(layer_class, cache_utils.LinearAttentionCacheLayerMixin),
        )
        assert has == expected, (
            f"{layer_class.__name__} no longer says by its base classes whether it has keys (CacheLayerMixin) and a recurrent "
            "state (LinearAttentionCacheLayerMixin): internals.is_recurrent_only, variants.py and saving.py ask for these."
        )


@guards("can_take_back")
@torch.no_grad()
def test_layers_say_whether_they_can_take_back() -> None:
    says = (
        "Cache layers no longer say in is_croppable whether crop can put them back as they were: internals.can_take_back asks "
        "them, and SinkWindowCache.crop refuses recurrent states by it."
    )
    expected = {
        "llama": {"DynamicLayer": True},
        "gemma3_text": {"DynamicLayer": True, "DynamicSlidingWindowLayer": True},
        "zamba2": {"LinearAttentionLayer": False, "LinearAttentionAndFullAttentionLayer": False},
    }
    for model_type, kinds in expected.items():
        layers = DynamicCache(config=tiny_model(model_type).config).layers
        assert {type(layer).__name__: getattr(layer, "is_croppable", None) for layer in layers} == kinds, says
    layer = cache_utils.DynamicLayer()
    keys = torch.randn(1, 2, 5, 16)
    layer.update(keys, keys)
    layer.crop(-2)
    assert torch.equal(layer.keys, keys[:, :, :3]), says


@guards("end_recording")
def test_layers_that_record_keep_everything() -> None:
    with assumed(
        "A cache layer with record_past no longer keeps all keys, or all inputs of its convolutions in conv_states. A layer "
        "without it has conv_kernel_size of them: internals.end_recording cuts them off or fills them up."
    ):
        sliding = cache_utils.DynamicSlidingWindowLayer(sliding_window=4)
        sliding.activate_past_recording()
        sliding.update(torch.ones(1, 1, 9, 2), torch.ones(1, 1, 9, 2))
        assert (sliding.record_past, sliding.keys.shape[2]) == (True, 9)
        for tokens_fed, length in ((2, 2), (9, 9)):
            recorded, plain = cache_utils.LinearAttentionLayer(), cache_utils.LinearAttentionLayer()
            assert plain.conv_states == {0: None}
            recorded.activate_past_recording()
            for layer in (recorded, plain):
                layer.update_conv_state(torch.ones(1, 2, tokens_fed), conv_kernel_size=3)
            assert recorded.record_past is True
            assert recorded.conv_kernel_size == {0: 3}
            assert recorded.conv_states[0].shape[-1] == length
            assert plain.conv_states[0][0, 0].tolist() == [float(tokens_fed > 2), 1, 1]


@guards("transformers.cache_utils")
@torch.no_grad()
def test_sliding_layers_hold_what_is_saved_and_moved() -> None:
    model = tiny_model("gemma3_text")
    model(tokens(30), **{generate_name(): (cache := DynamicCache(config=model.config))})
    layer = next(layer for layer in cache.layers if type(layer) is cache_utils.DynamicSlidingWindowLayer)
    window = model.config.sliding_window
    with assumed(
        "A DynamicSlidingWindowLayer no longer keeps the last sliding_window - 1 keys and values, and counts tokens in "
        "cumulative_length: saving.py writes these, and rebase() moves the keys (see the imports of internals.py)."
    ):
        held = (layer.keys.shape[2], layer.values.shape[2], layer.cumulative_length, layer.sliding_window)
        assert held == (window - 1, window - 1, 30, window)


@guards("transformers.cache_utils")
@torch.no_grad()
def test_layers_forget_at_reset() -> None:
    model, input_ids = tiny_model("gemma3_text"), tokens(12)
    cache = DynamicCache(config=model.config)
    model(tokens(20, seed=5), **{generate_name(): cache})
    cache.reset()
    with assumed(
        "transformers' own layers no longer forget everything at reset(): SinkWindowCache.reset leaves sliding layers to it "
        "(see the imports of internals.py)."
    ):
        logits = model(input_ids, **{generate_name(): cache}).logits
        assert torch.allclose(logits, model(input_ids, use_cache=False).logits, atol=1e-5)


@guards("transformers.cache_utils")
@torch.no_grad()
def test_recording_layers_take_back() -> None:
    model, input_ids = tiny_model("gemma3_text"), tokens(24)
    cache = DynamicCache(config=model.config)
    model(input_ids[:, :20], **{generate_name(): cache})
    with assumed(
        "transformers' own sliding layers no longer record several calls after activate_past_recording(), or crop(-n) no longer "
        "takes back the last n tokens, or does not cut them to their window: SinkWindowCache.crop leaves them to it (see the "
        "imports of internals.py)."
    ):
        cache.activate_past_recording()
        for t in range(4):
            model(tokens(1, seed=t), **{generate_name(): cache})
        cache.crop(-4)
        logits = model(input_ids[:, 20:], **{generate_name(): cache}).logits
        assert torch.allclose(logits, model(input_ids, use_cache=False).logits[:, 20:], atol=1e-5)
        cache.crop(0)
        sliding = [layer for layer in cache.layers if isinstance(layer, cache_utils.DynamicSlidingWindowLayer)]
        assert all(layer.record_past and layer.keys.shape[2] == layer.sliding_window - 1 for layer in sliding)


@guards("transformers.cache_utils")
def test_hybrid_layers_are_made_as_ours_make_them() -> None:
    layers = DynamicCache(config=tiny_model("zamba2").config).layers
    theirs = next(layer for layer in layers if isinstance(layer, cache_utils.LinearAttentionAndFullAttentionLayer))
    assert isinstance(getattr(theirs, "number_of_states", None), int), (
        "Layers of attention beside a recurrent state no longer have number_of_states: variants.py makes ours with it (see the "
        "imports of internals.py)."
    )
    with assumed(
        "Layers with a recurrent state no longer take number_of_states as their first argument: variants.py makes ours with it "
        "(see the imports of internals.py)."
    ):
        assert cache_utils.LinearAttentionLayer(2).number_of_states == 2


# --- models ---


def wrapped(wrapper: str) -> Any:
    """A model inside another module."""
    if wrapper == "torch.compile":
        return torch.compile(tiny_model("llama"), backend="eager")
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    return peft.get_peft_model(tiny_model("llama"), config).eval()


@guards("text_model")
@MODELS
@torch.no_grad()
def test_the_text_decoder_is_known_by_its_config(model_type: str) -> None:
    model = tiny_model(model_type)
    config = model.config.get_text_config(decoder=True)
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel) and part.config is config]
    assert parts, (
        "No part of a model has the object config.get_text_config(decoder=True) for its config: internals.text_model finds the "
        "text decoder by it."
    )
    decoder = parts[0].base_model
    assert "logits" not in decoder(tokens(2)), (
        "The base_model of a decoder is no longer the part without a head: internals.text_model would not find the same part "
        "in generate() and in forward()."
    )
    assert "position_ids" in inspect.signature(type(decoder).forward).parameters, (
        "The base_model of a decoder is no longer what takes position_ids: the twin of a model would be refused "
        "(internals.text_model)."
    )
    frequencies = [name for name, _ in decoder.named_buffers() if "inv_freq" in name]
    assert frequencies, (
        "Rotary frequencies are no longer buffers of the decoder: those that were changed after loading would not be noticed."
    )


@guards("text_model")
@pytest.mark.parametrize("wrapper", ["peft", "torch.compile"])
def test_a_wrapper_shows_the_model_within(wrapper: str) -> None:
    model = wrapped(wrapper)
    within = next((part for part in model.modules() if isinstance(part, PreTrainedModel)), None)
    assert within is not None, (
        f"No module inside {wrapper} is a PreTrainedModel: internals.text_model would not find the text decoder."
    )
    assert getattr(model, "config", None) is within.config, (
        f"A model inside {wrapper} no longer has its config outside, too: internals.text_model would refuse it."
    )


@guards("layer_index")
@MODELS
def test_attention_modules_know_their_layer(model_type: str) -> None:
    model = tiny_model(model_type)
    config = model.config.get_text_config(decoder=True)
    decoder = next(part for part in model.modules() if isinstance(part, PreTrainedModel) and part.config is config)
    numbered = {part.layer_idx for part in decoder.modules() if isinstance(getattr(part, "layer_idx", None), int)}
    assert numbered == set(range(config.num_hidden_layers)), (
        "Attention modules no longer have the number of their layer as layer_idx: SinkWindowCache.load would not know on which "
        "device a layer is (internals.layer_index)."
    )


@guards("transformers.models.auto.modeling_auto")
@MODELS
def test_the_class_of_a_model_is_in_a_mapping(model_type: str) -> None:
    model = tiny_model(model_type)
    config = model.config.get_text_config(decoder=True)
    found = [
        mapping.get(type(config), None)
        for mapping in (modeling_auto.MODEL_MAPPING, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING)
    ]
    classes = {type(part) for part in model.modules() if isinstance(part, PreTrainedModel) and part.config is config}
    assert found[0] in {type(part.base_model) for part in model.modules() if type(part) in classes}, (
        "MODEL_MAPPING no longer maps a text config to the class of the decoder without a head: "
        "SinkWindowCache(config=model.config) takes the class from there (internals.class_for_config)."
    )
    assert found[1] is None or issubclass(found[1], PreTrainedModel), (
        "MODEL_FOR_CAUSAL_LM_MAPPING no longer maps a config to a model class: SinkWindowCache(config=model.config) takes it "
        "from there where MODEL_MAPPING has none (internals.class_for_config)."
    )


@guards("attention_of")
@torch.no_grad()
def test_the_attention_of_a_model_is_in_its_config(llama: PreTrainedModel) -> None:
    calls: list[str] = []

    def attention(*args: Any, **kwargs: Any) -> Any:
        calls.append("assumed_by_config")
        return sdpa_attention_forward(*args, **kwargs)

    AttentionInterface.register("assumed_by_config", attention)
    AttentionMaskInterface.register("assumed_by_config", AttentionMaskInterface()["sdpa"])
    model = tiny_model("llama")
    model.set_attn_implementation("eager")
    assert getattr(model.config, "_attn_implementation", None) == "eager", (
        "config._attn_implementation no longer says which attention a model has: internals.attention_of reads it, and stream() "
        "and compileable caches refuse by it."
    )
    config = copy.deepcopy(llama.config)
    config._attn_implementation = "assumed_by_config"
    LlamaForCausalLM(config).eval()(tokens(3))
    assert len(calls) == 3, (
        "A model that is made from a config no longer has the attention of config._attn_implementation: internals.set_attention "
        "chooses that of a twin."
    )


@guards("device_of")
def test_offloaded_modules_say_where_they_compute() -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = accelerate.cpu_offload(tiny_model("llama"), execution_device=torch.device("cpu"))
    offloaded = [part for part in model.modules() if any(w.is_meta for w in part.parameters(recurse=False))]
    assert offloaded, (
        'accelerate no longer leaves weights that it offloads on the device "meta": internals.device_of knows them by that.'
    )
    devices = [getattr(getattr(part, "_hf_hook", None), "execution_device", None) for part in offloaded]
    assert set(devices) == {torch.device("cpu")}, (
        "A module with offloaded weights no longer has a hook _hf_hook with its execution_device: internals.device_of would not "
        "know where the states of a layer belong."
    )


@guards("refuse_encoder_decoder")
def test_configs_say_who_is_an_encoder_decoder(llama: PreTrainedModel) -> None:
    rests = "internals.refuse_encoder_decoder refuses by it."
    options = {"d_model": 16, "vocab_size": 32, "encoder_layers": 1, "decoder_layers": 1, "decoder_ffn_dim": 16}
    config = BartConfig(**options, encoder_ffn_dim=16, encoder_attention_heads=2, decoder_attention_heads=2)
    assert BartForConditionalGeneration(config).config.is_encoder_decoder is True, (
        f"The config of an encoder-decoder no longer says so in is_encoder_decoder: {rests}"
    )
    assert BartForCausalLM(config).config.is_encoder_decoder is False, (
        f"A decoder that is taken out of an encoder-decoder no longer has is_encoder_decoder False in its config: {rests}"
    )
    assert getattr(llama.config, "is_encoder_decoder", False) is False, (
        f"The config of a decoder no longer has is_encoder_decoder False, or leaves it out: {rests}"
    )


@guards("leave_dtype_open")
@pytest.mark.parametrize("dtype", [torch.bfloat16, None])
def test_a_part_is_made_in_the_dtype_of_its_config(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype | None) -> None:
    config, set_to = copy.deepcopy(tiny_model("llama").config), []
    config.dtype = dtype
    set_default = torch.set_default_dtype

    def spy(default: torch.dtype) -> None:
        set_to.append(default)
        set_default(default)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "set_default_dtype", spy)
        made = AutoModel.from_config(config).dtype
    assert made == (dtype or torch.float32), (
        "AutoModel.from_config no longer makes a model in config.dtype, or in the default dtype where that is None: a twin, "
        "which is judged in float32, would have parts in another one (internals.leave_dtype_open)."
    )
    assert set_to[:1] == ([] if dtype is None else [dtype]), (
        "AutoModel.from_config no longer sets the default dtype of the process just where config.dtype is not None: other "
        "threads would see it while a twin is made (internals.leave_dtype_open)."
    )


@guards("without_wrappers")
@pytest.mark.filterwarnings("ignore")
def test_wrappers_have_the_module_within_by_a_known_name() -> None:
    def wrappers() -> Iterator[tuple[str, torch.nn.Module]]:
        yield "_orig_mod", torch.compile(torch.nn.Linear(2, 2), backend="eager")
        yield "_checkpoint_wrapped_module", checkpoint_wrapper(torch.nn.Linear(2, 2))
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        try:
            yield "_fsdp_wrapped_module", FullyShardedDataParallel(torch.nn.Linear(2, 2), device_id=torch.device("cpu"))
        finally:
            torch.distributed.destroy_process_group()

    for name, wrapper in wrappers():
        paths = [path for path, _ in torch.nn.Sequential(wrapper).named_modules()]
        assert paths == ["", "0", f"0.{name}"], (
            f"A {type(wrapper).__name__} no longer has the module within as {name}: live_model.py would miss modules of a "
            "wrapped model at the paths that its twin has (internals.without_wrappers)."
        )


@guards("is_of_library")
@torch.no_grad()
def test_hooks_show_which_library_made_them() -> None:
    says = (
        "show in its globals, or by its class, that {} made it: internals.is_of_library, and models would be refused."
    )
    model = tiny_model("llama")
    model.set_attn_implementation("eager")
    model(tokens(3), output_attentions=True)
    hooks = [hook for part in model.modules() for hook in part._forward_hooks.values()]
    assert hooks, (
        "transformers records outputs without hooks now: this test shows nothing, and needs another hook of theirs."
    )
    homes = {hook.__globals__["__name__"].partition(".")[0] for hook in hooks}
    assert homes == {"transformers"}, f"A hook that records outputs does not {says.format('transformers')}"
    linear = prune.l1_unstructured(torch.nn.Linear(2, 2), "weight", amount=0.5)
    (hook,) = linear._forward_pre_hooks.values()
    home = getattr(hook, "__globals__", {}).get("__name__") or type(hook).__module__
    assert home.startswith("torch."), f"A hook of pruning does not {says.format('torch')}"


@guards("is_of_library")
def test_a_wrapping_function_keeps_its_own_globals() -> None:
    def patched(*args: Any, **kwargs: Any) -> Any: ...

    wrapping = functools.wraps(LlamaForCausalLM.forward)(patched)
    assert wrapping.__module__.startswith("transformers."), (
        "functools.wraps no longer copies __module__, so that a function's globals need not be asked (internals.is_of_library)."
    )
    assert wrapping.__globals__["__name__"] == __name__, (
        "A function that wraps another no longer keeps its own globals: live_model.py would take anybody's patch of a forward "
        "for the library's (internals.is_of_library)."
    )


@guards("forward_before_libraries", "is_of_library")
def test_accelerate_keeps_the_forward_before_its_own() -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    rotary = tiny_model("llama").model.rotary_emb
    accelerate.hooks.add_hook_to_module(rotary, accelerate.hooks.ModelHook())
    says = (
        "accelerate no longer keeps a module's forward as _old_forward beneath a partial function of its own: live_model.py "
        "would refuse offloaded models (internals.forward_before_libraries)."
    )
    assert isinstance(rotary.forward, functools.partial), says
    assert rotary.forward.func.__globals__["__name__"].startswith("accelerate."), says
    assert getattr(rotary._old_forward, "__func__", None) is type(rotary).forward, says


@guards("forward_before_libraries")
def test_a_compiled_forward_keeps_the_one_before() -> None:
    rotary = tiny_model("llama").model.rotary_emb
    forward = torch.compile(rotary.forward, backend="eager")
    assert not inspect.ismethod(forward)  # or it would be no example
    while forward is not None and not inspect.ismethod(forward):
        within = getattr(forward, "_torchdynamo_orig_callable", None)
        forward = getattr(forward, "__wrapped__", None) if within is None else within
    assert getattr(forward, "__func__", None) is type(rotary).forward, (
        "A compiled function no longer has the one before as _torchdynamo_orig_callable, perhaps within a function that has it "
        "as __wrapped__: live_model.py would refuse a model with a compiled forward (internals.forward_before_libraries)."
    )


@guards("virtual_tokens", "peft_finds_cache")
@pytest.mark.parametrize("kind", ["PREFIX_TUNING", "PROMPT_TUNING"])
def test_peft_shows_that_it_gives_virtual_tokens(kind: str) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.get_peft_config({"peft_type": kind, "task_type": "CAUSAL_LM", "num_virtual_tokens": 3})
    model = peft.get_peft_model(tiny_model("llama"), config).eval()
    found: list[Any] = []

    def look(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        found.append(vars(model.get_base_model()).get("prepare_inputs_for_generation"))
        return scores

    def generate() -> None:
        model.generate(input_ids=tokens(3), max_new_tokens=1, logits_processor=[look])

    generate()
    rests = "SinkWindowCache would not refuse virtual tokens that it cannot keep (internals.virtual_tokens)."
    assert getattr(found[0], "__self__", None) is model, (
        "While PEFT generates, the model within no longer has the wrapper's method prepare_inputs_for_generation on its "
        f"instance: {rests}"
    )
    active = getattr(model, "active_peft_config", None)
    assert getattr(active, "is_prompt_learning", None) is True, (
        f"PEFT's wrapper no longer says in active_peft_config.is_prompt_learning that it gives virtual tokens: {rests}"
    )
    assert active.peft_type.value == kind, f"active_peft_config.peft_type no longer names the method {kind}: {rests}"
    assert {"cache", "past_key_values"} & set(found[0].__func__.__code__.co_consts), (
        "PEFT's prepare_inputs_for_generation looks up no cache by its name: internals.peft_finds_cache would take it for "
        "a PEFT that feeds virtual tokens at every step."
    )
    with model.disable_adapter():
        generate()
    assert getattr(getattr(found[1], "__self__", None), "active_peft_config", None) is None, (
        "While an adapter is disabled, the model within still has the method of PEFT's wrapper: SinkWindowCache would refuse a "
        "model that has no virtual tokens then (internals.virtual_tokens)."
    )


# --- are these all? ---


def assumptions(source: str) -> set[str]:
    """What in a module has a "Relies on": the names of definitions, and for the comment of an import the imported module."""
    statements = ast.parse(source).body
    names = set()
    for number, line in enumerate(source.splitlines(), start=1):
        if "Relies on:" in line:
            # A comment belongs to the statement after it.
            statement = next(s for s in statements if s.end_lineno is not None and s.end_lineno >= number)
            name = getattr(statement, "name", None) or getattr(statement, "module", None)
            assert name, (
                f"internals.py:{number}: a Relies on belongs to a definition, or to an import, which it stands before"
            )
            names.add(name)
    return names


def test_every_assumption_is_guarded_and_every_guard_has_one() -> None:
    relying = assumptions(INTERNALS.read_text())
    assert len(relying) > 20
    unguarded = sorted(relying - GUARDED.keys())
    assert not unguarded, (
        f"internals.py says what {', '.join(unguarded)} relies on, and no test of this file @guards it: the next release of "
        "transformers could break it and nobody would be told what."
    )
    unknown = {name: tests for name, tests in GUARDED.items() if name not in relying}
    assert not unknown, (
        f"There is nothing in internals.py by these names that relies on anything: {unknown} @guards them."
    )
