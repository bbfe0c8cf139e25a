"""Tiny random models of every causal language model family that the installed transformers has.

The families come from the auto mapping and the sizes from rules on the names of config fields, so a new family is
picked up without being listed here. All that concerns positions and attention stays as the family's default has it,
but for the window sizes, which shrink so that a dozen tokens are enough to leave them.
"""

import inspect
import re
from collections.abc import Callable, Collection
from dataclasses import MISSING, fields
from typing import Any

import torch
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, EXPERTS, VOCAB = 64, 4, 2, 16, 4, 128
WINDOW = 8
MIN_POSITIONS = 512
GAIN = 1.25  # attention scores of a spread at which the weights are neither uniform nor all on one token
# Options of generate() for tokens that can be told in advance, to the last one.
PLAIN: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
FIRST_WORD = 8  # pad, bos and eos lie below, so ids from here up to VOCAB are ordinary in every family

# The whole name of a field -> its tiny value from the default one; the first match wins.
SIZE_RULES: list[tuple[str, Callable[[int], int]]] = [
    (r"(pad|bos|eos|sep|cls|mask|unk|eod|decoder_start)_(token_id|index)", lambda n: n % FIRST_WORD),
    (r"(mamba_n|mamba_num|n_mamba)_heads", lambda n: min(n, 2 * HIDDEN // HEAD_DIM)),
    (r".*(key_value|kv)_(n_)?heads|kv_n_heads", lambda n: min(n, KV_HEADS)),
    (r"index(er)?_n_heads", lambda n: n),  # their scores are clipped at zero: few heads would all be zero and tie
    (r".*heads?(_per_layer)?", lambda n: min(n, HEADS)),
    (r".*head_?dim|.*head_size|.*_d_head|kv_channels|dim_head|d_head|query_pre_attn_scalar", lambda n: HEAD_DIM),
    (r".*(intermediate_size|ffn_dim|ffn_hidden_size)(_mlp)?|dff|dim_ff|d_inner|feed_forward_size", lambda n: HIDDEN),
    (r".*experts_per_tok(en)?|moe_topk|moe_k|top_k_experts", lambda n: min(n, 2)),
    (r".*(num|n)(_local|_routed)?_experts|zero_expert_num", lambda n: min(n, EXPERTS)),
    (r"num_codebooks", lambda n: 1),
    (r"n_group|topk_group|num_expert_group|(mamba_)?n_?groups", lambda n: 1),
    (r".*_rank|.*_lowrank", lambda n: 2 * HEAD_DIM),  # unlike a head's, so that latent and rotated keys differ in size
    (r".*d_state|.*state_size", lambda n: HEAD_DIM),
    (r".*vocab(_size)?(_per_layer_input)?", lambda n: min(n, VOCAB)),
    (r"((sliding|attention)_)?window(_size)?|local_attention", lambda n: min(n, WINDOW)),
    (r"attention_chunk_size|index_topk", lambda n: min(n, WINDOW)),
    (r".*hidden_size.*", lambda n: HIDDEN),
    (r"(mamba_)?chunk_size", lambda n: min(n, 2 * WINDOW)),  # slow scans fill every chunk up, also for one token
    (r"max_position_embeddings|n_positions|max_target_positions|max_seq_len", lambda n: max(n, MIN_POSITIONS)),
]
DEPTH = re.compile(r"(num|n)_(hidden_|encoder_|decoder_)?layers?|(en|de)coder_layers|num_blocks")


def _cycle(*kinds: str) -> Callable[[int], list[str]]:
    return lambda layers: [kinds[i % len(kinds)] for i in range(layers)]


_SLIDING_AND_FULL = _cycle("sliding_attention", "full_attention")

_KIMI: dict[str, Any] = {
    "layer_types": _cycle("linear_attention", "linear_attention", "full_attention"),
    "mlp_layer_types": lambda layers: ["dense"] + ["sparse"] * (layers - 1),
    "linear_num_heads": KV_HEADS,
    "linear_head_dim": HEAD_DIM // 2,
}

# Config fields that the rules cannot know, by the `model_type` of the config they belong to; a callable is given the
# number of layers.
QUIRKS: dict[str, dict[str, Any]] = {
    # The default of a required field is None or empty.
    "cohere_compass_text": {
        "layer_types": _SLIDING_AND_FULL,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": None,
        },
    },
    "cosmos3_edge_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": EXPERTS, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "ernie4_5_vl_moe_text": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]}
    },
    "hunyuan_vl_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2, 2]}},
    "hy_v4_vl_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}},
    "lfm2_moe": {"layer_types": _cycle("conv", "full_attention")},
    "qwen4_exp_text": {
        "indexer_n_heads": 16,
        "indexer_kv_heads": 1,
        "indexer_head_dim": HEAD_DIM,
        "indexer_budget": WINDOW,
        "indexer_compress_ratio": 2,
    },
    "xmod": {"default_language": "en_XX"},
    # The default has one kind of layer only, or a pattern too long for few layers; the checkpoints mix these.
    "bamba": {"attn_layer_indices": lambda layers: list(range(0, layers, 2))},
    "gpt_neo": {"attention_types": lambda layers: [[_cycle("global", "local")(layers), 1]]},
    "granitemoehybrid": {"layer_types": _cycle("full_attention", "linear_attention")},
    "jamba": {"attn_layer_period": 3, "attn_layer_offset": 0},  # one with experts and one without follow
    "laguna": {"layer_types": _cycle("full_attention", "sliding_attention")},  # the first has no experts
    "lfm2": {"layer_types": _cycle("conv", "full_attention")},
    "mellum": {"layer_types": _SLIDING_AND_FULL},
    "minimax_m3_vl_text": {
        "layer_types": _cycle("full_attention", "minimax_m3_sparse"),
        "index_block_size": 2,
        "index_topk_blocks": 2,
    },
    "zaya": {"layer_types": _cycle("hybrid", "hybrid", "hybrid_sliding"), "sliding_window": WINDOW},
    # Layers are tied to an earlier one of their kind, so that kind has to come twice.
    "gemma3n_text": {
        "layer_types": _SLIDING_AND_FULL,
        "num_kv_shared_layers": lambda layers: 1 if layers < 8 else 2,
        "activation_sparsity_pattern": lambda layers: [0.95] * 2 + [0.0] * (layers - 2),
    },
    # A loop over some layers in the middle.
    "dory": {"n_input_layers": 1, "n_output_layers": 1, "n_recurrent_layers": lambda layers: layers - 2},
    "inkling2_loop_text": {
        "layer_types": _cycle("hybrid_sliding", "hybrid_sliding", "hybrid"),
        "n_layers_per_attn_res_block": 3,
        "loop_layer_index_start": 3,
        "loop_layer_index_end": 6,
    },
    "zamba": {"layers_block_type": lambda layers: ["linear_attention"] + ["hybrid"] * (layers - 1)},
    # These models disagree with themselves: moshi masks without regard to the window that its cache keeps, the others
    # bound the time step from below in the scan over many tokens and not in the step for one.
    "moshi": {"sliding_window": 3000},
    "nemotron_h": {"time_step_min": 1e-9, "time_step_floor": 1e-2},
    "zamba2": {"time_step_min": 1e-9, "time_step_floor": 1e-2},
    # Sizes that are arguments and no fields of the config, or that have to fit each other.
    "qwen2_5_omni_thinker": {"vision_start_token_id": 5, "vision_end_token_id": 6},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 5, "vision_end_token_id": 6},
    "glm_image_vqmodel": {"num_embeddings": VOCAB, "embed_dim": HIDDEN},
    "qwen2_vl_vision": {"depth": 1, "embed_dim": HIDDEN},
    "dots3_note_text": {
        "sliding_window": WINDOW,
        "swa_num_attention_heads": KV_HEADS,
        "swa_num_key_value_heads": KV_HEADS,
        "swa_q_lora_rank": 2 * HEAD_DIM,
        "swa_kv_lora_rank": 3 * HEAD_DIM,
        "swa_head_dim": 2 * HEAD_DIM,
        "swa_qk_nope_head_dim": HEAD_DIM,
        "swa_v_head_dim": HEAD_DIM,
    },
    "falcon_h1": {"mamba_d_ssm": 2 * HIDDEN},
    # Every kind of layer in fewer layers, of smaller heads: their slow scan fills each token up to 64, in tensors of
    # 64 x 64 numbers for each number of a head.
    "bailing_hybrid": _KIMI,
    "kimi_linear": _KIMI,
    "gemma4_text": {"global_head_dim": 2 * HEAD_DIM},
    "gemma4_unified_text": {"global_head_dim": 2 * HEAD_DIM},
    "mamba2": {"num_heads": 2 * HIDDEN // HEAD_DIM},
    "reformer": {"axial_pos_embds": False},
}

