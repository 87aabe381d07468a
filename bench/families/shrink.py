"""Configs of a real architecture with tiny sizes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

HIDDEN, LAYERS, HEADS, HEAD_DIM, VOCABULARY = 64, 4, 4, 16, 300
MROPE = [2, 3, 3]  # of half a head: time, height and width
SPECIAL_IDS = 285  # placeholders of images and audio lie here, ordinary tokens below

_SIZES = (
    (
        HIDDEN,
        "hidden_size d_model n_embd dim embed_dim hidden_dim output_dim projection_dim lru_width model_dim "
        "encoder_hidden_size decoder_hidden_size cross_hidden_size mm_hidden_size out_hidden_size embedding_size "
        "emb_dim text_hidden_size audio_hidden_size encoder_dim decoder_dim word_embed_proj_dim text_embed_dim "
        "attention_hidden_size output_hidden_size embedding_dim input_dim qformer_hidden_size",
    ),
    (
        48,
        "intermediate_size ffn_dim d_ff encoder_ffn_dim decoder_ffn_dim moe_intermediate_size ffn_hidden_size d_inner "
        "shared_expert_intermediate_size shared_intermediate_size expert_ffn_hidden_size intermediate_size_mlp "
        "moe_shared_expert_intermediate_size dense_intermediate_size mlp_hidden_size expert_hidden_size mlp_dim "
        "encoder_intermediate_size decoder_intermediate_size classifier_proj_size linear_units projector_hidden_size",
    ),
    (
        LAYERS,
        "num_hidden_layers n_layer num_layers n_layers decoder_layers num_decoder_layers layers "
        "decoder_num_hidden_layers encoder_layers num_encoder_layers speech_encoder_layers encoder_num_hidden_layers",
    ),
    (
        2,
        "depth num_blocks num_key_value_heads num_kv_heads "
        "n_kv_heads num_experts_per_tok moe_k moe_topk moe_top_k top_k_experts num_experts_per_token "
        "linear_num_key_heads swa_num_key_value_heads decoder_num_key_value_heads encoder_num_key_value_heads "
        "num_ln_in_parallel_attn resampler_depth",
    ),
    (
        HEADS,
        "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads "
        "attention_heads swa_num_attention_heads linear_num_value_heads num_experts num_local_experts n_routed_experts "
        "moe_num_experts n_experts num_moe_experts index_n_heads decoder_num_attention_heads "
        "encoder_num_attention_heads linear_num_heads",
    ),
    (
        HEAD_DIM,
        "head_dim d_kv kv_channels attention_head_dim global_head_dim swa_head_dim swa_v_head_dim v_head_dim "
        "linear_key_head_dim linear_value_head_dim index_head_dim kv_lora_rank q_lora_rank qk_nope_head_dim dim_head "
        "mamba_d_state mamba_d_head ssm_state_size mamba_head_dim state_size linear_head_dim "
        "rotary_dim query_pre_attn_scalar attention_key_dim d_rel num_conv_pos_embeddings",
    ),
    (8, "qk_rope_head_dim mamba_n_heads mamba_num_heads chunk_size mamba_chunk_size hidden_size_per_layer_input"),
    (24, "qk_head_dim"),
    (
        1,
        "n_group topk_group num_expert_groups num_expert_group mamba_n_groups n_groups n_shared_experts "
        "num_shared_experts moe_num_shared_experts first_k_dense_replace moe_layer_start_index "
        "num_conv_pos_embedding_groups num_nextn_predict_layers",
    ),
    (0, "num_kv_shared_layers"),
    (512, "max_position_embeddings n_positions n_ctx context_length max_seq_len"),
    (VOCABULARY, "vocab_size padded_vocab_size vocab_size_per_layer_input text_vocab_size"),
    (28, "image_size"),
    (4, "mm_tokens_per_image"),
    (14, "patch_size"),
)
_VALUES = {name: value for value, names in _SIZES for name in names.split()}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_PINPOINTS = {"image_grid_pinpoints": [[56, 56]]}
_MAMBA = ["linear_attention", "hybrid", "linear_attention", "hybrid"]
# What no rule finds: sizes that depend on each other in one architecture's own way, by model type.
_OWN: dict[str, dict[str, Any]] = {
    "aria": {"projector_patch_to_query_dict": {"4": 4}},
    "bailing_hybrid": {"layer_group_size": 2, "layer_types": ["linear_attention", "full_attention"] * 2},
    "bamba": {"attn_layer_indices": [1, 3], "mamba_n_heads": 8},
    "chameleon": {"vocabulary_map": {"<image>": 299}},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse", "dense", "sparse"]},
    "dots3_note_text": {"swa_head_dim": 24, "swa_qk_nope_head_dim": 16, "swa_qk_rope_head_dim": 8, "head_dim": 24},
    "emu3": {"vocabulary_map": {"<image>": 299, "<|extra_200|>": 298}},
    "ernie4_5_vl_moe_text": {"rope_parameters": _ROPE | {"mrope_section": [3, 3, 2]}},
    "falcon_h1": {"mamba_d_ssm": 128},
    "florence_vision": {
        "embed_dim": [16, 32, 64, 64],
        "num_heads": [1, 2, 4, 4],
        "num_groups": [1, 2, 4, 4],
        "depths": [1, 1, 1, 1],
    },
    "glm4v_moe_text": {"rope_parameters": _ROPE | {"partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]}},
    "glm5_next_text": {"index_topk": 16},
    "granite4_vision": _PINPOINTS | {"deepstack_layer_map": []},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 8},
    "janus_vqgan": {"base_channels": 32, "embed_dim": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"], "num_dense_layers": 1},
    "llama4_vision_model": {
        "intermediate_size": 256,
        "projector_input_dim": 64,
        "projector_output_dim": 64,
        "vision_output_dim": 64,
    },
    **dict.fromkeys(("llava_next", "llava_next_video", "llava_onevision"), _PINPOINTS),
    "longcat_flash": {"head_dim": 8, "num_layers": 2},
    "mistral4": {"rope_parameters": _ROPE | {"partial_rotary_factor": 1 / 3}},
    "molmo2_adapter": {"vision_feature_layer": [3, 2]},
    "moonshine": {"encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "reformer": {
        "axial_pos_embds": False,
        "attn_layers": ["local"] * LAYERS,
        "local_attn_chunk_length": 4,
        "attention_head_size": HEAD_DIM,
    },
    "step3p5": {"sliding_window": 128},
    "vipllava": {"vision_feature_layers": [-1, -2]},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": _MAMBA,
        "n_mamba_heads": 2,
        "attention_head_dim": 32,
        "attention_hidden_size": 128,
    },
    "zamba2": {
        "layers_block_type": _MAMBA,
        "mamba_headdim": 16,
        "n_mamba_heads": 8,
        "attention_head_dim": 32,
        "attention_hidden_size": 128,
    },
    "zaya": {"num_experts_per_tok": 1},
}
# left to the class if it says None, else given
_OFTEN_NONE = {
    *("head_dim", "num_key_value_heads", "num_experts", "n_routed_experts", "n_shared_experts"),
    *("num_experts_per_tok", "top_k_experts", "moe_intermediate_size"),
}
_UPPER_BOUNDS = {"index_topk": 4, "max_source_positions": 30, "num_query_tokens": 4, "num_channels": 3}
_LAYER_LISTS = ("layer_types", "mlp_layer_types", "attention_types", "layers_block_type", "block_types")
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

Given = dict[str, Any]


def shrunk(config: Any, fill: bool = False) -> Given:
    """The keyword arguments that make ``config``'s class tiny; with ``fill`` also some of those that say None."""
    return _without_clashes(_shrink(config.to_dict(), fill))


