"""The options of ``avsr prepare`` and their checks."""

from __future__ import annotations

from dataclasses import dataclass, fields

from avsr.data.mouth.cut import COVERAGE
from avsr.errors import UserError
from avsr.tools.corpora.lrs import LRS3_VALIDATION
from avsr.tools.corpora.options import check_ranges, read_options

VIDEOS = ("lrs2", "lrs3", "vox2", "muavic", "videos")  # of these mouths are cut
DEBIAN = "debian-speech"
CORPORA = (*VIDEOS, DEBIAN)

DETECT = "detect"  # landmarks are found by the detector


@dataclass
class PrepareOptions:
    """How to prepare a corpus.

    Attributes:
        landmarks: a folder with landmark files named like the videos, or ``detect``.
        seg: seconds of the longest clip where long videos are cut.
        skew: seconds by which sound and video of a file may differ in length.
        coverage: the least share of a clip's frames that must have landmarks.
        validation: lrs3: utterances to hold out of trainval.
        validation_ids: lrs3: a file with the ids to hold out instead.
        english: vox2: the list of English videos, or ``all``.
        labels: vox2: a file with the texts of the clips.
        language: muavic: the code of the language.
        cropped: muavic: the videos already show only the mouth.
        debs: debian-speech: a folder with the packages; empty: apt-get downloads them.
        workers: processes; 0 means one per CPU. 1 is the main process, which a video that crashes its decoder ends.
    """

    landmarks: str = DETECT
    seg: float = 16.0
    skew: float = 0.2
    coverage: float = COVERAGE
    validation: int = LRS3_VALIDATION
    validation_ids: str = ""
    english: str = ""
    labels: str = ""
    language: str = "en"
    cropped: bool = True
    debs: str = ""
    workers: int = 0


_ONLY = {
    "validation": ("lrs3",),
    "validation_ids": ("lrs3",),
    "english": ("vox2",),
    "labels": ("vox2",),
    "language": ("muavic",),
    "cropped": ("muavic",),
    "debs": (DEBIAN,),
    "seg": ("lrs2", "lrs3", "vox2", "videos"),
}

_RANGES: dict[str, tuple[float, float]] = {
    "seg": (1, 600),
    "skew": (0, 10),
    "coverage": (0, 1),
    "validation": (0, 1_000_000),
    "workers": (0, 1024),
}


def parse_options(corpus: str, overrides: list[str]) -> PrepareOptions:
    """Reads ``key=value`` strings.

    Raises:
        UserError: unknown corpus, unknown key, a key of another corpus, a value of the wrong kind or out of range.
    """
    check_corpus(corpus)
    owners = {field.name: _ONLY.get(field.name, VIDEOS) for field in fields(PrepareOptions)}
    for key in (override.partition("=")[0] for override in overrides):
        if key in owners and corpus not in owners[key]:
            raise UserError(f"option {key} is not one of {corpus}: it belongs to {', '.join(owners[key])}")
    options = PrepareOptions()
    names = [name for name, corpora in owners.items() if corpus in corpora]
    read_options(options, overrides, names, f"prepare {corpus}")
    check_options(options)
    return options


def check_corpus(corpus: str, known: tuple[str, ...] = CORPORA) -> None:
    """Raises a ``UserError`` if the corpus is unknown."""
    if corpus not in known:
        raise UserError(f"unknown corpus {corpus!r}: expected one of {', '.join(known)}")


def read_folders(corpus: str, targets: list[str]) -> tuple[list[str], list[str]]:
    """The folders at the begin of ``targets``, ROOT and OUT or OUT alone, and the ``key=value`` strings after them.

    Raises:
        UserError: unknown corpus, or another number of folders.
    """
    check_corpus(corpus)
    wanted = ["OUT"] if corpus == DEBIAN else ["ROOT", "OUT"]
    names = {field.name for field in fields(PrepareOptions)}
    folders = [target for target in targets[: len(wanted)] if target.partition("=")[0] not in names]
    more = targets[len(wanted) : len(wanted) + 1]
    if len(folders) < len(wanted) or more and "=" not in more[0]:
        listed = " ".join([*wanted, "[key=value ...]"])
        raise UserError(f"expected avsr prepare {corpus} {listed}, got {' '.join(targets)}")
    return folders, targets[len(wanted) :]


def check_options(options: PrepareOptions) -> None:
    """Raises a ``UserError`` that names the option, its value and its range if one is out of range."""
    check_ranges(options, _RANGES)
    if not options.landmarks:
        raise UserError(f"option landmarks: expected a folder or {DETECT!r}, got nothing")
    if options.validation_ids and options.validation != LRS3_VALIDATION:
        raise UserError("options validation and validation_ids exclude each other: give one")
