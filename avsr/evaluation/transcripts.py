"""``avsr transcribe RUN FILE...``, of files, of what patterns match, or of the clips of a manifest.

Without a manifest ``transcripts.jsonl`` has a row per file: file, then duration (seconds), text, score (nats, see
:mod:`avsr.evaluation.decode`), cut and loop as in ``hypotheses.jsonl``; or file and error.

With one it is itself a manifest, of pseudo-labels: id, audio, video, offset, duration, speaker and sha256 are those
that were given, text is the hypothesis, and score, cut and loop are there to filter by. A file below the folder of the
result is named relative to it, any other absolutely: manifests do not lead out of their folder by ``..``, and with
``data.allow_absolute=true`` they may by absolute paths. What has no text is in ``rejected.jsonl``.

Rows are written as they come and stay on disk, so the number of files does not matter for memory but for their names.
"""

from __future__ import annotations

import glob
import logging
import os
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from avsr.config import TASKS, Config, read_run_config
from avsr.config.schema import DataConfig
from avsr.data.batches import Example
from avsr.data.clip import VIDEO_SUFFIXES
from avsr.data.dataset import REJECTED
from avsr.data.features import FeatureStore
from avsr.data.manifest import Utterance, read_manifest
from avsr.data.members import stamp
from avsr.data.mouth.single import mouth_video
from avsr.errors import UserError, visible
from avsr.evaluation.act import calibrated
from avsr.evaluation.decode import BUDGET, transcribe
from avsr.evaluation.failures import loops
from avsr.evaluation.results import UNFINISHED, made_by
from avsr.models.build import load_run, pick_device
from avsr.models.speech_llm import SpeechLLM
from avsr.runtime.locks import claim
from avsr.runtime.rows import Row, StoredRows, write_rows
from avsr.runtime.share import Share

logger = logging.getLogger("avsr")
_DIGITS = 4  # of a score: later ones depend on which clips are decoded together
TRANSCRIPTS = "transcripts.jsonl"
Clip = str | Utterance  # a file, or a line of a manifest
_MANIFESTS = (".jsonl", ".csv")
_BATCHES = 8  # of files read before their decoding begins, for batches of similar length
_STAMP = "stamp"  # key of an unfinished row


def transcribe_files(
    run: str | Path,
    files: Sequence[str],
    overrides: list[str],
    out: str | Path | None = None,
    share: Share | None = None,
) -> Iterator[tuple[str, str | UserError]]:
    """Transcribes clips: (name, text) in order, as they come, with the error instead of a text for an unusable one.

    Of a video file the mouth frames, the sound or both are used, as the run's task needs; from a whole face the mouth
    is cropped first, if no manifest names it. A text that repeats itself or was cut is warned about.

    Args:
        run: the run folder.
        files: of sound or video, patterns of such, or one manifest, whose texts are not read.
        overrides: ``key=value`` of its config.
        out: a folder that also gets ``transcripts.jsonl``, where a stopped command goes on.
        share: of the clips; None = all of them.

    Raises:
        UserError: a pattern matches nothing, the manifest is bad, or ``out`` cannot be written, is in use or has
            transcripts already.
    """
    config = read_run_config(run, overrides)
    clips = find_clips(files, config.data)
    clips = clips if share is None else share.of(clips)
    if out is None:
        for clip, (row, _) in zip(clips, _transcripts(run, clips, overrides, None), strict=True):
            yield _name(clip), _result(row)
        return
    place = Path(out, TRANSCRIPTS)
    with claim(place.parent, TRANSCRIPTS, "--out"):
        unfinished = place.with_name(f"{TRANSCRIPTS}{UNFINISHED}")
        if place.exists() and not unfinished.exists():  # with it a command was stopped between its last two steps
            raise UserError(f"{place} is there already: name another folder with --out")
        config.data.test = {}
        kept = StoredRows(unfinished, _row_key, made_by(run, config))
        if place.exists() and not len(kept):
            raise UserError(f"{place} is there already and of other settings: name another folder with --out")
        places = array("q")  # of the rows in order
        for clip, (row, begin) in zip(clips, _transcripts(run, clips, overrides, kept), strict=True):
            places.append(begin)
            yield _name(clip), _result(row)
        try:
            _publish(place, kept, places, files[0] if files[0].endswith(_MANIFESTS) else None)
        except OSError as error:
            raise UserError(f"cannot write {place}: {error}; the same command goes on") from error


