"""Rows of a cache: moving a row to another cache, to host memory or to a file, and letting rows pause in a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from .cache import SinkWindowCache, stack_of
from .internals import LinearAttentionCacheLayerMixin
from .layers import RingLayer, StaticSinkWindowLayer
from .saving import write_whole
from .stack import LayerStack
from .state import DeviceStreamState, compact


@dataclass(frozen=True)
class Row:
    """The stream of one row, outside of its cache.

    Attributes:
        tensors (`dict[str, torch.Tensor]`): the row in each ring's tensors, by "index.name", `[num_heads, slots, head_dim]` each.
        count, start, rebased (`int`): how far the row is; see `StreamState`.
    """

    tensors: dict[str, torch.Tensor]
    count: int
    start: int
    rebased: int

    @property
    def next_position(self) -> int:
        """The position of the row's next token."""
        return self.start + self.count

    def on_host(self) -> Row:
        """Returns a copy in host memory."""
        return replace(self, tensors={name: tensor.detach().cpu().clone() for name, tensor in self.tensors.items()})

    def save_tensors(self, path: Path) -> None:
        """Writes the tensors to a safetensors file."""
        write_whole(path, self.on_host().tensors)

    def with_tensors_of(self, path: Path) -> Row:
        """Returns this row with the tensors of a file that `save_tensors` wrote."""
        return replace(self, tensors=load_file(path))


@torch.inference_mode()  # inference mode may write to any tensor
def copy_row(source: SinkWindowCache, row: int, target: SinkWindowCache, target_row: int) -> None:
    """Copies the stream of a row, with its length and positions, over the stream of another cache's row.

    The target's memory stays where it is, so that a captured graph goes on with the new stream. Its next positions are
    `target.next_position_ids()`. A graph that was captured while all rows were full has no masks. Capture another graph after a
    row that is not full has joined.

    Args:
        source (`SinkWindowCache`): a cache that a model has used, with rows of any batch size.
        row (`int`): the row to copy.
        target (`SinkWindowCache`): another cache of the same sizes, which the same model has used.
        target_row (`int`): the row to overwrite.

    Raises:
        ValueError: if the caches have other sizes, were made for other models, or have not been used.
        IndexError: if there is no such row.
        NotImplementedError: for models with layers other than full attention, and while a cache records.
    """
    _check(stack_of(source), stack_of(target))
    _check_index(target, target_row)
    put_row(take_row(source, row), target, target_row)


def take_row(cache: SinkWindowCache, row: int) -> Row:
    """Returns a row of a cache that a model has used. Its tensors are views, which change with the cache."""
    _check_index(cache, row)
    stack = stack_of(cache)
    held = enumerate(stack.take_out())
    tensors = {f"{i}.{name}": tensor[row] for i, tensors in held for name, tensor in tensors.items()}
    return Row(tensors, *stack.state.row(row))


@torch.inference_mode()  # inference mode may write to any tensor
def put_row(row: Row, cache: SinkWindowCache, index: int) -> None:
    """Replaces a row of a cache by this row, which must fit; `copy_row` checks that."""
    stack = stack_of(cache)
    for i, held in enumerate(stack.take_out()):
        for name, tensor in held.items():
            tensor[index].copy_(row.tensors[f"{i}.{name}"])
    if stack.rows == 1:  # nothing is left of the stream that was there
        fed = {"fed": row.count + row.rebased, "pads": (0,), "rebased": (row.rebased,), "starts": (row.start,)}
        stack.state.take_over({**fed, "begun": True, "unfinished": False, "recheck_positions": True})
    else:
        stack.state.set_row(index, stack.rows, row.count, row.start, row.rebased)
    stack.forget_steps()
    for ring in stack.rings:
        if isinstance(ring, StaticSinkWindowLayer):
            ring.sinks_complete = ring.sinks_complete and row.count >= ring.n_sink
    if stack.compileable and stack.checks.tokens_until_full():
        stack.use_step_masks(True)
    stack.fed_text = None


def is_ring_alone(layer: Any) -> bool:
    """Whether a cache layer is a ring without a recurrent state, which could not be copied row by row."""
    return isinstance(layer, RingLayer) and not isinstance(layer, LinearAttentionCacheLayerMixin)


def pause_rows(cache: SinkWindowCache, running: torch.Tensor) -> None:
    """Takes back the last step of a compileable cache in paused rows. Their next token overwrites what the step stored.

    This changes only the counts on the devices, so that a graph can capture it. `note_pauses` informs the host later.

    Args:
        running (`torch.Tensor`): int64 `[rows]`, 1 for rows that run and 0 for paused rows.
    """
    state = stack_of(cache).state
    assert isinstance(state, DeviceStreamState)
    state.pause(running)


def counts_of_rows(cache: SinkWindowCache) -> dict[torch.device, torch.Tensor]:
    """The counts `[rows]` of a compileable cache on its devices, before a step that may fail."""
    state = stack_of(cache).state
    assert isinstance(state, DeviceStreamState)
    return state.copied_counts()


def bring_rows_back(cache: SinkWindowCache, counts: dict[torch.device, torch.Tensor]) -> None:
    """Undoes a step that failed after the cache took it in; `counts` are those before. Its tokens are overwritten later."""
    state = stack_of(cache).state
    assert isinstance(state, DeviceStreamState)
    state.bring_back(counts)


def note_pauses(cache: SinkWindowCache, steps: Sequence[int]) -> None:
    """Notes for how many steps each row has paused since the last call. For a paused row, a step counts as padding."""
    state = stack_of(cache).state
    state.pads = compact(tuple(pads + more for pads, more in state.per_row(state.pads, tuple(steps))))


def _check_index(cache: SinkWindowCache, row: int) -> None:
    rows = stack_of(cache).rows
    if not 0 <= row < rows:
        raise IndexError(f"there is no row {row}: this cache has the rows 0 to {rows - 1}")


def _check(source: LayerStack, target: LayerStack) -> None:
    for stack in (source, target):
        if not stack.rows:
            raise ValueError(
                "rows can be copied between caches that a model has used; one of these has not been used yet"
            )
        stack.checks.refuse_interrupted()
        if stack.state.recording:
            raise NotImplementedError("rows cannot be copied while a cache records for assisted decoding")
        if not all(map(is_ring_alone, stack.layers)):
            raise NotImplementedError(
                "rows cannot be copied in models with layers other than full attention, unless compileable=True makes rings of "
                "their sliding layers"
            )
    sizes = [(stack.n_sink, stack.window, [ring.keys.shape[1:] for ring in stack.rings]) for stack in (source, target)]
    if sizes[0] != sizes[1] or not (source.scheme is not None and source.scheme.agrees_with(target.scheme)):
        raise ValueError("rows can be copied between caches of the same n_sink and window, used by the same model")
