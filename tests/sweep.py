"""`python -m tests.sweep`: every causal language model class of the installed transformers, exact or refused.

Writes results/families.json and the list of families in docs/models.md; tests/test_families.py holds every family to it.
"""

import argparse
import inspect
import json
import platform
import re
import textwrap
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from sink_cache import SinkWindowCache
from sink_cache.cache import stack_of

from .families import FIRST_WORD, VOCAB, CannotBuild, cache_name, dense_is_right, depth, model_types, tiny_model
from .oracle import relative_error, streamed_logits

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "results" / "families.json"
BEGIN, END = "<!-- families: written by python -m tests.sweep -->", "<!-- end of families -->"
N_SINK, WINDOW, TOKENS = 3, 4, 24  # 17 evictions: more than twice around the ring
TOLERANCE = 1e-5


def examine(model_type: str, tokens: int = TOKENS) -> dict[str, Any]:
    """What the cache does on a tiny model of this type: `outcome` is exact, refused, wrong, dense wrong or not built.

    Where it is exact, `compileable` is the outcome with `compileable=True`, in the same form.

    Args:
        model_type (`str`): one of `model_types()`.
        tokens (`int`): the length of the text.
    """
    torch.set_num_threads(1)
    try:
        model = tiny_model(model_type)
    except CannotBuild as reason:
        return {"outcome": "not built", "reason": str(reason)}
    if reason := dense_is_right(model):
        return {"outcome": "dense wrong", "reason": reason}
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(FIRST_WORD, VOCAB, (1, tokens), generator=generator)
    cache = SinkWindowCache(N_SINK, WINDOW)
    try:
        logits = one_by_one(model, input_ids, cache)
    except (NotImplementedError, ValueError) as refusal:
        return {"outcome": "refused", "reason": str(refusal)}
    recurrent = any(
        isinstance(layer, LinearAttentionCacheLayerMixin) for layer in DynamicCache(config=model.config).layers
    )
    expected = streamed_logits(model, input_ids, N_SINK, WINDOW)
    scheme = stack_of(cache).scheme
    family = {
        "layers": depth(model_type),
        "merges_sinks": scheme is not None and scheme.plain,  # in stream()
        **_judge(model, input_ids, 1, logits, expected),
    }
    try:
        # Steps of a cache that is filling up have masks; after a first call that fills it they have none.
        outcomes = []
        for first in (1, N_SINK + WINDOW):
            logits = one_by_one(model, input_ids, SinkWindowCache(N_SINK, WINDOW, compileable=True), first)
            if (
                first > 1
            ):  # recurrent layers read several tokens with another formula, which the oracle has to do as well
                expected = (
                    streamed_logits(model, input_ids, N_SINK, WINDOW, first) if recurrent else expected[:, first - 1 :]
                )
            outcomes.append(_judge(model, input_ids, first, logits, expected))
        family["compileable"] = max(outcomes, key=lambda one: one["error"])
    except NotImplementedError as refusal:
        family["compileable"] = {"outcome": "refused", "reason": str(refusal)}
    return family


@torch.no_grad()
def one_by_one(model: PreTrainedModel, input_ids: torch.Tensor, cache: Cache, first: int = 1) -> torch.Tensor:
    """Logits `[batch, tokens - first + 1, vocab]`, after a first call of so many tokens, and of single tokens."""
    # As in generate(): position_ids are given to models that take them. (Without them, Bamba starts anew at every call.)
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    logits = []
    for call in torch.arange(input_ids.shape[1]).split([first] + [1] * (input_ids.shape[1] - first)):
        kwargs = {"position_ids": call.expand(len(input_ids), -1)} if takes_positions else {}
        logits.append(model(input_ids[:, call], **{cache_name(model): cache}, **kwargs).logits[:, -1])
    return torch.stack(logits, dim=1)


