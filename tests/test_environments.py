"""Where models live: half precision, compiled, offloaded, with an adapter, in a pipeline. It works, or is refused clearly.

The judge is the oracle, on a plain model of the same weights. (For two GPUs: `python -m tests.two_gpus`.)
"""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import DynamicCache, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast, pipeline

from sink_cache import SinkWindowCache, cache_kwargs, endless, stream, verify
from sink_cache.internals import padding_mask_of_caller

from .families import PLAIN, VOCAB, tiny_model
from .oracle import relative_error, streamed_logits
from .test_exact import TOLERANCE, one_by_one, tokens

N_SINK, WINDOW = 3, 9
BOTH_KINDS = pytest.mark.parametrize("compileable", [False, True])


def streams_exactly(model: Any, reference: PreTrainedModel, compileable: bool) -> bool:
    """Whether `generate()` gives what the oracle gives on the reference: 12 tokens fit, 31 are there in the end."""
    cache = SinkWindowCache(N_SINK, WINDOW, compileable=compileable)
    options = PLAIN | {"return_dict_in_generate": True, "output_logits": True, "max_new_tokens": 25}
    out = model.generate(input_ids=tokens(6), past_key_values=cache, **options)
    expected = streamed_logits(reference, out.sequences, N_SINK, WINDOW)[:, 5:-1]
    return relative_error(torch.stack(out.logits, dim=1), expected) <= TOLERANCE


def goes_on_from_a_file(model: Any, reference: PreTrainedModel, compileable: bool, path: Path) -> bool:
    """Whether a cache that was saved and read back streams as the oracle does."""
    input_ids = tokens(30)
    cache, resumed = (SinkWindowCache(N_SINK, WINDOW, compileable=compileable) for _ in range(2))
    one_by_one(model, input_ids[:, :20], cache)
    cache.save(path)
    resumed.load(path, model)
    expected = streamed_logits(reference, input_ids, N_SINK, WINDOW)[:, 20:]
    return relative_error(one_by_one(model, input_ids[:, 20:], resumed), expected) <= TOLERANCE


def goes_on_for_ever(model: Any, reference: PreTrainedModel, compileable: bool) -> bool:
    """Whether `endless` gives the text of `generate()`."""
    options = PLAIN | {"input_ids": tokens(6), "max_new_tokens": 40}
    cache = SinkWindowCache(N_SINK, WINDOW, compileable=compileable)
    text = model.generate(past_key_values=cache, custom_generate=endless, keep_tokens=100, **options)
    return torch.equal(text, reference.generate(past_key_values=SinkWindowCache(N_SINK, WINDOW), **options))


def streams_in_chunks(model: Any, reference: PreTrainedModel) -> bool:
    input_ids = tokens(30)
    logits = torch.cat(list(stream(model, input_ids, SinkWindowCache(N_SINK, WINDOW), chunk_size=7)), dim=1)
    return relative_error(logits, streamed_logits(reference, input_ids, N_SINK, WINDOW)) <= TOLERANCE


# --- half precision ---


@BOTH_KINDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_loses_no_more_than_the_model_does(dtype: torch.dtype, compileable: bool) -> None:
    # Angles or sinks that are rounded more often than the model rounds its own keys.
    half = tiny_model("llama").to(dtype)  # its inv_freq too
    exact, input_ids = copy.deepcopy(half).float(), tokens(40)
    expected = streamed_logits(exact, input_ids, N_SINK, WINDOW)
    cache = SinkWindowCache(N_SINK, WINDOW, compileable=compileable)
    error = relative_error(one_by_one(half, input_ids, cache).float(), expected)
    of_the_model = relative_error(streamed_logits(half, input_ids, N_SINK, WINDOW).float(), expected)
    assert error <= 1.5 * of_the_model
    assert verify(half) < 0.1


# --- compiled ---


def compiled_forward(model: PreTrainedModel) -> Any:
    model.forward = torch.compile(model.forward, backend="aot_eager")
    return model


