"""All that `generate()` can do with a cache: padded rows, beams, rolling back, turns. Every test names the bug it catches.

The oracle of `test_exact` sees one text without padding, so a row of a batch or a beam is judged by the logits that its own text
gives there; and where nothing is evicted, by what `DynamicCache` gives.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.generation.utils import DeferredStopCheck

from sink_cache import SinkWindowCache, stream

from .families import FIRST_WORD, VOCAB, tiny_model
from .oracle import fresh_logits, relative_error, streamed_logits
from .test_exact import TOLERANCE, one_by_one, tokens

PAD = 0
PLAIN: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": PAD}
WITH_LOGITS = {"return_dict_in_generate": True, "output_logits": True}


def left_padded(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Texts `[1, tokens]` as a tokenizer with padding=True and padding_side="left" gives them."""
    length = max(row.shape[1] for row in rows)
    input_ids = torch.full((len(rows), length), PAD)
    attention_mask = torch.zeros_like(input_ids)
    for i, row in enumerate(rows):
        input_ids[i, length - row.shape[1] :] = row[0]
        attention_mask[i, length - row.shape[1] :] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def texts(*lengths: int) -> list[torch.Tensor]:
    return [tokens(length, seed=i) for i, length in enumerate(lengths)]


def alone(
    model: PreTrainedModel, calls: list[torch.Tensor], continuation: torch.Tensor, n_sink: int, window: int
) -> torch.Tensor:
    """Logits `[1, tokens, vocab]` from which each token of a row's continuation was chosen, after it was fed in these calls.

    From the oracle if the calls are one that fits into the cache (there a call equals single tokens), else from a cache of its
    own, one call after another.
    """
    text = torch.cat([*calls, continuation], dim=1)
    prompt = text.shape[1] - continuation.shape[1]
    if len(calls) == 1 and prompt <= n_sink + window:
        return streamed_logits(model, text, n_sink, window)[:, prompt - 1 : -1]
    cache = SinkWindowCache(n_sink, window)
    with torch.no_grad():
        first = [model(call, past_key_values=cache).logits[:, -1:] for call in calls][-1:]
    return torch.cat([*first, one_by_one(model, continuation[:, :-1], cache)], dim=1)


# --- 1. left-padded batches ---


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize(
    "lengths, n_sink, window",
    [
        ((5, 4), 3, 5),  # padded by 1
        ((8, 1, 3), 3, 5),  # by more than n_sink, by more than the window; a prompt that ends amid its sinks
        ((8, 1, 3), 0, 4),  # no sinks; one prompt longer than the cache, the others shorter
        ((30, 2, 9), 2, 12),  # rows fill up at different times, one by far
        ((20, 9, 19), 4, 1),  # all longer than the cache
    ],
)
def test_padded_rows_get_what_they_get_alone(
    llama: PreTrainedModel, lengths: tuple[int, ...], n_sink: int, window: int, sampled: bool, attention: str
) -> None:
    # Pads that become the sinks of short rows; one row's distances for all; pad columns read wrongly after eviction.
    model = copy.deepcopy(llama)
    model.set_attn_implementation(attention)
    rows = texts(*lengths)
    torch.manual_seed(0)
    out = model.generate(
        **left_padded(rows), past_key_values=SinkWindowCache(n_sink, window), max_new_tokens=25,
        **PLAIN | {"do_sample": sampled} | WITH_LOGITS,
    )  # fmt: skip
    logits = torch.stack(out.logits, dim=1)
    for i, row in enumerate(rows):
        continuation = out.sequences[i : i + 1, max(lengths) :]
        expected = alone(model, [row], continuation, n_sink, window)
        assert relative_error(logits[i : i + 1], expected) <= TOLERANCE
        if not sampled:
            assert torch.equal(continuation, expected.argmax(-1))


@pytest.mark.parametrize("model_type", ["gemma3_text", "gpt_neox", "mistral", "gpt_oss"])
def test_padded_rows_of_other_families(model_type: str) -> None:
    # Sliding layers beside ours have the same pads; in a model of sliding layers only the masks end before the sinks;
    # partial rotary; gpt-oss has sinks of its own.
    model, rows = tiny_model(model_type), texts(7, 3, 1)
    out = model.generate(
        **left_padded(rows), past_key_values=SinkWindowCache(2, 5), max_new_tokens=16, **PLAIN | WITH_LOGITS
    )
    logits = torch.stack(out.logits, dim=1)
    for i, row in enumerate(rows):
        expected = alone(model, [row], out.sequences[i : i + 1, 7:], 2, 5)
        assert relative_error(logits[i : i + 1], expected) <= TOLERANCE


def test_padded_prefill_in_chunks_and_a_second_turn(llama: PreTrainedModel) -> None:
    # Chunks that are all pads for a row, or begin with pads; a second turn that meets rows full, filling and empty of sinks.
    n_sink, window, chunk = 2, 6, 7
    rows, turn, cache = texts(30, 2, 9), tokens(5, batch_size=3, seed=9), SinkWindowCache(n_sink, window)
    inputs = left_padded(rows)
    first = llama.generate(
        **inputs, past_key_values=cache, max_new_tokens=4, prefill_chunk_size=chunk, **PLAIN | WITH_LOGITS
    )
    said = torch.cat([first.sequences, turn], dim=1)
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, 9, dtype=torch.long)], dim=1)
    second = llama.generate(
        said, attention_mask=mask, past_key_values=cache, max_new_tokens=12, **PLAIN | WITH_LOGITS
    )
    for i, row in enumerate(rows):
        edges = [max(0, edge - (30 - row.shape[1])) for edge in (*range(0, 30, chunk), 30)]
        calls = [row[:, a:b] for a, b in zip(edges, edges[1:], strict=False) if b > a]
        answer = first.sequences[i : i + 1, 30:]
        expected = alone(llama, calls, answer, n_sink, window)
        assert relative_error(torch.stack(first.logits, dim=1)[i : i + 1], expected) <= TOLERANCE
        # The last token of an answer has not been fed when the next turn comes.
        calls += [*answer[:, :-1].split(1, dim=1), torch.cat([answer[:, -1:], turn[i : i + 1]], dim=1)]
        expected = alone(llama, calls, second.sequences[i : i + 1, 39:], n_sink, window)
        assert relative_error(torch.stack(second.logits, dim=1)[i : i + 1], expected) <= TOLERANCE


@torch.no_grad()
def test_padded_rows_numbered_by_index_or_by_themselves(llama: PreTrainedModel) -> None:
    # forward() numbers padded rows from the first pad, generate() from the first token: distances count, not numbers.
    rows = texts(6, 2)
    inputs = left_padded(rows)
    given = inputs["attention_mask"].cumsum(-1) - 1
    for position_ids in (None, given.clamp(min=0)):
        for pieces in ([6], [3, 3], [1] * 6):  # fed at once; pads only for one row in the first call; one by one
            cache, logits = SinkWindowCache(2, 3), torch.empty(0)
            done = 0
            for piece in pieces:
                done += piece
                part = {} if position_ids is None else {"position_ids": position_ids[:, done - piece : done]}
                logits = llama(
                    inputs["input_ids"][:, done - piece : done], attention_mask=inputs["attention_mask"][:, :done],
                    past_key_values=cache, **part,
                ).logits  # fmt: skip
            if pieces != [6]:
                continue  # longer than what is cached: dense within the call, so only that it is let through
            expected = llama(rows[1], use_cache=False).logits
            assert relative_error(logits[1:, -1:], expected[:, -1:]) <= TOLERANCE
