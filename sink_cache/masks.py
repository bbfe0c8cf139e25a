"""Masks that indices cannot express, and the attention that takes them.

transformers builds masks from indices. No index says that a query sees one copy of a token and not another, or that the slots of
a ring are filled in part. transformers passes what `Cache.get_query_offset` returns on as `q_offset`, to functions that it lets
users register (`AttentionMaskInterface`). So the cache returns an offset that carries its layer: a `ChunkOffset`, a `RowsOffset`
or a `StepOffset`. Our mask functions recognise these. All other masks are built as before.
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

KNOWN_TO = ("sdpa", "eager")  # attention implementations


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
        used (`bool`): a mask was made with it.
    """

    used = False


def chunk_mask(layer: RingLayer, queries: int) -> torch.Tensor:
    """Who sees whom when a layer takes in several tokens, each with its own copy of the sinks.

    Returns:
        `torch.Tensor`: bool `[queries, kv_length]`, true where a query sees a key. Keys are in the order of
            `RingLayer.chunk`: sinks for each query that needs a copy, cached tokens, the new tokens.
    """
    shifts, cached, new = layer.chunk(queries)
    position = torch.arange(new.start, new.stop, device="cpu")[:, None]
    shift = position + 1 - layer.capacity
    owner = torch.arange(shifts.start, shifts.stop, device="cpu").repeat_interleave(layer.n_sink)[None]
    tokens = [torch.arange(some.start, some.stop, device="cpu") for some in (cached, new)]
    token = torch.cat(tokens)[None]
    in_window = (token >= layer.n_sink) & (position - token < layer.window)
    dense = (position < layer.state.dense_tokens) & (position - token < (layer.sliding_window or len(position)))
    return torch.cat([owner == shift, (token <= position) & ((shift <= 0) | in_window | dense)], dim=1)


class RowsOffset(LayerOffset):
    """For a layer whose rows have different lengths, and are not told apart by a padding mask."""


def rows_mask(layer: RingLayer, queries: int) -> torch.Tensor:
    """Who sees whom when rows of different lengths take in tokens, some of which are padding.

    Returns:
        `torch.Tensor`: bool `[rows, 1, queries, kv_length]`. Keys are cached tokens, those of a shorter row at the end, and the
            new tokens. Queries that are padding see themselves at least.
    """
    state = layer.state
    rows = torch.tensor(state.per_row(state.counts, state.skips or (0,)), device="cpu")
    count, skip = rows[:, 0, None, None, None], rows[:, 1, None, None, None]
    visible = visible_besides(int(count.max()), layer.capacity)
    cached, query = torch.arange(visible, device="cpu"), torch.arange(queries, device="cpu")[:, None]
    shown = (cached >= visible - count.clamp(max=layer.capacity - 1)).expand(-1, -1, queries, -1)
    new = torch.arange(queries, device="cpu")
    if layer.is_sliding:  # a query sees `window` tokens, also of those that come with it
        shown = shown & (query - skip + visible - cached < layer.window)
    in_window = new > query - layer.window if layer.is_sliding else new >= 0
    return torch.cat([shown, (new <= query) & in_window & ((new >= skip) | (new == query))], dim=-1)


class StepOffset:
    """The offset of the queries for static rings, which show all their slots to a single query.

    Args:
        layer (`StaticSinkWindowLayer`): knows how many tokens each row has.
        all_full (`bool`): every slot of every row is filled, so that attention needs no mask.
    """

    def __init__(self, layer: StaticSinkWindowLayer, all_full: bool) -> None:
        self.layer, self.all_full = layer, all_full


def step_mask(
    layer: StaticSinkWindowLayer, batch_size: int, kv_length: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """What to add to the scores of a single query of each row, `[batch_size, 1, 1, kv_length]`.

    A row's tokens are in its first slots. Numbers are added rather than a bool mask used, because SDPA would turn a bool mask
    into numbers in each layer.
    """
    counts = layer.counts.to(device)
    if counts.shape[0] != batch_size:
        counts = counts[:1]  # of an empty cache, which will take another batch
    filled = torch.arange(kv_length, device=device) <= counts[:, None]  # with the new token
    nothing, hidden = (torch.full((), value, dtype=dtype, device=device) for value in (0, torch.finfo(dtype).min))
    return torch.where(filled, nothing, hidden)[:, None, None].expand(batch_size, -1, -1, -1)


def register_mask_functions() -> None:
    """Registers functions that know `ChunkOffset` and `StepOffset`; once for the process.

    The process may have another copy of this library, from the hub, with functions of its own around ours or within.
    """
    for attention in KNOWN_TO:
        build = mask_functions()[attention]
        if not any(isinstance(function, _MaskFunction) for function in _with_wrapped(build)):
            register_mask_function(attention, _MaskFunction(build, attention == "eager"))
    attend = attention_functions()["sdpa"]
    if not any(isinstance(function, _RingAttention) for function in _with_wrapped(attend)):
        register_attention("sdpa", _RingAttention(attend))


def _with_wrapped(function: Any) -> Iterator[Any]:
    """A registered function, and those that it wraps if it is of a copy of this library."""
    while function is not None:
        yield function
        function = getattr(function, "wrapped_by_sink_cache", None)


def merges_sinks() -> bool:
    """Whether what merges the sinks of exact chunks stands for transformers' own SDPA, and not for another function."""
    register_mask_functions()
    *_, innermost = _with_wrapped(attention_functions()["sdpa"])
    return is_own_sdpa(innermost)


class _MaskFunction:
    def __init__(self, build: Callable[..., torch.Tensor | None], additive: bool) -> None:
        self.wrapped_by_sink_cache, self.additive = build, additive

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor | None:
        offset, queries = kwargs.get("q_offset"), kwargs.get("q_length")
        if not isinstance(offset, (LayerOffset, StepOffset)):
            return self.wrapped_by_sink_cache(*args, **kwargs)
        layer = offset.layer
        if queries == 1 and isinstance(layer, StaticSinkWindowLayer) and layer.is_initialized:
            # Some models add to their scores whatever eager attention is given.
            if isinstance(offset, StepOffset) and offset.all_full and not self.additive:
                return None
            dtype = kwargs.get("dtype", layer.keys.dtype)
            return step_mask(layer, kwargs["batch_size"], kwargs["kv_length"], dtype, kwargs["device"])
        if layer.state.skips is not None:
            mask = rows_mask(layer, kwargs["q_length"])
        elif isinstance(offset, ChunkOffset) and layer.evicts_within(kwargs["q_length"]):
            offset.used = True
            if layer.merges_within(kwargs["q_length"]):
                return None
            mask = chunk_mask(layer, kwargs["q_length"])
        else:
            return self.wrapped_by_sink_cache(*args, **kwargs | {"q_offset": layer.state.fed})
        mask = mask.to(kwargs["device"]).expand(kwargs["batch_size"], 1, -1, -1)
        if self.additive:
            dtype = kwargs["dtype"]
            mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
        return mask


class _RingAttention:
    """SDPA that merges the sinks of exact chunks, and that does not copy the keys of a static ring for each query head, as
    transformers' does whenever there is a mask.
    """

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
