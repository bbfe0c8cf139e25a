"""`chunk_attention.merge_sinks` as one CUDA kernel, in Triton, which comes with PyTorch for CUDA.

PyTorch's operations would read and write the queries many times. For 4,096 tokens, a layer of 32 heads would then take 0.6 ms on
an H200, while attention to a window of 1,020 takes 0.3 ms.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 16  # queries


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
    """See `chunk_attention.merge_sinks`; the result is written to `windowed`, whose `value_dim` is `head_dim`."""
    batch_size, heads, queries, head_dim = query.shape
    if query.stride(-1) != 1:
        query = query.contiguous()
    windowed = windowed.contiguous()
    _merge_sinks[triton.cdiv(queries, _BLOCK), heads, batch_size](
        query,
        *query.stride()[:3],
        sink_keys.contiguous(),
        sink_values.contiguous(),
        turns,
        windowed,
        window_total.contiguous(),
        scale,
        count,
        heads,
        queries,
        heads // sink_keys.shape[1],
        sink_keys.shape[2],
        head_dim,
        triton.next_power_of_2(head_dim),
        _BLOCK,
    )
    return windowed


@triton.jit
def _merge_sinks(
    query,
    batch_stride,
    head_stride,
    query_stride,
    sink_keys,
    sink_values,
    turns,
    windowed,
    window_total,
    scale,
    count,
    heads,
    queries,
    groups,
    n_sink: tl.constexpr,
    head_dim: tl.constexpr,
    width: tl.constexpr,
    block: tl.constexpr,
):
    row = tl.program_id(0) * block + tl.arange(0, block)
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    d = tl.arange(0, width)
    inside, in_head = row < queries, d < head_dim
    there = inside[:, None] & in_head[None]
    own = tl.load(
        query + batch * batch_stride + head * head_stride + row[:, None] * query_stride + d, mask=there, other=0.0
    ).to(tl.float32)
    turn = turns + row[:, None] * 2 * head_dim + d
    along = own * tl.load(turn, mask=there, other=0.0) * scale
    across = own * tl.load(turn + head_dim, mask=there, other=0.0) * scale
    output = windowed + ((batch * queries + row[:, None]) * heads + head) * head_dim + d
    mean = tl.load(output, mask=there, other=0.0).to(tl.float32)
    most = tl.load(window_total + (batch * heads + head) * queries + row, mask=inside, other=0.0)
    mass = tl.full((block,), 1.0, tl.float32)
    first = (batch * heads + head) // groups * n_sink
    for sink in range(n_sink):
        key = sink_keys + (first + sink) * 2 * head_dim + d
        score = tl.sum(
            along * tl.load(key, mask=in_head, other=0.0) + across * tl.load(key + head_dim, mask=in_head, other=0.0),
            axis=1,
        )
        score = tl.where(row + count >= sink, score, float("-inf"))
        value = tl.load(sink_values + (first + sink) * head_dim + d, mask=in_head, other=0.0).to(tl.float32)
        higher = tl.maximum(most, score)
        kept, new = tl.exp(most - higher), tl.exp(score - higher)
        mean = mean * kept[:, None] + new[:, None] * value[None]
        mass = mass * kept + new
        most = higher
    tl.store(output, (mean / mass[:, None]).to(windowed.dtype.element_ty), mask=there)
