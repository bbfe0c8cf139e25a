"""What a call of a model is checked for before its tokens go into the layers, and what is known from the calls before.

The cache holds a few tokens of a text and moves them by counting, so a call that does not go on where the last one ended
would give wrong text and no error. All of it is refused here: a forward that was interrupted, positions with gaps, padding
that is not on the left or that is forgotten, masks that do not show the sinks. (Of single tokens after the first, every 64th.)
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from .internals import (
    DynamicSlidingWindowLayer,
    calling_model_with_virtual_tokens,
    calling_tensor,
    generate_call,
    positions_of_caller,
    virtual_tokens,
)
from .masks import ChunkOffset
from .ring import POSITION_LIMIT, SinkWindowLayer
from .static import StaticSinkWindowLayer

_READ_EVERY = 64  # steps


class Calls:
    """The calls on the layers that a cache has for a model: what each must have right, and what is known of the text.

    Args:
        layers (`Sequence[Any]`): all of them, the rings and transformers' own; none before a model is known.
        takes_masks (`bool`): see `PositionScheme`.
        trained_context (`int`, *optional*): the positions that the model was trained on.
        in_chunks (`bool`): some layers attend within chunks of a text, which begin where a row's padding ends.

    Attributes:
        begun (`bool`): there are tokens in the layers, or have been since `reset`; known without waiting for a device.
        first_positions (`tuple[int, ...]`): of the first token, one for each row or one for all.
        positions_moved (`bool`): by a rebase, and the positions of a caller have not been looked at since.
    """

    def __init__(
        self,
        layers: Sequence[Any] = (),
        takes_masks: bool = True,
        trained_context: int | None = None,
        in_chunks: bool = False,
    ) -> None:
        self._takes_masks, self._trained_context, self._in_chunks = takes_masks, trained_context, in_chunks
        attention = [layer for layer in layers if isinstance(layer, (SinkWindowLayer, DynamicSlidingWindowLayer))]
        self._rings = [layer for layer in attention if isinstance(layer, SinkWindowLayer)]
        self._sliding = [layer for layer in attention if isinstance(layer, DynamicSlidingWindowLayer)]
        self.ends = attention[:1] + attention[-1:]
        self._masks_unread = self._positions_unread = 0
        self.reset()

    def reset(self) -> None:
        """Forgets the text."""
        self.begun = self.positions_moved = self._half_done = False
        self.first_positions: tuple[int, ...] = (0,)
        # Of the first layer's keys and values; under autocast, those of others may differ.
        self._dtypes: tuple[torch.dtype, ...] = ()

    def begin(self, new_tokens: int, offsets: dict[bool, ChunkOffset], *, looks: bool) -> None:
        """Tokens are about to go into the first layer.

        Args:
            new_tokens (`int`): how many.
            offsets (`dict[bool, ChunkOffset]`): with which masks were made for layers that are sliding, and that are not.
            looks (`bool`): whether this may be a call of `generate()`.
        """
        seen = self._rings[0].get_seq_length()
        self._note_padding(calling_tensor("attention_mask", {2}, of_models=True))
        if seen == 0:
            config = generate_call().get("generation_config") if looks else None
            if config is not None and not config.use_cache:
                raise ValueError(
                    "generate(use_cache=False), which is the default of some models, feeds the whole text at every step. A "
                    "cache would take it for new text: pass use_cache=True."
                )
            if self._trained_context is not None and new_tokens > self._trained_context:
                warnings.warn(
                    f"the first call has {new_tokens:,} tokens, and the model was trained on {self._trained_context:,} "
                    "positions. A first call is dense over the whole prompt; generate(..., prefill_chunk_size=n) feeds it "
                    "in pieces that attend to no more than the cache holds.",
                    stacklevel=4,
                )
        self._refuse_gaps(positions_of_caller(), seen, new_tokens)
        self._positions_unread = _READ_EVERY if seen == 0 or new_tokens > 1 else 0  # the first step of a loop is read
        self.positions_moved, self.begun = False, True
        if kinds := {ring.is_sliding for ring in self._rings if ring.evicts_within(new_tokens)}:
            if self._rings[0].pads:
                raise NotImplementedError("stream() and assisted decoding do not support padded batches.")
            if not all(kind in offsets and offsets[kind].used for kind in kinds):
                raise NotImplementedError(
                    "stream() and assisted decoding need attn_implementation='sdpa' or 'eager' and no 4-D attention_mask: "
                    "each query sees its own copy of the sinks, and only these masks can say so."
                )

    def refuse_interrupted(self) -> None:
        """Wherever a forward was interrupted, one end of the cache shows it."""
        first, (head, tail) = self._rings[0], self.ends
        if isinstance(first, StaticSinkWindowLayer):
            half_way = first.positions.unfinished  # as one position is that of all
        else:
            half_way = not head.get_seq_length() == first.get_seq_length() == tail.get_seq_length()
        if self._half_done or half_way:
            raise ValueError(
                "the layers of this cache have seen different numbers of tokens: a forward was interrupted. Call reset()."
            )

    @contextmanager
    def changing_layers(self) -> Iterator[None]:
        """Within, layers change one after the other; if something stops that half-way, every later call is refused."""
        begun = self.begun
        self.abandon()
        yield
        self.begun, self._half_done = begun, False

    def abandon(self) -> None:
        """Some layers are ahead of others: every later call is refused, until `reset`."""
        self.begun, self._half_done = False, True  # only steps of a text that has begun go unchecked

    def refuse_other_tensors(self, key_states: torch.Tensor, value_states: torch.Tensor, seen: int) -> None:
        """Of the first layer, before it takes them in; it may be one that is not ours and refuses nothing."""
        first, dtypes = self._rings[0], (key_states.dtype, value_states.dtype)
        first.refuse_gradients(key_states, value_states)
        if not seen:
            self._dtypes = dtypes
            return
        given, expected = (key_states.shape[0], *dtypes), (first.keys.shape[0], *(self._dtypes or dtypes))
        first.refuse_unless_equal(("batch size", "dtype", "value dtype"), given, expected)

    def _refuse_gaps(self, position_ids: torch.Tensor | None, seen: int, new_tokens: int) -> None:
        """Sinks move by the number of evicted tokens, so positions must count tokens."""
        if position_ids is None:
            return
        if position_ids.shape[-1] == 1 < new_tokens:
            raise ValueError(
                f"position_ids has one position for {new_tokens} tokens, and models would give it to all of them: pass "
                f"next_position_ids({new_tokens})."
            )
        has_axes = position_ids.ndim == 3
        # (Qwen3-Omni's positions on several axes are whole numbers in floating point.)
        if position_ids.shape[-1] != new_tokens or (position_ids.is_floating_point() and not has_axes):
            return
        first = self._rings[0]
        pads = torch.tensor(first.pads or (0,), device="cpu")[:, None]
        index = torch.arange(new_tokens, device="cpu") + seen
        counted = index - pads - first.rebased
        given = position_ids.cpu()
        if has_axes:
            if ((given != given[:1]) & (index >= pads)).any():
                raise NotImplementedError(
                    "SinkWindowCache does not support images in this model: it gives the tokens of an image or a video positions "
                    "on several axes (M-RoPE), which do not count tokens, and this cache moves its sinks by a number of tokens. "
                    "Nothing of this call was stored. Texts without images are exact; use DynamicCache for those with images."
                )
            given = given[0]
        # Rows may begin anywhere: what counts are distances.
        starts = (given - counted).reshape(-1, new_tokens)[:, -1].tolist()
        known = self.first_positions * (len(starts) // len(self.first_positions) or 1)
        begins = [seen <= row_pads for row_pads in first.pads or (0,) * len(starts)]
        starts = [now if begin else before for now, begin, before in zip(starts, begins, known, strict=False)]
        first_positions = tuple(starts) if len(set(starts)) > 1 else (starts[0],)
        counted = counted + torch.tensor(first_positions, device="cpu")[:, None]
        if not ((given == counted) | (index < pads)).all():
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
        self.first_positions = first_positions

    def _refuse_images(self, new_tokens: int) -> None:
        """Where the model has positions on several axes. Others are refused when the first layer of attention is called."""
        position_ids = positions_of_caller()
        if position_ids is not None and position_ids.ndim == 3:
            self._refuse_gaps(position_ids, self._rings[0].get_seq_length(), new_tokens)

    def must_read_positions(self) -> bool:
        """Whether to look at the positions of a step: to read them means to walk up the stack, and to wait for a GPU."""
        first = self._rings[0]
        self._positions_unread += 1
        # After a rebase the caller has to know of it.
        often = self._positions_unread >= _READ_EVERY or (first.rebased and first.device.type == "cpu")
        return bool(self.positions_moved or often)

    def tokens_until_full(self) -> int:
        """How many more tokens until every row of every ring is full, and no layer shows pads any more."""
        # A compileable ring waits for the device here, and those of one size would answer the same.
        until_full = [
            -min(ring.evicted_before_query()) for ring in {ring.capacity: ring for ring in self._rings}.values()
        ]
        # transformers' own sliding layers may be longer than ours.
        if pads := max((0, *self._rings[0].pads)):
            if self._in_chunks:
                return POSITION_LIMIT  # never
            seen = self._rings[0].get_seq_length()
            until_full += [pads + layer.sliding_window - 1 - seen for layer in self._sliding]
        return max(0, *until_full)

    def begin_masks(self, mask: torch.Tensor | None, new_tokens: int) -> None:
        """A call begins, and masks are made first; `mask`: the caller's `attention_mask` `[batch_size, length]`."""
        # To read it means to wait for a GPU, and steps only add a one to what was read before.
        first, is_step = self._rings[0], new_tokens == 1 and self.begun
        self._masks_unread += int(is_step)
        if not is_step or mask is None or mask.device.type == "cpu" or self._masks_unread >= _READ_EVERY:
            self._masks_unread = 0
            self._note_padding(mask)
        if not is_step or self._positions_unread + 1 >= _READ_EVERY:  # now, before recurrent layers take anything in
            self._refuse_images(new_tokens)
        if first.is_compileable and new_tokens == 1:
            return  # what follows would wait, too
        self.refuse_interrupted()
        if mask is None and first.pads and not first.get_seq_length():
            self.set_pads(())  # of a call that was refused
        elif mask is None and first.pads and self.tokens_until_full():
            raise ValueError(
                "rows of this cache began with padding that is not yet out of sight, so that every call needs the "
                "attention_mask of the whole text, as the first one did."
            )

    def _note_padding(self, mask: torch.Tensor | None) -> None:
        """Learns from a mask `[batch_size, length]` how many pads each row began with; refuses what is not left padding."""
        if mask is not None and not self._takes_masks:
            raise NotImplementedError(
                "this model makes its attention biases (ALiBi) for all that its attention_mask covers, and not for what this "
                "cache shows. Leave attention_mask out; padded batches are not possible."
            )
        first = self._rings[0]
        if mask is None or (not (pads := first.pads) and mask.all()):
            return
        real = mask.bool().cpu()
        zeros = tuple((~real).sum(dim=1).tolist())
        column = torch.arange(mask.shape[-1], device="cpu")
        if not torch.equal(real, column >= torch.tensor(zeros, device="cpu")[:, None]):
            if (model := calling_model_with_virtual_tokens()) is not None:
                raise NotImplementedError(
                    f"SinkWindowCache does not support padded rows with {virtual_tokens(model)}: PEFT puts virtual tokens before "
                    "the pads, and rows must begin with their pads. Generate one row at a time."
                )
            raise NotImplementedError(
                "SinkWindowCache supports left padding only, and attention_mask has zeros after the first token of a row. "
                "Set tokenizer.padding_side = 'left'."
            )
        seen = first.get_seq_length()
        if zeros == pads or (not any(zeros) and not self.tokens_until_full()):
            return
        if first.is_compileable:
            raise NotImplementedError(
                "SinkWindowCache(compileable=True) does not support padded batches, and attention_mask has zeros. "
                "Leave compileable out."
            )
        if first.exact_chunks or first.record_past:
            raise NotImplementedError("stream() and assisted decoding do not support padded batches.")
        for row, (before, now) in enumerate(zip(pads or (0,) * len(zeros), zeros, strict=False)):
            if seen and now != before and (not pads or before < seen):
                raise ValueError(
                    f"attention_mask now begins with {now} zeros in row {row}, but began with {before} when the cache took in "
                    "its first tokens. Call reset() for another text."
                )
        self.set_pads(zeros)

    def set_pads(self, pads: tuple[int, ...]) -> None:
        """Tells the rings how many pads each row began with."""
        for ring in self._rings:
            ring.pads = pads if any(pads) else ()

    def select(self, rows: torch.Tensor) -> None:
        """Keeps what is known of these rows of the batch (indices), in this order."""
        if pads := self._rings[0].pads:
            self.set_pads(tuple(pads[row] for row in rows.tolist()))
        if len(self.first_positions) > 1:
            self.first_positions = tuple(self.first_positions[row] for row in rows.tolist())
