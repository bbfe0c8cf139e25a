"""Many streams at once, in one batch whose rows come and go.

A bounded cache needs an amount of memory for a conversation that is known in advance. So one cache with a fixed number of rows,
and one graph that is captured once, can serve any number of streams. A stream that joins is read into a cache with one row, piece
by piece between the steps of the others. Then it is copied into a row of the batch. A stream that waits for its next turn keeps
its row until another stream needs it. Then it is parked outside of the batch.
"""

from __future__ import annotations

import copy
import itertools
import math
import os
import signal
import threading
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import CompileConfig, GenerationConfig, PreTrainedModel

from .batch import Batch, Reader
from .cache import SinkWindowCache
from .internals import takes_logits_to_keep, text_model, virtual_tokens
from .rows import Row, is_ring_alone
from .sampling import Draws
from .turns import TurnOptions, turn_options

QUEUED, READING, RUNNING, IDLE, FAILED, CLOSED = "queued", "reading", "running", "idle", "failed", "closed"


class Stream:
    """One text in a `StreamPool`; made by `StreamPool.add`.

    Attributes:
        status (`str`): "queued" (waits to be read), "reading", "running" (gets a token at every step), "idle" (its turn is over,
            and `send` begins another), "failed" or "closed".
        finish_reason (`str`, *optional*): why the last turn ended: "eos", "length", "stopped", "failed" or "closed". None while
            a turn is under way.
        error (`Exception`, *optional*): why the stream failed.
    """

    def __init__(self, pool: StreamPool, options: dict[str, Any], draws: Draws) -> None:
        self.status = QUEUED
        self.finish_reason: str | None = None
        self.error: Exception | None = None
        self._pool, self._options, self._draws = pool, options, draws
        self._turn: TurnOptions
        self._tokens: deque[int] = deque()
        self._recent: deque[int] = deque(maxlen=pool.keep_tokens)  # of the whole text
        self._unread: list[int] = []
        self._left = -1  # how many tokens of this turn are to come; negative for no end
        self._row: int | None = None
        self._parked: Row | None = None
        self._file: Path | None = None
        self._stops = False

    @property
    def tokens(self) -> list[int]:
        """The new tokens of the current or last turn. If the turn has no end, only the last `keep_tokens` of them."""
        return list(self._tokens)

    @property
    def is_active(self) -> bool:
        """Whether tokens of this stream are still to come."""
        return self.status in (QUEUED, READING, RUNNING)

    @property
    def is_parked(self) -> bool:
        """Whether the stream's row lies outside of the batch, in host memory or a file."""
        return self._parked is not None

    def send(
        self,
        input_ids: Any,
        generation_config: GenerationConfig | None = None,
        *,
        seed: int | None = None,
        **options: Any,
    ) -> None:
        """Begins the next turn. Nothing is read twice. First the last generated token is read, which no forward has seen.

        Args:
            input_ids: the new tokens alone, as for `StreamPool.add`. None of them (an empty list) goes on after `max_new_tokens`.
            generation_config, options: as for `StreamPool.add`. Options that are not given stay as in the turn before. A
                `generation_config` replaces all of them.
            seed (`int`, *optional*): starts new random numbers. By default the stream's random numbers continue.

        Raises:
            RuntimeError: if the stream is active, has failed or is closed.
            TypeError, ValueError, NotImplementedError: as `StreamPool.add`. The stream then stays as it was.
        """
        self._pool._send(self, input_ids, generation_config, seed, options)

    def stop(self) -> None:
        """Ends the turn with its next token. The stream is idle then, and `send` begins another turn."""
        with self._pool._lock:
            self._stops = self.is_active

    def close(self) -> None:
        """Frees the row and forgets the text. Does nothing the second time."""
        self._pool._close(self)

    def __repr__(self) -> str:
        return f"<Stream {self.status}, {len(self._tokens)} tokens>"

    def _take(self, token: int) -> None:
        """Takes in a new token, and sets `finish_reason` if it is the turn's last."""
        self._tokens.append(token)
        self._recent.append(token)
        self._left -= 1
        if token in self._turn.eos_tokens:
            self.finish_reason = "eos"
        elif self._left == 0:
            self.finish_reason = "length"
        elif self._stops:
            self.finish_reason = "stopped"


