"""``avsr evaluate RUN`` and ``avsr transcribe RUN FILE...``."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from avsr.config import TASKS, Config, read_run_config
from avsr.data.batches import Example
from avsr.data.clip import VIDEO_SUFFIXES
from avsr.data.dataset import REJECTED, Reading, SpeechDataset, load_dataset
from avsr.data.features import FeatureStore
from avsr.data.foreign import resolve
from avsr.data.index import open_manifest
from avsr.data.manifest import Utterance
from avsr.data.mouth.single import mouth_video
from avsr.data.noise import CLEAN
from avsr.data.overlap import judges, overlaps
from avsr.data.transforms import Version
from avsr.errors import UserError, visible
from avsr.evaluation.act import calibrated
from avsr.evaluation.breakdown import by_length, by_normaliser, by_speaker
from avsr.evaluation.confusions import confusions
from avsr.evaluation.decode import BUDGET, transcribe
from avsr.evaluation.failures import failures, loops, warning
from avsr.evaluation.results import (
    ERRORS,
    HYPOTHESES,
    MADE_BY,
    METRICS,
    UNFINISHED,
    environment,
    made_by,
    refuse_other,
    results_folder,
    row_key,
)
from avsr.evaluation.speed import TIMES, rtfx, timed
from avsr.evaluation.wer import Score, alignment, normaliser, score
from avsr.models.build import find_checkpoint, load_run, pick_device
from avsr.models.speech_llm import SpeechLLM
from avsr.runtime.folders import write_durably
from avsr.runtime.locks import claim
from avsr.runtime.progress import ProgressBar
from avsr.runtime.rows import Row, Rows

logger = logging.getLogger("avsr")
WORST = 20  # utterances shown in errors.txt
TRANSCRIPTS = "transcripts.jsonl"
_BATCHES = 8  # files read before their decoding begins, for batches of similar length


def decode_set(
    model: SpeechLLM, dataset: SpeechDataset, config: Config, name: str, kept: Rows | None = None
) -> tuple[Score, list[Row]]:
    """Decodes a dataset. Returns its score and one row per utterance (set, id, speaker, seconds, reference, hypothesis,
    cut as in :class:`~avsr.evaluation.decode.Hypothesis`, loop; with ``decode.nbest`` > 1 also nbest, a list of text,
    score and cut, best first). ``kept`` gets every row as it comes, with its ``TIMES``; what it holds is not decoded
    again."""
    held = {} if kept is None else kept.held
    left = [(index, u) for index, u in enumerate(dataset.utterances) if (name, u.id) not in held]
    rows: dict[str, Row] = {}
    with ProgressBar(f"decode {name}", len(dataset), done=len(dataset) - len(left)) as bar:
        seconds = [utterance.duration for _, utterance in left]
        decoded = timed(transcribe(model, lambda i: dataset[left[i][0]], seconds, config.decode))
        for number, ((place, best), took) in enumerate(decoded):
            utterance = left[place][1]
            row: dict[str, Any] = {
                "set": name,
                "id": utterance.id,
                "speaker": utterance.speaker,
                "seconds": utterance.duration,
                "reference": utterance.text,
                "hypothesis": best[0].text,
                "cut": best[0].cut,
                "loop": loops(best[0].text, utterance.text),
                "took": took,
                "warm": number >= config.decode.batch,
                "cached": dataset.cached,
            }
            if config.decode.nbest > 1:
                row["nbest"] = [hypothesis._asdict() for hypothesis in best]
            if kept is not None:
                kept.add(row)
            rows[utterance.id] = row
            bar.advance()
    found = [rows.get(utterance.id) or held[name, utterance.id] for utterance in dataset.utterances]
    references, hypotheses = [row["reference"] for row in found], [row["hypothesis"] for row in found]
    total = score(references, hypotheses, normaliser(config.decode.normaliser))
    cached = sorted({stream for row in found for stream in row["cached"]})
    total = replace(total, rtfx=rtfx(found), rtfx_without_encoders=cached)
    return total, [{key: value for key, value in row.items() if key not in TIMES} for row in found]


def test_sets(config: Config, model: SpeechLLM, store: FeatureStore) -> dict[str, SpeechDataset]:
    """The datasets of ``data.test``, once for each of ``decode.tasks`` and ``noise.snr``.

    The name of a condition follows that of the set: "sentences", "sentences -5 dB", "sentences video".

    Raises:
        UserError: the config names none, an utterance cannot be used, or no transcript of a manifest has a word.
    """
    if not config.data.test:
        raise UserError("data.test: names no manifest to evaluate on (data.test.NAME=PATH)")
    sets = {}
    normalise = normaliser(config.decode.normaliser)
    for name, manifest in config.data.test.items():
        for task in config.decode.tasks or [config.model.task]:
            for snr in config.noise.snr or [CLEAN]:
                title = name + (f" {task}" if config.decode.tasks else "") + (f" {snr:g} dB" if snr != CLEAN else "")
                reading = Reading(task, Version(snr))
                sets[title] = load_dataset(
                    manifest,
                    config.data,
                    store,
                    model.tokenize,
                    title=f"read {title}",
                    reading=reading,
                    refuse=model.layout.unusable,
                    rejected=Path(config.run) / REJECTED,
                )
                if not any(normalise(utterance.text) for utterance in sets[title].utterances):
                    raise UserError(
                        f"data.test.{name}: {manifest}: no transcript has a word that decode.normaliser = "
                        f"{config.decode.normaliser} leaves, so nothing could be scored"
                    )
    for line in _overlaps(config):
        logger.warning(line)
    return sets


def _overlaps(config: Config) -> list[str]:
    try:
        path, absolute = resolve(config.data.train, config.data, alone=True, load=False)
        train = open_manifest(path, absolute=absolute).utterances
    except UserError:  # a run may be evaluated where its training data is not
        return []
    return overlaps(train[: config.data.limit or None], judges(config.data))


def evaluate(
    run: str | Path, overrides: list[str], which: str = "best", out: str | Path | None = None
) -> dict[str, Score]:
    """Decodes every test set of a run, with ACT if ``act.beta`` < 1; writes ``metrics.json``, ``hypotheses.jsonl`` and
    ``errors.txt``. An evaluation that was stopped goes on where it was; what was there before stays until it is whole.

    Args:
        run: the run folder.
        overrides: ``key=value`` of its config.
        which: the checkpoint.
        out: the folder of the results; by default that of :func:`~avsr.evaluation.results.results_folder`.

    Raises:
        UserError: bad input; the folder cannot be written, another process evaluates there, or ``out`` holds the result
            of other settings.
    """
    made = made_by(run, read_run_config(run, overrides), which)
    folder = results_folder(run, overrides, which) if out is None else Path(out)
    with claim(folder, METRICS, "" if out is None else "--out"):
        if out is not None:
            refuse_other(folder / METRICS, made, "name another folder with --out")
        config, model, store = load_run(run, overrides, pick_device(), which)
        if made_by(run, read_run_config(run, overrides), which) != made:
            raise UserError(f"{find_checkpoint(run, which)} or a manifest was replaced meanwhile: repeat the command")
        with calibrated(config, model) as act:
            return evaluate_model(config, model, test_sets(config, model, store), folder, act, made)


def evaluate_model(
    config: Config,
    model: SpeechLLM,
    sets: dict[str, SpeechDataset],
    folder: Path,
    act: dict[str, Any] | None = None,
    made: Row | None = None,
) -> dict[str, Score]:
    """Decodes ``sets`` with a loaded model and writes the files of :func:`evaluate` to ``folder``.

    Args:
        config: of the run.
        model: its model.
        sets: of :func:`test_sets`.
        folder: of the results.
        act: what :func:`~avsr.evaluation.act.calibrated` yields.
        made: what :func:`~avsr.evaluation.results.made_by` returns; rows of a stopped evaluation that was made by the
            same are not decoded again.
    """
    unfinished = folder / f"{HYPOTHESES}{UNFINISHED}"
    if made is None:
        unfinished.unlink(missing_ok=True)
    kept = Rows(unfinished, row_key, made)
    if kept.held:
        logger.info("%s: %d utterances are decoded already", unfinished, len(kept.held))
    scores: dict[str, Score] = {}
    rows: list[Row] = []
    result: dict[str, Any] = {}
    failed: dict[str, dict[str, int]] = {}
    normalise = normaliser(config.decode.normaliser)
    for name, dataset in sets.items():
        scores[name], part = decode_set(model, dataset, config, name, kept)
        failed[name] = failures(part)
        parts = {"by_speaker": by_speaker(part, normalise), "by_length": by_length(part, normalise)}
        result[name] = {**asdict(scores[name]), **by_normaliser(part), **failed[name], **parts}
        rows += part
    result["decoding"] = {"beams": config.decode.beams, "normaliser": config.decode.normaliser, **environment(model)}
    if act:
        result["decoding"]["act"] = act
    if made:
        result[MADE_BY] = made
    try:
        tables = "\n".join(filter(None, [confusions(rows, normalise), worst(rows, config)]))
        write_durably(folder / ERRORS, tables.encode("utf-8", errors="backslashreplace"))
        write_durably(folder / METRICS, (json.dumps(result, indent=2) + "\n").encode())
        kept.publish(folder / HYPOTHESES, rows)
    except OSError as error:
        reason = f"{error}; the same command goes on from {unfinished}"
        raise UserError(f"cannot write results to {folder}: {reason}") from error
    if line := warning(failed):
        logger.warning(line)
    logger.info("results: %s", folder)
    return scores


def worst(rows: Sequence[Row], config: Config) -> str:
    """Alignments of the utterances with the highest word error rate."""
    normalise = normaliser(config.decode.normaliser)
    rated = []
    for row in rows:
        if normalise(row["reference"]):
            rated.append((score([row["reference"]], [row["hypothesis"]], normalise).wer, row))
    rated.sort(key=lambda pair: (-pair[0], pair[1]["set"], pair[1]["id"]))
    parts = [
        f"{visible(row['set'] + '/' + row['id'])}  WER {rate:.2f}\n"
        f"{alignment(row['reference'], row['hypothesis'], normalise)}\n"
        for rate, row in rated[:WORST]
        if rate > 0
    ]
    return "\n".join(parts) or "no errors\n"


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