def tiny(config: Any) -> Iterator[Given]:
    """Keyword arguments that may make ``config``'s class tiny, the likeliest first."""
    seen = []
    for fill in (False, True):
        for given in variants(shrunk(config, fill)):
            given.pop("model_type", None)
            if given not in seen:
                seen.append(given)
                yield copy.deepcopy(given)


def variants(given: Given) -> Iterator[Given]:
    """``given``, then what some architectures want instead: lists of layers from their own defaults, as many key and
    value heads as heads, the head's size said or left to the class, the parts of three-dimensional rotary
    positions."""
    yield given
    bare = _everywhere(given, lambda part: {k: v for k, v in part.items() if k not in _LAYER_LISTS})
    yield bare
    for base in (given, bare):
        yield _everywhere(
            base,
            lambda part: {
                k: HEADS if k in ("num_key_value_heads", "num_kv_heads") else v
                for k, v in part.items()
                if k != "head_dim"
            },
        )
    yield _everywhere(bare, lambda part: part | {"head_dim": HEAD_DIM})
    for base in (given, bare):
        yield _everywhere(
            base,
            lambda part: (
                part | {"rope_parameters": part["rope_parameters"] | {"mrope_section": MROPE}}
                if isinstance(part.get("rope_parameters"), dict)
                else part
            ),
        )


