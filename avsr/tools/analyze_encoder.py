"""``avsr analyze KIND:NAME... --encoder``: attention sinks and massive activations inside speech encoders."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

from avsr.errors import UserError
from avsr.models.build import pick_device
from avsr.models.sources import PACKAGE
from avsr.runtime.locks import claim
from avsr.runtime.machine import enough_memory
from avsr.tools.analysis.encoder_collect import collect_frames
from avsr.tools.analysis.encoder_inputs import (
    WHISPER,
    EncoderOptions,
    choose_clips,
    measure_clips,
    open_encoder,
    parse_encoder_options,
    split_target,
)
from avsr.tools.analysis.encoder_sections import SECTIONS
from avsr.tools.analysis.figures import Run
from avsr.tools.analysis.report import write_page
from avsr.tools.analyze import ANALYSIS, MODELS_OUT, name_of, write_results


def analyze_encoders(targets: list[str], overrides: list[str], manifest: str | None, out: str | None = None) -> Path:
    """Analyzes speech encoders over the clips of a manifest; returns the report's path.

    A Whisper is analyzed twice: over a clip's own frames, as this project encodes it, and padded to 30 s as by Hugging
    Face.

    Args:
        targets: ``whisper:NAME``, ``wavlm:NAME`` or ``avhubert:NAME``; NAME as ``model.audio.encoder.name``.
        overrides: ``limit=N`` and, for AV-HuBERT, ``stream=audio``, ``video`` or ``fused``.
        manifest: a manifest or a dataset, whose texts are not read.
        out: folder of both files, by default ``runs/analysis/KIND-NAME``.

    Raises:
        UserError: a target is no encoder or is missing, the manifest is missing or has no clip of the right length, or
            a clip cannot be read.
    """
    options = parse_encoder_options(overrides)
    targets = list(dict.fromkeys(targets))
    kinds = [split_target(target) for target in targets]
    if manifest is None:
        raise UserError("--encoder: give the clips that it hears, with --manifest FILE.jsonl (one of any corpus)")
    folder = Path(out) if out else Path(MODELS_OUT, re.sub(r"[ /:]", "-", _label(targets[0], targets)))
    with claim(folder, ANALYSIS, "--out" if out else ""):
        analyses: list[Run] = []
        for target, (kind, _) in zip(targets, kinds, strict=True):
            with enough_memory(f"analyzing {target}", "give it shorter clips"):
                label = _label(target, targets)
                analyses.append((label, _analyze(target, options, manifest, padded=False)))
                if kind == WHISPER:
                    analyses.append((f"{label}, padded", _analyze(target, options, manifest, padded=True)))
        return write_results(folder, analyses, lambda path, runs, title: write_page(path, runs, title, SECTIONS))


def _analyze(target: str, options: EncoderOptions, manifest: str, *, padded: bool) -> dict[str, Any]:
    encoder = open_encoder(target, options, pick_device(), padded=padded)
    utterances = choose_clips(manifest, encoder, options.limit)
    found = collect_frames(measure_clips(encoder, utterances))
    lines = "\n".join(f"{u.id}\t{u.duration}" for u in utterances)
    identity = {
        "encoder": encoder.identity,
        "layers": found["layers"],
        "heads": len(found["heads"]["multiple"][0]),
        "hidden_size": encoder.width,
        "frames_per_second": encoder.frames_per_second,
        "padded": padded,
        "reads": options.stream,
        "data": manifest,
        "digest": hashlib.sha256(lines.encode()).hexdigest()[:16],
    }
    return {"identity": identity, **found}


def _label(target: str, targets: list[str]) -> str:
    """Kind and last part of the name, of a package its own too; or the whole target where two share them."""
    short = {}
    for one in targets:
        kind, name = split_target(one)
        short[one] = f"{kind} {name[len(PACKAGE) :] if name.startswith(PACKAGE) else name_of(name)}"
    return short[target] if list(short.values()).count(short[target]) == 1 else target
