"""``avsr prepare debian-speech``: about 5,000 utterances of human English, 4 hours, out of four Debian packages.

``OUT/clips/ID.wav`` are 16 kHz mono, ``OUT/NAME.jsonl`` the manifests and ``OUT/licences/PACKAGE.txt`` the licences.
``OUT/refused.jsonl`` has a line with the reason for everything that was left out.

| manifest | what |
|---|---|
| train | Flight of the Amazon Queen but the roles and texts of the tests, and Drascula |
| validation | other texts of the roles of train |
| test_texts | other texts of the roles of train |
| test_roles | roles of the Queen that train does not have |
| test_prompts | Asterisk's prompts: another speaker, another domain |

No text of a test or of validation is in train, whoever speaks it.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib
import io
import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchaudio

from avsr.data.audio import SILENCE
from avsr.data.manifest import write_manifest
from avsr.data.rates import SAMPLE_RATE
from avsr.errors import UserError
from avsr.runtime.folders import has_content, write_durably, write_whole
from avsr.runtime.progress import ProgressBar
from avsr.runtime.share import claim_whole
from avsr.tools.corpora.debian.asterisk import read_asterisk
from avsr.tools.corpora.debian.drascula import read_drascula
from avsr.tools.corpora.debian.misread import MISREAD
from avsr.tools.corpora.debian.packages import (
    ASTERISK_SOUNDS,
    ASTERISK_TEXTS,
    DRASCULA,
    PACKAGES,
    QUEEN,
    Package,
    find_packages,
    read_package,
)
from avsr.tools.corpora.debian.queen import CONTAINER, read_queen
from avsr.tools.corpora.debian.spoken import Spoken
from avsr.tools.corpora.debian.text import spoken_words
from avsr.tools.corpora.source import Refusal
from avsr.tools.corpora.state import contents, read_state, refuse_differences, refuse_foreign
from avsr.tools.corpora.wav import encode_wav

logger = logging.getLogger("avsr")

CORPUS = "debian-speech"
STATE, REFUSED = "prepare.json", "refused.jsonl"
SPLITS = ("train", "validation", "test_texts", "test_roles", "test_prompts")
UNSEEN = ("queen_sec", "queen_lou", "queen_henry", "queen_naomi", "queen_frank")  # the roles of test_roles
TESTED, VALIDATED = 0.14, 0.05  # shares of the Queen's other texts
SHORTEST, LONGEST = 0.3, 30.0  # seconds; Whisper's window
GAME_RATE = 11_025  # Hz, of Drascula's sounds


@dataclass(frozen=True)
class Clip:
    """What becomes a line of a manifest: a sound with the words that are said."""

    spoken: Spoken
    words: str

    @property
    def corpus(self) -> str:
        return self.spoken.id.partition("_")[0]

    @property
    def speaker(self) -> str:
        return f"{self.corpus}_{self.spoken.role}"


def prepare_debian(out: str | Path, debs: str = "") -> tuple[dict[str, int], dict[str, int]]:
    """Makes the corpus, or what is missing of it.

    Args:
        out: the folder to make.
        debs: a folder with the packages' files; "": ``apt-get download`` puts them into ``out/packages``.

    Returns:
        Rows of each manifest by name, and refusals by kind.

    Raises:
        UserError: a package is missing, another version, or damaged; ``out`` holds something else, is in use, or cannot
            be written.
    """
    out = Path(out).absolute()
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is not a folder: choose another one")
    try:
        with claim_whole(out):
            _open_folder(out)
            return _prepare(out, find_packages(Path(debs).absolute() if debs else None, out / "packages"))
    except OSError as error:
        raise UserError(f"cannot write {error.filename or out}: {error.strerror or error}") from error


def _open_folder(out: Path) -> None:
    wanted = {"corpus": CORPUS, "packages": {package.file: package.sha256 for package in PACKAGES}}
    names = contents(out)
    held = read_state(out / STATE, "prepare", lambda found: {name: found[name] for name in wanted})
    if held is not None:
        refuse_differences(out, held, wanted)
        return
    refuse_foreign(out, names)
    out.mkdir(parents=True, exist_ok=True)
    write_durably(out / STATE, (json.dumps(wanted, indent=2) + "\n").encode())


def _prepare(out: Path, packages: dict[Package, Path]) -> tuple[dict[str, int], dict[str, int]]:
    refused: list[Refusal] = []
    clips = list(_clips(_spoken(out, packages), refused))
    splits = split(clips)
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in SPLITS}
    (out / "clips").mkdir(exist_ok=True)
    with ProgressBar("prepare", len(clips)) as bar:
        for clip in clips:
            row = _write(out, clip)
            if isinstance(row, Refusal):
                refused.append(row)
            elif clip.spoken.id in splits:
                rows[splits[clip.spoken.id]].append(row)
            else:
                refused.append(Refusal(clip.spoken.id, "", "tested", "its text is in a test"))
            bar.advance(note=f"{len(refused)} refused")
    for name, content in rows.items():
        write_manifest(out / f"{name}.jsonl", sorted(content, key=lambda row: str(row["id"])))
    write_manifest(out / REFUSED, [asdict(refusal) for refusal in refused])
    kinds = dict.fromkeys(refusal.kind for refusal in refused)
    counts = {kind: sum(refusal.kind == kind for refusal in refused) for kind in kinds}
    return {name: len(content) for name, content in rows.items()}, counts


def _spoken(out: Path, packages: dict[Package, Path]) -> Iterator[Spoken]:
    """All clips of all packages; writes the licences."""
    files = {}
    for package, path in packages.items():
        logger.info("read %s", path.name)
        files[package], licence = read_package(package, path)
        (out / "licences").mkdir(exist_ok=True)
        write_whole(out / "licences" / f"{package.name}.txt", licence)
    listed = gzip.decompress(files[ASTERISK_TEXTS]["core-sounds-en.txt.gz"]).decode("utf-8", "replace")
    prompts = {name.removesuffix(".g722"): sound for name, sound in files[ASTERISK_SOUNDS].items()}
    yield from read_queen(files[QUEEN][CONTAINER])
    yield from read_drascula(files[DRASCULA])
    yield from read_asterisk(listed, prompts)


def _clips(found: Iterable[Spoken], refused: list[Refusal]) -> Iterator[Clip]:
    for spoken in found:
        words = spoken_words(spoken.text)
        if words is None:
            refused.append(Refusal(spoken.id, "", "text", f"it is not known how {spoken.text!r} is read"))
        elif not words:
            refused.append(Refusal(spoken.id, "", "no words", f"{spoken.text!r} has no words"))
        elif spoken.id in MISREAD:
            reason = "a recognizer hears something else than the text (avsr.tools.corpora.debian.misread)"
            refused.append(Refusal(spoken.id, "", "misread", reason))
        else:
            yield Clip(spoken, words)


def split(clips: Iterable[Clip]) -> dict[str, str]:
    """The manifest of every clip by its id. All clips of a text are on one side, and so are all of an unseen role; what
    Drascula says of a tested text is in none, since its actors paraphrase."""
    clips = list(clips)
    apart = {clip.words for clip in clips if clip.speaker in UNSEEN or clip.corpus == "asterisk"}
    places = {}
    for clip in clips:
        place = "test_texts" if clip.words in apart else _place(clip.words)
        if clip.corpus == "asterisk":
            place = "test_prompts"
        elif clip.speaker in UNSEEN:
            place = "test_roles"
        if clip.corpus != "drascula" or place == "train":
            places[clip.spoken.id] = place
    return places


def _place(words: str) -> str:
    """By a hash of the text, so that the place does not depend on which other clips there are."""
    drawn = int.from_bytes(hashlib.sha256(words.encode()).digest()[:8], "big") / 2**64
    if drawn < TESTED:
        return "test_texts"
    return "validation" if drawn < TESTED + VALIDATED else "train"


def _write(out: Path, clip: Clip) -> dict[str, Any] | Refusal:
    """The clip's line; its sound is written unless it is there."""
    spoken, path = clip.spoken, Path("clips", f"{clip.spoken.id}.wav")
    try:
        wave = _decode(spoken)
    except (OSError, ValueError) as error:  # PyAV's errors are both
        return Refusal(spoken.id, "", "damaged", f"its sound cannot be decoded: {error}")
    seconds = len(wave) / SAMPLE_RATE
    if not SHORTEST <= seconds <= LONGEST:
        return Refusal(spoken.id, "", "length", f"{seconds:.2f} s, expected {SHORTEST} to {LONGEST:g}")
    if float(np.abs(wave).max()) < SILENCE:
        return Refusal(spoken.id, "", "silent", f"its sound is silent (peak below {SILENCE})")
    data = encode_wav(wave)
    if not has_content(out / path):
        write_whole(out / path, data)
    return {
        "id": spoken.id,
        "audio": str(path),
        "duration": round(seconds, 4),
        "text": clip.words,
        "speaker": clip.speaker,
        "sha256": hashlib.sha256(data).hexdigest(),
    }


def _decode(spoken: Spoken) -> np.ndarray:
    """(samples,) float32 in -1..1 at 16 kHz."""
    if spoken.kind == "u8":
        wave, rate = np.frombuffer(spoken.sound, np.uint8).astype(np.float32) / 128 - 1, GAME_RATE
    else:
        av = importlib.import_module("av")  # of an extra
        with av.open(io.BytesIO(spoken.sound), format=spoken.kind) as container:
            frames = [frame.to_ndarray().astype(np.float32) for frame in container.decode(audio=0)]
            stream = container.streams.audio[0]
            rate, whole = stream.rate, stream.codec_context.format.name.startswith("s")
        wave = np.concatenate([frame[0] for frame in frames]) / (32768 if whole else 1)
    if rate != SAMPLE_RATE:
        wave = torchaudio.functional.resample(torch.from_numpy(wave), rate, SAMPLE_RATE).numpy()
    return wave
