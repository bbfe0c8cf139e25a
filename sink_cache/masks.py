"""Masks that indices cannot express, and the attention that takes them.

transformers builds masks from indices. No index says that a query sees only one of several copies of a token, or that a ring is
partly filled. transformers lets users register mask functions (`AttentionMaskInterface`), and hands them the result of
`Cache.get_query_offset` as `q_offset`. So the cache returns an offset that carries its layer: a `ChunkOffset`, a `RowsOffset` or
a `StepOffset`. Our mask functions recognise these offsets. All other masks are built as before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from .chunk_attention import chunk_of_attention
from .internals import attention_functions, is_own_sdpa, mask_functions, register_attention, register_mask_function
from .layers import RingLayer, StaticSinkWindowLayer
from .ring import visible_besides

if TYPE_CHECKING:
    from typing_extensions import Self

SUPPORTED_ATTENTION = ("sdpa", "eager")  # the implementations whose masks are made here


class LayerOffset(int):
    """The offset of the queries, with the layer that they will attend to."""

    layer: RingLayer

    @classmethod
    def of(cls, layer: RingLayer) -> Self:
        """The offset for the next call on this layer."""
        offset = cls(layer.state.fed)
        offset.layer = layer
        return offset


class ChunkOffset(LayerOffset):
    """For a layer that shows each query its own copy of the sinks.

    Attributes:
        used (`bool`): whether a mask was made with it.
    """

    used = False


def chunk_mask(layer: RingLayer, queries: int) -> torch.Tensor:
    """Builds the mask of an exact chunk, in which each query sees its own copy of the sinks.

    Returns:
        `torch.Tensor`: bool `[queries, kv_length]`, true where a query sees a key. Keys are in the order of
            `RingLayer.chunk`: sinks for each query that needs a copy, cached tokens, new tokens.
    """
    shifts, cached, new = layer.chunk(queries)
    position = torch.arange(new.start, new.stop, device="cpu")[:, None]
    shift = position + 1 - layer.capacity
    owner = torch.arange(shifts.start, shifts.stop, device="cpu").repeat_interleave(layer.n_sink)[None]
    token = torch.cat([torch.arange(part.start, part.stop, device="cpu") for part in (cached, new)])[None]
    in_window = (token >= layer.n_sink) & (position - token < layer.window)
    dense = (position < layer.state.dense_tokens) & (position - token < (layer.sliding_window or len(position)))
    return torch.cat([owner == shift, (token <= position) & ((shift <= 0) | in_window | dense)], dim=1)


class RowsOffset(LayerOffset):
    """For a layer whose rows have different lengths, without a padding mask."""


def rows_mask(layer: RingLayer, queries: int) -> torch.Tensor:
    """Builds the mask of a call on rows of different lengths, in which some new tokens may be padding.

    Returns:
        `torch.Tensor`: bool `[rows, 1, queries, kv_length]`. Keys are the cached tokens (a shorter row's at the end), then the
            new tokens. Queries that are padding see at least themselves.
    """
    state = layer.state
    rows = torch.tensor(state.per_row(state.counts, state.new_pads or (0,)), device="cpu")
    count, skip = rows[:, 0, None, None, None], rows[:, 1, None, None, None]
    visible = visible_besides(int(count.max()), layer.capacity)
    cached, query = torch.arange(visible, device="cpu"), torch.arange(queries, device="cpu")[:, None]
    shown = (cached >= visible - count.clamp(max=layer.capacity - 1)).expand(-1, -1, queries, -1)
    new = torch.arange(queries, device="cpu")
    if layer.is_sliding:  # the new tokens before a query count for its window, too
        shown = shown & (query - skip + visible - cached < layer.window)
    in_window = new > query - layer.window if layer.is_sliding else new >= 0
    return torch.cat([shown, (new <= query) & in_window & ((new >= skip) | (new == query))], dim=-1)


class StepOffset:
    """The offset of the queries for static rings, which show all their slots to a single query.

    Args:
        layer (`StaticSinkWindowLayer`): any ring of the cache. It knows how many tokens each row has.
        all_full (`bool`): every slot of every row is filled, so that attention needs no mask.
    """

    def __init__(self, layer: StaticSinkWindowLayer, all_full: bool) -> None:
        self.layer, self.all_full = layer, all_full


def step_mask(
    layer: StaticSinkWindowLayer, batch_size: int, kv_length: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Builds what is added to the scores of one query of each row, `[batch_size, 1, 1, kv_length]`.

    A row's tokens are in its first slots. The mask is not bool, because SDPA would convert a bool mask in each layer.
    """
    counts = layer.counts.to(device)
    if counts.shape[0] != batch_size:
        counts = counts[:1]  # the cache is empty, and will take a batch of another size
    filled = torch.arange(kv_length, device=device) <= counts[:, None]  # with the new token
    nothing, hidden = (torch.full((), value, dtype=dtype, device=device) for value in (0, torch.finfo(dtype).min))
    return torch.where(filled, nothing, hidden)[:, None, None].expand(batch_size, -1, -1, -1)


def register_mask_functions() -> None:
    """Registers our mask and attention functions, once for the process.

    Another copy of this library, from the hub, may have registered its own functions before or after.
    """
    for attention in SUPPORTED_ATTENTION:
        build = mask_functions()[attention]
        if not any(isinstance(function, _MaskFunction) for function in _with_wrapped(build)):
            register_mask_function(attention, _MaskFunction(build, attention == "eager"))
    attend = attention_functions()["sdpa"]
    if not any(isinstance(function, _RingAttention) for function in _with_wrapped(attend)):
        register_attention("sdpa", _RingAttention(attend))


def _with_wrapped(function: Any) -> Iterator[Any]:
    """Yields a registered function, and the functions that it wraps if it comes from a copy of this library."""
    while function is not None:
        yield function
        function = getattr(function, "wrapped_by_sink_cache", None)


def merges_sinks() -> bool:
    """Whether the attention that merges the sinks of exact chunks wraps transformers' own SDPA, and no other function."""
    register_mask_functions()
    *_, innermost = _with_wrapped(attention_functions()["sdpa"])
    return is_own_sdpa(innermost)


class _MaskFunction:
    def __init__(self, build: Callable[..., torch.Tensor | None], additive: bool) -> None:
        self.wrapped_by_sink_cache, self.additive = build, additive

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor | None:
        offset = kwargs.get("q_offset")
        if not isinstance(offset, (LayerOffset, StepOffset)):
            return self.wrapped_by_sink_cache(*args, **kwargs)
        layer, queries = offset.layer, kwargs["q_length"]
        if queries == 1 and isinstance(layer, StaticSinkWindowLayer) and layer.is_initialized:
            # Some models add eager attention's mask to their scores even if there is none.
            if isinstance(offset, StepOffset) and offset.all_full and not self.additive:
                return None
            dtype = kwargs.get("dtype", layer.keys.dtype)
            return step_mask(layer, kwargs["batch_size"], kwargs["kv_length"], dtype, kwargs["device"])
        if layer.state.new_pads is not None:
            mask = rows_mask(layer, queries)
        elif isinstance(offset, ChunkOffset) and layer.needs_sinks_per_query(queries):
            offset.used = True
            if layer.attention_merges_sinks(queries):
                return None
            mask = chunk_mask(layer, queries)
        else:
            return self.wrapped_by_sink_cache(*args, **kwargs | {"q_offset": layer.state.fed})
        mask = mask.to(kwargs["device"]).expand(kwargs["batch_size"], 1, -1, -1)
        if self.additive:
            dtype = kwargs["dtype"]
            mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
        return mask


class _RingAttention:
    """SDPA that merges the sinks of exact chunks. Unlike transformers' SDPA, it needs no copy of a static ring per query head."""

    def __init__(self, attend: Callable[..., Any]) -> None:
        self.wrapped_by_sink_cache = attend

    def __call__(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        chunk = None if query.shape[2] == 1 else chunk_of_attention(key, value, attention_mask, kwargs)
        if chunk is not None:
            scaling = kwargs.get("scaling")
            return chunk.attend(query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling), None
        # The slots of a static ring are parameters; no other cache returns parameters.
        is_step = query.shape[2] == 1 and attention_mask is not None and isinstance(key, torch.nn.Parameter)
        groups = getattr(module, "num_key_value_groups", 1)
        is_plain = not any(kwargs.get(name) for name in ("dropout", "softcap")) and kwargs.get("position_bias") is None
        if is_step and is_plain and groups > 1 and key.shape[1] * groups == query.shape[1]:
            output = torch.nn.functional.scaled_dot_product_attention(
                query, key, value, attn_mask=attention_mask, scale=kwargs.get("scaling"), enable_gqa=True
            )
            return output.transpose(1, 2).contiguous(), None
        return self.wrapped_by_sink_cache(module, query, key, value, attention_mask, *args, **kwargs)
