"""Changes to clips: crops, time masks, versions that are reproducible anywhere, and their caches."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from itertools import groupby, pairwise
from pathlib import Path

import pytest
import torch
from safetensors.numpy import load_file
from torch import Tensor

from avsr.config import AugmentConfig, Config, NoiseConfig, load_config
from avsr.data.clip import Clip, center_crop, load_clip
from avsr.data.dataset import Reading, load_dataset
from avsr.data.features import FeatureStore
from avsr.data.manifest import Utterance, read_manifest
from avsr.data.noise import Babble
from avsr.data.transforms import PLAIN, Transforms, Version, random_crop, time_mask
from avsr.models.build import build_store

CPU = torch.device("cpu")
BOTH = frozenset({"audio", "video"})
ROW = Utterance(id="u", audio=Path("/u.wav"), text="x", duration=1.0, speaker="s")


def numbered(frames: int, height: int, width: int) -> Tensor:
    """(T, H, W): every pixel of a frame is unlike the others."""
    return torch.arange(frames * height * width).reshape(frames, height, width)


def clip(frames: int = 50) -> Clip:
    generator = torch.Generator().manual_seed(0)
    mouth = torch.randint(1, 256, (frames, 96, 96), dtype=torch.uint8, generator=generator)
    return Clip(0.1 + 0.01 * torch.rand(frames * 640, generator=generator), mouth)


# Crops


def test_a_random_crop_is_one_window_inside_for_all_frames() -> None:
    frames = numbered(4, 96, 90)
    places = set()
    for draw in range(200):
        part = random_crop(frames, 88, random.Random(draw))
        top, left = divmod(int(part[0, 0, 0]), 90)
        assert torch.equal(part, frames[:, top : top + 88, left : left + 88]) and part.shape == (4, 88, 88)
        places.add((top, left))
    assert {top for top, _ in places} == set(range(9)) and {left for _, left in places} == set(range(3))
    assert torch.equal(random_crop(numbered(2, 88, 88), 88, random.Random(0)), numbered(2, 88, 88))


def test_the_middle() -> None:
    frames = numbered(2, 96, 91)
    assert torch.equal(center_crop(frames, 88, 88), frames[:, 4:92, 1:89])
    assert torch.equal(center_crop(frames[:, :88, :88], 88, 88), frames[:, :88, :88])


# Time masks


def runs_of_zeros(signal: Tensor) -> list[int]:
    return [len(list(run)) for value, run in groupby(signal.tolist()) if value == 0]


@pytest.mark.parametrize(("length", "masks"), [(1, 1), (25, 1), (26, 2), (50, 2), (51, 3), (400, 16)])
def test_the_number_of_masks(length: int, masks: int) -> None:
    """One for every 25 frames begun; each draws a bound, a width and, where the bound leaves room, a start."""

    class Counting(random.Random):
        bounds = 0

        def randrange(self, *args: int) -> int:  # type: ignore[override]
            Counting.bounds += args == (7,)
            return super().randrange(*args)

    time_mask(torch.ones(length), 7, 25, Counting(0))
    assert Counting.bounds == 2 * masks


def test_a_mask_is_shorter_than_the_window_and_zero() -> None:
    longest, hidden = 0, 0
    for draw in range(400):
        signal = torch.arange(1.0, 26.0)
        masked = time_mask(signal, 10, 25, random.Random(draw))
        assert torch.equal(signal, torch.arange(1.0, 26.0))  # a copy is changed
        zeros = runs_of_zeros(masked)
        assert len(zeros) <= 1 and torch.equal(masked[masked != 0], signal[masked != 0])
        longest, hidden = max([longest, *zeros]), hidden + sum(zeros)
    assert longest == 9
    assert hidden / 400 == pytest.approx(0.9 * 4.5, rel=0.15)  # a bound of 0 in ten skips the mask


def test_whole_frames_are_masked_and_short_clips_survive() -> None:
    frames = clip(50).mouth
    assert frames is not None
    masked = time_mask(frames, 10, 25, random.Random(1))
    hidden = (masked == 0).flatten(1).all(dim=1)
    assert 0 < int(hidden.sum()) < 19 and torch.equal(masked[~hidden], frames[~hidden])
    for length in range(1, 12):
        for draw in range(30):
            assert time_mask(torch.ones(length), 10, 25, random.Random(draw)).shape == (length,)


# Versions


def all_on(noise: Babble | None = None, seed: int = 3) -> Transforms:
    levels = [-5.0, 0.0, 5.0, float("inf")] if noise else []
    return Transforms(AugmentConfig(snr=levels, time_mask=True, random_crop=True), noise, seed)


def test_the_plain_version_is_the_clip_itself() -> None:
    given = clip()
    assert all_on()(given, ROW, PLAIN) is given
    assert Version().plain and not Version(snr=0.0).plain and not Version(draw=0).plain
    assert all_on().identity(PLAIN, BOTH) == ""


@pytest.fixture
def babble(tmp_path: Path, make_corpus: Callable[..., Path]) -> Babble:
    return Babble(NoiseConfig(talkers=2), str(make_corpus(tmp_path / "voices", 6, 0.4)))


def digest(made: Clip) -> str:
    assert made.wave is not None and made.mouth is not None
    return f"{made.mouth.double().sum()} {made.mouth.shape} {made.wave.double().sum():.9f}"


def test_a_version_is_the_same_in_any_process(babble: Babble) -> None:
    """Sums over mouth and sound, as another process has found them."""
    found = []
    for draw in (0, 1):
        made = all_on(babble)(clip(), ROW, Version(draw=draw))
        assert made.wave is not None and made.mouth is not None
        found.append((int(made.mouth.long().sum()), round(float(made.wave.double().sum()), 1)))
    assert found == [(45622019, 2712.5), (39676049, 2860.9)]


def test_seed_utterance_and_draw_make_other_versions(babble: Babble) -> None:
    other = Utterance(id="v", audio=Path("/v.wav"), text="x", duration=1.0, speaker="s")
    made = {
        digest(all_on(babble, seed)(clip(), row, Version(draw=draw)))
        for seed in (3, 4)
        for row in (ROW, other)
        for draw in (0, 1, 2)
    }
    assert len(made) == 12


def test_every_level_is_drawn(babble: Babble) -> None:
    config = AugmentConfig(snr=[-5.0, 20.0, float("inf")])
    plain = clip(10)
    assert plain.wave is not None
    found = []
    for draw in range(30):
        noisy = Transforms(config, babble, 0)(plain, ROW, Version(draw=draw)).wave
        assert noisy is not None
        power = float((noisy - plain.wave).double().square().sum())
        found.append(float(10 * torch.tensor(float(plain.wave.double().square().sum()) / max(power, 1e-30)).log10()))
    assert {round(level) for level in found if level < 100} == {-5, 20} and max(found) > 100


def test_changes_are_drawn_apart(babble: Babble) -> None:
    """A loud babble comes with any place of the crop."""
    made = Transforms(AugmentConfig(snr=[-20.0, float("inf")], random_crop=True), babble, 0)
    plain = Clip(clip(4).wave, numbered(4, 96, 96))
    seen = set()
    for draw in range(60):
        changed = made(plain, ROW, Version(draw=draw))
        assert changed.mouth is not None
        seen.add((changed.wave is plain.wave, int(changed.mouth[0, 0, 0]) // 96 < 4))
    assert len(seen) == 4


def test_noise_of_an_evaluation_is_the_same_each_time_and_at_each_level(babble: Babble) -> None:
    """Only its scale differs, so that levels can be compared; masks and crops are only for training."""
    plain, made = clip(20), all_on(babble)
    assert plain.wave is not None
    noises = []
    for level in (-5.0, 5.0):
        one, two = (made(plain, ROW, Version(level)) for _ in range(2))
        assert one.wave is not None and two.wave is not None and one.mouth is plain.mouth
        assert torch.equal(one.wave, two.wave)
        noises.append((one.wave - plain.wave).double())
    torch.testing.assert_close(noises[0], noises[1] * 10**0.5, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("needs", [{"audio"}, {"video"}, BOTH])
def test_one_identity_is_one_input(babble: Babble, needs: set[str]) -> None:
    """Whatever is switched on: where names for the cache agree, what an encoder gets agrees, and the other way."""
    by_name: dict[str, str] = {}
    for levels in ([], [0.0]):
        for mask in (False, True):
            for crop in (False, True):
                for version in (PLAIN, Version(draw=0), Version(draw=1), Version(5.0)):
                    made = Transforms(AugmentConfig(levels, mask, crop), babble, 3)
                    seen = made(clip(), ROW, version)
                    got = " ".join(
                        str(part.double().sum().item()) + str(part.shape)
                        for part in (seen.wave if "audio" in needs else None, seen.mouth if "video" in needs else None)
                        if part is not None
                    )
                    assert by_name.setdefault(made.identity(version, needs), got) == got
    assert len(set(by_name.values())) == len(by_name)


# The cache


def make_store(recipe: Path, *overrides: str) -> tuple[Config, FeatureStore]:
    config = load_config(str(recipe), overrides)
    return config, build_store(config, CPU, levels=[*config.augment.snr, *config.noise.snr])


def cached(cache: Path) -> dict[str, int]:
    """Number of clips by encoder."""
    clips: Counter[str] = Counter()
    for shard in cache.rglob("*/shards/*.safetensors"):
        clips[shard.parts[-3]] += len(load_file(str(shard)))
    return clips


AUGMENTED = ("augment.snr=[0,5]", "augment.time_mask=true", "augment.random_crop=true")


def test_a_cache_holds_so_many_versions_and_epochs_take_turns(av_recipe: Callable[..., Path], tmp_path: Path) -> None:
    recipe = av_recipe(tmp_path, "audiovisual")
    config, store = make_store(recipe, *AUGMENTED, "augment.views=2", "noise.talkers=2")
    reading = Reading("audiovisual", versions=2, augmented=True, seed=config.training.seed)
    data = load_dataset(config.data.train, config.data, store, list, title="x", reading=reading)
    assert sum(cached(tmp_path / "cache").values()) == 8 * 2 * 2  # utterances, streams, versions
    by_epoch = [data[(0, epoch)].features for epoch in range(4)]
    for name in ("audio", "video"):
        for early, late in pairwise(by_epoch):
            assert not torch.equal(early[name], late[name])
        assert torch.equal(by_epoch[0][name], by_epoch[2][name]) and torch.equal(by_epoch[1][name], by_epoch[3][name])
    assert data.sizes.tolist() == [30 + 15] * 8
    # the same numbers without a cache, from the encoders that the model would run
    _, plain = make_store(recipe, *AUGMENTED, "noise.talkers=2", "data.cache=null")
    for draw in range(2):
        inputs = plain.load(data.utterances[0], Version(draw=draw))
        for name, rows in inputs.items():
            features = plain.encoders[name].run([rows])[0].half().float()
            torch.testing.assert_close(features, by_epoch[draw][name], rtol=2e-3, atol=2e-3)
    # validation is read as it is
    validation = load_dataset(
        config.data.validation, config.data, store, list, title="x", reading=Reading("audiovisual")
    )
    features = validation[0].features
    clean = load_clip(validation.utterances[0], BOTH, 0.2)
    for name, encoder in store.encoders.items():
        torch.testing.assert_close(features[name], encoder.encode([clean])[0].half().float(), rtol=2e-3, atol=2e-3)


def test_a_cached_noisy_set_needs_no_second_encoding_of_the_mouth(
    av_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    config, store = make_store(av_recipe(tmp_path, "audiovisual"), "noise.snr=[0,.inf]", "noise.talkers=2")
    for level in (float("inf"), 0.0):
        load_dataset(
            config.data.test["sentences"],
            config.data,
            store,
            list,
            title="x",
            reading=Reading("audiovisual", Version(level)),
        )
    assert sorted(cached(tmp_path / "cache").values()) == [4, 8]  # of video, of audio


def test_without_a_cache_every_epoch_is_new(av_recipe: Callable[..., Path], tmp_path: Path) -> None:
    config, store = make_store(av_recipe(tmp_path, "video"), "augment.random_crop=true", "data.cache=null")
    reading = Reading("video", augmented=True, seed=0)
    data = load_dataset(config.data.train, config.data, store, list, title="x", reading=reading)
    inputs = [data[(1, epoch)].features["video"] for epoch in range(6)]
    assert len({rows.numpy().tobytes() for rows in inputs}) > 3
    assert torch.equal(data[(1, 4)].features["video"], inputs[4])
    middle = data[1].features["video"]  # without a draw the clip as it is
    mouth = read_manifest(config.data.train)[1]
    plain = load_clip(mouth, {"video"}, 0.2).mouth
    assert plain is not None
    assert torch.equal(middle, center_crop(plain, 88, 88).flatten(1))
