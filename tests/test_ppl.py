"""`benchmarks.ppl`: the right tokens in the right windows, each scored once, and numbers that do not depend on how.

Reference paths: windows written out by hand, forwards over just these tokens, and the oracle, which shares no code with
the library. Our path: the harness, from its functions up to the command line.
"""

import itertools
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import evaluate
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from benchmarks import harness, models, ppl
from benchmarks.arms import Arm
from benchmarks.harness import BenchmarkError

from .oracle import streamed_logits

VOCAB = 61
TRAINED = 48  # positions of the tiny model; the samples of the command line's tests are longer
ROOT = Path(__file__).parents[1]
NO_BAR = harness.progress_bar(disable=True)


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"num_key_value_heads": 2, "vocab_size": VOCAB, "max_position_embeddings": TRAINED}
    config = LlamaConfig(**sizes, **more, initializer_range=0.3)  # so that what is attended to matters
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_llama()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models, and a tokenizer whose words are `w0`, `w1` …."""
    folder = tmp_path_factory.mktemp("ppl")
    tiny_llama().save_pretrained(folder / "tiny")
    words = WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder / "tiny")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder / "gpt2")
    gpt2 = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=VOCAB, n_positions=128)
    GPT2LMHeadModel(gpt2).save_pretrained(folder / "gpt2")
    ids = np.random.default_rng(0).integers(VOCAB, size=200)
    (folder / "text.txt").write_text(" ".join(f"w{i}" for i in ids), encoding="utf-8")
    return folder


def random_ids(batch: int, tokens: int) -> torch.Tensor:
    return torch.randint(VOCAB, (batch, tokens), generator=torch.Generator().manual_seed(1))


def nll(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return the loss of all tokens but the first, `[batch, tokens - 1]`, from the logits of all tokens but the last."""
    return -logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]


def run_of(model: PreTrainedModel, ids: torch.Tensor, **settings: Any) -> ppl.Run:
    everything = np.ones((len(ids), ids.shape[1] - 1), dtype=bool)
    args = SimpleNamespace(**{"n_sink": 2, "chunk_size": 1, "batch_size": 4} | settings)
    loaded, state = models.LoadedModel(model, None, "tiny"), SimpleNamespace(num_processes=1, process_index=0)
    return ppl.Run(loaded, args, list(ids), everything, everything, state)


def reading_of(run: ppl.Run, ids: torch.Tensor, name: str, capacity: int | None = None) -> ppl.Reading:
    batch = ppl.Batch(list(range(len(ids))), ids)
    return ppl.Reading(run, batch, Arm(name, capacity), run.recompute_sample, NO_BAR)


def measured(
    model: PreTrainedModel, ids: torch.Tensor, name: str, capacity: int | None = None, **settings: Any
) -> np.ndarray:
    reading = reading_of(run_of(model, ids, **settings), ids, name, capacity)
    while reading.take_turn():
        pass
    return reading.scores()["nll"]


# --- which tokens are scored -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tokens, samples",
    [(2, [[0, 1]]), (4, [[0, 1, 2, 3]]), (5, [[0, 1, 2, 3], [3, 4]]), (7, [[0, 1, 2, 3], [3, 4, 5, 6]])],
)
def test_samples_written_out_by_hand(tokens: int, samples: list[list[int]]) -> None:
    cut = models.cut(torch.arange(tokens), max_tokens=3)
    assert [sample.tolist() for sample in cut] == samples
    # Every token but the very first of the text is predicted exactly once.
    assert [token for sample in cut for token in sample.tolist()[1:]] == list(range(1, tokens))


def test_a_number_of_samples_means_full_ones() -> None:
    assert [s.tolist() for s in models.cut(torch.arange(9), 3, num_samples=2)] == [[0, 1, 2, 3], [3, 4, 5, 6]]
    with pytest.raises(BenchmarkError, match="9 tokens, but 3 samples of 3 need 10"):
        models.cut(torch.arange(9), 3, num_samples=3)