# Layers that a tiny model needs so that every kind of layer of the default config is among them, where three are too few.
DEPTHS = {
    "beam": 4,
    "deepseek_v3": 4,
    "exaone_moe": 4,
    "flint": 6,
    "gemma4": 7,
    "gemma4_text": 7,
    "gemma4_unified": 7,
    "gemma4_unified_text": 7,
    "gemma3n_text": 8,
    "inkling2_loop_text": 7,
    "inkling2_text": 7,
    "lfm2_moe": 4,
    "mimo_v2_flash": 6,
    "mllama": 4,
    "modernbert-decoder": 4,
    "nemotron_h": 4,
}
# Quirks that replace which kinds of layer there are.
_PATTERNS = {
    "layer_types", "attn_layer_indices", "attention_types", "attn_layer_period", "attn_layer_offset", "layers_block_type",
    "mlp_layer_types", "num_kv_shared_layers",
}  # fmt: skip


class CannotBuild(Exception):
    """The family has no tiny causal language model; the text says why in one short line."""


def model_types() -> list[str]:
    """Every key of the auto mapping of causal language models, sorted."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_model(model_type: str, *, layers: int | None = None, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random model of the family: float32, on the CPU, in eval mode, with "sdpa" attention where it is supported.

    Every kind of layer of the family's default config is in it, if `layers` is not given. `overrides` are fields of the (text)
    config. Ids from `FIRST_WORD` up to `VOCAB` are ordinary tokens.
    """

    def build() -> PreTrainedModel:
        config_class, model_class = _classes(model_type)
        return model_class(tiny_config(config_class, layers or depth(model_type), overrides))

    return random_model(build, seed)


