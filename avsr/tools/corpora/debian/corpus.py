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

``OUT/prepare.json`` says what the corpus is made of, from the start; when the manifests are there, it has their counts
too, and the same command only checks the files against their checksums. Until then ``OUT/progress.jsonl`` has the clips
that are made, from which a later run goes on.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import logging
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from avsr.data.manifest import write_manifest
from avsr.data.rates import SAMPLE_RATE
from avsr.errors import UserError
from avsr.runtime.folders import has_content, sha256, write_durably, write_whole
from avsr.runtime.progress import ProgressBar
from avsr.runtime.rows import Row, Rows, read_rows
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
    check_packages,
    download_packages,
    read_package,
    require_apt,
)
from avsr.tools.corpora.debian.queen import CONTAINER, read_queen
from avsr.tools.corpora.debian.sound import Unusable, decode
from avsr.tools.corpora.debian.split import SPLITS, Clip, split
from avsr.tools.corpora.debian.spoken import Spoken
from avsr.tools.corpora.debian.text import spoken_words
from avsr.tools.corpora.source import Refusal
from avsr.tools.corpora.state import contents, read_state, refuse_differences, refuse_foreign
from avsr.tools.corpora.wav import encode_wav

logger = logging.getLogger("avsr")

FORMAT = "avsr-debian-1"  # change it with anything that changes the sounds, the texts or the manifests
STATE, PROGRESS, REFUSED = "prepare.json", "progress.jsonl", "refused.jsonl"
CLIPS, LICENCES, DOWNLOADS = "clips", "licences", "packages"  # folders
_LISTED, _LIST_BYTES = "core-sounds-en.txt.gz", 2**20  # the texts of the prompts: 39,000 bytes
_ID, _TEXT_LENGTH = re.compile("[a-z0-9_-]{1,100}"), 1000  # of a clip

Counts = tuple[dict[str, int], dict[str, int]]  # rows of each manifest by name, refusals by kind


def prepare_debian(out: str | Path, debs: str = "") -> Counts:
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
    try:
        found = _finished(out)
        if found is None:
            folder = Path(debs).absolute() if debs else out / DOWNLOADS
            if debs:
                check_packages(folder)
            else:
                require_apt(folder)
            with claim_whole(out):
                found = _finished(out, log=True)  # by a process that this one was too late to meet
                return _make(out, folder, download=not debs) if found is None else found
    except OSError as error:
        raise UserError(f"cannot write {error.filename or out}: {error.strerror or error}") from error
    logger.info("%s already holds this corpus (%d utterances), nothing to do", out, sum(found[0].values()))
    return found


def _described() -> dict[str, Any]:
    """What the corpus depends on."""
    misread = hashlib.sha256(" ".join(sorted(MISREAD)).encode()).hexdigest()[:16]
    packages = {package.file: package.sha256 for package in PACKAGES}
    return {"format": FORMAT, "corpus": "debian-speech", "packages": packages, "misread": misread}


def _finished(out: Path, *, log: bool = False) -> Counts | None:
    """What the corpus in ``out`` has; None if there is to be one, or if it is unfinished or damaged, which is logged.

    Raises:
        UserError: the folder holds something else.
    """
    wanted = _described()

    def parse(state: Any) -> tuple[dict[str, Any], Counts | None]:
        counts = None
        if "manifests" in state:
            manifests = {name: int(state["manifests"][name]) for name in SPLITS}
            counts = manifests, {str(kind): int(count) for kind, count in state["refused"].items()}
        return {name: state.get(name) for name in wanted}, counts

    names = contents(out)
    state = read_state(out / STATE, "prepare", parse)
    if state is None:
        refuse_foreign(out, names)
        return None
    held, counts = state
    refuse_differences(out, held, wanted)
    if counts is None:
        return None
    damaged = next((name for name, count in counts[0].items() if not _is_whole(out, name, count)), "")
    files = [f"{LICENCES}/{package.name}.txt" for package in PACKAGES]
    damaged = damaged or next((name for name in (REFUSED, *files) if not (out / name).is_file()), "")
    if damaged and log:
        logger.warning("%s of %s is damaged or lacks clips: makes what is missing", damaged, out)
    return None if damaged else counts


def _is_whole(out: Path, name: str, count: int) -> bool:
    """Whether a manifest has all its lines, and these their files."""
    try:
        rows = read_rows(out / f"{name}.jsonl", lambda row: hash(row["id"]))
        return len(rows) == count and all(sha256(out / row["audio"]) == row["sha256"] for row in rows)
    except (OSError, TypeError, ValueError, KeyError):
        return False


