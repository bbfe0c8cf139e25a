"""`SinkWindowCache`: what is kept, where it lies, and what is evicted.

Token `t` of the stream lies in slot `t` while `t < n_sink`, and in slot `n_sink + (t - n_sink) % window` after that: a
ring. Nothing but the number of tokens seen is needed to know what lies where, and attention does not care about the
order of keys once all of them are visible. The keys of the window already have the right rotary distance to the next
query; only the sinks are too far away, by the number of evicted tokens, and are presented rotated forward by it.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin

from .discovery import calling_model, calling_padding_mask, class_for_config, text_model_class
from .rotary import ForwardRotation, Rotation
from .twin import CannotStream, PositionScheme, position_scheme

# Models compute angles as float32 position * frequency; from here on float32 cannot tell neighbouring positions apart.
POSITION_LIMIT = 2**24

_NOT_IN_GRAPHS = "SinkWindowCache works outside of graphs: compile the model without fullgraph=True"


class SinkWindowLayer(CacheLayerMixin):
    """One layer's sinks and window: `capacity = n_sink + window` slots, allocated at the first update.

    Args:
        n_sink (`int`): how many of the first tokens to keep for ever.
        window (`int`): how many of the last tokens to keep, the current one included.
        rotation (`Rotation`): how the layer's keys rotate.
        max_position (`int`): the most tokens that the model can number.

    Attributes:
        keys, values (`torch.Tensor`): `[batch_size, num_heads, capacity, head_dim]`, sinks in the first `n_sink` slots, their
            keys rotated forward by the number of evicted tokens.
        sink_keys (`torch.Tensor`): `[batch_size, num_heads, n_sink, head_dim]`, as the model made them. Always rotating
            from these rounds once; rotating in place would add up an error with every token.
        seen (`int`): tokens seen, ever.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = False

    def __init__(self, n_sink: int, window: int, rotation: Rotation, max_position: int = POSITION_LIMIT) -> None:
        super().__init__()
        self.n_sink, self.window, self.capacity = n_sink, window, n_sink + window
        self.rotation, self.max_position = rotation, max_position
        self.seen = 0
        self.sink_keys: torch.Tensor | None = None
        self.sinks: SharedSinks | None = None
        self.sinks_per_query = False

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocates the slots; shapes, dtype and device are those of the first `key_states` and `value_states`."""
        batch_size, num_heads, _, head_dim = key_states.shape
        if head_dim != len(self.rotation.partner):
            raise NotImplementedError(
                f"SinkWindowCache expected keys of head_dim {len(self.rotation.partner)} from this model's config, but got "
                f"{head_dim}. Use DynamicCache with this model."
            )
        self.dtype, self.device = key_states.dtype, key_states.device
        # Tensors made in inference mode could not be written to outside of it, so make ordinary ones.
        with torch.inference_mode(False):
            self.keys = key_states.new_zeros(batch_size, num_heads, self.capacity, head_dim)
            self.values = value_states.new_zeros(batch_size, num_heads, self.capacity, value_states.shape[-1])
            self.sink_keys = key_states.new_zeros(batch_size, num_heads, self.n_sink, head_dim)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores new tokens, evicts what no longer fits, and returns what the new tokens attend to.

        Args:
            key_states, value_states (`torch.Tensor`): `[batch_size, num_heads, new_tokens, head_dim]`, keys rotated by the
                model at their absolute positions.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: keys and values `[batch_size, num_heads, kv_length, head_dim]` with the
            `kv_length` that `get_mask_sizes` promised. For several tokens they are in chronological order; for one token
            they are a view of the slots, valid until the next update.
        """
        self._check(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new_tokens = key_states.shape[2]
        if new_tokens == 1 and self.sinks is not None:
            self.sinks.present(self._evicted_before_query())
            slot = self.seen if self.seen < self.capacity else self.n_sink + (self.seen - self.n_sink) % self.window
            self.keys.narrow(2, slot, 1).copy_(key_states)
            self.values.narrow(2, slot, 1).copy_(value_states)
            if self.seen < self.n_sink:
                self.sink_keys.narrow(2, slot, 1).copy_(key_states)
            self.seen += 1
            if self.seen >= self.capacity:
                return self.keys, self.values
            return self.keys.narrow(2, 0, self.seen), self.values.narrow(2, 0, self.seen)
        if self.seen == 0:
            attended = key_states, value_states
        elif self.sinks_per_query:
            attended = self._attended_with_sinks_per_query(key_states, value_states)
        else:
            self.sinks.present(self._evicted_before_query())
            slots = torch.cat([torch.arange(min(self.seen, self.n_sink), device=self.device), self._window_slots()])
            attended = (
                torch.cat([self.keys.index_select(2, slots), key_states], dim=2),
                torch.cat([self.values.index_select(2, slots), value_states], dim=2),
            )
        self._store(key_states, value_states)
        return attended

    def _attended_with_sinks_per_query(
        self, key_states: torch.Tensor, value_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values in the order: the sinks as the first query should see them, as the second, …; window; new.

        Each query has its own distance to the sinks, so each gets its own copy; `streaming.chunk_mask` fits this order.
        """
        queries, slots = key_states.shape[2], self._window_slots()
        shifts = range(self._evicted_before_query(), self._evicted_before_query() + queries)
        sink_keys = self.sinks.forward_rotation.one_layer(self.sink_keys, self.sinks.layers.index(self), shifts)
        sink_values = self.values[:, :, : self.n_sink].repeat(1, 1, queries, 1)
        return (
            torch.cat([sink_keys, self.keys.index_select(2, slots), key_states], dim=2),
            torch.cat([sink_values, self.values.index_select(2, slots), value_states], dim=2),
        )

    def _evicted_before_query(self) -> int:
        """Tokens that the next query no longer sees: it takes a place in the window itself."""
        return max(0, self.seen + 1 - self.capacity)

    def _window_slots(self) -> torch.Tensor:
        """The slots of the window tokens that the next query sees besides itself, in chronological order."""
        first = self.n_sink + self._evicted_before_query()
        tokens = torch.arange(first, max(first, self.seen), device=self.device)
        return self.n_sink + (tokens - self.n_sink) % self.window

    def _store(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Keeps those of several new tokens that are sinks, or are not older than `window` at the end of the call."""
        end = self.seen + key_states.shape[2]
        first = max(self.seen, self.n_sink, end - self.window)
        sinks = torch.arange(self.seen, max(self.seen, min(self.n_sink, end)), device=self.device)
        kept = torch.cat([sinks, torch.arange(first, max(first, end), device=self.device)])
        slots = torch.where(kept < self.n_sink, kept, self.n_sink + (kept - self.n_sink) % self.window)
        self.keys.index_copy_(2, slots, key_states.index_select(2, kept - self.seen))
        self.values.index_copy_(2, slots, value_states.index_select(2, kept - self.seen))
        if self.seen < self.n_sink:
            stop = min(self.n_sink, end)
            self.sink_keys[:, :, self.seen : stop] = key_states[:, :, : stop - self.seen]
        self.seen = end

    def _check(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Refuses what would go wrong, before anything is changed."""
        if key_states.requires_grad or value_states.requires_grad:
            raise NotImplementedError(
                "SinkWindowCache is for inference only: it writes in place, and an endless stream would be an endless "
                "graph. Call the model under torch.no_grad() or torch.inference_mode()."
            )
        self._check_positions(key_states.shape[2])
        if not self.is_initialized:
            return
        (batch_size, num_heads, _, head_dim), held = key_states.shape, self.keys.shape
        given = (batch_size, num_heads, head_dim, key_states.dtype, key_states.device)
        expected = (held[0], held[1], held[3], self.dtype, self.device)
        if given != expected:
            names = ("batch size", "number of key-value heads", "head_dim", "dtype", "device")
            wrong = next(i for i in range(len(names)) if given[i] != expected[i])
            raise ValueError(
                f"the {names[wrong]} of the keys is {given[wrong]}, but this cache holds {self.seen} tokens with "
                f"{names[wrong]} {expected[wrong]}. Call reset() before using it for something else."
            )

    def _check_positions(self, new_tokens: int) -> None:
        if self.seen + new_tokens > self.max_position:
            raise ValueError(
                f"{self.seen:,} tokens seen and {new_tokens:,} new are more than the {self.max_position:,} positions that "
                "this model can tell apart. Call reset(), or start a new cache from the recent text."
            )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Returns `(kv_length, kv_offset)`: how many keys `update` will return, and the index of the first of them.

        The index counts as if the keys were contiguous up to the last new token, so that a causal mask built from it is right.
        """
        self._check_positions(query_length)  # here too: beyond the end of a table a model fails before it calls update
        visible = min(self.seen, self.capacity - 1)
        return visible + query_length, self.seen - visible

    def get_seq_length(self) -> int:
        """Tokens seen, ever: `generate()` slices the prompt with it, and models number positions from it."""
        return self.seen

    def get_max_length(self) -> int:
        """-1: a stream has no maximum length."""
        return -1

    def reset(self) -> None:
        """Forgets all tokens; shape, dtype and device may differ afterwards."""
        self.keys = self.values = self.sink_keys = self.sinks = None
        self.is_initialized = False
        self.seen = 0


class SharedSinks:
    """Layers that share one storage, so that the sinks of all of them are repositioned together.

    Args:
        layers (`list[SinkWindowLayer]`): initialised layers of one shape, dtype, device and pairing of dimensions. Their
            `keys`, `values` and `sink_keys` become views of `[layers, batch_size, num_heads, slots, head_dim]` tensors.
    """

    def __init__(self, layers: list[SinkWindowLayer]) -> None:
        self.layers = layers
        self.shift = 0
        with torch.inference_mode(False):
            for name in ("keys", "values", "sink_keys"):
                shared = torch.stack([getattr(layer, name) for layer in layers])
                setattr(self, name, shared)
                for layer, own in zip(layers, shared, strict=True):
                    setattr(layer, name, own)
            for layer in layers:
                layer.sinks = self
        first = layers[0]
        self.rotates = first.n_sink > 0 and not all(layer.rotation.is_identity for layer in layers)
        self.slots = self.keys[..., : first.n_sink, :]
        self.forward_rotation = ForwardRotation([layer.rotation for layer in layers], first.device)

    def present(self, shift: int) -> None:
        """Rotates the sinks of all layers forward by `shift` positions; the first layer of a step does it for all."""
        if shift == self.shift:
            return
        if self.layers[0].seen != self.layers[-1].seen:
            raise ValueError(
                "the layers of this cache have seen different numbers of tokens: a forward was interrupted. Call reset()."
            )
        if self.rotates:
            self.forward_rotation.all_layers(self.sink_keys, shift, out=self.slots)
        self.shift = shift


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
        super().__init__(layers=[])
        if config is not None:
            if not isinstance(config, PreTrainedConfig):
                raise TypeError(f"config must be a model's config (model.config), but is a {type(config).__name__}")
            model_class, text_config = class_for_config(config)
            self._prepare_for(model_class, text_config, {})

    # The layers depend on the model, and the model shows itself only when it first uses the cache, so look then.
    @property
    def layers(self) -> list[Any]:
        if not self._layers:
            self._look_for_the_model()
        return self._layers

    @layers.setter
    def layers(self, layers: list[Any]) -> None:
        self._layers = layers

    @torch.compiler.disable(
        reason="a SinkWindowCache cannot see the model from inside a full graph: pass SinkWindowCache(..., config=model.config)"
    )
    def _look_for_the_model(self) -> None:
        model = calling_model()
        if model is not None:
            model_class, config = text_model_class(model)
            buffers = {name: b for name, b in model.named_buffers() if "inv_freq" in name and not b.is_meta}
            self._prepare_for(model_class, config, buffers)

    def _prepare_for(self, model_class: Any, config: PreTrainedConfig, buffers: dict[str, torch.Tensor]) -> None:
        try:
            scheme = position_scheme(model_class, config, buffers)
        except CannotStream as reason:
            raise NotImplementedError(
                f"SinkWindowCache does not support model type {config.model_type!r} ({model_class.__name__}): {reason}. "
                "Use DynamicCache with this model."
            ) from reason
        self.prepare(config, scheme)

    def prepare(self, config: PreTrainedConfig, scheme: PositionScheme) -> None:
        """Makes the layers for a model of this config, whose positions work as `scheme` says."""
        if scheme.sliding_window is not None and self.capacity > scheme.sliding_window:
            raise ValueError(
                f"n_sink + window is {self.capacity}, but every layer of this model ({config.model_type}) attends to at most "
                f"sliding_window = {scheme.sliding_window} tokens. Choose n_sink + window <= {scheme.sliding_window}."
            )
        layers = DynamicCache(config=config).layers
        for index, rotation in scheme.rotations.items():
            layers[index] = SinkWindowLayer(
                self.n_sink, self.window, rotation, min(POSITION_LIMIT, scheme.max_position or POSITION_LIMIT)
            )
        self._layers = layers
        self._trained_context = getattr(config, "max_position_embeddings", None)

    @torch.compiler.disable(reason=_NOT_IN_GRAPHS)
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores the new keys and values of one layer and returns those to attend to; see `SinkWindowLayer.update`."""
        layers = self.layers
        if not layers:
            raise ValueError(
                "this SinkWindowCache cannot see a transformers model among its callers. Pass "
                "SinkWindowCache(..., config=model.config)."
            )
        layer = layers[layer_idx]
        if isinstance(layer, SinkWindowLayer) and (layer.sinks is None or key_states.shape[2] > 1):
            self._check_call(layer, key_states)
            if layer.seen and layer.sinks is None:
                self._share_storage()
        return layer.update(key_states, value_states, *args, **kwargs)

    def _check_call(self, layer: SinkWindowLayer, key_states: torch.Tensor) -> None:
        if layer is not next(one for one in self.layers if isinstance(one, SinkWindowLayer)):
            return
        self._refuse_padding(calling_padding_mask())
        new_tokens = key_states.shape[2]
        if layer.seen == 0 and self._trained_context is not None and new_tokens > self._trained_context:
            warnings.warn(
                f"the first call has {new_tokens:,} tokens, and the model was trained on {self._trained_context:,} positions. "
                "A first call is dense over the whole prompt; generate(..., prefill_chunk_size=n) feeds it in pieces "
                "that attend to no more than the cache holds.",
                stacklevel=2,
            )

    def _share_storage(self) -> None:
        alike = defaultdict(list)
        for layer in self.layers:
            if isinstance(layer, SinkWindowLayer) and layer.is_initialized and layer.sinks is None:
                shape = (layer.keys.shape, layer.values.shape, layer.dtype, layer.device)
                alike[shape, layer.rotation.partner].append(layer)
        for layers in alike.values():
            SharedSinks(layers)

    @torch.compiler.disable(reason=_NOT_IN_GRAPHS)
    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Returns `(kv_length, kv_offset)` for a layer; called by the mask-building code before any layer runs."""
        if self.layers:
            self._refuse_padding(calling_padding_mask(innermost=True))
        return super().get_mask_sizes(query_length, layer_idx)

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
