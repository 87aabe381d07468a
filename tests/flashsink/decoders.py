"""Tiny Hugging Face decoders, and batches for them."""

from __future__ import annotations

import torch

HIDDEN, LAYERS, VOCABULARY = 32, 3, 60
KINDS = ("llama", "qwen2", "qwen3", "mistral")
NEW = 6  # tokens that generate() adds
MODES = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "static cache, beams": {"cache_implementation": "static", "disable_compile": True, "num_beams": 2},
}


def build(kind, lora=False, *, seed=0, **overrides):
    """A tiny random causal LM in eval mode, with weights large enough for uneven attention."""
    import transformers as hf

    config_type, model_type = {
        "llama": (hf.LlamaConfig, hf.LlamaForCausalLM),
        "qwen2": (hf.Qwen2Config, hf.Qwen2ForCausalLM),
        "qwen3": (hf.Qwen3Config, hf.Qwen3ForCausalLM),
        "mistral": (hf.MistralConfig, hf.MistralForCausalLM),
    }[kind]
    options = {
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16 if kind == "qwen3" else 8,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": 0,
        "attn_implementation": "sdpa",
    }
    if kind == "mistral":
        options["sliding_window"] = None
    torch.manual_seed(seed)
    model = model_type(config_type(**(options | overrides)))
    if lora:
        import peft

        config = peft.LoraConfig(
            r=4,
            lora_alpha=8,
            target_modules=["q_proj", "v_proj"],
            init_lora_weights=False,
            task_type="CAUSAL_LM",
        )
        model = peft.get_peft_model(model, config)
    return model.eval()


def decoder(model):
    """The module that holds the layers, also inside a wrapper."""
    return next(m for m in model.modules() if isinstance(getattr(m, "layers", None), torch.nn.ModuleList))


def ids(rows=2, tokens=8, seed=0):
    return torch.randint(3, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def valid(starts, lengths, tokens):
    """(B, tokens) bool."""
    position = torch.arange(tokens)
    return (position >= starts[:, None]) & (position < (starts + lengths)[:, None])


def padded(ids, starts, lengths):
    """(ids with padding 0 and BOS 1, attention mask)."""
    keep = valid(starts, lengths, ids.shape[1])
    ids = ids.masked_fill(~keep, 0)
    ids[torch.arange(len(ids)), starts] = 1
    return ids, keep.long()


def prompts(starts, tokens=7, seed=3):
    """Left-padded (ids, attention mask)."""
    starts = torch.tensor(starts)
    return padded(ids(len(starts), tokens, seed), starts, tokens - starts)


@torch.no_grad()
def generate(model, ids, mask, **mode):
    options = {"do_sample": False, "max_new_tokens": NEW, "min_new_tokens": NEW, "pad_token_id": 0}
    return model.generate(input_ids=ids, attention_mask=mask, **(options | mode))


def training_inputs(padding):
    """(arguments of a forward with labels, spans) for the fixture ``padding``."""
    _, ids, mask, _, lengths = padding
    embeds = torch.randn(3, 12, HIDDEN, generator=torch.Generator().manual_seed(2))
    labels = ids.clone() if mask is None else ids.masked_fill(mask == 0, -100)
    call = {"inputs_embeds": embeds, "attention_mask": mask, "labels": labels, "use_cache": False}
    return call, (lengths + 1) // 2
