"""The endless loop: the same text as generate() for as long as that goes, and then on, in bounded positions and memory."""

import gc
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    MaxLengthCriteria,
    NoRepeatNGramLogitsProcessor,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)

from sink_cache import SinkWindowCache, endless, stream, verify
from sink_cache.rotary import ForwardRotation

from .families import tiny_model
from .oracle import relative_error, streamed_logits
from .test_exact import tokens


class Collect:
    """A streamer that keeps everything."""

    def __init__(self) -> None:
        self.text: list[int] = []
        self.ended = False

    def put(self, ids: torch.Tensor) -> None:
        self.text.extend(ids.flatten().tolist())

    def end(self) -> None:
        self.ended = True


@pytest.fixture
def model() -> Iterator[PreTrainedModel]:
    model = tiny_model("llama")
    model.generation_config.eos_token_id = None
    return model


def go_on(model: PreTrainedModel, input_ids: torch.Tensor, cache: SinkWindowCache, **more: Any) -> Any:
    options = {"do_sample": False, "pad_token_id": 0, "custom_generate": endless, **more}
    return model.generate(input_ids, past_key_values=cache, **options)


@pytest.mark.parametrize("compileable", [False, True])
@pytest.mark.parametrize("model_type", ["llama", "gpt_neox", "gemma3_text"])
def test_many_rebases_leave_no_trace(model_type: str, compileable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # A dozen rebases: a key rotated at every one of them, or by other numbers than the positions, would add up.
    monkeypatch.setattr("sink_cache.steps._REBASE_EVERY", 12)
    model, streamer, cache = tiny_model(model_type), Collect(), SinkWindowCache(3, 9, compileable=compileable)
    model.generation_config.eos_token_id = None
    positions, logits = [], []

    def note(_: Any, __: Any, kwargs: dict[str, Any], output: Any) -> None:
        positions.append(int(kwargs["position_ids"].max()))
        logits.append(output.logits[:, -1])

    hook = model.register_forward_hook(note, with_kwargs=True)
    go_on(model, tokens(5), cache, max_new_tokens=160, streamer=streamer)
    hook.remove()
    assert streamer.ended
    assert len(streamer.text) == 165
    expected = streamed_logits(model, torch.tensor([streamer.text]), 3, 9)[:, 4:-1]
    assert relative_error(torch.stack(logits, dim=1), expected) <= 1e-4
    assert max(positions) <= 12 + 9 + 2 * max(12, cache.rebase_step)
    assert cache.get_seq_length() == 164


def test_each_key_is_rotated_once_at_most(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sink_cache.steps._REBASE_EVERY", 1)  # even then not before the window has turned over
    moments, cache = [], SinkWindowCache(3, 9)
    rebase = SinkWindowCache.rebase

    def noting(self: SinkWindowCache) -> int:
        by = rebase(self)
        moments.extend([self.get_seq_length()] if by else [])
        return by

    monkeypatch.setattr(SinkWindowCache, "rebase", noting)
    go_on(model, tokens(5), cache, max_new_tokens=200)
    assert len(moments) > 10
    assert min(later - earlier for earlier, later in pairwise(moments)) >= 9


@pytest.mark.parametrize("options", [{"do_sample": True, "top_k": 5, "repetition_penalty": 1.3}, {"do_sample": False}])
@pytest.mark.parametrize("compileable", [False, True])
def test_processors_and_sampling_as_in_generate(model: PreTrainedModel, options: Any, compileable: bool) -> None:
    more = {"max_new_tokens": 40, "logits_processor": LogitsProcessorList([NoRepeatNGramLogitsProcessor(3)]), **options}
    texts = []
    for custom in (endless, None):
        torch.manual_seed(1)
        cache = SinkWindowCache(2, 60, compileable=compileable)
        texts.append(go_on(model, tokens(8, 2), cache, custom_generate=custom, **more))
    assert torch.equal(*texts)


def test_padded_rows(model: PreTrainedModel) -> None:
    mask = torch.ones(3, 8, dtype=torch.long)
    mask[0, :5] = mask[2, :2] = 0
    texts = [
        go_on(
            model, tokens(8, 3), SinkWindowCache(2, 9), attention_mask=mask, max_new_tokens=40, custom_generate=custom
        )
        for custom in (endless, None)
    ]
    assert torch.equal(texts[0], texts[1][:, -11:])


@pytest.mark.parametrize("model_type", ["gemma3_text", "gpt_oss", "cohere2"])
def test_pads_in_sliding_layers_that_are_longer_than_the_cache(model_type: str) -> None:
    # Ours are full after 5 tokens of a row, and transformers' own layers of 8 still hold pads then.
    model, mask = tiny_model(model_type), torch.ones(2, 8, dtype=torch.long)
    model.generation_config.eos_token_id = None
    mask[0, :6] = 0
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 20, "return_dict_in_generate": True}
    plain = go_on(model, tokens(8, 2), SinkWindowCache(2, 3), output_logits=True, custom_generate=None, **options)
    cache, logits = SinkWindowCache(2, 3), []

    def note(_: Any, scores: torch.Tensor) -> torch.Tensor:
        logits.append(scores)
        return scores

    go_on(model, tokens(8, 2), cache, logits_processor=LogitsProcessorList([note]), **options)
    assert relative_error(torch.stack(logits), torch.stack(plain.logits)) <= 1e-5
    cache = SinkWindowCache(2, 3)
    with torch.no_grad():
        model(tokens(8, 2), attention_mask=mask, past_key_values=cache)
        while until := cache.tokens_until_full():
            mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], dim=1)
            if until == 1:
                with pytest.raises(ValueError, match="padding that is not yet out of sight"):
                    model(tokens(1, 2), past_key_values=cache)
            model(tokens(1, 2), attention_mask=mask, past_key_values=cache)
        model(tokens(1, 2), past_key_values=cache)


