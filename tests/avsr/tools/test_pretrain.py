"""Pre-training of the visual encoder on clips with known times."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from avsr.config import EncoderConfig
from avsr.data.clip import Clip
from avsr.data.manifest import write_manifest
from avsr.data.video import read_video, write_video
from avsr.errors import UserError
from avsr.models.visual import VisualConfig, VisualEncoder, load_visual
from avsr.tools.corpora.synth.espeak import Span
from avsr.tools.lipreader.augment import FaceAugmentConfig, augment
from avsr.tools.lipreader.pretrain import PretrainConfig, best_path, evaluate_visual, pretrain
from avsr.tools.lipreader.timed import TimedClip, load_timed, vocabulary
from avsr.training.metrics import read_metrics

pytestmark = pytest.mark.integration

# A word is a bar at its own place for as long as it is said; an eSpeak phoneme goes with it.
WORDS = {"bin": ("b", 16), "lay": ("l", 32), "set": ("s", 48), "now": ("n", 64)}
TINY = VisualConfig(pool=8, channels=[8, 8, 8], width=24, hidden=12, layers=1, dropout=0.0)
STILL = FaceAugmentConfig(shift=0.0, zoom=0.0, turn=0.0, gamma=0.0, flip=0.0)


def write_corpus(folder: Path, name: str, count: int, seed: int, **changes: Any) -> Path:
    """``count`` clips of three bars each with their times; ``changes`` go into every row."""
    draw = np.random.default_rng(seed)
    for kind in ("video", "times"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(count):
        said = [str(word) for word in draw.choice(list(WORDS), 3, replace=False)]
        bounds = np.cumsum(draw.integers(3, 7, 4)) / 25
        duration = float(bounds[-1] + 0.08)
        frames = draw.normal(90, 4, (round(duration * 25), 96, 96))
        spans = {"words": [], "phonemes": []}
        for word, start, end in zip(said, bounds, bounds[1:], strict=False):
            sound, place = WORDS[word]
            frames[round(start * 25) : round(end * 25), place : place + 12, 20:76] += 100
            spans["words"].append([word, start, end])
            spans["phonemes"].append([sound, start, end])
        key = f"{name}_{index}"
        write_video(folder / "video" / f"{key}.mp4", frames.clip(0, 255).astype(np.uint8))
        (folder / "times" / f"{key}.json").write_text(json.dumps(spans))
        row = {
            "id": key,
            "audio": f"audio/{key}.wav",
            "video": f"video/{key}.mp4",
            "times": f"times/{key}.json",
            "text": " ".join(said),
            "duration": duration,
        }
        rows.append({**row, **changes})
    write_manifest(folder / f"{name}.jsonl", rows)
    return folder / f"{name}.jsonl"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("bars")
    return {name: str(write_corpus(folder, name, count, count)) for name, count in (("train", 24), ("validation", 10))}


def make_config(corpus: dict[str, str], run: Path, **changes: Any) -> PretrainConfig:
    values: dict[str, Any] = {
        "run": str(run),
        **corpus,
        "model": TINY,
        "augment": STILL,
        "steps": 60,
        "batch": 8,
        "warmup": 5,
        "learning_rate": 1e-2,
        "validate_every": 30,
    }
    config = PretrainConfig(**{**values, **changes})
    config.log.tensorboard = False
    return config


@pytest.fixture(scope="module")
def run(corpus: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "visual"
    return pretrain(make_config(corpus, folder, test={"again": corpus["validation"]}))


def test_it_learns_new_clips(run: Path) -> None:
    measured = json.loads((run / "metrics.json").read_text())
    assert measured["again"] == measured["validation"]
    assert measured["validation"]["clips"] == 10
    assert measured["validation"]["unit_error"] < 0.1
    assert measured["validation"]["unit_accuracy"] > 0.85  # always "none" would get about 0.4
    assert measured["validation"]["viseme_accuracy"] > 0.85
    rows = read_metrics(run)
    assert [row["step"] for row in rows] == list(range(1, 61))
    assert rows[-1]["unit_loss"] < 0.25 * rows[0]["unit_loss"]
    assert rows[-1]["ctc_loss"] < 0.5 * rows[0]["ctc_loss"]
    assert rows[-1]["validation_unit_error"] == measured["validation"]["unit_error"]
    assert "validation_unit_error" in rows[29] and "validation_unit_error" not in rows[28]


def test_the_encoder_loads_it_and_gives_standard_features(run: Path, corpus: dict[str, str]) -> None:
    encoder = VisualEncoder(EncoderConfig(name=str(run)))
    folder = Path(corpus["train"]).parent
    clips = [Clip(None, read_video(path)) for path in sorted((folder / "video").glob("train_*.mp4"))]
    features = torch.cat(encoder.encode(clips))
    torch.testing.assert_close(features.mean(0), torch.zeros(24), atol=0.02, rtol=0)
    torch.testing.assert_close(features.std(0), torch.ones(24), atol=0.02, rtol=0)


def test_what_is_measured_is_what_the_encoder_computes(run: Path, corpus: dict[str, str]) -> None:
    """The reduced frames in memory and the encoder's own way from the file are one."""
    model = load_visual(run)
    clips = load_timed(corpus["validation"], targets="words", pool=8)
    encoder = VisualEncoder(EncoderConfig(name=str(run)))
    folder = Path(corpus["validation"]).parent
    heads = model.unit_head
    right = total = 0
    for index, clip in enumerate(clips):
        features = encoder.encode([Clip(None, read_video(folder / "video" / f"validation_{index}.mp4"))])[0]
        with torch.no_grad():
            guess = heads(features / model.feature_scale + model.feature_mean).argmax(-1)
        labels = clip.labels({name: number for number, name in enumerate(model.units, 1)})
        right, total = right + int((guess == labels).sum()), total + len(labels)
    assert evaluate_visual(model, clips)["unit_accuracy"] == pytest.approx(right / total, abs=0.02)


