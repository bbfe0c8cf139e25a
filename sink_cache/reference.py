"""What streaming with sinks and a window must give, computed by the model itself.

The reference needs no knowledge of rotary embeddings and no code of the cache. Sinks attend only to each other, and attention
sees only differences of positions. So a fresh forward over the sink tokens at *shifted* `position_ids` gives the keys and values
that every layer should present. Window tokens keep the keys and values from when they were first computed. Both are put into a
`DynamicCache` in the order of the text, and the next token is read at its absolute position. A model without `position_ids`
counts the keys there. The reference reads sinks one at a time, as the text was read. A model that quantises its activations
would round several tokens together.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel

from .internals import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    cache_kwargs,
    device_of,
    has_indexer,
    layer_class_is_known,
    layers_of,
    takes_any_keyword,
    takes_argument,
    text_model,
)

_ROUNDINGS, _DRAWS = 32, 3  # see `own_noise`


class CannotStream(Exception):
    """Sinks cannot be repositioned on a model; `str` is the reason, as the end of a sentence about the model."""


def bounded_layers(config: PreTrainedConfig) -> tuple[list[int], int | None]:
    """Returns the layers that a sink window replaces, and their native sliding window if they have one.

    Full-attention layers are replaced, also those beside a recurrent state. A model without such layers has its sliding layers
    replaced. All other layers keep transformers' own layer class.
    """
    layers = layers_of(config)
    kinds = ", ".join(sorted({type(layer).__name__ for layer in layers})) or "none"
    if any(has_indexer(layer) for layer in layers):
        raise CannotStream(f"its sparse attention looks keys up in an index of every token (its cache layers: {kinds})")
    if not all(map(layer_class_is_known, layers)):
        raise CannotStream(
            f"it has cache layers of its own, whose states cannot be bounded (its cache layers: {kinds})"
        )
    full = [i for i, layer in enumerate(layers) if type(layer) in (DynamicLayer, LinearAttentionAndFullAttentionLayer)]
    if full:
        return full, None
    sliding = {i: layer for i, layer in enumerate(layers) if type(layer) is DynamicSlidingWindowLayer}
    if not sliding or getattr(config, "attention_chunk_size", None) is not None:
        raise CannotStream(f"it has no layer of ordinary attention to bound (its cache layers: {kinds})")
    return list(sliding), min(layer.sliding_window for layer in sliding.values())


def streaming_error(
    model: PreTrainedModel,
    cache: Cache,
    n_sink: int,
    window: int,
    tokens: int,
    *,
    masked: bool = False,
    chunk_size: int = 1,
) -> float:
    """Returns the largest relative error of a cache of these sizes on random tokens, which are read in chunks.

    With `masked`, the model also gets an `attention_mask` of all tokens seen, if it takes one.
    """
    input_ids = _random_tokens(model, tokens)
    reference = _reference(model, input_ids, n_sink, window)
    masked &= takes_argument(model, "attention_mask")
    outputs: list[torch.Tensor] = []
    for t in range(0, tokens, chunk_size):
        chunk = input_ids[:, t : t + chunk_size]
        seen = {"attention_mask": torch.ones_like(input_ids[:, : t + chunk_size])} if masked else {}
        outputs += _read(model, chunk, t, cache, **seen).unbind(dim=1)
    return _largest_error(outputs, reference)


def own_noise(model: PreTrainedModel, n_sink: int, window: int, tokens: int) -> float:
    """Returns how far the outputs of the reference move when the model's input embeddings move by a few roundings."""
    input_ids = _random_tokens(model, tokens)
    reference = _reference(model, input_ids, n_sink, window)
    noise = 0.0
    for seed in range(_DRAWS):
        with _perturbed_embeddings(text_model(model), seed):
            noise = max(noise, _largest_error(_reference(model, input_ids, n_sink, window), reference))
    return noise


