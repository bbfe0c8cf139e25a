"""Both names of a cache, `past_key_values` and `cache`, wherever one is passed; and no warning from calls of ours.

From transformers 5.24 on, models and `generate()` take `cache`, and warn of `past_key_values`. Before, they take
`past_key_values` only. `endless` takes both with every version. The oracle judges, so what works gives the same by both names.
"""

import contextlib
import copy
import inspect
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    GenerationMixin,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from examples import endless as endless_example
from examples import generate as generate_example
from sink_cache import SinkWindowCache, cache_kwargs, endless, stream, verify

from .families import PLAIN, cache_name, tiny_model
from .oracle import relative_error, streamed_logits
from .own_calls import ROOT, warned_of_us
from .test_exact import TOLERANCE, tokens

N_SINK, WINDOW = 3, 5

BOTH_NAMES = pytest.mark.parametrize("name", ["past_key_values", "cache"])
TAKES_CACHE = "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
TAKEN_NAMES = pytest.mark.parametrize(
    "name",
    [
        "past_key_values",
        pytest.param(
            "cache",
            marks=pytest.mark.skipif(
                not TAKES_CACHE, reason=f"transformers {transformers.__version__} takes past_key_values only"
            ),
        ),
    ],
)


def new_cache(**options: Any) -> SinkWindowCache:
    return SinkWindowCache(N_SINK, WINDOW, **options)


def greedy(model: PreTrainedModel, text: torch.Tensor, prompt: int) -> torch.Tensor:
    """The tokens `[batch, tokens - prompt]` that the oracle has after each token of the text from the prompt's last one on."""
    return streamed_logits(model, text, N_SINK, WINDOW)[:, prompt - 1 : -1].argmax(-1)


@contextlib.contextmanager
def no_renaming_is_shown() -> Iterator[None]:
    """Fails where Python shows that transformers has renamed `past_key_values`."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*past_key_values.*is deprecated", category=FutureWarning)
        yield


# --- what takes a cache ---


@TAKEN_NAMES
@pytest.mark.parametrize("compileable", [False, True])
@pytest.mark.parametrize("model_type", ["llama", "gpt_neox", "gemma3"])
def test_generate(model_type: str, compileable: bool, name: str) -> None:
    if compileable and model_type == "gemma3":
        pytest.skip("masks of images need compileable=False")
    model, cache = tiny_model(model_type), new_cache(compileable=compileable)
    out = model.generate(tokens(5), max_new_tokens=20, return_dict_in_generate=True, **{name: cache}, **PLAIN)
    assert cache.get_seq_length() == 24
    assert torch.equal(out.sequences[:, 5:], greedy(model, out.sequences, 5))
    assert out[name] is getattr(out, name) is cache


@TAKEN_NAMES
def test_beams(llama: PreTrainedModel, name: str) -> None:
    out = llama.generate(
        tokens(7), num_beams=3, length_penalty=0.0, max_new_tokens=16, return_dict_in_generate=True, output_scores=True,
        **{name: new_cache()}, **PLAIN,
    )  # fmt: skip
    logits = streamed_logits(llama, out.sequences, N_SINK, WINDOW)[0, 6:-1]
    expected = logits.log_softmax(-1).gather(1, out.sequences[0, 7:, None]).sum()
    assert torch.allclose(out.sequences_scores[0], expected, atol=1e-4)


@TAKEN_NAMES
@pytest.mark.parametrize("by", ["draft", "lookup"])
def test_assisted_decoding(llama: PreTrainedModel, by: str, name: str) -> None:
    lookup = {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1}
    helped = {"assistant_model": tiny_model("llama", seed=1, layers=1)} if by == "draft" else lookup
    out = llama.generate(tokens(6, seed=3), max_new_tokens=30, **helped, **{name: new_cache()}, **PLAIN)
    assert torch.equal(out[:, 6:], greedy(llama, out, 6))


@TAKEN_NAMES
@pytest.mark.parametrize("model_type", ["llama", "gpt_neox", "gemma3"])
@torch.no_grad()
def test_own_loops(model_type: str, name: str) -> None:
    model, cache, ids = tiny_model(model_type), new_cache(), tokens(40)
    logits, first = [], 0
    for length in (5, *[1] * 35):
        call = ids[:, first : first + length]
        positions = cache.next_position_ids(length)
        output = model(call, position_ids=positions, use_cache=True, **{name: cache})
        assert output[name] is getattr(output, name) is cache
        logits.append(output.logits)
        first += length
        if first in (20, 30):
            assert cache.rebase() > 0
    assert relative_error(torch.cat(logits, dim=1), streamed_logits(model, ids, N_SINK, WINDOW)) <= TOLERANCE


@BOTH_NAMES
@pytest.mark.parametrize("model_type, compileable", [("llama", True), ("gemma3_text", False)])
def test_two_turns_of_endless(model_type: str, compileable: bool, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The second turn is a second call of generate(), with a cache that has seen tokens. It is streamed but for its last token,
    # because several tokens of one call see more than the oracle shows them.
    monkeypatch.setattr("sink_cache.steps._REBASE_EVERY", 10)
    model, cache = tiny_model(model_type), new_cache(compileable=compileable)
    options = {"custom_generate": endless, "keep_tokens": 100, "max_new_tokens": 30, **PLAIN}
    first = model.generate(tokens(5), **{name: cache}, **options)
    turn = torch.cat([first[:, -1:], tokens(1, seed=1)], dim=1)
    for _ in stream(model, turn[:, :-1], cache):
        pass
    second = model.generate(turn[:, -1:], return_dict_in_generate=True, **{name: cache}, **options)
    said = torch.cat([first, second.sequences], dim=1)
    assert cache.get_seq_length() == said.shape[1] - 1 == 65
    expected = greedy(model, said, 5)
    assert torch.equal(first[:, 5:], expected[:, :30])
    assert torch.equal(second.sequences[:, 1:], expected[:, 31:])
    assert next(iter(cache_kwargs(None))) in second


@BOTH_NAMES
def test_endless_without_a_cache_of_ours_says_so(llama: PreTrainedModel, name: str) -> None:
    with pytest.raises(TypeError, match=r"endless needs .*SinkWindowCache.*DynamicCache"):
        llama.generate(tokens(5), custom_generate=endless, **{name: DynamicCache()}, **PLAIN)


@pytest.fixture(scope="module")
def lora() -> tuple[Any, PreTrainedModel]:
    """A model with an adapter beside its queries, keys and values, and the same with the adapter merged."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = peft.LoraConfig(
            r=4, target_modules=["q_proj", "k_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
        )
        model = peft.get_peft_model(tiny_model("llama"), config).eval()
    return model, copy.deepcopy(model).merge_and_unload()


