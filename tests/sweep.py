"""`python -m tests.sweep`: every causal language model class of the installed transformers, exact or refused.

Writes results/families.json and the family table in README.md; tests/test_families.py holds every family to it.
"""

import inspect
import json
import platform
import re
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

from sink_cache import SinkWindowCache

from .families import FIRST_WORD, VOCAB, CannotBuild, dense_is_right, model_types, tiny_model
from .oracle import relative_error, streamed_logits

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "results" / "families.json"
N_SINK, WINDOW, TOKENS = 3, 4, 24  # 17 evictions: more than twice around the ring
TOLERANCE = 1e-5


def examine(model_type: str, layers: int = 3) -> dict[str, str | float]:
    """What the cache does on a tiny model of this type: `outcome` is exact, refused, wrong, dense wrong or not built."""
    torch.set_num_threads(1)
    try:
        model = tiny_model(model_type, layers=layers)
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


def main() -> None:
    types = model_types()
    with ProcessPoolExecutor() as pool:
        families = dict(zip(types, tqdm(pool.map(examine, types), total=len(types)), strict=True))
    versions = {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
    setting = {"n_sink": N_SINK, "window": WINDOW, "tokens": TOKENS, "tolerance": TOLERANCE, "layers": 3}
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps({"versions": versions, "setting": setting, "families": families}, indent=1) + "\n")
    outcomes = [family["outcome"] for family in families.values()]
    print({outcome: outcomes.count(outcome) for outcome in sorted(set(outcomes))})


if __name__ == "__main__":
    main()
