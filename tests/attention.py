"""`python -m tests.attention`: which attention implementations go with which ways of using a cache.

Writes results/attention-DEVICE.json and, from all files of this name, the tables in docs/attention.md. A cell is *exact*: logits,
or the tokens of a pool, are those of the oracle on a float32 model. Or it is *refused*, in words of the library; or it *fails*
with another error. What is not installed is left out. `--device cuda` also tries flash attention, in bfloat16. There, exact means
an error of at most twice what the oracle has in bfloat16.
"""

import argparse
import json
import re
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from sink_cache import SinkWindowCache, StreamPool, cache_kwargs, endless, stream

from .families import tiny_model, tokens
from .oracle import relative_error, streamed_logits

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "attention.md"
LIBRARY = ROOT / "sink_cache"
BEGIN, END = "<!-- attention: written by python -m tests.attention -->", "<!-- end of attention -->"
IMPLEMENTATIONS = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4")
N_SINK, WINDOW = 3, 9
PROMPT, TOKENS, PADS = 6, 32, 3  # 20 evictions: twice around the ring
TOLERANCE = 1e-5


class Dictated(LogitsProcessor):
    """Notes the logits of each step, and lets `generate()` go on with the tokens of a given text `[rows, tokens]`."""

    def __init__(self, text: torch.Tensor) -> None:
        self.text, self.logits = text, []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self.logits.append(scores.float().cpu())
        following = self.text[:, PROMPT + len(self.logits) - 1, None].to(scores.device)
        return torch.full_like(scores, -torch.inf).scatter(1, following, 0)


def generated(
    model: PreTrainedModel, text: torch.Tensor, compileable: bool, mask: Any = None, **loop: Any
) -> torch.Tensor:
    """Logits `[rows, TOKENS - PROMPT, vocab]` of the tokens after the prompt."""
    dictated, cache = Dictated(text), SinkWindowCache(N_SINK, WINDOW, compileable=compileable)
    model.generate(
        text[:, :PROMPT].to(model.device),
        attention_mask=None if mask is None else mask.to(model.device),
        logits_processor=LogitsProcessorList([dictated]),
        max_new_tokens=TOKENS - PROMPT,
        eos_token_id=None,
        pad_token_id=0,
        do_sample=False,
        **cache_kwargs(cache),
        **loop,
    )
    return torch.stack(dictated.logits, dim=1)


def padded(model: PreTrainedModel, compileable: bool) -> torch.Tensor:
    mask = torch.ones(2, PROMPT, dtype=torch.long)
    mask[1, :PADS] = 0
    return generated(model, tokens(TOKENS, 2), compileable, mask)[1:]


def streamed(model: PreTrainedModel, compileable: bool) -> torch.Tensor:
    cache = SinkWindowCache(N_SINK, WINDOW, compileable=compileable)
    chunks = [logits.float().cpu() for logits in stream(model, tokens(TOKENS).to(model.device), cache, chunk_size=7)]
    return torch.cat(chunks, dim=1)[:, PROMPT - 1 : -1]


def pooled(model: PreTrainedModel, compileable: bool) -> torch.Tensor:
    """A text `[1, TOKENS]`; a pool's own cache is compileable."""
    pool = StreamPool(model, n_sink=N_SINK, window=WINDOW, max_streams=2)
    pool.add(tokens(PROMPT).to(model.device), max_new_tokens=TOKENS - PROMPT)
    return torch.cat([tokens(PROMPT), torch.tensor([[token for _, token in pool]])], dim=1)


WAYS: dict[str, Callable[[PreTrainedModel, bool], torch.Tensor]] = {
    "generate()": lambda model, compileable: generated(model, tokens(TOKENS), compileable),
    "padded rows": padded,
    "endless": lambda model, compileable: generated(model, tokens(TOKENS), compileable, custom_generate=endless),
    "stream()": streamed,
    "StreamPool": pooled,
}


