"""``avsr synth``: writes a corpus of synthetic speech, with the drawn mouths of its speakers.

``OUT/SET/SPLIT.jsonl`` are the manifests, for the sets ``grid`` and ``open`` and the splits ``train``,
``validation``, ``test_sentences`` (known voices, new sentences) and ``test_voices`` (new voices and sentences).
The audio is in ``OUT/SET/audio/SPEAKER/ID.wav``, the video in ``OUT/SET/video/SPEAKER/ID.mp4``, the times of words and
phonemes are in ``OUT/SET/times/SPEAKER/ID.json``. ``OUT/corpus.json`` has the options and is written last; until then
``OUT/corpus.json.part`` marks unfinished work.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from avsr.data.manifest import write_manifest
from avsr.errors import UserError
from avsr.runtime.machine import cpus
from avsr.runtime.progress import ProgressBar
from avsr.tools.synth.espeak import require_espeak
from avsr.tools.synth.options import SynthOptions, check_options, parse_options
from avsr.tools.synth.pool import run_jobs
from avsr.tools.synth.shards import SPLITS, plan_shards, render_shard

__all__ = ["FORMAT", "SynthOptions", "parse_options", "synthesise"]

logger = logging.getLogger("avsr")

FORMAT = "avsr-synth-2"  # change it with anything that changes the audio, the video or the files

_FINISHED, _UNFINISHED = "corpus.json", "corpus.json.part"


def synthesise(out: str | Path, options: SynthOptions) -> dict[str, int]:
    """Makes the corpus, unless ``out`` has it already.

    The same options give the same bytes, whatever the number of workers. A script that calls this needs the
    usual ``if __name__ == "__main__"``, because it starts processes.

    Args:
        out: the folder; new, empty, with the same corpus, or with an unfinished one (which is made again).
        options: what to make.

    Returns:
        The number of utterances of each manifest, by its path in ``out`` ("grid/train.jsonl").

    Raises:
        UserError: bad options, eSpeak NG is missing or fails, ``out`` holds something else or cannot be
            written.
    """
    out = Path(out).absolute()
    check_options(options)
    described = {name: value for name, value in asdict(options).items() if name != "workers"}
    try:
        found = _finished_corpus(out, described)
        if found is not None:
            logger.info("%s already holds this corpus (%d utterances), nothing to do", out, sum(found.values()))
            return found
        require_espeak()
        _start(out, described)
        shards = plan_shards(out, options)
        workers = min(options.workers or cpus(), len(shards))
        with ProgressBar("speak", sum(len(shard.lines) for shard in shards)) as progress:
            rendered = run_jobs(render_shard, shards, workers, progress.advance)
        rows: dict[str, list[dict[str, Any]]] = {
            f"{name}/{split}.jsonl": []
            for name in dict.fromkeys(shard.set_name for shard in shards)
            for split in SPLITS
        }
        for shard, result in zip(shards, rendered, strict=True):
            for split, row in result:
                rows[f"{shard.set_name}/{split}.jsonl"].append(row)
        for manifest, content in rows.items():
            write_manifest(out / manifest, sorted(content, key=lambda row: row["id"]))
        counts = {manifest: len(content) for manifest, content in rows.items()}
        _write_state(out / _UNFINISHED, described, counts)
        os.replace(out / _UNFINISHED, out / _FINISHED)
    except OSError as error:
        raise UserError(f"cannot write the corpus to {error.filename or out}: {error.strerror or error}") from error
    return counts


def _finished_corpus(out: Path, described: dict[str, Any]) -> dict[str, int] | None:
    """The utterance counts of the corpus in ``out``; None if there is to be one.

    Raises:
        UserError: the folder holds something else.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    advice = "choose another folder or delete this one"
    if not out.is_dir():
        raise UserError(f"{out} is not a folder: choose another one")
    if not (out / _FINISHED).exists():
        if (out / _UNFINISHED).exists():
            return None
        raise UserError(f"{out} holds something else ({_some_names(out)}): {advice}")
    try:
        state = json.loads((out / _FINISHED).read_text(encoding="utf-8"))
        format_version, options = state["format"], dict(state["options"])
        counts = {str(name): int(count) for name, count in state["utterances"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        raise UserError(f"{out / _FINISHED} is not of a corpus made by synth: {advice}") from None
    if format_version != FORMAT:
        raise UserError(f"{out} holds a corpus of the format {format_version!r}, not {FORMAT!r}: {advice}")
    different = [
        f"{name} is {options.get(name)} there, not {value}"
        for name, value in described.items()
        if options.get(name) != value
    ]
    if different:
        raise UserError(f"{out} holds a corpus with other options ({'; '.join(different)}): {advice}")
    missing = [name for name in counts if not os.path.isfile(out / name)]
    if missing:
        raise UserError(f"the corpus in {out} is damaged, {missing[0]} is missing: delete the folder and run again")
    return counts


def _some_names(out: Path) -> str:
    names = sorted(path.name for path in out.iterdir())
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _start(out: Path, described: dict[str, Any]) -> None:
    """Marks ``out`` as unfinished and removes what an earlier, unfinished run wrote."""
    out.mkdir(parents=True, exist_ok=True)
    _write_state(out / _UNFINISHED, described, {})
    for set_name in ("grid", "open"):
        for kind in ("audio", "video", "times"):
            if (out / set_name / kind).exists():
                shutil.rmtree(out / set_name / kind)
        for split in SPLITS:
            (out / set_name / f"{split}.jsonl").unlink(missing_ok=True)


def _write_state(path: Path, described: dict[str, Any], counts: dict[str, int]) -> None:
    state = {"format": FORMAT, "options": described, "utterances": counts}
    path.write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
