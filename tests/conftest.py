import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from .families import tiny_model

torch.set_num_threads(1)  # the models are tiny, and pytest-xdist runs one process for each core


@pytest.fixture(scope="session")
def llama() -> PreTrainedModel:
    """Three layers, so that an error in one layer's keys reaches the hidden states of the next."""
    return tiny_model("llama")


@pytest.fixture(scope="session")
def tiny_llama() -> LlamaForCausalLM:
    """The smallest that still has several layers and grouped heads, for long streams."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=2**20, pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()
