"""``avsr index MANIFEST``: parses a manifest and measures its clips, once for all runs, and says what it holds."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from avsr.data.index import Index, make_index, open_manifest
from avsr.data.measuring import SIGNALS, measure, measured
from avsr.data.rates import FRAMES_PER_SECOND, SAMPLE_RATE
from avsr.data.utterances import Utterances
from avsr.errors import UserError, visible
from avsr.runtime.folders import write_durably
from avsr.runtime.share import Share

PICTURE = "lengths.png"
_SHOWN = 3  # reasons of rejection
_RATES = {"audio": SAMPLE_RATE, "video": FRAMES_PER_SECOND}


def index_manifest(
    manifest: str | Path, *, media: bool = True, workers: int = 0, share: Share | None = None
) -> list[str]:
    """Makes the index of a manifest, or brings it up to date, and writes a picture of the lengths beside it.

    Args:
        manifest: a ``.jsonl`` manifest or a label CSV.
        media: whether the clips are read; files that have not changed since the last time are not.
        workers: processes; 0 = one for each CPU.
        share: of the clips that this process measures; None = all of them.

    Returns:
        Lines for the user.

    Raises:
        UserError: the manifest cannot be read, the index cannot be written, or ``workers`` is negative.
    """
    path = Path(manifest)
    if workers < 0:
        raise UserError(f"--workers: expected a number from 0 on, got {workers}")
    index = make_index(path, workers)
    signals = [signal for signal in SIGNALS if media and _has(index, signal)]
    for signal in signals:
        measure(path, signal, workers=workers, share=share)
    found = open_manifest(path, absolute=True)
    lines = [f"{visible(str(path))}: {len(found.utterances):,} utterances, {len(found.bad):,} bad lines"]
    lines += [f"  {visible(reason)}" for reason in found.bad[:_SHOWN]]
    lines += _described(found.utterances, index)
    seconds = found.utterances.numbers("duration")
    tables = measured(index, signals) or {}
    if len(tables) < len(signals):
        lines.append("lengths       not all shards are done yet")
    for signal, table in tables.items():
        lengths = np.asarray(table.column("length")) / _RATES[signal]
        lines += _rejected(signal, lengths, table)
        seconds = lengths[lengths > 0] if signal == "audio" or len(tables) == 1 else seconds
    if len(seconds):
        _draw(seconds, found.utterances, index.folder / PICTURE)
        lines.append(f"picture       {visible(str(index.folder / PICTURE))}")
    return lines


def _has(index: Index, signal: str) -> bool:
    """Whether any row names a file of the signal; the sound of a video counts."""
    columns = ("video",) if signal == "video" else ("audio", "video")
    return any(index.table.column(name).null_count < len(index.table) for name in columns)


def _described(utterances: Utterances, index: Index) -> list[str]:
    seconds = utterances.numbers("duration")
    speakers = int(pc.count_distinct(utterances.column("speaker")).as_py())
    words = pc.sum(pc.add(pc.count_substring_regex(pc.utf8_trim_whitespace(utterances.column("text")), r"\s+"), 1))
    low, middle, high = (float(np.quantile(seconds, q)) for q in (0.05, 0.5, 0.95))
    lines = [
        f"declared      {seconds.sum() / 3600:,.2f} h, clips of {seconds.min():.2f} to {seconds.max():.2f} s (5% "
        f"{low:.2f}, median {middle:.2f}, 95% {high:.2f})",
        f"speakers      {speakers:,}",
        f"words         {int(words.as_py()):,}",
    ]
    count, first, second = index.twice
    if count:
        lines.append(
            f"twice         {count:,} clips are there under two ids, as {visible(first)} and {visible(second)}"
        )
    return lines


def _rejected(signal: str, lengths: np.ndarray[Any, Any], table: pa.Table) -> list[str]:
    good = lengths[lengths > 0]
    bad = table.column("reason").drop_null()
    lines = [f"{signal:13s} {good.sum() / 3600:,.2f} h measured in {len(good):,} clips, {len(bad):,} rejected"]
    return lines + [f"  {visible(reason)}" for reason in bad[:_SHOWN].to_pylist()]


def _draw(seconds: np.ndarray[Any, Any], utterances: Utterances, place: Path) -> None:
    from avsr.tools.analysis.plots import panels

    figure, (left, right) = panels(2, share=False)
    left.hist(seconds, bins=min(60, max(10, len(seconds) // 20)), weights=seconds / 3600, color="#0072b2")
    left.set(xlabel="length of a clip (s)", ylabel="hours", title="Hours by length")
    table = pa.table({"speaker": utterances.column("speaker"), "hours": utterances.numbers("duration") / 3600})
    hours = np.sort(np.asarray(table.group_by("speaker").aggregate([("hours", "sum")]).column("hours_sum")))[::-1]
    share = np.concatenate([[0.0], np.cumsum(hours) / hours.sum()])
    right.plot(np.linspace(0, 1, len(share)), share, color="#d55e00")
    right.plot([0, 1], [0, 1], color="#8a8a8a", linewidth=1, linestyle=":")
    right.set(xlabel="share of the speakers", ylabel="share of the hours", title=f"{len(hours):,} speakers")
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    try:
        write_durably(place, content.getvalue())
    except OSError as error:
        raise UserError(f"cannot write {place}: {error.strerror or error}") from error
