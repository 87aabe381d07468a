"""Datasets of others as manifests: of Hugging Face (``hf:NAME``, or a folder that ``save_to_disk`` wrote) and
WebDataset's tar files (``wds:PATTERN``).

Each is turned once into ``datasets/KEY/manifest.jsonl`` of the cache, whose lines name the clips where they are
(``avsr.data.members``). KEY depends on the files of the dataset, their sizes and times, and ``data.columns``.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import av
import soundfile

from avsr.config import DataConfig
from avsr.config.schema import ColumnsConfig
from avsr.data.arrows import INSTALL, open_rows
from avsr.data.clip import SOUND_SUFFIXES, VIDEO_SUFFIXES
from avsr.data.container import opened
from avsr.data.foreign_rows import arrow_rows, tar_rows
from avsr.data.manifest import write_manifest
from avsr.data.members import readable, suffix_of
from avsr.errors import UserError
from avsr.runtime.folders import cache_folder, part_of, remove
from avsr.runtime.pool import Lost, run_jobs
from avsr.runtime.progress import ProgressBar
from avsr.runtime.ranks import after_the_first_rank

logger = logging.getLogger("avsr")
HF, WDS = "hf:", "wds:"
_STATE, _SPLITS = "state.json", "dataset_dict.json"  # in folders of save_to_disk
_VERSION = 1  # of what is made of a dataset
_GROUP = 64  # clips measured by a process at a time
_FEW = 2000  # clips that are measured faster than processes start
_NUMBERS = re.compile(r"\{(\d{1,9})\.\.(\d{1,9})\}")
_MOST = 1_000_000  # tars of a pattern


def resolve(spec: str, data: DataConfig, *, alone: bool = False, load: bool = True) -> tuple[str, bool]:
    """What a key such as ``data.train`` names, as a manifest.

    Args:
        spec: a manifest's path, which is returned; or a dataset, which is read the first time. In a training, rank 0
            does so before the others.
        data: columns of datasets, and whether manifests may have absolute paths.
        alone: the other ranks do not call this.
        load: datasets may be loaded from a hub; else one of ``hf:`` counts as missing.

    Returns:
        ``path`` and ``absolute`` of :func:`~avsr.data.manifest.read_manifest`.

    Raises:
        UserError: there is no such dataset or it cannot be loaded, it is empty or damaged, or a column is missing or of
            another type.
    """
    saved = os.path.isdir(spec) and any(os.path.isfile(os.path.join(spec, name)) for name in (_STATE, _SPLITS))
    if not saved and (os.path.isfile(spec) or not spec.startswith((HF, WDS))):
        return spec, data.allow_absolute
    if spec.startswith(HF) and not load:
        raise UserError(f"{spec} is not loaded")
    with nullcontext() if alone else after_the_first_rank():
        return _made(spec, tuple(asdict(data.columns).items())), True


@lru_cache
def _made(spec: str, columns: tuple[tuple[str, Any], ...]) -> str:
    """The path of a dataset's manifest."""
    own = ColumnsConfig(**dict(columns))
    files = _tars(spec) if spec.startswith(WDS) else _loaded(spec) if spec.startswith(HF) else _saved(Path(spec))
    place = _folder(files, str(columns)) / "manifest.jsonl"
    if not place.is_file():
        rows = list((tar_rows if spec.startswith(WDS) else arrow_rows)(spec, files, own))
        if not rows:
            raise UserError(f"{spec} holds no row")
        if unknown := [row for row in rows if row["duration"] is None]:
            _measure(unknown, spec)
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            write_manifest(place, rows)
        except OSError as error:
            raise UserError(f"cannot write {place}: {error.strerror or error} (AVSR_CACHE names the cache)") from error
    return str(place)


def _folder(files: list[Path], what: str) -> Path:
    """Of the cache, for what is made of these files as they are now."""
    try:
        stats = [(str(path), os.stat(path)) for path in files]
    except (OSError, ValueError) as error:  # a name with a NUL
        raise UserError(f"a file of the dataset cannot be read: {error}") from error
    state = f"{_VERSION} {what} {[(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats]}"
    return cache_folder() / "datasets" / hashlib.sha256(state.encode("utf-8", "surrogateescape")).hexdigest()[:32]


def _tars(spec: str) -> list[Path]:
    """The files of a pattern: ``*`` and ``?`` as in a shell, and ``{000..012}``."""
    found: list[str] = []
    for pattern in _numbered(os.path.expanduser(spec.removeprefix(WDS))):
        names = sorted(glob.glob(pattern, recursive=True)) if glob.has_magic(pattern) else [pattern]
        found += [os.path.abspath(name) for name in names]
        if len(found) > _MOST:
            raise UserError(f"{spec} names more than {_MOST} files")
    if not found:
        raise UserError(f"{spec}: no file has such a name")
    for name in found:
        if not name.endswith(".tar") or not os.path.isfile(name):
            raise UserError(f"{spec}: expected files NAME.tar, and {name} is none")
    return [Path(name) for name in dict.fromkeys(found)]


