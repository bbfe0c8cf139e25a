"""Texts for the harnesses: WikiText, a file, or the English text that every Python carries; and cutting them up."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from .harness import BenchmarkError, hub_error


@dataclass(frozen=True)
class Text:
    """A text and what it is called."""

    name: str
    text: str

    @property
    def description(self) -> dict[str, Any]:
        """What a result file says about the text."""
        sha256 = hashlib.sha256(self.text.encode()).hexdigest()
        return {"name": self.name, "characters": len(self.text), "sha256": sha256}


def wikitext(dataset: str = "Salesforce/wikitext", config: str = "wikitext-103-raw-v1", split: str = "test") -> Text:
    """Load a split of WikiText (or of another dataset with a `text` column) as one running text.

    Raises:
        BenchmarkError: there is no such dataset or split, or the hub cannot be reached.
    """
    # Imported here because it takes seconds, and only this function needs it.
    import datasets

    try:
        lines = datasets.load_dataset(dataset, config, split=split)["text"]
    except (OSError, ValueError, KeyError) as error:
        raise hub_error(f"the {split} split of {dataset} ({config})", error) from error
    # The dataset has the lines of the original file, except that those with a single space have become empty: undo
    # that, so that the text is the file, byte for byte. The first line is such a one.
    return Text(f"{config} {split}", "".join(line or " \n" for line in lines))


def text_file(path: str) -> Text:
    """Read a text in UTF-8.

    Raises:
        BenchmarkError: it cannot be read.
    """
    try:
        return Text(Path(path).name, Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise BenchmarkError(f"cannot read the text file {path}: {reason}") from error


def embedded() -> Text:
    """Return the help topics of this Python: half a megabyte of technical English, in every installation."""
    return Text("Python's help topics", "\n".join(topics.values()))


def tokenize(text: Text, tokenizer: PreTrainedTokenizerBase | None) -> torch.Tensor:
    """Return the token ids `[tokens]` of a text, without special tokens; without a tokenizer, its bytes.

    Raises:
        BenchmarkError: there is nothing to predict in it.
    """
    if tokenizer is None:
        ids = list(text.text.encode())
    else:
        # Not verbose: it would warn that the text is longer than the model's context, which is the point.
        ids = tokenizer(text.text, add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) < 2:
        raise BenchmarkError(f"{text.name} has {len(ids)} tokens: at least 2 are needed, to predict one from the other")
    return torch.tensor(ids)


def cut(ids: torch.Tensor, max_tokens: int, num_samples: int | None = None) -> list[torch.Tensor]:
    """Cut a text into samples that are read from an empty cache each.

    Neighbours share one token, the last of one being the first of the next: it is predicted in the former and only read
    in the latter. So every token but the very first of the text is predicted exactly once.

    Args:
        ids (`torch.Tensor`): `[tokens]`.
        max_tokens (`int`): tokens to predict in each sample.
        num_samples (`int`, *optional*): how many samples, all of full length; by default the whole text, the last one
            being shorter.

    Returns:
        `list[torch.Tensor]`: `[max_tokens + 1]` each, the last one possibly shorter.

    Raises:
        BenchmarkError: the text is too short for so many samples.
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
