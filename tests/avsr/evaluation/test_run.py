"""A run decoded from its folder: scores, hypotheses and files that evaluate and transcribe agree on."""

from __future__ import annotations

import errno
import json
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from avsr.cli import main
from avsr.config import read_run_config
from avsr.data.manifest import write_manifest
from avsr.errors import EXIT_PREEMPTED, UserError
from avsr.evaluation import decode
from avsr.evaluation import run as run_module
from avsr.evaluation.results import HYPOTHESES, made_by, refuse_other, results_folder, row_key
from avsr.evaluation.run import evaluate
from avsr.evaluation.run import test_sets as load_test_sets
from avsr.evaluation.transcripts import transcribe_files
from avsr.models.build import load_run
from avsr.runtime.rows import Rows


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
    assert metrics["decoding"]["device"] == "cpu" and metrics["decoding"]["attention"] == "sdpa"
    assert metrics["decoding"]["versions"]["torch"] == torch.__version__
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


# One writer: what was decoded is not lost, and what is whole is replaced only by its like


SLOW = """
    import sys, time
    from avsr.cli import main
    from avsr.evaluation import decode

    real, calls = decode.transcribe_batch, []

    def transcribe_batch(*arguments):
        if len(calls) == 2:
            print("third batch", flush=True)
            time.sleep(60)
        calls.append(1)
        return real(*arguments)

    decode.transcribe_batch = transcribe_batch
    main(sys.argv[1:])
"""


def files(folder: Path) -> dict[str, bytes]:
    """Without what differs between two evaluations of the same."""
    found = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    return {name: re.sub(rb'"rtfx": [\d.e+-]+', b'"rtfx": 0', content) for name, content in found.items()}


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ids of the utterances that are decoded from now on."""
    ids: list[str] = []
    real = decode.transcribe_batch

    def counted(model: Any, batch: Any, config: Any) -> Any:
        ids.extend(utterance.id for utterance in batch.utterances)
        return real(model, batch, config)

    monkeypatch.setattr(decode, "transcribe_batch", counted)
    return ids


@pytest.mark.integration
@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGKILL])
def test_a_stopped_evaluation_goes_on_where_it_was(
    run_folder: Path, decoded: list[str], caplog: pytest.LogCaptureFixture, number: signal.Signals
) -> None:
    """After two batches of two; in the meantime the old result is there, and at the end that of one go."""
    evaluate(run_folder, [])
    before = files(run_folder)
    command = [sys.executable, "-c", textwrap.dedent(SLOW), "evaluate", str(run_folder), "decode.batch=2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout and process.stderr and process.stdout.readline() == "third batch\n"
    process.send_signal(number)
    assert process.wait(20) == (EXIT_PREEMPTED if number == signal.SIGTERM else -signal.SIGKILL)
    now = files(run_folder)
    assert {name: now[name] for name in before} == before
    assert len(now[f"{HYPOTHESES}.unfinished"].splitlines()) == 1 + 4
    assert (run_folder / ".metrics.json.lock").exists() == (number == signal.SIGKILL)
    with (run_folder / f"{HYPOTHESES}.unfinished").open("ab") as file:
        file.write(b'{"set": "unseen_voices", "id": "u0')
    decoded.clear()
    evaluate(run_folder, [])
    assert decoded == ["u000", "u001", "u002"]  # of the second set
    assert "cut short" in caplog.text and files(run_folder) == before


@pytest.mark.integration
def test_a_newer_checkpoint_or_manifest_begins_again(
    run_folder: Path, decoded: list[str], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    made = made_by(run_folder, read_run_config(run_folder))
    row = {"set": "sentences", "id": "u000", "reference": "x", "hypothesis": "stale", "speaker": "", "seconds": 1.0}
    row |= {"cut": "", "loop": False, "took": 1.0, "warm": True, "cached": []}
    path = run_folder / f"{HYPOTHESES}.unfinished"
    Rows(path, row_key, {**made, "checkpoint.sha256": "0" * 64}).add(row)
    evaluate(run_folder, [])
    assert len(decoded) == 7 and "begins again" in caplog.text and b"stale" not in files(run_folder)[HYPOTHESES]
    Rows(path, row_key, made).add(row)
    decoded.clear()
    evaluate(run_folder, [])
    assert len(decoded) == 6 and b"stale" in files(run_folder)[HYPOTHESES]
    Rows(path, row_key, made).add(row)
    with (tmp_path / "corpus" / "sentences" / "manifest.jsonl").open("a") as file:
        file.write("\n")
    evaluate(run_folder, [])
    assert b"stale" not in files(run_folder)[HYPOTHESES]


@pytest.mark.integration
def test_results_are_kept_by_what_made_them(
    run_folder: Path, decoded: list[str], refuse: Callable[..., str], tmp_path: Path
) -> None:
    """Every key that changes what is decoded has a folder of its own; those that do not share the run's."""
    evaluate(run_folder, [])
    whole = files(run_folder)
    made = json.loads(whole["metrics.json"])["made_by"]
    assert made["checkpoint"] == "best" and made["data.limit"] == 0 and made["data.test.sentences"].endswith(".jsonl")
    evaluate(run_folder, ["data.limit=2"])
    (part,) = (run_folder / "evaluations").iterdir()
    assert part == results_folder(run_folder, ["data.limit=2"]) and part.name.startswith("data.limit=2-")
    assert json.loads((part / "metrics.json").read_text())["sentences"]["utterances"] == 2
    assert files(run_folder) == whole
    for idle in (["decode.batch=2"], ["data.workers=1", "log.tensorboard=true"], ["act.heads=all"]):
        assert results_folder(run_folder, idle) == run_folder
    others = (
        ["decode.beams=2"],
        ["noise.snr=[0]"],
        ["data.test.sentences=other.jsonl"],
        ["model.prompts.audio=a/../b"],
    )
    named = [results_folder(run_folder, other) for other in others]
    named.append(results_folder(run_folder, [], "last"))
    assert len(set(named)) == 5 and {folder.parent for folder in named} == {run_folder / "evaluations"}
    assert len(max(folder.name for folder in named)) < 100

    out = tmp_path / "out"
    evaluate(run_folder, ["decode.beams=2"], out=out)
    evaluate(run_folder, ["decode.beams=2", "decode.batch=1"], out=out)
    decoded.clear()
    message = refuse("evaluate", run_folder, "--out", out, "data.limit=1")
    assert f"{out / 'metrics.json'} is the result of other settings" in message and "name another folder" in message
    assert "data.limit is 0 there, not 1; decode.beams is 2 there, not 1" in message
    (out / "metrics.json").write_text("{}")
    assert "does not say what made it" in refuse("evaluate", run_folder, "--out", out, "decode.beams=2")
    assert not decoded