def find_clips(files: Sequence[str], data: DataConfig) -> Sequence[Clip]:
    """The files that ``files`` name themselves or match, or the utterances of the manifest that they name.

    A name with ``*``, ``?`` or ``[...]`` of no file is a pattern; ``**`` stands for any number of folders. Matches are
    sorted.

    Raises:
        UserError: a pattern matches nothing; a manifest is bad, or not alone.
    """
    manifests = [name for name in files if name.endswith(_MANIFESTS)]
    if not manifests:
        return [match for name in files for match in _matches(name)]
    if len(files) > 1:
        raise UserError(f"{manifests[0]}: a manifest is transcribed alone, since the result is one, too")
    on_bad = logger.warning if data.on_bad == "skip" else None
    found = read_manifest(manifests[0], on_bad=on_bad, absolute=data.allow_absolute, texts=False)
    return found[: data.limit or None]


def _matches(name: str) -> list[str]:
    if not glob.has_magic(name) or os.path.lexists(name):
        return [name]
    found = sorted(path for path in glob.glob(name, recursive=True) if not os.path.isdir(path))
    if not found:
        raise UserError(f"no file matches {name!r}")
    return found


def _transcripts(
    run: str | Path, clips: Sequence[Clip], overrides: list[str], kept: StoredRows | None
) -> Iterator[tuple[Row, int]]:
    """The row of every clip in order, and its place in ``kept``."""
    config, model, store = load_run(run, overrides, pick_device(), single=True)
    together = config.decode.batch * _BATCHES
    with calibrated(config, model):
        for first in range(0, len(clips), together):
            rows = _transcribe_some(clips[first : first + together], config, model, store, kept)
            for row, place in rows:
                if "text" in row:
                    _warn(row)
                yield row, place


def _transcribe_some(
    clips: Sequence[Clip], config: Config, model: SpeechLLM, store: FeatureStore, kept: StoredRows | None
) -> list[tuple[Row, int]]:
    """As :func:`_transcripts`, of clips whose features fit into memory."""
    task = (config.decode.tasks or [config.model.task])[0]
    found: dict[int, tuple[Row, int]] = {}
    examples: list[tuple[int, Example]] = []

    def add(index: int, row: dict[str, Any]) -> None:
        clip = clips[index]
        row = {**_about(clip, None if kept is None else kept.path.parent), **row}
        found[index] = row, 0 if kept is None else kept.add(row)

    for index, clip in enumerate(clips):
        place = None if kept is None else kept.place(_key(clip))
        if kept is not None and place is not None:
            found[index] = next(kept.read([place])), place
            continue
        try:
            examples.append((index, _example(clip, task, model, store)))
        except UserError as error:  # which another start may not meet
            add(index, {"error": str(error), _STAMP: []})
    seconds = [example.utterance.duration for _, example in examples]
    for number, hypotheses in transcribe(model, lambda i: examples[i][1], seconds, config.decode):
        index, (text, score, cut) = examples[number][0], hypotheses[0]
        own = {
            "duration": seconds[number],
            "text": text,
            "score": round(score, _DIGITS),
            "cut": cut,
            "loop": loops(text),
        }
        add(index, {**own, _STAMP: _key(clips[index])[1]})
    return [found[index] for index in range(len(clips))]


