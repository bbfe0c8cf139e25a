"""A saved cache goes on as if nothing had happened, and a file that does not fit changes nothing."""

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from sink_cache import SinkWindowCache

from .families import tiny_model
from .test_exact import one_by_one, tokens


@pytest.mark.parametrize("compileable", [False, True])
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])  # gemma3: sliding layers beside ours
@pytest.mark.parametrize("length", [2, 9, 30])  # sinks still missing, not full, evicting
def test_goes_on_from_a_file(tmp_path: Path, model_type: str, compileable: bool, length: int) -> None:
    model, input_ids = tiny_model(model_type), tokens(length + 15, 2)
    cache = SinkWindowCache(3, 9, compileable=compileable)
    one_by_one(model, input_ids[:, :length], cache)
    cache.save(tmp_path / "cache.safetensors")
    resumed = SinkWindowCache(3, 9, compileable=compileable)
    resumed.load(tmp_path / "cache.safetensors", model)
    assert resumed.get_seq_length() == length
    assert torch.equal(
        one_by_one(model, input_ids[:, length:], resumed), one_by_one(model, input_ids[:, length:], cache)
    )


def test_padding_and_rebases_are_in_the_file(tmp_path: Path, llama: PreTrainedModel) -> None:
    input_ids, mask = tokens(20, 2), torch.ones(2, 20, dtype=torch.long)
    mask[1, :7] = 0
    options = {"do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True, "output_logits": True}
    cache = SinkWindowCache(2, 6)
    first = llama.generate(
        input_ids, attention_mask=mask, past_key_values=cache, max_new_tokens=12, min_new_tokens=12, **options
    )
    cache.save(tmp_path / "cache.safetensors")
    resumed = SinkWindowCache(2, 6)
    resumed.load(tmp_path / "cache.safetensors", llama)
    longer = torch.cat([mask, mask.new_ones(2, 12)], dim=1)
    logits = [
        llama.generate(first.sequences, attention_mask=longer, past_key_values=one, max_new_tokens=5, **options).logits
        for one in (cache, resumed)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*logits, strict=True))

    with torch.no_grad():
        by = cache.rebase()
        cache.save(tmp_path / "rebased.safetensors")
        resumed.load(tmp_path / "rebased.safetensors", llama)
        assert by
        assert torch.equal(resumed.next_position_ids(), cache.next_position_ids())
        assert resumed.get_seq_length() == cache.get_seq_length()


@pytest.mark.parametrize("compileable", [False, True])
def test_positions_of_a_rebased_file_are_looked_at(tmp_path: Path, llama: PreTrainedModel, compileable: bool) -> None:
    # Who loads a file may not know that it was rebased, and models count all tokens.
    cache = SinkWindowCache(3, 5, compileable=compileable)
    one_by_one(llama, tokens(40), cache)
    with torch.no_grad():
        assert cache.rebase()
    cache.save(tmp_path / "cache")
    cache.load(tmp_path / "cache", llama)
    with pytest.raises(NotImplementedError, match="use next_position_ids"):
        one_by_one(llama, tokens(1), cache)


@pytest.mark.parametrize("compileable", [False, True])
def test_pickle(llama: PreTrainedModel, compileable: bool) -> None:
    input_ids, cache = tokens(30), SinkWindowCache(3, 5, compileable=compileable)
    one_by_one(llama, input_ids[:, :15], cache)
    copied = pickle.loads(pickle.dumps(cache))
    assert torch.equal(one_by_one(llama, input_ids[:, 15:], copied), one_by_one(llama, input_ids[:, 15:], cache))


@pytest.mark.parametrize("compileable", [False, True])
def test_a_pickle_holds_everything_once(llama: PreTrainedModel, compileable: bool) -> None:
    # The layers' tensors are views of one, and pickle would save all of that with each.
    cache = SinkWindowCache(3, 1000, compileable=compileable)
    one_by_one(llama, tokens(15), cache)
    assert cache.nbytes < len(pickle.dumps(cache)) < 1.1 * cache.nbytes


