"""Two tasks of `benchmarks.recall`: many questions about one text, and multiple-choice questions one after the other."""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import binomtest, bootstrap
from transformers import Cache, DynamicCache, PreTrainedModel

from sink_cache import SinkWindowCache, stream

from . import harness, models, ppl
from .arms import Arm, choose
from .harness import BenchmarkError

ARC = {"dataset": "allenai/ai2_arc", "dataset_config": "ARC-Easy", "split": "test"}
ALONE = "one by one"  # the method with a new dense cache for each question
Row = dict[str, Any]


# --- rows ---


def interval(values: Sequence[float], texts: Sequence[int]) -> tuple[float | None, float | None]:
    """Return the 95% interval of a mean: Wilson's if all values are 0 or 1, else a bootstrap over texts.

    Takes the values and the number of each value's text. Values of one text are not independent, because they share what
    was read before; so texts are resampled. Fewer than five texts give no interval.
    """
    if set(values) <= {0.0, 1.0}:
        found = binomtest(int(sum(values)), len(values)).proportion_ci(method="wilson")
    elif len(set(texts)) >= harness.FEWEST_ROUNDS:
        _, of_text = np.unique(texts, return_inverse=True)
        sums, counts = np.bincount(of_text, values), np.bincount(of_text)
        rng = np.random.default_rng(0)
        mean = lambda sums, counts, axis: sums.sum(axis) / counts.sum(axis)  # noqa: E731
        options = {"n_resamples": harness.RESAMPLES, "method": "percentile", "paired": True, "rng": rng}
        found = bootstrap((sums, counts), mean, **options).confidence_interval
    else:
        return None, None
    return float(found.low), float(found.high)


def make_row(args: argparse.Namespace, method: str, n_sink: int | None, capacity: int | None, **more: Any) -> Row:
    """Return a row of a method. Numbers that are not among `more` are None."""
    numbers = ("distance_tokens", "questions", "accuracy", "accuracy_low", "accuracy_high", "nats_saved")
    row = {"task": args.task, "method": method, "n_sink": n_sink, "capacity": capacity}
    return row | dict.fromkeys(numbers) | {"reason": "", "warning": ""} | more


def accuracy(right: Sequence[float], texts: Sequence[int]) -> Row:
    """Return the mean of answers, each between 0 and 1, its interval, and the answers. `texts` is as in `interval`."""
    low, high = interval(right, texts)
    mean = statistics.fmean(right)
    return {"accuracy": mean, "accuracy_low": low, "accuracy_high": high, "right": [round(share, 4) for share in right]}


# --- many about one text ---


def read(model: PreTrainedModel, ids: torch.Tensor, cache: Cache, chunk_size: int) -> torch.Tensor:
    """Feed ids `[batch, tokens]` to a cache and return the logits of the last chunk, `[batch, q, vocab]`."""
    feed = stream if isinstance(cache, SinkWindowCache) else ppl.dense_logits
    with torch.inference_mode():
        for logits in feed(model, ids, cache, chunk_size=chunk_size):
            last = logits
    return last


