"""`python -m tests.sweep`: every causal language model class of the installed transformers, exact or refused.

Writes results/families.json and the family table in README.md; tests/test_families.py holds every family to it.
"""

import inspect
import json
import platform
import re
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import transformers
from tabulate import tabulate
from tqdm import tqdm

from sink_cache import SinkWindowCache

from .families import FIRST_WORD, VOCAB, CannotBuild, dense_is_right, model_types, tiny_model
from .oracle import relative_error, streamed_logits

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "results" / "families.json"
BEGIN, END = "<!-- families: written by python -m tests.sweep -->", "<!-- end of families -->"
N_SINK, WINDOW, LAYERS, TOKENS = 3, 4, 3, 24  # 17 evictions: more than twice around the ring
TOLERANCE = 1e-5


def examine(model_type: str) -> dict[str, str | float]:
    """What the cache does on a tiny model of this type: `outcome` is exact, refused, wrong, dense wrong or not built."""
    torch.set_num_threads(1)
    try:
        model = tiny_model(model_type, layers=LAYERS)
    except CannotBuild as reason:
        return {"outcome": "not built", "reason": str(reason)}
    if reason := dense_is_right(model):
        return {"outcome": "dense wrong", "reason": reason}
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(FIRST_WORD, VOCAB, (1, TOKENS), generator=generator)
    cache = SinkWindowCache(N_SINK, WINDOW)
    positions = torch.arange(TOKENS)[None]
    # As in generate(): position_ids are given to models that take them. (Without them, Bamba starts anew at every call.)
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters

    def step(t: int) -> torch.Tensor:
        kwargs = {"position_ids": positions[:, t : t + 1]} if takes_positions else {}
        return model(input_ids[:, t : t + 1], past_key_values=cache, **kwargs).logits[:, -1]

    try:
        with torch.no_grad():
            steps = [step(t) for t in range(TOKENS)]
    except (NotImplementedError, ValueError) as refusal:
        return {"outcome": "refused", "reason": str(refusal)}
    error = relative_error(torch.stack(steps, dim=1), streamed_logits(model, input_ids, N_SINK, WINDOW))
    return {"outcome": "exact" if error <= TOLERANCE else "wrong", "error": error}


def table(result: dict[str, Any]) -> str:
    """The outcome of every family as Markdown, refusals grouped by their reason."""
    groups: dict[str, list[str]] = {}
    for model_type, family in result["families"].items():
        reason = re.sub(
            r".*?\): |\. Use DynamicCache.*| \(its cache layers.*\)", "", family.get("reason", ""), flags=re.S
        )
        said = {
            "exact": "**exact**",
            "refused": f"refused: {reason}",
            "dense wrong": "not comparable: `DynamicCache` fails",
        }
        groups.setdefault(said.get(family["outcome"], family["outcome"]), []).append(model_type)
    rows = sorted(groups.items(), key=lambda row: (row[0] != "**exact**", -len(row[1])))
    cells = [[outcome, len(types), ", ".join(types)] for outcome, types in rows]
    return tabulate(cells, ["outcome", "families", "model types"], tablefmt="pipe")


def write_table(result: dict[str, Any], readme: Path = ROOT / "README.md") -> None:
    """Puts the table between the markers in the README."""
    before, rest = readme.read_text().split(BEGIN)
    readme.write_text(f"{before}{BEGIN}\n{table(result)}\n{END}{rest.split(END)[1]}")


def main() -> None:
    types = model_types()
    with ProcessPoolExecutor() as pool:
        families = dict(zip(types, tqdm(pool.map(examine, types), total=len(types)), strict=True))
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    setting = {"n_sink": N_SINK, "window": WINDOW, "tokens": TOKENS, "tolerance": TOLERANCE, "layers": LAYERS}
    result = {"versions": versions, "setting": setting, "families": families}
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    write_table(result)
    print(dict(Counter(family["outcome"] for family in families.values())))


if __name__ == "__main__":
    main()
