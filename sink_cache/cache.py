"""`SinkWindowCache`: a transformers `Cache` whose full-attention layers are rings."""

from __future__ import annotations

import copy
import math
import operator
import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import Cache, PreTrainedConfig, PreTrainedModel

from . import saving
from .calls import Calls
from .fed import FedText
from .internals import (
    DynamicSlidingWindowLayer,
    GivenToGenerate,
    LinearAttentionCacheLayerMixin,
    attention_of,
    calling_model,
    calling_model_with_virtual_tokens,
    can_take_back,
    class_for_config,
    finds_cache,
    generate_call,
    padding_mask_of_caller,
    prompt_length,
    shows_blocks_of_tokens,
    text_model,
    virtual_tokens,
    virtual_tokens_in_cache,
)
from .layers import kinds_of_layers, layers_for
from .live_model import accept, refuse_changed
from .masks import KNOWN_TO, ChunkOffset, NoMask, register_mask_functions
from .ring import SharedStorage, SinkWindowLayer, share_storage
from .rotary import move_in_place
from .static import StaticSinkWindowLayer
from .twin import CannotStream, Learned, PositionScheme, learn

_LARGEST_TABLE = 2**20  # numbers in a buffer
_MODEL_SIZES = ("model_type", "hidden_size", "num_attention_heads", "num_key_value_heads")

_NOT_COMPILEABLE = "Leave compileable out."
_NOT_IN_GRAPHS = "SinkWindowCache works outside of graphs: compile the model without fullgraph=True"