def test_recompute_windows_written_out_by_hand() -> None:
    seen: list[list[int]] = []

    class Spy(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
            assert not use_cache
            seen.extend(input_ids.tolist())
            return SimpleNamespace(logits=torch.zeros(*input_ids.shape, VOCAB))

        def _supports_logits_to_keep(self) -> bool:
            return False

    everything = torch.ones(1, 6, dtype=torch.bool)
    list(ppl.score_recomputed(Spy(), torch.arange(7)[None], everything, 3, 2, NO_BAR))
    # The first window predicts tokens 1, 2 and 3. Each other window predicts the token after its last: 4, 5 and 6.
    assert seen == [[0, 1, 2], [1, 2, 3], [2, 3, 4], [3, 4, 5]]


def test_which_tokens_are_scored() -> None:
    samples = [torch.arange(5), torch.arange(3)]
    assert ppl.scored_tokens(samples, 1).tolist() == [[True] * 4, [True, True, False, False]]
    assert ppl.scored_tokens(samples, 2).tolist() == [[False, True, True, True], [False, True, False, False]]
    scored = ppl.scored_tokens([torch.arange(101), torch.arange(101), torch.arange(51)], 11)
    sample = ppl.spread_sample(scored, 22)  # of recompute, evenly
    assert not (sample & ~scored).any()
    assert sample.sum() == 22
    assert sample.sum(axis=1).tolist() == pytest.approx([9, 9, 4], abs=1)
    assert (ppl.spread_sample(scored, 10_000) == scored).all()


def test_batches_hold_each_sample_once_and_only_equal_lengths() -> None:
    samples = [torch.full((6,), i) for i in range(5)] + [torch.full((3,), 5)]
    batches = ppl.cut_into_batches(samples, batch_size=2)
    assert [batch.samples for batch in batches] == [[0, 1], [2, 3], [4], [5]]
    assert [batch.ids[:, 0].tolist() for batch in batches] == [[0, 1], [2, 3], [4], [5]]


# --- the right numbers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method, capacity, chunk_size",
    [("sink", 6, 1), ("sink", 6, 64), ("window", 6, 3), ("sink", 30, 3), ("sink", 40, 64)],
)
def test_bounded_methods_equal_the_oracle(model: LlamaForCausalLM, method: str, capacity: int, chunk_size: int) -> None:
    # 30 tokens are read: more than the capacity, exactly as many, and fewer.
    ids = random_ids(2, 31)
    n_sink = 2 if method == "sink" else 0
    expected = nll(streamed_logits(model, ids[:, :-1], n_sink, capacity - n_sink), ids)
    got = measured(model, ids, method, capacity, chunk_size=chunk_size)
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_sinks_that_are_line_breaks_come_before_the_text(model: LlamaForCausalLM) -> None:
    ids = random_ids(2, 31)
    breaks = torch.full((2, 2), ord("\n"))  # of a model without a tokenizer
    logits = streamed_logits(model, torch.cat([breaks, ids[:, :-1]], dim=1), n_sink=2, window=6)[:, 2:]
    got = measured(model, ids, "line-breaks", 8, chunk_size=7)
    np.testing.assert_allclose(got, nll(logits, ids), atol=1e-4)


@pytest.mark.parametrize("capacity, chunk_size", [(4, 33), (5, 5), (8, 2), (16, 5)])
def test_chunks_and_steps_agree(model: LlamaForCausalLM, capacity: int, chunk_size: int) -> None:
    ids = random_ids(2, 42)
    for method in ("dense", "sink", "window"):
        bound = None if method == "dense" else capacity
        steps = measured(model, ids, method, bound)
        chunks = measured(model, ids, method, bound, chunk_size=chunk_size)
        np.testing.assert_allclose(chunks, steps, atol=1e-3, err_msg=method)


@pytest.mark.parametrize("chunk_size", [1, 7, 64])
def test_dense_equals_one_forward(model: LlamaForCausalLM, chunk_size: int) -> None:
    ids = random_ids(3, 31)
    with torch.no_grad():
        expected = nll(model(ids[:, :-1]).logits, ids)
    np.testing.assert_allclose(measured(model, ids, "dense", chunk_size=chunk_size), expected, atol=1e-4)
    np.testing.assert_allclose(measured(model, ids, "dense-batched"), expected, atol=1e-4)


def test_recompute_equals_a_fresh_forward_for_every_token(model: LlamaForCausalLM) -> None:
    ids = random_ids(2, 21)
    with torch.no_grad():
        last = [model(ids[:, max(0, t - 8) : t]).logits[:, -1:] for t in range(1, 21)]
    expected = nll(torch.cat(last, dim=1), ids)
    np.testing.assert_allclose(measured(model, ids, "recompute", 8, chunk_size=16), expected, atol=1e-4)


