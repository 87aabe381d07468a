"""Every family of language models on a tiny random member: loading, specials, LoRA, flashsink and a training step.

Tokenizers are trained here in each family's own form: byte-level BPE with and without BOS, and SentencePiece-like BPE
with spaces as "\u2581" and bytes as a fallback.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

import flashsink
from avsr.config import LLMConfig, LoraConfig
from avsr.errors import UserError
from avsr.models.llm import LoadedLLM, add_lora, load_llm

TEXTS = [
    "bin blue at f two now",
    "lay green by s nine again",
    "set white in z zero please",
    "it's don't 19 71 caf\u00e9",
]
PROMPT = "Transcribe speech to text."
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


def byte_level(specials: list[str]) -> Tokenizer:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False))
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    return core


def sentencepiece_like() -> Tokenizer:
    """As converted from Llama-2's: specials first, a space before the first word, bytes for unknown characters."""
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=340, special_tokens=specials, show_progress=False))
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tree = json.loads(core.to_str())  # the trainer makes the bytes special, and the real one does not
    tree["added_tokens"] = [token for token in tree["added_tokens"] if not token["content"].startswith("<0x")]
    return Tokenizer.from_str(json.dumps(tree))


def llama_3() -> Tokenizer:
    core = byte_level(["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"])
    begin = core.token_to_id("<|begin_of_text|>")
    template = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", begin)]
    )
    core.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return core


ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# name -> tokenizer, its specials, the model's config (vocab_size comes from the tokenizer), (BOS, EOS) to be found
FAMILIES: dict[str, tuple[Callable[[], Tokenizer], dict[str, str], Callable[..., Any], tuple[str | None, str]]] = {
    "llama-3.2": (
        llama_3,
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"},
        lambda **k: hf.LlamaConfig(**SIZES, **k, head_dim=16, rope_parameters=dict(ROPE), tie_word_embeddings=True),
        ("<|begin_of_text|>", "<|end_of_text|>"),
    ),
    "llama-3.1": (
        llama_3,
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"},
        lambda **k: hf.LlamaConfig(**SIZES, **k, rope_parameters={**ROPE, "factor": 8.0}, tie_word_embeddings=False),
        ("<|begin_of_text|>", "<|end_of_text|>"),
    ),
    "llama-2": (
        sentencepiece_like,
        {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
        lambda **k: hf.LlamaConfig(**{**SIZES, "num_key_value_heads": 4}, **k),
        ("<s>", "</s>"),
    ),
    "tinyllama": (
        sentencepiece_like,
        {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
        lambda **k: hf.LlamaConfig(**{**SIZES, "num_attention_heads": 8, "num_key_value_heads": 1}, **k),
        ("<s>", "</s>"),
    ),
    "qwen2.5": (
        lambda: byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]),
        {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
        lambda **k: hf.Qwen2Config(**SIZES, **{**k, "vocab_size": k["vocab_size"] + 17}, tie_word_embeddings=True),
        (None, "<|endoftext|>"),
    ),
    "qwen3": (
        lambda: byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]),
        {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        lambda **k: hf.Qwen3Config(**SIZES, **{**k, "vocab_size": k["vocab_size"] + 5}, head_dim=32),
        (None, "<|im_end|>"),
    ),
    "smollm2": (
        lambda: byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]),
        {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>"},
        lambda **k: hf.LlamaConfig(
            **{**SIZES, "num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 48},
            **k,
            rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
            tie_word_embeddings=True,
        ),
        ("<|im_start|>", "<|im_end|>"),
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            make, specials, config, _ = FAMILIES[family]
            made[family] = tmp_path_factory.mktemp("llm")
            tokenizer = hf.PreTrainedTokenizerFast(
                tokenizer_object=make(), clean_up_tokenization_spaces=False, **specials
            )
            tokenizer.save_pretrained(made[family])
            with torch.random.fork_rng():
                torch.manual_seed(0)
                model = hf.AutoModelForCausalLM.from_config(config(vocab_size=len(tokenizer)))
            # what the published models carry, and what must not leak into decoding
            model.generation_config = hf.GenerationConfig(do_sample=True, temperature=0.6, top_p=0.9)
            model.save_pretrained(made[family])
        return made[family]

    return folder


def load(folder: Path, family: str) -> LoadedLLM:
    bos = FAMILIES[family][3][0]
    return load_llm(LLMConfig(name=str(folder), bos_token="<|endoftext|>" if bos is None else None))


def rows(loaded: LoadedLLM) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(B, S) ids and mask, (B,) spans: BOS, prompt, text, of two lengths."""
    prompt = [loaded.bos, *loaded.tokenize(PROMPT)]
    texts = [prompt + loaded.tokenize(text) + [loaded.eos] for text in TEXTS[:2]] + [prompt + [loaded.eos]]
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(text) for text in texts], batch_first=True)
    lengths = torch.tensor([len(text) for text in texts])
    return ids, (torch.arange(ids.shape[1]) < lengths[:, None]).long(), torch.full((3,), len(prompt))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_loads_attaches_and_trains(folders: Callable[[str], Path], family: str) -> None:
    """Specials come from the tokenizer; LoRA and flashsink change no output, and a step lowers the loss."""
    bos, eos = FAMILIES[family][3]
    folder = folders(family)
    if bos is None:
        with pytest.raises(UserError, match=r"model\.llm\.bos_token"):
            load_llm(LLMConfig(name=str(folder)))
    loaded = load(folder, family)
    name = loaded.tokenizer.convert_ids_to_tokens
    assert (name(loaded.bos), name(loaded.eos)) == (bos or "<|endoftext|>", eos)
    assert not loaded.model.generation_config.do_sample
    for text in (PROMPT, *TEXTS):
        ids = loaded.tokenize(text)
        assert ids and loaded.bos not in ids and loaded.eos not in ids
        assert loaded.tokenizer.decode(ids, skip_special_tokens=True).strip() == text
        assert max(ids) < loaded.model.get_input_embeddings().num_embeddings

    ids, mask, spans = rows(loaded)
    with torch.no_grad():
        before = loaded.model(ids, attention_mask=mask).logits
    model = add_lora(loaded.model, LoraConfig(rank=4, alpha=8.0))
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    layers = SIZES["num_hidden_layers"]
    assert len(names) == layers * 2 * 2
    assert sum("q_proj" in name for name in names) == sum("v_proj" in name for name in names) == layers * 2
    probe = flashsink.attach(model)
    with probe.spans(spans), torch.no_grad():
        attached = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(attached[mask.bool()], before[mask.bool()], atol=1e-5, rtol=1e-4)

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    labels = ids.masked_fill(mask == 0, -100).masked_fill(torch.arange(ids.shape[1]) < spans[:, None], -100)
    losses = []
    for _ in range(2):
        with probe.spans(spans):
            cross_entropy = model(ids, attention_mask=mask, labels=labels).loss
        loss = cross_entropy + probe.decorrelation_loss
        assert 0 < float(probe.decorrelation_loss.detach()) <= 1
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[1] < losses[0]
    received = probe.sinks[0].received
    torch.testing.assert_close(received.sum(dim=-1), mask.sum(dim=1)[:, None].expand(received.shape[:2]).float())
    probe.detach()
