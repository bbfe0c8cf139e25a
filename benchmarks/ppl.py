"""Streaming perplexity: what a bounded cache costs in quality, and what a whole run gains in time and memory.

    python -m benchmarks.ppl                                      # Pythia-70M on the WikiText-103 test split
    python -m benchmarks.ppl --offline                            # no hub: SmolLM2-135M on Python's help topics
    python -m benchmarks.ppl --model FOLDER --text-file FILE --max-tokens 20000 --num-samples 1
    accelerate launch -m benchmarks.ppl ...                       # samples shared out over all GPUs, and machines
    accelerate launch --multi_gpu --num_processes 2 -m benchmarks.ppl --device cpu ...    # the same without GPUs

The text is cut into samples of `--max-tokens`. Each is read from an empty cache, and each of its tokens is predicted
from those before it, once (`--score-from P` leaves out those with fewer than P tokens before them). Methods:

    dense           DynamicCache: everything is kept
    sink            SinkWindowCache(n_sink, capacity - n_sink)
    window          SinkWindowCache(0, capacity): the last tokens without sinks
    dense-batched   one forward over the whole sample, no cache: the standard evaluation, a check on `dense`
    recompute       no cache: the last `capacity` tokens are read anew for each token. That is `capacity` times the
                    work, so only `--recompute-tokens` tokens are predicted, evenly spread over all that are scored.
                    The other methods also report their perplexity on just these, as `same_tokens`

`--mode chunk` (default) reads `--chunk-size` tokens per forward, through `sink_cache.stream`, and each token sees what
it would see if read alone. `--mode step` reads one token per forward, as generating text does, and dense, sink and window
take turns of 64 tokens in it, so that drift of the machine hits all alike; all their caches are in memory at once. Ctrl-C
keeps the methods that are finished, and of those that take turns the samples that all have finished.

Perplexities are the same in both modes; times are not, and are to be compared within a mode only. The speed-up of a run is a
mean over all context lengths of its samples, from 1 to `--max-tokens`; `benchmarks.latency` measures single points of that curve.

A model has learned positions only up to its trained context. Beyond it dense collapses, and its perplexity over a
whole sample says little: look at the perplexity by position. By default a sample is as long as the trained context.

Results: a table here, and in the `--output` folder a JSON file (for its header see `benchmarks.harness`) and two plots
of it. Each object of `rows` has

    method, capacity, n_sink
    perplexity, nll_per_token (nats), accuracy (of the next token), tokens (scored)
    seconds                   of the slowest process
    tokens_per_second         tokens read; for recompute, tokens predicted
    speedup_over_dense        ratio of these
    cache_bytes               keys and values of one sample, at its end
    peak_bytes                growth of memory over the weights, in the worst batch, of `samples_per_batch` samples: the
                              cache, and with it what a turn needs besides
    spread                    over samples; for times, over batches
    by_position, same_tokens  the totals of some of the tokens; likewise, where samples are longer than the trained
                              context, `within_trained_context` and `beyond_trained_context`
    samples, batches          the raw sums and times; `turn_seconds` are those of turns, or of all of a batch at once
    note                      in words, what a reader must know

A row that could not be measured has `null` for numbers and the reason as its note.
"""

from __future__ import annotations

import argparse
import gc
import inspect
import itertools
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
import transformers
from accelerate import PartialState  # type: ignore[import-untyped]
from accelerate.utils import gather_object  # type: ignore[import-untyped]
from tabulate import tabulate
from tqdm import tqdm
from transformers import Cache, DynamicCache, PreTrainedModel

from sink_cache import SinkWindowCache, cache_kwargs, stream

from . import harness, models, plots, texts
from .harness import MIB, BenchmarkError
from .perplexity_metric.perplexity_metric import perplexity_and_accuracy

METHODS = ("dense", "sink", "window", "dense-batched", "recompute")
BOUNDED = ("sink", "window", "recompute")
TAKING_TURNS = ("dense", "sink", "window")  # in step mode
DEFAULTS: dict[str, Any] = {"capacities": [256, 512, 1024, 2048], "recompute_tokens": 1024}
# Two CPU cores should need less than three minutes for this.
OFFLINE_DEFAULTS: dict[str, Any] = {
    "capacities": [256, 512],
    "recompute_tokens": 16,
    "max_tokens": 2048,
    "num_samples": 1,
}
POSITION_BINS = 20
SCORED_AT_ONCE = 64  # tokens, and a turn: one at a time, scoring would weigh in the times of small models
LOGITS_BYTES_AT_ONCE = 2 * 2**30  # in float32, for dense-batched
WARM_UP_TOKENS = 32

