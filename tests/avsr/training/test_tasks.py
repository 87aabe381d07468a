"""Every task from the corpus to the words: train, evaluate, transcribe; conditions, and input that does not fit."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

import avsr.training.run as train_module
from avsr.config import load_config
from avsr.data.dataset import Reading, load_dataset
from avsr.data.manifest import read_manifest
from avsr.data.video_writer import write_video
from avsr.errors import UserError
from avsr.evaluation.run import evaluate
from avsr.evaluation.transcripts import transcribe_files
from avsr.models.build import build_store
from avsr.training.metrics import read_metrics

pytestmark = pytest.mark.integration
Recipe = Callable[..., Path]
Run = Callable[..., Path]
LORA = {"model.video.encoder.lora": {"rank": 2, "alpha": 4.0, "dropout": 0.3}}
ALL_ON = {
    "augment.snr": [-5, 5, float("inf")],
    "augment.time_mask": True,
    "augment.random_crop": True,
    "noise.talkers": 2,
    "training.tasks": {"audio": 1.0, "video": 1.0, "audiovisual": 2.0},
}


def clip(path: Path, frames: int = 15, *, sound: bool = True, side: int = 96) -> Path:
    rng = np.random.default_rng(0)
    mouth = np.repeat(rng.integers(0, 256, (1, side, side), dtype=np.uint8), frames, axis=0)
    wave = 0.3 * np.sin(np.arange(640 * frames) / 9)
    write_video(path, mouth, sound=wave if sound else None)
    return path


@pytest.mark.parametrize("task", ["video", "audiovisual", "fused"])
def test_a_task_is_trained_scored_and_used(
    av_recipe: Recipe, run: Run, weights: Callable[..., Any], tmp_path: Path, task: str
) -> None:
    folder = run(av_recipe(tmp_path, task, **{"loss.decorrelation": 1.0, "training.steps": 2}))
    rows = read_metrics(folder)
    assert [row["step"] for row in rows] == [1, 2]
    assert all(np.isfinite(row[key]) for row in rows for key in ("ce", "decorrelation", "grad_norm"))
    streams = {name.split(".")[1] for name in weights(folder) if name.startswith("projectors.")}
    assert streams == {"video": {"video"}, "audiovisual": {"audio", "video"}, "fused": {"fused"}}[task]
    evaluate(folder, [])
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics.keys() == {"sentences", "unseen_voices", "decoding", "made_by"}
    assert metrics["sentences"]["utterances"] == 4
    ((_, text),) = transcribe_files(folder, [str(clip(tmp_path / "own.mp4"))], [])
    assert isinstance(text, str)


@pytest.fixture(scope="module")
def all_tasks(av_recipe: Recipe, run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of all three tasks with noise, masks and crops in training, cached in two versions."""
    settings = {**ALL_ON, "augment.views": 2, "training.steps": 3}
    return run(av_recipe(tmp_path_factory.mktemp("all_tasks"), "audiovisual", **settings))


def test_conditions_are_scored_one_by_one(all_tasks: Path, tmp_path: Path) -> None:
    conditions = ["noise.snr=[-5,.inf]", "decode.tasks=[audio,video,audiovisual]"]
    evaluate(all_tasks, [*conditions, "decode.beams=2", "decode.nbest=2"], out=tmp_path)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    names = [
        f"{name} {task}{level}"
        for name in ("sentences", "unseen_voices")
        for task in ("audio", "video", "audiovisual")
        for level in (" -5 dB", "")
    ]
    assert list(metrics) == [*names, "decoding", "made_by"]
    assert [metrics[name]["utterances"] for name in names] == [4] * 6 + [3] * 6
    rows = [json.loads(line) for line in (tmp_path / "hypotheses.jsonl").read_text().splitlines()]
    scores: dict[str, list[float]] = {}
    for row in rows:
        scores.setdefault(row["set"], []).append(row["nbest"][0]["score"])
    assert scores["sentences video -5 dB"] == scores["sentences video"]  # a mouth hears no noise
    for task in ("audio", "audiovisual"):
        pairs = zip(scores[f"sentences {task} -5 dB"], scores[f"sentences {task}"], strict=True)
        assert all(abs(noisy - clean) > 1e-5 for noisy, clean in pairs)
    evaluate(all_tasks, ["noise.snr=[0]"], out=tmp_path / "noisy")
    found = list(json.loads((tmp_path / "noisy" / "metrics.json").read_text()))
    assert found == ["sentences 0 dB", "unseen_voices 0 dB", "decoding", "made_by"]


