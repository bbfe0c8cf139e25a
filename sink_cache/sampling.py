"""Choosing the next tokens of many rows at once, each with its own options and its own random numbers.

Options mean what they mean in transformers, and are applied in its order: repetition penalty, temperature, top-k, top-p, min-p.
There are two departures. Tokens of equal weight at the border of a top-p set stay together. Each row draws from its own
generator, so that it gets the same tokens whatever the other rows do.

A token is drawn with whole-number weights. Their sums are exact, so the order of adding, which depends on the device, cannot
change which token a random number stands for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

BLOCK = 256  # random numbers that a row has on its device
_DRAW_BITS, _WEIGHT_BITS = 31, 40  # for vocabularies up to 2**22 these products stay below 2**63
_TILE = 1024  # tokens
_PASS_BITS = 3  # how many of a weight's 30 bits each pass of the search finds


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
        """Whether the choice is just the likeliest token."""
        return not self.do_sample and self.repetition_penalty == 1.0

    def numbers(self, vocab_size: int) -> list[float]:
        """Returns a row of the `options` of `choose`."""
        top_k = min(self.top_k or vocab_size, vocab_size)
        return [float(self.do_sample), self.temperature, top_k, self.top_p, self.min_p, self.repetition_penalty]


GREEDY = SamplingOptions()


class Draws:
    """The random numbers of one stream, from its own seed, a block at a time.

    Attributes:
        block (`torch.Tensor`): int64 `[BLOCK]`, below `2**31`.
        drawn (`int`): how many numbers of the block were used.
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

    @property
    def next(self) -> torch.Tensor:
        """The next number, int64 `[1, 1]`; `advance` counts it as drawn."""
        return self.block[self.drawn].view(1, 1)


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
        recent (`torch.Tensor`): int64 `[rows, tokens]`, the tokens that get a repetition penalty.
        draws (`torch.Tensor`): int64 `[rows, 1]`, random numbers below `2**31`.
        compiled (`bool`): use compiled kernels, and a search instead of sorting. On a GPU, sorting would take longer than the
            rest of a step.

    Returns:
        `torch.Tensor`: int64 `[rows, 1]`.
    """
    do_sample, _, top_k, top_p, min_p, _ = options.split(1, dim=1)
    top_k = top_k.clamp(max=logits.shape[1])  # a model may know more tokens than it has logits for
    run = _compiled if compiled else _plain
    likeliest, weights = run(weigh)(logits, options, recent)
    limit = limit_by_search(weights, top_k, top_p, run) if compiled else limit_by_sorting(weights, top_k, top_p)
    drawn = run(pick)(weights, torch.maximum(limit, min_p), draws)
    return torch.where(do_sample > 0, drawn, likeliest).clamp(max=logits.shape[1] - 1)  # where logits are not finite


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False)


def _plain(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def weigh(logits: torch.Tensor, options: torch.Tensor, recent: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Applies the repetition penalty and the temperature to logits.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: the likeliest token of each row, int64 `[rows, 1]`, and the weights for sampling,
            float32 `[rows, tokens]`. The likeliest token weighs 1. Zeros fill up to a multiple of `_TILE` tokens.
    """
    temperature, penalty = options[:, 1:2], options[:, 5:6]
    scores = logits.float()
    seen = scores.gather(1, recent)
    scores = scores.scatter(1, recent, torch.where(seen < 0, seen * penalty, seen / penalty))
    weights = torch.exp((scores - scores.amax(dim=1, keepdim=True)) / temperature)
    return scores.argmax(dim=1, keepdim=True), torch.nn.functional.pad(weights, (0, -scores.shape[1] % _TILE))