def _make(out: Path, folder: Path, *, download: bool) -> Counts:
    """Makes what is missing, and the manifests."""
    if not (out / STATE).exists():
        write_durably(out / STATE, _state())
    if download:
        download_packages(folder)
    refused: list[Refusal] = []
    clips = list(_clips(_spoken(out, folder), refused))
    places = split(clips)
    for clip in clips:
        if clip.spoken.id not in places:
            refused.append(Refusal(clip.spoken.id, "", "tested", "its text is in a test or in validation"))
    rows: dict[str, list[Row]] = {name: [] for name in SPLITS}
    for clip, row in _rows(out, [clip for clip in clips if clip.spoken.id in places]):
        if isinstance(row, Refusal):
            refused.append(row)
        else:
            rows[places[clip.spoken.id]].append(row)
    for name, content in rows.items():
        write_manifest(out / f"{name}.jsonl", sorted(content, key=lambda row: str(row["id"])))
    write_manifest(out / REFUSED, [asdict(refusal) for refusal in refused])
    kinds = Counter(refusal.kind for refusal in refused)
    counts = {name: len(content) for name, content in rows.items()}, dict(kinds.most_common())
    write_durably(out / STATE, _state(counts))
    (out / PROGRESS).unlink(missing_ok=True)
    return counts


def _state(counts: Counts | None = None) -> bytes:
    done = {} if counts is None else {"manifests": counts[0], "refused": counts[1]}
    return (json.dumps({**_described(), **done}, indent=2) + "\n").encode()


def _spoken(out: Path, folder: Path) -> Iterator[Spoken]:
    """All clips of all packages; writes the licences."""
    files = {}
    (out / LICENCES).mkdir(exist_ok=True)
    for package in PACKAGES:
        logger.info("read %s", package.file)
        files[package], licence = read_package(package, folder / package.file)
        write_whole(out / LICENCES / f"{package.name}.txt", licence)
    if CONTAINER not in files[QUEEN] or _LISTED not in files[ASTERISK_TEXTS]:
        raise UserError(f"{folder}: the packages have no {CONTAINER} or no {_LISTED}: other versions?")
    prompts = {name.removesuffix(".g722"): sound for name, sound in files[ASTERISK_SOUNDS].items()}
    yield from read_queen(files[QUEEN][CONTAINER])
    yield from read_drascula(files[DRASCULA])
    yield from read_asterisk(_list(files[ASTERISK_TEXTS][_LISTED]), prompts)


def _list(packed: bytes) -> str:
    try:
        with gzip.open(io.BytesIO(packed)) as file:
            data = file.read(_LIST_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{_LISTED} is damaged: {error}") from error
    if len(data) > _LIST_BYTES:
        raise UserError(f"{_LISTED} is damaged: it has more than {_LIST_BYTES} bytes")
    return data.decode("utf-8", "replace")


def _clips(found: Iterable[Spoken], refused: list[Refusal]) -> Iterator[Clip]:
    seen: set[str] = set()
    for spoken in found:
        words = spoken_words(spoken.text) if len(spoken.text) <= _TEXT_LENGTH else None
        if not _ID.fullmatch(spoken.id) or spoken.id in seen:
            refused.append(Refusal(spoken.id, "", "name", "its name is no name of a file, or that of another one"))
        elif words is None:
            refused.append(Refusal(spoken.id, "", "text", f"it is not known how {spoken.text!r} is read"))
        elif not words:
            refused.append(Refusal(spoken.id, "", "no words", f"{spoken.text!r} has no words"))
        elif spoken.id in MISREAD:
            reason = "a recognizer hears something else than the text (avsr.tools.corpora.debian.misread)"
            refused.append(Refusal(spoken.id, "", "misread", reason))
        else:
            yield Clip(spoken, words)
        seen.add(spoken.id)


def _rows(out: Path, clips: list[Clip]) -> Iterator[tuple[Clip, Row | Refusal]]:
    """The line of every clip in its manifest; makes those that are missing."""
    done = Rows(out / PROGRESS, _key)
    (out / CLIPS).mkdir(exist_ok=True)
    kept = {name for name, row in done.held.items() if _sum(out / CLIPS / f"{name}.wav") == row["sha256"]}
    if kept:
        logger.info("%d of %d clips are done", len(kept), len(clips))
    refused = 0
    with ProgressBar("prepare", len(clips), done=len(kept)) as bar:
        for clip in clips:
            name = clip.spoken.id
            if name not in kept:
                try:
                    done.add(_write(out, clip))
                except Unusable as unusable:
                    refused += 1
                    yield clip, Refusal(name, "", unusable.kind, str(unusable))
                bar.advance(note=f"{refused} refused")
            if name in done.held:
                made = done.held[name]
                yield (
                    clip,
                    {
                        "id": name,
                        "audio": f"{CLIPS}/{name}.wav",
                        "duration": made["duration"],
                        "text": clip.words,
                        "speaker": clip.speaker,
                        "sha256": made["sha256"],
                    },
                )


def _key(row: Row) -> str:
    if not (_ID.fullmatch(row["id"]) and type(row["sha256"]) is str and type(row["duration"]) is float):
        raise ValueError
    return str(row["id"])


def _write(out: Path, clip: Clip) -> Row:
    """Writes the sound of a clip, unless it is there already."""
    wave = decode(clip.spoken)
    data, path = encode_wav(wave), out / CLIPS / f"{clip.spoken.id}.wav"
    digest = hashlib.sha256(data).hexdigest()
    if _sum(path) != digest:
        write_whole(path, data)
    return {"id": clip.spoken.id, "duration": round(len(wave) / SAMPLE_RATE, 4), "sha256": digest}


def _sum(path: Path) -> str:
    """The SHA-256 of a file; "" if there is none."""
    return sha256(path) if has_content(path) else ""
