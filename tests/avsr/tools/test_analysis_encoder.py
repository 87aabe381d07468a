"""Sinks and massive activations inside speech encoders: eager attention in float64, planted ones, the command."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor
from transformers import WavLMModel, WhisperFeatureExtractor, WhisperModel

from avsr.cli import main
from avsr.config import EncoderConfig
from avsr.data.clip import Clip
from avsr.data.manifest import write_manifest
from avsr.models.encoder import SpeechEncoder
from avsr.models.encoders import build_encoder
from avsr.tools.analysis.attention import frame_attention
from avsr.tools.analysis.encoder_collect import BINS, collect_frames
from avsr.tools.analysis.frames import REGIONS, FrameStatistics, measure_clip, regions_of
from avsr.tools.analysis.walk import QKV

RATE = 16_000
FIRST, SPEECH, SILENCE, BETWEEN, LAST, PADDING = range(len(REGIONS))


def noise(seconds: float, seed: int = 0) -> Tensor:
    return 0.1 * torch.randn(round(seconds * RATE), generator=torch.Generator().manual_seed(seed))


def opened(kind: str, name: Path, *, stream: str = "audio", padded: bool = False) -> SpeechEncoder:
    return build_encoder(EncoderConfig(kind=kind, name=str(name), pad_to_30s=padded), stream)


def lively(encoder: SpeechEncoder) -> SpeechEncoder:
    """Random attention that is not nearly uniform."""
    with torch.no_grad():
        for name, own in encoder.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                own.mul_(12.0 if own.dim() == 2 else 1.0)
            if "rel_attn_embed" in name or "gru_rel_pos_linear" in name:
                own.add_(torch.randn(own.shape, generator=torch.Generator().manual_seed(5)))
    return encoder


def double_whisper(encoder: Any, folder: Path) -> Any:
    """The encoder's weights in transformers' own eager model, in float64."""
    model = WhisperModel.from_pretrained(folder, attn_implementation="eager").encoder.double().eval()
    model.load_state_dict(encoder._encoder.state_dict())
    return model


def check(found: FrameStatistics, maps: Tensor, states: Tensor) -> None:
    """``maps`` (L, H, T, T) and the layers' outputs ``states`` (L, T, D), float64."""
    frames, own = maps.shape[-1], found.own
    asked = maps[:, :, :own]
    others = asked.sum(2)
    others[..., :own] -= asked.diagonal(dim1=2, dim2=3)
    counts = torch.tensor([own - 1] * own + [own] * (frames - own))
    for name, expected in {"raw": maps.mean(2), "mean": asked.mean(2), "others": others / counts}.items():
        torch.testing.assert_close(getattr(found, name).double(), expected, rtol=2e-4, atol=2e-6)
    torch.testing.assert_close(found.multiple.double(), others / counts * frames, rtol=2e-4, atol=2e-4)
    torch.testing.assert_close(found.max_abs.double(), states.abs().amax(-1), rtol=1e-4, atol=1e-5)
    assert torch.equal(found.feature, states.abs().argmax(-1))
    middle = states.abs().flatten(1).sort(dim=1).values[:, (states[0].numel() - 1) // 2]
    torch.testing.assert_close(found.median.double(), middle, rtol=1e-3, atol=1e-5)
    assert float(maps.amax()) > 20 / frames  # of nearly uniform attention nothing could be told apart


@pytest.mark.parametrize("seconds", [1.0, 1.53])
def test_own_frames_of_whisper_are_those_of_eager_attention(tiny_whisper: Path, seconds: float) -> None:
    encoder = lively(opened("whisper", tiny_whisper))
    found = measure_clip(encoder, Clip(wave := noise(seconds)))
    frames = math.ceil(seconds * 50)
    mel = encoder._log_mel(torch.nn.functional.pad(wave, (0, frames * 320 - len(wave) + 400))[None])[..., : 2 * frames]
    model = double_whisper(encoder, tiny_whisper)
    model.embed_positions = torch.nn.Embedding.from_pretrained(model.embed_positions.weight[:frames])
    model.config.max_source_positions = frames
    assert found.own == frames and found.others.shape == (2, 4, frames)
    check(found, *eager(model, mel.double()))


def test_padded_whisper_is_that_of_hugging_face(tiny_whisper: Path) -> None:
    encoder = lively(opened("whisper", tiny_whisper, padded=True))
    wave = noise(1.3)
    found = measure_clip(encoder, Clip(wave))
    mel = WhisperFeatureExtractor()(wave.numpy(), sampling_rate=RATE, return_tensors="pt").input_features
    maps, states = eager(double_whisper(encoder, tiny_whisper), mel.double())
    assert found.own == 65 and found.others.shape == (2, 4, 1500)
    expected = maps[:, :, :65].mean(2)
    torch.testing.assert_close(found.mean.double(), expected, rtol=2e-2, atol=1e-5)  # two ways to make a mel spectrum
    torch.testing.assert_close(found.raw.double(), maps.mean(2), rtol=2e-2, atol=1e-5)
    result = collect_frames([("a", found)])
    share = expected[..., 65:].sum(-1).float()
    torch.testing.assert_close(torch.tensor(result["heads"]["padding"]), share, rtol=1e-3, atol=1e-4)
    assert result["padding_frames"] == pytest.approx(1 - 65 / 1500)
    assert sum(region["frames"] for region in result["groups"].values()) == pytest.approx(1.0)


def outputs_of(layers: Any) -> list[Tensor]:
    """Grows by what every layer gives in the next forward."""
    states: list[Tensor] = []
    for layer in layers:
        layer.register_forward_hook(lambda module, args, out: states.append(out[0] if isinstance(out, tuple) else out))
    return states


def eager(model: Any, mel: Tensor) -> tuple[Tensor, Tensor]:
    states = outputs_of(model.layers)
    with torch.no_grad():
        maps = model(mel, output_attentions=True).attentions
    return torch.cat(maps), torch.cat(states)


@pytest.fixture
def wavlm_maps(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """Every call of torch's attention leaves its (H, T, T) weights; transformers asks for their mean alone."""
    kept: list[Tensor] = []
    compute = torch.nn.functional.multi_head_attention_forward

    def keeping(*args: Any, **options: Any) -> Any:
        out, weights = compute(*args, **options, average_attn_weights=False)
        kept.append(weights[0])
        return out, weights.mean(dim=1)

    monkeypatch.setattr(torch.nn.functional, "multi_head_attention_forward", keeping)
    yield kept


def test_wavlm_with_its_relative_positions(
    tiny_wavlm: Path, wavlm_maps: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("avsr.tools.analysis.attention.BLOCK", 4 * 59 * 7)  # blocks that do not divide the frames
    encoder = lively(opened("wavlm", tiny_wavlm))
    wave = noise(1.2)
    found = measure_clip(encoder, Clip(wave))
    wavlm_maps.clear()
    (model := WavLMModel.from_pretrained(tiny_wavlm).eval()).load_state_dict(encoder.model.state_dict())
    states = outputs_of(model.encoder.layers)
    with torch.no_grad():
        model.double()(torch.nn.functional.layer_norm(wave, wave.shape, eps=1e-8)[None].double())
    assert found.own == 59 and found.seconds == pytest.approx(59 / 50)
    check(found, torch.stack(wavlm_maps), torch.cat(states))
    assert not encoder.layers[0]._forward_hooks
    assert "torch_multi_head_self_attention" not in vars(encoder.layers[0].attention)


def test_avhubert_by_its_own_softmax(tiny_avhubert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = lively(opened("avhubert", tiny_avhubert))
    wave = noise(1.31)
    found = measure_clip(encoder, Clip(wave))
    maps: list[Tensor] = []
    states = outputs_of(encoder.layers)

    def spelled_out(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        assert attn_mask is None
        maps.append((q @ k.mT / math.sqrt(q.shape[-1])).softmax(dim=-1)[0])
        return maps[-1] @ v

    monkeypatch.setattr("avsr.models.avhubert_network.scaled_dot_product_attention", spelled_out)
    with torch.no_grad():
        encoder.double()(inputs := encoder.prepare(Clip(wave))[None], torch.tensor([found.own]))
    assert found.own == inputs.shape[1] and found.seconds == pytest.approx(found.own / 25)
    check(found, torch.stack(maps), torch.cat(states))


PLANTED = 37  # the frame that takes the attention


def planted(encoder: Any, feature: int = 3, size: float = 60.0) -> SpeechEncoder:
    """Position ``PLANTED`` is marked by its embedding; keys of head 2 of layer 1 read the mark, its queries are
    constant. The MLP of layer 1 passes the mark on, times 50."""
    whisper = encoder._encoder
    layer = whisper.layers[0]
    width = whisper.config.d_model // 4
    with torch.no_grad():
        whisper.embed_positions.weight[:, feature] = 0.0
        whisper.embed_positions.weight[PLANTED, feature] = size
        layer.self_attn.q_proj.weight[width : 2 * width] = 0.0
        layer.self_attn.q_proj.bias[width : 2 * width] = 4.0
        layer.self_attn.k_proj.weight[width : 2 * width] = 0.0
        layer.self_attn.k_proj.weight[width : 2 * width, feature] = 4.0
        layer.fc1.weight[0] = 0.0
        layer.fc1.weight[0, feature] = 10.0
        layer.fc2.weight[feature, 0] = 100.0
    return encoder


def test_a_planted_sink_is_found_where_and_when_it_is(tiny_whisper: Path) -> None:
    encoder = planted(opened("whisper", tiny_whisper))
    clips = [Clip(noise(seconds, seed)) for seed, seconds in enumerate((1.2, 2.0, 1.61))]
    found = [measure_clip(encoder, clip) for clip in clips]
    for one in found:
        sinks = one.sinks.nonzero().tolist()
        assert [0, 1, PLANTED] in sinks and all(frame == PLANTED for layer, _, frame in sinks if layer == 0)
        assert one.massive[0].nonzero().flatten().tolist() == [PLANTED]
    result = collect_frames([(f"clip {n}", one) for n, one in enumerate(found)])
    first = result["by_layer"][0]
    assert first["sink_heads"] == first["raw_heads"] == first["corrected_heads"] == 0.25
    assert first["sink_clips"] == first["massive_clips"] == 1.0 and first["sink_frames"] == 1.0
    assert first["feature"] == 3 and first["feature_clips"] == 1.0
    assert first["multiple"] == pytest.approx((60 + 100 + 81) / 3, rel=1e-3)  # all attention goes there
    assert result["heads"]["sinks"][0] == [0.0, 1.0, 0.0, 0.0]
    strongest, largest = result["strongest"][0], result["largest"][0]
    assert (strongest["head"], strongest["second"], strongest["clip"]) == (2, pytest.approx(PLANTED / 50), "clip 1")
    assert strongest["region"] == "speech" and largest["second"] == pytest.approx(PLANTED / 50)
    assert int(np.argmax(result["time"]["start"][0])) == PLANTED
    massive = [row for row in result["massive"] if row["layer"] == 1]
    assert [(row["feature"], row["region"], row["frames"], row["clips"]) for row in massive] == [(3, "speech", 3, 3)]
    assert result["groups"]["speech"]["peak"][0] == 1.0


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("frames", "own"), [(16, 16), (53, 20), (7, 2)])
def test_what_frames_receive_from_others(frames: int, own: int, biased: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("avsr.tools.analysis.attention.BLOCK", 3 * frames * 5)
    rng = torch.Generator().manual_seed(frames)
    q, k, v = (2 * torch.randn(1, 3, frames, 16, generator=rng) for _ in range(3))
    bias = 3 * torch.randn(3, frames, frames, generator=rng) if biased else None
    found = frame_attention(QKV(q, k, v, 0.3), own, bias)
    maps = (q[0].double() @ k[0].double().mT * 0.3 + (bias.double() if bias is not None else 0.0)).softmax(dim=-1)
    without = maps * (1 - torch.eye(frames))
    counts = own - (torch.arange(frames) < own).double()
    for value, expected in (
        (found.raw, maps.mean(1)),
        (found.mean, maps[:, :own].mean(1)),
        (found.others, without[:, :own].sum(1) / counts),
    ):
        torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=1e-6)


def test_attention_to_oneself_is_not_counted() -> None:
    alone = 40 * torch.eye(16)[None, None]
    found = frame_attention(QKV(alone, alone, alone, 1.0), 16)
    torch.testing.assert_close(found.raw, torch.full((1, 16), 1 / 16))
    torch.testing.assert_close(found.others, torch.zeros(1, 16), rtol=0.0, atol=1e-6)


def test_regions_of_ends_speech_silence_and_padding() -> None:
    wave = noise(2.0)
    wave[8000:16000], wave[16000:24000] = wave[8000:16000] * 0.001, wave[16000:24000] * 0.03  # -60 and -30 dB
    regions = regions_of(wave, 100, 130, 50).tolist()
    assert regions[:5] == [FIRST] * 5 and regions[95:100] == [LAST] * 5 and regions[100:] == [PADDING] * 30
    assert regions[5:25] == [SPEECH] * 20 and regions[25:50] == [SILENCE] * 25 and regions[50:95] == [SPEECH] * 45
    assert regions_of(None, 50, 50, 25).tolist() == [FIRST] * 2 + [BETWEEN] * 46 + [LAST] * 2


def test_a_silent_clip_has_no_speech_and_finite_numbers(tiny_whisper: Path) -> None:
    found = measure_clip(opened("whisper", tiny_whisper), Clip(torch.zeros(RATE)))
    assert found.regions.tolist() == [FIRST] * 5 + [SILENCE] * 40 + [LAST] * 5
    result = collect_frames([("silent", found)])
    assert set(result["groups"]) == {"first", "silence", "last"}
    json.dumps(result, allow_nan=False)
    np.testing.assert_allclose(np.sum([one["mass"] for one in result["groups"].values()], axis=0), 1.0, rtol=1e-5)


def uniform(own: int, frames: int = 0, layers: int = 2, heads: int = 3) -> FrameStatistics:
    """Uniform attention of a clip of ``own`` frames at 50 a second."""
    frames = frames or own
    same = torch.full((layers, heads, frames), 1 / frames)
    ones = torch.ones(layers, frames)
    regions = regions_of(noise(own / 50), own, frames, 50)
    return FrameStatistics(
        *(same, same, same, same), ones, ones.long(), torch.ones(layers), regions=regions, own=own, seconds=own / 50
    )


def test_uniform_attention_is_one_everywhere_whatever_the_length() -> None:
    result = collect_frames([(str(own), uniform(own)) for own in (50, 77, 1500)])
    for region in result["groups"].values():
        np.testing.assert_allclose(region["multiple"], 1.0, rtol=1e-5)
        assert region["sink_rate_relative"] == [0.0, 0.0]
    assert {name: len(lines[0]) for name, lines in result["time"].items()} == {"start": 50, "end": 50, "clip": BINS}
    for lines in result["time"].values():
        np.testing.assert_allclose(lines, 1.0, rtol=1e-5)
    assert all(row["multiple"] == pytest.approx(1.0) for row in result["by_layer"])


def test_a_threshold_in_seconds_does_not_depend_on_the_length() -> None:
    for own, frames in ((60, 60), (1500, 1500), (60, 1500)):
        one = uniform(own, frames)
        others = one.others.clone()
        others[0, 1, 30] = 1.001 * 25 / own  # what 25 frames have to give
        others[1, 2, 30] = 0.999 * 25 / own
        assert replace(one, others=others).sinks.nonzero().tolist() == [[0, 1, 30]]


def test_time_of_clips_of_unequal_lengths() -> None:
    """Of a clip shorter than the window only its frames count; ends are aligned with ends."""
    short, long = uniform(30), uniform(200, 230)
    spike = short.others.clone()
    spike[:, :, 29] = 1.0
    spiked = long.others.clone()
    spiked[:, :, 199] = 2 / 230
    spiked[:, :, 200] = 3 / 230
    time = collect_frames([("a", replace(short, others=spike)), ("b", replace(long, others=spiked))])["time"]
    assert time["end"][0][49] == pytest.approx((30 + 2) / 2)
    np.testing.assert_allclose(time["end"][0][:49], 1.0, rtol=1e-5)
    assert time["start"][0][29] == pytest.approx((30 + 1) / 2) and time["start"][0][30] == pytest.approx(1.0)
    assert time["padding_start"][0][0] == pytest.approx(3.0) and time["padding_start"][0][30:] == [None] * 20
    assert time["padding_end"][0][:20] == [None] * 20 and time["padding_end"][0][20] == pytest.approx(3.0)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(["analyze", *arguments])
    assert stop.value.code == 2
    line = capsys.readouterr().err.strip()
    assert "\n" not in line.split("\r")[-1]
    return line


@pytest.fixture
def corpus(make_corpus: Callable[..., Path], tmp_path: Path) -> Path:
    return make_corpus(tmp_path / "corpus", seconds=[1.2, 0.5, 1.0, 2.1, 1.7])


def test_the_command_over_a_random_whisper(
    tiny_whisper: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    main(["analyze", f"whisper:{tiny_whisper}", "--encoder", "--manifest", str(corpus), "limit=3", "--out", str(out)])
    assert capsys.readouterr().out.strip() == str(out / "report.html")
    held = json.loads((out / "analysis.json").read_text(), parse_constant=pytest.fail)
    own, padded = held.values()
    assert list(held) == [f"whisper {tiny_whisper.name}", f"whisper {tiny_whisper.name}, padded"]
    assert own["clips"] == padded["clips"] == 3 and own["identity"]["digest"] == padded["identity"]["digest"]
    assert own["heads"]["padding"] is None and np.shape(padded["heads"]["padding"]) == (2, 4)
    assert "padding" in padded["groups"] and "padding" not in own["groups"]
    page = (out / "report.html").read_text()
    for section in ("summary", "layers", "heads", "time", "regions", "padding", "massive"):
        assert f"<section id={section}>" in page
    assert len(re.findall("<svg", page)) == 2 + 2 * 3 + 2 + 2 * 2 + 1 + 2
    assert "nan" not in re.sub("<[^>]*>", " ", page).lower().split()


@pytest.mark.parametrize("stream", ["audio", "video", "fused"])
def test_the_command_over_a_random_avhubert(
    tiny_avhubert: Path, make_corpus: Callable[..., Path], tmp_path: Path, stream: str
) -> None:
    manifest = make_corpus(tmp_path / "corpus", seconds=[1.2, 1.6], video="beside")
    options = [f"--manifest={manifest}", f"stream={stream}", f"--out={tmp_path}"]
    main(["analyze", f"avhubert:{tiny_avhubert}", "--encoder", *options])
    (held,) = json.loads((tmp_path / "analysis.json").read_text()).values()
    assert held["identity"]["frames_per_second"] == 25 and held["clips"] == 2
    assert ("between" in held["groups"]) == (stream == "video")


def test_two_encoders_side_by_side(tiny_wavlm: Path, tiny_whisper: Path, corpus: Path, tmp_path: Path) -> None:
    targets = [f"wavlm:{tiny_wavlm}", f"whisper:{tiny_whisper}", f"wavlm:{tiny_wavlm}"]
    main(["analyze", *targets, "--encoder", f"--manifest={corpus}", f"--out={tmp_path}", "limit=1"])
    assert len(json.loads((tmp_path / "analysis.json").read_text())) == 3


def test_what_is_refused(
    tiny_whisper: Path, tiny_llm: Path, tiny_avhubert: Path, corpus: Path, tmp_path: Path,
    make_corpus: Callable[..., Path], capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    good, clips = f"whisper:{tiny_whisper}", f"--manifest={corpus}"
    into = f"--out={tmp_path / 'none'}"
    short = make_corpus(tmp_path / "short", seconds=[0.4, 0.9])
    for arguments, said in (
        ([str(tiny_llm), "--encoder", clips], "no speech encoder; with --encoder a target is one of whisper:NAME"),
        (["visual:runs/visual", "--encoder", clips], "no speech encoder"),
        ([f"whisper:{tiny_llm}", "--encoder", clips, into], "cannot load the Whisper model"),
        ([f"wavlm:{tiny_whisper}", "--encoder", clips, into], "expected a WavLM model, got 'whisper'"),
        ([good, "--encoder"], "--encoder: give the clips that it hears, with --manifest FILE.jsonl"),
        ([good, "--encoder", f"--manifest={tmp_path / 'gone.jsonl'}", into], "cannot read the manifest"),
        ([good, "--encoder", f"--manifest={short}", into], "none of its 2 clips lasts 1 to 30 s"),
        ([f"avhubert:{tiny_avhubert}", "--encoder", clips, "stream=video", into], "has no video"),
        ([good, "--encoder", clips, "stream=video", into], "reads sound alone"),
        ([good, "--encoder", clips, "stream=smell"], "stream: expected one of audio, video, fused, got 'smell'"),
        ([good, "--encoder", clips, "limits=3"], "did you mean 'limit'?"),
        ([good, "--encoder", clips, "limit=0"], "limit: expected a whole number above 0"),
        ([good, "--encoder", clips, "--audio=x.wav"], "--encoder reads the clips of --manifest, not --audio"),
        ([str(tiny_llm), clips], "--manifest is for speech encoders, with --encoder"),
        ([good], "is a speech encoder: analyze it with --encoder --manifest FILE.jsonl"),
    ):
        assert said in refused(capsys, *arguments), arguments
    assert not (tmp_path / "none" / "report.html").exists()


def test_a_clip_that_cannot_be_heard_is_named_with_its_line(
    tiny_whisper: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    soundfile.write(tmp_path / "a.wav", np.zeros(RATE, dtype=np.float32), RATE)
    manifest = tmp_path / "m.jsonl"
    write_manifest(manifest, [{"id": "a", "audio": "a.wav", "duration": 1.0}])
    said = refused(capsys, f"whisper:{tiny_whisper}", "--encoder", f"--manifest={manifest}", f"--out={tmp_path / 'o'}")
    assert "m.jsonl:1" in said and "is silent" in said
