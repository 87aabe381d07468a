"""The benchmark of large corpora: its manifests, one measurement of each kind, and the page made of its rows."""

from __future__ import annotations

from pathlib import Path

import pytest

from avsr.data.manifest import read_manifest
from bench.corpus import page, run
from bench.runner import ledger


def test_its_manifests_are_usable(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text("".join(run.rows(200)))
    rows = read_manifest(path)
    assert len(rows) == 200 and len({row.sha256 for row in rows}) == 200 and all(row.text for row in rows)
    assert list(run.rows(5)) == list(run.rows(200))[:5]


def test_the_page_is_of_its_rows() -> None:
    readme = (ledger.ROOT / "bench" / "README.md").read_text(encoding="utf-8")
    assert page.table(page.newest()) in readme


@pytest.mark.slow
def test_every_line_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "RANKS", 2)
    manifests = run.make_manifests(tmp_path, (100, 300))
    run.make_tokenizer(tmp_path / "tokenizer")
    runner = run.Runner(run.ROOT, tmp_path)
    rows = list(run.measure(runner, manifests, (100, 300)))
    assert [(row["line"], row["rows"]) for row in rows[:5]] == [(n, 100) for n in ("first start", *run.LINES)]
    assert all(0 < float(str(row["seconds"])) < 60 for row in rows)
    manifest = run.make_clips(tmp_path, 200)
    cached = {row["line"]: row for row in run.measure_cache(runner, manifest, 200)}
    looks = int(str(cached["cached start"]["note"]).split()[0])
    slow = runner.cached(manifest, delay=0.02)["seconds"]
    assert looks < 100 and slow - float(str(cached["cached start"]["seconds"])) > 0.01 * looks
