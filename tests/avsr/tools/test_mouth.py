"""The drawing of mouths: repeatable, of a speaker and a clip, and readable."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import numpy as np
import pytest
import torch

from avsr.tools.corpora.synth.mouth import SIZE, draw_mouth
from avsr.tools.corpora.synth.visemes import PARAMETERS, TARGETS, VISEMES
from avsr.tools.corpora.synth.voices import VOICES

pytestmark = pytest.mark.integration


def still(frames: int = 3, **values: float) -> np.ndarray:
    """A track that stays at rest but for the given parameters."""
    track = np.zeros((frames, len(PARAMETERS)))
    for name, value in values.items():
        track[:, PARAMETERS.index(name)] = value
    return track


def mean_mouth(**values: float) -> np.ndarray:
    """The mean of many clips of one speaker, without noise and motion to speak of; (96, 96) float64."""
    mean: np.ndarray = np.mean([draw_mouth(still(2, **values), "us_f2", f"clip{i}") for i in range(24)], axis=(0, 1))
    return mean


def test_shape_and_type() -> None:
    for count in (1, 8, 21):
        frames = draw_mouth(still(count), "a", "b")
        assert frames.shape == (count, SIZE, SIZE) == (count, 96, 96) and frames.dtype == np.uint8
    for bad in (np.zeros((0, len(PARAMETERS))), np.zeros((4, 3)), np.zeros(7)):
        with pytest.raises(ValueError, match="track: expected"):
            draw_mouth(bad, "a", "b")


def test_the_same_input_gives_the_same_bytes_in_any_process() -> None:
    track = TARGETS[[0, 1, 5, 11, 22] * 3]
    here = hashlib.sha256(draw_mouth(track, "us_f2", "x").tobytes()).hexdigest()
    draw_mouth(track, "somebody", "else")
    assert hashlib.sha256(draw_mouth(track, "us_f2", "x").tobytes()).hexdigest() == here
    code = (
        "import hashlib; from avsr.tools.corpora.synth.mouth import draw_mouth;"
        "from avsr.tools.corpora.synth.visemes import TARGETS;"
        "track = TARGETS[[0, 1, 5, 11, 22] * 3];"
        "print(hashlib.sha256(draw_mouth(track, 'us_f2', 'x').tobytes()).hexdigest())"
    )
    there = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
    assert there == here


def test_the_speaker_sets_the_face_and_the_clip_the_scene() -> None:
    frames = {(s, c): draw_mouth(still(4), s, c)[0].astype(float) for s in ("a", "b") for c in ("x", "y")}
    assert len({frame.tobytes() for frame in frames.values()}) == 4
    means = {voice.name: draw_mouth(still(1), voice.name, "x")[0] for voice in VOICES}
    levels = [float(np.median(frame)) for frame in means.values()]
    assert max(levels) - min(levels) > 40  # skins differ
    head = [draw_mouth(still(60), "a", clip) for clip in ("x", "y")]
    for clip in head:  # the head moves, slowly
        steps = np.abs(np.diff(clip.astype(float), axis=0)).mean(axis=(1, 2))
        assert 0.5 < steps.mean() < 6
        assert np.abs(clip[0].astype(float) - clip[30]).mean() > steps.mean() * 1.05


def test_each_parameter_does_what_it_says() -> None:
    middle = slice(40, 75), slice(30, 66)
    shut, open_ = mean_mouth(), mean_mouth(opening=1.0)
    skin = float(np.median(shut))
    dark = [(mean_mouth(opening=o)[middle] < 0.3 * skin).sum() for o in (0.0, 0.3, 0.6, 1.0)]
    assert dark[0] < 20 < dark[1] < dark[2] < dark[3] and dark[3] > 300
    rows = (open_[:, 46:50].mean(axis=1) < 0.3 * skin).sum()
    assert 14 <= rows <= 24  # of 96: the gap of a wide "ah"
    teeth = mean_mouth(opening=0.5, teeth=1.0)
    bare = mean_mouth(opening=0.5)
    assert teeth[42:52, 40:56].max() > 0.9 * skin > bare[42:52, 40:56].max() + 40
    tongue, none = mean_mouth(opening=0.8, tongue=1.0), mean_mouth(opening=0.8)
    assert tongue[48:60, 40:56].mean() > none[48:60, 40:56].mean() + 15
    assert mean_mouth(opening=0.3, tip=1.0)[46:54, 44:52].mean() > mean_mouth(opening=0.3)[46:54, 44:52].mean() + 15
    tucked, loose = mean_mouth(opening=0.14, tuck=1.0), mean_mouth(opening=0.14)
    lips = [np.flatnonzero(picture[:, 44:52].mean(axis=1) < 0.7 * skin) for picture in (tucked, loose)]
    tucked_rows, loose_rows = (rows[(rows > 30) & (rows < 70)] for rows in lips)
    assert tucked_rows.max() < loose_rows.max() - 5  # less of the lower lip is seen, and higher up
    pressed = (mean_mouth(opening=-0.25)[middle] < 0.8 * skin).sum()
    assert pressed < 0.9 * (shut[middle] < 0.8 * skin).sum()


def half_width(picture: np.ndarray) -> float:
    """Half of the widest run of columns whose darkest pixel near the middle row is a lip's."""
    darkest = picture[38:58].min(axis=0)
    return float((darkest[8:-8] < 0.72 * np.median(picture)).sum()) / 2


def test_the_mouth_has_its_size_and_changes_its_width() -> None:
    rest = half_width(mean_mouth())
    assert 22 <= rest <= 32
    assert half_width(mean_mouth(width=1.0)) > rest + 2
    assert half_width(mean_mouth(width=-0.9, rounding=1.0)) < rest - 5


def stills(speakers: list[str], clips: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, 1, 22, 22) float32 and (N,): each viseme once a clip, sized as a small encoder would see it."""
    pictures = []
    for speaker in speakers:
        for clip in range(clips):
            frames = draw_mouth(TARGETS, speaker, f"{speaker}{clip}")[:, 4:92, 4:92]
            pictures.append(frames.reshape(-1, 1, 22, 4, 22, 4).mean(axis=(3, 5)))
    small = np.concatenate(pictures)
    small = (small - small.mean(axis=(2, 3), keepdims=True)) / small.std(axis=(2, 3), keepdims=True)
    return torch.tensor(small, dtype=torch.float32), torch.arange(len(VISEMES)).repeat(len(pictures))


def test_a_small_network_reads_the_visemes_of_unseen_speakers_from_single_frames() -> None:
    """Drawn mouths can be read: well above chance (1 of 23) from one 22x22 picture, with few clear confusions."""
    names = [voice.name for voice in VOICES]
    pictures, labels = stills(names[:20], 4)
    seen, truth = stills(names[30:38], 2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = torch.nn
        model = layers.Sequential(
            *(layers.Conv2d(1, 16, 3, padding=1), layers.ReLU(), layers.MaxPool2d(2)),
            *(layers.Conv2d(16, 32, 3, padding=1), layers.ReLU(), layers.MaxPool2d(2)),
            *(layers.Flatten(), layers.Linear(800, 96), layers.ReLU(), layers.Linear(96, len(VISEMES))),
        )
        optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
        for _ in range(10):
            for batch in torch.randperm(len(pictures)).split(64):
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(model(pictures[batch]), labels[batch]).backward()
                optimizer.step()
        read = model(seen).argmax(dim=1)
    correct = read == truth
    assert float(correct.float().mean()) > 0.5
    for viseme in ("FV", "AA", "SH"):
        assert float(correct[truth == VISEMES.index(viseme)].float().mean()) > 0.7, viseme
