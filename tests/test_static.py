"""Shapes that never change: one graph from the first decoded token on, and the same tokens as without it."""

import copy
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionMaskInterface, CompileConfig, PreTrainedModel

from sink_cache import SinkWindowCache, endless, stream
from sink_cache.layers import StaticSinkWindowLayer

from .families import tiny_model
from .oracle import relative_error, streamed_logits
from .test_exact import TOLERANCE, one_by_one, tokens

# Plain, partial rotary, and full attention beside sliding layers with a rotation of their own.
MODELS = ["llama", "gpt_neox", "gemma3_text"]
# The compiler takes time for each layer. With two, an error in the keys of the first reaches the second.
COMPILED_LAYERS = 2
# Tokens of the long comparison, of which 32 fit into the cache. LONG_TEXT=2000 takes minutes.
LENGTH = int(os.environ.get("LONG_TEXT", "120"))


@pytest.fixture
def _fresh_compiler() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def compiling(backend: str) -> CompileConfig:
    """What makes generate() compile on the CPU, too, and fail if anything breaks the graph."""
    config = CompileConfig(fullgraph=True, backend=backend, mode="default")
    config._compile_all_devices = True
    return config


def greedy(
    model: PreTrainedModel, input_ids: torch.Tensor, cache: SinkWindowCache, new: int, **more: object
) -> list[int]:
    model.generation_config.eos_token_id = None
    sequences = model.generate(
        input_ids, past_key_values=cache, max_new_tokens=new, do_sample=False, pad_token_id=0, **more
    )
    return sequences[0, input_ids.shape[1] :].tolist()


