"""`verify` judges a model against its own noise: what rounds more than its dtype says passes if it is exact, and only then."""

import copy
import warnings
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from sink_cache import verify

from .families import tiny_model


def quantised(model: PreTrainedModel) -> Any:
    """Weights and activations in 8 bits: every call rounds its activations by their own largest value."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's quantisation moves to torchao
        return torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {torch.nn.Linear}, dtype=torch.qint8)


def turned_too_slowly(model: Any, factor: float) -> Any:
    """Its cos and sin are those of other frequencies than its buffers say; no twin knows."""
    rotary = model.model.rotary_emb
    forward = rotary.forward
    rotary.forward = lambda hidden_states, position_ids, **kwargs: forward(
        hidden_states, position_ids * factor, **kwargs
    )
    return model


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma3_text", "olmo2", "gpt_neox"])
def test_a_dynamically_quantised_model_is_exact(model_type: str) -> None:
    verify(quantised(tiny_model(model_type)))


class Coarse(torch.nn.Linear):
    """Its activations lie on a grid of 4,096 steps for each token: what falls beside a boundary jumps by a whole step."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        step = states.abs().amax(dim=-1, keepdim=True) / 4096
        return super().forward((states / step).round() * step)


def coarse(model: PreTrainedModel) -> Any:
    for module in model.modules():
        if type(module) is torch.nn.Linear:
            module.__class__ = Coarse
    return model


def test_an_error_like_the_models_own_noise_passes() -> None:
    model = coarse(tiny_model("llama"))
    assert verify(model) > 1e-4  # which is what float32 alone allows
    with pytest.raises(NotImplementedError, match=r"allowed 0\.0001\."):
        verify(model, tolerance=1e-4)


@pytest.mark.parametrize("rounded", [quantised, coarse])
def test_noise_does_not_hide_a_wrong_rotation(rounded: Any) -> None:
    model = turned_too_slowly(rounded(tiny_model("llama")), 0.97)
    with pytest.raises(NotImplementedError, match="is not exact on this LlamaForCausalLM"):
        verify(model)
