"""The rows of a pool on their device: one step for all of them, and the choice of their next tokens.

On CUDA both are captured in graphs. Meanwhile texts are read on a CUDA stream of their own: a step waits for memory, and reading
for arithmetic.
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

_WARM_UP = 2  # runs of a choice before it is captured


class Batch:
    """A cache with a fixed number of rows, which run, or pause and stay as they are.

    Args:
        model (`PreTrainedModel`): the model of all rows.
        cache (`SinkWindowCache`): compileable and unused.
        rows (`int`): how many.
        keep_tokens (`int`): how many tokens a repetition penalty sees.
        config (`GenerationConfig`): says whether and how steps are compiled.
        kwargs (`dict[str, Any]`): what every call of the model gets.

    Attributes:
        vocab_size (`int`): how many tokens the model knows.
        runs (`list[bool]`): the rows that run.
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
        with torch.no_grad():  # each row begins with a token, so that all steps are alike
            first = torch.zeros(rows, 1, dtype=torch.long, device=self.device)
            model(first, position_ids=torch.zeros_like(first), **kwargs)
        self.runs = [False] * rows
        self._run_on_device = self.runs
        self._sampling = [GREEDY] * rows
        self._changed = True  # since these were last written to the device
        self._paused = [0] * rows  # steps since the host last looked

        def numbers(*shape: int) -> torch.Tensor:
            return torch.zeros(*shape, dtype=torch.long, device=self.device)

        with torch.inference_mode(False):
            self._running = numbers(rows)
            self._options = torch.tensor([GREEDY.numbers(self.vocab_size)] * rows, device=self.device)
            self._recent, self._place = numbers(rows, keep_tokens), numbers(rows, 1)  # a ring, and where it goes on
            self._draws, self._drawn = numbers(rows, BLOCK), numbers(rows, 1)
            self._on_host = torch.zeros(rows, dtype=torch.long, pin_memory=self.device.type == "cuda", device="cpu")
        self._step = Step(model, cache, rows, self.device, config, kwargs, self._running)
        self._tokens = self._step.tokens  # each row's last one
        self._launched = torch.cuda.Event() if self.device.type == "cuda" else None
        self._every = self._until_rebase = steps_between_rebases(cache)
        self._compiles_choice = self._step.is_compiled and self.device.type == "cuda"
        self._graphs: dict[bool, torch.cuda.CUDAGraph] = {}  # of choices, by whether all rows are greedy
        self._warm_up = _WARM_UP

    @property
    def is_ready(self) -> bool:
        """Whether all is compiled that will be."""
        return self._step.is_settled

    # --- rows, between steps ---

    def take(self, row: int) -> Row:
        """The stream of a row, as views."""
        self._settle()
        return take_row(self.cache, row)

    def put(self, stream: Row, row: int, last_token: int) -> None:
        """Puts a stream into a row, which pauses; `last_token` is the one that it will be fed first."""
        self._settle()
        put_row(stream, self.cache, row)
        self._step.positions[row] = stream.next_position
        self._tokens[row] = last_token

    def run(self, row: int, sampling: SamplingOptions, recent: list[int], draws: Draws) -> None:
        """Lets a row run from the next step on; `recent` are its last tokens, for a repetition penalty."""
        self.runs[row], self._sampling[row], self._changed = True, sampling, True
        if not sampling.is_greedy:
            size = self._recent.shape[1]
            # What is missing is a token that is there already, for which the penalty counts once.
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
        """Brings the host up to date, before it looks at rows."""
        note_pauses(self.cache, self._paused)
        self._paused = [0] * len(self._paused)

    # --- a step ---

    def launch(self) -> None:
        """Begins a step of all rows; `tokens` waits for its end."""
        if not self._step.is_compiled:
            self._settle()  # as every call looks at the positions
        if self._changed:
            self._changed = False  # first, because another thread may pause a row meanwhile
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
        """The tokens of the step that was launched, one for each row, also for those that pause."""
        if self._launched is not None:
            self._launched.synchronize()
        found: list[int] = self._on_host.tolist()
        return found

    def _choose(self, logits: torch.Tensor) -> None:
        is_greedy = all(one.is_greedy for one, runs in zip(self._sampling, self._run_on_device, strict=True) if runs)
        if self._compiles_choice and self._warm_up:
            is_greedy = False  # all is compiled in the first steps, and not when the first stream samples
            self._warm_up -= self._step.is_settled
        elif self._step.graph is not None:
            if is_greedy not in self._graphs:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                    self._choose_uncaptured(logits, is_greedy)
                self._graphs[is_greedy] = graph
            return self._graphs[is_greedy].replay()
        self._choose_uncaptured(logits, is_greedy)

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
    """Reads one text after another, each in pieces, into a cache with one row.

    Args:
        model (`PreTrainedModel`): reads.
        cache (`SinkWindowCache`): compileable and unused.
        piece_size (`int`): tokens of a piece.
        kwargs (`dict[str, Any]`): what every call of the model gets.

    Attributes:
        pieces_left (`int`): of the text that is read.
    """

    def __init__(self, model: PreTrainedModel, cache: SinkWindowCache, piece_size: int, kwargs: dict[str, Any]) -> None:
        self.model, self.cache, self.piece_size = model, cache, piece_size
        self.device = model.device
        self._kwargs = kwargs
        self._beside = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._pieces: Iterator[torch.Tensor] = iter(())
        self.pieces_left = 0

    def begin(self, unread: list[int], before: Row | None) -> None:
        """Begins with these tokens, of a new text or after the row of one."""
        self.pieces_left = len(pieces(len(unread), self.piece_size))
        with self._reading(after_all=True):
            self.cache.reset()
            if before is not None:
                put_row(before, self.cache, 0)
            ids = torch.tensor([unread], device=self.device)
            kwargs = {**self._kwargs, **cache_kwargs(self.cache, self.model)}
            self._pieces = read(self.model, self.cache, ids, self.piece_size, kwargs)

    def read_piece(self, sampling: SamplingOptions, recent: list[int], draws: Draws) -> int | None:
        """Reads the next piece; after the last one, returns the token that follows."""
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
        """The stream that was read, as views."""
        if self._beside is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._beside)
        return take_row(self.cache, 0)

    @contextmanager
    def _reading(self, after_all: bool = False) -> Iterator[None]:
        """Within, work goes to a CUDA stream of its own, after all that the present one has to do if need be."""
        if self._beside is None:
            yield
            return
        if after_all:
            self._beside.wait_stream(torch.cuda.current_stream(self.device))
        # cuDNN's attention makes a plan for each length that it meets: this takes longer than a step, and memory for each.
        plans = torch.backends.cuda.cudnn_sdp_enabled()
        torch.backends.cuda.enable_cudnn_sdp(False)
        try:
            with torch.cuda.stream(self._beside):
                yield
        finally:
            torch.backends.cuda.enable_cudnn_sdp(plans)
