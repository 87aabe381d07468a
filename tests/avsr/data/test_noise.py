"""Babble: levels measured in float64, whose voices are mixed, repeatable draws, and sources that cannot be used."""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from avsr.config import NoiseConfig
from avsr.data.audio import load_audio
from avsr.data.manifest import Utterance, read_manifest, write_manifest
from avsr.data.noise import CLEAN, Babble, add_babble, make_babble
from avsr.data.video import encode_video
from avsr.errors import UserError


def wave(samples: int, seed: int = 0) -> torch.Tensor:
    return 0.1 * torch.randn(samples, generator=torch.Generator().manual_seed(seed))


def tones(folder: Path, speakers: list[str], seconds: float = 0.5) -> Path:
    """A manifest of pure tones, 500 Hz apart and of very unlike loudness; row i is of speakers[i]."""
    rows = []
    for index, speaker in enumerate(speakers):
        time = np.arange(round(seconds * 16_000)) / 16_000
        tone = 0.5 / 3**index * np.sin(2 * np.pi * 500 * (index + 1) * time)
        soundfile.write(str(folder / f"{index}.wav"), tone.astype(np.float32), 16_000, subtype="FLOAT")
        rows.append({"id": str(index), "audio": f"{index}.wav", "text": "x", "duration": seconds, "speaker": speaker})
    write_manifest(folder / "m.jsonl", rows)
    return folder / "m.jsonl"


def powers(noise: torch.Tensor, count: int) -> list[float]:
    """Power of each of the tones, by projection (float64)."""
    time = torch.arange(len(noise), dtype=torch.float64) / 16_000
    found = []
    for index in range(count):
        turning = torch.exp(-2j * math.pi * 500 * (index + 1) * time)
        found.append(float((noise.double() * turning).mean().abs()) ** 2 * 2)
    return found


def clip_of(speaker: str, path: str = "/elsewhere.wav") -> Utterance:
    return Utterance(id="clip", audio=Path(path), text="x", duration=1.0, speaker=speaker)


@pytest.mark.parametrize("snr", [-5.0, 0.0, 2.5, 20.0])
@pytest.mark.parametrize("loudness", [0.01, 3.0])
def test_the_level_is_the_ratio_of_powers(snr: float, loudness: float) -> None:
    speech, noise = wave(16_000), loudness * wave(16_000, 1)
    added = add_babble(speech, noise, snr).double() - speech.double()
    measured = 10 * math.log10(float(speech.double().square().sum() / added.square().sum()))
    assert measured == pytest.approx(snr, abs=1e-3)
    assert torch.nn.functional.cosine_similarity(added, noise.double(), dim=0) > 0.9999


def test_clean_is_bit_identical_and_draws_nothing() -> None:
    speech = wave(1000)
    assert add_babble(speech, wave(1000, 1), CLEAN) is speech
    assert make_babble(NoiseConfig(), [CLEAN], "no/such.jsonl") is None
    assert make_babble(NoiseConfig(), [], "no/such.jsonl") is None


def test_silence_stays_finite() -> None:
    """A time mask may hide all of a short clip."""
    assert torch.isfinite(add_babble(torch.zeros(500), wave(500), 0.0)).all()


def noise_file(folder: Path, samples: torch.Tensor) -> NoiseConfig:
    soundfile.write(str(folder / "noise.wav"), samples.numpy(), 16_000, subtype="FLOAT")
    return NoiseConfig(file=str(folder / "noise.wav"))


@pytest.mark.parametrize("length", [300, 1000, 2500])
def test_a_segment_of_a_file_is_a_stretch_of_its_repetition(tmp_path: Path, length: int) -> None:
    source = torch.arange(1, 1001) / 1001
    babble = make_babble(noise_file(tmp_path, source), [0.0], "unused.jsonl")
    assert babble is not None
    starts = set()
    for draw in range(20):
        noise = babble.draw(length, clip_of("s"), random.Random(draw))
        start = int((source == noise[0]).nonzero())
        torch.testing.assert_close(noise, source.repeat(5)[start : start + length], rtol=0, atol=0)
        starts.add(start)
    assert len(starts) > 10


