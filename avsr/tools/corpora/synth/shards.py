"""Shards: the utterances of one speaker in one set, and the process that renders them.

A shard is always rendered in a fresh process and in the order of its lines, because a waveform of eSpeak NG depends on
what the process has spoken before. The test sets come first in both the sentences and the shards, so they do not change
when the training set grows.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from avsr.data.rates import SAMPLE_RATE
from avsr.data.video_writer import encode_video
from avsr.errors import UserError
from avsr.runtime.folders import has_content, sha256, write_whole
from avsr.runtime.pool import tick
from avsr.tools.corpora.synth.espeak import Espeak, Span
from avsr.tools.corpora.synth.mouth import draw_mouth
from avsr.tools.corpora.synth.options import SynthOptions
from avsr.tools.corpora.synth.sentences import GRID_SAID_AS, grid_sentences, open_sentences
from avsr.tools.corpora.synth.visemes import frames_of, loosened, viseme_track
from avsr.tools.corpora.synth.voices import TRAINING_VOICES, UNSEEN_VOICES, Voice
from avsr.tools.corpora.wav import encode_wav

SPLITS = ("train", "validation", "test_sentences", "test_voices")

_LOWEST_PEAK, _PEAK_RANGE = 0.5, 0.4  # peaks are from 0.5 to 0.9 of full scale


@dataclass(frozen=True)
class Line:
    """One sentence to speak."""

    id: str
    split: str
    text: str


@dataclass(frozen=True)
class Shard:
    """What one process renders; ``folder`` is the set's, ``OUT/grid`` or ``OUT/open``."""

    set_name: str
    folder: str
    voice: Voice
    seed: int
    lines: tuple[Line, ...]
    video: bool = False


def plan_shards(out: Path, options: SynthOptions) -> list[Shard]:
    """The shards of the whole corpus in a fixed order; the voices of a split take turns at its sentences."""
    shards = []
    training = TRAINING_VOICES[: options.voices]
    unseen = UNSEEN_VOICES[: options.unseen_voices]
    for set_name, train, draw in (
        ("grid", options.grid, grid_sentences),
        ("open", options.open, open_sentences),
    ):
        if train == 0:
            continue
        sizes = {"test_sentences": options.test, "test_voices": options.test}
        sizes |= {"validation": options.validation, "train": train}
        sentences = iter(draw(sum(sizes.values()), options.seed))
        lines: dict[Voice, list[Line]] = {voice: [] for voice in training + unseen}
        for split, size in sizes.items():
            voices = unseen if split == "test_voices" else training
            for index in range(size):
                line = Line(f"{set_name}_{split}_{index:06d}", split, next(sentences))
                lines[voices[index % len(voices)]].append(line)
        for voice, spoken in lines.items():
            if spoken:
                seed = zlib.crc32(f"{options.seed} {set_name} {voice.name}".encode()) & 0x7FFFFFFF
                shards.append(Shard(set_name, str(out / set_name), voice, seed, tuple(spoken), bool(options.video)))
    return shards


def render_shard(shard: Shard) -> list[tuple[str, dict[str, Any]]]:
    """Speaks, draws and writes every line of a shard. Runs in a process of its own, with a ``tick`` for each line.

    Returns:
        The (split, manifest row) of each line.

    Raises:
        UserError: eSpeak NG fails or a file cannot be written.
    """
    folder, speaker = Path(shard.folder), shard.voice.name
    espeak = Espeak(shard.voice.voice, shard.voice.rate, shard.voice.pitch, shard.seed)
    rows = []
    try:
        for kind in ("audio", "times", *(["video"] if shard.video else [])):
            (folder / kind / speaker).mkdir(parents=True, exist_ok=True)
        for line in shard.lines:
            rows.append((line.split, _render_line(shard, line, espeak)))
            tick()
    except OSError as error:
        raise UserError(f"cannot write {error.filename or folder}: {os.strerror(error.errno or 0)}") from error
    return rows


def is_whole(shard: Shard, rendered: Any) -> bool:
    """Whether ``rendered``, what :func:`render_shard` once returned, is of this shard and its files are still there."""
    folder = Path(shard.folder)
    try:
        ids = [row["id"] for _, row in rendered]
        sums = [sha256(folder / row["audio"]) == row["sha256"] for _, row in rendered]
        sums += [has_content(folder / row[kind]) for _, row in rendered for kind in ("times", "video") if row[kind]]
    except (OSError, TypeError, ValueError, KeyError):
        return False
    return ids == [line.id for line in shard.lines] and all(sums)


def _render_line(shard: Shard, line: Line, espeak: Espeak) -> dict[str, Any]:
    speech = espeak.speak(line.text, GRID_SAID_AS if shard.set_name == "grid" else None)
    wav = encode_wav(normalise(speech.waveform))
    duration = round(len(speech.waveform) / SAMPLE_RATE, 7)
    speaker, folder = shard.voice.name, Path(shard.folder)
    audio, times = f"audio/{speaker}/{line.id}.wav", f"times/{speaker}/{line.id}.json"
    write_whole(folder / audio, wav)
    spans = {
        "words": [_timed(span, duration) for span in speech.words],
        "phonemes": [_timed(span, duration) for span in speech.phonemes],
    }
    write_whole(folder / times, (json.dumps(spans, ensure_ascii=False) + "\n").encode())
    video = f"video/{speaker}/{line.id}.mp4" if shard.video else None
    if video and not has_content(folder / video):  # else of a process that was stopped: drawing takes longest
        # the file has the times of the sound; the lips move at loosened ones, so a boundary in a label made from the
        # file may be off by up to 40 ms (2 * LOOSE), one frame
        phonemes = [Span(*row) for row in spans["phonemes"]]
        track = viseme_track(loosened(phonemes, line.id), frames_of(len(speech.waveform)))
        write_whole(folder / video, encode_video(draw_mouth(track, speaker, line.id)))
    return {
        "id": line.id,
        "audio": audio,
        "video": video,
        "duration": duration,
        "text": line.text,
        "speaker": speaker,
        "sha256": hashlib.sha256(wav).hexdigest(),
        "voice": shard.voice.voice,
        "rate": shard.voice.rate,
        "pitch": shard.voice.pitch,
        "times": times,
    }


def _timed(span: Span, duration: float) -> list[Any]:
    return [span.text, min(round(span.start, 4), duration), min(round(span.end, 4), duration)]


def normalise(waveform: np.ndarray) -> np.ndarray:
    """Scales the peak to between 0.5 and 0.9 by a hash of the waveform, so that it varies reproducibly."""
    peak = float(np.abs(waveform).max())
    if peak == 0.0:
        return waveform
    share = zlib.crc32(waveform.astype("<f4").tobytes()) / 0xFFFFFFFF
    return (waveform * ((_LOWEST_PEAK + _PEAK_RANGE * share) / peak)).astype(np.float32)
