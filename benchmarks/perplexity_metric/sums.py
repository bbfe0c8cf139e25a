"""The arithmetic of the metric, which needs no library."""

import math
from collections.abc import Sequence


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