Floats = npt.NDArray[np.floating[Any]]
Bools = npt.NDArray[np.bool_]
Method = tuple[str, int | None]  # its name and its capacity, if it has one
NllAndCorrect = tuple[torch.Tensor, torch.Tensor]  # what `score` yields


@dataclass(frozen=True)
class Settings:
    """How the samples are read; see the module docstring."""

    n_sink: int
    chunk_size: int
    batch_size: int


@dataclass(frozen=True)
class Batch:
    """Samples of one length that are read together: their numbers, and their tokens `[samples, tokens + 1]`."""

    samples: list[int]
    ids: torch.Tensor


@dataclass(frozen=True)
class BatchScores:
    """What one method gave for one batch; arrays are `[samples, tokens]`, column i the token after i + 1 others."""

    samples: list[int]
    nll: Floats
    correct: Bools
    turn_seconds: list[float]
    tokens_processed: int
    cache_bytes: int
    peak_bytes: int
    pressure: str

    @property
    def seconds(self) -> float:
        """The time of all turns."""
        return sum(self.turn_seconds)


# --- measuring -------------------------------------------------------------------------------------------------------


def cut_into_batches(samples: Sequence[torch.Tensor], batch_size: int) -> list[Batch]:
    """Return the samples in batches of equal length, in their order, at most `batch_size` in each."""
    batches: list[Batch] = []
    for _, alike in itertools.groupby(enumerate(samples), key=lambda numbered: len(numbered[1])):
        numbers, ids = zip(*alike, strict=True)
        for start in range(0, len(numbers), batch_size):
            some = slice(start, start + batch_size)
            batches.append(Batch(list(numbers[some]), torch.stack(ids[some])))
    return batches


def scored_tokens(samples: Sequence[torch.Tensor], score_from: int) -> Bools:
    """Return which tokens are scored, `[samples, tokens]`: those with at least `score_from` before them."""
    lengths = np.array([len(sample) - 1 for sample in samples])
    before = np.arange(1, lengths.max() + 1)
    return (before >= score_from) & (before <= lengths[:, None])


def spread_sample(scored: Bools, tokens: int) -> Bools:
    """Return at most `tokens` of the scored tokens, evenly spread over all samples and positions."""
    candidates = np.flatnonzero(scored)
    chosen = candidates[np.linspace(0, len(candidates) - 1, min(tokens, len(candidates))).round().astype(int)]
    sample = np.zeros_like(scored)
    sample.flat[chosen] = True
    return sample


def dense_logits(
    model: PreTrainedModel, input_ids: torch.Tensor, cache: DynamicCache, chunk_size: int
) -> Iterator[torch.Tensor]:
    """Feed `input_ids` `[batch, tokens]` in chunks and yield logits `[batch, q, vocab]`: the dense twin of `stream`."""
    kwargs = cache_kwargs(cache, model)
    for chunk in input_ids.split(chunk_size, dim=1):
        yield model(chunk, **kwargs, use_cache=True).logits


def score(chunks: Iterable[torch.Tensor], targets: torch.Tensor, bar: tqdm[Any]) -> Iterator[NllAndCorrect]:
    """Compare logits with the tokens that came, at least `SCORED_AT_ONCE` of each sample at a time, and let the logits go.

    Args:
        chunks: logits `[batch, q, vocab]`, one after the other, of all tokens.
        targets (`torch.Tensor`): `[batch, tokens]`.

    Yields:
        negative log-likelihoods in nats, float32 `[batch, some tokens]`, and whether the token was the first choice.
    """
    held: list[torch.Tensor] = []
    start = 0
    for logits in chunks:
        bar.update(logits.shape[0] * logits.shape[1])
        held.append(logits)
        stop = start + sum(one.shape[1] for one in held)
        if stop - start < SCORED_AT_ONCE and stop < targets.shape[1]:
            continue
        nll, correct = [], []
        for piece in (held[0] if len(held) == 1 else torch.cat(held, dim=1)).split(SCORED_AT_ONCE, dim=1):
            wanted = targets[:, start : start + piece.shape[1]]
            losses = F.cross_entropy(piece.flatten(0, 1).float(), wanted.flatten(), reduction="none")
            nll.append(losses.view_as(wanted))
            correct.append(piece.argmax(-1) == wanted)
            start += piece.shape[1]
        held = []
        del logits, piece  # or they would still be in memory while the next ones are made
        yield torch.cat(nll, dim=1), torch.cat(correct, dim=1)


