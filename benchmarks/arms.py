"""The arms: the ways to keep keys and values that are compared. Every harness declares its arms here."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache

from sink_cache import SinkWindowCache

from .harness import is_out_of_memory

# In the order in which they take turns; docs/benchmarks.md says what each is.
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
    """One arm at one capacity (None if it has none), in eager or in compiled steps; perhaps with its own number of sinks."""

    name: str
    capacity: int | None = None
    compiled: bool = False
    n_sink: int | None = None

    def __str__(self) -> str:
        words = [self.name, f"{self.capacity:,}" if self.capacity else "", "compiled" if self.compiled else ""]
        words += [] if self.n_sink is None else [f"{self.n_sink} sinks"]
        return " ".join(word for word in words if word)

    def sinks(self, n_sink: int) -> int | None:
        """Return how many sinks it keeps, by default `n_sink`; None if it evicts nothing."""
        if self.name in WITH_SINKS:
            return n_sink if self.n_sink is None else self.n_sink
        return 0 if self.name in ("window", "recompute") else None

    def make_cache(self, model: PreTrainedModel, n_sink: int, slots: int | None = None) -> Cache | None:
        """Return an empty cache, of so many `slots` for `static`; None if it has none."""
        if self.name in ("dense", "dense-at-capacity"):
            return DynamicCache(config=model.config)
        if self.name in ("static", "static-at-capacity"):
            return StaticCache(config=model.config, max_cache_len=self.capacity or slots)
        if self.capacity is None or self.name == "recompute":
            return None
        sinks = self.sinks(n_sink) or 0
        return SinkWindowCache(sinks, self.capacity - sinks, compileable=self.compiled)


def choose(names: Collection[str], capacities: Sequence[int], compiled: Collection[str] = ()) -> list[Arm]:
    """Return the arms of these names in the order of `ARMS`: bounded ones for each capacity, those in `compiled` compiled."""
    return [
        Arm(name, capacity, name in compiled)
        for name in ARMS
        if name in names
        for capacity in ([None] if name in UNBOUNDED else dict.fromkeys(capacities))
    ]


class CannotMeasure(Exception):
    """Why an arm cannot be measured at some context, in words; the others still can."""


def reason_for(error: BaseException) -> str:
    """Return in words why an arm failed."""
    if isinstance(error, CannotMeasure):
        return str(error)
    return (
        "out of memory" if is_out_of_memory(error) else f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    )
