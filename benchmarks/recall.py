"""What a model can still use of what it has read: by distance, in a pinned prefix, and question after question.

    python -m benchmarks.recall                      # segments of random tokens that come back after a distance
    python -m benchmarks.recall --task streameval    # numbered lines, and questions about lines before
    python -m benchmarks.recall --task pinned        # segments of the sinks that come back after a long text
    python -m benchmarks.recall --task questions     # time of a question about a text: reading it anew, copying the cache
    python -m benchmarks.recall --task choices       # multiple-choice questions, one after the other

The first three tasks read texts exactly as `benchmarks.ppl` does: every token is predicted as in one-token steps. The
right answers are part of the text, so the model reads them after each question, whatever it predicted itself.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import PartialState

from . import harness, models, ppl
from .arms import Arm, choose
from .asking import about_one_text, accuracy, make_row, one_after_the_other
from .harness import BenchmarkError

METHODS = ("dense", "sink", "window", "recompute")
LINES_PER_QUESTION = 10
LONGEST = 8192  # tokens of a text, by default
DEFAULTS: dict[str, Any] = {
    "num_samples": 32,
    "distances": [64, 128, 256, 512, 768, 960, 1100, 1536, 2048, 4096],
    "line_distances": [20, 40, 60, 80, 100, 150, 200],
    "further": [2000, 10_000, 100_000],
    "segment": 60,
    "pairs": 3,
    "recompute_questions": 8,
    "text_tokens": 30_000,
    "question_tokens": 32,
}
# For two CPU cores and less than a minute.
OFFLINE_DEFAULTS: dict[str, Any] = {
    "num_samples": 1,
    "max_tokens": 700,
    "distances": [30, 60, 90, 120, 150, 300],
    "line_distances": [4],
    "further": [200, 500],
    "segment": 30,
    "pairs": 1,
    "recompute_questions": 1,
    "text_tokens": 500,
    "question_tokens": 32,
}
OF_TASKS = {  # options that not all tasks have
    "arms": "copy, streameval, pinned, choices",
    "seed": "copy, streameval, pinned",
    "batch_size": "copy, streameval, pinned",
    "chunk_size": "copy, streameval, pinned, questions",
    "max_tokens": "copy, streameval",
    "distances": "copy",
    "pairs": "copy",
    "segment": "copy, pinned",
    "recompute_questions": "copy, streameval, pinned",
    "line_distances": "streameval",
    "further": "pinned",
    "text_file": "pinned, questions",
    "dataset": "pinned, questions, choices",
    "dataset_config": "pinned, questions, choices",
    "split": "pinned, questions, choices",
    "text_tokens": "questions",
    "question_tokens": "questions",
}
PINNED, PINNED_OFFLINE, WINDOW, WINDOW_OFFLINE = 1000, 120, 1020, 124
DENSE_FAILS = 0.1  # below this accuracy at its best distance, the dense cache cannot do the task


@dataclass(frozen=True)
class Question:
    """Some tokens of a sample that come a second time. `asked` is the distance that the task varies, in its own unit."""

    sample: int
    first: int  # index of their start at the first time
    again: int  # index of their start at the second time
    tokens: int
    asked: int


Texts = tuple[list[torch.Tensor], list[Question]]  # samples `[tokens + 1]`, as `ppl` takes them


# --- texts with questions ---


def vocabulary(loaded: models.LoadedModel) -> np.ndarray:
    """Return the ids of all tokens that are not special."""
    size, tokenizer = loaded.model.config.get_text_config(decoder=True).vocab_size, loaded.tokenizer
    known = range(size if tokenizer is None else min(size, len(tokenizer)))
    return np.setdiff1d(known, [] if tokenizer is None else tokenizer.all_special_ids)


def random_ids(tokens: int, loaded: models.LoadedModel, rng: np.random.Generator) -> np.ndarray:
    """Return random tokens, each at most once if the vocabulary is large enough: then no other place shows what follows."""
    known = vocabulary(loaded)
    return rng.choice(known, tokens, replace=tokens > len(known))


def copy_texts(loaded: models.LoadedModel, args: argparse.Namespace, rng: np.random.Generator) -> Texts:
    """Return texts of random tokens in which segments come back. Nothing is asked about the first token of a segment."""
    samples, questions, size = [], [], args.segment
    for sample in range(args.num_samples):
        ids = random_ids(args.max_tokens + 1, loaded, rng)
        free = np.arange(len(ids)) >= args.n_sink
        for distance in sorted(args.distances * args.pairs, reverse=True):
            fits = np.lib.stride_tricks.sliding_window_view(free, size).all(axis=1)
            starts = np.flatnonzero(fits[:-distance] & fits[distance:])
            if len(starts):
                start = rng.choice(starts)
                first, again = (slice(at, at + size) for at in (start, start + distance))
                ids[again] = ids[first]
                free[first] = free[again] = False
                questions.append(Question(sample, first.start + 1, again.start + 1, size - 1, distance))
        samples.append(torch.from_numpy(ids))
    if missing := set(args.distances) - {question.asked for question in questions}:
        raise BenchmarkError(f"no text of {args.max_tokens:,} tokens has room for distances {sorted(missing)}")
    return samples, questions


def streameval_texts(loaded: models.LoadedModel, args: argparse.Namespace, rng: np.random.Generator) -> Texts:
    """Return texts of the paper's StreamEval, from its description: every ten lines a question about an earlier line."""
    if loaded.tokenizer is None:
        raise BenchmarkError("--task streameval is made of words: name a model with a tokenizer (--model)")
    samples, questions = [], []

    def ids_of(text: str) -> list[int]:
        return list(loaded.tokenizer(text, add_special_tokens=False)["input_ids"])

    for sample in range(args.num_samples):
        ids: list[int] = []
        contents, places = [""], [0]  # of each line; lines are numbered from 1
        # One distance for each text, so that no line is asked about twice: an earlier answer would be nearer than the line.
        back = args.line_distances[sample % len(args.line_distances)]
        while len(ids) <= args.max_tokens:
            line = len(contents)
            contents.append(str(rng.integers(10_000, 100_000)))
            ids += ids_of(f"The REGISTER_CONTENT in line {line} is <")
            places.append(len(ids))
            ids += ids_of(contents[line]) + ids_of(">\n")
            if line % LINES_PER_QUESTION == 0 and back < line:
                about, answer = line - back, ids_of(contents[line - back])
                what = f"REGISTER_CONTENT in line {about}"
                ids += ids_of(f"What is the {what}? The {what} is <")
                if len(ids) + len(answer) <= args.max_tokens + 1:
                    questions.append(Question(sample, places[about], len(ids), len(answer), back))
                ids += answer + ids_of(">\n")
        samples.append(torch.tensor(ids[: args.max_tokens + 1]))
    if not questions:
        raise BenchmarkError(f"--max-tokens {args.max_tokens} has no room for a question")
    return samples, questions


