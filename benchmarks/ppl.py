"""Streaming perplexity: what a bounded cache costs in quality, and what a whole run gains in time and memory."""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm import tqdm
from transformers import Cache, PreTrainedModel

from sink_cache import cache_kwargs, stream

from . import harness, models
from .arms import WITH_SINKS, Arm, choose
from .harness import BenchmarkError
from .perplexity_metric.sums import perplexity_and_accuracy

NAMES = ("dense", "sink", "window", "dense-batched", "recompute", "line-breaks")
TAKING_TURNS = ("dense", "sink", "window")  # in step mode
DEFAULTS: dict[str, Any] = {"capacities": [256, 512, 1024, 2048], "recompute_tokens": 1024}
# Two CPU cores should need less than three minutes for this.
OFFLINE_DEFAULTS = {"capacities": [256, 512], "recompute_tokens": 16, "max_tokens": 2048, "num_samples": 1}
MODE_DEFAULTS = {"step": {"chunk_size": 1, "batch_size": 1}, "chunk": {"chunk_size": 128, "batch_size": 8}}
POSITION_BINS = 20
SCORED_AT_ONCE = 64  # tokens, and a turn: one at a time, scoring would weigh in the times of small models
LOGITS_BYTES_AT_ONCE = 2 * 2**30  # in float32, for dense-batched
WARM_UP_TOKENS = 32

Floats = npt.NDArray[np.floating[Any]]
Bools = npt.NDArray[np.bool_]
NllAndCorrect = tuple[torch.Tensor, torch.Tensor]  # what `score` yields


@dataclass(frozen=True)
class Batch:
    """Samples of one length that are read together: their numbers, and their tokens `[samples, tokens + 1]`."""

    samples: list[int]
    ids: torch.Tensor


# --- measuring ---


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


def dense_logits(model: PreTrainedModel, ids: torch.Tensor, cache: Cache, chunk_size: int) -> Iterator[torch.Tensor]:
    """Feed `ids` `[batch, tokens]` in chunks and yield logits `[batch, q, vocab]`: the dense twin of `stream`."""
    kwargs = cache_kwargs(cache, model)
    for chunk in ids.split(chunk_size, dim=1):
        yield model(chunk, **kwargs, use_cache=True).logits


