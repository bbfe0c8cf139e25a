"""Models of quantised weights: what the cache sees are keys and values, and the oracle asks the same model.

torchao and bitsandbytes are not in requirements.txt: transformers imports them where they are, which takes a second and writes
lines to stderr. `make test-quantised` installs them in a folder of their own. GGUF needs no more than the benchmarks do.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from benchmarks import harness, models
from sink_cache import SinkWindowCache, StreamPool, cache_kwargs, endless, stream, verify

from .families import PLAIN, random_model, tokens
from .oracle import relative_error, streamed_logits
from .test_exact import TOLERANCE, one_by_one

N_SINK, WINDOW = 3, 9


def plain_llama() -> PreTrainedModel:
    """Llama of heads that rotate, in sizes that all kinds of blocks divide."""
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=128, max_position_embeddings=512)
    return random_model(lambda: LlamaForCausalLM(config), seed=0)


def torchao(to: str) -> Callable[[Path], PreTrainedModel]:
    def quantised(_: Path) -> PreTrainedModel:
        pytest.importorskip("torchao", reason="torchao is not installed: make test-quantised")
        return models.quantize(models.LoadedModel(plain_llama(), None, "tiny"), to).model

    return quantised


def bitsandbytes(**options: Any) -> Callable[[Path], PreTrainedModel]:
    def quantised(folder: Path) -> PreTrainedModel:
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: make test-quantised")
        plain_llama().save_pretrained(folder)
        config = BitsAndBytesConfig(**options)
        return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu").eval()

    return quantised


def from_gguf(folder: Path) -> PreTrainedModel:
    """From a file of 8-bit blocks, which transformers unpacks."""
    model, config = plain_llama(), plain_llama().config
    writer = gguf.GGUFWriter(folder / "tiny.gguf", "llama")
    writer.add_context_length(512)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        kind = gguf.GGMLQuantizationType.Q8_0 if weight.ndim == 2 else gguf.GGMLQuantizationType.F32
        packed = gguf.quantize(weight.numpy().astype(np.float32), kind)
        writer.add_tensor(names.get_name(name, (".weight",)), packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file="tiny.gguf").eval()


KINDS: dict[str, Callable[[Path], PreTrainedModel]] = {
    "torchao int8": torchao("int8"),
    "torchao int4": torchao("int4"),
    "bitsandbytes int8": bitsandbytes(load_in_8bit=True),
    "bitsandbytes nf4": bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "GGUF": from_gguf,
}


@torch.no_grad()
def own_error(model: PreTrainedModel) -> float:
    """How far a model is from itself with transformers' cache: bitsandbytes rounds activations of several tokens together."""
    input_ids, cache = tokens(N_SINK + WINDOW), DynamicCache(config=model.config)
    return relative_error(one_by_one(model, input_ids, cache), model(input_ids).logits)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_quantised_weights(kind: str, tmp_path: Path) -> None:
    model = KINDS[kind](tmp_path)
    model.generation_config.eos_token_id = None
    assert relative_error(model(tokens(6)).logits, plain_llama()(tokens(6)).logits) > 1e-3  # it is quantised
    own = own_error(model)
    assert kind == "bitsandbytes int8" or own <= TOLERANCE
    tolerance, prompt, options = max(own, TOLERANCE), tokens(6), PLAIN | {"max_new_tokens": 30}
    texts = []
    for compileable in (False, True):
        for loop in ({}, {"custom_generate": endless, "keep_tokens": 99}):
            cache = SinkWindowCache(N_SINK, WINDOW, compileable=compileable)
            texts.append(model.generate(prompt, **cache_kwargs(cache), **loop, **options))
    pool = StreamPool(model, n_sink=N_SINK, window=WINDOW, max_streams=2)
    pool.add(prompt, max_new_tokens=30)
    texts.append(torch.cat([prompt, torch.tensor([[token for _, token in pool]])], dim=1))
    text = texts[0]
    assert all(torch.equal(text, other) for other in texts)
    expected = streamed_logits(model, text, N_SINK, WINDOW)
    of_tokens = expected[:, :-1].gather(2, text[:, 1:, None])[..., 0]
    short = (expected[:, :-1].amax(-1) - of_tokens) / expected[:, :-1].abs().amax(-1)
    assert short[:, 5:].max() <= tolerance  # each token is the likeliest
    logits = torch.cat(list(stream(model, text, SinkWindowCache(N_SINK, WINDOW), chunk_size=7)), dim=1)
    assert relative_error(logits, expected) <= tolerance
    assert verify(model) < 1e-4


def test_bytes_of_quantised_weights() -> None:
    # A quantised weight says the dtype of what it stands for: its own bytes are those of its parts.
    pytest.importorskip("torchao", reason="torchao is not installed: make test-quantised")
    plain = models.LoadedModel(plain_llama(), None, "tiny (random weights)")
    before, linear = (
        plain.description["weight_bytes"],
        sum(module.weight.numel() for module in plain.model.modules() if isinstance(module, torch.nn.Linear)),
    )
    int8 = models.quantize(plain, "int8")
    assert int8.name == "tiny int8 (random weights)"
    saved = before - int8.description["weight_bytes"]
    assert 2.9 * linear < saved < 3 * linear  # of four bytes three; scales take some


def test_without_torchao_quantize_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(harness.BenchmarkError, match=r"--quantize needs torchao.*pip install torchao"):
        models.quantize(models.LoadedModel(plain_llama(), None, "tiny"), "int8")