def test_a_checkpoint_replaced_while_it_is_read_makes_no_result(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a training that goes on: the result would name the other one."""
    real = load_run

    def replaced(*arguments: Any) -> Any:
        found = real(*arguments)
        weights = run_folder / "checkpoints" / "best" / "model.safetensors"
        weights.write_bytes(weights.read_bytes() + b" ")
        return found

    monkeypatch.setattr("avsr.evaluation.run.load_run", replaced)
    with pytest.raises(UserError, match=r"checkpoints/best or a manifest was replaced meanwhile: repeat"):
        evaluate(run_folder, [])
    assert not (run_folder / "metrics.json").exists() and not list(run_folder.glob("*.unfinished"))


def test_a_folder_that_takes_no_files_is_found_before_anything_is_loaded(
    run_folder: Path, refuse: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*arguments: Any, **options: Any) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr("avsr.evaluation.run.load_run", load)
    for arguments in (["evaluate", run_folder], ["transcribe", run_folder, "a.wav"]):
        assert "avsr: --out: cannot write to /proc/results: " in refuse(*arguments, "--out", "/proc/results")


@pytest.mark.integration
def test_a_full_disk_keeps_the_old_result_and_the_rows(
    run_folder: Path, decoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate(run_folder, [])
    before = files(run_folder)

    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr("avsr.evaluation.run.write_durably", full)
        with pytest.raises(UserError, match="cannot write results to .*No space left.* goes on from"):
            evaluate(run_folder, [])
    assert {name: files(run_folder)[name] for name in before} == before
    decoded.clear()
    evaluate(run_folder, [])
    assert not decoded and files(run_folder) == before


@pytest.mark.integration
def test_transcribe_writes_as_it_goes_and_goes_on(
    run_folder: Path,
    tone: Callable[[Path, float], Path],
    decoded: list[str],
    tmp_path: Path,
    refuse: Callable[..., str],
) -> None:
    names = [str(tone(tmp_path / f"{n}.wav", 0.4 + 0.1 * n)) for n in range(12)]
    names[3:3] = [str(tmp_path / "gone.wav")]
    (tmp_path / "gone.wav").symlink_to("gone.wav")  # to itself
    settings, out = ["decode.batch=1"], tmp_path / "out"
    whole = list(transcribe_files(run_folder, names, settings))
    decoded.clear()
    stopped = transcribe_files(run_folder, names, settings, out)
    assert [next(stopped) for _ in range(2)][0] == whole[0] and len(decoded) == 7  # of the first eight files
    with pytest.raises(UserError, match="is in use by"):
        next(transcribe_files(run_folder, names, settings, out))
    stopped.close()
    tone(tmp_path / "0.wav", 0.7)  # another file of this name
    decoded.clear()
    found = list(transcribe_files(run_folder, names, settings, out))
    assert decoded == [names[0], *names[8:]]
    assert [(name, str(result)) for name, result in found[1:]] == [(name, str(result)) for name, result in whole[1:]]
    rows = [json.loads(line) for line in (out / "transcripts.jsonl").read_text().splitlines()]
    assert [(row["file"], row.get("text", row.get("error"))) for row in rows] == [(n, str(r)) for n, r in found]
    assert "error" in rows[3] and [path.name for path in out.iterdir()] == ["transcripts.jsonl"]
    assert "name another folder" in refuse("transcribe", run_folder, names[0], "--out", out)


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


def test_other_noise_under_the_same_name_is_another_result(
    run_folder: Path, tone: Callable[[Path, float], Path], tmp_path: Path
) -> None:
    config = read_run_config(run_folder, ["noise.snr=[0]", f"noise.file={tone(tmp_path / 'noise.wav', 1.0)}"])
    first = made_by(run_folder, config)
    assert made_by(run_folder, config) == first
    tone(tmp_path / "noise.wav", 1.5)
    assert {name for name, value in made_by(run_folder, config).items() if first[name] != value} == {"noise.sha256"}


def test_a_result_of_a_version_without_a_key_was_made_with_its_default(run_folder: Path, tmp_path: Path) -> None:
    made = made_by(run_folder, read_run_config(run_folder))
    older = {name: value for name, value in made.items() if name != "decode.repetition_penalty"}
    path = tmp_path / "metrics.json"
    path.write_text(json.dumps({"made_by": older}))
    refuse_other(path, made, "name another")
    with pytest.raises(UserError, match=r"decode\.repetition_penalty is None there, not 1\.3\): name another"):
        refuse_other(path, {**made, "decode.repetition_penalty": 1.3}, "name another")
