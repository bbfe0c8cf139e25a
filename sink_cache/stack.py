"""All layers that a cache has for one model, and the stream that goes through them.

Work on all layers at once is done here: moving the stream back, taking tokens back, choosing rows, copying. The package's own
loops (`endless`, `stream`, `StreamPool`) work on a `LayerStack`, and users on a `SinkWindowCache`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedConfig

from .checks import CallChecks
from .fed import FedText
from .internals import (
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
    attention_of,
    can_take_back,
    end_recording,
)
from .layers import RingLayer, StaticSinkWindowLayer
from .masks import SUPPORTED_ATTENTION, StepOffset, register_mask_functions
from .rotary import ForwardRotations
from .state import DeviceStreamState, PerRow, StreamState
from .storage import SharedStorage, share_storage
from .twin import PositionScheme
from .variants import kinds_of_layers, layers_for

_MODEL_SIZES = ("model_type", "hidden_size", "num_attention_heads", "num_key_value_heads")


class LayerStack:
    """The layers of a cache; none before `make_layers`.

    Args:
        n_sink, window (`int`): the sizes of the cache.
        compileable (`bool`): shapes are constant, and counts of tokens lie on the devices.

    Attributes:
        layers (`list[Any]`): one for each layer of the model: rings, and transformers' own layers.
        rings (`list[RingLayer]`): the rings among `layers`.
        first_attention, last_attention (`int`): the first and last index of a layer that stores tokens (ring or native sliding).
        state (`StreamState`): how far the rows are.
        checks (`CallChecks`): refuses calls that would go wrong.
        scheme (`PositionScheme`, *optional*): how the model uses positions.
        model_sizes (`dict[str, Any]`): the sizes by which a saved cache recognises its model.
        step_offset (`StepOffset`, *optional*): the offset from which masks of a compileable cache's steps are made.
        fed_text (`FedText`, *optional*): the end of the text, if `stream` or `endless` fed it.
    """

    def __init__(self, n_sink: int, window: int, compileable: bool) -> None:
        self.n_sink, self.window, self.capacity = n_sink, window, n_sink + window
        self.compileable = compileable
        self.state: StreamState = DeviceStreamState() if compileable else StreamState()
        self.layers: list[Any] = []
        self.rings: list[RingLayer] = []
        self.first_attention = self.last_attention = 0
        self.checks = CallChecks([], self.state)
        self.scheme: PositionScheme | None = None
        self.model_sizes: dict[str, Any] = {}
        self.step_offset: StepOffset | None = None
        self.fed_text: FedText | None = None
        self._kinds: list[tuple[type, int | None]] = []  # see `kinds_of_layers`
        self._attention = ""  # the model's attention implementation

    def make_layers(self, config: PreTrainedConfig, scheme: PositionScheme) -> None:
        """Makes layers for models of this config, whose positions work as `scheme` says; see `variants.layers_for`."""
        self.layers = layers_for(config, scheme, self.n_sink, self.window, self.state)
        self.rings = [layer for layer in self.layers if isinstance(layer, RingLayer)]
        if self.compileable:
            register_mask_functions()  # before there are graphs, which would have to be compiled again
        self.scheme, self._kinds, self._attention = scheme, kinds_of_layers(config), attention_of(config)
        self.model_sizes = {name: getattr(config, name, None) for name in _MODEL_SIZES}
        self.checks = CallChecks(
            self.layers,
            self.state,
            scheme.takes_masks,
            getattr(config, "max_position_embeddings", None),
            in_chunks=getattr(config, "attention_chunk_size", None) is not None,
        )
        takes_tokens = [isinstance(layer, (RingLayer, DynamicSlidingWindowLayer)) for layer in self.layers]
        self.first_attention = takes_tokens.index(True)
        self.last_attention = len(takes_tokens) - 1 - takes_tokens[::-1].index(True)
        self.use_step_masks(True)

    def fits(self, config: PreTrainedConfig, scheme: PositionScheme) -> bool:
        """Whether the layers fit models of this config, whose positions work as `scheme` says."""
        return bool(self.layers) and scheme.agrees_with(self.scheme) and self._kinds == kinds_of_layers(config)

    def storages(self) -> list[SharedStorage]:
        """Returns each storage that layers share, once."""
        return list(dict.fromkeys(ring.storage for ring in self.rings if ring.storage is not None))

    def has_recurrent_layers(self, last: int | None = None) -> bool:
        """Whether any layer has a recurrent state. With `last`, only layers up to that index count."""
        layers = self.layers if last is None else self.layers[: last + 1]
        return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers)

    @property
    def nbytes(self) -> int:
        """Bytes of all states held, of our layers and transformers' own."""
        return sum(tensor.nbytes for layer in self.layers for tensor in _tensors_of(layer))

    def reset(self) -> None:
        """Forgets the stream. The layers forget their tokens by themselves."""
        self.stop_recording()
        self.state.reset()
        self.fed_text = None
        if self.rings:
            self.use_step_masks(True)

    # --- masks ---

    def leave_out_masks_if_full(self) -> None:
        """Lets the steps of a compileable cache run without masks until `reset`, if every slot is filled.

        A mask costs attention its fast kernel. Single steps never change this choice, because a change in the middle of a text
        would compile another graph. So if steps begin before the cache is full, all of them have masks.
        """
        if self.compileable and not self.checks.tokens_until_full():
            self.use_step_masks(False)

    def use_step_masks(self, masked: bool) -> None:
        """Chooses whether the steps of a compileable cache have masks; they need none while every slot is filled."""
        first = self.rings[0]
        self.step_offset = StepOffset(first, not masked) if isinstance(first, StaticSinkWindowLayer) else None

    @contextmanager
    def exact_chunks(self, *, merged: bool = False) -> Iterator[None]:
        """Makes calls in its body exact: each of several tokens sees what it would see if fed alone; see `streaming.stream`.

        Args:
            merged (`bool`): attention itself merges the sinks, which only plain attention does; see `chunk_attention.py`.

        Raises:
            NotImplementedError: at the end, if attention has not merged all sinks. The model's output is wrong then.
        """
        register_mask_functions()
        state = self.state
        state.exact_chunks, state.unmerged = True, set() if merged else None
        try:
            yield
            if state.unmerged:
                state.unfinished = True
                raise NotImplementedError(
                    f"the attention of {len(state.unmerged)} layers was not called with the keys that the cache gave them. These "
                    "layers have not seen the sinks. Call reset(), and use chunk_size=1."
                )
        finally:
            state.exact_chunks, state.unmerged = False, None

    @contextmanager
    def rows_of_any_length(self, new_pads: PerRow = (0,)) -> Iterator[None]:
        """Makes masks of calls in its body from the length of each row, so that they need no `attention_mask`.

        Args:
            new_pads (`PerRow`): how many pads a call brings before each row's new tokens.

        Raises:
            NotImplementedError: for layers other than ours, which would take in the padding, and for attention implementations
                whose masks have other forms.
        """
        theirs = [type(layer).__name__ for layer in self.layers if not isinstance(layer, RingLayer)]
        if theirs:
            raise NotImplementedError(
                f"rows of different lengths cannot go on in a model with a {theirs[0]}, which would take in their padding. "
                "For natively sliding layers, compileable=True makes layers that can."
            )
        if self._attention not in SUPPORTED_ATTENTION:
            raise NotImplementedError(
                f"rows of different lengths cannot go on with attn_implementation {self._attention!r}: their masks are made for "
                f"{' and '.join(SUPPORTED_ATTENTION)} attention. Use one of these."
            )
        if any(new_pads) and self.scheme is not None and self.scheme.chronological:
            raise NotImplementedError(
                "rows of different lengths cannot go on in a model that counts its keys (ALiBi), if their new tokens are padded: "
                "it would count the padding. Feed turns of one length, or one row at a time."
            )
        register_mask_functions()
        self.state.new_pads = new_pads
        try:
            yield
        finally:
            self.state.new_pads = None

    # --- bounded positions ---

    @property
    def largest_capacity(self) -> int:
        """The largest capacity of a ring."""
        return max(ring.capacity for ring in self.rings)

    @property
    def max_position(self) -> int:
        """How many positions the model can tell apart."""
        return min(ring.max_position for ring in self.rings)

    @property
    def rebase_step(self) -> int:
        """`rebase` moves by a multiple of this many positions."""
        return math.lcm(*{ring.window for ring in self.rings})

    def rebase(self) -> int:
        """See `SinkWindowCache.rebase`."""
        assert self.scheme is not None
        state, step, capacity = self.state, self.rebase_step, self.largest_capacity
        others = self.other_layers_to_move()
        by = tuple(max(0, count - capacity) // step * step for count in state.counts)
        if any(by):
            self.checks.refuse_interrupted()
            windows = [(ring.keys[:, :, ring.n_sink :], ring.rotation) for ring in self.rings]
            windows += [(self.layers[index].keys, self.scheme.sliding[index]) for index in others]
            state.unfinished = True  # until all layers have moved
            rotations = ForwardRotations()
            with torch.inference_mode():  # inference mode may write to any tensor
                # One layer at a time, because float32 copies of all keys would be large.
                for keys, rotation in windows:
                    if not rotation.is_identity:
                        rotations.of(rotation, keys.device).move_rows(keys, tuple(-moved for moved in by))
                state.rebase(by)
            self.forget_steps()
            state.unfinished, state.recheck_positions = False, True
        return max(by)

    def other_layers_to_move(self) -> list[int]:
        """Returns the indices of transformers' own sliding layers, whose keys `rebase` also moves.

        Raises:
            NotImplementedError: if `rebase` cannot move the keys of one of them.
        """
        sliding = [i for i, layer in enumerate(self.layers) if isinstance(layer, DynamicSlidingWindowLayer)]
        unknown = [index for index in sliding if self.scheme is None or index not in self.scheme.sliding]
        if unknown:
            raise NotImplementedError(f"rebase() cannot move the keys of the sliding layers {unknown} of this model")
        return sliding

    def forget_steps(self) -> None:
        """Drops what storages know about the next step, after keys or counts have changed without a step."""
        for storage in self.storages():
            storage.forget_steps()

    # --- going back ---

    def crop(self, tokens_to_remove: int) -> None:
        """See `SinkWindowCache.crop`; the model has been checked."""
        state, seen = self.state, self.state.fed
        share_storage(self.rings)  # storages hold what was recorded
        left = seen + tokens_to_remove
        if left < 0:
            raise ValueError(f"crop({tokens_to_remove}) takes back more than the {seen} tokens that there are")
        recorded = min(
            (storage.overwritten[0][0] for storage in self.storages() if storage.has_recorded_until(seen)),
            default=left + 1,
        )
        # Sliding layers of transformers must still hold every key that they need after the crop.
        too_short = any(
            isinstance(layer, DynamicSlidingWindowLayer)
            and layer.keys is not None
            and layer.keys.shape[2] + tokens_to_remove < min(layer.sliding_window - 1, left)
            for layer in self.layers
        )
        if tokens_to_remove and (too_short or (seen > self.capacity and recorded > left)):
            raise ValueError(
                f"crop({tokens_to_remove}) cannot bring back tokens that were evicted meanwhile. Call "
                "activate_past_recording() before feeding tokens that may have to be taken back, and feed no more than "
                f"window = {self.window} of them (in assisted decoding: fewer candidates, or a larger window)."
            )
        for other in self.layers:
            if not isinstance(other, RingLayer) and (tokens_to_remove or getattr(other, "record_past", True)):
                other.crop(tokens_to_remove)
        self.fed_text = None
        for storage in self.storages():
            storage.bring_back(left)
        state.fed = left

    def stop_recording(self) -> None:
        """Records no longer. Layers of transformers, which keep every token while they record, forget what is too old."""
        for layer in self.layers:
            if getattr(layer, "record_past", False):
                end_recording(layer)
        self.state.recording = False

    def can_take_back_states(self) -> bool:
        """Whether recurrent states, if there are any, can be put back as they were."""
        recurrent = [layer for layer in self.layers if isinstance(layer, LinearAttentionCacheLayerMixin)]
        return all(map(can_take_back, recurrent))

    # --- choosing rows ---

    @property
    def rows(self) -> int:
        """The batch size; 0 before the first call."""
        return next((len(ring.keys) for ring in self.rings if ring.is_initialized), 0)

    def select(self, rows: torch.Tensor) -> None:
        """Keeps these rows of the batch, in this order; a row may come several times."""
        for layer in self.layers:
            if not isinstance(layer, RingLayer) or isinstance(layer, LinearAttentionCacheLayerMixin):
                # Not batch_select_indices, which recurrent states do not have, and which fails on a second device.
                layer.reorder_cache(rows)
        self.state.select(rows.tolist())
        self.fed_text = None
        for storage in self.storages():
            storage.select(rows)
        for ring in self.rings:
            if ring.storage is None and ring.is_initialized:
                with torch.inference_mode(False):
                    there = rows.to(ring.device)
                    ring.replace({name: tensor.index_select(0, there) for name, tensor in ring.tensors().items()})

    # --- taking the state out, and putting it back ---

    def take_out(self) -> list[dict[str, torch.Tensor]]:
        """Returns the tensors of each ring by name. With `state.numbers()`, they are the whole stream."""
        return [ring.tensors() for ring in self.rings]

    def put_back(self, tensors: list[dict[str, torch.Tensor]]) -> None:
        """Gives the rings the tensors that `take_out` returned, of this or another stack."""
        for ring, held in zip(self.rings, tensors, strict=True):
            if held:
                ring.replace(held)

    def __getstate__(self) -> dict[str, Any]:
        parts = self._parts()
        # Clones, because a view would be pickled with the storage of all layers.
        parts["tensors"] = [{name: tensor.clone() for name, tensor in held.items()} for held in parts["tensors"]]
        return parts

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerStack:
        # Copies made in inference mode could not be written to outside of it.
        with torch.inference_mode(False):
            copied = type(self).__new__(type(self))
            memo[id(self)] = copied
            copied.__setstate__(copy.deepcopy(self._parts(), memo))
        return copied

    def _parts(self) -> dict[str, Any]:
        return vars(self) | {
            "tensors": self.take_out(),
            "recorded": [storage.overwritten for storage in self.storages()],
        }

    def __setstate__(self, parts: dict[str, Any]) -> None:
        tensors, recorded = parts.pop("tensors"), parts.pop("recorded")
        vars(self).update(parts)
        if self.compileable:
            register_mask_functions()  # perhaps in another process
        self.put_back(tensors)
        if recorded:
            share_storage(self.rings)
        for storage, overwritten in zip(self.storages(), recorded, strict=True):
            storage.overwritten = overwritten


def _tensors_of(layer: Any) -> list[torch.Tensor]:
    if isinstance(layer, RingLayer):
        return list(layer.tensors().values())
    values = [value for held in vars(layer).values() for value in (held.values() if isinstance(held, dict) else [held])]
    return [value for value in values if isinstance(value, torch.Tensor)]
