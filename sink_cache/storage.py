"""One piece of memory for layers that are alike, so that a step can work on all of them at once.

The launches of small kernels limit decoding on a GPU. So three kernels rotate the sinks of all layers, and the views of all slots
that take the token are made at once.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch

from .ring import evicted_before, slot_of, slots_of
from .rotary import ForwardRotation

if TYPE_CHECKING:
    from .layers import SinkWindowLayer

NAMES = ("keys", "values", "sink_keys")
Overwritten = tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]  # fed before, slots, keys, values


class SharedStorage:
    """The tensors of layers that are alike, `[layers, batch_size, num_heads, slots, head_dim]` each.

    Args:
        layers (`list[SinkWindowLayer]`): initialised layers of one shape, dtype, device, ring and pairing of dimensions. Their
            `keys`, `values` and `sink_keys` become views of the tensors here.

    Attributes:
        step (`int`): the value of `state.fed` for which `begin_step` has prepared the slots, or -1.
        overwritten (`list[Overwritten]`): while the stream records, what each call overwrote.
    """

    def __init__(self, layers: list[SinkWindowLayer]) -> None:
        self.layers, self.state = layers, layers[0].state
        self.n_sink, self.window, self.capacity = layers[0].n_sink, layers[0].window, layers[0].capacity
        self.forward_rotation = ForwardRotation([layer.rotation for layer in layers], layers[0].device)
        self.rotates = self.n_sink > 0 and not all(layer.rotation.is_identity for layer in layers)
        self.overwritten: list[Overwritten] = []
        if layers[0].overwritten is not None:
            fed, slots, *_ = layers[0].overwritten
            keys, values = zip(*(layer.overwritten[2:] for layer in layers if layer.overwritten), strict=True)
            self.overwritten.append((fed, slots, torch.stack(keys), torch.stack(values)))
            for layer in layers:
                layer.overwritten = None
        with torch.inference_mode(False):
            self.hold(*(torch.stack([layer.tensors()[name] for layer in layers]) for name in NAMES))

    def hold(self, keys: torch.Tensor, values: torch.Tensor, sink_keys: torch.Tensor) -> None:
        """Holds these tensors from now on, and gives each layer views of them."""
        self.keys, self.values, self.sink_keys = keys, values, sink_keys
        for index, layer in enumerate(self.layers):
            layer.replace({name: getattr(self, name)[index] for name in NAMES})
            layer.storage, layer.index = self, index
        self.sink_slots = keys[..., : self.n_sink, :]
        self.token_shapes = keys[0, :, :, :1].shape, values[0, :, :, :1].shape
        # Rows of different lengths write through views in which each slot of each head is a row.
        self.flat = [[layer.flatten(0, 2) for layer in held] for held in (keys, values)]
        self.first_slots = [
            torch.arange(0, held[0, :, :, :, 0].numel(), self.capacity, device=held.device).view(held.shape[1], -1)
            for held in (keys, values)
        ]
        self.step = -1
        self.sinks_moved_by: tuple[int, ...] | None = None

    def begin_step(self, key_states: torch.Tensor, value_states: torch.Tensor) -> bool:
        """Prepares all layers for a step, from the new keys and values of the first layer.

        Returns:
            `bool`: False, with nothing changed, if these are not one token for each row that fits what is stored.
        """
        counts = self.state.counts
        fits = (
            self.takes(key_states, value_states)
            and value_states.shape == self.token_shapes[1]
            and (key_states.dtype, value_states.dtype) == (self.keys.dtype, self.values.dtype)
            and key_states.device == self.keys.device
            and min(counts) >= 0
        )
        if not fits:
            return False
        self.layers[0].check_positions(1)
        self.rotate_sinks(tuple(evicted_before(count, self.capacity) for count in counts))
        if self.state.recording:
            self.record(1)
        self.visible: torch.Tensor | None = None
        self.rows_differ = len(counts) > 1
        if self.rows_differ:
            self._place_rows(counts)
        else:
            (count,) = counts
            slot = slot_of(count, self.n_sink, self.window)
            self.key_slots = self.keys.narrow(3, slot, 1).unbind()
            self.value_slots = self.values.narrow(3, slot, 1).unbind()
            self.sink = count if count < self.n_sink else None
            self.length = min(count + 1, self.capacity)
        self.step = self.state.fed
        return True

    def takes(self, key_states: torch.Tensor, value_states: torch.Tensor) -> bool:
        """Whether a layer may store these tensors. PyTorch would broadcast a wrong shape, and gradients keep an endless graph."""
        return key_states.shape == self.token_shapes[0] and not (key_states.requires_grad or value_states.requires_grad)

    def _place_rows(self, counts: tuple[int, ...]) -> None:
        """Finds the slot for each row's token, and the visible slots if any row is not full."""
        count = torch.tensor(counts, device="cpu")
        device, slots = self.keys.device, slots_of(count, self.n_sink, self.window)
        self.slots = [(first + slots.to(device)[:, None]).flatten() for first in self.first_slots]
        self.new_sinks = [(row, count) for row, count in enumerate(counts) if count < self.n_sink]
        seen = torch.clamp(count + 1, max=self.capacity)
        if int(seen.min()) < self.capacity:
            length = int(seen.max())
            first = (length - seen)[:, None]
            self.visible = torch.clamp(torch.arange(length, device="cpu") - first, min=0).to(device)

    def put(
        self, index: int, key_states: torch.Tensor, value_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores one token of each row in the layer `index`, and returns what it attends to."""
        layer = self.layers[index]
        if self.rows_differ:
            for flat, slots, states in zip(self.flat, self.slots, (key_states, value_states), strict=True):
                flat[index].index_copy_(0, slots, states.flatten(0, 2))
            for row, count in self.new_sinks:
                layer.sink_keys[row, :, count] = key_states[row, :, 0]
            if self.visible is None:
                return layer.keys, layer.values
            return take(layer.keys, self.visible), take(layer.values, self.visible)
        self.key_slots[index].copy_(key_states)
        self.value_slots[index].copy_(value_states)
        if self.sink is not None:
            layer.sink_keys[:, :, self.sink : self.sink + 1] = key_states
        if self.length == self.capacity:
            return layer.keys, layer.values
        return layer.keys.narrow(2, 0, self.length), layer.values.narrow(2, 0, self.length)

    def rotate_sinks(self, evicted: tuple[int, ...]) -> None:
        """Rotates the sinks of all layers forward by each row's `evicted`, if positive. Does nothing if they are there."""
        shifts = tuple(max(0, shift) for shift in evicted)
        if self.rotates and shifts != self.sinks_moved_by:
            self.forward_rotation.all_layers(self.sink_keys, evicted, out=self.sink_slots)
        self.sinks_moved_by = shifts

    def forget_steps(self) -> None:
        """Drops what is known about steps, after keys or counts have changed without a step."""
        self.overwritten.clear()
        self.step, self.sinks_moved_by = -1, None

    def record(self, new_tokens: int) -> None:
        """Keeps what the next `new_tokens` tokens are about to overwrite, and what the last `window` tokens overwrote.

        Keeps nothing if there are more than `window` tokens, because some would overwrite each other.
        """
        fed, (count,) = self.state.fed, self.state.counts
        if not self.has_recorded_until(fed) or new_tokens > self.window:
            self.overwritten.clear()
        if new_tokens > self.window:
            return
        while len(self.overwritten) > 1 and fed - self.overwritten[1][0] >= self.window:
            del self.overwritten[0]
        tokens = torch.arange(count, count + new_tokens, device=self.keys.device)
        slots = slots_of(tokens, self.n_sink, self.window)
        self.overwritten.append((fed, slots, self.keys[..., slots, :], self.values[..., slots, :]))

    def has_recorded_until(self, fed: int) -> bool:
        """Whether the last recorded token came just before `fed`; otherwise tokens came while nobody recorded."""
        return bool(self.overwritten) and self.overwritten[-1][0] + len(self.overwritten[-1][1]) == fed

    def bring_back(self, fed: int) -> None:
        """Puts back what tokens from `fed` on overwrote, and forgets the rest of the record."""
        for start, slots, keys, values in reversed(self.overwritten):
            kept = max(0, fed - start)
            self.keys[..., slots[kept:], :] = keys[..., kept:, :]
            self.values[..., slots[kept:], :] = values[..., kept:, :]
        self.forget_steps()

    def select(self, rows: torch.Tensor) -> None:
        """Keeps these rows of the batch, in this order; a row may come several times."""
        rows = rows.to(self.keys.device)
        with torch.inference_mode(False):
            self.hold(*(getattr(self, name).index_select(1, rows) for name in NAMES))
        self.overwritten.clear()


def take(tensor: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Takes slots `[1 or batch, length]` out of a tensor `[batch, heads, slots, head_dim]`."""
    if slots.shape[0] == 1:
        return tensor.index_select(2, slots[0])
    return tensor.gather(2, slots[:, None, :, None].expand(-1, tensor.shape[1], -1, tensor.shape[-1]))


def share_storage(layers: list[Any]) -> None:
    """Makes a `SharedStorage` for each group of layers that are alike, initialised, and not yet in one."""
    groups: dict[Any, list[Any]] = defaultdict(list)
    for layer in layers:
        if layer.is_initialized and layer.storage is None:
            groups[layer.keys.shape, layer.values.shape, layer.dtype, layer.device].append(layer)
    for group in groups.values():
        partners = {layer.rotation.partner for layer in group if not layer.rotation.is_identity}
        for partner in partners or {group[0].rotation.partner}:
            together = [layer for layer in group if layer.rotation.partner == partner or layer.rotation.is_identity]
            if free := [layer for layer in together if layer.storage is None]:
                SharedStorage(free)
