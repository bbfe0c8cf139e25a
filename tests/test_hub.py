"""The repository for the hub: what it holds, and what a user gets from it who has not installed the package."""

import configparser
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import get_imports, get_relative_import_files

from hub.build import LEFT_OUT, build
from sink_cache import SinkWindowCache, cache_kwargs, endless

from .test_exact import tokens
from .test_generate import PLAIN

ROOT = Path(__file__).parents[1]
N_SINK, WINDOW = 3, 9
SIZES = {"n_sink": N_SINK, "window": WINDOW}
PROMPT = tokens(20)
GREEDY = {**PLAIN, "max_new_tokens": 30}

# What the user asks for; the package gives the same tokens with the options that remain without these.
OF_THE_CODE = ("n_sink", "window", "num_sink_tokens", "window_length", "endless", "compileable", "revision")
CALLS: dict[str, dict[str, Any]] = {
    "greedy": {**GREEDY, **SIZES},
    "older arguments": {**GREEDY, "num_sink_tokens": N_SINK, "window_length": N_SINK + WINDOW},
    "endless": {**GREEDY, **SIZES, "endless": True, "max_new_tokens": 300},  # beyond several rebases
    "endless, compileable": {**GREEDY, **SIZES, "endless": True, "compileable": True},
    "endless, keeps more": {**GREEDY, **SIZES, "endless": True, "keep_tokens": 25},
    "beams": {**GREEDY, **SIZES, "num_beams": 3, "num_return_sequences": 2},
    "sampling": {**GREEDY, **SIZES, "do_sample": True, "num_return_sequences": 2, "top_k": 20},
    "prompt lookup": {**GREEDY, **SIZES, "prompt_lookup_num_tokens": 3},
    "pinned revision": {**GREEDY, **SIZES, "revision": "main"},
}
TURN = {**GREEDY, **SIZES, "turn": tokens(5, seed=1).tolist()}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another cache": (
        {**GREEDY, **SIZES, next(iter(cache_kwargs(None))): [1]},
        "TypeError: the cache is a list. Leave it out",
    ),
    "a cache of another size": (
        {**TURN, "then": {"window": 8}},
        "ValueError: window=8, but the cache that was given has wi",
    ),
    "both names": (
        {**GREEDY, **SIZES, "num_sink_tokens": 3},
        "ValueError: n_sink=3 and num_sink_tokens=3 say the same",
    ),
    "no window": (
        {**GREEDY, "num_sink_tokens": 4, "window_length": 4},
        "ValueError: window_length counts the sinks, too, so it must be more than their number, 4, but is 4",
    ),
    "a negative size": ({**GREEDY, "n_sink": -1}, "ValueError: n_sink must be at least 0, but is -1"),
    "no cache": ({**GREEDY, "use_cache": False}, "ValueError: use_cache=False leaves no cache"),
    "a size of endless": ({**GREEDY, "keep_tokens": 5}, "ValueError: keep_tokens=5 is for endless=True"),
    "beams without end": (
        {**GREEDY, "endless": True, "num_beams": 3},
        "ValueError: endless does greedy decoding and samp",
    ),
}


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "sink_cache"
    build(folder)
    return folder


def outcomes_of_user(tmp_path: Path, model: Path, code: Path | str, calls: list[dict[str, Any]]) -> list[Any]:
    """What the calls give in a process that cannot import the package."""
    calls = [{"input_ids": PROMPT.tolist()} | call for call in calls]
    (tmp_path / "calls.json").write_text(json.dumps(calls))
    arguments = [str(model), str(code), str(tmp_path / "calls.json"), str(tmp_path / "outcomes.json")]
    result = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "hub_user.py"), *arguments],
        env=os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    outcomes: list[Any] = json.loads((tmp_path / "outcomes.json").read_text())
    return outcomes


def of_package(model: PreTrainedModel, call: dict[str, Any], n_sink: int = N_SINK, window: int = WINDOW) -> Any:
    """What the package gives for a call of the user."""
    cache = SinkWindowCache(n_sink, window, compileable=call.get("compileable", False))
    loop = {"custom_generate": endless} if call.get("endless") else {}
    options = {name: value for name, value in call.items() if name not in OF_THE_CODE}
    torch.manual_seed(0)
    return model.generate(PROMPT, **options, **loop, **cache_kwargs(cache)).tolist()


def test_without_the_package(tmp_path: Path, repository: Path, llama: PreTrainedModel) -> None:
    llama.save_pretrained(tmp_path / "model")
    calls = [*CALLS.values(), TURN, *(call for call, _ in REFUSED.values())]
    outcomes = outcomes_of_user(tmp_path, tmp_path / "model", repository, calls)
    for (name, call), outcome in zip(CALLS.items(), outcomes, strict=False):
        assert outcome == of_package(llama, call), name

    text, cache = PROMPT, SinkWindowCache(N_SINK, WINDOW)
    for turn in (TURN["turn"], [[]]):
        text = torch.cat([llama.generate(text, **GREEDY, **cache_kwargs(cache)), torch.tensor(turn).long()], dim=1)
    assert outcomes[len(CALLS)] == text.tolist()

    for (name, (_, words)), outcome in zip(REFUSED.items(), outcomes[len(CALLS) + 1 :], strict=True):
        assert isinstance(outcome, str), name
        assert outcome.startswith(words), name


