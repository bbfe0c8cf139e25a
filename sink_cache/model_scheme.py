"""How a live model uses positions: what its twin tells, if the model is like its twin."""

from __future__ import annotations

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from .internals import attention_of, device_of, text_model
from .live_model import accept, differences, refuse_changed
from .masks import merges_sinks
from .reference import CannotStream
from .twin import ErrorOf, Learned, PositionScheme, learn

_LARGEST_TABLE = 2**20  # numbers in a buffer


def scheme_of(text: PreTrainedModel, error_of: ErrorOf, *, may_be_changed: bool = False) -> PositionScheme:
    """Returns how this text model uses positions.

    Args:
        text (`PreTrainedModel`): the text model.
        error_of (`ErrorOf`): see `twin.learn`.
        may_be_changed (`bool`): do not refuse a model that was changed on its instance.

    Raises:
        NotImplementedError: if the model is refused, with the reason.
    """
    scheme, known = _learn_live(text, error_of)
    if not may_be_changed:
        refuse_changed(text, known)
    return scheme


def scheme_of_class(model_class: type[PreTrainedModel], config: PreTrainedConfig, error_of: ErrorOf) -> PositionScheme:
    """Returns how models of this class and config use positions. Unlike `scheme_of`, this needs no model."""
    return _learn(model_class, config, {}, error_of)[0]


def attends_plainly(model: PreTrainedModel, error_of: ErrorOf) -> bool:
    """Whether the attention of this model merges the sinks of exact chunks itself.

    It does if its twin was exact with it, and if no known difference lies between the model and the twin.

    Raises:
        NotImplementedError: if the model is refused.
    """
    text = text_model(model)
    device = device_of(text)
    if attention_of(text.config) != "sdpa" or text.training or device is None or torch.is_autocast_enabled(device.type):
        return False
    scheme, known = _learn_live(text, error_of)
    return scheme.plain and merges_sinks() and not differences(text, known)


def accept_as_it_is(model: PreTrainedModel, error_of: ErrorOf) -> None:
    """Accepts a model with all that was changed on its instance, because it has been verified."""
    text = text_model(model)
    accept(text, _learn_live(text, error_of)[1])


def _learn_live(text: PreTrainedModel, error_of: ErrorOf) -> Learned:
    return _learn(type(text), text.config, _small_buffers(text), error_of)


def _learn(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, buffers: dict[str, torch.Tensor], error_of: ErrorOf
) -> Learned:
    try:
        return learn(model_class, config, buffers, error_of)
    except CannotStream as reason:
        raise NotImplementedError(
            f"SinkWindowCache does not support model type {config.model_type!r} ({model_class.__name__}): {reason}. "
            "Use DynamicCache with this model."
        ) from reason


def _small_buffers(text: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Returns the buffers that may hold rotations, such as `inv_freq`. Larger buffers hold something else."""
    buffers = {
        name: buffer
        for name, buffer in text.named_buffers()
        if buffer.is_floating_point() and buffer.numel() <= _LARGEST_TABLE
    }
    if offloaded := [name for name, buffer in buffers.items() if buffer.is_meta]:
        raise NotImplementedError(
            f"SinkWindowCache cannot see how this model rotates its keys, because its buffer {offloaded[0]} is offloaded. "
            "Offload its weights only: offload_buffers=False."
        )
    return buffers
