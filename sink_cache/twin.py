"""A small float32 twin of a model, and what it tells about the model's positions.

Conventions of rotation differ from family to family, and no config says which one a model uses. So we run the model's code
instead of reading it. The twin has the model's class and config, random weights, and few heads. Its head size and all that
concerns positions stay. A token that is alone in the context attends only to itself. So between two runs of one token at two
positions only its keys may differ, and they must differ by a rotation. (Either of the two tensors in a layer's cache may be the
one that rotates.) If nothing differs, the model may still count the keys between a query and a key. Then the cache keeps the keys
in order. A model that behaves otherwise, or that does not stream exactly with what was found, is refused.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel

from .apart import Defaults, OwnRandomNumbers, apart
from .internals import (
    DynamicSlidingWindowLayer,
    attention_of,
    cache_kwargs,
    layers_of,
    leave_dtype_open,
    modules_that_use_a_cache,
    set_attention,
    takes_argument,
)
from .live_model import KnownModule, classes_changed, known_modules
from .reference import CannotStream, bounded_layers
from .rotary import NotARotation, Rotation, first_unexplained, fit_rotation

_SMALL = 150_000_000  # parameters that a twin may have
_TOKENS = 16
# A larger relative error of a float32 twin cannot be rounding. (126 layers of Llama have 1e-6, 54 of Zamba 2 have 2e-5. Inkling 2
# has biases for distances. They are small in a twin, and show as 4e-4 and more.)
_EXACT = 1e-4


@dataclass(frozen=True)
class PositionScheme:
    """How a model uses positions, layer by layer.

    Attributes:
        rotations (`dict[int, Rotation]`): for each layer that a sink window replaces, how its keys rotate.
        sliding_window (`int`, *optional*): how many tokens these layers attend to, if they are natively sliding (as in Mistral 7B
            v0.1, where no layer attends to everything).
        max_position (`int`, *optional*): the length of the model's table of positions, if it has one.
        sliding (`dict[int, Rotation]`): for each natively sliding layer beside these, how its keys rotate.
        swapped (`frozenset[int]`): layers that cache what rotates as values, and a latent that does not rotate as keys
            (multi-head latent attention).
        chronological (`bool`): positions are not in the keys but in their order (ALiBi).
        takes_masks (`bool`): the model may get an `attention_mask` of all tokens seen. (Bloom would make biases for all of them.)
        max_keys (`int`, *optional*): for how many keys the model has biases, if their number is limited.
        plain (`bool`): the model's attention can merge the sinks of an exact chunk itself; see `chunk_attention`.
    """

    rotations: dict[int, Rotation]
    sliding_window: int | None
    max_position: int | None
    sliding: dict[int, Rotation]
    swapped: frozenset[int] = frozenset()
    chronological: bool = False
    takes_masks: bool = True
    max_keys: int | None = None
    plain: bool = False

    def agrees_with(self, other: PositionScheme | None) -> bool:
        """Whether both schemes are equal, up to the rounding with which frequencies were learned."""
        return (
            other is not None
            and (self.sliding_window, self.max_position, self.max_keys)
            == (other.sliding_window, other.max_position, other.max_keys)
            and (self.swapped, self.chronological, self.takes_masks)
            == (other.swapped, other.chronological, other.takes_masks)
            and all(
                mine.keys() == theirs.keys() and all(mine[layer].is_close_to(theirs[layer]) for layer in mine)
                for mine, theirs in ((self.rotations, other.rotations), (self.sliding, other.sliding))
            )
        )


Learned = tuple[PositionScheme, dict[str, KnownModule]]
ErrorOf = Callable[[PreTrainedModel, PositionScheme], float]


def learn(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, buffers: dict[str, torch.Tensor], error_of: ErrorOf
) -> Learned:
    """Learns how models of this class, config and buffers use positions; remembers the answer for the process.

    Args:
        model_class (`type[PreTrainedModel]`): a class whose forward takes `input_ids`, `position_ids` and a cache.
        config (`PreTrainedConfig`): its (text) config, of any size.
        buffers (`dict[str, torch.Tensor]`): buffers of the live model, such as `inv_freq`. They replace the twin's, so that
            frequencies that were changed or rounded after loading are found.
        error_of (`ErrorOf`): measures the relative error of a cache that believes a scheme, on a twin.

    Returns:
        `Learned`: the scheme, and the modules of the twin that decide what positions mean.

    Raises:
        CannotStream: if the model is refused, with the reason.
    """
    digest = hashlib.sha256((attention_of(config) + config.to_json_string(use_diff=False)).encode())
    for name, buffer in sorted(buffers.items()):
        digest.update(name.encode() + buffer.detach().cpu().double().numpy().tobytes())
    key = (model_class, digest.hexdigest())
    if isinstance(known := _remembered.get(key), tuple) and classes_changed(known[1]):
        del _remembered[key]
    if key not in _remembered:
        try:
            _remembered[key] = _learn(model_class, config, buffers, error_of)
        except CannotStream as reason:
            # Not the exception: its traceback would keep the live model in memory.
            _remembered[key] = f"{reason}{_hint_at_rounding(model_class, config, buffers, error_of)}"
    answer = _remembered[key]
    if isinstance(answer, str):
        raise CannotStream(answer)
    return answer


def _hint_at_rounding(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, buffers: dict[str, torch.Tensor], error_of: ErrorOf
) -> str:
    """Returns the rest of the reason if a model is refused only because its buffers were rounded, else nothing."""
    rounded = [name for name, buffer in buffers.items() if buffer.itemsize < 4]
    if rounded:
        try:
            _learn(model_class, config, {}, error_of)
        except CannotStream:
            return ""
        dtype = str(buffers[rounded[0]].dtype)
        return (
            f", since its {rounded[0]} was rounded to {dtype}: load it with dtype={dtype}, which casts the weights only"
        )
    return ""


_remembered: dict[tuple[type, str], Learned | str] = {}


def _learn(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, buffers: dict[str, torch.Tensor], error_of: ErrorOf
) -> Learned:
    layers, sliding_window = bounded_layers(config)
    with apart():
        twin = build_twin(model_class, config)
        for name, buffer in twin.named_buffers():
            if name in buffers and buffers[name].shape == buffer.shape:
                buffer.copy_(buffers[name])
        takes_positions = takes_argument(twin, "position_ids")
        scheme = (_probe if takes_positions else _probe_order)(twin, layers, sliding_window)
        reason = ""
        for candidate in _candidates(scheme, takes_positions, getattr(config, "max_seq_len", None)):
            how = "keeping its keys in order" if candidate.chronological else "moving its keys"
            try:
                error = error_of(twin, candidate)
            except ValueError as refusal:
                reason = f"it uses a cache in a way that is not understood ({_short(refusal)})"
            except Exception as failure:
                reason = f"its twin fails when streaming ({_short(failure)})"
                if candidate.chronological:
                    reason = "it makes its attention biases (ALiBi) for the whole text, and not for the keys that it is shown"
            else:
                if error <= _EXACT:
                    attention = modules_that_use_a_cache(twin, lambda cache: _one_token_alone(twin, 0, cache=cache))
                    plain = replace(candidate, plain=True)
                    return plain if _is_exact(twin, plain, error_of) else candidate, known_modules(twin, attention)
                reason = (
                    f"{how} does not reproduce it (relative error {error:.1g}): its attention uses positions in another way "
                    "than through rotary keys or their order"
                )
    raise CannotStream(reason)


def _is_exact(twin: PreTrainedModel, scheme: PositionScheme, error_of: ErrorOf) -> bool:
    try:
        return error_of(twin, scheme) <= _EXACT
    except Exception:
        return False


def _candidates(scheme: PositionScheme, takes_positions: bool, max_keys: int | None) -> Iterator[PositionScheme]:
    """Yields the schemes that a model may have on which `scheme` was found, the cheapest first."""
    if takes_positions:
        yield scheme
    if all(rotation.is_identity for rotation in scheme.rotations.values()):
        scheme = replace(scheme, chronological=True, max_keys=max_keys)
        yield scheme
        yield replace(scheme, takes_masks=False)


def _probe(twin: PreTrainedModel, layers: list[int], sliding_window: int | None) -> PositionScheme:
    """Runs one token at positions 0, 1, 8, 64, … past the trained context, and fits the rotation of each layer."""
    trained = getattr(twin.config, "max_position_embeddings", None) or 2048
    powers = [8**k for k in range(max(6, int(trained).bit_length() // 3 + 2))]
    # In chunked attention the slot of a key matters, too.
    chunked = getattr(twin.config, "attention_chunk_size", None) is not None
    sliding = [
        index
        for index, layer in enumerate(layers_of(twin.config))
        if type(layer) is DynamicSlidingWindowLayer and index not in layers and not chunked
    ]
    keys: dict[int, dict[int, torch.Tensor]] = {layer: {} for layer in (*layers, *sliding)}
    values: dict[int, dict[int, torch.Tensor]] = {layer: {} for layer in keys}
    max_position = None
    for position in [0, *powers, 3, 11, 777]:
        try:
            cached = _one_token_alone(twin, position)
        except Exception as failure:
            if position < trained or not isinstance(failure, (IndexError, RuntimeError)):
                raise CannotStream(f"its twin does not run ({_short(failure)})") from failure
            max_position = trained  # a table of positions ends here
            continue
        for layer in keys:
            _check_cached(cached, layer)
            keys[layer][position] = cached[layer].keys.flatten(0, 2)
            values[layer][position] = cached[layer].values.flatten(0, 2)
        if any(_changes(keys[layer]) and _changes(values[layer]) for layer in layers):
            raise CannotStream(
                "its keys and its values change with the position: positions are learned, added to the embeddings, or used "
                "outside of attention"
            )
    swapped = frozenset(layer for layer in keys if _changes(values[layer]) and not _changes(keys[layer]))
    turning = {layer: values[layer] if layer in swapped else keys[layer] for layer in keys}
    try:
        return PositionScheme(
            _fit_layers({layer: turning[layer] for layer in layers}),
            sliding_window,
            max_position,
            _fit_sliding_layers({layer: turning[layer] for layer in sliding}),
            swapped,
        )
    except NotARotation as reason:
        kind = (getattr(twin.config, "rope_parameters", None) or {}).get("rope_type")
        named = f" (rope_type {kind!r})" if isinstance(kind, str) and kind != "default" else ""
        raise CannotStream(f"{reason}{named}") from reason


def _probe_order(twin: PreTrainedModel, layers: list[int], sliding_window: int | None) -> PositionScheme:
    """Probes a model that takes no positions. It can only count keys, unless the keys themselves change with the position."""
    try:
        alone, last = _one_token_alone(twin, 0), _one_token_alone(twin, 0, after=5)
    except Exception as failure:
        raise CannotStream(f"its twin does not run ({_short(failure)})") from failure
    for layer in layers:
        _check_cached(alone, layer)
    # In higher layers, keys depend on earlier tokens.
    first = layers[0]
    for here, there in ((alone[first].keys, last[first].keys), (alone[first].values, last[first].values)):
        if _changes({0: here, 5: there[:, :, -1:]}):
            raise CannotStream(
                "its forward takes no position_ids, and its keys and values change with the position: positions are learned, "
                "or added to the embeddings"
            )
    sizes = {layer: alone[layer].keys.shape[-1] for layer in layers}
    still = {layer: Rotation(tuple(range(size)), (0.0,) * size) for layer, size in sizes.items()}
    return PositionScheme(still, sliding_window, None, {})


def _check_cached(cached: list[Any], layer: int) -> None:
    if cached[layer].keys is None or cached[layer].keys.shape[2] != 1:
        raise CannotStream(f"layer {layer} does not put the keys of one token into its cache")


def _changes(states: dict[int, torch.Tensor]) -> bool:
    return not all(torch.allclose(state, states[0], rtol=1e-3, atol=1e-4) for state in states.values())


def _fit_layers(keys: dict[int, dict[int, torch.Tensor]]) -> dict[int, Rotation]:
    rotations: dict[int, Rotation] = {}
    for layer, samples in keys.items():
        known = (r for r in dict.fromkeys(rotations.values()) if first_unexplained(samples, r) is None)
        rotations[layer] = next(known, None) or fit_rotation(samples)
    return rotations


def _fit_sliding_layers(keys: dict[int, dict[int, torch.Tensor]]) -> dict[int, Rotation]:
    """Fits the layers if all their keys rotate. If not, the cache leaves them alone, so this is no reason to refuse."""
    try:
        return _fit_layers(keys)
    except NotARotation:
        return {}


def _one_token_alone(twin: PreTrainedModel, position: int, after: int = 0, cache: Cache | None = None) -> list[Any]:
    """Reads a batch of single tokens, `[_TOKENS, 1]`, at this position, and returns the cache's layers.

    With `after`, so many other tokens come first. Without `cache`, a fresh `DynamicCache` is used.
    """
    cache = DynamicCache(config=twin.config) if cache is None else cache
    input_ids = torch.arange(1, _TOKENS + 1, device="cpu")[:, None] % twin.config.vocab_size
    input_ids = torch.cat([input_ids.roll(shift, dims=0) for shift in range(after, -1, -1)], dim=1)
    positions = {"position_ids": torch.full_like(input_ids, position)} if takes_argument(twin, "position_ids") else {}
    twin(input_ids=input_ids, use_cache=True, **cache_kwargs(cache, twin), **positions)
    return cache.layers


def build_twin(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """Builds a float32 CPU model of this class with random weights, narrow where `config` is wide."""
    failures = []
    own = attention_of(config)
    implementations = (own,) if own in ("sdpa", "eager") else ("sdpa", "eager")  # other implementations may need a GPU
    for variant, attention in itertools.product(range(1 + _NARROWINGS), implementations):
        try:
            candidate = copy.deepcopy(config) if variant == 0 else _narrow(config, variant)
            set_attention(candidate, attention)
            leave_dtype_open(candidate)
            with Defaults("meta"):
                size = sum(p.numel() for p in model_class(copy.deepcopy(candidate)).parameters())
            if size > _SMALL:
                failures.append(f"{size:,} parameters")
                continue
            with OwnRandomNumbers():
                twin: PreTrainedModel = model_class(candidate).float().eval()
                _randomise(twin)
            _one_token_alone(twin, 0)
            return twin
        except Exception as failure:
            failures.append(_short(failure))
    raise CannotStream(
        f"no small twin of it could be built to learn its rotation from ({'; '.join(dict.fromkeys(failures))})"
    )


_NARROWINGS = 4


def _narrow(config: PreTrainedConfig, variant: int) -> PreTrainedConfig:
    """Makes a config narrower. Widths and counts shrink; the head size and all that concerns positions stay."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    own_head_dim = getattr(config, "head_dim", None)
    few_kv_heads = min(kv_heads, {3: 1, 4: 4}.get(variant, 2))  # CodeGen wants a multiple of 4
    few_heads = few_kv_heads * min(heads // kv_heads, 2)
    changes = {"num_attention_heads": few_heads, "num_key_value_heads": few_kv_heads}
    # If the config sets the head size, the hidden size is free. If not, it is heads times head size.
    free = own_head_dim is not None and variant == 1
    changes["hidden_size"] = 64 if free else few_heads * (own_head_dim or config.hidden_size // heads)
    if getattr(config, "attention_hidden_size", None):  # Zamba's attention sees the embeddings beside the hidden states
        changes["attention_hidden_size"] = few_heads * config.attention_head_dim
        changes["hidden_size"] = changes["attention_hidden_size"] // 2
        if getattr(config, "mamba_headdim", None):
            changes["mamba_headdim"] = config.mamba_expand * changes["hidden_size"] // config.n_mamba_heads
    changes |= {"vocab_size": min(config.vocab_size, 256), "pad_token_id": 0}
    changes |= {"kv_lora_rank": 32, "q_lora_rank": 32, "n_group": 1, "topk_group": 1}
    for name, value in config.to_dict().items():
        if isinstance(value, int) and ("intermediate_size" in name or "ffn_hidden_size" in name):
            changes[name] = 64
        if name in ("chunk_size", "mamba_chunk_size"):  # a scan pads even a single token to this size
            changes[name] = 8
        if isinstance(value, int) and name.endswith(("d_state", "state_size")):
            changes[name] = min(value, 16)
        counts_experts = "experts" in name or name.endswith("expert_num")
        if isinstance(value, int) and counts_experts and "per_tok" not in name and value > 4:
            changes[name] = max(4, getattr(config, "num_experts_per_tok", None) or 0)
    narrow = copy.deepcopy(config)
    if hasattr(narrow, "n_inner"):  # GPT-J and CodeGen: None there means four times the hidden size
        narrow.n_inner = 64
    for name, value in changes.items():
        if getattr(narrow, name, None) is not None:
            setattr(narrow, name, value)
    return narrow


def _randomise(model: PreTrainedModel) -> None:
    """Draws weights at which everything matters: attention is neither flat nor saturated, no norm weight is 1, no bias 0."""
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
        elif "norm" in name or name.endswith("weight"):
            parameter.uniform_(0.7, 1.3)
        else:
            parameter.normal_(std=0.1)


def _short(failure: Any) -> str:
    return f"{type(failure).__name__}: {str(failure).strip().splitlines()[0][:120] if str(failure).strip() else ''}"