def limit_by_sorting(weights: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """The least weight that may be drawn in each row, `[rows, 1]`: the `top_k`-th, or the last of the top-p set within it."""
    ordered = weights.sort(dim=1, descending=True).values
    kth = ordered.gather(1, top_k.long() - 1)
    mass = torch.where(ordered >= kth, ordered, 0).cumsum(dim=1)
    place = (mass < top_p * mass[:, -1:]).sum(dim=1, keepdim=True).clamp(max=weights.shape[1] - 1)
    return torch.where(top_p < 1, torch.maximum(kth, ordered.gather(1, place)), kth)


def limit_by_search(
    weights: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, run: Callable[..., Any] = _plain
) -> torch.Tensor:
    """Finds the limit of `limit_by_sorting` without sorting.

    Weights are between 0 and 1, so their bits, read as integers, have the same order. Each pass over the weights finds some bits
    of the limit.
    """
    kth = _largest(weights, top_k, run(_narrow_to_number))
    kept, goal = run(_keep)(weights, kth, top_p)
    last = _largest(kept, goal, run(_narrow_to_mass))
    # No weight is above 1, but the search ends above 1 if nothing has to be reached (a top_p of 0).
    return torch.where(top_p < 1, torch.maximum(kth, last.clamp(max=1.0)), kth)


def _largest(weights: torch.Tensor, goal: torch.Tensor, narrow: Callable[..., torch.Tensor]) -> torch.Tensor:
    """Finds the largest weight for which all weights that are at least as large reach the goal together, `[rows, 1]`."""
    found = torch.zeros(len(weights), 1, dtype=torch.int32, device=weights.device)
    for shift in torch.arange(30 - _PASS_BITS, -1, -_PASS_BITS, dtype=torch.int32, device=weights.device):
        found = narrow(weights, found, goal, shift)
    return found.view(torch.float32)


def _keep(weights: torch.Tensor, least: torch.Tensor, share: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    kept = torch.where(weights >= least, weights, 0)
    return kept, share * kept.sum(dim=1, keepdim=True)


def _narrow_to_number(
    weights: torch.Tensor, found: torch.Tensor, goal: torch.Tensor, shift: torch.Tensor
) -> torch.Tensor:
    return _next_bits(found, goal, shift, lambda limit: (_tiles(weights) >= limit).float())


def _narrow_to_mass(
    weights: torch.Tensor, found: torch.Tensor, goal: torch.Tensor, shift: torch.Tensor
) -> torch.Tensor:
    return _next_bits(found, goal, shift, lambda limit: torch.where(_tiles(weights) >= limit, _tiles(weights), 0))


def _next_bits(
    found: torch.Tensor, goal: torch.Tensor, shift: torch.Tensor, counted: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    digit = torch.zeros_like(found)
    for tried in range(1, 2**_PASS_BITS):
        limit = (found + (tried << shift)).view(torch.float32)[..., None]
        # Summed in two steps, because in one step few of a GPU's processors would work on each row.
        digit = digit + (counted(limit).sum(dim=2).sum(dim=1, keepdim=True) >= goal).int()
    return found + (digit << shift)


def _tiles(weights: torch.Tensor) -> torch.Tensor:
    return weights.view(len(weights), -1, _TILE)


def pick(weights: torch.Tensor, least: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Picks the token for which each row's random number stands, int64 `[rows, 1]`, among tokens that weigh at least `least`."""
    tiles = _tiles((torch.where(weights >= least, weights, 0) * 2**_WEIGHT_BITS).long())
    ends = tiles.sum(dim=2).cumsum(dim=1)
    total = ends[:, -1:]
    target = (total >> _DRAW_BITS) * draws + (((total & (2**_DRAW_BITS - 1)) * draws) >> _DRAW_BITS)
    tile = (ends <= target).sum(dim=1, keepdim=True).clamp(max=tiles.shape[1] - 1)
    tokens = tiles.gather(1, tile[..., None].expand(-1, -1, _TILE))[:, 0]
    before = ends.gather(1, tile) - tokens.sum(dim=1, keepdim=True)
    place = (tokens.cumsum(dim=1) + before <= target).sum(dim=1, keepdim=True)
    found: torch.Tensor = tile * _TILE + place
    return found