@TAKEN_NAMES
@torch.no_grad()
def test_lora(lora: tuple[Any, PreTrainedModel], name: str) -> None:
    model, merged = lora
    out = model.generate(input_ids=tokens(5), max_new_tokens=20, **{name: new_cache()}, **PLAIN)
    assert torch.equal(out[:, 5:], greedy(merged, out, 5))
    cache, ids = new_cache(), tokens(20)
    logits = torch.cat([model(ids[:, t : t + 1], **{name: cache}).logits for t in range(20)], dim=1)
    assert relative_error(logits, streamed_logits(merged, ids, N_SINK, WINDOW)) <= TOLERANCE


@BOTH_NAMES
def test_endless_with_lora(lora: tuple[Any, PreTrainedModel], name: str) -> None:
    model, merged = lora
    options = {"custom_generate": endless, "keep_tokens": 100, "max_new_tokens": 30, **PLAIN}
    out = model.generate(input_ids=tokens(5), **{name: new_cache()}, **options)
    assert torch.equal(out[:, 5:], greedy(merged, out, 5))


# --- what we call ourselves ---


def test_cache_kwargs_has_the_name_that_warns_of_nothing(
    llama: PreTrainedModel, lora: tuple[Any, PreTrainedModel]
) -> None:
    # Also where a forward names no cache and hands its keywords on, as PEFT's does.
    assert cache_kwargs(None) == {"cache" if TAKES_CACHE else "past_key_values": None}
    for model in (llama, tiny_model("gemma3"), lora[0], torch.compile(llama)):
        cache = new_cache()
        assert cache_kwargs(cache, model) == {cache_name(llama): cache}
    for kwargs in (cache_kwargs(new_cache()), cache_kwargs(new_cache(), llama)):
        with no_renaming_is_shown():
            llama.generate(tokens(5), max_new_tokens=12, **kwargs, **PLAIN)


def test_stream_verify_and_endless_warn_of_no_name(llama: PreTrainedModel, lora: tuple[Any, PreTrainedModel]) -> None:
    for model in (llama, tiny_model("gemma3"), lora[0]):
        with no_renaming_is_shown():
            ids, cache = tokens(30), new_cache()
            logits = torch.cat(list(stream(model, ids, cache, chunk_size=7)), dim=1)
            assert verify(model) < 1e-4
            kept = model.generate(
                input_ids=tokens(1), custom_generate=endless, max_new_tokens=20, **cache_kwargs(cache), **PLAIN
            )
        assert kept.shape == (1, N_SINK + WINDOW)
        plain = lora[1] if model is lora[0] else model
        assert relative_error(logits, streamed_logits(plain, ids, N_SINK, WINDOW)) <= TOLERANCE