def logits_of(
    model: PreTrainedModel, inputs: torch.Tensor, method: Method, settings: Settings
) -> tuple[Iterable[torch.Tensor], Cache | None]:
    """Return the logits `[batch, q, vocab]` of inputs `[batch, tokens]`, not yet made, and the cache that will be used.

    For any method but `recompute`, which makes no logits for most tokens.
    """
    name, capacity = method
    if name == "dense-batched":
        return (model(some, use_cache=False).logits for some in [inputs]), None
    if capacity is None:
        dense = DynamicCache(config=model.config)
        return dense_logits(model, inputs, dense, settings.chunk_size), dense
    n_sink = sinks_of(name, settings)
    bounded = SinkWindowCache(n_sink=n_sink, window=capacity - n_sink)
    return stream(model, inputs, bounded, chunk_size=settings.chunk_size), bounded


def sinks_of(method: str, settings: Settings) -> int:
    """Return how many sinks a method keeps."""
    return settings.n_sink if method == "sink" else 0


def score_recomputed(
    model: PreTrainedModel, ids: torch.Tensor, chosen: torch.Tensor, capacity: int, rows_at_once: int, bar: tqdm[Any]
) -> Iterator[NllAndCorrect]:
    """Score the `chosen` `[batch, tokens]` of samples `[batch, tokens + 1]`, reading `capacity` tokens anew for each.

    The first `capacity` tokens of a sample see all before them, so one forward scores these. Yields once, like
    `score`; values that were not asked for are left at zero.
    """
    keep_last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    nll = torch.zeros(chosen.shape, device=ids.device)
    correct = torch.zeros_like(chosen)
    if chosen[:, :capacity].any():
        head = ids[:, : capacity + 1]
        logits = model(head[:, :-1], use_cache=False).logits
        ((nll[:, :capacity], correct[:, :capacity]),) = score([logits], head[:, 1:], harness.no_progress_bar())
        bar.update(int(chosen[:, :capacity].sum()))
    for some in torch.nonzero(chosen[:, capacity:]).split(rows_at_once):
        row, first = some[:, 0], some[:, 1] + 1
        last = first + capacity
        window = ids[row[:, None], first[:, None] + torch.arange(capacity, device=ids.device)]
        if not len(window):
            break
        logits = model(window, use_cache=False, **keep_last).logits[:, -1]
        nll[row, last - 1] = F.cross_entropy(logits.float(), ids[row, last], reduction="none")
        correct[row, last - 1] = logits.argmax(-1) == ids[row, last]
        bar.update(len(row))
    yield nll, correct


