"""Official Llama-AVSR checkpoints, against models put together by hand from the same tensors.

The oracle knows nothing of our names: a plain Hugging Face Llama whose tokenizer and table were enlarged by
transformers' own calls, with LoRA merged into its weights as W + (alpha / R) up down, and rows of embeddings put
together in Llama-AVSR's order.
"""

from __future__ import annotations

import json
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from avsr.build import load_run
from avsr.cli import main
from avsr.config import read_run_config
from avsr.data.batches import Example, collate
from avsr.data.manifest import Utterance
from avsr.importing import import_checkpoint
from avsr.models.avhubert_network import AVHubert, AVHubertConfig

Refuse = Callable[..., str]
R, ALPHA = 6, 3.0  # hidden 48: rank 8, scale 0.5
AVH = AVHubertConfig(width=128, ffn=96, layers=2, channels=2)
TEXT = "bin blue"
PROMPTS = {
    "audio": "Transcribe speech to text.",
    "video": "Transcribe video to text.",
    "audiovisual": "Transcribe speech and video to text.",
}


@pytest.fixture(scope="session")
def plain_llm(tiny_llm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with a tokenizer that has no <pad>, as Llama's."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("plain_llm")
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


def pooled(features: Tensor, rate: int) -> Tensor:
    count = len(features) // rate
    return features[: count * rate].reshape(count, rate, -1).mean(dim=1)


def stacked(features: Tensor, rate: int) -> Tensor:
    count = len(features) // rate
    return features[: count * rate].reshape(count, -1)


@pytest.fixture
def audio_recipe(tiny_recipe: Callable[..., Path], tmp_path: Path, plain_llm: Path) -> Callable[..., Path]:
    def make(**overrides: Any) -> Path:
        lora = {"rank": 8, "alpha": 4.0, "targets": ["q_proj", "v_proj"]}
        return tiny_recipe(tmp_path, **{"model.llm.name": str(plain_llm), "model.lora": lora, **overrides})

    return make


@pytest.fixture
def audio(plain_llm: Path, tiny_whisper: Path) -> Official:
    official = Official(plain_llm, {"audio_proj": (32, 32)})
    official.add_whisper(tiny_whisper)
    return official


def example(model: Any, task: str, features: dict[str, Tensor]) -> Example:
    utterance = Utterance(id="u", audio=Path("u.wav"), text=TEXT, duration=1.0)
    return Example(utterance, features, model.tokenize(TEXT), task)


def imported_logits(run: Path, task: str, features: dict[str, Tensor], *overrides: str) -> tuple[Any, Tensor]:
    _, model, _ = load_run(run, list(overrides), torch.device("cpu"))
    batch = collate([example(model, task, features)])
    with torch.no_grad():
        return model, model.label_logits(batch, model.assemble(batch, with_text=True))[0]


@pytest.mark.parametrize(("prefix", "by_factor"), [("", True), ("model.", False)])
def test_an_audio_model_gives_the_logits_of_the_merged_llama(
    audio_recipe: Callable[..., Path], audio: Official, tmp_path: Path, prefix: str, by_factor: bool
) -> None:
    path = audio.write(tmp_path / "model_avg_1.pth", prefix)
    factor = {"reduction": R, "alpha": ALPHA} if by_factor else {}
    lora = {"model.lora": {"rank": 3, "alpha": 1.0}} if by_factor else {}
    run = import_checkpoint(path, str(audio_recipe(**lora)), tmp_path / "official", **factor)
    features = torch.randn(42, 32, generator=torch.Generator().manual_seed(1))
    model, logits = imported_logits(run, "audio", {"audio": features})

    # the scale of one layer, from the checkpoint's tensors alone
    x = torch.randn(5, 48, dtype=torch.float64)
    for part, name in (("Q", "q_proj"), ("V", "v_proj")):
        start = "llm.model.layers.1.self_attn."
        down, up = (audio.state[f"{start}lora_{side}_{part}.weight"].double() for side in ("down", "up"))
        expected = x @ audio.state[f"{start}{name}.weight"].double().T + ALPHA / R * (x @ down.T @ up.T)
        layer = model.decoder.model.layers[1].self_attn.get_submodule(name)
        with torch.no_grad():
            torch.testing.assert_close(layer(x.float()).double(), expected, rtol=1e-5, atol=1e-5)

    speech = [("audio", audio.project("audio_proj", pooled(features, 4)))]
    expected = audio.logits(PROMPTS["audio"], speech, audio.merged_llm())[:, : logits.shape[1]]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert logits.std() > 0.1

    config = read_run_config(run)
    assert config.model.audio.encoder.pad_to_30s and config.model.audio.encoder.normalise
    assert config.model.lora.rank == 8 and config.model.lora.alpha == 4.0
    assert json.loads((run / "checkpoints/best/state.json").read_text())["imported"] == "model_avg_1.pth"
    assert all(t.dtype == torch.float32 for t in load_file(str(run / "checkpoints/best/model.safetensors")).values())


def test_the_command_and_what_it_leads_to(
    audio_recipe: Callable[..., Path], audio: Official, tmp_path: Path, capsys: pytest.CaptureFixture[str], tone: Any
) -> None:
    """Stored in bf16 as the official ones, stacking, without LayerNorm; then evaluated and used."""
    for key in [key for key in audio.state if ".3." in key]:
        del audio.state[key]
    audio.state["audio_proj.0.weight"] = torch.randn(32, 96)
    path = audio.write(tmp_path / "model_avg_4.pth", dtype=torch.bfloat16)
    recipe = audio_recipe(**{"data.cache": None})
    overrides = ["model.audio.compression.kind=stack", "model.audio.compression.rate=3"]
    overrides += ["model.projector.layernorm=false", "model.audio.encoder.pad_to_30s=false"]
    out = tmp_path / "official"
    main(
        [
            "import",
            str(path),
            "--config",
            str(recipe),
            "--out",
            str(out),
            *overrides,
            "--reduction",
            "6",
            "--alpha",
            "3",
        ]
    )
    assert capsys.readouterr().out.strip() == str(out)
    assert not read_run_config(out).model.audio.encoder.pad_to_30s
    assert read_run_config(out).training.precision == "fp32"
    main(["evaluate", str(out), "data.limit=2"])
    assert "sentences: WER" in capsys.readouterr().out
    main(["transcribe", str(out), str(tone(tmp_path / "a.wav", 0.8))])
    assert capsys.readouterr().out.startswith(str(tmp_path / "a.wav"))
    assert sorted(path.name for path in out.parent.glob("official*")) == ["official"]


def test_rows_of_a_tokenizer_that_has_some_of_the_tokens(
    tiny_recipe: Callable[..., Path], tiny_llm: Path, tmp_path: Path
) -> None:
    official = Official(tiny_llm, {"audio_proj": (32, 32)})  # its tokenizer knows <pad>: four rows are added
    path = official.write(tmp_path / "model.pth")
    run = import_checkpoint(path, str(tiny_recipe(tmp_path)), tmp_path / "out", reduction=R, alpha=ALPHA)
    features = torch.randn(9, 32)
    _, logits = imported_logits(run, "audio", {"audio": features})
    speech = [("audio", official.project("audio_proj", pooled(features, 4)))]
    expected = official.logits(PROMPTS["audio"], speech, official.merged_llm())[:, : logits.shape[1]]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


# Mouths


def mouth_recipe(make: Callable[..., Path], tmp_path: Path, task: str, **overrides: Any) -> Path:
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


def test_a_video_model_carries_its_own_encoder(
    audio_recipe: Callable[..., Path], plain_llm: Path, tmp_path: Path
) -> None:
    official = Official(plain_llm, {"video_proj": (128, 32)})
    official.add_avhubert("video_encoder")
    path = official.write(tmp_path / "vsr.pth")
    run = import_checkpoint(path, str(mouth_recipe(audio_recipe, tmp_path, "video")), tmp_path / "out")
    mouth = torch.randn(13, 88 * 88, generator=torch.Generator().manual_seed(2))
    model, logits = imported_logits(run, "video", {"video": mouth})
    features = run_network(avhubert(official, "video_encoder"), None, mouth)
    speech = [("video", official.project("video_proj", pooled(features, 3)))]
    expected = official.logits(PROMPTS["video"], speech, official.merged_llm())[:, : logits.shape[1]]
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
    frozen = run_network(avhubert(official, "video_encoder", lora=False), None, mouth)
    assert (frozen - features).abs().max() > 0.1  # else the adapters would prove nothing
    assert read_run_config(run).model.video.encoder.name == str(run / "encoders" / "video_encoder.safetensors")
    held = load_file(str(run / "encoders" / "video_encoder.safetensors"))
    assert not any("lora" in key or "final_proj" in key or "label_embs" in key for key in held)


def test_a_fused_model_has_no_delimiters(audio_recipe: Callable[..., Path], plain_llm: Path, tmp_path: Path) -> None:
    official = Official(plain_llm, {"audiovisual_proj": (128, 32)})
    official.add_avhubert("audiovisual_encoder")
    path = official.write(tmp_path / "fused.pth")
    run = import_checkpoint(path, str(mouth_recipe(audio_recipe, tmp_path, "fused")), tmp_path / "out")
    generator = torch.Generator().manual_seed(3)
    sound, mouth = (torch.randn(12, width, generator=generator) for width in (104, 88 * 88))
    model, logits = imported_logits(run, "fused", {"fused": torch.cat([sound, mouth], dim=1)})
    assert model.delimiters is None
    features = run_network(avhubert(official, "audiovisual_encoder"), sound, mouth)
    speech = [("", official.project("audiovisual_proj", pooled(features, 2)))]
    expected = official.logits(PROMPTS["audiovisual"], speech, official.merged_llm())[:, : logits.shape[1]]
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)


