"""``avsr synth``: writes a corpus of synthetic speech, with the drawn mouths of its speakers.

``OUT/SET/SPLIT.jsonl`` are the manifests, for the sets ``grid`` and ``open`` and the splits ``train``,
``validation``, ``test_sentences`` (known voices, new sentences) and ``test_voices`` (new voices and sentences).
The audio is in ``OUT/SET/audio/SPEAKER/ID.wav``, the video in ``OUT/SET/video/SPEAKER/ID.mp4``, the times of words and
phonemes are in ``OUT/SET/times/SPEAKER/ID.json``. ``OUT/corpus.json`` has the options and is written last; until then
``OUT/corpus.json.part`` has them, and ``OUT/progress.jsonl`` the finished shards, from which a later run goes on.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from avsr.data.manifest import write_manifest
from avsr.errors import UserError
from avsr.runtime.folders import write_durably
from avsr.runtime.locks import claim
from avsr.runtime.pool import Lost, run_jobs
from avsr.runtime.progress import ProgressBar
from avsr.runtime.rows import Rows
from avsr.tools.corpora.state import read_state, refuse_differences, refuse_foreign
from avsr.tools.corpora.synth.espeak import require_espeak
from avsr.tools.corpora.synth.options import SynthOptions, check_options, parse_options
from avsr.tools.corpora.synth.shards import SPLITS, Shard, is_whole, plan_shards, render_shard

__all__ = ["FORMAT", "SynthOptions", "parse_options", "synthesise"]

logger = logging.getLogger("avsr")

FORMAT = "avsr-synth-2"  # change it with anything that changes the audio, the video or the files

# An utterance takes well under a second; the rest is for a cold start of the interpreter on a busy disk.
STALL_SECONDS = 120.0
_FINISHED, _UNFINISHED, _PROGRESS = "corpus.json", "corpus.json.part", "progress.jsonl"


def synthesise(out: str | Path, options: SynthOptions) -> dict[str, int]:
    """Makes the corpus, unless ``out`` has it already.

    The same options give the same bytes, whatever the number of workers. A script that calls this needs the
    usual ``if __name__ == "__main__"``, because it starts processes.

    Args:
        out: the folder; new, empty, with the same corpus, or with an unfinished one. This goes on from the shards that
            are whole, and begins again with other options.
        options: what to make.

    Returns:
        The number of utterances of each manifest, by its path in ``out`` ("grid/train.jsonl").

    Raises:
        UserError: bad options, eSpeak NG is missing or fails, ``out`` holds something else, is in use, or
            cannot be written.
    """
    out = Path(out).absolute()
    check_options(options)
    described = {name: value for name, value in asdict(options).items() if name != "workers"}
    try:
        found = _finished_corpus(out, described)
        if found is None:
            require_espeak()
            with claim(out):
                found = _finished_corpus(out, described)  # by a process that this one was too late to meet
                return _make(out, options, described) if found is None else found
    except OSError as error:
        raise UserError(f"cannot write the corpus to {error.filename or out}: {error.strerror or error}") from error
    logger.info("%s already holds this corpus (%d utterances), nothing to do", out, sum(found.values()))
    return found


def _make(out: Path, options: SynthOptions, described: dict[str, Any]) -> dict[str, int]:
    """Makes what is missing of the corpus, and its manifests."""
    _start(out, described)
    shards = plan_shards(out, options)
    done = Rows(out / _PROGRESS, lambda row: (row["set"], row["voice"]))
    _render(shards, done, options.workers)
    rows: dict[str, list[dict[str, Any]]] = {
        f"{name}/{split}.jsonl": [] for name in dict.fromkeys(shard.set_name for shard in shards) for split in SPLITS
    }
    for shard in shards:
        for split, row in done.held[_key(shard)]["utterances"]:
            rows[f"{shard.set_name}/{split}.jsonl"].append(row)
    for manifest, content in rows.items():
        write_manifest(out / manifest, sorted(content, key=lambda row: row["id"]))
    counts = {manifest: len(content) for manifest, content in rows.items()}
    write_durably(out / _FINISHED, _state(described, counts))
    (out / _UNFINISHED).unlink()
    done.path.unlink(missing_ok=True)
    return counts


def _render(shards: list[Shard], done: Rows, workers: int) -> None:
    """Renders every shard that is not in ``done`` yet, or of which a file has changed since, and adds it."""
    missing = [shard for shard in shards if not is_whole(shard, done.held.get(_key(shard), {}).get("utterances"))]
    total, left = (sum(len(shard.lines) for shard in part) for part in (shards, missing))
    if left < total:
        logger.info("%d of %d utterances are done", total - left, total)
    with ProgressBar("speak", total, done=total - left) as progress:
        for shard, result in run_jobs(
            render_shard, missing, workers, fresh=True, stall_seconds=STALL_SECONDS, on_tick=progress.advance
        ):
            if isinstance(result, Lost):
                advice = "run the same command again, with workers=1 if the machine is short of memory"
                raise UserError(f"a speech process {result.reason}: {advice}")
            set_name, voice = _key(shard)
            done.add({"set": set_name, "voice": voice, "utterances": result})


def _key(shard: Shard) -> tuple[str, str]:
    return shard.set_name, shard.voice.name


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
    """Marks ``out`` as unfinished and removes what an earlier, unfinished run of other options wrote."""
    out.mkdir(parents=True, exist_ok=True)
    with suppress(FileNotFoundError):
        if (out / _UNFINISHED).read_bytes() == _state(described, {}):
            return
    (out / _PROGRESS).unlink(missing_ok=True)
    for set_name in ("grid", "open"):
        for kind in ("audio", "video", "times"):
            if (out / set_name / kind).exists():
                shutil.rmtree(out / set_name / kind)
        for split in SPLITS:
            (out / set_name / f"{split}.jsonl").unlink(missing_ok=True)
    write_durably(out / _UNFINISHED, _state(described, {}))


def _state(described: dict[str, Any], counts: dict[str, int]) -> bytes:
    state = {"format": FORMAT, "options": described, "utterances": counts}
    return (json.dumps(state, indent=2) + "\n").encode()