def score(chunks: Iterable[torch.Tensor], targets: torch.Tensor, bar: tqdm[Any]) -> Iterator[NllAndCorrect]:
    """Compare logits with the tokens that came, at least `SCORED_AT_ONCE` of each sample at a time, and let the logits go.

    Takes logits `[batch, q, vocab]` of all tokens, one after the other, and targets `[batch, tokens]`. Yields negative
    log-likelihoods in nats, float32 `[batch, some tokens]`, and whether the token was the first choice.
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


def score_recomputed(
    model: PreTrainedModel, ids: torch.Tensor, chosen: torch.Tensor, capacity: int, rows_at_once: int, bar: tqdm[Any]
) -> Iterator[NllAndCorrect]:
    """Score the `chosen` `[batch, tokens]` of samples `[batch, tokens + 1]`, reading `capacity` tokens anew for each.

    The first `capacity` tokens of a sample see all before them, so one forward scores these. Yields once, like
    `score`; values that were not asked for are left at zero.
    """
    keep_last = {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}
    nll = torch.zeros(chosen.shape, device=ids.device)
    correct = torch.zeros_like(chosen)
    if chosen[:, :capacity].any():
        head = ids[:, : capacity + 1]
        logits = model(head[:, :-1], use_cache=False).logits
        ((nll[:, :capacity], correct[:, :capacity]),) = score([logits], head[:, 1:], harness.progress_bar(disable=True))
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
    """A batch that one arm reads from an empty cache, turn by turn, with time and memory.

    `chosen`, `[all samples of the run, tokens]`, are the tokens that `recompute` predicts; the other arms predict all.
    """

    def __init__(self, run: Run, batch: Batch, arm: Arm, chosen: Bools, bar: tqdm[Any]) -> None:
        model, chunk = run.loaded.model, run.args.chunk_size
        self.batch, self.arm, self.chosen = batch, arm, chosen[batch.samples, : batch.ids.shape[1] - 1]
        self.clock, self.cache = harness.Clock(model.device), arm.make_cache(model, run.args.n_sink)
        ids = batch.ids.to(model.device)
        inputs = ids[:, :-1]
        if arm.name == "recompute":
            rows_at_once = max(1, run.args.batch_size * chunk // int(arm.capacity or 1))
            wanted = torch.from_numpy(self.chosen).to(model.device)
            self.unread = score_recomputed(model, ids, wanted, int(arm.capacity or 1), rows_at_once, bar)
        else:
            if self.cache is None:
                logits: Iterable[torch.Tensor] = (model(some, use_cache=False).logits for some in [inputs])
            elif arm.name == "dense":
                logits = dense_logits(model, inputs, self.cache, chunk)
            else:
                if arm.name == "line-breaks":  # they come before the text, and nothing of them is scored
                    breaks = torch.full_like(inputs[:, : self.cache.n_sink], models.line_break(run.loaded.tokenizer))
                    list(stream(model, breaks, self.cache, chunk_size=chunk))
                logits = stream(model, inputs, self.cache, chunk_size=chunk)
            self.unread = score(logits, ids[:, 1:], bar)
        self.read: list[NllAndCorrect] = []
        self.turn_seconds: list[float] = []
        self.peak_bytes: int | None = None

    def take_turn(self, everything: bool = False) -> bool:
        """Read `SCORED_AT_ONCE` tokens of each sample, or everything, and return whether there is more."""
        held = harness.cache_bytes(self.cache)
        with torch.inference_mode(), harness.PeakMemory(self.clock.device) as peak:
            start = self.clock.now()
            self.read += itertools.islice(self.unread, None if everything else 1)
            self.turn_seconds.append(self.clock.now() - start)
        if peak.bytes is not None:
            self.peak_bytes = max(self.peak_bytes or 0, held + peak.bytes)
        return sum(len(nll[0]) for nll, _ in self.read) < len(self.chosen[0])

    def scores(self) -> dict[str, Any]:
        """Return what was measured; `nll` and `correct` are `[samples, tokens]`, column i the token after i + 1 others."""
        nll, correct = (torch.cat(pieces, dim=1).cpu().numpy() for pieces in zip(*self.read, strict=True))
        return {
            "samples": self.batch.samples,
            "seconds": sum(self.turn_seconds),
            "turn_seconds": [round(seconds, 6) for seconds in self.turn_seconds],
            "tokens_processed": int(self.chosen.sum()) if self.arm.name == "recompute" else nll.size,
            "cache_bytes": harness.cache_bytes(self.cache) // len(self.batch.samples),
            "peak_bytes": self.peak_bytes,
            "nll": nll,
            "correct": correct,
        }


@dataclass
class Run:
    """A run over samples: which tokens are scored, which of them `recompute` predicts, and what was measured so far."""

    loaded: models.LoadedModel
    args: argparse.Namespace
    samples: list[torch.Tensor]
    scored: Bools
    recompute_sample: Bools
    state: PartialState
    scores: dict[Arm, list[dict[str, Any]]] = field(default_factory=dict)
    reasons: dict[Arm, str] = field(default_factory=dict)

    def measure(self, arms: Sequence[Arm]) -> None:
        """Score all samples with arms that take turns, or with a single one; each process its share of the batches."""
        batch_size, state = self.args.batch_size, self.state
        if arms[0].name == "dense-batched":
            vocab_size = self.loaded.model.config.get_text_config(decoder=True).vocab_size
            batch_size = max(1, min(batch_size, LOGITS_BYTES_AT_ONCE // (4 * vocab_size * len(self.samples[0]))))
        # The same batches however many processes there are, so that rounding is the same, too.
        batches = cut_into_batches(self.samples, batch_size)[state.process_index :: state.num_processes]
        total, in_turns = sum(b.ids[:, 1:].numel() for b in batches) * len(arms), len(arms) > 1
        self.scores |= {arm: [] for arm in arms}
        with harness.progress_bar(total=total, desc=" ".join(map(str, arms)), disable=not state.is_main_process) as bar:
            for arm in arms if batches else ():
                with self.noting_failure(arm, in_turns):
                    self.warm_up(batches[0], arm)
            for batch in batches:
                readings: dict[Arm, Reading] = {}
                for arm in (one for one in arms if one not in self.reasons):
                    with self.noting_failure(arm, in_turns):
                        readings[arm] = Reading(self, batch, arm, self.recompute_sample, bar)
                for arm, of_batch in self.read_batch(readings, in_turns).items():
                    self.scores[arm].append(of_batch)
        gc.collect()  # a cache whose layers refer to each other is not freed before
        for scores, reasons in gather_object([(self.scores, self.reasons)]) if state.num_processes > 1 else ():
            self.reasons |= reasons
            for arm in arms:
                known = [one["samples"] for one in self.scores[arm]]
                self.scores[arm] += [one for one in scores[arm] if one["samples"] not in known]
        for arm in arms:
            self.scores[arm].sort(key=lambda one: one["samples"])

    def read_batch(self, readings: dict[Arm, Reading], in_turns: bool) -> dict[Arm, dict[str, Any]]:
        """Read a batch with several arms in turns, or with one at once, and return the scores of those that did not fail."""
        scores = {}
        while readings:
            for arm in list(readings):
                has_more = False
                with self.noting_failure(arm, in_turns):
                    has_more = readings[arm].take_turn(everything=not in_turns)
                    if not has_more:
                        scores[arm] = readings[arm].scores()
                if not has_more:
                    del readings[arm]  # and its cache, which others may need the memory of
        return scores

    @contextlib.contextmanager
    def noting_failure(self, arm: Arm, in_turns: bool) -> Iterator[None]:
        """Note in words why an arm cannot go on; the others can."""
        try:
            yield
        except (NotImplementedError, ValueError) as error:
            self.reasons[arm] = str(error) or type(error).__name__
        except (RuntimeError, MemoryError) as error:
            if not harness.is_out_of_memory(error):
                raise
            ways_out = "a smaller one, or a smaller --max-tokens"
            ways_out += ", or fewer --arms or --capacities, whose caches are in memory at once" if in_turns else ""
            self.reasons[arm] = f"out of memory with --batch-size {self.args.batch_size}: choose {ways_out}"

    def warm_up(self, batch: Batch, arm: Arm) -> None:
        """Read the start of a batch untimed: the first arm of a run would else pay for what all of them share."""
        ids = batch.ids[:, : WARM_UP_TOKENS + 1]
        chosen = np.ones((len(ids), ids.shape[1] - 1), dtype=bool)
        bar = harness.progress_bar(disable=True)
        Reading(self, Batch(list(range(len(ids))), ids), arm, chosen, bar).take_turn(everything=True)


# --- reporting ---


def put_together(batches: Sequence[dict[str, Any]], scored: Bools) -> tuple[Floats, Bools]:
    """Return nll and correct of all samples, `[samples, tokens]`."""
    nll, correct = np.zeros(scored.shape, dtype=np.float32), np.zeros_like(scored)
    for batch in batches:
        tokens = batch["nll"].shape[1]
        nll[batch["samples"], :tokens], correct[batch["samples"], :tokens] = batch["nll"], batch["correct"]
    return nll, correct


def sums(nll: Floats, correct: Bools, scored: Bools) -> dict[str, list[Any]]:
    """Return `nll_sum` (nats), `correct` and `tokens` of the scored tokens, each a list over samples."""
    nll_sum = np.where(scored, nll, 0).sum(axis=1, dtype=np.float64).tolist()
    return {
        "nll_sum": nll_sum,
        "correct": (correct & scored).sum(axis=1).tolist(),
        "tokens": scored.sum(axis=1).tolist(),
    }


def totals(nll: Floats, correct: Bools, scored: Bools) -> dict[str, float | int] | None:
    """Return perplexity and accuracy over all scored tokens, or None if there are none or it is not finite."""
    try:
        return perplexity_and_accuracy(**sums(nll, correct, scored))
    except ValueError:
        return None


def make_row(run: Run, arm: Arm) -> dict[str, Any]:
    """Return a row of the result file from what was measured."""
    numbers = ("perplexity", "accuracy", "tokens", "seconds", "tokens_per_second", "cache_bytes", "peak_bytes")
    row = {"arm": arm.name, "capacity": arm.capacity, "n_sink": arm.sinks(run.args.n_sink), "reason": "", "warning": ""}
    row |= dict.fromkeys(numbers)
    if arm in run.reasons:
        return row | {"reason": run.reasons[arm]}
    batches, n = run.scores[arm], run.state.num_processes
    scored = run.recompute_sample if arm.name == "recompute" else run.scored
    nll, correct = put_together(batches, scored)
    if (everything := totals(nll, correct, scored)) is None:
        return row | {"reason": "no finite perplexity in this dtype: choose another --dtype"}
    before, longest = np.arange(1, scored.shape[1] + 1), scored.shape[1]
    trained = run.loaded.trained_context or longest
    masked = {"same_tokens": run.recompute_sample, "within_trained_context": before <= trained}
    masked["beyond_trained_context"] = before > trained
    bounds = itertools.pairwise([*range(1, longest + 1, run.args.position_bin), longest + 1])
    bins = ((a, b, totals(nll, correct, scored & (before >= a) & (before < b))) for a, b in bounds)
    by_sample = sums(nll, correct, scored)
    # Process i had every n-th batch, and they worked side by side.
    seconds = max(sum(one["seconds"] for one in batches[i::n]) for i in range(n))
    processed = sum(one["tokens_processed"] for one in batches)
    row |= {"seconds": seconds, "tokens_processed": processed, "tokens_per_second": processed / seconds}
    row["cache_bytes"] = max(one["cache_bytes"] for one in batches)
    row["peak_bytes"] = max((one["peak_bytes"] for one in batches if one["peak_bytes"] is not None), default=None)
    row |= {name: totals(nll, correct, scored & mask) for name, mask in masked.items()}
    row["by_position"] = [{"start": start, "stop": stop, **found} for start, stop, found in bins if found]
    row["samples"] = [dict(zip(by_sample, values, strict=True)) for values in zip(*by_sample.values(), strict=True)]
    raw = ("samples", "seconds", "turn_seconds", "tokens_processed")
    row["batches"] = [{name: one[name] for name in raw} for one in batches]
    if min(arm.capacity or longest, longest) > trained:
        row["warning"] = f"beyond the trained context of {trained:,} positions"
    return row | everything


def groups_of(args: argparse.Namespace) -> list[list[Arm]]:
    """Return what is to be measured, in its order, those together that take turns."""
    chosen = sorted(choose(args.arms, args.capacities), key=lambda arm: NAMES.index(arm.name))
    arms = [
        replace(arm, n_sink=n_sink)
        for arm in chosen
        for n_sink in (args.n_sinks if arm.name in WITH_SINKS and args.n_sinks else [None])
        if arm.name != "line-breaks" or n_sink != 0
    ]
    together = [one for one in arms if args.mode == "step" and one.name in TAKING_TURNS]
    return [together] * bool(together) + [[one] for one in arms if one not in together]


def measure_rows(run: Run, groups: Sequence[Sequence[Arm]]) -> Iterator[dict[str, Any]]:
    """Measure one group after the other and yield the rows of its arms, as soon as it is finished."""
    dense: Floats | None = None
    for group in groups:
        run.measure(group)
        for arm in group:
            row = make_row(run, arm)
            if not row["reason"]:
                nll = put_together(run.scores[arm], run.scored)[0]
                dense = nll if arm.name == "dense" else dense
                if arm.name == "dense-batched" and dense is not None:
                    row["largest_nll_difference_from_dense"] = float(np.abs(nll - dense)[run.scored].max())
            yield row


COLUMNS = ["arm", "capacity", "perplexity", "same_tokens.perplexity", "accuracy", "tokens", "seconds"]
COLUMNS += ["tokens_per_second", "cache_bytes", "peak_bytes", "reason", "warning"]


def tables(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows as a text table; `spread` is the standard deviation of perplexity over samples."""
    dense = next((row["tokens_per_second"] for row in rows if row["arm"] == "dense"), None) or math.nan
    samples = [[one for one in row.get("samples", ()) if one["tokens"]] for row in rows]
    of_samples = [[math.exp(one["nll_sum"] / one["tokens"]) for one in some] for some in samples]
    spread = [np.std(found, ddof=1) if len(found) > 1 else None for found in of_samples]
    gain = [(row["tokens_per_second"] or math.nan) / dense for row in rows]
    sinks = ["" if row["n_sink"] is None else str(row["n_sink"]) for row in rows]
    return harness.table(rows, COLUMNS, sinks=sinks, spread=spread, **{"× dense": gain})


