"""The rows of a pool on their device: one step for all rows, and the choice of their next tokens.

On CUDA, graphs capture the step and the choice. Texts are read at the same time, on a second CUDA stream: memory limits a step,
and arithmetic limits reading.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from .cache import SinkWindowCache
from .internals import cache_kwargs
from .rows import Row, bring_rows_back, counts_of_rows, note_pauses, put_row, take_row
from .sampling import BLOCK, GREEDY, Draws, SamplingOptions, choose
from .steps import Step, pieces, read, steps_between_rebases

_WARM_UP = 2  # how often a choice runs before it is captured


class Batch:
    """A cache with a fixed number of rows. Each row runs, or pauses and stays as it is.

    Args:
        model (`PreTrainedModel`): the model of all rows.
        cache (`SinkWindowCache`): compileable and unused.
        rows (`int`): how many rows there are.
        keep_tokens (`int`): how many tokens a repetition penalty sees.
        config (`GenerationConfig`): says whether and how steps are compiled.
        kwargs (`dict[str, Any]`): keyword arguments of every call of the model.

    Attributes:
        vocab_size (`int`): how many tokens the model knows.
        runs (`list[bool]`): which rows run.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cache: SinkWindowCache,
        rows: int,
        keep_tokens: int,
        config: GenerationConfig,
        kwargs: dict[str, Any],
    ) -> None:
        self.vocab_size: int = model.get_input_embeddings().weight.shape[0]  # type: ignore[index, assignment]
        self.device, self.cache = model.device, cache
        kwargs = {**kwargs, **cache_kwargs(cache, model)}
        with torch.no_grad():  # every row gets a first token here, so that all steps are alike
            first = torch.zeros(rows, 1, dtype=torch.long, device=self.device)
            model(first, position_ids=torch.zeros_like(first), **kwargs)
        self.runs = [False] * rows
        self._run_on_device = self.runs
        self._sampling = [GREEDY] * rows
        self._changed = True  # `runs` or `_sampling`, since they were last written to the device
        self._paused = [0] * rows  # for how many steps each row has paused since `_settle`

        def numbers(*shape: int) -> torch.Tensor:
            return torch.zeros(*shape, dtype=torch.long, device=self.device)

        with torch.inference_mode(False):
            self._running = numbers(rows)
            self._options = torch.tensor([GREEDY.numbers(self.vocab_size)] * rows, device=self.device)
            self._recent, self._place = numbers(rows, keep_tokens), numbers(rows, 1)  # a ring, and its next index
            self._draws, self._drawn = numbers(rows, BLOCK), numbers(rows, 1)
            self._on_host = torch.zeros(rows, dtype=torch.long, pin_memory=self.device.type == "cuda", device="cpu")
        self._step = Step(model, cache, rows, self.device, config, kwargs, self._running)
        self._tokens = self._step.tokens  # each row's last one
        self._launched = torch.cuda.Event() if self.device.type == "cuda" else None
        self._every = self._until_rebase = steps_between_rebases(cache)
        self._compiles_choice = self._step.is_compiled and self.device.type == "cuda"
        self._graphs: dict[bool, torch.cuda.CUDAGraph] = {}  # of the choice, by whether all rows are greedy
        self._warm_up = _WARM_UP

    @property
    def is_ready(self) -> bool:
        """Whether nothing is left to be compiled."""
        return self._step.is_settled

    # --- rows, between steps ---

    def take(self, row: int) -> Row:
        """Returns the stream of a row; its tensors are views."""
        self._settle()
        return take_row(self.cache, row)

    def put(self, stream: Row, row: int, last_token: int) -> None:
        """Puts a stream into a row, which then pauses. `last_token` is the first token that the row will be fed."""
        self._settle()
        put_row(stream, self.cache, row)
        self._step.positions[row] = stream.next_position
        self._tokens[row] = last_token

    def run(self, row: int, sampling: SamplingOptions, recent: list[int], draws: Draws) -> None:
        """Lets a row run from the next step on; `recent` are its last tokens, for a repetition penalty."""
        self.runs[row], self._sampling[row], self._changed = True, sampling, True
        if not sampling.is_greedy:
            size = self._recent.shape[1]
            # A repeated token fills what is missing, because the penalty counts each token once.
            filled = recent + recent[:1] * (size - len(recent))
            self._recent[row] = torch.tensor(filled, device=self.device)
            self._place[row] = len(recent) % size
            self.renew_draws(row, draws)

    def renew_draws(self, row: int, draws: Draws) -> None:
        """Writes the random numbers of a row's stream to the device."""
        self._draws[row] = draws.block.to(self.device)
        self._drawn[row] = draws.drawn

    def pause(self, row: int) -> None:
        """Lets a row stay as it is."""
        self.runs[row], self._changed = False, True

    def _settle(self) -> None:
        """Tells the host which rows have paused. Needed before it looks at rows."""
        note_pauses(self.cache, self._paused)
        self._paused = [0] * len(self._paused)

    # --- a step ---

    def launch(self) -> None:
        """Begins a step of all rows; `tokens` waits for its end."""
        if not self._step.is_compiled:
            self._settle()  # because every uncompiled call reads the positions
        if self._changed:
            self._changed = False  # before `runs` is read, because another thread may pause a row meanwhile
            self._run_on_device = list(self.runs)
            self._running.copy_(torch.tensor(self._run_on_device, device="cpu"))
            options = [sampling.numbers(self.vocab_size) for sampling in self._sampling]
            self._options.copy_(torch.tensor(options, device="cpu"))
        if self._until_rebase == 0:
            self._settle()
            self._step.rebase()
            self._until_rebase = self._every
        with self._whole_or_not_at_all():
            self._choose(self._step(self._tokens))
        self._until_rebase -= 1
        self._paused = [steps + (not runs) for steps, runs in zip(self._paused, self._run_on_device, strict=True)]
        self._on_host.copy_(self._tokens[:, 0], non_blocking=True)
        if self._launched is not None:
            self._launched.record()

    @contextmanager
    def _whole_or_not_at_all(self) -> Iterator[None]:
        """Within, rows advance, unless something fails. A row without its next token would be fed its last one again."""
        counts, positions = counts_of_rows(self.cache), self._step.positions.clone()
        try:
            yield
        except BaseException:
            bring_rows_back(self.cache, counts)
            self._step.positions.copy_(positions)
            raise

    def tokens(self) -> list[int]:
        """Waits for the launched step, and returns the token of each row, paused rows included."""
        if self._launched is not None:
            self._launched.synchronize()
        found: list[int] = self._on_host.tolist()
        return found

    def _choose(self, logits: torch.Tensor) -> None:
        is_greedy = all(row.is_greedy for row, runs in zip(self._sampling, self._run_on_device, strict=True) if runs)
        if self._compiles_choice and self._warm_up:
            self._choose_uncaptured(logits, False)  # compiles sampling now, and not when the first stream samples
            self._warm_up -= self._step.is_settled
        elif self._step.graph is None:
            self._choose_uncaptured(logits, is_greedy)
        else:
            if is_greedy not in self._graphs:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                    self._choose_uncaptured(logits, is_greedy)
                self._graphs[is_greedy] = graph
            self._graphs[is_greedy].replay()

    def _choose_uncaptured(self, logits: torch.Tensor, is_greedy: bool) -> None:
        runs = self._running[:, None] > 0
        if is_greedy:
            chosen = logits.argmax(dim=-1, keepdim=True)
        else:
            draws = self._draws.gather(1, self._drawn)
            chosen = choose(logits, self._options, self._recent, draws, compiled=self._compiles_choice)
            self._recent.scatter_(1, self._place, torch.where(runs, chosen, self._recent.gather(1, self._place)))
            self._place.add_(self._running[:, None]).remainder_(self._recent.shape[1])
            self._drawn.add_(self._running[:, None]).remainder_(BLOCK)
        self._tokens.copy_(torch.where(runs, chosen, self._tokens))