def test_what_is_clean_needs_no_noise(all_tasks: Path, tmp_path: Path) -> None:
    """A run trained with babble can be used where its training corpus is not."""
    away = ["data.train=no/such.jsonl"]
    assert list(evaluate(all_tasks, [*away, "decode.tasks=[video]"])) == ["sentences video", "unseen_voices video"]
    ((_, text),) = transcribe_files(all_tasks, [str(clip(tmp_path / "own.mp4"))], away)
    assert isinstance(text, str)
    with pytest.raises(UserError, match=r"no/such\.jsonl"):
        evaluate(all_tasks, [*away, "noise.snr=[0]"])


def test_only_encoders_that_are_read_are_needed(all_tasks: Path) -> None:
    gone = "model.video.encoder.name=gone.pt"
    assert evaluate(all_tasks, ["decode.tasks=[audio]", gone]) == evaluate(all_tasks, ["decode.tasks=[audio]"])
    with pytest.raises(UserError, match=r"gone\.pt"):
        evaluate(all_tasks, ["decode.tasks=[video]", gone])
    with pytest.raises(UserError, match=r"projectors\.audio\.0\.\S+ has shape"):
        evaluate(all_tasks, ["decode.tasks=[audio]", gone, "model.projector.hidden=20"])


def test_a_file_is_transcribed_by_the_task_it_fits(all_tasks: Path, tmp_path: Path) -> None:
    both, mute = clip(tmp_path / "both.mp4"), clip(tmp_path / "mute.mp4", sound=False)
    wave = tmp_path / "sound.wav"
    soundfile.write(str(wave), 0.3 * np.sin(np.arange(9600) / 9), 16_000)
    large, short = clip(tmp_path / "face.mp4", side=320), clip(tmp_path / "short.mp4", 3)
    files = [str(path) for path in (both, mute, wave, large, short)]
    wanted = {
        "audio": [None, "mute.mp4 has no sound track", None, None, None],
        "video": [None, None, "sound.wav' has no video", "320x320", None],
        "audiovisual": [None, "mute.mp4 has no sound track", "sound.wav' has no video", "320x320", None],
    }
    for task, expected in wanted.items():
        # the first of several tasks is the one that is used; the others ask for nothing
        given = [f"decode.tasks=[{task},audiovisual]", "data.min_seconds=0.01"]
        found = list(transcribe_files(all_tasks, files, given))
        assert [name for name, _ in found] == files
        for (_, got), part in zip(found, expected, strict=True):
            if part is None:
                assert isinstance(got, str), got
            else:
                assert isinstance(got, UserError) and part in str(got)


