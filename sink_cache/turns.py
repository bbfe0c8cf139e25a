"""What `generate()` makes of a stream's options, for streams that run in a batch of others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, MaxLengthCriteria, PreTrainedModel, StoppingCriteriaList

from .cache import SinkWindowCache
from .endless_loop import refuse_what_endless_has_not, steps_left
from .internals import cache_kwargs, eos_tokens_of, generate_call, stops_at_token, warper_options
from .sampling import SamplingOptions


@dataclass(frozen=True)
class TurnOptions:
    """The options of one turn of a stream.

    Attributes:
        sampling (`SamplingOptions`): how tokens are chosen.
        eos_tokens (`frozenset[int]`): at which the turn ends.
        new_tokens (`int`): after how many the turn ends; negative for never.
    """

    sampling: SamplingOptions
    eos_tokens: frozenset[int]
    new_tokens: int


def turn_options(
    model: PreTrainedModel, text: list[int], options: dict[str, Any], cache: SinkWindowCache, piece_size: int
) -> TurnOptions:
    """Asks `generate()` what it makes of these options, by giving it a decoding loop that looks and decodes nothing.

    Args:
        text (`list[int]`): the tokens of the turn.
        cache (`SinkWindowCache`): of the stream's sizes, and unused.
        piece_size (`int`): the pool's `prefill_chunk_size`.

    Raises:
        TypeError, ValueError: what `generate()` and `endless` refuse.
        NotImplementedError: for what a stream in a pool does not have.
    """
    if taken := sorted(options.keys() & _THE_POOLS_OWN):
        raise NotImplementedError(
            f"{taken[0]} is not an option of a stream in a StreamPool: {_THE_POOLS_OWN[taken[0]]}"
        )
    input_ids = torch.tensor([text], device=model.device)
    found: list[TurnOptions] = []

    def look(
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> torch.Tensor:
        refuse_what_endless_has_not(cache, generation_config, input_ids, model_kwargs, None)
        if len(input_ids) > 1:
            raise ValueError("a stream is one text: add one for each of num_return_sequences, with a seed each")
        if generation_config.return_dict_in_generate:
            raise NotImplementedError("return_dict_in_generate is not possible in a StreamPool, which hands out tokens")
        if generation_config.prefill_chunk_size not in (None, piece_size):
            raise NotImplementedError("prefill_chunk_size is an option of the StreamPool, and not of a stream in it")
        call = generate_call()
        asked_for = call.get("stopping_criteria") or ()
        for criterion in stopping_criteria:
            if not isinstance(criterion, MaxLengthCriteria) and not stops_at_token(criterion):
                raise NotImplementedError(
                    f"a StreamPool has no {type(criterion).__name__}. Iterate over the pool, and call Stream.stop()."
                )
        warpers = warper_options(logits_processor)
        if isinstance(warpers, str):
            raise NotImplementedError(
                f"a StreamPool has temperature, top_k, top_p, min_p and repetition_penalty, and no {warpers}. Leave this option out, "
                "or use generate() with custom_generate=endless."
            )
        left = steps_left(generation_config, input_ids, call.get("has_default_max_length", False), asked_for)
        sampling = SamplingOptions(do_sample=bool(generation_config.do_sample), **warpers)
        found.append(TurnOptions(sampling, eos_tokens_of(stopping_criteria), left))
        return input_ids

    # A mask, because generate() would look for pads in the text otherwise.
    mask = torch.ones_like(input_ids)
    options = {"pad_token_id": 0, **options} if "generation_config" not in options else options
    model.generate(input_ids, attention_mask=mask, custom_generate=look, **cache_kwargs(cache), **options)  # type: ignore[operator]
    return found[0]


_THE_POOLS_OWN = {
    "streamer": "iterate over the pool, which hands out each token with its stream.",
    "custom_generate": "the pool decodes by itself.",
    "cache": "the pool has a cache for all of them.",
    "past_key_values": "the pool has a cache for all of them.",
    "attention_mask": "a stream is one text without padding.",
    "position_ids": "the pool numbers tokens.",
    "inputs": "input_ids are given by position.",
    "keep_tokens": "give it to the StreamPool.",
    "logits_to_keep": "the pool looks at the last ones.",
    "stopping_criteria": "iterate over the pool, and call Stream.stop().",
    "stop_strings": "iterate over the pool, and call Stream.stop().",
}
