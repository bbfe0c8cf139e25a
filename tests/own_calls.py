"""Where code of ours makes transformers warn that it has renamed `past_key_values`."""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers.utils import deprecation, generic

ROOT = Path(__file__).parents[1]
OURS = ("sink_cache", "benchmarks", "examples", "hub")


@contextmanager
def warned_of_us() -> Iterator[list[str]]:
    """Collects the lines of ours that made transformers warn of the old name, as "sink_cache/streaming.py:66".

    A call is ours if no code of tests/ lies between it and the warning. It is looked for where transformers warns, because
    Python shows a warning once for each line, and that line is PyTorch's for every call of a model.
    """
    lines: list[str] = []

    def note(message: object) -> None:
        if "past_key_values" in str(message) and (line := _innermost_line()) is not None:
            lines.append(line)

    def warn(message: Any, category: Any = None, stacklevel: int = 1) -> None:
        note(message)
        warnings.warn(message, category, stacklevel=stacklevel + 1)

    log_once = generic.logger.warning_once

    def warning_once(message: Any, *args: Any, **kwargs: Any) -> None:
        note(message)
        log_once(message, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deprecation, "warnings", SimpleNamespace(warn=warn))
        patch.setattr(generic.logger, "warning_once", warning_once, raising=False)
        yield lines


def _innermost_line() -> str | None:
    """The innermost line of this repository among the callers; None if it is a test's."""
    frame = sys._getframe(3)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        # (A virtual environment may lie within the repository.)
        if path.is_relative_to(ROOT) and (folder := path.relative_to(ROOT).parts[0]) in (*OURS, "tests"):
            return None if folder == "tests" else f"{path.relative_to(ROOT)}:{frame.f_lineno}"
        frame = frame.f_back
    return None
