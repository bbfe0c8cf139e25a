"""Every causal language model class of the installed transformers is exact or refused; never silently wrong."""

import json
import re

import pytest
import torch
import transformers

from sink_cache import SinkWindowCache

from .families import FIRST_WORD, VOCAB, model_types, tiny_model
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


@pytest.mark.parametrize(
    "model_type", ["gemma2", "gemma3_text", "gpt_oss", "jamba", "lfm2", "llama4_text", "qwen3_next", "smollm3"]
)
@pytest.mark.parametrize("with_config", [False, True])
def test_generate_where_the_first_layers_are_not_ours(model_type: str, with_config: bool) -> None:
    # generate() shows the cache the whole model, forward() a part of it: layers made twice would lose their tokens.
    model = tiny_model(model_type, layers=4)
    prompt = torch.randint(FIRST_WORD, VOCAB, (1, 9), generator=torch.Generator().manual_seed(0))
    cache = SinkWindowCache(2, 5, config=model.config if with_config else None)
    with torch.no_grad():
        out = model.generate(prompt, past_key_values=cache, max_new_tokens=15, do_sample=False, eos_token_id=None)
        by_hand, new, cache = prompt, prompt, SinkWindowCache(2, 5)
        for _ in range(15):
            positions = torch.arange(by_hand.shape[1] - new.shape[1], by_hand.shape[1])[None]
            new = model(new, position_ids=positions, past_key_values=cache).logits[:, -1:].argmax(-1)
            by_hand = torch.cat([by_hand, new], dim=1)
    assert torch.equal(out, by_hand)


def test_the_readme_shows_the_sweep() -> None:
    result = json.loads(RESULT.read_text())
    assert table(result) in (ROOT / "README.md").read_text()
    outcomes = [family["outcome"] for family in result["families"].values()]
    assert outcomes.count("exact") >= 80
    assert outcomes.count("wrong") == 0
    if result["versions"]["transformers"] == transformers.__version__:
        assert sorted(result["families"]) == model_types()
