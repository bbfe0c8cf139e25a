"""What the examples share: errors in one line, and Ctrl-C that ends a text where it is."""

import argparse
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Cache, PreTrainedModel, PreTrainedTokenizerBase

from benchmarks import smollm2
from sink_cache import SinkWindowCache


def device(text: str) -> str:
    """The type of an argument that names a device of this machine."""
    try:
        torch.empty(0, device=text)
    except (AssertionError, RuntimeError) as reason:  # a torch without CUDA asserts that it has it
        raise argparse.ArgumentTypeError(f"{text} cannot be used: {first_line(reason)}") from None
    return text


def prompt(text: str) -> str:
    """The type of an argument with which a text begins. Many tokenizers make no token of an empty one."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def file(text: str) -> Path:
    """The type of an argument that is a file which is there."""
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"there is no file {text}")
    return Path(text)


def read_text(path: Path) -> str:
    """The text of a file. A failure is one line."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as reason:
        why = "is not a text in UTF-8" if isinstance(reason, UnicodeDecodeError) else f"cannot be read: {reason}"
        raise SystemExit(f"error: {path} {why}") from None


def load(name: str | None, device: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model and its tokenizer, by its id or folder; SmolLM2-135M-Instruct by default. A failure is one line."""
    try:
        folder = name or smollm2.fetch()
        model = AutoModelForCausalLM.from_pretrained(folder)  # first: of a wrong folder it says what is missing
        return model.to(device), AutoTokenizer.from_pretrained(folder)
    except (OSError, RuntimeError, ValueError) as reason:
        raise SystemExit(f"error: cannot load {name or 'SmolLM2-135M-Instruct'}: {first_line(reason)}") from None


def cache_for(model: PreTrainedModel, **options: Any) -> SinkWindowCache:
    """A cache for this model. A refusal is one line."""
    try:
        cache = SinkWindowCache(**options)
        cache.prepare_for(model)
    except (NotImplementedError, ValueError) as reason:
        raise SystemExit(f"error: {first_line(reason)}") from None
    return cache


def cache_bytes(cache: Cache) -> int:
    """The bytes of the keys and values that a cache holds."""
    if isinstance(cache, SinkWindowCache):
        return cache.nbytes
    return sum(getattr(layer, name).nbytes for layer in cache.layers for name in ("keys", "values"))


def first_line(reason: BaseException) -> str:
    """The first line of an error's message; the name of its class if it has none."""
    return next((line for line in str(reason).splitlines() if line.strip()), type(reason).__name__)


class CtrlC:
    """A stopping criterion of `generate()`: the user has pressed Ctrl-C. A second Ctrl-C is a `KeyboardInterrupt`, as ever.

    An exception might come in the middle of a step, and leave the cache without some of its tokens.

    Attributes:
        pressed (`bool`): once, at least.
    """

    pressed = False

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Whether each row ends."""
        return torch.full(input_ids.shape[:1], self.pressed, device=input_ids.device)

    def _press(self, *_: Any) -> None:
        if self.pressed:
            raise KeyboardInterrupt
        self.pressed = True


@contextmanager
def noting_ctrl_c() -> Iterator[CtrlC]:
    """Within, Ctrl-C is noted by the criterion."""
    ctrl_c = CtrlC()
    before = signal.signal(signal.SIGINT, ctrl_c._press)
    try:
        yield ctrl_c
    finally:
        signal.signal(signal.SIGINT, before)


def run(main: Callable[[], None]) -> None:
    """Call a program's `main`. A Ctrl-C that it does not take is one line, and exit code 130."""
    try:
        main()
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