def test_a_seed_repeats_the_weights(corpus: dict[str, str], tmp_path: Path) -> None:
    runs = [
        pretrain(make_config(corpus, tmp_path / name, steps=3, augment=FaceAugmentConfig(hide=0.3), seed=seed))
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    first, second, third = ((path / "model.safetensors").read_bytes() for path in runs)
    assert first == second != third


@pytest.mark.parametrize(("targets", "units"), [("phonemes", ("b", "l", "n", "s")), ("visemes", None)])
def test_other_targets(targets: str, units: tuple[str, ...] | None, corpus: dict[str, str], tmp_path: Path) -> None:
    folder = pretrain(make_config(corpus, tmp_path / "run", steps=2, targets=targets))
    model = load_visual(folder)
    assert units is None or model.units == units
    assert set(model.units) <= set(model.visemes) or targets == "phonemes"
    assert "rest" not in model.units and len(model.units) >= 3


def test_a_frame_belongs_to_the_span_over_its_middle() -> None:
    clip = TimedClip(
        torch.zeros(8, 12, 12, dtype=torch.uint8),
        torch.zeros(8, dtype=torch.int64),
        (Span("a", 0.021, 0.099), Span("b", 0.099, 0.2), Span("x", 0.24, 0.281)),
        "a b x",
    )
    # the middles are at 0.02, 0.06, 0.10, ... s
    assert clip.labels({"a": 1, "b": 2}).tolist() == [0, 1, 2, 2, 2, 0, -100, 0]


def test_vocabulary_is_sorted_and_bounded() -> None:
    def clip(words: list[str]) -> TimedClip:
        return TimedClip(torch.zeros(1), torch.zeros(1), tuple(Span(word, 0.0, 0.1) for word in words), "")

    assert vocabulary([clip(["b", "a"]), clip(["a", "c"])]) == ["a", "b", "c"]
    with pytest.raises(UserError, match="1001 different words"):
        vocabulary([clip([f"w{index}" for index in range(1001)])])


@pytest.mark.parametrize("seed", range(5))
def test_best_path(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    scores = torch.randn(5, 3, generator=draw, dtype=torch.float64)

    def value(path: tuple[int, ...]) -> float:
        changes = sum(here != there for here, there in zip(path, path[1:], strict=False))
        return float(scores[torch.arange(5), torch.tensor(path)].sum()) - 0.7 * changes

    best = max(np.ndindex(3, 3, 3, 3, 3), key=value)
    assert tuple(best_path(scores, switch=0.7).tolist()) == best
    assert len(set(best_path(scores, switch=1e3).tolist())) == 1


def blob(x: float, y: float, size: int = 24) -> torch.Tensor:
    """(3, size, size) uint8 with a spot."""
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    spot = 250 * torch.exp(-((rows - y) ** 2 + (columns - x) ** 2) / 8)
    return spot.to(torch.uint8).expand(3, size, size)


def centre(view: torch.Tensor, side: int = 22) -> tuple[float, float]:
    frame = view[0].view(side, side)
    total = frame.sum()
    return float((frame.sum(0) * torch.arange(side)).sum() / total), float(
        (frame.sum(1) * torch.arange(side)).sum() / total
    )


def test_no_augmentation_is_the_middle_of_the_frame() -> None:
    clip = torch.randint(0, 256, (4, 24, 24), dtype=torch.uint8)
    view = augment([clip], 22, 4, STILL, torch.Generator())[0]
    torch.testing.assert_close(view.view(4, 22, 22), clip[:, 1:-1, 1:-1].float(), atol=1e-2, rtol=1e-4)


def test_each_augmentation_does_what_it_says() -> None:
    draw = torch.Generator().manual_seed(0)
    clip = blob(15.0, 8.0)  # 14, 7 in the view; its middle is 10.5

    def centres(**settings: float) -> np.ndarray:
        config = FaceAugmentConfig(**{**vars(STILL), **settings})
        return np.array([centre(augment([clip], 22, 4, config, draw)[0]) for _ in range(60)])

    flipped = centres(flip=1.0)
    assert flipped == pytest.approx(np.tile([21 - 14.0, 7.0], (60, 1)), abs=0.1)
    shifted = centres(shift=8.0) - [14.0, 7.0]
    assert 1.6 < np.abs(shifted).max() <= 2.1  # 8 pixels are 2 of the averaged ones
    zoomed = (centres(zoom=0.1) - 10.5) / [3.5, -3.5]
    assert zoomed.min() > 0.8 and zoomed.max() < 1.27 and zoomed.std() > 0.03
    offset = centres(turn=30.0) - 10.5
    angles = np.degrees(np.arctan2(offset[:, 1], offset[:, 0])) + 45
    assert 20 < np.abs(angles).max() < 32
    assert np.hypot(*offset.T) == pytest.approx(3.5 * 2**0.5, abs=0.15)  # a rotation changes no distance


def test_gamma_and_hiding() -> None:
    draw = torch.Generator().manual_seed(0)
    clip = torch.full((10, 24, 24), 64, dtype=torch.uint8)
    clip[:5] = 128
    values = [augment([clip], 22, 4, FaceAugmentConfig(**{**vars(STILL), "gamma": 0.5}), draw)[0] for _ in range(50)]
    powers = [float((view[0, 0] / 255).log() / torch.tensor(128 / 255).log()) for view in values]
    assert np.log(powers).std() == pytest.approx(0.5, abs=0.15)
    hidden = []
    for _ in range(50):
        view = augment([clip], 22, 4, FaceAugmentConfig(**{**vars(STILL), "hide": 0.5}), draw)[0]
        gone = (view - 96).abs().amax(1) < 0.1
        hidden.append(int(gone.sum()))
        assert not gone.any() or gone.nonzero().max() - gone.nonzero().min() == gone.sum() - 1
    assert max(hidden) == 4 and min(hidden) == 0


@pytest.mark.parametrize(
    ("changes", "times", "message"),
    [
        ({"video": None}, None, r"bad\.jsonl:1: bad_0 has no video"),
        ({"times": None}, None, r"bad\.jsonl:1: bad_0 has no times"),
        ({"times": "times/none.json"}, None, r"none\.json: expected the times"),
        ({"duration": 3.0}, None, "frames, and the duration of 3 s makes 75"),
        ({"text": "bin blue"}, None, "the text is 'bin blue'"),
        ({"video": "times/bad_0.json"}, None, r"bad_0\.json"),
        ({}, {"words": [], "phonemes": [["b", 0.0, 0.1]]}, "there are no words"),
        ({}, {"words": [["bin", 0.3, 0.1]], "phonemes": [["b", 0.0, 0.1]]}, "words in order"),
        ({}, {"words": [["bin", 0.0, 9.0]], "phonemes": [["b", 0.0, 0.1]]}, "words in order"),
        ({}, {"words": [["bin", 0.0]]}, "expected the times"),
        ({}, [1], "expected the times"),
    ],
)
def test_bad_rows_and_times_are_refused(changes: dict[str, Any], times: Any, message: str, tmp_path: Path) -> None:
    manifest = write_corpus(tmp_path, "bad", 1, 0, **changes)
    if times is not None:
        (tmp_path / "times" / "bad_0.json").write_text(json.dumps(times))
    with pytest.raises(UserError, match=message):
        load_timed(str(manifest), targets="words", pool=8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": "letters"}, "targets: expected one of words, phonemes, visemes"),
        ({"steps": 0}, "steps: expected at least 1"),
        ({"learning_rate": 0.0}, "learning_rate: expected more than 0"),
        ({"ctc": -1.0}, "ctc: expected at least 0"),
        ({"model": VisualConfig(pool=3)}, r"model\.pool"),
        ({"model": VisualConfig(channels=[4, 8, 8])}, r"model\.channels: expected at least 8 each"),
        ({"augment": FaceAugmentConfig(flip=2.0)}, r"augment\.flip"),
        ({"train": "nowhere.jsonl"}, "nowhere"),
    ],
)
def test_bad_settings_are_refused(
    changes: dict[str, Any], message: str, corpus: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        pretrain(make_config(corpus, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_a_finished_run_is_not_overwritten(run: Path, corpus: dict[str, str]) -> None:
    with pytest.raises(UserError, match="holds a trained model already"):
        pretrain(make_config(corpus, run, seed=9))


def test_a_training_that_was_stopped_begins_again(run: Path, corpus: dict[str, str], tmp_path: Path) -> None:
    """Its weights are there since the first validation."""
    again = shutil.copytree(run, tmp_path / "again")
    config = OmegaConf.to_object(OmegaConf.merge(PretrainConfig, OmegaConf.load(again / "pretrain.yaml")))
    config.run = str(again)
    (again / "metrics.json").unlink()
    (again / "model.safetensors").write_bytes(b"of the first validation")
    assert pretrain(config) == again
    assert (again / "model.safetensors").read_bytes() == (run / "model.safetensors").read_bytes()
    assert (again / "metrics.json").read_bytes() == (run / "metrics.json").read_bytes()
