"""The ring: which slot a token lies in, what a query sees, and what is evicted. Pure arithmetic on counts of tokens.

A row's tokens are numbered from 0. The token `t` lies in slot `t` while `t < n_sink`, and in slot
`n_sink + (t - n_sink) % window` after that. A row of `count` tokens fills the first slots; when all `capacity` slots are
full, a new token overwrites the oldest token of the window. The window's keys already have the right rotary distance to the
next query. Only the sinks are too far away, by the number of evicted tokens.

In all functions, `count` is the number of tokens that a row has seen, and `capacity` is `n_sink + window`.
"""

from __future__ import annotations

import torch


def slots_of(tokens: torch.Tensor, n_sink: int, window: int) -> torch.Tensor:
    """The slots in which these tokens lie; a tensor of the same shape and dtype."""
    return torch.where(tokens < n_sink, tokens, n_sink + (tokens - n_sink) % window)


def slot_of(token: int, n_sink: int, window: int) -> int:
    """The slot in which one token lies."""
    return token if token < n_sink else n_sink + (token - n_sink) % window


def evicted_before(count: int, capacity: int) -> int:
    """How many tokens the next query, which takes a slot itself, no longer sees; zero or less while there is room."""
    return count + 1 - capacity


def visible_besides(count: int, capacity: int) -> int:
    """How many cached tokens the next query sees besides itself."""
    return max(0, min(count, capacity - 1))


def tokens_seen(count: int, n_sink: int, window: int, device: torch.device) -> torch.Tensor:
    """The tokens that the next query sees besides itself, int64 `[visible]`, in chronological order."""
    first = n_sink + max(0, evicted_before(count, n_sink + window))
    sinks = torch.arange(min(count, n_sink), device=device)
    return torch.cat([sinks, torch.arange(first, max(first, count), device=device)])


def tokens_kept(count: int, new_tokens: int, n_sink: int, window: int, device: torch.device) -> torch.Tensor:
    """The new tokens that stay after a call, int64 `[kept]`: sinks, and tokens among the last `window`."""
    end = count + new_tokens
    first = max(count, n_sink, end - window)
    sinks = torch.arange(count, max(count, min(n_sink, end)), device=device)
    return torch.cat([sinks, torch.arange(first, max(first, end), device=device)])


def window_of(count: int, queries: int, n_sink: int, window: int) -> tuple[range, range]:
    """The tokens, without sinks, in the windows of an exact chunk's queries: the cached tokens, and the new tokens."""
    start = max(count, n_sink)
    return range(max(n_sink, count + 1 - window), start), range(start, count + queries)


def chunk_of(count: int, queries: int, dense: int, n_sink: int, window: int) -> tuple[range, range, range]:
    """What the queries of an exact chunk see if tokens are evicted within it. The first `dense` tokens see all before them.

    Each query has its own distance to the sinks. So each query for which tokens are evicted has its own copy of the sinks.

    Returns:
        `tuple[range, range, range]`: the distances of the sink copies; the cached tokens; the new tokens.
    """
    evicted = evicted_before(count, n_sink + window)
    first_distance = max(1, evicted_before(max(count, dense), n_sink + window))
    first = 0 if evicted <= 0 else evicted + n_sink
    return range(first_distance, evicted + queries), range(first, count), range(count, count + queries)