class Reader:
    """Reads one text after another, piece by piece, into a cache with one row.

    Args:
        model (`PreTrainedModel`): the model that reads.
        cache (`SinkWindowCache`): compileable and unused.
        piece_size (`int`): how many tokens a piece has.
        kwargs (`dict[str, Any]`): keyword arguments of every call of the model.

    Attributes:
        pieces_left (`int`): how many pieces of the current text are unread.
    """

    def __init__(self, model: PreTrainedModel, cache: SinkWindowCache, piece_size: int, kwargs: dict[str, Any]) -> None:
        self.model, self.cache, self.piece_size = model, cache, piece_size
        self.device = model.device
        self._kwargs = kwargs
        self._cuda_stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._pieces: Iterator[torch.Tensor] = iter(())
        self.pieces_left = 0

    def begin(self, unread: list[int], before: Row | None) -> None:
        """Begins to read the tokens `unread`: a new text, or the continuation of the row `before`."""
        self.pieces_left = len(pieces(len(unread), self.piece_size))
        with self._reading(after_all=True):
            self.cache.reset()
            if before is not None:
                put_row(before, self.cache, 0)
            ids = torch.tensor([unread], device=self.device)
            kwargs = {**self._kwargs, **cache_kwargs(self.cache, self.model)}
            self._pieces = read(self.model, self.cache, ids, self.piece_size, kwargs)

    def read_piece(self, sampling: SamplingOptions, recent: list[int], draws: Draws) -> int | None:
        """Reads the next piece. After the last piece, returns the token that follows the text."""
        with self._reading():
            logits = next(self._pieces)
            if self.pieces_left > 1:
                self.pieces_left -= 1
                return None
            self.cache.rebase()
            if sampling.is_greedy:
                token = int(logits.argmax())
            else:
                logits = logits.to(self.device)
                options = torch.tensor([sampling.numbers(logits.shape[1])], device=self.device)
                seen = torch.tensor([recent], device=self.device)
                token = int(choose(logits, options, seen, draws.next.to(self.device)))
                draws.advance()
            self.pieces_left = 0  # at last, because a text whose reading was interrupted is read anew
            return token

    def row(self) -> Row:
        """Returns the stream that was read; its tensors are views."""
        if self._cuda_stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._cuda_stream)
        return take_row(self.cache, 0)

    @contextmanager
    def _reading(self, after_all: bool = False) -> Iterator[None]:
        """Runs its body on the reader's CUDA stream. With `after_all`, that stream first waits for the current one."""
        if self._cuda_stream is None:
            yield
            return
        if after_all:
            self._cuda_stream.wait_stream(torch.cuda.current_stream(self.device))
        # cuDNN's attention makes a plan for each new length. A plan takes longer than a step, and keeps memory.
        plans = torch.backends.cuda.cudnn_sdp_enabled()
        torch.backends.cuda.enable_cudnn_sdp(False)
        try:
            with torch.cuda.stream(self._cuda_stream):
                yield
        finally:
            torch.backends.cuda.enable_cudnn_sdp(plans)