def compiled_module(model: PreTrainedModel) -> Any:
    return torch.compile(model, backend="aot_eager")


def compiled_in_place(model: PreTrainedModel) -> Any:
    model.compile(backend="aot_eager")
    return model


# Each takes the compiler seconds. generate() does not run the second compiled: its loop by hand does, and is read from a file.
@pytest.mark.parametrize(
    "compiled, compileable", [(compiled_forward, False), (compiled_module, True), (compiled_in_place, True)]
)
def test_compiled_models(
    llama: PreTrainedModel, compiled: Callable[[PreTrainedModel], Any], compileable: bool, tmp_path: Path
) -> None:
    torch._dynamo.reset()
    model = compiled(tiny_model("llama"))
    assert streams_exactly(model, llama, compileable)
    if compiled is not compiled_in_place:
        assert goes_on_from_a_file(model, llama, compileable, tmp_path / "cache")
    if compiled is compiled_forward:
        lookup = {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1, "max_new_tokens": 30}
        out = model.generate(tokens(6, seed=3), past_key_values=SinkWindowCache(N_SINK, WINDOW), **lookup, **PLAIN)
        greedy = streamed_logits(llama, out, N_SINK, WINDOW)[:, 5:-1].argmax(-1)
        assert torch.equal(out[:, 6:], greedy)


class WatchingCache(SinkWindowCache):
    """A cache of a user's own, between whose methods and ours there is one call more."""

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, Any]:
        return super().get_mask_sizes(query_length, layer_idx)


@pytest.mark.parametrize("compiled", [lambda model: model, compiled_forward])
def test_pads_that_are_in_sight_in_compiled_models(compiled: Callable[[PreTrainedModel], Any]) -> None:
    # Compiled frames and a subclass put other frames between the cache and the function that has the mask.
    torch._dynamo.reset()
    prompt, mask = tokens(6, 2), torch.ones(2, 6, dtype=torch.long)
    mask[0, :3] = 0
    options = PLAIN | {"attention_mask": mask, "max_new_tokens": 8}
    plain = tiny_model("llama", layers=1).generate(prompt, past_key_values=SinkWindowCache(N_SINK, WINDOW), **options)
    model = compiled(tiny_model("llama", layers=1))
    assert torch.equal(model.generate(prompt, past_key_values=WatchingCache(N_SINK, WINDOW), **options), plain)


def test_a_frame_that_has_lost_its_padding_mask() -> None:
    # As frames that the compiler resumes may: what is no longer used is gone from them, but not from those that called them.
    mask, found = torch.ones(2, 6, dtype=torch.long), []
    masking: dict[str, Any] = {"__name__": "transformers.masking_utils", "ask": padding_mask_of_caller, "found": found}
    source = """
def outer(attention_mask):
    inner(attention_mask)

def inner(attention_mask):
    del attention_mask
    found.append(ask())

def without(attention_mask):
    found.append(ask())
"""
    exec(source, masking)
    masking["outer"](mask)
    masking["without"](None)
    assert found[0] is mask
    assert found[1] is None


def test_each_query_has_its_own_sinks_in_compiled_models(llama: PreTrainedModel) -> None:
    # The compiler sees the offset that knows the mask as a plain integer.
    torch._dynamo.reset()
    model = compiled_module(tiny_model("llama"))
    assert streams_in_chunks(model, llama)
    assert verify(model) < 1e-4


# --- autocast ---


