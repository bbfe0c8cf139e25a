"""Time of one decoding step: a sink cache of 1,024 tokens after a long text, against dense caches.

    python -m benchmarks.step_time                                  # this machine, a 12-layer, 768-wide Llama
    python -m benchmarks.step_time --shapes pythia-70m pythia-410m --device cuda --dtype bfloat16

Random weights: the time of a step does not depend on their values. All arms of a shape run in one process, interleaved
(a few steps of each in turn, so that drift of the machine hits all alike), with the device synchronised around every
step; medians. `vs dense@1024` is the overhead of the sink cache at the same number of keys; `dense@4096 / sink` is
what it gains. On CUDA the cuDNN attention backend is off, because it builds a plan for every new length of the dense arms.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from tabulate import tabulate
from tqdm import tqdm
from transformers import AutoModelForCausalLM, DynamicCache, GPTNeoXConfig, LlamaConfig, PretrainedConfig

from sink_cache import SinkWindowCache

CAPACITY, CONTEXT, N_SINK = 1024, 4096, 4


def pythia(layers: int, hidden: int, heads: int) -> PretrainedConfig:
    """GPT-NeoX as in the Pythia suite."""
    return GPTNeoXConfig(
        num_hidden_layers=layers, hidden_size=hidden, num_attention_heads=heads, intermediate_size=4 * hidden,
        vocab_size=50304,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
    )  # fmt: skip


def llama(vocab_size: int) -> PretrainedConfig:
    """12 layers, 768 wide."""
    return LlamaConfig(
        num_hidden_layers=12, hidden_size=768, num_attention_heads=12, intermediate_size=2048,
        max_position_embeddings=8192, vocab_size=vocab_size,
    )  # fmt: skip


SHAPES: dict[str, Callable[[], PretrainedConfig]] = {
    "llama-12x768": lambda: llama(vocab_size=32000),
    # The same with a small vocabulary: less of the step is spent in reading the weights of the output layer.
    "llama-12x768-1k": lambda: llama(vocab_size=1000),
    "pythia-70m": lambda: pythia(6, 512, 8),
    "pythia-410m": lambda: pythia(24, 1024, 16),
    "pythia-1.4b": lambda: pythia(24, 2048, 16),
    "pythia-6.9b": lambda: pythia(32, 4096, 32),
}


def measure(shape: str, device: str, dtype: torch.dtype, rounds: int, steps: int) -> dict[str, list[float]]:
    """Raw step times in ms for each arm."""
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(SHAPES[shape](), dtype=dtype).eval()
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    prompt = torch.randint(1000, (1, CONTEXT), device=device)
    caches = {
        f"dense@{CAPACITY}": DynamicCache(config=model.config),
        f"dense@{CONTEXT}": DynamicCache(config=model.config),
        f"sink@{CONTEXT}": SinkWindowCache(N_SINK, CAPACITY - N_SINK),
    }
    for arm, cache in caches.items():
        model(prompt[:, : int(arm.split("@")[1])], past_key_values=cache, logits_to_keep=1)
    step_ms: dict[str, list[float]] = {arm: [] for arm in caches}
    for turn in range(rounds + 1):
        for arm, cache in caches.items():
            for _ in range(steps):
                synchronize()
                start = time.perf_counter()
                model(prompt[:, :1], past_key_values=cache)
                synchronize()
                if turn:  # the first turn warms up
                    step_ms[arm].append(1e3 * (time.perf_counter() - start))
    return step_ms


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["llama-12x768"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=6, help="steps of an arm before the next arm's turn")
    parser.add_argument("--output", type=Path, help="JSON file with all raw step times")
    args = parser.parse_args()
    if args.device == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)
    raw, rows = {}, []
    for shape in tqdm(args.shapes, desc="shapes", disable=len(args.shapes) == 1):
        raw[shape] = measure(shape, args.device, getattr(torch, args.dtype), args.rounds, args.steps)
        near, far, sink = (statistics.median(times) for times in raw[shape].values())
        rows.append([shape, near, far, sink, sink / near, far / sink])
    arms = [f"{arm} ms" for arm in next(iter(raw.values()))]
    headers = ["shape", *arms, f"vs dense@{CAPACITY}", f"dense@{CONTEXT} / sink"]
    print(tabulate(rows, headers, floatfmt=".3f"))
    if args.output:
        device = torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.machine()} CPU"
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        setting = {"device": device, "threads": torch.get_num_threads(), "dtype": args.dtype, "n_sink": N_SINK}
        args.output.write_text(json.dumps({**versions, **setting, "capacity": CAPACITY, "step_ms": raw}) + "\n")


if __name__ == "__main__":
    main()
