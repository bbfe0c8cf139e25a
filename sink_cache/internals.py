"""Everything that the library uses of transformers beyond its documented interface.

A new release of transformers can break the library here and nowhere else. Every definition says what it relies on, in a line
that begins with "Relies on". tests/test_assumptions.py checks each line with transformers alone, and its failures say in a
sentence what has changed. No other module of the library reads frames, private attributes or argument names of transformers.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import FrameType
from typing import Any, cast

import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    Cache,
    CompileConfig,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    MinPLogitsWarper,
    PreTrainedConfig,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

# Relies on: these are the layer classes of a DynamicCache. Recurrent states are LinearAttention layers, and a layer of attention
# beside a recurrent state takes `number_of_states`, which says how many states it has. A sliding layer has the last
# `sliding_window - 1` keys and values in `keys` and `values`, and counts tokens in `cumulative_length`. Layers forget all tokens
# at `reset()`. After `activate_past_recording()`, `crop(-n)` takes back the last n tokens, and cuts sliding layers to their
# window. Layers record until `record_past` is set to False.
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)
from transformers.generation.utils import GenerateDecoderOnlyOutput
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.integrations.fsdp import is_fsdp_managed_module
from transformers.integrations.sdpa_attention import sdpa_attention_forward

# Relies on: these map a config to the model class that transformers builds for it.
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

__all__ = [
    "CacheLayerMixin",
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "GenerateDecoderOnlyOutput",
    "LinearAttentionAndFullAttentionLayer",
    "LinearAttentionCacheLayerMixin",
    "LinearAttentionLayer",
]

# --- names of arguments ---

_CACHE_NAMES = ("cache", "past_key_values")  # from transformers 5.24 on, and before


def cache_kwargs(cache: Cache | None, model: PreTrainedModel | None = None) -> dict[str, Any]:
    """The cache as a keyword argument, by the name that the installed transformers has for it.

    transformers 5.24 renamed `past_key_values` to `cache`, and warns of the old name. Code that runs on both sides of it,
    without warnings, calls `model.generate(**inputs, **cache_kwargs(cache))` and `model(ids, **cache_kwargs(cache, model))`.

    Relies on: a forward names its cache `cache` or `past_key_values` (older code, also on newer transformers). A forward that
    names neither hands its keywords on to the text decoder. `GenerationMixin.prepare_inputs_for_generation` has the name that
    `generate()` and its `model_kwargs` use.

    Args:
        cache (`Cache`, *optional*): any cache, or None.
        model (`PreTrainedModel`, *optional*): whose forward will be called. Without it, the name is that of `generate()`.

    Returns:
        `dict[str, Any]`: the cache under its name.
    """
    owners: list[Callable[..., Any]] = [GenerationMixin.prepare_inputs_for_generation]
    if model is not None:
        owners = [type(model).forward, type(text_model(model)).forward, *owners]
    parameters = [inspect.signature(owner).parameters for owner in owners]
    return {next(name for names in parameters for name in _CACHE_NAMES if name in names): cache}


def take_cache(model_kwargs: dict[str, Any]) -> Any:
    """Takes the cache out of the keyword arguments of a decoding loop, whichever name it has; None without one.

    Relies on: `generate()` hands a decoding loop its cache by one of the two names.
    """
    found = [model_kwargs.pop(name, None) for name in _CACHE_NAMES]
    return next((cache for cache in found if cache is not None), None)


def by_both_names(loop: Callable[..., Any]) -> Callable[..., Any]:
    """Lets `generate(cache=..., custom_generate=loop)` work before transformers 5.24, which would refuse the newer name.

    Relies on: `generate()` hands a decoding loop the arguments that only the loop's signature names.
    """
    if "cache" not in cache_kwargs(None):
        signature = inspect.signature(loop)
        *parameters, keywords = signature.parameters.values()
        cache = inspect.Parameter("cache", inspect.Parameter.KEYWORD_ONLY, default=None)
        loop.__signature__ = signature.replace(parameters=[*parameters, cache, keywords])  # type: ignore[attr-defined]
    return loop


def takes_argument(model: PreTrainedModel | type[PreTrainedModel], name: str) -> bool:
    """Whether the model's forward names this argument.

    Relies on: decorators of a forward leave its signature visible.
    """
    model_class = model if isinstance(model, type) else type(model)
    return name in inspect.signature(model_class.forward).parameters


def takes_any_keyword(model: PreTrainedModel) -> bool:
    """Whether the model's forward accepts arguments that it does not name, and perhaps hands them on."""
    parameters = inspect.signature(type(model).forward).parameters.values()
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)


