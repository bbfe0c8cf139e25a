"""Attention sinks and a sliding window for transformers: exact, constant in memory, through plain `generate()`."""

from .cache import SinkWindowCache
from .endless_loop import endless
from .internals import cache_kwargs
from .pool import Stream, StreamPool
from .streaming import stream
from .verify import verify

__all__ = ["SinkWindowCache", "Stream", "StreamPool", "cache_kwargs", "endless", "stream", "verify"]
