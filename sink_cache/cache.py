"""`SinkWindowCache`: a transformers `Cache` whose full-attention layers are rings, and what it refuses."""

from __future__ import annotations

import copy
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicSlidingWindowLayer

from .discovery import calling_model, calling_tensor, class_for_config, padding_mask_of_caller, text_model
from .ring import POSITION_LIMIT, SharedStorage, SinkWindowLayer
from .twin import CannotStream, PositionScheme, position_scheme

_LARGEST_TABLE = 2**20  # numbers in a buffer

_NOT_IN_GRAPHS = "SinkWindowCache works outside of graphs: compile the model without fullgraph=True"


class SinkWindowCache(Cache):
    """Attention sinks and a sliding window: a key-value cache of constant size for streams of any length.

    StreamingLLM (Xiao et al., arXiv 2309.17453). Each token attends to the first `n_sink` tokens and to the last `window`
    tokens, itself included, and rotary distances are those inside the cache: kept tokens count as contiguous. While no
    more than `n_sink + window` tokens have been seen, everything equals `DynamicCache`. A call with several new tokens
    lets them see the sinks, the last `window - 1` cached tokens and each other causally, and drops what does not fit after
    attention; so a prompt longer than the cache is dense over the prompt.

    The model's rotary embedding is found and checked by itself at the first use; a model on which the cache would not be
    exact is refused. Departures from the paper's code: nothing in the model is patched, and instead of rotating all cached
    keys at every step, only the sinks are.

    Args:
        n_sink (`int`): how many of the first tokens to keep for ever; 0 gives a plain sliding window.
        window (`int`): how many of the last tokens to keep, at least 1. It does *not* include the sinks: the cache holds
            `capacity = n_sink + window` tokens.
        config (`PreTrainedConfig`, *optional*): the model's config. Only needed where the calling model cannot be
            seen, as in a compiled first call.

    Attributes:
        capacity (`int`): `n_sink + window`.
        nbytes (`int`): bytes of all keys and values held, and of the sinks' pristine keys.

    Raises:
        TypeError, ValueError: for arguments of the wrong type or size.
        NotImplementedError: at the first use, for a model whose positions it cannot move, with the reason.

    Example:

    ```python
    >>> from sink_cache import SinkWindowCache
    >>> model.generate(**inputs, past_key_values=SinkWindowCache(n_sink=4, window=1020), max_new_tokens=5000)
    ```
    """

    def __init__(self, n_sink: int, window: int, *, config: PreTrainedConfig | None = None) -> None:
        for name, value, least in (("n_sink", n_sink, 0), ("window", window, 1)):
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} must be an integer, but is {value!r} of type {type(value).__name__}")
            if value < least:
                raise ValueError(f"{name} must be at least {least}, but is {value}")
        self.n_sink, self.window, self.capacity = n_sink, window, n_sink + window
        self._trained_context: int | None = None
        self._scheme: PositionScheme | None = None
        self._first, self._ends = 0, (0, 0)  # the first of our layers; the first and the last layer of attention
        self._looks = True
        self._first_position = 0
        super().__init__(layers=[])
        if config is not None:
            if not isinstance(config, PreTrainedConfig):
                raise TypeError(f"config must be a model's config (model.config), but is a {type(config).__name__}")
            model_class, text_config = class_for_config(config)
            self._prepare_for(model_class, text_config, {})

    # The layers depend on the model, and the model shows itself only when it first uses the cache, so look then.
    @property
    def layers(self) -> list[Any]:
        """One cache layer for each layer of the model; empty until a model has used the cache."""
        if not self._layers:
            self._look_for_the_model()
        return self._layers

    @layers.setter
    def layers(self, layers: list[Any]) -> None:
        self._layers = layers

    @torch.compiler.disable(  # type: ignore[untyped-decorator]
        reason="a SinkWindowCache cannot see the model from inside a full graph: pass SinkWindowCache(..., config=model.config)"
    )
    def _look_for_the_model(self) -> None:
        model = calling_model() if self._looks else None
        if model is not None:
            text = text_model(model)
            # Rotations live in buffers such as inv_freq; larger ones are something else.
            buffers = {
                name: buffer
                for name, buffer in text.named_buffers()
                if buffer.is_floating_point() and not buffer.is_meta and buffer.numel() <= _LARGEST_TABLE
            }
            self._prepare_for(type(text), text.config, buffers)

    def _prepare_for(self, model_class: Any, config: PreTrainedConfig, buffers: dict[str, torch.Tensor]) -> None:
        try:
            scheme = position_scheme(model_class, config, buffers)
        except CannotStream as reason:
            raise NotImplementedError(
                f"SinkWindowCache does not support model type {config.model_type!r} ({model_class.__name__}): {reason}. "
                "Use DynamicCache with this model."
            ) from reason
        if not self._layers or not scheme.agrees_with(self._scheme):
            self._make_layers(config, scheme)

    def prepare(self, config: PreTrainedConfig, scheme: PositionScheme) -> None:
        """Makes the layers for a model of this config, whose positions work as `scheme` says, whoever calls later."""
        self._make_layers(config, scheme)
        self._looks = False

    def _make_layers(self, config: PreTrainedConfig, scheme: PositionScheme) -> None:
        if scheme.sliding_window is not None and self.capacity > scheme.sliding_window:
            raise ValueError(
                f"n_sink + window is {self.capacity}, but every layer of this model ({config.model_type}) attends to at "
                f"most sliding_window = {scheme.sliding_window} tokens. Choose n_sink + window <= {scheme.sliding_window}."
            )
        layers = DynamicCache(config=config).layers
        max_position = min(POSITION_LIMIT, scheme.max_position or POSITION_LIMIT)
        for index, rotation in scheme.rotations.items():
            layers[index] = SinkWindowLayer(self.n_sink, self.window, rotation, max_position, scheme.sliding_window)
        self._layers, self._first = layers, min(scheme.rotations)
        attention = [
            i for i, layer in enumerate(layers) if isinstance(layer, (SinkWindowLayer, DynamicSlidingWindowLayer))
        ]
        self._ends = (attention[0], attention[-1])
        self._scheme = scheme
        self._trained_context = getattr(config, "max_position_embeddings", None)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores the new keys and values of one layer and returns those to attend to; see `SinkWindowLayer.update`."""
        if torch.compiler.is_compiling():
            compiled: tuple[torch.Tensor, torch.Tensor]
            compiled = self._outside_of_graphs(self.update, key_states, value_states, layer_idx, *args, **kwargs)
            return compiled
        layers = self._layers or self.layers
        if not layers:
            raise ValueError(
                "this SinkWindowCache cannot see a transformers model among its callers. Pass "
                "SinkWindowCache(..., config=model.config)."
            )
        layer = layers[layer_idx]
        if isinstance(layer, SinkWindowLayer):
            if layer_idx == self._first:
                self._begin_call(layer_idx, key_states.shape[2])
                layer = self._layers[layer_idx]
            if layer.seen and layer.storage is None:
                self._share_storage()
        attended: tuple[torch.Tensor, torch.Tensor] = layer.update(key_states, value_states, *args, **kwargs)
        return attended

    def _begin_call(self, first: int, new_tokens: int) -> None:
        """All that has to be right before the first of our layers takes in the tokens of a call."""
        seen = self._layers[first].seen
        self._refuse_interrupted(new_tokens)
        if seen and new_tokens == 1:
            return
        self._refuse_padding(calling_tensor("attention_mask", {2}))
        self._refuse_gaps(calling_tensor("position_ids", {2, 3}), seen, new_tokens)
        if seen == 0:
            # A cache may have been prepared for another model: by config=, or in its life before a reset.
            prepared = self._layers
            self._look_for_the_model()
            if self._layers is not prepared and first > 0:
                raise ValueError(
                    "this cache was made for another model, and layers before the first of ours have used it already. "
                    "Make a new SinkWindowCache for each model."
                )
            if self._trained_context is not None and new_tokens > self._trained_context:
                warnings.warn(
                    f"the first call has {new_tokens:,} tokens, and the model was trained on {self._trained_context:,} "
                    "positions. A first call is dense over the whole prompt; generate(..., prefill_chunk_size=n) feeds it "
                    "in pieces that attend to no more than the cache holds.",
                    stacklevel=3,
                )

    def _refuse_interrupted(self, new_tokens: int) -> None:
        """Wherever a forward was interrupted, one end of the cache shows it; `new_tokens`: what ours have not yet seen."""
        seen = self._layers[self._first].get_seq_length()
        for index in self._ends:
            if self._layers[index].get_seq_length() != (seen + new_tokens if index < self._first else seen):
                raise ValueError(
                    "the layers of this cache have seen different numbers of tokens: a forward was interrupted. "
                    "Call reset()."
                )

    def _refuse_gaps(self, position_ids: torch.Tensor | None, seen: int, new_tokens: int) -> None:
        """Sinks move by the number of evicted tokens, so positions must count tokens."""
        if position_ids is None or position_ids.shape[-1] != new_tokens or position_ids.is_floating_point():
            return
        if seen == 0:
            self._first_position = int(position_ids.flatten()[0])
        counted = torch.arange(new_tokens, device=position_ids.device) + self._first_position + seen
        if not torch.equal(position_ids, counted.expand_as(position_ids).to(position_ids.dtype)):
            raise NotImplementedError(
                f"SinkWindowCache needs positions that rise by one with every token, from {self._first_position + seen:,} "
                f"on in this call, but position_ids are {position_ids.flatten()[:8].tolist()}… For another text, call "
                "reset(); after stream() of a prompt, generate() needs one token more than was streamed; images and "
                "packed texts are not supported."
            )

    def _share_storage(self) -> None:
        alike = defaultdict(list)
        for layer in self.layers:
            if isinstance(layer, SinkWindowLayer) and layer.is_initialized and layer.storage is None:
                alike[layer.keys.shape, layer.values.shape, layer.dtype, layer.device].append(layer)
        for layers in alike.values():
            partners = {layer.rotation.partner for layer in layers if not layer.rotation.is_identity}
            for partner in partners or {layers[0].rotation.partner}:
                together = [one for one in layers if one.rotation.partner == partner or one.rotation.is_identity]
                SharedStorage([layer for layer in together if layer.storage is None])

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Returns `(kv_length, kv_offset)` for a layer; called by the mask-building code before any layer runs."""
        if torch.compiler.is_compiling():
            sizes: tuple[int, int] = self._outside_of_graphs(self.get_mask_sizes, query_length, layer_idx)
            return sizes
        if self.layers:
            self._refuse_padding(padding_mask_of_caller())
            self._refuse_interrupted(0)
        return super().get_mask_sizes(query_length, layer_idx)

    # Applied to the methods themselves, the decorator would cost more at every call than all else that they do.
    @torch.compiler.disable(reason=_NOT_IN_GRAPHS)  # type: ignore[untyped-decorator]
    def _outside_of_graphs(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return method(*args, **kwargs)

    def _refuse_padding(self, mask: torch.Tensor | None) -> None:
        if mask is not None and not mask.all():
            raise NotImplementedError(
                "SinkWindowCache does not support padded batches yet, and attention_mask has zeros: in a padded row the "
                "pads would become the sinks. Run rows of different lengths one at a time."
            )

    @contextmanager
    def sinks_per_query(self) -> Iterator[None]:
        """Within, calls with several new tokens give each query its own copy of the sinks; see `streaming.stream`."""
        layers = [layer for layer in self.layers if isinstance(layer, SinkWindowLayer)]
        for layer in layers:
            layer.sinks_per_query = True
        try:
            yield
        finally:
            for layer in layers:
                layer.sinks_per_query = False

    def __deepcopy__(self, memo: dict[int, Any]) -> SinkWindowCache:
        # Copies made in inference mode could not be written to outside of it.
        with torch.inference_mode(False):
            copied = type(self).__new__(type(self))
            memo[id(self)] = copied
            vars(copied).update(copy.deepcopy(vars(self), memo))
        return copied

    def __bool__(self) -> bool:
        return True  # although it has no layers before a model has used it

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values held, and of the sinks' pristine keys. Constant once the cache is in use."""
        return sum(t.numel() * t.element_size() for layer in self._layers for t in _tensors(layer))

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: a stream has no maximum length."""
        return -1

    def __repr__(self) -> str:
        seen = self.get_seq_length() if self._layers else 0
        return f"SinkWindowCache(n_sink={self.n_sink}, window={self.window}, seen={seen}, nbytes={self.nbytes})"

    def _not_supported(self, what: str) -> NotImplementedError:
        return NotImplementedError(f"SinkWindowCache does not support {what} yet. Use DynamicCache for that.")

    def crop(self, tokens_to_remove: int) -> None:
        """Not supported yet: evicted tokens cannot be brought back."""
        raise self._not_supported("crop (assisted decoding)")

    def activate_past_recording(self) -> None:
        """Not supported yet."""
        raise self._not_supported("recording past states (assisted decoding)")

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Not supported yet."""
        raise self._not_supported("reorder_cache (beam search)")

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Not supported yet."""
        raise self._not_supported("batch_repeat_interleave")

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Not supported yet."""
        raise self._not_supported("batch_select_indices")

    def offload(self, layer_idx: int, only_non_sliding: bool = True) -> None:
        """Not supported: the cache is small and stays on its device."""
        raise self._not_supported("offloading")

    def prefetch(self, layer_idx: int, only_non_sliding: bool = True) -> None:
        """Not supported: the cache is small and stays on its device."""
        raise self._not_supported("offloading")


def _tensors(layer: Any) -> list[torch.Tensor]:
    attributes = [v for value in vars(layer).values() for v in (value.values() if isinstance(value, dict) else [value])]
    return [value for value in attributes if isinstance(value, torch.Tensor)]