class StreamPool:
    """Runs many streams at once in shared steps. Each stream gets the same tokens as alone in `endless`.

    Args:
        model (`PreTrainedModel`): a causal language model with `attn_implementation` "sdpa" or "eager".
        n_sink, window (`int`): the sizes of each stream's cache, see `SinkWindowCache`.
        max_streams (`int`): how many streams run at once (the rows of the batch). Further streams wait in a queue.
        prefill_chunk_size (`int`): how many tokens of a prompt are read at once. At most one such piece is read between two
            steps. Smaller pieces let running streams wait less, and larger ones read prompts faster. As in `generate()`, the
            later tokens of a piece see more than the cache holds.
        keep_tokens (`int`, *optional*): how many of a text's last tokens a repetition penalty sees. `Stream.tokens` keeps as many
            of a turn without an end. By default the cache's capacity.
        park_to (`str`, *optional*): a folder for the rows of idle streams that must leave the batch; host memory by default.
        compile_config (`CompileConfig`, *optional*): as for `generate()`.

    The options of a stream are those of `generate()` with `custom_generate=endless`: greedy decoding or sampling with
    `temperature`, `top_k`, `top_p` and `min_p`, `repetition_penalty`, `max_new_tokens`, `max_length` (in later turns it counts
    the tokens of the turn) and `eos_token_id`. Other options that would change the text are refused. A stream draws from its own
    seed, so it gets the same tokens whatever else runs.

    Threads: `add`, `Stream.send`, `Stream.stop` and `Stream.close` may be called from any thread, and wait at most for the
    current step. Only one thread at a time may run steps (by iteration or `step`). The device works on the next step while the
    caller handles the tokens of the last one.

    An interrupt (Ctrl-C) waits for the end of the step, so that no token is lost. Tokens that were not handed out yet come first
    in the next iteration.

    Raises:
        TypeError, ValueError: for arguments of the wrong type or size.
        NotImplementedError: for a model that `SinkWindowCache` refuses, or with layers other than attention.

    Example:

    ```python
    >>> from sink_cache import StreamPool
    >>> pool = StreamPool(model, n_sink=4, window=1020, max_streams=64)
    >>> story = pool.add(input_ids, max_new_tokens=500, do_sample=True, temperature=0.8)
    >>> for stream, token in pool:
    ...     print(token)
    >>> story.send(next_ids)
    ```
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        n_sink: int,
        window: int,
        max_streams: int,
        prefill_chunk_size: int = 512,
        keep_tokens: int | None = None,
        park_to: str | Path | None = None,
        compile_config: CompileConfig | None = None,
    ) -> None:
        self._cache = SinkWindowCache(n_sink, window, compileable=True)
        self.model, self.n_sink, self.window, self.capacity = model, n_sink, window, self._cache.capacity
        self.max_streams, self.prefill_chunk_size = max_streams, prefill_chunk_size
        self.keep_tokens = self.capacity if keep_tokens is None else keep_tokens
        for name in ("max_streams", "prefill_chunk_size", "keep_tokens"):
            if not isinstance(value := getattr(self, name), int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, but is {value!r}")
        if park_to is not None and not Path(park_to).is_dir():
            raise FileNotFoundError(f"there is no folder {park_to} to park streams in")
        self.park_to = None if park_to is None else Path(park_to)
        self._refuse_model(model)
        kwargs: dict[str, Any] = {"use_cache": True, "return_dict": True}
        if takes_logits_to_keep(model):
            kwargs["logits_to_keep"] = 1
        config = copy.deepcopy(model.generation_config)
        config.compile_config = compile_config
        self._batch = Batch(model, self._cache, max_streams, self.keep_tokens, config, kwargs)
        one_row = SinkWindowCache(n_sink, window, compileable=True)
        self._reader = Reader(model, one_row, prefill_chunk_size, kwargs)

        self._lock = threading.RLock()  # over all that follows, held only for bookkeeping between calls of the model
        self._has_work = threading.Condition(self._lock)
        self._stepping = threading.Lock()
        self._queue: deque[Stream] = deque()
        self._reading: Stream | None = None  # whose text is in the reader
        self._rows: list[Stream | None] = [None] * max_streams
        self._idle: dict[Stream, None] = {}  # idle streams that have a row, the longest idle first
        self._streams: set[Stream] = set()
        self._launched: list[tuple[int, Stream]] = []  # the rows of the step that the device works on
        self._undelivered: deque[tuple[Stream, int]] = deque()
        self._names = itertools.count()
        self.steps = 0

    def _refuse_model(self, model: PreTrainedModel) -> None:
        if method := virtual_tokens(model):
            raise NotImplementedError(
                f"StreamPool feeds only the tokens of texts, and would leave out the virtual tokens of {method}"
            )
        self._cache.prepare_for(model)
        if theirs := [type(layer).__name__ for layer in self._cache.layers if not is_ring_alone(layer)]:
            raise NotImplementedError(
                f"StreamPool needs a model whose layers are all attention, and this {type(text_model(model)).__name__} has a "
                f"{theirs[0]}. Use generate() with custom_generate=endless, one text at a time."
            )
        for layer in self._cache.layers:
            most = max(1, (layer.sliding_window or math.inf) - self.capacity + 1)
            if self.prefill_chunk_size > most:
                raise ValueError(
                    f"prefill_chunk_size must be at most {most} for this model with n_sink={self.n_sink} and "
                    f"window={self.window}, but is {self.prefill_chunk_size}: the model's own masks end after sliding_window = "
                    f"{layer.sliding_window} tokens."
                )

    # --- what users see ---

    def add(
        self,
        input_ids: Any,
        generation_config: GenerationConfig | None = None,
        *,
        seed: int | None = None,
        **options: Any,
    ) -> Stream:
        """Adds a stream. The steps that follow read it, and run it as soon as there is a row for it.

        Args:
            input_ids: the prompt: a tensor `[1, tokens]` or `[tokens]`, or a list of integers.
            generation_config (`GenerationConfig`, *optional*), options: as for `generate()`, whose defaults hold.
            seed (`int`, *optional*): the seed of its random numbers. By default one is drawn from torch's generator.

        Raises:
            TypeError, ValueError: for tokens that the model does not have, for more tokens than the model has positions, and for
                all that `generate()` and `endless` refuse.
            NotImplementedError: for options that a pool does not have.
        """
        new = self._new_tokens(input_ids, least=1)
        if generation_config is not None:
            options = {**options, "generation_config": generation_config}
        turn = self._options_of(len(new), options)
        stream = Stream(self, options, _draws(seed))
        self._enqueue(stream, turn, new)
        return stream

    def __iter__(self) -> Iterator[tuple[Stream, int]]:
        """Runs steps while any stream is active, and yields each token with its stream."""
        while True:
            while (pair := self._next_undelivered()) is not None:
                yield pair
            if not self.is_active:
                return
            self._step()

    def _next_undelivered(self) -> tuple[Stream, int] | None:
        with self._lock:
            return self._undelivered.popleft() if self._undelivered else None

    def step(self) -> list[tuple[Stream, int]]:
        """Reads one piece of a prompt, if one waits, and runs one step of all running streams. Returns the new tokens."""
        self._step()
        with self._lock:
            found = list(self._undelivered)
            self._undelivered.clear()
        return found

    def wait(self, timeout: float | None = None) -> bool:
        """Waits until any stream is active, for at most `timeout` seconds. Returns whether any is."""
        with self._has_work:
            return self._has_work.wait_for(lambda: self.is_active, timeout)

    @property
    def is_active(self) -> bool:
        """Whether any stream is queued, reading or running."""
        with self._lock:
            return any(stream.is_active for stream in [*self._queue, self._reading, *self._rows] if stream is not None)

    @property
    def counts(self) -> dict[str, int]:
        """How many streams have each active or idle `Stream.status`, and how many of the idle streams are parked."""
        with self._lock:
            statuses = [stream.status for stream in self._streams]
            parked = sum(stream.is_parked and stream.status == IDLE for stream in self._streams)
        return {name: statuses.count(name) for name in (QUEUED, READING, RUNNING, IDLE)} | {"parked": parked}

    @property
    def nbytes(self) -> int:
        """Bytes of the batch's cache and of the reader's cache, without parked rows."""
        return self._cache.nbytes + self._reader.cache.nbytes

    def close(self) -> None:
        """Closes all streams."""
        for stream in list(self._streams):
            self._close(stream)

    # --- turns ---

    def _new_tokens(self, input_ids: Any, least: int) -> list[int]:
        if isinstance(input_ids, torch.Tensor):
            if input_ids.ndim == 2 and len(input_ids) != 1:
                raise ValueError(f"a stream is one text, but input_ids have {len(input_ids)} rows; add each by itself")
            if input_ids.ndim not in (1, 2) or input_ids.is_floating_point():
                raise TypeError(
                    f"input_ids must be whole numbers [1, tokens] or [tokens], but are {input_ids.dtype} {list(input_ids.shape)}"
                )
            new = input_ids.flatten().tolist()
        elif isinstance(input_ids, Sequence) and not isinstance(input_ids, str):
            new = list(input_ids)
        else:
            raise TypeError(f"input_ids must be a tensor or a list of integers, but is {type(input_ids).__name__}")
        if len(new) < least:
            raise ValueError("input_ids have no token: a text needs at least one")
        for token in new:
            if not isinstance(token, int) or isinstance(token, bool):
                raise TypeError(f"input_ids must hold integers, but hold {token!r}")
            if not 0 <= token < self._batch.vocab_size:
                raise ValueError(f"token {token} is none of the model's {self._batch.vocab_size} tokens")
        room = self._cache.max_position - self._cache.rebase_step - self.capacity
        if len(new) >= room:
            raise ValueError(
                f"{len(new):,} tokens at once are too many: this model has positions for {room:,}. Send them in several turns."
            )
        return new

    def _options_of(self, length: int, options: dict[str, Any]) -> TurnOptions:
        return turn_options(
            self.model, length, options, SinkWindowCache(self.n_sink, self.window), self.prefill_chunk_size
        )

    def _send(
        self,
        stream: Stream,
        input_ids: Any,
        generation_config: GenerationConfig | None,
        seed: int | None,
        options: dict[str, Any],
    ) -> None:
        new = self._new_tokens(input_ids, least=0)
        if generation_config is None:
            options = {**stream._options, **options}
        else:
            options = {**options, "generation_config": generation_config}
        with self._lock:
            if stream.status != IDLE:
                raise RuntimeError(f"this stream is {stream.status}; only an idle stream can be sent something")
            turn = self._options_of(1 + len(new), options)
            if seed is not None:
                stream._draws = _draws(seed)
            stream._options = options
            self._enqueue(stream, turn, new)

    def _enqueue(self, stream: Stream, turn: TurnOptions, new: list[int]) -> None:
        with self._lock:
            self._idle.pop(stream, None)
            last = [stream._recent[-1]] if stream._recent else []  # which no forward has seen
            stream._unread = last + new
            stream._recent.extend(new)
            stream._turn, stream._left = turn, turn.new_tokens
            stream._tokens = deque(maxlen=self.keep_tokens if turn.new_tokens < 0 else None)
            stream.status, stream.finish_reason, stream._stops = QUEUED, None, False
            self._streams.add(stream)
            self._queue.append(stream)
            self._has_work.notify_all()

    def _close(self, stream: Stream) -> None:
        with self._lock:
            if stream.status not in (CLOSED, FAILED):
                self._forget(stream, CLOSED)

    def _forget(self, stream: Stream, status: str) -> None:
        """Frees all that the pool holds of a stream, which is then "closed" or "failed"."""
        stream.status, stream.finish_reason = status, stream.finish_reason or status
        if stream._row is not None:
            self._free(stream)
        if stream in self._queue:
            self._queue.remove(stream)
        self._forget_parked(stream)
        self._streams.discard(stream)
        self._undelivered = deque(pair for pair in self._undelivered if pair[0] is not stream)

    def _free(self, stream: Stream) -> None:
        assert stream._row is not None
        self._rows[stream._row] = None
        self._batch.pause(stream._row)
        stream._row = None
        self._idle.pop(stream, None)

    # --- one step ---

    def _step(self) -> None:
        if not self._stepping.acquire(blocking=False):
            raise RuntimeError("the pool is in the middle of a step in another thread: only one thread can run steps")
        try:
            with _delaying_interrupts(self._batch.is_ready), torch.no_grad():
                self._launch()  # unless the step before has done so
                try:
                    self._read_piece()  # while the device works on the step
                finally:
                    self._deliver()
                self._launch()  # the device works on the next step while the caller has these tokens
                self.steps += 1
        finally:
            self._stepping.release()

    def _launch(self) -> None:
        if self._launched:
            return
        with self._lock:
            streams = enumerate(self._rows)
            rows = [(row, stream) for row, stream in streams if stream is not None and stream.status == RUNNING]
        if rows:
            self._batch.launch()
            self._launched = rows

    def _deliver(self) -> None:
        """Waits for the step that was launched, and hands its tokens to their streams."""
        if not self._launched:
            return
        tokens = self._batch.tokens()
        with self._lock:
            for row, stream in self._launched:
                if stream.status != RUNNING:
                    continue  # closed meanwhile
                token = tokens[row]
                stream._take(token)
                self._undelivered.append((stream, token))
                is_new_block = not stream._turn.sampling.is_greedy and stream._draws.advance()
                if stream.finish_reason is not None:
                    self._end_turn(stream)
                elif is_new_block:
                    self._batch.renew_draws(row, stream._draws)
            self._launched = []

    def _end_turn(self, stream: Stream) -> None:
        stream.status = IDLE
        if stream._row is not None:
            self._batch.pause(stream._row)
            self._idle[stream] = None

    # --- reading ---

    def _read_piece(self) -> None:
        """Reads one piece of the next stream's text. A text that has been read gets a row as soon as one is free."""
        with self._lock:
            stream = self._reading
            if stream is None or stream.status == CLOSED:
                stream = self._reading = self._queue.popleft() if self._queue else None
            if stream is None:
                return
            begins, stream.status = stream.status == QUEUED, READING
        try:
            if begins:
                self._reader.begin(stream._unread, self._row_of(stream))
                begins = False
            if self._reader.pieces_left:
                token = self._reader.read_piece(stream._turn.sampling, list(stream._recent), stream._draws)
                if token is None:
                    return
                with self._lock:
                    if stream.status != CLOSED:
                        stream._take(token)
                        self._undelivered.append((stream, token))
            with self._lock:
                if stream.status != CLOSED:
                    self._place(stream)
        except Exception as reason:
            with self._lock:
                stream.error, self._reading = reason, None
                if stream.status != CLOSED:
                    self._forget(stream, FAILED)
        except BaseException:  # an interrupt: the text will be read again from its beginning
            with self._lock:
                if (begins or self._reader.pieces_left) and stream.status != CLOSED:
                    stream.status, self._reading = QUEUED, None
                    self._queue.appendleft(stream)
            raise

    def _row_of(self, stream: Stream) -> Row | None:
        if stream._row is not None:
            return self._batch.take(stream._row)
        if stream._parked is None or stream._file is None:
            return stream._parked
        return stream._parked.with_tensors_of(stream._file)

    def _place(self, stream: Stream) -> None:
        """Puts the stream that was read into the batch, if there is room."""
        row = stream._row if stream._row is not None else self._free_row()
        if row is not None:
            self._batch.put(self._reader.row(), row, stream._recent[-1])
            self._forget_parked(stream)
            self._rows[row], stream._row = stream, row
        elif stream.finish_reason is not None:
            self._park(stream, self._reader.row())
        else:
            return  # all rows run: the next step tries again
        self._reading, stream._unread = None, []
        if stream.finish_reason is not None:
            self._end_turn(stream)
        elif row is not None:
            stream.status = RUNNING
            self._batch.run(row, stream._turn.sampling, list(stream._recent), stream._draws)

    def _free_row(self) -> int | None:
        """Finds or frees a row: the row of the stream that has been idle longest, else of the last in the queue that has one."""
        if None in self._rows:
            return self._rows.index(None)
        waiting = (stream for stream in reversed(self._queue) if stream._row is not None)
        stream = next(iter(self._idle), None) or next(waiting, None)
        if stream is None:
            return None
        row = stream._row
        assert row is not None
        self._park(stream, self._batch.take(row))
        self._free(stream)
        return row

    def _park(self, stream: Stream, row: Row) -> None:
        self._forget_parked(stream)
        if self.park_to is None:
            stream._parked = row.on_host()
            return
        path = self.park_to / f"stream-{os.getpid()}-{id(self):x}-{next(self._names)}.safetensors"
        try:
            row.save_tensors(path)
        except OSError as reason:
            warnings.warn(f"{path} cannot be written ({reason}); the stream is parked in memory", stacklevel=2)
            stream._parked = row.on_host()
        else:
            stream._parked, stream._file = replace(row, tensors={}), path

    @staticmethod
    def _forget_parked(stream: Stream) -> None:
        if stream._file is not None:
            stream._file.unlink(missing_ok=True)
        stream._parked = stream._file = None


def _draws(seed: int | None) -> Draws:
    if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool)):
        raise TypeError(f"seed must be an integer, but is {seed!r}")
    return Draws(int(torch.randint(2**62, (), device="cpu")) if seed is None else seed)


@contextmanager
def _delaying_interrupts(delays: bool) -> Iterator[None]:
    """Delays an interrupt (Ctrl-C) until its body ends. Halfway through a step, rows would have tokens that no stream has.

    Args:
        delays (`bool`): False while a graph is compiled, which takes long.
    """
    before = signal.getsignal(signal.SIGINT)
    if not delays or before is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: waiting.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if waiting:
            signal.raise_signal(signal.SIGINT)