def _numbered(pattern: str) -> Iterator[str]:
    match = _NUMBERS.search(pattern)
    if match is None:
        yield pattern
        return
    first, last = match.groups()
    for number in range(int(first), int(last) + 1):
        for rest in _numbered(pattern[match.end() :]):
            yield f"{pattern[: match.start()]}{number:0{len(first)}d}{rest}"


def _saved(folder: Path) -> list[Path]:
    """The Arrow files of a folder that ``save_to_disk`` wrote."""
    try:
        if (folder / _SPLITS).is_file():
            splits = [str(name) for name in json.loads((folder / _SPLITS).read_text(encoding="utf-8"))["splits"]]
            raise UserError(f"{folder} holds the splits {', '.join(splits)}: name one, {folder / splits[0]}")
        state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        names = [str(item["filename"]) for item in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise UserError(f"{folder} is not a dataset as save_to_disk writes it: {error!r}") from error
    if state.get("_indices_files") or any(Path(name).name != name or Path(name).suffix != ".arrow" for name in names):
        raise UserError(f"{folder} was written by an old version of datasets: load and save it again")
    return [folder.resolve() / name for name in names]


def _loaded(spec: str) -> list[Path]:
    """The Arrow files of ``hf:NAME[,CONFIG][,SPLIT]``; the last of two is the split."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{spec}: loaded by the package datasets, which is not installed: {INSTALL}") from error
    name, *rest = spec.removeprefix(HF).split(",")
    if not name or len(rest) > 2:
        raise UserError(f"{spec}: expected {HF}NAME, {HF}NAME,SPLIT or {HF}NAME,CONFIG,SPLIT")
    config, split = (rest[0] or None) if len(rest) == 2 else None, (rest[-1] or None) if rest else None
    try:
        found = datasets.load_dataset(os.path.expanduser(name), config, split=split)
    except Exception as error:  # of many kinds: those of the network, of the hub, and of every file format
        lines = str(error).strip().splitlines() or [""]
        raise UserError(f"{spec} cannot be loaded: {type(error).__name__}: {lines[0]}") from error
    if split is None:
        if len(found) != 1:
            raise UserError(f"{spec} holds the splits {', '.join(found)}: name one, {HF}{name},{next(iter(found))}")
        found = next(iter(found.values()))
    if not len(found):
        raise UserError(f"{spec} holds no row")
    files = [Path(item["filename"]) for item in found.cache_files]
    if files and sum(len(open_rows(file)) for file in files) == len(found):
        return files
    return _kept(found, _folder(files, f"rows {spec} {found.num_rows}") / "rows")


def _kept(found: Any, folder: Path) -> list[Path]:
    """A part of a split, such as train[:10%], has no files of its own until it is saved."""
    if not folder.is_dir():
        part = part_of(folder)
        try:
            part.parent.mkdir(parents=True, exist_ok=True)
            found.save_to_disk(str(part))
            os.replace(part, folder)
        except OSError as error:
            if folder.is_dir():  # another rank of this host was faster
                return _saved(folder)
            raise UserError(f"cannot write {folder}: {error.strerror or error} (AVSR_CACHE names it)") from error
        finally:
            remove(part)
    return _saved(folder)


def _measure(rows: list[dict[str, Any]], spec: str) -> None:
    """Fills in durations by the headers of the clips; one that cannot be read keeps none, and its line is refused."""
    groups = [range(first, min(first + _GROUP, len(rows))) for first in range(0, len(rows), _GROUP)]
    jobs = [tuple((n, rows[n]["audio"] or rows[n]["video"]) for n in group) for group in groups]
    failed: list[str] = []
    with ProgressBar(f"durations of {spec}", len(rows)) as bar:
        for job, result in run_jobs(_durations, jobs, 1 if len(rows) <= _FEW else 0):
            values = [f"{job[0][1]}: its process {result.reason}"] * len(job) if isinstance(result, Lost) else result
            for (number, _), value in zip(job, values, strict=True):
                if isinstance(value, str):
                    failed.append(value)
                else:
                    rows[number]["duration"] = value
            bar.advance(len(job))
    if failed:
        logger.warning("%s: %d clips without a duration cannot be measured, first %s", spec, len(failed), failed[0])


def _durations(job: tuple[tuple[int, str | None], ...]) -> list[float | str]:
    """Seconds of clips, or why they are not known."""
    found: list[float | str] = []
    for _, path in job:
        try:
            found.append(_seconds(Path(path or "")))
        except (UserError, soundfile.LibsndfileError, RuntimeError, OSError, TypeError, ValueError) as error:
            found.append(str(error))
    return found


def _seconds(path: Path) -> float:
    if suffix_of(path) not in VIDEO_SUFFIXES + SOUND_SUFFIXES:
        with soundfile.SoundFile(readable(path)) as file:
            return round(file.frames / file.samplerate, 3)
    with opened(path, "") as container:
        if not container.duration:
            raise UserError(f"{path} does not say how long it is")
        return round(float(container.duration / av.time_base), 3)
