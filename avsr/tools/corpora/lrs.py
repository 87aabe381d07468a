"""LRS2 and LRS3 as distributed: ``SET/SPEAKER/00001.mp4`` with ``00001.txt`` next to it.

LRS3 has the sets pretrain, trainval and test. LRS2 has ``mvlrs_v1/main`` and ``mvlrs_v1/pretrain``, and the lists
``train.txt``, ``val.txt``, ``test.txt`` and ``pretrain.txt`` (``SPEAKER/00001`` and perhaps a second column), which
are in that folder or next to it. Utterances of pretrain are cut at word boundaries, those of the other sets are kept
whole.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from avsr.errors import UserError
from avsr.tools.corpora.source import Found, Piece, Refusal, Source, is_safe_id
from avsr.tools.corpora.transcripts import Transcript, cut_words, read_transcript

LRS3_VALIDATION = 1200  # utterances; as many as AV-HuBERT holds out of trainval

_MOST_VALIDATION = 0.05  # share of trainval; for parts of the corpus


def read_lrs3(root: Path, seg: float, validation: int = LRS3_VALIDATION, validation_ids: Path | None = None) -> Found:
    """The videos of LRS3.

    The manifests: ``trainval``, ``pretrain``, ``train`` (both), ``validation`` and ``test``. LRS3 has no validation
    set, so one is held out of trainval: the utterances in the file ``validation_ids`` (one ``trainval/SPEAKER/00001``
    per line), or else those of whole speakers, picked by a hash of their names, until there are ``validation`` (at
    most 5% of trainval). What such speakers say in pretrain is in ``pretrain`` but not in ``train``.

    Args:
        root: the folder with the sets.
        seg: the longest clip of pretrain in seconds.
        validation: utterances to hold out; 0 holds out none.
        validation_ids: a list to hold out instead.

    Raises:
        UserError: none of the sets exists, or the list cannot be read.
    """
    videos = {name: sorted((root / name).glob("*/*.mp4")) for name in ("trainval", "pretrain", "test")}
    if not any(videos.values()):
        raise UserError(f"{root} is not LRS3: expected trainval, pretrain or test with SPEAKER/00001.mp4 in it")
    held_ids: set[str] = set()
    held_speakers: set[str] = set()
    if validation_ids is not None:
        held_ids = {line.removesuffix(".mp4") for line in read_list(validation_ids)}
    else:
        held_speakers = _speakers_to_hold_out([path.parent.name for path in videos["trainval"]], validation)
    for name, paths in videos.items():
        for path in paths:
            speaker = path.parent.name
            source = f"{name}/{speaker}/{path.stem}"
            held = speaker in held_speakers or name == "trainval" and source in held_ids
            manifests = {
                "trainval": ("validation",) if held else ("train", "trainval"),
                "pretrain": ("pretrain",) if held else ("train", "pretrain"),
                "test": ("test",),
            }[name]
            yield from utterance(source, path, manifests, seg if name == "pretrain" else None)


def read_lrs2(root: Path, seg: float) -> Found:
    """The videos of LRS2 that its lists name, in the manifests ``main``, ``pretrain``, ``train`` (both),
    ``validation`` and ``test``.

    Args:
        root: ``mvlrs_v1`` or the folder that it is in.
        seg: the longest clip of pretrain in seconds.

    Raises:
        UserError: there is no ``main`` and no ``pretrain``, or no list.
    """
    data = root / "mvlrs_v1" if (root / "mvlrs_v1").is_dir() else root
    if not any((data / name).is_dir() for name in ("main", "pretrain")):
        raise UserError(f"{root} is not LRS2: expected mvlrs_v1 with main and pretrain in it")
    lists = {
        "train": ("main", ("train", "main")),
        "val": ("main", ("validation",)),
        "test": ("main", ("test",)),
        "pretrain": ("pretrain", ("train", "pretrain")),
    }
    places = {name: [folder / f"{name}.txt" for folder in (data, data.parent)] for name in lists}
    found = {name: next((path for path in paths if path.is_file()), None) for name, paths in places.items()}
    if not any(found.values()):
        raise UserError(f"{root} has none of LRS2's lists train.txt, val.txt, test.txt and pretrain.txt")
    for name, (folder, manifests) in lists.items():
        path = found[name]
        if path is None:
            if (data / folder).is_dir():
                yield Refusal(name, str(data / f"{name}.txt"), "list", f"the list {name}.txt is missing")
            continue
        for number, entry in enumerate(read_list(path), 1):
            if not is_safe_id(entry) or entry.count("/") != 1:
                yield Refusal(entry, str(path), "list", f"{path}: entry {number} must be SPEAKER/NAME, got {entry!r}")
                continue
            limit = seg if name == "pretrain" else None
            yield from utterance(f"{folder}/{entry}", data / folder / f"{entry}.mp4", manifests, limit)


def utterance(source: str, video: Path, manifests: tuple[str, ...], seg: float | None) -> Found:
    """One video with the transcript next to it; cut into clips of at most ``seg`` seconds unless that is None."""
    script = video.with_suffix(".txt")
    try:
        transcript = read_transcript(script)
        if seg is not None and not transcript.words:
            raise UserError(f"the transcript {script} has no table of word times")
    except UserError as error:
        yield Refusal(source, str(script), "text", str(error))
        return
    pieces, refused = pieces_of(source, script, transcript, seg)
    yield from refused
    if pieces:
        yield Source(source, video, video.parent.name, manifests, pieces)


def pieces_of(
    source: str, script: Path, transcript: Transcript, seg: float | None
) -> tuple[tuple[Piece, ...], list[Refusal]]:
    """The clips of an utterance, and refusals of those that cannot be cut short enough.

    An utterance whose last word ends within ``seg`` is one clip from the start of the video.
    """
    words = transcript.words
    if seg is None or not words:
        return (Piece(source, transcript.text),), []
    last = max(word.end for word in words)
    if last <= seg:
        return (Piece(f"{source}_00", transcript.text, 0.0, seg, last),), []
    pieces, refused = [], []
    for index, run in enumerate(cut_words(words, seg)):
        text, end = " ".join(word.text for word in run), max(word.end for word in run)
        name = f"{source}_{index:02d}"
        if end - run[0].start <= seg + 1e-6:
            pieces.append(Piece(name, text, run[0].start, end, end))
        else:
            refused.append(Refusal(name, str(script), "text", f"the word {text!r} lasts longer than {seg} s"))
    return tuple(pieces), refused


def read_list(path: Path) -> list[str]:
    """The first word of every line that is not empty.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        return [line.split()[0] for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the list {path}: {error}") from error


def _speakers_to_hold_out(speakers: Sequence[str], wanted: int) -> set[str]:
    """Whole speakers until ``wanted`` of the utterances are theirs; never all speakers."""
    counts = Counter(speakers)
    order = sorted(counts, key=lambda name: hashlib.sha256(name.encode()).digest())
    wanted = min(wanted, max(1, round(_MOST_VALIDATION * len(speakers))))
    held: set[str] = set()
    total = 0
    for speaker in order[:-1]:
        if total >= wanted:
            break
        held.add(speaker)
        total += counts[speaker]
    return held
