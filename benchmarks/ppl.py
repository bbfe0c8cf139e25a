"""Streaming perplexity: what a bounded cache costs in quality, and what a whole run gains in time and memory."""

from __future__ import annotations

import argparse
import atexit
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
import pandas as pd
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
# For two CPU cores and less than three minutes.
OFFLINE_DEFAULTS = {"capacities": [256, 512], "recompute_tokens": 16, "max_tokens": 2048, "num_samples": 1}
MODE_DEFAULTS = {"step": {"chunk_size": 1, "batch_size": 1}, "chunk": {"chunk_size": 128, "batch_size": 8}}
POSITION_BINS = 20
SCORED_AT_ONCE = 64  # tokens, also of a turn: scoring each by itself would add to the time of small models
LOGITS_BYTES_AT_ONCE = 2 * 2**30  # in float32, for dense-batched
WARM_UP_TOKENS = 32

Floats = npt.NDArray[np.floating[Any]]
Bools = npt.NDArray[np.bool_]
NllAndCorrect = tuple[torch.Tensor, torch.Tensor]  # see `score`


@dataclass(frozen=True)
class Batch:
    """Samples of one length that are read together: their numbers, and their tokens `[samples, tokens + 1]`."""

    samples: list[int]
    ids: torch.Tensor


# --- measuring ---


def cut_into_batches(samples: Sequence[torch.Tensor], batch_size: int) -> list[Batch]:
    """Return the samples in their order, in batches of equal length, at most `batch_size` in each."""
    batches: list[Batch] = []
    for _, same_length in itertools.groupby(range(len(samples)), key=lambda number: len(samples[number])):
        numbers = list(same_length)
        for start in range(0, len(numbers), batch_size):
            some = numbers[start : start + batch_size]
            batches.append(Batch(some, torch.stack([samples[number] for number in some])))
    return batches


def scored_tokens(samples: Sequence[torch.Tensor], score_from: int) -> Bools:
    """Return which tokens are scored, `[samples, tokens]`: those after at least `score_from` tokens."""
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
    """Score the tokens of a batch by the logits that predict them, and free the logits.

    Takes logits in chunks `[batch, q, vocab]`, and the tokens that came, `targets` `[batch, tokens]`. Yields negative
    log-likelihoods in nats, float32 `[batch, some tokens]`, and whether the token was the first choice. Small chunks are
    collected until `SCORED_AT_ONCE` tokens of each sample are there.
    """
    held: list[torch.Tensor] = []
    start = 0
    for logits in chunks:
        bar.update(logits.shape[0] * logits.shape[1])
        held.append(logits)
        tokens = sum(one.shape[1] for one in held)
        if tokens < SCORED_AT_ONCE and start + tokens < targets.shape[1]:
            continue
        nll, correct = [], []
        all_held = held[0] if len(held) == 1 else torch.cat(held, dim=1)
        for piece in all_held.split(SCORED_AT_ONCE, dim=1):
            wanted = targets[:, start : start + piece.shape[1]]
            losses = F.cross_entropy(piece.flatten(0, 1).float(), wanted.flatten(), reduction="none")
            nll.append(losses.view_as(wanted))
            correct.append(piece.argmax(-1) == wanted)
            start += piece.shape[1]
        held = []
        del logits, all_held, piece  # frees their memory before the next logits are made
        yield torch.cat(nll, dim=1), torch.cat(correct, dim=1)


