"""Perplexity and next-token accuracy from summed negative log-likelihoods, as a metric for `evaluate`.

Averaging the perplexities or mean losses of batches weights short batches too much; sums add up exactly, whatever the
batches were. Loads from its folder, without a hub:

    metric = evaluate.load("benchmarks/perplexity_metric")
    metric.add_batch(nll_sum=[12.3, 45.6], correct=[2, 7], tokens=[5, 15])
    metric.compute()  # {"perplexity": ..., "accuracy": ..., "nll_per_token": ..., "tokens": 20}
"""

from collections.abc import Sequence

import datasets
import evaluate

from .sums import perplexity_and_accuracy

FEATURES = {"nll_sum": "float64", "correct": "int64", "tokens": "int64"}
INPUTS = """
Args:
    nll_sum (`list[float]`): the summed negative log-likelihood, in nats, of each piece of text.
    correct (`list[int]`): how many of its tokens were the model's first choice.
    tokens (`list[int]`): how many of its tokens were scored.
Returns:
    perplexity (`float`), accuracy (`float`), nll_per_token (`float`, nats), tokens (`int`)
"""


class StreamingPerplexity(evaluate.Metric):  # type: ignore[misc] # evaluate is not annotated
    """The metric; `evaluate.load` finds it."""

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({name: datasets.Value(kind) for name, kind in FEATURES.items()})
        return evaluate.MetricInfo(description=__doc__, citation="", inputs_description=INPUTS, features=features)

    def _compute(self, **sums: Sequence[float]) -> dict[str, float | int]:
        return perplexity_and_accuracy(**sums)
