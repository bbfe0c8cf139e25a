"""Layers of models whose attention differs from keys that rotate, values that do not, and nothing else."""

from __future__ import annotations

from typing import Any

import torch

from .internals import LinearAttentionAndFullAttentionLayer, LinearAttentionLayer
from .ring import SinkWindowLayer
from .static import StaticSinkWindowLayer


class ChronologicalSinkWindowLayer(SinkWindowLayer):
    """For models that count the keys between a query and a key (ALiBi): keys are returned in the order of the text."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As in the base class, but for one token too they are in chronological order."""
        attended = super().update(key_states, value_states)
        if key_states.shape[2] > 1 or self.position - min(self.pads, default=0) <= self.capacity:
            return attended
        return self._in_order(self.keys), self._in_order(self.values)

    def _in_order(self, slots: torch.Tensor) -> torch.Tensor:
        """Sinks first, then the window from its oldest token on; of a row that is not full, what it has, at the end."""
        if self.pads:
            counts = (self.position - torch.tensor(self.pads, device="cpu"))[:, None]
            rank = (torch.arange(self.capacity, device="cpu") - (self.capacity - counts).clamp(min=0)).clamp(min=0)
            token = torch.where(rank < self.n_sink, rank, rank + (counts - self.capacity).clamp(min=0))
            order = self.slots_of(token).to(slots.device)[:, None, :, None]
            return slots.gather(2, order.expand(-1, slots.shape[1], -1, slots.shape[-1]))
        oldest = self.n_sink + (self.position - self.n_sink) % self.window
        return torch.cat([slots[:, :, : self.n_sink], slots[:, :, oldest:], slots[:, :, self.n_sink : oldest]], dim=2)

    def evicts_within(self, new_tokens: int) -> bool:
        """False, or an error: copies of the sinks would be counted as keys."""
        if super().evicts_within(new_tokens):
            raise NotImplementedError(
                "stream() with chunk_size > 1 and assisted decoding are not possible once tokens are evicted in a model that "
                "counts its keys (ALiBi), as each query would need a number of keys of its own. Use chunk_size=1."
            )
        return False


class _Swapped(SinkWindowLayer):
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As in the base class, in which `keys` are what rotates."""
        rotated, latents = super().update(value_states, key_states)
        return latents, rotated


class SwappedSinkWindowLayer(_Swapped):
    """For multi-head latent attention: what rotates comes as the values, and a latent that does not as the keys."""


class SwappedStaticSinkWindowLayer(_Swapped, StaticSinkWindowLayer):
    """The same for compiled decoding."""


class _Hybrid(SinkWindowLayer, LinearAttentionAndFullAttentionLayer):
    is_croppable = False
    dtype: Any
    device: Any

    def __init__(self, *args: Any, number_of_states: int, **kwargs: Any) -> None:
        LinearAttentionLayer.__init__(self, number_of_states)
        super().__init__(*args, **kwargs)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Of the ring, for which `update` passes two tensors, or of the state, which comes by keyword."""
        if args:
            super().lazy_initialization(*args)
        else:
            LinearAttentionLayer.lazy_initialization(self, **kwargs)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Puts the rows of the state in this order; the cache does it for rings, of several layers at once."""
        LinearAttentionLayer.reorder_cache(self, beam_idx)  # type: ignore[arg-type]

    def reset(self) -> None:
        """Forgets all tokens."""
        super().reset()
        LinearAttentionLayer.reset(self)


class HybridSinkWindowLayer(_Hybrid):
    """For layers of attention beside a recurrent state: the ring is ours, the state is transformers' own."""


class HybridStaticSinkWindowLayer(_Hybrid, StaticSinkWindowLayer):
    """The same for compiled decoding."""


def ring_for(theirs: Any, *args: Any, swapped: bool, chronological: bool, static: dict[str, Any]) -> SinkWindowLayer:
    """Our layer in the place of one of transformers' own.

    Args:
        theirs (`CacheLayerMixin`): the layer that a `DynamicCache` has there.
        args: of `SinkWindowLayer`.
        swapped (`bool`), chronological (`bool`): see `PositionScheme`.
        static (`dict[str, Any]`): arguments of `StaticSinkWindowLayer` alone; empty for layers of changing shapes.
    """
    # A layer that is two of these at once does not pass the check of the twin.
    if isinstance(theirs, LinearAttentionAndFullAttentionLayer):
        hybrid = HybridStaticSinkWindowLayer if static else HybridSinkWindowLayer
        return hybrid(*args, number_of_states=theirs.number_of_states, **static)
    if chronological:
        return ChronologicalSinkWindowLayer(*args)
    if swapped:
        return SwappedStaticSinkWindowLayer(*args, **static) if static else SwappedSinkWindowLayer(*args)
    return StaticSinkWindowLayer(*args, **static) if static else SinkWindowLayer(*args)