def _publish(place: Path, kept: StoredRows, places: Sequence[int], manifest: str | None) -> None:
    """Writes ``transcripts.jsonl``, and of a manifest ``rejected.jsonl``, from the rows on disk."""

    def rows(accepted: bool) -> Iterator[Row]:
        for row in kept.read(places) if places else ():  # without a row there is no file
            if accepted == (manifest is None or bool(row.get("text"))):
                yield {name: value for name, value in row.items() if name != _STAMP}

    refused = place.with_name(REJECTED)
    if manifest is not None:  # else it is none of ours: OUT may be a run
        refused.unlink(missing_ok=True)
    if next(rows(accepted=False), None):
        reasons = ((row["id"], row.get("error", "no text was found in it")) for row in rows(accepted=False))
        write_rows(refused, ({"manifest": manifest, "id": id, "reason": reason} for id, reason in reasons))
        logger.warning("%s lists the clips that have no text", refused)
    if any(os.path.isabs(row.get(field, "")) for row in rows(accepted=True) for field in ("audio", "video")):
        logger.info("%s has absolute paths: data.allow_absolute=true reads it", place)
    kept.publish(place, rows(accepted=True))


def _about(clip: Clip, folder: Path | None) -> dict[str, Any]:
    """What a row says of its clip; its paths are relative to ``folder`` as far as they are below it."""
    if isinstance(clip, str):
        return {"file": clip}
    fields = {"audio": clip.audio, "video": clip.video}
    paths = {name: _from(folder, path) for name, path in fields.items() if path is not None}
    rest = {"offset": clip.offset, "speaker": clip.speaker or None, "sha256": clip.sha256 or None}
    return {"id": clip.id, **paths, **{name: value for name, value in rest.items() if value is not None}}


def _from(folder: Path | None, path: Path) -> str:
    base = None if folder is None else folder.resolve()
    return str(path.relative_to(base) if base is not None and path.is_relative_to(base) else path)


def _name(clip: Clip) -> str:
    return clip if isinstance(clip, str) else clip.id


def _result(row: Row) -> str | UserError:
    return UserError(row["error"]) if "error" in row else str(row["text"])


def _row_key(row: Row) -> tuple[str, tuple[Any, ...]]:
    return str(row["file"] if "file" in row else row["id"]), tuple(row[_STAMP])


def _key(clip: Clip) -> tuple[str, tuple[Any, ...]]:
    """Its name with size and time of its files, and which part of them it is: another clip under this name is
    transcribed again."""
    if isinstance(clip, str):
        return clip, (_file_stamp(clip),)
    files = [_file_stamp(path) for path in (clip.audio, clip.video) if path is not None]
    return clip.id, (*files, clip.offset, clip.duration)


def _file_stamp(name: str | Path) -> str:
    try:
        return stamp(Path(name))
    except (OSError, ValueError, UserError):  # of a container that is damaged
        return ""


def _warn(row: Row) -> None:
    """Of a text that is probably not what was said."""
    name = visible(_row_key(row)[0])
    if row["loop"]:
        logger.warning("%s: its text repeats itself (decode.no_repeat_ngram, decode.repetition_penalty)", name)
    if row["cut"]:
        keys = "its budget (decode.base_tokens, decode.tokens_per_second)"
        cause = keys if row["cut"] == BUDGET else "the language model's positions"
        logger.warning("%s: its text was cut by %s", name, cause)


def _example(clip: Clip, task: str, model: SpeechLLM, store: FeatureStore) -> Example:
    utterance = clip if isinstance(clip, Utterance) else _whole_file(clip, store)
    features = store.load(utterance, streams=TASKS[task])
    frames = store.frames(utterance)
    store.measure(utterance, frames)
    measured = store.measured.pop(utterance.id).seconds
    utterance = replace(utterance, duration=utterance.duration or measured)
    reason = model.layout.unusable(frames, 0)
    if reason:
        raise UserError(f"{_name(clip)} ({utterance.duration:.2f} s) {reason}")
    return Example(utterance, features, [], task)


def _whole_file(name: str, store: FeatureStore) -> Utterance:
    path = Path(os.path.realpath(name))  # where Path.resolve raises, for a link to itself, it is just no file
    moving = path.suffix.lower() in VIDEO_SUFFIXES
    needs_mouth = moving and any("video" in store.encoders[stream].needs for stream in store.active)
    return Utterance(id=name, audio=path, text="", duration=0, video=mouth_video(path) if needs_mouth else None)