# --- models and configs ---


def text_model(model: PreTrainedModel) -> PreTrainedModel:
    """The text decoder in `model`: itself, or a part of a model of several modalities.

    Relies on: a part's `config` is the object that `config.get_text_config(decoder=True)` returns, and its `base_model` is the
    decoder without a head. Wrappers of a model (torch.compile, PEFT) are other classes, but have these attributes.

    Raises:
        TypeError: if `model` is no transformers model.
        NotImplementedError: if it is an encoder-decoder.
    """
    if not (isinstance(model, torch.nn.Module) and hasattr(model, "config")):
        raise TypeError(f"model must be a transformers model, but is a {type(model).__name__}")
    refuse_encoder_decoder(model.config, type(model))
    config = model.config.get_text_config(decoder=True)
    parts = (module for module in model.modules() if isinstance(module, PreTrainedModel) and module.config is config)
    # The head is left out, because generate() shows the whole model and forward() only the part: both have this decoder.
    decoder = next(parts, model).base_model
    return decoder if isinstance(decoder, PreTrainedModel) else model


def refuse_encoder_decoder(config: PreTrainedConfig, model_class: type) -> None:
    """Refuses encoder-decoders; `model_class` is for the message.

    Relies on: `config.is_encoder_decoder`, which is False in a decoder that is taken out of such a model.

    Raises:
        NotImplementedError: if it is an encoder-decoder.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise NotImplementedError(
            f"SinkWindowCache does not support model type {config.model_type!r} ({model_class.__name__}): it is an "
            "encoder-decoder, whose decoder also keeps keys of all that the encoder read. Use DynamicCache with this model."
        )


def without_compiler(model: PreTrainedModel) -> PreTrainedModel:
    """Returns the model that `torch.compile` has wrapped, and any other model as it is.

    Relies on: PyTorch keeps the wrapped model as `_orig_mod`.
    """
    return cast(PreTrainedModel, getattr(model, "_orig_mod", model))


def without_wrappers(model: PreTrainedModel) -> dict[str, torch.nn.Module]:
    """Returns all modules of a model by their path, as if no library had wrapped any of them.

    Relies on: torch.compile keeps a module as `_orig_mod`, FSDP as `_fsdp_wrapped_module`, activation checkpointing as
    `_checkpoint_wrapped_module`.
    """
    wrappers = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
    paths = {}
    for path, module in model.named_modules():
        # A module comes after its wrapper, and takes its place.
        paths[".".join(part for part in path.split(".") if part not in wrappers)] = module
    return paths


# Packages whose hooks and forwards leave results as they are: they compile, shard, offload, or record outputs.
_TRUSTED = {"torch", "transformers", "accelerate", "peft", "deepspeed"}


def is_of_library(function: Any) -> bool:
    """Whether a hook was made by a library that hooks modules without changing what they compute.

    Relies on: a function's globals are those of the module that defines it (`functools.wraps` copies `__module__`).
    """
    while isinstance(function, functools.partial):
        function = function.func
    function = getattr(function, "__func__", function)
    home = getattr(function, "__globals__", {}).get("__name__") or type(function).__module__
    return str(home).partition(".")[0] in _TRUSTED


def forward_before_libraries(module: torch.nn.Module) -> Any:
    """The `forward` that a module would have if libraries had not wrapped it on the instance.

    Relies on: accelerate puts its own partial function there, and keeps the earlier function as `_old_forward`. A compiled
    function keeps the earlier one as `_torchdynamo_orig_callable`. A function around the compiled one has it as `__wrapped__`.
    """
    forward: Any = module.forward
    while not inspect.ismethod(forward):
        before: Any = getattr(forward, "_torchdynamo_orig_callable", None)
        if before is None and is_of_library(forward):
            is_accelerates = isinstance(forward, functools.partial)
            before = getattr(module, "_old_forward", None) if is_accelerates else getattr(forward, "__wrapped__", None)
        if before is None or before is forward:
            break
        forward = before
    return forward


def modules_that_use_a_cache(model: PreTrainedModel, call: Callable[[Cache], Any]) -> list[torch.nn.Module]:
    """Returns the modules that put keys into a cache. `call` must call the model with the cache that it is given.

    Relies on: the innermost module among the callers of `Cache.update` is the attention.
    """
    users: list[torch.nn.Module] = []

    class Watching(DynamicCache):
        def update(self, *args: Any, **kwargs: Any) -> Any:
            users.append(next(_calling_modules())[0])
            return super().update(*args, **kwargs)

    call(Watching(config=model.config))
    return users


def class_for_config(config: PreTrainedConfig) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    """The class that transformers builds for a (text) config.

    Raises:
        ValueError: if transformers has none (remote code).
        NotImplementedError: if it is the config of an encoder-decoder.
    """
    refuse_encoder_decoder(config, type(config))
    config = config.get_text_config(decoder=True)
    for mapping in (MODEL_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING):
        model_class = mapping.get(type(config), None)
        if isinstance(model_class, type):
            return model_class, config
    raise ValueError(
        f"config= is a {type(config).__name__}, for which transformers has no causal language model class. Leave config "
        "out: the cache then finds the model by itself in its first (uncompiled) call."
    )


def attention_of(config: PreTrainedConfig) -> str:
    """The attention implementation of a model of this config, such as "sdpa".

    Relies on: `config._attn_implementation`.
    """
    return str(config._attn_implementation)


def set_attention(config: PreTrainedConfig, attention: str) -> None:
    """Chooses the attention implementation of a model that will be made from this config; see `attention_of`."""
    config._attn_implementation = attention


def leave_dtype_open(config: PreTrainedConfig) -> None:
    """Lets a model that will be made from this config, and its parts, have the default dtype.

    Relies on: `AutoModel.from_config`, which makes parts, sets the process's default dtype to a `config.dtype` that is not None.
    """
    for name in config.sub_configs:
        if isinstance(part := getattr(config, name, None), PreTrainedConfig):
            leave_dtype_open(part)
    config.dtype = None


def layers_of(config: PreTrainedConfig) -> list[Any]:
    """The cache layers that transformers has for a model of this config, one for each layer of the model.

    Relies on: `DynamicCache(config=...)` makes them at once.
    """
    return list(DynamicCache(config=config).layers)


def layer_class_is_known(layer: Any) -> bool:
    """Whether this cache layer's class is one of transformers' general ones, and not a model's own.

    Relies on: the general ones are defined in one module, transformers.cache_utils.
    """
    return type(layer).__module__ == DynamicLayer.__module__


def has_indexer(layer: Any) -> bool:
    """Whether this cache layer keeps an index of every token, for sparse attention.

    Relies on: such layers have a method `update_indexer`.
    """
    return hasattr(layer, "update_indexer")


def is_recurrent_only(layer: Any) -> bool:
    """Whether this cache layer holds a recurrent state and no keys.

    Relies on: layers with keys are CacheLayerMixin, those with a recurrent state are LinearAttentionCacheLayerMixin.
    """
    return isinstance(layer, LinearAttentionCacheLayerMixin) and not isinstance(layer, CacheLayerMixin)


def can_take_back(layer: Any) -> bool:
    """Whether `layer.crop` can put the layer back as it was.

    Relies on: layers say so in `is_croppable`.
    """
    return bool(layer.is_croppable)


def end_recording(layer: Any) -> None:
    """Ends the recording of a layer of transformers, and leaves it as if it had not recorded.

    Relies on: layers that record have `record_past`, and keep all keys and all inputs of convolutions until `crop`. A layer that
    does not record writes into `conv_kernel_size` inputs, with zeros before the first token.
    """
    if isinstance(layer, DynamicSlidingWindowLayer) and layer.is_initialized:
        layer.crop(0)
    for index, inputs in getattr(layer, "conv_states", {}).items():
        if inputs is not None:
            size = layer.conv_kernel_size[index]
            last = inputs[..., -size:]
            layer.conv_states[index] = torch.nn.functional.pad(last, (size - last.shape[-1], 0))
    layer.record_past = False


def layer_index(module: torch.nn.Module) -> int | None:
    """The index of the layer to which this attention module belongs; None for other modules.

    Relies on: attention modules have it as `layer_idx`.
    """
    index = getattr(module, "layer_idx", None)
    return index if isinstance(index, int) else None


def virtual_tokens(model: torch.nn.Module) -> str:
    """The method by which PEFT gives this model virtual tokens ("prefix tuning", "prompt tuning", …); empty without them.

    Relies on: PEFT's wrapper has `active_peft_config`, with `is_prompt_learning` and `peft_type`. While it generates, the model
    has the wrapper's method `prepare_inputs_for_generation`, unless the adapter is disabled.
    """
    wrapper = getattr(vars(model).get("prepare_inputs_for_generation"), "__self__", model)
    config = getattr(wrapper, "active_peft_config", None)
    if not getattr(config, "is_prompt_learning", False):
        return ""
    return str(config.peft_type.value).replace("_", " ").lower()  # type: ignore[union-attr]


def virtual_tokens_in_cache(method: str) -> bool:
    """Whether this method of PEFT hands virtual tokens on as the keys and values of a cache that it makes itself."""
    return method in ("prefix tuning", "cartridge")


def peft_finds_cache(model: torch.nn.Module) -> bool:
    """Whether PEFT knows the name of `generate()`'s cache. While PEFT sees no tokens in a cache, it adds virtual tokens.

    Relies on: PEFT looks the cache up by its name in `prepare_inputs_for_generation`.
    """
    function = getattr(vars(model).get("prepare_inputs_for_generation"), "__func__", None)
    return function is None or next(iter(cache_kwargs(None))) in function.__code__.co_consts


def device_of(module: torch.nn.Module) -> torch.device | None:
    """Where a module computes: where its first weight is, or where accelerate brings it (an offloaded weight is on "meta").

    Relies on: accelerate's hook of a module is `_hf_hook` and has an `execution_device`.
    """
    for part in module.modules():
        for weight in part.parameters(recurse=False):
            if not weight.is_meta:
                return weight.device
            device = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
            if device is not None:
                return torch.device(device)
    return None


# --- masks ---


def mask_functions() -> Any:
    """The registry of functions that make attention masks, by attention implementation.

    Relies on: mask functions are called with `q_offset` (what `Cache.get_query_offset` returned, unchanged), `q_length`,
    `batch_size`, `device` and `dtype` by keyword. A function that returns None leaves the mask out.
    """
    return AttentionMaskInterface()


def register_mask_function(attention: str, function: Callable[..., Any]) -> None:
    """Puts a mask function in the place of transformers' own; see `mask_functions`."""
    AttentionMaskInterface.register(attention, function)


