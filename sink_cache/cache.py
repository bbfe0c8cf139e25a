"""`SinkWindowCache`: a transformers `Cache` whose full-attention layers are rings."""

from __future__ import annotations

import operator
import os
import weakref
from collections.abc import Callable
from typing import Any

import torch
from transformers import Cache, PreTrainedConfig, PreTrainedModel

from .caller import Call, look_at_caller
from .checks import NO_PADDED_CHUNKS
from .internals import (
    GivenToGenerate,
    attention_of,
    calling_model,
    calling_model_with_virtual_tokens,
    can_take_back,
    class_for_config,
    generate_call,
    padding_mask_of_caller,
    peft_finds_cache,
    prompt_length,
    shows_blocks_of_tokens,
    text_model,
    virtual_tokens,
    virtual_tokens_in_cache,
)
from .layers import RingLayer
from .masks import SUPPORTED_ATTENTION, ChunkOffset, RowsOffset, StepOffset, register_mask_functions
from .model_scheme import scheme_of, scheme_of_class
from .reference import streaming_error
from .saving import load_stack, save_stack
from .stack import LayerStack
from .storage import share_storage
from .twin import PositionScheme

_NOT_COMPILEABLE = "Leave compileable out."
_NOT_IN_GRAPHS = "SinkWindowCache works outside of graphs: compile the model without fullgraph=True"