class Reading:
    """A batch that one method reads from an empty cache, turn by turn, with time and memory.

    Args:
        chosen: `[all samples of the run, tokens]`, which tokens `recompute` predicts; the other methods predict all.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batch: Batch,
        method: Method,
        chosen: Bools,
        settings: Settings,
        bar: tqdm[Any],
    ) -> None:
        self.batch, self.method, self.chosen = batch, method, chosen[batch.samples, : batch.ids.shape[1] - 1]
        self.clock = harness.Clock(model.device)
        self.cache: Cache | None = None
        self.unread: Iterator[NllAndCorrect]
        ids = batch.ids.to(model.device)
        name, capacity = method
        if name == "recompute" and capacity is not None:
            rows_at_once = max(1, settings.batch_size * settings.chunk_size // capacity)
            wanted = torch.from_numpy(self.chosen).to(model.device)
            self.unread = score_recomputed(model, ids, wanted, capacity, rows_at_once, bar)
        else:
            logits, self.cache = logits_of(model, ids[:, :-1], method, settings)
            self.unread = score(logits, ids[:, 1:], bar)
        self.read: list[NllAndCorrect] = []
        self.turn_seconds: list[float] = []
        self.peak_bytes = self.swapped_bytes = 0
        self.pressure = ""

    def take_turn(self, everything: bool = False) -> bool:
        """Read `SCORED_AT_ONCE` tokens of each sample, or everything, and return whether there is more."""
        held = harness.cache_bytes(self.cache)
        with torch.inference_mode(), harness.PeakMemory(self.clock.device) as peak:
            start = self.clock.now()
            self.read += itertools.islice(self.unread, None if everything else 1)
            self.turn_seconds.append(self.clock.now() - start)
        self.peak_bytes = max(self.peak_bytes, held + peak.bytes)
        self.swapped_bytes += peak.swapped_bytes
        self.pressure = harness.memory_pressure(self.swapped_bytes) or self.pressure
        return sum(len(nll[0]) for nll, _ in self.read) < len(self.chosen[0])

    def scores(self) -> BatchScores:
        """Return what was measured."""
        nll, correct = (torch.cat(pieces, dim=1).cpu().numpy() for pieces in zip(*self.read, strict=True))
        return BatchScores(
            samples=self.batch.samples,
            nll=nll,
            correct=correct,
            turn_seconds=self.turn_seconds,
            tokens_processed=int(self.chosen.sum()) if self.method[0] == "recompute" else nll.size,
            cache_bytes=harness.cache_bytes(self.cache) // len(self.batch.samples),
            peak_bytes=self.peak_bytes,
            pressure=self.pressure,
        )


class InterruptedInTurns(KeyboardInterrupt):
    """Ctrl-C while methods took turns; `measured` is what `measure_all` would return for the samples that all have finished."""

    def __init__(self, measured: dict[Method, list[BatchScores] | str]) -> None:
        super().__init__()
        self.measured = measured


def measure_all(
    model: PreTrainedModel,
    samples: Sequence[torch.Tensor],
    methods: Sequence[Method],
    chosen: Bools,
    settings: Settings,
    state: PartialState,
) -> dict[Method, list[BatchScores] | str]:
    """Score all samples with methods that take turns, or with a single one; each process its share of the batches.

    Returns:
        for each method the batches of all processes, in the order of the samples; or, in words, why one of the processes
        could not measure it.

    Raises:
        InterruptedInTurns: on Ctrl-C, if there is something to keep, and no other process that would have to know.
    """
    batch_size = settings.batch_size
    if methods[0][0] == "dense-batched":
        vocab_size = model.config.get_text_config(decoder=True).vocab_size
        batch_size = max(1, min(batch_size, LOGITS_BYTES_AT_ONCE // (4 * vocab_size * len(samples[0]))))
    # The same batches however many processes there are, so that rounding is the same, too.
    batches = cut_into_batches(samples, batch_size)[state.process_index :: state.num_processes]
    total = sum(
        chosen[b.samples].sum() if name == "recompute" else b.ids[:, 1:].numel() for b in batches for name, _ in methods
    )
    in_turns = len(methods) > 1
    label = f"{len(methods)} methods in turns" if in_turns else " ".join(map(str, filter(None, methods[0])))
    scores: dict[Method, list[BatchScores]] = {method: [] for method in methods}
    reasons: dict[Method, str] = {}
    noting = partial(noting_failure, reasons, settings, in_turns)
    try:
        with harness.progress_bar(total, label, disable=not state.is_main_process) as bar:
            for method in methods if batches else ():
                with noting(method):
                    warm_up(model, batches[0], method, settings)
            for batch in batches:
                readings: dict[Method, Reading] = {}
                for method in (one for one in methods if one not in reasons):
                    with noting(method):
                        readings[method] = Reading(model, batch, method, chosen, settings, bar)
                for method, of_batch in read_batch(readings, in_turns, noting).items():
                    scores[method].append(of_batch)
    except KeyboardInterrupt:
        if not in_turns or not any(scores.values()) or state.num_processes > 1:
            raise
        raise InterruptedInTurns({method: reasons.get(method, scores[method]) for method in methods}) from None
    gc.collect()  # a cache whose layers refer to each other is not freed before
    gathered = gather_object([(scores, reasons)])
    measured: dict[Method, list[BatchScores] | str] = {}
    for method in methods:
        failures = [why[method] for _, why in gathered if method in why]
        of_all = [batch for some, _ in gathered for batch in some[method]]
        measured[method] = failures[0] if failures else sorted(of_all, key=lambda one: one.samples)
    return measured


def read_batch(
    readings: dict[Method, Reading], in_turns: bool, noting: Callable[[Method], AbstractContextManager[None]]
) -> dict[Method, BatchScores]:
    """Read a batch with several methods in turns, or with one at once; `readings` is empty afterwards.

    Returns:
        the scores of those that did not fail.
    """
    scores = {}
    while readings:
        for method in list(readings):
            has_more = False
            with noting(method):
                has_more = readings[method].take_turn(everything=not in_turns)
                if not has_more:
                    scores[method] = readings[method].scores()
            if not has_more:
                del readings[method]  # and its cache, which others may need the memory of
    return scores


@contextmanager
def noting_failure(reasons: dict[Method, str], settings: Settings, in_turns: bool, method: Method) -> Iterator[None]:
    """Note in words why a method cannot go on; the others can."""
    try:
        yield
    except (NotImplementedError, ValueError) as error:
        reasons[method] = str(error) or type(error).__name__
    except (RuntimeError, MemoryError) as error:
        if not harness.is_out_of_memory(error):
            raise
        ways_out = ["a smaller one"] if settings.batch_size > 1 else ["a smaller --max-tokens"]
        ways_out += ["fewer --methods or --capacities, whose caches are in memory at once"] if in_turns else []
        reasons[method] = f"out of memory with --batch-size {settings.batch_size}: choose {', or '.join(ways_out)}"


def warm_up(model: PreTrainedModel, batch: Batch, method: Method, settings: Settings) -> None:
    """Read the start of a batch untimed: the first method of a run would else pay for what all of them share."""
    ids = batch.ids[:, : WARM_UP_TOKENS + 1]
    short = Batch(list(range(len(ids))), ids)
    chosen = np.ones((len(ids), ids.shape[1] - 1), dtype=bool)
    Reading(model, short, method, chosen, settings, harness.no_progress_bar()).take_turn(everything=True)


# --- reporting -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scores:
    """What one method gave for all samples: arrays `[samples, tokens]`, `scored` being false where there is nothing."""

    nll: Floats
    correct: Bools
    scored: Bools

    @classmethod
    def of(cls, batches: Sequence[BatchScores], scored: Bools) -> Scores:
        """Put batches together; of samples that are in none of them nothing is scored."""
        nll, correct = np.zeros(scored.shape, dtype=np.float32), np.zeros_like(scored)
        read = np.zeros((len(scored), 1), dtype=bool)
        for batch in batches:
            nll[batch.samples, : batch.nll.shape[1]] = batch.nll
            correct[batch.samples, : batch.nll.shape[1]] = batch.correct
            read[batch.samples] = True
        return cls(nll, correct, scored & read)

    def restricted(self, mask: Bools) -> Scores:
        """Return the scores with only the tokens scored that are also in `mask`, broadcast to `[samples, tokens]`."""
        return Scores(self.nll, self.correct, self.scored & mask)

    def sums(self) -> dict[str, list[Any]]:
        """Return `nll_sum` (nats), `correct` and `tokens`, each a list over samples."""
        return {
            "nll_sum": np.where(self.scored, self.nll, 0).sum(axis=1, dtype=np.float64).tolist(),
            "correct": (self.correct & self.scored).sum(axis=1).tolist(),
            "tokens": self.scored.sum(axis=1).tolist(),
        }

    def totals(self) -> dict[str, float | int] | None:
        """Return perplexity and accuracy over all scored tokens, or None if there are none or it is not finite."""
        try:
            return perplexity_and_accuracy(**self.sums())
        except ValueError:
            return None

    def by_position(self, bin_tokens: int) -> list[dict[str, Any]]:
        """Return the totals of the tokens with `start` to `stop - 1` tokens before them, bin by bin."""
        before = np.arange(1, self.scored.shape[1] + 1)
        bins = []
        for start in range(1, len(before) + 1, bin_tokens):
            stop = min(start + bin_tokens, len(before) + 1)
            totals = self.restricted((before >= start) & (before < stop)).totals()
            if totals is not None:
                bins.append({"start": start, "stop": stop, **totals})
        return bins


@dataclass(frozen=True)
class Run:
    """What all rows of a run have in common."""

    loaded: models.LoadedModel
    samples: list[torch.Tensor]
    scored: Bools
    recompute_sample: Bools
    settings: Settings
    bin_tokens: int
    num_processes: int

    @property
    def longest(self) -> int:
        """Tokens to predict in the longest sample."""
        return int(self.scored.shape[1])


def empty_row(run: Run, method: str, capacity: int | None, note: str) -> dict[str, Any]:
    """Return the row of a method that could not be measured, with the reason."""
    numbers = ("perplexity", "accuracy", "tokens", "seconds", "tokens_per_second", "speedup_over_dense", "cache_bytes")
    n_sink = None if capacity is None else sinks_of(method, run.settings)
    return {
        "method": method,
        "capacity": capacity,
        "n_sink": n_sink,
        **dict.fromkeys((*numbers, "peak_bytes"), None),
        "note": note,
    }


def make_row(run: Run, method: str, capacity: int | None, batches: Sequence[BatchScores]) -> dict[str, Any]:
    """Return a row of the result file from what was measured; see the module docstring."""
    scores = Scores.of(batches, run.recompute_sample if method == "recompute" else run.scored)
    totals = scores.totals()
    if totals is None:
        return empty_row(run, method, capacity, "no finite perplexity in this dtype: choose another --dtype")
    before = np.arange(1, run.longest + 1)
    trained = run.loaded.trained_context or run.longest
    sums = scores.sums()
    samples = [dict(zip(sums, values, strict=True)) for values in zip(*sums.values(), strict=True)]
    per_sample = [perplexity_and_accuracy(*([value] for value in one.values())) for one in samples if one["tokens"]]
    # Process i had every num_processes-th batch, and they worked side by side.
    seconds = max(sum(b.seconds for b in batches[i :: run.num_processes]) for i in range(run.num_processes))
    processed = sum(batch.tokens_processed for batch in batches)
    return empty_row(run, method, capacity, "; ".join(notes(run, method, capacity, batches))) | {
        **totals,
        "seconds": seconds,
        "tokens_processed": processed,
        "tokens_per_second": processed / seconds,
        "cache_bytes": max(batch.cache_bytes for batch in batches),
        "peak_bytes": max(batch.peak_bytes for batch in batches),
        "samples_per_batch": max(len(batch.samples) for batch in batches),
        "spread": {
            "perplexity": harness.summary([one["perplexity"] for one in per_sample]),
            "accuracy": harness.summary([one["accuracy"] for one in per_sample]),
            "tokens_per_second": harness.summary([b.tokens_processed / b.seconds for b in batches]),
        },
        "by_position": scores.by_position(run.bin_tokens),
        "same_tokens": scores.restricted(run.recompute_sample).totals(),
        "within_trained_context": scores.restricted(before <= trained).totals() if run.longest > trained else None,
        "beyond_trained_context": scores.restricted(before > trained).totals(),
        "samples": samples,
        "batches": [
            {
                "samples": b.samples,
                "seconds": b.seconds,
                "turn_seconds": [round(seconds, 6) for seconds in b.turn_seconds],
                "tokens_processed": b.tokens_processed,
            }
            for b in batches
        ],
    }


def notes(run: Run, method: str, capacity: int | None, batches: Sequence[BatchScores]) -> list[str]:
    """Return what a reader must know about a row, in words."""
    trained, name = run.loaded.trained_context, run.loaded.name
    found = []
    reach = run.longest if capacity is None else min(capacity, run.longest)
    if trained is not None and reach > trained:
        found.append(f"{name} was trained on {trained:,} positions, and this reaches {reach:,}")
    if capacity is not None and capacity >= run.longest:
        found.append("nothing was evicted: no sample is longer than the capacity")
    if method == "recompute" and run.recompute_sample.sum() < run.scored.sum():
        found.append(f"on a sample of {run.recompute_sample.sum():,} of {run.scored.sum():,} tokens")
    if (finished := sum(len(batch.samples) for batch in batches)) < len(run.samples):
        found.append(f"interrupted after {finished:,} of {len(run.samples):,} samples")
    return found + sorted({batch.pressure for batch in batches if batch.pressure})


def groups_of(methods: Sequence[str], capacities: Sequence[int], mode: str) -> list[list[Method]]:
    """Return what is to be measured, in its order, those together that take turns."""
    all_of_them: list[Method] = [
        (name, capacity)
        for name in METHODS
        if name in methods
        for capacity in (dict.fromkeys(capacities) if name in BOUNDED else [None])
    ]
    together = [one for one in all_of_them if mode == "step" and one[0] in TAKING_TURNS]
    return [together] * bool(together) + [[one] for one in all_of_them if one not in together]


def measure_rows(run: Run, groups: Sequence[Sequence[Method]], state: PartialState) -> Iterator[dict[str, Any]]:
    """Measure one group after the other and yield the rows of its methods, as soon as it is finished."""
    dense: tuple[dict[str, Any], Floats] | None = None
    for group in groups:
        interrupted: KeyboardInterrupt | None = None
        try:
            measured = measure_all(run.loaded.model, run.samples, group, run.recompute_sample, run.settings, state)
        except InterruptedInTurns as stop:
            measured, interrupted = stop.measured, stop
        for (method, capacity), batches in measured.items():
            if isinstance(batches, str):
                yield empty_row(run, method, capacity, batches)
                continue
            row = make_row(run, method, capacity, batches)
            nll = Scores.of(batches, run.scored).nll
            if method == "dense" and row["perplexity"] is not None:
                dense = row, nll
            if dense is not None and row["perplexity"] is not None:
                row["speedup_over_dense"] = row["tokens_per_second"] / dense[0]["tokens_per_second"]
                if method == "dense-batched":
                    row["largest_nll_difference_from_dense"] = float(np.abs(nll - dense[1])[run.scored].max())
            yield row
        if interrupted is not None:
            raise interrupted


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows as a text table, with the notes below it; ± is a standard deviation over samples, or batches."""
    headers = [
        "method",
        "capacity",
        "perplexity",
        "same tokens",
        "accuracy",
        "tokens",
        "seconds",
        "tokens/s",
        "× dense",
    ]
    headers += ["cache MiB", "peak MiB", "note"]
    lines, notes = [], []
    for row in rows:
        if row["note"] and row["note"] not in notes:
            notes.append(row["note"])
        note = f"[{notes.index(row['note']) + 1}]" if row["note"] else ""
        if row["perplexity"] is None:
            lines.append([row["method"], row["capacity"], *[None] * (len(headers) - 3), note])
            continue
        spread, speedup = row["spread"], row["speedup_over_dense"]
        lines.append(
            [
                row["method"],
                row["capacity"],
                spread_of(row["perplexity"], spread["perplexity"], ",.3f"),
                f"{row['same_tokens']['perplexity']:,.3f}" if row["same_tokens"] else None,
                spread_of(row["accuracy"], spread["accuracy"], ".2%"),
                f"{row['tokens']:,}",
                f"{row['seconds']:.2f}",
                spread_of(row["tokens_per_second"], spread["tokens_per_second"], ",.1f"),
                None if speedup is None else f"{speedup:.3g}",
                f"{row['cache_bytes'] / MIB:,.2f}",
                f"{row['peak_bytes'] / MIB:,.0f}",
                note,
            ]
        )
    text = tabulate(lines, headers, disable_numparse=True, colalign=["left", *["right"] * 11], missingval="–")
    return "\n".join([text, *(f"[{number}] {note}." for number, note in enumerate(notes, 1))])


