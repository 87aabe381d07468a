"""``avsr synth``: writes a corpus of synthetic speech, with the drawn mouths of its speakers.

``OUT/SET/SPLIT.jsonl`` are the manifests, for the sets ``grid`` and ``open`` and the splits ``train``,
``validation``, ``test_sentences`` (known voices, new sentences) and ``test_voices`` (new voices and sentences).
The audio is in ``OUT/SET/audio/SPEAKER/ID.wav``, the video in ``OUT/SET/video/SPEAKER/ID.mp4``, the times of words and
phonemes are in ``OUT/SET/times/SPEAKER/ID.json``. ``OUT/corpus.json`` has the options and is written last; until then
``OUT/corpus.json.part`` has them, and ``OUT/progress.jsonl`` the finished shards, from which a later run goes on.

Here a shard is what one process speaks; a share (:mod:`avsr.runtime.share`), which the user calls a shard, is some of
them. A merge writes the manifests when all are made, and a run of the whole takes over what shares have made.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from avsr.data.manifest import write_manifest
from avsr.errors import UserError
from avsr.runtime.folders import drop_dead_parts, write_durably
from avsr.runtime.pool import Lost, run_jobs
from avsr.runtime.progress import ProgressBar
from avsr.runtime.rows import Row, Rows, read_rows
from avsr.runtime.share import Share, claim_share, claim_whole, drop_shares, gather, take_over, unfinished
from avsr.tools.corpora.state import contents, read_state, refuse_differences, refuse_foreign
from avsr.tools.corpora.synth.espeak import require_espeak
from avsr.tools.corpora.synth.options import SynthOptions, check_options, parse_options
from avsr.tools.corpora.synth.shards import SPLITS, Shard, is_whole, plan_shards, render_shard

__all__ = ["FORMAT", "SynthOptions", "parse_options", "synthesise"]

logger = logging.getLogger("avsr")

FORMAT = "avsr-synth-2"  # change it with anything that changes the audio, the video or the files

# An utterance takes well under a second; the rest is for a cold start of the interpreter on a busy disk.
STALL_SECONDS = 120.0
_FINISHED, _UNFINISHED, _PROGRESS = "corpus.json", "corpus.json.part", "progress.jsonl"


def synthesise(
    out: str | Path, options: SynthOptions, share: Share | None = None, *, merge: bool = False
) -> dict[str, int]:
    """Makes the corpus, unless ``out`` has it already.

    The same options give the same bytes, whatever the number of workers. A script that calls this needs the
    usual ``if __name__ == "__main__"``, because it starts processes.

    Args:
        out: the folder; new, empty, with the same corpus, or with an unfinished one. This goes on from the shards that
            are whole, and begins again with other options.
        options: what to make.
        share: make only this share of the utterances, and no manifests.
        merge: make only the manifests of what the shards have made.

    Returns:
        The number of utterances of each manifest, by its path in ``out`` ("grid/train.jsonl"); none for a share.

    Raises:
        UserError: bad options, eSpeak NG is missing or fails, ``out`` holds something else, is in use, or
            cannot be written, or ``merge`` and something is missing.
    """
    out = Path(out).absolute()
    check_options(options)
    described = {name: value for name, value in asdict(options).items() if name != "workers"}
    try:
        found = _finished_corpus(out, described)
        if found is None:
            if not merge:
                require_espeak()
            with claim_whole(out) if share is None else claim_share(out, share):
                found = _finished_corpus(out, described)  # by a process that this one was too late to meet
                if found is None:
                    return _make(out, options, described, share, merge)
    except OSError as error:
        raise UserError(f"cannot write the corpus to {error.filename or out}: {error.strerror or error}") from error
    logger.info("%s already holds this corpus (%d utterances), nothing to do", out, sum(found.values()))
    return found


def _make(
    out: Path, options: SynthOptions, described: dict[str, Any], share: Share | None, merge: bool
) -> dict[str, int]:
    """Makes what is missing of the corpus and its manifests, or only of a share of it."""
    shards, made_by = plan_shards(out, options), {"format": FORMAT, **described}
    if share is not None:
        _start(out, described, keep=True)
        own = Rows(out / share.file, _row_key, made_by)
        own.held = {_row_key(row): row for row in read_rows(out / _PROGRESS, _row_key)} | own.held
        _render(share.of(_longest_first(shards)), own, options.workers, f"speak, shard {share}")
        return {}
    if merge and not (out / _UNFINISHED).exists():
        raise unfinished(out, (), lambda _: ())
    _start(out, described, keep=merge)
    done, shared = Rows(out / _PROGRESS, _row_key), gather(out, _row_key, made_by)
    if merge:
        _refuse_unfinished(out, shards, done, shared)
    take_over(done, shared)
    if not merge:
        _render(shards, done, options.workers, "speak")
    counts = _write_manifests(out, shards, done)
    write_durably(out / _FINISHED, _state(described, counts))
    (out / _UNFINISHED).unlink()
    done.path.unlink(missing_ok=True)
    return counts


def _refuse_unfinished(out: Path, shards: list[Shard], done: Rows, shared: dict[Share, list[Row]]) -> None:
    held = done.held | {_row_key(row): row for part in shared.values() for row in part}
    left = [
        place
        for place, shard in enumerate(_longest_first(shards))
        if not is_whole(shard, held.get(_key(shard), {}).get("utterances"))
    ]
    if left:
        raise unfinished(out, shared, lambda count: (place % count + 1 for place in left))


def _longest_first(shards: list[Shard]) -> list[Shard]:
    """The order in which the user's shards take turns, so that each has about as much to do."""
    return sorted(shards, key=lambda shard: -len(shard.lines))