@pytest.mark.parametrize("compileable", [False, True])
def test_autocast_makes_values_of_another_dtype_than_keys(compileable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sink_cache.twin._remembered", {})  # what is learned of positions has to be learned without it
    model, input_ids = tiny_model("qwen2"), tokens(30)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        dense = model(input_ids[:, :8], past_key_values=DynamicCache(config=model.config)).logits
        cache, other = (SinkWindowCache(N_SINK, WINDOW, compileable=compileable) for _ in range(2))
        ours = torch.cat([model(input_ids[:, t : t + 1], past_key_values=cache).logits for t in range(30)], dim=1)
        chunks = torch.cat(list(stream(model, input_ids, other, chunk_size=7)), dim=1)
    assert (cache.layers[0].keys.dtype, cache.layers[0].values.dtype) == (torch.float32, torch.bfloat16)
    assert relative_error(ours[:, :8].float(), dense.float()) <= 0.05
    assert relative_error(chunks.float(), ours.float()) <= 0.05


@pytest.mark.parametrize("new_tokens", [1, 6])
@BOTH_KINDS
def test_after_autocast_without_it(llama: PreTrainedModel, compileable: bool, new_tokens: int, tmp_path: Path) -> None:
    cache, resumed = (SinkWindowCache(N_SINK, WINDOW, compileable=compileable) for _ in range(2))
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            llama(tokens(4), past_key_values=cache)
            cache.save(tmp_path / "cache")
            resumed.load(tmp_path / "cache", llama)
            assert torch.equal(one_by_one(llama, tokens(20), resumed), one_by_one(llama, tokens(20), cache))
        cache.reset()
        logits = llama(tokens(new_tokens), past_key_values=cache).logits
        assert torch.allclose(logits, llama(tokens(new_tokens)).logits, atol=1e-5)


# --- without gradients ---


@BOTH_KINDS
@pytest.mark.parametrize("made_in, used_in", [("inference", "no_grad"), ("no_grad", "inference")])
def test_inference_mode_and_no_grad(
    llama: PreTrainedModel, made_in: str, used_in: str, compileable: bool, tmp_path: Path
) -> None:
    # Tensors that were made in inference mode cannot be written to outside of it; all that replaces tensors is done there.
    modes = {"inference": torch.inference_mode, "no_grad": torch.no_grad}
    input_ids, path = tokens(60, 2), tmp_path / "cache"
    expected = streamed_logits(llama, input_ids, N_SINK, WINDOW)
    cache, resumed = (SinkWindowCache(N_SINK, WINDOW, compileable=compileable) for _ in range(2))
    with modes[made_in]():
        llama(input_ids[:, :10], past_key_values=cache)
        llama(input_ids[:, 10:11], past_key_values=cache)
        cache.batch_select_indices(torch.tensor([1, 0]))
        cache.save(path)
        resumed.load(path, llama)
        copied = copy.deepcopy(cache)
    for one in (cache, resumed, copied):
        with modes[used_in]():
            first = [llama(input_ids[[1, 0], t : t + 1], past_key_values=one).logits for t in range(11, 40)]
            assert one.rebase() > 0
            for t in range(40, 50):
                positions = one.next_position_ids().expand(2, -1)
                first.append(llama(input_ids[[1, 0], t : t + 1], position_ids=positions, past_key_values=one).logits)
        assert relative_error(torch.cat(first, dim=1)[[1, 0]][:, 1:], expected[:, 12:50]) <= TOLERANCE


def test_recorded_tokens_come_back_in_another_mode(llama: PreTrainedModel) -> None:
    input_ids, cache = tokens(40), SinkWindowCache(N_SINK, WINDOW)
    with torch.inference_mode():
        llama(input_ids[:, :5], past_key_values=cache)
        one_by_one(llama, input_ids[:, 5:20], cache)
        cache.activate_past_recording()
        llama(tokens(4, seed=1), past_key_values=cache)
    with torch.no_grad():
        cache.crop(-4)
        logits = one_by_one(llama, input_ids[:, 20:], cache)
    expected = streamed_logits(llama, input_ids, N_SINK, WINDOW)[:, 20:]
    assert relative_error(logits, expected) <= TOLERANCE


# --- in a pipeline ---


@pytest.fixture
def pipe(llama: PreTrainedModel) -> Any:
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", padding_side="left")
    return pipeline("text-generation", model=llama, tokenizer=tokenizer, device="cpu")


def said(pipe: Any, texts: Any, cache: SinkWindowCache, **more: Any) -> Any:
    options = {"do_sample": False, "max_new_tokens": 25, "eos_token_id": None, "return_full_text": False}
    return pipe(texts, past_key_values=cache, **options, **more)


def words(length: int, seed: int) -> str:
    return " ".join(f"w{token}" for token in tokens(length, seed=seed)[0].tolist())


@BOTH_KINDS
def test_pipeline(llama: PreTrainedModel, pipe: Any, compileable: bool) -> None:
    cache = SinkWindowCache(N_SINK, WINDOW, compileable=compileable)
    (answer,) = said(pipe, words(6, seed=1), cache)
    text = pipe.tokenizer(f"{words(6, seed=1)} {answer['generated_text']}", return_tensors="pt").input_ids
    assert text.shape == (1, 31)
    assert torch.equal(streamed_logits(llama, text, N_SINK, WINDOW)[:, 5:-1].argmax(-1), text[:, 6:])
    assert cache.get_seq_length() == 30


def test_pipeline_with_a_batch(pipe: Any) -> None:
    texts = [words(9, seed=1), words(2, seed=2)]
    together = said(pipe, texts, SinkWindowCache(N_SINK, WINDOW), batch_size=2)
    assert together == [said(pipe, text, SinkWindowCache(N_SINK, WINDOW)) for text in texts]


def test_a_pipeline_that_hands_one_cache_from_text_to_text(pipe: Any) -> None:
    # Without batch_size it feeds them one after the other, and the second would go on where the first ended.
    with pytest.raises(ValueError, match=r"has seen 33 tokens.*no token.*reset\(\)"):
        said(pipe, [words(9, seed=1), words(2, seed=2)], SinkWindowCache(N_SINK, WINDOW))


# --- with an adapter ---


@pytest.fixture
def adapted() -> tuple[Any, PreTrainedModel]:
    """A model with LoRA matrices beside all that makes queries, keys and values, and one that has them merged."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "k_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(tiny_model("llama"), config).eval()
    return model, copy.deepcopy(model).merge_and_unload()


@BOTH_KINDS
def test_lora(adapted: tuple[Any, PreTrainedModel], compileable: bool, tmp_path: Path) -> None:
    # The caller is no transformers model, and one lies within.
    model, merged = adapted
    assert streams_exactly(model, merged, compileable)
    assert goes_on_from_a_file(model, merged, compileable, tmp_path / "cache")
    assert goes_on_for_ever(model, merged, compileable)


def test_lora_streams_and_verifies(adapted: tuple[Any, PreTrainedModel], llama: PreTrainedModel) -> None:
    model, merged = adapted
    assert streams_in_chunks(model, merged)
    assert verify(model) < 1e-4
    with model.disable_adapter():
        assert streams_exactly(model, llama, compileable=False)


def with_virtual_tokens(kind: str) -> Any:
    """A model that PEFT gives three virtual tokens: as keys and values ("Prefix"), or as embeddings ("Prompt")."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    torch.manual_seed(0)
    config = getattr(peft, f"{kind}TuningConfig")(num_virtual_tokens=3, task_type="CAUSAL_LM")
    return peft.get_peft_model(tiny_model("llama"), config).eval()


@pytest.mark.parametrize("more", [{}, {"custom_generate": endless}], ids=["generate", "endless"])
@BOTH_KINDS
def test_prefix_tuning_is_refused(compileable: bool, more: dict[str, Any]) -> None:
    # PEFT would put the prefix into a cache of its own, and use that.
    model = with_virtual_tokens("Prefix")
    cache = SinkWindowCache(N_SINK, WINDOW, compileable=compileable)
    for input_ids, mask in ((tokens(6), None), (tokens(6, 2), torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6]))):
        with pytest.raises(NotImplementedError, match=r"prefix tuning.*Use DynamicCache"):
            model.generate(
                input_ids=input_ids, attention_mask=mask, past_key_values=cache, max_new_tokens=9, **more, **PLAIN
            )
        assert not cache.get_seq_length()
    # The cache is as good as new, and so is the model without its prefix.
    with model.disable_adapter():
        model.generate(input_ids=tokens(6), past_key_values=cache, max_new_tokens=9, **PLAIN)


