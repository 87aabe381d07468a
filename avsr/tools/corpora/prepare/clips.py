"""Makes the clips of one video file. Runs in its own process and never raises because of the file's content."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from avsr.data.audio import SILENCE, refuse_impossible
from avsr.data.clip import refuse_still
from avsr.data.mouth.crop import CROP, MIN_FRAMES
from avsr.data.mouth.cut import Refused, check_landmarks, cut_mouths
from avsr.data.mouth.faces import track_landmarks
from avsr.data.mouth.landmarks import find_landmarks, read_landmarks
from avsr.data.rates import FRAMES_PER_SECOND, SAMPLE_RATE, SAMPLES_PER_FRAME
from avsr.data.video import encode_video, read_video_sound, video_frames
from avsr.errors import UserError
from avsr.runtime.folders import write_whole
from avsr.tools.corpora.prepare.options import DETECT
from avsr.tools.corpora.source import Piece, Refusal, Source
from avsr.tools.corpora.wav import encode_wav

CLIPS = "clips"  # the folder of the clips

_LATE_WORD = 0.5  # seconds by which the last word may end after the video


@dataclass(frozen=True)
class Made:
    """A finished clip; ``start`` and ``end`` are frames of its video file."""

    id: str
    start: int
    end: int
    sha256: str

    @property
    def video(self) -> str:
        return f"{CLIPS}/{self.id}.mp4"

    @property
    def audio(self) -> str:
        return f"{CLIPS}/{self.id}.wav"


@dataclass(frozen=True)
class Job:
    """One video file to prepare; the clips in ``keep`` exist already."""

    source: Source
    out: str
    landmarks: str
    skew: float
    coverage: float
    keep: tuple[Made, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What became of a video file."""

    made: tuple[Made, ...]
    refused: tuple[Refusal, ...]


def make_clips(job: Job) -> Outcome:
    """Cuts, crops and writes the clips of a video file.

    Raises:
        UserError: the detector is missing or a file cannot be written; whatever is wrong with the video is a
            ``Refusal`` in the outcome, for every clip of it.
    """
    torch.set_num_threads(1)
    source = job.source
    try:
        sound = _sound(source)
        frames, valid, outside = mouths(job)
        _check_streams(sound, len(frames), job.skew)
    except Refused as refused:
        ids = [piece.id for piece in source.pieces] or [source.id]
        return Outcome((), tuple(_refusal(source, name, refused) for name in ids))
    made, left_out = [], []
    for piece in source.pieces or _windows(source, len(frames)):
        try:
            start, end = _span(piece, len(frames))
            if not source.cropped:
                check_landmarks(valid[start:end], outside[start:end], job.coverage)
            kept = next((clip for clip in job.keep if (clip.id, clip.start, clip.end) == (piece.id, start, end)), None)
            made.append(kept or _write(job, piece.id, sound, frames, start, end))
        except Refused as refused:
            left_out.append(_refusal(source, piece.id, refused))
    return Outcome(tuple(made), tuple(left_out))


def _refusal(source: Source, name: str, refused: Refused) -> Refusal:
    return Refusal(name, str(source.video), refused.kind, str(refused))


def _sound(source: Source) -> Tensor:
    """(samples,) float32 at 16 kHz, in step with the video."""
    with _refused_as("video"):
        sound = read_video_sound(source.video)
    if sound is None:
        file = next((path for path in source.audio if os.path.isfile(path)), None)
        if file is None:
            raise Refused("no audio", f"{source.video} has no sound, and there is no sound file for it")
        with _refused_as("audio"):
            sound = read_video_sound(file)
    if sound is None or not len(sound):
        raise Refused("no audio", f"the sound of {source.video} holds no samples")
    with _refused_as("audio"):
        refuse_impossible(sound, f"the sound of {source.video}")
    return sound


@contextmanager
def _refused_as(kind: str) -> Iterator[None]:
    """What cannot be read is refused, not an end of the run."""
    try:
        yield
    except UserError as error:
        raise Refused(kind, str(error)) from error