@contextmanager
def _perturbed_embeddings(text: PreTrainedModel, seed: int) -> Iterator[None]:
    generator = torch.Generator("cpu").manual_seed(seed)

    def moved(module: torch.nn.Module, arguments: Any, states: torch.Tensor) -> torch.Tensor:
        size = max(_ROUNDINGS * torch.finfo(torch.float32).eps, torch.finfo(states.dtype).eps)
        draws = torch.randn(states.shape, generator=generator, device="cpu", dtype=torch.float32)
        return (states * (1 + size * draws.to(states.device))).to(states.dtype)

    hook = text.get_input_embeddings().register_forward_hook(moved)
    try:
        yield
    finally:
        hook.remove()


def _random_tokens(model: PreTrainedModel, tokens: int) -> torch.Tensor:
    generator = torch.Generator("cpu").manual_seed(0)
    vocab_size = text_model(model).config.vocab_size
    return torch.randint(vocab_size, (1, tokens), generator=generator, device="cpu").to(device_of(model))


def _largest_error(outputs: list[torch.Tensor], reference: list[torch.Tensor]) -> float:
    """The largest error of any output of any step, relative to the largest output of that step; NaN if any is NaN."""
    worst = 0.0
    for output, expected in zip(outputs, reference, strict=True):
        # Not `max(worst, error)`, which would drop an error that is NaN.
        error = ((output.float() - expected.float()).abs().amax() / expected.float().abs().amax()).item()
        worst = worst if error <= worst else error
    return worst


def _reference(model: PreTrainedModel, input_ids: torch.Tensor, n_sink: int, window: int) -> list[torch.Tensor]:
    config = text_model(model).config
    layers = bounded_layers(config)[0]
    cache = _dynamic_cache(model, layers)
    cached: list[Any] = cache.layers
    history: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {layer: [] for layer in layers}
    outputs: list[torch.Tensor] = []
    for t in range(input_ids.shape[1]):
        evicted = max(0, t + 1 - n_sink - window)
        if evicted:
            sinks = _dynamic_cache(model, layers)
            repositioned: list[Any] = sinks.layers
            for sink in range(n_sink):
                _read(model, input_ids[:, sink : sink + 1], evicted + sink, sinks)
            for layer in layers:
                kept = history[layer][n_sink + evicted :]
                keys, values = [k for k, _ in kept], [v for _, v in kept]
                if n_sink:
                    keys, values = [repositioned[layer].keys, *keys], [repositioned[layer].values, *values]
                empty = history[layer][0][0][:, :, :0], history[layer][0][1][:, :, :0]
                cached[layer].keys = torch.cat([empty[0], *keys], dim=2)
                cached[layer].values = torch.cat([empty[1], *values], dim=2)
        outputs += _read(model, input_ids[:, t : t + 1], t, cache).unbind(dim=1)
        for layer in layers:
            history[layer].append((cached[layer].keys[:, :, -1:], cached[layer].values[:, :, -1:]))
    return outputs


def _dynamic_cache(model: PreTrainedModel, layers: list[int]) -> DynamicCache:
    cache = DynamicCache(config=text_model(model).config)
    for layer in layers:
        if type(cache.layers[layer]) is DynamicSlidingWindowLayer:  # need not slide: the reference keeps it short
            cache.layers[layer] = DynamicLayer()
    return cache


def _read(
    model: PreTrainedModel, input_ids: torch.Tensor, position: int, cache: Cache, **kwargs: torch.Tensor
) -> torch.Tensor:
    position_ids = torch.arange(position, position + input_ids.shape[1], device=input_ids.device)[None]
    # A model that does not name positions may hand them on, or ignore them (ALiBi).
    if takes_argument(model, "position_ids") or takes_any_keyword(model):
        kwargs["position_ids"] = position_ids
    output: torch.Tensor = model(input_ids=input_ids, use_cache=True, **cache_kwargs(cache, model), **kwargs)[0]
    return output
