"""``avsr evaluate RUN`` and ``avsr transcribe RUN FILE...``."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from avsr.config import TASKS, Config
from avsr.data.batches import Example
from avsr.data.clip import VIDEO_SUFFIXES
from avsr.data.dataset import REJECTED, Reading, SpeechDataset, load_dataset
from avsr.data.features import FeatureStore
from avsr.data.manifest import Utterance, read_manifest
from avsr.data.mouth.single import mouth_video
from avsr.data.noise import CLEAN
from avsr.data.overlap import judges, overlaps
from avsr.data.transforms import Version
from avsr.errors import UserError, visible
from avsr.evaluation.act import calibrated
from avsr.evaluation.breakdown import by_length, by_speaker
from avsr.evaluation.decode import Hypothesis, transcribe
from avsr.evaluation.wer import Score, alignment, normaliser, score
from avsr.models.build import load_run, pick_device
from avsr.models.speech_llm import SpeechLLM
from avsr.runtime.progress import ProgressBar

logger = logging.getLogger("avsr")
WORST = 20  # utterances shown in errors.txt


def decode_set(
    model: SpeechLLM, dataset: SpeechDataset, config: Config, name: str
) -> tuple[Score, list[dict[str, Any]]]:
    """Decodes a dataset. Returns its score and one row per utterance (set, id, speaker, seconds, reference, hypothesis;
    with ``decode.nbest`` > 1 also nbest, a list of text and score, best first)."""
    found: dict[int, list[Hypothesis]] = {}
    seconds = [utterance.duration for utterance in dataset.utterances]
    with ProgressBar(f"decode {name}", len(dataset)) as bar:
        for index, best in transcribe(model, dataset.__getitem__, seconds, config.decode):
            found[index] = best
            bar.advance()
    rows: list[dict[str, Any]] = [
        {
            "set": name,
            "id": utterance.id,
            "speaker": utterance.speaker,
            "seconds": utterance.duration,
            "reference": utterance.text,
            "hypothesis": found[index][0].text,
        }
        for index, utterance in enumerate(dataset.utterances)
    ]
    if config.decode.nbest > 1:
        for index, row in enumerate(rows):
            row["nbest"] = [hypothesis._asdict() for hypothesis in found[index]]
    references, hypotheses = [row["reference"] for row in rows], [row["hypothesis"] for row in rows]
    return score(references, hypotheses, normaliser(config.decode.normaliser)), rows


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
        train = read_manifest(config.data.train, on_bad=lambda line: None, absolute=config.data.allow_absolute)
    except UserError:  # a run may be evaluated where its training data is not
        return []
    return overlaps(train[: config.data.limit or None], judges(config.data))


def evaluate(run: str | Path, overrides: list[str], which: str = "best") -> dict[str, Score]:
    """Decodes every test set of a run, with ACT if ``act.beta`` < 1; writes ``metrics.json``, ``hypotheses.jsonl``
    and ``errors.txt``."""
    config, model, store = load_run(run, overrides, pick_device(), which)
    with calibrated(config, model) as act:
        return evaluate_model(config, model, test_sets(config, model, store), Path(run), act)


def evaluate_model(
    config: Config,
    model: SpeechLLM,
    sets: dict[str, SpeechDataset],
    folder: Path,
    act: dict[str, Any] | None = None,
) -> dict[str, Score]:
    """Decodes ``sets`` with a loaded model and writes the files of :func:`evaluate` to ``folder``; ``act`` is what
    :func:`~avsr.evaluation.act.calibrated` yields."""
    scores: dict[str, Score] = {}
    rows: list[dict[str, Any]] = []
    result: dict[str, Any] = {}
    normalise = normaliser(config.decode.normaliser)
    for name, dataset in sets.items():
        scores[name], part = decode_set(model, dataset, config, name)
        parts = {"by_speaker": by_speaker(part, normalise), "by_length": by_length(part, normalise)}
        result[name] = {**asdict(scores[name]), **parts}
        rows += part
    decoding: dict[str, Any] = {"beams": config.decode.beams, "normaliser": config.decode.normaliser}
    if act:
        decoding["act"] = act
    try:
        (folder / "metrics.json").write_text(json.dumps({**result, "decoding": decoding}, indent=2) + "\n")
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / "hypotheses.jsonl").write_text(lines, encoding="utf-8")
        (folder / "errors.txt").write_text(worst(rows, config), encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write results to {folder}: {error}") from error
    return scores


def worst(rows: list[dict[str, Any]], config: Config) -> str:
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


def transcribe_files(run: str | Path, files: list[str], overrides: list[str]) -> list[tuple[str, str | UserError]]:
    """Transcribes files: (file, text) in order, with the error instead of a text for an unusable file.

    Of a video file the mouth frames, the sound or both are used, as the run's task needs; from a whole face the mouth
    is cropped first.
    """
    config, model, store = load_run(run, overrides, pick_device(), single=True)
    task = (config.decode.tasks or [config.model.task])[0]
    results: dict[int, str | UserError] = {}
    examples: list[tuple[int, Example]] = []
    for index, name in enumerate(files):
        try:
            examples.append((index, _example(name, task, model, store)))
        except UserError as error:
            results[index] = error
    seconds = [example.utterance.duration for _, example in examples]
    with calibrated(config, model):
        for place, hypotheses in transcribe(model, lambda i: examples[i][1], seconds, config.decode):
            results[examples[place][0]] = hypotheses[0].text
    return [(name, results[index]) for index, name in enumerate(files)]


def _example(name: str, task: str, model: SpeechLLM, store: FeatureStore) -> Example:
    path = Path(name).resolve()
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
