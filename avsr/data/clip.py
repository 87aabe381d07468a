"""The signals of one utterance: 16 kHz sound and 25 fps mouth frames, cut to the same length."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from avsr.data.audio import load_audio, refuse_unusable
from avsr.data.manifest import Utterance
from avsr.data.measured import Measured
from avsr.data.members import suffix_of
from avsr.data.rates import FRAMES_PER_SECOND, SAMPLE_RATE, SAMPLES_PER_FRAME
from avsr.data.video import read_video, read_video_sound
from avsr.errors import UserError, at

VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".avi", ".webm", ".m4v", ".mpg", ".mpeg")
# of sound that libsndfile does not read, and of videos that are read for their sound alone
SOUND_SUFFIXES = (
    *(".m4a", ".m4b", ".aac", ".wma", ".mka", ".ac3", ".eac3", ".amr", ".ape", ".wv", ".tta", ".dts"),
    *(".3gp", ".ts", ".m2ts", ".mts", ".flv", ".wmv", ".asf", ".ogv", ".vob", ".mxf"),
)
FLAT = 3.0  # standard deviation (grey levels) of a picture that shows nothing; noise that codecs leave of black has 2.8
# Share of its standard deviation, but 2 to so many grey levels, by which 99% of the pixels may differ from the first
# picture of a video that stands still; lips that move by a pixel make 55 levels of a bright face
STILL = 0.2, 8.0
STILL_FRAMES = 25  # that may do so, as before a word
MOUTH_SIZES = (88, 128)  # smallest and largest side in pixels of a usable mouth crop; 96 in all known corpora


@dataclass(frozen=True)
class Clip:
    """``wave`` (samples,) float32 mono at 16 kHz in -1..1; ``mouth`` (T, H, W) uint8 grey at 25 fps."""

    wave: Tensor | None = None
    mouth: Tensor | None = None

    @property
    def samples(self) -> int:
        return 0 if self.wave is None else len(self.wave)

    @property
    def video_frames(self) -> int:
        return 0 if self.mouth is None else len(self.mouth)

    @property
    def measured(self) -> Measured:
        return Measured(self.samples, self.video_frames)

    @property
    def seconds(self) -> float:
        return self.measured.seconds


def center_crop(frames: Tensor, height: int, width: int) -> Tensor:
    """The central (T, height, width) of (T, H, W) frames, which must be at least that large."""
    top, left = (frames.shape[1] - height) // 2, (frames.shape[2] - width) // 2
    return frames[:, top : top + height, left : left + width]


def load_clip(utterance: Utterance, needs: Set[str], max_mismatch: float) -> Clip:
    """Reads the signals of an utterance.

    Args:
        utterance: names its files.
        needs: "audio", "video" or both.
        max_mismatch: seconds by which the two may differ in length; within it both are cut to the shorter.

    Raises:
        UserError: a file is missing or unusable, the video is not a mouth crop, shows nothing or stands still, or the
            lengths disagree.
    """
    place = at(utterance.where)
    clip = Clip()
    if "audio" in needs:
        clip = replace(clip, wave=_sound(utterance, place))
    if "video" in needs:
        if utterance.video is None:
            raise UserError(f"{place}{utterance.id!r} has no video")
        mouth = read_video(utterance.video, where=utterance.where, cut=utterance.cut)
        height, width = mouth.shape[1:]
        if height != width or not MOUTH_SIZES[0] <= height <= MOUTH_SIZES[1]:
            raise UserError(
                f"{place}{utterance.video} is {width}x{height}, expected a mouth crop of 96x96 pixels; "
                "make crops of talking faces with 'avsr prepare'"
            )
        refuse_still(mouth, f"{place}{utterance.video}")
        clip = replace(clip, mouth=mouth)
    if clip.wave is None or clip.mouth is None:
        return clip
    refuse_mismatch(len(clip.wave), len(clip.mouth), max_mismatch, utterance)
    return _aligned(clip.wave, clip.mouth)


def refuse_still(mouth: Tensor, name: str) -> None:
    """Raises a ``UserError`` if (T, H, W) frames show nothing, or the same for more than ``STILL_FRAMES``; ``name`` is
    that of their file. Looks no further than the first picture that shows otherwise."""
    if all(float(picture.float().std()) < FLAT for picture in mouth):
        grey = int(mouth[0].float().mean())
        raise UserError(f"{name} shows nothing: all of its pictures are of one grey ({grey} of 255)")
    first = mouth[0].int()
    levels = max(2.0, min(STILL[1], STILL[0] * float(first.float().std())))
    if len(mouth) > STILL_FRAMES and all(
        float(((picture.int() - first).abs() >= levels).float().mean()) < 0.01 for picture in mouth
    ):
        raise UserError(f"{name} stands still: its {len(mouth)} frames show the same picture")


def _sound(utterance: Utterance, place: str) -> Tensor:
    path = utterance.audio or utterance.video
    if path is None:
        raise UserError(f"{place}{utterance.id!r} has no audio")
    if suffix_of(path) not in VIDEO_SUFFIXES + SOUND_SUFFIXES:
        return load_audio(path, where=utterance.where, cut=utterance.cut)
    wave = read_video_sound(path, where=utterance.where, cut=utterance.cut)
    if wave is None:
        raise UserError(f"{place}{path} has no sound track")
    refuse_unusable(wave, f"{place}{path}")
    return wave


def refuse_mismatch(samples: int, frames: int, max_mismatch: float, utterance: Utterance) -> None:
    """Raises a ``UserError`` if sound of so many samples and so many video frames differ by more than ``max_mismatch``
    seconds."""
    sound, video = samples / SAMPLE_RATE, frames / FRAMES_PER_SECOND
    if abs(sound - video) > max_mismatch:
        raise UserError(
            f"{at(utterance.where)}{utterance.id!r}: the sound lasts {sound:.2f} s and the video {video:.2f} s, "
            f"allowed is a difference of data.max_mismatch = {max_mismatch:g} s"
        )


def _aligned(wave: Tensor, mouth: Tensor) -> Clip:
    frames = min(len(mouth), -(-len(wave) // SAMPLES_PER_FRAME))
    samples = frames * SAMPLES_PER_FRAME
    padded = torch.nn.functional.pad(wave[:samples], (0, max(samples - len(wave), 0)))
    return Clip(padded, mouth[:frames])