def pinned_texts(loaded: models.LoadedModel, args: argparse.Namespace, rng: np.random.Generator) -> Texts:
    """Return texts of `n_sink` random tokens and a real text, in which segments of the random tokens come back.

    The segments are shared out over the lengths of `--further`.
    """
    size, moments = args.segment, sorted(args.further)
    filler = models.tokenize(models.chosen_text(args), loaded.tokenizer).numpy()
    samples, questions = [], []
    for sample in range(args.num_samples):
        ids = random_ids(args.n_sink, loaded, rng)
        starts = rng.permutation(np.arange(0, args.n_sink - size + 1, size))
        real = np.resize(np.roll(filler, -sample * len(filler) // args.num_samples), args.n_sink + moments[-1])
        for further, some in zip(moments, np.array_split(starts, len(moments)), strict=True):
            if len(ids) > args.n_sink + further:
                within = "lies within the segments that come again before"
                raise BenchmarkError(f"--further {further:,} {within}: leave more between")
            ids = np.concatenate([ids, real[len(ids) : args.n_sink + further]])
            for start in some:
                questions.append(Question(sample, start + 1, len(ids) + 1, size - 1, further))
                ids = np.concatenate([ids, ids[start : start + size]])
        samples.append(torch.from_numpy(ids))
    return samples, questions


# --- what each arm recalls ---


def answered(run: ppl.Run, arm: Arm, questions: Sequence[Question], whole: bool) -> dict[str, Any]:
    """Return the numbers of a row. Either each answer is right as a `whole`, or each of its tokens by itself."""
    nll, correct = ppl.put_together(run.scores[arm], run.scored)
    right, saved = [], []
    for question in questions:
        # Token i is predicted in column i - 1.
        places = (slice(at - 1, at - 1 + question.tokens) for at in (question.first, question.again))
        first, again = ((question.sample, columns) for columns in places)
        right.append(float(correct[again].all() if whole else correct[again].mean()))
        saved.append(float(nll[first].mean() - nll[again].mean()))
    asked = len(questions) if whole else sum(question.tokens for question in questions)
    texts = [question.sample for question in questions]
    return accuracy(right, texts) | {"questions": asked, "nats_saved": statistics.fmean(saved)}


def measure(loaded: models.LoadedModel, args: argparse.Namespace, texts: Texts) -> Iterator[dict[str, Any]]:
    """Read all texts with one arm after the other. Yield a row for each arm and each distance that was asked."""
    samples, questions = texts
    length, state = max(map(len, samples)) - 1, PartialState(cpu=loaded.model.device.type == "cpu")
    trained = loaded.trained_context or length
    every: dict[int, list[Question]] = {}
    for question in sorted(questions, key=lambda question: question.asked):
        every.setdefault(question.asked, []).append(question)
    few = {asked: some[:: math.ceil(len(some) / args.recompute_questions)] for asked, some in every.items()}
    for arm in choose(args.arms, args.capacities):
        groups = few if arm.name == "recompute" else every  # recomputation is too slow for all questions
        if arm.name == "dense":  # beyond the trained context the model itself fails
            groups = {asked: [q for q in some if q.again + q.tokens <= trained + 1] for asked, some in every.items()}
        chosen = np.zeros((len(samples), length), dtype=bool)
        for question in itertools.chain(*groups.values()):
            for at in (question.first, question.again):
                chosen[question.sample, at - 1 : at - 1 + question.tokens] = True
        limit = trained if arm.name == "dense" else length
        run = ppl.Run(loaded, args, [ids[: limit + 1] for ids in samples], np.ones_like(chosen), chosen, state)
        if any(groups.values()):
            run.measure([arm])
        for asked, some in groups.items():
            row = make_row(args, arm.name, arm.sinks(args.n_sink), arm.capacity, asked=asked)
            if arm in run.reasons:
                row["reason"] = run.reasons[arm]
            elif not some:
                row["reason"] = f"beyond the trained context of {trained:,} positions"
            else:
                row["distance_tokens"] = round(statistics.median(q.again - q.first for q in some))
                row |= answered(run, arm, some, whole=args.task == "streameval")
                of_few = [right for q, right in zip(some, row["right"], strict=True) if q in few[asked]]
                row["same_accuracy"] = statistics.fmean(of_few) if of_few else None
            yield row


def warn(rows: Sequence[dict[str, Any]]) -> None:
    """Warn in all rows if even the dense cache fails at every distance: then the task is too hard for the model."""
    dense = [row["accuracy"] for row in rows if row["method"] == "dense" and row["accuracy"] is not None]
    if dense and max(dense) < DENSE_FAILS:
        for row in rows:
            cannot = f"the dense cache is right in {max(dense):.0%} at best: this model cannot do the task"
            row["warning"] = f"{row['warning']}; {cannot}" if row["warning"] else cannot


TASKS: dict[str, tuple[str, Callable[..., Texts] | None]] = {
    "copy": ("segments of random tokens that come back after a distance", copy_texts),
    "streameval": ("numbered lines, and questions about earlier lines", streameval_texts),
    "pinned": ("segments of the sinks that come back after a real text", pinned_texts),
    "questions": ("time of a question about a text: reading it anew, copying the cache, loading it", None),
    "choices": ("multiple-choice questions, one after the other", None),
}


# --- command line ---


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check the command line, and fill in the defaults that do not depend on the model."""
    parser = harness.Parser("recall", __doc__.partition("\n")[0])
    tasks = "; ".join(f"{name}: {says}" for name, (says, _) in TASKS.items())
    parser.add_argument("--task", choices=TASKS, default="copy", help=f"{tasks} (%(default)s)")
    models.add_text_options(parser)
    parser.names("--arms", of=METHODS)
    parser.numbers(
        num_samples=(None, "texts, or questions (32)"),
        max_tokens=(None, f"tokens of a text of copy or streameval (what the model was trained on, at most {LONGEST})"),
        distances=([], "copy: tokens from a token to the same token again (64 to 4096)"),
        line_distances=([], "streameval: lines from a line to the question about it (20 to 200)"),
        further=([], "pinned: tokens between the sinks and their repetition (2000 10000 100000)"),
        segment=(None, "tokens of a repeated segment (60)", 2),
        pairs=(None, "copy: segments for each distance in a text (3)"),
        recompute_questions=(None, "segments that recompute is asked at each distance (8)"),
        text_tokens=(None, "questions: tokens of the text (30000)"),
        question_tokens=(None, "questions: tokens of a question (32)"),
        chunk_size=(None, "tokens per forward (256)"),
        batch_size=(None, "texts read together (16)"),
        seed=(None, "seed of the random texts (0)", 0),
    )
    parser.set_defaults(arms=None)  # so that given arms can be told from the default ones
    args = parser.parse(argv)
    for name, tasks in OF_TASKS.items():
        idle = getattr(args, name) is not None and args.task not in tasks.split(", ")
        parser.refuse(idle, f"--{name.replace('_', '-')} is for --task {tasks}")
    recomputed = args.task == "choices" and "recompute" in (args.arms or [])
    parser.refuse(recomputed, "--task choices asks a cache, and the arm recompute has none")
    several = args.task == "questions" and len(args.capacities or []) > 1
    parser.refuse(several, "--task questions has one cache: give one of --capacities")
    # Small runs are for a call that names neither a model nor a text.
    small = args.offline and not (args.model or args.text_file or args.dataset)
    if args.task == "pinned":  # the default of other tasks holds no segment
        harness.fill_in(args, n_sink=PINNED_OFFLINE if small else PINNED)
    sinks = harness.N_SINK if args.n_sink is None else args.n_sink
    parser.fill_in_sizes(args, [sinks + (WINDOW_OFFLINE if small else WINDOW)])
    slow = small or args.task in ("pinned", "choices")  # for recompute, unless it is asked for
    harness.fill_in(args, arms=[name for name in METHODS if name != "recompute" or not slow])
    harness.fill_in(args, **(OFFLINE_DEFAULTS if small else DEFAULTS), chunk_size=256, batch_size=16, seed=0)
    least, fewest = min(args.distances), args.segment * len(args.further)
    texts, asked = args.num_samples, len(args.line_distances)
    overlap = f"distance {least} is less than --segment {args.segment}: a segment would overlap itself"
    needs = f"--task pinned needs an --n-sink of at least {fewest}: a segment of the sinks for each of --further"
    too_few = f"--num-samples {texts} is too few for {asked} --line-distances: each text has one"
    parser.refuse(least < args.segment, overlap)
    parser.refuse(args.task == "pinned" and args.n_sink < fewest, needs)
    parser.refuse(args.task == "streameval" and texts < asked, too_few)
    return args


def rows_of(loaded: models.LoadedModel, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Do the task and yield its rows."""
    if args.task == "questions":
        return about_one_text(loaded, args)
    if args.task == "choices":
        return one_after_the_other(loaded, args)
    make_texts = TASKS[args.task][1]
    return measure(loaded, args, make_texts(loaded, args, np.random.default_rng(args.seed)))


def main(argv: Sequence[str] | None = None) -> None:
    """Do a task, print the table, and write the result file."""
    args = parse(argv)
    device, dtype = harness.set_up(args)
    for loaded in models.chosen(args, dtype, device, "EleutherAI/pythia-70m"):
        harness.fill_in(args, max_tokens=min(loaded.trained_context or LONGEST, LONGEST))
        with harness.Result("recall", loaded, args, argv, (args.task,)) as result:
            for row in rows_of(loaded, args):
                result.rows.append(row)
                result.keep()
            warn(result.rows)
            in_tokens = ["asked"] if args.task == "copy" else []  # the same as distance_tokens
            print(harness.table(result.rows, hidden=["task", "n_sink", *in_tokens]))


if __name__ == "__main__":
    sys.exit(harness.run(main))