def test_accuracy_counts_the_first_choice() -> None:
    targets = torch.tensor([[1, 2, 0, 2]])
    logits = torch.nn.functional.one_hot(torch.tensor([[1, 2, 1, 2]]), 3).float() * 5
    pieces = [logits[:, :1], logits[:, 1:3], logits[:, 3:]]
    ((losses, correct),) = ppl.score(pieces, targets, NO_BAR)
    assert correct.tolist() == [[True, True, False, True]]
    # By hand: the right token has a logit 5 above two others, or 5 below the preferred token.
    right = math.log(1 + 2 * math.exp(-5))
    np.testing.assert_allclose(losses, [[right, right, right + 5, right]], rtol=1e-5)


def test_the_metric_is_exact_under_any_batching(tmp_path: Path) -> None:
    pieces = {"nll_sum": [30.0, 4.0, 6.0], "correct": [1, 2, 3], "tokens": [10, 4, 6]}
    metric = evaluate.load(str(ROOT / "benchmarks" / "perplexity_metric"), cache_dir=str(tmp_path))
    for batches in ([0, 3], [0, 1, 3], [0, 1, 2, 3]):
        for start, stop in itertools.pairwise(batches):
            metric.add_batch(**{name: values[start:stop] for name, values in pieces.items()})
        assert metric.compute() == {
            "perplexity": pytest.approx(math.exp(40 / 20), rel=1e-12),
            "accuracy": 6 / 20,
            "nll_per_token": 2.0,
            "tokens": 20,
        }
    for bad in ({"nll_sum": [math.nan], "tokens": [3]}, {"nll_sum": [0.0], "tokens": [0]}):
        with pytest.raises(ValueError, match="perplexity"):
            metric.compute(correct=[0], **bad)


def test_wikitext_is_the_original_file_again(monkeypatch: pytest.MonkeyPatch) -> None:
    # The first line of the dataset is empty, which once crashed a harness that read line by line.
    lines = {"text": ["", " = A title = \n", "", " A paragraph . \n"]}
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: lines)
    assert models.wikitext(**models.WIKITEXT).text == " \n = A title = \n \n A paragraph . \n"


# --- the command line ------------------------------------------------------------------------------------------------


def run(folder: Path, output: Path, *more: str, text: str = "text.txt", model: str = "tiny") -> int:
    argv = ["--model", str(folder / model), "--text-file", str(folder / text), "--output", str(output)]
    return harness.run(ppl.main, [*argv, *SMALL, *more])


SMALL = ("--device", "cpu", "--max-tokens", "64", "--capacities", "8", "16")
RECOMPUTE = ("--recompute-tokens", "20")


def result_in(output: Path) -> dict[str, Any]:
    (path,) = output.glob("ppl-*.json")
    return harness.read_json(path)


def test_a_run_writes_table_and_result(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder, tmp_path, "--batch-size", "2", *RECOMPUTE) == 0
    printed = capsys.readouterr().out
    result = result_in(tmp_path)
    assert str(folder) not in json.dumps(result)
    assert result["model"]["trained_context"] == TRAINED
    assert [(row["arm"], row["capacity"]) for row in result["rows"]] == [
        ("dense", None),
        *((method, capacity) for method in ("sink", "window") for capacity in (8, 16)),
        ("dense-batched", None),
        *(("recompute", capacity) for capacity in (8, 16)),
    ]
    for row in result["rows"]:
        assert row["arm"] in printed
        assert row["perplexity"] == pytest.approx(math.exp(row["nll_per_token"]))
        # 200 words are 64 + 64 + 64 + 7 predictions.
        assert row["tokens"] == (20 if row["arm"] == "recompute" else 199)
        assert sum(one["tokens"] for one in row["samples"]) == row["tokens"]
        assert sum(one["tokens"] for one in row["by_position"]) == row["tokens"]
        assert row["seconds"] > 0
        assert row["same_tokens"]["tokens"] == 20
        # The raw sums of the file give the perplexity again.
        total = sum(one["nll_sum"] for one in row["samples"])
        assert math.exp(total / row["tokens"]) == pytest.approx(row["perplexity"])
    dense, sink, _, _, _, batched, *_ = result["rows"]
    assert batched["largest_nll_difference_from_dense"] < 1e-4
    assert batched["perplexity"] == pytest.approx(dense["perplexity"], rel=1e-5)
    head_dim, kv_heads, layers = 8, 2, 2
    assert dense["cache_bytes"] == 64 * 2 * head_dim * kv_heads * layers * 4
    assert sink["cache_bytes"] == (8 * 2 + 4) * head_dim * kv_heads * layers * 4  # and the sinks' pristine keys
    assert dense["warning"] == f"beyond the trained context of {TRAINED} positions"
    assert sink["warning"] == ""
    assert dense["within_trained_context"]["tokens"] + dense["beyond_trained_context"]["tokens"] == 199


