"""``avsr analyze TARGET...``: ``analysis.json`` and ``report.html`` of runs or of plain language models."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from avsr.config import Config, read_run_config, to_yaml
from avsr.data.dataset import SpeechDataset
from avsr.data.noise import CLEAN
from avsr.errors import UserError
from avsr.evaluation.results import ERRORS, MADE_BY, METRICS, made_by, refuse_other, results_folder
from avsr.evaluation.run import test_sets
from avsr.models.build import load_run, pick_device
from avsr.models.speech_llm import SpeechLLM
from avsr.runtime.folders import write_durably
from avsr.runtime.locks import claim
from avsr.runtime.machine import enough_memory
from avsr.tools.analysis.causal import causal_test
from avsr.tools.analysis.collect import collect
from avsr.tools.analysis.composite import ASKED, Media, load_media_subject
from avsr.tools.analysis.encoder_inputs import KINDS as ENCODERS
from avsr.tools.analysis.example import examine_row
from avsr.tools.analysis.features import feature_sets
from avsr.tools.analysis.figures import Run
from avsr.tools.analysis.inputs import (
    check_attention,
    load_text_subject,
    parse_model_options,
    read_texts,
    speech_subject,
)
from avsr.tools.analysis.origin import Untraceable, trace_origin
from avsr.tools.analysis.report import write_report
from avsr.tools.analysis.statistics import measure_tokens
from avsr.tools.analysis.subject import Subject
from avsr.training.metrics import read_metrics

Measure = Callable[[], dict[str, Any]]
RUN, MODEL = "run", "language model"
TRACED, TURNED = 32, 16  # rows of all lengths in which causes are traced, and in which states are rotated
ANALYSIS = "analysis.json"
MODELS_OUT = "runs/analysis"  # folder of the reports of models, which have none of their own


def analyze(
    targets: list[str],
    overrides: list[str],
    out: str | None = None,
    text: str | None = None,
    media: Media | None = None,
) -> Path:
    """Analyzes one target or several side by side; returns the report's path.

    Args:
        targets: run folders, over their first test set, task and noise level; or language models (hub id, folder, .gguf
            file, ``package:NAME/path``), over plain text. A target named twice counts once.
        overrides: ``key=value``: of a run's config, or a model's (``model.llm.bos_token``, ``model.llm.eos_token``,
            ``limit``).
        out: folder of both files; by default that of the first run's results with these ``overrides`` (see
            :func:`~avsr.evaluation.results.results_folder`), or ``runs/analysis/NAME`` of a model.
        text: a file with one text a line, for models.
        media: a file that a speech or vision language model reads instead, in its own chat template.

    Raises:
        UserError: a target is neither, cannot be analyzed, or cannot be compared with the first; the folder cannot be
            written, another process writes its report, or ``out`` holds that of runs with other settings.
    """
    by_path: dict[str, str] = {}
    for target in targets:
        by_path.setdefault(os.path.realpath(target), target)
    targets = list(by_path.values())
    kinds = {kind_of(target) for target in targets}
    if len(kinds) > 1:
        raise UserError("a run and a language model cannot be compared: one reads speech, the other plain text")
    kind = kinds.pop()
    if kind == RUN and media is not None:
        raise UserError(f"--{media.kind} {media.file}: runs read their test set; such a file is for language models")
    if media is not None and (text is not None or overrides):
        raise UserError(f"--{media.kind} {media.file}: expected neither --text nor key=value beside it")
    if kind == RUN and text is not None:
        raise UserError(f"--text {text}: runs read their test set; a text file is for language models")
    if out:
        folder = Path(out)
    else:
        folder = results_folder(targets[0], overrides) if kind == RUN else Path(MODELS_OUT, name_of(targets[0]))
    advice = "lower training.frames, those of a batch" if kind == RUN else "give it shorter input"
    with claim(folder, ANALYSIS, "--out" if out else ""):
        if out and kind == RUN:
            _refuse_replacing(folder / ANALYSIS, targets, overrides)
        analyses: list[Run] = []
        for target in targets:
            label = run_label(target, targets)
            with enough_memory(f"analyzing {target}", advice):
                if media is not None:
                    identity, measure = _open_media(target, media)
                elif kind == RUN:
                    identity, measure = _open_run(target, overrides)
                else:
                    identity, measure = _open_model(target, overrides, text)
                if analyses:
                    refuse_unlike(analyses[0], (label, identity))
                analyses.append((label, measure()))
            del measure  # with its model, before the next one is loaded
        return write_results(folder, analyses)


def _refuse_replacing(path: Path, runs: list[str], overrides: list[str]) -> None:
    labels = {run_label(run, runs) for run in runs}
    try:
        there = set(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):  # what cannot be read is judged below
        there = labels
    if there != labels:
        raise UserError(f"{path} is the report of {', '.join(sorted(there))}: name another folder with --out")
    for run in runs:
        made = made_by(run, read_run_config(run, overrides))
        refuse_other(path, made, "name another folder with --out", run_label(run, runs))


def kind_of(target: str) -> str:
    """``RUN`` or ``MODEL``, by the contents of the folder or the form of the name.

    Raises:
        UserError: a folder that is neither, or a name that can be neither.
    """
    path = Path(target)
    if target.partition(":")[0] in ENCODERS and not path.exists():
        raise UserError(f"{target} is a speech encoder: analyze it with --encoder --manifest FILE.jsonl")
    if (path / "config.yaml").is_file():
        return RUN
    if path.is_dir() and not (path / "config.json").is_file():
        raise UserError(
            f"{target} is neither a run nor a model: it has neither config.yaml nor config.json "
            "(train a run with 'avsr train CONFIG')"
        )
    named = target.startswith("package:") or (target.count("/") == 1 and target[0] not in "./~")
    if named and not path.exists() and path.parent.is_dir():
        raise UserError(f"{target} is neither a run nor a model: nothing of this name is in {path.parent}")
    if path.exists() or named or path.suffix == ".gguf":
        return MODEL
    raise UserError(f"{target} is neither a run nor a model: no such folder, and not a hub id")


def analyze_subject(subject: Subject) -> dict[str, Any]:
    """Every measurement of a subject, plain numbers; a new one adds its key here and its section to
    ``avsr.tools.analysis.sections.SECTIONS``.

    ``origin`` and ``causal`` are missing where they cannot follow the decoder's layers; ``untraced`` says why.
    ``traced`` is the number of rows behind ``origin`` and ``features``, ``turned`` that behind ``causal``.
    """
    analysis, example = collect(subject)
    analysis["example"] = examine_row(subject, example)
    if subject.layers > 1:
        part = subject.spread(TRACED)
        seen = measure_tokens(part)
        analysis["traced"] = part.count
        analysis["features"] = feature_sets(part, seen)
        try:
            analysis["origin"] = trace_origin(part, seen)
        except Untraceable as error:
            analysis["untraced"] = str(error)
        else:
            few = part.spread(TURNED)
            analysis["turned"] = few.count
            analysis["causal"] = causal_test(few, origin=analysis["origin"])
    return analysis


def analyze_model(
    config: Config, model: SpeechLLM, dataset: SpeechDataset, run: Path, results: Path | None = None
) -> dict[str, Any]:
    """Statistics of a loaded run with its curve, and the scores and errors in the folder ``results`` (default: the
    run's), as far as there are any.

    Raises:
        UserError: ``metrics.json`` is damaged, or a file cannot be read.
    """
    results = results or run
    held = {"curve": read_metrics(run), "scores": _scores(results)}
    errors = results / ERRORS
    held["errors"] = errors.read_text(encoding="utf-8", errors="replace") if errors.is_file() else ""
    subject = speech_subject(model, dataset, config)
    analysis: dict[str, Any] = {"identity": _run_identity(subject, config, dataset)} | analyze_subject(subject)
    analysis["settings"] = to_yaml(config)
    analysis["lambda"], analysis["margin"] = config.loss.decorrelation, config.loss.margin
    return analysis | held


def _scores(results: Path) -> dict[str, Any]:
    """By test set what ``metrics.json`` says, as far as there is one."""
    path = results / METRICS
    if not path.is_file():
        return {}
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a readable JSON file ('avsr evaluate' writes a new one): {error}") from error
    if not isinstance(held, dict):
        raise UserError(f"{path}: expected an object with a key for every test set, got {type(held).__name__}")
    sets = {name: value for name, value in held.items() if isinstance(value, dict) and "wer" in value}
    for name, value in sets.items():
        if not isinstance(value["wer"], int | float) or abs(value["wer"]) > sys.float_info.max:
            raise UserError(f"{path}: {name}: wer is not a number; 'avsr evaluate' writes a new file")
    return sets


def _open_run(run: str, overrides: list[str]) -> tuple[dict[str, Any], Measure]:
    """The identity of a run's first test set, task and noise level, and what analyzes it."""
    made, results = made_by(run, read_run_config(run, overrides)), results_folder(run, overrides)
    config, model, store = load_run(run, overrides, pick_device())
    config.data.test = dict(list(config.data.test.items())[:1])
    config.decode.tasks, config.noise.snr = config.decode.tasks[:1], config.noise.snr[:1]
    dataset = next(iter(test_sets(config, model, store).values()))
    identity = _run_identity(speech_subject(model, dataset, config), config, dataset)
    return identity, lambda: {MADE_BY: made} | analyze_model(config, model, dataset, Path(run), results)


def _open_model(name: str, overrides: list[str], file: str | None) -> tuple[dict[str, Any], Measure]:
    """The same of a language model over the texts of a file."""
    options = parse_model_options(overrides)
    texts = read_texts(file, options.limit)
    subject = load_text_subject(name, texts, options, pick_device())
    source = file or "100 fixed sentences"
    identity = _identity(subject, "plain text", "none", source, texts)
    return identity, lambda: {"identity": identity} | analyze_subject(subject)


def _open_media(name: str, media: Media) -> tuple[dict[str, Any], Measure]:
    """The same of a speech or vision language model over a file."""
    subject = load_media_subject(name, media, pick_device())
    check_attention(name, subject)
    digest = hashlib.sha256(Path(media.file).read_bytes()).hexdigest()
    identity = _identity(subject, media.kind, "none", media.file, [digest, ASKED[media.kind]])
    return identity, lambda: {"identity": identity} | analyze_subject(subject)


def refuse_unlike(first: Run, second: Run) -> None:
    """Raises a ``UserError`` that says why the analysis ``first`` and a subject of the identity ``second`` cannot be
    compared: other sizes of the language model, another task, other noise, other data."""
    ours, theirs = first[1]["identity"], second[1]
    refused = f"{first[0]} and {second[0]} cannot be compared"
    for key, what in (
        ("layers", "decoder layers"),
        ("hidden_size", "hidden size"),
        ("heads", "attention heads"),
        ("reads", "input"),
        ("noise", "noise"),
    ):
        if ours[key] != theirs[key]:
            raise UserError(f"{refused}: {what} {ours[key]} and {theirs[key]}")
    if ours["digest"] != theirs["digest"]:
        raise UserError(f"{refused}: they read different data ({ours['data']} and {theirs['data']})")


def _run_identity(subject: Subject, config: Config, dataset: SpeechDataset) -> dict[str, Any]:
    snr = dataset.reading.version.snr
    noise = "none" if snr == CLEAN else f"at {snr:g} dB"
    data = next(iter(config.data.test.values()), "")
    lines = [f"{u.id}\t{u.duration}\t{u.text}" for u in dataset.utterances]
    return _identity(subject, dataset.reading.task, noise, data, lines)


def _identity(subject: Subject, reads: str, noise: str, data: str, lines: list[str]) -> dict[str, Any]:
    config = subject.decoder.config
    return {
        "layers": subject.layers,
        "hidden_size": int(config.hidden_size),
        "heads": int(config.num_attention_heads),
        "reads": reads,
        "noise": noise,
        "data": data,
        "digest": hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16],
    }


def write_results(
    folder: Path, analyses: list[Run], page: Callable[[Path, list[Run], str], None] | None = None
) -> Path:
    """Writes both files to ``folder``, the report by ``page`` (default: that of runs), and returns its path."""
    names = " and ".join(name for name, _ in analyses)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_durably(folder / ANALYSIS, (json.dumps(dict(analyses), indent=1) + "\n").encode())
        (page or write_report)(folder / "report.html", analyses, f"Attention sinks: {names}")
    except OSError as error:
        raise UserError(f"cannot write the report to {folder}: {error}") from error
    return folder / "report.html"


def run_label(run: str, runs: list[str]) -> str:
    """The folder's or model's name, or the whole path where two share one."""
    return name_of(run) if [name_of(other) for other in runs].count(name_of(run)) == 1 else run


def name_of(target: str) -> str:
    """The last part of its path, also of "."."""
    return Path(target).resolve().name
