"""Refusing a call of a model before its tokens go into the layers.

The cache moves its tokens by counting, so a call that does not continue the text would give wrong text and no error. Such a call
is refused here: after an interrupted forward, with gaps in positions, with padding that is forgotten or not on the left, and with
masks that do not show the sinks. Positions of single tokens are read at the first step of a loop and then at every 64th.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch

from .caller import Call
from .internals import (
    DynamicSlidingWindowLayer,
    calling_model_with_virtual_tokens,
    positions_of_caller,
    virtual_tokens,
)
from .layers import POSITION_LIMIT, RingLayer
from .masks import ChunkOffset
from .ring import evicted_before
from .state import PerRow, StreamState, compact

_READ_EVERY = 64  # steps
NO_PADDED_CHUNKS = "stream() and assisted decoding do not support padded batches."


def left_padding_of(mask: torch.Tensor) -> PerRow:
    """How many zeros each row of a mask `[batch_size, length]` begins with.

    Raises:
        NotImplementedError: if a row has zeros after its first 1.
    """
    real = mask.bool().cpu()
    zeros = (~real).sum(dim=1)
    if torch.equal(real, torch.arange(mask.shape[-1], device="cpu") >= zeros[:, None]):
        return tuple(zeros.tolist())
    if (model := calling_model_with_virtual_tokens()) is not None:
        raise NotImplementedError(
            f"SinkWindowCache does not support padded rows with {virtual_tokens(model)}: PEFT puts virtual tokens before "
            "the pads, and rows must begin with their pads. Generate one row at a time."
        )
    raise NotImplementedError(
        "SinkWindowCache supports left padding only, but attention_mask has zeros after the first token of a row. "
        "Set tokenizer.padding_side = 'left'. If generate() made the mask from a pad token within the text, pass attention_mask."
    )


class CallChecks:
    """Checks the calls of one model on the layers that a cache has for it.

    Args:
        layers (`Sequence[Any]`): all of them, the rings and transformers' own.
        state (`StreamState`): of the cache. Padding and first positions are noted there.
        takes_masks (`bool`): see `PositionScheme`.
        trained_context (`int`, *optional*): how many positions the model was trained on.
        in_chunks (`bool`): some layers attend within chunks of a text, which begin where a row's padding ends.
    """

    def __init__(
        self,
        layers: Sequence[Any],
        state: StreamState,
        takes_masks: bool = True,
        trained_context: int | None = None,
        in_chunks: bool = False,
    ) -> None:
        self.state = state
        self._takes_masks, self._trained_context, self._in_chunks = takes_masks, trained_context, in_chunks
        self._rings = [layer for layer in layers if isinstance(layer, RingLayer)]
        self._sliding = [layer for layer in layers if isinstance(layer, DynamicSlidingWindowLayer)]
        # The dtypes of the first layer's keys and values. Under autocast, those of other layers may differ.
        self._dtypes: tuple[torch.dtype, ...] = ()
        self._masks_unread = self._positions_unread = 0

    # --- when masks are made, before any layer ---

    def before_masks(self, mask: torch.Tensor | None, new_tokens: int) -> None:
        """Checks a call when its masks are made; `mask` is the caller's `attention_mask` `[batch_size, length]`."""
        # Reading a mask waits for the GPU, and a step only adds a one to a mask that was read before.
        state, is_step = self.state, new_tokens == 1 and self.state.begun
        if state.new_pads is not None:
            return self.refuse_interrupted()
        self._masks_unread += int(is_step)
        if not is_step or mask is None or mask.device.type == "cpu" or self._masks_unread >= _READ_EVERY:
            self._masks_unread = 0
            self.note_padding(mask)
        if mask is None and state.padded and not state.begun and not state.fed:
            state.forget_start()  # clears what a refused first call left behind
        if not is_step or self._positions_unread + 1 >= _READ_EVERY:  # now, before recurrent layers take anything in
            self._refuse_images(new_tokens)
        if self._rings[0].is_compileable and new_tokens == 1:
            return  # a static ring hides the empty slots of each row by itself
        self.refuse_interrupted()
        # transformers would hide what is beyond the end of a mask.
        if mask is not None and mask.shape[-1] < state.fed + new_tokens:
            raise ValueError(
                f"attention_mask covers {mask.shape[-1]} of the {state.fed + new_tokens} tokens of the text: pass one for all "
                "that the cache has seen and the new tokens, or none if no row is padded."
            )
        if mask is None and state.padded and self.tokens_until_full():
            raise ValueError(
                "rows of this cache began with padding that is not yet out of sight. Until then every call needs the "
                "attention_mask of the whole text, as the first call did."
            )

    def note_padding(self, mask: torch.Tensor | None) -> None:
        """Learns from a mask `[batch_size, length]` how many pads each row began with; refuses what is not left padding."""
        state = self.state
        if mask is not None and not self._takes_masks:
            raise NotImplementedError(
                "this model makes its attention biases (ALiBi) for all tokens of its attention_mask, and this cache shows fewer. "
                "Leave attention_mask out; padded batches are not possible."
            )
        if mask is None or (not state.padded and mask.all()):
            return
        zeros = left_padding_of(mask)
        if compact(zeros) == state.pads or (not any(zeros) and not self.tokens_until_full()):
            return
        if state.chunks_are_exact:
            raise NotImplementedError(NO_PADDED_CHUNKS)
        # A refused first call may have left the padding of another batch behind.
        for row, (now, before) in enumerate(state.per_row(zeros, state.pads) if state.fed else ()):
            if now != before and (not state.padded or before < state.fed):
                raise ValueError(
                    f"attention_mask now begins with {now} zeros in row {row}, but began with {before} when the cache took in "
                    "its first tokens. Call reset() for another text."
                )
        state.set_pads(zeros)

    # --- when the first layer takes in tokens ---

    def begin(self, call: Call, new_tokens: int, offsets: dict[bool, ChunkOffset]) -> None:
        """Checks a call when its tokens are about to go into the first layer.

        Args:
            call (`Call`): the model, its mask and its positions.
            new_tokens (`int`): how many tokens the call has for each row.
            offsets (`dict[bool, ChunkOffset]`): the offsets from which masks were made, by whether a layer is sliding.
        """
        state = self.state
        self.note_padding(call.padding_mask)
        if state.fed == 0:
            self._begin_text(call, new_tokens)
        self._refuse_gaps(call.position_ids, new_tokens)
        # After this call, the first step of a loop is read.
        self._positions_unread = _READ_EVERY if state.fed == 0 or new_tokens > 1 else 0
        state.recheck_positions, state.begun = False, state.least_after(new_tokens) > 0
        if kinds := {ring.is_sliding for ring in self._rings if ring.needs_sinks_per_query(new_tokens)}:
            if state.padded:
                raise NotImplementedError(NO_PADDED_CHUNKS)
            if not all(kind in offsets and offsets[kind].used for kind in kinds):
                raise NotImplementedError(
                    "stream() and assisted decoding need attn_implementation='sdpa' or 'eager' and no 4-D attention_mask: "
                    "each query sees its own copy of the sinks, and only these masks can say so."
                )

    def _begin_text(self, call: Call, new_tokens: int) -> None:
        if call.generates_without_cache:
            raise ValueError(
                "generate(use_cache=False), which is the default of some models, feeds the whole text at every step. A "
                "cache would take it for new text: pass use_cache=True."
            )
        # In an exact chunk each token sees what the cache holds, and no more.
        dense = not self.state.exact_chunks
        if dense and self._trained_context is not None and new_tokens > self._trained_context:
            warnings.warn(
                f"the first call has {new_tokens:,} tokens, and the model was trained on {self._trained_context:,} "
                "positions. A first call is dense over the whole prompt; generate(..., prefill_chunk_size=n) feeds it "
                "in pieces that attend to no more than the cache holds.",
                stacklevel=4,
            )

    def refuse_interrupted(self) -> None:
        """Refuses a call if the call before did not get through all layers. Only `reset` helps then."""
        if self.state.unfinished:
            raise ValueError(
                "the layers of this cache have seen different numbers of tokens: a forward was interrupted. Call reset()."
            )

    def refuse_other_tensors(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Checks the first layer's tensors before they are stored. That layer may be transformers' own, which checks nothing."""
        first, dtypes = self._rings[0], (key_states.dtype, value_states.dtype)
        first.refuse_gradients(key_states, value_states)
        if key_states.shape[2] != (tokens := value_states.shape[2]):
            raise ValueError(
                f"the model made {key_states.shape[2]} keys of {tokens} new tokens: position_ids must have one position for each "
                f"new token, and none for those that the cache has seen. Pass next_position_ids({tokens})."
            )
        if not self.state.fed:
            self._dtypes = dtypes
            return
        given, expected = (key_states.shape[0], *dtypes), (first.keys.shape[0], *(self._dtypes or dtypes))
        first.refuse_unless_equal(("batch size", "dtype", "value dtype"), given, expected)

    def read_next_positions(self) -> None:
        """A loop begins, of which the first step is read."""
        self._positions_unread = _READ_EVERY

    def must_read_positions(self) -> bool:
        """Counts a step, and returns whether to read its positions. Reading walks up the frames, and waits for the GPU."""
        self._positions_unread += 1
        # After a rebase, a caller might go on with the old positions.
        rebased_on_cpu = any(self.state.rebased) and self._rings[0].device.type == "cpu"
        return self.state.recheck_positions or self._positions_unread >= _READ_EVERY or rebased_on_cpu

    def _refuse_gaps(self, position_ids: torch.Tensor | None, new_tokens: int) -> None:
        """Refuses positions that do not count tokens, because sinks move by the number of evicted tokens."""
        if position_ids is None:
            return
        if position_ids.shape[-1] == 1 < new_tokens:
            raise ValueError(
                f"position_ids has one position for {new_tokens} tokens, and models would give it to every token. Pass "
                f"next_position_ids({new_tokens})."
            )
        has_axes = position_ids.ndim == 3
        # (Qwen3-Omni's positions on several axes are whole numbers in floating point.)
        if position_ids.shape[-1] != new_tokens or (position_ids.is_floating_point() and not has_axes):
            return
        state = self.state
        rows = state.per_row(state.counts, state.new_pads or (0,))
        first = torch.tensor([[count - skip] for count, skip in rows], device="cpu")
        index = torch.arange(new_tokens, device="cpu")
        number = first + index  # the count before each token
        skipped = (number < 0) | (index < torch.tensor([[skip] for _, skip in rows], device="cpu"))
        given = position_ids.cpu()
        if has_axes:
            if ((given != given[:1]) & ~skipped).any():
                raise NotImplementedError(
                    "SinkWindowCache does not support images in this model. The tokens of an image or a video get positions on "
                    "several axes (M-RoPE). They do not count tokens, but this cache moves its sinks by counting tokens. Nothing "
                    "of this call was stored. Texts without images are exact. Use DynamicCache for texts with images."
                )
            given = given[0]
        # A row may begin at any position, because only distances matter.
        now = (given - number).reshape(-1, new_tokens)[:, -1].tolist()
        known = state.starts * (len(now) // len(state.starts) or 1)
        begins = [pads >= state.fed for pads in state.pads] * (len(now) // len(state.pads) or 1)
        starts = compact(tuple(n if begin else k for n, begin, k in zip(now, begins, known, strict=False)))
        counted = number + torch.tensor(starts, device="cpu")[:, None]
        if not ((given == counted) | skipped).all():
            if has_axes:
                raise NotImplementedError(
                    f"SinkWindowCache needs positions that rise by one with every token of a row, from {counted[0, 0]:,} on in "
                    f"this call, but position_ids are {given.flatten()[:8].tolist()}… on every axis. A model with M-RoPE "
                    "remembers how far an image moved positions, also an image of another text, in its attribute rope_deltas. "
                    "Set that to None before a text without images, or use DynamicCache; for another text, call reset()."
                )
            raise NotImplementedError(
                f"SinkWindowCache needs positions that rise by one with every token of a row, from "
                f"{counted[0, 0]:,} on in this call, but position_ids are {given.flatten()[:8].tolist()}… For another "
                "text, call reset(); after stream() of a prompt, generate() needs one token more than was streamed; after "
                "rebase(), use next_position_ids(); images and packed texts are not supported."
            )
        state.starts = starts

    def _refuse_images(self, new_tokens: int) -> None:
        """Refuses positions on several axes that do not count tokens. Other positions are read at the first attention layer."""
        position_ids = positions_of_caller()
        if position_ids is not None and position_ids.ndim == 3:
            self._refuse_gaps(position_ids, new_tokens)

    # --- how far ---

    def tokens_until_full(self) -> int:
        """How many more tokens are needed until every row of every ring is full, and no layer shows pads."""
        least = min(self.state.counts)
        until_full = [-evicted_before(least, capacity) for capacity in {ring.capacity for ring in self._rings}]
        # transformers' own sliding layers may be longer than ours.
        if pads := max(self.state.pads):
            if self._in_chunks:
                return POSITION_LIMIT  # never
            until_full += [pads + layer.sliding_window - 1 - self.state.fed for layer in self._sliding]
        return max(0, *until_full)
