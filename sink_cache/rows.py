"""Moving a row of one cache into a row of another: for whoever serves many streams with one batch."""

from __future__ import annotations

import torch

from .cache import SinkWindowCache
from .layers import StaticSinkWindowLayer


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
    for cache, index in ((source, row), (target, target_row)):
        rows = len(cache._rings[0].keys)
        if not 0 <= index < rows:
            raise IndexError(f"there is no row {index}: this cache has the rows 0 to {rows - 1}")
    for theirs, ours in zip(source._rings, target._rings, strict=True):
        for name, tensor in ours.tensors().items():
            tensor[target_row].copy_(theirs.tensors()[name][row])
    count, start, rebased = source._state.row(row)
    target._state.set_row(target_row, len(target._rings[0].keys), count, start, rebased)
    for storage in target._storages():
        storage.forget_steps()
    for ring in target._rings:
        if isinstance(ring, StaticSinkWindowLayer):
            ring.sinks_complete = ring.sinks_complete and count >= ring.n_sink
    if target.compileable and target.tokens_until_full():
        target._show_all_slots(False)
    target.fed_text = None


def _check(source: SinkWindowCache, target: SinkWindowCache) -> None:
    for cache in (source, target):
        if not cache._rings or not cache._rings[0].is_initialized:
            raise ValueError(
                "rows can be copied between caches that a model has used; one of these has not been used yet"
            )
        cache._checks.refuse_interrupted()
        if cache._state.recording:
            raise NotImplementedError("rows cannot be copied while a cache records for assisted decoding")
        if len(cache._rings) < len(cache.layers):
            raise NotImplementedError(
                "rows cannot be copied in models with layers other than full attention, unless compileable=True makes rings of "
                "their sliding layers"
            )
    sizes = [(cache.n_sink, cache.window, [ring.keys.shape[1:] for ring in cache._rings]) for cache in (source, target)]
    if sizes[0] != sizes[1] or not (source._scheme is not None and source._scheme.agrees_with(target._scheme)):
        raise ValueError("rows can be copied between caches of the same n_sink and window, used by the same model")