def _everywhere(given: Given, change: Callable[[Given], Given]) -> Given:
    inner = {k: _everywhere(v, change) if isinstance(v, dict) and "model_type" in v else v for k, v in given.items()}
    return change(copy.deepcopy(inner))


def _shrink(given: Given, fill: bool) -> Given:
    layers = next((given[k] for k in ("num_hidden_layers", "n_layer", "num_layers", "n_layers") if given.get(k)), None)
    result: Given = {}
    for name, value in given.items():
        if value is None and fill and name in _OFTEN_NONE:
            value = _VALUES[name]
        small = _small(name, value, layers, fill)
        if small is not None:
            result[name] = small
    if "model_type" in given:
        result["model_type"] = given["model_type"]
        result |= copy.deepcopy(_OWN.get(given["model_type"], {}))
    return result


def _small(name: str, value: Any, layers: int | None, fill: bool) -> Any:
    """The tiny value, or None to leave it to the class."""
    if isinstance(value, dict):
        if name in ("rope_parameters", "rope_scaling"):
            return _rope(value)
        if name.isdigit() and layers is not None:
            return None
        return _shrink(value, fill) if name.endswith("_config") or "model_type" in value else None
    if value is None and name in ("image_token_id", "audio_token_id"):
        value = VOCABULARY
    if name in _TOKENS:
        outside = value is None or isinstance(value, list) or value >= VOCABULARY
        return _TOKENS[name] if outside else value
    if isinstance(value, bool) or not isinstance(value, (int, float, list)):
        return None
    if isinstance(value, list):
        return _few(value) if layers is not None and len(value) == layers else None
    if name in _UPPER_BOUNDS:
        return min(int(value), _UPPER_BOUNDS[name])
    if name in _VALUES:
        return _VALUES[name]
    if name.endswith(("token_id", "token_index")) and value >= VOCABULARY:
        return SPECIAL_IDS + sum(map(ord, name)) % (VOCABULARY - SPECIAL_IDS)
    return None


def _few(values: list[Any]) -> list[Any]:
    """One entry per layer, with as many kinds as there is room for, in the order in which they come."""
    kinds = [value for place, value in enumerate(values) if value not in values[:place]]
    return (kinds + values)[:LAYERS]


def _rope(value: Given) -> Given:
    result: Given = {}
    for name, part in value.items():
        if isinstance(part, dict):
            result[name] = _rope(part)
        elif name == "mrope_section":
            result[name] = MROPE
        elif name in ("short_factor", "long_factor"):
            result[name] = [1.0] * (HEAD_DIM // 2)
        else:
            result[name] = part
    return result


def _without_clashes(given: Given) -> Given:
    """MLA computes head_dim from its parts, and has a key for every head."""
    if "qk_rope_head_dim" in given:
        if given.get("head_dim") == HEAD_DIM:
            del given["head_dim"]
        given["num_key_value_heads"] = HEADS
    for value in given.values():
        if isinstance(value, dict):
            _without_clashes(value)
    return given
