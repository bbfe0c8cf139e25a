"""Attention sinks and a sliding window for transformers: exact, constant in memory, through plain `generate()`.

The way of a token, and where each step lies:

    a model calls SinkWindowCache.update         cache.py: speaks transformers' interface; begins and ends a call
      one look at the calling frames             caller.py, internals.py: the model, its padding mask, its positions
      calls that would go wrong are refused      checks.py
      LayerStack                                 stack.py: the layers that a cache has for one model
        StreamState                              state.py: how far each row is; the only thing that advances
        RingLayer                                layers.py, storage.py, variants.py: tensors and a rotation
          slots, evictions, rotations            ring.py, rotary.py: pure functions of counts
      masks that say what a ring shows           masks.py
    what positions mean to a model               twin.py asks a small copy of it; reference.py checks the answer;
                                                 model_scheme.py compares the live model with the copy
    what users call beside the cache             streaming.py reads texts exactly; chunk_attention.py makes that fast;
                                                 endless_loop.py, steps.py generate without end;
                                                 pool.py, batch.py, turns.py, sampling.py, rows.py run many streams at once;
                                                 verify.py; saving.py; fed.py notes what a cache was fed

Terms of our own:

    sink          one of the first tokens of a text, which every later token sees
    window        the last tokens of a text, the current one included
    capacity      n_sink + window: how many tokens a layer holds
    ring          the slots of a layer; a new token takes the slot of the oldest token of the window
    count         how many tokens a row has seen, padding excluded, less what rebases took off
    step          a call of the model with one token for each row
    exact chunk   a call with several tokens, in which each token sees what it would see in a step
    rebase        to move the whole ring to lower positions, so that positions stay small for ever
    twin          a small model of the same class, with random weights, that shows how the class uses positions
    scheme        what a twin has shown: how the keys of each layer rotate
"""

from .cache import SinkWindowCache
from .endless_loop import endless
from .internals import cache_kwargs
from .pool import Stream, StreamPool
from .streaming import stream
from .verify import verify

__version__ = "0.1.0"

__all__ = ["SinkWindowCache", "Stream", "StreamPool", "cache_kwargs", "endless", "stream", "verify"]
