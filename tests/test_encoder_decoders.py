"""Encoder-decoders are refused as what they are, wherever the cache first meets one."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel

from sink_cache import SinkWindowCache, verify

from .families import FIRST_WORD, VOCAB, random_model, tiny_config

# Biases for distances; learned positions; rotary ones and waves; learned ones and mel spectra; a check of its own in generate().
CLASSES = {
    "T5ForConditionalGeneration": {"input_ids": (1, 6)},
    "BartForConditionalGeneration": {"input_ids": (1, 6)},
    "MoonshineForConditionalGeneration": {"input_values": (1, 4000)},
    "WhisperForConditionalGeneration": {"input_features": (1, 80, 3000)},
    "T5GemmaForConditionalGeneration": {"input_ids": (1, 6)},
}
SAYS = r"^SinkWindowCache does not support model type '\w+' \(\w+\): it is an encoder-decoder, .+\. Use DynamicCache"
USES: dict[str, Callable[[PreTrainedModel, dict[str, torch.Tensor]], Any]] = {
    "generate": lambda model, inputs: model.generate(
        **inputs, past_key_values=SinkWindowCache(2, 5), max_new_tokens=12, decoder_start_token_id=1, eos_token_id=None
    ),
    "forward": lambda model, inputs: model(
        **inputs, decoder_input_ids=torch.tensor([[1, 9]]), past_key_values=SinkWindowCache(2, 5)
    ),
    "forward with a cache for each part": lambda model, inputs: model(
        **inputs,
        decoder_input_ids=torch.tensor([[1, 9]]),
        past_key_values=EncoderDecoderCache(SinkWindowCache(2, 5), DynamicCache()),
    ),
    "prepare_for": lambda model, inputs: SinkWindowCache(2, 5).prepare_for(model),
    "config": lambda model, inputs: SinkWindowCache(2, 5, config=model.config),
    "verify": lambda model, inputs: verify(model),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("name", CLASSES)
@torch.no_grad()
def test_an_encoder_decoder_is_refused_as_one(name: str, use: str) -> None:
    model_class = getattr(transformers, name)
    model = random_model(lambda: model_class(tiny_config(model_class.config_class, 2, {})), seed=0)
    generator = torch.Generator().manual_seed(0)
    inputs = {
        key: torch.randint(FIRST_WORD, VOCAB, shape, generator=generator)
        if key == "input_ids"
        else torch.randn(shape, generator=generator)
        for key, shape in CLASSES[name].items()
    }
    with pytest.raises(NotImplementedError, match=SAYS):
        USES[use](model, inputs)


def test_a_decoder_of_the_same_family_is_no_encoder_decoder() -> None:
    # BartForCausalLM is refused for its learned positions. ProphetNet, Marian and others alike.
    model_class = transformers.BartForCausalLM
    model = random_model(lambda: model_class(tiny_config(model_class.config_class, 2, {})), seed=0)
    with torch.no_grad(), pytest.raises(NotImplementedError, match="positions are learned"):
        model(torch.tensor([[9, 10]]), past_key_values=SinkWindowCache(2, 5))


def test_generate_still_knows_a_cache_that_it_was_given(llama: PreTrainedModel) -> None:
    ids = torch.randint(FIRST_WORD, VOCAB, (1, 4), generator=torch.Generator().manual_seed(0))
    cache = SinkWindowCache(2, 5)
    with torch.no_grad():
        llama.generate(ids, past_key_values=cache, max_new_tokens=3, do_sample=False)
    assert cache._is_user_defined
