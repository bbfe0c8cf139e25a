"""Every causal language model class of the installed transformers is exact or refused; never silently wrong."""

import json
import re

import pytest
import torch
import transformers
from torch._dynamo.testing import CompileCounter
from transformers import CONFIG_MAPPING, DynamicCache, PreTrainedModel

from sink_cache import SinkWindowCache, stream
from sink_cache.ring import slot_of

from .families import DEPTHS, FIRST_WORD, VOCAB, missing_kinds, model_types, tiny_model
from .oracle import relative_error, streamed_logits
from .sweep import N_SINK, RESULT, ROOT, WINDOW, examine, listing, one_by_one

MUST_BE_EXACT = set(
    "gpt_neox llama mistral qwen2 qwen3 gemma gemma2 gemma3_text phi stablelm gptj codegen cohere glm ernie4_5 "  # noqa: SIM905
    "helium olmo2 olmo3 granite smollm3 falcon llama4_text nanochat gpt_oss qwen3_next deepseek_v2 deepseek_v3 "
    "minicpm3 glm4_moe_lite longcat_flash mpt falcon_h1 zamba zamba2 jamba".split()
)


def test_layers_of_another_kind_are_missed() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(DEPTHS, "mllama")
        assert missing_kinds("mllama") == [3]  # the first cross-attention
        patch.delitem(DEPTHS, "deepseek_v3")
        assert missing_kinds("deepseek_v3") == [3]  # the first with experts


@pytest.mark.parametrize("model_type", model_types())
def test_exact_or_refused(model_type: str) -> None:
    family = examine(model_type, tokens=2 * (N_SINK + WINDOW) + 2)  # 9 evictions: more than twice around the ring
    if family["outcome"] in ("not built", "dense wrong"):
        assert model_type not in MUST_BE_EXACT
        pytest.skip(f"{family['outcome']}: {family['reason']}")
    assert family["outcome"] in ("exact", "refused"), family
    if model_type in MUST_BE_EXACT:
        assert family["outcome"] == "exact", family
    if family["outcome"] == "refused":
        assert re.search(r"model type '\w[\w-]*' \(\w+\): .+\. Use DynamicCache", str(family["reason"]))
        return
    static = family["compileable"]
    assert static["outcome"] in ("exact", "refused"), static
    if static["outcome"] == "refused":
        assert re.search(r"compileable=True is not possible for .+: .+\. Leave compileable out", static["reason"])
    # A family is exact only if all that its real config has was judged: with three layers, mllama has no cross-attention.
    missing = missing_kinds(model_type)
    assert not missing, f"layers {missing} of the default config are of kinds that the tiny model lacks: see DEPTHS"


@pytest.mark.parametrize(
    "model_type, with_config",
    [
        *((name, False) for name in ("gemma2", "gpt_oss", "lfm2", "llama4_text", "qwen3_next", "smollm3")),
        *((name, either) for name in ("gemma3_text", "jamba") for either in (False, True)),
    ],
)
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


# Latents in the place of keys; biases for the order of keys; a recurrent state in the layers of attention, or beside them.
CLOSE = 1e-4  # what these tests look for is at least a thousand times larger
UNUSUAL = ["deepseek_v3", "mpt", "falcon_h1", "zaya", "jamba"]


@pytest.mark.parametrize("model_type", UNUSUAL)
def test_rows_of_unusual_layers(model_type: str) -> None:
    model, n_sink, window = tiny_model(model_type), 2, 5
    text, further = random_ids(3, 9), random_ids(6, 4, seed=1)
    rows = torch.tensor([2, 0, 0])
    cache = SinkWindowCache(n_sink, window)
    with torch.no_grad():
        one_by_one(model, random_ids(3, 8, seed=2), cache)
        cache.reset()
        one_by_one(model, text, cache)
        cache.reorder_cache(rows)
        cache.batch_repeat_interleave(2)
        logits = torch.stack([step(model, further[:, t : t + 1], cache, 9 + t)[:, -1] for t in range(4)], dim=1)
    whole = torch.cat([text[rows].repeat_interleave(2, dim=0), further], dim=1)
    assert relative_error(logits, streamed_logits(model, whole, n_sink, window)[:, 9:]) <= CLOSE


