"""The rotation is learned from keys: it must be the model's own, at any size, and what is no rotation must be refused."""

import pytest
import torch
from transformers import CohereConfig, GemmaConfig, GPTNeoXConfig, LlamaConfig, PhiConfig, Qwen3Config

from sink_cache.cache import error_of
from sink_cache.internals import class_for_config
from sink_cache.model_scheme import scheme_of_class
from sink_cache.rotary import ForwardRotation, NotARotation, Rotation, fit_rotation, rotate

HALF_SPLIT = Rotation((2, 3, 0, 1, 4), (-1.0, -0.01, 1.0, 0.01, 0.0))
INTERLEAVED = Rotation((1, 0, 3, 2, 4), (0.5, -0.5, -3e-5, 3e-5, 0.0))


def keys_at(rotation: Rotation, positions: list[int], noise: float = 1e-7) -> dict[int, torch.Tensor]:
    start = torch.randn(32, len(rotation.partner), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return {p: (rotate(start, rotation, p) * (1 + noise * torch.randn_like(start))).float() for p in positions}


POSITIONS = [0, *(8**k for k in range(7)), 3, 777]


@pytest.mark.parametrize("rotation", [HALF_SPLIT, INTERLEAVED])
def test_fit_finds_any_pairing_and_sign(rotation: Rotation) -> None:
    found = fit_rotation(keys_at(rotation, POSITIONS))
    assert found.partner == rotation.partner
    # At the limit of 2^24 positions the angle is then still good to 1e-3.
    assert torch.allclose(torch.tensor(found.frequency), torch.tensor(rotation.frequency), atol=1e-3 / 2**24, rtol=0)


def test_fit_refuses_what_is_no_rotation() -> None:
    keys = keys_at(HALF_SPLIT, POSITIONS)
    bent = {p: k if p < 4096 else keys_at(INTERLEAVED, [p])[p] for p, k in keys.items()}  # other frequencies when long
    scaled = {p: k * torch.tensor([1.0, 2, 3, 4, 5]) for p, k in keys.items()}  # a weighted norm after the rotation
    grows = {p: k * (1 + 0.01 * p) for p, k in keys.items()}
    for wrong in (bent, scaled, grows):
        with pytest.raises(NotARotation):
            fit_rotation(wrong)


def test_moves_add_up_and_undo() -> None:
    keys = torch.randn(3, 7, 5, dtype=torch.float64)
    there = rotate(rotate(keys, HALF_SPLIT, 1000), HALF_SPLIT, 234)
    assert torch.allclose(there, rotate(keys, HALF_SPLIT, 1234))
    assert torch.allclose(rotate(there, HALF_SPLIT, -1234), keys)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_layers_at_once_equals_one_by_one(dtype: torch.dtype) -> None:
    slow = Rotation(HALF_SPLIT.partner, tuple(f / 10 for f in HALF_SPLIT.frequency))
    pristine = torch.randn(2, 3, 2, 4, 5).to(dtype)  # [layers, batch, heads, n_sink, head_dim]
    slots = torch.zeros(2, 3, 2, 9, 5, dtype=dtype)
    forward = ForwardRotation([HALF_SPLIT, slow], pristine.device)
    for shift in (1, 2, 63, 64, 65, 3, 100_000):  # along the table, past its end, back, far away
        forward.all_layers(pristine, (shift,), out=slots[..., :4, :])
        alone = [ForwardRotation([rotation], pristine.device) for rotation in (HALF_SPLIT, slow)]
        copies = [alone[i].one_layer(pristine[i], range(shift - 1, shift + 1)) for i in range(2)]
        for i, rotation in enumerate((HALF_SPLIT, slow)):
            expected = rotate(pristine[i], rotation, shift)
            assert torch.allclose(
                slots[i, ..., :4, :], expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5
            )
            assert torch.allclose(copies[i][:, :, 4:].float(), slots[i, ..., :4, :].float(), atol=1e-6)
    assert not slots[..., 4:, :].any()


SHALLOW = {"num_hidden_layers": 8}  # in their full width; tests/test_families.py has full depth


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(rope_parameters={"rope_type": "default", "rope_theta": 5e5}, num_key_value_heads=8, **SHALLOW),
        GPTNeoXConfig(**SHALLOW),  # a quarter of the dimensions rotate; no head size of its own
        Qwen3Config(**SHALLOW),
        GemmaConfig(**SHALLOW),
        PhiConfig(**SHALLOW),
        CohereConfig(**SHALLOW),  # interleaved pairs
    ],
    ids=lambda config: config.model_type,
)
def test_a_full_size_config_gives_the_models_own_frequencies(config: LlamaConfig) -> None:
    # The twin is narrow; its head size and frequencies must be those of the real model.
    model_class, _ = class_for_config(config)
    scheme = scheme_of_class(model_class, config, error_of)
    heads_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    with torch.device("meta"):
        inv_freq_shape = next(b.shape for n, b in model_class(config).named_buffers() if n.endswith("inv_freq"))
    theta, pairs = config.rope_parameters["rope_theta"], inv_freq_shape[0]
    inv_freq = theta ** -(torch.arange(pairs, dtype=torch.float64) / pairs)
    assert len(scheme.rotations) == config.num_hidden_layers
    for rotation in scheme.rotations.values():
        assert len(rotation.partner) == heads_dim
        turning = torch.tensor(rotation.frequency, dtype=torch.float64).abs().sort(descending=True).values
        assert torch.allclose(turning[: 2 * pairs : 2], inv_freq, rtol=1e-5, atol=1e-11)  # two dimensions a pair
        assert not turning[2 * pairs :].any()