@pytest.mark.parametrize("kind", ["Prefix", "Prompt"])
def test_verify_says_which_tuning_it_cannot_judge(kind: str) -> None:
    with pytest.raises(NotImplementedError, match=f"{kind.lower()} tuning.*Verify the base model"):
        verify(with_virtual_tokens(kind))


def test_prompt_tuning() -> None:
    model = with_virtual_tokens("Prompt")
    prompt, cache, other = tokens(6), SinkWindowCache(N_SINK, WINDOW), SinkWindowCache(N_SINK, WINDOW)
    options: dict[str, Any] = {"past_key_values": cache, "max_new_tokens": 30, **PLAIN}
    if "cache" in cache_kwargs(None):  # PEFT 0.21 looks for past_key_values, and feeds virtual tokens at every step
        with pytest.raises(NotImplementedError, match=r"prompt tuning.*virtual tokens at every step.*newer PEFT"):
            model.generate(input_ids=prompt, **options)
        return
    text = model.generate(input_ids=prompt, **options)
    assert cache.get_seq_length() == 3 + 6 + 29
    base = model.get_base_model()
    embeddings = torch.cat([model.get_prompt(batch_size=1), base.get_input_embeddings()(prompt)], dim=1)
    by_hand = prompt
    with torch.no_grad():
        logits = base(inputs_embeds=embeddings, past_key_values=other).logits
        for _ in range(30):
            by_hand = torch.cat([by_hand, logits[:, -1:].argmax(-1)], dim=1)
            logits = base(by_hand[:, -1:], past_key_values=other).logits
    assert torch.equal(text, by_hand)


