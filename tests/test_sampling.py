"""Sampling of many rows: the sets and chances that transformers' processors give, and draws that are exact."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from sink_cache.sampling import SamplingOptions, choose, limit_by_search, limit_by_sorting, pick, weigh

VOCAB = 1500  # more than one tile of `pick`, and not a multiple of it
OPTIONS = st.builds(
    SamplingOptions, do_sample=st.just(True), temperature=st.floats(0.3, 3), top_k=st.integers(0, VOCAB + 9),
    top_p=st.sampled_from([0.0, 0.05, 0.5, 0.9, 0.999, 1.0]), min_p=st.sampled_from([0.0, 0.01, 0.3]),
    repetition_penalty=st.sampled_from([0.5, 1.0, 1.7]),
)  # fmt: skip


def by_transformers(logits: torch.Tensor, recent: torch.Tensor, options: SamplingOptions) -> torch.Tensor:
    """Probabilities `[1, vocab_size]`."""
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(options.repetition_penalty)])
    processors.append(TemperatureLogitsWarper(options.temperature))
    if options.top_k:
        processors.append(TopKLogitsWarper(options.top_k))
    if options.top_p < 1:
        processors.append(TopPLogitsWarper(options.top_p))
    processors.append(MinPLogitsWarper(options.min_p))
    return processors(recent, logits.clone()).softmax(dim=-1)


@given(st.lists(OPTIONS, min_size=1, max_size=4), st.integers(0, 9))
@settings(deadline=None, max_examples=60)
def test_rows_have_the_chances_that_transformers_gives_them(rows: list[SamplingOptions], seed: int) -> None:
    # Options of another row, another order of the processors, a border that is off by one.
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(len(rows), VOCAB, generator=generator)
    recent = torch.randint(VOCAB, (len(rows), 5), generator=generator)
    options = torch.tensor([row.numbers(VOCAB) for row in rows])
    _, weights = weigh(logits, options, recent)
    for limit in (limit_by_sorting, limit_by_search):
        border = torch.maximum(limit(weights, options[:, 2:3], options[:, 3:4]), options[:, 4:5])
        kept = torch.where(weights >= border, weights, 0)[:, :VOCAB]
        for i, row in enumerate(rows):
            # Rounded sums decide which token is the last of a top-p set.
            fewest, most = (
                by_transformers(logits[i : i + 1], recent[i : i + 1], replace(row, top_p=min(1.0, row.top_p + more)))[0]
                for more in (-min(1e-6, row.top_p), 1e-6)
            )
            assert ((fewest > 0) <= (kept[i] > 0)).all()
            assert ((kept[i] > 0) <= (most > 0)).all()
            expected = torch.where(kept[i] > 0, most, 0)
            assert torch.allclose(kept[i] / kept[i].sum(), expected / expected.sum(), atol=1e-6, rtol=1e-4)


def test_draws_are_shared_out_by_weight() -> None:
    # Numbers at equal distances: each token is drawn as often as its weight says, to one draw.
    weights = torch.zeros(1, 2048)
    weights[0, [3, 1023, 1024, 1700]] = torch.tensor([0.125, 1.0, 0.5, 0.375])
    draws = torch.arange(0, 2**31, 2**31 // 1000)[:1000]
    found = torch.cat([pick(weights, torch.zeros(1, 1), draw.view(1, 1)) for draw in draws]).flatten()
    assert found.bincount(minlength=2048)[[3, 1023, 1024, 1700]].tolist() == pytest.approx([62, 500, 250, 188], abs=1)
    assert pick(weights, torch.full((1, 1), 0.4), torch.tensor([[2**31 - 1]])).item() == 1024  # the last that is left


def test_what_is_not_finite_gives_some_token() -> None:
    # A row whose logits have become NaN harms no other, and no index is out of range.
    logits = torch.randn(3, VOCAB)
    logits[1] = torch.nan
    logits[2, 5:] = -torch.inf
    options = torch.tensor([SamplingOptions(do_sample=True, top_k=9, top_p=0.9).numbers(VOCAB)] * 3)
    draws = torch.full((3, 1), 2**30)
    found = choose(logits, options, torch.zeros(3, 1, dtype=torch.long), draws)
    assert 0 <= int(found.min()) <= int(found.max()) < VOCAB
    assert found[2] < 5
    assert torch.equal(found[:1], choose(logits[:1], options[:1], torch.zeros(1, 1, dtype=torch.long), draws[:1]))


def test_greedy_rows_beside_sampling_rows() -> None:
    logits = torch.randn(2, VOCAB)
    options = torch.tensor([SamplingOptions().numbers(VOCAB), SamplingOptions(do_sample=True).numbers(VOCAB)])
    recent = torch.zeros(2, 1, dtype=torch.long)
    for draw in (0, 2**30, 2**31 - 1):
        assert choose(logits, options, recent, torch.full((2, 1), draw))[0] == logits[0].argmax()