def error_of(result: torch.Tensor, way: str, judge: PreTrainedModel) -> float:
    """Of logits, the relative error. Of a text, by how much its tokens fall short of being the likeliest."""
    text = result if way == "StreamPool" else tokens(TOKENS, 2)[1:, PADS:] if way == "padded rows" else tokens(TOKENS)
    expected = streamed_logits(judge, text, N_SINK, WINDOW)[:, PROMPT - 1 - (PADS if way == "padded rows" else 0) : -1]
    if way != "StreamPool":
        return relative_error(result, expected)
    chosen = expected.gather(2, result[:, PROMPT:, None])[..., 0]
    return ((expected.amax(-1) - chosen) / expected.abs().amax(-1)).max().item()


def model_with(implementation: str, device: str) -> PreTrainedModel | None:
    """A tiny model with this attention, or None if its package is not installed."""
    flash = implementation.startswith("flash")
    if flash and device == "cpu":
        return None
    model = tiny_model("llama").to(device, torch.bfloat16 if flash else torch.float32)
    try:
        model.set_attn_implementation(implementation)
    except ImportError:
        return None
    return model


def examine(model: PreTrainedModel, way: str, compileable: bool) -> dict[str, Any]:
    """One cell of the table."""
    if way == "StreamPool" and not compileable:
        return {"outcome": "–"}
    torch._dynamo.reset()
    judge, tolerance = tiny_model("llama"), TOLERANCE
    if model.dtype != torch.float32:
        rounded = streamed_logits(model, tokens(TOKENS).to(model.device), N_SINK, WINDOW)[:, PROMPT - 1 : -1]
        tolerance = 2 * error_of(rounded.float().cpu(), "generate()", judge)
    try:
        error = error_of(WAYS[way](model, compileable), way, judge)
    except Exception as failure:
        raised_in = Path(traceback.extract_tb(failure.__traceback__)[-1].filename)
        if isinstance(failure, (NotImplementedError, ValueError)) and raised_in.parent == LIBRARY:
            return {"outcome": "refused", "reason": str(failure)}
        said = re.search(r"error: .*", str(failure)) or re.search(r".*", str(failure))
        return {"outcome": "fails", "reason": f"{type(failure).__name__}: {said[0] if said else ''}"}
    return {"outcome": "exact" if error <= tolerance else "wrong", "error": error}


def tables() -> str:
    """The outcomes of every result file as Markdown."""
    parts = []
    for path in sorted((ROOT / "results").glob("attention-*.json")):
        result = json.loads(path.read_text())
        versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
        alike: dict[tuple[str, ...], list[str]] = {}  # a column for those with the same outcomes
        for row in result["rows"]:
            name = row["attention"] + (", compileable" if row["compileable"] else "")
            alike.setdefault(tuple(row[way]["outcome"] for way in WAYS), []).append(name)
        lines = [["", *("; ".join(names) for names in alike.values())], ["---"] * (1 + len(alike))]
        lines += [[way, *outcomes] for way, outcomes in zip(WAYS, zip(*alike, strict=True), strict=True)]
        parts.append(f"{result['device']}, {versions} ([reasons](../results/{path.name})):\n")
        parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n")
    return "\n".join(parts)


def page_with_tables() -> str:
    """The page, with the tables between its marks."""
    before, begin, rest = PAGE.read_text().partition(BEGIN)
    return f"{before}{begin}\n{tables()}{END}{rest.partition(END)[2]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--tables-only", action="store_true", help="write the page from the files that there are")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if not args.tables_only:
        rows = []
        for implementation in IMPLEMENTATIONS:
            if (model := model_with(implementation, args.device)) is None:
                print(f"{implementation}: not installed", flush=True)
                continue
            for compileable in (False, True):
                rows.append({"attention": implementation, "compileable": compileable})
                rows[-1] |= {way: examine(model, way, compileable) for way in WAYS}
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        result = {
            "command": f"python -m tests.attention --device {args.device}",
            "device": torch.cuda.get_device_name() if args.device == "cuda" else "CPU",
            "versions": versions,
            "rows": rows,
        }
        path = ROOT / "results" / f"attention-{args.device}.json"
        path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    PAGE.write_text(page_with_tables())
    print(tables())


if __name__ == "__main__":
    main()