def test_a_gap_in_the_file_is_no_noise(tmp_path: Path) -> None:
    """Silence cannot be scaled to a level: it would give NaN, or a clean clip that counts as noisy."""
    source = torch.zeros(16_000)
    source[9000:9100] = wave(100)
    babble = Babble(noise_file(tmp_path, source), "")
    for draw in range(10):
        noisy = add_babble(wave(500, 2), babble.draw(500, clip_of("s"), random.Random(draw)), -5.0)
        added = noisy.double() - wave(500, 2).double()
        assert 10 * math.log10(float(wave(500, 2).double().square().sum() / added.square().sum())) == pytest.approx(
            -5.0, abs=1e-3
        )


def test_talkers_have_equal_power_and_are_never_the_clips_speaker(tmp_path: Path) -> None:
    manifest = tones(tmp_path, ["a", "a", "b", "c", "d"])
    babble = Babble(NoiseConfig(talkers=3), str(manifest))
    heard: set[int] = set()
    for draw in range(30):
        found = powers(babble.draw(16_000, clip_of("a"), random.Random(draw)), 5)
        assert found[:2] == pytest.approx([0.0, 0.0], abs=1e-6)
        talking = [index for index, power in enumerate(found) if power > 1e-3]
        assert len(talking) == 3 and [found[i] for i in talking] == pytest.approx([1.0] * 3, rel=1e-3)
    for draw in range(30):
        found = powers(babble.draw(16_000, clip_of("d"), random.Random(draw)), 5)
        heard |= {index for index, power in enumerate(found) if power > 1e-3}
    assert heard == {0, 1, 2, 3}


def test_fewer_voices_than_talkers_all_talk_once(tmp_path: Path) -> None:
    babble = Babble(NoiseConfig(talkers=8), str(tones(tmp_path, ["a", "b", "c"])))
    found = powers(babble.draw(16_000, clip_of("b"), random.Random(0)), 3)
    assert found == pytest.approx([1.0, 0.0, 1.0], abs=1e-3)


def test_without_other_speakers_it_says_so(tmp_path: Path) -> None:
    manifest = tones(tmp_path, ["a", "a"])
    babble = Babble(NoiseConfig(), str(manifest))
    with pytest.raises(UserError, match=r"noise\.babble: .*m\.jsonl.*another speaker than 'a'.*noise\.file"):
        babble.draw(100, clip_of("a"), random.Random(0))
    assert powers(babble.draw(16_000, clip_of("z"), random.Random(0)), 2) == pytest.approx([1.0, 1.0], abs=1e-3)


def test_without_names_of_speakers_the_clip_itself_stays_out(tmp_path: Path) -> None:
    manifest = tones(tmp_path, ["", "", ""])
    clip = read_manifest(manifest)[1]
    babble = Babble(NoiseConfig(), str(manifest))
    assert powers(babble.draw(16_000, clip, random.Random(0)), 3) == pytest.approx([1.0, 0.0, 1.0], abs=1e-3)
    with_name = replace(clip, speaker="me")
    assert powers(babble.draw(16_000, with_name, random.Random(0)), 3) == pytest.approx([1.0, 0.0, 1.0], abs=1e-3)


def test_another_part_of_its_file_is_babble_for_a_clip(tmp_path: Path) -> None:
    """Without names of speakers only the part itself stays out."""
    tones(tmp_path, ["", "", ""], 1.0)
    waves = [soundfile.read(str(tmp_path / f"{index}.wav"))[0] for index in range(3)]
    soundfile.write(str(tmp_path / "all.wav"), np.concatenate(waves), 16_000, subtype="FLOAT")
    rows = [{"id": str(n), "audio": "all.wav", "text": "x", "offset": n, "duration": 1} for n in range(3)]
    write_manifest(tmp_path / "parts.jsonl", rows)
    for index, clip in enumerate(read_manifest(tmp_path / "parts.jsonl")):
        babble = Babble(NoiseConfig(), str(tmp_path / "parts.jsonl"))
        found = powers(babble.draw(16_000, clip, random.Random(0)), 3)
        assert found == pytest.approx([float(n != index) for n in range(3)], abs=1e-3)


