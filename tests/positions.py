"""`python -m tests.positions`: how far logits move when the same tokens stand at a higher position.

Models compute the angle of a key as float32 `position * frequency`, so distances lose precision as positions rise, with any
cache. Writes results/positions.json. With `--perplexity TEXT_FILE` also the perplexity of SmolLM2-135M (`benchmarks.smollm2`) on
the first 1,024 tokens of a text, dense, at each position.

Tiny llama: three layers, float32. Errors are those of the worst of 32 tokens, relative to the largest logit of that token.
"""

import argparse
import json
import math
import platform
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from transformers import Cache, DynamicCache, PreTrainedModel

from sink_cache import SinkWindowCache, cache_kwargs, stream

from .families import FIRST_WORD, VOCAB, tiny_model
from .oracle import relative_error

RESULT = Path(__file__).parent.parent / "results" / "positions.json"
POSITIONS = [1_000, 10_000, 100_000, 1_000_000, 4_000_000, 8_000_000, 16_000_000]
N_SINK, WINDOW, JUDGED = 4, 28, 32
REBASE_EVERY = 1024  # as `endless` does


def text(length: int) -> torch.Tensor:
    """Random tokens `[1, length]`."""
    return torch.randint(FIRST_WORD, VOCAB, (1, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits_at(model: PreTrainedModel, cache: Cache, input_ids: torch.Tensor, position: int) -> torch.Tensor:
    """Logits `[1, tokens, vocab]` of tokens that are fed one at a time, from this position on."""
    logits = []
    for t in range(input_ids.shape[1]):
        positions = torch.tensor([[position + t]])
        logits.append(model(input_ids[:, t : t + 1], position_ids=positions, **cache_kwargs(cache, model)).logits)
    return torch.cat(logits, dim=1)


def dense_error(model: PreTrainedModel, position: int) -> float:
    """Of a `DynamicCache`: 32 tokens from this position on, against the same from 0 on."""
    here, there = (logits_at(model, DynamicCache(config=model.config), text(JUDGED), p) for p in (0, position))
    return relative_error(there, here)


def plain_error(model: PreTrainedModel, position: int) -> float:
    """Of a `SinkWindowCache` that counts positions, as in plain `generate()`: sinks from 0 on, the rest from this position on.

    Nobody could wait for all tokens between. The cache is told that it has seen them, and turns over once. Compared with the
    same at the lowest position at which the cache is full.
    """

    def after_jump(position: int) -> torch.Tensor:
        cache = SinkWindowCache(N_SINK, WINDOW)
        logits_at(model, cache, text(N_SINK), 0)
        cache.layers[0].state.fed = position  # of all layers
        return logits_at(model, cache, text(WINDOW + JUDGED), position)[:, WINDOW:]

    # Any token has its slot, so both positions have to be as far apart as the window turns.
    capacity = N_SINK + WINDOW
    return relative_error(after_jump(position - (position - capacity) % WINDOW), after_jump(capacity))


def rebased_error(model: PreTrainedModel, length: int) -> float:
    """Of a `SinkWindowCache` that is rebased: the last of so many tokens, against the same in float64."""

    def last(model: PreTrainedModel) -> torch.Tensor:
        cache = SinkWindowCache(N_SINK, WINDOW)
        for piece in text(length).split(REBASE_EVERY, dim=1):
            logits = torch.cat([*stream(model, piece, cache, chunk_size=128)], dim=1)[:, -JUDGED:]
            cache.rebase()
        return logits

    exact = tiny_model("llama").double()
    return relative_error(last(model).double(), last(exact))


@torch.no_grad()
def perplexities(text_file: Path) -> dict[int, float]:
    """Perplexity of SmolLM2-135M on 1,023 tokens, by the position of the first token."""
    from benchmarks import smollm2

    model, tokenizer = smollm2.load()
    input_ids = tokenizer(text_file.read_text()[:20_000], return_tensors="pt").input_ids[:, :1024]
    found = {}
    for position in [0, *POSITIONS]:
        positions = torch.arange(position, position + input_ids.shape[1])[None]
        logits = model(input_ids[:, :-1], position_ids=positions[:, :-1], use_cache=False).logits
        found[position] = math.exp(F.cross_entropy(logits[0], input_ids[0, 1:]).item())
    return found


def main() -> None:
    """Measure, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--perplexity", metavar="TEXT_FILE", type=Path, help="measure SmolLM2's perplexity, too")
    args = parser.parse_args()
    torch.set_num_threads(1)  # two that share a busy core wait for each other
    model = tiny_model("llama")
    rows: list[dict[str, Any]] = []
    for position in POSITIONS:
        row = {"position": position, "dynamic": dense_error(model, position), "plain": plain_error(model, position)}
        if position <= 100_000:  # all of these tokens are read
            row["rebased"] = rebased_error(model, position)
        rows.append(row)
        print(row, flush=True)
    result: dict[str, Any] = {
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "setting": {
            "model": "tiny llama, 3 layers, float32",
            "head_dim": model.config.head_dim,
            "rope_theta": model.config.rope_parameters["rope_theta"],
            "n_sink": N_SINK,
            "window": WINDOW,
            "rebase_every": REBASE_EVERY,
        },
        "relative_error_of_logits": rows,
    }
    if args.perplexity:
        result["perplexity"] = {
            "model": "SmolLM2-135M-Instruct, float32, dense",
            "text": f"the first 1,024 tokens of {args.perplexity.name}",
            "by_position": perplexities(args.perplexity),
        }
        print(result["perplexity"])
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
