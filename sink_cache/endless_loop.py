"""Generation without end: positions stay bounded, and nothing grows with the text.

`generate()` numbers tokens for ever, keeps every token, and builds a mask over all of them. The decoding loop here uses
transformers' own extension point, `custom_generate`. It rebases the cache from time to time, so that positions stay low. It keeps
only the recent tokens of the text. Once the cache is full, a compiled step needs no mask, because its query sees every slot.

Low positions are also more exact: at position 100,000, the logits of plain `generate()` have moved by some 0.2%.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    PreTrainedModel,
    StoppingCriteriaList,
)

from .cache import SinkWindowCache, stack_of
from .fed import KEPT, first_new_token, note_fed, text_fed_to
from .internals import (
    GenerateDecoderOnlyOutput,
    by_both_names,
    cache_kwargs,
    generate_call,
    generate_output,
    keeps_processes_in_step,
    pad_token_of,
    stops_at_token,
    take_cache,
    virtual_tokens,
)
from .steps import Step, read, steps_between_rebases


@by_both_names
@torch.no_grad()
def endless(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    *,
    keep_tokens: int | None = None,
    **model_kwargs: Any,
) -> torch.Tensor | GenerateDecoderOnlyOutput:
    """A decoding loop for `model.generate(..., custom_generate=endless)` that runs until it is told to stop.

    It does greedy decoding and sampling, with all of `generate()`'s logits processors and stopping criteria, and a `streamer`. It
    stops at an `eos_token_id` (if the model or the call has one), when a stopping criterion says so, and after `max_new_tokens`
    or at `max_length`, if given. Otherwise it never stops. With `SinkWindowCache(..., compileable=True)`, steps of a full cache
    are compiled where `generate()` would compile them, and run without masks (with `sdpa` attention).

    Args:
        keep_tokens (`int`, *optional*): how many of the last tokens are returned, and are seen by logits processors and stopping
            criteria. By default the cache's capacity. Pass it to `generate()`.
        past_key_values (`SinkWindowCache`): in `model_kwargs` (`cache` from transformers 5.24 on).

    If the cache has seen tokens already, `input_ids` may be one of these:

    * The new tokens alone. The first is the last token of the previous answer, which no forward has seen.
    * The whole text, as `generate()`'s own loops want it. The last 256 tokens that the cache has seen are compared.
    * What the last call returned, followed by new tokens. The last call need not have returned the whole text.

    Only tokens that `stream` or `endless` fed last can be compared. If something else fed the cache, `input_ids` that are longer
    than what it has seen are refused.

    Returns:
        `torch.Tensor`: the last `keep_tokens` tokens at most, prompt included, `[batch_size, tokens]`; or a
            `GenerateDecoderOnlyOutput` with these tokens and the cache, if `return_dict_in_generate`. All tokens go to the
            `streamer`, as they come.

    Raises:
        TypeError: without a `SinkWindowCache`.
        NotImplementedError: for models with PEFT's virtual tokens, or whose keys a rebase could not move; for `synced_gpus`,
            which `generate()` sets by itself for models that processes share by FSDP or ZeRO 3.
        ValueError: if `input_ids` hold no new token, or could be the whole text or new tokens. For beams, for outputs that
            would grow with the text, and for options that count more tokens than are kept.

    Example:

    ```python
    >>> from sink_cache import SinkWindowCache, endless
    >>> cache = SinkWindowCache(n_sink=4, window=1020, compileable=True)
    >>> model.generate(**inputs, past_key_values=cache, custom_generate=endless, streamer=TextStreamer(tokenizer))
    ```
    """
    cache = take_cache(model_kwargs)
    refuse_unsupported(cache, generation_config, input_ids, model_kwargs, keep_tokens)
    if method := virtual_tokens(model):
        raise NotImplementedError(
            f"endless feeds only the tokens of the text, and would leave out the virtual tokens of {method}. Use DynamicCache "
            "and generate() without custom_generate."
        )
    call = generate_call()
    if keeps_processes_in_step(model):
        raise NotImplementedError(
            "endless does not keep processes in step. If one process ended first, the others would wait for ever. With "
            "synced_gpus=False it works if all processes have prompts of one length and end after the same number of tokens."
        )
    streamer = model_kwargs.pop("streamer", None) or call.get("streamer")
    # generate() adds its own MaxLengthCriteria, even if nobody has asked for one.
    asked_for = call.get("stopping_criteria", stopping_criteria) or ()
    left = _steps_left(generation_config, input_ids, call.get("has_default_max_length", False), asked_for)
    _refuse_long_counts(generation_config, input_ids.shape[1], left, keep_tokens or cache.capacity)
    criteria = StoppingCriteriaList(c for c in stopping_criteria if not isinstance(c, MaxLengthCriteria))
    has_eos = any(map(stops_at_token, criteria))
    pad_token = pad_token_of(generation_config)

    recent: Any = _RecentTokens(input_ids, keep_tokens or cache.capacity)
    new_tokens = input_ids[:, first_new_token(stack_of(cache), input_ids) :]
    unfinished = torch.ones(len(input_ids), dtype=torch.long, device=input_ids.device)
    next_logits = _next_logits(model, cache, new_tokens, generation_config, model_kwargs, recent)
    with _noting_what_is_fed(cache, recent, new_tokens), closing(next_logits) as steps:
        for logits in steps:
            scores = logits_processor(recent.tokens, logits.to(copy=True, dtype=torch.float32, device=input_ids.device))
            if generation_config.do_sample:
                tokens = torch.multinomial(torch.softmax(scores, dim=-1), num_samples=1).squeeze(1)
            else:
                tokens = scores.argmax(dim=-1)
            if has_eos:
                tokens = tokens * unfinished + pad_token * (1 - unfinished)
            recent.append(tokens)
            if streamer is not None:
                streamer.put(tokens.cpu())
            if criteria:
                unfinished = unfinished & ~criteria(recent.tokens, None)
                if not unfinished.any():
                    break
            left -= 1
            if left == 0:
                break
    if streamer is not None:
        streamer.end()
    kept: torch.Tensor = recent.tokens.clone()
    return generate_output(kept, cache) if generation_config.return_dict_in_generate else kept


def refuse_unsupported(
    cache: Any, config: GenerationConfig, input_ids: torch.Tensor, model_kwargs: dict[str, Any], keep_tokens: Any
) -> None:
    """Refuses options and inputs of `generate()` that have no meaning for a text without end."""
    if not isinstance(cache, SinkWindowCache):
        raise TypeError(
            f"endless needs past_key_values=SinkWindowCache(...), but got {'none' if cache is None else type(cache).__name__} "
            "(generate() makes a DynamicCache where none is given)."
        )
    if keep_tokens is not None and (not isinstance(keep_tokens, int) or keep_tokens < 1):
        raise ValueError(f"keep_tokens must be an integer of at least 1, but is {keep_tokens!r}")
    if config.prefill_chunk_size is not None and config.prefill_chunk_size < 1:
        raise ValueError(f"prefill_chunk_size must be at least 1, but is {config.prefill_chunk_size}")
    if config.num_beams not in (None, 1):
        raise ValueError(f"endless does greedy decoding and sampling, but num_beams is {config.num_beams}")
    for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states"):
        if getattr(config, name, None):
            raise ValueError(f"endless keeps nothing that grows with the text, so {name} is not possible")
    if model_kwargs.get("inputs_embeds") is not None or not input_ids.shape[1]:
        raise ValueError("endless needs input_ids with at least one token, and no inputs_embeds")
    for name, value in model_kwargs.items():
        if not isinstance(value, torch.Tensor) or name in ("attention_mask", "position_ids"):
            continue
        if not name.endswith("token_type_ids") or value.any():
            raise ValueError(f"endless reads text only, and would not pass {name} to the model")


def _refuse_long_counts(config: GenerationConfig, prompt: int, steps_left: int, keep_tokens: int) -> None:
    """Refuses logits processors that would have to count more tokens of the text than are kept for them."""
    end = prompt + steps_left if steps_left >= 0 else math.inf
    needed = {
        "min_new_tokens or min_length": config.min_length or 0,  # generate() turns min_new_tokens into min_length
        "begin_suppress_tokens": prompt + 1 if config.begin_suppress_tokens else 0,
        "forced_bos_token_id": 2 if config.forced_bos_token_id is not None else 0,
        "forced_eos_token_id": end if config.forced_eos_token_id is not None else 0,
        "exponential_decay_length_penalty": end if config.exponential_decay_length_penalty is not None else 0,
    }
    for name, tokens in needed.items():
        if tokens > keep_tokens:
            raise ValueError(
                f"{name} counts the tokens of the text up to {tokens}, but endless keeps only the last {keep_tokens}. "
                + (f"Pass keep_tokens={tokens}." if tokens < math.inf else "Pass max_new_tokens, or leave it out.")
            )


def _steps_left(
    config: GenerationConfig, input_ids: torch.Tensor, has_default_max_length: bool, asked_for: Sequence[Any]
) -> int:
    """Returns how many tokens to generate; negative for no end."""
    lengths = [criterion.max_length for criterion in asked_for if isinstance(criterion, MaxLengthCriteria)]
    if config.max_new_tokens is not None:
        lengths.append(input_ids.shape[1] + config.max_new_tokens)
    elif not has_default_max_length and config.max_length is not None:
        lengths.append(config.max_length)
    # generate() makes at least one token, too.
    return max(1, min(lengths) - input_ids.shape[1]) if lengths else -1


class _RecentTokens:
    """The last tokens of a text without end, in memory that does not grow.

    Attributes:
        appended (`int`): how many tokens have been appended.
    """

    def __init__(self, input_ids: torch.Tensor, shown: int) -> None:
        self.shown, self.length, self.appended = shown, max(shown, KEPT + 1), 0
        kept = input_ids[:, -self.length :]
        self._buffer = kept.new_zeros(len(kept), 2 * self.length)
        self._buffer[:, : kept.shape[1]] = kept
        self._end = kept.shape[1]

    @property
    def tokens(self) -> torch.Tensor:
        """The last tokens, `[batch_size, <= shown]`."""
        return self.last(self.shown)

    def last(self, number: int) -> torch.Tensor:
        """The last tokens, `[batch_size, <= number]`."""
        return self._buffer[:, max(0, self._end - min(number, self.length)) : self._end]

    def append(self, tokens: torch.Tensor) -> None:
        if self._end == self._buffer.shape[1]:
            self._buffer[:, : self.length] = self.last(self.length).clone()
            self._end = self.length
        self._buffer[:, self._end] = tokens
        self._end += 1
        self.appended += 1


@contextmanager
def _noting_what_is_fed(cache: SinkWindowCache, recent: _RecentTokens, prompt: torch.Tensor) -> Iterator[None]:
    """Leaves the end of the text with the cache for the next turn, even if an exception stops the loop."""
    before, seen = text_fed_to(stack_of(cache)), cache.get_seq_length()
    try:
        yield
    finally:
        if fed := cache.get_seq_length() - seen:
            unfed = prompt.shape[1] + recent.appended - fed
            tokens = recent.last(fed + unfed)
            note_fed(
                stack_of(cache), before, tokens[:, : tokens.shape[1] - unfed], recent.tokens.clone() if unfed else None
            )


def _next_logits(
    model: PreTrainedModel,
    cache: SinkWindowCache,
    input_ids: torch.Tensor,
    config: GenerationConfig,
    model_kwargs: dict[str, Any],
    recent: _RecentTokens,
) -> Generator[torch.Tensor, None, None]:
    """Yields logits `[batch_size, vocab_size]` after the prompt, and then after each token that is appended to `recent`."""
    kwargs = {**cache_kwargs(cache, model), "use_cache": True, "return_dict": True}
    if "logits_to_keep" in model_kwargs:
        kwargs["logits_to_keep"] = model_kwargs["logits_to_keep"]
    mask = model_kwargs.get("attention_mask")
    if mask is not None and mask.all():
        mask = None
    size, position_ids = config.prefill_chunk_size, model_kwargs.get("position_ids")
    is_turn = cache.get_seq_length() > 0
    for logits in read(model, cache, input_ids, size, kwargs, mask=mask, position_ids=position_ids):
        last = logits
    yield last
    if is_turn:
        mask = None

    step = Step(model, cache, len(input_ids), input_ids.device, config, kwargs)
    if not step.is_compiled:
        for _ in range(cache.tokens_until_full()):
            yield step.with_masks(recent.tokens[:, -1:], mask)
    every = steps_between_rebases(cache)
    stack_of(cache).leave_out_masks_if_full()
    try:
        while True:
            step.rebase()
            for _ in range(every):
                yield step(recent.tokens[:, -1:])
    finally:
        stack_of(cache).state.recheck_positions = True  # another loop may count other positions
