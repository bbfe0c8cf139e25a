"""Writing a cache to a safetensors file and reading it back, so that a text goes on in another process.

The file holds the tensors of the layers. Its metadata holds the numbers that describe them: the cache's sizes, the position, and
how the model rotates its keys. A file is read completely and compared with the live model before anything is changed.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from .internals import DynamicSlidingWindowLayer, LinearAttentionCacheLayerMixin, device_of, layer_index, text_model
from .layers import RingLayer
from .storage import NAMES

if TYPE_CHECKING:
    from .stack import LayerStack

_FORMAT, _VERSION = "sink_cache", 3


def save_stack(stack: LayerStack, path: str | os.PathLike[str]) -> None:
    """See `SinkWindowCache.save`."""
    if not stack.rows:
        raise ValueError("there is nothing to save: no model has used this cache yet")
    stack.checks.refuse_interrupted()
    tensors: dict[str, torch.Tensor] = {}
    layers = []
    for index, layer in enumerate(stack.layers):
        state, held = _state_of(layer, index)
        layers.append(state)
        tensors |= {f"{index}.{name}": tensor.detach().cpu().clone() for name, tensor in held.items()}
    header = {
        "version": _VERSION,
        "n_sink": stack.n_sink,
        "window": stack.window,
        "stream": stack.state.numbers(),
        "without_masks": stack.step_offset is None or stack.step_offset.all_full,
        "model": stack.model_sizes,
        "layers": layers,
    }
    if not Path(path).parent.is_dir():
        raise FileNotFoundError(f"there is no folder {Path(path).parent} to save the cache in")
    write_whole(path, tensors, {_FORMAT: json.dumps(header)})


def write_whole(
    path: str | os.PathLike[str], tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Writes a safetensors file under a temporary name, and renames it when it is complete.

    Raises:
        OSError: if it cannot be written.
    """
    unfinished = Path(f"{path}.{os.getpid()}.tmp")
    try:
        save_file(tensors, unfinished, metadata=metadata)
        os.replace(unfinished, path)
    except SafetensorError as error:  # which hides the reason of the system in its text
        raise OSError(f"{path} cannot be written: {error}") from error
    finally:
        unfinished.unlink(missing_ok=True)


def _state_of(layer: Any, index: int) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    if isinstance(layer, RingLayer) and not isinstance(layer, LinearAttentionCacheLayerMixin):
        rotation = layer.rotation
        kind = {"kind": "sinks and window", "n_sink": layer.n_sink, "window": layer.window}
        return {**kind, "partner": rotation.partner, "frequency": rotation.frequency}, layer.tensors()
    if type(layer) is DynamicSlidingWindowLayer:
        state = {"kind": "sliding", "seen": layer.cumulative_length, "window": layer.sliding_window}
        held = {"keys": layer.keys, "values": layer.values} if layer.is_initialized else {}
        return state, {name: tensor for name, tensor in held.items() if tensor is not None}
    raise NotImplementedError(
        f"a cache with a {type(layer).__name__} (layer {index}) cannot be saved: only states of attention layers can be"
    )


@torch.inference_mode(False)  # tensors that are made in inference mode could not be written to outside of it
def load_stack(stack: LayerStack, path: str | os.PathLike[str], model: PreTrainedModel) -> None:
    """Fills a stack that was just made for this model; see `SinkWindowCache.load`."""
    header, tensors = _read(Path(path))
    for name in ("n_sink", "window"):
        if header[name] != getattr(stack, name):
            raise ValueError(
                f"{path} holds a cache of {name}={header[name]}, but this one has {name}={getattr(stack, name)}"
            )
    if len(header["layers"]) != len(stack.layers):
        raise ValueError(
            f"{path} holds a cache of {len(header['layers'])} layers, but this model has {len(stack.layers)}"
        )
    for name, size in json.loads(json.dumps(stack.model_sizes)).items():  # JSON makes lists of tuples
        if header["model"][name] != size:
            raise ValueError(
                f"{path} holds a cache of a model with {name}={header['model'][name]!r}, but this one has {name}={size!r}"
            )
    devices = {}
    for module in text_model(model).modules():
        index, device = layer_index(module), device_of(module)
        if index is not None and device is not None:
            devices[index] = device
    rings: list[dict[str, torch.Tensor]] = []
    for index, (layer, state) in enumerate(zip(stack.layers, header["layers"], strict=True)):
        # Copies, because the file's tensors are not aligned as kernels like them.
        held = {
            name.partition(".")[2]: tensor.to(devices.get(index, device_of(model)), copy=True)
            for name, tensor in tensors.items()
            if name.startswith(f"{index}.")
        }
        # Under autocast, values may have another dtype than the model.
        others = [tensor.dtype for name, tensor in held.items() if name != "values" and tensor.dtype != model.dtype]
        if others:
            raise ValueError(f"{path} holds {others[0]} states, but this model works in {model.dtype}")
        try:
            if isinstance(layer, RingLayer):
                _check_ring(layer, state)
                rings.append({name: held[name] for name in NAMES} if held else {})
            else:
                _fill_sliding(layer, state, held)
        except (KeyError, RuntimeError, TypeError) as error:
            raise ValueError(f"{path} does not fit layer {index} of this model: {error}") from error
    stack.put_back(rings)
    stack.state.take_over(header["stream"])
    stack.state.recheck_positions = True  # the next caller may count other positions
    if header.get("without_masks", True):  # as before, so that a graph that was compiled for it can be used
        stack.leave_out_masks_if_full()


def _fill_sliding(layer: Any, state: dict[str, Any], held: dict[str, torch.Tensor]) -> None:
    if state["kind"] != "sliding" or type(layer) is not DynamicSlidingWindowLayer:
        raise TypeError(f"it holds a layer of kind {state['kind']!r}, the model has a {type(layer).__name__}")
    if state["window"] != layer.sliding_window:
        raise TypeError(f"its window is {state['window']}, the model's {layer.sliding_window}")
    if held:
        layer.lazy_initialization(held["keys"], held["values"])
        layer.keys, layer.values, layer.cumulative_length = held["keys"], held["values"], state["seen"]


def _check_ring(layer: RingLayer, state: dict[str, Any]) -> None:
    if state["kind"] != "sinks and window" or (state["n_sink"], state["window"]) != (layer.n_sink, layer.window):
        raise TypeError(
            f"it holds a layer of kind {state['kind']!r} and other sizes; perhaps it was saved with another compileable"
        )
    rotation = type(layer.rotation)(tuple(state["partner"]), tuple(state["frequency"]))
    if not layer.rotation.is_close_to(rotation):
        raise TypeError("its keys rotate in another way: it belongs to another model")


def _read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {})[_FORMAT])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged, or no safetensors file: {error}") from error
    except KeyError as error:
        raise ValueError(f"{path} was not written by SinkWindowCache.save") from error
    if header["version"] != _VERSION:
        raise ValueError(f"{path} is of version {header['version']}, and this is sink_cache for version {_VERSION}")
    return header, tensors