def test_prompt_tuning_of_padded_rows_is_refused_for_its_reason() -> None:
    # They are padded on the left, and virtual tokens come before the pads.
    model, mask = with_virtual_tokens("Prompt"), torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    options = {"attention_mask": mask, "past_key_values": SinkWindowCache(N_SINK, WINDOW), "max_new_tokens": 9, **PLAIN}
    reasons = ["prompt tuning.*virtual tokens before the pads.*one row at a time", "newer PEFT"]
    with pytest.raises(NotImplementedError, match=reasons["cache" in cache_kwargs(None)]):
        model.generate(input_ids=tokens(6, 2), **options)


def test_endless_does_not_leave_virtual_tokens_out() -> None:
    model = with_virtual_tokens("Prompt")
    options = {"past_key_values": SinkWindowCache(N_SINK, WINDOW), "custom_generate": endless, "max_new_tokens": 9}
    with pytest.raises(NotImplementedError, match=r"endless.*virtual tokens of prompt tuning"):
        model.generate(input_ids=tokens(6), **options, **PLAIN)


# --- weights elsewhere ---


def cpu_offloaded(model: PreTrainedModel, _: Path) -> Any:
    return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


def disk_offloaded(model: PreTrainedModel, folder: Path) -> Any:
    return accelerate.disk_offload(model, folder / "weights", execution_device=torch.device("cpu"))


def spread_by_device_map(model: PreTrainedModel, folder: Path) -> Any:
    """As `device_map="auto"` does when memory is short."""
    model.save_pretrained(folder / "model")
    parts = ("embed_tokens", "layers.0", "layers.1", "layers.2", "norm", "rotary_emb")
    device_map = {f"model.{part}": "disk" if part in ("layers.0", "layers.2") else "cpu" for part in parts}
    return LlamaForCausalLM.from_pretrained(
        folder / "model", device_map={**device_map, "lm_head": "disk"}, offload_folder=folder / "weights"
    )


OFFLOADED = pytest.mark.parametrize("offloaded", [cpu_offloaded, disk_offloaded, spread_by_device_map])


@BOTH_KINDS
@OFFLOADED
def test_offloaded_weights(
    llama: PreTrainedModel, offloaded: Callable[[PreTrainedModel, Path], Any], compileable: bool, tmp_path: Path
) -> None:
    # Such weights are on the device "meta", where states would be lost.
    model = offloaded(tiny_model("llama"), tmp_path)
    assert any(weight.is_meta for weight in model.parameters())
    assert streams_exactly(model, llama, compileable)
    assert goes_on_from_a_file(model, llama, compileable, tmp_path / "cache")
    assert goes_on_for_ever(model, llama, compileable)