class SinkWindowCache(GivenToGenerate, Cache):
    """Attention sinks and a sliding window: a key-value cache of constant size for streams of any length.

    StreamingLLM (Xiao et al., arXiv 2309.17453). Each token attends to the first `n_sink` tokens and to the last `window`
    tokens, itself included, and rotary distances are those inside the cache: kept tokens count as contiguous. While no
    more than `n_sink + window` tokens have been seen, everything equals `DynamicCache`. A call with several new tokens
    lets them see the sinks, the last `window - 1` cached tokens and each other causally, and drops what does not fit after
    attention; so a prompt longer than the cache is dense over the prompt.

    Plain `generate()` numbers tokens for ever, and models compute angles in float32, with any cache. So logits move as positions
    rise: by some 0.2% at 100,000 tokens and 4% at a million. For longer texts use `endless`, or call `rebase()`.

    The model's rotary embedding is found and checked by itself at the first use; a model on which the cache would not be
    exact is refused. Departures from the paper's code: nothing in the model is patched, and instead of rotating all cached
    keys at every step, only the sinks are.

    Args:
        n_sink (`int`): how many of the first tokens to keep for ever; 0 gives a plain sliding window.
        window (`int`): how many of the last tokens to keep, at least 1. It does *not* include the sinks: the cache holds
            `capacity = n_sink + window` tokens.
        compileable (`bool`): keep all shapes constant and positions on the device, so that decoding steps can be compiled;
            `generate()` then does so by itself on CUDA. Where a prompt (or another call with several tokens) fills the
            cache, the steps that follow have no masks (with `sdpa`), and a graph of their own, as those have that follow a
            prompt of less than `n_sink` tokens. Each pair of sizes, batch size and dtype is compiled by itself, too, and
            torch keeps eight graphs for a model (`torch._dynamo.config.recompile_limit`); what is beyond runs uncompiled.
            No padded batches, no `crop`.
        config (`PreTrainedConfig`, *optional*): the model's config. Only needed where the calling model cannot be
            seen, as in a compiled first call.

    Attributes:
        capacity (`int`): `n_sink + window`.
        nbytes (`int`): bytes of all keys and values held, and of the sinks' pristine keys.
        fed_text (`FedText`, *optional*): the end of the text, if `stream` or `endless` fed it; `endless` asks for it.

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
        self._scheme: PositionScheme | None = None
        self._kinds: list[tuple[type, int | None]] = []  # of layers that a DynamicCache has for the model
        self._model_sizes: dict[str, Any] = {}
        self._looks = True
        self._measures = False  # whether it is exact on a model, which may be changed on its instance: for `verify`
        self._prepared_for: weakref.ref[PreTrainedModel] | None = None  # the text model that last was looked at
        self._rings: list[SinkWindowLayer] = []  # those of the layers that are ours
        self._first = 0  # the index of the first layer that takes in tokens: of ours, or natively sliding
        self._calls = Calls()
        self._exact = False
        self._no_mask: NoMask | None = None  # see `leave_out_masks_if_full`
        self.fed_text: FedText | None = None
        self._chunk_offsets: dict[bool, ChunkOffset] = {}  # of layers that are sliding, and that are not
        super().__init__(layers=[])
        if config is not None:
            if not isinstance(config, PreTrainedConfig):
                raise TypeError(f"config must be a model's config (model.config), but is a {type(config).__name__}")
            model_class, text_config = class_for_config(config)
            self._make_layers(text_config, _learned_of(model_class, text_config, {})[0])

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

    def _refuse_generate(self) -> None:
        if self._looks:
            calling_model()  # or a refusal

    def _look_if_not_begun(self) -> None:
        # The cache may have been prepared for another model: by config=, or in its life before a reset. What a forward asks
        # first is asked before masks are made, and before recurrent layers keep anything.
        if not torch.compiler.is_compiling() and not self._calls.begun:
            self._look_for_the_model()

    @property
    def is_sliding(self) -> list[bool]:
        """For each layer, whether it is natively sliding; models ask this first, for their masks."""
        self._look_if_not_begun()
        # As in Cache, whose property the compiler cannot reach through super().
        return [getattr(layer, "is_sliding", False) for layer in self.layers]

    def has_previous_state(self, layer_idx: int | None = None, *args: Any, **kwargs: Any) -> bool:
        """Whether recurrent layers have a state."""
        self._look_if_not_begun()
        return bool(super().has_previous_state(layer_idx, *args, **kwargs))

    def prepare_for(self, model: PreTrainedModel) -> None:
        """Makes the layers for this model, unless they are there; what happens by itself when the model first uses the cache.

        Raises:
            TypeError: if it is no model.
            NotImplementedError: if the model is refused.
        """
        text = text_model(model)
        attention = attention_of(text.config)
        if self.compileable and attention not in KNOWN_TO:
            raise NotImplementedError(
                f"compileable=True is not possible with attn_implementation {attention!r}: a cache that is not full has empty "
                f"slots, which the masks of {' and '.join(KNOWN_TO)} attention hide. Use one of these, or leave compileable out."
            )
        if (scheme := self._scheme_if_other(text)) is not None:
            self._make_layers(text.config, scheme)
        self._prepared_for = weakref.ref(text)

    def _scheme_if_other(self, text: PreTrainedModel) -> PositionScheme | None:
        """How this model uses positions, if the layers are not right for it; None if they are."""
        scheme, known = _learned_of(type(text), text.config, _small_buffers(text))
        if not self._measures:
            refuse_changed(text, known)
        fits = bool(self._layers) and scheme.agrees_with(self._scheme) and self._kinds == kinds_of_layers(text.config)
        return None if fits else scheme

    def _refuse_another_model(self) -> None:
        """In the middle of a text: its keys rotate in the way of the model that made them."""
        model = calling_model() if self._looks else None
        text = None if model is None else text_model(model)
        if text is None or (self._prepared_for is not None and self._prepared_for() is text):
            return
        if self._scheme_if_other(text) is not None:
            raise ValueError(
                f"this cache holds {self.get_seq_length()} tokens of another model than this {type(text).__name__}. Use one "
                "cache for each model, or call reset()."
            )
        self._prepared_for = weakref.ref(text)

    def prepare_to_measure(self, model: PreTrainedModel) -> None:
        """As `prepare_for`, but the model may have been changed on its instance: whether the cache is exact will be seen."""
        self._measures = True
        self.prepare_for(model)

    def prepare(self, config: PreTrainedConfig, scheme: PositionScheme) -> None:
        """Makes the layers for a model of this config, whose positions work as `scheme` says, whoever calls later."""
        self._make_layers(config, scheme)
        self._looks = False

    def _make_layers(self, config: PreTrainedConfig, scheme: PositionScheme) -> None:
        recording = any(ring.record_past for ring in self._rings)
        self._layers = layers_for(config, scheme, self.n_sink, self.window, compileable=self.compileable)
        self._rings = [layer for layer in self._layers if isinstance(layer, SinkWindowLayer)]
        for ring in self._rings:
            ring.exact_chunks, ring.record_past = self._exact, recording
        self._no_mask = None
        if self.compileable:
            register_mask_functions()  # before there are graphs, which would be made anew
        self._scheme, self._kinds = scheme, kinds_of_layers(config)
        self._model_sizes = {name: getattr(config, name, None) for name in _MODEL_SIZES}
        self._calls = Calls(
            self._layers,
            scheme.takes_masks,
            getattr(config, "max_position_embeddings", None),
            in_chunks=getattr(config, "attention_chunk_size", None) is not None,
        )
        self._first = self._layers.index(self._calls.ends[0])

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores the new keys and values of one layer and returns those to attend to; see `SinkWindowLayer.update`."""
        layers = self._layers
        attended: tuple[torch.Tensor, torch.Tensor]
        is_static_step = (
            (self.compileable and key_states.shape[2] == 1 and self._calls.begun and layers[layer_idx].is_initialized)
            and not layers[self._first].positions.unfinished
            and (torch.compiler.is_compiling() or layer_idx != self._first or not self._calls.must_read_positions())
        )
        if torch.compiler.is_compiling():
            if is_static_step:
                attended = layers[layer_idx].update(key_states, value_states)
            else:
                attended = self._outside_of_graphs(self.update, key_states, value_states, layer_idx, *args, **kwargs)
            return attended
        try:
            layer = layers[layer_idx] if is_static_step else self._layer_for(key_states, value_states, layer_idx)
            attended = layer.update(key_states, value_states, *args, **kwargs)
        except BaseException:
            self._end_refused_call(layer_idx)
            raise
        if self.compileable and key_states.shape[2] > 1 and layer is self._rings[-1]:
            self.leave_out_masks_if_full()
        return attended

    def _layer_for(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int) -> Any:
        """The layer that takes in these tokens, when all has been done that comes before."""
        if not self._layers and not self.layers:
            raise ValueError(
                "this SinkWindowCache cannot see a transformers model among its callers. Pass "
                "SinkWindowCache(..., config=model.config)."
            )
        if layer_idx == self._first or not self._calls.begun:
            self._begin_call(key_states, value_states)
        layer = self._layers[layer_idx]
        if not self.compileable and isinstance(layer, SinkWindowLayer) and layer.storage is None and layer.position:
            share_storage(self._rings)
        return layer

    def _begin_call(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """All that has to be right before the first layer takes in the tokens of a call."""
        first, new_tokens = self._rings[0], key_states.shape[2]
        seen = first.get_seq_length()
        self._calls.refuse_interrupted()
        is_step = seen > max((0, *first.pads)) and new_tokens == 1
        # A ring that is the first to see them checks the tensors of a step itself.
        if not is_step or first is not self._layers[self._first]:
            self._calls.refuse_other_tensors(key_states, value_states, seen)
        if is_step and not self.compileable and not self._calls.must_read_positions():  # else `update` has asked
            return
        if seen == 0:
            prepared, pads = self._layers, first.pads
            self._look_for_the_model()
            if self._layers is not prepared and self._has_recurrent_layers(self._first):
                raise ValueError(
                    "this cache was made for another model, and recurrent layers of this one have used it already. Make a new "
                    "SinkWindowCache for each model."
                )
            self._calls.set_pads(pads)
        else:
            self._refuse_another_model()
        offsets, self._chunk_offsets = self._chunk_offsets, {}
        self._calls.begin(new_tokens, offsets, looks=self._looks)
        if self._rings[0].record_past:
            self._record(new_tokens)

    def _has_recurrent_layers(self, last: int) -> bool:
        return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in self._layers[: last + 1])

    def _end_refused_call(self, layer_idx: int) -> None:
        if self._has_recurrent_layers(layer_idx):
            self._calls.abandon()  # these have taken in the tokens already
        if self._looks and generate_call():
            self._stop_recording()  # which generate() begins anew in each call that needs it

    def leave_out_masks_if_full(self) -> None:
        """With `compileable=True`: until `reset`, steps are made without masks, if every slot is filled.

        A mask costs attention its fast kernel. Not decided anew at every step, or a graph would be compiled twice in the middle
        of a text: where steps begin before the cache is full, all of them have masks.
        """
        first = self._rings[0]
        if isinstance(first, StaticSinkWindowLayer) and not self._calls.tokens_until_full():
            self._no_mask = NoMask(first)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, Any]:
        """Returns `(kv_length, kv_offset)` for a layer; called by the mask-building code before any layer runs."""
        if query_length == 0:
            raise ValueError(
                f"this cache has seen {self.get_seq_length()} tokens, and the text has no token more to feed. generate() needs "
                "the whole text so far and at least one new token; for another text, call reset()."
            )
        if torch.compiler.is_compiling() and not (self.compileable and query_length == 1):
            sizes: tuple[int, int] = self._outside_of_graphs(self.get_mask_sizes, query_length, layer_idx)
            return sizes
        if self.layers and not torch.compiler.is_compiling():
            self._calls.begin_masks(padding_mask_of_caller(), query_length)
            if query_length > 1 and not self.compileable:
                self._expect_prompt(query_length)
            if self.compileable and shows_blocks_of_tokens():
                raise NotImplementedError(
                    "compileable=True is not possible for models that mask images by blocks: transformers looks the tokens of a "
                    "block up by their index in the whole text. Leave compileable out."
                )
        return super().get_mask_sizes(query_length, layer_idx)

    def _expect_prompt(self, new_tokens: int) -> None:
        """Tells the rings which tokens of a first call are its prompt, where what comes after it is recorded."""
        recorded = self._rings[0].record_past and not self.get_seq_length()
        prompt = min(prompt_length(), new_tokens) if recorded and new_tokens > self.capacity else 0
        for ring in self._rings:
            ring.prompt = prompt

    def get_query_offset(self, layer_idx: int = 0) -> int | torch.Tensor | NoMask:  # type: ignore[override]
        """The index of the next token in masks."""
        layer = self.layers[layer_idx] if self.layers else None
        if isinstance(layer, SinkWindowLayer) and (layer.exact_chunks or layer.record_past):
            if torch.compiler.is_compiling():
                offset: int = self._outside_of_graphs(self.get_query_offset, layer_idx)
                return offset
            self._chunk_offsets[layer.is_sliding] = ChunkOffset.of(layer)
            return self._chunk_offsets[layer.is_sliding]
        if self._no_mask is not None:
            return self._no_mask
        if isinstance(layer, StaticSinkWindowLayer):
            return layer.get_query_offset()
        return super().get_query_offset(layer_idx)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen, ever. In a compiled step of a compileable cache: the position of the next token, a tensor."""
        if self.compileable and torch.compiler.is_compiling():
            position: int = self._layers[self._first].get_query_offset()
            return position
        if self._looks and not self._calls.begun and not torch.compiler.is_compiling():
            self._refuse_virtual_tokens()
        return super().get_seq_length(layer_idx)

    def _refuse_virtual_tokens(self) -> None:
        """Where PEFT would use another cache, or feed its virtual tokens again and again; it asks for the length before."""
        if (model := calling_model_with_virtual_tokens()) is None:
            return
        if virtual_tokens_in_cache(method := virtual_tokens(model)):
            raise NotImplementedError(
                f"SinkWindowCache does not support {method}: PEFT puts the virtual tokens into a cache of its own. "
                "Use DynamicCache with this model."
            )
        if not finds_cache(model):
            raise NotImplementedError(
                f"this PEFT does not find the cache of this transformers, and so in {method} it would feed its virtual tokens at "
                "every step. Use a newer PEFT, or transformers before 5.24."
            )

    # Applied to the methods themselves, the decorator would cost more at every call than all else that they do.
    @torch.compiler.disable(reason=_NOT_IN_GRAPHS)  # type: ignore[untyped-decorator]
    def _outside_of_graphs(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return method(*args, **kwargs)

    @contextmanager
    def exact_chunks(self) -> Iterator[None]:
        """Within, each token of a call with several sees exactly what it would see if fed alone; see `streaming.stream`."""
        register_mask_functions()
        self._set_exact(True)
        try:
            yield
        finally:
            self._set_exact(False)

    def _set_exact(self, exact: bool) -> None:
        self._exact = exact
        for ring in self._rings:
            ring.exact_chunks = exact

    def __deepcopy__(self, memo: dict[int, Any]) -> SinkWindowCache:
        # Copies made in inference mode could not be written to outside of it.
        with torch.inference_mode(False):
            copied = type(self).__new__(type(self))
            memo[id(self)] = copied
            copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return copied

    def __getstate__(self) -> dict[str, Any]:
        # A weak reference cannot be pickled; a copy looks at its model when it is used.
        return vars(self) | {"_prepared_for": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if self.compileable:
            register_mask_functions()  # perhaps in another process
        for storage in self._storages():
            storage.hold_again()

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

    def _not_supported(self, what: str, instead: str = "Use DynamicCache for that.") -> NotImplementedError:
        return NotImplementedError(f"SinkWindowCache does not support {what}. {instead}")

    # --- going back ---

    def activate_past_recording(self) -> None:
        """From now on keeps what each call overwrites until the next `crop`, and makes calls with several tokens exact.

        For assisted decoding: candidates are checked as if they had been fed one at a time. Its first call has the prompt and
        the first candidates. There each token of the prompt sees the whole prompt before it, as in plain `generate()`, and
        each candidate sees the sinks and its own window. So greedy decoding gives the same text with and without help.
        """
        if self.compileable:
            raise self._not_supported("assisted decoding with compileable=True", _NOT_COMPILEABLE)
        if not self.layers:
            raise ValueError("activate_past_recording needs a model: pass SinkWindowCache(..., config=model.config).")
        register_mask_functions()
        for ring in self._rings:
            ring.record_past = True
        for other in self._layers:
            if not isinstance(other, SinkWindowLayer) and hasattr(other, "activate_past_recording"):
                other.activate_past_recording()

    def _stop_recording(self) -> None:
        for layer in self._layers:
            if hasattr(layer, "record_past"):
                layer.record_past = False

    def _record(self, new_tokens: int) -> None:
        first = self._rings[0]
        position = first.position
        if position == 0 or new_tokens == 1:
            if new_tokens > self.capacity and not first.prompt:
                raise NotImplementedError(
                    f"the first call after activate_past_recording() has {new_tokens} tokens, and the cache holds "
                    f"{self.capacity}. It cannot know which of them may have to be taken back: feed the prompt before you "
                    "activate recording, or use a larger window."
                )
            return  # nothing is overwritten, or the layers record it themselves; single tokens are recorded by their storage
        share_storage(self._rings)
        for storage in self._storages():
            storage.record(position, new_tokens)

    def _storages(self) -> list[SharedStorage]:
        return list(dict.fromkeys(ring.storage for ring in self._rings if ring.storage is not None))

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` can put the whole cache back as it was."""
        return all(map(can_take_back, self.layers))

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last tokens (a number <= 0), as if they had never been fed; and what was recorded is forgotten.

        Raises:
            ValueError: for a positive number; or if tokens were evicted for those to be taken back, and the cache was not
                recording (`activate_past_recording`) when they came.
            NotImplementedError: for padded rows, for recurrent states, and with `compileable=True`.
        """
        try:
            tokens_to_remove = operator.index(tokens_to_remove)  # generate() may count them on the device
        except TypeError:
            raise TypeError(f"crop takes a number of tokens, but got {tokens_to_remove!r}") from None
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes minus the number of tokens to take back, but got {tokens_to_remove}")
        if not self._rings or not self._rings[0].position:
            return
        first = self._rings[0]
        if any(
            isinstance(layer, LinearAttentionCacheLayerMixin) and not can_take_back(layer) for layer in self._layers
        ):
            raise self._not_supported("crop of recurrent states")
        if not first.is_croppable:
            if self.compileable:
                raise self._not_supported("crop with compileable=True", _NOT_COMPILEABLE)
            raise self._not_supported("crop of padded batches")
        seen, position = first.get_seq_length(), first.position + tokens_to_remove
        share_storage(self._rings)  # which has what was recorded
        if seen + tokens_to_remove < 0:
            raise ValueError(f"crop({tokens_to_remove}) takes back more than the {seen} tokens that there are")
        recorded = min(
            (
                start
                for storage in self._storages()
                if storage.has_recorded_until(first.position)
                for start, *_ in storage.overwritten
            ),
            default=position + 1,
        )
        # Of transformers' own sliding layers: that what they show after it is there.
        too_short = any(
            isinstance(layer, DynamicSlidingWindowLayer)
            and layer.keys is not None
            and layer.keys.shape[2] + tokens_to_remove < min(layer.sliding_window - 1, seen + tokens_to_remove)
            for layer in self._layers
        )
        if tokens_to_remove and (too_short or (seen > self.capacity and recorded > position)):
            raise ValueError(
                f"crop({tokens_to_remove}) cannot bring back tokens that were evicted meanwhile. Call "
                "activate_past_recording() before feeding tokens that may have to be taken back, and feed no more than "
                f"window = {self.window} of them (in assisted decoding: fewer candidates, or a larger window)."
            )
        for other in self._layers:
            if not isinstance(other, SinkWindowLayer) and (tokens_to_remove or getattr(other, "record_past", True)):
                other.crop(tokens_to_remove)
        self.fed_text = None
        for storage in self._storages():
            storage.bring_back(position)
        for ring in self._rings:
            ring.position = position

    # --- other rows ---

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps these rows of the batch (indices, or a mask), in this order; a row may come several times."""
        rings = [ring for ring in self._rings if ring.is_initialized]
        if not rings or not rings[0].position:
            return
        batch_size = rings[0].values.shape[0]
        rows = torch.arange(batch_size, device=indices.device)[indices]
        for layer in self._layers:
            if not isinstance(layer, SinkWindowLayer) or isinstance(layer, LinearAttentionCacheLayerMixin):
                # Not batch_select_indices, which recurrent states do not have, and which fails on a second device.
                layer.reorder_cache(rows)
        self._calls.select(rows)
        self.fed_text = None
        for storage in self._storages():
            storage.select(rows.to(storage.keys.device))
        for ring in rings:
            if ring.storage is None:
                with torch.inference_mode(False):
                    there = rows.to(ring.device)
                    ring.replace({name: tensor.index_select(0, there) for name, tensor in ring.tensors().items()})

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Rows in the order `beam_idx` `[batch_size]`, for beam search."""
        if len(beam_idx) and self.get_seq_length():
            self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times."""
        first = next((ring for ring in self._rings if ring.is_initialized), None)
        if first is not None:
            rows = torch.arange(first.values.shape[0], device=first.device)
            self.batch_select_indices(rows.repeat_interleave(repeats))

    # --- in a file ---

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the cache to a safetensors file; `load` reads it back, in this process or another.

        Raises:
            ValueError: before a model has used the cache.
            FileNotFoundError: if there is no such folder.
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
        if not self._rings or not self._rings[0].is_initialized:
            return torch.arange(new_tokens, device="cpu")[None]
        first, begins = self._rings[0], self._calls.first_positions
        if not first.pads and len(begins) == 1:
            # Made on the device: to copy them there would be to wait for it.
            start = begins[0] + first.position
            return torch.arange(start, start + new_tokens, device=first.device)[None]
        pads = torch.tensor(first.pads or (0,), device="cpu")
        starts = torch.tensor(begins, device="cpu") - pads + first.position
        return (starts[:, None] + torch.arange(new_tokens, device="cpu")).to(first.device)

    def tokens_until_full(self) -> int:
        """How many more tokens until every row of every bounded layer is full, and one-token calls need no mask."""
        self._need_a_model("tokens_until_full()")
        return self._calls.tokens_until_full()

    def tokens_between_rebases(self) -> int:
        """How many tokens may at most be fed from one `rebase()` to the next, before positions go beyond the model's last one."""
        self._need_a_model("tokens_between_rebases()")
        furthest = max(ring.capacity for ring in self._rings) + max((0, *self._rings[0].pads))
        return self.max_position - furthest - self.rebase_step

    @property
    def max_position(self) -> int:
        """How many positions the model can tell apart."""
        self._need_a_model("max_position")
        return min(ring.max_position for ring in self._rings)

    @property
    def rebase_step(self) -> int:
        """By a multiple of this many positions `rebase` moves; and that many tokens should lie between two calls."""
        self._need_a_model("rebase_step")
        return math.lcm(*{ring.window for ring in self._rings})

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
        self._need_a_model("rebase()")
        assert self._scheme is not None
        first, others = self._rings[0], self.other_layers_to_move()
        furthest = max(ring.capacity for ring in self._rings)
        by = max(0, first.position - furthest - max((*first.pads, 0))) // self.rebase_step * self.rebase_step
        if by:
            self._calls.refuse_interrupted()
            windows = [(ring.keys[:, :, ring.n_sink :], ring.rotation) for ring in self._rings]
            windows += [(self._layers[index].keys, self._scheme.sliding[index]) for index in others]
            with self._calls.changing_layers(), torch.inference_mode():  # in which any tensor can be written to
                move_in_place(windows, -by)
                for ring in self._rings:
                    ring.lower_positions(by)
            for storage in self._storages():
                storage.forget_steps()
            self._calls.positions_moved = True
        return by

    def other_layers_to_move(self) -> list[int]:
        """The indices of transformers' own sliding layers, whose keys `rebase` moves, too.

        Raises:
            NotImplementedError: if it cannot move the keys of some of them.
        """
        sliding = [i for i, layer in enumerate(self._layers) if isinstance(layer, DynamicSlidingWindowLayer)]
        unknown = [index for index in sliding if self._scheme is None or index not in self._scheme.sliding]
        if unknown:
            raise NotImplementedError(f"rebase() cannot move the keys of the sliding layers {unknown} of this model")
        return sliding

    def _need_a_model(self, what: str) -> None:
        if not self.layers:
            raise ValueError(
                f"{what} needs a cache that a model has used, or SinkWindowCache(..., config=model.config)"
            )

    def reset(self) -> None:
        """Forgets all tokens."""
        super().reset()  # type: ignore[no-untyped-call]
        self._calls.reset()
        self._chunk_offsets, self._no_mask, self.fed_text = {}, None, None
        self._set_exact(False)
        self._stop_recording()

    def offload(self, layer_idx: int, only_non_sliding: bool = True) -> None:
        """Not supported: the cache is small and stays on its device."""
        raise self._not_supported("offloading")

    def prefetch(self, layer_idx: int, only_non_sliding: bool = True) -> None:
        """Not supported: the cache is small and stays on its device."""
        raise self._not_supported("offloading")


def accept_as_it_is(model: PreTrainedModel) -> None:
    """From now on, what was changed on the instance of this model is no reason to refuse it: it has been verified."""
    text = text_model(model)
    accept(text, _learned_of(type(text), text.config, _small_buffers(text))[1])


def _learned_of(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, buffers: dict[str, torch.Tensor]
) -> Learned:
    """What `learn` returns, with a refusal that users can read."""
    try:
        return learn(model_class, config, buffers)
    except CannotStream as reason:
        raise NotImplementedError(
            f"SinkWindowCache does not support model type {config.model_type!r} ({model_class.__name__}): {reason}. "
            "Use DynamicCache with this model."
        ) from reason


def _small_buffers(text: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Rotations live in buffers such as inv_freq; larger ones are something else."""
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
