"""``avsr prepare``: makes the clips of a corpus and its manifests.

``OUT/clips/ID.mp4`` are 96x96 grey mouths at 25 fps and ``OUT/clips/ID.wav`` their sound, 16 kHz mono, 640 samples per
frame. ``OUT/NAME.jsonl`` are the manifests; clips without a text are in ``untranscribed.jsonl``, to be filled in.
``OUT/refused.jsonl`` has a line with the reason for everything that was left out. The same command continues a run that
was stopped; after a finished run it retries what was refused if its landmarks, sound or options have changed, and
rewrites the manifests.

Shards (:mod:`avsr.runtime.share`) make the clips of their videos only, in the same folder. A merge writes the manifests
when all are made; a run of the whole takes over what shards have done and makes the rest.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from avsr.data.manifest import write_manifest
from avsr.data.mouth.faces import require_detector
from avsr.data.mouth.landmarks import find_landmarks
from avsr.data.rates import FRAMES_PER_SECOND
from avsr.errors import UserError
from avsr.runtime.folders import has_content
from avsr.runtime.pool import Lost, run_jobs
from avsr.runtime.progress import ProgressBar
from avsr.runtime.share import Share, claim_share, claim_whole, owner, unfinished
from avsr.tools.corpora.lrs import read_lrs2, read_lrs3
from avsr.tools.corpora.muavic import read_muavic
from avsr.tools.corpora.prepare.clips import Job, Made, Outcome, make_clips
from avsr.tools.corpora.prepare.journal import STATE, Entry, Journal
from avsr.tools.corpora.prepare.options import DETECT, VIDEOS, PrepareOptions, check_corpus, check_options
from avsr.tools.corpora.source import Refusal, Source
from avsr.tools.corpora.videos import read_videos
from avsr.tools.corpora.voxceleb import read_labels, read_vox2, vox_key

logger = logging.getLogger("avsr")

REFUSED = "refused.jsonl"
UNTRANSCRIBED = "untranscribed"
MANIFESTS = ("train", "trainval", "main", "pretrain", "validation", "test", "all", UNTRANSCRIBED)


@dataclass(frozen=True)
class Prepared:
    """The result of a run: rows of each manifest by name, refusals by kind, and the clips made in this run."""

    manifests: dict[str, int]
    refused: dict[str, int]
    made: int


def prepare(
    corpus: str,
    root: str | Path,
    out: str | Path,
    options: PrepareOptions,
    share: Share | None = None,
    *,
    merge: bool = False,
) -> Prepared:
    """Prepares a corpus, or continues with it.

    A script that calls this needs the usual ``if __name__ == "__main__"``, because it starts processes.

    Args:
        corpus: lrs2, lrs3, vox2, muavic or videos.
        root: the corpus as distributed.
        out: the folder to make.
        options: how.
        share: make only the clips of this share of the videos, and no manifests.
        merge: make no clips, only the manifests of those that the shards have made.

    Raises:
        UserError: bad options, ``root`` is not such a corpus, the landmark detector is missing, ``out`` holds
            something else, is in use or cannot be written, no clip could be made, or ``merge`` and a clip is missing.
    """
    check_corpus(corpus, VIDEOS)
    check_options(options)
    root, out = Path(root).absolute(), Path(out).absolute()
    if not root.is_dir():
        raise UserError(f"there is no folder {root}")
    landmarks = options.landmarks if options.landmarks == DETECT else str(Path(options.landmarks).absolute())
    if landmarks != DETECT and not Path(landmarks).is_dir():
        raise UserError(f"option landmarks: there is no folder {landmarks}")
    ready = corpus == "muavic" and options.cropped
    if landmarks == DETECT and not ready and not merge:
        require_detector()
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is not a folder: choose another one")
    with claim_whole(out) if share is None else claim_share(out, share):
        return _prepare(corpus, root, out, landmarks, options, share, merge)


def _prepare(
    corpus: str, root: Path, out: Path, landmarks: str, options: PrepareOptions, share: Share | None, merge: bool
) -> Prepared:
    if merge and not (out / STATE).exists():
        raise unfinished(out, (), lambda _: ())
    labels = read_labels(Path(options.labels)) if options.labels else {}
    sources, refused = _sources(_read(corpus, root, out, options))
    jobs = [Job(source, str(out), landmarks, options.skew, options.coverage) for source in sources]
    try:
        journal = Journal(out, {"corpus": corpus, "root": str(root), "seg": options.seg}, share)
        if share is not None:
            return _make_share(jobs, journal, options.workers, share)
        if merge:
            _refuse_unfinished(out, jobs, journal)
        journal.take_over()
        made = 0 if merge else _make(jobs, journal, options.workers, "prepare")
        for source in sources:
            refused += journal.entry(source.id).refused
        report = _write(out, _rows(sources, journal, labels), refused, made)
    except OSError as error:
        raise UserError(f"cannot write {error.filename or out}: {error.strerror or error}") from error
    if not report.manifests:
        first = refused[0].reason if refused else "nothing was found"
        raise UserError(f"no clip could be made; {out / REFUSED} has the reasons; the first: {first}")
    return report


def _make_share(jobs: list[Job], journal: Journal, workers: int, share: Share) -> Prepared:
    own = [job for job in jobs if share.has(job.source.id)]
    made = _make(own, journal, workers, f"prepare, shard {share}")
    kinds = Counter(refusal.kind for job in own for refusal in journal.entry(job.source.id).refused)
    return Prepared({}, dict(kinds.most_common()), made)


def _refuse_unfinished(out: Path, jobs: list[Job], journal: Journal) -> None:
    left = [job.source.id for job in jobs if not _is_done(job, journal.entry(job.source.id))]
    if left:
        raise unfinished(out, journal.shared, lambda count: (owner(name, count) for name in left))


def _is_done(job: Job, entry: Entry) -> bool:
    """Whether one process would go on to the manifests: a video that crashed its decoder is tried again only then."""
    return _left_to_do(job, entry if entry.tried else replace(entry, tried=_tried(job))) is None


def _read(corpus: str, root: Path, out: Path, options: PrepareOptions) -> Iterator[Source | Refusal]:
    if corpus == "lrs3":
        ids = Path(options.validation_ids) if options.validation_ids else None
        return read_lrs3(root, options.seg, options.validation, ids)
    if corpus == "lrs2":
        return read_lrs2(root, options.seg)
    if corpus == "muavic":
        return read_muavic(root, options.language, options.cropped)
    if corpus == "videos":
        return read_videos(root, options.seg, out)
    if options.english == "all":
        return read_vox2(root, options.seg, None)
    english = Path(options.english) if options.english else root / "vox-en.id"
    if not english.is_file():
        raise UserError(f"there is no list of English videos {english}: give english=FILE (vox-en.id), or english=all")
    return read_vox2(root, options.seg, english)


def _sources(found: Iterable[Source | Refusal]) -> tuple[list[Source], list[Refusal]]:
    sources: list[Source] = []
    refused: list[Refusal] = []
    owners: dict[tuple[str, str], Path] = {}  # of names as ``_names`` gives them: the first video that has it
    for item in found:
        if isinstance(item, Refusal):
            refused.append(item)
            continue
        names, foreign = _names(item)
        owner = next((owners[name] for name in foreign if name in owners), None)
        if owner is not None:
            reason = f"its name or those of its clips are already used by {owner}: rename one of the two"
            refused.append(Refusal(item.id, str(item.video), "twice", reason))
        else:
            owners |= {name: item.video for name in names if name not in owners}
            sources.append(item)
    return sources, refused


def _names(source: Source) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """The names that a video and its clips take, and those that no other video may have taken.

    How many windows a video has is not known yet: any name that is the video's with a number after it can be one.
    """
    names, foreign = [("video", source.id)], [("video", source.id)]
    if source.window is not None:
        names.append(("windows of", source.id))
        foreign.append(("clip of", source.id))
    for piece in source.pieces:
        base, _, number = piece.id.rpartition("_")
        names.append(("clip", piece.id))
        foreign.append(("clip", piece.id))
        if len(number) >= 2 and number.isdecimal():
            names.append(("clip of", base))
            foreign.append(("windows of", base))
    return names, foreign


def _make(jobs: list[Job], journal: Journal, workers: int, title: str) -> int:
    """Makes what is missing, records it in the journal, and returns the number of clips made."""
    todo = [job for known in jobs if (job := _left_to_do(known, journal.entry(known.source.id))) is not None]
    logger.info("%d of %d videos are done", len(jobs) - len(todo), len(jobs))
    made = refused = 0
    with ProgressBar(title, len(jobs), done=len(jobs) - len(todo)) as bar:
        for job, outcome in _outcomes(todo, workers):
            source = job.source
            asked, tried = _asked(source), _tried(job)
            if isinstance(outcome, Lost):
                reason = f"the process that read {source.video} {outcome.reason}"
                outcome = Outcome(job.keep, (Refusal(source.id, str(source.video), "crash", reason),))
                tried = ""  # it may have been short of memory: another run tries again
            journal.add(source.id, Entry(asked, tried, outcome.made, outcome.refused))
            refused += len(outcome.refused)
            made += len(set(outcome.made) - set(job.keep))
            bar.advance(note=f"{refused} refused")
    return made


def _outcomes(jobs: list[Job], workers: int) -> Iterator[tuple[Job, Outcome | Lost]]:
    """As they come. A video can crash the decoder that reads it, but a process may also die of a lack of memory: its
    video is tried once more when the others are done, alone."""
    lost = []
    for job, outcome in run_jobs(make_clips, jobs, workers):
        if isinstance(outcome, Lost):
            lost.append(job)
        else:
            yield job, outcome
    yield from run_jobs(make_clips, lost, 1, fresh=True)


def _left_to_do(job: Job, entry: Entry) -> Job | None:
    """The job with the clips that exist already; None if nothing is left to do."""
    if entry.asked != _asked(job.source):
        return job
    there = tuple(c for c in entry.made if all(has_content(Path(job.out, name)) for name in (c.video, c.audio)))
    if len(there) == len(entry.made) and (not entry.refused or entry.tried == _tried(job)):
        return None
    return replace(job, keep=there)


def _asked(source: Source) -> str:
    pieces = [(piece.id, piece.start, piece.end, piece.last_word, piece.limit) for piece in source.pieces]
    return json.dumps([_stamp(source.video), source.window, source.cropped, pieces])


def _tried(job: Job) -> str:
    """What else a refusal can depend on."""
    path = None if job.landmarks == DETECT else find_landmarks(Path(job.landmarks), job.source.id)
    audio = [_stamp(file) for file in job.source.audio]
    return json.dumps([job.landmarks, job.skew, job.coverage, _stamp(path), audio])


def _stamp(path: Path | None) -> list[int] | None:
    try:
        found = path.stat() if path else None
    except OSError:
        return None
    return [found.st_size, found.st_mtime_ns] if found else None


def _rows(sources: list[Source], journal: Journal, labels: dict[str, str]) -> dict[str, list[dict[str, Any]]]:
    """The rows of each manifest, in the order of the corpus."""
    manifests: dict[str, list[dict[str, Any]]] = {}
    for source in sources:
        clips = journal.entry(source.id).made
        texts = {piece.id: piece.text for piece in source.pieces}
        for clip in clips:
            text = texts.get(clip.id) or labels.get(vox_key(clip.id))
            if text is None and len(clips) == 1:
                text = labels.get(vox_key(source.id))
            for name in source.manifests if text else (UNTRANSCRIBED,):
                manifests.setdefault(name, []).append(_row(clip, text or "", source.speaker))
    return manifests


def _row(clip: Made, text: str, speaker: str) -> dict[str, Any]:
    return {
        "id": clip.id,
        "audio": clip.audio,
        "video": clip.video,
        "duration": (clip.end - clip.start) / FRAMES_PER_SECOND,
        "text": text,
        "speaker": speaker,
        "sha256": clip.sha256,
    }


def _write(out: Path, rows: dict[str, list[dict[str, Any]]], refused: list[Refusal], made: int) -> Prepared:
    for name in MANIFESTS:
        if name not in rows:
            (out / f"{name}.jsonl").unlink(missing_ok=True)  # of an earlier run; it has no clips now
    for name, content in rows.items():
        write_manifest(out / f"{name}.jsonl", content)
    write_manifest(out / REFUSED, [asdict(refusal) for refusal in refused])
    kinds = Counter(refusal.kind for refusal in refused)
    return Prepared({name: len(content) for name, content in rows.items()}, dict(kinds.most_common()), made)
