"""Attention sinks and a sliding window for transformers: exact, constant in memory, through plain `generate()`."""

from .cache import SinkWindowCache
from .streaming import stream
from .verify import verify

__all__ = ["SinkWindowCache", "stream", "verify"]