@pytest.mark.parametrize("task", ["audiovisual", "fused"])
def test_clips_that_do_not_fit_are_named_or_skipped(
    av_recipe: Recipe, run: Run, tmp_path: Path, task: str, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = av_recipe(tmp_path, task, **{"training.steps": 1})
    rows = read_manifest(tmp_path / "corpus" / "train" / "manifest.jsonl")
    assert rows[1].audio is not None and rows[2].video is not None and rows[3].video is not None
    soundfile.write(str(rows[1].audio), 0.3 * np.sin(np.arange(16_000) / 9), 16_000)  # 1 s of sound, 0.6 s of video
    rows[2].video.write_bytes(b"broken")
    clip(rows[3].video, 15, side=256)
    with pytest.raises(UserError) as caught:
        run(recipe)
    message = str(caught.value)
    for part in (
        "3 of 8",
        "data.on_bad=skip",
        "1.00 s and the video 0.60 s",
        str(rows[2].video),
        "256x256",
        ":2:",
        ":4:",
    ):
        assert part in message
    with caplog.at_level("WARNING", logger="avsr"):
        folder = run(recipe, "data.on_bad=skip")
    assert "skipped 3 of " in caplog.text and len(read_metrics(folder)) == 1


def test_a_wrong_corpus_for_the_task(
    av_recipe: Recipe, run: Run, make_corpus: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = av_recipe(tmp_path, "video")
    sound = make_corpus(tmp_path / "sound", 3)
    with pytest.raises(UserError, match="3 of 3 utterances cannot be used(.|\n)*'u000' has no video"):
        run(recipe, f"data.train={sound}")
    mute = make_corpus(tmp_path / "mute", 3, video="alone")
    with pytest.raises(UserError, match="3 of 3(.|\n)*u000.mp4 has no sound track"):
        run(recipe, f"data.train={mute}", "model.task=audio")
    whole = make_corpus(tmp_path / "whole", 8, video="with sound")
    assert len(read_metrics(run(recipe, f"data.train={whole}", "model.task=audiovisual", "training.steps=1"))) == 1


def test_lora_on_the_mouths_encoder_trains_and_comes_back(
    av_recipe: Recipe, run: Run, stop: Callable[..., int], weights: Callable[..., Any], tmp_path: Path
) -> None:
    """With loader processes, noise and everything drawn anew; interrupted and resumed it is the same run."""
    settings = {**LORA, **ALL_ON, "data.cache": None, "data.workers": 2, "training.steps": 6, "training.utterances": 2}
    recipe = av_recipe(tmp_path, "audiovisual", **settings)
    whole = run(recipe, f"run={tmp_path / 'whole'}")
    stop(3, recipe, f"run={tmp_path / 'parts'}", number=signal.SIGINT)
    parts = run(recipe, f"run={tmp_path / 'parts'}", "resume=true", "data.workers=0")
    one, other = read_metrics(whole), read_metrics(parts)
    # the same numbers up to the stop, the same clips and tasks after it
    assert [row["tokens"] for row in other] == [row["tokens"] for row in one]
    assert [row["ce"] for row in other[:3]] == pytest.approx([row["ce"] for row in one[:3]], rel=1e-5)
    saved = weights(whole)
    adapters = {name: tensor for name, tensor in saved.items() if name.startswith("encoders.video.")}
    assert len(adapters) == 2 * 2 * 2 and all("lora_" in name for name in adapters)
    assert all(tensor.any() for name, tensor in adapters.items() if "lora_B" in name)  # it learned something
    assert not any(name.startswith("encoders.audio") for name in saved)
    scores = evaluate(whole, ["decode.tasks=[video,audiovisual]"])
    assert len(scores) == 4
    with pytest.raises(UserError, match=r"encoders\.video\..*model\.video\.encoder\.lora\.rank: 0 != 2"):
        evaluate(whole, ["model.video.encoder.lora.rank=0"])


def test_bad_input_met_in_a_loader_process_is_one_message(av_recipe: Recipe, run: Run, tmp_path: Path) -> None:
    """A clip that goes away between the check and the training."""
    recipe = av_recipe(tmp_path, "video", **{"data.cache": None, "data.workers": 1})
    (tmp_path / "corpus").rename(tmp_path / "real")
    (tmp_path / "corpus").symlink_to(tmp_path / "real")
    attach = train_module.attach

    def take_away(*arguments: Any) -> None:
        attach(*arguments)
        for path in (tmp_path / "real" / "train").glob("*.mp4"):
            path.unlink()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_module, "attach", take_away)
        with pytest.raises(UserError) as caught:
            run(recipe)
    assert "Traceback" not in str(caught.value) and "there is no file" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_wavlm_without_a_cache_transcribes(tiny_recipe: Recipe, run: Run, tiny_wavlm: Path, tmp_path: Path) -> None:
    """Its inputs are samples, of which a clip has many more than the language model has positions."""
    settings = {"model.audio.encoder": {"kind": "wavlm", "name": str(tiny_wavlm)}, "data.cache": None}
    folder = run(tiny_recipe(tmp_path, **settings, **{"training.steps": 1}))
    wave = tmp_path / "sound.wav"
    soundfile.write(str(wave), 0.3 * np.sin(np.arange(16_000) / 9), 16_000)
    ((_, text),) = transcribe_files(folder, [str(wave)], [])
    assert isinstance(text, str)


def test_weights_of_tasks_are_met(av_recipe: Recipe, tmp_path: Path) -> None:
    config = load_config(str(av_recipe(tmp_path, "audiovisual")))
    store = build_store(config, torch.device("cpu"))
    weights = {"audio": 1.0, "video": 3.0, "audiovisual": 0.0}
    reading = Reading("audiovisual", tasks=weights, seed=5)
    data = load_dataset(config.data.train, config.data, store, list, title="x", reading=reading)
    drawn = [reading.pick(data.utterances[i], epoch)[1] for i in range(8) for epoch in range(100)]
    assert drawn.count("video") / len(drawn) == pytest.approx(0.75, abs=0.05) and "audiovisual" not in drawn
    assert data[(2, 7)].task == data[(2, 7)].task == reading.pick(data.utterances[2], 7)[1]
    assert set(data[(2, 7)].features) == {data[(2, 7)].task}
    assert data[2].task == "audiovisual" and set(data[2].features) == {"audio", "video"}  # not drawn: validation
