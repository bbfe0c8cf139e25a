"""Moving a row of one cache into a row of another: for whoever serves many streams with one batch."""

from __future__ import annotations

import torch

from .cache import SinkWindowCache, stack_of
from .layers import StaticSinkWindowLayer
from .stack import LayerStack


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
    theirs, ours = stack_of(source), stack_of(target)
    _check(theirs, ours)
    for stack, index in ((theirs, row), (ours, target_row)):
        if not 0 <= index < stack.rows:
            raise IndexError(f"there is no row {index}: this cache has the rows 0 to {stack.rows - 1}")
    for tensors, into in zip(theirs.take_out(), ours.take_out(), strict=True):
        for name, tensor in into.items():
            tensor[target_row].copy_(tensors[name][row])
    count, start, rebased = theirs.state.row(row)
    ours.state.set_row(target_row, ours.rows, count, start, rebased)
    ours.forget_steps()
    for ring in ours.rings:
        if isinstance(ring, StaticSinkWindowLayer):
            ring.sinks_complete = ring.sinks_complete and count >= ring.n_sink
    if ours.compileable and ours.checks.tokens_until_full():
        ours.show_all_slots(False)
    ours.fed_text = None


def _check(source: LayerStack, target: LayerStack) -> None:
    for stack in (source, target):
        if not stack.rows:
            raise ValueError(
                "rows can be copied between caches that a model has used; one of these has not been used yet"
            )
        stack.checks.refuse_interrupted()
        if stack.state.recording:
            raise NotImplementedError("rows cannot be copied while a cache records for assisted decoding")
        if len(stack.rings) < len(stack.layers):
            raise NotImplementedError(
                "rows cannot be copied in models with layers other than full attention, unless compileable=True makes rings of "
                "their sliding layers"
            )
    sizes = [(stack.n_sink, stack.window, [ring.keys.shape[1:] for ring in stack.rings]) for stack in (source, target)]
    if sizes[0] != sizes[1] or not (source.scheme is not None and source.scheme.agrees_with(target.scheme)):
        raise ValueError("rows can be copied between caches of the same n_sink and window, used by the same model")
