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


def calling_padding_mask() -> torch.Tensor | None:
    """The 2-D `attention_mask` `[batch, seen + new]` that the calling model was given, or None."""
    for _, frame in _calling_modules():
        mask = frame.f_locals.get("attention_mask")
        if isinstance(mask, torch.Tensor) and mask.ndim == 2:
            return mask
    return None


def padding_mask_of_caller() -> torch.Tensor | None:
    """The same, from transformers' mask-building function, which asks the cache for sizes: at every step, so quickly."""
    mask = sys._getframe(2).f_locals.get("attention_mask")
    return mask if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None


def text_model_class(model: PreTrainedModel) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    """The class and config of the text decoder in `model`: itself, or a part of a model of several modalities."""
    config = model.config.get_text_config(decoder=True)
    if config is model.config:
        return type(model), config
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module.config is config:
            return type(module), config
    return class_for_config(config)


def class_for_config(config: PreTrainedConfig) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    """The class that transformers builds for a (text) config.

    Raises:
        ValueError: if transformers has none (remote code).
    """
    config = config.get_text_config(decoder=True)
    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING):
        model_class = mapping.get(type(config), None)
        if isinstance(model_class, type):
            return model_class, config
    raise ValueError(
        f"config= is a {type(config).__name__}, for which transformers has no causal language model class. Leave config "
        "out: the cache then finds the model by itself in its first (uncompiled) call."
    )


def _calling_modules() -> Iterator[tuple[Any, FrameType]]:
    """The modules in whose methods we are and the frames of these, innermost first."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_globals.get("__name__") != "sink_cache.twin":  # a twin has no other caller
        owner = frame.f_locals.get("self")
        if isinstance(owner, torch.nn.Module):
            yield owner, frame
        frame = frame.f_back
