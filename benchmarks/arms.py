"""The arms of `benchmarks.latency`: the ways to decode a token that are compared, each with a cache of its kind."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import DynamicLayer

from sink_cache import SinkWindowCache, cache_kwargs

from . import harness, models

BLOCK_LIMIT = 63  # steps of a turn; with the untimed one before, a static cache keeps 64 slots free for them


class CannotMeasure(Exception):
    """Why an arm cannot be measured at some context, in words; the others still can."""


def reason_for(error: BaseException) -> str:
    """Return in words why an arm failed."""
    if isinstance(error, CannotMeasure):
        return str(error)
    if harness.is_out_of_memory(error):
        return "out of memory"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


@dataclass
class Bench:
    """What all arms of a model share: the model, tokens, the dense prefill, and the static caches, which are large."""

    loaded: models.LoadedModel
    n_sink: int
    piece_tokens: int
    kept_contexts: frozenset[int]
    static_compiled_contexts: frozenset[int]
    contexts: Sequence[int]
    snapshots: dict[int, list[Any]] = field(default_factory=dict)
    statics: dict[int, StaticCache] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.model: PreTrainedModel = self.loaded.model
        self.device = self.model.device
        self.config = self.model.config.get_text_config(decoder=True)
        generator = torch.Generator().manual_seed(0)
        # As long as the text with all steps: generate() passes all tokens, and positions for all of them.
        shape = (1, max(self.contexts) + 2**16)
        self.tokens = torch.randint(self.config.vocab_size, shape, generator=generator).to(self.device)
        self.positions = torch.arange(shape[1], device=self.device)[None]
        self.token = self.tokens[:, :1].clone()
        # What forward() and generate() call their cache, asked once and not within timed steps.
        (self.forward_name,), (self.generate_name,) = cache_kwargs(None, self.model), cache_kwargs(None)
        # As in generate(), where the model's forward has it.
        self.keep_last = {"logits_to_keep": 1} if self.model._supports_logits_to_keep() else {}
        self._dense, self._read, self._broken = DynamicCache(config=self.model.config), 0, ""

    def read(self, cache: Cache, start: int, stop: int) -> None:
        """Feed the tokens of the text from `start` to `stop` into a cache, in pieces."""
        for first in range(start, stop, self.piece_tokens):
            piece = self.tokens[:, first : min(first + self.piece_tokens, stop)]
            self.model(piece, **{self.forward_name: cache}, use_cache=True, **self.keep_last)

    def dense_layers(self, context: int) -> list[Any]:
        """Return the layers of a DynamicCache that has read `context` tokens; contexts must rise, or be kept ones."""
        on_the_way = sorted(n for n in self.kept_contexts if self._read < n < context)
        for stop in (*on_the_way, context):
            if stop in self.snapshots:
                continue
            if self._broken:
                raise CannotMeasure(self._broken)
            try:
                self.read(self._dense, self._read, stop)
            except Exception as error:
                self._broken, self._dense = reason_for(error), DynamicCache()
                raise
            self._read = stop
            self.snapshots = {n: layers for n, layers in self.snapshots.items() if n in self.kept_contexts}
            # Copies of layers stay as they are: a dynamic layer makes new tensors and never writes into old ones.
            self.snapshots[stop] = [copy.copy(layer) for layer in self._dense.layers]
        return self.snapshots[context]

    def step_of_generate(self, cache: Cache, seen: int) -> None:
        """Feed one token after `seen` others as `generate()` does with a cache that can be compiled."""
        inputs = self.model.prepare_inputs_for_generation(
            self.tokens[:, : seen + 1],
            next_sequence_length=1,
            **{self.generate_name: cache},
            attention_mask=None,
            position_ids=self.positions[:, : seen + 1],
            use_cache=True,
            **self.keep_last,
        )
        self.compiled_call(**inputs, return_dict=True)

    @functools.cached_property
    def compiled_call(self) -> Callable[..., Any]:
        """The model's forward, compiled as `generate()` does it."""
        return self.model.get_compiled_call(self.model.generation_config.compile_config)


class Arm:
    """One way to decode: `fill(context)`, then turns of `rewind()` and some `step()`s, of which only steps are timed."""

    name: ClassVar[str]
    compiled: ClassVar[bool] = False
    bounded: ClassVar[bool] = False  # has one arm for each capacity

    def __init__(self, bench: Bench, capacity: int | None = None) -> None:
        self.bench, self.capacity = bench, capacity
        self.cache: Cache | None = None

    def applies(self, context: int) -> bool:
        """Whether there is anything to measure at a context."""
        return True

    def fill(self, context: int) -> None:
        """Read a text of `context` tokens; contexts only rise. Raises CannotMeasure."""

    def rewind(self) -> None:
        """Go back to the state that `fill` left, or to one that costs the same."""

    def step(self) -> None:
        """Feed one token."""
        self.bench.model(self.bench.token, **{self.bench.forward_name: self.cache}, use_cache=True)

    def length(self, context: int) -> int:
        """Return how many tokens a step attends to."""
        return context if self.capacity is None else min(context, self.capacity)

    def release(self) -> None:
        """Let go of memory before the next context."""
        self.cache = None


