"""Choosing the next tokens of many rows at once, each with its own options and its own random numbers.

Options mean what they mean in transformers, and come in its order: repetition penalty, temperature, top-k, top-p, min-p. Two
departures: tokens of equal weight at the border of a top-p set stay or go together, and a row draws from its own
generator, so that it gets the same tokens whatever the other rows do.

A token is drawn with whole-number weights. Sums of these are exact, so that no order of adding, on whatever device, can change
which token a random number stands for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

BLOCK = 256  # random numbers that a row has on its device
_DRAW_BITS, _WEIGHT_BITS = 31, 40  # for vocabularies up to 2**22 these products stay below 2**63
_TILE = 512  # tokens


@dataclass(frozen=True)
class SamplingOptions:
    """How a row's tokens are chosen; the defaults choose the likeliest. `top_k` of 0 means no limit."""

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is all that is asked for."""
        return not self.do_sample and self.repetition_penalty == 1.0

    def numbers(self, vocab_size: int) -> list[float]:
        """One row of the `options` of `choose`."""
        top_k = min(self.top_k or vocab_size, vocab_size)
        return [float(self.do_sample), self.temperature, top_k, self.top_p, self.min_p, self.repetition_penalty]


GREEDY = SamplingOptions()


class Draws:
    """The random numbers of one stream, from its own seed, a block at a time.

    Attributes:
        block (`torch.Tensor`): int64 `[BLOCK]`, below `2**31`.
        drawn (`int`): how many of these were used.
    """

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator("cpu").manual_seed(seed)
        self._renew()

    def _renew(self) -> None:
        self.block = torch.randint(2**_DRAW_BITS, (BLOCK,), generator=self._generator, device="cpu")
        self.drawn = 0

    def advance(self) -> bool:
        """Counts a number that was used, and returns whether there is a new block now."""
        self.drawn += 1
        if self.drawn < BLOCK:
            return False
        self._renew()
        return True

    def next(self) -> torch.Tensor:
        """The next number, `[1, 1]`."""
        number = self.block[self.drawn].view(1, 1)
        self.advance()
        return number


def choose(
    logits: torch.Tensor,
    options: torch.Tensor,
    recent: torch.Tensor,
    draws: torch.Tensor,
    *,
    compiled: bool = False,
) -> torch.Tensor:
    """Chooses a token for each row.

    Args:
        logits (`torch.Tensor`): `[rows, vocab_size]`.
        options (`torch.Tensor`): float32 `[rows, 6]`, see `SamplingOptions.numbers`.
        recent (`torch.Tensor`): int64 `[rows, tokens]`, for which there is a repetition penalty.
        draws (`torch.Tensor`): int64 `[rows, 1]`, random numbers below `2**31`.
        compiled (`bool`): in kernels that the compiler makes. Sorting is replaced by a search then, as it would take longer on a GPU
            than all else that a step does.

    Returns:
        `torch.Tensor`: int64 `[rows, 1]`.
    """
    do_sample, _, top_k, top_p, min_p, _ = options.split(1, dim=1)
    run = _compiled if compiled else _plain
    scores, weights = run(weigh)(logits, options, recent)
    limit = limit_by_search(weights, top_k, top_p, run) if compiled else limit_by_sorting(weights, top_k, top_p)
    return torch.where(
        do_sample > 0,
        run(pick)(weights, torch.maximum(limit, min_p), draws),
        scores.argmax(dim=1, keepdim=True),
    )


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False)


def _plain(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def weigh(logits: torch.Tensor, options: torch.Tensor, recent: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores after the repetition penalty, and the weights of sampling: 1 for the likeliest token. `[rows, vocab_size]` each."""
    temperature, penalty = options[:, 1:2], options[:, 5:6]
    scores = logits.float()
    seen = scores.gather(1, recent)
    scores = scores.scatter(1, recent, torch.where(seen < 0, seen * penalty, seen / penalty))
    return scores, torch.exp((scores - scores.amax(dim=1, keepdim=True)) / temperature)


def limit_by_sorting(weights: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """The least weight that may be drawn in each row, `[rows, 1]`: the `top_k`-th, and of these the last of the top-p set."""
    ordered = weights.sort(dim=1, descending=True).values
    kth = ordered.gather(1, top_k.long() - 1)
    mass = torch.where(ordered >= kth, ordered, 0).cumsum(dim=1)
    place = (mass < top_p * mass[:, -1:]).sum(dim=1, keepdim=True).clamp(max=weights.shape[1] - 1)
    return torch.where(top_p < 1, torch.maximum(kth, ordered.gather(1, place)), kth)


def limit_by_search(
    weights: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, run: Callable[..., Any] = _plain
) -> torch.Tensor:
    """The same as `limit_by_sorting`.

    Weights are between 0 and 1, so their bits, read as integers, are in the order of their sizes. Each pass over the weights finds
    three bits of the limit.
    """
    kth = _largest(weights, top_k, run(_narrow_to_number))
    kept = torch.where(weights >= kth, weights, 0)
    last = _largest(kept, top_p * kept.sum(dim=1, keepdim=True), run(_narrow_to_mass))
    return torch.where(top_p < 1, torch.maximum(kth, last), kth)


def _largest(weights: torch.Tensor, goal: torch.Tensor, narrow: Callable[..., torch.Tensor]) -> torch.Tensor:
    """The largest weight for which all weights that are at least as large reach the goal together, `[rows, 1]`."""
    found = torch.zeros(len(weights), 1, dtype=torch.int32, device=weights.device)
    for shift in torch.arange(27, -1, -3, dtype=torch.int32, device=weights.device):
        found = narrow(weights, found, goal, shift)
    return found.view(torch.float32)


def _narrow_to_number(
    weights: torch.Tensor, found: torch.Tensor, goal: torch.Tensor, shift: torch.Tensor
) -> torch.Tensor:
    return _next_bits(found, shift, lambda limit: (weights >= limit).sum(dim=1, keepdim=True) >= goal)


def _narrow_to_mass(
    weights: torch.Tensor, found: torch.Tensor, goal: torch.Tensor, shift: torch.Tensor
) -> torch.Tensor:
    return _next_bits(
        found, shift, lambda limit: torch.where(weights >= limit, weights, 0).sum(dim=1, keepdim=True) >= goal
    )


def _next_bits(
    found: torch.Tensor, shift: torch.Tensor, reaches: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    digit = torch.zeros_like(found)
    for tried in range(1, 8):
        digit = digit + reaches((found + (tried << shift)).view(torch.float32)).int()
    return found + (digit << shift)


def pick(weights: torch.Tensor, least: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """The token of each row for which its random number stands, int64 `[rows, 1]`, among those of at least this weight."""
    rows, vocab_size = weights.shape
    whole = (torch.where(weights >= least, weights, 0) * 2**_WEIGHT_BITS).long()
    tiles = torch.nn.functional.pad(whole, (0, -vocab_size % _TILE)).view(rows, -1, _TILE)
    ends = tiles.sum(dim=2).cumsum(dim=1)
    total = ends[:, -1:]
    target = (total >> _DRAW_BITS) * draws + (((total & (2**_DRAW_BITS - 1)) * draws) >> _DRAW_BITS)
    tile = (ends <= target).sum(dim=1, keepdim=True).clamp(max=tiles.shape[1] - 1)
    tokens = tiles.gather(1, tile[..., None].expand(-1, -1, _TILE))[:, 0]
    before = ends.gather(1, tile) - tokens.sum(dim=1, keepdim=True)
    place = (tokens.cumsum(dim=1) + before <= target).sum(dim=1, keepdim=True)
    return (tile * _TILE + place).clamp(max=vocab_size - 1)  # where weights are not finite