class SinkWindowCache(GivenToGenerate, Cache):
    """Attention sinks and a sliding window: a key-value cache of constant size for streams of any length.

    StreamingLLM (Xiao et al., arXiv 2309.17453). Each token attends to the first `n_sink` tokens and to the last `window`
    tokens, itself included. Rotary distances are those inside the cache: kept tokens count as contiguous. Up to
    `n_sink + window` tokens, everything equals `DynamicCache`. In a call with several new tokens, each of them sees the sinks,
    the last `window - 1` cached tokens and the new tokens before it. Tokens that do not fit are dropped after attention. So a
    prompt longer than the cache is dense over the prompt.

    Plain `generate()` numbers tokens for ever, and models compute angles in float32, with any cache. So logits move as positions
    rise: by some 0.2% at 100,000 tokens and 4% at a million. For longer texts use `endless`, or call `rebase()`.

    At the first use, the cache finds and checks the model's rotary embedding. It refuses a model on which it would not be
    exact. Departures from the paper's code: nothing in the model is patched, and a step rotates only the sinks, not all keys.

    Args:
        n_sink (`int`): how many of the first tokens to keep for ever; 0 gives a plain sliding window.
        window (`int`): how many of the last tokens to keep, at least 1. It does *not* include the sinks: the cache holds
            `capacity = n_sink + window` tokens.
        compileable (`bool`): keep all shapes constant and positions on the device, so that decoding steps can be compiled. On
            CUDA, `generate()` then compiles them. Steps have no masks (with `sdpa`) if a prompt, or another call with several
            tokens, has filled the cache. Such steps have their own graph. So have steps after a prompt of fewer than `n_sink`
            tokens, and each combination of sizes, batch size and dtype. Left-padded rows share a graph, whenever each fills up.
            Torch keeps eight graphs for a model (`torch._dynamo.config.recompile_limit`), and runs further ones uncompiled.
            `crop` is not possible.
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
        self._stack = LayerStack(n_sink, window, compileable)
        self._finds_model = True  # by looking at the callers
        self._accepts_changed_model = False  # True for `verify`, which measures whether the cache is exact on the model
        self._model: weakref.ref[PreTrainedModel] | None = None  # the text model that was last seen
        self._chunk_offsets: dict[bool, ChunkOffset] = {}  # by whether the layer is sliding
        self._records_for_generate = False  # whether generate() has activated recording, and not the user
        self._is_step = False  # whether the call that is under way is a step of a static ring
        super().__init__(layers=[])
        if config is not None:
            if not isinstance(config, PreTrainedConfig):
                raise TypeError(f"config must be a model's config (model.config), but is a {type(config).__name__}")
            model_class, text_config = class_for_config(config)
            self._stack.make_layers(text_config, scheme_of_class(model_class, text_config, error_of))

    @property
    def n_sink(self) -> int:
        """How many of the first tokens are kept for ever."""
        return self._stack.n_sink

    @property
    def window(self) -> int:
        """How many of the last tokens are kept."""
        return self._stack.window

    @property
    def capacity(self) -> int:
        """`n_sink + window`."""
        return self._stack.capacity

    @property
    def compileable(self) -> bool:
        """Whether all shapes are constant."""
        return self._stack.compileable

    # --- layers: they depend on the model, which the cache first sees when it is used ---

    @property
    def layers(self) -> list[Any]:
        """One cache layer for each layer of the model; empty until a model has used the cache."""
        if not self._stack.layers:
            self._look_for_the_model()
        return self._stack.layers

    @layers.setter
    def layers(self, layers: list[Any]) -> None:
        self._stack.layers = layers

    @torch.compiler.disable(  # type: ignore[untyped-decorator]
        reason="a SinkWindowCache cannot see the model from inside a full graph: pass SinkWindowCache(..., config=model.config)"
    )
    def _look_for_the_model(self) -> None:
        if self._finds_model and (model := look_at_caller().model) is not None:
            self.prepare_for(model)

    def _begin_generate(self) -> None:
        if self._finds_model:
            calling_model()  # or a refusal
        if self._records_for_generate:  # for the one before, which does not say when it has ended
            self._stop_recording()
        self._stack.checks.read_next_positions()

    def _stop_recording(self) -> None:
        self._stack.stop_recording()
        self._records_for_generate = False

    def _look_if_not_begun(self) -> None:
        # The cache may have been prepared for another model, by config= or before a reset. A forward asks for this before it
        # makes masks, and before its recurrent layers keep anything.
        if not torch.compiler.is_compiling() and not self._stack.state.begun:
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
        """Makes the layers for this model, unless they are there. The first call of a model does this by itself.

        Raises:
            TypeError: if it is no model.
            ValueError: in the middle of a text of another model.
            NotImplementedError: if the model is refused.
        """
        text = text_model(model)
        if self._stack.state.fed:
            return self._refuse_another_model(text)
        attention = attention_of(text.config)
        if self.compileable and attention not in SUPPORTED_ATTENTION:
            raise NotImplementedError(
                f"compileable=True is not possible with attn_implementation {attention!r}. A cache that is not full has empty "
                f"slots, which only the masks of {' and '.join(SUPPORTED_ATTENTION)} attention hide. Use one of these "
                "implementations, or leave compileable out."
            )
        if (scheme := self._scheme_if_other(text)) is not None:
            self._stack.make_layers(text.config, scheme)
        self._model = weakref.ref(text)

    def _scheme_if_other(self, text: PreTrainedModel) -> PositionScheme | None:
        """Returns how this model uses positions if the layers do not fit it, and None if they do."""
        scheme = scheme_of(text, error_of, may_be_changed=self._accepts_changed_model)
        return None if self._stack.fits(text.config, scheme) else scheme

    def _refuse_another_model(self, model: PreTrainedModel | None) -> None:
        """Refuses another model in the middle of a text, because its keys may rotate differently from the cached ones."""
        text = None if model is None else text_model(model)
        if text is None or (self._model is not None and self._model() is text):
            return
        if self._scheme_if_other(text) is not None:
            raise ValueError(
                f"this cache holds {self.get_seq_length()} tokens of another model than this {type(text).__name__}. Use one "
                "cache for each model, or call reset()."
            )
        self._model = weakref.ref(text)

    # --- a call of the model ---

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores one layer's new keys and values, and returns all keys and values to attend to; see `RingLayer.update`."""
        stack, is_static_step = self._stack, self._is_static_step(key_states, layer_idx)
        attended: tuple[torch.Tensor, torch.Tensor]
        if torch.compiler.is_compiling():
            if not is_static_step:
                attended = self._outside_of_graphs(self.update, key_states, value_states, layer_idx, *args, **kwargs)
                return attended
            attended = stack.layers[layer_idx].update(key_states, value_states)
        else:
            try:
                is_read = not is_static_step or (
                    layer_idx == stack.first_attention and stack.checks.must_read_positions()
                )
                if is_read and (layer_idx == stack.first_attention or not stack.state.unfinished):
                    self._begin_call(key_states, value_states)
                attended = stack.layers[layer_idx].update(key_states, value_states, *args, **kwargs)
            except BaseException as reason:
                is_refusal = isinstance(reason, (IndexError, NotImplementedError, TypeError, ValueError))
                # Other exceptions may come in the middle of a layer's work and leave it half-changed. A step may be repeated.
                stack.state.unfinished |= not is_refusal and not is_static_step
                self._end_refused_call(layer_idx)
                raise
        if layer_idx == stack.last_attention:
            self._end_call(key_states.shape[2], is_static_step or self._is_step)
        elif not is_static_step:
            stack.state.unfinished = True
        return attended

    def _is_static_step(self, key_states: torch.Tensor, layer_idx: int) -> bool:
        """Whether a layer takes in one token of a text that has begun, with shapes that never change."""
        stack = self._stack
        if not stack.compileable or key_states.shape[2] != 1:
            return False
        return stack.state.begun and not stack.state.unfinished and bool(stack.layers[layer_idx].is_initialized)

    def _begin_call(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Checks a call and prepares the layers, before the first layer takes in its tokens."""
        if not self.layers:
            raise ValueError(
                "this SinkWindowCache cannot see a transformers model among its callers. Pass "
                "SinkWindowCache(..., config=model.config)."
            )
        stack, new_tokens = self._stack, key_states.shape[2]
        state, checks = stack.state, stack.checks
        checks.refuse_interrupted()
        if state.recording and (state.padded or len(state.counts) > 1):
            raise NotImplementedError(NO_PADDED_CHUNKS)
        state.remember_fed()
        goes_on = state.begun and new_tokens == 1 and min(state.counts) > 0
        # If the first attention layer is a ring, it checks the tensors of a step itself.
        if not goes_on or stack.rings[0] is not stack.layers[stack.first_attention]:
            checks.refuse_other_tensors(key_states, value_states)
        self._is_step = stack.compileable and new_tokens == 1 and stack.rings[0].is_initialized
        if not goes_on or stack.compileable or checks.must_read_positions():  # for a static step, `update` has asked
            call = look_at_caller(for_model=self._finds_model)
            if state.fed == 0:
                if state.recording and new_tokens > self.capacity and not state.prompt_length:
                    raise NotImplementedError(
                        f"the first call after activate_past_recording() has {new_tokens} tokens, and the cache holds "
                        f"{self.capacity}. It cannot know which tokens may have to be taken back. Feed the prompt before you "
                        "activate recording, or use a larger window."
                    )
                self._begin_text(call)
            else:
                self._refuse_another_model(call.model)
            offsets, self._chunk_offsets = self._chunk_offsets, {}
            stack.checks.begin(call, new_tokens, offsets)  # `_begin_text` may have made new checks
        if not stack.compileable and state.fed:
            if any(ring.storage is None for ring in stack.rings):
                share_storage(stack.rings)
            if state.recording and new_tokens > 1:
                for storage in stack.storages():
                    storage.record(new_tokens)
        if self._is_step:
            state.forget_fed()  # a step counts on the devices

    def _begin_text(self, call: Call) -> None:
        stack, prepared = self._stack, self._stack.layers
        if call.model is not None:
            self.prepare_for(call.model)
        if stack.layers is not prepared and stack.has_recurrent_layers(stack.first_attention):
            raise ValueError(
                "this cache was made for another model, and recurrent layers of the calling model have used it already. Make a "
                "new SinkWindowCache for each model."
            )

    def _end_call(self, new_tokens: int, is_step: bool) -> None:
        state = self._stack.state
        if is_step and not any(state.new_pads or ()):
            state.step()
        else:
            state.advance(new_tokens)
        if state.unfinished:
            state.unfinished = False
        if self.compileable and new_tokens > 1:
            self._stack.leave_out_masks_if_full()

    def _end_refused_call(self, layer_idx: int) -> None:
        state = self._stack.state
        state.forget_fed()
        if not state.fed:
            state.forget_start()
        if self._stack.has_recurrent_layers(layer_idx):
            state.unfinished = True  # recurrent layers have taken in the tokens already
        if self._records_for_generate:
            self._stop_recording()

    # --- masks ---

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Returns `(kv_length, kv_offset)` for a layer. transformers asks for them when it makes masks, before any layer runs."""
        if query_length == 0:
            raise ValueError(
                f"this cache has seen {self.get_seq_length()} tokens, and the text has no token more to feed. Give generate() "
                "the whole text so far and at least one new token. For another text, call reset()."
            )
        if torch.compiler.is_compiling() and not (self.compileable and query_length == 1):
            sizes: tuple[int, int] = self._outside_of_graphs(self.get_mask_sizes, query_length, layer_idx)
            return sizes
        if self.layers and not torch.compiler.is_compiling():
            stack = self._stack
            stack.checks.before_masks(padding_mask_of_caller(), query_length)
            if query_length > 1 and not self.compileable:
                self._note_prompt(query_length)
            if self.compileable and shows_blocks_of_tokens():
                raise NotImplementedError(
                    "compileable=True is not possible for models that mask images by blocks: transformers looks the tokens of a "
                    "block up by their index in the whole text. Leave compileable out."
                )
            if query_length == 1 and stack.state.next_step_may_pass(stack.rings[0].max_position):
                stack.rings[0].check_positions(1)
        return super().get_mask_sizes(query_length, layer_idx)

    def _note_prompt(self, new_tokens: int) -> None:
        """Notes how many tokens of a recorded first call are its prompt. Draft candidates follow the prompt."""
        state = self._stack.state
        recorded = state.recording and not state.fed and new_tokens > self.capacity
        state.prompt_length = min(prompt_length(), new_tokens) if recorded else 0

    def get_query_offset(self, layer_idx: int = 0) -> int | StepOffset:  # type: ignore[override]
        """The index of the next token in masks."""
        layer, stack = self.layers[layer_idx] if self.layers else None, self._stack
        if isinstance(layer, RingLayer) and stack.state.new_pads is not None:
            return RowsOffset.of(layer)
        if isinstance(layer, RingLayer) and stack.state.chunks_are_exact:
            if torch.compiler.is_compiling():
                offset: int = self._outside_of_graphs(self.get_query_offset, layer_idx)
                return offset
            self._chunk_offsets[layer.is_sliding] = ChunkOffset.of(layer)
            return self._chunk_offsets[layer.is_sliding]
        if stack.step_offset is not None:
            return stack.step_offset
        return super().get_query_offset(layer_idx)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen, ever. In a compiled step of a compileable cache: the position of the next token, a tensor."""
        if self.compileable and torch.compiler.is_compiling():
            position: int = self._stack.rings[0].counts.max()  # type: ignore[attr-defined]
            return position
        if self._finds_model and not self._stack.state.begun and not torch.compiler.is_compiling():
            self._refuse_virtual_tokens()
        return super().get_seq_length(layer_idx)

    def _refuse_virtual_tokens(self) -> None:
        """Refuses PEFT models that would use another cache, or feed virtual tokens at every step. PEFT asks for this length."""
        if (model := calling_model_with_virtual_tokens()) is None:
            return
        if virtual_tokens_in_cache(method := virtual_tokens(model)):
            raise NotImplementedError(
                f"SinkWindowCache does not support {method}: PEFT puts the virtual tokens into a cache of its own. "
                "Use DynamicCache with this model."
            )
        if not peft_finds_cache(model):
            raise NotImplementedError(
                f"the installed PEFT does not find the cache of the installed transformers. With {method}, it would feed its "
                "virtual tokens at every step. Use a newer PEFT, or transformers before 5.24."
            )

    # A decorator on each method would cost more per call than the method itself.
    @torch.compiler.disable(reason=_NOT_IN_GRAPHS)  # type: ignore[untyped-decorator]
    def _outside_of_graphs(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return method(*args, **kwargs)

    # --- copies ---

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_model": None}  # a copy looks for its model again

    def __copy__(self) -> SinkWindowCache:
        copied = type(self).__new__(type(self))
        vars(copied).update(vars(self))  # the same layers and the same stream
        return copied

    def __bool__(self) -> bool:
        return True  # although it has no layers before a model has used it

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values held, and of the sinks' pristine keys. Constant once the cache is in use."""
        return self._stack.nbytes

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: a stream has no maximum length."""
        return -1

    def __repr__(self) -> str:
        seen = self.get_seq_length() if self._stack.layers else 0
        return f"SinkWindowCache(n_sink={self.n_sink}, window={self.window}, seen={seen}, nbytes={self.nbytes})"

    def _not_supported(self, what: str, instead: str = "Use DynamicCache for that.") -> NotImplementedError:
        return NotImplementedError(f"SinkWindowCache does not support {what}. {instead}")

    # --- going back ---

    def activate_past_recording(self) -> None:
        """Keeps what each call overwrites, until the next `crop`, and makes calls with several tokens exact.

        Assisted decoding uses this to check candidates as if they were fed one at a time. Its first call has the prompt and the
        first candidates. Each prompt token sees the whole prompt before it, as in plain `generate()`. Each candidate sees the
        sinks and its own window. So greedy decoding gives the same text with and without help. Recording that `generate()` has
        activated ends with the next `generate()`. All recording ends with `reset()`.
        """
        if self.compileable:
            raise self._not_supported("assisted decoding with compileable=True", _NOT_COMPILEABLE)
        if not self.layers:
            raise ValueError("activate_past_recording needs a model: pass SinkWindowCache(..., config=model.config).")
        register_mask_functions()
        is_users = self._stack.state.recording and not self._records_for_generate  # and goes on after generate()
        self._records_for_generate = self._finds_model and bool(generate_call()) and not is_users
        self._stack.state.recording = True
        for other in self.layers:
            if not isinstance(other, RingLayer) and hasattr(other, "activate_past_recording"):
                other.activate_past_recording()

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` can put the whole cache back as it was."""
        return all(map(can_take_back, self.layers))

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last `-tokens_to_remove` tokens, as if they had never been fed, and forgets what was recorded.

        Raises:
            ValueError: for a positive number; or if these tokens evicted others while the cache was not recording (see
                `activate_past_recording`).
            NotImplementedError: for padded rows, for recurrent states, and with `compileable=True`.
        """
        try:
            tokens_to_remove = operator.index(tokens_to_remove)  # generate() may count them on the device
        except TypeError:
            raise TypeError(f"crop takes a number of tokens, but got {tokens_to_remove!r}") from None
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes minus the number of tokens to take back, but got {tokens_to_remove}")
        stack = self._stack
        if not stack.rings or not stack.state.fed:
            return
        if not stack.can_take_back_states():
            raise self._not_supported("crop of recurrent states")
        if self.compileable:
            raise self._not_supported("crop with compileable=True", _NOT_COMPILEABLE)
        if stack.state.padded:
            raise self._not_supported("crop of padded batches")
        stack.crop(tokens_to_remove)

    # --- choosing rows ---

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps these rows of the batch (indices, or a mask), in this order; a row may come several times."""
        stack = self._stack
        if stack.rows and stack.state.fed:
            stack.select(torch.arange(stack.rows, device=indices.device)[indices])

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Puts the rows in the order `beam_idx` `[batch_size]`, for beam search."""
        if len(beam_idx) and self.get_seq_length():
            self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each row `repeats` times."""
        rows = torch.arange(self._stack.rows, device="cpu")
        self.batch_select_indices(rows.repeat_interleave(repeats))

    # --- in a file ---

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the cache to a safetensors file; `load` reads it back, in this process or another.

        Raises:
            ValueError: before a model has used the cache.
            FileNotFoundError: if there is no such folder.
            NotImplementedError: for models with layers other than attention.
        """
        save_stack(self._stack, path)

    def load(self, path: str | os.PathLike[str], model: PreTrainedModel) -> None:
        """Replaces the cache's state by that of a file from `save`. The text then goes on as if nothing had happened.

        Args:
            path (`str` or `os.PathLike`): the file.
            model (`PreTrainedModel`): the model that will use the cache. Each state is put on the device of its layer.

        Raises:
            FileNotFoundError, ValueError: if the file is missing, damaged or foreign, or is of a cache of other sizes, of another
                model or of another dtype. The cache then stays as it was.
            NotImplementedError: if the model is refused.
        """
        fresh = type(self)(self.n_sink, self.window, compileable=self.compileable)
        fresh.prepare_for(model)
        load_stack(fresh._stack, path, model)
        vars(self).update(vars(fresh))

    # --- bounded positions ---

    def next_position_ids(self, new_tokens: int = 1) -> torch.Tensor:
        """The `position_ids` for the next call of the model, `[1, new_tokens]`, or `[batch_size, new_tokens]` if padded.

        Only needed after `rebase()`; until then models count positions right by themselves.
        """
        positions, rings = self._stack.state.next_positions(), self._stack.rings
        device = rings[0].device if rings and rings[0].is_initialized else torch.device("cpu")
        if len(positions) == 1:
            # Made on the device, because a copy would wait for it.
            return torch.arange(positions[0], positions[0] + new_tokens, device=device)[None]
        starts = torch.tensor(positions, device="cpu")[:, None]
        return (starts + torch.arange(new_tokens, device="cpu")).to(device)

    def tokens_until_full(self) -> int:
        """How many more tokens until every row of every bounded layer is full, and one-token calls need no mask."""
        self._need_a_model("tokens_until_full()")
        return self._stack.checks.tokens_until_full()

    def tokens_between_rebases(self) -> int:
        """How many tokens may be fed between two calls of `rebase()`, so that the model has a position for each."""
        self._need_a_model("tokens_between_rebases()")
        stack = self._stack
        return stack.max_position - stack.largest_capacity - max(0, *stack.state.starts) - stack.rebase_step

    @property
    def max_position(self) -> int:
        """How many positions the model can tell apart."""
        self._need_a_model("max_position")
        return self._stack.max_position

    @property
    def rebase_step(self) -> int:
        """`rebase` moves by a multiple of this many positions. Feed at least as many tokens between two calls."""
        self._need_a_model("rebase_step")
        return self._stack.rebase_step

    def rebase(self) -> int:
        """Moves the stream back to the lowest position that it can have, for loops that pass their own `position_ids`.

        Rotary attention sees only differences of positions, so the window's keys can be rotated back by any number. Each row
        moves by a multiple of `rebase_step`, as far as its own length allows. If at least `rebase_step` tokens lie between two
        calls, each key is rotated once in its life.

        Returns:
            `int`: by how many positions the furthest row moved. From now on pass `next_position_ids()`, because `generate()`
                and `forward()` would count wrong positions by themselves.

        Raises:
            ValueError: before a model has used the cache.
            NotImplementedError: for models with layers whose keys it cannot move.
        """
        self._need_a_model("rebase()")
        return self._stack.rebase()

    def _need_a_model(self, what: str) -> None:
        if not self.layers:
            raise ValueError(
                f"{what} needs a cache that a model has used, or SinkWindowCache(..., config=model.config)"
            )

    def reset(self) -> None:
        """Forgets all tokens."""
        super().reset()  # type: ignore[no-untyped-call]
        self._stack.reset()
        self._chunk_offsets = {}

    def offload(self, layer_idx: int, only_non_sliding: bool = True) -> None:
        """Not supported: the cache is small and stays on its device."""
        raise self._not_supported("offloading")

    def prefetch(self, layer_idx: int, only_non_sliding: bool = True) -> None:
        """Not supported: the cache is small and stays on its device."""
        raise self._not_supported("offloading")


# --- for the other modules of the package ---


def stack_of(cache: SinkWindowCache) -> LayerStack:
    """The layers and the stream of a cache, on which the package's own loops work."""
    return cache._stack


def cache_to_measure(model: PreTrainedModel, n_sink: int, window: int) -> SinkWindowCache:
    """Makes a cache for `verify`, which also measures models that were changed on their instance."""
    cache = SinkWindowCache(n_sink, window)
    cache._accepts_changed_model = True
    cache.prepare_for(model)
    return cache


def prepare_as(cache: SinkWindowCache, config: PreTrainedConfig, scheme: PositionScheme) -> None:
    """Makes the layers for this config and scheme. From then on the cache does not look for its model."""
    cache._finds_model = False
    cache._stack.make_layers(config, scheme)


def error_of(twin: PreTrainedModel, scheme: PositionScheme) -> float:
    """The relative error of a small cache that believes `scheme`, on a twin; see `twin.learn`."""
    cache = SinkWindowCache(2, 2)
    prepare_as(cache, twin.config, scheme)
    if scheme.plain:
        with cache._stack.exact_chunks(merged=True):
            return streaming_error(twin, cache, 2, 2, tokens=8, chunk_size=5)
    return streaming_error(twin, cache, 2, 2, tokens=7, masked=scheme.takes_masks)