def attention_functions() -> Any:
    """The registry of attention functions.

    Relies on: they are called with the attention module, `query` `[batch, heads, queries, head_dim]`, `key`, `value` and the mask
    by position, with `scaling` by keyword, and return `[batch, queries, heads, head_dim]` and the attention weights or None.
    """
    return AttentionInterface()


def is_own_sdpa(function: Any) -> bool:
    """Whether an attention function is the one that transformers has for "sdpa".

    Relies on: that function computes softmax(query · key * scaling + mask) · value of its arguments, with a dropout. It adds
    `position_bias` to the mask and refuses a `softcap`. Of the other keywords only `is_causal` matters, if there is no mask.
    """
    return function is sdpa_attention_forward


def register_attention(attention: str, function: Callable[..., Any]) -> None:
    """Puts an attention function in the place of transformers' own; see `attention_functions`."""
    AttentionInterface.register(attention, function)


# --- what a decoding loop needs of generate() ---


def pad_token_of(generation_config: GenerationConfig) -> Any:
    """The token that fills finished rows, a tensor; None without one.

    Relies on: `generate()` puts it into `generation_config._pad_token_tensor`.
    """
    return generation_config._pad_token_tensor


def stops_at_token(criterion: Any) -> bool:
    """Whether a stopping criterion is the one that `generate()` makes for an `eos_token_id`.

    Relies on: this criterion has an attribute `eos_token_id`.
    """
    return hasattr(criterion, "eos_token_id")


