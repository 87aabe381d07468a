"""``avsr transcribe RUN FILE...``."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from avsr.config import TASKS, read_run_config
from avsr.data.batches import Example
from avsr.data.clip import VIDEO_SUFFIXES
from avsr.data.features import FeatureStore
from avsr.data.manifest import Utterance
from avsr.data.mouth.single import mouth_video
from avsr.errors import UserError, visible
from avsr.evaluation.act import calibrated
from avsr.evaluation.decode import BUDGET, transcribe
from avsr.evaluation.failures import loops
from avsr.evaluation.results import UNFINISHED, made_by
from avsr.models.build import load_run, pick_device
from avsr.models.speech_llm import SpeechLLM
from avsr.runtime.locks import claim
from avsr.runtime.rows import Row, Rows

logger = logging.getLogger("avsr")
TRANSCRIPTS = "transcripts.jsonl"
_BATCHES = 8  # files read before their decoding begins, for batches of similar length


def transcribe_files(
    run: str | Path, files: Sequence[str], overrides: list[str], out: str | Path | None = None
) -> Iterator[tuple[str, str | UserError]]:
    """Transcribes files: (file, text) in order, as they come, with the error instead of a text for an unusable file.

    Of a video file the mouth frames, the sound or both are used, as the run's task needs; from a whole face the mouth
    is cropped first. ``out`` is a folder that also gets ``transcripts.jsonl``, where a stopped command goes on. A text
    that repeats itself or was cut is warned about.
    """
    if out is None:
        yield from _transcripts(run, files, overrides, None)
        return
    place = Path(out, TRANSCRIPTS)
    with claim(place.parent, TRANSCRIPTS, "--out"):
        if place.exists():
            raise UserError(f"{place} is there already: name another folder with --out")
        config = read_run_config(run, overrides)
        config.data.test = {}
        made = made_by(run, config)
        kept = Rows(place.with_name(f"{TRANSCRIPTS}{UNFINISHED}"), lambda row: (row["file"], tuple(row["stamp"])), made)
        rows: list[Row] = []
        for name, result in _transcripts(run, files, overrides, kept):
            rows.append({"file": name, "error" if isinstance(result, UserError) else "text": str(result)})
            yield name, result
        try:
            kept.publish(place, rows)
        except OSError as error:
            raise UserError(f"cannot write {place}: {error}; the same command goes on") from error


def _transcripts(
    run: str | Path, files: Sequence[str], overrides: list[str], kept: Rows | None
) -> Iterator[tuple[str, str | UserError]]:
    config, model, store = load_run(run, overrides, pick_device(), single=True)
    task = (config.decode.tasks or [config.model.task])[0]
    together = config.decode.batch * _BATCHES
    with calibrated(config, model):
        for first in range(0, len(files), together):
            part = files[first : first + together]
            results: dict[int, str | UserError] = {}
            cuts: dict[int, str] = {}
            examples: list[tuple[int, Example]] = []
            for index, name in enumerate(part):
                held = None if kept is None else kept.held.get((name, _stamp(name)))
                try:
                    if held is None:
                        examples.append((index, _example(name, task, model, store)))
                    else:
                        results[index], cuts[index] = str(held["text"]), held["cut"]
                except UserError as error:
                    results[index] = error
            seconds = [example.utterance.duration for _, example in examples]
            load = [example for _, example in examples].__getitem__
            for place, hypotheses in transcribe(model, load, seconds, config.decode):
                index, (text, _, cut) = examples[place][0], hypotheses[0]
                results[index], cuts[index] = text, cut
                if kept is not None:
                    kept.add({"file": part[index], "stamp": _stamp(part[index]), "text": text, "cut": cut})
            for index, name in enumerate(part):
                if index in cuts:
                    _warn(name, str(results[index]), cuts[index])
                yield name, results[index]


def _warn(name: str, text: str, cut: str) -> None:
    """Of a text that is probably not what was said."""
    name = visible(name)
    if loops(text):
        logger.warning("%s: its text repeats itself (decode.no_repeat_ngram, decode.repetition_penalty)", name)
    if cut:
        keys = "its budget (decode.base_tokens, decode.tokens_per_second)"
        logger.warning("%s: its text was cut by %s", name, keys if cut == BUDGET else "the language model's positions")


def _stamp(name: str) -> tuple[int, int]:
    """Size and time of a file: another one under its name is transcribed again."""
    try:
        found = os.stat(name)
    except (OSError, ValueError):
        return 0, 0
    return found.st_size, found.st_mtime_ns


def _example(name: str, task: str, model: SpeechLLM, store: FeatureStore) -> Example:
    path = Path(os.path.realpath(name))  # where Path.resolve raises, for a link to itself, it is just no file
    moving = path.suffix.lower() in VIDEO_SUFFIXES
    utterance = Utterance(id=name, audio=path, text="", duration=0, video=None)
    if moving and any("video" in store.encoders[stream].needs for stream in store.active):
        utterance = replace(utterance, video=mouth_video(path))
    features = store.load(utterance, streams=TASKS[task])
    utterance = replace(utterance, duration=store.seconds(utterance))
    reason = model.layout.unusable(store.frames(utterance), 0)
    if reason:
        raise UserError(f"{name} ({utterance.duration:.2f} s) {reason}")
    return Example(utterance, features, [], task)
