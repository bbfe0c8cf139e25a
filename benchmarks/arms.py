"""The arms that are compared: ways to keep keys and values."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache

from sink_cache import SinkWindowCache

from .harness import is_out_of_memory

# In the order in which they take turns. docs/benchmarks.md describes each.
ARMS = (
    "dense",
    "dense-at-capacity",
    "static",
    "static-at-capacity",
    "sink",
    "window",
    "line-breaks",
    "endless",
    "dense-batched",
    "recompute",
)
UNBOUNDED = ("dense", "static", "dense-batched")
WITH_SINKS = ("sink", "line-breaks", "endless")


@dataclass(frozen=True)
class Arm:
    """An arm at one capacity (None if it has none), in eager or compiled steps.

    `n_sink` None means the number of sinks of the options.
    """

    name: str
    capacity: int | None = None
    compiled: bool = False
    n_sink: int | None = None

    def __str__(self) -> str:
        words = [self.name]
        words += [f"{self.capacity:,}"] if self.capacity else []
        words += ["compiled"] if self.compiled else []
        words += [] if self.n_sink is None else [f"{self.n_sink} sinks"]
        return " ".join(words)

    def sinks(self, n_sink: int) -> int | None:
        """Return the number of sinks of this arm, by default `n_sink`; None if the arm evicts nothing."""
        if self.name in WITH_SINKS:
            return n_sink if self.n_sink is None else self.n_sink
        return 0 if self.name in ("window", "recompute") else None

    def make_cache(self, model: PreTrainedModel, n_sink: int, slots: int | None = None) -> Cache | None:
        """Return an empty cache, or None for an arm without a cache. `slots` is the size for `static`."""
        if self.name in ("dense", "dense-at-capacity"):
            return DynamicCache(config=model.config)
        if self.name in ("static", "static-at-capacity"):
            return StaticCache(config=model.config, max_cache_len=self.capacity or slots)
        if self.capacity is None or self.name == "recompute":
            return None
        sinks = self.sinks(n_sink) or 0
        return SinkWindowCache(sinks, self.capacity - sinks, compileable=self.compiled)


def choose(names: Collection[str], capacities: Sequence[int], compiled: Collection[str] = ()) -> list[Arm]:
    """Return the arms of these names in the order of `ARMS`, bounded arms once for each capacity.

    Arms whose names are in `compiled` take compiled steps.
    """
    return [
        Arm(name, capacity, name in compiled)
        for name in ARMS
        if name in names
        for capacity in ([None] if name in UNBOUNDED else dict.fromkeys(capacities))
    ]


class CannotMeasure(Exception):
    """An arm cannot be measured at some context. The message says why."""


def reason_for(error: BaseException) -> str:
    """Return in words why an arm failed."""
    if isinstance(error, CannotMeasure):
        return str(error)
    if is_out_of_memory(error):
        return "out of memory"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