def eos_tokens_of(criteria: Iterable[Any]) -> frozenset[int]:
    """The tokens at which these stopping criteria end a text; see `stops_at_token`."""
    ending = (criterion.eos_token_id for criterion in criteria if stops_at_token(criterion))
    return frozenset(token for tokens in ending for token in tokens.flatten().tolist())


_WARPERS = {
    RepetitionPenaltyLogitsProcessor: ("repetition_penalty", "penalty"),
    TemperatureLogitsWarper: ("temperature", "temperature"),
    TopKLogitsWarper: ("top_k", "top_k"),
    TopPLogitsWarper: ("top_p", "top_p"),
    MinPLogitsWarper: ("min_p", "min_p"),
}


def warper_options(processors: Sequence[Any]) -> dict[str, Any] | str:
    """The options of these processors by name, or the class name of a processor that is unknown or out of order.

    Relies on: `generate()` makes the processors of `_WARPERS` from these options, in this order. They keep the options in these
    attributes.
    """
    order, options, last = list(_WARPERS), {}, -1
    for processor in processors:
        kind = type(processor)
        if kind not in order[last + 1 :]:
            return kind.__name__
        option, attribute = _WARPERS[kind]
        options[option], last = getattr(processor, attribute), order.index(kind)
    return options


def takes_logits_to_keep(model: PreTrainedModel) -> bool:
    """Whether the model's forward can leave out the logits of all but the last tokens.

    Relies on: such a forward has an argument `logits_to_keep`.
    """
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def would_compile(model: PreTrainedModel, cache: Cache, generation_config: GenerationConfig) -> bool:
    """Whether `generate()` would compile the steps of this model with this cache.

    Relies on: `model._valid_auto_compile_criteria(model_kwargs, generation_config)`.
    """
    return bool(model._valid_auto_compile_criteria(cache_kwargs(cache), generation_config))  # type: ignore[operator]


