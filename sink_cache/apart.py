"""Running a model without side effects that other threads or the caller could see.

`torch.set_default_dtype`, `torch.manual_seed` and a logger's level change the whole process. The modes here change one thread:
they fill in what a call leaves to the process's defaults.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# Functions that create tensors and take a `device`. The dtype that `_FLOATING` functions give does not depend on the arguments.
_FLOATING = (torch.empty, torch.zeros, torch.ones, torch.eye, torch.linspace, torch.logspace, torch.rand, torch.randn)
_BY_ARGUMENTS = (torch.full, torch.arange, torch.tensor, torch.as_tensor, torch.scalar_tensor)
_INTEGERS = (torch.randint, torch.randperm, torch.tril_indices, torch.triu_indices)
_MAKERS = frozenset((*_FLOATING, *_BY_ARGUMENTS, *_INTEGERS))


class Defaults(TorchFunctionMode):
    """Creates tensors on this device, and floating-point tensors in float32, unless a call says otherwise."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = torch.device(device)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _MAKERS and not any(isinstance(argument, torch.Tensor) for argument in args[:1]):
            if kwargs.get("device") is None:
                kwargs["device"] = self.device
            if kwargs.get("dtype") is None and (func in _FLOATING or _holds_floats((args, kwargs))):
                kwargs["dtype"] = torch.float32
        result = func(*args, **kwargs)
        if func in _ARITHMETIC and torch.get_default_dtype() is not torch.float32 and _has_default_dtype(result, args):
            return func(*(argument.float() if isinstance(argument, torch.Tensor) else argument for argument in args))
        return result


# Quotients and powers of integers have the default dtype.
_ARITHMETIC = frozenset(
    getattr(owner, name)
    for owner in (torch, torch.Tensor)
    for name in ("div", "true_divide", "pow", "mul", "add", "sub", "exp", "log", "log2", "sin", "cos", "sqrt")
    for name in (name, f"__{name}__", f"__r{name}__", "__truediv__", "__rtruediv__", "__rdiv__")
    if hasattr(owner, name)
)


def _has_default_dtype(result: Any, arguments: Any) -> bool:
    """Whether `result` is a tensor of the default dtype, computed from no floating-point tensor."""
    made_of = any(isinstance(argument, torch.Tensor) and argument.is_floating_point() for argument in arguments)
    return isinstance(result, torch.Tensor) and result.dtype is torch.get_default_dtype() and not made_of


def _holds_floats(arguments: Any) -> bool:
    if isinstance(arguments, dict):
        arguments = arguments.values()
    elif not isinstance(arguments, tuple | list):
        return isinstance(arguments, float)
    return any(map(_holds_floats, arguments))


class OwnRandomNumbers(TorchDispatchMode):
    """Draws random numbers from its own generator instead of the process's."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.generator = torch.Generator("cpu").manual_seed(0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if torch.Tag.nondeterministic_seeded in func.tags:
            func = next((overload for overload in _overloads(func) if _takes_generator_beside(func, overload)), func)
            if "generator" in _arguments(func):
                kwargs["generator"] = self.generator
        return func(*args, **kwargs)


def _arguments(overload: Any) -> list[str]:
    return [argument.name for argument in overload._schema.arguments]


def _overloads(func: Any) -> list[Any]:
    return [getattr(func.overloadpacket, name) for name in func.overloadpacket.overloads()]


def _takes_generator_beside(func: Any, overload: Any) -> bool:
    """Whether `overload` is `func` with a generator: `torch.rand(3)` and `torch.rand(3, generator=...)` are two overloads."""
    names = _arguments(overload)
    return "generator" in names and [name for name in names if name != "generator"] == _arguments(func)


@contextmanager
def apart() -> Iterator[None]:
    """Makes new tensors in its body float32, on the CPU, without gradients; leaves the process's defaults and log alone.

    Random numbers also need `OwnRandomNumbers`. That mode is separate because it slows down every operation.
    """
    with (
        _without_log(),
        Defaults("cpu"),
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast("cpu", enabled=False),
    ):
        yield


@contextmanager
def _without_log() -> Iterator[None]:
    """Drops what transformers logs in this thread."""
    thread = threading.get_ident()

    def is_shown(record: logging.LogRecord) -> bool:
        return record.thread != thread or not record.name.startswith("transformers")

    handlers = [*logging.getLogger("transformers").handlers, *logging.getLogger().handlers]
    for handler in handlers:
        handler.addFilter(is_shown)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(is_shown)
