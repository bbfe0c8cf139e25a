"""The example that reads a long text with two caches, with a tiny model whose words are its tokens."""

import math
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerFast

from examples import collapse

from .families import tiny_model
from .oracle import streamed_logits

TRAINED = 128  # positions of the tiny model


@pytest.fixture
def folder(tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny model and a text of 150 tokens; lines of 40 tokens, in chunks of 20."""
    monkeypatch.setattr(collapse, "ROW", 40)
    monkeypatch.setattr(collapse, "CHUNK", 20)
    monkeypatch.chdir(tmp_path)
    model = tiny_model("llama")
    model.config.max_position_embeddings = TRAINED
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(20, 90, (150,), generator=generator).tolist()
    (tmp_path / "text.txt").write_text(" ".join(f"w{word}" for word in words))
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    sizes = ["--n-sink", "2", "--window", "14", "--model", ".", "--text", "text.txt"]
    monkeypatch.setattr(sys, "argv", ["collapse", *sizes, *options])
    collapse.main()


def perplexities(logits: torch.Tensor, ids: torch.Tensor, stops: list[int]) -> list[float]:
    nll = F.cross_entropy(logits[0], ids[0, 1:], reduction="none")
    return [math.exp(nll[max(0, stop - 40) : stop].mean()) for stop in stops]


@torch.no_grad()
def test_each_row_has_the_perplexity_of_its_own_tokens(
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # Off by one token, a chunk that is scored twice, or the two caches mixed up, would be other numbers.
    readings: list[Any] = []
    monkeypatch.setattr(
        collapse, "Reading", lambda *args, kind=collapse.Reading: readings.append(kind(*args)) or readings[-1]
    )
    run(monkeypatch, "--tokens", "145")
    dense, ours = readings
    model = tiny_model("llama")
    ids = tokenizer((folder / "text.txt").read_text(), return_tensors="pt").input_ids[:, :146]
    stops = [40, 80, 120, 145]
    for reading, logits in (
        (dense, model(ids[:, :-1]).logits),
        (ours, streamed_logits(model, ids[:, :-1], 2, 14)),
    ):
        assert [row.tokens for row in reading.rows] == stops
        assert [row.perplexity for row in reading.rows] == pytest.approx(perplexities(logits, ids, stops), rel=1e-4)
        assert [row.tokens_per_second > 0 for row in reading.rows] == [True] * 4
    assert dense.rows[-1].cache_mib == pytest.approx(145 / 40 * dense.rows[0].cache_mib)
    assert len({row.cache_mib for row in ours.rows}) == 1

    out = capsys.readouterr().out
    lines = out.splitlines()
    before, mark, after = (next(i for i, line in enumerate(lines) if begin in line) for begin in ("120", "128", "145"))
    assert before < mark < after
    assert "After 145 tokens, 17 more than the 128 that this model was trained on: perplexity" in out
    assert (folder / "build" / "collapse.png").stat().st_size > 1000


def test_ctrl_c_ends_it_with_what_there_is(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chunks = iter(range(100))
    split = collapse.Reading.read_chunk

    def read_chunk(self: Any) -> int:
        if next(chunks) == stop_at:
            signal.raise_signal(signal.SIGINT)
        return split(self)

    monkeypatch.setattr(collapse.Reading, "read_chunk", read_chunk)
    stop_at = 8  # the fifth chunk of the first cache
    run(monkeypatch, "--tokens", "145")
    assert "After 80 tokens: perplexity" in capsys.readouterr().out
    assert (folder / "build" / "collapse.png").exists()
    chunks, stop_at = iter(range(100)), 0
    with pytest.raises(SystemExit, match="stopped before 40 tokens were read"):
        run(monkeypatch, "--tokens", "145")


@pytest.mark.parametrize(
    "options, says",
    [
        (["--tokens", "150"], r"\Aerror: the text has 150 tokens; choose --tokens below that, or a longer --text\Z"),
        (["--text", "model.safetensors"], r"\Aerror: model.safetensors is not a text in UTF-8\Z"),
    ],
)
def test_a_mistake_is_answered_in_one_line(
    folder: Path, options: list[str], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match=says):
        run(monkeypatch, *options)
