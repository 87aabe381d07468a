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
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from avsr.data.manifest import write_manifest
from avsr.errors import UserError
from avsr.runtime.pool import Lost, run_jobs
from avsr.runtime.progress import ProgressBar
from avsr.tools.corpora.state import read_state, refuse_differences, refuse_foreign
from avsr.tools.corpora.synth.espeak import require_espeak
from avsr.tools.corpora.synth.options import SynthOptions, check_options, parse_options
from avsr.tools.corpora.synth.shards import SPLITS, Shard, plan_shards, render_shard

__all__ = ["FORMAT", "SynthOptions", "parse_options", "synthesise"]

logger = logging.getLogger("avsr")

FORMAT = "avsr-synth-2"  # change it with anything that changes the audio, the video or the files

# An utterance takes well under a second; the rest is for a cold start of the interpreter on a busy disk.
STALL_SECONDS = 120.0
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
        rows: dict[str, list[dict[str, Any]]] = {
            f"{name}/{split}.jsonl": []
            for name in dict.fromkeys(shard.set_name for shard in shards)
            for split in SPLITS
        }
        for manifest, row in _render(shards, options.workers):
            rows[manifest].append(row)
        for manifest, content in rows.items():
            write_manifest(out / manifest, sorted(content, key=lambda row: row["id"]))
        counts = {manifest: len(content) for manifest, content in rows.items()}
        _write_state(out / _UNFINISHED, described, counts)
        os.replace(out / _UNFINISHED, out / _FINISHED)
    except OSError as error:
        raise UserError(f"cannot write the corpus to {error.filename or out}: {error.strerror or error}") from error
    return counts


def _render(shards: list[Shard], workers: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """(manifest, row) of every utterance, in no fixed order."""
    with ProgressBar("speak", sum(len(shard.lines) for shard in shards)) as progress:
        for shard, result in run_jobs(
            render_shard, shards, workers, fresh=True, stall_seconds=STALL_SECONDS, on_tick=progress.advance
        ):
            if isinstance(result, Lost):
                advice = "run the same command again, with workers=1 if the machine is short of memory"
                raise UserError(f"a speech process {result.reason}: {advice}")
            for split, row in result:
                yield f"{shard.set_name}/{split}.jsonl", row


def _finished_corpus(out: Path, described: dict[str, Any]) -> dict[str, int] | None:
    """The utterance counts of the corpus in ``out``; None if there is to be one.

    Raises:
        UserError: the folder holds something else.
    """

    def parse(state: Any) -> tuple[dict[str, Any], dict[str, int]]:
        counts = {str(name): int(count) for name, count in state["utterances"].items()}
        return {"format": state["format"], **state["options"]}, counts

    state = read_state(out / _FINISHED, "synth", parse)
    if state is None:
        if not (out / _UNFINISHED).exists():
            refuse_foreign(out)
        return None
    held, counts = state
    refuse_differences(out, held, {"format": FORMAT, **described})
    missing = [name for name in counts if not os.path.isfile(out / name)]
    if missing:
        raise UserError(f"the corpus in {out} is damaged, {missing[0]} is missing: delete the folder and run again")
    return counts


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