def depth(model_type: str) -> int:
    """How many layers a tiny model of the family has."""
    return DEPTHS.get(model_type, 3)


def _classes(model_type: str) -> tuple[type[PreTrainedConfig], type[PreTrainedModel]]:
    config_class = CONFIG_MAPPING[model_type]
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
    if model_class.config_class in config_class.sub_configs.values():
        config_class = model_class.config_class  # the class models the text part of a composite config alone
    return config_class, model_class


def missing_kinds(model_type: str) -> list[int]:
    """The indices of layers of the family's default config of whose kind the tiny model has none.

    Two layers are of one kind if they have the same modules, with parameters of the same shapes, and equal settings in these:
    words, true or false, none or zero. So it does not matter by which list, period or offset a config says it.
    """
    config_class, model_class = _classes(model_type)
    default = config_class().get_text_config(decoder=True)
    tiny = tiny_config(config_class, depth(model_type), {})
    with torch.device("meta"):
        known = _kinds(model_class(tiny))
        try:
            deep = model_class(tiny_config(config_class, default.num_hidden_layers, {}, _PATTERNS))
        except TypeError:  # the default config is no model without its quirks
            deep = model_class(tiny_config(config_class, default.num_hidden_layers, {}))
        all_kinds = _kinds(deep)
    return [index for index, kind in enumerate(all_kinds) if kind not in known and kind not in all_kinds[:index]]


def _kinds(model: PreTrainedModel) -> list[frozenset]:
    """The kind of each layer."""
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    return [
        frozenset(
            (
                re.sub(r"\d+", "#", name),  # such as adapters, of which there may be one for each other layer
                type(module).__name__,
                *((key, tuple(weight.shape)) for key, weight in module.named_parameters(recurse=False)),
                *(
                    (key, value if isinstance(value, bool | str) else bool(value))
                    for key, value in vars(module).items()
                    if value is None or isinstance(value, bool | str | float)
                ),
            )
            for name, module in layer.named_modules()
        )
        for layer in max(lists, key=len)
    ]


def random_model(build: Callable[[], PreTrainedModel], seed: int) -> PreTrainedModel:
    """What `build` makes, with random weights of this seed: float32, on the CPU, in eval mode."""
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = build().float().eval()
            _randomise(model)
    except Exception as error:  # whatever a family cannot do, the sweep has to go on with the next one
        raise CannotBuild(_one_line(error)) from error
    return model


