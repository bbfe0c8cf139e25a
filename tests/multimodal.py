"""Tiny random models of every class that computes positions in several dimensions for images (M-RoPE), and what the cache does.

In such a model the tokens of an image share positions along one axis and differ along the others, and the text after an image
goes on at a lower position than the number of tokens. A sink window needs positions that count tokens, so with an image the
cache has to refuse; without images these models are ordinary. `python -m tests.multimodal` writes results/multimodal.json.

No pixels are needed: the grid of an image alone decides the positions, and its placeholder tokens are ordinary embeddings.
"""

import argparse
import copy
import importlib
import inspect
import json
import platform
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel

from sink_cache import SinkWindowCache

from .families import FIRST_WORD, HEAD_DIM, VOCAB, CannotBuild, cache_name, dense_is_right, random_model, tiny_config
from .oracle import relative_error, streamed_logits

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "results" / "multimodal.json"
N_SINK, WINDOW, LAYERS, TOLERANCE = 3, 13, 4, 1e-5
NEW = 12  # tokens, after a prompt of 10 tokens, or two of 16 together
IMAGE_TOKENS = 4  # at two heights and two widths, so that what follows is two positions lower than its index
SPECIAL_IDS = {"image": 3, "video": 4, "start": 5, "end": 6, "audio": 7}  # below FIRST_WORD, so that text has none
# The image begins at this index of a prompt; its start and end tokens are before and after it.
PLACES = {"image first": 1, "image in the text": 4}

_GENERATING = re.compile(r"^class ((?!\w+PreTrainedModelFor)\w+(?:ForConditionalGeneration|ForCausalLM))\(", re.M)


def class_names() -> list[str]:
    """The generating classes in the model files of the installed transformers that compute positions of images, sorted."""
    names = []
    for file in (Path(transformers.__file__).parent / "models").glob("*/modeling_*.py"):
        source = file.read_text()
        if re.search(r"mrope|rope_deltas|def get_rope_index", source):
            names += [f"{file.parent.name}.{name}" for name in _GENERATING.findall(source)]
    return sorted(names)


def tiny_multimodal(name: str) -> PreTrainedModel:
    """A random model of the class `folder.ClassName`: float32, on the CPU, in eval mode."""
    folder, class_name = name.split(".")
    module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    model_class = getattr(module, class_name)
    if not {"cache", "past_key_values"} & inspect.signature(model_class.forward).parameters.keys():
        raise CannotBuild("its forward takes no cache; those of its parts do")

    def build() -> PreTrainedModel:
        config = tiny_config(model_class.config_class, LAYERS, {})
        _lower_special_ids(config)
        _shrink_sections(config.get_text_config(decoder=True))
        return model_class(config)

    return random_model(build, seed=0)


def _lower_special_ids(config: PreTrainedConfig) -> None:
    """Ids of image placeholders that the tiny vocabulary has."""
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            _lower_special_ids(value)
        elif isinstance(value, int) and re.fullmatch(r".*(_token_id|_token_index)", name):
            for kind in ("audio", "video", "start", "end", "image"):
                if kind in name and not name.startswith(("bos", "eos", "pad")):
                    setattr(config, name, SPECIAL_IDS[kind])
                    break


