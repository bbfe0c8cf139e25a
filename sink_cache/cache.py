"""`SinkWindowCache`: a transformers `Cache` whose full-attention layers are rings, and what it refuses."""

from __future__ import annotations

import copy
import math
import os
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicSlidingWindowLayer, LinearAttentionCacheLayerMixin

from . import saving
from .discovery import (
    calling_model,
    calling_tensor,
    class_for_config,
    generate_call,
    padding_mask_of_caller,
    shows_blocks_of_tokens,
    text_model,
)
from .masks import ChunkOffset, let_masks_show_each_query_its_sinks
from .ring import POSITION_LIMIT, SharedStorage, SinkWindowLayer
from .rotary import ForwardRotation
from .static import DevicePositions, StaticSinkWindowLayer
from .twin import CannotStream, PositionScheme, position_scheme
from .variants import ring_for

_LARGEST_TABLE = 2**20  # numbers in a buffer
_READ_MASK_EVERY = 64  # steps

_NOT_IN_GRAPHS = "SinkWindowCache works outside of graphs: compile the model without fullgraph=True"


class SinkWindowCache(Cache):
    """Attention sinks and a sliding window: a key-value cache of constant size for streams of any length.

    StreamingLLM (Xiao et al., arXiv 2309.17453). Each token attends to the first `n_sink` tokens and to the last `window`
    tokens, itself included, and rotary distances are those inside the cache: kept tokens count as contiguous. While no
    more than `n_sink + window` tokens have been seen, everything equals `DynamicCache`. A call with several new tokens
    lets them see the sinks, the last `window - 1` cached tokens and each other causally, and drops what does not fit after
    attention; so a prompt longer than the cache is dense over the prompt.

    The model's rotary embedding is found and checked by itself at the first use; a model on which the cache would not be
    exact is refused. Departures from the paper's code: nothing in the model is patched, and instead of rotating all cached
    keys at every step, only the sinks are.

    Args:
        n_sink (`int`): how many of the first tokens to keep for ever; 0 gives a plain sliding window.
        window (`int`): how many of the last tokens to keep, at least 1. It does *not* include the sinks: the cache holds
            `capacity = n_sink + window` tokens.
        config (`PreTrainedConfig`, *optional*): the model's config. Only needed where the calling model cannot be
            seen, as in a compiled first call.

    Attributes:
        capacity (`int`): `n_sink + window`.
        nbytes (`int`): bytes of all keys and values held, and of the sinks' pristine keys.

    Raises:
        TypeError, ValueError: for arguments of the wrong type or size.
        NotImplementedError: at the first use, for a model whose positions it cannot move, with the reason.

    Example:

    ```python
    >>> from sink_cache import SinkWindowCache
    >>> model.generate(**inputs, past_key_values=SinkWindowCache(n_sink=4, window=1020), max_new_tokens=5000)
    ```
    """

    def __init__(
        self, n_sink: int, window: int, *, compileable: bool = False, config: PreTrainedConfig | None = None
    ) -> None:
        for name, value, least in (("n_sink", n_sink, 0), ("window", window, 1)):
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} must be an integer, but is {value!r} of type {type(value).__name__}")
            if value < least:
                raise ValueError(f"{name} must be at least {least}, but is {value}")
        if not isinstance(compileable, bool):
            raise TypeError(f"compileable must be True or False, but is {compileable!r}")
        self.n_sink, self.window, self.capacity = n_sink, window, n_sink + window
        self.compileable = compileable
        self._trained_context: int | None = None
        self._scheme: PositionScheme | None = None
        self._first, self._ends = 0, (0, 0)  # the first of our layers; the first and the last layer of attention
        self._looks = True
        self._first_positions = (0,)  # of the first token, one for each row or one for all
        self._exact = False
        self._chunks: dict[bool, ChunkOffset] = {}  # of layers that are sliding, and that are not
        self._kinds: list[tuple[type, int | None]] = []  # of layers that a DynamicCache has for the model
        self._positions_moved = False  # and have not been looked at since
        self._begun = False  # a text, in layers that are there
        self._masks_unread = self._positions_unread = 0
        super().__init__(layers=[])
        if config is not None:
            if not isinstance(config, PreTrainedConfig):
                raise TypeError(f"config must be a model's config (model.config), but is a {type(config).__name__}")
            model_class, text_config = class_for_config(config)
            self._prepare_for(model_class, text_config, {})

    # The layers depend on the model, and the model shows itself only when it first uses the cache, so look then.
    @property
    def layers(self) -> list[Any]:
        """One cache layer for each layer of the model; empty until a model has used the cache."""
        if not self._layers:
            self._look_for_the_model()
        return self._layers

    @layers.setter
    def layers(self, layers: list[Any]) -> None:
        self._layers = layers

    @torch.compiler.disable(  # type: ignore[untyped-decorator]
        reason="a SinkWindowCache cannot see the model from inside a full graph: pass SinkWindowCache(..., config=model.config)"
    )
    def _look_for_the_model(self) -> None:
        model = calling_model() if self._looks else None
        if model is not None:
            self.prepare_for(model)

    def prepare_for(self, model: PreTrainedModel) -> None:
        """Makes the layers for this model, unless they are there; what happens by itself when the model first uses the cache.

        Raises:
            NotImplementedError: if the model is refused.
        """
        text = text_model(model)
        # Rotations live in buffers such as inv_freq; larger ones are something else.
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
        self._prepare_for(type(text), text.config, buffers)

    def _prepare_for(self, model_class: Any, config: PreTrainedConfig, buffers: dict[str, torch.Tensor]) -> None:
        try:
            scheme = position_scheme(model_class, config, buffers)
        except CannotStream as reason:
            raise NotImplementedError(
                f"SinkWindowCache does not support model type {config.model_type!r} ({model_class.__name__}): {reason}. "
                "Use DynamicCache with this model."
            ) from reason
        if not self._layers or not scheme.agrees_with(self._scheme) or self._kinds != _kinds(config):
            self._make_layers(config, scheme)

    def prepare(self, config: PreTrainedConfig, scheme: PositionScheme) -> None:
        """Makes the layers for a model of this config, whose positions work as `scheme` says, whoever calls later."""
        self._make_layers(config, scheme)
        self._looks = False

    def _make_layers(self, config: PreTrainedConfig, scheme: PositionScheme) -> None:
        if scheme.sliding_window is not None and self.capacity > scheme.sliding_window:
            raise ValueError(
                f"n_sink + window is {self.capacity}, but every layer of this model ({config.model_type}) attends to at "
                f"most sliding_window = {scheme.sliding_window} tokens. Choose n_sink + window <= {scheme.sliding_window}."
            )
        if scheme.max_keys is not None and self.capacity > scheme.max_keys:
            raise ValueError(
                f"n_sink + window is {self.capacity}, but this model ({config.model_type}) has attention biases for "
                f"{scheme.max_keys} tokens. Choose n_sink + window <= {scheme.max_keys}."
            )
        layers = DynamicCache(config=config).layers
        limits = min(POSITION_LIMIT, scheme.max_position or POSITION_LIMIT), scheme.sliding_window
        ours: dict[int, SinkWindowLayer]
        if self.compileable:
            ours = self._static_layers(layers, scheme, limits, config)
        else:
            ours = {
                index: ring_for(
                    *(layers[index], index in scheme.swapped, scheme.chronological, {}),
                    *(self.n_sink, self.window, rotation, *limits),
                )
                for index, rotation in scheme.rotations.items()
            }
        recording = any(layer.record_past for layer in self._ours())
        for index, layer in ours.items():
            layers[index] = layer
            layer.exact_chunks, layer.record_past = self._exact, recording
        self._layers, self._first = layers, min(ours)
        attention = [
            i for i, layer in enumerate(layers) if isinstance(layer, (SinkWindowLayer, DynamicSlidingWindowLayer))
        ]
        self._ends = (attention[0], attention[-1])
        self._scheme, self._kinds = scheme, _kinds(config)
        self._trained_context = getattr(config, "max_position_embeddings", None)

    def _static_layers(
        self, layers: list[Any], scheme: PositionScheme, limits: tuple[int, int | None], config: PreTrainedConfig
    ) -> dict[int, SinkWindowLayer]:
        """Ours for full attention; for sliding layers too, as rings without sinks: transformers' own move all their keys."""
        if scheme.chronological:
            raise NotImplementedError(
                f"compileable=True is not possible for model type {config.model_type!r}: it counts the keys between a query and "
                "a key (ALiBi), so they have to be put in order anew at every step. Leave compileable out."
            )
        rotations = dict(sorted({**scheme.rotations, **scheme.sliding}.items()))
        for index, layer in enumerate(layers):
            if index not in rotations and not layer.is_compileable:
                raise NotImplementedError(
                    f"compileable=True is not possible for model type {config.model_type!r}: layer {index} has a "
                    f"{type(layer).__name__}, whose shapes change or whose keys cannot be moved. Leave compileable out."
                )
        positions = DevicePositions()
        static: dict[int, SinkWindowLayer] = {}
        for index, rotation in rotations.items():
            bounded = index in scheme.rotations
            sizes = (self.n_sink, self.window) if bounded else (0, layers[index].sliding_window)
            is_last = index == max(rotations)
            own = {"positions": positions, "is_last": is_last, "is_sliding": not bounded}
            static[index] = ring_for(layers[index], index in scheme.swapped, False, own, *sizes, rotation, *limits)
        return static

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores the new keys and values of one layer and returns those to attend to; see `SinkWindowLayer.update`."""
        layers = self._layers
        attended: tuple[torch.Tensor, torch.Tensor]
        if (
            (self.compileable and key_states.shape[2] == 1 and self._begun and layers[layer_idx].is_initialized)
            and not layers[self._first].positions.unfinished
            and (torch.compiler.is_compiling() or layer_idx != self._first or not self._is_time_to_look_at_positions())
        ):
            attended = layers[layer_idx].update(key_states, value_states)
            return attended
        if torch.compiler.is_compiling():
            attended = self._outside_of_graphs(self.update, key_states, value_states, layer_idx, *args, **kwargs)
            return attended
        if not layers and not self.layers:
            raise ValueError(
                "this SinkWindowCache cannot see a transformers model among its callers. Pass "
                "SinkWindowCache(..., config=model.config)."
            )
        layer = self._layers[layer_idx]
        if isinstance(layer, SinkWindowLayer):
            if layer_idx == self._first:
                self._begin_call(key_states.shape[2])
                layer = self._layers[layer_idx]
            if layer.storage is None and layer.position and not self.compileable:
                self._share_storage()
        attended = layer.update(key_states, value_states, *args, **kwargs)
        return attended

    def _begin_call(self, new_tokens: int) -> None:
        """All that has to be right before the first of our layers takes in the tokens of a call."""
        layer = self._layers[self._first]
        seen = layer.get_seq_length()
        self._refuse_interrupted(new_tokens)
        is_step = seen > max((0, *layer.pads)) and new_tokens == 1
        if is_step and not self.compileable and not self._is_time_to_look_at_positions():  # else `update` has asked
            return
        self._note_padding(calling_tensor("attention_mask", {2}))
        if seen == 0:
            config = generate_call().get("generation_config") if self._looks else None  # a twin is not what it calls
            if config is not None and not config.use_cache:
                raise ValueError(
                    "generate(use_cache=False), which is the default of some models, feeds the whole text at every step. A "
                    "cache would take it for new text: pass use_cache=True."
                )
            # A cache may have been prepared for another model: by config=, or in its life before a reset.
            prepared, pads = self._layers, layer.pads
            self._look_for_the_model()
            if self._layers is not prepared and self._first > 0:
                raise ValueError(
                    "this cache was made for another model, and layers before the first of ours have used it already. "
                    "Make a new SinkWindowCache for each model."
                )
            self._set_pads(pads)
            layer = self._layers[self._first]
            if self._trained_context is not None and new_tokens > self._trained_context:
                warnings.warn(
                    f"the first call has {new_tokens:,} tokens, and the model was trained on {self._trained_context:,} "
                    "positions. A first call is dense over the whole prompt; generate(..., prefill_chunk_size=n) feeds it "
                    "in pieces that attend to no more than the cache holds.",
                    stacklevel=3,
                )
        self._refuse_gaps(calling_tensor("position_ids", {2, 3}), seen, new_tokens)
        self._positions_moved, self._begun = False, True
        if kinds := {one.is_sliding for one in self._ours() if one.evicts_within(new_tokens)}:
            if layer.pads:
                raise NotImplementedError("stream() and assisted decoding do not support padded batches.")
            chunks, self._chunks = self._chunks, {}
            if not all(kind in chunks and chunks[kind].used for kind in kinds):
                raise NotImplementedError(
                    "stream() and assisted decoding need attn_implementation='sdpa' or 'eager' and no 4-D attention_mask: "
                    "each query sees its own copy of the sinks, and only these masks can say so."
                )
        if layer.record_past:
            self._record(new_tokens)

    def _refuse_interrupted(self, new_tokens: int) -> None:
        """Wherever a forward was interrupted, one end of the cache shows it; `new_tokens`: what ours have not yet seen."""
        first = self._layers[self._first]
        seen = first.get_seq_length()
        unfinished = isinstance(first, StaticSinkWindowLayer) and first.positions.unfinished
        for index in self._ends:
            expected = seen + new_tokens if index < self._first else seen
            if unfinished or self._layers[index].get_seq_length() != expected:
                raise ValueError(
                    "the layers of this cache have seen different numbers of tokens: a forward was interrupted. "
                    "Call reset()."
                )

    def _refuse_gaps(self, position_ids: torch.Tensor | None, seen: int, new_tokens: int) -> None:
        """Sinks move by the number of evicted tokens, so positions must count tokens."""
        if position_ids is None or position_ids.shape[-1] != new_tokens or position_ids.is_floating_point():
            return
        layer = self._layers[self._first]
        pads = torch.tensor(layer.pads or (0,))[:, None]
        index = torch.arange(new_tokens) + seen
        counted = index - pads - layer.rebased
        given = position_ids.cpu()
        # Rows may begin anywhere: what counts are distances.
        starts = (given - counted).reshape(-1, new_tokens)[:, -1].tolist()
        known = self._first_positions * (len(starts) // len(self._first_positions) or 1)
        begins = [seen <= row_pads for row_pads in layer.pads or (0,) * len(starts)]
        starts = [now if begin else before for now, begin, before in zip(starts, begins, known, strict=False)]
        self._first_positions = tuple(starts) if len(set(starts)) > 1 else (starts[0],)
        counted = counted + torch.tensor(self._first_positions)[:, None]
        if not ((given == counted) | (index < pads)).all():
            raise NotImplementedError(
                f"SinkWindowCache needs positions that rise by one with every token of a row, from "
                f"{counted[0, 0]:,} on in this call, but position_ids are {given.flatten()[:8].tolist()}… For another "
                "text, call reset(); after stream() of a prompt, generate() needs one token more than was streamed; after "
                "rebase(), use next_position_ids(); images and packed texts are not supported."
            )

    def _share_storage(self) -> None:
        alike = defaultdict(list)
        for layer in self.layers:
            if isinstance(layer, SinkWindowLayer) and layer.is_initialized and layer.storage is None:
                alike[layer.keys.shape, layer.values.shape, layer.dtype, layer.device].append(layer)
        for layers in alike.values():
            partners = {layer.rotation.partner for layer in layers if not layer.rotation.is_identity}
            for partner in partners or {layers[0].rotation.partner}:
                together = [one for one in layers if one.rotation.partner == partner or one.rotation.is_identity]
                SharedStorage([layer for layer in together if layer.storage is None])

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, Any]:
        """Returns `(kv_length, kv_offset)` for a layer; called by the mask-building code before any layer runs."""
        if query_length == 0:
            raise ValueError(
                f"this cache has seen {self.get_seq_length()} tokens, and the text has no token more to feed. generate() needs "
                "the whole text so far and at least one new token; for another text, call reset()."
            )
        static = self.compileable and query_length == 1
        if torch.compiler.is_compiling() and not static:
            sizes: tuple[int, int] = self._outside_of_graphs(self.get_mask_sizes, query_length, layer_idx)
            return sizes
        if self.layers and not torch.compiler.is_compiling():
            if static and not self._begun:
                self._look_for_the_model()  # the sizes are those of the layers that it will use
            mask = padding_mask_of_caller()
            if query_length > 1 or not self._begun or self._is_time_to_look(mask):
                self._note_padding(mask)
            if self.compileable and shows_blocks_of_tokens():
                raise NotImplementedError(
                    "compileable=True is not possible for models that mask images by blocks: transformers looks the tokens of a "
                    "block up by their index in the whole text. Leave compileable out."
                )
            if not static:
                self._refuse_interrupted(0)
                self._refuse_to_forget_padding(mask)
        return super().get_mask_sizes(query_length, layer_idx)

    def get_query_offset(self, layer_idx: int = 0) -> int | torch.Tensor:  # type: ignore[override]
        """The index of the next token in masks."""
        layer = self.layers[layer_idx] if self.layers else None
        if isinstance(layer, SinkWindowLayer) and (layer.exact_chunks or layer.record_past):
            if torch.compiler.is_compiling():
                offset: int = self._outside_of_graphs(self.get_query_offset, layer_idx)
                return offset
            self._chunks[layer.is_sliding] = ChunkOffset.of(layer)
            return self._chunks[layer.is_sliding]
        if isinstance(layer, StaticSinkWindowLayer):
            return layer.get_query_offset()
        return super().get_query_offset(layer_idx)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen, ever. In a compiled step of a compileable cache: the position of the next token, a tensor."""
        if self.compileable and torch.compiler.is_compiling():
            position: int = self._layers[self._first].get_query_offset()
            return position
        return super().get_seq_length(layer_idx)

    # Applied to the methods themselves, the decorator would cost more at every call than all else that they do.
    @torch.compiler.disable(reason=_NOT_IN_GRAPHS)  # type: ignore[untyped-decorator]
    def _outside_of_graphs(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return method(*args, **kwargs)

    def _ours(self) -> list[SinkWindowLayer]:
        return [layer for layer in self._layers if isinstance(layer, SinkWindowLayer)]

    def _note_padding(self, mask: torch.Tensor | None) -> None:
        """Learns from a mask `[batch_size, length]` how many pads each row began with; refuses what is not left padding."""
        if mask is not None and self._scheme is not None and not self._scheme.takes_masks:
            raise NotImplementedError(
                "this model makes its attention biases (ALiBi) for all that its attention_mask covers, and not for what this "
                "cache shows. Leave attention_mask out; padded batches are not possible."
            )
        if mask is None or (not (pads := self._layers[self._first].pads) and mask.all()):
            return
        real = mask.bool().cpu()
        zeros = tuple((~real).sum(dim=1).tolist())
        if not torch.equal(real, torch.arange(mask.shape[-1]) >= torch.tensor(zeros)[:, None]):
            raise NotImplementedError(
                "SinkWindowCache supports left padding only, and attention_mask has zeros after the first token of a row. "
                "Set tokenizer.padding_side = 'left'."
            )
        seen = self._layers[self._first].get_seq_length()
        if zeros == pads or (not any(zeros) and min(self._layers[self._first].evicted_before_query()) >= 0):
            return
        if self.compileable:
            raise NotImplementedError(
                "SinkWindowCache(compileable=True) does not support padded batches, and attention_mask has zeros. "
                "Leave compileable out."
            )
        if self._layers[self._first].exact_chunks or self._layers[self._first].record_past:
            raise NotImplementedError("stream() and assisted decoding do not support padded batches.")
        for row, (before, now) in enumerate(zip(pads or (0,) * len(zeros), zeros, strict=False)):
            if seen and now != before and (not pads or before < seen):
                raise ValueError(
                    f"attention_mask now begins with {now} zeros in row {row}, but began with {before} when the cache took in "
                    "its first tokens. Call reset() for another text."
                )
        self._set_pads(zeros)

    def _is_time_to_look(self, mask: torch.Tensor | None) -> bool:
        """Whether to read the mask of a step: on a GPU that means to wait, and steps only add a one to what was read before."""
        self._masks_unread += 1
        if mask is None or mask.device.type == "cpu" or self._masks_unread >= _READ_MASK_EVERY:
            self._masks_unread = 0
            return True
        return False

    def _is_time_to_look_at_positions(self) -> bool:
        """Whether to read the positions of a step: after a rebase the caller has to know of it, at every step."""
        layer = self._layers[self._first]
        self._positions_unread += 1
        often = layer.device.type == "cpu" or self._positions_unread >= _READ_MASK_EVERY
        if self._positions_moved or (layer.rebased and often):
            self._positions_unread = 0
            return True
        return False

    def _refuse_to_forget_padding(self, mask: torch.Tensor | None) -> None:
        layer = self._layers[self._first]
        if mask is None and layer.pads and min(layer.evicted_before_query()) < 0:
            raise ValueError(
                "rows of this cache began with padding and are not full yet, so that every call needs the attention_mask "
                "of the whole text, as the first one did."
            )

    def _set_pads(self, pads: tuple[int, ...]) -> None:
        for layer in self._ours():
            layer.pads = pads if any(pads) else ()

    @contextmanager
    def exact_chunks(self) -> Iterator[None]:
        """Within, each token of a call with several sees exactly what it would see if fed alone; see `streaming.stream`."""
        let_masks_show_each_query_its_sinks()
        self._set_exact(True)
        try:
            yield
        finally:
            self._set_exact(False)

    def _set_exact(self, exact: bool) -> None:
        self._exact = exact
        for layer in self._ours():
            layer.exact_chunks = exact

    def __deepcopy__(self, memo: dict[int, Any]) -> SinkWindowCache:
        # Copies made in inference mode could not be written to outside of it.
        with torch.inference_mode(False):
            copied = type(self).__new__(type(self))
            memo[id(self)] = copied
            vars(copied).update(copy.deepcopy(vars(self), memo))
        return copied

    def __bool__(self) -> bool:
        return True  # although it has no layers before a model has used it

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values held, and of the sinks' pristine keys. Constant once the cache is in use."""
        return sum(tensor.nbytes for layer in self._layers for tensor in tensors_of(layer).values())

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: a stream has no maximum length."""
        return -1

    def __repr__(self) -> str:
        seen = self.get_seq_length() if self._layers else 0
        return f"SinkWindowCache(n_sink={self.n_sink}, window={self.window}, seen={seen}, nbytes={self.nbytes})"

    def _not_supported(self, what: str) -> NotImplementedError:
        return NotImplementedError(f"SinkWindowCache does not support {what}. Use DynamicCache for that.")

    # --- going back ---

    def activate_past_recording(self) -> None:
        """From now on keeps what each call overwrites until the next `crop`, and makes calls with several tokens exact.

        For assisted decoding: candidates are checked as if they had been fed one at a time.
        """
        if self.compileable:
            raise self._not_supported("assisted decoding with compileable=True")
        if not self.layers:
            raise ValueError("activate_past_recording needs a model: pass SinkWindowCache(..., config=model.config).")
        let_masks_show_each_query_its_sinks()
        for layer in self._ours():
            layer.record_past = True
        for other in self._layers:
            if not isinstance(other, SinkWindowLayer) and hasattr(other, "activate_past_recording"):
                other.activate_past_recording()

    def _record(self, new_tokens: int) -> None:
        layer = self._layers[self._first]
        if layer.position == 0 or new_tokens == 1:
            if new_tokens > self.capacity:
                raise NotImplementedError(
                    f"the first call of assisted decoding has {new_tokens} tokens, prompt and candidates, and the cache holds "
                    f"{self.capacity}. Use a larger window."
                )
            return  # nothing is overwritten; single tokens are recorded by their storage
        self._share_storage()
        for storage in self._storages():
            storage.record(layer.position, new_tokens)

    def _storages(self) -> list[SharedStorage]:
        return list(dict.fromkeys(layer.storage for layer in self._ours() if layer.storage is not None))

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` can put the whole cache back as it was."""
        return all(map(_is_croppable, self.layers))

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last tokens (a number <= 0), as if they had never been fed; and what was recorded is forgotten.

        Raises:
            ValueError: for a positive number; or if tokens were evicted for those to be taken back, and the cache was not
                recording (`activate_past_recording`) when they came.
            NotImplementedError: for padded rows, for recurrent states, and with `compileable=True`.
        """
        tokens_to_remove = int(tokens_to_remove)  # generate() may count them on the device
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes minus the number of tokens to take back, but got {tokens_to_remove}")
        ours = self._ours()
        if not ours or not ours[0].position:
            return
        if any(
            isinstance(layer, LinearAttentionCacheLayerMixin) and not _is_croppable(layer) for layer in self._layers
        ):
            raise self._not_supported("crop of recurrent states")
        if not ours[0].is_croppable:
            raise self._not_supported("crop with compileable=True" if self.compileable else "crop of padded batches")
        seen, position = ours[0].get_seq_length(), ours[0].position + tokens_to_remove
        if seen + tokens_to_remove < 0:
            raise ValueError(f"crop({tokens_to_remove}) takes back more than the {seen} tokens that there are")
        recorded = min(
            (
                start
                for storage in self._storages()
                if storage.has_recorded_until(ours[0].position)
                for start, *_ in storage.overwritten
            ),
            default=position + 1,
        )
        if tokens_to_remove and seen > self.capacity and recorded > position:
            raise ValueError(
                f"crop({tokens_to_remove}) cannot bring back tokens that were evicted meanwhile. Call "
                "activate_past_recording() before feeding tokens that may have to be taken back, and feed no more than "
                f"window = {self.window} of them."
            )
        for other in self._layers:
            if not isinstance(other, SinkWindowLayer):
                other.crop(tokens_to_remove)
        for storage in self._storages():
            storage.bring_back(position)
        for layer in ours:
            layer.position = position

    # --- other rows ---

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps these rows of the batch (indices, or a mask), in this order; a row may come several times."""
        ours = [layer for layer in self._ours() if layer.is_initialized]
        if not ours or not ours[0].position:
            return
        batch_size = ours[0].values.shape[0]
        rows = torch.arange(batch_size, device=indices.device)[indices]
        for layer in self._layers:
            if isinstance(layer, LinearAttentionCacheLayerMixin):
                # Recurrent states know no other way.
                layer.reorder_cache(rows)  # type: ignore[arg-type]
            elif not isinstance(layer, SinkWindowLayer):
                layer.batch_select_indices(rows)
        if pads := ours[0].pads:
            self._set_pads(tuple(pads[row] for row in rows.tolist()))
        if len(self._first_positions) > 1:
            self._first_positions = tuple(self._first_positions[row] for row in rows.tolist())
        for storage in self._storages():
            storage.select(rows.to(storage.keys.device))
        for layer in ours:
            if layer.storage is None:
                with torch.inference_mode(False):
                    there = rows.to(layer.device)
                    layer.replace({name: tensor.index_select(0, there) for name, tensor in layer.tensors().items()})

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Rows in the order `beam_idx` `[batch_size]`, for beam search."""
        if len(beam_idx) and self.get_seq_length():
            self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times."""
        ours = [layer for layer in self._ours() if layer.is_initialized]
        if ours:
            rows = torch.arange(ours[0].values.shape[0], device=ours[0].device)
            self.batch_select_indices(rows.repeat_interleave(repeats))

    # --- in a file ---

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the cache to a safetensors file; `load` reads it back, in this process or another.

        Raises:
            ValueError: before a model has used the cache.
            NotImplementedError: for models with layers other than attention.
        """
        saving.save(self, path)

    def load(self, path: str | os.PathLike[str], model: PreTrainedModel) -> None:
        """Takes the state of a file that `save` wrote, in place of its own; the text goes on as if nothing had happened.

        Args:
            path: the file.
            model (`PreTrainedModel`): the model that will use the cache; its states are put where its layers are.

        Raises:
            FileNotFoundError, ValueError: if the file is not there, is damaged or foreign, or is of a cache of other sizes,
                of another model or dtype. The cache is then as it was.
            NotImplementedError: if the model is refused.
        """
        saving.load(self, path, model)

    # --- bounded positions ---

    def next_position_ids(self, new_tokens: int = 1) -> torch.Tensor:
        """The `position_ids` for the next call of the model, `[1, new_tokens]`, or `[batch_size, new_tokens]` if padded.

        Only needed after `rebase()`; until then models count positions right by themselves.
        """
        layer = self._layers[self._first] if self._layers else None
        if layer is None or not layer.is_initialized:
            return torch.arange(new_tokens)[None]
        starts = torch.tensor(self._first_positions) - torch.tensor(layer.pads or (0,)) + layer.position
        position_ids: torch.Tensor = (starts[:, None] + torch.arange(new_tokens)).to(layer.device)
        return position_ids

    def tokens_until_full(self) -> int:
        """How many more tokens until every row of every bounded layer is full, and one-token calls need no mask."""
        return max(0, -min(min(layer.evicted_before_query()) for layer in self._ours()))

    def tokens_between_rebases(self) -> int:
        """How many tokens may at most be fed from one `rebase()` to the next, before positions go beyond the model's last one."""
        ours = self._ours()
        furthest = max(layer.capacity for layer in ours) + max((0, *ours[0].pads))
        return min(layer.max_position for layer in ours) - furthest - self.rebase_step

    @property
    def rebase_step(self) -> int:
        """By a multiple of this many positions `rebase` moves; and that many tokens should lie between two calls."""
        return math.lcm(*{layer.window for layer in self._ours()})

    def rebase(self) -> int:
        """Moves the stream back to a lower position, as far as it goes; for loops that pass `position_ids` of their own.

        Rotary attention sees differences of positions only, so the window's keys can be rotated back by any number, and the
        text goes on from there. They are moved by a multiple of `window`; call this at least `window` tokens after the last
        time, and each key is rotated once in its life.

        Returns:
            `int`: by how much: the next tokens' positions are `next_position_ids()`, and the positions that
                `generate()` or `forward()` would count by themselves are wrong from now on.

        Raises:
            ValueError: before a model has used the cache.
            NotImplementedError: for models with layers whose keys it cannot move.
        """
        if not self.layers:
            raise ValueError("rebase() needs a cache that a model has used")
        assert self._scheme is not None
        first = self._layers[self._first]
        others = [i for i, layer in enumerate(self._layers) if isinstance(layer, DynamicSlidingWindowLayer)]
        unknown = [i for i in others if i not in self._scheme.sliding]
        if unknown:
            raise NotImplementedError(f"rebase() cannot move the keys of the sliding layers {unknown} of this model")
        furthest = max(layer.capacity for layer in self._ours())
        by: int = max(0, first.position - furthest - max((*first.pads, 0))) // self.rebase_step * self.rebase_step
        if by:
            if not self.compileable:
                self._share_storage()
            for layer in self._ours():
                layer.rebase(by)
            for index in others:
                sliding = self._layers[index]
                ForwardRotation([self._scheme.sliding[index]], sliding.keys.device).one_layer_in_place(
                    sliding.keys, 0, -by
                )
            self._positions_moved = True
        return by

    def reset(self) -> None:
        """Forgets all tokens."""
        super().reset()  # type: ignore[no-untyped-call]
        self._positions_moved, self._chunks, self._first_positions = False, {}, (0,)
        self._begun = False
        self._set_exact(False)
        for layer in self._ours():
            layer.record_past = False

    def offload(self, layer_idx: int, only_non_sliding: bool = True) -> None:
        """Not supported: the cache is small and stays on its device."""
        raise self._not_supported("offloading")

    def prefetch(self, layer_idx: int, only_non_sliding: bool = True) -> None:
        """Not supported: the cache is small and stays on its device."""
        raise self._not_supported("offloading")


def _is_croppable(layer: Any) -> bool:
    # transformers' own layers say so from 5.17 on; before, only recurrent states could not.
    return bool(getattr(layer, "is_croppable", not isinstance(layer, LinearAttentionCacheLayerMixin)))


def _kinds(config: PreTrainedConfig) -> list[tuple[type, int | None]]:
    return [(type(layer), getattr(layer, "sliding_window", None)) for layer in DynamicCache(config=config).layers]


def tensors_of(layer: Any) -> dict[str, torch.Tensor]:
    """The states that a layer holds, ours or one of transformers' own, by name."""
    if isinstance(layer, SinkWindowLayer):
        return layer.tensors()
    states = {}
    for name, value in vars(layer).items():
        for key, state in value.items() if isinstance(value, dict) else [("", value)]:
            if isinstance(state, torch.Tensor):
                states[f"{name}.{key}".rstrip(".")] = state
    return states