def _judge(
    model: PreTrainedModel, input_ids: torch.Tensor, first: int, logits: torch.Tensor, expected: torch.Tensor
) -> dict[str, Any]:
    error = relative_error(logits, expected)
    if error <= TOLERANCE:
        return {"outcome": "exact", "error": error}
    # Some recurrent models round more than that: with transformers' own cache they differ as much from one forward of all tokens.
    own_error = _own_error(model, input_ids, first)
    return {"outcome": "exact" if error <= own_error else "wrong", "error": error, "own_error": own_error}


@torch.no_grad()
def _own_error(model: PreTrainedModel, input_ids: torch.Tensor, first: int) -> float:
    """How far a model is from itself in float32, with a DynamicCache and the same calls against one forward of all tokens."""
    in_calls = one_by_one(model, input_ids, DynamicCache(config=model.config), first)
    return relative_error(in_calls, model(input_ids).logits[:, first - 1 :])


def listing(result: dict[str, Any]) -> str:
    """The families of every outcome as Markdown, refusals grouped by their reason."""
    groups: dict[str, list[str]] = {}
    for model_type, family in result["families"].items():
        outcome = {"exact": "**exact**", "dense wrong": "not comparable, as `DynamicCache` fails"}.get(
            family["outcome"], family["outcome"]
        )
        if family["outcome"] == "refused":
            outcome = f"refused: {_reason(family)}"
        if family["outcome"] == "exact":
            static = family["compileable"]
            how = "too" if static["outcome"] == "exact" else static["outcome"]
            outcome += f", with `compileable=True` {how}" + (f": {_reason(static)}" if "reason" in static else "")
        groups.setdefault(outcome, []).append(model_type)
    largest_first = sorted(groups.items(), key=lambda group: (not group[0].startswith("**exact"), -len(group[1])))
    return "\n".join(
        textwrap.fill(
            f"- {len(types)} {outcome} — {', '.join(types)}",
            width=120,
            subsequent_indent="  ",
            break_on_hyphens=False,
            break_long_words=False,
        )
        for outcome, types in largest_first
    )


def _reason(family: dict[str, Any]) -> str:
    """What a refusal says about all families alike."""
    boilerplate = (
        r"^SinkWindowCache does not .*?\): |^compileable=True is not .*?: |\. Use DynamicCache.*|\. Leave compileable.*"
    )
    return re.sub(rf"{boilerplate}| \(its cache layers.*\)", "", str(family["reason"]), flags=re.S)


def write_listing(result: dict[str, Any], page: Path = ROOT / "docs" / "models.md") -> None:
    """Puts the list between the markers of the page."""
    before, rest = page.read_text().split(BEGIN)
    page.write_text(f"{before}{BEGIN}\n{listing(result)}\n{END}{rest.split(END)[1]}")


def main() -> None:
    """Examines the families; all of them unless told otherwise."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.sweep",
        description="Examine SinkWindowCache on a tiny model of every causal language model class that transformers has. "
        "Of all of them, the result is written to results/families.json and to docs/models.md.",
    )
    parser.add_argument("model_types", nargs="*", metavar="MODEL_TYPE", help="only these, printed and not written")
    parser.add_argument("--workers", type=int, help="processes (default: one for each core)")
    args = parser.parse_args()
    types = args.model_types or model_types()
    with ProcessPoolExecutor(args.workers) as pool:
        families = dict(zip(types, tqdm(pool.map(examine, types), total=len(types)), strict=True))
    if args.model_types:
        print(json.dumps(families, indent=1))
        return
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    setting = {"n_sink": N_SINK, "window": WINDOW, "tokens": TOKENS, "tolerance": TOLERANCE}
    result = {"versions": versions, "setting": setting, "families": families}
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    write_listing(result)
    print(dict(Counter(family["outcome"] for family in families.values())))
    print("compileable:", dict(Counter(f["compileable"]["outcome"] for f in families.values() if "compileable" in f)))


if __name__ == "__main__":
    main()
