"""examples/tour.ipynb runs, on a tiny model in the place of SmolLM2; what is stored in it is of a run of SmolLM2."""

import os
import sys
from pathlib import Path

import nbformat
import pytest
from transformers import PreTrainedTokenizerFast

from .families import tiny_model
from .tour import NOTEBOOK, ROOT, executed


def printed(notebook: nbformat.NotebookNode) -> list[str]:
    """The text that each code cell shows."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return ["".join(out.get("text") or out.data["text/plain"] for out in cell.outputs) for cell in cells]


def test_the_tour_runs(tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Its folder is where `benchmarks.smollm2` would put the real one.
    folder = tmp_path / "sink_cache" / "SmolLM2-135M-Instruct"
    tiny_model("llama", max_position_embeddings=512).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *sys.path]))  # for the kernel
    _, first, table, story, talk, error = printed(executed(timeout_s=120))
    assert "128 held" in first
    assert len(table.splitlines()) > 12
    assert "the last 150 held" in talk
    assert "tokens seen" in story
    assert float(error) < 1e-4


def test_what_the_tour_shows_is_of_the_real_model() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    about, *_, error = printed(notebook)
    assert about.startswith("134,515,008 parameters, trained on 8,192 positions")
    assert float(error) < 1e-4
    assert NOTEBOOK.stat().st_size < 50_000
