"""LRS2 and LRS3 as they were handed out: ``SET/SPEAKER/00001.mp4`` with ``00001.txt`` beside it.

LRS3 has the sets pretrain, trainval and test. LRS2 has ``mvlrs_v1/main`` and ``mvlrs_v1/pretrain``, and the lists
``train.txt``, ``val.txt``, ``test.txt`` and ``pretrain.txt`` (``SPEAKER/00001`` and perhaps a second column), which
lie in that folder or beside it. Utterances of pretrain are cut at word boundaries, those of the other sets are kept
whole.
"""

from __future__ import annotations

import hashlib
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
    a line), or else those of whole speakers, picked by a hash of their names, until there are ``validation`` (at
    most 5% of trainval). What such speakers say in pretrain is in ``pretrain`` but not in ``train``.

    Args:
        root: the folder with the sets.
        seg: the longest clip of pretrain in seconds.
        validation: utterances to hold out; 0 holds out none.
        validation_ids: a list to hold out instead.

    Raises:
        UserError: none of the sets is there, or the list cannot be read.
    """
    videos = {name: sorted((root / name).glob("*/*.mp4")) for name in ("trainval", "pretrain", "test")}
    if not any(videos.values()):
        raise UserError(f"{root} is no LRS3: expected trainval, pretrain or test with SPEAKER/00001.mp4 in it")
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
            if name == "test":
                manifests: tuple[str, ...] = ("test",)
            elif name == "trainval":
                held = source in held_ids or speaker in held_speakers
                manifests = ("validation",) if held else ("train", "trainval")
            else:
                manifests = ("pretrain",) if speaker in held_speakers else ("train", "pretrain")
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
        raise UserError(f"{root} is no LRS2: expected mvlrs_v1 with main and pretrain in it")
    lists = {
        "train": ("main", ("train", "main")),
        "val": ("main", ("validation",)),
        "test": ("main", ("test",)),
        "pretrain": ("pretrain", ("train", "pretrain")),
    }
    found = {
        name: next(
            (folder / f"{name}.txt" for folder in (data, data.parent) if (folder / f"{name}.txt").is_file()), None
        )
        for name in lists
    }
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
    """One video with its transcript beside it; cut into clips of at most ``seg`` seconds unless that is None."""
    try:
        transcript = read_transcript(video.with_suffix(".txt"))
        if seg is not None and not transcript.words:
            raise UserError(f"the transcript {video.with_suffix('.txt')} has no table of word times")
    except UserError as error:
        yield Refusal(source, str(video.with_suffix(".txt")), "text", str(error))
        return
    pieces, refused = pieces_of(source, transcript, seg)
    for piece in refused:
        reason = f"the word {piece.text!r} lasts longer than {seg} s"
        yield Refusal(piece.id, str(video.with_suffix(".txt")), "text", reason)
    if pieces:
        yield Source(source, video, video.parent.name, manifests, pieces)


def pieces_of(source: str, transcript: Transcript, seg: float | None) -> tuple[tuple[Piece, ...], tuple[Piece, ...]]:
    """The clips of an utterance, and those that cannot be cut short enough.

    An utterance whose last word ends within ``seg`` is one clip from the start of the video.
    """
    words = transcript.words
    if seg is None or not words:
        return (Piece(source, transcript.text),), ()
    last = max(word.end for word in words)
    if last <= seg:
        return (Piece(f"{source}_00", transcript.text, 0.0, seg, last),), ()
    pieces = []
    for index, run in enumerate(cut_words(words, seg)):
        text, end = " ".join(word.text for word in run), max(word.end for word in run)
        pieces.append(Piece(f"{source}_{index:02d}", text, run[0].start, end, end))
    fits = [piece for piece in pieces if piece.last_word - piece.start <= seg + 1e-6]
    return tuple(fits), tuple(piece for piece in pieces if piece not in fits)


def read_list(path: Path) -> list[str]:
    """The first word of every line that is not empty.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        return [line.split()[0] for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the list {path}: {error}") from error


def _speakers_to_hold_out(speakers: Sequence[str], wanted: int) -> set[str]:
    """Whole speakers until ``wanted`` of the utterances are theirs; never all speakers."""
    counts: dict[str, int] = {}
    for speaker in speakers:
        counts[speaker] = counts.get(speaker, 0) + 1
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