def test_goes_on_in_another_process(tmp_path: Path, llama: PreTrainedModel) -> None:
    # What the file does not say may still be known to this process: the rotation, memoised, or who the caller is.
    input_ids, cache = tokens(25), SinkWindowCache(3, 5)
    llama.save_pretrained(tmp_path / "model")
    one_by_one(llama, input_ids[:, :20], cache)
    cache.save(tmp_path / "cache.safetensors")
    expected = one_by_one(llama, input_ids[:, 20:], cache)
    program = (
        "import sys, torch, transformers, sink_cache\n"
        "model = transformers.LlamaForCausalLM.from_pretrained(sys.argv[1] + '/model')\n"
        "cache = sink_cache.SinkWindowCache(3, 5)\n"
        "cache.load(sys.argv[1] + '/cache.safetensors', model)\n"
        f"ids = torch.tensor({input_ids[:, 20:].tolist()})\n"
        "with torch.no_grad():\n"
        "    logits = [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(5)]\n"
        "torch.save(torch.cat(logits, dim=1), sys.argv[1] + '/logits')\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, cwd=Path(__file__).parent.parent)
    assert torch.allclose(torch.load(tmp_path / "logits"), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("compileable", [False, True])
def test_a_file_that_does_not_fit_changes_nothing(tmp_path: Path, llama: PreTrainedModel, compileable: bool) -> None:
    good, input_ids = tmp_path / "good.safetensors", tokens(30)
    other = SinkWindowCache(3, 5, compileable=compileable)
    one_by_one(llama, input_ids[:, :12], other)
    other.save(good)
    files = {
        name: tmp_path / name
        for name in ("truncated", "foreign", "text", "other_sizes", "other_type", "heads", "theta", "deeper", "half")
    }
    files["truncated"].write_bytes(good.read_bytes()[:-100])
    files["text"].write_text("not a cache")
    save_file({"weight": torch.ones(3)}, files["foreign"])
    for name, model, sizes in (
        ("other_sizes", llama, (3, 6)),
        ("other_type", tiny_model("qwen3"), (3, 5)),
        ("heads", tiny_model("llama", num_key_value_heads=4), (3, 5)),
        ("theta", tiny_model("llama", rope_parameters={"rope_type": "default", "rope_theta": 777.0}), (3, 5)),
        ("deeper", tiny_model("llama", layers=4), (3, 5)),
        ("half", tiny_model("llama").bfloat16(), (3, 5)),
    ):
        cache = SinkWindowCache(*sizes)
        one_by_one(model, input_ids[:, :12], cache)
        cache.save(files[name])

    live, twin = SinkWindowCache(3, 5, compileable=compileable), SinkWindowCache(3, 5, compileable=compileable)
    for cache in (live, twin):
        one_by_one(llama, input_ids[:, :20], cache)
    for name, message in {
        "truncated": "damaged",
        "text": "damaged, or no safetensors file",
        "foreign": "not written by SinkWindowCache",
        "other_sizes": "window=6, but this one has window=5",
        "other_type": "model_type='qwen3', but this one has model_type='llama'",
        "heads": "num_key_value_heads=4, but this one has",
        "theta": "does not fit layer 0 of this model",
        "deeper": "4 layers, but this model has 3",
        "half": "bfloat16 states, but this model works in torch.float32",
    }.items():
        with pytest.raises(ValueError, match=message):
            live.load(files[name], llama)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        live.load(tmp_path / "nowhere", llama)
    with pytest.raises(TypeError, match="must be a transformers model, but is a LlamaConfig"):
        live.load(good, llama.config)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        live.save(tmp_path / "nowhere" / "cache")
    assert torch.equal(one_by_one(llama, input_ids[:, 20:], live), one_by_one(llama, input_ids[:, 20:], twin))


@pytest.mark.parametrize("model_type", ["falcon_h1", "jamba"])  # a recurrent state in the same layer, and in others
def test_recurrent_states_are_not_left_out_silently(tmp_path: Path, model_type: str) -> None:
    cache = SinkWindowCache(3, 5)
    one_by_one(tiny_model(model_type), tokens(4), cache)
    with pytest.raises(NotImplementedError, match="cannot be saved"):
        cache.save(tmp_path / "cache")


def test_an_unused_cache_has_nothing_to_save(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to save"):
        SinkWindowCache(3, 5).save(tmp_path / "cache")
    assert not list(tmp_path.iterdir())
