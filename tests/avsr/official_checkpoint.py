"""An official Llama-AVSR checkpoint, made of random parts, and what its model computes, put together by hand.

Nothing here knows of this project's names: a plain Hugging Face Llama whose tokenizer and table were enlarged by
transformers' own calls, with LoRA merged into its weights as W + (alpha / R) up down, and rows of embeddings put
together in Llama-AVSR's order.
"""

from __future__ import annotations

import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from avsr.models.avhubert_network import AVHubert, AVHubertConfig

R, ALPHA = 6, 3.0  # hidden 48: rank 8, scale 0.5
AVH = AVHubertConfig(width=128, ffn=96, layers=2, channels=2)
TEXT = "bin blue"
PROMPTS = {
    "audio": "Transcribe speech to text.",
    "video": "Transcribe video to text.",
    "audiovisual": "Transcribe speech and video to text.",
}


def write_plain_llm(tiny_llm: Path, folder: Path) -> Path:
    """The tiny Llama with a tokenizer that has no <pad>, as Llama's."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    model = AutoModelForCausalLM.from_pretrained(str(tiny_llm))
    size = model.config.vocab_size
    tokens = ["<s>", "</s>", "<unk>", " ", *string.ascii_lowercase, *string.digits, *string.punctuation]
    core = Tokenizer(models.WordLevel({token: index for index, token in enumerate(tokens)}, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.save_pretrained(folder)
    assert len(tokenizer) == size - 1
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder)
    return folder


class Official:
    """A checkpoint as Llama-AVSR writes it, and its parts."""

    prompts = PROMPTS

    def __init__(self, llm: Path, streams: dict[str, tuple[int, int]], layernorm: bool = True) -> None:
        """``streams``: projector's prefix -> (width into it, hidden)."""
        generator = torch.Generator().manual_seed(5)

        def random(*shape: int, std: float = 0.2) -> Tensor:
            return torch.randn(*shape, generator=generator) * std

        self.tokenizer = AutoTokenizer.from_pretrained(str(llm))
        self.llm = AutoModelForCausalLM.from_pretrained(str(llm)).float()
        delimiters = ["<audio>", "</audio>", "<video>", "</video>"]
        added = {"pad_token": "<pad>", "additional_special_tokens": delimiters}
        self.tokenizer.add_special_tokens(added)
        self.llm.resize_token_embeddings(len(self.tokenizer), mean_resizing=False)
        self.state: dict[str, Tensor] = {f"llm.{k}": v.detach().clone() for k, v in self.llm.state_dict().items()}
        hidden, layers = self.llm.config.hidden_size, self.llm.config.num_hidden_layers
        rank = round(hidden / R)
        for layer in range(layers):
            for part, out in (("Q", hidden), ("V", hidden // 2)):
                start = f"llm.model.layers.{layer}.self_attn.lora_"
                self.state[f"{start}down_{part}.weight"] = random(rank, hidden)
                self.state[f"{start}up_{part}.weight"] = random(out, rank)
        for prefix, (width, middle) in streams.items():
            self.state[f"{prefix}.0.weight"] = random(middle, width)
            self.state[f"{prefix}.0.bias"] = random(middle)
            self.state[f"{prefix}.2.weight"] = random(hidden, middle)
            self.state[f"{prefix}.2.bias"] = random(hidden)
            if layernorm:
                self.state[f"{prefix}.3.weight"] = random(hidden, std=1.0)
                self.state[f"{prefix}.3.bias"] = random(hidden)

    def add_whisper(self, folder: Path) -> None:
        from transformers import WhisperModel

        encoder = WhisperModel.from_pretrained(str(folder)).float().encoder
        self.state |= {f"audio_encoder.{k}": v.clone() for k, v in encoder.state_dict().items()}

    def add_avhubert(self, prefix: str, *, lora: bool = True, zero: bool = False) -> None:
        """Random weights and batch statistics, as after training in train mode."""
        torch.manual_seed(9)
        for name, tensor in AVHubert(AVH).state_dict().items():
            value = torch.rand_like(tensor) + 0.5 if name.endswith(("running_var", "weight_g")) else tensor
            if tensor.is_floating_point() and value is tensor:
                value = torch.randn_like(tensor) * 0.1
            self.state[f"{prefix}.{name}"] = value
        self.state[f"{prefix}.final_proj.weight"] = torch.randn(16, 128)
        self.state[f"{prefix}.label_embs_concat"] = torch.randn(20, 16)
        for layer in range(AVH.layers if lora else 0):
            for part in "QV":
                start = f"{prefix}.encoder.layers.{layer}.self_attn.lora_"
                self.state[f"{start}down_{part}.weight"] = torch.randn(8, 128) * (0 if zero else 0.1)
                self.state[f"{start}up_{part}.weight"] = torch.randn(128, 8) * 0.1

    def write(self, path: Path, prefix: str = "", dtype: torch.dtype = torch.float32) -> Path:
        torch.save({prefix + k: v.to(dtype) if v.is_floating_point() else v for k, v in self.state.items()}, path)
        return path

    def merged_llm(self) -> Any:
        """The Llama with W + (alpha / R) up down for its queries and values."""
        with torch.no_grad():
            for index, layer in enumerate(self.llm.model.layers):
                for part, module in (("Q", layer.self_attn.q_proj), ("V", layer.self_attn.v_proj)):
                    start = f"llm.model.layers.{index}.self_attn.lora_"
                    up, down = self.state[f"{start}up_{part}.weight"], self.state[f"{start}down_{part}.weight"]
                    module.weight += (ALPHA / R) * (up.double() @ down.double()).float()
        return self.llm.eval()

    def project(self, prefix: str, features: Tensor) -> Tensor:
        w = {k.removeprefix(f"{prefix}."): v for k, v in self.state.items() if k.startswith(f"{prefix}.")}
        x = torch.relu(features @ w["0.weight"].T + w["0.bias"]) @ w["2.weight"].T + w["2.bias"]
        if "3.weight" in w:
            x = torch.nn.functional.layer_norm(x, x.shape[-1:], w["3.weight"], w["3.bias"])
        return x

    def logits(self, prompt: str, speech: list[tuple[str, Tensor]], llm: Any) -> Tensor:
        """(text tokens + 1, vocabulary) where the text and its end are predicted; a nameless stream has no
        delimiters."""
        embed = llm.get_input_embeddings().weight
        one = self.tokenizer.convert_tokens_to_ids
        ids = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, TEXT)]
        rows = [embed[[self.tokenizer.bos_token_id]]]
        for name, tokens in speech:
            rows += [embed[[one(f"<{name}>")]], tokens, embed[[one(f"</{name}>")]]] if name else [tokens]
        rows += [embed[ids[0]], embed[ids[1]]]
        with torch.no_grad():
            return llm(inputs_embeds=torch.cat(rows)[None]).logits[0, -len(ids[1]) - 1 :]