def score_recomputed(
    model: PreTrainedModel, ids: torch.Tensor, chosen: torch.Tensor, capacity: int, rows_at_once: int, bar: tqdm[Any]
) -> Iterator[NllAndCorrect]:
    """Score the `chosen` `[batch, tokens]` of samples `[batch, tokens + 1]`, reading `capacity` tokens anew for each.

    The first `capacity` predictions of a sample see the whole text before them, so one forward makes all of them.
    Yields once, as `score` does. Values of tokens that are not chosen are zero.
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
        if not len(row):  # an empty tensor splits into one empty piece
            break
        predicted = first + capacity
        window = ids[row[:, None], first[:, None] + torch.arange(capacity, device=ids.device)]
        logits = model(window, use_cache=False, **keep_last).logits[:, -1]
        nll[row, predicted - 1] = F.cross_entropy(logits.float(), ids[row, predicted], reduction="none")
        correct[row, predicted - 1] = logits.argmax(-1) == ids[row, predicted]
        bar.update(len(row))
    yield nll, correct


class Reading:
    """One arm reading a batch from an empty cache, turn by turn, with time and memory.

    `chosen`, `[all samples of the run, tokens]`, are the tokens that `recompute` predicts. The other arms predict all.
    """

    def __init__(self, run: Run, batch: Batch, arm: Arm, chosen: Bools, bar: tqdm[Any]) -> None:
        model, chunk = run.loaded.model, run.args.chunk_size
        self.batch, self.arm, self.chosen = batch, arm, chosen[batch.samples, : batch.ids.shape[1] - 1]
        self.clock, self.cache = harness.Clock(model.device), arm.make_cache(model, run.args.n_sink)
        ids = batch.ids.to(model.device)
        inputs, targets = ids[:, :-1], ids[:, 1:]
        # All arms are read lazily, by `take_turn`.
        if arm.name == "recompute":
            rows_at_once = max(1, run.args.batch_size * chunk // arm.capacity)
            wanted = torch.from_numpy(self.chosen).to(model.device)
            self.unread = score_recomputed(model, ids, wanted, arm.capacity, rows_at_once, bar)
        elif arm.name == "dense-batched":
            self.unread = score((model(some, use_cache=False).logits for some in [inputs]), targets, bar)
        elif arm.name == "dense":
            self.unread = score(dense_logits(model, inputs, self.cache, chunk), targets, bar)
        else:
            if arm.name == "line-breaks":  # they become the sinks; their own predictions are not scored
                breaks = torch.full_like(inputs[:, : self.cache.n_sink], models.line_break(run.loaded.tokenizer))
                list(stream(model, breaks, self.cache, chunk_size=chunk))
            self.unread = score(stream(model, inputs, self.cache, chunk_size=chunk), targets, bar)
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
        """Return what was measured. `nll` and `correct` are `[samples, tokens]`; column i is token i + 1 of a sample."""
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
    """A run over samples: which tokens are scored, which of them `recompute` predicts, and the scores so far.

    An arm that failed has a reason in words in `reasons`.
    """

    loaded: models.LoadedModel
    args: argparse.Namespace
    samples: list[torch.Tensor]
    scored: Bools
    recompute_sample: Bools
    state: PartialState
    scores: dict[Arm, list[dict[str, Any]]] = field(default_factory=dict)
    reasons: dict[Arm, str] = field(default_factory=dict)

    def measure(self, arms: Sequence[Arm]) -> None:
        """Score all samples with one arm, or with several arms in turns. Each process takes its share of the batches."""
        batch_size, state = self.args.batch_size, self.state
        if arms[0].name == "dense-batched":
            vocab_size = self.loaded.model.config.get_text_config(decoder=True).vocab_size
            batch_size = max(1, min(batch_size, LOGITS_BYTES_AT_ONCE // (4 * vocab_size * len(self.samples[0]))))
        # Batches do not depend on the number of processes, so rounding does not either.
        batches = cut_into_batches(self.samples, batch_size)[state.process_index :: state.num_processes]
        total, in_turns = sum(b.ids[:, 1:].numel() for b in batches) * len(arms), len(arms) > 1
        self.scores |= {arm: [] for arm in arms}
        with harness.progress_bar(total=total, desc=" ".join(map(str, arms)), disable=not state.is_main_process) as bar:
            for arm in arms if batches else ():
                with self.noting_failure(arm, in_turns):
                    self.warm_up(batches[0], arm)
            for batch in batches:
                readings: dict[Arm, Reading] = {}
                for arm in [arm for arm in arms if arm not in self.reasons]:
                    with self.noting_failure(arm, in_turns):
                        readings[arm] = Reading(self, batch, arm, self.recompute_sample, bar)
                for arm, of_batch in self.read_batch(readings, in_turns).items():
                    self.scores[arm].append(of_batch)
        gc.collect()  # frees caches whose layers refer to each other
        for scores, reasons in gather_object([(self.scores, self.reasons)]) if state.num_processes > 1 else ():
            self.reasons |= reasons
            for arm in arms:
                known = [batch["samples"] for batch in self.scores[arm]]
                self.scores[arm] += [batch for batch in scores[arm] if batch["samples"] not in known]
        for arm in arms:
            self.scores[arm].sort(key=lambda batch: batch["samples"])

    def read_batch(self, readings: dict[Arm, Reading], in_turns: bool) -> dict[Arm, dict[str, Any]]:
        """Read a batch with several arms in turns, or with one arm in one go. Return the scores of arms that did not fail."""
        scores = {}
        while readings:
            for arm in list(readings):
                has_more = False
                with self.noting_failure(arm, in_turns):
                    has_more = readings[arm].take_turn(everything=not in_turns)
                    if not has_more:
                        scores[arm] = readings[arm].scores()
                if not has_more:
                    del readings[arm]  # frees the memory of its cache
        return scores

    @contextlib.contextmanager
    def noting_failure(self, arm: Arm, in_turns: bool) -> Iterator[None]:
        """Note in words why an arm fails in the `with` block, and let the other arms go on."""
        try:
            yield
        except (NotImplementedError, ValueError) as error:
            self.reasons[arm] = str(error) or type(error).__name__
        except (RuntimeError, MemoryError) as error:
            if not harness.is_out_of_memory(error):
                raise
            ways_out = "a smaller one, or a smaller --max-tokens"
            if in_turns:
                ways_out += ", or fewer --arms or --capacities, whose caches are in memory at once"
            self.reasons[arm] = f"out of memory with --batch-size {self.args.batch_size}: choose {ways_out}"

    def warm_up(self, batch: Batch, arm: Arm) -> None:
        """Read the start of a batch untimed. Otherwise the first arm of a run would pay for the set-up that all share."""
        ids = batch.ids[:, : WARM_UP_TOKENS + 1]
        chosen = np.ones((len(ids), ids.shape[1] - 1), dtype=bool)
        bar = harness.progress_bar(disable=True)
        Reading(self, Batch(list(range(len(ids))), ids), arm, chosen, bar).take_turn(everything=True)


# --- reporting ---


def put_together(batches: Sequence[dict[str, Any]], scored: Bools) -> tuple[Floats, Bools]:
    """Return nll and correct of all samples, `[samples, tokens]`, from the scores of batches."""
    nll, correct = np.zeros(scored.shape, dtype=np.float32), np.zeros_like(scored)
    for batch in batches:
        tokens = batch["nll"].shape[1]
        nll[batch["samples"], :tokens], correct[batch["samples"], :tokens] = batch["nll"], batch["correct"]
    return nll, correct


def sums(nll: Floats, correct: Bools, scored: Bools) -> dict[str, list[Any]]:
    """Return `nll_sum` (nats), `correct` and `tokens` of the scored tokens, each a list over samples."""
    return {
        "nll_sum": np.where(scored, nll, 0).sum(axis=1, dtype=np.float64).tolist(),
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
    """Return a row of the result file from the scores of an arm, or with the reason why it has none."""
    numbers = ("perplexity", "accuracy", "tokens", "seconds", "tokens_per_second", "cache_bytes", "peak_bytes")
    row = {"arm": arm.name, "capacity": arm.capacity, "n_sink": arm.sinks(run.args.n_sink), "reason": "", "warning": ""}
    row |= dict.fromkeys(numbers)
    if arm in run.reasons:
        return row | {"reason": run.reasons[arm]}
    scored = run.recompute_sample if arm.name == "recompute" else run.scored
    batches, n = run.scores[arm], run.state.num_processes
    nll, correct = put_together(batches, scored)
    if (everything := totals(nll, correct, scored)) is None:
        return row | {"reason": "no finite perplexity in this dtype: choose another --dtype"}
    longest = scored.shape[1]
    trained = run.loaded.trained_context or longest
    before = np.arange(1, longest + 1)  # how many tokens come before the token of each column
    by_position = []
    for start, stop in itertools.pairwise([*range(1, longest + 1, run.args.position_bin), longest + 1]):
        if found := totals(nll, correct, scored & (before >= start) & (before < stop)):
            by_position.append({"start": start, "stop": stop, **found})
    if min(arm.capacity or longest, longest) > trained:
        row["warning"] = f"beyond the trained context of {trained:,} positions"
    batches = pd.DataFrame(batches)
    # Process i read batches i, i + n, i + 2n …, at the same time as the other processes.
    seconds = max(float(batches["seconds"][i::n].sum()) for i in range(n))
    processed = int(batches["tokens_processed"].sum())
    return {
        **row,
        **everything,
        "seconds": seconds,
        "tokens_processed": processed,
        "tokens_per_second": processed / seconds,
        "cache_bytes": int(batches["cache_bytes"].max()),
        "peak_bytes": int(batches["peak_bytes"].max()) if batches["peak_bytes"].notna().any() else None,
        "same_tokens": totals(nll, correct, scored & run.recompute_sample),
        "within_trained_context": totals(nll, correct, scored & (before <= trained)),
        "beyond_trained_context": totals(nll, correct, scored & (before > trained)),
        "by_position": by_position,
        "samples": pd.DataFrame(sums(nll, correct, scored)).to_dict("records"),
        "batches": batches[["samples", "seconds", "turn_seconds", "tokens_processed"]].to_dict("records"),
    }


def groups_of(args: argparse.Namespace) -> list[list[Arm]]:
    """Return the arms in the order of measuring, in groups: arms of one group take turns."""
    arms: list[Arm] = []
    for arm in sorted(choose(args.arms, args.capacities), key=lambda arm: NAMES.index(arm.name)):
        if arm.name in WITH_SINKS and args.n_sinks:
            several = [n_sink for n_sink in args.n_sinks if n_sink or arm.name != "line-breaks"]
            arms += [replace(arm, n_sink=n_sink) for n_sink in several]
        else:
            arms.append(arm)
    in_turns = [arm for arm in arms if args.mode == "step" and arm.name in TAKING_TURNS]
    alone = [[arm] for arm in arms if arm not in in_turns]
    return [in_turns, *alone] if in_turns else alone


def measure_rows(run: Run, groups: Sequence[Sequence[Arm]]) -> Iterator[dict[str, Any]]:
    """Measure one group of arms after the other, and yield the rows of each group as soon as it is finished."""
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
    spread = []
    for row in rows:
        samples = [sample for sample in row.get("samples", ()) if sample["tokens"]]
        perplexities = [math.exp(sample["nll_sum"] / sample["tokens"]) for sample in samples]
        spread.append(np.std(perplexities, ddof=1) if len(samples) > 1 else None)
    gain = [(row["tokens_per_second"] or math.nan) / dense for row in rows]
    sinks = ["" if row["n_sink"] is None else str(row["n_sink"]) for row in rows]
    return harness.table(rows, COLUMNS, sinks=sinks, spread=spread, **{"× dense": gain})


# --- command line ---


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check the command line, and fill in the defaults that do not depend on the model."""
    parser = harness.Parser("ppl", __doc__)
    models.add_text_options(parser)
    parser.names("--arms", "--methods", of=NAMES, default=NAMES[:-1])
    mode = "tokens a forward: many, or one (%(default)s)"
    parser.add_argument("--mode", choices=MODE_DEFAULTS, default="chunk", help=mode)
    parser.numbers(
        n_sinks=([], "several numbers of sinks, each with rows of its own, instead of --n-sink", 0),
        max_tokens=(None, "tokens to predict in each sample (the model's trained context)"),
        num_samples=(None, "samples, from the start of the text (all of it)"),
        score_from=(1, "tokens of each sample that come before the first scored one"),
        position_bin=(None, "tokens in a bin of by_position (a 20th of a sample)"),
        recompute_tokens=(None, "tokens to predict with recompute (1024)"),
        chunk_size=(None, "tokens per forward in chunk mode (128)"),
        batch_size=(None, "samples read together (8 in chunk mode, 1 in step mode)"),
    )
    args = parser.parse(argv)
    one_token = args.mode == "step" and args.chunk_size
    no_recompute = args.recompute_tokens and "recompute" not in args.arms
    no_sinks = args.n_sinks and not set(WITH_SINKS) & set(args.arms)
    twice = args.n_sinks and args.n_sink is not None
    parser.refuse(one_token, "--chunk-size is for --mode chunk: --mode step reads one token per forward")
    parser.refuse(no_recompute, "--recompute-tokens is for the arm recompute, which --arms leaves out")
    parser.refuse(no_sinks, "--n-sinks is for the arms sink, line-breaks, which --arms leaves out")
    parser.refuse(twice, "--n-sink and --n-sinks both give numbers of sinks: give one of them")
    # Small runs are for a call that names neither a model nor a text.
    small = args.offline and not (args.model or args.text_file or args.dataset)
    harness.fill_in(args, **MODE_DEFAULTS[args.mode], **(OFFLINE_DEFAULTS if small else DEFAULTS))
    parser.fill_in_sizes(args)
    least, most = min(args.capacities), max(args.n_sinks or [0])
    parser.refuse(least <= most, f"capacity {least} leaves no window: it includes the {most} sinks of --n-sinks")
    return args


def plan(args: argparse.Namespace, loaded: models.LoadedModel, text: models.Text, state: PartialState) -> Run:
    """Return a run over samples of the text, before anything is measured."""
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
    atexit.register(state.destroy_process_group)  # threads of a group that is left alone may abort a process at its end
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