# --- command line ---


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check the command line, with the defaults filled in that do not depend on the model."""
    parser = harness.Parser("ppl", __doc__)
    models.add_text_options(parser)
    parser.names("--arms", "--methods", of=NAMES, default=NAMES[:-1])
    several = "several numbers of sinks, each with rows of its own, instead of --n-sink"
    parser.add_argument("--n-sinks", nargs="+", type=int, metavar="N", help=several)
    parser.least["n_sinks"] = 0
    mode = "chunk: many tokens a forward; step: one (%(default)s)"
    parser.add_argument("--mode", choices=MODE_DEFAULTS, default="chunk", help=mode)
    parser.numbers(
        max_tokens=(None, "tokens to predict in each sample (the model's trained context)"),
        num_samples=(None, "samples, from the start of the text (all of it)"),
        score_from=(1, "tokens of each sample that come before the first scored one"),
        position_bin=(None, "tokens in a bin of by_position (a 20th of a sample)"),
        recompute_tokens=(None, "tokens to predict with recompute (1024)"),
        chunk_size=(None, "tokens per forward in chunk mode (128)"),
        batch_size=(None, "samples read together (8 in chunk mode, 1 in step mode)"),
    )
    args = parser.parse(argv)
    chunks, recompute = args.chunk_size is not None, args.recompute_tokens is not None
    parser.refuse(
        {
            "--chunk-size is for --mode chunk: --mode step reads one token per forward": args.mode == "step" and chunks,
            "--recompute-tokens is for the arm recompute, which --arms leaves out": recompute
            and "recompute" not in args.arms,
        }
    )
    # Small only if everything is left to this module.
    small = args.offline and not (args.model or args.text_file or args.dataset)
    harness.fill_in(args, **MODE_DEFAULTS[args.mode], **(OFFLINE_DEFAULTS if small else DEFAULTS))
    parser.check_capacities(args)
    least, most = min(args.capacities), max(args.n_sinks or [0])
    sinks, without = ", ".join(one for one in NAMES if one in WITH_SINKS), not set(WITH_SINKS) & set(args.arms)
    parser.refuse(
        {
            f"capacity {least} leaves no window: it includes the {most} sinks of --n-sinks": least <= most,
            f"--n-sinks is for the arms {sinks}, which --arms leaves out": args.n_sinks and without,
        }
    )
    return args


def plan(args: argparse.Namespace, loaded: models.LoadedModel, text: models.Text, state: PartialState) -> Run:
    """Return the samples of a run and which of their tokens are scored."""
    args.max_tokens = args.max_tokens or loaded.trained_context or 2048
    samples = models.cut(models.tokenize(text, loaded.tokenizer), args.max_tokens, args.num_samples)
    scored = scored_tokens(samples, args.score_from)
    if not scored.any():
        longest = scored.shape[1]
        raise BenchmarkError(f"--score-from {args.score_from} leaves nothing: the longest sample has {longest} tokens")
    harness.fill_in(args, position_bin=math.ceil(scored.shape[1] / POSITION_BINS))
    return Run(loaded, args, samples, scored, spread_sample(scored, args.recompute_tokens), state)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the table, and write the result file."""
    args = parse(argv)
    state = PartialState(cpu=args.device == "cpu" or not torch.cuda.is_available())
    harness.fill_in(args, dtype="float32")
    device, dtype = harness.set_up(args, state.local_process_index)
    text = models.chosen_text(args) if args.text_file else None
    for loaded in models.chosen(args, dtype, device, "EleutherAI/pythia-70m"):
        text = text or models.chosen_text(args)
        run = plan(args, loaded, text, state)
        tokens = {"samples": len(run.samples), "scored_tokens": int(run.scored.sum()), "max_tokens": args.max_tokens}
        more = {"warm_up_tokens": WARM_UP_TOKENS, "turn_tokens": SCORED_AT_ONCE, "num_processes": state.num_processes}
        what = (text.name, f"{len(run.samples)}x{args.max_tokens}", args.mode)
        result = harness.Result("ppl", loaded, args, argv, what, data=text.description | tokens, run=more)
        with result if state.is_main_process else contextlib.nullcontext():
            for row in measure_rows(run, groups_of(args)):
                result.rows.append(row)
                if state.is_main_process:
                    result.keep()
            if state.is_main_process:
                print(tables(result.rows))


if __name__ == "__main__":
    sys.exit(harness.run(main))