def test_whisper_and_a_frozen_avhubert(
    audio_recipe: Callable[..., Path], plain_llm: Path, tiny_whisper: Path, tmp_path: Path
) -> None:
    """Its AV-HuBERT has adapters that never learned: zero in ``down``, as Llama-AVSR leaves them."""
    official = Official(plain_llm, {"audio_proj": (32, 32), "video_proj": (256, 32)})
    official.add_whisper(tiny_whisper)
    official.add_avhubert("video_encoder", zero=True)
    path = official.write(tmp_path / "avsr.pth")
    settings = {"model.video": {"encoder": {"kind": "avhubert", "name": "nowhere.pt"}}, "data.cache": None}
    settings["model.video"]["compression"] = {"kind": "stack", "rate": 2}
    settings["model.audio.compression"] = {"kind": "average", "rate": 4}
    recipe = audio_recipe(**{"model.task": "audiovisual", **settings})
    # average and stack cannot be mixed by a user of Llama-AVSR, but shapes do not care
    run = import_checkpoint(path, str(recipe), tmp_path / "out")
    generator = torch.Generator().manual_seed(3)
    sound, mouth = torch.randn(16, 32, generator=generator), torch.randn(9, 88 * 88, generator=generator)
    _, model, _ = load_run(run, [], torch.device("cpu"))
    seen = run_network(avhubert(official, "video_encoder", lora=False), None, mouth)
    model._frozen.clear()  # features as they are
    batch = collate([example(model, "audiovisual", {"audio": sound, "video": seen})])
    with torch.no_grad():
        logits, _ = model.label_logits(batch, model.assemble(batch, with_text=True))
    speech = [
        ("audio", official.project("audio_proj", pooled(sound, 4))),
        ("video", official.project("video_proj", stacked(seen, 2))),
    ]
    expected = official.logits(PROMPTS["audiovisual"], speech, official.merged_llm())[:, : logits.shape[1]]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_one_avhubert_for_two_projectors(audio_recipe: Callable[..., Path], plain_llm: Path, tmp_path: Path) -> None:
    official = Official(plain_llm, {"audio_proj": (128, 32), "video_proj": (128, 32)})
    official.add_avhubert("audiovisual_encoder")
    path = official.write(tmp_path / "double.pth")
    encoder = {"kind": "avhubert", "name": "nowhere.pt", "lora": {"rank": 8, "alpha": 16.0}}
    stream = {"encoder": encoder, "compression": {"kind": "average", "rate": 2}}
    recipe = audio_recipe(
        **{"model.task": "audiovisual", "model.audio": stream, "model.video": stream, "data.cache": None}
    )
    run = import_checkpoint(path, str(recipe), tmp_path / "out")
    generator = torch.Generator().manual_seed(3)
    sound, mouth = (torch.randn(8, width, generator=generator) for width in (104, 88 * 88))
    _, logits = imported_logits(run, "audiovisual", {"audio": sound, "video": mouth})
    network = avhubert(official, "audiovisual_encoder")
    speech = [
        ("audio", official.project("audio_proj", pooled(run_network(network, sound, None), 2))),
        ("video", official.project("video_proj", pooled(run_network(network, None, mouth), 2))),
    ]
    expected = official.logits(PROMPTS["audiovisual"], speech, official.merged_llm())[:, : logits.shape[1]]
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
    assert [p.name for p in (run / "encoders").iterdir()] == ["audiovisual_encoder.safetensors"]
