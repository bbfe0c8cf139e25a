"""Measurements of `sink_cache`, through its public API only. Run from a checkout, not installed."""
