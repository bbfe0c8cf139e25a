"""The one look at the caller: which model is using the cache, and is its batch padded.

`generate()` and `forward()` pass a cache neither their model nor their padding mask, so both are read from the calling
frames, where they are plain local variables. This is the only such look in the library; everything else is arguments.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING


def calling_model() -> PreTrainedModel | None:
    """The innermost transformers model in whose `forward()` or `generate()` we are, or None."""
    for owner, _ in _calling_modules():
        if isinstance(owner, PreTrainedModel):
            return owner
    return None


def calling_tensor(name: str, dimensions: set[int], *, of_models: bool = False) -> torch.Tensor | None:
    """What the calling model was given as `attention_mask`, `position_ids` or the like: the innermost such tensor.

    Args:
        of_models (`bool`): not what their layers were given. (Flash attention's padding masks are cut to the keys there.)
    """
    for owner, frame in _calling_modules():
        if name in frame.f_code.co_varnames and (not of_models or isinstance(owner, PreTrainedModel)):
            value = frame.f_locals.get(name)
            if isinstance(value, torch.Tensor) and value.ndim in dimensions:
                return value
    return None


def padding_mask_of_caller() -> torch.Tensor | None:
    """The 2-D `attention_mask` in transformers' mask-building function, which asks the cache for sizes at every step."""
    mask = sys._getframe(2).f_locals.get("attention_mask")
    return mask if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None


def shows_blocks_of_tokens() -> bool:
    """Whether that mask is one in which blocks of tokens (images) also see what comes after them."""
    caller = sys._getframe(2).f_back
    return caller is not None and caller.f_locals.get("block_sequence_ids") is not None


def generate_call() -> dict[str, Any]:
    """The local variables of the `generate()` in which we are, for what it hands on neither to a model nor to a decoding loop;
    empty without one.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "generate" and frame.f_globals.get("__name__", "").startswith("transformers."):
            return frame.f_locals
        frame = frame.f_back
    return {}


def text_model(model: PreTrainedModel) -> PreTrainedModel:
    """The text decoder in `model`: itself, or a part of a model of several modalities.

    Raises:
        TypeError: if it is no transformers model.
    """
    # Wrappers of a model (torch.compile, PEFT) are other classes, but have these.
    if not (isinstance(model, torch.nn.Module) and hasattr(model, "config")):
        raise TypeError(f"model must be a transformers model, but is a {type(model).__name__}")
    config = model.config.get_text_config(decoder=True)
    parts = (module for module in model.modules() if isinstance(module, PreTrainedModel) and module.config is config)
    # Without its head, so that generate(), called on the whole, and forward(), running in the part, show the same.
    decoder = next(parts, model).base_model
    return decoder if isinstance(decoder, PreTrainedModel) else model


def device_of(module: torch.nn.Module) -> torch.device | None:
    """Where a module computes: where its first weight is, or where accelerate brings it (an offloaded weight is on "meta")."""
    for part in module.modules():
        for weight in part.parameters(recurse=False):
            if not weight.is_meta:
                return weight.device
            device = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
            if device is not None:
                return torch.device(device)
    return None


def class_for_config(config: PreTrainedConfig) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    """The class that transformers builds for a (text) config.

    Raises:
        ValueError: if transformers has none (remote code).
    """
    config = config.get_text_config(decoder=True)
    for mapping in (MODEL_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING):
        model_class = mapping.get(type(config), None)
        if isinstance(model_class, type):
            return model_class, config
    raise ValueError(
        f"config= is a {type(config).__name__}, for which transformers has no causal language model class. Leave config "
        "out: the cache then finds the model by itself in its first (uncompiled) call."
    )


def _calling_modules() -> Iterator[tuple[Any, FrameType]]:
    """The modules in whose methods we are and the frames of these, innermost first; ends where the model was called."""
    frame: FrameType | None = sys._getframe(2)
    inside_model = False
    while frame is not None:
        caller = frame.f_globals.get("__name__", "").partition(".")[0]
        # Reading f_locals keeps a frame's variables alive until it returns, so leave frames without `self` alone.
        owner = frame.f_locals.get("self") if frame.f_code.co_varnames[:1] == ("self",) else None
        is_model = isinstance(owner, PreTrainedModel)
        if inside_model and not is_model and caller not in _LIBRARIES:
            return
        if isinstance(owner, torch.nn.Module):
            yield owner, frame
        inside_model |= is_model
        frame = frame.f_back


_LIBRARIES = {"torch", "transformers", "transformers_modules", "accelerate", "peft"}
