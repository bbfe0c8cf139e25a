"""All that `generate()` can do with a cache: padded rows, beams, rolling back, turns. Every test names the bug it catches.

The oracle of `test_exact` sees one text without padding, so a row of a batch or a beam is judged by the logits that its own text
gives there; and where nothing is evicted, by what `DynamicCache` gives.
"""

import copy
import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.generation import utils as generation_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import flash_attention_mask

from sink_cache import SinkWindowCache, stream
from sink_cache.cache import stack_of

from .families import tiny_model
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


@pytest.mark.parametrize("attention, sampled", [("sdpa", False), ("sdpa", True), ("eager", False)])
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


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "gpt_neox"])
def test_padded_rows_with_masks_as_flash_attention_has_them(model_type: str) -> None:
    # Layers are given a padding mask that is cut to the keys, and not that of the whole text.
    def attention(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **options: Any) -> Any:
        queries, keys = query.shape[2], key.shape[2]
        seen = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)[None, None]
        if attention_mask is not None:
            seen = seen & attention_mask[:, None, None].bool()
            seen = seen | ~seen.any(-1, keepdim=True)  # queries of pads see anything
        return sdpa_attention_forward(module, query, key, value, seen, **options | {"is_causal": False})

    AttentionInterface.register("cut_masks", attention)
    AttentionMaskInterface.register("cut_masks", flash_attention_mask)
    model = tiny_model(model_type)
    written = []
    for name in ("sdpa", "cut_masks"):
        model.set_attn_implementation(name)
        cache = SinkWindowCache(3, 5)
        written.append(model.generate(**left_padded(texts(8, 1, 3)), past_key_values=cache, max_new_tokens=25, **PLAIN))
    assert torch.equal(*written)


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
    second = llama.generate(said, attention_mask=mask, past_key_values=cache, max_new_tokens=12, **PLAIN | WITH_LOGITS)
    for i, row in enumerate(rows):
        edges = [max(0, edge - (30 - row.shape[1])) for edge in (*range(0, 30, chunk), 30)]
        calls = [row[:, a:b] for a, b in itertools.pairwise(edges) if b > a]
        answer = first.sequences[i : i + 1, 30:]
        expected = alone(llama, calls, answer, n_sink, window)
        assert relative_error(torch.stack(first.logits, dim=1)[i : i + 1], expected) <= TOLERANCE
        # The last token of an answer has not been fed when the next turn comes.
        calls += [*answer[:, :-1].split(1, dim=1), torch.cat([answer[:, -1:], turn[i : i + 1]], dim=1)]
        expected = alone(llama, calls, second.sequences[i : i + 1, 39:], n_sink, window)
        assert relative_error(torch.stack(second.logits, dim=1)[i : i + 1], expected) <= TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("pieces", [[6], [3, 3], [1] * 6])
@pytest.mark.parametrize("numbered", ["by index", "by token"])
def test_padded_rows_fed_by_hand(llama: PreTrainedModel, numbered: str, pieces: list[int]) -> None:
    # forward() numbers a padded row from its first pad, generate() from its first token: distances count, not numbers. In
    # pieces, the cache learns the padding of a row only bit by bit, and a row's first position only with its first token.
    rows, more, n_sink, window = texts(6, 2), tokens(12, batch_size=2, seed=9), 2, 7
    inputs = left_padded(rows)
    input_ids = torch.cat([inputs["input_ids"], more], dim=1)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(more)], dim=1)
    by_token = (mask.cumsum(dim=1) - 1).clamp(min=0)
    cache, seen, logits = SinkWindowCache(n_sink, window), 0, []
    for piece in [*pieces, 2, *[1] * 10]:
        part = slice(seen, seen + piece)
        position_ids = {"position_ids": by_token[:, part]} if numbered == "by token" else {}
        seen += piece
        logits.append(
            llama(input_ids[:, part], attention_mask=mask[:, :seen], past_key_values=cache, **position_ids).logits
        )
    for i, row in enumerate(rows):
        expected = streamed_logits(llama, torch.cat([row, more[i : i + 1]], dim=1), n_sink, window)[:, -13:]
        assert relative_error(torch.cat(logits, dim=1)[i : i + 1, -13:], expected) <= TOLERANCE


# --- 2. beams and several sequences ---


