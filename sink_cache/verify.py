"""Is the cache exact on this model? Streaming with it, against the model repositioning its own sinks.

The reference needs no knowledge of rotary embeddings and no code of the cache. Sinks attend only to each other, and
attention sees only differences of positions; so a fresh forward over the sink tokens at *shifted* `position_ids` gives
the keys and values that every layer should present, computed by the model itself. Window tokens keep the keys and values
they had when they were first computed. Both in a `DynamicCache`, and the next token at its absolute position. A model that
cannot be told positions counts the keys in the `DynamicCache`, where they are in the order of the text. The reference reads
sinks one at a time, as the text was read: a model that quantises its activations rounds several tokens together otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedModel

from .cache import SinkWindowCache, accept_as_it_is
from .internals import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    cache_kwargs,
    device_of,
    takes_any_keyword,
    takes_argument,
    text_model,
    virtual_tokens,
    without_compiler,
)
from .twin import CannotStream, PositionScheme, bounded_layers

_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
_ROUNDINGS, _DRAWS, _NOISES = 32, 3, 2  # see `verify`


def verify(
    model: PreTrainedModel, *, n_sink: int = 4, window: int = 12, tokens: int = 48, tolerance: float | None = None
) -> float:
    """Checks `SinkWindowCache` on your model: for remote code, fine-tuned oddities, anything that we have never seen.

    A model that was changed on its instance (a module replaced, patched or hooked) is refused by `SinkWindowCache`, until it
    has passed here. Then it is accepted, as long as it exists and is not changed again.

    Streams random tokens one at a time through a `SinkWindowCache` and through a reference that shares nothing with it
    (see the module's text), and compares the outputs after every token.

    The tolerance comes from the dtype: 1e-4 for float32 and float64, 0.02 for float16, 0.1 for bfloat16, where rounding alone
    gives that much. A model may round more than its dtype says, for example because it quantises its activations: then a last
    bit decides between two steps of a coarse grid. So an error above the tolerance is compared with the model's own noise. To
    measure it, the reference runs again, three times, with input embeddings that are moved at random by about 32 roundings of
    float32 (or by one of a coarser dtype). The noise is the largest change of an output. An error up to twice the noise passes.
    The noise cannot hide a wrong rotation, because it is measured without the cache and at the same positions.

    Args:
        model (`PreTrainedModel`): any decoder that `generate()` accepts, on any device, in any dtype.
        n_sink (`int`), window (`int`): of the cache to check.
        tokens (`int`): how many tokens to stream; more than `n_sink + window`, or nothing is evicted.
        tolerance (`float`, *optional*): largest relative error that passes, in place of all that is said above.

    Returns:
        `float`: the largest error of any output of any step, relative to the largest output of that step.

    Raises:
        NotImplementedError: if the model is refused (see `SinkWindowCache`), or if the error is above what passes.
        TypeError: if it is no transformers model.
        ValueError: if `tokens` is not above `n_sink + window`.
    """
    if tokens <= n_sink + window:
        raise ValueError(
            f"verify needs tokens > n_sink + window = {n_sink + window} to see an eviction, but tokens is {tokens}"
        )
    text_model(model)  # or a TypeError
    if method := virtual_tokens(model):
        raise NotImplementedError(
            f"this model has virtual tokens from {method}, which PEFT adds to every call. Verify the model that it was made from."
        )
    model = without_compiler(model)  # of a compiled model, the model: it also says what its forward takes
    limit = _TOLERANCE.get(model.dtype, 1e-1) if tolerance is None else tolerance
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            error = streaming_error(model, None, n_sink, window, tokens)
            if tolerance is None and not error <= limit:
                limit = max(limit, _NOISES * _own_noise(model, n_sink, window, tokens))
    except CannotStream as reason:
        raise NotImplementedError(
            f"SinkWindowCache does not support model type {model.config.model_type!r}: {reason}. Use DynamicCache."
        ) from reason
    finally:
        for module in training:
            module.training = True
    if not error <= limit:
        raise NotImplementedError(
            f"SinkWindowCache is not exact on this {type(model).__name__} (model type {model.config.model_type!r}): relative "
            f"error {error:.2g}, allowed {limit:.2g}. Use DynamicCache."
        )
    accept_as_it_is(model)
    return error


def streaming_error(
    model: PreTrainedModel,
    scheme: PositionScheme | None,
    n_sink: int,
    window: int,
    tokens: int,
    masked: bool = False,
) -> float:
    """The largest relative error of `SinkWindowCache` (with `scheme`, or finding its own) on random tokens.

    With `masked` the model is also given an `attention_mask` of all tokens seen, if it takes one.
    """
    config = text_model(model).config
    cache = SinkWindowCache(n_sink, window)
    if scheme is not None:
        cache.prepare(config, scheme)
    else:
        cache.prepare_to_measure(model)
    input_ids = _random_tokens(model, tokens)
    reference = _reference(model, input_ids, n_sink, window)
    masked &= takes_argument(model, "attention_mask")
    outputs = []
    for t in range(tokens):
        seen = {"attention_mask": torch.ones_like(input_ids[:, : t + 1])} if masked else {}
        outputs.append(_step(model, input_ids[:, t : t + 1], t, cache, **seen))
    return _largest_error(outputs, reference)


def _random_tokens(model: PreTrainedModel, tokens: int) -> torch.Tensor:
    generator = torch.Generator("cpu").manual_seed(0)
    vocab_size = text_model(model).config.vocab_size
    return torch.randint(vocab_size, (1, tokens), generator=generator, device="cpu").to(device_of(model))


def _largest_error(outputs: list[torch.Tensor], reference: list[torch.Tensor]) -> float:
    """The largest error of any output of any step, relative to the largest output of that step; NaN if any is NaN."""
    worst = 0.0
    for output, expected in zip(outputs, reference, strict=True):
        # A comparison that is not a number must not pass, hence not `max(worst, error)`.
        error = ((output.float() - expected.float()).abs().amax() / expected.float().abs().amax()).item()
        worst = worst if error <= worst else error
    return worst


def _own_noise(model: PreTrainedModel, n_sink: int, window: int, tokens: int) -> float:
    """How far the outputs of the reference move when the model's input embeddings move by a few roundings; see `verify`."""
    input_ids = _random_tokens(model, tokens)
    reference = _reference(model, input_ids, n_sink, window)
    noise = 0.0
    for seed in range(_DRAWS):
        with _moved_embeddings(text_model(model), seed):
            noise = max(noise, _largest_error(_reference(model, input_ids, n_sink, window), reference))
    return noise


@contextmanager
def _moved_embeddings(text: PreTrainedModel, seed: int) -> Iterator[None]:
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


def _reference(model: PreTrainedModel, input_ids: torch.Tensor, n_sink: int, window: int) -> list[torch.Tensor]:
    config = text_model(model).config
    layers = bounded_layers(config)[0]
    cache = _dynamic_cache(model, layers)
    cached: list[Any] = cache.layers
    history: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {layer: [] for layer in layers}
    outputs = []
    for t in range(input_ids.shape[1]):
        evicted = max(0, t + 1 - n_sink - window)
        sinks = _dynamic_cache(model, layers)
        repositioned: list[Any] = sinks.layers
        if evicted:
            for sink in range(n_sink):
                _step(model, input_ids[:, sink : sink + 1], evicted + sink, sinks)
        if evicted:
            for layer in layers:
                kept = history[layer][n_sink + evicted :]
                keys, values = [k for k, _ in kept], [v for _, v in kept]
                if n_sink:
                    keys, values = [repositioned[layer].keys, *keys], [repositioned[layer].values, *values]
                empty = history[layer][0][0][:, :, :0], history[layer][0][1][:, :, :0]
                cached[layer].keys = torch.cat([empty[0], *keys], dim=2)
                cached[layer].values = torch.cat([empty[1], *values], dim=2)
        outputs.append(_step(model, input_ids[:, t : t + 1], t, cache))
        for layer in layers:
            history[layer].append((cached[layer].keys[:, :, -1:], cached[layer].values[:, :, -1:]))
    return outputs


def _dynamic_cache(model: PreTrainedModel, layers: list[int]) -> DynamicCache:
    cache = DynamicCache(config=text_model(model).config)
    for layer in layers:
        if type(cache.layers[layer]) is DynamicSlidingWindowLayer:  # never slides here, as the reference keeps it short
            cache.layers[layer] = DynamicLayer()
    return cache


def _step(
    model: PreTrainedModel, input_ids: torch.Tensor, position: int, cache: Cache, **kwargs: torch.Tensor
) -> torch.Tensor:
    position_ids = torch.arange(position, position + input_ids.shape[1], device=input_ids.device)[None]
    # A model may hand positions on that it does not name, or ignore them (ALiBi).
    if takes_argument(model, "position_ids") or takes_any_keyword(model):
        kwargs["position_ids"] = position_ids
    output: torch.Tensor = model(input_ids=input_ids, use_cache=True, **cache_kwargs(cache, model), **kwargs)[0]
    return output[:, -1]