class After(StoppingCriteria):
    """Stops after so many calls."""

    def __init__(self, calls: int) -> None:
        self.calls, self.widest = calls, 0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.calls -= 1
        self.widest = max(self.widest, input_ids.shape[1])
        return torch.full((len(input_ids),), self.calls <= 0)


def test_stops_only_when_told(model: PreTrainedModel) -> None:
    cache, criterion = SinkWindowCache(2, 9), After(70)
    text = go_on(model, tokens(5), cache, stopping_criteria=[criterion])  # generate()'s default would stop after 20
    assert cache.get_seq_length() == 5 + 70 - 1
    assert criterion.widest == text.shape[1] == 11  # the recent tokens, as many as the cache holds
    assert go_on(model, tokens(5), SinkWindowCache(2, 60), max_length=30).shape[1] == 30
    lengths = StoppingCriteriaList([MaxLengthCriteria(12), After(99)])
    assert go_on(model, tokens(5), SinkWindowCache(2, 60), stopping_criteria=lengths).shape[1] == 12
    assert go_on(model, tokens(5), SinkWindowCache(2, 60), stopping_criteria=[MaxLengthCriteria(3)]).shape[1] == 6
    assert go_on(model, tokens(5), SinkWindowCache(2, 9), max_new_tokens=30, keep_tokens=20).shape[1] == 20
    eos = int(go_on(model, tokens(5), SinkWindowCache(2, 60), max_new_tokens=9)[0, -1])
    stopped = go_on(model, tokens(5), SinkWindowCache(2, 60), eos_token_id=eos)
    assert stopped[0, -1] == eos
    assert stopped.shape[1] <= 14


def test_rows_that_have_finished_get_pads(model: PreTrainedModel) -> None:
    input_ids = tokens(5, 2)
    eos = int(go_on(model, input_ids, SinkWindowCache(2, 60), max_new_tokens=6)[0, -1])
    for custom in (endless, None):
        text = go_on(
            model, input_ids, SinkWindowCache(2, 60), max_new_tokens=12, eos_token_id=eos, custom_generate=custom
        )
        assert (text[0, 5 + 6 :] == 0).all()


def test_a_second_turn_takes_the_new_tokens_only(model: PreTrainedModel) -> None:
    cache, plain = SinkWindowCache(2, 60), SinkWindowCache(2, 60)
    first = go_on(model, tokens(8), cache, max_new_tokens=10)
    # The last token of the answer has not been fed.
    second = go_on(model, torch.cat([first[:, -1:], tokens(5, seed=3)], dim=1), cache, max_new_tokens=10)
    text = go_on(model, tokens(8), plain, max_new_tokens=10, custom_generate=None)
    text = torch.cat([text, tokens(5, seed=3)], dim=1)
    text = go_on(model, text, plain, max_new_tokens=10, custom_generate=None)
    assert torch.equal(second[:, -10:], text[:, -10:])


# The cache holds 11 tokens: turns that end before it is full, fill it, and turn it over.
QUESTIONS = [3, 4, 1, 9, 2, 14]