@pytest.mark.parametrize("model_type", UNUSUAL)
def test_padded_rows_of_unusual_layers(model_type: str) -> None:
    # Rows wrap around at different times; a wrong order of keys would show in MPT.
    model, n_sink, window, longest, new = tiny_model(model_type), 2, 5, 9, 9
    pads = torch.tensor([5, 0, 8])
    ids, mask = random_ids(3, longest + new), (torch.arange(longest + new) >= pads[:, None]).long()
    positions = (torch.arange(longest + new) - pads[:, None]).clamp(min=0)

    def feed(row: slice, start: int, cache: SinkWindowCache) -> torch.Tensor:
        logits = []
        for a, b in [(start, longest), *((t, t + 1) for t in range(longest, longest + new))]:
            seen = {} if start else {"attention_mask": mask[row, :b]}
            logits.append(step(model, ids[row, a:b], cache, positions[row, a:b], **seen)[:, -1])
        return torch.stack(logits, dim=1)

    with torch.no_grad():
        together = feed(slice(None), 0, SinkWindowCache(n_sink, window))
        for i, start in enumerate(pads.tolist()):
            row = slice(i, i + 1)
            mask[row] = 1
            alone = feed(row, start, SinkWindowCache(n_sink, window))
            assert relative_error(together[row], alone) <= CLOSE


def step(
    model: PreTrainedModel,
    ids: torch.Tensor,
    cache: SinkWindowCache,
    positions: int | torch.Tensor,
    **kwargs: torch.Tensor,
) -> torch.Tensor:
    if isinstance(positions, int):
        positions = torch.arange(positions, positions + ids.shape[1]).expand(len(ids), -1)
    return model(ids, position_ids=positions, past_key_values=cache, **kwargs).logits