@pytest.mark.parametrize("folder", ["sink_cache", "benchmarks", "examples", "hub", "tests"])
@torch.no_grad()
def test_a_warning_that_python_shows_is_known_by_its_caller(llama: PreTrainedModel, folder: str) -> None:
    # What watches the whole suite (tests/conftest.py) would see nothing if transformers warned in another way.
    code = compile("\nllama(ids, past_key_values=cache)\n", ROOT / folder / "caller.py", "exec")
    calls = {"llama": llama, "ids": tokens(3), "cache": DynamicCache()}
    with warned_of_us() as lines, warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        exec(code, calls)
    renamed = [warning for warning in shown if "past_key_values" in str(warning.message)]
    assert bool(renamed) == TAKES_CACHE
    assert set(lines) == ({f"{folder}/caller.py:2"} if renamed and folder != "tests" else set())


@pytest.mark.skipif(not TAKES_CACHE, reason="outputs are not renamed")
@pytest.mark.parametrize("expression", ["output.past_key_values", "output['past_key_values']"])
@torch.no_grad()
def test_an_output_that_is_read_by_its_old_name_is_known_by_its_caller(llama: PreTrainedModel, expression: str) -> None:
    output = llama(tokens(3), **cache_kwargs(DynamicCache(), llama))
    with warned_of_us() as lines:
        eval(compile(expression, ROOT / "benchmarks" / "reader.py", "eval"), {"output": output})
    assert set(lines) == {"benchmarks/reader.py:1"}


# --- examples, and the README ---


@pytest.fixture
def folder(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    """A tiny model that never ends its text, in a folder."""
    model = tiny_model("llama")
    model.generation_config.eos_token_id = None
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "main, says",
    [
        # Until the first token is evicted, which the 21st after the prompt of 10 does not see.
        (generate_example.main, r"Capacity 20: the first (2[1-9]|[3-5].) of 60 tokens are the same"),
        (endless_example.main, r"\[59 tokens, the last at position"),
    ],
)
def test_examples_run_without_a_warning_of_the_name(
    main: Callable[[], None],
    says: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    prompt = " ".join(f"w{20 + i}" for i in range(10))
    options = ["--prompt", prompt, "--n-sink", "4", "--window", "16", "--max-new-tokens", "50"]
    monkeypatch.setattr(sys, "argv", ["example", "--model", str(folder), *options])
    with no_renaming_is_shown():
        main()
    assert re.search(says, capsys.readouterr().out)


# --- the code of the README and of the pages ---

SHORTER = {  # sizes for a tiny model that reads 17 tokens in the quick start
    "window=252": "window=8",
    "window=1020": "window=30",
    "window=1000": "window=30",
    "tokens=5000": "tokens=50",
    "range(5000)": "range(50)",
    "tokens=600": "tokens=50",
    "tokens=500": "tokens=9",
    "tokens=200": "tokens=9",
    "tokens=60": "tokens=6",
    "2000 == 1999": "20 == 19",
    "max_streams=64": "max_streams=2",
}


def blocks_of(page: str) -> list[str]:
    """The Python code of a page, with shorter texts."""
    blocks = [part.partition("```")[0] for part in (ROOT / page).read_text().split("```python\n")[1:]]
    for written, run in SHORTER.items():
        blocks = [block.replace(written, run) for block in blocks]
    return blocks


PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]


@TAKEN_NAMES
@pytest.mark.parametrize("page", [page for page in PAGES if blocks_of(page)])
def test_the_code_of_the_pages_runs(
    page: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    # As it stands there, after the quick start of the README.
    monkeypatch.chdir(folder)
    for auto in (AutoModelForCausalLM, AutoTokenizer):
        load = auto.from_pretrained
        monkeypatch.setattr(auto, "from_pretrained", lambda _, load=load: load(folder))
    quick_start, *recipes = blocks_of("README.md")
    state: dict[str, Any] = {}
    for block in [quick_start, *(recipes if page == "README.md" else blocks_of(page))]:
        if name == "cache":
            block = block.replace("past_key_values=", "cache=")
        with no_renaming_is_shown() if name == "cache" else contextlib.nullcontext():
            exec(compile(block, page, "exec"), state)
    prompt = state["inputs"].input_ids.shape[1]
    assert f"[{prompt + 49} tokens so far, room for 12 in " in capsys.readouterr().out
    read = {  # by the last cache of the page
        "README.md": prompt - 2,
        "docs/semantics.md": prompt + 49,
        "docs/speed.md": prompt + 49,
    }
    assert state["cache"].get_seq_length() == read.get(page, prompt + 49)
