"""Fixtures of the flashsink tests: the oracle, the usable CPU backends and tiny Hugging Face decoders."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

import flashsink
from flashsink.triton.launch import INTERPRETED

HIDDEN, LAYERS, VOCABULARY = 32, 3, 60
KINDS = ("llama", "qwen2", "qwen3", "mistral")


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def oracle():
    """The module oracle.py beside this file."""
    spec = importlib.util.spec_from_file_location("flashsink_oracle", Path(__file__).with_name("oracle.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _usable():
    """The backends that compute on CPU tensors; the Triton kernels do in their interpreter."""
    names = ("reference", "cpu", "triton") if INTERPRETED else ("reference", "cpu")
    return [name for name in names if flashsink.backends()[name] == "usable"]


@pytest.fixture(scope="session", params=_usable())
def backend(request):
    """Every backend that computes on CPU tensors."""
    return request.param


@pytest.fixture(autouse=True)
def _what_the_interpreter_can(request):
    """Triton's interpreter computes bfloat16 wrongly, and float64 is not for the kernels."""
    if "backend" not in request.fixturenames or request.getfixturevalue("backend") != "triton":
        return
    callspec = getattr(request.node, "callspec", None)
    if callspec is not None and callspec.params.get("dtype") in (torch.bfloat16, torch.float64):
        pytest.skip("Triton's interpreter computes bfloat16 wrongly, and float64 is not for the kernels")


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


@pytest.fixture(scope="session")
def tiny():
    """The function ``build(kind, lora=False, **config)``."""
    return build


@pytest.fixture(
    params=[(kind, lora) for kind in KINDS for lora in (False, True)],
    ids=lambda p: p[0] + ("-lora" if p[1] else ""),
)
def model(request):
    """Every kind of model, with and without LoRA, freshly made."""
    return build(*request.param)


@pytest.fixture(params=["none", "right", "left", "both"])
def padding(request):
    """(kind, ids, attention_mask or None, starts, lengths) of three rows of 12 tokens."""
    starts, lengths = {
        "none": ([0, 0, 0], [12, 12, 12]),
        "right": ([0, 0, 0], [12, 7, 1]),
        "left": ([0, 5, 10], [12, 7, 2]),
        "both": ([3, 0, 4], [9, 6, 3]),
    }[request.param]
    ids = torch.randint(3, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(7))
    position = torch.arange(12)
    starts, lengths = torch.tensor(starts), torch.tensor(lengths)
    keep = (position >= starts[:, None]) & (position < (starts + lengths)[:, None])
    ids = ids.masked_fill(~keep, 0)
    ids[torch.arange(3), starts] = 1
    return request.param, ids, None if request.param == "none" else keep.long(), starts, lengths
