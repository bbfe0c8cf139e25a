"""Exact streaming of many tokens per forward.

One token per forward is exact and slow. In a forward of several tokens each query needs its own rotary distance to the
sinks, so each gets its own copy of them (`queries * n_sink` extra keys: few), and a mask in which a query sees its own
copy, and window tokens no older than `window`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.masking_utils import create_masks_for_generate

from .cache import SinkWindowCache
from .discovery import text_model


@torch.no_grad()
def stream(
    model: PreTrainedModel, input_ids: torch.Tensor, cache: SinkWindowCache, *, chunk_size: int = 64
) -> Iterator[torch.Tensor]:
    """Feeds a text through the model in chunks, each token seeing exactly what it would see if fed one at a time.

    For perplexity over long texts, and as a prefill that never attends to more than the cache holds: after the last chunk the
    cache is as if the text had been generated, and `generate()` can go on from it. (A plain call with many tokens
    is dense over them, and `generate(prefill_chunk_size=...)` lets the later tokens of a chunk see too much.)

    Args:
        model (`PreTrainedModel`): a causal language model with `attn_implementation` "sdpa" or "eager".
        input_ids (`torch.Tensor`): `[batch_size, tokens]`, no padding.
        cache (`SinkWindowCache`): empty, or with earlier tokens of the same rows.
        chunk_size (`int`): tokens per forward. Larger is faster until the `chunk_size * n_sink` extra keys weigh.

    Yields:
        `torch.Tensor`: logits `[batch_size, q, vocab_size]` of the next `q <= chunk_size` tokens, in the order of the text.

    Raises:
        TypeError: if `cache` is not a `SinkWindowCache`.
        ValueError: if `chunk_size` is below 1, or for other attention implementations, whose masks have other forms.
        NotImplementedError: for models with linear-attention layers; not all of these go on from a state with several tokens.
    """
    if not isinstance(cache, SinkWindowCache):
        raise TypeError(f"stream needs a SinkWindowCache, but got a {type(cache).__name__}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, but is {chunk_size}")
    config = text_model(model).config
    attention = config._attn_implementation
    if attention not in ("sdpa", "eager"):
        raise ValueError(f"stream needs attn_implementation 'sdpa' or 'eager', but this model has {attention!r}")
    batch_size, tokens = input_ids.shape
    if chunk_size > 1 and any(DynamicCache(config=config).is_linear):
        raise NotImplementedError(
            f"stream cannot feed several tokens at once to model type {model.config.model_type!r}: it has linear-attention "
            "layers. Use chunk_size=1."
        )
    start = 0
    while start < tokens:
        seen = cache.get_seq_length()
        # Until the cache is full nothing is evicted, and an ordinary call is exact.
        room = cache.capacity - seen
        stop = min(tokens, start + min(chunk_size, room if room > 0 else chunk_size))
        positions = torch.arange(seen, seen + stop - start, device=input_ids.device).expand(batch_size, -1)
        chunk = input_ids[:, start:stop]
        if room > 0 or stop - start == 1:
            output = model(chunk, position_ids=positions, past_key_values=cache, use_cache=True)
        else:
            with cache.sinks_per_query():
                mask = _masks(model, cache, positions, attention)
                output = model(
                    chunk, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
                )
        yield output.logits
        del output  # or its logits would still be in memory while the next ones are made
        start = stop


def chunk_mask(queries: int, n_sink: int, window: int, device: torch.device) -> torch.Tensor:
    """Who sees whom when a full cache takes in several tokens at once, each with its own copy of the sinks.

    Returns:
        `torch.Tensor`: bool `[queries, queries * n_sink + (window - 1) + queries]`, true where a query sees a key. Keys are
            in the order of `SinkWindowLayer.update`: sinks for each query, the cached window, the new tokens.
    """
    query = torch.arange(queries, device=device)[:, None]
    sink_owner = torch.arange(queries * n_sink, device=device)[None] // max(n_sink, 1)
    age = query - torch.arange(1 - window, queries, device=device)[None]  # of window and new tokens, seen by each query
    return torch.cat([sink_owner == query, (age >= 0) & (age < window)], dim=1)


def _masks(
    model: PreTrainedModel, cache: SinkWindowCache, positions: torch.Tensor, attention: str
) -> torch.Tensor | dict[str, torch.Tensor]:
    """`chunk_mask` in the form that the model takes: for our layers, beside transformers' own masks for other layers."""
    batch_size, queries = positions.shape
    mask = chunk_mask(queries, cache.n_sink, cache.window, positions.device).expand(batch_size, 1, -1, -1)
    if attention == "eager":
        floor = torch.finfo(model.dtype).min
        mask = torch.zeros(mask.shape, dtype=model.dtype, device=mask.device).masked_fill(~mask, floor)
    create = getattr(model, "create_masks_for_generate", create_masks_for_generate)
    masks = create(
        config=model.config,
        inputs_embeds=torch.empty((batch_size, queries, 0), dtype=model.dtype, device=positions.device),
        attention_mask=None,
        past_key_values=cache,
        position_ids=positions,
    )
    if not isinstance(masks, dict):
        return mask
    ours = "full_attention" if "full_attention" in masks else "sliding_attention"
    return {**masks, ours: mask}