def test_several_numbers_of_sinks_have_rows_of_their_own(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--arms", "sink", "window", "line-breaks", "--n-sinks", "0", "2")
    assert run(folder, tmp_path / "none", *options) == 0
    assert "no token for a line break" in result_in(tmp_path / "none")["rows"][-1]["reason"]
    monkeypatch.setattr(models, "line_break", lambda _: 3)
    assert run(folder, tmp_path, *options) == 0
    rows = {(row["arm"], row["n_sink"], row["capacity"]): row["perplexity"] for row in result_in(tmp_path)["rows"]}
    assert list(rows) == [
        *(("sink", n_sink, capacity) for capacity in (8, 16) for n_sink in (0, 2)),
        *(("window", 0, capacity) for capacity in (8, 16)),
        *(("line-breaks", 2, capacity) for capacity in (8, 16)),
    ]
    assert rows["sink", 0, 8] == rows["window", 0, 8]
    assert run(folder, tmp_path / "default", "--arms", "sink", "--n-sink", "2") == 0
    assert rows["sink", 2, 8] == result_in(tmp_path / "default")["rows"][0]["perplexity"]
    assert rows["sink", 2, 8] != rows["line-breaks", 2, 8]


def test_two_processes_give_the_numbers_of_one(folder: Path, tmp_path: Path) -> None:
    options = ("--batch-size", "1", "--methods", "dense", "recompute", "--capacities", "8", *RECOMPUTE)
    assert run(folder, tmp_path / "one", *options) == 0
    launch = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no"
    launch = [sys.executable, *launch.split(), "--dynamo_backend", "no", "--main_process_port", "0"]
    files = ["--model", folder / "tiny", "--text-file", folder / "text.txt", "--output", tmp_path / "two"]
    command = [*launch, "-m", "benchmarks.ppl", *files, *SMALL, *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "past_key_values" not in done.stderr  # transformers' warning of a renamed argument
    one, two = result_in(tmp_path / "one"), result_in(tmp_path / "two")
    assert (one["run"]["num_processes"], two["run"]["num_processes"]) == (1, 2)
    for row_of_one, row_of_two in zip(one["rows"], two["rows"], strict=True):
        for name in ("arm", "capacity", "tokens", "accuracy", "cache_bytes"):
            assert row_of_one[name] == row_of_two[name]
        for a, b in zip(row_of_one["samples"], row_of_two["samples"], strict=True):
            assert a == pytest.approx(b, rel=1e-6)
    assert done.stdout.count("× dense") == 1  # only the main process prints


def no_connection(*_: Any, **__: Any) -> None:
    raise OSError("We couldn't\n connect")


@pytest.mark.parametrize("what", ["model", "text"])
def test_a_hub_out_of_reach_is_said_so(
    what: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(AutoConfig, "from_pretrained", no_connection)
    monkeypatch.setattr("datasets.load_dataset", no_connection)
    text = ["--text-file", str(folder / "text.txt")] if what == "model" else []
    assert harness.run(ppl.main, [*SMALL, *text, "--output", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "We couldn't connect; what is here can be named with --model and --text-file" in error


def test_what_cannot_be_measured_says_why_and_the_rest_is(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(folder, tmp_path, "--arms", "dense", "sink", model="gpt2") == 0
    dense, *sinks = result_in(tmp_path)["rows"]
    assert dense["perplexity"] > 1
    assert all(row["perplexity"] is None and "'gpt2'" in row["reason"] for row in sinks)
    assert run(folder, tmp_path, "--arms", "sink", model="gpt2") == 2
    assert "nothing could be measured" in capsys.readouterr().err


def test_in_step_mode_methods_take_turns_and_share_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    take_turn = ppl.Reading.take_turn

    def noted(reading: ppl.Reading, everything: bool = False) -> bool:
        order.append("all of it" if everything else str(reading.arm))
        return take_turn(reading, everything)

    monkeypatch.setattr(ppl.Reading, "take_turn", noted)
    options = ("--mode", "step", "--max-tokens", "150", "--num-samples", "1", "--capacities", "8")
    assert run(folder, tmp_path, *options, "--recompute-tokens", "5") == 0
    # Each is warmed up; then dense, sink and window alternate until 64 + 64 + 22 tokens are read.
    assert order == [*["all of it"] * 3, *["dense", "sink 8", "window 8"] * 3, *["all of it"] * 4]
    result = result_in(tmp_path)
    assert (result["run"]["warm_up_tokens"], result["run"]["turn_tokens"]) == (32, 64)
    for row in result["rows"]:
        (batch,) = row["batches"]
        assert len(batch["turn_seconds"]) == (3 if row["arm"] in ppl.TAKING_TURNS else 1)
        assert sum(batch["turn_seconds"]) == pytest.approx(row["seconds"], rel=1e-3)
    assert run(folder, tmp_path / "alone", *options, "--methods", "sink") == 0
    (alone,) = result_in(tmp_path / "alone")["rows"]
    for what in ("perplexity", "accuracy", "tokens", "cache_bytes", "samples"):
        assert result["rows"][1][what] == alone[what]


@pytest.mark.parametrize(
    "call, error, reason",
    [
        (5, NotImplementedError(), "NotImplementedError"),
        (32 + 90 + 5, torch.OutOfMemoryError("CUDA out of memory"), "fewer --arms or --capacities"),
    ],
    ids=["warm-up", "second sample"],
)
def test_one_method_that_fails_in_turns_leaves_the_others(
    call: int, error: Exception, reason: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense_logits, calls = ppl.dense_logits, itertools.count()

    def fails(*args: Any) -> Iterator[torch.Tensor]:
        for logits in dense_logits(*args):
            if next(calls) == call:  # of the model; the first 32 warm up
                raise error
            yield logits

    options = ("--max-tokens", "90", "--mode", "step", "--methods", "dense", "sink", "--capacities", "8")
    if not (whole := folder / "without-failure").exists():
        assert run(folder, whole, *options) == 0
    monkeypatch.setattr(ppl, "dense_logits", fails)
    assert run(folder, tmp_path, *options) == 0
    dense, sink = result_in(tmp_path)["rows"]
    assert dense["perplexity"] is None
    assert reason in dense["reason"]
    assert sink["perplexity"] == result_in(whole)["rows"][1]["perplexity"]
    assert len(sink["batches"]) == 3  # of 90, 90 and 19 tokens


def test_memory_of_turns(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    class Fake:
        """Each turn needs 1000 bytes besides the cache, the second 5000."""

        def __init__(self, device: torch.device) -> None:
            self.bytes = 5000 if next(turns) == 1 else 1000

        def __enter__(self) -> "Fake":
            return self

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(harness, "PeakMemory", Fake)
    ids = random_ids(1, 151)
    for per_token, (name, capacity) in ((2 * 2 * 2 * 8 * 4, ("dense", None)), (0, ("sink", 8))):
        turns = itertools.count()
        reading = reading_of(run_of(model, ids), ids, name, capacity)
        while reading.take_turn():
            pass
        # Before the second turn there were 64 tokens in the cache, before the third 128.
        expected = 64 * per_token + 5000 if per_token else harness.cache_bytes(reading.cache) + 5000
        assert reading.scores()["peak_bytes"] == max(expected, 128 * per_token + 1000)


def test_offline_replaces_nothing_that_was_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A named model must not be replaced: its result would be that of another model.
    assert run(folder, tmp_path / "named", "--offline", "--arms", "sink") == 0
    result = result_in(tmp_path / "named")
    assert (result["model"]["name"], result["data"]["name"]) == ("tiny", "text.txt")
    monkeypatch.setattr(models.smollm2, "fetch", lambda: folder / "tiny")
    monkeypatch.setattr(models, "topics", {"a": (folder / "text.txt").read_text()})
    assert harness.run(ppl.main, ["--offline", "--arms", "sink", *SMALL, "--output", str(tmp_path / "not")]) == 0
    assert result_in(tmp_path / "not")["data"]["name"] == "Python's help topics"
    assert harness.run(ppl.main, ["--offline", "--model", "no/such-model", *SMALL]) == 2
