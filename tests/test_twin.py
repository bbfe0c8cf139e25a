"""Learning what a model's positions mean happens in one thread, and no other one can tell."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers.utils import logging as transformers_logging

from sink_cache import SinkWindowCache, twin
from sink_cache.cache import error_of
from sink_cache.model_scheme import scheme_of_class

from .families import tiny_model
from .test_exact import one_by_one, tokens


@contextmanager
def meanwhile(sample: Callable[[], Any]) -> Iterator[list[Any]]:
    """What `sample` returned, again and again, in another thread, while the block ran."""
    samples: list[Any] = []
    running, over = threading.Event(), threading.Event()

    def repeat() -> None:
        while not over.is_set():
            samples.append(sample())
            running.set()

    thread = threading.Thread(target=repeat)
    thread.start()
    running.wait()
    try:
        yield samples
    finally:
        over.set()
        thread.join()


MODELS = pytest.mark.parametrize("model_type", ["llama", "qwen3_next", "mpt"])


@pytest.fixture
def learn_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sink_cache.twin._remembered", {})


@MODELS
@pytest.mark.usefixtures("learn_anew")
def test_other_threads_draw_the_same_random_numbers(model_type: str) -> None:
    model = tiny_model(model_type)
    torch.manual_seed(1)
    with meanwhile(lambda: torch.rand(1)) as draws:
        one_by_one(model, tokens(3), SinkWindowCache(1, 2))
    assert len(draws) > 100
    torch.manual_seed(1)
    assert torch.equal(torch.stack(draws), torch.stack([torch.rand(1) for _ in draws]))


@MODELS
@pytest.mark.usefixtures("learn_anew")
def test_other_threads_see_the_same_defaults(model_type: str) -> None:
    # The default dtype is another one than the twin's, so that a change would show.
    model = tiny_model(model_type)
    positions = SinkWindowCache(1, 2)
    torch.set_default_dtype(torch.float64)
    try:
        with meanwhile(
            lambda: (torch.empty(0).dtype, torch.empty(0).device, torch.utils._device.CURRENT_DEVICE)
        ) as samples:
            positions.prepare_for(model)
    finally:
        torch.set_default_dtype(torch.float32)
    assert len(samples) > 100
    assert set(samples) == {(torch.float64, torch.device("cpu"), None)}


def test_other_threads_may_log(monkeypatch: pytest.MonkeyPatch) -> None:
    records: list[logging.LogRecord] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record)

    monkeypatch.setattr("sink_cache.twin._remembered", {})
    handler, log = Kept(), logging.getLogger("transformers.models.llama")
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_warning()  # the benchmarks, which other tests run in this process, set it to errors
    transformers_logging.add_handler(handler)
    try:
        count = 0

        def sample() -> None:
            nonlocal count
            count += 1
            log.warning("%d", count)
            time.sleep(0.001)  # a thread that never waits makes the other one take twenty times as long

        with meanwhile(sample):
            one_by_one(tiny_model("llama"), tokens(3), SinkWindowCache(1, 2))
    finally:
        transformers_logging.remove_handler(handler)
        transformers_logging.set_verbosity(verbosity)
    assert count > 20
    assert [record.getMessage() for record in records] == [str(i + 1) for i in range(count)]
    assert not handler.filters


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("model_type", ["llama", "gptj", "gemma3_text", "mpt", "deepseek_v2", "falcon_h1"])
def test_the_default_dtype_changes_nothing_that_is_learned(model_type: str, dtype: torch.dtype) -> None:
    model = tiny_model(model_type)
    text = model.base_model
    expected = scheme_of_class(type(text), model.config, error_of)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sink_cache.twin._remembered", {})
        torch.set_default_dtype(dtype)
        try:
            found = scheme_of_class(type(text), model.config, error_of)
        finally:
            torch.set_default_dtype(torch.float32)
    assert found.agrees_with(expected)


@pytest.mark.usefixtures("learn_anew")
def test_learned_twice_it_is_the_same() -> None:
    text = tiny_model("gemma3_text").base_model
    first = scheme_of_class(type(text), text.config, error_of)
    torch.manual_seed(7)
    twin._remembered.clear()
    assert scheme_of_class(type(text), text.config, error_of) == first