def random_ids(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(FIRST_WORD, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def test_latents_stream_in_chunks_and_are_taken_back_and_rebased() -> None:
    model, n_sink, window = tiny_model("deepseek_v3"), 2, 5
    ids, other = random_ids(2, 24), random_ids(2, 3, seed=1)
    expected = streamed_logits(model, ids, n_sink, window)
    cache = SinkWindowCache(n_sink, window)
    logits = [*stream(model, ids[:, :14], cache, chunk_size=4)]
    with torch.no_grad():
        cache.activate_past_recording()
        step(model, other, cache, 14)
        cache.crop(-3)
        logits += [step(model, ids[:, t : t + 1], cache, t) for t in range(14, 18)]
        assert cache.rebase() > 0
        for t in range(18, 24):
            logits.append(
                model(ids[:, t : t + 1], position_ids=cache.next_position_ids(), past_key_values=cache).logits
            )
    assert relative_error(torch.cat(logits, dim=1), expected) <= CLOSE


def test_several_tokens_at_once_keep_their_order_with_alibi() -> None:
    model, n_sink, window = tiny_model("mpt"), 2, 5
    ids = random_ids(1, 16)
    cache, kept = SinkWindowCache(n_sink, window), DynamicCache(config=model.config)
    with torch.no_grad():
        one_by_one(model, ids[:, :12], cache)
        for layer in range(3):
            held = cache.layers[layer]
            # 12 tokens: slots 2 to 6 hold tokens 7, 8, 9, 10, 11, from wherever the ring is; the next sees the last four.
            slots = [0, 1, *(slot_of(t, n_sink, window) for t in (8, 9, 10, 11))]
            kept.update(held.keys[:, :, slots], held.values[:, :, slots], layer)
        logits = [model(ids[:, 12:], past_key_values=each).logits for each in (cache, kept)]
    assert relative_error(*logits) <= CLOSE


def test_what_alibi_cannot_do_is_refused() -> None:
    mpt, bloom = tiny_model("mpt"), tiny_model("bloom")
    ids = random_ids(1, 12)
    refusals = [
        (NotImplementedError, "chunk_size > 1", lambda: list(stream(mpt, ids, SinkWindowCache(1, 4), chunk_size=3))),
        (
            NotImplementedError,
            "compileable=True",
            lambda: mpt(ids, past_key_values=SinkWindowCache(1, 4, compileable=True)),
        ),
        (ValueError, "biases for 2048", lambda: mpt(ids, past_key_values=SinkWindowCache(4, 2045))),
        # MPT's default is not to use a cache, and it would be given the whole text at every step.
        (
            ValueError,
            "use_cache=True",
            lambda: mpt.generate(ids, past_key_values=SinkWindowCache(1, 4), max_new_tokens=2),
        ),
    ]
    with torch.no_grad():
        if examine("bloom")["outcome"] == "exact":  # in versions that make biases for as many keys as they are shown
            masked = {"attention_mask": torch.ones_like(ids), "past_key_values": SinkWindowCache(1, 4)}
            refusals.append((NotImplementedError, "Leave attention_mask out", lambda: bloom(ids, **masked)))
        for error, says, call in refusals:
            with pytest.raises(error, match=re.escape(says)):
                call()
        assert next(stream(mpt, ids, SinkWindowCache(1, 4), chunk_size=1)).shape == (1, 1, VOCAB)
        with pytest.raises(NotImplementedError, match=r"biases \(ALiBi\) for the whole text"):
            tiny_model("falcon", alibi=True)(ids, past_key_values=SinkWindowCache(1, 4))


@pytest.mark.parametrize("model_type", ["falcon_h1", "jamba"])
def test_recurrent_states_are_not_cropped(model_type: str) -> None:
    model, cache = tiny_model(model_type), SinkWindowCache(2, 5)
    with torch.no_grad():
        one_by_one(model, random_ids(1, 4), cache)
    with pytest.raises(NotImplementedError, match="crop of recurrent states"):
        cache.crop(-1)
    assert cache.get_seq_length() == 4


@pytest.mark.parametrize("model_type", ["gpt_oss", "deepseek_v3"])  # sinks of its own and sliding layers; latents
def test_one_graph_decodes_for_ever(model_type: str) -> None:
    model, n_sink, window = tiny_model(model_type, layers=2), 2, 5
    ids = random_ids(2, 30)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    cache = SinkWindowCache(n_sink, window, compileable=True)
    with torch.no_grad():
        logits = [model(ids[:, :1], past_key_values=cache).logits]
        logits += [compiled(ids[:, t : t + 1], past_key_values=cache).logits for t in range(1, 30)]
    assert relative_error(torch.cat(logits, dim=1), streamed_logits(model, ids, n_sink, window)) <= CLOSE
    assert counter.frame_count == 1


@pytest.mark.parametrize("model_type", ["longcat_flash", "mpt", "zamba2"])  # 500 experts; 7 billion; sizes of their own
def test_full_size_models_have_small_twins(model_type: str) -> None:
    # In their full width; of the deepest, 32 layers of attention are enough.
    sizes = {
        "longcat_flash": {"num_layers": 16},  # with two each
        "mpt": {"d_model": 4096, "n_heads": 32, "n_layers": 32},
        "zamba2": {
            "num_hidden_layers": 32,
            "layers_block_type": CONFIG_MAPPING["zamba2"]().layers_block_type[:32],
            "chunk_size": 16,  # the slow scan fills each token up to as many
        },
    }
    config = CONFIG_MAPPING[model_type](**sizes[model_type])
    assert len(SinkWindowCache(4, 12, config=config).layers) >= 32


KNOWN = (
    "llama",
    "mistral",
    "qwen3",
    "gemma3",
    "phi3",
    "deepseek_v3",
    "gpt_oss",
    "glm4",
    "olmo3",
    "falcon",
)  # in the README


def test_the_pages_show_the_sweep() -> None:
    result = json.loads(RESULT.read_text())
    assert listing(result) in (ROOT / "docs" / "models.md").read_text()
    outcomes = {model_type: family["outcome"] for model_type, family in result["families"].items()}
    counts = f"Of {len(outcomes)} language model classes in transformers 5.24, [{[*outcomes.values()].count('exact')} are exact]"
    assert counts in (ROOT / "README.md").read_text()
    assert {outcomes[model_type] for model_type in KNOWN} == {"exact"}
    families = result["families"].values()
    for outcomes, least in (
        ([family["outcome"] for family in families], 115),
        ([family["compileable"]["outcome"] for family in families if "compileable" in family], 105),
    ):
        assert outcomes.count("exact") >= least
        assert outcomes.count("wrong") == 0
    if result["versions"]["transformers"] == transformers.__version__:
        assert sorted(result["families"]) == model_types()
