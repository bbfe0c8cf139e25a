"""Masks that indices cannot express: each query sees its own copy of the sinks; or one query sees every key.

transformers builds masks from indices, and no index says that a query sees one copy of a token and not another. Masks are
built by functions that transformers lets users register (`AttentionMaskInterface`), and these ask the cache for the offset of
the queries: so a cache that gives each query its own sinks answers with a `ChunkOffset`, which knows the mask, and one
whose single tokens need none with a `NoMask`. Everybody else's masks are built as before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .internals import mask_functions, register_mask_function
from .ring import SinkWindowLayer
from .static import StaticSinkWindowLayer


class ChunkOffset(int):
    """The offset of the queries for a layer that shows each query its own copy of the sinks."""

    layer: SinkWindowLayer
    used: bool

    @classmethod
    def of(cls, layer: SinkWindowLayer) -> ChunkOffset:
        """The offset for the next call on this layer."""
        offset = cls(layer.query_offset())
        offset.layer, offset.used = layer, False
        return offset


def chunk_mask(layer: SinkWindowLayer, queries: int) -> torch.Tensor:
    """Who sees whom when a layer takes in several tokens, each with its own copy of the sinks.

    Returns:
        `torch.Tensor`: bool `[queries, kv_length]`, true where a query sees a key. Keys are in the order of
            `SinkWindowLayer.chunk_tokens`: sinks for each query that needs a copy, cached tokens, the new tokens.
    """
    shifts, cached, new = layer.chunk_tokens(queries)
    position = torch.arange(new.start, new.stop, device="cpu")[:, None]
    shift = position + 1 - layer.capacity
    owner = torch.arange(shifts.start, shifts.stop, device="cpu").repeat_interleave(layer.n_sink)[None]
    token = torch.tensor([*cached, *new], device="cpu")[None]
    in_window = (token >= layer.n_sink) & (position - token < layer.window)
    dense = (position < layer.dense()) & (position - token < (layer.sliding_window or len(position)))
    return torch.cat([owner == shift, (token <= position) & ((shift <= 0) | in_window | dense)], dim=1)


class NoMask:
    """In place of the offset: a single query sees every key, and needs no mask. (transformers does so where nothing is compiled.)

    Args:
        layer (`StaticSinkWindowLayer`): knows the offset, for calls with several tokens and attention that has to have masks.
    """

    def __init__(self, layer: StaticSinkWindowLayer) -> None:
        self.layer = layer


KNOWN_TO = ("sdpa", "eager")  # attention functions


def register_mask_functions() -> None:
    """Registers mask functions that know `ChunkOffset` and `NoMask`; once for the process."""
    interface = mask_functions()
    for attention in KNOWN_TO:
        if not isinstance(interface[attention], _MaskFunction):
            register_mask_function(attention, _MaskFunction(interface[attention], attention == "eager"))


class _MaskFunction:
    def __init__(self, build: Callable[..., torch.Tensor | None], additive: bool) -> None:
        self.build, self.additive = build, additive

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor | None:
        offset = kwargs.get("q_offset")
        if isinstance(offset, NoMask):
            # Some models add to their scores whatever eager attention is given.
            if kwargs["q_length"] == 1 and not self.additive:
                return None
            offset = offset.layer.get_query_offset()
            kwargs["q_offset"] = offset.to(kwargs["device"]) if isinstance(offset, torch.Tensor) else offset
        if not isinstance(offset, ChunkOffset) or not offset.layer.evicts_within(kwargs["q_length"]):
            return self.build(*args, **kwargs)
        offset.used = True
        mask = chunk_mask(offset.layer, kwargs["q_length"]).to(kwargs["device"]).expand(kwargs["batch_size"], 1, -1, -1)
        if self.additive:
            dtype = kwargs["dtype"]
            mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
        return mask
