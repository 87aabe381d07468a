"""VoxCeleb2: ``{dev,test}/mp4/idXXXXX/VIDEO/00001.mp4``, the list of its English videos, and labels from a file.

VoxCeleb2 has no transcripts. The clips are windows of a fixed length, as auto_avsr cuts them; their texts are the
output of some recognizer, read from a file by ``read_labels``. A video without sound has it in
``{dev,test}/wav/...wav`` or ``{dev,test}/aac/...m4a``.
"""

from __future__ import annotations

import gzip
import json
import zlib
from pathlib import Path, PurePosixPath

from avsr.data.manifest import parse_label
from avsr.errors import UserError
from avsr.tools.corpora.source import Found, Source
from avsr.tools.corpora.transcripts import clean_text

_MOST_BYTES = 2**28  # of a list or of texts, unpacked


def read_vox2(root: Path, seg: float, english: Path | None) -> Found:
    """The videos of VoxCeleb2 in the manifests ``train`` (dev) and ``test``.

    Args:
        root: the folder with ``dev`` and ``test``.
        seg: the length of the windows in seconds.
        english: the list ``vox-en.id`` (plain or ``.gz``), one ``.../idXXXXX/VIDEO/00001`` per line; None takes all.

    Raises:
        UserError: there are no videos, the list cannot be read, or it names none of them.
    """
    wanted = None if english is None else {vox_key(line) for line in _lines(english)}
    seen = taken = 0
    for part, manifest in (("dev", "train"), ("test", "test")):
        for path in sorted((root / part / "mp4").glob("id*/*/*.mp4")):
            seen += 1
            inner = path.relative_to(root / part / "mp4").with_suffix("").as_posix()
            if wanted is not None and inner not in wanted:
                continue
            taken += 1
            sound = (root / part / "wav" / f"{inner}.wav", root / part / "aac" / f"{inner}.m4a")
            yield Source(f"{part}/mp4/{inner}", path, inner.split("/")[0], (manifest,), window=seg, audio=sound)
    if not seen:
        raise UserError(f"{root} is not VoxCeleb2: expected dev/mp4/idXXXXX/VIDEO/00001.mp4 or the same in test")
    if not taken:
        raise UserError(f"the list {english} names none of the {seen} videos in {root}")


def vox_key(name: str) -> str:
    """``idXXXXX/VIDEO/00001``, the last three parts of a path without the suffix."""
    path = PurePosixPath(name.strip())
    parts = path.with_suffix("").parts if path.suffix in (".mp4", ".wav", ".m4a", ".txt") else path.parts
    return "/".join(parts[-3:])


def read_labels(path: Path) -> dict[str, str]:
    """Texts by ``vox_key``.

    The file is a label CSV as auto_avsr's, with the text in the fifth field, or ``.jsonl`` with ``id`` and ``text``, or
    has the id, a tab and the text in every line. An id names a window (``.../00001_00``) or, for a video of one window,
    the video.

    Raises:
        UserError: the file cannot be read or a line is not of its format.
    """
    labels: dict[str, str] = {}
    for number, line in enumerate(_lines(path), 1):
        where = f"{path}:{number}"
        if path.suffix == ".jsonl":
            try:
                row = json.loads(line)
                name, text = row["id"], row["text"]
            except (ValueError, KeyError, TypeError, RecursionError):
                raise UserError(f"{where}: expected a JSON object with 'id' and 'text'") from None
            if not isinstance(name, str) or not isinstance(text, str):
                raise UserError(f"{where}: 'id' and 'text' must be strings")
        elif path.suffix == ".csv":
            label = parse_label(line, where)
            if label.text is None:
                raise UserError(f"{where}: expected 5 fields (dataset, path, frames, token ids, text), got 4")
            name, text = label.path, label.text
        else:
            name, tab, text = line.partition("\t")
            if not tab:
                raise UserError(f"{where}: expected an id, a tab and the text")
        text = clean_text(text)
        if text:
            labels[vox_key(name)] = text
    return labels


def _lines(path: Path) -> list[str]:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            data = file.read(_MOST_BYTES + 1)
        if len(data) > _MOST_BYTES:
            raise UserError(f"{path} holds more than {_MOST_BYTES >> 20} MB of text")
        return [line for line in data.decode("utf-8-sig").split("\n") if line.strip()]
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {error}") from error
