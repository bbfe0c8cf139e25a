"""Measurements of `sink_cache`, through its public API only. Run from a checkout, not installed."""

import os

# torch's profiler reads this when torch is loaded. It would write two lines among the tables each time it starts.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")
