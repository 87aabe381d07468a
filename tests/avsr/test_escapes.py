"""Whatever a manifest or a corpus calls its clips, nothing is written outside the folder that was named for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from avsr.data.manifest import write_manifest
from avsr.data.video_writer import write_video
from avsr.errors import UserError
from avsr.evaluation.results import results_folder
from avsr.evaluation.run import evaluate
from avsr.tools.corpora.prepare.journal import Journal
from avsr.tools.corpora.prepare.options import PrepareOptions
from avsr.tools.corpora.prepare.run import prepare
from avsr.tools.corpora.source import is_safe_id

HOSTILE = [
    "../x",
    "a/../../../b",
    "/tmp/x",
    "..",
    ".",
    "\0",
    "a\0b",
    "x" * 300,
    "y/" * 600 + "y",
    "é" * 150,
    "\\..\\x",
    "\udcff",
]


def files_of(folder: Path, *but: Path) -> dict[Path, int]:
    """Every file outside ``but`` and when it was changed."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_file() and not any(path.is_relative_to(other) for other in but):
            found[path] = path.stat().st_mtime_ns
    return found


@pytest.mark.parametrize("name", HOSTILE)
def test_names_that_no_file_below_a_folder_can_have(name: str) -> None:
    assert not is_safe_id(name)
    assert is_safe_id("id00001/5tFh_x-1/ünï 00001")


def test_clips_of_prepare_stay_in_its_folder(tmp_path: Path) -> None:
    root, out = tmp_path / "a" / "b" / "muavic", tmp_path / "a" / "b" / "out"
    (root / "v").mkdir(parents=True)
    frames = np.full((30, 96, 96), 90, np.uint8)
    write_video(root / "v" / "a.mp4", frames, sound=0.3 * np.sin(np.arange(30 * 640) / 9))
    names = [name for name in HOSTILE if name != "\udcff"]
    rows = "".join(f"{name}\tv/a.mp4\tv/a.wav\t30\t19200\n" for name in [*names, "good/a"])
    (root / "train.tsv").write_text(f"/\n{rows}", encoding="utf-8")
    (root / "train.en").write_text("hello\n" * (len(names) + 1))
    before = files_of(tmp_path, out)
    report = prepare("muavic", root, out, PrepareOptions(workers=1))
    assert report.manifests == {"train": 1} and report.refused == {"list": len(names)}
    assert files_of(tmp_path, out) == before
    refused = [json.loads(line)["id"] for line in (out / "refused.jsonl").read_text().splitlines()]
    assert refused == [name.strip() for name in names]


def test_a_journal_with_other_clips_is_not_believed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    Journal(out, {})
    for name in HOSTILE[:-1]:
        clip = {"id": name, "start": 0, "end": 30, "sha256": ""}
        row = {"source": "a", "asked": "x", "tried": "y", "made": [clip], "refused": []}
        (out / "progress.jsonl").write_text(json.dumps(row) + "\n")
        assert Journal(out, {}).entry("a").made == ()


def test_a_name_that_is_no_text_is_written_as_json(tmp_path: Path) -> None:
    """The name of a file on a disk may hold bytes that are no UTF-8."""
    write_manifest(tmp_path / "refused.jsonl", [{"id": "a\udcff"}])
    assert json.loads((tmp_path / "refused.jsonl").read_text(encoding="utf-8"))["id"] == "a\udcff"


def test_what_evaluate_and_the_cache_write_stays_in_their_folders(run_folder: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "corpus" / "sentences" / "manifest.jsonl"
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    names = [name for name in HOSTILE if name.strip() and name != "\udcff"]
    rows = [{**rows[index % len(rows)], "id": name, "speaker": name} for index, name in enumerate(names)]
    write_manifest(manifest, rows)
    cache = tmp_path / "cache"
    before = files_of(tmp_path, run_folder, cache)
    overrides = ["data.limit=0", "noise.snr=[0]", f"noise.babble={tmp_path / 'corpus' / 'train' / 'manifest.jsonl'}"]
    overrides.append(f"data.test={{a: {manifest}}}")
    scores = evaluate(run_folder, overrides)
    assert scores["a 0 dB"].utterances == len(names)
    assert files_of(tmp_path, run_folder, cache) == before
    assert len(files_of(cache)) > len(names)  # the noise of each is another, and so are its features
    written = [json.loads(line) for line in (results_folder(run_folder, overrides) / "hypotheses.jsonl").open()]
    assert [row["id"] for row in written if row["set"] == "a 0 dB"] == names


@pytest.mark.parametrize("path", ["../outside.wav", "/etc/hostname", "a/../../outside.wav", "\0", "x" * 5_000])
def test_a_manifest_reads_below_its_own_folder_alone(path: str, run_folder: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "corpus" / "sentences" / "manifest.jsonl"
    row = json.loads(manifest.read_text().splitlines()[0])
    write_manifest(manifest, [{**row, "audio": path}])
    with pytest.raises(UserError, match="leads outside|there is no file|cannot be the path"):
        evaluate(run_folder, [f"data.test={{a: {manifest}}}"])


def test_a_name_too_long_for_the_system_ends_a_command_with_one_line(refuse: Callable[..., str]) -> None:
    for arguments in (("analyze", "./" + "x" * 5_000), ("prepare", "lrs3", "x" * 5_000, "out")):
        message = refuse(*arguments)
        assert "File name too long" in message and len(message) < 200 and "\n" not in message