@OFFLOADED
def test_offloaded_weights_stream_and_verify(
    llama: PreTrainedModel, offloaded: Callable[[PreTrainedModel, Path], Any], tmp_path: Path
) -> None:
    model = offloaded(tiny_model("llama"), tmp_path)
    assert streams_in_chunks(model, llama)
    assert verify(model, n_sink=2, window=5, tokens=16) < 1e-4  # its weights are read anew at every call


def test_offloaded_frequencies_are_refused() -> None:
    # What the config says need not be what the model has: here it is silently 0.9 too small in the config's eyes.
    model = tiny_model("llama")
    rotary = model.model.rotary_emb
    rotary.register_buffer("inv_freq", 0.9 * rotary.inv_freq, persistent=True)
    model = accelerate.cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=True)
    with pytest.raises(NotImplementedError, match=r"buffer rotary_emb\.inv_freq is offloaded.*offload_buffers=False"):
        one_by_one(model, tokens(3), SinkWindowCache(N_SINK, WINDOW))


# --- on two devices ---


@torch.no_grad()
def test_layers_on_two_devices(llama: PreTrainedModel) -> None:
    # "meta" stands for the second: whatever mixes it with the first fails. (Compileable caches read their position from the
    # device, so that only two_gpus.py can tell.)
    spread, plain = SinkWindowCache(N_SINK, WINDOW), SinkWindowCache(N_SINK, WINDOW)
    devices = ["cpu", "meta", "cpu"]
    for cache in (spread, plain):
        cache.prepare_for(llama)

    def feed(lengths: tuple[int, ...]) -> None:
        for length in lengths:
            keys, values = torch.randn(2, 2, 2, length, 16).unbind()
            assert spread.get_mask_sizes(length, 1) == plain.get_mask_sizes(length, 1)
            for layer, device in enumerate(devices):
                expected = plain.update(keys, values, layer)
                attended = spread.update(keys.to(device), values.to(device), layer)
                for one, other in zip(attended, expected, strict=True):
                    assert one.shape == other.shape
                    assert one.device.type == device
                    assert device == "meta" or torch.equal(one, other)

    feed((4, *[1] * 12, 3, *[1] * 20))
    for cache in (spread, plain):
        assert cache.rebase() > 0
        cache.reorder_cache(torch.tensor([1, 0]))
    feed((2, *[1] * 5))
    for cache in (spread, plain):
        cache.activate_past_recording()
    feed((1, 1, 1))
    for cache in (spread, plain):
        cache.crop(-2)
    feed((1, 1))
    assert [layer.keys.device.type for layer in spread.layers] == devices
    assert spread.nbytes == plain.nbytes


# --- default device ---


@pytest.fixture
def on_cpu(llama: PreTrainedModel) -> Iterator[SimpleNamespace]:
    """A draft model and tensors on the CPU; what is made after them is by default on another device.

    That is "meta": a tensor that is made there by mistake has no numbers, and an operation that mixes it with others fails.
    """
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[0, :2] = 0
    made = {"prompt": tokens(6), "text": tokens(30), "rows": tokens(6, 2), "mask": mask, "swap": torch.tensor([1, 0])}
    draft = tiny_model("llama", layers=1)
    torch.set_default_device("meta")
    yield SimpleNamespace(draft=draft, **made)
    torch.set_default_device(None)