def scores_by_oracle(
    model: PreTrainedModel, rows: list[torch.Tensor], sequences: torch.Tensor, length: int, n_sink: int, window: int
) -> torch.Tensor:
    """Log-probabilities `[sequences]` of what follows the prompts, which are padded to `length`; an equal share for each."""
    each = len(sequences) // len(rows)
    scores = []
    for i, sequence in enumerate(sequences):
        text = torch.cat([rows[i // each], sequence[None, length:]], dim=1)
        logits = streamed_logits(model, text, n_sink, window)[0, rows[i // each].shape[1] - 1 : -1]
        scores.append(logits.log_softmax(-1).gather(1, sequence[length:, None]).sum())
    return torch.stack(scores)


@pytest.mark.parametrize(
    "lengths, n_sink, window, compileable",
    [
        ((7, 7), 3, 5, False),  # nearly full before the first beams
        ((2, 2), 4, 8, False),  # beams begin amid the sinks
        ((7, 1), 2, 6, False),  # padded
        ((7, 7), 3, 5, True),
    ],
)
def test_beams_have_the_scores_of_their_texts(
    llama: PreTrainedModel, lengths: tuple[int, ...], n_sink: int, window: int, compileable: bool
) -> None:
    # A beam that goes on with another beam's window, sinks or pristine sinks; it works by shape, and the text is fluent.
    rows = texts(*lengths)
    out = llama.generate(
        **left_padded(rows), past_key_values=SinkWindowCache(n_sink, window, compileable=compileable),
        max_new_tokens=20, num_beams=3, num_return_sequences=2, length_penalty=0.0,
        **PLAIN | {"return_dict_in_generate": True, "output_scores": True},
    )  # fmt: skip
    expected = scores_by_oracle(llama, rows, out.sequences, max(lengths), n_sink, window)
    assert (out.beam_indices[:, :-1] != out.beam_indices[:, 1:]).any()  # or nothing was reordered
    assert torch.allclose(out.sequences_scores, expected, atol=1e-4)


@pytest.mark.parametrize("broken", ["reorder", "sinks"])
def test_scores_tell_a_broken_reorder(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    # If beams that keep each other's keys passed too, the test above would mean nothing.
    if broken == "reorder":
        monkeypatch.setattr(SinkWindowCache, "reorder_cache", lambda self, beam_idx: None)
    else:
        select = SinkWindowCache.batch_select_indices

        def keeps_its_sinks(self: SinkWindowCache, indices: torch.Tensor) -> None:
            kept = [layer.sink_keys.clone() for layer in self.layers]
            select(self, indices)
            for layer, sink_keys in zip(self.layers, kept, strict=True):
                layer.sink_keys.copy_(sink_keys)

        monkeypatch.setattr(SinkWindowCache, "batch_select_indices", keeps_its_sinks)
    rows = texts(1)  # so that beams differ in their sinks
    out = llama.generate(
        rows[0], past_key_values=SinkWindowCache(4, 4), max_new_tokens=24, num_beams=4, num_return_sequences=4,
        length_penalty=0.0, **PLAIN | {"return_dict_in_generate": True, "output_scores": True},
    )  # fmt: skip
    expected = scores_by_oracle(llama, rows, out.sequences, 1, 4, 4)
    assert not torch.allclose(out.sequences_scores, expected, atol=1e-2)


def test_several_sampled_sequences(llama: PreTrainedModel) -> None:
    torch.manual_seed(0)
    out = llama.generate(
        tokens(7), past_key_values=SinkWindowCache(3, 5), max_new_tokens=20, num_return_sequences=3,
        **PLAIN | {"do_sample": True} | WITH_LOGITS,
    )  # fmt: skip
    assert not torch.equal(out.sequences[0], out.sequences[1])
    expected = streamed_logits(llama, out.sequences, 3, 5)[:, 6:-1]
    assert relative_error(torch.stack(out.logits, dim=1), expected) <= TOLERANCE


@pytest.mark.parametrize("model_type, compileable", [("llama", False), ("gemma3_text", False), ("llama", True)])
@pytest.mark.parametrize("seen", [1, 2, 6, 25])  # before and after the layers share storage; before and after eviction
def test_rows_selected_and_repeated(model_type: str, compileable: bool, seen: int) -> None:
    # Rows that are left out, swapped, doubled; pristine sinks that stay where they were; sliding layers forgotten.
    model, n_sink, window = tiny_model(model_type), 3, 5
    before, after = tokens(seen, batch_size=3), tokens(15, batch_size=4, seed=1)
    cache = SinkWindowCache(n_sink, window, compileable=compileable)
    one_by_one(model, before, cache)
    cache.batch_select_indices(torch.tensor([False, True, True]))
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([3, 0, 2, 2]))
    text = torch.cat([before[[2, 1, 2, 2]], after], dim=1)
    logits = one_by_one(model, after, cache)
    assert relative_error(logits, streamed_logits(model, text, n_sink, window)[:, seen:]) <= TOLERANCE


@torch.no_grad()
def test_rows_that_were_padded_can_go(llama: PreTrainedModel) -> None:
    # What is left has no padding, and can do what unpadded rows can: stream, and be cropped.
    rows, cache = texts(6, 2), SinkWindowCache(3, 5)
    llama(**left_padded(rows), past_key_values=cache)
    assert not cache.is_croppable
    cache.batch_select_indices(torch.tensor([0, 0]))
    assert cache.is_croppable
    cache.crop(-2)
    more = tokens(14, batch_size=2, seed=9)
    logits = torch.cat(list(stream(llama, more, cache, chunk_size=5)), dim=1)
    expected = streamed_logits(llama, torch.cat([rows[0][:, :4].expand(2, -1), more], dim=1), 3, 5)[:, 4:]
    assert relative_error(logits, expected) <= TOLERANCE


@torch.no_grad()
def test_a_compileable_cache_after_reset_and_rebase(llama: PreTrainedModel) -> None:
    # Its memory stays where it is after a reset, but batch size, dtype and model may be others, also if the first call has one
    # token only; a select while it is empty is about nothing; after rebase() a call with several tokens sees the cache.
    n_sink, window = 3, 5
    cache = SinkWindowCache(n_sink, window, compileable=True)
    one_by_one(llama, tokens(12, batch_size=3), cache)
    cache.reset()
    cache.batch_select_indices(torch.tensor([False, True]))
    text = tokens(30, batch_size=2, seed=1)
    logits = one_by_one(llama, text, cache)
    assert relative_error(logits, streamed_logits(llama, text, n_sink, window)) <= TOLERANCE
    with pytest.raises(ValueError, match="batch size of the keys is 1"):
        llama(tokens(1), past_key_values=cache)

    assert cache.rebase() == 20
    more = tokens(window, batch_size=2, seed=2)
    position_ids = cache.next_position_ids(window).expand(2, -1)
    logits = llama(more, position_ids=position_ids, past_key_values=cache).logits[:, :1]
    expected = streamed_logits(llama, torch.cat([text, more], dim=1), n_sink, window)[:, 30:31]
    assert relative_error(logits, expected) <= TOLERANCE

    cache.reset()
    for t in range(2):  # positions that begin elsewhere
        llama(text[:, t : t + 1], position_ids=torch.tensor([[7 + t]]).expand(2, -1), past_key_values=cache)
    assert cache.next_position_ids().tolist() == [[9]]

    other = tiny_model("llama", rope_parameters={"rope_type": "default", "rope_theta": 50.0})
    for model in (other, copy.deepcopy(llama).double()):
        cache.reset()
        logits = one_by_one(model, text, cache)
        assert relative_error(logits, streamed_logits(model, text, n_sink, window)) <= TOLERANCE


# --- 3. rolling back ---


@torch.no_grad()
@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "mistral"])
@pytest.mark.parametrize("seen, fed, kept", [(2, 2, 0), (1, 5, 0), (3, 4, 2), (6, 4, 1), (30, 5, 0), (30, 4, 3)])
def test_cropped_tokens_were_never_fed(model_type: str, seen: int, fed: int, kept: int, at_once: bool) -> None:
    # Amid the sinks, before, across and after eviction at 8; all candidates rejected, or some. Tokens that were overwritten
    # and not brought back; sinks that stay rotated too far; candidates that see each other's evictions.
    model, n_sink, window = tiny_model(model_type), 3, 5
    text, candidates, after = tokens(seen), tokens(fed, seed=1), tokens(14, seed=2)
    cache = SinkWindowCache(n_sink, window)
    one_by_one(model, text, cache)
    cache.activate_past_recording()
    logits = model(candidates, past_key_values=cache).logits if at_once else one_by_one(model, candidates, cache)
    expected = streamed_logits(model, torch.cat([text, candidates], dim=1), n_sink, window)[:, seen:]
    assert relative_error(logits, expected) <= TOLERANCE
    cache.crop(kept - fed)
    assert cache.get_seq_length() == seen + kept
    logits = one_by_one(model, after, cache)
    expected = streamed_logits(model, torch.cat([text, candidates[:, :kept], after], dim=1), n_sink, window)
    assert relative_error(logits, expected[:, seen + kept :]) <= TOLERANCE


@torch.no_grad()
def test_crop_without_recording(llama: PreTrainedModel) -> None:
    # Possible while nothing has been evicted; after that refused, and nothing has changed, also where rebase() makes a
    # full cache look as if nothing had.
    text, after = tokens(8), tokens(14, seed=2)
    cache = SinkWindowCache(3, 5)
    one_by_one(llama, text, cache)
    cache.crop(-6)
    expected = streamed_logits(llama, torch.cat([text[:, :2], after], dim=1), 3, 5)[:, 2:]
    assert relative_error(one_by_one(llama, after, cache), expected) <= TOLERANCE

    for seen in (9, 13, 18):  # 18: rebase() goes back to 8, at which a new cache would be just full
        cache = SinkWindowCache(3, 5)
        one_by_one(llama, tokens(seen), cache)
        positions_go_on = cache.rebase() == 0
        assert positions_go_on == (seen == 9)
        with pytest.raises(ValueError, match=r"crop\(-2\) cannot bring back.*activate_past_recording"):
            cache.crop(-2)
        assert cache.get_seq_length() == seen
        for t in range(14):
            positions = cache.next_position_ids()
            logits = llama(after[:, t : t + 1], position_ids=positions, past_key_values=cache).logits
        expected = streamed_logits(llama, torch.cat([tokens(seen), after], dim=1), 3, 5)[:, -1:]
        assert relative_error(logits, expected) <= TOLERANCE


def draft_of(model: PreTrainedModel) -> PreTrainedModel:
    """A draft model that is sometimes right."""
    draft = copy.deepcopy(model)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for parameter in draft.parameters():
            parameter.add_(0.05 * parameter.std() * torch.randn_like(parameter) if parameter.ndim > 1 else 0)
    draft.generation_config.num_assistant_tokens = 4
    draft.generation_config.num_assistant_tokens_schedule = "constant"
    draft.generation_config.assistant_confidence_threshold = 0.0
    return draft


@pytest.fixture(scope="module")
def draft(llama: PreTrainedModel) -> PreTrainedModel:
    return draft_of(llama)


def count_crops(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    crops: list[int] = []
    crop = SinkWindowCache.crop
    monkeypatch.setattr(SinkWindowCache, "crop", lambda self, remove: (crops.append(-remove), crop(self, remove))[1])
    return crops


@pytest.mark.parametrize("n_sink, window", [(2, 60), (3, 9), (0, 12), (6, 5)])
@pytest.mark.parametrize("by", ["draft", "lookup"])
def test_assisted_greedy_is_plain_greedy(
    llama: PreTrainedModel, draft: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, by: str,
    n_sink: int, window: int,
) -> None:  # fmt: skip
    # Never full; full soon after the prompt; candidates of nearly the whole window. Rejected candidates that stay, or take
    # with them what they evicted; candidates that are judged with the sinks of the first of them.
    prompt = tokens(6, seed=3)
    lookup = {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1}
    helped = {"assistant_model": draft} if by == "draft" else lookup
    crops = count_crops(monkeypatch)
    settings = {"max_new_tokens": 50, **PLAIN, **WITH_LOGITS}
    plain = llama.generate(prompt, past_key_values=SinkWindowCache(n_sink, window), **settings)
    cache = SinkWindowCache(n_sink, window)
    out = llama.generate(prompt, past_key_values=cache, **helped, **settings)
    assert torch.equal(out.sequences, plain.sequences)
    assert relative_error(torch.stack(out.logits, dim=1), torch.stack(plain.logits, dim=1)) <= TOLERANCE
    assert any(crops), "no candidate was ever rejected"
    assert len(crops) < 50, "no candidate was ever right"
    # The cache goes on as if its text had been fed: another turn, assisted or not.
    assert cache.get_seq_length() == out.sequences.shape[1] - 1
    after = tokens(12, seed=9)
    expected = streamed_logits(llama, torch.cat([out.sequences[:, :-1], after], dim=1), n_sink, window)[:, -12:]
    assert relative_error(one_by_one(llama, after, cache), expected) <= TOLERANCE


@pytest.mark.parametrize("prompt_length", [11, 13, 40])  # the cache holds 12: candidates do not fit, or the prompt
@pytest.mark.parametrize("by", ["draft", "lookup"])
@pytest.mark.parametrize(
    "model_type, n_sink, window", [("llama", 3, 9), ("llama", 0, 12), ("gemma3_text", 3, 9), ("mistral", 3, 9)]
)
def test_assisted_greedy_is_plain_greedy_after_a_long_prompt(
    monkeypatch: pytest.MonkeyPatch, model_type: str, by: str, n_sink: int, window: int, prompt_length: int
) -> None:
    # The first call has prompt and candidates. Prompt tokens that do not see the whole prompt, as in plain generate(), or as
    # much as the native window of mistral's layers shows; candidates that do; candidates that cannot be taken back.
    # gemma3's own words would repeat themselves for ever.
    overrides = {"mistral": {"sliding_window": 16}, "gemma3_text": {"tie_word_embeddings": False}}
    model = tiny_model(model_type, **overrides.get(model_type, {}))
    prompt = tokens(prompt_length, seed=3)
    prompt[:, -3:] = prompt[:, 4:7]  # so that a lookup finds candidates in the first call
    helped = {
        "draft": {"assistant_model": draft_of(model)},
        "lookup": {"prompt_lookup_num_tokens": 3},
    }[by]
    crops = count_crops(monkeypatch)
    settings = {"max_new_tokens": 25, **PLAIN, **WITH_LOGITS}
    plain = model.generate(prompt, past_key_values=SinkWindowCache(n_sink, window), **settings)
    cache = SinkWindowCache(n_sink, window)
    out = model.generate(prompt, past_key_values=cache, **helped, **settings)
    assert torch.equal(out.sequences, plain.sequences)
    assert relative_error(torch.stack(out.logits, dim=1), torch.stack(plain.logits, dim=1)) <= TOLERANCE
    assert any(crops), "no candidate was ever rejected"
    assert cache.get_seq_length() == prompt_length + 24


def test_assisted_decoding_of_a_sampled_text_after_a_long_prompt(llama: PreTrainedModel) -> None:
    # Speculative sampling rejects candidates by chance; what follows must be what the cache gives after the tokens kept.
    cache = SinkWindowCache(3, 9)
    options = {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1, "do_sample": True, "max_new_tokens": 30}
    torch.manual_seed(0)
    out = llama.generate(tokens(40), past_key_values=cache, **{**PLAIN, **options})
    plain = SinkWindowCache(3, 9)
    with torch.no_grad():
        llama(out[:, :40], past_key_values=plain)
    one_by_one(llama, out[:, 40:-1], plain)
    after = tokens(5, seed=1)
    assert relative_error(one_by_one(llama, after, cache), one_by_one(llama, after, plain)) <= TOLERANCE


def test_assisted_decoding_begins_with_an_empty_cache(llama: PreTrainedModel, draft: PreTrainedModel) -> None:
    # After a streamed prompt transformers feeds all of it again, whatever the cache has seen: DynamicCache then gives another
    # text, without a word.
    prompt, cache = tokens(40), SinkWindowCache(3, 9)
    for _ in stream(llama, prompt[:, :-1], cache, chunk_size=16):
        pass
    with pytest.raises(NotImplementedError, match="positions that rise by one"):
        llama.generate(prompt, past_key_values=cache, assistant_model=draft, max_new_tokens=9, **PLAIN)
    assert cache.get_seq_length() == 39


def test_recording_outside_of_generate_begins_with_a_prompt_that_fits(llama: PreTrainedModel) -> None:
    # Nobody says there which tokens are the prompt and which may be taken back. What was learned of a call of generate() is over.
    cache = SinkWindowCache(3, 9)
    llama.generate(tokens(40), past_key_values=cache, prompt_lookup_num_tokens=3, max_new_tokens=5, **PLAIN)
    cache.reset()
    cache.activate_past_recording()
    with torch.no_grad(), pytest.raises(NotImplementedError, match=r"first call.*13 tokens.*holds 12"):
        llama(tokens(13), past_key_values=cache)
    assert cache.get_seq_length() == 0
    cache.reset()
    logits = torch.cat([*stream(llama, tokens(40), cache, chunk_size=16)], dim=1)
    assert relative_error(logits, streamed_logits(llama, tokens(40), 3, 9)) <= TOLERANCE


def test_recording_that_a_user_began_goes_on_after_assisted_decoding(llama: PreTrainedModel) -> None:
    cache = SinkWindowCache(3, 9, config=llama.config)
    options: dict[str, Any] = {"past_key_values": cache, **PLAIN}
    cache.activate_past_recording()
    text = llama.generate(tokens(6), prompt_lookup_num_tokens=3, max_new_tokens=9, **options)
    text = llama.generate(text, max_new_tokens=9, **options)
    seen = cache.get_seq_length()
    with torch.no_grad():
        llama(tokens(5), past_key_values=cache)
    cache.crop(-5)
    assert cache.get_seq_length() == seen


def test_what_is_recorded_does_not_grow(llama: PreTrainedModel, draft: PreTrainedModel) -> None:
    # Nobody crops after assisted decoding, and recording every token for ever would be a leak.
    cache = SinkWindowCache(3, 9)
    out = llama.generate(tokens(6), past_key_values=cache, assistant_model=draft, max_new_tokens=10, **PLAIN)
    cache.activate_past_recording()  # what generate() activates for itself ends with the next generate()
    out = llama.generate(out, past_key_values=cache, max_new_tokens=60, **PLAIN)
    assert sum(keys.shape[-2] for s in stack_of(cache).storages() for _, _, keys, _ in s.overwritten) <= 2 * 9
    assert torch.equal(out[:, 6:], streamed_logits(llama, out, 3, 9)[:, 5:-1].argmax(-1))
    # A turn longer than the window has no candidates; it is exact too, and cannot be taken back.
    turn = torch.cat([out, tokens(25, seed=1)], dim=1)
    out = llama.generate(turn, past_key_values=cache, max_new_tokens=1, **PLAIN)
    assert out[0, -1] == streamed_logits(llama, out, 3, 9)[0, -2].argmax(-1)
    with pytest.raises(ValueError, match=r"crop\(-2\).*no more than window = 9"):
        cache.crop(-2)


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
@pytest.mark.parametrize("stop", [2, 7, 30])  # before, at and after eviction; capacity is 12
def test_a_stop_that_is_noticed_one_step_late(monkeypatch: pytest.MonkeyPatch, model_type: str, stop: int) -> None:
    # transformers does so on MPS, and takes the last step back: the turn that follows must not see its token. Here on the CPU,
    # by leaving the question of the device out of DeferredStopCheck.is_supported.
    model = tiny_model(model_type)
    plain = model.generate(tokens(5), past_key_values=SinkWindowCache(4, 8), max_new_tokens=50, **PLAIN)
    end = int(plain[0, 5 + stop])
    first = plain[0, 5:].tolist().index(end)
    until_end = PLAIN | {"eos_token_id": end, "max_new_tokens": 50}
    crops = count_crops(monkeypatch)
    monkeypatch.setattr(torch, "Event", lambda **_: SimpleNamespace(record=lambda: None, synchronize=lambda: None))
    monkeypatch.setattr(
        generation_utils.DeferredStopCheck,
        "is_supported",
        staticmethod(lambda device, cache, cache_is_returned, is_assistant: cache.is_croppable),
    )
    cache = SinkWindowCache(4, 8)
    out = model.generate(tokens(5), past_key_values=cache, **until_end)
    assert crops[-1] == 1
    assert torch.equal(out, plain[:, : 6 + first])
    assert cache.get_seq_length() == out.shape[1] - 1
    # The next turn is longer than the window, which a cache that still records would refuse.
    turn = torch.cat([out, tokens(20, seed=1)], dim=1)
    again = model.generate(turn, past_key_values=cache, max_new_tokens=20, **PLAIN)
    monkeypatch.undo()
    cache = SinkWindowCache(4, 8)
    out = model.generate(tokens(5), past_key_values=cache, **until_end)
    assert torch.equal(again, model.generate(turn, past_key_values=cache, max_new_tokens=20, **PLAIN))


# --- 4. several turns ---

# The window is 8: turns that are shorter, as long, longer; the first ends amid the sinks.
TURNS = [3, 20, 1, 2, 9, 8, 5, 13, 1, 30]


def test_ten_streamed_turns_are_one_continuous_run(llama: PreTrainedModel) -> None:
    # A turn that is fed twice, or from the wrong token on; tokens that only a turn as long as the window loses.
    cache, said, answered = SinkWindowCache(4, 8), torch.empty(1, 0, dtype=torch.long), []
    for i, length in enumerate(TURNS):
        said = torch.cat([said, tokens(length, seed=i)], dim=1)
        for _ in stream(llama, said[:, cache.get_seq_length() : -1], cache, chunk_size=6) if said.shape[1] > 1 else ():
            pass
        answered += range(said.shape[1], said.shape[1] + 7)
        said = llama.generate(said, past_key_values=cache, max_new_tokens=7, **PLAIN)
        assert cache.get_seq_length() == said.shape[1] - 1
    expected = streamed_logits(llama, said, 4, 8).argmax(-1)
    assert torch.equal(said[0, answered], expected[0, [t - 1 for t in answered]])


def test_ten_plain_turns_are_dense_within_each_turn() -> None:
    # The same through generate() alone. A model of one layer, in which a fresh forward over just the tokens that a query
    # sees says what it must give: of a call with several tokens, sinks, the last 7 cached and the call.
    model, cache, said = tiny_model("llama", layers=1), SinkWindowCache(4, 8), torch.empty(1, 0, dtype=torch.long)
    for i, length in enumerate(TURNS):
        seen = cache.get_seq_length()
        prompt = torch.cat([said, tokens(length, seed=i)], dim=1)
        out = model.generate(prompt, past_key_values=cache, max_new_tokens=7, **PLAIN | WITH_LOGITS)
        said = out.sequences
        kept = [t for t in range(prompt.shape[1]) if t < 4 or t > seen - 8]
        first = model(prompt[:, kept], use_cache=False).logits[:, -1:]
        later = fresh_logits(model, said[:, :-1], 4, 8)[:, prompt.shape[1] :]
        expected = torch.cat([first, later], dim=1)
        assert relative_error(torch.stack(out.logits, dim=1), expected) <= TOLERANCE


# --- 10. transformers' own cache as the judge ---

# Partial rotary; sliding layers beside ours, and alone; interleaved pairs; sinks of its own; a single head of keys.
FAMILIES = ["gpt_neox", "gemma3_text", "mistral", "cohere", "gpt_oss", "falcon"]
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"do_sample": True, "num_return_sequences": 2},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "beams that sample": {"num_beams": 2, "do_sample": True},
    "assisted": {"assistant_model": None},
    "prompt lookup": {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1},
}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_until_full_every_mode_gives_what_dynamic_cache_gives(model_type: str) -> None:
    # mistral: all its layers are sliding ones, and n_sink + window may not be above their window
    model = tiny_model(model_type, **({"sliding_window": 40} if model_type == "mistral" else {}))
    prompts = {1: tokens(9), 2: left_padded(texts(9, 4))}
    for mode, arguments in MODES.items():
        batch_size = 1 if mode in ("assisted", "prompt lookup") else 2
        inputs = prompts[batch_size] if batch_size > 1 else {"input_ids": prompts[1]}
        if mode == "assisted":
            arguments = {"assistant_model": tiny_model(model_type, seed=1, layers=1)}
        caches: list[Callable[[], Any]] = [lambda: SinkWindowCache(4, 36), lambda: DynamicCache(config=model.config)]
        texts_of_both = []
        for make in caches:
            torch.manual_seed(0)
            texts_of_both.append(
                model.generate(**inputs, past_key_values=make(), max_new_tokens=16, **PLAIN | arguments)
            )
        assert texts_of_both[0].shape[1] == 25
        assert torch.equal(*texts_of_both), mode
