"""Reading the options of a pool's stream as `generate()` reads them."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, MaxLengthCriteria, PreTrainedModel, StoppingCriteriaList

from .cache import SinkWindowCache
from .endless_loop import refuse_unsupported
from .internals import cache_kwargs, eos_tokens_of, stops_at_token, warper_options
from .sampling import SamplingOptions


@dataclass(frozen=True)
class TurnOptions:
    """The options of one turn of a stream.

    Attributes:
        sampling (`SamplingOptions`): how tokens are chosen.
        eos_tokens (`frozenset[int]`): the tokens at which the turn ends.
        new_tokens (`int`): after how many new tokens the turn ends; negative for no end.
    """

    sampling: SamplingOptions
    eos_tokens: frozenset[int]
    new_tokens: int


def turn_options(
    model: PreTrainedModel, length: int, options: dict[str, Any], cache: SinkWindowCache, piece_size: int
) -> TurnOptions:
    """Lets `generate()` read these options, with a decoding loop that notes them and decodes nothing.

    Args:
        length (`int`): how many tokens the turn has before it generates; `max_length` counts them.
        options (`dict[str, Any]`): as for `generate()`.
        cache (`SinkWindowCache`): unused, with the sizes of the stream's cache.
        piece_size (`int`): the pool's `prefill_chunk_size`.

    Raises:
        TypeError, ValueError: what `generate()` and `endless` refuse.
        NotImplementedError: for what a stream in a pool does not have.
    """
    if taken := sorted(options.keys() & _THE_POOLS_OWN):
        raise NotImplementedError(
            f"{taken[0]} is not an option of a stream in a StreamPool: {_THE_POOLS_OWN[taken[0]]}"
        )
    config = options.get("generation_config")
    given = (*(options.get(name) for name in _LENGTHS), *_lengths_of(config), *_lengths_of(model.generation_config))
    has_end = any(number is not None for number in given)
    if not has_end and config is None:
        options = {**options, "max_new_tokens": 1}  # generate() would choose a length
    elif not has_end:
        options = {**options, "generation_config": copy.deepcopy(config)}
        options["generation_config"].max_new_tokens = 1
    found: list[TurnOptions] = []

    def look(
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> torch.Tensor:
        refuse_unsupported(cache, generation_config, input_ids, model_kwargs, None)
        if len(input_ids) > 1:
            raise ValueError("a stream is one text: instead of num_return_sequences, add several streams")
        if generation_config.return_dict_in_generate:
            raise NotImplementedError("return_dict_in_generate is not possible in a StreamPool, which hands out tokens")
        if generation_config.prefill_chunk_size not in (None, piece_size):
            raise NotImplementedError("prefill_chunk_size is an option of the StreamPool, and not of a stream in it")
        for criterion in stopping_criteria:
            if not isinstance(criterion, MaxLengthCriteria) and not stops_at_token(criterion):
                raise NotImplementedError(
                    f"a StreamPool has no {type(criterion).__name__}. Iterate over the pool, and call Stream.stop()."
                )
        warpers = warper_options(logits_processor)
        if isinstance(warpers, str):
            raise NotImplementedError(
                f"a StreamPool has temperature, top_k, top_p, min_p and repetition_penalty, and no {warpers}. Leave this option "
                "out, or use generate() with custom_generate=endless."
            )
        new_tokens = -1
        if has_end and generation_config.max_new_tokens is not None:
            new_tokens = generation_config.max_new_tokens
        elif has_end and generation_config.max_length is not None:
            new_tokens = generation_config.max_length - length
            if new_tokens < 1:
                raise ValueError(
                    f"max_length={generation_config.max_length} leaves no token to generate after {length}"
                )
        sampling = SamplingOptions(bool(generation_config.do_sample), **warpers)
        found.append(TurnOptions(sampling, eos_tokens_of(stopping_criteria), new_tokens))
        return input_ids

    # One token stands for the text. It has a mask, because generate() would warn that the token may be padding.
    token = torch.ones(1, 1, dtype=torch.long, device=model.device)
    if config is None:
        options = {"pad_token_id": 0, **options}
    model.generate(token, attention_mask=token, custom_generate=look, **cache_kwargs(cache), **options)  # type: ignore[operator]
    return found[0]


def _lengths_of(config: GenerationConfig | None) -> list[int | None]:
    return [getattr(config, name, None) for name in _LENGTHS]


_LENGTHS = ("max_new_tokens", "max_length")
_THE_POOLS_OWN = {
    "streamer": "iterate over the pool, which hands out each token with its stream.",
    "custom_generate": "the pool decodes by itself.",
    "cache": "the pool has one cache for all streams.",
    "past_key_values": "the pool has one cache for all streams.",
    "attention_mask": "a stream is one text without padding.",
    "position_ids": "the pool numbers tokens.",
    "inputs": "input_ids are given by position.",
    "keep_tokens": "give it to the StreamPool.",
    "logits_to_keep": "the pool reads only the last token's logits.",
    "stopping_criteria": "iterate over the pool, and call Stream.stop().",
    "stop_strings": "iterate over the pool, and call Stream.stop().",
}