@BOTH_KINDS
def test_generate_where_the_default_device_is_another(
    on_cpu: SimpleNamespace, llama: PreTrainedModel, compileable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sink_cache.twin._remembered", {})
    options, texts = PLAIN | {"max_new_tokens": 60}, []
    for more in ({}, {"custom_generate": endless, "keep_tokens": 99}):
        cache = SinkWindowCache(N_SINK, WINDOW, compileable=compileable)
        texts.append(llama.generate(on_cpu.prompt, past_key_values=cache, **more, **options))
    assert torch.equal(*texts)
    turn = torch.cat([texts[1][:, -1:], on_cpu.prompt], dim=1)  # two turns in one cache
    assert llama.generate(turn, past_key_values=cache, custom_generate=endless, **options).shape == (1, N_SINK + WINDOW)
    torch.set_default_device(None)
    expected = streamed_logits(llama, texts[0], N_SINK, WINDOW)[:, 5:-1].argmax(-1)
    assert torch.equal(texts[0][:, 6:], expected)


@pytest.mark.parametrize("more", [{}, {"custom_generate": endless, "keep_tokens": 99}], ids=["generate", "endless"])
@pytest.mark.parametrize("model_type", ["llama", "mpt"])
def test_padded_rows_where_the_default_device_is_another(
    on_cpu: SimpleNamespace, model_type: str, more: dict[str, Any]
) -> None:
    # mpt is no model of rotary keys: they are put in order.
    with torch.device("cpu"):
        model = tiny_model(model_type)
    options = PLAIN | {"max_new_tokens": 30, "use_cache": True} | more
    caches = [SinkWindowCache(N_SINK, WINDOW) for _ in range(3)]
    text = model.generate(on_cpu.rows, attention_mask=on_cpu.mask, past_key_values=caches[0], **options)
    alone = [on_cpu.rows[:1, 2:], on_cpu.rows[1:]]
    each = [model.generate(row, past_key_values=cache, **options) for row, cache in zip(alone, caches[1:], strict=True)]
    assert torch.equal(text[0, -30:], each[0][0, -30:])
    assert torch.equal(text[1, -30:], each[1][0, -30:])


def test_candidates_where_the_default_device_is_another(on_cpu: SimpleNamespace, llama: PreTrainedModel) -> None:
    options = PLAIN | {"max_new_tokens": 30}
    plain = llama.generate(on_cpu.prompt, past_key_values=SinkWindowCache(N_SINK, WINDOW), **options)
    for helped in ({"assistant_model": on_cpu.draft}, {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1}):
        cache = SinkWindowCache(N_SINK, WINDOW)
        assert torch.equal(llama.generate(on_cpu.prompt, past_key_values=cache, **helped, **options), plain)


@BOTH_KINDS
def test_all_else_where_the_default_device_is_another(
    on_cpu: SimpleNamespace, llama: PreTrainedModel, compileable: bool, tmp_path: Path
) -> None:
    cache, resumed = (SinkWindowCache(N_SINK, WINDOW, compileable=compileable) for _ in range(2))
    assert cache.next_position_ids(5).device.type == "cpu"
    logits = [*stream(llama, on_cpu.text[:, :24], cache, chunk_size=7)]
    assert cache.rebase() == WINDOW
    cache.save(tmp_path / "cache")
    resumed.load(tmp_path / "cache", llama)
    resumed.reorder_cache(on_cpu.swap[1:])
    resumed.batch_repeat_interleave(2)
    resumed.reorder_cache(on_cpu.swap)
    both = on_cpu.text.repeat(2, 1)
    with torch.no_grad():
        for t in range(24, 30):
            positions = resumed.next_position_ids().expand(2, -1)
            logits.append(llama(both[:, t : t + 1], position_ids=positions, past_key_values=resumed).logits[:1])
    assert verify(llama) < 1e-4
    copied = copy.deepcopy(cache)
    copied.reset()
    if not compileable:
        with torch.no_grad():
            llama(on_cpu.text[:, :20], past_key_values=copied)
            copied.activate_past_recording()
            llama(on_cpu.text[:, 20:24], past_key_values=copied)
            copied.crop(-3)
        assert copied.get_seq_length() == 21
    torch.set_default_device(None)
    expected = streamed_logits(llama, on_cpu.text, N_SINK, WINDOW)
    assert relative_error(torch.cat(logits, dim=1), expected) <= TOLERANCE
