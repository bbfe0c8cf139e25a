"""A process that uses the repository for the hub and cannot import the package.

Call it as `python tests/hub_user.py MODEL CODE CALLS OUTCOMES`. MODEL is a folder with weights. CODE is the repository, or
empty if MODEL has the code, too. CALLS is a JSON list of options of `generate()`. OUTCOMES gets what each call returned
or raised.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

sys.modules["sink_cache"] = None  # type: ignore[assignment] # an import of it is now an ImportError


def main(model_folder: str, code: str, calls: list[dict[str, Any]]) -> list[Any]:
    model = AutoModelForCausalLM.from_pretrained(model_folder, trust_remote_code=not code)
    options = {"custom_generate": code, "trust_remote_code": True} if code else {}
    outcomes: list[Any] = []
    for call in calls:
        torch.manual_seed(0)
        try:
            outcomes.append(outcome(model, options, **call))
        except (NotImplementedError, TypeError, ValueError) as reason:
            outcomes.append(f"{type(reason).__name__}: {reason}")
    return outcomes


def outcome(
    model: Any, options: dict[str, Any], input_ids: Any, turn: Any = None, then: Any = None, **call: Any
) -> Any:
    """The tokens that a call returned; with a `turn`, those of a second call with the cache of the first, and other options."""
    if turn is None:
        return model.generate(torch.tensor(input_ids), **options, **call).tolist()
    first = model.generate(torch.tensor(input_ids), **options, **call, return_dict_in_generate=True)
    name = "cache" if "cache" in first else "past_key_values"
    text = torch.cat([first.sequences, torch.tensor(turn)], dim=1)
    return model.generate(text, **{**options, **call, **(then or {}), name: first[name]}).tolist()


if __name__ == "__main__":
    torch.set_num_threads(1)
    outcomes = main(*sys.argv[1:3], json.loads(Path(sys.argv[3]).read_text()))
    Path(sys.argv[4]).write_text(json.dumps(outcomes))