def spread_of(value: float, summary: dict[str, float], style: str) -> str:
    """Return a value with its standard deviation, if there is more than one sample or batch to have one."""
    return f"{value:{style}}" + (f" ± {summary['std']:{style}}" if summary["n"] > 1 else "")


# --- command line ----------------------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check the command line, with the defaults filled in that do not depend on the model."""
    parser = harness.Parser(prog="python -m benchmarks.ppl", description=__doc__)
    source = parser.add_argument_group("model and text")
    source.add_argument("--model", default="EleutherAI/pythia-70m", help="an id on the hub or a folder (%(default)s)")
    source.add_argument("--gguf-file", help="a GGUF file in the model's folder or repository")
    source.add_argument("--random-weights", metavar="SHAPE", help=f"for times only: {', '.join(models.SHAPES)}")
    source.add_argument("--offline", action="store_true", help="SmolLM2-135M and Python's help topics: no hub is asked")
    source.add_argument("--dataset", default="Salesforce/wikitext", help="with a text column (%(default)s)")
    source.add_argument("--dataset-config", default="wikitext-103-raw-v1", help="(%(default)s)")
    source.add_argument("--split", default="test", help="(%(default)s)")
    source.add_argument("--text-file", help="a text in UTF-8 instead of a dataset")
    source.add_argument("--max-tokens", type=int, help="tokens to predict in each sample (the model's trained context)")
    source.add_argument("--num-samples", type=int, help="samples from the start of the text (all of it)")
    source.add_argument("--score-from", type=int, default=1, metavar="P", help="score tokens after at least P others")

    what = parser.add_argument_group("methods")
    what.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD", help="(all)")
    what.add_argument("--capacities", nargs="+", type=int, metavar="N", help="sinks included (256 512 1024 2048)")
    what.add_argument("--n-sink", type=int, default=4, help="(%(default)s)")
    what.add_argument("--recompute-tokens", type=int, help="tokens to predict with recompute (1024)")
    what.add_argument("--mode", choices=("chunk", "step"), default="chunk", help="(%(default)s)")
    what.add_argument("--chunk-size", type=int, help="tokens per forward in chunk mode (128)")
    what.add_argument("--batch-size", type=int, help="samples read together (8 in chunk mode, 1 in step mode)")

    how = parser.add_argument_group("machine and output")
    how.add_argument("--device", default="auto", help="auto, cuda, mps or cpu (%(default)s)")
    how.add_argument("--dtype", default="float32", help=f"{', '.join(harness.DTYPES)} (%(default)s)")
    how.add_argument("--attn-implementation", help="sdpa or eager (the model's default)")
    how.add_argument("--sdpa-backend", choices=harness.SDPA_CHOICES, default="auto", help="(auto)")
    how.add_argument(
        "--position-bin", type=int, metavar="TOKENS", help="width of the bins by position (a 20th of a sample)"
    )
    how.add_argument("--output", default="build/benchmarks", help="folder for the JSON file and plots (%(default)s)")
    args = parser.parse_args(argv)

    if args.mode == "step" and args.chunk_size is not None:
        parser.error("--chunk-size is for --mode chunk: --mode step reads one token per forward")
    for name, value in (OFFLINE_DEFAULTS if args.offline else DEFAULTS).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.gguf_file is not None and (args.random_weights is not None or args.offline):
        parser.error("--gguf-file is for --model: leave out --random-weights and --offline")
    defaults = {"chunk_size": 1, "batch_size": 1} if args.mode == "step" else {"chunk_size": 128, "batch_size": 8}
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    least = {"max_tokens": 1, "num_samples": 1, "score_from": 1, "n_sink": 0, "recompute_tokens": 1, "chunk_size": 1}
    for name, lowest in {**least, "batch_size": 1, "position_bin": 1}.items():
        if (value := getattr(args, name)) is not None and value < lowest:
            parser.error(f"--{name.replace('_', '-')} must be at least {lowest}, but is {value}")
    for capacity in args.capacities:
        if capacity <= args.n_sink:
            parser.error(
                f"capacity {capacity} leaves no window: it includes the sinks and must be above --n-sink {args.n_sink}"
            )
    return args


