"""MuAViC as its own scripts leave it, which is also AV-HuBERT's format.

``LANGUAGE/{train,valid,test}.tsv``: the first line is a root folder, then come ``id  video  audio  frames  samples``
separated by tabs, with -1 for what is missing. Line n of ``{train,valid,test}.LANGUAGE`` (or ``.wrd``) is the text of
row n. Paths may be absolute or relative to the root; if the root does not exist, to the folder of the tsv.
"""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

from avsr.errors import UserError
from avsr.tools.corpora.source import Found, Piece, Refusal, Source, is_safe_id
from avsr.tools.corpora.transcripts import clean_text

_MANIFESTS = {"train": "train", "valid": "validation", "test": "test"}


def read_muavic(root: Path, language: str = "en", cropped: bool = True) -> Found:
    """The videos of one language in the manifests ``train``, ``validation`` and ``test``.

    Args:
        root: the folder with the languages, or the one of the language.
        language: its code.
        cropped: the videos show only the mouth, as MuAViC's scripts make them.

    Raises:
        UserError: there is no tsv, one is not of this format, or it has not as many texts as rows.
    """
    folder = root / language if (root / language).is_dir() else root
    present = [name for name in _MANIFESTS if (folder / f"{name}.tsv").is_file()]
    if not present:
        raise UserError(f"{root} has no {language}/train.tsv, valid.tsv or test.tsv")
    for name in present:
        yield from _read_tsv(folder, name, language, cropped)


def _read_tsv(folder: Path, name: str, language: str, cropped: bool) -> Found:
    tsv = folder / f"{name}.tsv"
    rows = _read(tsv)
    if not rows:
        raise UserError(f"{tsv} is empty: expected a root folder in the first line")
    base = Path(rows[0].strip())
    texts_path = next((p for p in (folder / f"{name}.{language}", folder / f"{name}.wrd") if p.is_file()), None)
    if texts_path is None:
        raise UserError(f"{tsv} has no texts: there is neither {name}.{language} nor {name}.wrd next to it")
    texts = _read(texts_path)
    if len(texts) != len(rows) - 1:
        raise UserError(f"{texts_path} has {len(texts)} lines, but {tsv} has {len(rows) - 1} rows")
    for number, (row, text) in enumerate(zip(rows[1:], texts, strict=True), 2):
        fields = row.split("\t")
        if len(fields) != 5:
            raise UserError(f"{tsv}:{number}: expected 5 fields separated by tabs, got {len(fields)}")
        clip = fields[0].strip()
        source = f"{name}/{clip}"
        if not is_safe_id(clip):
            yield Refusal(clip, str(tsv), "list", f"{tsv}:{number}: the id {clip!r} cannot be a path below a folder")
            continue
        cleaned = clean_text(text)
        if not cleaned:
            yield Refusal(source, str(texts_path), "text", f"{texts_path}:{number - 1}: the text is empty")
            continue
        video, audio = (_locate(base, folder, field.strip()) for field in fields[1:3])
        speaker = PurePosixPath(clip).parent.name or clip
        pieces = (Piece(source, cleaned),)
        yield Source(source, video, speaker, (_MANIFESTS[name],), pieces, audio=(audio,), cropped=cropped)


def _locate(base: Path, folder: Path, name: str) -> Path:
    path = base / name  # an absolute name wins over the base
    return path if os.path.exists(path) or Path(name).is_absolute() else folder / name


def _read(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    return lines[:-1] if lines[-1] == "" else lines
