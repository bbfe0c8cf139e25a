import signal
from collections.abc import Iterator

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from .families import VOCAB, tiny_model
from .own_calls import warned_of_us

TEMPLATE = (
    "{% for message in messages %}<start> {{ message['role'] }} {{ message['content'] }} <end> <line> {% endfor %}"
    "{% if add_generation_prompt %}<start> assistant {% endif %}"
)
WORDS = ["<pad>", "<start>", "<end>", "<line>", "system", "user", "assistant", "?", "ANSWER"]

# A shell's background job ignores Ctrl-C, and so would the tests of it.
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)  # the models are tiny, and pytest-xdist runs one process for each core


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    with warned_of_us() as lines:
        yield
    if lines:
        pytest.fail(
            f"{', '.join(sorted(set(lines)))} uses the name past_key_values, and the installed transformers warns of it: no "
            "warning may come from our own calls. Pass a cache by **cache_kwargs(cache, model).",
            pytrace=False,
        )


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


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A token for each word of `WORDS` and of w9, w10 …, and a chat template."""
    words = {word: i for i, word in enumerate([*WORDS, *(f"w{i}" for i in range(len(WORDS), VOCAB))])}
    backend = Tokenizer(WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<end>", unk_token="<pad>"
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer
