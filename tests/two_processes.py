"""One of two processes that share a model, for test_distributed.py:

    python -m torch.distributed.run --standalone --nproc-per-node 2 -m tests.two_processes MODEL OUTCOMES

shares out the model of the folder MODEL in each of `WAYS`, on the CPU, and writes to OUTCOMES/WAY-RANK.pt what it then says.
"""

import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from sink_cache import SinkWindowCache, StreamPool, cache_kwargs, endless, stream, verify

from .families import PLAIN, tokens

N_SINK, WINDOW = 3, 9


def tensor_parallel(folder: str) -> PreTrainedModel:
    """Each process has some of the heads of every layer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # from 5.24 on tp_plan is a field of DistributedConfig
        return AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto").eval()


def fully_sharded(folder: str) -> PreTrainedModel:
    """Each process has a part of every weight, and all of them while a layer runs."""
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


# With the shared model of the second, processes may read texts of their own.
WAYS: dict[str, Callable[[str], PreTrainedModel]] = {
    "tensor-parallel": tensor_parallel,
    "fully-sharded": fully_sharded,
}


def what_is_said(model: PreTrainedModel, text: int) -> dict[str, torch.Tensor]:
    """Tokens and logits of every way to use a cache, on text number `text`: 12 tokens fit, and 46 come."""
    prompt, said = tokens(6, seed=text), {}
    # All processes end after the same number of tokens; without saying so, endless refuses a fully sharded model.
    without_end = {"custom_generate": endless, "keep_tokens": 100, "synced_gpus": False}
    for compileable in (False, True):
        for name, loop in (("generate", {}), ("endless", without_end)):
            cache = SinkWindowCache(N_SINK, WINDOW, compileable=compileable)
            options = PLAIN | {"max_new_tokens": 40, **loop, **cache_kwargs(cache)}
            said[f"{name}, {compileable=}"] = model.generate(prompt, **options)
    said["logits of stream"] = torch.cat(
        list(stream(model, tokens(40, seed=text), SinkWindowCache(N_SINK, WINDOW), chunk_size=7)), dim=1
    )
    pool = StreamPool(model, n_sink=N_SINK, window=WINDOW, max_streams=2)
    pool.add(prompt, max_new_tokens=30)
    said["pool"] = torch.tensor([token for _, token in pool])
    return said


def main(folder: str, outcomes: str) -> None:
    torch.set_num_threads(1)
    for way, share_out in WAYS.items():
        model = share_out(folder)
        rank = torch.distributed.get_rank()
        cache = SinkWindowCache(N_SINK, WINDOW)
        model.generate(tokens(6), max_new_tokens=2, **PLAIN, **cache_kwargs(cache))
        outcome = {
            "weights": sum(weight.to_local().numel() for weight in model.parameters() if isinstance(weight, DTensor)),
            "heads": cache.layers[0].keys.shape[1],
            "said": what_is_said(model, text=rank if way == "fully-sharded" else 0),
            "error": verify(model),
        }
        torch.save(outcome, Path(outcomes) / f"{way}-{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
