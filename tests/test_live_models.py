"""Models that were changed on their instance: noticed where it decides what positions mean, and no trouble elsewhere.

A twin has a model's class, config and buffers, and nothing of what was done to the instance.
"""

import copy
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import accelerate
import peft
import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, PrepareModuleInput, RowwiseParallel, parallelize_module
from torch.nn.utils import prune
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

from sink_cache import SinkWindowCache, verify

from .families import tiny_model
from .oracle import relative_error, streamed_logits
from .test_exact import TOLERANCE, one_by_one, tokens

N_SINK, WINDOW = 3, 9


class OwnFrequencies(torch.nn.Module):
    """A rotary module whose frequencies have another name, and are those of a base of 100."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.freqs = 100.0 ** (-torch.arange(0, head_dim, 2) / head_dim)

    def forward(self, hidden_states: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angle = (position_ids[..., None] * self.freqs).repeat(1, 1, 2)
        return angle.cos(), angle.sin()


class Slow(LlamaRotaryEmbedding):
    def forward(self, hidden_states: torch.Tensor, position_ids: torch.Tensor) -> Any:
        return super().forward(hidden_states, position_ids * 0.5)


class Mirrored(LlamaAttention):
    """Its keys turn the other way."""

    def forward(self, hidden_states: torch.Tensor, position_embeddings: Any, *args: Any, **kwargs: Any) -> Any:
        cos, sin = position_embeddings
        return LlamaAttention.forward(self, hidden_states, (cos, -sin), *args, **kwargs)


def rotary_replaced(model: Any) -> None:
    model.model.rotary_emb = OwnFrequencies(16)


def rotary_of_a_subclass(model: Any) -> None:
    model.model.rotary_emb = Slow(model.config)


def rotary_patched(model: Any) -> None:
    rotary = model.model.rotary_emb
    forward = rotary.forward
    rotary.forward = lambda hidden_states, position_ids: forward(hidden_states, position_ids * 0.5)


def rotary_patched_and_offloaded(model: Any) -> None:
    rotary_patched(model)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


def rotary_patched_and_compiled(model: Any) -> None:
    rotary_patched(model)
    model.model.rotary_emb.forward = torch.compile(model.model.rotary_emb.forward, backend="eager")


def hook_before_rotary(model: Any) -> None:
    def slower(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, kwargs | {"position_ids": kwargs["position_ids"] * 0.5}

    model.model.rotary_emb.register_forward_pre_hook(slower, with_kwargs=True)


def hook_after_rotary(model: Any) -> None:
    model.model.rotary_emb.register_forward_hook(lambda module, args, cos_sin: (cos_sin[1], cos_sin[0]))


def buffer_of_rotary(model: Any) -> None:
    model.model.rotary_emb.register_buffer("short_freq", torch.ones(8))


def attention_patched(model: Any) -> None:
    attention = model.model.layers[1].self_attn
    attention.forward = types.MethodType(Mirrored.forward, attention)


def attention_replaced(model: Any) -> None:
    attention = Mirrored(model.config, 1)
    attention.load_state_dict(model.model.layers[1].self_attn.state_dict())
    model.model.layers[1].self_attn = attention


def attention_wrapped(model: Any) -> None:
    class Wrapped(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.inner(*args, **kwargs)

    model.model.layers[1].self_attn = Wrapped(model.model.layers[1].self_attn)


ROTARY, ATTENTION = "this LlamaModel.*: rotary_emb ", r"this LlamaModel.*: layers\.1\.self_attn "


@pytest.mark.parametrize(
    "change, says",
    [
        (rotary_replaced, f"{ROTARY}is a OwnFrequencies, and the model's class makes a LlamaRotaryEmbedding there"),
        (rotary_of_a_subclass, f"{ROTARY}is a Slow, and"),
        (rotary_patched, f"{ROTARY}has a forward of its own, and not that of its class LlamaRotaryEmbedding"),
        (rotary_patched_and_offloaded, f"{ROTARY}has a forward of its own"),
        (rotary_patched_and_compiled, f"{ROTARY}has a forward of its own"),
        (hook_before_rotary, rf"{ROTARY}has a hook \(hook_before_rotary.*slower\)"),
        (hook_after_rotary, f"{ROTARY}has a hook"),
        (buffer_of_rotary, f"{ROTARY}has a buffer short_freq, which its class LlamaRotaryEmbedding does not make"),
        (attention_patched, f"{ATTENTION}has a forward of its own"),
        (attention_replaced, f"{ATTENTION}is a Mirrored"),
        (attention_wrapped, f"{ATTENTION}is a Wrapped"),
    ],
)
def test_what_decides_over_positions_was_changed(change: Callable[[Any], None], says: str) -> None:
    model = tiny_model("llama")
    change(model)
    cache = SinkWindowCache(N_SINK, WINDOW)
    with pytest.raises(NotImplementedError, match=f"{says}.*verify\\(model\\).*undo the change, or use DynamicCache"):
        one_by_one(model, tokens(30), cache)
    assert cache.get_seq_length() == 0


def test_a_model_that_is_changed_between_two_texts() -> None:
    model, cache = tiny_model("llama"), SinkWindowCache(N_SINK, WINDOW)
    one_by_one(model, tokens(20), cache)
    cache.reset()
    rotary_patched(model)
    with pytest.raises(NotImplementedError, match=ROTARY):
        one_by_one(model, tokens(20), cache)


def test_verify_lets_in_what_is_exact(llama: PreTrainedModel) -> None:
    # Someone looks at attention, and changes nothing.
    model, looks = copy.deepcopy(llama), []
    model.model.layers[1].self_attn.register_forward_hook(lambda module, args, output: looks.append(output[0].shape))
    with pytest.raises(NotImplementedError, match=ATTENTION):
        one_by_one(model, tokens(30), SinkWindowCache(N_SINK, WINDOW))
    assert verify(model) <= 1e-4
    logits = one_by_one(model, tokens(30), SinkWindowCache(N_SINK, WINDOW))
    assert relative_error(logits, streamed_logits(llama, tokens(30), N_SINK, WINDOW)) <= TOLERANCE
    rotary_patched(model)  # another change than the one that was verified
    with pytest.raises(NotImplementedError, match=r"changed on its instance.*\(and 1 more\)"):
        one_by_one(model, tokens(30), SinkWindowCache(N_SINK, WINDOW))


@pytest.mark.parametrize("change", [rotary_replaced, rotary_patched, hook_before_rotary])
def test_verify_does_not_let_in_what_is_wrong(change: Callable[[Any], None]) -> None:
    model = tiny_model("llama")
    change(model)
    with pytest.raises(NotImplementedError, match="is not exact on this LlamaForCausalLM"):
        verify(model, n_sink=2, window=5, tokens=16)
    with pytest.raises(NotImplementedError, match="changed on its instance"):
        one_by_one(model, tokens(30), SinkWindowCache(N_SINK, WINDOW))


def test_a_class_that_was_patched_after_its_first_use(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    # What was learned of the class is remembered, and no longer true.
    one_by_one(llama, tokens(4), SinkWindowCache(N_SINK, WINDOW))
    forward = LlamaRotaryEmbedding.forward
    monkeypatch.setattr(
        LlamaRotaryEmbedding,
        "forward",
        lambda self, hidden_states, position_ids: forward(self, hidden_states, position_ids * 0.5),
    )
    logits = one_by_one(llama, tokens(30), SinkWindowCache(N_SINK, WINDOW))
    assert relative_error(logits, streamed_logits(llama, tokens(30), N_SINK, WINDOW)) <= TOLERANCE


# --- what libraries do to a model ---


def lora(model: PreTrainedModel) -> Any:
    return with_adapter(model, use_dora=False)


def dora(model: PreTrainedModel) -> Any:
    return with_adapter(model, use_dora=True)


def with_adapter(model: PreTrainedModel, use_dora: bool) -> Any:
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    config = peft.LoraConfig(
        r=4, target_modules=targets, init_lora_weights=False, use_dora=use_dora, task_type="CAUSAL_LM"
    )
    torch.manual_seed(0)
    return peft.get_peft_model(model, config).eval()


def quantised(model: PreTrainedModel) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)


def offloaded(model: PreTrainedModel) -> Any:
    return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


def compiled_layers(model: Any) -> Any:
    model.model.layers[1] = torch.compile(model.model.layers[1], backend="eager")
    return model


def compiled_in_place(model: Any) -> Any:
    model.model.layers[1].self_attn.compile(backend="eager")
    return model


def compiled_attention_and_rotary(model: Any) -> Any:
    for module in (model.model.layers[1].self_attn, model.model.rotary_emb):
        module.forward = torch.compile(module.forward, backend="eager")
    return model


def offloaded_and_compiled(model: Any) -> Any:
    return compiled_attention_and_rotary(offloaded(model))


def with_recorded_outputs(model: Any) -> Any:
    with torch.no_grad():
        model(tokens(3), output_attentions=True, output_hidden_states=True)  # transformers' own hooks stay
    return model


def steered(model: Any) -> Any:
    # Whoever changes hidden states changes nothing about positions.
    model.model.layers[1].register_forward_hook(lambda module, args, output: output * 1.1)
    model.model.layers[0].mlp.forward = lambda states: 0.5 * states
    return model


def pruned(model: Any) -> Any:
    prune.l1_unstructured(model.model.layers[0].self_attn.k_proj, "weight", amount=0.3)
    return model


@pytest.mark.parametrize(
    "prepare",
    [lora, dora, offloaded, compiled_layers, compiled_in_place, compiled_attention_and_rotary, offloaded_and_compiled,
     with_recorded_outputs, steered, pruned],
)  # fmt: skip
def test_what_libraries_do_to_a_model(prepare: Callable[[Any], Any]) -> None:
    torch._dynamo.reset()
    model = prepare(tiny_model("llama"))
    logits = one_by_one(model, tokens(15), SinkWindowCache(N_SINK, WINDOW))
    assert relative_error(logits, streamed_logits(model, tokens(15), N_SINK, WINDOW)) <= TOLERANCE


def test_quantised_linears() -> None:
    # The oracle reads sinks several at once, and would share a scale between them.
    model = quantised(tiny_model("llama"))
    one_by_one(model, tokens(30), SinkWindowCache(N_SINK, WINDOW))
    verify(model, n_sink=2, window=5, tokens=16)


@pytest.fixture
def mesh() -> Iterator[Any]:
    """One process that is all of a group."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
