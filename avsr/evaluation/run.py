"""``avsr evaluate RUN``, by one process or by the ranks of ``deepspeed --module avsr.evaluate RUN``."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Container, Hashable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from avsr.config import Config, read_run_config
from avsr.data.dataset import REJECTED, Reading, SpeechDataset, load_dataset
from avsr.data.features import FeatureStore
from avsr.data.foreign import resolve
from avsr.data.index import open_manifest
from avsr.data.noise import CLEAN
from avsr.data.overlap import judges, overlaps
from avsr.data.transforms import Version
from avsr.errors import UserError, visible
from avsr.evaluation.act import calibrated
from avsr.evaluation.breakdown import by_length, by_normaliser, by_speaker
from avsr.evaluation.confusions import confusions
from avsr.evaluation.decode import groups, transcribe
from avsr.evaluation.failures import failures, loops, warning
from avsr.evaluation.ranks import Keyed, drop_others, from_first, open_rows, place, whole
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
from avsr.models.build import load_run, pick_device
from avsr.models.speech_llm import SpeechLLM
from avsr.models.weights import find_checkpoint
from avsr.runtime.folders import write_durably
from avsr.runtime.locks import claim, unwinding
from avsr.runtime.progress import ProgressBar
from avsr.runtime.rows import Row, Rows

logger = logging.getLogger("avsr")
WORST = 20  # utterances shown in errors.txt
Enter = Callable[[str], None]


def decode_set(
    model: SpeechLLM, dataset: SpeechDataset, config: Config, name: str, kept: Rows | None = None
) -> tuple[Score, list[Row]]:
    """Decodes a dataset alone. Returns its score and one row per utterance, as of :func:`decode_share` without
    ``TIMES``. ``kept`` gets every row as it comes; what it holds is not decoded again."""
    held = {} if kept is None else kept.held
    own = decode_share(model, dataset, config, name, kept, held)
    return _scored(dataset, config, name, {**held, **own})


def decode_share(
    model: SpeechLLM,
    dataset: SpeechDataset,
    config: Config,
    name: str,
    kept: Rows | None,
    done: Container[Hashable],
    share: tuple[int, int] = (0, 1),
) -> Keyed:
    """Decodes one rank's share of a dataset.

    Args:
        model: decodes.
        dataset: all of it.
        config: of the run.
        name: of the set.
        kept: gets every row as it comes.
        done: keys of what is not decoded again, of any rank.
        share: (rank, number of ranks).

    Returns:
        By key, one row per utterance (set, id, speaker, seconds, reference, hypothesis, cut as in
        :class:`~avsr.evaluation.decode.Hypothesis`, loop; with ``decode.nbest`` > 1 also nbest, a list of text, score
        and cut, best first), with its ``TIMES``.
    """
    left = [(index, u) for index, u in enumerate(dataset.utterances) if (name, u.id) not in done]
    seconds = [utterance.duration for _, utterance in left]
    rank, ranks = share
    mine = sum(map(len, groups(seconds, config.decode.batch)[rank::ranks]))
    before = len(dataset) - len(left)
    title = f"decode {name}" + (f", rank {rank} of {ranks}" if ranks > 1 else "")
    rows: Keyed = {}
    with ProgressBar(title, before + mine, done=before, shown=rank == 0) as bar:
        decoded = timed(transcribe(model, lambda i: dataset[left[i][0]], seconds, config.decode, share))
        for number, ((index, best), took) in enumerate(decoded):
            utterance = left[index][1]
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
            rows[row_key(row)] = row
            bar.advance()
    return rows


def _scored(dataset: SpeechDataset, config: Config, name: str, rows: Keyed) -> tuple[Score, list[Row]]:
    """The score of a dataset, and its rows in order without ``TIMES``."""
    found = [rows[name, utterance.id] for utterance in dataset.utterances]
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
        raise UserError(f"data.test: the config of {config.run} names no manifest to evaluate on (data.test.NAME=PATH)")
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
    if place()[0] == 0:
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
    run: str | Path,
    overrides: list[str],
    which: str = "best",
    out: str | Path | None = None,
    enter: Enter = lambda stage: None,
) -> dict[str, Score]:
    """Decodes every test set of a run, with ACT if ``act.beta`` < 1; writes ``metrics.json``, ``hypotheses.jsonl`` and
    ``errors.txt``. An evaluation that was stopped goes on where it was; what was there before stays until it is whole.

    The ranks of a process group share the decoding. They need the same run folder, which rank 0 locks and writes; all
    return its scores.

    Args:
        run: the run folder.
        overrides: ``key=value`` of its config.
        which: the checkpoint.
        out: the folder of the results; by default that of :func:`~avsr.evaluation.results.results_folder`.
        enter: called with every stage of :data:`avsr.training.watchdog.STAGES` that begins.

    Raises:
        UserError: bad input; the folder cannot be written, another process evaluates there, or ``out`` holds the result
            of other settings.
    """
    with ExitStack() as held:

        def begin() -> tuple[Row, Path]:
            made = made_by(run, read_run_config(run, overrides), which)
            folder = results_folder(run, overrides, which) if out is None else Path(out)
            held.enter_context(claim(folder, METRICS, "" if out is None else "--out"))
            if out is not None:
                refuse_other(folder / METRICS, made, "name another folder with --out")
            return made, folder

        if place()[0]:
            held.enter_context(unwinding())  # which claim does on rank 0
        enter("run folder")
        made, folder = from_first(begin)
        enter("model")
        config, model, store = load_run(run, overrides, pick_device(), which)
        if made_by(run, read_run_config(run, overrides), which) != made:
            raise UserError(f"{find_checkpoint(run, which)} or a manifest was replaced meanwhile: repeat the command")
        with calibrated(config, model) as act:
            enter("manifests")
            sets = test_sets(config, model, store)
            enter("decoding")
            return evaluate_model(config, model, sets, folder, act, made, enter)


def evaluate_model(
    config: Config,
    model: SpeechLLM,
    sets: dict[str, SpeechDataset],
    folder: Path,
    act: dict[str, Any] | None = None,
    made: Row | None = None,
    enter: Enter = lambda stage: None,
) -> dict[str, Score]:
    """Decodes ``sets`` with a loaded model and writes the files of :func:`evaluate` to ``folder``. Collective.

    Args:
        config: of the run.
        model: its model.
        sets: of :func:`test_sets`.
        folder: of the results.
        act: what :func:`~avsr.evaluation.act.calibrated` yields.
        made: what :func:`~avsr.evaluation.results.made_by` returns; rows of a stopped evaluation that was made by the
            same are not decoded again.
        enter: as in :func:`evaluate`.
    """
    share = place()
    kept, done = open_rows(folder / f"{HYPOTHESES}{UNFINISHED}", made)
    if done and share[0] == 0:
        logger.info("%s: %d utterances are decoded already", kept.path, len(done))
    own: Keyed = {} if share[0] else dict(kept.held)
    for name, dataset in sets.items():
        own |= decode_share(model, dataset, config, name, kept, done, share)
    enter("results")
    rows = whole(((name, u.id) for name, dataset in sets.items() for u in dataset.utterances), own)
    about = {**environment(model), **({"act": act} if act else {})}
    return from_first(lambda: _write_results(config, sets, kept, rows, about, made))


def _write_results(
    config: Config, sets: dict[str, SpeechDataset], kept: Rows, found: Keyed, about: Row, made: Row | None
) -> dict[str, Score]:
    """Writes what :func:`evaluate` says next to ``kept``, which is deleted; ``about`` goes under "decoding"."""
    folder = kept.path.parent
    scores: dict[str, Score] = {}
    rows: list[Row] = []
    result: dict[str, Any] = {}
    failed: dict[str, dict[str, int]] = {}
    normalise = normaliser(config.decode.normaliser)
    for name, dataset in sets.items():
        scores[name], part = _scored(dataset, config, name, found)
        failed[name] = failures(part)
        parts = {"by_speaker": by_speaker(part, normalise), "by_length": by_length(part, normalise)}
        result[name] = {**asdict(scores[name]), **by_normaliser(part), **failed[name], **parts}
        rows += part
    result["decoding"] = {"beams": config.decode.beams, "normaliser": config.decode.normaliser, **about}
    if made:
        result[MADE_BY] = made
    try:
        tables = "\n".join(filter(None, [confusions(rows, normalise), worst(rows, config)]))
        write_durably(folder / ERRORS, tables.encode("utf-8", errors="backslashreplace"))
        write_durably(folder / METRICS, (json.dumps(result, indent=2) + "\n").encode())
        kept.publish(folder / HYPOTHESES, rows)
        drop_others(kept.path)
    except OSError as error:
        reason = f"{error}; the same command goes on from {kept.path}"
        raise UserError(f"cannot write results to {folder}: {reason}") from error
    if line := warning(failed):
        logger.warning(line)
    logger.info("results: %s", folder)
    return scores


def score_lines(scores: Mapping[str, Score]) -> list[str]:
    """What the command prints: a line for every test set."""
    lines = []
    for name, found in scores.items():
        counts = f"{found.utterances} utterances, {found.words} words"
        note = " without encoders" if found.rtfx_without_encoders else ""
        speed = "" if found.rtfx is None else f"  RTFx {found.rtfx:.4g}{note}"
        lines.append(f"{visible(name)}: WER {found.wer:.4f}  CER {found.cer:.4f}{speed}  ({counts})")
    return lines


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