def mouths(job: Job) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(T, 96, 96) uint8 mouths, (T,) bool where there were landmarks, (T,) shares outside the picture."""
    source = job.source
    if source.cropped:
        frames = _ready_mouths(source)
        return frames, np.ones(len(frames), bool), np.zeros(len(frames))
    return cut_mouths(source.video, _landmarks(job))


def _ready_mouths(source: Source) -> np.ndarray:
    frames = []
    with _refused_as("video"):
        for frame in video_frames(source.video):
            if frame.shape != (CROP, CROP):
                reason = f"{source.video} has pictures of {frame.shape[1]}x{frame.shape[0]} pixels"
                advice = "set cropped=false if they show whole faces"
                raise Refused("size", f"{reason}, expected mouths of {CROP}x{CROP}: {advice}")
            frames.append(frame)
    return np.stack(frames)


def _landmarks(job: Job) -> np.ndarray:
    source = job.source
    if job.landmarks == DETECT:
        with _refused_as("video"):
            return track_landmarks(video_frames(source.video))
    path = find_landmarks(Path(job.landmarks), source.id)
    if path is None:
        reason = f"there is no landmark file {Path(job.landmarks, source.id)}.npz, .npy or .pkl"
        raise Refused("no landmarks", reason)
    with _refused_as("landmarks"):
        return read_landmarks(path)


def _check_streams(sound: Tensor, frames: int, skew: float) -> None:
    heard, seen = len(sound) / SAMPLE_RATE, frames / FRAMES_PER_SECOND
    if abs(heard - seen) > skew + 1e-6:
        raise Refused("streams", f"{heard:.2f} s of sound but {seen:.2f} s of video, more than {skew:g} s apart")


def _windows(source: Source, frames: int) -> list[Piece]:
    if source.window is None:
        return []
    step = max(1, int(source.window * FRAMES_PER_SECOND))
    starts = range(0, frames, step)
    return [
        Piece(f"{source.id}_{i:02d}", None, s / FRAMES_PER_SECOND, (s + step) / FRAMES_PER_SECOND)
        for i, s in enumerate(starts)
    ]


def _span(piece: Piece, frames: int) -> tuple[int, int]:
    """The first frame of a clip and the one after its last."""
    seconds = frames / FRAMES_PER_SECOND
    if piece.last_word > seconds + _LATE_WORD:
        raise Refused("text", f"the transcript ends at {piece.last_word:.2f} s, the video at {seconds:.2f} s")
    # the tolerance is for the rounding of the times, which have two decimal places
    start = max(0, math.floor(piece.start * FRAMES_PER_SECOND + 1e-6))
    end = frames if piece.end is None else min(frames, math.ceil(piece.end * FRAMES_PER_SECOND - 1e-6))
    if end - start < MIN_FRAMES:
        raise Refused("short", f"{max(0, end - start)} frames, at least {MIN_FRAMES} are needed")
    length = (end - start) / FRAMES_PER_SECOND
    if piece.limit is not None and length > piece.limit + 1e-6:
        raise Refused("long", f"{length:.2f} s, more than seg={piece.limit:g}, and no word times to cut at")
    return start, end


def _write(job: Job, name: str, sound: Tensor, frames: np.ndarray, start: int, end: int) -> Made:
    """Writes the sound, then the video: a clip with a video is complete."""
    wave = np.zeros((end - start) * SAMPLES_PER_FRAME, np.float32)
    part = sound[start * SAMPLES_PER_FRAME : end * SAMPLES_PER_FRAME].numpy()
    wave[: len(part)] = part
    if float(np.abs(wave).max()) < SILENCE:
        raise Refused("silent", f"the sound of {job.source.video} is silent (peak below {SILENCE})")
    with _refused_as("still"):
        refuse_still(torch.from_numpy(frames[start:end]), f"the mouth in {job.source.video}")
    wav = encode_wav(wave)
    made = Made(name, start, end, hashlib.sha256(wav).hexdigest())
    target = Path(job.out, made.video)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_whole(Path(job.out, made.audio), wav)
        if job.source.cropped and end - start == len(frames):
            _link(target, job.source.video)
        else:
            write_whole(target, encode_video(frames[start:end]))
    except OSError as error:
        raise UserError(f"cannot write {error.filename or target}: {error.strerror or error}") from error
    return made


def _link(path: Path, target: Path) -> None:
    """A link, since the video needs no change and a corpus of mouths has tens of gigabytes."""
    part = path.with_name(path.name + ".part")
    part.unlink(missing_ok=True)
    part.symlink_to(target.resolve())
    os.replace(part, path)
