"""The ring: where one layer's keys and values lie, what is kept, and what is evicted.

Token `t` of the stream lies in slot `t` while `t < n_sink`, and in slot `n_sink + (t - n_sink) % window` after that.
Nothing but the number of tokens seen is needed to know what lies where, and attention does not care about the order of
keys once all of them are visible. The keys of the window already have the right rotary distance to the next query;
only the sinks are too far away, by the number of evicted tokens, and are presented rotated forward by it.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from .rotary import ForwardRotation, Rotation

# Models compute angles as float32 position * frequency; from here on float32 cannot tell neighbouring positions apart.
POSITION_LIMIT = 2**24


class SinkWindowLayer(CacheLayerMixin):
    """One layer's sinks and window: `capacity = n_sink + window` slots, allocated at the first update.

    Args:
        n_sink (`int`): how many of the first tokens to keep for ever.
        window (`int`): how many of the last tokens to keep, the current one included.
        rotation (`Rotation`): how the layer's keys rotate.
        max_position (`int`): the most tokens that the model can number.
        sliding_window (`int`, *optional*): the layer's native window, of which the model's masks know.

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
    keys: torch.Tensor
    values: torch.Tensor
    sink_keys: torch.Tensor
    storage: SharedStorage | None
    seen: int

    def __init__(
        self,
        n_sink: int,
        window: int,
        rotation: Rotation,
        max_position: int = POSITION_LIMIT,
        sliding_window: int | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.n_sink, self.window, self.capacity = n_sink, window, n_sink + window
        self.rotation, self.max_position, self.sliding_window = rotation, max_position, sliding_window
        self.sinks_per_query = False
        self.reset()

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
        storage = self.storage
        if storage and (
            (self.index and storage.step == self.seen and not key_states.requires_grad)
            or storage.begin_step(self.seen, key_states, value_states)
        ):
            self.keys.index_copy_(2, storage.slot, key_states)
            self.values.index_copy_(2, storage.slot, value_states)
            if self.seen < self.n_sink:
                self.sink_keys[:, :, self.seen : self.seen + 1] = key_states
            self.seen += 1
            if self.seen >= self.capacity:
                return self.keys, self.values
            return self.keys.narrow(2, 0, self.seen), self.values.narrow(2, 0, self.seen)
        self._check(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if storage is None:
            attended = key_states, value_states
        elif self.sinks_per_query:
            attended = self._attended_with_sinks_per_query(storage, key_states, value_states)
        else:
            storage.present_sinks(self._evicted_before_query())
            slots = torch.cat([torch.arange(min(self.seen, self.n_sink), device=self.device), self._window_slots()])
            attended = (
                torch.cat([self.keys.index_select(2, slots), key_states], dim=2),
                torch.cat([self.values.index_select(2, slots), value_states], dim=2),
            )
        self._store(key_states, value_states)
        return attended

    def _attended_with_sinks_per_query(
        self, storage: SharedStorage, key_states: torch.Tensor, value_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values in the order: the sinks as the first query should see them, as the second, …; window; new.

        Each query has its own distance to the sinks, so each gets its own copy; `streaming.chunk_mask` fits this order.
        """
        queries, slots = key_states.shape[2], self._window_slots()
        shifts = range(self._evicted_before_query(), self._evicted_before_query() + queries)
        sink_keys = storage.forward_rotation.one_layer(self.sink_keys, self.index, shifts)
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
        self.check_positions(key_states.shape[2])
        if not self.is_initialized:
            return
        (batch_size, num_heads, _, head_dim), held = key_states.shape, self.keys.shape
        given = (batch_size, num_heads, head_dim, key_states.dtype, value_states.dtype, key_states.device)
        expected = (held[0], held[1], held[3], self.dtype, self.dtype, self.device)
        if given != expected:
            names = ("batch size", "number of key-value heads", "head_dim", "dtype", "value dtype", "device")
            wrong = next(i for i in range(len(names)) if given[i] != expected[i])
            raise ValueError(
                f"the {names[wrong]} of the keys is {given[wrong]}, but this cache holds {self.seen} tokens with "
                f"{names[wrong]} {expected[wrong]}. Call reset() before using it for something else."
            )

    def check_positions(self, new_tokens: int) -> None:
        """Refuses to number more tokens than the model can."""
        if self.seen + new_tokens > self.max_position:
            raise ValueError(
                f"{self.seen:,} tokens seen and {new_tokens:,} new are more than the {self.max_position:,} positions that "
                "this model can tell apart. Call reset(), or start a new cache from the recent text."
            )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Returns `(kv_length, kv_offset)`: how many keys `update` will return, and the index of the first of them.

        The index counts as if the keys were contiguous up to the last new token, so that a causal mask built from it is right.
        """
        self.check_positions(query_length)  # here too: beyond the end of a table a model fails before it calls update
        visible = min(self.seen, self.capacity - 1)
        beyond = self.sliding_window is not None and visible + query_length > self.sliding_window
        if beyond and self.seen and query_length > 1 and not self.sinks_per_query:
            raise ValueError(
                f"a call with {query_length} tokens on a cache that shows {visible} would lose the sinks, because the "
                f"model's own masks end after sliding_window = {self.sliding_window} tokens. Feed these tokens with "
                "sink_cache.stream, or one at a time."
            )
        return visible + query_length, self.seen - visible

    def get_seq_length(self) -> int:
        """Tokens seen, ever: `generate()` slices the prompt with it, and models number positions from it."""
        return self.seen

    def get_max_length(self) -> int:
        """-1: a stream has no maximum length."""
        return -1

    def reset(self) -> None:
        """Forgets all tokens; shape, dtype and device may differ afterwards."""
        self.keys = self.values = self.sink_keys = torch.empty(0)
        self.storage = None
        self.index = 0  # among the layers of its storage
        self.is_initialized = False
        self.seen = 0


class SharedStorage:
    """The keys and values of layers that are alike, in one piece, so that what all layers do at a step is done at once.

    Args:
        layers (`list[SinkWindowLayer]`): initialised layers of one shape, dtype, device and pairing of dimensions. Their
            `keys`, `values` and `sink_keys` become views of `[layers, batch_size, num_heads, slots, head_dim]` tensors.

    Attributes:
        slot (`torch.Tensor`): `[1]`, int64, the slot that takes the token of the current step. One tensor for all layers, because
            a view of the slot for every layer costs a launch-bound step more than the write itself.
    """

    def __init__(self, layers: list[SinkWindowLayer]) -> None:
        self.layers = layers
        self.keys, self.values, self.sink_keys = (self._join(name) for name in ("keys", "values", "sink_keys"))
        for index, layer in enumerate(layers):
            layer.storage, layer.index = self, index
        first = layers[0]
        self.n_sink, self.window, self.capacity = first.n_sink, first.window, first.capacity
        self.forward_rotation = ForwardRotation([layer.rotation for layer in layers], first.device)
        self.rotates = self.n_sink > 0 and not all(layer.rotation.is_identity for layer in layers)
        self.sink_slots = self.keys[..., : self.n_sink, :]
        self.shift = 0
        self.token_shapes = self.keys[0, :, :, :1].shape, self.values[0, :, :, :1].shape
        self.step = -1
        self.every_slot = torch.arange(self.capacity, device=first.device)
        self.slot = self.every_slot[:0]

    def _join(self, name: str) -> torch.Tensor:
        with torch.inference_mode(False):
            joined = torch.stack([getattr(layer, name) for layer in self.layers])
            for layer, own in zip(self.layers, joined.unbind(), strict=True):
                setattr(layer, name, own)
        return joined

    def begin_step(self, seen: int, key_states: torch.Tensor, value_states: torch.Tensor) -> bool:
        """Gets ready for one token after `seen` others, with which the first layer of the step comes, for all layers.

        Returns:
            `bool`: False, with nothing done, if these are not one token of what is stored here.
        """
        fits = (
            (key_states.shape, value_states.shape) == self.token_shapes
            and key_states.dtype == value_states.dtype == self.keys.dtype
            and key_states.device == self.keys.device
            and not (key_states.requires_grad or value_states.requires_grad)
        )
        if fits:
            self.layers[0].check_positions(1)
            self.present_sinks(max(0, seen + 1 - self.capacity))
            slot = seen if seen < self.capacity else self.n_sink + (seen - self.n_sink) % self.window
            self.slot = self.every_slot.narrow(0, slot, 1)
            self.step = seen
        return fits

    def present_sinks(self, shift: int) -> None:
        """Rotates the sinks of all layers forward by `shift` positions, if they are not yet."""
        if self.rotates and shift != self.shift:
            self.forward_rotation.all_layers(self.sink_keys, shift, out=self.sink_slots)
        self.shift = shift
