"""Is the cache right on a model that is spread over two GPUs? `python -m tests.two_gpus`, on a machine with two of them.

Random models in float32 are loaded twice, once whole on the first GPU and once with their layers split over both by `device_map`.
A row of the table is one way of using the cache: the largest difference of a logit between the two, relative to the largest
logit, or whether the tokens are the same where a way gives tokens only. Exits with 1 if anything differs or fails.

Gemma 3's first layers are sliding, so that its first layer of full attention is on the second GPU. Rows marked * are
transformers' own caches, for comparison: they do not count. `--devices cpu cpu` tries the script out where there is no GPU.
"""

import argparse
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    Gemma3TextConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    StaticCache,
)

import sink_cache.endless_loop
from sink_cache import SinkWindowCache, cache_kwargs, endless, stream

TOLERANCE = 1e-4
N_SINK, WINDOW, LAYERS = 4, 60, 5
SIZES = {
    "vocab_size": 1000, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": LAYERS, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 32, "max_position_embeddings": 4096, "tie_word_embeddings": False,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "gemma3": Gemma3TextConfig(
        **SIZES,
        sliding_window=32,
        layer_types=["full_attention" if i in (3, 4) else "sliding_attention" for i in range(LAYERS)],
    ),
}
Results = list[
    torch.Tensor
]  # of one way on one model: logits, which are compared by size, or tokens, which have to be equal


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", nargs=2, default=["cuda:0", "cuda:1"], metavar=("FIRST", "SECOND"))
    parser.add_argument("--models", nargs="+", choices=CONFIGS, default=list(CONFIGS), metavar="MODEL", help="(all)")
    args = parser.parse_args()
    devices = args.devices
    if "cuda:1" in devices and torch.cuda.device_count() < 2:
        print(f"this needs two CUDA GPUs, and there are {torch.cuda.device_count()}", file=sys.stderr)
        return 2
    sink_cache.steps._REBASE_EVERY = 64  # so that a short text is rebased several times
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        for name in args.models:
            whole, spread = load(CONFIGS[name], Path(folder) / name, devices)
            print(f"{name}: layers on {[str(device) for device in devices_of_layers(spread)]}", flush=True)
            for way, run in WAYS.items():
                outcome, is_right = compare(run, whole, spread)
                counts = not way.startswith("*")
                failures += counts and not is_right
                print(f"  {way:55}{outcome:28}{'ok' if is_right else 'FAILED' if counts else 'no'}", flush=True)
            print(f"  {'saved on one, loaded on the other':55}", end="", flush=True)
            outcome, is_right = exchange(whole, spread, Path(folder) / "cache")
            failures += not is_right
            print(f"{outcome:28}{'ok' if is_right else 'FAILED'}", flush=True)
    print(f"{failures} failed" if failures else "all the same")
    return 1 if failures else 0