def load(args: argparse.Namespace, dtype: torch.dtype, device: torch.device) -> tuple[models.LoadedModel, texts.Text]:
    """Load what the command line asks for."""
    text = texts.text_file(args.text_file) if args.text_file is not None else None
    attention = args.attn_implementation
    if args.random_weights is not None:
        loaded = models.random_model(args.random_weights, dtype, device, attn_implementation=attention)
    elif args.offline:
        loaded = models.load_offline(dtype, device, attn_implementation=attention)
    else:
        loaded = models.load(args.model, dtype, device, gguf_file=args.gguf_file, attn_implementation=attention)
    if text is None:
        text = texts.embedded() if args.offline else texts.wikitext(args.dataset, args.dataset_config, args.split)
    if not text.text.strip():
        raise BenchmarkError(f"{text.name} is empty: there is nothing to predict")
    return loaded, text


def title(args: argparse.Namespace, loaded: models.LoadedModel, text: texts.Text) -> str:
    """Return the title of the results: what was measured, and what it must not be taken for."""
    remarks = []
    if args.offline:
        remarks.append("offline run: " + ("not WikiText" if args.random_weights else "neither Pythia nor WikiText"))
    if loaded.tokenizer is None:
        remarks.append("random weights: only times and memory mean anything")
    return f"{loaded.name} on {text.name}" + (f" ({'; '.join(remarks)})" if remarks else "")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the table, and write the result file and its plots; see the module docstring."""
    args = parse(argv)
    folder = harness.output_folder(args.output)
    dtype, sdpa = harness.parse_dtype(args.dtype), harness.choose_sdpa(args.sdpa_backend)
    transformers.utils.logging.disable_progress_bar()
    state = PartialState(cpu=args.device == "cpu" or not torch.cuda.is_available())
    device = harness.choose_device(args.device, state.local_process_index)
    loaded, text = load(args, dtype, device)
    max_tokens = args.max_tokens or loaded.trained_context or 2048
    samples = texts.cut(texts.tokenize(text, loaded.tokenizer), max_tokens, args.num_samples)
    scored = scored_tokens(samples, args.score_from)
    if not scored.any():
        raise BenchmarkError(
            f"--score-from {args.score_from} leaves nothing: the longest sample has {scored.shape[1]} tokens"
        )
    run = Run(
        loaded=loaded,
        samples=samples,
        scored=scored,
        recompute_sample=spread_sample(scored, args.recompute_tokens),
        settings=Settings(args.n_sink, args.chunk_size, args.batch_size),
        bin_tokens=args.position_bin or math.ceil(scored.shape[1] / POSITION_BINS),
        num_processes=state.num_processes,
    )
    result = harness.header(
        "ppl",
        title(args, loaded, text),
        device,
        dtype,
        argv=argv,
        model=loaded.description,
        data=text.description
        | {
            "samples": len(samples),
            "max_tokens": max_tokens,
            "scored_tokens": int(scored.sum()),
            "score_from": args.score_from,
        },
        protocol={
            "mode": args.mode,
            "chunk_size": args.chunk_size,
            "batch_size": args.batch_size,
            "recompute_tokens": int(run.recompute_sample.sum()),
            "warm_up_tokens": WARM_UP_TOKENS,
            "turn_tokens": SCORED_AT_ONCE,
            "num_processes": state.num_processes,
            "sdpa_backend": args.sdpa_backend,
            "sdpa_enabled": sdpa,
        },
        interrupted=False,
        rows=[],
    )
    name = f"ppl {loaded.name} {text.name} {len(samples)}x{max_tokens} {args.mode}"
    path = folder / (re.sub(r"[^a-z0-9.]+", "-", name.lower()) + ".json")
    if state.is_main_process:
        print(result["title"], flush=True)
    try:
        for row in measure_rows(run, groups_of(args.methods, args.capacities, args.mode), state):
            result["rows"].append(row)
            if state.is_main_process:
                harness.write_json(path, result)
    except KeyboardInterrupt:
        result["interrupted"] = True
        if state.is_main_process and result["rows"]:
            harness.write_json(path, result)
    if state.is_main_process and result["rows"]:
        print(table(result["rows"]))
        if all(row["perplexity"] is None for row in result["rows"]):
            raise BenchmarkError(f"nothing could be measured: {result['rows'][0]['note']}")
        for written in [path, *plots.plot(path, folder)]:
            print(f"wrote {written}")
    if result["interrupted"]:
        raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(harness.run(main))