def _shrink_sections(config: PreTrainedConfig) -> None:
    """The frequencies of each axis, of as many as the tiny heads have."""
    rope = getattr(config, "rope_parameters", None)
    if rope and "rope_type" in rope:  # and not by layer type
        rotated = int(HEAD_DIM * rope.get("partial_rotary_factor", 1.0)) // 2
        others = max(1, rotated // 4)
        rope.setdefault("mrope_section", [rotated - 2 * others, others, others])
        if sum(rope["mrope_section"]) != rotated:
            rope["mrope_section"] = [rotated - 2 * others, others, others]


def prompt(model: PreTrainedModel, place: int | None, before: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """Inputs of `generate()`: ten tokens, of which four from index `place` on are an image, after the text `before`.

    Args:
        model (`PreTrainedModel`): in whose words.
        place (`int`, *optional*): None for text alone.
        before (`torch.Tensor`, *optional*): ids `[1, length]`.
    """
    ids = torch.randint(FIRST_WORD, VOCAB, (1, 10), generator=torch.Generator().manual_seed(1))
    if place is not None:
        ids[:, place - 1], ids[:, place + IMAGE_TOKENS] = SPECIAL_IDS["start"], SPECIAL_IDS["end"]
        ids[:, place : place + IMAGE_TOKENS] = SPECIAL_IDS["image"]
    if before is not None:
        ids = torch.cat([before, ids], dim=1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if place is not None:
        accepted = inspect.signature(model.forward).parameters
        vision = getattr(model.config, "vision_config", None)
        side = 2 * getattr(vision, "spatial_merge_size", 1)
        size = {"image_grid_thw": [[1, side, side]], "target_sizes": [[8, 8]]}
        inputs |= {name: torch.tensor(value) for name, value in size.items() if name in accepted}
        if "mm_token_type_ids" in accepted:
            inputs["mm_token_type_ids"] = (ids == SPECIAL_IDS["image"]).long()
    return inputs


@torch.no_grad()
def generate(
    model: PreTrainedModel, inputs: dict[str, torch.Tensor], cache: Cache, new: int = NEW
) -> tuple[torch.Tensor, torch.Tensor]:
    """The whole text `[1, length]` and the logits `[1, new, vocab]` of its new tokens."""
    options = {
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
        "max_new_tokens": new,
        "min_new_tokens": new,
    }
    output = model.generate(
        **inputs, past_key_values=cache, return_dict_in_generate=True, output_logits=True, **options
    )
    return output.sequences, torch.stack(output.logits, dim=1)


@torch.no_grad()
def step_by_step(
    model: PreTrainedModel, inputs: dict[str, torch.Tensor], cache: Cache, new: int = NEW
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `generate`, with forwards that number their tokens themselves."""
    text, logits = inputs["input_ids"], []
    seen = cache.get_seq_length() if isinstance(cache, DynamicCache) or cache.nbytes else 0
    if seen:  # with a mask of the whole text, models fail by themselves
        inputs = {name: value[:, seen:] if value.shape == text.shape else value for name, value in inputs.items()}
        inputs.pop("attention_mask", None)
    for _ in range(new):
        logits.append(model(**inputs, **{cache_name(model): cache}).logits[:, -1])
        token = logits[-1].argmax(-1, keepdim=True)
        text = torch.cat([text, token], dim=1)
        inputs = {"input_ids": token}
    return text, torch.stack(logits, dim=1)


WAYS = (generate, step_by_step)


def examine(name: str, ways: Sequence[Callable[..., Any]] = WAYS) -> dict[str, Any]:
    """What the cache does with text, and with an image at several places: of each of `cases`, `outcome` is exact, refused,
    wrong or failed (with an error of the model's own).

    A class that has no such cases says why, as "not built" or "dense wrong". A call with an image may be exact only in models
    whose images have the positions of ordinary tokens.

    Args:
        name (`str`): `folder.ClassName`.
        ways (`Sequence[Callable]`): those of `WAYS` that each case is fed by; the first of them decides whether images are tried.
    """
    torch.set_num_threads(1)
    try:
        model = tiny_multimodal(name)
    except CannotBuild as reason:
        return {"not built": str(reason), "cases": {}}
    if reason := dense_is_right(model):
        return {"dense wrong": reason, "cases": {}}
    cases: dict[str, Any] = {}
    for how in ways:
        cases[f"text, {how.__name__}"] = _judge(model, how, None)
        # A model whose text is refused refuses all else for the same reason.
        if takes_images(model) and cases[f"text, {ways[0].__name__}"]["outcome"] == "exact":
            cases |= {f"{where}, {how.__name__}": _judge(model, how, place) for where, place in PLACES.items()}
            cases[f"image in the second turn, {how.__name__}"] = _judge(model, how, 1, turns=2)
            cases[f"text after an image, {how.__name__}"] = _judge(model, how, None, image_before=True)
    return {"cases": cases}


def takes_images(model: PreTrainedModel) -> bool:
    """Whether the model can be told how large an image is."""
    return bool({"image_grid_thw", "target_sizes"} & inspect.signature(model.forward).parameters.keys())


@contextmanager
def _as_it_was(model: PreTrainedModel) -> Iterator[None]:
    """Models remember images in attributes of their modules; afterwards these are as before."""
    before = [(module, dict(vars(module))) for module in model.modules()]
    yield
    for module, attributes in before:
        vars(module).clear()
        vars(module).update(attributes)


def _judge(
    model: PreTrainedModel, how: Callable[..., Any], place: int | None, turns: int = 1, image_before: bool = False
) -> dict[str, Any]:
    """One case.

    Args:
        model (`PreTrainedModel`): remembers nothing of it afterwards.
        how (`Callable`): `generate` or `step_by_step`.
        place (`int`, *optional*): of the image in the last turn.
        turns (`int`): with 2, a short text comes before.
        image_before (`bool`): the model has read an image of another text, with a cache of its own.
    """
    cache, text, result = SinkWindowCache(N_SINK, WINDOW), None, {}
    with _as_it_was(model):
        if image_before:
            how(model, prompt(model, PLACES["image first"]), DynamicCache(config=model.config), new=2)
        if turns == 2:
            first = prompt(model, None)
            text, _ = how(model, {name: value[:, :4] for name, value in first.items()}, cache, new=2)
        inputs = prompt(model, place, text)
        before = copy.deepcopy(cache)
        try:
            text, logits = how(model, inputs, cache)
        except (NotImplementedError, ValueError) as refusal:
            result = {"outcome": "refused", "reason": str(refusal)}
        except Exception as failure:
            result = {"outcome": "failed", "reason": f"{type(failure).__name__}: {failure}"[:300]}
    if result:
        if result["outcome"] == "refused" and place is not None:
            result["nothing stored"] = _go_on_alike(model, cache, before)
        return result
    expected = streamed_logits(model, text[:, :-1], N_SINK, WINDOW, first=inputs["input_ids"].shape[1])
    error = relative_error(logits, expected)
    return {"outcome": "exact" if error <= TOLERANCE else "wrong", "error": error}


def _go_on_alike(model: PreTrainedModel, cache: SinkWindowCache, before: SinkWindowCache) -> bool:
    """Whether a text goes on after a refused call as if there had been none."""
    ids = prompt(model, None)["input_ids"]
    logits = []
    for each in (cache, before):
        with _as_it_was(model):
            try:
                logits.append(step_by_step(model, {"input_ids": ids}, each)[1])
            except (NotImplementedError, ValueError):
                return False
    return torch.equal(*logits)


def main() -> None:
    """Examines all classes, or those that are named."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.multimodal",
        description="Examine SinkWindowCache with text and images on a tiny model of every class with positions on several "
        "axes. Of all of them, the result is written to results/multimodal.json.",
    )
    parser.add_argument("names", nargs="*", metavar="FOLDER.CLASS", help="only these, printed and not written")
    parser.add_argument("--workers", type=int, help="processes (default: one for each core)")
    args = parser.parse_args()
    names = args.names or class_names()
    with ProcessPoolExecutor(args.workers) as pool:
        classes = dict(zip(names, tqdm(pool.map(examine, names), total=len(names)), strict=True))
    if args.names:
        print(json.dumps(classes, indent=1))
        return
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    setting = {"n_sink": N_SINK, "window": WINDOW, "new_tokens": NEW, "tolerance": TOLERANCE, "layers": LAYERS}
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps({"versions": versions, "setting": setting, "classes": classes}, indent=1) + "\n")
    print(dict(Counter(case["outcome"] for cases in classes.values() for case in cases["cases"].values())))


if __name__ == "__main__":
    main()
