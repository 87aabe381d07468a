"""Speech encoders as targets of the analysis: which one, and the clips it reads."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import isinf

import torch

from avsr.config import DataConfig, EncoderConfig
from avsr.data.clip import load_clip
from avsr.data.foreign import resolve
from avsr.data.manifest import Utterance, read_manifest
from avsr.data.measured import refuse_other_content, refuse_other_length
from avsr.errors import UserError, at
from avsr.models.encoder import SpeechEncoder
from avsr.models.encoders import build_encoder
from avsr.runtime.progress import ProgressBar
from avsr.tools.analysis.frames import FrameStatistics, measure_clip
from avsr.tools.analysis.inputs import parse_limit

WHISPER, AVHUBERT = "whisper", "avhubert"
KINDS = (WHISPER, "wavlm", AVHUBERT)
STREAMS = ("audio", "video", "fused")
SHORTEST = 1.0  # seconds: of a shorter clip half a second is most
_KEYS = ("limit", "stream")
_log = logging.getLogger("avsr")


@dataclass
class EncoderOptions:
    """``key=value`` options of an encoder."""

    limit: int | None = None  # number of clips
    stream: str = "audio"  # that AV-HuBERT reads


def parse_encoder_options(overrides: Sequence[str]) -> EncoderOptions:
    """Options from ``key=value`` strings.

    Raises:
        UserError: an unknown key (with the nearest one) or value.
    """
    options = EncoderOptions()
    for text in overrides:
        key, _, value = text.partition("=")
        if key == "limit":
            options.limit = parse_limit(value)
        elif key != "stream":
            near = difflib.get_close_matches(key, _KEYS, n=1, cutoff=0.0)[0]
            raise UserError(f"unknown option {key!r}: did you mean {near!r}? An encoder takes {', '.join(_KEYS)}")
        elif value in STREAMS:
            options.stream = value
        else:
            raise UserError(f"stream: expected one of {', '.join(STREAMS)}, got {value!r}")
    return options


def split_target(target: str) -> tuple[str, str]:
    """Kind and name of a target such as ``whisper:openai/whisper-tiny``.

    Raises:
        UserError: it names no encoder.
    """
    kind, _, name = target.partition(":")
    if kind not in KINDS or not name:
        forms = ", ".join(f"{kind}:NAME" for kind in KINDS)
        raise UserError(f"{target}: no speech encoder; with --encoder a target is one of {forms}")
    return kind, name


def open_encoder(target: str, options: EncoderOptions, device: torch.device, *, padded: bool = False) -> SpeechEncoder:
    """The encoder of a target; ``padded`` is for Whisper, which then reads 30 s.

    Raises:
        UserError: it is none, is missing, or reads no such stream.
    """
    kind, name = split_target(target)
    if kind != AVHUBERT and options.stream != "audio":
        raise UserError(f"stream={options.stream}: {target} reads sound alone")
    return build_encoder(EncoderConfig(kind=kind, name=name, pad_to_30s=padded), options.stream, device)


def choose_clips(manifest: str, encoder: SpeechEncoder, limit: int | None) -> list[Utterance]:
    """The clips of a manifest or dataset that last at least ``SHORTEST`` and at most what the encoder takes; of these
    ``limit`` at even distances. Says how many are left out for their length.

    Raises:
        UserError: it cannot be read, has no such clip, or a line is bad.
    """
    path, absolute = resolve(manifest, DataConfig())
    utterances = read_manifest(path, absolute=absolute, texts=False)
    inside = [u for u in utterances if SHORTEST <= u.duration <= encoder.max_seconds]
    bounds = f"{SHORTEST:g} s or more" if isinf(encoder.max_seconds) else f"{SHORTEST:g} to {encoder.max_seconds:g} s"
    if not inside:
        raise UserError(f"--manifest {manifest}: none of its {len(utterances)} clips lasts {bounds}")
    if left := len(utterances) - len(inside):
        _log.info("%s: %d of %d clips are left out, which do not last %s", manifest, left, len(utterances), bounds)
    count = min(limit or len(inside), len(inside))
    return [inside[n * len(inside) // count] for n in range(count)]


def measure_clips(encoder: SpeechEncoder, utterances: Sequence[Utterance]) -> Iterator[tuple[str, FrameStatistics]]:
    """Name and statistics of every clip, one after the other.

    Raises:
        UserError: one cannot be read, or not by this encoder; the message names its line.
    """
    mismatch = DataConfig().max_mismatch
    with ProgressBar("analyze", len(utterances)) as bar:
        for utterance in utterances:
            clip = load_clip(utterance, encoder.needs, mismatch)
            refuse_other_length(utterance, clip.seconds, mismatch)
            refuse_other_content(utterance, encoder.needs)
            try:
                yield utterance.id, measure_clip(encoder, clip)
            except UserError as error:
                raise UserError(f"{at(utterance.where)}{error}") from error
            bar.advance(1)
