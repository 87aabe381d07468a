"""``avsr analyze MODEL --audio FILE`` and ``--image FILE``: tiny composite models with their processors."""

from __future__ import annotations

import json
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import transformers as hf
from PIL import Image

import flashsink
from avsr.cli import main
from avsr.tools.analysis.collect import collect
from avsr.tools.analysis.composite import AUDIO, IMAGE, Media, load_media_subject
from avsr.tools.analysis.walk import measure

pytestmark = pytest.mark.integration

Refuse = Callable[..., str]
CPU = torch.device("cpu")
SIZES: dict[str, Any] = {
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "vocab_size": 120, "max_position_embeddings": 512, "initializer_range": 0.2},
}
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)
VISION = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
SPEECH = ["<|audio_bos|>", "<|audio_eos|>", "<|AUDIO|>"]


def tokenizer(special: list[str]) -> hf.PreTrainedTokenizerFast:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    tokens = ["<pad>", "<unk>", "<|im_start|>", "<|im_end|>", *special, " ", "\n"]
    tokens += [*string.ascii_letters, *string.digits, ".", ":", ","]
    core = Tokenizer(models.WordLevel({token: place for place, token in enumerate(tokens)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    core.decoder = decoders.Fuse()
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>", *special],
    )


@pytest.fixture(scope="module")
def hearing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2-Audio, which hears two seconds."""
    folder = tmp_path_factory.mktemp("hearing")
    words = tokenizer(SPEECH)
    tower: dict[str, Any] = {"num_mel_bins": 16, "d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2}
    tower |= {"encoder_ffn_dim": 48, "max_source_positions": 100, "model_type": "qwen2_audio_encoder"}
    config = hf.Qwen2AudioConfig(
        audio_config=tower,
        text_config={**SIZES, "model_type": "qwen2"},
        audio_token_index=words.convert_tokens_to_ids("<|AUDIO|>"),
    )
    torch.manual_seed(0)
    hf.Qwen2AudioForConditionalGeneration(config).save_pretrained(folder)
    features = hf.WhisperFeatureExtractor(feature_size=16, chunk_length=2)
    hf.Qwen2AudioProcessor(features, words).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LLaVA."""
    folder = tmp_path_factory.mktemp("seeing")
    words = tokenizer(VISION)
    tower: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    tower |= {"image_size": 28, "patch_size": 7, "model_type": "clip_vision_model", "projection_dim": 32}
    config = hf.LlavaConfig(
        vision_config=tower,
        text_config={**SIZES, "model_type": "llama"},
        image_token_index=words.convert_tokens_to_ids("<|image_pad|>"),
    )
    torch.manual_seed(0)
    hf.LlavaForConditionalGeneration(config).save_pretrained(folder)
    images = hf.CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    options = {"patch_size": 7, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    hf.LlavaProcessor(images, words, chat_template=CHAT, image_token="<|image_pad|>", **options).save_pretrained(folder)
    return folder


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    wave = np.random.default_rng(0).standard_normal(8000 * 3 // 2) * 0.1
    soundfile.write(tmp_path / "a.wav", wave, 8000)
    return tmp_path / "a.wav"


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def held_in(folder: Path) -> dict[str, Any]:
    (held,) = json.loads((folder / "analysis.json").read_text()).values()
    return dict(held)


def test_a_speech_model_is_analyzed_over_a_sound(
    hearing: Path, sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["analyze", str(hearing), "--audio", str(sound), "--out", str(tmp_path / "out")])
    assert capsys.readouterr().out.strip() == str(tmp_path / "out" / "report.html")
    held = held_in(tmp_path / "out")
    assert held["identity"]["reads"] == "audio" and held["layers"] == 3 and held["utterances"] == 1
    assert held["groups"]["speech"]["tokens"] == 37  # 150 frames, halved twice
    assert held["intermediate"] == "<|audio_bos|>" and held["groups"]["<|audio_eos|>"]["tokens"] == 1
    assert held["groups"]["text"]["tokens"] > 8 and held["groups"]["prompt 'y'"]["tokens"] == 1  # of "system"
    assert "origin" in held and "<svg" in (tmp_path / "out" / "report.html").read_text()


def test_a_vision_model_sees_a_picture(seeing: Path, picture: Path) -> None:
    held, example = collect(load_media_subject(str(seeing), Media(IMAGE, str(picture)), CPU))
    assert held["groups"]["image"]["tokens"] == 16 and "speech" not in held["groups"]
    assert held["intermediate"] == "<|vision_start|>"
    text = "Describe the image.<|im_end|>\n<|im_start|>assistant"
    assert held["groups"]["text"]["tokens"] == len(tokenizer(VISION).tokenize(text))
    first = example.names[0].index("i0")
    assert example.names[0][first : first + 17] == [*(f"i{n}" for n in range(16)), "<|vision_end|>"]


@pytest.mark.parametrize("kind", [AUDIO, IMAGE])
def test_the_decoder_reads_what_the_whole_model_reads(kind: str, request: pytest.FixtureRequest) -> None:
    """Against sinks and activations of the whole model, attached, over its processor's own input."""
    folder, file = (
        request.getfixturevalue(name) for name in {AUDIO: ("hearing", "sound"), IMAGE: ("seeing", "picture")}[kind]
    )
    media = Media(kind, str(file))
    subject = load_media_subject(str(folder), media, CPU)
    (rows,) = subject.batches()
    got = measure(subject, rows, decorrelation=False)
    processor = hf.AutoProcessor.from_pretrained(folder)
    content = [{"type": kind, kind: media.load()}, {"type": "text", "text": "Describe the image."}]
    if kind == AUDIO:
        content[1]["text"] = "Transcribe the audio."
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    given = {"images": [media.load()]} if kind == IMAGE else {"audio": [media.load()], "sampling_rate": 16000}
    inputs = processor(text=[prompt], return_tensors="pt", **given)
    model = hf.AutoModelForMultimodalLM.from_pretrained(folder).eval()
    want = flashsink.attach(model, decorrelation=False)
    with torch.no_grad():
        model(**inputs)
    assert len(rows.names[0]) == inputs["input_ids"].shape[1]
    for own, other in zip(got.sinks, want.sinks, strict=True):
        torch.testing.assert_close(own.received, other.received, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.activations.max_abs, want.activations.max_abs, rtol=1e-4, atol=1e-5)


def test_rotary_positions_of_a_picture_reach_the_decoder(
    picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Qwen2.5-VL: three positions a token, which the decoder cannot make from embeddings."""
    words = tokenizer(VISION)
    tokens = dict(
        zip(
            ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id"),
            range(4, 8),
            strict=True,
        )
    )
    assert words.convert_tokens_to_ids(VISION) == list(tokens.values())
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    tower: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "depth": 2,
        "num_heads": 2,
        "out_hidden_size": 32,
    }
    tower |= {"patch_size": 4, "spatial_merge_size": 2, "window_size": 16, "fullatt_block_indexes": [1]}
    config = hf.Qwen2_5_VLConfig(
        vision_config=tower, text_config={**SIZES, "rope_parameters": rope, "model_type": "qwen2_5_vl_text"}, **tokens
    )
    torch.manual_seed(0)
    model = hf.Qwen2_5_VLForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path / "model")
    ids = words(
        "<|im_start|>a <|vision_start|>" + "<|image_pad|>" * 6 + "<|vision_end|>what is it", return_tensors="pt"
    )
    pixels = torch.randn(24, 96, generator=torch.Generator().manual_seed(1))
    pad = (ids["input_ids"] == tokens["image_token_id"]).long()
    inputs = hf.BatchFeature({**ids, "pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 4, 6]])})
    inputs["mm_token_type_ids"] = pad

    class Processor:  # its own needs torchvision
        tokenizer = words

        def apply_chat_template(self, conversation: Any, **options: Any) -> hf.BatchFeature:
            assert conversation[0]["content"][1]["text"] == "Describe the image."
            return inputs

    monkeypatch.setattr(hf.AutoProcessor, "from_pretrained", lambda source, **options: Processor())
    subject = load_media_subject(str(tmp_path / "model"), Media(IMAGE, str(picture)), CPU)
    (rows,) = subject.batches()
    assert subject.inputs["position_ids"].shape[1:] == (1, len(rows.names[0]))
    got = measure(subject, rows, decorrelation=False)
    want = flashsink.attach(model, decorrelation=False)
    with torch.no_grad():
        model(**inputs)
    for own, other in zip(got.sinks, want.sinks, strict=True):
        torch.testing.assert_close(own.received, other.received, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_read_is_named(
    hearing: Path, seeing: Path, sound: Path, picture: Path, tiny_llm: Path, tmp_path: Path, refuse: Refuse
) -> None:
    assert "no file" in refuse("analyze", hearing, "--audio", tmp_path / "none.wav")
    assert "not a readable sound file" in refuse("analyze", hearing, "--audio", picture)
    assert "not a readable picture" in refuse("analyze", seeing, "--image", sound)
    assert "not a readable picture" in refuse("analyze", seeing, "--image", tmp_path)
    assert "reads text alone" in refuse("analyze", tiny_llm, "--audio", sound)
    message = refuse("analyze", hearing, "--image", picture)
    assert "--image" in message and str(hearing) in message and "\n" not in message
    assert str(seeing) in refuse("analyze", seeing, "--audio", sound)
    assert "got both" in refuse("analyze", seeing, "--audio", sound, "--image", picture)
    text = tmp_path / "text.txt"
    text.write_text("a text\n")
    for more in (["--text", text], ["limit=3"]):
        assert "expected neither" in refuse("analyze", hearing, "--audio", sound, *more)