def test_the_sound_of_videos_is_babble_too(tmp_path: Path, make_corpus: Callable[..., Path]) -> None:
    manifest = tmp_path / "m.jsonl"
    rows = []
    for index, speaker in enumerate("ab"):
        tone = 0.3 * np.sin(np.arange(16_000) * (0.1 + 0.1 * index))
        (tmp_path / f"{index}.mp4").write_bytes(encode_video(np.zeros((25, 32, 32), np.uint8), sound=tone))
        rows.append({"id": str(index), "video": f"{index}.mp4", "text": "x", "duration": 1.0, "speaker": speaker})
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    noise = Babble(NoiseConfig(), str(manifest)).draw(16_000, clip_of("a"), random.Random(0))
    assert float(noise.square().mean()) == pytest.approx(1.0, rel=0.01)


def test_a_large_pool_is_not_listed_for_every_clip(tmp_path: Path) -> None:
    babble = Babble(NoiseConfig(talkers=2), str(tones(tmp_path, ["a", "b"])))
    held, many = babble._talkers, 300_000
    babble._talkers = replace(held, speakers=["a"] + ["b"] * many, ends=held.ends[:1] + [held.ends[1]] * many)
    started = time.perf_counter()
    for draw in range(20):
        babble._others(clip_of("a"), random.Random(draw))
    assert time.perf_counter() - started < 1.0


def test_the_same_draw_is_the_same_noise(tmp_path: Path) -> None:
    manifest = tones(tmp_path, ["a", "b", "c", "d"])
    one, two = (Babble(NoiseConfig(talkers=2), str(manifest)) for _ in range(2))
    first = one.draw(4000, clip_of("a"), random.Random("x"))
    assert torch.equal(first, two.draw(4000, clip_of("a"), random.Random("x")))
    assert not torch.equal(first, two.draw(4000, clip_of("a"), random.Random("y")))


def test_a_voice_that_cannot_be_read_is_replaced(tmp_path: Path) -> None:
    """data.on_bad=skip leaves such a clip out of the corpus; it must not end the training as noise."""
    manifest = tones(tmp_path, ["a", "b", "c"])
    (tmp_path / "1.wav").write_text("no sound")
    found = powers(Babble(NoiseConfig(talkers=2), str(manifest)).draw(16_000, clip_of("z"), random.Random(0)), 3)
    assert found == pytest.approx([1.0, 0.0, 1.0], abs=1e-3)


def test_sources_without_sound_are_refused(tmp_path: Path, make_corpus: Callable[..., Path]) -> None:
    mute = Babble(NoiseConfig(), str(make_corpus(tmp_path / "mute", 2, video="alone")))
    with pytest.raises(UserError, match=r"noise\.babble: .*no usable sound.*name another manifest or a noise\.file"):
        mute.draw(100, clip_of("z"), random.Random(0))
    with pytest.raises(UserError, match=r"no/such\.jsonl"):
        Babble(NoiseConfig(babble="no/such.jsonl"), str(tones(tmp_path, ["a"])))
    with pytest.raises(UserError, match=r"noise\.file: there is no file .*gone\.wav"):
        Babble(NoiseConfig(file="gone.wav"), "")


def test_a_named_corpus_wins_over_the_training_manifest(tmp_path: Path) -> None:
    own = tones(tmp_path, ["a"])
    babble = Babble(NoiseConfig(babble=str(own)), "no/such.jsonl")
    assert str(own) in babble.identity and load_audio(tmp_path / "0.wav").std() > 0
    before = babble.identity
    tones(tmp_path, ["a", "b"])
    assert Babble(NoiseConfig(babble=str(own)), "").identity != before  # another corpus, other noise
