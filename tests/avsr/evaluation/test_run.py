"""A run decoded from its folder: scores, hypotheses and files that evaluate and transcribe agree on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from avsr.cli import main
from avsr.data.manifest import write_manifest
from avsr.errors import UserError
from avsr.evaluation import run as run_module
from avsr.evaluation.run import evaluate, transcribe_files
from avsr.evaluation.run import test_sets as load_test_sets
from avsr.models.build import load_run


def test_evaluate_repeats_itself_and_transcribe_gives_the_same(
    run_folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    first = evaluate(run_folder, [])
    rows = [json.loads(line) for line in (run_folder / "hypotheses.jsonl").read_text().splitlines()]
    metrics = json.loads((run_folder / "metrics.json").read_text())
    assert set(first) == {"sentences", "unseen_voices"} <= set(metrics)
    assert {row["set"] for row in rows} == set(first)
    assert all({"id", "speaker", "reference", "hypothesis"} <= row.keys() for row in rows)
    assert metrics["sentences"]["wer"] == pytest.approx(first["sentences"].wer)
    assert "REF" in (run_folder / "errors.txt").read_text()  # an untrained model: everything is wrong
    assert evaluate(run_folder, []) == first
    assert [json.loads(line) for line in (run_folder / "hypotheses.jsonl").read_text().splitlines()] == rows

    manifest = tmp_path / "corpus" / "sentences" / "manifest.jsonl"
    by_id = {json.loads(line)["id"]: json.loads(line)["audio"] for line in manifest.read_text().splitlines()}
    chosen = [row for row in rows if row["set"] == "sentences"][:3]
    files = [str(manifest.parent / by_id[row["id"]]) for row in chosen]
    assert [text for _, text in transcribe_files(run_folder, files, [])] == [row["hypothesis"] for row in chosen]
    bad = tmp_path / "bad.wav"
    bad.write_text("no sound")
    capsys.readouterr()
    with pytest.raises(SystemExit) as status:
        main(["transcribe", str(run_folder), files[0], str(bad), str(tmp_path / "none.wav")])
    out, err = capsys.readouterr()
    assert status.value.code == 2
    assert out.splitlines() == [f"{files[0]}\t{chosen[0]['hypothesis']}"]
    assert "bad.wav" in err and "none.wav" in err and "Traceback" not in err


def test_a_run_without_test_sets_says_which_key_is_missing(run_folder: Path) -> None:
    config, model, store = load_run(run_folder, [], torch.device("cpu"))
    config.data.test = {}
    with pytest.raises(UserError, match=r"data\.test"):
        load_test_sets(config, model, store)


@pytest.mark.parametrize("normaliser", ["plain", "whisper"])
def test_transcripts_without_a_word_are_found_before_decoding(
    run_folder: Path, tmp_path: Path, normaliser: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode(*arguments: object) -> None:
        raise AssertionError("decoding has begun")

    monkeypatch.setattr(run_module, "transcribe", decode)
    manifest = tmp_path / "corpus" / "unseen_voices" / "manifest.jsonl"
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    write_manifest(manifest, [{**row, "text": "?!"} for row in rows])
    with pytest.raises(UserError, match=rf"data\.test\.unseen_voices: .*no transcript has a word .*{normaliser}"):
        evaluate(run_folder, [f"decode.normaliser={normaliser}"])


def test_what_tests_share_with_training_is_said(run_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    config, model, store = load_run(run_folder, [], torch.device("cpu"))
    load_test_sets(config, model, store)
    assert "data.test.sentences: 4 of 4 texts are also in data.train" in caplog.text
    assert "clips" not in caplog.text
    config.data.train = config.data.test["sentences"]
    caplog.clear()
    load_test_sets(config, model, store)
    assert "data.test.sentences: 4 of 4 clips are also in data.train" in caplog.text
    caplog.clear()
    config.data.train = "gone.jsonl"
    load_test_sets(config, model, store)
    assert "data.train" not in caplog.text
