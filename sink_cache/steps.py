"""Reading and stepping: what `endless` and `StreamPool` do with a model, piece by piece and step by step."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from transformers import CompileConfig, GenerationConfig, PreTrainedModel

from .cache import SinkWindowCache, stack_of
from .checks import left_padding_of
from .internals import compiled_forward, would_compile
from .rows import pause_rows

# Rebasing costs a few small kernels a layer; a small window need not pay for them every few tokens.
_REBASE_EVERY = 1024


def steps_between_rebases(cache: SinkWindowCache) -> int:
    """How many steps to make from one rebase to the next."""
    return max(cache.rebase_step, min(_REBASE_EVERY, cache.tokens_between_rebases()))


def read(
    model: PreTrainedModel,
    cache: SinkWindowCache,
    input_ids: torch.Tensor,
    piece_size: int | None,
    kwargs: dict[str, Any],
    *,
    mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
) -> Iterator[torch.Tensor]:
    """Reads tokens into a cache, which may be empty.

    Args:
        input_ids (`torch.Tensor`): `[batch_size, tokens]`.
        piece_size (`int`, *optional*): how many tokens to read in one forward; all of them by default.
        kwargs (`dict[str, Any]`): keyword arguments of every call of the model, with the cache.
        mask (`torch.Tensor`, *optional*): the padding mask of the text, `[batch_size, length]`, if any row is padded.
        position_ids (`torch.Tensor`, *optional*): the positions of a text's first tokens, `[batch_size, tokens]`.

    Yields:
        `torch.Tensor`: after each piece the logits of its last token, `[batch_size, vocab_size]`.

    Raises:
        ValueError, NotImplementedError: after the first piece of a text, if this cache cannot be rebased.
    """
    if cache.get_seq_length():
        yield from _read_turn(model, cache, input_ids, piece_size, kwargs, mask)
        return
    for part in pieces(input_ids.shape[1], piece_size):
        positions = cache.next_position_ids(part.stop - part.start) if position_ids is None else position_ids[..., part]
        positions = positions.to(input_ids.device)
        seen = None if mask is None else mask[:, : part.stop]
        logits = model(input_ids[:, part], attention_mask=seen, position_ids=positions, **kwargs).logits
        if part.start == 0:
            _refuse_if_it_cannot_rebase(cache)  # now, and not only when the cache is full
        yield logits[:, -1]


def _read_turn(
    model: PreTrainedModel,
    cache: SinkWindowCache,
    input_ids: torch.Tensor,
    piece_size: int | None,
    kwargs: dict[str, Any],
    mask: torch.Tensor | None,
) -> Iterator[torch.Tensor]:
    """Reads further tokens of the rows, which may have been padded before and may be padded now."""
    padding = (0,) if mask is None else left_padding_of(mask[:, -input_ids.shape[1] :])
    pads = torch.tensor(padding, device="cpu")[:, None]
    cache.rebase()  # so that there are positions for the whole turn
    rows_differ = mask is not None or stack_of(cache).state.padded
    for part in pieces(input_ids.shape[1], piece_size):
        length = part.stop - part.start
        new_pads = (pads - part.start).clamp(0, length)
        index = (torch.arange(length, device="cpu") - new_pads).clamp(min=0).to(input_ids.device)
        positions = cache.next_position_ids().to(input_ids.device) + index
        with stack_of(cache).rows_of_any_length(tuple(new_pads.flatten().tolist())) if rows_differ else nullcontext():
            logits = model(input_ids[:, part], position_ids=positions, **kwargs).logits
        yield logits[:, -1]


def pieces(length: int, piece_size: int | None) -> list[slice]:
    """The slices of a text that are read in one forward each."""
    size = piece_size or length
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _refuse_if_it_cannot_rebase(cache: SinkWindowCache) -> None:
    stack_of(cache).other_layers_to_move()
    if cache.tokens_between_rebases() < cache.rebase_step:
        raise ValueError(
            f"this cache moves by {cache.rebase_step:,} positions at a time, and the model has too few positions for that. "
            "Choose a smaller window. With compileable=True, let it divide the model's sliding window, or be divided by it."
        )


class Step:
    """Runs steps of a full cache, whose shapes never change: compiled where `generate()` would, and captured in a CUDA graph.

    The graph is our own, and not one of `mode="reduce-overhead"`. Before it replays a graph, the compiler checks the model, and
    that takes the host longer than a small model's step takes the GPU. With a `compile_config`, there is no graph of our own.

    Args:
        kwargs (`dict[str, Any]`): keyword arguments of every call of the model, with the cache.
        running (`torch.Tensor`, *optional*): int64 `[rows]`, 1 for rows that run in a step, and 0 for rows that pause. The next
            token of a paused row overwrites what the step stored.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cache: SinkWindowCache,
        rows: int,
        device: torch.device,
        config: GenerationConfig,
        kwargs: dict[str, Any],
        running: torch.Tensor | None = None,
    ) -> None:
        self.cache, self.kwargs, self.running = cache, kwargs, running
        with torch.inference_mode(False):  # tensors that are made in it could not be written to outside of it
            self.positions = cache.next_position_ids().expand(rows, -1).to(device).clone()
            self.tokens = torch.zeros_like(self.positions)
        self.forward: Any = model.__call__
        self.warm_up = 3  # how many calls come before the graph is captured
        self.captures = False
        self.is_compiled = would_compile(model, cache, config)
        if self.is_compiled:
            own = config.compile_config is None and {p.device.type for p in model.parameters()} == {"cuda"}
            self.forward = compiled_forward(model, CompileConfig(mode="default") if own else config.compile_config)
            self.captures = own and len({p.device for p in model.parameters()}) == 1
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """Feeds one token of each row, `[rows, 1]`; returns logits `[rows, vocab_size]`, valid until the next call."""
        if tokens is not self.tokens:
            self.tokens.copy_(tokens)
        if self.captures and self.warm_up == 0:
            self._capture()
        if self.graph is None:
            logits = self._run()
        else:
            self.graph.replay()
            logits = self.logits
        # Last, because a call that failed, or was interrupted while it compiled, may have compiled nothing.
        self.warm_up -= 1
        return logits

    @property
    def is_settled(self) -> bool:
        """Whether nothing is left to be compiled or captured."""
        return not self.is_compiled or self.warm_up < 0

    def with_masks(self, tokens: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Runs one step while any row is not full. Such a step needs a mask."""
        self.tokens.copy_(tokens)
        stack = stack_of(self.cache)
        own_masks = stack.state.padded and mask is None
        with stack.rows_of_any_length() if own_masks else nullcontext():
            return self._run(**({} if mask is None else {"attention_mask": _up_to_now(mask, self.cache)}))

    def rebase(self) -> None:
        """Moves the rows back; see `SinkWindowCache.rebase`."""
        if self.cache.rebase():
            self.positions.copy_(self.cache.next_position_ids())

    def _run(self, **more: Any) -> torch.Tensor:
        outputs = self.forward(input_ids=self.tokens, position_ids=self.positions, **self.kwargs, **more)
        if self.running is None:
            self.positions += 1
        else:
            self.positions += self.running[:, None]
            pause_rows(self.cache, self.running)
        logits: torch.Tensor = outputs.logits[:, -1]
        return logits

    def _capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.logits = self._run()
            self.graph = graph
        except RuntimeError as reason:
            warnings.warn(
                f"this model's step cannot be captured in a CUDA graph ({reason}); it runs without one", stacklevel=2
            )


def _up_to_now(mask: torch.Tensor, cache: SinkWindowCache) -> torch.Tensor:
    """Extends the prompt's padding mask `[batch_size, length]` by ones for all tokens since, and for the next token."""
    return torch.nn.functional.pad(mask, (0, cache.get_seq_length() + 1 - mask.shape[1]), value=1)