def compiled_forward(model: PreTrainedModel, compile_config: CompileConfig | None) -> Callable[..., Any]:
    """The model's forward, compiled and kept as `generate()` keeps it.

    Relies on: `model.get_compiled_call(compile_config)`.
    """
    return model.get_compiled_call(compile_config)


def generate_output(sequences: torch.Tensor, cache: Cache) -> GenerateDecoderOnlyOutput:
    """What `generate(return_dict_in_generate=True)` returns.

    Relies on: the output names the cache as `generate()` does.
    """
    return GenerateDecoderOnlyOutput(sequences=sequences, **cache_kwargs(cache))  # type: ignore[arg-type]


class GivenToGenerate:
    """A cache that learns that it was given to `generate()`, so that it can refuse an encoder-decoder first, in its own words.

    Relies on: `generate()` sets `_is_user_defined` on a cache that it was given, before it does anything else with it.
    """

    _given = False

    @property
    def _is_user_defined(self) -> bool:
        return self._given

    @_is_user_defined.setter
    def _is_user_defined(self, given: bool) -> None:
        self._begin_generate()
        self._given = given

    def _begin_generate(self) -> None:
        """Raises an error if the cache is not for the calling model."""


def generate_call() -> dict[str, Any]:
    """The local variables of the `generate()` that is running; empty without one.

    Relies on: a function `generate` in a module of transformers, with local variables `generation_config`, `streamer`,
    `stopping_criteria` and `has_default_max_length`.
    """
    for frame in _frames():
        if frame.f_code.co_name == "generate" and frame.f_globals.get("__name__", "").startswith("transformers."):
            return frame.f_locals
    return {}


def keeps_processes_in_step(model: PreTrainedModel) -> bool:
    """Whether the running `generate()` goes on in each process until all processes have ended.

    Relies on: `generate()` has a local variable `synced_gpus`. None means true where several processes share a model by FSDP or
    DeepSpeed's ZeRO 3.
    """
    asked_for = generate_call().get("synced_gpus")
    if asked_for is not None:
        return bool(asked_for)
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    several = distributed and torch.distributed.get_world_size() > 1
    return several and (is_deepspeed_zero3_enabled() or is_fsdp_managed_module(model))


def prompt_length() -> int:
    """How many tokens the prompt of the running `generate()` has; 0 without one.

    Relies on: `generate()` keeps the prompt in a local variable `input_ids` to its end. It hands decoding loops a reference.
    """
    prompt = generate_call().get("input_ids")
    return prompt.shape[1] if isinstance(prompt, torch.Tensor) and prompt.ndim == 2 else 0


# --- frames: `generate()` and `forward()` pass a cache neither their model nor their padding mask ---

# Packages whose frames may lie between a model and the code that called it.
_LIBRARIES = {"torch", "transformers", "transformers_modules", "accelerate", "peft"}


