"""Choosing a cache's layers for a model, and layers for models that do not cache plain rotating keys and values."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedConfig

from .internals import LinearAttentionAndFullAttentionLayer, LinearAttentionLayer, layers_of
from .layers import POSITION_LIMIT, RingLayer, SinkWindowLayer, StaticSinkWindowLayer
from .ring import slots_of
from .rotary import ForwardRotations
from .state import DeviceStreamState, StreamState
from .storage import take
from .twin import PositionScheme


class ChronologicalSinkWindowLayer(SinkWindowLayer):
    """For models that count the keys between a query and a key (ALiBi): keys are returned in the order of the text."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As in the base class, but keys and values are in chronological order for one token, too."""
        attended = super().update(key_states, value_states)
        if key_states.shape[2] > 1 or max(self.state.counts) < self.capacity:
            return attended
        return self._in_order(self.keys), self._in_order(self.values)

    def _in_order(self, slots: torch.Tensor) -> torch.Tensor:
        """Takes the sinks first, then the window from its oldest token on. A row that is not full has its tokens at the end."""
        counts = torch.tensor(self.state.counts, device="cpu")[:, None] + 1  # with the token that has just been stored
        rank = (torch.arange(self.capacity, device="cpu") - (self.capacity - counts).clamp(min=0)).clamp(min=0)
        token = torch.where(rank < self.n_sink, rank, rank + (counts - self.capacity).clamp(min=0))
        return take(slots, slots_of(token, self.n_sink, self.window).to(slots.device))

    def needs_sinks_per_query(self, new_tokens: int) -> bool:
        """Returns False, or refuses the call, because the model would count copies of the sinks as keys."""
        if super().needs_sinks_per_query(new_tokens):
            raise NotImplementedError(
                "stream() with chunk_size > 1 and assisted decoding are not possible once tokens are evicted in a model that "
                "counts its keys (ALiBi), because each query would need another number of keys. Use chunk_size=1."
            )
        return False


class _Swapped(RingLayer):
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As in the base class, but with keys and values swapped, because the base class rotates `keys`."""
        rotated, latents = super().update(value_states, key_states)
        return latents, rotated


class SwappedSinkWindowLayer(_Swapped, SinkWindowLayer):
    """For multi-head latent attention, where the values rotate, and the keys are a latent that does not."""


class SwappedStaticSinkWindowLayer(_Swapped, StaticSinkWindowLayer):
    """The same for compiled decoding."""


class _Hybrid(RingLayer, LinearAttentionAndFullAttentionLayer):
    is_croppable = False
    dtype: Any
    device: Any

    def __init__(self, *args: Any, number_of_states: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        LinearAttentionLayer.__init__(self, number_of_states)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Initialises the ring from two tensors by position, or the recurrent state from keywords."""
        if args:
            super().lazy_initialization(*args)
        else:
            LinearAttentionLayer.lazy_initialization(self, **kwargs)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Puts the rows of the recurrent state in this order. `LayerStack.select` reorders the rings."""
        LinearAttentionLayer.reorder_cache(self, beam_idx)  # type: ignore[arg-type]

    def reset(self) -> None:
        """Forgets all tokens."""
        super().reset()
        LinearAttentionLayer.reset(self)


class HybridSinkWindowLayer(_Hybrid, SinkWindowLayer):
    """For layers of attention beside a recurrent state: the ring is ours, the state is transformers' own."""


class HybridStaticSinkWindowLayer(_Hybrid, StaticSinkWindowLayer):
    """The same for compiled decoding."""


# --- which layer a model's layer gets ---


def layers_for(
    config: PreTrainedConfig, scheme: PositionScheme, n_sink: int, window: int, state: StreamState
) -> list[Any]:
    """Makes one cache layer for each layer of a model of this config, whose positions work as `scheme` says.

    Rings replace full attention. All other layers are transformers' own. With a `DeviceStreamState`, all shapes are constant, and
    rings replace sliding layers, too.

    Raises:
        ValueError: if the model attends to fewer than `n_sink + window` tokens.
        NotImplementedError: if shapes must be constant, and a layer's shapes would change.
    """
    capacity = n_sink + window
    if scheme.sliding_window is not None and capacity > scheme.sliding_window:
        raise ValueError(
            f"n_sink + window is {capacity}, but every layer of this model ({config.model_type}) attends to at "
            f"most sliding_window = {scheme.sliding_window} tokens. Choose n_sink + window <= {scheme.sliding_window}."
        )
    if scheme.max_keys is not None and capacity > scheme.max_keys:
        raise ValueError(
            f"n_sink + window is {capacity}, but this model ({config.model_type}) has attention biases for "
            f"{scheme.max_keys} tokens. Choose n_sink + window <= {scheme.max_keys}."
        )
    layers = layers_of(config)
    rotations = scheme.rotations
    state.forget_layers()
    is_static = isinstance(state, DeviceStreamState)
    if is_static:
        # Sliding layers get rings without sinks, because transformers' own layers move all their keys at every step.
        rotations = {**scheme.rotations, **scheme.sliding}
        _refuse_changing_shapes(config, scheme, {i: layer for i, layer in enumerate(layers) if i not in rotations})
    shared: dict[str, Any] = {"state": state, "rotations": ForwardRotations()}
    shared["max_position"] = min(POSITION_LIMIT, scheme.max_position or POSITION_LIMIT)
    for index, rotation in rotations.items():
        theirs, is_sliding = layers[index], index not in scheme.rotations
        sizes = (0, theirs.sliding_window) if is_sliding else (n_sink, window)
        more: dict[str, Any] = {"sliding_window": scheme.sliding_window, "is_sliding": is_sliding}
        if isinstance(theirs, LinearAttentionAndFullAttentionLayer):
            more["number_of_states"] = theirs.number_of_states
        ring_class: Any = _ring_class(theirs, index in scheme.swapped, scheme.chronological, is_static)
        layers[index] = ring_class(*sizes, rotation, **shared, **more)
    return layers


def _ring_class(theirs: Any, swapped: bool, chronological: bool, is_static: bool) -> type[RingLayer]:
    # A model with a layer of two of these kinds does not pass the check on its twin.
    if isinstance(theirs, LinearAttentionAndFullAttentionLayer):
        return HybridStaticSinkWindowLayer if is_static else HybridSinkWindowLayer
    if chronological:
        return ChronologicalSinkWindowLayer
    if swapped:
        return SwappedStaticSinkWindowLayer if is_static else SwappedSinkWindowLayer
    return StaticSinkWindowLayer if is_static else SinkWindowLayer


def _refuse_changing_shapes(config: PreTrainedConfig, scheme: PositionScheme, theirs: dict[int, Any]) -> None:
    if scheme.chronological:
        raise NotImplementedError(
            f"compileable=True is not possible for model type {config.model_type!r}: it counts the keys between a query and "
            "a key (ALiBi), so they have to be put in order anew at every step. Leave compileable out."
        )
    for index, layer in theirs.items():
        if not layer.is_compileable:
            raise NotImplementedError(
                f"compileable=True is not possible for model type {config.model_type!r}: layer {index} has a "
                f"{type(layer).__name__}, whose shapes change or whose keys cannot be moved. Leave compileable out."
            )


def kinds_of_layers(config: PreTrainedConfig) -> list[tuple[type, int | None]]:
    """The layer classes and windows of transformers for this config. Our layers fit only models for which they are equal."""
    return [(type(layer), getattr(layer, "sliding_window", None)) for layer in layers_of(config)]
