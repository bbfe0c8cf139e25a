"""In models with positions on several axes, text is exact, and images are refused before anything is stored."""

import json

import pytest
import torch
import transformers

from sink_cache import SinkWindowCache

from .multimodal import (
    N_SINK,
    RESULT,
    TOLERANCE,
    WAYS,
    WINDOW,
    class_names,
    examine,
    generate,
    prompt,
    tiny_multimodal,
)
from .oracle import relative_error

QWEN2_VL, QWEN3_5 = "qwen2_vl.Qwen2VLForConditionalGeneration", "qwen3_5.Qwen3_5ForConditionalGeneration"
MUST_BE_EXACT = {  # with text
    QWEN2_VL,
    QWEN3_5,
    "glm4v.Glm4vForConditionalGeneration",
    "qwen2_5_vl.Qwen2_5_VLForConditionalGeneration",
    "qwen3_vl.Qwen3VLForConditionalGeneration",
}


# One class for each row of outcomes that results/multimodal.json has: these are fed step by step, too.
STEP_BY_STEP = {
    QWEN2_VL,
    QWEN3_5,  # the same row, with recurrent layers first
    "cosmos3_edge.Cosmos3EdgeForConditionalGeneration",
    "exaone4_5.Exaone4_5_ForConditionalGeneration",
    "glm_image.GlmImageForConditionalGeneration",
    "hunyuan_vl.HunYuanVLForConditionalGeneration",
    "qwen2_5_omni.Qwen2_5OmniThinkerForConditionalGeneration",
    "qwen3_5.Qwen3_5ForCausalLM",
}


@pytest.mark.parametrize("name", class_names())
def test_text_is_exact_and_images_are_refused(name: str) -> None:
    ways = WAYS if name in STEP_BY_STEP else [generate]
    found = examine(name, ways)
    recorded = json.loads(RESULT.read_text())
    if recorded["versions"]["transformers"] == transformers.__version__:
        expected = outcomes(recorded["classes"][name])
        endings = tuple(way.__name__ for way in ways)
        assert outcomes(found) == {case: outcome for case, outcome in expected.items() if case.endswith(endings)}
    check(name, found)
    if not found["cases"]:
        pytest.skip(str(found))


def check(name: str, found: dict) -> None:
    assert found["cases"] or name not in MUST_BE_EXACT
    for case, result in found["cases"].items():
        assert result["outcome"] in ("exact", "refused"), (case, result)
        if case.startswith("text,"):
            assert result["outcome"] == "exact" or name not in MUST_BE_EXACT, (case, result)
        elif result["outcome"] == "refused":
            assert "image" in result["reason"], (case, result)
            # A model that remembers another text's image goes wrong in the first step after the prompt.
            assert case.startswith("text after an image") or result["nothing stored"], (case, result)


def outcomes(found: dict) -> dict:
    return {case: result["outcome"] for case, result in found["cases"].items()}


def test_the_list_is_of_all_classes_and_nothing_in_it_is_wrong() -> None:
    recorded = json.loads(RESULT.read_text())
    for name, found in recorded["classes"].items():
        check(name, found)
    rows = {tuple(outcomes(found).items()) for found in recorded["classes"].values() if found["cases"]}
    assert rows == {tuple(outcomes(recorded["classes"][name]).items()) for name in STEP_BY_STEP}
    if recorded["versions"]["transformers"] == transformers.__version__:
        assert sorted(recorded["classes"]) == class_names()


@pytest.mark.parametrize("compileable", [False, True])
@pytest.mark.parametrize("name", [QWEN2_VL, QWEN3_5])  # layers of attention alone; recurrent layers come first
def test_an_image_with_its_pixels(name: str, compileable: bool) -> None:
    model = tiny_multimodal(name)
    vision = model.config.vision_config
    inputs = prompt(model, 1)
    patches = int(inputs["image_grid_thw"].prod())
    numbers = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    inputs["pixel_values"] = torch.randn(patches, numbers, generator=torch.Generator().manual_seed(0))
    cache = SinkWindowCache(N_SINK, WINDOW, compileable=compileable)
    with pytest.raises(NotImplementedError, match="does not support images in this model"):
        generate(model, inputs, cache)
    with torch.no_grad(), pytest.raises(NotImplementedError, match="does not support images in this model"):
        model(**inputs, past_key_values=cache)
    assert cache.get_seq_length() == 0
    text = prompt(model, None)
    expected = generate(model, text, SinkWindowCache(N_SINK, WINDOW, compileable=compileable))
    assert all(map(torch.equal, generate(model, text, cache), expected))


def test_padded_text() -> None:
    # The axes of a padded batch are equal but at the pads, and its rows begin at different positions.
    model, pads = tiny_multimodal(QWEN2_VL), 3
    text = prompt(model, None)["input_ids"]
    alone, expected = generate(model, {"input_ids": text[:, pads:]}, SinkWindowCache(N_SINK, WINDOW))
    rows = torch.cat([text, text])
    mask = torch.ones_like(rows)
    mask[0, :pads] = 0
    together, logits = generate(model, {"input_ids": rows, "attention_mask": mask}, SinkWindowCache(N_SINK, WINDOW))
    assert torch.equal(together[0, pads:], alone[0])
    assert relative_error(logits[:1], expected) <= TOLERANCE


def test_a_model_that_remembers_an_image() -> None:
    # generate() forgets it; a forward adds it to the positions of every call after the first.
    model, cache = tiny_multimodal(QWEN2_VL), SinkWindowCache(N_SINK, WINDOW)
    model.model.rope_deltas = torch.tensor([[-2]])
    text = prompt(model, None)["input_ids"]
    with torch.no_grad():
        model(text, past_key_values=cache)
        with pytest.raises(NotImplementedError, match="rope_deltas"):
            model(text[:, :1], past_key_values=cache)
        assert cache.get_seq_length() == text.shape[1]
        model.model.rope_deltas = None  # as the message says
        model(text[:, :1], past_key_values=cache)
