"""Whatever a manifest or a corpus calls its clips, nothing is written outside the folder that was named for it, and
nothing but visible characters reaches a terminal or a page."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import unicodedata
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from avsr.cli import main
from avsr.config import Config, DecodeConfig
from avsr.data.clip import load_clip
from avsr.data.manifest import read_manifest, write_manifest
from avsr.data.video_writer import write_video
from avsr.errors import ClipError, UserError, visible
from avsr.evaluation.results import results_folder
from avsr.evaluation.run import evaluate, worst
from avsr.models.sources import inside_run, resolve
from avsr.runtime.progress import ProgressBar
from avsr.tools.analysis.page import escape
from avsr.tools.analysis.plots import drawing
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
    frames = (np.arange(30)[:, None, None] + np.arange(96) + np.zeros((96, 1))) % 32 * 6
    write_video(root / "v" / "a.mp4", frames.astype(np.uint8), sound=0.3 * np.sin(np.arange(30 * 640) / 9))
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
    kept = [key for path in cache.rglob("shards/*.safetensors") for key in load_file(path)]
    assert len(kept) >= len(names)  # the noise of each is another, and so are its features
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


# What reaches a terminal or a page

ACTING = "a\x1b[2J\r\nb\tc\x9bd\u2028e\u202ef\u2066g\x7f"
SHOWN = r"a\x1b[2J\r\nb\tc\x9bd\u2028e\u202ef\u2066g\x7f"
TEXTS = "nä\u0308ïve \u0645\u06cc\u200c\u062e \u05d0\u200f \U0001f468\u200d\U0001f469 'x' \\n"


def test_what_acts_is_escaped_and_what_is_text_is_not() -> None:
    assert visible(ACTING) == SHOWN == visible(SHOWN)
    assert visible(ACTING, "\n\t") == SHOWN.replace(r"\n", "\n").replace(r"\t", "\t")
    assert visible(TEXTS) == TEXTS
    assert visible("\udcff\ud800") == r"\udcff\ud800"
    assert str(ClipError(ACTING)) == SHOWN == str(pickle.loads(pickle.dumps(ClipError(ACTING))))
    assert str(UserError(ACTING)) == visible(ACTING, "\n\t")


def acts(text: str) -> bool:
    return any(c != "\n" and unicodedata.category(c) in ("Cc", "Zl", "Zp", "Cs") or c in "\u202e\u2066" for c in text)


def test_transcribe_prints_one_line_for_a_file_whatever_its_name(
    run_folder: Path, tone: Callable[[Path, float], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = tone(tmp_path / "plain.wav", 0.6), tmp_path / f"{ACTING}2.wav"
    named = good.rename(tmp_path / f"{ACTING}.wav")
    bad.write_bytes(b"no sound")
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["transcribe", str(run_folder), str(named), str(bad)])
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if "2.wav" in line]
    assert out.count("\n") == 1 and out.startswith(f"{tmp_path}/{SHOWN}.wav\t") and not acts(out.replace("\t", "", 1))
    assert len(lines) == 1 and lines[0].startswith("avsr: ") and SHOWN in lines[0] and not acts(err)


def test_refusals_and_warnings_have_a_line_for_each_clip(run_folder: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "corpus" / "sentences" / "manifest.jsonl"
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    write_manifest(manifest, [rows[0], *({**row, "audio": f"{ACTING}{n}.wav"} for n, row in enumerate(rows[1:3]))])
    for on_bad in ("refuse", "skip"):
        command = [sys.executable, "-m", "avsr.cli", "evaluate", str(run_folder), f"data.on_bad={on_bad}"]
        done = subprocess.run(command, capture_output=True, text=True)  # a process of its own sets up its log
        err = done.stderr
        assert done.returncode == (2 if on_bad == "refuse" else 0) and not acts(err)
        assert sum(f"  {manifest}:" in line and SHOWN in line for line in err.splitlines()) == 2


@pytest.mark.parametrize("normaliser", ["plain", "whisper"])
def test_the_list_of_errors_and_the_page_hold_nothing_that_acts(normaliser: str) -> None:
    row = {"set": "a", "id": ACTING, "speaker": "", "seconds": 1.0, "reference": f"one {ACTING} two", "hypothesis": "x"}
    text = worst([row], Config(decode=DecodeConfig(normaliser=normaliser)))
    assert f"a/{SHOWN}  WER" in text and not acts(text)
    assert not acts(escape(ACTING).replace("\t", "")) and escape("<b>\n") == "&lt;b&gt;\n"
    pictures: list[str] = []
    with warnings.catch_warnings():  # no font has these characters
        warnings.simplefilter("ignore")
        with drawing(pictures, "a\x1b", ACTING, legend=False):
            pass
    assert r"\x1b[2J" in pictures[0] and not acts(pictures[0].replace("\t", ""))


def test_names_of_test_sets_are_no_markup(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with ProgressBar("decode [/b] [red]x", 1) as bar:
        bar.advance(1, "[/i]")
    assert bar._bar is not None


# Symbolic links and dots


def test_links_below_a_manifest_are_followed_wherever_they_lead(
    tone: Callable[[Path, float], Path], tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "corpus").mkdir()
    tone(tmp_path / "elsewhere" / "a.wav", 0.5)
    (tmp_path / "corpus" / "wavs").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "corpus" / "b.wav").symlink_to(tmp_path / "elsewhere" / "a.wav")
    rows = [{"id": name, "audio": name, "text": "x", "duration": 0.5} for name in ("wavs/a.wav", "b.wav")]
    write_manifest(tmp_path / "corpus" / "m.jsonl", rows)
    found = read_manifest(tmp_path / "corpus" / "m.jsonl")
    assert [len(load_clip(row, {"audio"}, 1).wave) for row in found] == [8000, 8000]  # type: ignore[arg-type]
    write_manifest(tmp_path / "corpus" / "m.jsonl", [{**rows[0], "audio": "wavs/../../elsewhere/a.wav"}])
    with pytest.raises(UserError, match="leads outside"):
        read_manifest(tmp_path / "corpus" / "m.jsonl")


@pytest.mark.parametrize("path", ["../x", "a/../../x", "/etc/hostname", "..", "../run2/x"])
def test_run_and_package_lead_nowhere_else(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("run", "run2", "site/mine/a"):
        (tmp_path / folder).mkdir(parents=True)
    for folder in ("run", "run2", "site/mine", "site"):
        (tmp_path / folder / "x").write_text("x")
    (tmp_path / "site" / "mine" / "__init__.py").write_text("raise SystemExit('this code must not run')")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    for name, read in (
        (f"run:{path}", lambda name: inside_run(name, tmp_path / "run")),
        (f"package:mine/{path}", resolve),
    ):
        with pytest.raises(UserError, match="leads out of"):
            read(name)
    assert inside_run("run:a/../x", tmp_path / "run") == str(tmp_path / "run" / "x")
    assert inside_run("run:a/x", "rel/../run") == "run/a/x"
    assert resolve("package:mine/a/../x") == tmp_path / "site" / "mine" / "x"
    with pytest.raises(UserError, match="'mine.a' is not installed"):
        resolve("package:mine.a/x")  # to look for it Python would run mine/__init__.py
