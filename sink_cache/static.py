"""The same ring with shapes that never change and its position on the device: one captured graph decodes for ever.

A compiled step may read nothing that changes from the host, or it is compiled anew. So the position of the next token is a
tensor, from which each step computes the slot that it overwrites and the angles of the sinks; and all slots are
returned from the first token on, with a mask for those that are still empty.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .ring import SinkWindowLayer
from .rotary import ForwardRotation, Rotation


@dataclass
class Turn:
    """What layers of one rotation on one device share, which is to be looked at once a step and not once a layer.

    Attributes:
        frequency (`torch.Tensor`): `[head_dim]`, float64.
        partner (`torch.Tensor`): `[head_dim]`, int64.
        cos_sin (`torch.Tensor`): `[2, head_dim]`, float32, of the angles by which sinks are moved at the current step.
        slots (`torch.Tensor`): `[n_sink]`, int64, where the sinks lie.
        owner: the layer that computes `cos_sin` for all, the first of them in a step.
    """

    frequency: torch.Tensor
    partner: torch.Tensor
    cos_sin: torch.Tensor
    slots: torch.Tensor
    owner: Any


class DevicePositions:
    """The position of the next token, once on each device that layers of a cache are on; and what rotations need there."""

    def __init__(self) -> None:
        self.counters: dict[torch.device, torch.Tensor] = {}
        self._turns: dict[tuple[Rotation, torch.device, int], Turn] = {}
        self.host: int | None = None  # known there only while a call with several tokens goes through the layers
        # Such a call has overwritten something in some layers and has not yet been through all of them.
        self.unfinished = False

    def counter(self, device: torch.device) -> torch.Tensor:
        """`[1]`, int64."""
        if device not in self.counters:
            self.counters[device] = _static(torch.zeros(1, dtype=torch.int64, device=device))
        return self.counters[device]

    def turn(self, rotation: Rotation, device: torch.device, layer: Any) -> Turn:
        """Shared by all layers that ask for the same."""
        key = rotation, device, layer.n_sink
        if key not in self._turns:
            frequency = torch.tensor(rotation.frequency, dtype=torch.float64, device=device)
            partner = torch.tensor(rotation.partner, device=device)
            cos_sin = torch.empty(2, len(partner), dtype=torch.float32, device=device)
            slots = torch.arange(layer.n_sink, device=device)
            self._turns[key] = Turn(_static(frequency), _static(partner), _static(cos_sin), _static(slots), layer)
        return self._turns[key]


# An operator of its own, because the compiler would fuse these float64 cosines into the kernels of every layer, and they would
# take 9 us for each layer of an H100's step instead of 2.
@torch.library.custom_op("sink_cache::cos_sin", mutates_args=("out",))
def _cos_sin(angle: torch.Tensor, out: torch.Tensor) -> None:
    torch.cos(angle, out=out[0])
    torch.sin(angle, out=out[1])


class StaticSinkWindowLayer(SinkWindowLayer):
    """A `SinkWindowLayer` for compiled decoding: `update` of one token is tensor operations only.

    Args:
        positions (`DevicePositions`): shared by all layers of the cache.
        is_last (`bool`): the layer that counts a token as seen, when it has been through all of them.
        is_sliding (`bool`): the layer stands for one that is natively sliding, and has no sinks.

    Attributes:
        sinks_complete (`bool`): all sinks have been seen in calls with several tokens, so that steps need not watch for them.
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
        if self.positions.host is not None:
            return self.positions.host
        return int(self.counter) if self.is_initialized else 0

    @position.setter
    def position(self, position: int) -> None:
        for counter in self.positions.counters.values():  # of devices that were left, too: they may be come back to
            counter.fill_(position)
        self._at_most, self.positions.host, self.positions.unfinished = position, None, False

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocates the slots; shapes, dtype and device are those of the first `key_states` and `value_states`."""
        super().lazy_initialization(key_states, value_states)
        self._settle()

    @torch.inference_mode(False)
    def _settle(self) -> None:
        for name, tensor in self.tensors().items():
            # The compiler takes the shapes of parameters for constants. (`torch._dynamo.mark_static` says the same of any
            # tensor, but is looked at again at every step, which takes the host 1 us for each.)
            setattr(self, name, _static(torch.nn.Parameter(tensor, requires_grad=False)))
        self.counter = self.positions.counter(self.device)
        self.turn = self.positions.turn(self.rotation, self.device, self)
        self.computes_angles = self.turn.owner is self

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        for tensor in self.tensors().values():  # copies of parameters have no attributes
            _static(tensor)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As in the base class; for one token, all `capacity` keys and values."""
        if key_states.shape[2] > 1 or not self.is_initialized or key_states.requires_grad or value_states.requires_grad:
            self._check(key_states, value_states)
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            self._at_most += key_states.shape[2]
            self.positions.unfinished = True
            self.positions.host = self.position  # or all layers would wait for the device, time and again
            self.sinks_complete = self.position + key_states.shape[2] >= self.n_sink
            attended = self._update_several(key_states, value_states)
            if self.is_last:
                self.positions.host, self.positions.unfinished = None, False
            return attended
        if _kind_of(key_states, value_states) != _kind_of(self.keys, self.values):
            self._check(key_states, value_states)
            self.lazy_initialization(key_states, value_states)
        turn, (n_sink, capacity) = self.turn, self.sizes
        slot = self.slots_of(self.counter)
        self.values.index_copy_(2, slot, value_states)
        if n_sink:
            if not self.sinks_complete:
                is_now = turn.slots[:, None] == self.counter
                self.sink_keys.copy_(torch.where(is_now, key_states, self.sink_keys))
            if self.computes_angles:
                shift = (self.counter + (1 - capacity)).clamp(min=0)
                _cos_sin(shift * turn.frequency, turn.cos_sin)  # float64: positions are up to 2**24
            moved = self.sink_keys * turn.cos_sin[0] + self.sink_keys[..., turn.partner] * turn.cos_sin[1]
            # In one write with the sinks, as each write is a kernel. While the token is a sink itself, both write the same.
            slot = torch.cat([turn.slots, slot])
            key_states = torch.cat([moved.to(key_states.dtype), key_states], dim=2)
        self.keys.index_copy_(2, slot, key_states)
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
            self.is_initialized = _kind_of(key_states, value_states) == _kind_of(self.keys, self.values)
            self.is_initialized &= key_states.device == self.device
        super()._check(key_states, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, Any]:
        """As in the base class; for one token `(capacity, 0)`, so that the causal mask hides the empty slots."""
        if query_length > 1 or not self.is_initialized:
            length, offset = super().get_mask_sizes(query_length)
            return length, offset - self.rebased  # as in get_query_offset
        if not torch.compiler.is_compiling():
            self._at_most += 1
            if self._at_most > self.max_position:
                self._at_most = self.position + 1
                self.check_positions(1)
        _, capacity = self.sizes
        if self.is_sliding or self.sliding_window is not None:  # their masks also end `sliding_window` tokens ago
            return capacity, (self.counter[0] + (1 - capacity)).clamp(min=0)
        return capacity, 0

    @property
    def sizes(self) -> tuple[int, int]:
        """As in the base class, and constants of a graph: integers that differ from cache to cache would be its inputs."""
        return self.sink_keys.shape[2], self.keys.shape[2]

    def get_query_offset(self) -> int | torch.Tensor:
        """The position of the next token, as a tensor that masks can be built from without waiting."""
        return self.counter[0] if self.is_initialized else 0

    def query_offset(self) -> int:
        """As in the base class; indices count from the last `rebase` on, as `get_query_offset` does."""
        return self.position

    def replace(self, tensors: dict[str, torch.Tensor]) -> None:
        """Holds these instead, in the same memory if their shape allows."""
        held = self.tensors()
        if held and all((t.shape, t.dtype) == (held[name].shape, held[name].dtype) for name, t in tensors.items()):
            for name, tensor in tensors.items():
                held[name].copy_(tensor)
        else:
            super().replace(tensors)
            self._settle()

    def lower_positions(self, by: int) -> None:
        """As in the base class."""
        self.rebased += by
        self._at_most = max(0, self._at_most - by)
        if self.is_last:
            for counter in self.positions.counters.values():
                counter.sub_(by)

    def reset(self) -> None:
        """Forgets all tokens; the memory stays where it is, as a captured graph knows its address."""
        if not self.is_initialized:
            super().reset()
        with torch.inference_mode():  # in which any tensor can be written to
            for tensor in self.tensors().values():
                tensor.zero_()  # empty slots are masked, but a mask does not hide what is not finite
        self.position = self.rebased = 0
        self.sinks_complete = False


def _kind_of(keys: torch.Tensor, values: torch.Tensor) -> tuple[Any, ...]:
    """What is free to change after a reset, and calls for other slots."""
    return keys.shape[:2], keys.dtype, values.shape[:2], values.dtype


def _static(tensor: torch.Tensor) -> torch.Tensor:
    """Promises that the tensor stays at its address, so that a captured graph neither copies it nor is made anew."""
    if not torch.compiler.is_compiling():
        torch._dynamo.mark_static_address(tensor)
    return tensor
