"""The one look at the caller: which model uses the cache, and with which mask and positions.

`generate()` and `forward()` pass a cache neither their model, nor their padding mask, nor their positions. These three are local
variables of the calling frames, where `internals.py` finds them. The rest of the library works with arguments only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from .internals import calling_model, calling_tensor, generate_call, positions_of_caller


@dataclass(frozen=True)
class Call:
    """A call of a model that is under way.

    Attributes:
        model (`PreTrainedModel`, *optional*): the innermost model that was called.
        padding_mask (`torch.Tensor`, *optional*): the model's `attention_mask`, `[batch_size, length]`.
        position_ids (`torch.Tensor`, *optional*): the model's positions, `[1 or batch_size, new_tokens]` or
            `[axes, 1 or batch_size, new_tokens]`.
        generates_without_cache (`bool`): the call comes from `generate(use_cache=False)`.
    """

    model: PreTrainedModel | None
    padding_mask: torch.Tensor | None
    position_ids: torch.Tensor | None
    generates_without_cache: bool


def look_at_caller(*, for_model: bool = True) -> Call:
    """Reads the calling frames.

    Args:
        for_model (`bool`): also look for the model. A cache that was prepared for a model by hand does not need it.
    """
    config = generate_call().get("generation_config") if for_model else None
    return Call(
        calling_model() if for_model else None,
        calling_tensor("attention_mask", {2}, of_models=True),
        positions_of_caller(),
        config is not None and not config.use_cache,
    )
