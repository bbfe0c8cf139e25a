"""What a sink-window stream must give, computed without any code of the library and without knowing rotary embeddings.

`fresh_logits` is plain: for every token a forward over just the tokens that it may see. It is exact for models of one
layer, whose keys and values depend on nothing but the token itself.

`streamed_logits` is exact for any depth. Sinks see only each other and attention sees only differences of positions, so
the model itself repositions its sinks when it reads them anew at shifted positions; tokens of the window keep the keys
and values that they had when they were read first. Both go into a `DynamicCache`. A model that ignores positions can only
count the keys in it, and there they are contiguous.
"""

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionAndFullAttentionLayer

from .families import cache_name


@torch.no_grad()
def fresh_logits(model: PreTrainedModel, input_ids: torch.Tensor, n_sink: int, window: int) -> torch.Tensor:
    """Logits `[batch, tokens, vocab]` of a one-layer model that sees the first `n_sink` and the last `window` tokens."""
    logits = []
    for t in range(input_ids.shape[1]):
        seen = [j for j in range(t + 1) if j < n_sink or j > t - window]
        logits.append(model(input_ids[:, seen], use_cache=False).logits[:, -1])
    return torch.stack(logits, dim=1)


@torch.no_grad()
def streamed_logits(
    model: PreTrainedModel, input_ids: torch.Tensor, n_sink: int, window: int, first: int = 1
) -> torch.Tensor:
    """Logits `[batch, tokens - first + 1, vocab]` of a model of any depth, one token at a time.

    The first call reads `first <= n_sink + window` tokens at once. Recurrent layers read several tokens with another formula
    than one token, which rounds otherwise.
    """

    def read(tokens: torch.Tensor, first_position: int, cache: DynamicCache) -> torch.Tensor:
        positions = torch.arange(first_position, first_position + tokens.shape[1]).expand(tokens.shape[0], -1)
        return model(tokens, position_ids=positions, use_cache=True, **{cache_name(model): cache}).logits[:, -1]

    def new_cache() -> tuple[DynamicCache, list[int]]:
        cache = DynamicCache(config=model.config)
        kinds = [type(layer) for layer in cache.layers]
        bounded = [i for i, kind in enumerate(kinds) if kind in (DynamicLayer, LinearAttentionAndFullAttentionLayer)]
        # A model of sliding layers only is bounded in those; they never slide here, as the oracle keeps them short.
        bounded = bounded or [i for i, kind in enumerate(kinds) if kind is DynamicSlidingWindowLayer]
        for i in bounded:
            if kinds[i] is DynamicSlidingWindowLayer:
                cache.layers[i] = DynamicLayer()
        return cache, bounded

    cache, bounded = new_cache()
    read_first = {i: ([], []) for i in bounded}  # layer -> keys and values of every token, as first computed
    logits = []
    for t in range(first - 1, input_ids.shape[1]):
        new = t + 1 if t == first - 1 else 1
        evicted = max(0, t + 1 - (n_sink + window))
        if evicted:
            sinks, _ = new_cache()
            if n_sink:
                read(input_ids[:, :n_sink], evicted, sinks)
            for i in bounded:
                keys, values = (torch.cat(tokens, dim=2)[:, :, n_sink + evicted :] for tokens in read_first[i])
                if n_sink:
                    keys = torch.cat([sinks.layers[i].keys, keys], dim=2)
                    values = torch.cat([sinks.layers[i].values, values], dim=2)
                cache.layers[i].keys, cache.layers[i].values = keys, values
        logits.append(read(input_ids[:, t + 1 - new : t + 1], t + 1 - new, cache))
        for i in bounded:
            read_first[i][0].append(cache.layers[i].keys[:, :, -new:])
            read_first[i][1].append(cache.layers[i].values[:, :, -new:])
    return torch.stack(logits, dim=1)


def relative_error(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference relative to the largest expected logit, both of the same token; NaN if any is NaN."""
    difference = (logits - expected).abs().amax(dim=-1) / expected.abs().amax(dim=-1)
    return difference.max().item()
