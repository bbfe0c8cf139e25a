"""The cache layers: tensors, a rotation, and no position of their own.

`SinkWindowLayer` is for eager decoding, `StaticSinkWindowLayer` for compiled decoding. Both keep the ring of `ring.py` and read
the `StreamState` of their cache. Their common base, `RingLayer`, handles calls with several tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .chunk_attention import ExactChunk
from .internals import CacheLayerMixin
from .ring import chunk_of, evicted_before, slots_of, tokens_kept, tokens_seen, visible_besides, window_of
from .rotary import ForwardRotations, Rotation
from .state import DeviceStreamState, StreamState, static
from .storage import NAMES, Overwritten, SharedStorage, take

# Models compute angles as float32 position * frequency, so logits move as positions rise: by some 0.2% at 100,000 and 4% at a
# million (results/positions.json). From this limit on float32 cannot tell neighbouring positions apart at all.
POSITION_LIMIT = 2**24


class RingLayer(CacheLayerMixin):
    """One layer's sinks and window: `capacity = n_sink + window` slots, allocated at the first update.

    Args:
        n_sink (`int`): how many of the first tokens to keep for ever.
        window (`int`): how many of the last tokens to keep, the current one included.
        rotation (`Rotation`): how the layer's keys rotate.
        state (`StreamState`): the state that all layers of the cache share.
        rotations (`ForwardRotations`): the rotations that all layers of the cache share.
        max_position (`int`): how many positions the model can tell apart.
        sliding_window (`int`, *optional*): the layer's native window, at which the model's masks end.
        is_sliding (`bool`): the ring replaces a natively sliding layer beside full attention, and has no sinks.

    Attributes:
        keys, values (`torch.Tensor`): `[batch_size, num_heads, capacity, head_dim]`. The sinks are in the first `n_sink` slots,
            their keys rotated forward by the number of evicted tokens.
        sink_keys (`torch.Tensor`): `[batch_size, num_heads, n_sink, head_dim]`, as the model made them. A rotation of these
            rounds once, while rotations in place would add up their errors.
    """

    keys: torch.Tensor
    values: torch.Tensor
    sink_keys: torch.Tensor
    storage: SharedStorage | None = None
    overwritten: Overwritten | None = None  # what the candidates of a first call overwrote, until a storage takes it

    def __init__(
        self,
        n_sink: int,
        window: int,
        rotation: Rotation,
        state: StreamState,
        rotations: ForwardRotations,
        max_position: int = POSITION_LIMIT,
        sliding_window: int | None = None,
        is_sliding: bool = False,
    ) -> None:
        # Not super().__init__(), which sets keys and values to None.
        self.n_sink, self.window, self.capacity = n_sink, window, n_sink + window
        self.rotation, self.state, self.rotations = rotation, state, rotations
        self.max_position, self.sliding_window, self.is_sliding = max_position, sliding_window, is_sliding
        self.forget_tensors()

    # --- tensors ---

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocates the slots; shapes, dtype and device are those of the first `key_states` and `value_states`."""
        batch_size, num_heads, _, head_dim = key_states.shape
        # Tensors made in inference mode could not be written to outside of it.
        with torch.inference_mode(False):
            tensors = {
                "keys": key_states.new_zeros(batch_size, num_heads, self.capacity, head_dim),
                "values": value_states.new_zeros(*value_states.shape[:2], self.capacity, value_states.shape[-1]),
                "sink_keys": key_states.new_zeros(batch_size, num_heads, self.n_sink, head_dim),
            }
        self.replace(tensors)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Returns the layer's tensors by name, `[batch_size, num_heads, slots, head_dim]` each; none before the first update."""
        return {name: getattr(self, name) for name in NAMES} if self.is_initialized else {}

    def replace(self, tensors: dict[str, torch.Tensor]) -> None:
        """Replaces the layer's tensors by `tensors`."""
        for name, tensor in tensors.items():
            setattr(self, name, tensor)
        self.dtype, self.device, self.is_initialized = self.keys.dtype, self.keys.device, True

    def forget_tensors(self) -> None:
        """Drops all tensors. The next ones may have other shapes, another dtype and another device."""
        self.keys = self.values = self.sink_keys = torch.empty(0, device="cpu")
        self.is_initialized, self.overwritten = False, None

    def __getstate__(self) -> dict[str, Any]:
        # `LayerStack` copies the tensors of its layers by itself.
        return {name: value for name, value in vars(self).items() if name not in (*NAMES, "storage")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        overwritten = state.pop("overwritten", None)
        vars(self).update(state)
        self.forget_tensors()
        self.overwritten = overwritten

    def reset(self) -> None:
        """Forgets all tokens."""
        self.forget_tensors()

    # --- calls with several tokens ---

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores new tokens, evicts what no longer fits, and returns what the new tokens attend to.

        Args:
            key_states, value_states (`torch.Tensor`): `[batch_size, num_heads, new_tokens, head_dim]`, keys rotated by the
                model at their absolute positions.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: keys and values `[batch_size, num_heads, kv_length, head_dim]` with the
            `kv_length` that `get_mask_sizes` promised. For several tokens they are in chronological order, and a row with
            fewer tokens has them at the end. For one token they are a view of the slots, valid until the next update.
        """
        self.check(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        attended = key_states, value_states
        if self.attention_merges_sinks(key_states.shape[2]):
            attended = self._window_beside_sinks(key_states, value_states)
        elif self.needs_sinks_per_query(key_states.shape[2]):
            attended = self._with_sinks_per_query(key_states, value_states)
        elif self.state.fed:
            self.rotate_sinks()
            shown = self._once_per_call(self._shown_slots)
            attended = (
                torch.cat([take(self.keys, shown), key_states], dim=2),
                torch.cat([take(self.values, shown), value_states], dim=2),
            )
        if self.state.recording and self.state.dense_tokens and self.needs_sinks_per_query(key_states.shape[2]):
            self._store_prompt_and_candidates(key_states, value_states)
            return attended
        for row, count, skip in self._rows():
            self._store(row, max(0, count), key_states[row, :, skip:], value_states[row, :, skip:])
        return attended

    @property
    def _ring(self) -> tuple[int, int]:
        return self.n_sink, self.window

    def _rows(self) -> list[tuple[slice, int, int]]:
        """One entry for all rows if they are alike, else one each: rows, their count, and how many pads the call brings them."""
        rows = self.state.per_row(self.state.counts, self.state.new_pads or (0,))
        return [
            (slice(row, row + 1) if len(rows) > 1 else slice(None), count, skip + max(0, -count))
            for row, (count, skip) in enumerate(rows)
        ]

    def _once_per_call(self, compute: Callable[..., Any], *numbers: int) -> Any:
        """Returns indices that are the same in all layers like this one. The first such layer computes them for all."""
        key = compute.__name__, self._ring, self.device, self.state.counts, numbers
        if key not in self.state.call_indices:
            self.state.call_indices[key] = compute(*numbers)
        return self.state.call_indices[key]

    def _shown_slots(self) -> torch.Tensor:
        """The slots that several new tokens see, `[1 or batch, length]`, in the order of the text; padded on the left."""
        cached = [
            slots_of(tokens_seen(max(0, count), *self._ring, self.device), *self._ring) for _, count, _ in self._rows()
        ]
        longest = max(map(len, cached))
        return torch.stack([torch.nn.functional.pad(slots, (longest - len(slots), 0)) for slots in cached])

    def _places(self, count: int, new_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """For the new tokens of a row that stay: their indices in the call, and their slots."""
        kept = tokens_kept(count, new_tokens, *self._ring, self.device)
        return kept - count, slots_of(kept, *self._ring)

    def _store(self, row: slice, count: int, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        kept, slots = self._once_per_call(self._places, count, key_states.shape[2])
        self.keys[row].index_copy_(2, slots, key_states.index_select(2, kept))
        self.values[row].index_copy_(2, slots, value_states.index_select(2, kept))
        if count < self.n_sink:
            stop = min(self.n_sink, count + key_states.shape[2])
            self.sink_keys[row, :, count:stop] = key_states[:, :, : stop - count]

    def _store_prompt_and_candidates(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Stores the tokens of a first call, and keeps what its candidates overwrite; see `SharedStorage.record`."""
        prompt, every = self.state.dense_tokens, slice(None)
        self._store(every, 0, key_states[:, :, :prompt], value_states[:, :, :prompt])
        if key_states.shape[2] - prompt <= self.window:
            slots = slots_of(torch.arange(prompt, key_states.shape[2], device=self.device), *self._ring)
            self.overwritten = (prompt, slots, self.keys[:, :, slots], self.values[:, :, slots])
        self._store(every, prompt, key_states[:, :, prompt:], value_states[:, :, prompt:])

    def rotate_sinks(self) -> None:
        """Rotates the sinks forward to where the next query expects them."""
        if self.n_sink and not self.rotation.is_identity:
            evicted = tuple(evicted_before(count, self.capacity) for count in self.state.counts)
            slots = self.keys[None, :, :, : self.n_sink]
            self.rotations.of(self.rotation, self.device).all_layers(self.sink_keys[None], evicted, out=slots)

    # --- exact chunks ---

    def needs_sinks_per_query(self, new_tokens: int) -> bool:
        """Whether tokens are evicted between the queries of a call, so that each query has its own distance to the sinks."""
        if not self.state.chunks_are_exact or new_tokens == 1:
            return False
        return max(self.state.counts) + new_tokens > max(self.capacity, self.state.dense_tokens)

    def chunk(self, queries: int) -> tuple[range, range, range]:
        """What a call that `needs_sinks_per_query` attends to; see `ring.chunk_of`."""
        return chunk_of(max(self.state.counts), queries, self.state.dense_tokens, *self._ring)

    def _with_sinks_per_query(
        self, key_states: torch.Tensor, value_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values in the order of `chunk`: the sinks for each query that needs a copy, cached tokens, new tokens.

        `masks.chunk_mask` shows each query its own copy.
        """
        shifts, cached, _ = self.chunk(key_states.shape[2])
        slots = slots_of(torch.arange(cached.start, cached.stop, device=self.device), *self._ring)
        sink_keys, sink_values = self._sinks_with(key_states, value_states)
        if cached and cached.start == 0:
            self.rotate_sinks()  # nothing was evicted, so this puts the sinks back as they came
        copies = self.rotations.of(self.rotation, self.device).one_layer(sink_keys, shifts)
        return (
            torch.cat([copies, self.keys.index_select(2, slots), key_states], dim=2),
            torch.cat(
                [sink_values.repeat(1, 1, len(shifts), 1), self.values.index_select(2, slots), value_states], dim=2
            ),
        )

    def attention_merges_sinks(self, new_tokens: int) -> bool:
        """Whether attention itself merges the sinks of such a call, so that queries need no copies; see `chunk_attention`."""
        state = self.state
        return state.unmerged is not None and not state.dense_tokens and self.needs_sinks_per_query(new_tokens)

    def _window_beside_sinks(
        self, key_states: torch.Tensor, value_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of all windows in the order of the text; they carry the sinks."""
        assert self.state.unmerged is not None
        count = max(self.state.counts)
        cached, new = window_of(count, key_states.shape[2], *self._ring)
        slots = slots_of(torch.arange(cached.start, cached.stop, device=self.device), *self._ring)
        keys, values = (
            torch.cat([held.index_select(2, slots), states[:, :, new.start - count :]], dim=2)
            for held, states in ((self.keys, key_states), (self.values, value_states))
        )
        sinks = self._sinks_with(key_states, value_states)
        rotation = self.rotations.of(self.rotation, self.device)
        return ExactChunk(*sinks, rotation, count, self.window, self.state.unmerged).carried_by(keys, values)

    def _sinks_with(self, key_states: torch.Tensor, value_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Unrotated keys, and values, of all sinks. Some of them may be among the new tokens."""
        known = min(max(self.state.counts), self.n_sink)
        return (
            torch.cat([self.sink_keys[:, :, :known], key_states[:, :, : self.n_sink - known]], dim=2),
            torch.cat([self.values[:, :, :known], value_states[:, :, : self.n_sink - known]], dim=2),
        )

    # --- checks ---

    def check(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Refuses tensors that do not fit the layer, before anything is changed."""
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
        """Refuses tensors that need gradients, because their graph would grow with the stream."""
        if key_states.requires_grad or value_states.requires_grad:
            raise NotImplementedError(
                "SinkWindowCache is for inference only: it writes in place, and the graph of an endless stream would be "
                "endless. Call the model under torch.no_grad() or torch.inference_mode()."
            )

    def refuse_unless_equal(self, names: tuple[str, ...], given: tuple[Any, ...], expected: tuple[Any, ...]) -> None:
        """Refuses keys and values if a property in `given` differs from that in `expected`; `names` are for messages."""
        for name, new, held in zip(names, given, expected, strict=True):
            if new != held:
                raise ValueError(
                    f"the {name} of the keys is {new}, but this cache holds {self.state.fed} tokens with "
                    f"{name} {held}. Call reset() before using it for something else."
                )

    def check_positions(self, new_tokens: int) -> None:
        """Refuses to number more tokens than the model can."""
        furthest = max(self.state.next_positions())
        if furthest + new_tokens > self.max_position:
            raise ValueError(
                f"{furthest:,} tokens seen and {new_tokens:,} new are more than the {self.max_position:,} positions that "
                "this model can tell apart. Logits move long before. Generate with custom_generate=sink_cache.endless, or call "
                "rebase() from time to time: both keep positions low. Or call reset() and start from the recent text."
            )

    # --- what transformers asks a layer ---

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Returns `(kv_length, kv_offset)`: how many keys `update` will return, and the index of the first key.

        The index counts as if the keys were contiguous up to the last new token, so that causal masks are right.
        """
        self.check_positions(query_length)  # also here, because a model with a table of positions fails before `update`
        if self.attention_merges_sinks(query_length):
            return sum(map(len, window_of(max(self.state.counts), query_length, *self._ring))), 0
        if self.needs_sinks_per_query(query_length):
            shifts, cached, _ = self.chunk(query_length)
            return len(shifts) * self.n_sink + len(cached) + query_length, 0
        visible = visible_besides(max(self.state.counts), self.capacity)
        beyond = self.sliding_window is not None and visible + query_length > self.sliding_window
        if beyond and self.state.fed and query_length > 1:
            raise ValueError(
                f"a call with {query_length} tokens on a cache that shows {visible} would lose the sinks, because the "
                f"model's own masks end after sliding_window = {self.sliding_window} tokens. Feed these tokens with "
                "sink_cache.stream, or one at a time."
            )
        return visible + query_length, self.state.fed - visible

    def get_seq_length(self) -> int:
        """Tokens seen, ever: `generate()` slices the prompt with it, and models number positions from it."""
        return self.state.fed

    def get_max_length(self) -> int:
        """-1: a stream has no maximum length."""
        return -1

    @property
    def record_past(self) -> bool:
        """Whether the stream records. transformers turns this off, layer by layer, when it has done with it."""
        return self.state.recording

    @record_past.setter
    def record_past(self, recording: bool) -> None:
        self.state.recording = recording


class SinkWindowLayer(RingLayer):
    """A `RingLayer` for eager decoding: shapes grow until the ring is full, and steps write through shared views."""

    is_compileable = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.index = 0  # in its storage
        super().__init__(*args, **kwargs)

    def forget_tensors(self) -> None:
        """As in the base class."""
        super().forget_tensors()
        self.storage = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As in the base class."""
        storage = self.storage
        if storage is not None and (
            (self.index and storage.step == self.state.fed and storage.takes(key_states, value_states))
            or storage.begin_step(key_states, value_states)
        ):
            return storage.put(self.index, key_states, value_states)
        return super().update(key_states, value_states)

    def rotate_sinks(self) -> None:
        """As in the base class."""
        super().rotate_sinks()
        if self.storage is not None:
            self.storage.sinks_moved_by = None

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """Whether `crop` can undo a recorded call. It cannot with padded rows."""
        return not self.state.padded


# A custom operator, because the compiler would fuse these float64 cosines into the kernels of every layer. They would then take
# 9 us for each layer of an H100's step instead of 2.
@torch.library.custom_op("sink_cache::cos_sin", mutates_args=("out",))
def _cos_sin(angle: torch.Tensor, out: torch.Tensor) -> None:
    torch.cos(angle, out=out[0])
    torch.sin(angle, out=out[1])


class SharedStep:
    """What layers of one rotation on one device compute once a step instead of once a layer.

    Attributes:
        frequency (`torch.Tensor`): `[head_dim]`, float64.
        partner (`torch.Tensor`): `[head_dim]`, int64.
        cos_sin (`torch.Tensor`): `[2, rows, head_dim]`, float32, of the angles by which each row's sinks move at this step.
        sinks (`torch.Tensor`): `[rows, n_sink]`, int64, the slots of the sinks.
        rows (`torch.Tensor`): `[rows, 1]`, int64.
        heads (`torch.Tensor`): `[1, num_heads]`, int64.
        owner (`StaticSinkWindowLayer`): the first of these layers in a step, which computes `cos_sin` for all.
    """

    def __init__(self, layer: StaticSinkWindowLayer) -> None:
        device, rotation, (rows, heads) = layer.device, layer.rotation, layer.keys.shape[:2]
        with torch.inference_mode(False):
            self.frequency = static(torch.tensor(rotation.frequency, dtype=torch.float64, device=device))
            self.partner = static(torch.tensor(rotation.partner, device=device))
            self.cos_sin = static(torch.empty(2, rows, len(rotation.partner), dtype=torch.float32, device=device))
            self.sinks = static(torch.arange(layer.n_sink, device=device).repeat(rows, 1))
            self.rows = static(torch.arange(rows, device=device)[:, None])
            self.heads = static(torch.arange(heads, device=device)[None])
        self.owner = layer


class StaticSinkWindowLayer(RingLayer):
    """A `RingLayer` for compiled decoding: all shapes are constant, and `step` is tensor operations only.

    `step` returns all slots. A mask that knows the count of each row hides the empty slots.

    Attributes:
        counts (`torch.Tensor`): `[batch_size]`, int64, the counts of the rows on the layer's device.
        sinks_complete (`bool`): all rows have all their sinks, so that steps need not store any.
    """

    is_compileable = True
    is_croppable = False
    state: DeviceStreamState
    counts: torch.Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.sinks_complete = False
        super().__init__(*args, **kwargs)

    def replace(self, tensors: dict[str, torch.Tensor]) -> None:
        """As in the base class. Keeps the memory if shapes and dtypes allow it, because a captured graph knows addresses."""
        held = self.tensors()
        if held and all((t.shape, t.dtype) == (held[name].shape, held[name].dtype) for name, t in tensors.items()):
            for name, tensor in tensors.items():
                held[name].copy_(tensor)
            return
        super().replace({name: static(tensor) for name, tensor in tensors.items()})
        rows = len(self.keys)
        self.counts = self.state.counts_on(self.device, rows)
        key = self.rotation, self.device, self.n_sink, rows, self.keys.shape[1]
        self.shared: SharedStep = self.state.shared_steps.setdefault(key, None) or SharedStep(self)
        self.state.shared_steps[key] = self.shared
        self.computes_angles = self.shared.owner is self

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As in the base class; for one token, all `capacity` keys and values."""
        if key_states.shape[2] == 1 and self.is_initialized:
            needs_grad = key_states.requires_grad or value_states.requires_grad
            if needs_grad or _kind_of(self.keys, self.values) != _kind_of(key_states, value_states):
                self.check(key_states, value_states)
                self.lazy_initialization(key_states, value_states)  # of another kind than before a reset
            return self.step(key_states, value_states)
        attended = super().update(key_states, value_states)  # or a refusal, which changes nothing
        self.sinks_complete = self.state.least_after(key_states.shape[2]) >= self.n_sink
        return attended

    def step(self, key_states: torch.Tensor, value_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores one token of each row, `[batch_size, num_heads, 1, head_dim]`, and returns all slots."""
        # Sizes come from shapes, which are constants of a graph. Integers that differ between caches would be its inputs.
        n_sink, capacity = self.sink_keys.shape[2], self.keys.shape[2]
        shared, counts = self.shared, self.counts
        # Pads have negative counts. They are written to slot 0, which the first real token overwrites.
        slots = slots_of(counts.clamp(min=0), n_sink, capacity - n_sink)[:, None]
        self._write(self.values, slots, value_states)
        if n_sink:
            if not self.sinks_complete:
                is_now = (shared.sinks == counts[:, None])[:, None, :, None]
                self.sink_keys.copy_(torch.where(is_now, key_states, self.sink_keys))
            if self.computes_angles:
                shift = (counts + (1 - capacity)).clamp(min=0)
                _cos_sin(shift[:, None] * shared.frequency, shared.cos_sin)  # float64: counts are up to 2**24
            cos, sin = shared.cos_sin[0][:, None, None], shared.cos_sin[1][:, None, None]
            moved = self.sink_keys * cos + self.sink_keys[..., shared.partner] * sin
            # Sinks and token share a write, because each write is a kernel. If the token is a sink, both write the same.
            slots = torch.cat([shared.sinks, slots], dim=1)
            key_states = torch.cat([moved.to(key_states.dtype), key_states], dim=2)
        self._write(self.keys, slots, key_states)
        return self.keys, self.values

    def _write(self, into: torch.Tensor, slots: torch.Tensor, states: torch.Tensor) -> None:
        """Writes `states` `[rows, heads, tokens, head_dim]` to slots `[rows, tokens]`."""
        if len(slots) == 1:
            into.index_copy_(2, slots[0], states)
        else:
            # There is an index for each dimension, because the compiler would copy the whole ring to write through a view.
            into.index_put_((self.shared.rows[..., None], self.shared.heads[..., None], slots[:, None]), states)

    def check(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """As in the base class. After a reset, tensors of another kind may come."""
        if self.is_initialized and self.state.fed == 0:
            self.is_initialized = _kind_of(key_states, value_states) == _kind_of(self.keys, self.values)
        super().check(key_states, value_states)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name not in ("counts", "shared")}

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As in the base class; for one token `(capacity, 0)`, because the mask hides the empty slots."""
        if query_length > 1 or not self.is_initialized:
            return super().get_mask_sizes(query_length)
        return self.keys.shape[2], 0

    def reset(self) -> None:
        """Forgets all tokens. The memory stays where it is, because a captured graph knows its address."""
        with torch.inference_mode():  # inference mode may write to any tensor
            for tensor in self.tensors().values():
                tensor.zero_()  # a mask hides empty slots only if their values are finite
        self.sinks_complete = False


def _kind_of(keys: torch.Tensor, values: torch.Tensor) -> tuple[Any, ...]:
    """The properties of keys and values that need new slots if they change after a reset."""
    return keys.shape[:2], keys.dtype, values.shape[:2], values.dtype, keys.device