def test_tensor_parallel_attention(llama: PreTrainedModel, mesh: Any) -> None:
    model = copy.deepcopy(llama)
    plan = {f"model.layers.*.self_attn.{name}_proj": ColwiseParallel() for name in "qkv"}
    plan["model.layers.*.self_attn.o_proj"] = RowwiseParallel()
    plan["model.layers.*.self_attn"] = PrepareModuleInput(input_kwarg_layouts={}, desired_input_kwarg_layouts={})
    parallelize_module(model, mesh, plan)
    assert any(layer.self_attn._forward_pre_hooks for layer in model.model.layers)
    logits = one_by_one(model, tokens(30), SinkWindowCache(N_SINK, WINDOW))
    assert relative_error(logits, streamed_logits(llama, tokens(30), N_SINK, WINDOW)) <= TOLERANCE


@pytest.mark.filterwarnings("ignore")
def test_sharded_attention(llama: PreTrainedModel, mesh: Any) -> None:
    model = copy.deepcopy(llama)
    for layer in model.model.layers:
        fully_shard(layer.self_attn, mesh=mesh)
    assert type(model.model.layers[0].self_attn) is not LlamaAttention
    logits = one_by_one(model, tokens(30), SinkWindowCache(N_SINK, WINDOW))
    assert relative_error(logits, streamed_logits(llama, tokens(30), N_SINK, WINDOW)) <= TOLERANCE
