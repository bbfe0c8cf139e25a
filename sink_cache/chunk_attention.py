"""Attention of an exact chunk in two parts: each query's sinks, and its window.

Queries of a chunk have different distances to the sinks. Here the sinks are not copied for each query. Each query gets its own
scores with the `n_sink` keys, and ordinary sliding-window attention over all other tokens. The two results are merged by their
log-sum-exp, as flash attention merges its blocks. This equals one softmax over both.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch

from .ring import evicted_before
from .rotary import ForwardRotation

_BLOCK = 128  # how many queries are computed at once where no kernel knows windows


class ExactChunk:
    """The sinks of one layer, for the queries of one exact chunk. The layer's keys and values carry this object to attention.

    Args:
        sink_keys (`torch.Tensor`): `[batch_size, kv_heads, n_sink, head_dim]`, as the model made them.
        sink_values (`torch.Tensor`): `[batch_size, kv_heads, n_sink, value_dim]`.
        rotation (`ForwardRotation`): how keys of the layer move forward.
        count (`int`): how many tokens came before the chunk.
        window (`int`): how many tokens a query sees beside the sinks, itself included.
        unmerged (`set[ExactChunk]`): holds the chunk until attention has merged its sinks.
    """

    def __init__(
        self,
        sink_keys: torch.Tensor,
        sink_values: torch.Tensor,
        rotation: ForwardRotation,
        count: int,
        window: int,
        unmerged: set[ExactChunk],
    ) -> None:
        self.sink_keys, self.sink_values, self.rotation = sink_keys, sink_values, rotation
        self.count, self.window, self.unmerged = count, window, unmerged
        unmerged.add(self)

    def carried_by(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Attaches this chunk to the window's keys and values. Tensors that are computed from them do not carry it."""
        keys.exact_chunk = values.exact_chunk = self  # type: ignore[attr-defined]
        return keys, values

    @torch.compiler.disable(reason="chunks are read outside of graphs")  # type: ignore[untyped-decorator]
    def attend(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:
        """Computes the attention of each query to its sinks and its window.

        Args:
            query (`torch.Tensor`): `[batch_size, heads, queries, head_dim]`.
            keys, values (`torch.Tensor`): `[batch_size, kv_heads, tokens, head_dim or value_dim]`, the tokens in the window of
                any query, without sinks. They are in the order of the text and end with the last query's own.
            scale (`float`): the factor of the scores.

        Returns:
            `torch.Tensor`: `[batch_size, queries, heads, value_dim]`, in the dtype of the query.
        """
        self.unmerged.discard(self)
        n_sink = self.sink_keys.shape[2]
        are_sinks = max(0, n_sink - self.count)  # how many queries are sinks themselves, and see no window
        windowed, window_total = window_attention(query[:, :, are_sinks:], keys, values, self.window, scale)
        if not n_sink:
            return windowed
        if are_sinks:
            windowed = torch.nn.functional.pad(windowed, (0, 0, 0, 0, are_sinks, 0))
            window_total = torch.nn.functional.pad(window_total, (are_sinks, 0), value=-torch.inf)
        evicted = evicted_before(self.count, n_sink + self.window)
        sink_keys, turns = self.rotation.turns(self.sink_keys, evicted, query.shape[2])
        merge = merge_sinks
        if flash_attention_takes(query, values) and importlib.util.find_spec("triton"):
            # The hub's loader would take an import statement for a requirement, and triton is none.
            merge = importlib.import_module(".merge_kernel", __package__).merge_sinks
        return merge(query, sink_keys, self.sink_values, turns, windowed, window_total, scale, self.count)


def merge_sinks(
    query: torch.Tensor,
    sink_keys: torch.Tensor,
    sink_values: torch.Tensor,
    turns: torch.Tensor,
    windowed: torch.Tensor,
    window_total: torch.Tensor,
    scale: float,
    count: int,
) -> torch.Tensor:
    """Adds attention to the sinks to a finished attention to the window.

    Args:
        query (`torch.Tensor`): `[batch_size, heads, queries, head_dim]`.
        sink_keys, turns (`torch.Tensor`): see `ForwardRotation.turns`.
        sink_values (`torch.Tensor`): `[batch_size, kv_heads, n_sink, value_dim]`.
        windowed, window_total (`torch.Tensor`): see `window_attention`. The total is `-inf` for queries that see no window.
        scale (`float`): the factor of the scores.
        count (`int`): how many tokens came before the first query.

    Returns:
        `torch.Tensor`: `[batch_size, queries, heads, value_dim]`, in the dtype of `windowed`.
    """
    groups, n_sink = query.shape[1] // sink_keys.shape[1], sink_keys.shape[2]
    keys, values = (t.repeat_interleave(groups, dim=1) for t in (sink_keys.flatten(-2), sink_values))
    scores = (query[..., None, :] * turns).flatten(-2) @ (keys * scale).transpose(2, 3)
    position = torch.arange(count, count + query.shape[2], device=query.device)[:, None]
    scores.masked_fill_(torch.arange(n_sink, device=query.device) > position, -torch.inf)
    total = torch.logaddexp(scores.logsumexp(dim=-1), window_total)  # [batch_size, heads, queries]
    of_sinks = torch.exp(scores - total[..., None]).to(values.dtype) @ values
    share = torch.exp(window_total - total).transpose(1, 2)[..., None]
    return (windowed * share + of_sinks.transpose(1, 2)).to(windowed.dtype)


def window_attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, window: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes causal attention of each query to the last `window` keys up to its own. The last key is the last query's own.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: the output `[batch_size, queries, heads, value_dim]`, and the logarithm of the sum
            of the exponentials of each query's scores, `[batch_size, heads, queries]`, float32.
    """
    if flash_attention_takes(query, values):
        # PyTorch's public functions for windows need the compiler, or a newer PyTorch.
        output, total, *_ = torch.ops.aten._flash_attention_forward(
            *(states.transpose(1, 2) for states in (query, keys, values)),
            None,
            None,
            query.shape[2],
            keys.shape[2],
            0.0,
            False,
            False,
            scale=scale,
            window_size_left=window - 1,
            window_size_right=0,
        )
        return output, total
    parts = [
        _window_block(query, keys, values, window, scale, slice(first, first + _BLOCK))
        for first in range(0, query.shape[2], _BLOCK)
    ]
    outputs, totals = zip(*parts, strict=True)
    return torch.cat(outputs, dim=2).transpose(1, 2), torch.cat(totals, dim=2)


def flash_attention_takes(query: torch.Tensor, values: torch.Tensor) -> bool:
    """Whether PyTorch's flash attention takes this query and these values, `[batch_size, heads, tokens, head_dim]` each."""
    if not query.is_cuda or torch.version.hip or query.dtype not in (torch.float16, torch.bfloat16):
        return False
    head_dim = query.shape[-1]
    return (
        head_dim == values.shape[-1] <= 256
        and head_dim % 8 == 0
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def _window_block(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, window: int, scale: float, block: slice
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes `window_attention` of a block of queries; the output is `[batch_size, heads, queries, value_dim]`."""
    before = keys.shape[2] - query.shape[2]
    query = query[:, :, block]
    first = before + block.start
    seen = slice(max(0, first + 1 - window), first + query.shape[2])
    token = torch.arange(seen.start, seen.stop, device=query.device)
    position = token[-query.shape[2] :, None]
    hidden = (token > position) | (token <= position - window)
    # One matrix of queries for each head of the keys.
    grouped = (query.float() * scale).unflatten(1, (keys.shape[1], -1)).flatten(2, 3)
    scores = grouped @ keys[:, :, seen].float().transpose(2, 3)
    scores = scores.unflatten(2, (-1, query.shape[2])).masked_fill_(hidden, -torch.inf)
    most = scores.amax(dim=-1, keepdim=True)
    weights = scores.sub_(most).exp_()
    total = weights.sum(dim=-1, keepdim=True)
    output = weights.flatten(2, 3) @ values[:, :, seen].float()
    output = output.unflatten(2, (-1, query.shape[2])).div_(total).flatten(1, 2).to(values.dtype)
    return output, (most + total.log())[..., 0].flatten(1, 2)


def chunk_of_attention(key: torch.Tensor, value: torch.Tensor, mask: Any, kwargs: dict[str, Any]) -> ExactChunk | None:
    """Returns the chunk whose sinks attention has to merge; None if attention was not called with just the layer's tensors."""
    chunk: ExactChunk | None = getattr(key, "exact_chunk", None)
    more = mask, kwargs.get("position_bias"), kwargs.get("softcap")
    if chunk is None or getattr(value, "exact_chunk", None) is not chunk or kwargs.get("dropout"):
        return None
    return chunk if all(each is None for each in more) else None
