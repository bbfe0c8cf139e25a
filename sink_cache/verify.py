"""Measuring whether the cache is exact on a model, against the model repositioning its own sinks; see `reference.py`."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from .cache import cache_to_measure, error_of
from .internals import text_model, virtual_tokens, without_compiler
from .model_scheme import accept_as_it_is
from .reference import CannotStream, own_noise, streaming_error

_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
_NOISES = 2  # how large an error may be, as a multiple of the model's own noise


def verify(
    model: PreTrainedModel, *, n_sink: int = 4, window: int = 12, tokens: int = 48, tolerance: float | None = None
) -> float:
    """Checks `SinkWindowCache` on your model: for remote code, fine-tuned oddities, anything that we have never seen.

    `SinkWindowCache` refuses a model that was changed on its instance (a module replaced, patched or hooked), until the model has
    passed here. Then it is accepted, as long as it exists and is not changed again.

    Streams random tokens one at a time through a `SinkWindowCache` and through a reference that shares nothing with it
    (see `sink_cache/reference.py`), and compares the outputs after every token.

    The tolerance comes from the dtype: 1e-4 for float32 and float64, 0.02 for float16, 0.1 for bfloat16, where rounding alone
    gives that much. A model may round more than its dtype says, for example because it quantises its activations. Then a last
    bit decides between two steps of a coarse grid. So an error above the tolerance is compared with the model's own noise. To
    measure the noise, the reference runs again, three times, with input embeddings that are moved at random by about 32 roundings
    of float32 (or by one of a coarser dtype). The noise is the largest change of an output. An error up to twice the noise
    passes. The noise cannot hide a wrong rotation, because it is measured without the cache and at the same positions.

    Args:
        model (`PreTrainedModel`): any decoder that `generate()` accepts, on any device, in any dtype.
        n_sink (`int`), window (`int`): the sizes of the cache to check.
        tokens (`int`): how many tokens to stream. Tokens are evicted only if there are more than `n_sink + window`.
        tolerance (`float`, *optional*): the largest relative error that passes. It replaces the rules above.

    Returns:
        `float`: the largest error of any output of any step, relative to the largest output of that step.

    Raises:
        NotImplementedError: if the model is refused (see `SinkWindowCache`), or if the error is too large.
        TypeError: if `model` is no transformers model.
        ValueError: if `tokens` is not above `n_sink + window`.
    """
    if tokens <= n_sink + window:
        raise ValueError(
            f"verify needs tokens > n_sink + window = {n_sink + window} to see an eviction, but tokens is {tokens}"
        )
    text_model(model)  # or a TypeError
    if method := virtual_tokens(model):
        raise NotImplementedError(
            f"this model has virtual tokens from {method}, which PEFT adds to every call. Verify the base model instead."
        )
    model = without_compiler(model)  # a compiled model does not say what its forward takes
    limit = _TOLERANCE.get(model.dtype, 1e-1) if tolerance is None else tolerance
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            cache = cache_to_measure(model, n_sink, window)
            error = streaming_error(model, cache, n_sink, window, tokens)
            if tolerance is None and not error <= limit:
                limit = max(limit, _NOISES * own_noise(model, n_sink, window, tokens))
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
    accept_as_it_is(model, error_of)
    return error
