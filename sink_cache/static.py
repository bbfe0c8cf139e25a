"""The same ring with shapes that never change and its position on the device: one captured graph decodes for ever.

A compiled step may read nothing that changes from the host, or it is compiled anew. So the position of the next token is a
tensor, from which each step computes the slot that it overwrites and the angles of the sinks; and all slots are
returned from the first token on, with a mask for those that are still empty.
"""

from __future__ import annotations

from typing import Any

import torch

from .ring import SinkWindowLayer
from .rotary import ForwardRotation, Rotation


class DevicePositions:
    """The position of the next token, once on each device that layers of a cache are on; and what rotations need there."""

    def __init__(self) -> None:
        self.counters: dict[torch.device, torch.Tensor] = {}
        self._tables: dict[tuple[Rotation, torch.device], tuple[torch.Tensor, torch.Tensor]] = {}

    def counter(self, device: torch.device) -> torch.Tensor:
        """`[1]`, int64."""
        if device not in self.counters:
            self.counters[device] = _static(torch.zeros(1, dtype=torch.int64, device=device))
        return self.counters[device]

    def tables(self, rotation: Rotation, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Frequency, float64, and partner of each of `head_dim` dimensions."""
        key = rotation, device
        if key not in self._tables:
            frequency = torch.tensor(rotation.frequency, dtype=torch.float64, device=device)
            self._tables[key] = _static(frequency), _static(torch.tensor(rotation.partner, device=device))
        return self._tables[key]


class StaticSinkWindowLayer(SinkWindowLayer):
    """A `SinkWindowLayer` for compiled decoding: `update` of one token is tensor operations only.

    Args:
        positions (`DevicePositions`): shared by all layers of the cache.
        is_last (`bool`): the layer that counts a token as seen, when it has been through all of them.
        is_sliding (`bool`): the layer stands for one that is natively sliding, and has no sinks.

    Attributes:
        buffer (`torch.Tensor`): `[batch_size, num_heads, n_sink + capacity, head_dim]`, the pristine sinks and then the `keys`,
            so that a token that is a sink is written like any other.
    """

    is_compileable = True
    is_croppable = False

    def __init__(self, *args: Any, positions: DevicePositions, is_last: bool, is_sliding: bool, **kwargs: Any) -> None:
        self.positions, self.is_last = positions, is_last
        self.is_initialized = False
        super().__init__(*args, **kwargs)
        self.is_sliding = is_sliding
        self._at_most = 0  # a bound of the position that needs no look at the device

    # What the base class keeps in attributes is on the device here.
    @property
    def position(self) -> int:
        """Of the next token; waits for the device."""
        return int(self.counter) if self.is_initialized else 0

    @position.setter
    def position(self, position: int) -> None:
        if self.is_initialized:
            self.counter.fill_(position)
        self._at_most = position

    @property
    def keys(self) -> torch.Tensor:  # type: ignore[override]
        """`[batch_size, num_heads, capacity, head_dim]`."""
        return self.buffer[:, :, self.n_sink :]

    @property
    def sink_keys(self) -> torch.Tensor:  # type: ignore[override]
        """`[batch_size, num_heads, n_sink, head_dim]`."""
        return self.buffer[:, :, : self.n_sink]

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocates the slots; shapes, dtype and device are those of the first `key_states` and `value_states`."""
        (batch_size, num_heads, _, head_dim), width = key_states.shape, value_states.shape[-1]
        with torch.inference_mode(False):
            keys = key_states.new_zeros(batch_size, num_heads, self.n_sink + self.capacity, head_dim)
            self._hold(keys, value_states.new_zeros(batch_size, num_heads, self.capacity, width))

    def _hold(self, buffer: torch.Tensor, values: torch.Tensor) -> None:
        self.buffer, self.values = _static(buffer), _static(values)
        self.dtype, self.device = buffer.dtype, buffer.device
        self.counter = self.positions.counter(self.device)
        self.frequency, self.partner = self.positions.tables(self.rotation, self.device)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As in the base class; for one token, all `capacity` keys and values."""
        if key_states.shape[2] > 1 or not self.is_initialized or key_states.requires_grad:
            self._check(key_states, value_states)
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            self._at_most += key_states.shape[2]
            return self._update_several(key_states, value_states)
        slot = self.slots_of(self.counter)
        self.values.index_copy_(2, slot, value_states)
        self.buffer.index_copy_(2, torch.where(slot < self.n_sink, slot, self.n_sink + slot), key_states)
        if self.n_sink:
            shift = (self.counter + (1 - self.capacity)).clamp(min=0)
            angle = shift * self.frequency  # float64: positions are up to 2**24
            pristine = self.buffer[:, :, : self.n_sink].float()
            moved = pristine * angle.cos().float() + pristine[..., self.partner] * angle.sin().float()
            self.buffer[:, :, self.n_sink : 2 * self.n_sink] = moved.to(self.buffer.dtype)
        if self.is_last:
            self._advance(1)
        return self.keys, self.values

    def _advance(self, new_tokens: int) -> None:
        if self.is_last:
            for counter in self.positions.counters.values():
                counter.add_(new_tokens)

    def _present_sinks(self) -> None:
        if self.n_sink:
            turn = ForwardRotation([self.rotation], self.device)
            turn.all_layers(self.sink_keys[None], self.evicted_before_query(), out=self.keys[None, :, :, : self.n_sink])

    def _sink_copies(self, sink_keys: torch.Tensor, shifts: range) -> torch.Tensor:
        return ForwardRotation([self.rotation], self.device).one_layer(sink_keys, 0, shifts)

    def _check(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        if self.is_initialized and self.position == 0:
            self.is_initialized = (self.dtype, self.device) == (key_states.dtype, key_states.device)
            self.is_initialized &= self.buffer.shape[:2] == key_states.shape[:2]
        super()._check(key_states, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, Any]:
        """As in the base class; for one token `(capacity, 0)`, so that the causal mask hides the empty slots."""
        if query_length > 1 or not self.is_initialized:
            return super().get_mask_sizes(query_length)
        if not torch.compiler.is_compiling():
            self._at_most += 1
            if self._at_most > self.max_position:
                self._at_most = self.position + 1
                self.check_positions(1)
        if self.is_sliding or self.sliding_window is not None:  # their masks also end `sliding_window` tokens ago
            return self.capacity, (self.counter[0] + (1 - self.capacity)).clamp(min=0)
        return self.capacity, 0

    def get_query_offset(self) -> int | torch.Tensor:
        """The position of the next token, as a tensor that masks can be built from without waiting."""
        return self.counter[0] if self.is_initialized else 0

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that the layer holds, by name, `[batch_size, num_heads, slots, head_dim]` each."""
        return {"buffer": self.buffer, "values": self.values} if self.is_initialized else {}

    def replace(self, tensors: dict[str, torch.Tensor]) -> None:
        """Holds these instead, in the same memory if their shape allows."""
        if (
            self.is_initialized
            and self.buffer.shape == tensors["buffer"].shape
            and self.dtype == tensors["buffer"].dtype
        ):
            self.buffer.copy_(tensors["buffer"])
            self.values.copy_(tensors["values"])
        else:
            self._hold(tensors["buffer"], tensors["values"])

    def rebase(self, by: int) -> None:
        """Moves the window back by `by` positions, a multiple of `window`."""
        turn = ForwardRotation([self.rotation], self.device)
        turn.one_layer_in_place(self.keys[:, :, self.n_sink :], 0, -by)
        self.rebased += by
        self._at_most = max(0, self._at_most - by)
        if self.is_last:
            for counter in self.positions.counters.values():
                counter.sub_(by)

    def reset(self) -> None:
        """Forgets all tokens; the memory stays where it is, as a captured graph knows its address."""
        self.storage, self.index = None, 0
        self.position = self.rebased = 0
        self.pads = ()


def _static(tensor: torch.Tensor) -> torch.Tensor:
    """Promises that the tensor stays at its address, so that a captured graph neither copies it nor is made anew."""
    if not torch.compiler.is_compiling():
        torch._dynamo.mark_static_address(tensor)
    return tensor
