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
from .caller import Call, look_at_caller
from .checks import NO_PADDED_CHUNKS, CallChecks
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
from .layers import RingLayer, StaticSinkWindowLayer
from .live_model import accept, refuse_changed
from .masks import KNOWN_TO, ChunkOffset, RowsOffset, StepOffset, register_mask_functions
from .reference import CannotStream, streaming_error
from .rotary import ForwardRotations
from .state import DeviceStreamState, PerRow, StreamState
from .storage import SharedStorage, share_storage
from .twin import Learned, PositionScheme, learn
from .variants import kinds_of_layers, layers_for

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
            Left-padded rows share one graph, whenever each of them fills up. No `crop`.
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
        self._state: StreamState = DeviceStreamState() if compileable else StreamState()
        self._scheme: PositionScheme | None = None
        self._kinds: list[tuple[type, int | None]] = []  # of layers that transformers has for the model
        self._model_sizes: dict[str, Any] = {}
        self._attention = ""  # the model's attention implementation
        self._looks = True  # at the caller, for the model
        self._measures = False  # whether it is exact on a model, which may be changed on its instance: for `verify`
        self._model: weakref.ref[PreTrainedModel] | None = None  # the text model that last was looked at
        self.fed_text: FedText | None = None
        self._rings: list[RingLayer] = []  # those of the layers that are ours
        # The indices of the first and last layer that take in tokens: of ours, or natively sliding.
        self._first = self._last = 0
        self._checks = CallChecks([], self._state)
        self._step_offset: StepOffset | None = None
        self._chunk_offsets: dict[bool, ChunkOffset] = {}  # of layers that are sliding, and that are not
        self._is_step = False  # the call that is under way is a step of a static ring
        super().__init__(layers=[])
        if config is not None:
            if not isinstance(config, PreTrainedConfig):
                raise TypeError(f"config must be a model's config (model.config), but is a {type(config).__name__}")
            model_class, text_config = class_for_config(config)
            self._make_layers(text_config, _learned_of(model_class, text_config, {})[0])

    # --- layers: they depend on the model, and the model shows itself only when it first uses the cache ---

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
        if self._looks and (model := look_at_caller().model) is not None:
            self.prepare_for(model)

    def _refuse_generate(self) -> None:
        if self._looks:
            calling_model()  # or a refusal

    def _look_if_not_begun(self) -> None:
        # The cache may have been prepared for another model: by config=, or in its life before a reset. What a forward asks
        # first is asked before masks are made, and before recurrent layers keep anything.
        if not torch.compiler.is_compiling() and not self._state.begun:
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
        self._model = weakref.ref(text)

    def _scheme_if_other(self, text: PreTrainedModel) -> PositionScheme | None:
        """How this model uses positions, if the layers are not right for it; None if they are."""
        scheme, known = _learned_of(type(text), text.config, _small_buffers(text))
        if not self._measures:
            refuse_changed(text, known)
        fits = bool(self._layers) and scheme.agrees_with(self._scheme) and self._kinds == kinds_of_layers(text.config)
        return None if fits else scheme

    def _refuse_another_model(self, model: PreTrainedModel | None) -> None:
        """In the middle of a text: its keys rotate in the way of the model that made them."""
        text = None if model is None else text_model(model)
        if text is None or (self._model is not None and self._model() is text):
            return
        if self._scheme_if_other(text) is not None:
            raise ValueError(
                f"this cache holds {self.get_seq_length()} tokens of another model than this {type(text).__name__}. Use one "
                "cache for each model, or call reset()."
            )
        self._model = weakref.ref(text)

    def prepare_to_measure(self, model: PreTrainedModel) -> None:
        """As `prepare_for`, but the model may have been changed on its instance: whether the cache is exact will be seen."""
        self._measures = True
        self.prepare_for(model)

    def prepare(self, config: PreTrainedConfig, scheme: PositionScheme) -> None:
        """Makes the layers for a model of this config, whose positions work as `scheme` says, whoever calls later."""
        self._make_layers(config, scheme)
        self._looks = False

    def _make_layers(self, config: PreTrainedConfig, scheme: PositionScheme) -> None:
        self._layers = layers_for(config, scheme, self.n_sink, self.window, self._state)
        self._rings = [layer for layer in self._layers if isinstance(layer, RingLayer)]
        if self.compileable:
            register_mask_functions()  # before there are graphs, which would be made anew
        self._scheme, self._kinds, self._attention = scheme, kinds_of_layers(config), attention_of(config)
        self._model_sizes = {name: getattr(config, name, None) for name in _MODEL_SIZES}
        self._checks = CallChecks(
            self._layers,
            self._state,
            scheme.takes_masks,
            getattr(config, "max_position_embeddings", None),
            in_chunks=getattr(config, "attention_chunk_size", None) is not None,
        )
        takes_tokens = [isinstance(layer, (RingLayer, DynamicSlidingWindowLayer)) for layer in self._layers]
        self._first = takes_tokens.index(True)
        self._last = len(takes_tokens) - 1 - takes_tokens[::-1].index(True)
        self._show_all_slots(False)

    # --- a call of the model ---

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores the new keys and values of one layer and returns those to attend to; see `RingLayer.update`."""
        is_static_step = self._is_static_step(key_states, layer_idx)
        attended: tuple[torch.Tensor, torch.Tensor]
        if torch.compiler.is_compiling():
            if not is_static_step:
                attended = self._outside_of_graphs(self.update, key_states, value_states, layer_idx, *args, **kwargs)
                return attended
            attended = self._layers[layer_idx].update(key_states, value_states)
        else:
            try:
                is_read = not is_static_step or (layer_idx == self._first and self._checks.must_read_positions())
                if is_read and (layer_idx == self._first or not self._state.unfinished):
                    self._begin_call(key_states, value_states)
                attended = self._layers[layer_idx].update(key_states, value_states, *args, **kwargs)
            except BaseException as reason:
                is_refusal = isinstance(reason, (IndexError, NotImplementedError, TypeError, ValueError))
                # What came in the middle of a layer's work may have left it half-changed. A step may be repeated.
                self._state.unfinished |= not is_refusal and not is_static_step
                self._end_refused_call(layer_idx)
                raise
        if layer_idx == self._last:
            self._end_call(key_states.shape[2], is_static_step or self._is_step)
        elif not is_static_step:
            self._state.unfinished = True
        return attended

    def _is_static_step(self, key_states: torch.Tensor, layer_idx: int) -> bool:
        """Whether a layer takes in one token of a text that has begun, with shapes that never change."""
        is_one_token = self.compileable and key_states.shape[2] == 1
        return (
            is_one_token and self._state.begun and not self._state.unfinished and self._layers[layer_idx].is_initialized
        )

    def _begin_call(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """All that has to be right before the first layer takes in the tokens of a call."""
        if not self._layers and not self.layers:
            raise ValueError(
                "this SinkWindowCache cannot see a transformers model among its callers. Pass "
                "SinkWindowCache(..., config=model.config)."
            )
        state, new_tokens = self._state, key_states.shape[2]
        self._checks.refuse_interrupted()
        if state.recording and (state.padded or len(state.counts) > 1):
            raise NotImplementedError(NO_PADDED_CHUNKS)
        state.hold()
        goes_on = state.begun and new_tokens == 1 and min(state.counts) > 0
        # A ring that is the first to see them checks the tensors of a step itself.
        if not goes_on or self._rings[0] is not self._layers[self._first]:
            self._checks.refuse_other_tensors(key_states, value_states)
        self._is_step = self.compileable and new_tokens == 1 and self._rings[0].is_initialized
        if not goes_on or self.compileable or self._checks.must_read_positions():  # a static step was asked before
            call = look_at_caller(for_model=self._looks)
            if state.fed == 0:
                if state.recording and new_tokens > self.capacity and not state.prompt:
                    raise NotImplementedError(
                        f"the first call after activate_past_recording() has {new_tokens} tokens, and the cache holds "
                        f"{self.capacity}. It cannot know which of them may have to be taken back: feed the prompt before you "
                        "activate recording, or use a larger window."
                    )
                self._begin_text(call)
            else:
                self._refuse_another_model(call.model)
            offsets, self._chunk_offsets = self._chunk_offsets, {}
            self._checks.begin(call, new_tokens, offsets)
        if not self.compileable and state.fed:
            if any(ring.storage is None for ring in self._rings):
                share_storage(self._rings)
            if state.recording and new_tokens > 1:
                for storage in self._storages():
                    storage.record(new_tokens)
        if self._is_step:
            state.let_go()  # a step counts on the devices

    def _begin_text(self, call: Call) -> None:
        prepared = self._layers
        if call.model is not None:
            self.prepare_for(call.model)
        if self._layers is not prepared and self._has_recurrent_layers(self._first):
            raise ValueError(
                "this cache was made for another model, and recurrent layers of this one have used it already. Make a new "
                "SinkWindowCache for each model."
            )

    def _end_call(self, new_tokens: int, is_step: bool) -> None:
        state = self._state
        if is_step and not any(state.skips or ()):
            state.step()
        else:
            state.advance(new_tokens)
        if state.unfinished:
            state.unfinished = False
        if self.compileable and new_tokens > 1:
            self.leave_out_masks_if_full()

    def _end_refused_call(self, layer_idx: int) -> None:
        self._state.let_go()
        if not self._state.fed:
            self._state.forget_start()
        if self._has_recurrent_layers(layer_idx):
            self._state.unfinished = True  # these have taken in the tokens already
        if self._looks and generate_call():
            self._state.recording = False  # which generate() begins anew in each call that needs it

    def _has_recurrent_layers(self, last: int) -> bool:
        """Whether there are layers with a recurrent state up to the one with this index."""
        return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in self._layers[: last + 1])

    # --- masks ---

    def leave_out_masks_if_full(self) -> None:
        """With `compileable=True`: until `reset`, steps are made without masks, if every slot is filled.

        A mask costs attention its fast kernel. Not decided anew at every step, or a graph would be compiled twice in the middle
        of a text: where steps begin before the cache is full, all of them have masks.
        """
        if self.compileable and not self._checks.tokens_until_full():
            self._show_all_slots(True)

    def _show_all_slots(self, all_full: bool) -> None:
        first = self._rings[0]
        self._step_offset = StepOffset(first, all_full) if isinstance(first, StaticSinkWindowLayer) else None

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
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
            self._checks.before_masks(padding_mask_of_caller(), query_length)
            if query_length > 1 and not self.compileable:
                self._expect_prompt(query_length)
            if self.compileable and shows_blocks_of_tokens():
                raise NotImplementedError(
                    "compileable=True is not possible for models that mask images by blocks: transformers looks the tokens of a "
                    "block up by their index in the whole text. Leave compileable out."
                )
            if query_length == 1 and self._state.may_pass(self._rings[0].max_position):
                self._rings[0].check_positions(1)
        return super().get_mask_sizes(query_length, layer_idx)

    def _expect_prompt(self, new_tokens: int) -> None:
        """Notes which tokens of a first call are its prompt, where what comes after it is recorded."""
        recorded = self._state.recording and not self._state.fed and new_tokens > self.capacity
        self._state.prompt = min(prompt_length(), new_tokens) if recorded else 0

    def get_query_offset(self, layer_idx: int = 0) -> int | StepOffset:  # type: ignore[override]
        """The index of the next token in masks."""
        layer = self.layers[layer_idx] if self.layers else None
        if isinstance(layer, RingLayer) and self._state.skips is not None:
            return RowsOffset.of(layer)
        if isinstance(layer, RingLayer) and self._state.chunked:
            if torch.compiler.is_compiling():
                offset: int = self._outside_of_graphs(self.get_query_offset, layer_idx)
                return offset
            self._chunk_offsets[layer.is_sliding] = ChunkOffset.of(layer)
            return self._chunk_offsets[layer.is_sliding]
        if self._step_offset is not None:
            return self._step_offset
        return super().get_query_offset(layer_idx)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen, ever. In a compiled step of a compileable cache: the position of the next token, a tensor."""
        if self.compileable and torch.compiler.is_compiling():
            position: int = self._rings[0].counts.max()  # type: ignore[attr-defined]
            return position
        if self._looks and not self._state.begun and not torch.compiler.is_compiling():
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
        self._state.exact_chunks = True
        try:
            yield
        finally:
            self._state.exact_chunks = False

    @contextmanager
    def _turn(self, skips: PerRow) -> Iterator[None]:
        """Within, calls need no `attention_mask`: masks follow from the length of each row, for rows of any lengths.

        Args:
            skips (`PerRow`): how many of a call's tokens are padding, before the new tokens of each row.

        Raises:
            NotImplementedError: for layers other than ours, which would take in the padding, and for attention implementations
                whose masks have other forms.
        """
        theirs = [type(layer).__name__ for layer in self._layers if not isinstance(layer, RingLayer)]
        if theirs:
            raise NotImplementedError(
                f"rows of different lengths cannot go on in a model with a {theirs[0]}, which would take in their padding. "
                "For natively sliding layers, compileable=True makes layers that can."
            )
        if self._attention not in KNOWN_TO:
            raise NotImplementedError(
                f"rows of different lengths cannot go on with attn_implementation {self._attention!r}: their masks are made for "
                f"{' and '.join(KNOWN_TO)} attention. Use one of these."
            )
        if any(skips) and self._scheme is not None and self._scheme.chronological:
            raise NotImplementedError(
                "rows of different lengths cannot go on in a model that counts its keys (ALiBi), if their new tokens are padded: "
                "it would count the padding. Feed turns of one length, or one row at a time."
            )
        register_mask_functions()
        self._state.skips = skips
        try:
            yield
        finally:
            self._state.skips = None

    # --- copies ---

    def __copy__(self) -> SinkWindowCache:
        copied = type(self).__new__(type(self))
        vars(copied).update(vars(self))  # the same layers and the same stream
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> SinkWindowCache:
        # Copies made in inference mode could not be written to outside of it.
        with torch.inference_mode(False):
            copied = type(self).__new__(type(self))
            memo[id(self)] = copied
            copied.__setstate__(copy.deepcopy(self._parts(), memo))
        return copied

    def __getstate__(self) -> dict[str, Any]:
        parts = self._parts()
        # A view would be pickled with the storage of all layers, once for each of them.
        parts["tensors"] = [{name: tensor.clone() for name, tensor in held.items()} for held in parts["tensors"]]
        return parts

    def _parts(self) -> dict[str, Any]:
        """All that a copy is made of: plain attributes, layers without tensors, their tensors, and what was recorded."""
        return vars(self) | {
            "_model": None,
            "tensors": [ring.tensors() for ring in self._rings],
            "recorded": [storage.overwritten for storage in self._storages()],
        }

    def __setstate__(self, parts: dict[str, Any]) -> None:
        tensors, recorded = parts.pop("tensors"), parts.pop("recorded")
        vars(self).update(parts)
        if self.compileable:
            register_mask_functions()  # perhaps in another process
        for ring, held in zip(self._rings, tensors, strict=True):
            if held:
                ring.replace(held)
        self._state.let_go()
        if recorded:
            share_storage(self._rings)
        for storage, overwritten in zip(self._storages(), recorded, strict=True):
            storage.overwritten = overwritten

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
        self._state.recording = True
        for other in self._layers:
            if not isinstance(other, RingLayer) and hasattr(other, "activate_past_recording"):
                other.activate_past_recording()

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
        state, seen = self._state, self._state.fed
        if not self._rings or not seen:
            return
        if any(
            isinstance(layer, LinearAttentionCacheLayerMixin) and not can_take_back(layer) for layer in self._layers
        ):
            raise self._not_supported("crop of recurrent states")
        if self.compileable:
            raise self._not_supported("crop with compileable=True", _NOT_COMPILEABLE)
        if state.padded:
            raise self._not_supported("crop of padded batches")
        share_storage(self._rings)  # which has what was recorded
        left = seen + tokens_to_remove
        if left < 0:
            raise ValueError(f"crop({tokens_to_remove}) takes back more than the {seen} tokens that there are")
        recorded = min(
            (storage.overwritten[0][0] for storage in self._storages() if storage.has_recorded_until(seen)),
            default=left + 1,
        )
        # Sliding layers of transformers must still hold every key that they need after the crop.
        too_short = any(
            isinstance(layer, DynamicSlidingWindowLayer)
            and layer.keys is not None
            and layer.keys.shape[2] + tokens_to_remove < min(layer.sliding_window - 1, left)
            for layer in self._layers
        )
        if tokens_to_remove and (too_short or (seen > self.capacity and recorded > left)):
            raise ValueError(
                f"crop({tokens_to_remove}) cannot bring back tokens that were evicted meanwhile. Call "
                "activate_past_recording() before feeding tokens that may have to be taken back, and feed no more than "
                f"window = {self.window} of them (in assisted decoding: fewer candidates, or a larger window)."
            )
        for other in self._layers:
            if not isinstance(other, RingLayer) and (tokens_to_remove or getattr(other, "record_past", True)):
                other.crop(tokens_to_remove)
        self.fed_text = None
        for storage in self._storages():
            storage.bring_back(left)
        state.fed = left

    # --- other rows ---

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps these rows of the batch (indices, or a mask), in this order; a row may come several times."""
        rings = [ring for ring in self._rings if ring.is_initialized]
        if not rings or not self._state.fed:
            return
        batch_size = rings[0].values.shape[0]
        rows = torch.arange(batch_size, device=indices.device)[indices]
        for layer in self._layers:
            if not isinstance(layer, RingLayer) or isinstance(layer, LinearAttentionCacheLayerMixin):
                # Not batch_select_indices, which recurrent states do not have, and which fails on a second device.
                layer.reorder_cache(rows)
        self._state.select(rows.tolist())
        self.fed_text = None
        for storage in self._storages():
            storage.select(rows)
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
        positions = self._state.next_positions()
        device = self._rings[0].device if self._rings and self._rings[0].is_initialized else torch.device("cpu")
        if len(positions) == 1:
            # Made on the device: to copy them there would be to wait for it.
            return torch.arange(positions[0], positions[0] + new_tokens, device=device)[None]
        starts = torch.tensor(positions, device="cpu")[:, None]
        return (starts + torch.arange(new_tokens, device="cpu")).to(device)

    def tokens_until_full(self) -> int:
        """How many more tokens until every row of every bounded layer is full, and one-token calls need no mask."""
        self._need_a_model("tokens_until_full()")
        return self._checks.tokens_until_full()

    def tokens_between_rebases(self) -> int:
        """How many tokens may at most be fed from one `rebase()` to the next, before positions go beyond the model's last one."""
        self._need_a_model("tokens_between_rebases()")
        furthest = self._furthest_capacity() + max(0, *self._state.starts)
        return self.max_position - furthest - self.rebase_step

    def _furthest_capacity(self) -> int:
        return max(ring.capacity for ring in self._rings)

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
        text goes on from there. Each row moves by a multiple of `window`, by as much as its own length allows. Call this at
        least `window` tokens after the last time, and each key is rotated once in its life.

        Returns:
            `int`: by how much, in the row that moved furthest. The next tokens' positions are `next_position_ids()`, and the
                positions that `generate()` or `forward()` would count by themselves are wrong from now on.

        Raises:
            ValueError: before a model has used the cache.
            NotImplementedError: for models with layers whose keys it cannot move.
        """
        self._need_a_model("rebase()")
        assert self._scheme is not None
        state, step, capacity, others = (
            self._state,
            self.rebase_step,
            self._furthest_capacity(),
            self.other_layers_to_move(),
        )
        by = tuple(max(0, count - capacity) // step * step for count in state.counts)
        if any(by):
            self._checks.refuse_interrupted()
            windows = [(ring.keys[:, :, ring.n_sink :], ring.rotation) for ring in self._rings]
            windows += [(self._layers[index].keys, self._scheme.sliding[index]) for index in others]
            state.unfinished = True  # until all layers have moved
            rotations = ForwardRotations()
            with torch.inference_mode():  # in which any tensor can be written to
                # One layer at a time, because float32 copies of all keys would be large.
                for keys, rotation in windows:
                    if not rotation.is_identity:
                        rotations.of(rotation, keys.device).move_rows(keys, tuple(-moved for moved in by))
                state.rebase(by)
            for storage in self._storages():
                storage.forget_steps()
            state.unfinished, state.moved = False, True
        return max(by)

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
        self._state.reset()
        self._chunk_offsets, self.fed_text = {}, None
        if self._rings:
            self._show_all_slots(False)

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
        return learn(model_class, config, buffers, _error_of)
    except CannotStream as reason:
        raise NotImplementedError(
            f"SinkWindowCache does not support model type {config.model_type!r} ({model_class.__name__}): {reason}. "
            "Use DynamicCache with this model."
        ) from reason


def _error_of(twin: PreTrainedModel, scheme: PositionScheme) -> float:
    """The relative error of a small cache that believes `scheme`, on a twin."""
    cache = SinkWindowCache(2, 2)
    cache.prepare(twin.config, scheme)
    return streaming_error(twin, cache, 2, 2, tokens=7, masked=scheme.takes_masks)


def position_scheme(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, buffers: dict[str, torch.Tensor]
) -> PositionScheme:
    """How models of this class, config and buffers use positions; see `twin.learn`.

    Raises:
        CannotStream: with the reason.
    """
    return learn(model_class, config, buffers, _error_of)[0]


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
    if isinstance(layer, RingLayer):
        return layer.tensors()
    states = {}
    for name, value in vars(layer).items():
        for key, state in value.items() if isinstance(value, dict) else [("", value)]:
            if isinstance(state, torch.Tensor):
                states[f"{name}.{key}".rstrip(".")] = state
    return states