@pytest.mark.parametrize("n_sink, window", [(0, 1), (4, 1), (5, 2), (2, 9), (1, 60)])
@pytest.mark.parametrize("model_type", MODELS)
def test_streams_exactly(model_type: str, n_sink: int, window: int) -> None:
    # One by one from nothing: the sinks come in steps, too, and the cache fills up under a mask.
    model, input_ids = tiny_model(model_type), tokens(40, 2)
    expected = streamed_logits(model, input_ids, n_sink, window)
    logits = one_by_one(model, input_ids, SinkWindowCache(n_sink, window, compileable=True))
    assert relative_error(logits, expected) <= TOLERANCE
    chunks = stream(model, input_ids, SinkWindowCache(n_sink, window, compileable=True), chunk_size=7)
    assert relative_error(torch.cat(list(chunks), dim=1), expected) <= TOLERANCE


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("model_type", MODELS)
def test_one_graph_from_the_first_decoded_token_on(model_type: str) -> None:
    # A position, a slot or a length read on the host is a constant of the graph, and compiled anew at every step.
    model, input_ids = tiny_model(model_type, layers=COMPILED_LAYERS), tokens(50)
    cache, counter = SinkWindowCache(3, 9, compileable=True), CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        model(input_ids[:, :3], past_key_values=cache)
        logits = [compiled(input_ids[:, t : t + 1], past_key_values=cache).logits for t in range(3, 50)]
    assert counter.frame_count == 1
    expected = streamed_logits(model, input_ids, 3, 9)[:, 3:]
    assert relative_error(torch.cat(logits, dim=1), expected) <= TOLERANCE


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_sizes_are_constants_of_a_graph(model_type: str) -> None:
    # What differs between two caches would become an input of the second graph, and one of all that follow.
    model, input_ids, inputs = tiny_model(model_type, layers=COMPILED_LAYERS), tokens(12), []

    def backend(module: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        inputs.append(example_inputs)
        return module

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        for n_sink, window in ((2, 4), (2, 6), (3, 3), (2, 4), (3, 3)):
            cache = SinkWindowCache(n_sink, window, compileable=True)
            model(input_ids[:, :5], past_key_values=cache)
            for t in range(5, 12):
                compiled(input_ids[:, t : t + 1], past_key_values=cache)
    assert len(inputs) == 3  # one for each pair of sizes
    assert all(isinstance(one, torch.Tensor) for some in inputs for one in some)


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize(
    "model_type, prompt",
    [("llama", 5), ("llama", 10), ("llama", 11), ("llama", 30), ("gemma3_text", 10), ("gemma3_text", 11)],
)
def test_after_a_prompt_that_fills_the_cache_no_step_has_a_mask(model_type: str, prompt: int) -> None:
    # Decided once: a text that fills the cache as it is decoded keeps its masks, and its graph.
    model, masks = tiny_model(model_type, layers=COMPILED_LAYERS), []

    def backend(module: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        attention = [n for n in module.graph.nodes if n.target is torch.nn.functional.scaled_dot_product_attention]
        masks.append([node.kwargs["attn_mask"] is not None for node in attention])
        return module

    config = compiling("eager")
    config.backend = backend
    cache = SinkWindowCache(3, 9, compileable=True)
    text = greedy(model, tokens(prompt), cache, 40, compile_config=config)
    assert masks == [[prompt < 11] * len(cache.layers)]
    assert text == greedy(model, tokens(prompt), SinkWindowCache(3, 9), 40)


@pytest.mark.parametrize("model_type", MODELS)
def test_calls_with_several_tokens_keep_their_masks(model_type: str, tmp_path: Path) -> None:
    model, input_ids = tiny_model(model_type), tokens(60)
    caches = [SinkWindowCache(3, 9, compileable=compileable) for compileable in (False, True)]

    @torch.no_grad()
    def same(*lengths: int) -> None:
        start = 0
        for length in lengths:
            call = input_ids[:, start : start + length]
            expected, logits = (model(call, past_key_values=cache).logits for cache in caches)
            assert relative_error(logits, expected) <= TOLERANCE
            start += length

    same(20, 1, 1, 7, 1, 1, 15, 1)
    caches[1].save(tmp_path / "cache")
    caches[1] = SinkWindowCache(3, 9, compileable=True)
    caches[1].load(tmp_path / "cache", model)
    same(1, 1, 5, 1)
    caches[0] = SinkWindowCache(3, 9)
    caches[1].reset()
    same(4, 1, 1, 3, 1, 1, 1, 1, 1)  # and steps have theirs again
    same(9, 1, 1)


@pytest.fixture
def _masks_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process in which there was no cache yet."""
    for attention in ("sdpa", "eager"):
        built = AttentionMaskInterface._global_mapping[attention]
        monkeypatch.setitem(AttentionMaskInterface._global_mapping, attention, getattr(built, "build", built))


@pytest.mark.usefixtures("_fresh_compiler", "_masks_of_transformers")
def test_graphs_with_masks_outlive_those_without() -> None:
    # Compiled by hand, a step makes its mask inside of the graph, which knows the function that makes it.
    model, counter = tiny_model("llama", layers=1), CompileCounter()
    compiled, graphs = torch.compile(model, backend=counter, fullgraph=True), []
    for prompt in (5, 20, 5):
        cache = SinkWindowCache(3, 9, compileable=True)
        with torch.no_grad():
            model(tokens(prompt), past_key_values=cache)
            for _ in range(12):
                compiled(tokens(1), past_key_values=cache)
        graphs.append(counter.frame_count)
    assert graphs == [1, 2, 2]


def test_a_pickled_full_cache_in_another_process(llama: PreTrainedModel, request: pytest.FixtureRequest) -> None:
    cache, expected = SinkWindowCache(3, 9, compileable=True), SinkWindowCache(3, 9)
    with torch.no_grad():
        for one in (cache, expected):
            llama(tokens(20), past_key_values=one)
    pickled = pickle.dumps(cache)
    request.getfixturevalue("_masks_of_transformers")
    logits = [one_by_one(llama, tokens(20), one) for one in (pickle.loads(pickled), expected)]
    assert relative_error(*logits) <= TOLERANCE


@pytest.mark.parametrize("first", [0, 5])
def test_a_refused_call_does_not_fill_the_cache(llama: PreTrainedModel, first: int) -> None:
    # Steps without masks would see the empty slots.
    cache, input_ids = SinkWindowCache(3, 9, compileable=True), tokens(40)
    with torch.no_grad():
        for t in range(first):
            llama(input_ids[:, t : t + 1], past_key_values=cache)
    with pytest.raises(NotImplementedError, match="inference only"):
        llama(input_ids[:, first : first + 20], past_key_values=cache)
    with torch.no_grad():
        llama(input_ids[:, first:7], past_key_values=cache)
    logits = one_by_one(llama, input_ids[:, 7:], cache)
    assert relative_error(logits, streamed_logits(llama, input_ids, 3, 9)[:, 7:]) <= TOLERANCE


def test_a_call_that_a_layer_refuses_does_not_complete_the_sinks(llama: PreTrainedModel) -> None:
    # The steps after it would not have watched for the sinks that are still to come.
    cache, input_ids = SinkWindowCache(4, 3, compileable=True), tokens(20)
    one_by_one(llama, input_ids[:, :3], cache)
    elsewhere = torch.zeros(1, 2, 2, 16, device="meta")
    with pytest.raises(ValueError, match="device of the keys is meta"):
        cache.update(elsewhere, elsewhere, 0)
    logits = one_by_one(llama, input_ids[:, 3:], cache)
    assert relative_error(logits, streamed_logits(llama, input_ids, 4, 3)[:, 3:]) <= TOLERANCE


@pytest.mark.parametrize("model_type", ["modernbert-decoder", "gemma3_text"])
@pytest.mark.parametrize("how", [{}, {"custom_generate": endless}])
def test_eager_attention_has_its_mask(model_type: str, how: dict[str, Any]) -> None:
    # Some models add it to their scores without asking whether there is one.
    model = tiny_model(model_type)
    model.set_attn_implementation("eager")
    texts = [
        greedy(model, tokens(20), SinkWindowCache(3, 4, compileable=compileable), 15, **how)
        for compileable in (False, True)
    ]
    assert texts[0] == texts[1]


def test_angles_are_float32_whatever_the_default(llama: PreTrainedModel) -> None:
    cache = SinkWindowCache(3, 9, compileable=True)
    torch.set_default_dtype(torch.bfloat16)
    try:
        logits = one_by_one(llama, tokens(40), cache)
    finally:
        torch.set_default_dtype(torch.float32)
    assert relative_error(logits, streamed_logits(llama, tokens(40), 3, 9)) <= TOLERANCE


def test_copies_stay_at_their_address_too() -> None:
    model, cache = tiny_model("llama"), SinkWindowCache(2, 4, compileable=True)
    with torch.no_grad():
        model(tokens(9), past_key_values=cache)
    for one in (cache, copy.deepcopy(cache)):
        for tensor in one.layers[1].tensors().values():
            assert torch._dynamo.utils.get_static_address_type(tensor) == "unguarded"


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize(
    "model_type, backend", [("llama", "inductor"), ("gpt_neox", "aot_eager"), ("gemma3_text", "aot_eager")]
)
def test_the_same_tokens_compiled_eager_and_by_hand(model_type: str, backend: str) -> None:
    model, input_ids = tiny_model(model_type, layers=COMPILED_LAYERS), tokens(6)
    eager = greedy(model, input_ids, SinkWindowCache(3, 29), LENGTH)
    assert greedy(model, input_ids, SinkWindowCache(3, 29, compileable=True), LENGTH) == eager
    compiled = greedy(
        model, input_ids, SinkWindowCache(3, 29, compileable=True), LENGTH, compile_config=compiling(backend)
    )
    assert compiled == eager
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1

    cache, by_hand = SinkWindowCache(3, 29), []
    with torch.no_grad():
        token = input_ids
        for _ in range(LENGTH):
            token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
            by_hand.append(int(token))
    assert by_hand == eager


@pytest.mark.usefixtures("_fresh_compiler")
def test_the_endless_loop_compiles_once_and_its_rebases_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sink_cache.steps._REBASE_EVERY", 40)
    model, input_ids = tiny_model("llama", layers=COMPILED_LAYERS), tokens(6)
    text: list[int] = []

    class Collect:
        def put(self, ids: torch.Tensor) -> None:
            text.extend(ids.flatten().tolist())

        def end(self) -> None:
            pass

    cache = SinkWindowCache(3, 29, compileable=True)
    more = {"custom_generate": endless, "compile_config": compiling("aot_eager"), "streamer": Collect()}
    greedy(model, input_ids, cache, 200, **more)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert text[6:] == greedy(model, input_ids, SinkWindowCache(3, 29), 200)
    assert int(cache.next_position_ids()) < 32 + 29 + 2 * 40
    assert cache.get_seq_length() == 205


def test_memory_stays_where_it_is(llama: PreTrainedModel) -> None:
    # A captured graph knows addresses; a cache that moved would be read where it no longer is.
    cache = SinkWindowCache(3, 9, compileable=True)

    def addresses() -> list[int]:
        return [tensor.data_ptr() for layer in cache.layers for tensor in (*layer.tensors().values(), layer.counts)]

    input_ids = tokens(60, 2)
    one_by_one(llama, input_ids[:, :20], cache)
    before = addresses()
    with torch.no_grad():
        llama(input_ids[:, 20:40], past_key_values=cache)
    one_by_one(llama, input_ids[:, 40:], cache)
    assert cache.rebase()
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.reset()
    assert relative_error(one_by_one(llama, input_ids, cache), streamed_logits(llama, input_ids, 3, 9)) <= TOLERANCE
    assert addresses() == before


def test_other_shapes_after_reset(llama: PreTrainedModel) -> None:
    cache = SinkWindowCache(3, 5, compileable=True)
    for batch_size in (1, 3, 2):
        input_ids = tokens(20, batch_size)
        with torch.no_grad():
            first = llama(input_ids[:, :4], past_key_values=cache).logits
        logits = torch.cat([first, one_by_one(llama, input_ids[:, 4:], cache)], dim=1)
        assert relative_error(logits, streamed_logits(llama, input_ids, 3, 5)) <= TOLERANCE
        cache.reset()


class _Waits(TorchDispatchMode):
    """Counts how often the value of a tensor is asked for, which waits for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("new", [1, 7])
def test_more_layers_wait_no_more_often(new: int) -> None:
    counts = []
    for layers in (2, 5):
        model, cache = tiny_model("llama", layers=layers), SinkWindowCache(4, 8, compileable=True)
        with torch.no_grad():
            model(tokens(20), past_key_values=cache)
            with _Waits() as waits:
                model(tokens(new), past_key_values=cache)
        counts.append(waits.count)
    assert counts[0] == counts[1] <= 12


@pytest.mark.parametrize("retry", [4, 1])
def test_an_interrupted_chunk_is_noticed(llama: PreTrainedModel, tmp_path: Path, retry: int) -> None:
    # All layers share one position, which does not say that the first of them have overwritten their windows.
    cache = SinkWindowCache(3, 5, compileable=True)
    one_by_one(llama, tokens(20), cache)
    interrupt = llama.model.layers[1].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with torch.no_grad(), pytest.raises(KeyboardInterrupt):
        llama(tokens(4), past_key_values=cache)
    interrupt.remove()
    for one in (cache, copy.deepcopy(cache)):
        with torch.no_grad(), pytest.raises(ValueError, match="interrupted"):
            llama(tokens(retry), past_key_values=one)
        with pytest.raises(ValueError, match="interrupted"):
            one.save(tmp_path / "cache")
    cache.reset()
    assert relative_error(one_by_one(llama, tokens(20), cache), streamed_logits(llama, tokens(20), 3, 5)) <= TOLERANCE


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("interrupted", [False, True])
def test_positions_are_right_after_a_call_that_came_to_nothing(tmp_path: Path, interrupted: bool) -> None:
    # Steps in a graph do not tell the host where they are.
    model_type, changes = ("llama", {}) if interrupted else ("mistral", {"sliding_window": 12})
    model, text = tiny_model(model_type, layers=COMPILED_LAYERS, **changes), tokens(60)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    cache = SinkWindowCache(4, 8, compileable=True)
    one_by_one(model, text[:, :20], cache)
    with torch.no_grad():
        for position in range(20, 40):
            if position == 22 and interrupted:
                hook = model.model.layers[0].register_forward_pre_hook(
                    lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
                )
                with pytest.raises(KeyboardInterrupt):
                    model(text[:, 22:24], past_key_values=cache)
                hook.remove()
            elif position == 22:
                with pytest.raises(ValueError, match="would lose the sinks"):
                    model(text[:, 22:28], past_key_values=cache)
            token = text[:, position : position + 1]
            compiled(token, past_key_values=cache, position_ids=torch.tensor([[position]]))
    assert cache.next_position_ids().tolist() == [[40]]
    cache.save(tmp_path / "cache")
    other = SinkWindowCache(4, 8, compileable=True)
    other.load(tmp_path / "cache", model)
    expected = streamed_logits(model, text, 4, 8)[:, 40:]
    for one in (other, cache):
        assert one.get_seq_length() == 40
        assert relative_error(one_by_one(model, text[:, 40:], one), expected) <= TOLERANCE


def test_values_alone_may_need_gradients(llama: PreTrainedModel) -> None:
    # A LoRA of v_proj only: the first layer's keys do not show that a graph would be kept.
    cache, model = SinkWindowCache(3, 5, compileable=True), copy.deepcopy(llama).requires_grad_(False)
    one_by_one(model, tokens(20), cache)
    model.model.layers[0].self_attn.v_proj.requires_grad_(True)
    with pytest.raises(NotImplementedError, match="inference only"):
        model(tokens(1), past_key_values=cache)
    assert not any(layer.values.requires_grad for layer in cache.layers)


def test_a_device_that_is_come_back_to_begins_at_the_first_position(llama: PreTrainedModel) -> None:
    cache = SinkWindowCache(3, 5, compileable=True)
    one_by_one(llama, tokens(3), cache)
    left = torch.zeros(1, dtype=torch.int64)
    cache.layers[0].state._counts[torch.device("cuda:1")] = left  # for want of a second device
    one_by_one(llama, tokens(9), cache)
    assert left.item() == 9
    cache.reset()
    assert left.item() == 0


@pytest.mark.parametrize("chunk_size", [3, 7])
def test_exact_chunks_where_full_attention_comes_first(chunk_size: int) -> None:
    # Two masks, of which the last does not need to know of the sinks' copies.
    model = tiny_model("gemma3_text", layer_types=["full_attention", "sliding_attention", "full_attention"])
    cache = SinkWindowCache(2, 3, compileable=True)
    logits = torch.cat(list(stream(model, tokens(30), cache, chunk_size=chunk_size)), dim=1)
    assert relative_error(logits, streamed_logits(model, tokens(30), 2, 3)) <= TOLERANCE


@pytest.mark.parametrize("chunk_size", [1, 7])
def test_exact_chunks_of_single_tokens_after_a_rebase(chunk_size: int) -> None:
    model, cache = tiny_model("gemma3_text"), SinkWindowCache(3, 8, compileable=True)
    logits = list(stream(model, tokens(80)[:, :51], cache, chunk_size=7))
    assert cache.rebase() > 0
    logits += stream(model, tokens(80)[:, 51:], cache, chunk_size=chunk_size)  # 29 tokens: a last chunk of one
    assert relative_error(torch.cat(logits, dim=1), streamed_logits(model, tokens(80), 3, 8)) <= TOLERANCE


def test_what_is_not_finite_is_forgotten(llama: PreTrainedModel) -> None:
    # A step is shown empty slots, too, and masks hide numbers only.
    cache = SinkWindowCache(3, 8, compileable=True)
    with torch.no_grad():
        llama(inputs_embeds=torch.full((1, 12, llama.config.hidden_size), torch.nan), past_key_values=cache)
    cache.reset()
    expected = streamed_logits(llama, tokens(9), 3, 8)
    assert relative_error(one_by_one(llama, tokens(9), cache), expected) <= TOLERANCE


def test_the_last_position_is_the_last(llama: PreTrainedModel) -> None:
    # The position is on the device, and nobody looks at it at every step; the limit has to hold all the same.
    cache = SinkWindowCache(3, 9, compileable=True)
    cache.prepare_for(llama)
    for layer in cache.layers:
        layer.max_position = 50
    with pytest.raises(ValueError, match="50 tokens seen and 1 new are more than the 50 positions"):
        greedy(llama, tokens(6), cache, 100)
    assert cache.get_seq_length() == 50


def test_what_cannot_be_static_is_refused(llama: PreTrainedModel) -> None:
    cache = SinkWindowCache(3, 9, compileable=True)
    one_by_one(llama, tokens(4), cache)
    with pytest.raises(NotImplementedError, match="crop with compileable=True"):
        cache.crop(-1)
    with pytest.raises(NotImplementedError, match="assisted decoding with compileable=True"):
        cache.activate_past_recording()
    with pytest.raises(NotImplementedError, match="compileable=True is not possible"):
        one_by_one(tiny_model("llama4_text"), tokens(4), SinkWindowCache(3, 9, compileable=True))


@pytest.mark.parametrize("compileable", [0, None, "yes"])
def test_compileable_is_a_bool(compileable: object) -> None:
    with pytest.raises(TypeError, match="compileable must be True or False"):
        SinkWindowCache(3, 9, compileable=compileable)


def test_layers_say_that_they_are_compileable(llama: PreTrainedModel) -> None:
    for compileable in (False, True):
        cache = SinkWindowCache(3, 9, compileable=compileable)
        cache.prepare_for(llama)
        assert cache.is_compileable == compileable
        assert all(isinstance(layer, StaticSinkWindowLayer) == compileable for layer in cache.layers)