def talk(model: PreTrainedModel, given: str, **more: Any) -> torch.Tensor:
    """All tokens of a conversation in which the user says `QUESTIONS`, and what is given to `endless` is `given`."""
    cache, text = SinkWindowCache(2, 9, **more), torch.empty(1, 0, dtype=torch.long)
    returned = text
    for turn, length in enumerate(QUESTIONS):
        said = tokens(length, seed=turn)
        unfed = text[:, cache.get_seq_length() :]  # the last token of an answer
        input_ids = {"new": [unfed, said], "whole": [text, said], "returned": [returned, said]}[given]
        returned = go_on(model, torch.cat(input_ids, dim=1), cache, max_new_tokens=7)
        text = torch.cat([text, said, returned[:, -7:]], dim=1)
        assert cache.get_seq_length() == text.shape[1] - 1
    return text


@pytest.mark.parametrize("compileable", [False, True])
@pytest.mark.parametrize("given", ["whole", "returned"])
def test_a_conversation_that_is_given_again_is_not_read_again(
    model: PreTrainedModel, given: str, compileable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # generate() wants the whole text in every turn; and torch.cat([returned, new]) is the whole as long as all is returned.
    monkeypatch.setattr("sink_cache.steps._REBASE_EVERY", 1)  # as often as the window turns over
    assert torch.equal(talk(model, given, compileable=compileable), talk(model, "new"))


def test_a_conversation_of_several_rows_that_is_given_again(model: PreTrainedModel) -> None:
    caches = [SinkWindowCache(2, 9) for _ in range(2)]
    first = [go_on(model, tokens(5, 3), cache, max_new_tokens=30, keep_tokens=99) for cache in caches]
    new = tokens(4, 3, seed=1)
    whole = go_on(model, torch.cat([first[0], new], dim=1), caches[0], max_new_tokens=9, keep_tokens=99)
    alone = go_on(model, torch.cat([first[1][:, -1:], new], dim=1), caches[1], max_new_tokens=9)
    assert torch.equal(whole[:, -9:], alone[:, -9:])
    assert torch.equal(whole[:, :35], first[0])


def test_the_same_text_once_more_is_an_answer_that_goes_on(model: PreTrainedModel) -> None:
    cache = SinkWindowCache(2, 9)
    text = go_on(model, tokens(5), cache, max_new_tokens=30, keep_tokens=99)
    more = go_on(model, text, cache, max_new_tokens=10, keep_tokens=99)
    assert torch.equal(more, go_on(model, tokens(5), SinkWindowCache(2, 9), max_new_tokens=40, keep_tokens=99))


@pytest.mark.parametrize("answer", [1, 7])
def test_a_question_that_is_asked_again_is_new(model: PreTrainedModel, answer: int) -> None:
    # It looks like the beginning of the conversation, as does every turn of a chat template.
    question, longer = tokens(6), torch.cat([tokens(6), tokens(20, seed=1)], dim=1)
    for again in (question, longer):
        cache = SinkWindowCache(2, 9)
        first = go_on(model, question, cache, max_new_tokens=answer)
        new = torch.cat([first[:, -1:], again], dim=1)
        second = go_on(model, new, cache, max_new_tokens=5, keep_tokens=99)
        assert cache.get_seq_length() == 6 + answer - 1 + new.shape[1] + 4
        assert torch.equal(second[:, : new.shape[1]], new)


def test_a_text_that_leaves_out_the_last_token_of_the_answer(model: PreTrainedModel) -> None:
    # Either the whole text without the end of the answer, or the same question again and more.
    cache = SinkWindowCache(2, 9)
    first = go_on(model, tokens(6), cache, max_new_tokens=4)
    other = (first[:, -1:] + 1) % 100
    with pytest.raises(ValueError, match=r"begin with the 9 tokens.*leave out the last token"):
        go_on(model, torch.cat([first[:, :-1], other, tokens(3)], dim=1), cache, max_new_tokens=4)
    assert cache.get_seq_length() == 9


def test_a_prompt_that_was_streamed_is_not_read_again(model: PreTrainedModel) -> None:
    # As generate() wants it after stream(): the whole prompt, with at least one token that was not streamed.
    prompt, texts = tokens(40), []
    for given in (prompt, prompt[:, -3:]):
        cache = SinkWindowCache(2, 9)
        for _ in stream(model, prompt[:, :-3], cache, chunk_size=16):
            pass
        texts.append(go_on(model, given, cache, max_new_tokens=20)[:, -9:])
        assert cache.get_seq_length() == 40 + 19
    assert torch.equal(*texts)
    cache.reset()
    for _ in stream(model, prompt[:, :5], cache):
        pass
    with pytest.raises(ValueError, match="the 5 tokens that this cache has seen, and no new one"):
        go_on(model, prompt[:, :5], cache, max_new_tokens=20)
    go_on(model, tokens(9, seed=1), cache, max_new_tokens=3)  # longer than what was streamed, and new
    assert cache.get_seq_length() == 5 + 9 + 2


def test_a_text_of_which_endless_has_not_been_told(model: PreTrainedModel, tmp_path: Path) -> None:
    # Whether these are new tokens or the whole text nobody can say who has only counted the tokens of the cache.
    def by_generate(cache: SinkWindowCache) -> None:
        go_on(model, tokens(5), cache, max_new_tokens=9, custom_generate=None)

    def by_loading(cache: SinkWindowCache) -> None:
        go_on(model, tokens(5), cache, max_new_tokens=9)
        cache.save(tmp_path / "cache")
        cache.load(tmp_path / "cache", model)

    def by_cropping(cache: SinkWindowCache) -> None:
        go_on(model, tokens(5), cache, max_new_tokens=6)
        cache.crop(-1)
        with torch.no_grad():
            model(tokens(4), past_key_values=cache)

    for fed in (by_generate, by_loading, by_cropping):
        cache = SinkWindowCache(2, 60)
        fed(cache)
        with pytest.raises(
            ValueError, match=r"14 tokens.*has seen 13.*not all of them through stream\(\) or endless.*by stream\(\)"
        ):
            go_on(model, tokens(14), cache, max_new_tokens=4)
        go_on(model, tokens(13, seed=1), cache, max_new_tokens=4)
        assert cache.get_seq_length() == 13 + 13 + 3


def test_nothing_grows(model: PreTrainedModel) -> None:
    # A mask, ids or positions of the whole text, or a list of steps.
    def numbers_held(_: Any = None) -> int:
        gc.collect()
        return sum(one.numel() for one in gc.get_objects() if isinstance(one, torch.Tensor))

    held = []

    class Watch(Collect):
        def put(self, ids: torch.Tensor) -> None:
            super().put(ids)
            if len(self.text) in (100, 300):
                held.append(numbers_held())

    go_on(model, tokens(5), SinkWindowCache(2, 9), max_new_tokens=310, streamer=Watch())
    assert held[1] <= held[0]


def test_the_model_is_left_as_it_was(model: PreTrainedModel) -> None:
    class Fails(Collect):
        def put(self, ids: torch.Tensor) -> None:
            super().put(ids)
            if len(self.text) > 40:
                raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        go_on(model, tokens(5), SinkWindowCache(2, 9, compileable=True), streamer=Fails())
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_steps_of_a_full_cache_have_no_mask(model_type: str, attention: str) -> None:
    # The sliding layers of the second are full after 8 tokens.
    model = tiny_model(model_type)
    model.generation_config.eos_token_id = None
    model.set_attn_implementation(attention)
    masked = []
    for layer in model.model.layers:
        note = lambda module, arguments, kwargs: masked.append(kwargs["attention_mask"] is not None)  # noqa: E731
        layer.self_attn.register_forward_pre_hook(note, with_kwargs=True)
    verify(model)  # or these hooks are a reason to refuse it
    masked.clear()
    go_on(model, tokens(5), SinkWindowCache(2, 8, compileable=True), max_new_tokens=20)
    until_full = 3 * (1 + 4)  # layers; the prompt and 4 tokens more: the next query takes the last slot
    assert all(masked[3:until_full])
    # Eager attention has no faster kernel to win, and some models cannot do without.
    assert set(masked[until_full:]) == {attention == "eager"}
    assert len(masked) == 3 * 20


def test_who_uses_the_model_during_a_step_has_its_masks(model: PreTrainedModel) -> None:
    # As another thread may: a step has no masks, and the model of all others has.
    input_ids, mask = tokens(6, 2), torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    alone, meanwhile = model(input_ids, attention_mask=mask).logits[:, -1], []

    def another_user(*_: Any) -> None:
        hook.remove()
        meanwhile.append(model(input_ids, attention_mask=mask).logits[:, -1])
        watch()

    def watch() -> None:
        nonlocal hook
        hook = model.model.layers[1].register_forward_hook(another_user)

    hook: Any = None
    watch()
    text = go_on(model, tokens(5), SinkWindowCache(2, 6, compileable=True), max_new_tokens=20, keep_tokens=99)
    hook.remove()
    assert len(meanwhile) == 20
    assert all(torch.allclose(one, alone, atol=1e-6) for one in meanwhile)
    assert torch.equal(text, go_on(model, tokens(5), SinkWindowCache(2, 6), max_new_tokens=20, custom_generate=None))


def test_models_that_cannot_be_rebased_are_refused_before_the_cache_is_full() -> None:
    model, cache, streamer = tiny_model("llama4_text"), SinkWindowCache(2, 60), Collect()
    with pytest.raises(NotImplementedError, match=r"rebase\(\) cannot move the keys of the sliding layers"):
        go_on(model, tokens(5), cache, max_new_tokens=9, streamer=streamer)
    assert len(streamer.text) == 5


def test_who_calls_the_model_between_steps_has_its_masks(model: PreTrainedModel) -> None:
    input_ids, mask, logits = tokens(6, 2), torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6]), []

    class Judges(StoppingCriteria):
        def __call__(self, ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            logits.append(model(input_ids, attention_mask=mask).logits[:, -1])
            return torch.tensor([len(logits) > 12] * len(ids))

    go_on(model, tokens(5), SinkWindowCache(2, 6, compileable=True), stopping_criteria=[Judges()])
    assert all(torch.equal(one, logits[0]) for one in logits)


@pytest.mark.parametrize("compileable", [False, True])
def test_generate_after_a_rebase_is_refused(
    model: PreTrainedModel, compileable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sink_cache.steps._REBASE_EVERY", 8)
    cache = SinkWindowCache(3, 5, compileable=compileable)
    text = go_on(model, tokens(5), cache, max_new_tokens=40, keep_tokens=99)
    with pytest.raises(NotImplementedError, match="use next_position_ids"):
        go_on(model, text, cache, max_new_tokens=3, custom_generate=None)


@pytest.mark.parametrize("compileable", [False, True])
def test_a_table_of_positions_does_not_end_the_text(compileable: bool) -> None:
    model = tiny_model("gptj", n_positions=130)
    model.generation_config.eos_token_id = None
    cache = SinkWindowCache(4, 25, compileable=compileable)
    go_on(model, tokens(5), cache, max_new_tokens=180)
    assert cache.get_seq_length() == 184
    with pytest.raises(ValueError, match="Choose a smaller window"):
        go_on(model, tokens(5), SinkWindowCache(4, 65, compileable=compileable), max_new_tokens=3)


@pytest.mark.parametrize(
    "cache, more, error, message",
    [
        (DynamicCache, {}, TypeError, "but got DynamicCache"),
        (lambda: None, {}, TypeError, "but got"),
        (lambda: SinkWindowCache(2, 9), {"num_beams": 2}, ValueError, "num_beams is 2"),
        (
            lambda: SinkWindowCache(2, 9),
            {"prefill_chunk_size": -1},
            ValueError,
            "prefill_chunk_size must be at least 1",
        ),
        (lambda: SinkWindowCache(2, 9), {"synced_gpus": True}, NotImplementedError, "does not keep processes in step"),
        (
            lambda: SinkWindowCache(2, 9),
            {"output_scores": True, "return_dict_in_generate": True},
            ValueError,
            "output_scores is not possible",
        ),
        (lambda: SinkWindowCache(2, 9), {"keep_tokens": 0}, ValueError, "keep_tokens must be"),
        (lambda: SinkWindowCache(2, 6), {"min_new_tokens": 6}, ValueError, "endless keeps only the last 8. Pass"),
        (lambda: SinkWindowCache(2, 3), {"begin_suppress_tokens": [9]}, ValueError, "Pass keep_tokens=6"),
        (lambda: SinkWindowCache(0, 1), {"forced_bos_token_id": 9}, ValueError, "Pass keep_tokens=2"),
    ],
)
def test_bad_input(model: PreTrainedModel, cache: Any, more: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        go_on(model, tokens(5), cache(), **{"max_new_tokens": 9, **more})


def test_a_model_that_processes_share_is_refused(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    # generate() sets synced_gpus by itself for it.
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *_: 2)
    monkeypatch.setattr(model, "_is_fsdp_managed_module", True, raising=False)
    with pytest.raises(NotImplementedError, match="With synced_gpus=False it works"):
        go_on(model, tokens(5), SinkWindowCache(2, 9), max_new_tokens=9)
    assert go_on(model, tokens(5), SinkWindowCache(2, 9), max_new_tokens=3, synced_gpus=False).shape[1] == 8


def test_inputs_other_than_text_are_not_dropped(model: PreTrainedModel) -> None:
    cache = SinkWindowCache(2, 9)
    with pytest.raises(ValueError, match="pixel_values"):
        endless(
            model, tokens(5), None, None, model.generation_config, past_key_values=cache, pixel_values=torch.ones(1)
        )


def test_rebase_by_hand(model: PreTrainedModel) -> None:
    cache = SinkWindowCache(3, 5)
    with pytest.raises(ValueError, match="a cache that a model has used"):
        cache.rebase()
    input_ids = tokens(60)
    with torch.no_grad():
        model(input_ids[:, :4], past_key_values=cache)
        assert cache.rebase() == 0  # nothing to take off yet
        for t in range(4, 40):
            model(input_ids[:, t : t + 1], past_key_values=cache)
        assert cache.rebase() == 30
        assert cache.next_position_ids(2).tolist() == [[10, 11]]
        # Positions that the model counts by itself are wrong from now on.
        with pytest.raises(NotImplementedError, match="from 10 on in this call"):
            model(input_ids[:, 40:41], past_key_values=cache)
        logits = [
            model(input_ids[:, t : t + 1], position_ids=cache.next_position_ids(), past_key_values=cache).logits
            for t in range(40, 60)
        ]
    assert relative_error(torch.cat(logits, dim=1), streamed_logits(model, input_ids, 3, 5)[:, 40:]) <= 1e-5


@pytest.mark.parametrize("compileable", [False, True])
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_a_rebase_that_is_interrupted_is_noticed(
    model_type: str, compileable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Some layers have been moved, and others have not.
    model, cache, turn = (
        tiny_model(model_type),
        SinkWindowCache(3, 5, compileable=compileable),
        ForwardRotation.move_rows,
    )
    calls = iter([turn])

    def one_layer_and_no_more(*args: Any) -> torch.Tensor:
        return next(calls, interrupt)(*args)

    def interrupt(*_: Any) -> torch.Tensor:
        raise KeyboardInterrupt

    with torch.no_grad():
        for t in range(100):
            model(tokens(100)[:, t : t + 1], past_key_values=cache)
        monkeypatch.setattr(ForwardRotation, "move_rows", one_layer_and_no_more)
        with pytest.raises(KeyboardInterrupt):
            cache.rebase()
        monkeypatch.undo()
        for go_on_anyway in (
            lambda: model(tokens(1), past_key_values=cache),
            lambda: model(tokens(1), position_ids=cache.next_position_ids(), past_key_values=cache),
            lambda: model(tokens(4), past_key_values=cache),
            cache.rebase,
            lambda: cache.save("nowhere"),
        ):
            with pytest.raises(ValueError, match="interrupted"):
                go_on_anyway()
        cache.reset()
        model(tokens(9), past_key_values=cache)
        assert cache.get_seq_length() == 9


def test_a_rebase_moves_what_was_made_in_inference_mode() -> None:
    model, cache, input_ids = tiny_model("gemma3_text"), SinkWindowCache(3, 5), tokens(60)
    with torch.inference_mode():
        for t in range(40):
            model(input_ids[:, t : t + 1], past_key_values=cache)
    assert cache.rebase()
    with torch.inference_mode():
        logits = [
            model(input_ids[:, t : t + 1], position_ids=cache.next_position_ids(), past_key_values=cache).logits
            for t in range(40, 60)
        ]
    assert relative_error(torch.cat(logits, dim=1), streamed_logits(model, input_ids, 3, 5)[:, 40:]) <= 1e-5


def test_a_turn_that_is_padded_on_the_right() -> None:
    # Its zeros were counted as padding on the left, and other tokens than the row's were generated.
    model, cache = tiny_model("llama"), SinkWindowCache(2, 6)
    options = {"custom_generate": endless, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    first = model.generate(tokens(3, 2), max_new_tokens=4, **options, past_key_values=cache)
    turn = torch.cat([first[:, -1:], tokens(4, 2, seed=1)], dim=1)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    seen = cache.get_seq_length()
    with pytest.raises(NotImplementedError, match="supports left padding only"):
        model.generate(turn, attention_mask=mask, max_new_tokens=4, **options, past_key_values=cache)
    assert cache.get_seq_length() == seen
