"""What a live model has that its twin cannot have: modules replaced, patched or hooked on the instance.

A twin has the model's class, config and buffers (see twin.py). It lacks what was changed on the instance, so the model may use
positions differently. The modules that decide this are compared: those that use the cache (attention), and those that hold
positions (rotary embeddings). Changes by libraries are allowed. Other weights, adapters and quantised linears lie below these
modules, and hooks for offloading and parallelism move tensors without changing them.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from .internals import forward_before_libraries, is_of_library, without_wrappers

_OF_POSITIONS = re.compile(r"rotary|rope|position|alibi", re.IGNORECASE)


@dataclass(frozen=True)
class KnownModule:
    """A module of a twin, at one path.

    Attributes:
        module_class (`type`): the module's class.
        forward (`Callable`): the `forward` of the class when the twin was made.
        buffers (`frozenset[str]`): the names of the module's own buffers.
    """

    module_class: type[torch.nn.Module]
    forward: Callable[..., Any]
    buffers: frozenset[str]


def known_modules(twin: PreTrainedModel, attention: Iterable[torch.nn.Module]) -> dict[str, KnownModule]:
    """Returns the modules of a twin that decide what positions mean, by their path.

    Args:
        twin (`PreTrainedModel`): the twin.
        attention (`Iterable[torch.nn.Module]`): the twin's modules that use the cache.
    """
    deciding = {id(module) for module in attention}
    return {
        path: KnownModule(type(module), type(module).forward, frozenset(_own_buffers(module)))
        for path, module in twin.named_modules()
        if id(module) in deciding or _holds_positions(module)
    }


def _holds_positions(module: torch.nn.Module) -> bool:
    if type(module).__module__.startswith("torch.") or next(module.parameters(), None) is not None:
        return False
    return bool(_own_buffers(module)) or bool(_OF_POSITIONS.search(type(module).__name__))


def _own_buffers(module: torch.nn.Module) -> list[str]:
    return [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_floating_point()]


def classes_changed(known: dict[str, KnownModule]) -> bool:
    """Whether a class has another `forward` than when the twin was made, so that a new twin is needed."""
    return any(module.module_class.forward is not module.forward for module in known.values())


def differences(text: PreTrainedModel, known: dict[str, KnownModule]) -> list[str]:
    """Lists what was changed on the instance `text` of a text model, as sentences that begin with a module's path."""
    modules = without_wrappers(text)
    found = []
    for path, expected in known.items():
        difference = "is not there" if path not in modules else _difference(modules[path], expected)
        if difference:
            found.append(f"{path} {difference}")
    return found


def _difference(module: torch.nn.Module, expected: KnownModule) -> str:
    name = expected.module_class.__name__
    # Sharding makes a subclass on the fly, which keeps the class's forward.
    if not isinstance(module, expected.module_class) or type(module).forward is not expected.forward:
        return f"is a {type(module).__name__}, and the model's class makes a {name} there"
    if getattr(forward_before_libraries(module), "__func__", None) is not expected.forward:
        return f"has a forward of its own, and not that of its class {name}"
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    if foreign := next((hook for hook in hooks if not is_of_library(hook)), None):
        return f"has a hook ({getattr(foreign, '__qualname__', type(foreign).__name__)})"
    if more := sorted(set(_own_buffers(module)) - expected.buffers):
        return f"has a buffer {more[0]}, which its class {name} does not make"
    return ""


# Models that `verify` has found exact, with their differences at that time.
_verified: weakref.WeakKeyDictionary[PreTrainedModel, list[str]] = weakref.WeakKeyDictionary()


def accept(text: PreTrainedModel, known: dict[str, KnownModule]) -> None:
    """Lets a verified model be used with its present differences."""
    _verified[text] = differences(text, known)


def refuse_changed(text: PreTrainedModel, known: dict[str, KnownModule]) -> None:
    """Refuses a model that was changed on its instance, unless it was verified with these changes.

    Raises:
        NotImplementedError: with the first changed module and the change.
    """
    found = differences(text, known)
    if found and found != _verified.get(text):
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise NotImplementedError(
            f"SinkWindowCache cannot know how this {type(text).__name__} uses positions, because it was changed on its "
            f"instance: {found[0]}{more}. Call verify(model), which measures whether the cache is exact on it. If it is, "
            "the changed model is accepted. If not, undo the change, or use DynamicCache."
        )
