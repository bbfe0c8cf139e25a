"""Exact streaming of many tokens per forward.

One token per forward is exact and slow. In a forward of several tokens, each query needs its own rotary distance to the sinks.
Where a model's attention is plain, attention itself merges the sinks (see `chunk_attention.py`). Elsewhere each query gets its
own copy of the sinks (`queries * n_sink` extra keys). A mask then shows each query its copy and its window.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from transformers import PreTrainedModel

from .cache import SinkWindowCache, error_of, stack_of
from .fed import note_fed, text_fed_to
from .internals import attention_of, cache_kwargs, is_recurrent_only, layers_of, text_model
from .masks import SUPPORTED_ATTENTION
from .model_scheme import attends_plainly


@torch.no_grad()
def stream(
    model: PreTrainedModel, input_ids: torch.Tensor, cache: SinkWindowCache, *, chunk_size: int = 64
) -> Iterator[torch.Tensor]:
    """Feeds a text through the model in chunks. Each token sees exactly what it would see if fed alone.

    Use it for perplexity over long texts, and as a prefill that never attends to more than the cache holds. After the last chunk
    the cache is as if the text had been generated, and `generate()` can go on from it. (A plain call with many tokens is dense
    over them. `generate(prefill_chunk_size=...)` lets the later tokens of a chunk see more than the cache holds.)

    Args:
        model (`PreTrainedModel`): a causal language model with `attn_implementation` "sdpa" or "eager".
        input_ids (`torch.Tensor`): `[batch_size, tokens]`, no padding.
        cache (`SinkWindowCache`): empty, or with earlier tokens of the same rows.
        chunk_size (`int`): tokens per forward. Larger chunks are faster, on a GPU up to some thousands of tokens. If attention is
            not plain, the `chunk_size * n_sink` extra keys slow large chunks down.

    Yields:
        `torch.Tensor`: logits `[batch_size, q, vocab_size]` of the next `q <= chunk_size` tokens, in the order of the text.

    Raises:
        TypeError: if `cache` is not a `SinkWindowCache`, or `input_ids` no tensor of two dimensions.
        ValueError: if `chunk_size` is below 1, or for other attention implementations, whose masks have other forms.
        NotImplementedError: for models with linear-attention layers if `chunk_size > 1`, because not all of them go on from a
            state with several tokens; and for models that do not use a cache.
    """
    if not isinstance(cache, SinkWindowCache):
        raise TypeError(f"stream needs a SinkWindowCache, but got a {type(cache).__name__}")
    if not isinstance(input_ids, torch.Tensor) or input_ids.ndim != 2:
        given = f"of shape {list(input_ids.shape)}" if isinstance(input_ids, torch.Tensor) else type(input_ids).__name__
        raise TypeError(
            f"input_ids must be a tensor [batch_size, tokens], such as tokenizer(...).input_ids, but is {given}"
        )
    if not isinstance(chunk_size, int):
        raise TypeError(f"chunk_size must be an integer, but is {chunk_size!r}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, but is {chunk_size}")
    config = text_model(model).config
    if attention_of(config) not in SUPPORTED_ATTENTION:
        raise ValueError(
            f"stream needs attn_implementation 'sdpa' or 'eager', but this model has {attention_of(config)!r}"
        )
    if chunk_size > 1 and any(map(is_recurrent_only, layers_of(config))):
        raise NotImplementedError(
            f"stream cannot feed several tokens at once to model type {model.config.model_type!r}: it has linear-attention "
            "layers. Use chunk_size=1."
        )
    kwargs, merged = cache_kwargs(cache, model), chunk_size > 1 and attends_plainly(model, error_of)
    for chunk in input_ids.split(chunk_size, dim=1):
        before, fed = text_fed_to(stack_of(cache)), cache.get_seq_length()
        positions = cache.next_position_ids(chunk.shape[1]).to(chunk.device).expand(len(chunk), -1)
        with stack_of(cache).exact_chunks(merged=merged):
            output = model(chunk, position_ids=positions, use_cache=True, **kwargs)
        if cache.get_seq_length() == fed:
            raise NotImplementedError(
                f"this {type(model).__name__} (model type {model.config.model_type!r}) has not used its cache, so each chunk "
                "would be a text of its own"
            )
        note_fed(stack_of(cache), before, chunk)
        yield output.logits
        del output  # or its logits would still be in memory while the next ones are made