def tokens(length: int, batch_size: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randint(FIRST_WORD, VOCAB, (batch_size, length), generator=torch.Generator().manual_seed(seed))


def cache_name(model: PreTrainedModel) -> str:
    """What the model's forward calls its cache: `cache` from transformers 5.24 on, `past_key_values` before."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


@torch.no_grad()
def dense_is_right(model: PreTrainedModel, *, length: int = 12) -> str | None:
    """None if `length` tokens fed one at a time through a `DynamicCache` give the logits of one pass without a cache.

    Otherwise a short reason: such a family cannot be asked to do better with another cache.
    """
    accepted = inspect.signature(model.forward).parameters
    if not {"cache", "past_key_values"} & accepted.keys():
        return "forward takes no cache"
    input_ids = torch.randint(FIRST_WORD, VOCAB, (1, length), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(length)[None] if "position_ids" in accepted else None

    def logits(start: int, stop: int, **kwargs: Any) -> torch.Tensor:
        if positions is not None:
            kwargs["position_ids"] = positions[:, start:stop]
        return model(input_ids[:, start:stop], **kwargs).logits  # (1, stop - start, vocab)

    try:
        expected = logits(0, length, use_cache=False)
        cache = DynamicCache(config=model.config)
        steps = [logits(i, i + 1, use_cache=True, **{cache_name(model): cache}) for i in range(length)]
    except Exception as error:
        return _one_line(error)
    error_size = ((torch.cat(steps, dim=1) - expected).abs().max() / expected.abs().max()).item()
    return None if error_size < 1e-4 else f"relative error {error_size:.1e}"


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:160]


def tiny_config(
    config_class: type[PreTrainedConfig], layers: int, overrides: dict[str, Any], but_for: Collection[str] = ()
) -> PreTrainedConfig:
    """The default config of the class with tiny sizes and `layers` layers; `overrides` go to its text config.

    `but_for` are names of quirks that are left out.
    """
    default = config_class()
    text_config = default.get_text_config(decoder=True)
    # Built anew and not edited, so that the class derives by itself what follows from the sizes.
    tiny: dict[str, Any] = {}
    for field in fields(config_class):
        value = field.default_factory() if field.default_factory is not MISSING else field.default
        current = vars(default).get(field.name)
        if isinstance(current, PreTrainedConfig):
            is_text = current is text_config
            tiny[field.name] = tiny_config(
                type(current), layers if is_text else 1, overrides if is_text else {}, but_for
            )
        elif DEPTH.fullmatch(field.name) and isinstance(value, int):
            tiny[field.name] = layers
        elif field.name == "is_decoder":
            tiny[field.name] = True
        elif (size := _tiny_size(field.name, value, default)) is not None:
            tiny[field.name] = size
    tiny |= _layer_window(default, layers)
    for name, value in QUIRKS.get(config_class.model_type, {}).items():
        if name not in but_for:
            tiny[name] = value(layers) if callable(value) else value
    if text_config is default:
        tiny |= {default.attribute_map.get(name, name): value for name, value in overrides.items()}
    return config_class(**tiny)


def _tiny_size(name: str, value: Any, default: PreTrainedConfig) -> Any:
    """The tiny value of one config field, or None where the default should stay."""
    if isinstance(value, list) and value and all(type(item) is int for item in value):
        return [_tiny_size(name, item, default) or item for item in value]
    if name in ("head_dim", "num_key_value_heads") and value is None:
        value = HEADS * HEAD_DIM  # most families derive these, but some have models that cannot do without them
    if type(value) is not int:
        return None
    if name == "num_key_value_heads" and "kv_lora_rank" in vars(default):
        return HEADS  # latent attention expands to keys of every head
    if name == "rotary_dim":
        return value * HEAD_DIM * default.num_attention_heads // default.hidden_size
    for pattern, shrink in SIZE_RULES:
        if re.fullmatch(pattern, name):
            return shrink(value)
    return HIDDEN if value == getattr(default, "hidden_size", None) else None


def _layer_window(default: PreTrainedConfig, layers: int) -> dict[str, list]:
    """Every per-layer list of the config, cut to the run of `layers` layers that has the most kinds of layer in it."""
    depth = getattr(default, "num_hidden_layers", None)
    lists = {
        name: list(value) * (layers // depth + 1)
        for name, value in vars(default).items()
        if isinstance(value, list | tuple) and len(value) == depth and list(value) != list(range(depth))
    }
    if not lists:
        return {}
    kinds = list(zip(*lists.values(), strict=True))
    types = lists.get("layer_types", kinds)
    runs = [slice(start, start + layers) for start in range(len(kinds) - layers + 1)]
    run = max(runs, key=lambda run: (len(set(kinds[run])), len(set(types[run]))))
    return {name: _tiny_size(name, value[run], default) or value[run] for name, value in lists.items()}


@torch.no_grad()
def _randomise(model: PreTrainedModel) -> None:
    """Weights drawn about zero get the scale that keeps unit vectors near unit size; all others move a little."""
    for parameter in model.parameters():
        spread = parameter.std() if parameter.numel() > 1 else 0.0
        if parameter.ndim > 1 and parameter.mean().abs() <= spread:
            parameter.normal_(std=GAIN * min(parameter.shape[-1], HIDDEN) ** -0.5)
        else:
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    for module in model.modules():
        # Trained weights make up for scores that the model does not scale down; random ones would saturate.
        if getattr(module, "scaling", None) == 1.0 and hasattr(module, "q_proj"):
            getattr(module, "q_norm", module.q_proj).weight.mul_(HEAD_DIM**-0.5)
