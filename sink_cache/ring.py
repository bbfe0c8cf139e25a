"""The ring: where one layer's keys and values lie, what is kept, and what is evicted.

The token at position `t` lies in slot `t` while `t < n_sink`, and in slot `n_sink + (t - n_sink) % window` after that.
Nothing but the position of the next token is needed to know what lies where, and attention does not care about the order
of keys once all of them are visible. The keys of the window already have the right rotary distance to the next query;
only the sinks are too far away, by the number of evicted tokens, and are presented rotated forward by it.

A left-padded row counts its own tokens: its first real token is at position 0, its sinks are its own, and it fills up and
evicts later than the others. `pads` says by how much.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch

from .internals import CacheLayerMixin
from .rotary import ForwardRotation, Rotation

# Models compute angles as float32 position * frequency, so logits move as positions rise: by some 0.2% at 100,000 and 4% at a
# million (results/positions.json). From this limit on float32 cannot tell neighbouring positions apart at all.
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
        position (`int`): of the next token of an unpadded row: tokens seen, less what `rebase` has taken off.
        rebased (`int`): what `rebase` has taken off.
        pads (`tuple[int, ...]`): how many pads each row began with; empty if none did.
        exact_chunks (`bool`): give each query of a call with several tokens its own copy of the sinks.
        prompt (`int`): of a first call that is recorded: how many of its tokens see all before them, as in a call that is not
            recorded. Candidates follow them.
        record_past (`bool`): keep what is overwritten, so that `crop` can bring it back, and give each query its own sinks.
            (transformers' name: it turns recording off itself when it has done with it.)
    """

    is_compileable = False
    keys: torch.Tensor
    values: torch.Tensor
    sink_keys: torch.Tensor
    storage: SharedStorage | None
    position: int
    rebased: int
    prompt: int
    overwritten: tuple[int, torch.Tensor, torch.Tensor, torch.Tensor] | None
    pads: tuple[int, ...]

    def __init__(
        self,
        n_sink: int,
        window: int,
        rotation: Rotation,
        max_position: int = POSITION_LIMIT,
        sliding_window: int | None = None,
    ) -> None:
        # Not super().__init__(), which sets keys and values to None; reset() sets all that it would.
        self.n_sink, self.window, self.capacity = n_sink, window, n_sink + window
        self.rotation, self.max_position, self.sliding_window = rotation, max_position, sliding_window
        self.is_sliding = False
        self.exact_chunks = self.record_past = False
        self.reset()

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocates the slots; shapes, dtype and device are those of the first `key_states` and `value_states`."""
        batch_size, num_heads, _, head_dim = key_states.shape
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
            they are a view of the slots, valid until the next update. A row with fewer tokens has them at the end.
        """
        storage = self.storage
        if storage and (
            (self.index and storage.step == self.position and storage.takes(key_states, value_states))
            or storage.begin_step(self.position, key_states, value_states)
        ):
            if self.pads:
                return self._step_of_padded_rows(storage, key_states, value_states)
            storage.key_slots[self.index].copy_(key_states)
            storage.value_slots[self.index].copy_(value_states)
            if self.position < self.n_sink:
                self.sink_keys[:, :, self.position : self.position + 1] = key_states
            self.position += 1
            if self.position >= self.capacity:
                return self.keys, self.values
            return self.keys.narrow(2, 0, self.position), self.values.narrow(2, 0, self.position)
        self._check(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return self._update_several(key_states, value_states)

    def _step_of_padded_rows(
        self, storage: SharedStorage, key_states: torch.Tensor, value_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One token for each row, into a slot of its own."""
        rows, slots = storage.every_row, storage.slot_of_row
        self.keys[rows, :, slots] = key_states[:, :, 0]
        self.values[rows, :, slots] = value_states[:, :, 0]
        for row, pads in enumerate(self.pads):
            if (count := self.position - pads) < self.n_sink:
                self.sink_keys[row, :, count] = key_states[row, :, 0]
        self.position += 1
        if storage.visible is None:
            return self.keys, self.values
        return _take(self.keys, storage.visible), _take(self.values, storage.visible)

    def _update_several(
        self, key_states: torch.Tensor, value_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        attended = key_states, value_states
        if self.evicts_within(key_states.shape[2]):
            attended = self._attended_with_sinks_per_query(key_states, value_states)
        elif self.position:
            self._present_sinks()
            cached = [self._cached_slots(max(0, count)) for _, count in self._rows()]
            longest = max(len(slots) for slots in cached)
            slots = torch.stack([torch.nn.functional.pad(slots, (longest - len(slots), 0)) for slots in cached])
            attended = (
                torch.cat([_take(self.keys, slots), key_states], dim=2),
                torch.cat([_take(self.values, slots), value_states], dim=2),
            )
        for row, count in self._rows():
            pads = max(0, -count)
            if not self.record_past or not self.evicts_within(key_states.shape[2]) or self.position:
                self._store(row, max(0, count), key_states[row, :, pads:], value_states[row, :, pads:])
                continue
            prompt = self.dense()
            self._store(row, 0, key_states[:, :, :prompt], value_states[:, :, :prompt])
            self._record_first(prompt, key_states.shape[2] - prompt)
            self._store(row, prompt, key_states[:, :, prompt:], value_states[:, :, prompt:])
        self._advance(key_states.shape[2])
        return attended

    def evicts_within(self, new_tokens: int) -> bool:
        """Whether the queries of a call see different tokens evicted, and each has to have its own copy of the sinks."""
        exact = self.exact_chunks or self.record_past
        return exact and new_tokens > 1 and self.position + new_tokens > max(self.capacity, self.dense())

    def dense(self) -> int:
        """How many tokens of the next call see all before them, and not only what a query sees that comes alone."""
        return 0 if self.position else self.prompt

    def chunk_tokens(self, queries: int) -> tuple[range, range, range]:
        """What a call that `evicts_within` attends to: a sink copy for each of these shifts, cached and new positions."""
        alone = max(self.position, self.dense())  # the first query that sees what it would see alone
        evicted = range(alone + 1 - self.capacity, self.position + 1 - self.capacity + queries)
        first = 0 if self.position < self.capacity else self.position + 1 - self.window
        return (
            range(max(1, evicted.start), evicted.stop),
            range(first, self.position),
            range(self.position, self.position + queries),
        )

    def _attended_with_sinks_per_query(
        self, key_states: torch.Tensor, value_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values as in `chunk_tokens`: sinks for the first query that needs a copy, the next, …; cached; new.

        Each query has its own distance to the sinks; `masks.chunk_mask` shows it its own copy.
        """
        shifts, cached, _ = self.chunk_tokens(key_states.shape[2])
        slots = self.slots_of(torch.arange(cached.start, cached.stop, device=self.device))
        # Sinks may be among the new tokens.
        known = min(self.position, self.n_sink)
        sink_keys = torch.cat([self.sink_keys[:, :, :known], key_states[:, :, : self.n_sink - known]], dim=2)
        sink_values = torch.cat([self.values[:, :, :known], value_states[:, :, : self.n_sink - known]], dim=2)
        if cached and cached.start == 0:
            self._present_sinks()  # where nothing has been evicted: as they came
        return (
            torch.cat([self._sink_copies(sink_keys, shifts), self.keys.index_select(2, slots), key_states], dim=2),
            torch.cat(
                [sink_values.repeat(1, 1, len(shifts), 1), self.values.index_select(2, slots), value_states], dim=2
            ),
        )

    def _record_first(self, position: int, new_tokens: int) -> None:
        """Keeps what candidates of a first call are about to overwrite, for the storage; see `SharedStorage.record`."""
        if new_tokens <= self.window:
            slots = self.slots_of(torch.arange(position, position + new_tokens, device=self.device))
            self.overwritten = (position, slots, self.keys[:, :, slots], self.values[:, :, slots])

    def _sink_copies(self, sink_keys: torch.Tensor, shifts: range) -> torch.Tensor:
        if self.storage is None:
            return ForwardRotation([self.rotation], self.device).one_layer(sink_keys, 0, shifts)
        return self.storage.forward_rotation.one_layer(sink_keys, self.index, shifts)

    def _present_sinks(self) -> None:
        if self.storage is not None:
            self.storage.present_sinks(self.evicted_before_query())

    def _advance(self, new_tokens: int) -> None:
        self.position += new_tokens

    def _rows(self) -> list[tuple[slice, int]]:
        """Rows of equal padding and the tokens that they have seen; negative while pads are still to come."""
        if not self.pads:
            return [(slice(None), self.position)]
        return [(slice(row, row + 1), self.position - pads) for row, pads in enumerate(self.pads)]

    def evicted_before_query(self) -> tuple[int, ...]:
        """For rows of equal padding: tokens that the next query no longer sees, as it takes a place itself (if > 0)."""
        return tuple(count + 1 - self.capacity for _, count in self._rows())

    @property
    def sizes(self) -> tuple[int, int]:
        """`n_sink` and `capacity`."""
        return self.n_sink, self.capacity

    def slots_of(self, positions: torch.Tensor) -> torch.Tensor:
        """Where the tokens at these positions of an unpadded row lie."""
        n_sink, capacity = self.sizes
        return torch.where(positions < n_sink, positions, n_sink + (positions - n_sink) % (capacity - n_sink))

    def _cached_slots(self, count: int) -> torch.Tensor:
        """The slots that the next query of a row of `count` tokens sees besides itself, in chronological order."""
        first = self.n_sink + max(0, count + 1 - self.capacity)
        sinks = torch.arange(min(count, self.n_sink), device=self.device)
        return self.slots_of(torch.cat([sinks, torch.arange(first, max(first, count), device=self.device)]))

    def _store(self, row: slice, count: int, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Keeps those of several new tokens that are sinks, or are not older than `window` at the end of the call."""
        end = count + key_states.shape[2]
        first = max(count, self.n_sink, end - self.window)
        sinks = torch.arange(count, max(count, min(self.n_sink, end)), device=self.device)
        kept = torch.cat([sinks, torch.arange(first, max(first, end), device=self.device)])
        slots = self.slots_of(kept)
        self.keys[row].index_copy_(2, slots, key_states.index_select(2, kept - count))
        self.values[row].index_copy_(2, slots, value_states.index_select(2, kept - count))
        if count < self.n_sink:
            stop = min(self.n_sink, end)
            self.sink_keys[row, :, count:stop] = key_states[:, :, : stop - count]

    def _check(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Refuses what would go wrong, before anything is changed."""
        self.refuse_gradients(key_states, value_states)
        if not self.is_initialized and key_states.shape[-1] != len(self.rotation.partner):
            raise NotImplementedError(
                f"SinkWindowCache expected keys of head_dim {len(self.rotation.partner)} from this model's config, but got "
                f"{key_states.shape[-1]}. Use DynamicCache with this model."
            )
        self.check_positions(key_states.shape[2])
        if not self.is_initialized:
            return
        (batch_size, num_heads, _, head_dim), held = key_states.shape, self.keys.shape
        given = (batch_size, num_heads, head_dim, key_states.dtype, value_states.dtype, key_states.device)
        expected = (held[0], held[1], held[3], self.dtype, self.values.dtype, self.device)
        names = ("batch size", "number of key-value heads", "head_dim", "dtype", "value dtype", "device")
        self.refuse_unless_equal(names, given, expected)

    @staticmethod
    def refuse_gradients(key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """What is written in place would be part of their graph."""
        if key_states.requires_grad or value_states.requires_grad:
            raise NotImplementedError(
                "SinkWindowCache is for inference only: it writes in place, and an endless stream would be an endless "
                "graph. Call the model under torch.no_grad() or torch.inference_mode()."
            )

    def refuse_unless_equal(self, names: tuple[str, ...], given: tuple[Any, ...], expected: tuple[Any, ...]) -> None:
        """Keys and values have to be like those that are held."""
        for name, one, other in zip(names, given, expected, strict=True):
            if one != other:
                raise ValueError(
                    f"the {name} of the keys is {one}, but this cache holds {self.get_seq_length()} tokens with "
                    f"{name} {other}. Call reset() before using it for something else."
                )

    def check_positions(self, new_tokens: int) -> None:
        """Refuses to number more tokens than the model can."""
        if self.position + new_tokens > self.max_position:
            raise ValueError(
                f"{self.position:,} tokens seen and {new_tokens:,} new are more than the {self.max_position:,} positions that "
                "this model can tell apart. Logits move long before. Generate with custom_generate=sink_cache.endless, or call "
                "rebase() from time to time: both keep positions low. Or call reset(), and start from the recent text."
            )

    def visible(self) -> int:
        """Cached tokens that the next query of the row with the most tokens sees besides itself."""
        return max(0, min(max(count for _, count in self._rows()), self.capacity - 1))

    def get_mask_sizes(self, query_length: int) -> tuple[int, Any]:
        """Returns `(kv_length, kv_offset)`: how many keys `update` will return, and the index of the first of them.

        The index counts as if the keys were contiguous up to the last new token, so that a causal mask built from it is right.
        """
        self.check_positions(query_length)  # here too: beyond the end of a table a model fails before it calls update
        if self.evicts_within(query_length):
            shifts, cached, _ = self.chunk_tokens(query_length)
            return len(shifts) * self.n_sink + len(cached) + query_length, 0
        visible = self.visible()
        beyond = self.sliding_window is not None and visible + query_length > self.sliding_window
        if beyond and self.position and query_length > 1:
            raise ValueError(
                f"a call with {query_length} tokens on a cache that shows {visible} would lose the sinks, because the "
                f"model's own masks end after sliding_window = {self.sliding_window} tokens. Feed these tokens with "
                "sink_cache.stream, or one at a time."
            )
        return visible + query_length, self.position + self.rebased - visible

    def get_seq_length(self) -> int:
        """Tokens seen, ever: `generate()` slices the prompt with it, and models number positions from it."""
        return self.position + self.rebased

    def query_offset(self) -> int:
        """The index of the next token in masks; see `get_mask_sizes`."""
        return self.get_seq_length()

    def get_max_length(self) -> int:
        """-1: a stream has no maximum length."""
        return -1

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """Whether `crop` can undo a call, if `record_past`; padded rows cannot."""
        return not self.pads

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that the layer holds, by name, `[batch_size, num_heads, slots, head_dim]` each; empty before the first update."""
        if not self.is_initialized:
            return {}
        return {"keys": self.keys, "values": self.values, "sink_keys": self.sink_keys}

    def replace(self, tensors: dict[str, torch.Tensor]) -> None:
        """Holds these instead; the layer must not be part of a `SharedStorage`."""
        for name, tensor in tensors.items():
            setattr(self, name, tensor)
        self.dtype, self.device, self.is_initialized = self.keys.dtype, self.keys.device, True

    def lower_positions(self, by: int) -> None:
        """Lowers all positions by a multiple of `window`, by which the keys of the window have been moved back."""
        self.position, self.rebased = self.position - by, self.rebased + by

    def __getstate__(self) -> dict[str, Any]:
        # A view would be pickled with the storage of all layers, once for each of them.
        views = () if self.storage is None else _NAMES
        return {name: value for name, value in vars(self).items() if name not in views}

    def reset(self) -> None:
        """Forgets all tokens; shape, dtype and device may differ afterwards."""
        self.keys = self.values = self.sink_keys = torch.empty(0, device="cpu")
        self.storage = None
        self.index = 0  # among the layers of its storage
        self.is_initialized = False
        self.position = self.rebased = self.prompt = 0
        self.overwritten = None
        self.pads = ()


def _take(tensor: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """From `[batch, heads, slots, head_dim]` these slots, `[1 or batch, length]`."""
    if slots.shape[0] == 1:
        return tensor.index_select(2, slots[0])
    return tensor.gather(2, slots[:, None, :, None].expand(-1, tensor.shape[1], -1, tensor.shape[-1]))


class SharedStorage:
    """The keys and values of layers that are alike, in one piece, so that what all layers do at a step is done at once.

    Args:
        layers (`list[SinkWindowLayer]`): initialised layers of one shape, dtype, device and pairing of dimensions. Their
            `keys`, `values` and `sink_keys` become views of `[layers, batch_size, num_heads, slots, head_dim]` tensors.

    Attributes:
        key_slots, value_slots (`tuple[torch.Tensor, ...]`): for each layer a view `[batch_size, num_heads, 1, head_dim]` of the
            slot that takes the token of the current step. All of them made at once: one by one, they cost a launch-bound
            step more than the writes themselves.
        slot_of_row (`torch.Tensor`): `[batch_size]`, int64, the same of padded rows.
        visible (`torch.Tensor`, *optional*): `[batch_size, kv_length]`, the slots that padded rows see at the current step;
            None when they see all.
    """

    def __init__(self, layers: list[SinkWindowLayer]) -> None:
        self.layers = layers
        first = layers[0]
        self.n_sink, self.window, self.capacity = first.n_sink, first.window, first.capacity
        self.forward_rotation = ForwardRotation([layer.rotation for layer in layers], first.device)
        self.rotates = self.n_sink > 0 and not all(layer.rotation.is_identity for layer in layers)
        self.visible: torch.Tensor | None = None
        self.overwritten: list[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]] = []
        if first.overwritten is not None:
            start, slots, *_ = first.overwritten
            keys, values = zip(*(layer.overwritten[2:] for layer in layers if layer.overwritten), strict=True)
            self.overwritten.append((start, slots, torch.stack(keys), torch.stack(values)))
            for layer in layers:
                layer.overwritten = None
        with torch.inference_mode(False):
            self._hold(*(torch.stack([layer.tensors()[name] for layer in layers]) for name in _NAMES))

    def _hold(self, keys: torch.Tensor, values: torch.Tensor, sink_keys: torch.Tensor) -> None:
        self.keys, self.values, self.sink_keys = keys, values, sink_keys
        for index, layer in enumerate(self.layers):
            layer.replace({name: getattr(self, name)[index] for name in _NAMES})
            layer.storage, layer.index = self, index
        self.sink_slots = self.keys[..., : self.n_sink, :]
        self.every_row = torch.arange(keys.shape[1], device=keys.device)
        self.token_shapes = self.keys[0, :, :, :1].shape, self.values[0, :, :, :1].shape
        self.shifts: tuple[int, ...] | None = None  # of the presented sinks, if known
        self.step = -1

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in _VIEWS}

    def hold_again(self) -> None:
        """Makes the views of the tensors here again, which copies and pickles of a cache do without."""
        self._hold(self.keys, self.values, self.sink_keys)

    def begin_step(self, position: int, key_states: torch.Tensor, value_states: torch.Tensor) -> bool:
        """Gets ready for one token at `position`, with which the first layer of the step comes, for all layers.

        Returns:
            `bool`: False, with nothing done, if these are not one token of what is stored here.
        """
        layer = self.layers[0]
        fits = (
            self.takes(key_states, value_states)
            and value_states.shape == self.token_shapes[1]
            and (key_states.dtype, value_states.dtype) == (self.keys.dtype, self.values.dtype)
            and key_states.device == self.keys.device
            and (not layer.pads or position >= max(layer.pads))
        )
        if not fits:
            return False
        layer.check_positions(1)
        self.present_sinks(layer.evicted_before_query())
        if layer.pads:
            self._place_padded_rows(position, layer.pads)
        else:
            slot = position if position < self.capacity else self.n_sink + (position - self.n_sink) % self.window
            self.key_slots = self.keys.narrow(3, slot, 1).unbind()
            self.value_slots = self.values.narrow(3, slot, 1).unbind()
        if layer.record_past:
            self.record(position, 1)
        self.step = position
        return True

    def takes(self, key_states: torch.Tensor, value_states: torch.Tensor) -> bool:
        """What has to be asked of each layer: keys of another shape would be repeated, and a graph would go on for ever."""
        return key_states.shape == self.token_shapes[0] and not (key_states.requires_grad or value_states.requires_grad)

    def _place_padded_rows(self, position: int, pads: tuple[int, ...]) -> None:
        counts = position - torch.tensor(pads, device="cpu")
        self.slot_of_row = self.layers[0].slots_of(counts).to(self.keys.device)
        self.visible = None
        seen = torch.clamp(counts + 1, max=self.capacity)
        if int(seen.min()) < self.capacity:
            length = int(seen.max())
            visible = torch.arange(length, device="cpu") - (length - seen)[:, None]
            self.visible = visible.clamp(min=0).to(self.keys.device)

    def present_sinks(self, evicted: tuple[int, ...]) -> None:
        """Rotates the sinks of all layers and rows forward by `evicted` positions (if > 0), if they are not yet."""
        shifts = tuple(max(0, shift) for shift in evicted)
        if self.rotates and shifts != self.shifts:
            self.forward_rotation.all_layers(self.sink_keys, evicted, out=self.sink_slots)
        self.shifts = shifts

    def forget_steps(self) -> None:
        """The keys or positions have changed otherwise than by a step."""
        self.overwritten.clear()
        self.step, self.shifts = -1, None

    def record(self, position: int, new_tokens: int) -> None:
        """Keeps what `new_tokens` tokens from `position` on are about to overwrite, and so for the last `window` tokens.

        Nothing, if these are more: some would overwrite each other. (Then they are no candidates but another turn.)
        """
        if not self.has_recorded_until(position):
            self.overwritten.clear()
        if new_tokens > self.window:
            self.overwritten.clear()
            return
        while len(self.overwritten) > 1 and position - self.overwritten[1][0] >= self.window:
            del self.overwritten[0]
        positions = torch.arange(position, position + new_tokens, device=self.keys.device)
        slots = self.layers[0].slots_of(positions)
        self.overwritten.append((position, slots, self.keys[..., slots, :], self.values[..., slots, :]))

    def has_recorded_until(self, position: int) -> bool:
        """Whether the last recorded token was the one before `position`; otherwise others came while nobody recorded."""
        return bool(self.overwritten) and self.overwritten[-1][0] + len(self.overwritten[-1][1]) == position

    def bring_back(self, position: int) -> None:
        """Puts back what tokens at `position` and after overwrote, and forgets what else was recorded."""
        for start, slots, keys, values in reversed(self.overwritten):
            kept = max(0, position - start)
            self.keys[..., slots[kept:], :] = keys[..., kept:, :]
            self.values[..., slots[kept:], :] = values[..., kept:, :]
        self.forget_steps()

    def select(self, rows: torch.Tensor) -> None:
        """Keeps these rows of the batch, in this order; a row may come several times."""
        with torch.inference_mode(False):
            self._hold(*(getattr(self, name).index_select(1, rows) for name in _NAMES))
        self.overwritten.clear()


_NAMES = ("keys", "values", "sink_keys")
_VIEWS = ("sink_slots", "key_slots", "value_slots")


def share_storage(layers: list[SinkWindowLayer]) -> None:
    """Makes a `SharedStorage` of those that are alike, initialised, and not yet part of one."""
    alike = defaultdict(list)
    for layer in layers:
        if layer.is_initialized and layer.storage is None:
            alike[layer.keys.shape, layer.values.shape, layer.dtype, layer.device].append(layer)
    for group in alike.values():
        partners = {layer.rotation.partner for layer in group if not layer.rotation.is_identity}
        for partner in partners or {group[0].rotation.partner}:
            together = [one for one in group if one.rotation.partner == partner or one.rotation.is_identity]
            SharedStorage([layer for layer in together if layer.storage is None])
