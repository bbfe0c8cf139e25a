"""Perplexity and next-token accuracy from summed negative log-likelihoods, as a metric for `evaluate`.

Averaging the perplexities or mean losses of batches weights short batches too much; sums add up exactly, whatever the
batches were. Loads from its folder, without a hub:

    metric = evaluate.load("benchmarks/perplexity_metric")
    metric.add_batch(nll_sum=[12.3, 45.6], correct=[2, 7], tokens=[5, 15])
    metric.compute()  # {"perplexity": ..., "accuracy": ..., "nll_per_token": ..., "tokens": 20}
"""

import math
from collections.abc import Sequence

import datasets
import evaluate

_DESCRIPTION = "Perplexity and next-token accuracy from summed negative log-likelihoods, exact under any batching."
_INPUTS = """
Args:
    nll_sum (`list[float]`): the summed negative log-likelihood, in nats, of each piece of text.
    correct (`list[int]`): how many of its tokens were the model's first choice.
    tokens (`list[int]`): how many of its tokens were scored.
Returns:
    perplexity (`float`): exp of the mean over all tokens of all pieces.
    accuracy (`float`): share of tokens that were the first choice.
    nll_per_token (`float`): nats.
    tokens (`int`): how many were scored.
"""


def perplexity_and_accuracy(
    nll_sum: Sequence[float], correct: Sequence[int], tokens: Sequence[int]
) -> dict[str, float | int]:
    """Return `perplexity`, `accuracy`, `nll_per_token` (nats) and `tokens` of pieces of text given by their sums.

    Raises:
        ValueError: no token was scored, or a sum is not finite or too large for a perplexity.
    """
    total = sum(tokens)
    if total < 1:
        raise ValueError("perplexity of no tokens: at least one must be scored")
    nll_per_token = math.fsum(nll_sum) / total
    if not nll_per_token < 700:  # also catches NaN; exp of more overflows
        raise ValueError(f"no perplexity: the mean negative log-likelihood is {nll_per_token}")
    return {
        "perplexity": math.exp(nll_per_token),
        "accuracy": sum(correct) / total,
        "nll_per_token": nll_per_token,
        "tokens": total,
    }


class StreamingPerplexity(evaluate.Metric):  # type: ignore[misc] # evaluate is not annotated
    """The metric; `evaluate.load` finds it."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {
                    "nll_sum": datasets.Value("float64"),
                    "correct": datasets.Value("int64"),
                    "tokens": datasets.Value("int64"),
                }
            ),
        )

    def _compute(
        self, nll_sum: Sequence[float], correct: Sequence[int], tokens: Sequence[int]
    ) -> dict[str, float | int]:
        return perplexity_and_accuracy(nll_sum, correct, tokens)