def test_repository_with_weights(tmp_path: Path, repository: Path, llama: PreTrainedModel) -> None:
    # from_pretrained puts our function in the place of the model's generate(), which would then call itself for ever.
    shutil.copytree(repository, tmp_path / "model")
    llama.save_pretrained(tmp_path / "model")
    calls = [CALLS["greedy"], CALLS["endless"], GREEDY, {**GREEDY, "custom_generate": "owner/name"}]
    greedy, without_end, default, other = outcomes_of_user(tmp_path, tmp_path / "model", "", calls)
    assert greedy == of_package(llama, CALLS["greedy"])
    assert without_end == of_package(llama, CALLS["endless"])
    assert default == of_package(llama, GREEDY, 4, 1020)
    assert other.startswith("ValueError: custom_generate='owner/name' cannot run inside this model's generate()")


BOTH_COPIES = """
import sys, torch
from transformers import AutoModelForCausalLM
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from sink_cache import SinkWindowCache, cache_kwargs, stream
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
ids = torch.arange(8, 38)[None]
own = dict(do_sample=False, max_new_tokens=20, eos_token_id=None, pad_token_id=0)
hubs = dict(custom_generate=sys.argv[2], trust_remote_code=True, n_sink=3, window=9, compileable=True)
outputs, registered, read = set(), set(), set()
for _ in range(2):
    outputs.add(str(model.generate(ids, **own, **cache_kwargs(SinkWindowCache(3, 9, compileable=True))).tolist()))
    outputs.add(str(model.generate(ids, **own, **hubs).tolist()))
    logits = torch.cat(list(stream(model, ids, SinkWindowCache(3, 9), chunk_size=5)), dim=1)
    read.add(str(logits.argmax(-1).tolist()))
    registered.add(ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
try:
    model.generate(ids, **own, **hubs, **cache_kwargs(SinkWindowCache(3, 9, compileable=True)))
except TypeError as reason:
    print(len(outputs), len(read), len(registered), reason)
"""


def test_package_and_repository_in_one_process(tmp_path: Path, repository: Path, llama: PreTrainedModel) -> None:
    # Each copy registers masks of its own. They would pile up if each copy did so whenever another's are on top.
    llama.save_pretrained(tmp_path / "model")
    result = subprocess.run(
        [sys.executable, "-c", BOTH_COPIES, str(tmp_path / "model"), str(repository)],
        env=os.environ
        | {
            "HF_MODULES_CACHE": str(tmp_path / "modules"),
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": os.pathsep.join(sys.path),
        },
        capture_output=True,
        text=True,
    )
    assert result.stdout.startswith("1 1 1 the cache is a SinkWindowCache, of another copy of this code"), result.stderr


def test_repository_holds_what_the_loader_follows_and_nothing_else(repository: Path) -> None:
    code = repository / "custom_generate"
    modules = {path.stem for path in code.glob("*.py")}
    followed = {Path(path).stem for path in get_relative_import_files(code / "generate.py")}
    assert modules == followed | {"generate"}
    package = {path.stem for path in (ROOT / "sink_cache").glob("*.py")}
    assert package >= LEFT_OUT
    assert modules == package - LEFT_OUT | {"generate"}
    assert {path.name for path in repository.iterdir()} == {"LICENSE", "README.md", "custom_generate"}


def test_modules_ask_for_what_is_there(repository: Path) -> None:
    # The loader refuses a module that imports, anywhere, a package that is not installed. (typing_extensions is torch's.)
    imported = {name for path in (repository / "custom_generate").glob("*.py") for name in get_imports(path)}
    assert imported - sys.stdlib_module_names == {"torch", "transformers", "safetensors", "typing_extensions"}


def test_requirements_are_those_of_the_package(repository: Path) -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lines = (repository / "custom_generate" / "requirements.txt").read_text().splitlines()
    assert lines == setup["options"]["install_requires"].split()
    assert all(re.fullmatch(r"[a-z]+>=[\d.]+", line) for line in lines)  # transformers reads no others


def test_card_names_every_argument(repository: Path) -> None:
    card = (repository / "README.md").read_text()
    code = (repository / "custom_generate" / "generate.py").read_text()
    signature = code.partition("model: PreTrainedModel,")[2].partition("**kwargs")[0]
    arguments = re.findall(r"(\w+): ", signature)
    assert set(re.findall(r"^- `(\w+)`", card, flags=re.MULTILINE)) == set(arguments) - {"args"}
    assert card.startswith("---\n")
    assert "- custom_generate\n" in card.split("---")[1]
