"""Rows of one cache: moving one into another cache, to host memory or a file, and letting one pause while others go on."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from .cache import SinkWindowCache
from .internals import LinearAttentionCacheLayerMixin
from .layers import RingLayer, StaticSinkWindowLayer
from .state import DeviceStreamState, alike


@dataclass(frozen=True)
class Row:
    """The stream of one row, outside of its cache.

    Attributes:
        tensors (`dict[str, torch.Tensor]`): what the layers hold, by index and name, `[num_heads, slots, head_dim]` each.
        count, start, rebased (`int`): how far the row is; see `state`.
    """

    tensors: dict[str, torch.Tensor]
    count: int
    start: int
    rebased: int

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def next_position(self) -> int:
        """The position of the row's next token."""
        return self.start + self.count

    def on_host(self) -> Row:
        """A copy in host memory."""
        return replace(self, tensors={name: tensor.detach().cpu().clone() for name, tensor in self.tensors.items()})

    def save(self, path: Path) -> None:
        """Writes the row to a safetensors file, which has its name only when it is whole."""
        unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        numbers = {name: str(getattr(self, name)) for name in ("count", "start", "rebased")}
        try:
            save_file(self.on_host().tensors, unfinished, metadata={"sink_cache.row": json.dumps(numbers)})
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)

    def load(self, path: Path) -> Row:
        """The row whose numbers are these, with its tensors from a file that `save` wrote."""
        return replace(self, tensors=load_file(path))


@torch.inference_mode()  # in which any tensor can be written to
def copy_row(source: SinkWindowCache, row: int, target: SinkWindowCache, target_row: int) -> None:
    """Copies the stream of a row, with its own length and positions, in the place of another row's stream.

    The target's memory stays where it is, so that a captured graph goes on with the new stream. Its next positions are
    `target.next_position_ids()`. A graph that was captured while all rows were full has no masks: after a row that is not full
    has joined, capture another one.

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
    _check(source, target)
    _check_index(target, target_row)
    put_row(take_row(source, row), target, target_row)


def take_row(cache: SinkWindowCache, row: int) -> Row:
    """A row of a cache that a model has used; its tensors are views, which change with the cache."""
    _check_index(cache, row)
    tensors = {f"{i}.{name}": held[row] for i, ring in enumerate(cache._rings) for name, held in ring.tensors().items()}
    return Row(tensors, *cache._state.row(row))


@torch.inference_mode()  # in which any tensor can be written to
def put_row(row: Row, cache: SinkWindowCache, index: int) -> None:
    """Puts a row in the place of another one; see `copy_row`, which checks that they fit."""
    rows = len(cache._rings[0].keys)
    for i, ring in enumerate(cache._rings):
        for name, tensor in ring.tensors().items():
            tensor[index].copy_(row.tensors[f"{i}.{name}"])
    if rows == 1:  # nothing is left of the stream that was there
        fed = {"fed": row.count + row.rebased, "pads": (0,), "rebased": (row.rebased,), "starts": (row.start,)}
        cache._state.take_over({**fed, "begun": True, "unfinished": False, "moved": True})
    else:
        cache._state.set_row(index, rows, row.count, row.start, row.rebased)
    for storage in cache._storages():
        storage.forget_steps()
    for ring in cache._rings:
        if isinstance(ring, StaticSinkWindowLayer):
            ring.sinks_complete = ring.sinks_complete and row.count >= ring.n_sink
    if cache.compileable and cache.tokens_until_full():
        cache._show_all_slots(False)
    cache.fed_text = None


def is_ring_alone(layer: Any) -> bool:
    """Whether a cache layer is a ring, and has no recurrent state beside it, which could not be copied row by row."""
    return isinstance(layer, RingLayer) and not isinstance(layer, LinearAttentionCacheLayerMixin)


def pause_rows(cache: SinkWindowCache, running: torch.Tensor) -> None:
    """After a step of a compileable cache: takes it back in rows that do not run. What these were fed is overwritten later.

    Only on the devices, as a captured graph needs it. `note_pauses` says the same to the host, before it next looks.

    Args:
        running (`torch.Tensor`): int64 `[rows]`, 1 for rows that run and 0 for the others.
    """
    assert isinstance(cache._state, DeviceStreamState)
    for counts in cache._state._counts.values():
        counts.add_(running.to(counts.device) - 1)


def note_pauses(cache: SinkWindowCache, steps: Sequence[int]) -> None:
    """Notes for how many steps each row has paused since the last time: to these rows, the steps brought padding."""
    state = cache._state
    state.pads = alike(tuple(pads + more for pads, more in state.per_row(state.pads, tuple(steps))))


def _check_index(cache: SinkWindowCache, row: int) -> None:
    rows = len(cache._rings[0].keys)
    if not 0 <= row < rows:
        raise IndexError(f"there is no row {row}: this cache has the rows 0 to {rows - 1}")


def _check(source: SinkWindowCache, target: SinkWindowCache) -> None:
    for cache in (source, target):
        if not cache._rings or not cache._rings[0].is_initialized:
            raise ValueError(
                "rows can be copied between caches that a model has used; one of these has not been used yet"
            )
        cache._checks.refuse_interrupted()
        if cache._state.recording:
            raise NotImplementedError("rows cannot be copied while a cache records for assisted decoding")
        if not all(map(is_ring_alone, cache.layers)):
            raise NotImplementedError(
                "rows cannot be copied in models with layers other than full attention, unless compileable=True makes rings of "
                "their sliding layers"
            )
    sizes = [(cache.n_sink, cache.window, [ring.keys.shape[1:] for ring in cache._rings]) for cache in (source, target)]
    if sizes[0] != sizes[1] or not (source._scheme is not None and source._scheme.agrees_with(target._scheme)):
        raise ValueError("rows can be copied between caches of the same n_sink and window, used by the same model")
