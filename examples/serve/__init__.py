"""A server that speaks the OpenAI chat-completions protocol over one `sink_cache.StreamPool`; see `__main__.py`."""