def calling_model() -> PreTrainedModel | None:
    """The innermost transformers model whose `forward()` or `generate()` is running, or None.

    Relies on: methods of a model have the model as their first local variable, `self`.

    Raises:
        NotImplementedError: if the model is a part of an encoder-decoder.
    """
    models = [owner for owner, _ in _calling_modules() if isinstance(owner, PreTrainedModel)]
    for model in models:  # an encoder-decoder is further out than its decoder, which may not say so
        refuse_encoder_decoder(model.config, type(model))
    return models[0] if models else None


def calling_model_with_virtual_tokens() -> PreTrainedModel | None:
    """The innermost calling model to which PEFT gives virtual tokens, or None; see `virtual_tokens`."""
    models = (owner for owner, _ in _calling_modules() if isinstance(owner, PreTrainedModel))
    return next((model for model in models if virtual_tokens(model)), None)


def calling_tensor(name: str, dimensions: set[int], *, of_models: bool = False) -> torch.Tensor | None:
    """The innermost tensor that the calling model has under this name (`attention_mask`, `position_ids`).

    Relies on: a forward keeps these arguments in local variables of the same names. A forward that is given no positions
    numbers its tokens from `cache.get_seq_length()` in `position_ids`.

    Args:
        dimensions (`set[int]`): how many dimensions the tensor may have.
        of_models (`bool`): leave out tensors of a model's layers. (Flash attention's padding masks are cut to the keys there.)
    """
    for owner, frame in _calling_modules():
        if name in frame.f_code.co_varnames and (not of_models or isinstance(owner, PreTrainedModel)):
            value = frame.f_locals.get(name)
            if isinstance(value, torch.Tensor) and value.ndim in dimensions:
                return value
    return None


def positions_of_caller() -> torch.Tensor | None:
    """The positions by which the calling model rotates: `[rows, tokens]`, or `[axes, rows, tokens]` with axes for images.

    Relies on: a text model with several axes (M-RoPE) keeps them in its own `position_ids`. It may give its layers another tensor
    of that name, with the index of each token. (If there are four axes, the first of them is that index.)
    """
    of_model = calling_tensor("position_ids", {2, 3}, of_models=True)
    return of_model if of_model is not None and of_model.ndim == 3 else calling_tensor("position_ids", {2, 3})


def padding_mask_of_caller() -> torch.Tensor | None:
    """The 2-D `attention_mask` of the function that makes masks, which asks the cache for sizes at every step.

    Relies on: that function has it in a local variable `attention_mask`.
    """
    mask = _mask_making_local("attention_mask")
    return mask if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None


def shows_blocks_of_tokens() -> bool:
    """Whether a mask is being made in which blocks of tokens (images) also see what comes after them.

    Relies on: the function that makes such masks has the blocks in a local variable `block_sequence_ids`.
    """
    return _mask_making_local("block_sequence_ids") is not None


def _mask_making_local(name: str) -> Any:
    """A local variable of the innermost mask-making function that has it; None outside of such functions.

    Relies on: masks are made by functions of the module transformers.masking_utils, which call each other.
    """
    inside = False
    for frame in _frames():
        if frame.f_globals.get("__name__") == "transformers.masking_utils":
            inside = True
            # A frame that the compiler resumes lacks the variables that it no longer uses. Its callers may still have them.
            if name in frame.f_code.co_varnames and name in (local := frame.f_locals):
                return local[name]
        elif inside:
            return None
    return None


def _frames() -> Iterator[FrameType]:
    """The frames of our callers, innermost first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _calling_modules() -> Iterator[tuple[Any, FrameType]]:
    """Yields the modules whose methods are running, with their frames, innermost first; ends where the model was called."""
    inside_model = False
    for frame in _frames():
        caller = frame.f_globals.get("__name__", "").partition(".")[0]
        # Reading f_locals keeps a frame's variables alive until it returns, so leave frames without `self` alone.
        owner = frame.f_locals.get("self") if frame.f_code.co_varnames[:1] == ("self",) else None
        is_model = isinstance(owner, PreTrainedModel)
        if inside_model and not is_model and caller not in _LIBRARIES:
            return
        if isinstance(owner, torch.nn.Module):
            yield owner, frame
        inside_model |= is_model