def _write_manifests(out: Path, shards: list[Shard], done: Rows) -> dict[str, int]:
    rows: dict[str, list[dict[str, Any]]] = {
        f"{name}/{split}.jsonl": [] for name in dict.fromkeys(shard.set_name for shard in shards) for split in SPLITS
    }
    for shard in shards:
        for split, row in done.held[_key(shard)]["utterances"]:
            rows[f"{shard.set_name}/{split}.jsonl"].append(row)
    for manifest, content in rows.items():
        drop_dead_parts((out / manifest).parent)
        write_manifest(out / manifest, sorted(content, key=lambda row: row["id"]))
    return {manifest: len(content) for manifest, content in rows.items()}


def _render(shards: Sequence[Shard], done: Rows, workers: int, title: str) -> None:
    """Renders every shard that is not in ``done`` yet, or of which a file has changed since, and adds it."""
    missing = [shard for shard in shards if not is_whole(shard, done.held.get(_key(shard), {}).get("utterances"))]
    total, left = (sum(len(shard.lines) for shard in part) for part in (shards, missing))
    if left < total:
        logger.info("%d of %d utterances are done", total - left, total)
    with ProgressBar(title, total, done=total - left) as progress:
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


def _row_key(row: Row) -> tuple[str, str]:
    return row["set"], row["voice"]


def _finished_corpus(out: Path, described: dict[str, Any]) -> dict[str, int] | None:
    """The utterance counts of the corpus in ``out``; None if there is to be one.

    Raises:
        UserError: the folder holds something else.
    """

    def parse(state: Any) -> tuple[dict[str, Any], dict[str, int]]:
        counts = {str(name): int(count) for name, count in state["utterances"].items()}
        return {"format": state["format"], **state["options"]}, counts

    names = contents(out)
    state = read_state(out / _FINISHED, "synth", parse)
    if state is None:
        if not (out / _UNFINISHED).exists():
            refuse_foreign(out, names)
        return None
    held, counts = state
    refuse_differences(out, held, {"format": FORMAT, **described})
    missing = [name for name in counts if not os.path.isfile(out / name)]
    if missing:
        raise UserError(f"the corpus in {out} is damaged, {missing[0]} is missing: delete the folder and run again")
    return counts


def _start(out: Path, described: dict[str, Any], *, keep: bool = False) -> None:
    """Marks ``out`` as unfinished and removes what an earlier, unfinished run of other options wrote.

    Raises:
        UserError: there is any, and it is to be kept, since others may be writing it.
    """
    out.mkdir(parents=True, exist_ok=True)
    with suppress(FileNotFoundError):
        if (out / _UNFINISHED).read_bytes() == _state(described, {}):
            return
        if keep:
            raise UserError(
                f"{out} has an unfinished corpus of other options: choose another folder or delete this one"
            )
    if not keep:
        _wipe(out)
    write_durably(out / _UNFINISHED, _state(described, {}))


def _wipe(out: Path) -> None:
    drop_shares(out)
    (out / _PROGRESS).unlink(missing_ok=True)
    for set_name in ("grid", "open"):
        for kind in ("audio", "video", "times"):
            if (out / set_name / kind).exists():
                shutil.rmtree(out / set_name / kind)
        for split in SPLITS:
            (out / set_name / f"{split}.jsonl").unlink(missing_ok=True)


def _state(described: dict[str, Any], counts: dict[str, int]) -> bytes:
    state = {"format": FORMAT, "options": described, "utterances": counts}
    return (json.dumps(state, indent=2) + "\n").encode()
