"""Every causal language model class of the installed transformers is exact or refused; never silently wrong."""

import json
import re

import pytest
import transformers

from .families import model_types
from .sweep import RESULT, ROOT, examine, table

MUST_BE_EXACT = set(
    "gpt_neox llama mistral qwen2 qwen3 gemma gemma2 gemma3_text phi stablelm gptj codegen cohere glm ernie4_5 "  # noqa: SIM905
    "helium olmo2 olmo3 granite smollm3 falcon llama4_text nanochat".split()
)


@pytest.mark.parametrize("model_type", model_types())
def test_exact_or_refused(model_type: str) -> None:
    family = examine(model_type)
    if family["outcome"] in ("not built", "dense wrong"):
        assert model_type not in MUST_BE_EXACT
        pytest.skip(f"{family['outcome']}: {family['reason']}")
    assert family["outcome"] in ("exact", "refused"), family
    if model_type in MUST_BE_EXACT:
        assert family["outcome"] == "exact", family
    if family["outcome"] == "refused":
        assert re.search(r"model type '\w[\w-]*' \(\w+\): .+\. Use DynamicCache", str(family["reason"]))


def test_the_readme_shows_the_sweep() -> None:
    result = json.loads(RESULT.read_text())
    assert table(result) in (ROOT / "README.md").read_text()
    outcomes = [family["outcome"] for family in result["families"].values()]
    assert outcomes.count("exact") >= 80
    assert outcomes.count("wrong") == 0
    if result["versions"]["transformers"] == transformers.__version__:
        assert sorted(result["families"]) == model_types()