def load(config: PreTrainedConfig, folder: Path, devices: list[str]) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The same model whole on the first device, and spread over both."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    first, second = devices
    parts = {"model.embed_tokens": first, "model.rotary_emb": first, "model.norm": second, "lm_head": second}
    layers = {f"model.layers.{i}": first if i < LAYERS // 2 else second for i in range(LAYERS)}
    maps: list[dict[str, str]] = [{"": first}, {**parts, **layers}]
    whole, spread = (AutoModelForCausalLM.from_pretrained(folder, device_map=device_map).eval() for device_map in maps)
    return whole, spread


def devices_of_layers(model: PreTrainedModel) -> list[torch.device]:
    return [next(layer.parameters()).device for layer in model.model.layers]


def compare(
    run: Callable[[PreTrainedModel], Results], whole: PreTrainedModel, spread: PreTrainedModel
) -> tuple[str, bool]:
    """Says how far the two are apart, and whether that is right."""
    try:
        return difference(run(whole), run(spread))
    except Exception as failure:
        traceback.print_exc()
        return type(failure).__name__, False


def difference(expected: Results, results: Results) -> tuple[str, bool]:
    error, same = 0.0, len(expected) == len(results)
    for one, other in zip(expected, results, strict=False):
        one, other = one.cpu(), other.cpu()
        if one.shape != other.shape or not one.is_floating_point():
            same &= torch.equal(one, other)
        else:
            error = max(error, ((one - other).abs().max() / one.abs().max()).nan_to_num(nan=torch.inf).item())
    return f"{'same' if same else 'OTHER'} tokens, {error:.1e}", same and error <= TOLERANCE


def exchange(whole: PreTrainedModel, spread: PreTrainedModel, path: Path) -> tuple[str, bool]:
    """A cache of each kind goes from one GPU to two in a file, and from two to one, and on as if it had not."""
    for compileable in (False, True):
        expected = one_by_one(whole, text(150), SinkWindowCache(N_SINK, WINDOW, compileable=compileable))[100:]
        for giver, taker in ((whole, spread), (spread, whole)):
            given, taken = (SinkWindowCache(N_SINK, WINDOW, compileable=compileable) for _ in range(2))
            try:
                one_by_one(giver, text(150)[:, :100], given)
                given.save(path)
                taken.load(path, taker)
                held = [layer.keys.device for layer in taken.layers]
                if held != devices_of_layers(taker):
                    raise AssertionError(f"loaded onto {held}")
                now, is_right = difference(expected, one_by_one(taker, text(150)[:, 100:], taken))
            except Exception as failure:
                traceback.print_exc()
                now, is_right = type(failure).__name__, False
            if not is_right:
                return f"{now} ({compileable=})", False
    return now, True


def text(length: int, batch_size: int = 1) -> torch.Tensor:
    return torch.randint(1, 1000, (batch_size, length), generator=torch.Generator().manual_seed(length))


@torch.no_grad()
def one_by_one(model: PreTrainedModel, input_ids: torch.Tensor, cache: Any) -> Results:
    steps = input_ids.to(devices_of_layers(model)[0]).split(1, dim=1)
    return [model(step, **cache_kwargs(cache, model)).logits for step in steps]


def generated(
    cache: Callable[[PreTrainedModel], Any], rows: int = 1, **more: Any
) -> Callable[[PreTrainedModel], Results]:
    """Greedy text of 200 tokens, or what `more` says, with its logits where `generate()` gives them."""

    def run(model: PreTrainedModel) -> Results:
        inputs = {"input_ids": text(20, rows).to(devices_of_layers(model)[0])}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        if rows > 1:
            inputs["attention_mask"][1, :13] = 0
        with_logits = {} if "custom_generate" in more else {"return_dict_in_generate": True, "output_logits": True}
        torch.manual_seed(0)
        options = {"max_new_tokens": 200, "do_sample": False, "disable_compile": True, **with_logits, **more}
        out = model.generate(**inputs, **cache_kwargs(cache(model)), **options)
        return [out] if isinstance(out, torch.Tensor) else [out.sequences, *out.logits]

    return run


def chunks(model: PreTrainedModel) -> Results:
    input_ids = text(300).to(devices_of_layers(model)[0])
    return list(stream(model, input_ids, SinkWindowCache(N_SINK, WINDOW), chunk_size=32))


def ours(compileable: bool = False) -> Callable[[PreTrainedModel], SinkWindowCache]:
    return lambda _: SinkWindowCache(N_SINK, WINDOW, compileable=compileable)


ENDLESS = {"custom_generate": endless, "max_new_tokens": 400, "keep_tokens": 1000}
WAYS: dict[str, Callable[[PreTrainedModel], Results]] = {
    "* DynamicCache": generated(lambda model: DynamicCache(config=model.config)),
    "* StaticCache, compiled by generate()": generated(
        lambda model: StaticCache(config=model.config, max_cache_len=256), disable_compile=False
    ),
    "one by one": lambda model: one_by_one(model, text(200), SinkWindowCache(N_SINK, WINDOW)),
    "one by one, compileable": lambda model: one_by_one(
        model, text(200), SinkWindowCache(N_SINK, WINDOW, compileable=True)
    ),
    "generate()": generated(ours()),
    "generate(), rows padded by 0 and 13": generated(ours(), rows=2),
    "generate(), 3 beams": generated(ours(), num_beams=3, output_logits=False, return_dict_in_generate=False),
    "generate(), prompt lookup": generated(ours(), prompt_lookup_num_tokens=3, max_matching_ngram_size=1),
    "generate(), compileable, not compiled": generated(ours(compileable=True)),
    "generate(), compileable, compiled": generated(ours(compileable=True), disable_compile=False),
    "endless": generated(ours(), **ENDLESS),
    "endless, compileable, not compiled": generated(ours(compileable=True), **ENDLESS),
    "endless, compileable, compiled": generated(ours(compileable=True), disable_compile=False, **ENDLESS),
    "stream() in chunks of 32": chunks,
}

if __name__ == "__main__":
    sys.exit(main())
