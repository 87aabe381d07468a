"""Tiny models of many families, by name."""

from __future__ import annotations

import torch

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 60,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
FULL = {k: v for k, v in SIZES.items() if k not in ("head_dim", "num_key_value_heads")}
GPT2 = {"n_embd": 32, "n_inner": 48, "n_layer": 4, "n_head": 4, "vocab_size": 60, "n_positions": 64}
GPT2 |= {"initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
MLA = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6}
MLA |= {
    "num_key_value_heads": 4,
    "num_experts_per_tok": 2,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 4,
    "n_shared_experts": 1,
}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 14, "model_type": "siglip_vision_model"}
DROPOUTS = ["attention_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop", "dropout", "attention_probs_dropout_prob"]
IMAGE = 59
ROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]}
QWEN_VISION = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 32}

# name: (config class, model class, what its config says)
MODELS = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", SIZES),
    "mistral": ("MistralConfig", "MistralForCausalLM", SIZES | {"sliding_window": 5}),
    "qwen2": (
        "Qwen2Config",
        "Qwen2ForCausalLM",
        SIZES | {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 2},
    ),
    "gemma2": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        SIZES | {"sliding_window": 5, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    ),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", SIZES | {"sliding_window": 5, "query_pre_attn_scalar": 8}),
    "embedding_gemma": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        SIZES | {"sliding_window": 8, "use_bidirectional_attention": True, "query_pre_attn_scalar": 8},
    ),
    "llama4": (
        "Llama4TextConfig",
        "Llama4ForCausalLM",
        SIZES
        | {"num_local_experts": 2, "intermediate_size_mlp": 48, "no_rope_layers": [1, 1, 1, 0]}
        | {"attention_chunk_size": 5},
    ),
    "gpt_oss": (
        "GptOssConfig",
        "GptOssForCausalLM",
        SIZES | {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 5},
    ),
    "deepseek_v3": ("DeepseekV3Config", "DeepseekV3ForCausalLM", FULL | MLA),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", FULL | {"num_key_value_heads": 2}),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", FULL | {"num_key_value_heads": 2}),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", GPT2),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", FULL),
    "gptj": ("GPTJConfig", "GPTJForCausalLM", GPT2 | {"rotary_dim": 4}),
    "gpt_neo": (
        "GPTNeoConfig",
        "GPTNeoForCausalLM",
        FULL | {"num_layers": 4, "num_heads": 4, "window_size": 5, "attention_types": [[["global", "local"], 2]]},
    ),
    "codegen": ("CodeGenConfig", "CodeGenForCausalLM", GPT2 | {"rotary_dim": 4}),
    "falcon": ("FalconConfig", "FalconForCausalLM", FULL),
    "falcon_new": ("FalconConfig", "FalconForCausalLM", FULL | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "opt": (
        "OPTConfig",
        "OPTForCausalLM",
        FULL | {"ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.3},
    ),
    "minimax": (
        "MiniMaxConfig",
        "MiniMaxForCausalLM",
        SIZES
        | MOE
        | {"layer_types": ["full_attention", "linear_attention"] * 2, "block_size": 8, "initializer_range": 0.1},
    ),
    "qwen3_next": (
        "Qwen3NextConfig",
        "Qwen3NextForCausalLM",
        SIZES | MOE | LINEAR | {"shared_expert_intermediate_size": 16},
    ),
    "eurobert": ("EuroBertConfig", "EuroBertForMaskedLM", SIZES),
    "bert": ("BertConfig", "BertForMaskedLM", FULL),
    "gemma3_image": ("Gemma3Config", "Gemma3ForConditionalGeneration", {}),
    "qwen2_5_vl": ("Qwen2_5_VLConfig", "Qwen2_5_VLForConditionalGeneration", {}),
}


def build(name, **overrides):
    """A random model in eval mode, without dropout."""
    import transformers as hf

    config, model, options = MODELS[name]
    options = dict(options)
    if name == "gemma3_image":
        text = SIZES | {"sliding_window": 32, "query_pre_attn_scalar": 8} | overrides
        options = {"vision_config": VISION, "text_config": text, "mm_tokens_per_image": 4}
        options |= {"image_token_index": IMAGE, "boi_token_index": 58, "eoi_token_index": 57, "initializer_range": 0.3}
    elif name == "qwen2_5_vl":
        options = {"vision_config": QWEN_VISION, "text_config": SIZES | {"rope_parameters": ROPE} | overrides}
    else:
        options |= overrides
    made = getattr(hf, config)(**options)
    for own in (made, made.get_text_config()):
        for key in (
            "attention_dropout",
            "attn_pdrop",
            "resid_pdrop",
            "embd_pdrop",
            "dropout",
            "attention_probs_dropout_prob",
        ):
            if hasattr(own, key):
                setattr(own, key, 0.0)
    # Falcon cannot change it later, and old releases leave Gemma-2's softcap out in torch's attention
    if name.startswith(("falcon", "gemma2")):
        made._attn_implementation = "eager"
    torch.manual_seed(0)
    return getattr(hf, model)(made).eval()