def about_one_text(loaded: models.LoadedModel, args: argparse.Namespace) -> Iterator[Row]:
    """Time questions about a text that is read anew for each, or whose cache is copied or loaded for each."""
    model, clock, arm = loaded.model, harness.Clock(loaded.model.device), Arm("sink", args.capacities[0])
    ids = models.tokenize(models.chosen_text(args), loaded.tokenizer).to(model.device)
    pieces = models.cut(ids[args.text_tokens :], args.question_tokens, args.num_samples)
    text, questions = ids[None, : args.text_tokens], [piece[None, :-1] for piece in pieces]

    def reading_anew() -> Cache:
        cache = arm.make_cache(model, args.n_sink)
        read(model, text, cache, args.chunk_size)
        return cache

    def loading() -> Cache:
        cache = arm.make_cache(model, args.n_sink)
        cache.load(path, model)
        return cache

    kept = reading_anew()
    ways: dict[str, Callable[[], Cache]] = {
        "reading anew": reading_anew,
        "copying the cache": lambda: copy.deepcopy(kept),
        "loading the cache": loading,
    }
    ms: dict[str, list[float]] = {way: [] for way in ways}
    answers: dict[str, list[int]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "text.safetensors"
        kept.save(path)
        for question in [questions[0], *questions]:  # the first question comes twice, to warm up
            for way, cache_of_text in ways.items():
                start = clock.now()
                answers[way].append(read(model, question, cache_of_text(), args.chunk_size)[0, -1].argmax().item())
                ms[way].append(1e3 * (clock.now() - start))
    for way in ways:
        row = make_row(args, way, args.n_sink, arm.capacity, questions=len(questions), text_tokens=args.text_tokens)
        row["ms_per_question"] = statistics.median(ms[way][1:])
        row["same_first_tokens"] = answers[way] == answers["reading anew"]
        row["cache_bytes"] = harness.cache_bytes(kept)
        yield row


# --- multiple choice, one after the other ---


def load_choices(args: argparse.Namespace) -> list[Row]:
    """Return questions of a dataset with the columns of ARC: question, choices (text, label), answerKey."""
    dataset = args.dataset or ARC["dataset"]
    config = args.dataset_config or (None if args.dataset else ARC["dataset_config"])
    found = models.load_split(dataset, config, args.split or ARC["split"], offline=args.offline)
    if missing := {"question", "choices", "answerKey"} - set(found.column_names):
        raise BenchmarkError(f"{dataset} is no multiple-choice set: it has no columns {sorted(missing)}")
    return list(found)[: args.num_samples]


def choose_answer(model: PreTrainedModel, cache: Cache, prompt: torch.Tensor, choices: Sequence[torch.Tensor]) -> int:
    """Read a prompt `[tokens]`, choose among the `choices` `[tokens]`, read the chosen one, and return its number.

    The choice is the one with the largest mean log-likelihood of its tokens.
    """
    first = read(model, prompt[None], cache, len(prompt))[:, -1:]
    padded = torch.nn.utils.rnn.pad_sequence(list(choices), batch_first=True)  # on the right, where no token sees it
    logits = first.expand(len(choices), -1, -1)
    if padded.shape[1] > 1:
        rows = copy.deepcopy(cache)
        rows.batch_repeat_interleave(len(choices))
        logits = torch.cat([logits, read(model, padded[:, :-1], rows, padded.shape[1])], dim=1)
    likely = logits.float().log_softmax(-1).gather(-1, padded[..., None])[..., 0]
    means = [float(row[: len(choice)].mean()) for row, choice in zip(likely, choices, strict=True)]
    chosen = int(np.argmax(means))
    read(model, choices[chosen][None], cache, len(choices[chosen]))
    return chosen


def one_after_the_other(loaded: models.LoadedModel, args: argparse.Namespace) -> Iterator[Row]:
    """Ask all questions of one cache that is never emptied, as the paper does; at last, each question of a new cache.

    The dense cache ends at the trained context, so it may answer fewer questions than the other arms. `same_accuracy` of
    each row is that of the questions that the dense cache has answered: only these compare with it.
    """
    model, trained, questions = loaded.model, loaded.trained_context, load_choices(args)
    if loaded.tokenizer is None:
        raise BenchmarkError("--task choices is made of words: name a model with a tokenizer (--model)")

    def ids_of(text: str) -> torch.Tensor:
        return torch.tensor(loaded.tokenizer(text, add_special_tokens=False)["input_ids"], device=model.device)

    answered_by_dense: int | None = None  # the dense arm comes first
    for arm in [*choose(args.arms, args.capacities), Arm(ALONE)]:
        cache, right, warning = arm.make_cache(model, args.n_sink), [], ""
        for number, question in enumerate(harness.progress_bar(questions, desc=str(arm), unit=" questions")):
            if arm.name == ALONE:
                cache = DynamicCache(config=model.config)
            line_break = "" if number == 0 or arm.name == ALONE else "\n"
            prompt = ids_of(f"{line_break}Question: {question['question']}\nAnswer:")
            choices = [ids_of(f" {text}") for text in question["choices"]["text"]]
            longest = len(prompt) + max(map(len, choices))
            if arm.name == "dense" and trained and cache.get_seq_length() + longest > trained:
                warning = f"after {number} questions the trained context of {trained:,} positions ends"
                break
            label = question["choices"]["label"][choose_answer(model, cache, prompt, choices)]
            right.append(float(label == question["answerKey"]))
        if arm.name == "dense":
            answered_by_dense = len(right)
        elif answered_by_dense is not None and answered_by_dense < len(right):
            warning = f"dense has answered {answered_by_dense} of these questions: compare same_accuracy with it"
        row = make_row(args, arm.name, arm.sinks(args.n_sink), arm.capacity, questions=len(right), warning=warning)
        same = right[:answered_by_dense]
        if not right:
            yield row | {"reason": warning}
        else:
            yield row | accuracy(right, range(len(right))) | {"same_accuracy": statistics.fmean(same) if same else None}
