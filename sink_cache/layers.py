"""Which layers a cache has for a model: rings in place of its full attention, and transformers' own for all else."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from .internals import layers_of
from .ring import POSITION_LIMIT
from .static import DevicePositions
from .twin import PositionScheme
from .variants import ring_for


def layers_for(
    config: PreTrainedConfig, scheme: PositionScheme, n_sink: int, window: int, *, compileable: bool
) -> list[Any]:
    """One cache layer for each layer of a model of this config, whose positions work as `scheme` says.

    Raises:
        ValueError: if the model attends to fewer than `n_sink + window` tokens.
        NotImplementedError: if `compileable`, and a layer's shapes would change.
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
    layers: list[Any] = layers_of(config)
    rotations = scheme.rotations
    if compileable:
        # Rings without sinks for sliding layers, too: transformers' own move all their keys.
        rotations = {**scheme.rotations, **scheme.sliding}
        _refuse_changing_shapes(config, scheme, {i: layer for i, layer in enumerate(layers) if i not in rotations})
    max_position = min(POSITION_LIMIT, scheme.max_position or POSITION_LIMIT)
    positions, last = DevicePositions(), max(rotations)
    for index, rotation in rotations.items():
        is_sliding = index not in scheme.rotations
        sizes = (0, layers[index].sliding_window) if is_sliding else (n_sink, window)
        static = {"positions": positions, "is_last": index == last, "is_sliding": is_sliding} if compileable else {}
        arguments = (*sizes, rotation, max_position, scheme.sliding_window)
        layers[index] = ring_for(
            layers[index],
            *arguments,
            swapped=index in scheme.swapped,
            chronological=scheme.chronological,
            static=static,
        )
    return layers


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
    """What transformers has for a model of this config; the layers made for one model serve another only if it is the same."""
    return [(type(layer), getattr(layer, "sliding_window", None)) for layer in layers_of(config)]