def audio_checkpoint(llm: Path, whisper: Path) -> Official:
    official = Official(llm, {"audio_proj": (32, 32)})
    official.add_whisper(whisper)
    return official


def mouth_checkpoint(llm: Path) -> Official:
    official = Official(llm, {"video_proj": (128, 32)})
    official.add_avhubert("video_encoder")
    return official


def pooled(features: Tensor, rate: int) -> Tensor:
    count = len(features) // rate
    return features[: count * rate].reshape(count, rate, -1).mean(dim=1)


def stacked(features: Tensor, rate: int) -> Tensor:
    count = len(features) // rate
    return features[: count * rate].reshape(count, -1)


def mouth_recipe(make: Callable[..., Path], task: str, **overrides: Any) -> Path:
    """A recipe whose AV-HuBERT has no file of its own: it comes out of the checkpoint."""
    encoder = {"kind": "avhubert", "name": "nowhere.pt", "lora": {"rank": 8, "alpha": 16.0}}
    settings = {"model.task": task, "data.cache": None, **overrides}
    for stream, rate in {"video": {"video": 3}, "fused": {"fused": 2}, "audiovisual": {"video": 2}}[task].items():
        settings[f"model.{stream}"] = {"encoder": encoder, "compression": {"kind": "average", "rate": rate}}
    return make(**settings)


def avhubert(official: Official, prefix: str, lora: bool = True) -> AVHubert:
    """The network with 2 up down merged into its queries and values."""
    start = f"{prefix}."
    state = {k.removeprefix(start): v.clone() for k, v in official.state.items() if k.startswith(start)}
    for layer in range(AVH.layers):
        for part, name in (("Q", "q_proj"), ("V", "v_proj")):
            own = f"encoder.layers.{layer}.self_attn."
            if lora:
                up, down = (state[f"{own}lora_{side}_{part}.weight"] for side in ("up", "down"))
                state[f"{own}{name}.weight"] = (
                    state[f"{own}{name}.weight"].double() + 2 * up.double() @ down.double()
                ).float()
    network = AVHubert(AVH)
    network.load_state_dict({k: v for k, v in state.items() if k in network.state_dict()})
    return network.eval()


def run_network(network: AVHubert, audio: Tensor | None, video: Tensor | None) -> Tensor:
    count = len(audio if audio is not None else video)  # type: ignore[arg-type]
    with torch.no_grad():
        sound = None if audio is None else audio[None]
        mouth = None if video is None else video.reshape(1, -1, 88, 88)
        return network(sound, mouth, torch.tensor([count]))[0]
