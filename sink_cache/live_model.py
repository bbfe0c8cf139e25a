"""What a live model has that its twin cannot have: modules replaced, patched or hooked on the instance.

A twin has the model's class, config and buffers (see twin.py). What was changed on the instance itself is not in it, so the
rotation that the twin tells may not be the model's. The modules that decide are compared: those that use the cache (attention),
and those that hold positions (rotary embeddings). What libraries do to a model they may do: other weights, adapters and
quantised linears are below these modules, and hooks of offloading and parallelism move tensors without changing them.
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
    """What a twin has at one place.

    Attributes:
        module_class (`type`): the module's class.
        forward (`Callable`): the function of the class, when the twin was made.
        buffers (`frozenset[str]`): the names of the module's own buffers.
    """

    module_class: type[torch.nn.Module]
    forward: Callable[..., Any]
    buffers: frozenset[str]


def known_modules(twin: PreTrainedModel, attention: Iterable[torch.nn.Module]) -> dict[str, KnownModule]:
    """The modules of a twin that decide what positions mean, by their path.

    Args:
        twin (`PreTrainedModel`): the twin.
        attention (`Iterable[torch.nn.Module]`): its modules that use the cache.
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
    """Whether a class has got another `forward` since the twin was made: it has to be made anew."""
    return any(module.module_class.forward is not module.forward for module in known.values())


def differences(text: PreTrainedModel, known: dict[str, KnownModule]) -> list[str]:
    """What was changed on the instance `text` of a text model, each as a sentence that begins with the module's path."""
    modules = without_wrappers(text)
    found = []
    for path, twins in known.items():
        difference = "is not there" if path not in modules else _difference(modules[path], twins)
        if difference:
            found.append(f"{path} {difference}")
    return found


def _difference(module: torch.nn.Module, twins: KnownModule) -> str:
    name = twins.module_class.__name__
    # Sharding makes a subclass of the class on the fly, which has its forward.
    if not isinstance(module, twins.module_class) or type(module).forward is not twins.forward:
        return f"is a {type(module).__name__}, and the model's class makes a {name} there"
    if getattr(forward_before_libraries(module), "__func__", None) is not twins.forward:
        return f"has a forward of its own, and not that of its class {name}"
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    if foreign := next((hook for hook in hooks if not is_of_library(hook)), None):
        return f"has a hook ({getattr(foreign, '__qualname__', type(foreign).__name__)})"
    if more := sorted(set(_own_buffers(module)) - twins.buffers):
        return f"has a buffer {more[0]}, which its class {name} does not make"
    return ""


# What `verify` has found exact, as it was then.
_verified: weakref.WeakKeyDictionary[PreTrainedModel, list[str]] = weakref.WeakKeyDictionary()


def accept(text: PreTrainedModel, known: dict[str, KnownModule]) -> None:
    """Lets this model be used as it is, because it was verified."""
    _verified[text] = differences(text, known)


def refuse_changed(text: PreTrainedModel, known: dict[str, KnownModule]) -> None:
    """Refuses a model that was changed on its instance, unless it was verified like that.

    Raises:
        NotImplementedError: with the module and what is different.
    """
    found = differences(text, known)
    if found and found != _verified.get(text):
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise NotImplementedError(
            f"SinkWindowCache cannot know how this {type(text).__name__} uses positions, because it was changed on its "
            f"instance: {found[0]}{more}. Call verify(model), which measures whether the cache is exact on it: if it is, "
            "the model is accepted as it is then. Else undo the change, or use DynamicCache."
        )
