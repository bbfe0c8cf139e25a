"""Types of arguments on the command line, for the benchmarks and the examples."""

import argparse
import math
from collections.abc import Callable
from typing import Any


def at_least(lowest: float, most: float = math.inf, kind: type = int) -> Callable[[str], Any]:
    """Return a `type` for argparse: numbers of this kind from `lowest` to `most`."""

    def number(text: str) -> Any:
        value = kind(text)
        if not value >= lowest:  # also refuses nan
            raise argparse.ArgumentTypeError(f"must be at least {lowest}, but is {text}")
        if value > most:
            raise argparse.ArgumentTypeError(f"must be at most {most}, but is {text}")
        return value

    number.__name__ = kind.__name__  # argparse names it if `text` is no number
    return number