class Dense(Arm):
    """DynamicCache."""

    name = "dense"

    def fill(self, context: int) -> None:
        """Take the shared prefill."""
        self._layers = self.bench.dense_layers(self.length(context))

    def rewind(self) -> None:
        """Begin anew from the layers of the prefill."""
        self.cache = DynamicCache(config=self.bench.model.config)
        self.cache.layers = [copy.copy(layer) for layer in self._layers]

    def release(self) -> None:
        """Let go of the prefill, too."""
        self.cache, self._layers = None, []


class DenseAtCapacity(Dense):
    """DynamicCache of `capacity` tokens, beside the others."""

    name = "dense-at-capacity"
    bounded = True

    def applies(self, context: int) -> bool:
        """Up to the capacity it would be dense itself."""
        return self.capacity is not None and context > self.capacity


class Sink(Arm):
    """SinkWindowCache, fed on from context to context; when it is full, every further token costs the same."""

    name = "sink"
    bounded = True
    _seen = 0
    _unfilled: SinkWindowCache | None = None

    def make(self) -> SinkWindowCache:
        """Return an empty cache."""
        return SinkWindowCache(self.bench.n_sink, int(self.capacity or 0) - self.bench.n_sink)

    def fill(self, context: int) -> None:
        """Read what is missing."""
        if self.cache is None:
            self.cache, self._seen = self.make(), 0
        elif self._unfilled is not None:
            self.rewind()
        self.bench.read(self.cache, self._seen, context)
        self._seen = self._context = max(self._seen, context)
        self._unfilled = copy.deepcopy(self.cache) if context < self.cache.capacity else None

    def rewind(self) -> None:
        """Begin anew from a copy, unless the cache was full: then its state costs the same."""
        if self._unfilled is not None:
            self.cache, self._seen = copy.deepcopy(self._unfilled), self._context

    def step(self) -> None:
        """Feed one token, and count it."""
        super().step()
        self._seen += 1

    def release(self) -> None:
        """Keep the cache: it is small, and read on."""


class SinkCompiled(Sink):
    """The same in the compiled step of `generate()`, once nothing changes its shape any more."""

    compiled = True

    def make(self) -> SinkWindowCache:
        """Return an empty cache that can be compiled."""
        return SinkWindowCache(self.bench.n_sink, int(self.capacity or 0) - self.bench.n_sink, compileable=True)

    def fill(self, context: int) -> None:
        """Read what is missing."""
        if context < int(self.capacity or 0):
            raise CannotMeasure("compiled steps are measured from a full cache on")
        super().fill(context)

    def step(self) -> None:
        """Feed one token as `generate()` does."""
        self.bench.step_of_generate(self.cache, self._seen)
        self._seen += 1


class Static(Arm):
    """StaticCache with as many slots as the context, of which the steps fill the last."""

    name = "static"

    def fill(self, context: int) -> None:
        """Take the tokens of the shared prefill."""
        self._layers = self.bench.dense_layers(context)
        if any(type(layer) is not DynamicLayer for layer in self._layers):
            raise CannotMeasure("only models of full-attention layers are measured with a StaticCache")
        self._filled = context - min(BLOCK_LIMIT + 1, context - 1)
        # Eager and compiled steps share the slots, because they are many.
        if context not in self.bench.statics:
            self.bench.statics[context] = StaticCache(config=self.bench.model.config, max_cache_len=context)
        self.cache = self.bench.statics[context]

    def rewind(self) -> None:
        """Write the tokens in again."""
        self.cache.reset()
        for index, layer in enumerate(self._layers):
            keys, values = (states[:, :, : self._filled] for states in (layer.keys, layer.values))
            self.cache.update(keys, values, index)
        self._seen = self._filled

    def release(self) -> None:
        """Let go of the slots and the prefill."""
        self.cache, self._layers = None, []
        self.bench.statics.clear()


class StaticCompiled(Static):
    """The same in the compiled step of `generate()`, which is compiled for every length."""

    compiled = True

    def fill(self, context: int) -> None:
        """Take the tokens of the shared prefill."""
        if context not in self.bench.static_compiled_contexts:
            raise CannotMeasure("it would have to be compiled for this length alone: see --compile-static-at")
        super().fill(context)

    def step(self) -> None:
        """Feed one token as `generate()` does."""
        self.bench.step_of_generate(self.cache, self._seen)
        self._seen += 1


class Recompute(Arm):
    """No cache: the window is read anew."""

    name = "recompute"
    bounded = True

    def applies(self, context: int) -> bool:
        """It does not depend on the context, so once is enough."""
        contexts, capacity = self.bench.contexts, int(self.capacity or 0)
        return context == min((n for n in contexts if n >= capacity), default=max(contexts))

    def fill(self, context: int) -> None:
        """Nothing is read before."""
        if context < int(self.capacity or 0):
            raise CannotMeasure("no context fills its window")

    def step(self) -> None:
        """Read the last `capacity` tokens."""
        self.bench.model(self.bench.tokens[:, : self.capacity], use_cache=False, **self.bench.keep_last)


ARMS: tuple[type[Arm], ...] = (Dense, DenseAtCapacity, Sink, SinkCompiled, Static, StaticCompiled, Recompute)
ARM_NAMES = tuple(dict.fromkeys(arm.name for arm in ARMS))


def make_arms(bench: Bench, names: Sequence[str], capacities: Sequence[int], compiled: bool) -> list[Arm]:
    """Return the arms that are asked for, in the order in which they take turns."""
    chosen = [kind for kind in ARMS if kind.name in names and (compiled or not kind.compiled)]
    return [kind(bench, capacity) for kind in chosen for capacity in (capacities if kind.bounded else [None])]
