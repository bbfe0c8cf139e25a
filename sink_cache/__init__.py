"""Attention sinks and a sliding window for transformers: exact, constant in memory, through plain `generate()`."""

from .cache import SinkWindowCache
from .verify import verify

__all__ = ["SinkWindowCache", "verify"]
