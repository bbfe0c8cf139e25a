"""The one thread that runs a pool's steps. Handlers of requests post to it, and it posts tokens back to their event loop."""

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any

from sink_cache import Stream, StreamPool

log = logging.getLogger("uvicorn.error")


class Turn:
    """One turn of a stream. `events` gets a pair for each token, and one more at the end.

    Attributes:
        stream (`Stream`, *optional*): None until the engine has added a new one.
        events (`asyncio.Queue`): a token and the time at which the pool handed it out (`time.perf_counter`); at the end
            None and the reason, as `Stream.finish_reason`.
        error (`Exception`, *optional*): why the turn failed.
    """

    def __init__(self, stream: Stream | None = None) -> None:
        self.stream = stream
        self.events: asyncio.Queue[tuple[int, float] | tuple[None, str]] = asyncio.Queue()
        self.error: Exception | None = None


class Engine:
    """Steps the pool as long as turns are under way, and waits otherwise. Its methods belong to the event loop's thread.

    Attributes:
        error (`Exception`, *optional*): why a step failed. The rows are then lost, and every turn is refused.
    """

    def __init__(self, pool: StreamPool) -> None:
        self.pool = pool
        self.error: Exception | None = None
        self._posted: SimpleQueue[Callable[[], None] | None] = SimpleQueue()  # None ends the thread
        self._turns: dict[Stream, Turn] = {}  # the thread's own, as is the pool but for its figures
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="steps", daemon=True)

    async def begin(self, turn: Turn, ids: list[int], options: dict[str, Any]) -> None:
        """Adds a stream, or sends to that of the turn.

        Raises:
            TypeError, ValueError, NotImplementedError: as `StreamPool.add`.
            RuntimeError: if a step has failed before.
        """
        if self.error is not None:
            raise RuntimeError(f"the engine has stopped: {self.error}")
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            self._thread.start()
        begun: asyncio.Future[None] = self._loop.create_future()

        def begin() -> None:
            try:
                if turn.stream is None:
                    turn.stream = self.pool.add(ids, **options)
                else:
                    turn.stream.send(ids, **options)
                self._turns[turn.stream] = turn
                self._post(lambda: begun.done() or begun.set_result(None))
            except Exception as reason:
                error = reason
                self._post(lambda: begun.done() or begun.set_exception(error))

        self._posted.put(begin)
        await begun

    def close(self, turn: Turn) -> None:
        """Closes the turn's stream, whether it has ended or not; frees its row."""

        def close() -> None:  # after `begin`, even if nobody waits for that any more
            if turn.stream is not None:
                self._turns.pop(turn.stream, None)
                turn.stream.close()

        self._posted.put(close)

    async def stop(self) -> None:
        """Ends the thread after the present step, and all turns; does nothing the second time."""
        self.error = self.error or RuntimeError("the server is going down")
        if self._thread.is_alive():
            self._posted.put(None)
            await asyncio.to_thread(self._thread.join)

    # --- in the thread ---

    def _run(self) -> None:
        while self._obey():
            try:
                tokens = self.pool.step()
            except Exception as error:  # of the device, and not of one stream
                log.exception("a step failed")
                self.error, tokens = error, []
                self.pool.close()
            self._publish(tokens)
        self.pool.close()
        self._publish([])

    def _publish(self, tokens: list[tuple[Stream, int]]) -> None:
        now = time.perf_counter()
        events: list[tuple[Turn, Any]] = [(self._turns[stream], (token, now)) for stream, token in tokens]
        for stream in [stream for stream in self._turns if not stream.is_active]:
            turn = self._turns.pop(stream)
            turn.error = self.error or stream.error
            events.append((turn, (None, stream.finish_reason)))
        # One call for all of them: each call wakes the event loop.
        self._post(lambda: [turn.events.put_nowait(event) for turn, event in events])

    def _obey(self) -> bool:
        """Does what was posted, and waits until there is something to step. Returns whether to go on."""
        try:
            while True:
                command = self._posted.get(block=not self._turns)
                if command is None:
                    return False
                command()
        except Empty:
            return True

    def _post(self, function: Callable[[], Any]) -> None:
        assert self._loop is not None
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function)
